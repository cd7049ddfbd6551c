"""Cascades, in which a first stage generates pictures and later stages enlarge them. Shared texts are encoded once.

In DeepFloyd-IF's cascade, the pictures' sides grow from 64 to 256 and 1024 pixels. A family that can be the first stage
lists the later stages in `System.stages`.
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
from sega_jax.method.naming import assignment, name_of, of_stage
from sega_jax.pipelines import diffusers_names, loading, part_loading
from sega_jax.pipelines.cascade_texts import are_words, cleaned, with_words, words_of
from sega_jax.pipelines.components import checked_scheduler
from sega_jax.pipelines.device_defaults import pick_attention, pick_dtype
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.load_options import check_checker
from sega_jax.pipelines.messages import collected, muted, warn
from sega_jax.pipelines.pipeline import Output, Pipeline
from sega_jax.pipelines.run import warn_of_pictures
from sega_jax.pipelines.safety import Safety
from sega_jax.pipelines.sources import Source, find
from sega_jax.systems.call import EditLike
from sega_jax.systems.registry import CHECKER, check_adapters, starting_systems
from sega_jax.text.files import CheckpointError

FIRST = "stage1"
# These arguments determine how edits are combined. The command line and sweeps set them once for all stages.
SHARED = ("momentum_scale", "momentum_beta", "semantics", "support")
# The cascade sets these arguments itself, so users cannot set them for a stage.
_OWN = {"prompt", "negative_prompt", "images_per_prompt", "seed", "key", "image", "output", "strict"}


class Stage(NamedTuple):
    """One stage of a cascade. It either stays loaded or is loaded for each run."""

    outline: Pipeline  # checks arguments; its networks may have shapes instead of parameters
    load: Callable[[], Pipeline]  # returns the pipeline to run


@dataclasses.dataclass
class CascadeOutput(Output):
    """The last stage's output. `finite` covers all stages; `stages` maps each stage's name to its output."""

    stages: dict[str, Output] = dataclasses.field(default_factory=dict)


class Cascade:
    """A chain of stages; each later stage enlarges the pictures of the stage before it. `load_cascade` creates it.

    Args:
        encode: A function that encodes a list of n strings as the first stage's text conditioning, with n rows.
        stages: {name: stage}, in the order in which the stages run.

    Example:
        >>> import sega_jax
        >>> from sega_jax.pipelines.cascade import Stage
        >>> pipe = sega_jax.load()
        >>> cascade = sega_jax.Cascade(pipe.encode, {"stage1": Stage(pipe, lambda: pipe)})
        >>> cascade("a face", stage1={"steps": 2}, output="latent").images.shape
        (1, 32, 32, 4)
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
        """Generates pictures from the prompts; the edits guide the stages in `edited`.

        Args:
            prompt, edits, negative_prompt, images_per_prompt, seed, key, output, strict: As for `Pipeline`, but all
                texts must be strings. All stages use the same seeds, so each gives the same result when called alone.
            edited: The names of the stages that the edits guide. The same warm-up or scale has a different effect in
                each stage. If a stage's own arguments include `edits`, that stage uses those edits instead.
            clean: Whether to clean all texts for the first stage's text encoder the way DeepFloyd-IF's training
                captions were cleaned (`sega_jax.text.caption_cleaning`, which needs the extra "if").
            stages: Other arguments for the stages' `Pipeline` calls, keyed by stage name, such as stage2={"steps": 20}.

        Raises:
            TypeError, ValueError: An argument is invalid for a stage. Raised before any model runs.
        """
        names = [edited] if isinstance(edited, str) else list(edited)
        for name in [*names, *(name for name, options in stages.items() if options is not None)]:
            if name in diffusers_names.ARGUMENTS:
                raise TypeError(f"{name} is diffusers' name; {diffusers_names.ARGUMENTS[name]}")
            if name not in self.stages:
                raise ValueError(
                    f"{name!r} is not a stage of this cascade, which has {', '.join(self.stages)}; give a stage's"
                    f" arguments under its name, such as {FIRST}={{'steps': 50}}"
                )
        if not are_words(prompt) or not (negative_prompt is None or are_words(negative_prompt)):
            raise TypeError("prompt and negative_prompt should be strings, because stages may have different encoders")
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
                raise TypeError(f"{name} has {', '.join(sorted(wrong))}, which the cascade sets; leave it out")
            forced = {"output": output if name == list(self.stages)[-1] else "float"}
            calls[name] = common | {"edits": edits if name in names else ()} | options | forced
        with collected():
            return self._run(self._read(self._fit(calls), clean), output)

    def _fit(self, calls: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Checks the calls of all stages, and adds the picture size to each stage's call."""
        size, fitted = None, {}
        for name, call in calls.items():
            outline = self.stages[name].outline
            sizes = outline.system.sampler.sizes(outline.models)
            if size is not None:
                picture = np.zeros((*size, 3), np.uint8)
                size = [sizes.enlarges * side for side in size]
                call = {"height": size[0], "width": size[1]} | call | {"image": picture}
            with of_stage("" if name == FIRST else name):
                outline.prepare(**call)
            if size is None:
                size = [sizes.factor * s for s in outline.latent_shape(call.get("height"), call.get("width"))[:2]]
            fitted[name] = call
        return fitted

    def _read(self, calls: dict[str, dict[str, Any]], clean: bool) -> dict[str, dict[str, Any]]:
        """Encodes the strings in the calls of all stages that share the first stage's text encoder."""
        text_type = self.stages[FIRST].outline.system.text.type
        shared = {name: call for name, call in calls.items() if self.stages[name].outline.system.text.type is text_type}
        read = cleaned if clean else str
        words = list(dict.fromkeys(read(word) for call in shared.values() for word in words_of(call)))
        new = [word for word in words if word not in self._known]
        encoded = dict(zip(new, self._encode(new), strict=True)) if new else {}
        gc.collect()
        self._known = {word: encoded[word] if word in encoded else self._known[word] for word in words}
        return calls | {name: with_words(call, lambda word: self._known[read(word)]) for name, call in shared.items()}

    def _run(self, calls: dict[str, dict[str, Any]], output: str) -> CascadeOutput:
        outputs: dict[str, Output] = {}
        finite, picture = np.array(True), None
        for name, stage in self.stages.items():
            pipe = stage.load()
            # These warnings were already emitted when the calls were checked.
            with muted(), of_stage("" if name == FIRST else name):
                outputs[name] = pipe(**calls[name] | ({} if picture is None else {"image": picture}))
            warn_of_pictures(outputs[name].finite, outputs[name].flagged)
            del pipe
            gc.collect()
            finite = finite & outputs[name].finite
            if name != list(self.stages)[-1]:
                images = outputs[name].images
                assert isinstance(images, np.ndarray)
                # Pictures that are not finite become grey for the later stages. The result omits them anyway.
                picture = np.where(finite[:, None, None, None], images, 0.5)
        last = outputs[name]
        return CascadeOutput(
            _without(last.images, ~finite, output), finite, last.seeds, last.record, last.flagged, stages=outputs
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
    """Loads DeepFloyd-IF's cascade, or only its first stages, as a `Cascade`.

    In bfloat16, IF-I-XL takes up 8.6 GB, IF-II-L 2.5 GB and their text encoder T5-XXL 9.5 GB
    (`python tests/benchmarks/parameters.py`).

    Args:
        stage1, stage2, upscaler: The checkpoints, as for `load`: DeepFloyd-IF's first and second stages, and Stable
            Diffusion's x4 upscaler. The second stage uses the first stage's text encoder.
        further: {stage name: checkpoint}, for cascades of other families. `System.stages` lists the stage names.
        low_memory: Whether calls load each network only when it is needed and free it afterwards.
        dtype, variant, devices, attention: As for `load`; they apply to all stages.
        revisions: {stage name: the branch, tag or commit of the checkpoint on the hub}.
        schedulers: {stage name: replacement for the checkpoint's scheduler}.
        loras, textual_inversions: {stage name: value of `load`'s option `lora` or `textual_inversion`}. A LoRA that
            changes the first stage's text encoder also affects the second stage's text conditioning.
        safety_checker: As for `load`. It applies only to the x4 upscaler; DeepFloyd-IF's own checker is not supported.

    Raises:
        CheckpointError: A checkpoint does not fit its stage (raised before any weights are fetched), or the stages need
            text embeddings of different widths; `load` lists further cases.
        ValueError: A stage is missing or unknown, or does not support an adapter; `load` lists further cases.

    Example:
        >>> import sega_jax
        >>> cascade = sega_jax.load_cascade("DeepFloyd/IF-I-XL-v1.0", "DeepFloyd/IF-II-L-v1.0")  # doctest: +SKIP
        >>> out = cascade("a castle", ["snow"], edited=["stage1", "stage2"])  # doctest: +SKIP
    """
    if upscaler is not None and stage2 is None:
        raise ValueError(
            f"{name_of('upscaler')} is given without {name_of('stage2')}, whose pictures it enlarges; give both"
        )
    check_checker(safety_checker)
    where = devices if isinstance(devices, Devices) else Devices(devices)
    dtype = pick_dtype(dtype, where)
    attention = pick_attention(attention, dtype, where)
    named_sources = {FIRST: stage1, "stage2": stage2, "upscaler": upscaler} | dict(further or {})
    checkpoints = {name: source for name, source in named_sources.items() if source is not None}
    revisions, schedulers = revisions or {}, schedulers or {}
    adapters = {"lora": loras or {}, "textual_inversion": textual_inversions or {}}
    _check_names({"revisions": revisions, "schedulers": schedulers}, checkpoints)
    _check_names({f"{option}s": of for option, of in adapters.items()}, checkpoints)
    schedulers = _by_stage(schedulers, lambda _, scheduler: checked_scheduler(scheduler))
    with collected():
        # First, all model_index.json files are fetched and checked, because fetching weights may take hours.
        sources = _by_stage(checkpoints, lambda name, source: find(source, revisions.get(name)))
        _check_stages(sources, safety_checker)
        sources = {name: sources[name] for name in (FIRST, *sources[FIRST].system.stages) if name in sources}
        by_stage = {name: {option: of.get(name) for option, of in adapters.items()} for name in sources}
        _by_stage(sources, lambda name, source: check_adapters(source.system, by_stage[name]))
        options: dict[str, Any] = {"dtype": dtype, "variant": variant, "devices": where}
        stages = _stages(sources, options, attention, schedulers, by_stage, safety_checker, low_memory)
    if low_memory:
        folder, lora = sources[FIRST].folder, by_stage[FIRST]["lora"]
        return Cascade(lambda words: part_loading.load_text(folder, lora=lora, **options)(words), stages)
    return Cascade(stages[FIRST].outline.encode, stages)


def _by_stage(values: Mapping[str, Any], function: Callable[[str, Any], Any]) -> dict[str, Any]:
    """Applies a function to the name and the value of each stage. Error messages name the stage."""
    results = {}
    for name, value in values.items():
        with of_stage(name):
            results[name] = function(name, value)
    return results


def _check_names(options: Mapping[str, Mapping[str, Any]], stages: Mapping[str, Any]) -> None:
    """Checks that options are mappings whose keys are stage names.

    Raises:
        TypeError: An option is not a mapping.
        ValueError: A key is not the name of a stage.
    """
    for option, by_stage in options.items():
        if not isinstance(by_stage, Mapping):
            raise TypeError(f"{option}={brief(by_stage)} should map stage names to values, such as {{{FIRST!r}: ...}}")
        if unknown := by_stage.keys() - stages.keys():
            raise ValueError(f"{option} has {', '.join(sorted(unknown))}; the stages are {', '.join(stages)}")


def _check_stages(sources: Mapping[str, Source], safety_checker: Any) -> None:
    """Checks that the checkpoints form one cascade; raises a CheckpointError if they do not."""
    first = sources[FIRST]
    if not first.system.stages:
        starts = " or ".join(system.title for system in starting_systems())
        raise CheckpointError(f"{assignment(FIRST, str(first.name))} is {first.system.title}, expected {starts}")
    order = list(first.system.stages)
    for name in sources.keys() - {FIRST}:
        if name not in order:
            raise CheckpointError(f"{name_of(name)} is given, but {first.system.title} has no such stage; leave it out")
        if missing := [one for one in order[: order.index(name)] if one not in sources]:
            needed = name_of(missing[-1])
            raise CheckpointError(f"{name_of(name)} is given without {needed}, whose pictures it enlarges; give both")
    for name, source in sources.items():
        expected = first.system if name == FIRST else first.system.stages[name]
        if source.system is not expected:
            given = assignment(name, str(source.name))
            raise CheckpointError(f"{given} is {source.system.title}, expected {expected.title}")
    part_loading.check_reads(first)
    notices_by_name = [(one.name, one.system.checkpoint.notice(one.model_index)) for one in sources.values()]
    notices = [f"{name} {notice}" for name, notice in notices_by_name if notice]
    if safety_checker is True and notices:
        warn(notices[0])


def _stages(
    sources: Mapping[str, Source],
    options: Mapping[str, Any],
    attention: str,
    schedulers: Mapping[str, Any],
    adapters: Mapping[str, Mapping[str, Any]],
    safety_checker: Any,
    low_memory: bool,
) -> dict[str, Stage]:
    """Loads the stages. With `low_memory`, only outlines are created, which check arguments but have no weights."""
    text = sources[FIRST].system.text.type
    stages: dict[str, Stage] = {}
    folders: dict[str, Path] = {}
    for name, source in sources.items():
        shares = name != FIRST and source.system.text.type is text
        has_own_checker = not shares and source.system.checkpoint.notice(source.model_index) is None and name != FIRST
        without = ["text_encoder", "tokenizer"] if shares else []
        without += [] if has_own_checker and safety_checker is True else [CHECKER]
        with of_stage(name):
            folders[name] = source.fetch(options["variant"], without=without)
            part_loading.check_adapter_files(folders[name], not shares, **adapters[name])
    for name, folder in folders.items():
        shares = name != FIRST and sources[name].system.text.type is text
        keeps_text = not shares and not (name == FIRST and low_memory)
        # The first stage's text encoder also encodes the second stage's texts. With `low_memory`, it is loaded
        # separately.
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
        with of_stage(name):
            if low_memory:
                outline = _outline(folder, schedulers.get(name), options["dtype"], options["devices"], keeps_text)
                stages[name] = Stage(outline, load)
            else:
                stages[name] = _loaded(load())
    texts = {
        stages[name].outline.models.unet.config.text_dim for name in stages if sources[name].system.text.type is text
    }
    if len(texts) > 1:
        raise CheckpointError(f"the stages need text embeddings of widths {sorted(texts)}; use stages from one release")
    return stages


def _loaded(pipe: Pipeline) -> Stage:
    """Returns a stage whose pipeline stays loaded."""
    return Stage(pipe, lambda: pipe)


def _outline(folder: Path, scheduler: Any, dtype: np.dtype, devices: Devices, keeps_text: bool) -> Pipeline:
    """Returns a pipeline that can only check arguments; its networks have shapes instead of parameters."""
    replaced = {} if keeps_text else {"text_encoder": None}
    parts = loading.describe(folder, scheduler=scheduler, safety_checker=False, replaced=replaced)
    models = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), parts.models)
    return Pipeline(**parts._asdict() | {"models": models, "devices": devices, "safety": None})


def _without(images: Any, bad: np.ndarray, output: str) -> Any:
    """Replaces bad pictures with None, black or NaN, depending on the output format."""
    if output == "pil":
        return [None if wrong else image for image, wrong in zip(images, bad, strict=True)]
    return np.where(bad[:, None, None, None], np.zeros((), images.dtype) if output == "uint8" else np.nan, images)
