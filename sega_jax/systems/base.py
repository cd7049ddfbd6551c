"""What a family of checkpoints is: a `System`, a value of four small parts, each of which has one reader.

`Checkpoint` is for loading, `TextReader` for words, `Sampler` for the compiled programs, and a class of arguments for
calls. A new family is a file that builds such a value and registers it (`sega_jax.register`); nothing else asks which
family a checkpoint belongs to.

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
    """How large the pictures of a checkpoint are."""

    channels: int  # of the state
    factor: int  # pixels along a side for one position of the state
    multiple: int  # height and width in pixels are multiples of it
    default: tuple[int, int] | None  # height and width in pixels; None where a smaller picture decides
    enlarges: int = 0  # how many times larger than the picture that conditions it; 0 where there is none


class Static(NamedTuple):
    """What is compiled in; everything else is an array that a program takes."""

    semantics: str = "diffusers"
    support: str = "channel"
    record: bool = False
    record_noise: bool = False
    own: Hashable = None  # the family's own choices, such as its solver


class Settings(NamedTuple):
    """The numbers of every row."""

    key: jax.Array  # typed keys [rows]
    guidance_scale: Any  # [rows]
    edits: Edits | None = None  # [rows, n] each; None for no concepts at all
    guidance_rescale: Any = None  # [rows] in [0, 1]; None for none at all
    replay: Any = None  # [rows, calls, height, width, channels] to be added, or None
    own: Any = None  # the family's own arrays, rows first; the pipeline passes them on unread
    noise: Any = None  # of every call in place of what `Sampler.draw` draws, [rows, calls, ...] each; or None

    @property
    def n(self) -> int:
        """The number of concepts."""
        return 0 if self.edits is None else self.edits.scale.shape[1]


class Record(NamedTuple):
    """What every model call predicted and what semantic guidance added; arrays [rows, calls, ...] in float32."""

    sem_guidance: Any  # [rows, calls, height, width, channels], without cfg and without replay
    uncond: Any  # [rows, calls, height, width, channels]
    cond: Any  # [rows, calls, height, width, channels]
    edits: Any  # [rows, calls, n, height, width, channels]; None without concepts
    # With `Static.record_noise` what was drawn for every call, [rows, calls, ...] each. An `Output` has it as [calls,
    # pictures, ...], as a call takes it.
    noise: Any = None


class Given(NamedTuple):
    """What a family knows of a call, beside its arguments, when it sets the call up."""

    models: Any
    scheduler: Any  # a `Scheduler`; None for a family that has its own schedule
    extras: Any  # of `Checkpoint.extras`
    rows: int
    n: int  # concepts
    texts: Sequence[Any]  # the prompt of every row, words or a `Text` of one row
    spread: Callable[[str, Sequence[Any]], list[Any]]  # entries for each prompt, or each picture -> one for each row
    dtype: np.dtype  # of the loop: float32 or wider
    platform: str  # of the devices: cpu, gpu, tpu
    devices: int  # how many there are
    warn: Callable[[str], None]


class Setup(NamedTuple):
    """How a call begins, as its family decides."""

    shape: tuple[int, int, int]  # height, width and channels of a row's predictions
    table: Any  # of the schedule
    own: Any = None  # arrays for `Settings.own`, rows first
    static: Hashable = None  # choices for `Static.own`
    x: np.ndarray | None = None  # the state to start from, rows first; None draws it
    picture: np.ndarray | None = None  # [rows, height, width, 3] in [-1, 1], to start from
    picture_noise: np.ndarray | None = None  # [rows, *shape], with which its latents are drawn; None draws it
    draws: bool = True  # whether the solver uses the noise of its calls
    # [rows], of classifier-free guidance in place of the call's, where the network takes that as an input; the negative
    # prompt is then the empty text
    guidance_scale: np.ndarray | None = None
    guidance_rescale: np.ndarray | None = None  # [rows]
    decode: Mapping[str, Hashable] = {}  # static arguments of `Sampler.decode`


class Network(NamedTuple):
    """One network of a checkpoint."""

    module: type  # built from its config; has `rename`
    config: Any  # its `from_dict` reads config.json
    stem: str = "diffusion_pytorch_model"  # the name of its weight file without ending
    optional: bool = False  # whether a checkpoint may do without it
    also: tuple[str, ...] = ()  # names of other classes whose files hold this network
    # config -> options of config.json that are no fields of it, without which other libraries build another network
    options: Callable[[Any], Mapping[str, Any]] = lambda config: {}
    published: Callable[[str], str] = str  # a key of the module -> the key in published files, which `rename` reads
    library: str = ""  # in model_index.json; "" for diffusers, and transformers where the stem is "model"


class Saved(NamedTuple):
    """How a pipeline of a family is written as a checkpoint in diffusers layout."""

    class_name: str  # of the pipeline, in model_index.json
    entries: Callable[[Any], Mapping[str, Any]] = lambda extras: {}  # extras -> further entries of model_index.json
    schedulers: Callable[[Any], Mapping[str, Scheduler]] = lambda extras: {}  # extras -> further ones, by their folders
    # tokenizer -> those that have files, by their folders
    tokenizers: Callable[[Any], Mapping[str, Any]] = lambda tokenizer: {"tokenizer": tokenizer}


def has_class(index: Mapping[str, Any], name: str) -> bool:
    """Tells whether a model_index.json names this class of pipeline."""
    return index.get("_class_name") == name


def listed(index: Mapping[str, Any], part: str) -> str | None:
    """Returns the class of a part in a model_index.json; None where it has none. Flax's class of a network counts as
    torch's, since both have the same parameters."""
    entry = index.get(part)
    name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    return name.removeprefix("Flax") if isinstance(name, str) else name


