"""DeepFloyd-IF's cascade: text is encoded once, and pictures are made of 64 pixels a side, then 256, then 1024."""

import dataclasses
import gc
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from sega_jax.method.guidance import Edit
from sega_jax.pipelines import loading, sources
from sega_jax.pipelines.batch import EditLike
from sega_jax.pipelines.components import checked_scheduler
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.pipeline import Output, Pipeline
from sega_jax.pipelines.safety import Safety
from sega_jax.systems.registry import CHECKER, STAGE_1, STAGE_2, UPSCALER, has_other_checker
from sega_jax.weights.pull import CheckpointError

STAGES = {"stage1": STAGE_1, "stage2": STAGE_2, "upscaler": UPSCALER}
# What the cascade gives each stage itself.
_OWN = {"prompt", "negative_prompt", "images_per_prompt", "seed", "key", "image", "output", "strict"}


class Stage(NamedTuple):
    """A stage that is there, or that is loaded each time that it runs."""

    outline: Pipeline  # checks arguments; its networks may be without values
    load: Callable[[], Pipeline]


@dataclasses.dataclass
class CascadeOutput(Output):
    """What the last stage made; `finite` is of all stages, and `stages` has what each made, by its name."""

    stages: dict[str, Output] = dataclasses.field(default_factory=dict)


class _Outline(Pipeline):
    """Checks what a call is given, and runs nothing."""

    def _run(self, plan: Any) -> None:
        return None


