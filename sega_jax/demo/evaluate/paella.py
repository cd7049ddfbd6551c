"""Measures how well edits work on token models, and the influence of choices that the SEGA paper leaves open.

    python -m sega_jax.demo.evaluate.paella FOLDER --model MODEL
    python -m sega_jax.demo.evaluate.paella FOLDER --model MODEL --seeds 8 --batch 8 --words glasses,smile   # on a CPU

MODEL is a model trained with `sega_jax.demo.training.paella`. The command writes two files: results.json, from which
`sega_jax.demo.evaluate.report` makes tables, and pictures.png, which shows pictures before and after each edit. As in
`sega_jax.demo.evaluate.diffusion`, adding a word is tested on seeds whose pictures lack it, and the judge classifies
the pictures before and after each edit. Choices are varied one at a time. `CALL` and `ADD` were chosen on seeds 1000 to
1255.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import click
import numpy as np
from PIL import Image

import sega_jax
from sega_jax.demo.evaluate.evaluation import TEN, Evaluation, Job, Originals, options, predicts_tokens, run
from sega_jax.demo.evaluate.measures import Measurement, lacking
from sega_jax.demo.evaluate.methods import change_by, change_to
from sega_jax.demo.evaluate.pictures import PictureMaker
from sega_jax.demo.judge import load_judge
from sega_jax.method.guidance import SUPPORTS, Edit
from sega_jax.pipelines import png
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
ADD: dict[str, Any] = {"scale": 5.0, "threshold": 0.9, "warmup": 2}
# The rule in the SEGA authors' code for Paella, which uses neither a threshold nor momentum.
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
STUDIES = ("prompts", "edits", "choices")


class TokenEvaluation(Evaluation):
    """The studies for Paella models."""

    module: ClassVar[str] = "sega_jax.demo.evaluate.paella"

    def edits(self) -> list[Measurement]:
        """Adds every word in three ways: with semantic guidance, with the authors' rule, and with the prompt. Also
        draws example pictures."""
        originals = self.originals()
        jobs = [
            Job({"method": name}, word, "add", change_to(Edit(word, **edit)))
            for name, edit in {"sega": ADD, "authors": AUTHORS}.items()
            for word in self.words
        ]
        jobs += [Job({"method": "prompt"}, word, "add", change_by("prompt", word, "add")) for word in self.words]
        self.pairs(originals)
        return self.compare(originals, jobs, self.seeds)

    def choices(self) -> list[Measurement]:
        """Varies one choice at a time, with the others as in `CALL` and `ADD`."""
        results, originals = [], self.originals()
        for setting, values in CHOICES.items():
            for value in values:
                call = {setting: value} if setting in CALL else {}
                edit = ADD if call else ADD | {setting: value}
                # The temperature also changes pictures without edits, so the originals are made with the same
                # temperature.
                own = (originals[0], self.maker(originals[0], **call)) if setting == "temperature" else originals
                labels = {"setting": setting, "value": str(value)}
                jobs = [Job(labels, word, "add", change_to(Edit(word, **edit))) for word in self.ten]
                results += self.compare(own, jobs, self.share(2), **call)
        return results

    def pairs(self, originals: Originals, count: int = 4) -> None:
        """Draws a row for each word: the first pictures that lack the word, before and after the edit."""
        requests, before = originals
        pictures: list[Image.Image] = []
        captions: list[str] = []
        for word in self.ten:
            chosen = np.flatnonzero(lacking(before, word))[:count]
            if not len(chosen):
                continue
            change = change_to(Edit(word, **ADD))
            after = self.maker([change(requests[i]) for i in chosen]).pixels
            row = np.stack([before.pixels[chosen], after], 1).reshape(-1, *after.shape[1:])
            blank = np.full((2 * (count - len(chosen)), *after.shape[1:]), 255, np.uint8)
            pictures += map(Image.fromarray, np.concatenate([row, blank]))
            captions += [caption for i in chosen for caption in (f"seed {requests[i].seed}", f"+ {word}")]
            captions += [""] * len(blank)
        png.sheet(pictures, captions, columns=2 * count).save(self.folder / "pictures.png")


@click.command(context_settings={"show_default": True})
@click.option("--model", required=True, help="Paella model of portraits.")
@options(seeds=64, first_seed=5000, words=TEN, studies=STUDIES, batch=128)
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
    """Measures edits of a Paella model, and writes results.json and pictures.png into FOLDER.

    Results of other studies in FOLDER are kept.
    """
    with plainly():
        pipe = sega_jax.load(model, dtype=dtype)
        if not predicts_tokens(pipe):
            raise click.ClickException(
                f"{model} is not a Paella model; evaluate it with sega_jax.demo.evaluate.diffusion"
            )
        evaluation = TokenEvaluation(PictureMaker(pipe, load_judge(), batch, CALL), folder, seeds, words, first_seed)
        run(evaluation, studies, {"model": Path(model).name, "settings": {"add": ADD, "call": CALL}})


if __name__ == "__main__":
    main()