def scheduler_of(folder: Path) -> Scheduler:
    """Reads the scheduler of a checkpoint's folder."""
    return from_config(read_json(folder / "scheduler" / "scheduler_config.json"))


class Checkpoint(NamedTuple):
    """How the files of a family become its networks."""

    recognise: Callable[[Mapping[str, Any]], bool]  # from model_index.json
    models: type[Any]  # the family's NamedTuple of networks
    networks: Mapping[str, Network]  # by their folders, which are the fields of `models`
    build: Callable[..., Any]  # (config, network or None by folder, attention=) -> the family's NamedTuple of networks
    tokenizer: Callable[[Path, Any, Any], Any]  # (folder, models, given by the user or None) -> tokenizer or None
    tokenizers: tuple[str, ...] = ("tokenizer",)  # folders that are fetched for it
    scheduler: Callable[[Path], Scheduler] | None = scheduler_of  # None where the family has none
    schedulers: tuple[str, ...] = ("scheduler",)  # folders that are fetched for schedules
    extras: Callable[[Path, Mapping[str, Any], Any], Any] = lambda folder, index, models: None
    extras_type: type[Any] = type(None)  # of what `extras` returns
    refuse: Callable[[Mapping[str, Any]], str | None] = lambda index: None  # why a relative is not supported
    notice: Callable[[Mapping[str, Any]], str | None] = lambda index: None  # what a user should be warned of
    unchecked: Mapping[str, Any] = {}  # entries of an index whose checkpoint has no safety checker
    single_file: Any = None  # `sega_jax.weights.single_file.SingleFile`; None where the family has none
    saved: Saved | None = None  # None for a family whose pipelines cannot be saved
    adapters: Any = None  # which networks LoRAs and textual inversion may change; None for none


class Encode(NamedTuple):
    """Encodes tokens: `encode(ids)` returns a text of one row for each entry of ids, a pytree with the texts first."""

    networks: Any  # as `TextReader.networks` returns them
    run: Callable[[Any, Any], list[Any]]  # (networks, ids) -> texts of one row each

    def __call__(self, ids: Any) -> list[Any]:
        return self.run(self.networks, ids)


def read_tokens(words: Sequence[str], tokenizer: Any, encode: Encode, warn: Callable[[str], None]) -> list[Any]:
    """Reads words, one row of tokens each."""
    return encode(tokenizer(words, warn=warn))


