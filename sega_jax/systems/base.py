"""Classes that describe a family of checkpoints: a `System` and its parts.

A `System` has a `Checkpoint` for loading, a `TextReader` for encoding texts, a `Sampler` for the compiled programs, and
a dataclass for the call arguments. To add a family, build a `System` and register it (`sega_jax.register`). No other
code depends on a checkpoint's family.

Axes: rows of the batch, branches (2 + n: unconditional, prompt, concepts), height, width, channels.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sega_jax.method.guidance import Edits, Predictions
from sega_jax.method.schedules import Scheduler, from_config
from sega_jax.method.solvers import Solver
from sega_jax.systems.call import Call
from sega_jax.systems.conditioning import Text, stacked
from sega_jax.text.files import read_json


class Sizes(NamedTuple):
    """The picture sizes that a checkpoint supports.

    Example:
        >>> from sega_jax import Sizes
        >>> Sizes(channels=4, factor=8, multiple=8, default=(512, 512)).default
        (512, 512)
    """

    channels: int  # the number of channels of the state
    factor: int  # the state's downsampling factor: pixels per state position in height and in width
    multiple: int  # height and width in pixels must be multiples of this number
    default: tuple[int, int] | None  # (height, width) in pixels; None if the low-resolution picture sets them
    enlarges: int = 0  # the enlargement factor; 0 for families without low-resolution pictures


class Static(NamedTuple):
    """The compile-time options of a call. All other inputs of a call are arrays.

    Example:
        >>> import sega_jax
        >>> sega_jax.load().prepare("a cat", semantics="per_concept").static.semantics
        'per_concept'
    """

    semantics: str = "diffusers"  # see `sega_jax.sega`
    support: str = "channel"  # see `sega_jax.sega`
    record: bool = False  # whether to record predictions
    record_noise: bool = False  # whether to record the solver's noise
    own: Hashable = None  # the family's own options, such as its solver


class Settings(NamedTuple):
    """A call's arrays; the first axis of each runs over the rows.

    Compiled programs take these arrays as arguments, so changing their values never triggers a recompilation.

    Example:
        >>> import jax, numpy as np
        >>> from sega_jax import Edit, Edits, Settings
        >>> edits = Edits.stack([[Edit("hat")], [Edit("glasses")]])
        >>> Settings(jax.random.split(jax.random.key(0), 2), np.full(2, 7.5), edits).n
        1
    """

    key: jax.Array  # typed keys [rows]
    guidance_scale: Any  # [rows]
    edits: Edits | None = None  # arrays [rows, n]; None without concepts
    guidance_rescale: Any = None  # [rows] in [0, 1]; None disables rescaling
    replay: Any = None  # recorded guidance to add, [rows, calls, height, width, channels]; or None
    own: Any = None  # the family's own arrays [rows, ...]; the pipeline passes them on without reading them
    noise: Any = None  # arrays [rows, calls, ...] to use instead of the noise from `Sampler.draw`; or None

    @property
    def n(self) -> int:
        """The number of concepts."""
        return 0 if self.edits is None else self.edits.scale.shape[1]


class Record(NamedTuple):
    """The predictions made and the semantic guidance added at every model call: float32 arrays [rows, calls, ...].

    Example:
        >>> import sega_jax
        >>> edit = sega_jax.Edit("glasses", warmup=0)
        >>> out = sega_jax.load()("a cat", edit, steps=2, record=True, output="latent", progress=False)
        >>> out.record.edits.shape  # picture, call, concept, height, width, channel
        (1, 2, 1, 32, 32, 4)
    """

    sem_guidance: Any  # [rows, calls, height, width, channels], excluding classifier-free and replayed guidance
    uncond: Any  # [rows, calls, height, width, channels]
    cond: Any  # [rows, calls, height, width, channels]
    edits: Any  # [rows, calls, n, height, width, channels]; None without concepts
    # The noise for every call, if `Static.record_noise` is set: arrays [rows, calls, ...]. In an `Output`, the axes are
    # [calls, pictures, ...], as in the argument `noise`.
    noise: Any = None


class Given(NamedTuple):
    """The information that a family needs to set up a call: the checkpoint, the batch and the devices.

    Example:
        >>> import numpy as np, sega_jax
        >>> pipe = sega_jax.load()
        >>> context = sega_jax.Given(
        ...     models=pipe.models, scheduler=pipe.scheduler, extras=pipe.extras, rows=2, n=0, texts=["a cat", "a dog"],
        ...     spread=lambda name, entries: list(entries), dtype=np.dtype("float32"), platform="cpu", devices=1,
        ...     warn=print,
        ... )
        >>> setup = pipe.system.sampler.setup(pipe.system.call(["a cat", "a dog"], eta=[0.0, 0.5]), context)
        >>> setup.own.eta.shape
        (2,)
    """

    models: Any
    scheduler: Any  # a `Scheduler`; None for a family with its own schedule
    extras: Any  # the result of `Checkpoint.extras`
    rows: int
    n: int  # the number of concepts
    texts: Sequence[Any]  # the prompt of every row: a string, or a `Text` with one row
    # (argument name, a list with one entry per prompt or picture) -> a list with one entry per row
    spread: Callable[[str, Sequence[Any]], list[Any]]
    dtype: np.dtype  # the dtype of the sampling loop: float32 or wider
    platform: str  # the devices' platform: cpu, gpu or tpu
    devices: int  # the number of devices
    warn: Callable[[str], None]


class Setup(NamedTuple):
    """The shapes, schedule, options and initial state that a family chooses for a call.

    Example:
        >>> import numpy as np
        >>> from sega_jax import Setup
        >>> setup = Setup(shape=(64, 64, 4), table=None, x=np.zeros((2, 64, 64, 4), np.float32))
        >>> setup.draws  # by default the solver draws noise
        True
    """

    shape: tuple[int, int, int]  # height, width and channels of a row's predictions
    table: Any  # the schedule's table
    own: Any = None  # arrays [rows, ...] for `Settings.own`
    static: Hashable = None  # options for `Static.own`
    x: np.ndarray | None = None  # the initial state [rows, ...]; drawn if None
    picture: np.ndarray | None = None  # the pictures to start from, [rows, height, width, 3] in [-1, 1]
    picture_noise: np.ndarray | None = None  # noise [rows, *shape] for sampling the pictures' latents; drawn if None
    draws: bool = True  # whether the solver uses noise at any model call
    # [rows], for networks that take the guidance scale as an input: the scale to use for classifier-free guidance
    # instead of the call's scale. The negative prompt is then the empty text.
    guidance_scale: np.ndarray | None = None
    guidance_rescale: np.ndarray | None = None  # [rows]
    decode: Mapping[str, Hashable] = {}  # static arguments for `Sampler.decode`


class Network(NamedTuple):
    """One network of a checkpoint: its classes, and the names that files use for it.

    Example:
        >>> import sega_jax
        >>> network = sega_jax.load().system.checkpoint.networks["text_encoder"]
        >>> network.module.__name__, network.stem
        ('CLIPTextModel', 'model')
    """

    module: type  # the network's class, which takes a config and has `rename`
    config: Any  # the config's class; `from_dict` reads config.json
    stem: str = "diffusion_pytorch_model"  # the name of the weight file without extension
    optional: bool = False  # whether a checkpoint may lack the network
    also: tuple[str, ...] = ()  # names of other classes whose files also contain this network
    # config -> additional entries for config.json, without which other libraries would build a different network
    options: Callable[[Any], Mapping[str, Any]] = lambda config: {}
    published: Callable[[str], str] = str  # a key in the module -> its key in published files; inverts `rename`
    library: str = ""  # as in model_index.json; "" means transformers if the stem is "model", otherwise diffusers


class Saved(NamedTuple):
    """How to save a family's pipelines as checkpoints in diffusers layout.

    Example:
        >>> from sega_jax import Saved
        >>> saved = Saved("MyPipeline", entries=lambda extras: {"zero_negative": True})
        >>> saved.entries(None)
        {'zero_negative': True}
    """

    class_name: str  # the pipeline's class name in model_index.json
    entries: Callable[[Any], Mapping[str, Any]] = lambda extras: {}  # extras -> additional entries for model_index.json
    schedulers: Callable[[Any], Mapping[str, Scheduler]] = lambda extras: {}  # extras -> {folder: additional scheduler}
    # tokenizer -> {folder: tokenizer}, omitting tokenizers that need no files
    tokenizers: Callable[[Any], Mapping[str, Any]] = lambda tokenizer: {"tokenizer": tokenizer}


def has_class(index: Mapping[str, Any], name: str) -> bool:
    """Returns whether a model_index.json names this pipeline class."""
    return index.get("_class_name") == name


def listed(index: Mapping[str, Any], part: str) -> str | None:
    """Returns the class name of a part according to model_index.json, or None if the part is absent.

    The prefix "Flax" is dropped: diffusers' Flax classes have the same parameters as its torch classes.
    """
    entry = index.get(part)
    name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    return name.removeprefix("Flax") if isinstance(name, str) else name


def scheduler_of(folder: Path) -> Scheduler:
    """Reads the scheduler from a checkpoint's folder."""
    return from_config(read_json(folder / "scheduler" / "scheduler_config.json"))


