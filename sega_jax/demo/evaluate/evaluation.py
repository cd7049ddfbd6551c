"""Runs evaluations: makes original pictures, applies edits to the suitable ones, and writes results.json."""

import dataclasses
import inspect
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import click
import jax
import numpy as np

import sega_jax
from sega_jax.demo.attributes import WORDS
from sega_jax.demo.evaluate.measures import NAMES, Measurement, effect, having, interval, lacking, summary
from sega_jax.demo.evaluate.methods import Change, phrase
from sega_jax.demo.evaluate.pictures import PictureMaker, Pictures, Request

PROMPT = "a portrait of a person"
# One word for each attribute. All of them can appear in one picture, except for hair that a hat hides.
TEN = (
    "glasses", "smile", "beard", "long hair", "red hair", "hat", "dark skin", "hoodie", "red clothes",
    "blue background",
)  # fmt: skip

Originals = tuple[list[Request], Pictures]  # requests without edits, and their pictures


class Job(NamedTuple):
    """A cell of a table: a word, and a function that changes a request to add or remove the word."""

    labels: Measurement  # the columns that identify the cell
    word: str
    action: str  # "add" or "remove"
    change: Change


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Runs studies. A study is a method without arguments that returns measurements.

    Attributes:
        maker: makes and judges the pictures.
        folder: the folder for the results.
        seeds: the maximum number of pictures for each cell of the main table; other studies use a fraction of it.
        words: the words to add and remove.
        first_seed: the seed of the first picture. The recommended settings were chosen on seeds below 1000.
    """

    maker: PictureMaker
    folder: Path
    seeds: int
    words: tuple[str, ...]
    first_seed: int = 1000

    module: ClassVar[str]  # the module whose command runs the evaluation

    @property
    def ten(self) -> tuple[str, ...]:
        """The words that the smaller studies use."""
        return tuple(word for word in TEN if word in self.words) or self.words[:10]

    def share(self, part: int) -> int:
        """Returns the number of seeds divided by `part`, but at least 4."""
        return max(self.seeds // part, 4)

    def originals(
        self, prompt: str = PROMPT, count: int | None = None, guidance_scale: float | None = None
    ) -> Originals:
        """Makes unedited pictures with consecutive seeds, starting at `first_seed`.

        Args:
            count: the number of pictures; None means four times `seeds` (at least 32), because removing a rare value,
                such as one of seven colours, requires pictures that have it.
        """
        count = max(4 * self.seeds, 32) if count is None else count
        requests = [Request(prompt, self.first_seed + i, guidance_scale=guidance_scale) for i in range(count)]
        return requests, self.maker(requests)

    def compare(self, originals: Originals, jobs: Iterable[Job], most: int, **options: Any) -> list[Measurement]:
        """Applies every job to the first `most` pictures that it can change, and measures the effects.

        A job that adds a word changes pictures that lack the word. A job that removes a word changes pictures that have
        it.

        Args:
            originals: the requests without edits, and their pictures.
            jobs: the changes to apply.
            most: the maximum number of pictures for each job.
            options: further arguments of the pipeline's calls.
        """
        (requests, before), jobs = originals, list(jobs)
        test = {"add": lacking, "remove": having}
        chosen = [np.flatnonzero(test[job.action](before, job.word))[:most] for job in jobs]
        after = self.maker(
            [job.change(requests[i]) for job, rows in zip(jobs, chosen, strict=True) for i in rows], **options
        )
        results, start = [], 0
        for job, rows in zip(jobs, chosen, strict=True):
            own = after[start : start + len(rows)]
            effects = effect(before[rows], own, [[job.word]] * len(rows), removed=job.action == "remove")
            results.append(job.labels | {"word": job.word, "action": job.action} | summary(effects))
            start += len(rows)
        return results

    def prompts(self) -> list[Measurement]:
        """Measures how often unedited pictures show the word that their prompt names."""
        count = self.share(2)
        seeds = range(self.first_seed, self.first_seed + count)
        requests = [Request(f"{PROMPT} {phrase(word)}", seed) for word in self.words for seed in seeds]
        verdict = self.maker(requests).verdict.words.reshape(len(self.words), count, len(NAMES))
        results = []
        for word, seen in zip(self.words, verdict, strict=True):
            success = seen[:, NAMES.index(word)]
            low, high = interval(int(success.sum()), count)
            results.append({"word": word, "n": count, "success": float(success.mean()), "low": low, "high": high})
        return results


def run(evaluation: Evaluation, studies: Iterable[str], about: Measurement) -> None:
    """Runs studies, and writes each study's measurements to results.json. Earlier results of other studies are kept."""
    pipe, folder = evaluation.maker.pipe, evaluation.folder
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
        # Replace the file after each study, so that an interruption loses at most one study.
        (folder / "results.part").write_text(json.dumps(results, indent=1) + "\n")
        (folder / "results.part").replace(path)
        click.echo(f"{study}: {time.perf_counter() - began:.0f} s")


def predicts_tokens(pipe: Any) -> bool:
    """Returns whether a pipeline samples tokens instead of latents. Tokens need their own studies and settings.

    A pipeline samples tokens if its call has the argument `temperature`. The check does not depend on the pipeline's
    class, because the studies in `sega_jax.demo.evaluate.paella` need only this argument.
    """
    return "temperature" in inspect.signature(pipe.__call__).parameters


def options(
    *, seeds: int, first_seed: int, words: Iterable[str], studies: Iterable[str], batch: int
) -> Callable[[Callable], Callable]:
    """Returns a decorator that adds the argument FOLDER and the options that evaluations share to a command.

    Args:
        seeds, first_seed, words, studies, batch: the default values of the options. `studies` also lists the known
            studies.
    """
    words, studies = list(words), list(studies)
    decorators = [
        click.argument("folder", type=click.Path(path_type=Path, file_okay=False)),
        click.option(
            "--seeds",
            type=click.IntRange(1),
            default=seeds,
            help="Maximum number of pictures for each cell of the main table; other studies use a fraction of it.",
        ),
        click.option("--first-seed", type=click.IntRange(0), default=first_seed, help="Seed of the first picture."),
        click.option(
            "--words",
            default=",".join(words),
            show_default="all" if words == list(WORDS) else True,
            callback=_names(WORDS),
            help="Words to edit, separated by commas.",
        ),
        click.option("--studies", default=",".join(studies), callback=_names(studies), help="Studies to run."),
        click.option("--batch", type=click.IntRange(1), default=batch, help="Pictures per call; use fewer on a CPU."),
        click.option("--dtype", help="The networks' dtype.  [default: float32 on a CPU, bfloat16 elsewhere]"),
    ]

    def decorate(command: Callable) -> Callable:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def _names(known: Iterable[str]) -> Callable[[click.Context, click.Parameter, str], tuple[str, ...]]:
    """Returns a callback that splits an option's value at its commas and rejects unknown names."""

    def split(context: click.Context, parameter: click.Parameter, text: str) -> tuple[str, ...]:
        values = tuple(text.split(","))
        if unknown := [value for value in values if value not in known]:
            raise click.BadParameter(f"{', '.join(unknown)} should be among {', '.join(known)}", context, parameter)
        return values

    return split
