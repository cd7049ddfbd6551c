"""Makes the animations of `sega-jax edit`, one for each seed, and writes each as soon as its frames are done."""

import io
import json
import shlex
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from sega_jax.cli.animation import Animation, Frame
from sega_jax.cli.edit_run import Job, Picture, Result, groups, numbered, stored_seed
from sega_jax.cli.terminal import compilations, echo, pictures_reported_elsewhere
from sega_jax.method.arguments import arguments
from sega_jax.pipelines import png
from sega_jax.pipelines.output import Output
from sega_jax.pipelines.pipeline import Pipeline
from sega_jax.pipelines.progress import styled
from sega_jax.pipelines.stored_settings import save_options
from sega_jax.weights.destination import write_file

_WEBP_QUALITY = 90  # lossless files are much larger

Pictures = list[tuple[str, Image.Image]]  # the value of the setting that changes, and the picture


def run(
    make: Callable[..., Output],
    pipe: Pipeline,
    call: Mapping[str, Any],
    job: Job,
    animation: Animation,
    folder: Path,
    most: int,
) -> Result:
    """Makes and writes the animations. All frames of a seed start from the same noise and use the same programs.

    Args:
        make: a function that makes pictures, given prompts, lists of edits and the arguments of a call.
        pipe: the pipeline that checks calls; for a cascade, the pipeline of the first stage.
        most: the maximum number of seeds that `sega-jax edit` processes at once.

    Returns:
        The animations. `missing` names the frames that contain non-finite values, which are left out.

    Raises:
        TypeError, ValueError: a frame's settings do not fit the checkpoint. Raised before any frame is made.
    """
    frames = animation.frames(job.concepts, pipe.system)
    rate = f"{1000 / animation.duration:.3g} frames per second"
    echo(f"  {animation.setting} from {frames[0].value} to {frames[-1].value} in {len(frames)} frames, {rate}")
    # With edits, `sega-jax edit` makes two pictures for each seed.
    size = most * (2 if job.concepts else 1) if _may_differ(frames[0], pipe) else 1
    calls = [(size, _arguments(job, group, call, pipe)) for group, size in groups(frames, size)]
    missing: list[str] = []
    written: list[Picture] = []
    last: Path | None = None
    began = time.perf_counter()
    with (
        compilations() as compiling,
        numbered(folder) as number,
        _each_warning_once(),
        pictures_reported_elsewhere(),
    ):
        for _, one in calls:
            pipe.prepare(**one, seed=[job.seeds[0]] * len(one["prompt"]))
        for done, seed in enumerate(job.seeds, 1):
            several = len(job.seeds) > 1
            images, flagged = _images(make, calls, seed, len(frames))
            prefix = f"seed {seed} " if several else ""
            names = [f"{prefix}{animation.setting}={frame.value}" for frame in frames]
            for name, flag in zip(names, flagged, strict=True):
                if flag:
                    echo(f"Flagged by the safety checker: {name}")
            missing += [name for name, image in zip(names, images, strict=True) if image is None]
            pictures = [(frame.value, image) for frame, image in zip(frames, images, strict=True) if image is not None]
            if pictures:
                stem = f"{number}-seed{seed}" if several else number
                known = {"picture": "animation", **job.known, "seed": seed, **animation.known}
                last = _write(folder / f"{stem}-animation", pictures, animation, known)
                echo(f"Wrote {last}{f' ({done} of {len(job.seeds)})' if several else ''}")
            finite = all(image is not None for image in images)
            any_flagged = None if pipe.safety is None else any(flagged)
            written.append(Picture(str(last) if pictures else None, seed, "animation", any_flagged, finite))
        seconds = time.perf_counter() - began
        echo(f"Compiled in {compiling():.1f} s, {job.ran} in {seconds - compiling():.1f} s")
    if last is not None:
        echo(f"To print the settings and the command that reproduces the file: sega-jax info {shlex.quote(str(last))}")
    settings = {**job.known, "seed": stored_seed(job.seeds), **animation.known}
    return Result(written, None, settings, compiling(), seconds - compiling(), missing)


