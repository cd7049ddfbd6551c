"""How well edits work, in numbers.

    python -m sega_jax.demo.evaluate.diffusion FOLDER
    python -m sega_jax.demo.evaluate.diffusion FOLDER --seeds 8 --batch 16 --words glasses,smile --studies edits   # on
    a CPU

writes results.json (a list of measurements for each study) and picture grids; `sega_jax.demo.evaluate.report` makes
tables and
plots of them. An edit is counted by the judge on the seeds that lack the word (to add it) or have it (to remove it),
against the same seed without an edit; what is removed must be gone, not replaced by another of its kind, so that
every method removes the others of the kind with it (sunglasses with glasses). Its rivals start from the same noise:

    prompt       the word is added to the prompt
    negative     the words are the negative prompt (to remove them)
    conjunction  more terms of classifier-free guidance, without threshold, warm-up and momentum (Liu et al. 2022)
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import click
import jax
import numpy as np
import scipy.stats
from PIL import Image

import sega_jax
from sega_jax.demo import settings
from sega_jax.demo.attributes import WORDS, kind
from sega_jax.demo.evaluate.studio import NAMES, Effect, Prints, Shot, Studio, effect, having, interval, lacking, phrase
from sega_jax.demo.judge import load_judge
from sega_jax.method.guidance import SEMANTICS, SUPPORTS, Edit
from sega_jax.pipelines import png
from sega_jax.pipelines.loading import DEMO
from sega_jax.pipelines.progress import plainly

PROMPT = "a portrait of a person"
# From little to much, and with words that edits contradict.
PROMPTS = (
    PROMPT,
    "a portrait of a man",
    "a portrait of a woman with brown hair",
    "an avatar of a person wearing a blue hoodie",
    "a cartoon of a person with long hair and glasses on a green background",
    "a drawing of a pale woman in red clothes",
    "a picture of a smiling man with a beard and a hat",
    "black jacket, yellow background",
)
# One word of each attribute; any of them may be asked for together, but hair below a hat.
TEN = (
    "glasses", "smile", "beard", "long hair", "red hair", "hat", "dark skin", "hoodie", "red clothes",
    "blue background",
)  # fmt: skip
ACTIONS = ("add", "remove")
METHODS = {"add": ("sega", "conjunction", "prompt"), "remove": ("sega", "conjunction", "negative")}
STRENGTHS = {
    "sega": (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 20.0),
    "conjunction": (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    "prompt": (1.5, 2.0, 3.0, 4.0, 6.0),
    "negative": (1.5, 2.0, 3.0, 4.0, 6.0, 8.0),
}
TOLD = {"sega": (5.0, 8.0, 12.0)}
RANGE = (-12, -8, -6, -4, -2, 0, 2, 4, 6, 8, 12)
ABLATIONS: Mapping[str, Sequence[Any]] = {
    "scale": (1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 20.0),
    "threshold": (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99),
    "warmup": (0, 2, 4, 6, 8, 10, 14),
    "cooldown": (10, 12, 14, 16, None),
    "momentum_scale": (0.0, 0.1, 0.2, 0.4, 0.6, 0.8),
    "momentum_beta": (0.0, 0.2, 0.4, 0.6, 0.8),
}

Measurement = dict[str, Any]
Base = tuple[list[Shot], Prints]


class Job(NamedTuple):
    """One cell of a table: what it is called, and how shots are edited by which word."""

    labels: Measurement
    word: str
    action: str  # "add" or "remove"
    how: Callable[[Shot], Shot]


def measured(found: Effect) -> Measurement:
    """Averages of pictures, the success with its confidence interval."""
    n = len(found.success)
    low, high = interval(int(found.success.sum()), n)
    averages = {name: float(values.mean()) if n else None for name, values in found._asdict().items()}
    return {"n": n, "low": low, "high": high} | averages


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The studies; each yields measurements.

    Attributes:
        seeds: the most pictures of a cell in the main table; other studies take a share.
        words: that are edited.
        first_seed: of the pictures; the recommended settings were chosen on the seeds below 1000.
    """

    studio: Studio
    folder: Path
    seeds: int
    words: tuple[str, ...]
    first_seed: int = 1000

    module: ClassVar[str] = "sega_jax.demo.evaluate.diffusion"

    @property
    def ten(self) -> tuple[str, ...]:
        """The words of the smaller studies."""
        return tuple(word for word in TEN if word in self.words) or self.words[:10]

    def share(self, part: int) -> int:
        return max(self.seeds // part, 4)

    def base(self, prompt: str = PROMPT, count: int | None = None, guidance_scale: float | None = None) -> Base:
        """Pictures without edits of the seeds from `first_seed` on; four times as many as are edited at most, since a
        word of seven colours is true of a seventh of them."""
        count = max(4 * self.seeds, 32) if count is None else count
        shots = [Shot(prompt, self.first_seed + i, guidance_scale=guidance_scale) for i in range(count)]
        return shots, self.studio(shots)

    def compare(self, base: Base, jobs: Iterable[Job], most: int, **options: Any) -> list[Measurement]:
        """What each job does to the first `most` pictures that lack its word, or have it."""
        (shots, before), jobs = base, list(jobs)
        test = {"add": lacking, "remove": having}
        chosen = [np.flatnonzero(test[job.action](before, job.word))[:most] for job in jobs]
        after = self.studio(
            [job.how(shots[i]) for job, part in zip(jobs, chosen, strict=True) for i in part], **options
        )
        ends = np.cumsum([len(part) for part in chosen])
        return [
            job.labels
            | {"word": job.word, "action": job.action}
            | measured(
                effect(
                    before[part], after[end - len(part) : end], [[job.word]] * len(part), removed=job.action == "remove"
                )
            )
            for job, part, end in zip(jobs, chosen, ends, strict=True)
        ]

    def edits(self) -> list[Measurement]:
        """Every word, added and removed, by every method."""
        jobs = [
            Job({"method": method}, word, action, way(method, word, action))
            for word in self.words
            for action in ACTIONS
            for method in METHODS[action]
        ]
        return self.compare(self.base(), jobs, self.seeds)

    def several(self) -> list[Measurement]:
        """One to five words at once, all absent before; per seed drawn from the ten."""
        shots, before = self.base(count=self.seeds)
        rng = np.random.default_rng(0)
        absent = np.stack([lacking(before, word) for word in self.ten], 1)
        orders = [compatible([self.ten[i] for i in rng.permutation(len(self.ten)) if row[i]]) for row in absent]
        results = []
        for count in range(1, 6):
            chosen = [i for i, words in enumerate(orders) if len(words) >= count]
            if not chosen:
                continue
            words = [orders[i][:count] for i in chosen]
            # Five concepts in every row, some of no weight, so that one program serves all.
            idle = (Edit("", weight=0.0, warmup=0),) * (5 - count)
            rows = [
                shots[i]._replace(edits=(*map(settings.add, row), *idle)) for i, row in zip(chosen, words, strict=True)
            ]
            after = self.studio(rows)
            each = [after.verdict.words[k, NAMES.index(word)] for k, row in enumerate(words) for word in row]
            found = measured(effect(before[np.array(chosen)], after, words))
            results.append({"count": count, "each": float(np.mean(each))} | found)
        return results

    def curves(self) -> list[Measurement]:
        """Success and isolation over the strength of every method. That of a prompt is the guidance scale: its
        pictures are compared with those of the same guidance scale."""
        base, results = self.base(), []
        for action in ACTIONS:
            for method in METHODS[action]:
                for value in STRENGTHS[method]:
                    scaled = method in ("prompt", "negative") and value != self.studio.call["guidance_scale"]
                    own = self.base(guidance_scale=value) if scaled else base
                    how = [(word, way(method, word, action, value)) for word in self.ten]
                    jobs = [Job({"method": method, "value": value}, word, action, one) for word, one in how]
                    results += self.compare(own, jobs, self.share(8))
        return results

    def monotonicity(self) -> list[Measurement]:
        """The probability of a word against the scale, negative ones too, at the other settings of adding."""
        few = self.share(8)
        shots = [Shot(PROMPT, self.first_seed + i) for i in range(few)]
        rows = [
            shot._replace(edits=(settings.add(word, scale=float(scale)),))
            for word in self.ten
            for scale in RANGE
            for shot in shots
        ]
        chances = self.studio(rows).verdict.probability.reshape(len(self.ten), len(RANGE), few, len(NAMES))
        results = []
        for word, chance in zip(self.ten, chances, strict=True):
            chance = chance[..., NAMES.index(word)]
            mean = chance.mean(1)
            # Of one seed the probability is often 0 or 1 for several scales: ties make its correlation smaller, and
            # where it never moves there is none, which counts as 0.
            each = [_correlation(chance[:, i]) for i in range(few)]
            found = {"scales": list(RANGE), "probability": mean.tolist(), "n": few}
            results.append({"word": word, "correlation": _correlation(mean), "of_seeds": float(np.mean(each))} | found)
        return results

    def robustness(self) -> list[Measurement]:
        """The same edits from other prompts."""
        results = []
        for prompt in PROMPTS:
            jobs = [Job({"prompt": prompt}, word, "add", way("sega", word, "add")) for word in self.ten]
            results += self.compare(self.base(prompt, self.seeds), jobs, self.share(8))
        return results

    def told(self) -> list[Measurement]:
        """Removing what the prompt itself says, which takes more strength."""
        results = []
        for word in self.ten:
            base = self.base(f"{PROMPT} {phrase(word)}", self.share(4))
            jobs = [
                Job({"method": method, "value": value}, word, "remove", way(method, word, "remove", value))
                for method in METHODS["remove"]
                for value in TOLD.get(method, (self.studio.call["guidance_scale"],))
            ]
            results += self.compare(base, jobs, self.share(4))
        return results

    def uniqueness(self) -> list[Measurement]:
        """Guidance recorded on one picture and replayed on others."""
        base = shots, before = self.base()
        results = []
        for word in self.ten:
            if not lacking(before, word).any():
                continue
            source = shots[np.flatnonzero(lacking(before, word))[-1]]
            options = {"seed": source.seed, "output": "latent", "progress": False, "record": True}
            record = self.studio.pipe(source.prompt, settings.add(word), **self.studio.call, **options).record
            job = Job({}, word, "add", lambda shot: shot)
            results += self.compare(base, [job], self.share(8), replay=record.sem_guidance)
        return results

    def ablations(self) -> list[Measurement]:
        """One setting at a time, the others as recommended; a picture grid each."""
        base = self.base()
        results = []
        for setting, values in ABLATIONS.items():
            jobs = [
                Job({"setting": setting, "value": value}, word, action, way("sega", word, action, **{setting: value}))
                for action in ACTIONS
                for value in values
                for word in self.ten
            ]
            results += self.compare(base, jobs, self.share(16))
            self.grid(base, setting, values)
        return results

    def grid(self, base: Base, setting: str, values: Sequence[Any]) -> None:
        """Pictures over the values of a setting, a row for each of three words."""
        shots, before = base
        made, captions = [], []
        for word in self.ten[:3]:
            if not lacking(before, word).any():
                continue
            shot = shots[np.flatnonzero(lacking(before, word))[0]]
            rows = [shot, *(way("sega", word, "add", **{setting: value})(shot) for value in values)]
            made += map(Image.fromarray, self.studio(rows).pictures)
            captions += ["no edit", *(f"{word}, {setting} {value}" for value in values)]
        png.sheet(made, captions, columns=1 + len(values)).save(self.folder / f"{setting}.png")

    def variants(self) -> list[Measurement]:
        """The three supports of the threshold, and both semantics where concepts have clocks of their own."""
        base = shots, before = self.base()
        results = []
        for support in SUPPORTS:
            jobs = [Job({"support": support}, word, "add", way("sega", word, "add")) for word in self.ten]
            results += self.compare(base, jobs, self.share(8), support=support)
        words = self.ten[:3]
        chosen = np.flatnonzero(np.all([lacking(before, word) for word in words], 0))[: self.share(2)]
        for semantics in SEMANTICS if len(chosen) else ():
            edits = tuple(settings.add(word, warmup=4 + 4 * i) for i, word in enumerate(words))
            after = self.studio([shots[i]._replace(edits=edits) for i in chosen], semantics=semantics)
            found = measured(effect(before[chosen], after, [words] * len(chosen)))
            results.append({"semantics": semantics, "words": list(words)} | found)
        return results

    def prompts(self) -> list[Measurement]:
        """Whether plain prompts are followed."""
        count = self.share(2)
        seeds = range(self.first_seed, self.first_seed + count)
        shots = [Shot(f"{PROMPT} {phrase(word)}", seed) for word in self.words for seed in seeds]
        verdict = self.studio(shots).verdict.words.reshape(len(self.words), count, len(NAMES))
        results = []
        for word, seen in zip(self.words, verdict, strict=True):
            success = seen[:, NAMES.index(word)]
            low, high = interval(int(success.sum()), count)
            results.append({"word": word, "n": count, "success": float(success.mean()), "low": low, "high": high})
        return results


def way(method: str, word: str, action: str, value: float | None = None, **changed: Any) -> Callable[[Shot], Shot]:
    """How a method edits a shot; `value` is its strength, by default the recommended one.

    changed: settings of SEGA's edit other than the recommended; scales are positive.
    """
    sign = 1 if action == "add" else -1
    if method == "prompt":
        return lambda shot: shot._replace(prompt=f"{shot.prompt} {phrase(word)}", guidance_scale=value)
    words = (word,) if action == "add" else kind(word)
    if method == "negative":
        return lambda shot: shot._replace(negative=", ".join(words), guidance_scale=value)
    if method == "conjunction":
        scale = sign * (settings.CALL["guidance_scale"] if value is None else value)
        edits = [Edit(one, scale=scale, threshold=0, warmup=0, momentum_scale=0) for one in words]
    else:
        scale = changed.pop("scale", value)
        changed |= {} if scale is None else {"scale": sign * scale}
        edits = [(settings.add if action == "add" else settings.remove)(one, **changed) for one in words]
    return lambda shot: shot._replace(edits=tuple(edits))


def _correlation(chances: np.ndarray) -> float:
    """Spearman's, of probabilities over `RANGE`; 0 where they are all the same."""
    return float(scipy.stats.spearmanr(RANGE, chances).statistic) if np.ptp(chances) else 0.0


def compatible(words: Sequence[str]) -> list[str]:
    """Without hats where hair comes first, or without hair, since hats hide it."""
    covered = "hair", "hair colour"
    first = next((WORDS[word][0] for word in words if WORDS[word][0] in ("hat", *covered)), "hat")
    return [word for word in words if WORDS[word][0] not in (covered if first == "hat" else ("hat",))]


def known(option: str, text: str, names: Iterable[str]) -> tuple[str, ...]:
    """What an option of the shell names, separated by commas."""
    values, names = tuple(text.split(",")), list(names)
    if unknown := [value for value in values if value not in names]:
        raise click.BadParameter(f"{', '.join(unknown)} should be of {', '.join(names)}", param_hint=option)
    return values


def run(evaluation: Evaluation, studies: Iterable[str], about: Measurement) -> None:
    """Writes what studies find into results.json, beside those that are there."""
    pipe, folder = evaluation.studio.pipe, evaluation.folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    about = about | {
        "module": evaluation.module,
        "seeds": evaluation.seeds,
        "first_seed": evaluation.first_seed,
        "words": evaluation.words,
        "dtype": pipe.dtype.name,
        "jax": jax.__version__,
        "device": pipe.devices.devices[0].device_kind,
        "sega_jax": sega_jax.__version__,
    }
    for study in studies:
        began = time.perf_counter()
        results[study] = {"about": about, "found": getattr(evaluation, study)()}
        # After each study, so that an interruption loses one at most, and whole or not at all.
        (folder / "results.part").write_text(json.dumps(results, indent=1) + "\n")
        (folder / "results.part").replace(path)
        click.echo(f"{study}: {time.perf_counter() - began:.0f} s")


STUDIES = (
    "edits", "several", "curves", "monotonicity", "robustness", "told", "prompts", "uniqueness", "ablations",
    "variants",
)  # fmt: skip


@click.command(context_settings={"show_default": True})
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--model", default=str(DEMO), show_default="the demo model", help="A checkpoint of portraits.")
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=256,
    help="The most pictures of a cell of the main table; other studies take a share.",
)
@click.option(
    "--first-seed",
    type=click.IntRange(0),
    default=Evaluation.first_seed,
    help="Of the pictures; settings were chosen on those below 1000.",
)
@click.option("--words", default=",".join(WORDS), show_default="all", help="That are edited.")
@click.option("--studies", default=",".join(STUDIES))
@click.option("--batch", type=click.IntRange(1), default=256, help="Pictures at once; fewer on a CPU.")
@click.option("--dtype", help="Of the networks.  [default: float32 on a CPU, else bfloat16]")
def main(
    folder: Path,
    model: str,
    seeds: int,
    first_seed: int,
    words: str,
    studies: str,
    batch: int,
    dtype: str | None,
) -> None:
    """Measures edits and writes results.json and picture grids into FOLDER; studies that are not asked for stay."""
    chosen, asked = known("--words", words, WORDS), known("--studies", studies, STUDIES)
    with plainly():
        pipe = sega_jax.load(model, dtype=dtype)
        if isinstance(pipe, sega_jax.PaellaPipeline):
            raise click.ClickException(f"{model} is a Paella; sega_jax.demo.evaluate.paella is for those")
        evaluation = Evaluation(Studio(pipe, load_judge(), batch), folder, seeds, chosen, first_seed)
        found = {"add": str(settings.add("")), "remove": str(settings.remove("")), "call": settings.CALL}
        run(evaluation, asked, {"model": model, "settings": found})


if __name__ == "__main__":
    main()