class Cascade:
    """The stages of DeepFloyd-IF, each of which enlarges what the one before made; `load_cascade` makes it.

    Args:
        encode: words -> embeddings [texts, tokens, channels], of the first two stages.
        stages: by the names of `STAGES`, without a gap.
    """

    def __init__(self, encode: Callable[[Sequence[str]], np.ndarray], stages: Mapping[str, Stage]):
        self._encode, self.stages = encode, dict(stages)
        self._known: dict[str, np.ndarray] = {}

    def __call__(
        self,
        prompt: str | Sequence[str],
        edits: EditLike | Sequence[EditLike] | Sequence[Sequence[EditLike]] = (),
        *,
        negative_prompt: str | Sequence[str] | None = None,
        edited: Sequence[str] = ("stage1",),
        images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        key: jax.Array | None = None,
        stage1: Mapping[str, Any] | None = None,
        stage2: Mapping[str, Any] | None = None,
        upscaler: Mapping[str, Any] | None = None,
        clean: bool = False,
        output: str = "pil",
        strict: bool = True,
    ) -> CascadeOutput:
        """Makes pictures of the prompts, guided by the edits in some of the stages.

        Args:
            prompt, edits, negative_prompt, images_per_prompt, seed, key, output, strict: as of `Pipeline`, but the
                words of prompts and edits are words. All stages have the same seeds, so that each called by itself
                with what the stage before made gives the same picture.
            edited: the stages that the edits guide. Warm-ups and scales mean other things in each: `edits` among
                the options of a stage are in their place.
            stage1, stage2, upscaler: options of the stage's own `Pipeline` call, such as steps, guidance_scale, eta,
                noise_level or record.
            clean: whether words are cleaned as DeepFloyd-IF's training data were (`sega_jax.text.caption_cleaning`,
                which needs the
                extra "if"), but for the x4 upscaler.

        Raises:
            TypeError, ValueError: an argument makes no sense, to any stage; nothing ran.
        """
        given = {"stage1": stage1, "stage2": stage2, "upscaler": upscaler}
        names = [edited] if isinstance(edited, str) else list(edited)
        for name in [*names, *(name for name, options in given.items() if options is not None)]:
            if name not in self.stages:
                raise ValueError(f"{name!r} is no stage of this cascade, which has {', '.join(self.stages)}")
        if not _are_words(prompt) or not (negative_prompt is None or _are_words(negative_prompt)):
            raise TypeError("prompt and negative_prompt should be words, which every stage reads by its own encoder")
        common = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "images_per_prompt": images_per_prompt,
            "seed": seed,
            "key": key,
            "strict": strict,
        }
        calls = {}
        for name in self.stages:
            options = dict(given[name] or {})
            if wrong := _OWN & options.keys():
                raise TypeError(f"{name} has {', '.join(sorted(wrong))}, which is the cascade's own to give")
            own = {"output": output if name == list(self.stages)[-1] else "float"}
            calls[name] = common | {"edits": edits if name in names else ()} | options | own
        calls = self._fit(calls)
        texts = {name: call for name, call in calls.items() if name != "upscaler"}
        read = _clean if clean else str
        self._know([read(word) for call in texts.values() for word in _words(call)])
        calls |= {name: _read(call, lambda word: self._known[read(word)]) for name, call in texts.items()}

        made, finite, small = {}, True, None
        for name, stage in self.stages.items():
            pipe = stage.load()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "the edit ")  # said before, and with words
                made[name] = pipe(**calls[name] | ({} if small is None else {"image": small}))
            del pipe
            gc.collect()
            finite = finite & made[name].finite
            if name != list(self.stages)[-1]:
                # What is not finite stays so to the end, and is grey on the way.
                small = np.where(finite[:, None, None, None], made[name].images, 0.5)
        last = made[name]
        return CascadeOutput(
            _without(last.images, ~finite, output), finite, last.seeds, last.record, last.flagged, stages=made
        )

    def _fit(self, calls: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """The calls with the size of what each stage makes, after all of them were checked."""
        small, fitted = None, {}
        for name, call in calls.items():
            outline = self.stages[name].outline
            sizes = outline.models.sizes
            if small is not None:
                small = [sizes.enlarges * side for side in small]
                call = {"height": small[0], "width": small[1]} | call
                picture = np.zeros((*(side // sizes.enlarges for side in small), 3), np.uint8)
                call = call | {"image": picture}
            _Outline(**outline.components)(**call)
            if small is None:
                small = [sizes.factor * s for s in outline.latent_shape(call.get("height"), call.get("width"))[:2]]
            fitted[name] = call
        return fitted

    def _know(self, words: Sequence[str]) -> None:
        """Encodes what was not known from the call before."""
        new = [word for word in dict.fromkeys(words) if word not in self._known]
        found = dict(zip(new, self._encode(new), strict=True)) if new else {}
        gc.collect()
        self._known = {word: found[word] if word in found else self._known[word] for word in words}


def load_cascade(
    stage1: str | Path,
    stage2: str | Path | None = None,
    upscaler: str | Path | None = None,
    *,
    low_memory: bool = False,
    dtype: DTypeLike | None = None,
    variant: str | None = None,
    devices: Sequence[jax.Device] | Devices | None = None,
    attention: str | None = None,
    revisions: Mapping[str, str | None] | None = None,
    schedulers: Mapping[str, Any] | None = None,
    safety_checker: bool | Safety | None = True,
) -> Cascade:
    """Loads DeepFloyd-IF's cascade, or as much of it as is named.

    In bfloat16, IF-I-XL is 8.6 GB, IF-II-L 2.5 GB and their text encoder T5-XXL 9.5 GB.

    Args:
        stage1, stage2, upscaler: checkpoints as `load` takes them; the last is Stable Diffusion's x4 upscaler. The
            text encoder is the first stage's.
        low_memory: whether to load what is needed when it is needed, and drop it after: the text encoder, then one
            stage after another, anew in every call.
        dtype, variant, devices, attention: as of `load`, of all stages.
        revisions: branches, tags or commits on the hub, by the names stage1, stage2 and upscaler.
        schedulers: in place of the checkpoints', by the same names.
        safety_checker: as of `load`, of the x4 upscaler if it has one; DeepFloyd-IF's own is not supported.

    Raises:
        As `load`; and CheckpointError: a checkpoint is of another stage (then no weights were fetched), or the stages
            read other texts.
    """
    if upscaler is not None and stage2 is None:
        raise ValueError(
            "upscaler is given without stage2, whose pictures it enlarges; give both, or call it by itself"
        )
    loading.check_checker(safety_checker)
    where = devices if isinstance(devices, Devices) else Devices(devices)
    dtype = loading.pick_dtype(dtype, where)
    attention = loading.pick_attention(attention, dtype, where)
    given = {"stage1": stage1, "stage2": stage2, "upscaler": upscaler}
    given = {name: source for name, source in given.items() if source is not None}
    revisions, schedulers = dict(revisions or {}), dict(schedulers or {})
    for what, named in (("revisions", revisions), ("schedulers", schedulers)):
        if unknown := named.keys() - given.keys():
            raise ValueError(f"{what} has {', '.join(sorted(unknown))}; the stages are {', '.join(given)}")
    schedulers = {name: checked_scheduler(scheduler) for name, scheduler in schedulers.items()}

    # All indices before the first weights, which take hours to fetch.
    found = {name: sources.find(source, revisions.get(name)) for name, source in given.items()}
    for name, source in found.items():
        if source.kind is not STAGES[name]:
            raise CheckpointError(f"{name}={str(source.name)!r} is {source.kind.name}, expected {STAGES[name].name}")
    loading.check_reads(found["stage1"])
    if safety_checker is True and any(has_other_checker(source.folder) for source in found.values()):
        warnings.warn(
            "DeepFloyd-IF's safety checker is not supported: pictures go unchecked and without a watermark;"
            " safety_checker=False is loading without this warning",
            stacklevel=2,
        )
    without = {
        "stage1": [CHECKER],
        "stage2": [CHECKER, "text_encoder", "tokenizer"],
        "upscaler": [] if safety_checker is True else [CHECKER],
    }
    folders = {name: source.fetch(variant, without=without[name]) for name, source in found.items()}
    options, stages = {"dtype": dtype, "variant": variant, "devices": where}, {}
    for name, folder in folders.items():
        keeps_text = name == "upscaler" or (name == "stage1" and not low_memory)
        load = partial(
            loading.load,
            folder,
            **options,
            attention=attention,
            scheduler=schedulers.get(name),
            safety_checker=safety_checker if name == "upscaler" else False,
            **({} if keeps_text else {"text_encoder": False}),
        )
        if low_memory:
            outline = _outline(folder, schedulers.get(name), dtype, where, keeps_text)
            stages[name] = Stage(outline, load)
        else:
            pipe = load()
            stages[name] = Stage(pipe, lambda pipe=pipe: pipe)
    texts = {stages[name].outline.models.unet.config.text_dim for name in stages if name != "upscaler"}
    if len(texts) > 1:
        raise CheckpointError(f"the stages read texts of {sorted(texts)} channels; do they belong together?")
    if low_memory:
        return Cascade(lambda words: loading.load_text(folders["stage1"], **options)(words), stages)
    return Cascade(stages["stage1"].outline.encode, stages)


def _outline(folder: Path, scheduler: Any, dtype: np.dtype, where: Devices, keeps_text: bool) -> Pipeline:
    """A pipeline without values."""
    given = {} if keeps_text else {"text_encoder": None}
    found = loading.describe(folder, scheduler=scheduler, safety_checker=False, given=given)
    models = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), found.models)
    return Pipeline(models, found.tokenizer, found.scheduler, where, None, found.noising)


def _are_words(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(v, str) for v in value)
    )


def _read(call: Mapping[str, Any], read: Callable[[str], Any]) -> dict[str, Any]:
    """A call with something else in place of its words; those of a negative prompt are empty by default."""

    def one(value: Any) -> Any:
        if isinstance(value, str):
            return read(value)
        if isinstance(value, Edit) and isinstance(value.concept, str):
            return dataclasses.replace(value, concept=read(value.concept))
        return [one(entry) for entry in value] if isinstance(value, list | tuple) else value

    negative = "" if call["negative_prompt"] is None else call["negative_prompt"]
    changed = {"prompt": call["prompt"], "negative_prompt": negative, "edits": call["edits"]}
    return {**call, **{name: one(value) for name, value in changed.items()}}


def _words(call: Mapping[str, Any]) -> list[str]:
    found = []
    _read(call, lambda word: found.append(word) or word)
    return found


def _clean(words: str) -> str:
    from sega_jax.text import caption_cleaning  # whose libraries are of an extra

    return caption_cleaning.clean(words) if words else words


def _without(images: Any, bad: np.ndarray, output: str) -> Any:
    """Pictures without those that came of what was not finite."""
    if output == "pil":
        return [None if wrong else image for image, wrong in zip(images, bad, strict=True)]
    return np.where(bad[:, None, None, None], np.zeros((), images.dtype) if output == "uint8" else np.nan, images)