def _may_differ(frame: Frame, pipe: Pipeline) -> bool:
    """Returns whether the pictures of a call may have different values of the setting that changes."""
    return all(arguments(pipe.system.call)[name].varies == "row" for name in frame.call)


def _arguments(job: Job, group: Sequence[Frame], call: Mapping[str, Any], pipe: Pipeline) -> dict[str, Any]:
    """Returns the arguments of the call that makes a group of frames, except the seeds."""
    own = {name: [frame.call[name] for frame in group] for name in group[0].call}
    if not _may_differ(group[0], pipe):
        own = group[0].call
    return {"prompt": [job.prompt] * len(group), "edits": [frame.edits for frame in group], **call, **own}


def _images(
    make: Callable[..., Output], calls: Sequence[tuple[int, dict[str, Any]]], seed: int, count: int
) -> tuple[list[Image.Image | None], list[bool]]:
    """Makes the frames of a seed.

    Args:
        calls: the arguments of each call, and how many of its pictures to keep.
        count: the number of frames.

    Returns:
        The pictures, with None for those that contain non-finite values, and whether the safety checker flagged them.
    """
    images: list[Image.Image | None] = []
    flagged: list[bool] = []
    for size, one in calls:
        shown = f"frame {len(images) + 1}" if size == 1 else f"frames {len(images) + 1} to {len(images) + size}"
        with styled(desc=f"{shown} of {count}", leave=False):
            result = make(**one, seed=[seed] * len(one["prompt"]))
        images += list(result.images[:size])
        flagged += [False] * size if result.flagged is None else list(map(bool, result.flagged[:size]))
    return images, flagged


def _write(stem: Path, pictures: Pictures, animation: Animation, known: dict[str, Any]) -> Path:
    """Writes an animation with its settings. Returns the file's path."""
    options = animation.known
    images = [image for _, image in pictures]
    if not options.get("no_captions"):
        images = captioned(images, [f"{animation.setting} = {value}" for value, _ in pictures])
    if not options.get("one_way"):
        images += images[-2:0:-1]
    path = stem.with_name(f"{stem.name}.{animation.format}")
    known = known | {"values": [json.loads(value) for value, _ in pictures]}
    write_file(path, encoded(images, animation.format, animation.duration, known))
    return path


def captioned(images: Sequence[Image.Image], captions: Sequence[str]) -> list[Image.Image]:
    """Returns pages of equal size, each with a picture above its caption. Small pictures are enlarged."""
    pages = [png.sheet([image], [caption], columns=1) for image, caption in zip(images, captions, strict=True)]
    size = pages[0].width, max(page.height for page in pages)
    equal = [Image.new("RGB", size, "white") for _ in pages]
    for one, page in zip(equal, pages, strict=True):
        one.paste(page)
    return equal


def encoded(images: Sequence[Image.Image], format: str, duration: int, settings: dict[str, Any]) -> bytes:
    """Encodes pictures of equal size as an animation that repeats for ever and stores its settings.

    Args:
        format: "webp" or "gif".
        duration: the duration of a frame in milliseconds. For a GIF, a multiple of 10.
    """
    options = save_options(format, settings)
    if format == "gif":
        # Without dithering, smooth areas have visible bands. Dithering needs a palette.
        dither = Image.Dither.FLOYDSTEINBERG
        images = [image.quantize(palette=image.quantize(), dither=dither) for image in images]
    else:
        options["quality"] = _WEBP_QUALITY
    options |= {"duration": duration, "loop": 0}
    file = io.BytesIO()
    images[0].save(file, format, save_all=True, append_images=images[1:], **options)
    return file.getvalue()


@contextmanager
def _each_warning_once() -> Iterator[None]:
    """Shows each distinct warning in a `with` block only the first time."""
    shown: set[str] = set()

    def show(message: Warning | str, *details: Any) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            show_any(message, *details)

    with warnings.catch_warnings():
        show_any, warnings.showwarning = warnings.showwarning, show  # type: ignore[assignment]
        yield