class Checkpoint(NamedTuple):
    """How to recognise a family's checkpoints, and how to read and save them.

    Example:
        >>> import sega_jax
        >>> checkpoint = sega_jax.load().system.checkpoint
        >>> list(checkpoint.networks)
        ['text_encoder', 'unet', 'vae']
        >>> stricter = checkpoint._replace(refuse=lambda index: "is too old" if "version" not in index else None)
        >>> stricter.refuse({"_class_name": "StableDiffusionPipeline"})
        'is too old'
    """

    recognise: Callable[[Mapping[str, Any]], bool]  # model_index.json -> whether the checkpoint belongs to this family
    models: type[Any]  # the family's NamedTuple of networks
    networks: Mapping[str, Network]  # {folder: network}; the folders are the fields of `models`
    build: Callable[..., Any]  # (attention=, a keyword argument per folder: a config, network or None) -> models
    tokenizer: Callable[[Path, Any, Any], Any]  # (folder, models, the user's tokenizer or None) -> tokenizer or None
    tokenizers: tuple[str, ...] = ("tokenizer",)  # folders to download for the tokenizer
    scheduler: Callable[[Path], Scheduler] | None = scheduler_of  # None if the family uses no scheduler
    schedulers: tuple[str, ...] = ("scheduler",)  # folders to download for schedulers
    # (folder, model_index.json, models) -> the checkpoint's settings that are not part of a network
    extras: Callable[[Path, Mapping[str, Any], Any], Any] = lambda folder, index, models: None
    extras_type: type[Any] = type(None)  # the type that `extras` returns
    refuse: Callable[[Mapping[str, Any]], str | None] = lambda index: None  # the reason for rejection, or None
    notice: Callable[[Mapping[str, Any]], str | None] = lambda index: None  # a warning to emit, or None
    unchecked: Mapping[str, Any] = {}  # entries in model_index.json for a checkpoint without a safety checker
    single_file: Any = None  # a `sega_jax.weights.single_file.SingleFile`; None without single files
    saved: Saved | None = None  # None if the family's pipelines cannot be saved
    adapters: Any = None  # the `AdapterNames` for LoRAs and textual inversion; None if they are not supported


