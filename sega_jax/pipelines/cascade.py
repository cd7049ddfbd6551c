"""A cascade: pictures are made by a first stage and enlarged by others, and the text is encoded once.

DeepFloyd-IF's makes pictures of 64 pixels a side, then 256, then 1024. A family that starts a cascade names the others
in `System.stages`.
"""

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from sega_jax.method.checks import brief
from sega_jax.method.guidance import Edit
from sega_jax.pipelines import diffusers_names, loading, part_loading
from sega_jax.pipelines.components import checked_scheduler
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.load_options import check_checker, pick_attention, pick_dtype
from sega_jax.pipelines.messages import collected, muted, warn
from sega_jax.pipelines.pipeline import Output, Pipeline
from sega_jax.pipelines.run import warn_of_pictures
from sega_jax.pipelines.safety import Safety
from sega_jax.pipelines.sources import Source, find
from sega_jax.systems.call import EditLike
from sega_jax.systems.registry import CHECKER, check_adapters, starting_systems
from sega_jax.text.files import CheckpointError

FIRST = "stage1"
# How edits act together, which the shell and sweeps say once for all stages.
SHARED = ("momentum_scale", "momentum_beta", "semantics", "support")
# What the cascade gives each stage itself.
_OWN = {"prompt", "negative_prompt", "images_per_prompt", "seed", "key", "image", "output", "strict"}


class Stage(NamedTuple):
    """A stage that is loaded, or that is loaded each time that it runs."""

    outline: Pipeline  # checks arguments; its networks may be without values
    load: Callable[[], Pipeline]


@dataclasses.dataclass
class CascadeOutput(Output):
    """What the last stage made; `finite` is of all stages, and `stages` has what each made, by its name."""

    stages: dict[str, Output] = dataclasses.field(default_factory=dict)


