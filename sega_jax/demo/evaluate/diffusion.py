"""Measures how well edits work on the demo model.

    python -m sega_jax.demo.evaluate.diffusion FOLDER
    # on a CPU
    python -m sega_jax.demo.evaluate.diffusion FOLDER --seeds 8 --batch 16 --words glasses,smile --studies edits

The command writes picture grids and results.json, which contains a list of measurements for each study.
`sega_jax.demo.evaluate.report` makes tables and plots from the measurements. Adding a word is tested on seeds whose
pictures lack it, and removing a word on seeds whose pictures show it. The judge classifies the pictures before and
after each edit. Removal succeeds only if no alternative to the word appears, so every method also removes the
alternatives (sunglasses, in the case of glasses). The other methods start from the same noise as semantic guidance:

    prompt       adds the word to the prompt
    negative     puts the words to remove into the negative prompt
    conjunction  adds terms as in classifier-free guidance, without threshold, warm-up or momentum (Liu et al. 2022)
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import click
import numpy as np
import scipy.stats
from PIL import Image

import sega_jax
from sega_jax.demo.attributes import WORDS
from sega_jax.demo.evaluate.evaluation import PROMPT, Evaluation, Job, Originals, options, predicts_tokens, run
from sega_jax.demo.evaluate.measures import NAMES, Measurement, effect, lacking, summary
from sega_jax.demo.evaluate.methods import ACTIONS, METHODS, change_by, phrase
from sega_jax.demo.evaluate.pictures import PictureMaker, Request
from sega_jax.demo.judge import load_judge
from sega_jax.demo.settings import RECOMMENDED
from sega_jax.method.guidance import SEMANTICS, SUPPORTS, Edit
from sega_jax.pipelines import png
from sega_jax.pipelines.loading import DEMO
from sega_jax.pipelines.progress import plainly

# Prompts of several lengths, some with words that the edits contradict.
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
# {method: strengths}, where a strength is the scale of the edits or the guidance scale of the prompts.
STRENGTHS = {
    "sega": (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 20.0),
    "conjunction": (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    "prompt": (1.5, 2.0, 3.0, 4.0, 6.0),
    "negative": (1.5, 2.0, 3.0, 4.0, 6.0, 8.0),
}
# {method: strengths} for removing a word that the prompt names. Other methods use the recommended guidance scale.
TOLD = {"sega": (5.0, 8.0, 12.0)}
SCALES = (-12, -8, -6, -4, -2, 0, 2, 4, 6, 8, 12)
ABLATIONS: Mapping[str, Sequence[Any]] = {
    "scale": (1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 20.0),
    "threshold": (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99),
    "warmup": (0, 2, 4, 6, 8, 10, 14),
    "cooldown": (10, 12, 14, 16, None),
    "momentum_scale": (0.0, 0.1, 0.2, 0.4, 0.6, 0.8),
    "momentum_beta": (0.0, 0.2, 0.4, 0.6, 0.8),
}
STUDIES = (
    "edits", "several", "curves", "monotonicity", "robustness", "told", "prompts", "uniqueness", "ablations",
    "variants",
)  # fmt: skip


class DiffusionEvaluation(Evaluation):
    """The studies for latent diffusion models."""

    module: ClassVar[str] = "sega_jax.demo.evaluate.diffusion"

    def edits(self) -> list[Measurement]:
        """Adds and removes every word with every method."""
        jobs = [
            Job({"method": method}, word, action, change_by(method, word, action))
            for word in self.words
            for action in ACTIONS
            for method in METHODS[action]
        ]
        return self.compare(self.originals(), jobs, self.seeds)

    def several(self) -> list[Measurement]:
        """Adds one to five words at once. For each seed, the words are drawn from the words in `ten` that the seed's
        picture lacks."""
        requests, before = self.originals(count=self.seeds)
        rng = np.random.default_rng(0)
        absent = np.stack([lacking(before, word) for word in self.ten], 1)
        orders = [compatible([self.ten[i] for i in rng.permutation(len(self.ten)) if row[i]]) for row in absent]
        results = []
        for count in range(1, 6):
            chosen = [i for i, words in enumerate(orders) if len(words) >= count]
            if not chosen:
                continue
            words = [orders[i][:count] for i in chosen]
            # Edits of weight 0 pad every row to five edits, so that one program works for any number of words.
            idle = (Edit("", weight=0.0, warmup=0),) * (5 - count)
            rows = [requests[i]._replace(edits=(*map(Edit, row), *idle)) for i, row in zip(chosen, words, strict=True)]
            after = self.maker(rows)
            each = [after.verdict.words[k, NAMES.index(word)] for k, row in enumerate(words) for word in row]
            averages = summary(effect(before[np.array(chosen)], after, words))
            results.append({"count": count, "each": float(np.mean(each))} | averages)
        return results

    def curves(self) -> list[Measurement]:
        """Measures the success of every method, and the share of other attributes that it keeps, at several strengths.

        For prompts and negative prompts, the strength is the guidance scale, and the originals have the same guidance
        scale.
        """
        originals, results = self.originals(), []
        for action in ACTIONS:
            for method in METHODS[action]:
                for value in STRENGTHS[method]:
                    scaled = method in ("prompt", "negative") and value != self.maker.call["guidance_scale"]
                    own = self.originals(guidance_scale=value) if scaled else originals
                    jobs = [
                        Job({"method": method, "value": value}, word, action, change_by(method, word, action, value))
                        for word in self.ten
                    ]
                    results += self.compare(own, jobs, self.share(8))
        return results

    def monotonicity(self) -> list[Measurement]:
        """Correlates the probability of a word with the scale of its edit, from negative to positive scales.

        All other settings are the ones recommended for adding a word.
        """
        few = self.share(8)
        requests = [Request(PROMPT, self.first_seed + i) for i in range(few)]
        rows = [
            request._replace(edits=(Edit(word, scale=float(scale)),))
            for word in self.ten
            for scale in SCALES
            for request in requests
        ]
        chances = self.maker(rows).verdict.probability.reshape(len(self.ten), len(SCALES), few, len(NAMES))
        results = []
        for word, chance in zip(self.ten, chances, strict=True):
            chance = chance[..., NAMES.index(word)]
            mean = chance.mean(1)
            # For a single seed, the probability is often 0 or 1 at several scales, and such ties reduce the
            # correlation.
            each = [_correlation(chance[:, i]) for i in range(few)]
            curve = {"scales": list(SCALES), "probability": mean.tolist(), "n": few}
            results.append({"word": word, "correlation": _correlation(mean), "of_seeds": float(np.mean(each))} | curve)
        return results

    def robustness(self) -> list[Measurement]:
        """Adds the ten words to pictures with other prompts."""
        results = []
        for prompt in PROMPTS:
            jobs = [Job({"prompt": prompt}, word, "add", change_by("sega", word, "add")) for word in self.ten]
            results += self.compare(self.originals(prompt, self.seeds), jobs, self.share(8))
        return results

    def told(self) -> list[Measurement]:
        """Removes words that the prompt names, which requires a greater strength."""
        results = []
        for word in self.ten:
            originals = self.originals(f"{PROMPT} {phrase(word)}", self.share(4))
            jobs = [
                Job({"method": method, "value": value}, word, "remove", change_by(method, word, "remove", value))
                for method in METHODS["remove"]
                for value in TOLD.get(method, (self.maker.call["guidance_scale"],))
            ]
            results += self.compare(originals, jobs, self.share(4))
        return results

    def uniqueness(self) -> list[Measurement]:
        """Records the guidance of one picture and replays it on others."""
        originals = requests, before = self.originals()
        results = []
        for word in self.ten:
            if not lacking(before, word).any():
                continue
            source = requests[np.flatnonzero(lacking(before, word))[-1]]
            call = {"seed": source.seed, "output": "latent", "progress": False, "record": True}
            record = self.maker.pipe(source.prompt, Edit(word), **self.maker.call, **call).record
            assert record is not None
            job = Job({}, word, "add", lambda request: request)
            results += self.compare(originals, [job], self.share(8), replay=record.sem_guidance)
        return results

    def ablations(self) -> list[Measurement]:
        """Varies one setting at a time, with the others as recommended, and draws a grid of pictures for each
        setting."""
        originals = self.originals()
        results = []
        for setting, values in ABLATIONS.items():
            jobs = [
                Job(
                    {"setting": setting, "value": value},
                    word,
                    action,
                    change_by("sega", word, action, **{setting: value}),
                )
                for action in ACTIONS
                for value in values
                for word in self.ten
            ]
            results += self.compare(originals, jobs, self.share(16))
            self.grid(originals, setting, values)
        return results

    def grid(self, originals: Originals, setting: str, values: Sequence[Any]) -> None:
        """Draws a picture for every value of a setting, in a row for each of three words."""
        requests, before = originals
        pictures: list[Image.Image] = []
        captions: list[str] = []
        for word in self.ten[:3]:
            if not lacking(before, word).any():
                continue
            request = requests[np.flatnonzero(lacking(before, word))[0]]
            edited = [change_by("sega", word, "add", **{setting: value})(request) for value in values]
            pictures += map(Image.fromarray, self.maker([request, *edited]).pixels)
            captions += ["no edit", *(f"{word}, {setting} {value}" for value in values)]
        png.sheet(pictures, captions, columns=1 + len(values)).save(self.folder / f"{setting}.png")

    def variants(self) -> list[Measurement]:
        """Compares the values of `support`. Also compares the values of `semantics`, with concepts that warm up one
        after another."""
        originals = requests, before = self.originals()
        results = []
        for support in SUPPORTS:
            jobs = [Job({"support": support}, word, "add", change_by("sega", word, "add")) for word in self.ten]
            results += self.compare(originals, jobs, self.share(8), support=support)
        words = self.ten[:3]
        chosen = np.flatnonzero(np.all([lacking(before, word) for word in words], 0))[: self.share(2)]
        for semantics in SEMANTICS if len(chosen) else ():
            edits = tuple(Edit(word, warmup=4 + 4 * i) for i, word in enumerate(words))
            after = self.maker([requests[i]._replace(edits=edits) for i in chosen], semantics=semantics)
            averages = summary(effect(before[chosen], after, [words] * len(chosen)))
            results.append({"semantics": semantics, "words": list(words)} | averages)
        return results


def compatible(words: Sequence[str]) -> list[str]:
    """Drops words that conflict with an earlier word: hats if a word about hair comes first, otherwise words about
    hair."""
    covered = "hair", "hair colour"
    first = next((WORDS[word][0] for word in words if WORDS[word][0] in ("hat", *covered)), "hat")
    return [word for word in words if WORDS[word][0] not in (covered if first == "hat" else ("hat",))]


def _correlation(chances: np.ndarray) -> float:
    """Returns Spearman's correlation between probabilities and `SCALES`, or 0 if all probabilities are equal."""
    return float(scipy.stats.spearmanr(SCALES, chances).statistic) if np.ptp(chances) else 0.0


@click.command(context_settings={"show_default": True})
@click.option("--model", default=str(DEMO), show_default="the demo model", help="Checkpoint of a portrait model.")
@options(seeds=256, first_seed=Evaluation.first_seed, words=WORDS, studies=STUDIES, batch=256)
def main(
    folder: Path,
    model: str,
    seeds: int,
    first_seed: int,
    words: tuple[str, ...],
    studies: tuple[str, ...],
    batch: int,
    dtype: str | None,
) -> None:
    """Measures edits, and writes results.json and picture grids into FOLDER.

    Results of other studies in FOLDER are kept.
    """
    with plainly():
        pipe = sega_jax.load(model, dtype=dtype)
        if predicts_tokens(pipe):
            raise click.ClickException(f"{model} is a Paella model; evaluate it with sega_jax.demo.evaluate.paella")
        evaluation = DiffusionEvaluation(PictureMaker(pipe, load_judge(), batch), folder, seeds, words, first_seed)
        name = "the demo model" if model == str(DEMO) else model
        run(evaluation, studies, {"model": name, "settings": RECOMMENDED.as_dict()})


if __name__ == "__main__":
    main()