class Encode(NamedTuple):
    """Encodes tokens: `encode(ids)` takes a pytree of arrays [texts, ...] and returns a list of one-row texts."""

    networks: Any  # the result of `TextReader.networks`
    run: Callable[[Any, Any], list[Any]]  # (networks, ids) -> a list of one-row texts

    def __call__(self, ids: Any) -> list[Any]:
        return self.run(self.networks, ids)


def read_tokens(words: Sequence[str], tokenizer: Any, encode: Encode, warn: Callable[[str], None]) -> list[Any]:
    """Tokenizes and encodes texts; each text becomes one row of tokens."""
    return encode(tokenizer(words, warn=warn))


def _unchanged(models: Any, tokenizer: Any, text: Any) -> Any:
    return text


def _no_length(tokenizer: Any, words: Sequence[str], **options: Any) -> None:
    return None


def _empty_text(models: Any, tokenizer: Any, extras: Any) -> str:
    return ""


class TextReader(NamedTuple):
    """How a family turns strings into its text conditioning.

    Example:
        >>> import sega_jax
        >>> reader = sega_jax.load().system.text
        >>> reader.type.__name__, reader.parts
        ('ClipText', ('text_encoder',))
    """

    type: type[Text]
    parts: tuple[str, ...]  # the folders of the networks that `networks` returns
    networks: Callable[[Any], Any]  # models -> the networks for `encode`; None without a text encoder
    encode: Callable[[Any, Any], Any]  # (networks, ids) -> texts; compiled
    # (strings, tokenizer, encode: Encode, warn, **options) -> a list with a one-row text for each string
    read: Callable[..., list[Any]] = read_tokens
    # (networks, options for `read`) -> None; raises ValueError if these networks do not support the options
    check_options: Callable[[Any, Mapping[str, Any]], None] = lambda networks, options: None
    # (models, tokenizer, a user's one-row text of type `type`, or an array without the row axis) -> the checked text
    check: Callable[[Any, Any, Any], Any] = _unchanged
    # (texts, a function that returns the encoded empty text) -> one text with all rows, padded to the same length
    join: Callable[[Sequence[Any], Callable[[], Any]], Any] = lambda texts, blank: stacked(texts)
    # (tokenizer, strings, **options) -> the length to which `join` pads the texts; None if padding has no effect
    length: Callable[..., Hashable] = _no_length
    negative: Callable[[Any, Any, Any], Any] = _empty_text  # (models, tokenizer, extras) -> the default negative prompt
    prior: Callable[[Any], Any] = lambda models: None  # models -> the network for `sample_prior`, or None
    sample_prior: Callable[[Any, Any, jax.Array], Any] | None = None  # (prior, text, keys [rows]) -> text; compiled