def _as_given(models: Any, tokenizer: Any, text: Any) -> Any:
    return text


def _no_length(tokenizer: Any, words: Sequence[str], **options: Any) -> None:
    return None


def _empty(models: Any, tokenizer: Any, extras: Any) -> str:
    return ""


class TextReader(NamedTuple):
    """How words become the family's text conditioning."""

    type: type[Text]
    parts: tuple[str, ...]  # the folders of the networks that `networks` takes from the models
    networks: Callable[[Any], Any]  # models -> what `encode` takes; None where they cannot read
    encode: Callable[[Any, Any], Any]  # (networks, ids) -> texts; compiled
    # (words, tokenizer, encode: Encode, warn, **options) -> texts of one row each
    read: Callable[..., list[Any]] = read_tokens
    # (networks, options of `read`) -> nothing; raises ValueError where these networks cannot read texts so
    check_options: Callable[[Any, Mapping[str, Any]], None] = lambda networks, options: None
    # (models, tokenizer, a user's text of `type` and one row, or an array without that axis) -> it, checked
    check: Callable[[Any, Any, Any], Any] = _as_given
    join: Callable[[Sequence[Any], Callable[[], Any]], Any] = lambda texts, blank: stacked(texts)
    # (tokenizer, words, **options) -> the length that `join` pads their texts to, where a text depends on it; else None
    length: Callable[..., Hashable] = _no_length
    negative: Callable[[Any, Any, Any], Any] = _empty  # (models, tokenizer, extras) -> in place of no negative prompt
    prior: Callable[[Any], Any] = lambda models: None  # models -> what `sample_prior` takes; None where nothing is
    sample_prior: Callable[[Any, Any, jax.Array], Any] | None = None  # (prior, text, keys [rows]) -> text; compiled


class Sampler(NamedTuple):
    """How the states of a family are drawn, predicted, stepped and decoded.

    From `initial` to `decode`, and `encode_image`, these are pure functions of one device's share of the rows. `check`
    takes a call, the scheduler and what warns: it checks arguments that depend on the scheduler alone.
    """

    sizes: Callable[[Any], Sizes]  # of models
    networks: Callable[[Any], Any]  # models -> what `denoiser` takes
    table: Callable[[Any, Any], Any]  # (call, scheduler or None) -> the schedule's table
    static: Callable[[Any, Any], Hashable]  # (call, scheduler or None) -> choices for `Static.own`
    setup: Callable[[Any, Given], Setup]  # checks the family's own arguments
    initial: Callable[..., Any]  # (settings, x or None, scale, clean, signal, shape=, dtype=) -> the first state
    denoiser: Callable[..., Callable[[Any, Any], Predictions]]  # (networks, text, settings, own, x) -> (x, call) -> ...
    solver: Callable[[Any, Settings, Any], Solver]  # (networks or None, settings, own)
    draw: Callable[[Any, Settings, Any], Callable]  # (networks, settings, x) -> (call, shape) -> the noise of a call
    decoder: Callable[[Any], Any]  # models -> what `decode` takes
    decode: Callable[..., tuple[Any, Any]]  # (decoder, x) -> pictures in [0, 1], and whether each row is finite
    check: Callable[[Any, Any, Callable[[str], None]], None] = lambda call, scheduler, warn: None
    # scheduler or None -> arguments of a call that depend on it where they are None
    defaults: Callable[[Any], Mapping[str, Any]] = lambda scheduler: {}
    encoder: Callable[[Any], Any] = lambda models: None  # models -> what `encode_image` takes
    encode_image: Callable[[Any, jax.Array, Any, Any], Any] | None = None  # (encoder, keys, pictures, noise) -> states


class System(NamedTuple):
    """A family of checkpoints."""

    name: str  # an identifier: "stable_diffusion"
    title: str  # for people: "Stable Diffusion 1.x or 2.x"
    checkpoint: Checkpoint
    text: TextReader
    sampler: Sampler
    call: type[Call]
    stages: Mapping[str, "System"] = {}  # what may enlarge its pictures in a cascade, by name, in order
