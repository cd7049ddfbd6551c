"""How well edits of tokens work, in numbers, and which of the choices that the method leaves open decide.

    python -m sega_jax.demo.evaluate.paella FOLDER --model MODEL
    python -m sega_jax.demo.evaluate.paella FOLDER --model MODEL --seeds 8 --batch 8 --words glasses,smile   # on a CPU

with a model of `sega_jax.demo.training.paella` writes results.json, of which `sega_jax.demo.evaluate.report` makes
tables, and
pictures.png with each word before and after. An edit is counted as in `sega_jax.demo.evaluate`: by the judge, on seeds
that lack the word, against the same seed without an edit. Choices are changed one at a time. `CALL` and `ADD` were
chosen on the seeds from 1000 to 1255.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import click
import numpy as np
from PIL import Image

import sega_jax
from sega_jax.demo.attributes import WORDS
from sega_jax.demo.evaluate.diffusion import TEN, Base, Evaluation, Job, Measurement, known, run
from sega_jax.demo.evaluate.studio import Shot, Studio, lacking, phrase
from sega_jax.demo.judge import load_judge
from sega_jax.method.guidance import SUPPORTS, Edit
from sega_jax.pipelines import png
from sega_jax.pipelines.paella import PaellaPipeline
from sega_jax.pipelines.progress import plainly

CALL = {
    "steps": 12,
    "guidance_scale": 3.0,
    "temperature": (1.0, 0.2),
    "momentum_scale": 0.4,
    "momentum_beta": 0.4,
    "support": "channel",
    "centred": False,
}
ADD = {"scale": 5.0, "threshold": 0.9, "warmup": 2}
# The rule of the authors' own code for Paella.
AUTHORS = ADD | {"threshold": 0.0, "momentum_scale": 0.0}
CHOICES: Mapping[str, Sequence[Any]] = {
    "support": SUPPORTS,
    "centred": (False, True),
    "warmup": (0, 1, 2, 3, 4, 6),
    "temperature": ((1.0, 0.2), (1.0, 1.0), (0.5, 0.2)),
    "threshold": (0.0, 0.5, 0.8, 0.9, 0.97),
    "scale": (1.0, 2.0, 5.0, 10.0),
    "momentum_scale": (0.0, 0.4),
}


@dataclasses.dataclass(frozen=True)
class TokenEvaluation(Evaluation):
    """The studies of a Paella; `prompts` is that of any model."""

    module: ClassVar[str] = "sega_jax.demo.evaluate.paella"

    def edits(self) -> list[Measurement]:
        """Every word, added by semantic guidance, by the rule of the authors' code, and in the prompt; pictures."""
        base, ways = self.base(), {"sega": ADD, "authors": AUTHORS}
        jobs = [
            Job({"method": name}, word, "add", _edited(word, edit))
            for name, edit in ways.items()
            for word in self.words
        ]
        jobs += [Job({"method": "prompt"}, word, "add", _told(word)) for word in self.words]
        self.pairs(base)
        return self.compare(base, jobs, self.seeds)

    def choices(self) -> list[Measurement]:
        """One choice at a time, the others as in `CALL` and `ADD`."""
        results, base = [], self.base()
        for setting, values in CHOICES.items():
            for value in values:
                call = {setting: value} if setting in CALL else {}
                edit = ADD if call else ADD | {setting: value}
                # What a picture is compared with is drawn at its temperature.
                own = (base[0], self.studio(base[0], **call)) if setting == "temperature" else base
                labels = {"setting": setting, "value": str(value)}
                jobs = [Job(labels, word, "add", _edited(word, edit)) for word in self.ten]
                results += self.compare(own, jobs, self.share(2), **call)
        return results

    def pairs(self, base: Base, count: int = 4) -> None:
        """Draws the first seeds that lack each word before and after, a row a word."""
        shots, before = base
        made, captions = [], []
        for word in self.ten:
            chosen = np.flatnonzero(lacking(before, word))[:count]
            if len(chosen):
                after = self.studio([_edited(word, ADD)(shots[i]) for i in chosen]).pictures
                pairs = np.stack([before.pictures[chosen], after], 1).reshape(-1, *after.shape[1:])
                blank = np.full((2 * (count - len(chosen)), *after.shape[1:]), 255, np.uint8)
                made += map(Image.fromarray, np.concatenate([pairs, blank]))
                captions += [name for i in chosen for name in (f"seed {shots[i].seed}", f"+ {word}")] + [""] * len(
                    blank
                )
        png.sheet(made, captions, columns=2 * count).save(self.folder / "pictures.png")


def _edited(word: str, edit: Mapping[str, Any]) -> Callable[[Shot], Shot]:
    return lambda shot: shot._replace(edits=(Edit(word, **edit),))


def _told(word: str) -> Callable[[Shot], Shot]:
    return lambda shot: shot._replace(prompt=f"{shot.prompt} {phrase(word)}")


STUDIES = ("prompts", "edits", "choices")


@click.command(context_settings={"show_default": True})
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--model", required=True, help="A Paella of portraits.")
@click.option("--seeds", type=click.IntRange(1), default=64, help="The most pictures of a cell of the main table.")
@click.option("--first-seed", type=click.IntRange(0), default=5000, help="Of the pictures.")
@click.option("--words", default=",".join(TEN), help="That are edited.")
@click.option("--studies", default=",".join(STUDIES))
@click.option("--batch", type=click.IntRange(1), default=128, help="Pictures at once; fewer on a CPU.")
@click.option("--dtype", help="Of the networks.  [default: float32 on a CPU, else bfloat16]")
def main(
    folder: Path, model: str, seeds: int, first_seed: int, words: str, studies: str, batch: int, dtype: str | None
) -> None:
    """Measures edits of tokens and writes results.json and pictures.png into FOLDER; other studies stay."""
    chosen, asked = known("--words", words, WORDS), known("--studies", studies, STUDIES)
    with plainly():
        pipe = sega_jax.load(model, dtype=dtype)
        if not isinstance(pipe, PaellaPipeline):
            raise click.ClickException(f"{model} is no Paella; sega_jax.demo.evaluate.diffusion is for other models")
        evaluation = TokenEvaluation(Studio(pipe, load_judge(), batch, CALL), folder, seeds, chosen, first_seed)
        run(evaluation, asked, {"model": model, "settings": {"add": ADD, "call": CALL}})


if __name__ == "__main__":
    main()