class Sampler(NamedTuple):
    """How a family draws the initial state, makes predictions, runs the solver and decodes the final state.

    `initial`, `denoiser`, `solver`, `draw`, `decode` and `encode_image` are pure functions that run on one device's
    share of the rows. `check` takes a call, the scheduler and a function that emits warnings, and checks the arguments
    whose validity depends only on the scheduler.

    Example:
        >>> import sega_jax
        >>> pipe = sega_jax.load()
        >>> pipe.system.sampler.sizes(pipe.models).default
        (128, 128)
    """

    sizes: Callable[[Any], Sizes]  # models -> the supported picture sizes
    networks: Callable[[Any], Any]  # models -> the networks for `denoiser`
    table: Callable[[Any, Any], Any]  # (call, scheduler or None) -> the schedule's table
    static: Callable[[Any, Any], Hashable]  # (call, scheduler or None) -> options for `Static.own`
    setup: Callable[[Any, Given], Setup]  # (call, context) -> setup; checks the family's own arguments
    initial: Callable[..., Any]  # (settings, x or None, scale, clean, signal, *, shape, dtype) -> the initial state
    denoiser: Callable[..., Callable[[Any, Any], Predictions]]  # (networks, text, settings, own, x) -> (x, call) -> ...
    solver: Callable[[Any, Settings, Any], Solver]  # (networks or None, settings, own) -> the solver
    draw: Callable[[Any, Settings, Any], Callable]  # (networks, settings, x) -> (call, shape) -> the noise for a call
    decoder: Callable[[Any], Any]  # models -> the network for `decode`
    decode: Callable[..., tuple[Any, Any]]  # (decoder, x) -> pictures in [0, 1] and whether each row is finite
    check: Callable[[Any, Any, Callable[[str], None]], None] = lambda call, scheduler, warn: None
    # scheduler or None -> {argument: default}, the scheduler's defaults for arguments that are None in the call
    defaults: Callable[[Any], Mapping[str, Any]] = lambda scheduler: {}
    encoder: Callable[[Any], Any] = lambda models: None  # models -> the network for `encode_image`
    encode_image: Callable[[Any, jax.Array, Any, Any], Any] | None = None  # (encoder, keys, pictures, noise) -> states


class System(NamedTuple):
    """A family of checkpoints.

    Example:
        >>> import sega_jax
        >>> system = sega_jax.load().system
        >>> system.name, system.title
        ('stable_diffusion', 'Stable Diffusion 1.x or 2.x')
    """

    name: str  # an identifier: "stable_diffusion"
    title: str  # a readable name: "Stable Diffusion 1.x or 2.x"
    checkpoint: Checkpoint
    text: TextReader
    sampler: Sampler
    call: type[Call]
    stages: Mapping[str, "System"] = {}  # {name: stage}: the later stages of a cascade, in order