class Cascade:
    """A chain of stages, each of which enlarges the pictures of the stage before. `load_cascade` makes it.

    Args:
        encode: words -> the conditioning of the first stage's family, one row a text.
        stages: by name, the first stage first.
    """

    def __init__(self, encode: Callable[[Sequence[str]], Any], stages: Mapping[str, Stage]):
        self._encode, self.stages = encode, dict(stages)
        self._known: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"<Cascade: {', '.join(stage.outline.system.title for stage in self.stages.values())}>"

    def __call__(
        self,
        prompt: str | Sequence[str],
        edits: EditLike | Sequence[EditLike] | Sequence[Sequence[EditLike]] = (),
        *,
        negative_prompt: str | Sequence[str] | None = None,
        edited: Sequence[str] = (FIRST,),
        images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        key: jax.Array | None = None,
        clean: bool = False,
        output: str = "pil",
        strict: bool = True,
        **stages: Mapping[str, Any] | None,
    ) -> CascadeOutput:
        """Makes pictures of the prompts, guided by the edits in some of the stages.

        Args:
            prompt, edits, negative_prompt, images_per_prompt, seed, key, output, strict: as of `Pipeline`, but prompts
                and concepts are words. All stages have the same seeds, so that each called by itself with what the
                stage before made gives the same picture.
            edited: the stages that the edits guide. Warm-ups and scales mean other things in each: `edits` among the
                arguments of a stage replace them.
            clean: whether words are cleaned as DeepFloyd-IF's training data were (`sega_jax.text.caption_cleaning`,
                which needs the extra "if"), for all stages that share the first one's text encoder.
            stages: arguments of a stage's own `Pipeline` call by its name, such as
                stage2={"steps": 20, "noise_level": 100}.

        Raises:
            TypeError, ValueError: an argument makes no sense to some stage; nothing ran.
        """
        names = [edited] if isinstance(edited, str) else list(edited)
        for name in [*names, *(name for name, options in stages.items() if options is not None)]:
            if name in diffusers_names.ARGUMENTS:
                raise TypeError(f"{name} is diffusers' name; {diffusers_names.ARGUMENTS[name]}")
            if name not in self.stages:
                raise ValueError(
                    f"{name!r} is no stage of this cascade, which has {', '.join(self.stages)}; arguments of a stage's"
                    f" call go by the stage's name, as {FIRST}={{'steps': 50}}"
                )
        if not _are_words(prompt) or not (negative_prompt is None or _are_words(negative_prompt)):
            raise TypeError("prompt and negative_prompt should be strings, which every stage reads by its own encoder")
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
            options = dict(stages.get(name) or {})
            if wrong := _OWN & options.keys():
                raise TypeError(f"{name} has {', '.join(sorted(wrong))}, which is the cascade's own to give")
            own = {"output": output if name == list(self.stages)[-1] else "float"}
            calls[name] = common | {"edits": edits if name in names else ()} | options | own
        with collected():
            return self._run(self._read(self._fit(calls), clean), output)

    def _fit(self, calls: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Checks the calls of all stages, and returns them with the size that each makes."""
        size, fitted = None, {}
        for name, call in calls.items():
            outline = self.stages[name].outline
            sizes = outline.system.sampler.sizes(outline.models)
            if size is not None:
                picture = np.zeros((*size, 3), np.uint8)
                size = [sizes.enlarges * side for side in size]
                call = {"height": size[0], "width": size[1]} | call | {"image": picture}
            outline.prepare(**call)
            if size is None:
                size = [sizes.factor * s for s in outline.latent_shape(call.get("height"), call.get("width"))[:2]]
            fitted[name] = call
        return fitted

    def _read(self, calls: dict[str, dict[str, Any]], clean: bool) -> dict[str, dict[str, Any]]:
        """Replaces the words of the stages that share the first one's text by their conditioning."""
        kind = self.stages[FIRST].outline.system.text.type
        shared = {name: call for name, call in calls.items() if self.stages[name].outline.system.text.type is kind}
        read = _clean if clean else str
        words = list(dict.fromkeys(read(word) for call in shared.values() for word in _words(call)))
        new = [word for word in words if word not in self._known]
        found = dict(zip(new, self._encode(new), strict=True)) if new else {}
        gc.collect()
        self._known = {word: found[word] if word in found else self._known[word] for word in words}
        return calls | {name: _replaced(call, lambda word: self._known[read(word)]) for name, call in shared.items()}

    def _run(self, calls: dict[str, dict[str, Any]], output: str) -> CascadeOutput:
        made: dict[str, Output] = {}
        finite, picture = np.array(True), None
        for name, stage in self.stages.items():
            pipe = stage.load()
            # Checking the calls has warned of what edits do, and with their words.
            with muted():
                made[name] = pipe(**calls[name] | ({} if picture is None else {"image": picture}))
            warn_of_pictures(made[name].finite, made[name].flagged)
            del pipe
            gc.collect()
            finite = finite & made[name].finite
            if name != list(self.stages)[-1]:
                images = made[name].images
                assert isinstance(images, np.ndarray)
                # What is not finite stays so to the end, and is grey on the way.
                picture = np.where(finite[:, None, None, None], images, 0.5)
        last = made[name]
        return CascadeOutput(
            _without(last.images, ~finite, output), finite, last.seeds, last.record, last.flagged, stages=made
        )


def load_cascade(
    stage1: str | Path,
    stage2: str | Path | None = None,
    upscaler: str | Path | None = None,
    *,
    further: Mapping[str, str | Path] | None = None,
    low_memory: bool = False,
    dtype: DTypeLike | None = None,
    variant: str | None = None,
    devices: Sequence[jax.Device] | Devices | None = None,
    attention: str | None = None,
    revisions: Mapping[str, str | None] | None = None,
    schedulers: Mapping[str, Any] | None = None,
    loras: Mapping[str, Any] | None = None,
    textual_inversions: Mapping[str, Any] | None = None,
    safety_checker: bool | Safety | None = True,
) -> Cascade:
    """Loads DeepFloyd-IF's cascade, or as much of it as is named.

    In bfloat16, IF-I-XL is 8.6 GB, IF-II-L 2.5 GB and their text encoder T5-XXL 9.5 GB.

    Args:
        stage1, stage2, upscaler: checkpoints as `load` takes them; the last is Stable Diffusion's x4 upscaler. The
            text encoder is the first stage's.
        further: checkpoints of stages by their names, for cascades of other families, whose `System.stages` name them.
        low_memory: whether each network is loaded when it is needed and dropped afterwards, in every call: the text
            encoder, then one stage after another.
        dtype, variant, devices, attention: as of `load`, of all stages.
        revisions: branches, tags or commits on the hub, by the names stage1, stage2 and upscaler.
        schedulers: in place of the checkpoints', by the same names.
        loras, textual_inversions: as `lora` and `textual_inversion` of `load`, by the same names. A LoRA of the first
            stage may change its text encoder, whose texts the second stage takes, too.
        safety_checker: as of `load`, of the x4 upscaler if it has one; DeepFloyd-IF's own is not supported.

    Raises:
        CheckpointError: a checkpoint is of another stage (then no weights were fetched), or the stages read different
            texts; or as `load`.
        ValueError: a stage is named that is not there, or that takes no such adapters; or as `load`.
    """
    if upscaler is not None and stage2 is None:
        raise ValueError(
            "upscaler is given without stage2, whose pictures it enlarges; give both, or call it by itself"
        )
    check_checker(safety_checker)
    where = devices if isinstance(devices, Devices) else Devices(devices)
    dtype = pick_dtype(dtype, where)
    attention = pick_attention(attention, dtype, where)
    named_sources = {FIRST: stage1, "stage2": stage2, "upscaler": upscaler} | dict(further or {})
    given = {name: source for name, source in named_sources.items() if source is not None}
    revisions, schedulers = revisions or {}, schedulers or {}
    adapters = {"lora": loras or {}, "textual_inversion": textual_inversions or {}}
    _check_names({"revisions": revisions, "schedulers": schedulers}, given)
    _check_names({f"{option}s": of for option, of in adapters.items()}, given)
    schedulers = {name: checked_scheduler(scheduler) for name, scheduler in schedulers.items()}
    with collected():
        # All indices before the first weights, which take hours to fetch.
        found = {name: find(source, revisions.get(name)) for name, source in given.items()}
        _check_stages(found, safety_checker)
        found = {name: found[name] for name in (FIRST, *found[FIRST].system.stages) if name in found}
        by_stage = {name: {option: of.get(name) for option, of in adapters.items()} for name in found}
        for name, source in found.items():
            check_adapters(source.system, by_stage[name], f"{name}'s {{}}".format)
        options: dict[str, Any] = {"dtype": dtype, "variant": variant, "devices": where}
        stages = _stages(found, options, attention, schedulers, by_stage, safety_checker, low_memory)
    if low_memory:
        folder, lora = found[FIRST].folder, by_stage[FIRST]["lora"]
        return Cascade(lambda words: part_loading.load_text(folder, lora=lora, **options)(words), stages)
    return Cascade(stages[FIRST].outline.encode, stages)


def _check_names(options: Mapping[str, Mapping[str, Any]], stages: Mapping[str, Any]) -> None:
    """Checks that options are by the names of stages.

    Raises:
        TypeError, ValueError: they are not.
    """
    for what, by_stage in options.items():
        if not isinstance(by_stage, Mapping):
            raise TypeError(f"{what}={brief(by_stage)} should be by stage, such as {{{FIRST!r}: ...}}")
        if unknown := by_stage.keys() - stages.keys():
            raise ValueError(f"{what} has {', '.join(sorted(unknown))}; the stages are {', '.join(stages)}")


def _check_stages(found: Mapping[str, Source], safety_checker: Any) -> None:
    """Checks that checkpoints are the stages of one cascade.

    Raises:
        CheckpointError: they are not.
    """
    first = found[FIRST]
    if not first.system.stages:
        starts = " or ".join(system.title for system in starting_systems())
        raise CheckpointError(f"{FIRST}={str(first.name)!r} is {first.system.title}, expected {starts}")
    order = list(first.system.stages)
    for name in found.keys() - {FIRST}:
        if name not in order:
            raise CheckpointError(f"{name} is given, which is no stage after {first.system.title}; leave it out")
        if missing := [one for one in order[: order.index(name)] if one not in found]:
            raise CheckpointError(
                f"{name} is given without {missing[-1]}, whose pictures it enlarges; give both, or call it by itself"
            )
    for name, source in found.items():
        expected = first.system if name == FIRST else first.system.stages[name]
        if source.system is not expected:
            raise CheckpointError(f"{name}={str(source.name)!r} is {source.system.title}, expected {expected.title}")
    part_loading.check_reads(first)
    told = [(one.name, one.system.checkpoint.notice(one.model_index)) for one in found.values()]
    notices = [f"{name} {notice}" for name, notice in told if notice]
    if safety_checker is True and notices:
        warn(notices[0])


def _stages(
    found: Mapping[str, Source],
    options: Mapping[str, Any],
    attention: str,
    schedulers: Mapping[str, Any],
    adapters: Mapping[str, Mapping[str, Any]],
    safety_checker: Any,
    low_memory: bool,
) -> dict[str, Stage]:
    """Loads the stages, or what checks their arguments where they are loaded later."""
    kind = found[FIRST].system.text.type
    stages: dict[str, Stage] = {}
    folders: dict[str, Path] = {}
    for name, source in found.items():
        shares = name != FIRST and source.system.text.type is kind
        own = not shares and source.system.checkpoint.notice(source.model_index) is None and name != FIRST
        without = ["text_encoder", "tokenizer"] if shares else []
        folders[name] = source.fetch(
            options["variant"], without=[*without, *([] if own and safety_checker is True else [CHECKER])]
        )
        part_loading.check_adapter_files(folders[name], not shares, **adapters[name])
    for name, folder in folders.items():
        shares = name != FIRST and found[name].system.text.type is kind
        keeps_text = not shares and not (name == FIRST and low_memory)
        # The second stage takes the first one's texts; the first one's text encoder may be loaded by itself.
        without_text = partial(loading.load, text_encoder=False) if shares else part_loading.load_without_text
        load = partial(
            loading.load if keeps_text else without_text,
            folder,
            **options,
            attention=attention,
            scheduler=schedulers.get(name),
            safety_checker=safety_checker if not shares and name != FIRST else False,
            **adapters[name],
        )
        if low_memory:
            outline = _outline(folder, schedulers.get(name), options["dtype"], options["devices"], keeps_text)
            stages[name] = Stage(outline, load)
        else:
            stages[name] = _loaded(load())
    texts = {
        stages[name].outline.models.unet.config.text_dim for name in stages if found[name].system.text.type is kind
    }
    if len(texts) > 1:
        raise CheckpointError(f"the stages read texts of {sorted(texts)} channels; do they belong together?")
    return stages


def _loaded(pipe: Pipeline) -> Stage:
    """Returns a stage whose pipeline stays loaded."""
    return Stage(pipe, lambda: pipe)


def _outline(folder: Path, scheduler: Any, dtype: np.dtype, devices: Devices, keeps_text: bool) -> Pipeline:
    """Returns a pipeline without values, which checks arguments."""
    replaced = {} if keeps_text else {"text_encoder": None}
    found = loading.describe(folder, scheduler=scheduler, safety_checker=False, replaced=replaced)
    models = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), found.models)
    return Pipeline(found.system, models, found.tokenizer, found.scheduler, devices, None, found.extras)


def _are_words(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(v, str) for v in value)
    )


def _replaced(call: Mapping[str, Any], read: Callable[[str], Any]) -> dict[str, Any]:
    """Returns a call with something else in place of its words; those of a negative prompt are empty by default."""

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
    found: list[str] = []

    def keep(word: str) -> str:
        found.append(word)
        return word

    _replaced(call, keep)
    return found


def _clean(words: str) -> str:
    from sega_jax.text import caption_cleaning  # whose libraries are of an extra

    return caption_cleaning.clean(words) if words else words


def _without(images: Any, bad: np.ndarray, output: str) -> Any:
    """Returns pictures without those that came of states that were not finite."""
    if output == "pil":
        return [None if wrong else image for image, wrong in zip(images, bad, strict=True)]
    return np.where(bad[:, None, None, None], np.zeros((), images.dtype) if output == "uint8" else np.nan, images)
