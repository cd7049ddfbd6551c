"""A sweep as data: a TOML file, or the same as a Python object.

[model]                                   # as sega_jax.load takes it; without it the demo model
source = "stable-diffusion-v1-5/stable-diffusion-v1-5"

[call]                                    # what all pictures share, as Pipeline takes it
steps = 50

[edits.glasses]                           # an edit and its settings; its words are its name, or `concept`
threshold = 0.95

[grid]                                    # every combination of these
prompt = ["a photo of a woman", "a photo of a man"]
image = { glob = "photos/*.png" }         # or { file = "photos.txt" }, a path in each line
lora = [{}, { "style.safetensors" = 0.5 }, { "style.safetensors" = 1.0 }]
seed = { from = 0, count = 8 }
glasses.scale = [0, 2, 4, 6]

[zip]                                     # these side by side, and every combination with the others
glasses.warmup = [5, 10]
glasses.cooldown = [25, "never"]

[sample]                                  # so many draws of these, and every combination with the others
count = 10
glasses.momentum_scale = { low = 0.0, high = 0.6 }

A cascade names its later stages by their checkpoints, and their settings begin with the stage's name:

[model]
source = "DeepFloyd/IF-I-XL-v1.0"
stage2 = "DeepFloyd/IF-II-L-v1.0"

[grid]
stage2.noise_level = [100, 250]
edited = [["stage1"], ["stage1", "stage2"]]   # the stages that the edits guide
"""

import dataclasses
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sega_jax.method.argument_kinds import Flag
from sega_jax.method.arguments import arguments
from sega_jax.method.checks import brief, check_int
from sega_jax.method.guidance import Edit
from sega_jax.pipelines.cascade import FIRST
from sega_jax.pipelines.load_options import LoadOptions
from sega_jax.sweep.description import axes, fields, stages
from sega_jax.sweep.description.axes import Block, Progression, Uniform
from sega_jax.sweep.description.fields import checked

# More points are a mistake in most cases, and a plan too large for one file.
MOST = 1_000_000
FORMATS = ("png", "webp")
# The options of `load` that a file can give.
_MODEL = {name: one for name, one in arguments(LoadOptions).items() if one.sweep}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """Points, each a call of `Pipeline` for one picture.

    Settings are named as in `Pipeline` ("prompt", "seed", "steps", "guidance_scale", ..., "scheduler"), those of an
    edit after its name ("glasses.scale"); "edits" lists which of the edits act. An axis is a list of values,
    {"from", "count", "step"}, {"file"}, the lines of a text, {"glob"}, the files that match a pattern, or in a sample
    {"low", "high"}. Paths are relative to the sweep's file. The points are the
    combinations of the axes in `grid`, each block of `zip`, and the draws of `sample`, the last axis fastest.

    Attributes:
        model: what `sega_jax.load` takes: source, revision, dtype, variant, safety_checker, attention; none of it is
            the demo model. Of a cascade it is the first stage, and the checkpoints of the others are named by their
            stages, such as stage2.
        call: settings that all points share.
        edits: of each edit by its name: its settings as `Edit` has them; its words, `concept`, are its name unless
            said.
        grid: axes by their settings, of which every combination is made.
        zip: axes of equal length that go side by side; or a list of such blocks.
        sample: axes of which `count` points are drawn, a list's values with equal chance; `key` (0) is a number that
            other draws have another of.
        format: of the pictures, "png" or "webp" (without loss).
        files: what is known of the files that settings name, by their paths: their SHA-256, and the height and width of
            pictures. Files that it does not have are read. A plan keeps it, so that its pictures can be looked at where
            the files are gone.
        folder: that files of values are relative to; it is no part of what the sweep says.

    Raises:
        TypeError, ValueError: an unknown setting, a value of another type or range, a setting that is said twice or a
            text that cannot be read; no points, or more than 1,000,000. Nothing but texts was read.

    Example:
        >>> from sega_jax import sweep
        >>> ablation = sweep.Sweep(
        ...     call={"prompt": "a portrait of a woman", "steps": 2},
        ...     edits={"glasses": {"warmup": 0}},
        ...     grid={"glasses.scale": [0, 8]},
        ... )
        >>> [point["glasses.scale"] for point in ablation]
        [0.0, 8.0]
    """

    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    call: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    edits: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    grid: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    zip: Mapping[str, Any] | Sequence[Mapping[str, Any]] = ()
    sample: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    format: str = "png"
    files: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    folder: dataclasses.InitVar[str | Path] = "."

    def __post_init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        for name in ("model", "call", "edits", "grid", "sample"):
            _table(name, getattr(self, name))
        if self.format not in FORMATS:
            raise ValueError(f"format={brief(self.format)} should be one of {', '.join(FORMATS)}")
        self._set("model", {key: _of_model(key, value) for key, value in self.model.items()})
        self._set("edits", {name: _edit(name, value) for name, value in self.edits.items()})
        for edit, given in self.edits.items():
            for name, value in given.items():
                given[name] = checked(f"{edit}.{name}", value, self.edits, "edits")
        call = _flat(self.call, self.edits)
        self._set("call", {key: checked(key, value, self.edits, "call", folder) for key, value in call.items()})
        if astray := [key for key in self.call if "." in key and not stages.split(key)[0]]:
            raise ValueError(f"call: {astray[0]!r} is of an edit; say it in [edits.{astray[0].rpartition('.')[0]}]")

        def read(where, table, draws=False):
            table = _flat(table, self.edits)
            return {key: axes.read(key, value, self.edits, folder, where, draws) for key, value in table.items()}

        self._set("grid", read("grid", self.grid))
        blocks = [self.zip] if isinstance(self.zip, Mapping) else self.zip
        if not isinstance(blocks, Sequence) or isinstance(blocks, str):
            raise TypeError(f"zip={brief(blocks)} should be a table of axes, or a list of such")
        blocks = [read("zip", _table("zip", block)) for block in blocks]
        for block in blocks:
            lengths = {key: len(values) for key, values in block.items()}
            if len(set(lengths.values())) > 1:
                said = ", ".join(f"{key} has {count}" for key, count in lengths.items())
                raise ValueError(f"zip: axes side by side have as many values each, but {said}")
        self._set("zip", tuple(block for block in blocks if block))
        self._set("sample", self._sample(read))
        self._check_once()
        self._check_count()
        self._set("files", self._read_files(self.files))

    def _read_files(self, given: Mapping[str, Any]) -> dict[str, Any]:
        listed: list[tuple[str, str, Sequence[Any]]] = [("call", key, [value]) for key, value in self.call.items()]
        for place, table in self._tables:
            listed += [(place, key, values) for key, values in table.items() if isinstance(values, tuple)]
        found: dict[str, Any] = {}
        for place, key, values in listed:
            kind = fields.kind_of(key)
            if kind is None or not kind.of_files:
                continue
            for path in (path for value in values if value is not None for path in kind.files(value)):
                try:
                    found[path] = given[path] if path in given else kind.known(path)
                except (FileNotFoundError, ValueError) as error:
                    raise type(error)(f"{place}: {key}: {error}") from None
        return found

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _sample(self, read: Any) -> dict[str, Any]:
        if not self.sample:
            return {}
        drawn = {key: value for key, value in self.sample.items() if key not in ("count", "key")}
        if "count" not in self.sample or not drawn:
            raise ValueError("sample should have a count of draws, and axes to draw from")
        count = check_int("sample: count", self.sample["count"], 0)
        if not count:
            raise ValueError("sample: count=0, so that the sweep has no points; give 1 at least")
        return {"count": count, "key": check_int("sample: key", self.sample.get("key", 0), 0)} | read(
            "sample", drawn, True
        )

    def _check_once(self) -> None:
        said = dict.fromkeys(self.call, "call")
        said |= {f"{edit}.{name}": f"edits.{edit}" for edit, given in self.edits.items() for name in given}
        for place, table in self._tables:
            for key in table:
                if key in said:
                    raise ValueError(f"{key!r} is said twice, in [{said[key]}] and in [{place}]; leave one out")
                said[key] = place
        if "prompt" not in said:
            raise ValueError("the sweep has no prompt; say it in [call], or several as an axis in [grid]")

    def _check_count(self) -> None:
        if len(self) > MOST:
            axes = {key: len(values) for key, values in self.grid.items()}
            axes |= {" with ".join(block): len(next(iter(block.values()))) for block in self._zipped}
            axes |= {"the sample": self.sample["count"]} if self.sample else {}
            largest = sorted(axes.items(), key=lambda item: -item[1])[:3]
            said = ", ".join(f"{key} has {count:,}" for key, count in largest)
            raise ValueError(f"the sweep has {len(self):,} points ({said}); the most are {MOST:,}: take several sweeps")

    @property
    def _zipped(self) -> Sequence[Mapping[str, Any]]:
        """The blocks of `zip`, which is a list once it is checked."""
        assert not isinstance(self.zip, Mapping)
        return self.zip

    @property
    def _drawn(self) -> dict[str, Any]:
        return {key: values for key, values in self.sample.items() if key not in ("count", "key")}

    @property
    def _tables(self) -> list[tuple[str, Mapping[str, Any]]]:
        return [("grid", self.grid), *(("zip", block) for block in self._zipped), ("sample", self._drawn)]

    @property
    def blocks(self) -> list[Block]:
        """The axes, the last of which is the fastest."""
        blocks = [Block({key: values}, len(values)) for key, values in self.grid.items()]
        blocks += [Block(block, len(next(iter(block.values())))) for block in self._zipped]
        return blocks + ([Block(self._drawn, self.sample["count"], self.sample["key"])] if self.sample else [])

    @property
    def axes(self) -> list[str]:
        """The settings that differ from point to point."""
        return [key for block in self.blocks for key in block.axes]

    def __len__(self) -> int:
        return math.prod(block.length for block in self.blocks)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """The settings that the sweep says for point i, by their keys."""
        if not 0 <= i < len(self):
            raise IndexError(f"point {i} of {len(self)}")
        settings = dict(self.call)
        settings |= {f"{edit}.{name}": value for edit, given in self.edits.items() for name, value in given.items()}
        for block in reversed(self.blocks):
            i, at = divmod(i, block.length)
            for key, value in block.settings(at).items():
                listed = isinstance(block.axes[key], tuple)
                settings[key] = value if listed else checked(key, value, self.edits, "a point")
        return settings

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def as_dict(self) -> dict[str, Any]:
        """What JSON can hold, and `Sweep(**...)` takes; texts of values are in it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return _plain(fields)

    @classmethod
    def read(cls, path: str | Path) -> "Sweep":
        """The sweep of a TOML file.

        Raises:
            FileNotFoundError, TypeError, ValueError: there is none, it is no TOML, or as of `Sweep`; the message begins
                with the file.
        """
        path = Path(path).expanduser()
        try:
            said = tomllib.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} does not exist; name the TOML file of a sweep") from None
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise ValueError(f"{path} is no text in UTF-8") from None
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is no TOML: {error}") from None
        known = [field.name for field in dataclasses.fields(cls) if field.name != "files"]
        if astray := [key for key in said if key not in known]:
            raise ValueError(f"{path}: {astray[0]!r} is unknown; a sweep has {', '.join(known)}")
        try:
            return cls(**said, folder=path.parent)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from None


def _table(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{name}={brief(value)} should be a table, of settings by their names")
    return value


def _of_model(key: str, value: Any) -> Any:
    if key in stages.later_stages():
        own = {"source": value} if isinstance(value, str) else value
        if not isinstance(own, Mapping) or "source" not in own or not own.keys() <= {"source", "revision"}:
            raise TypeError(
                f"model: {key}={brief(value)} should be the checkpoint of this stage, or a table of source and revision"
            )
        return {name: _of_model(name, one) for name, one in own.items()}
    if key not in _MODEL:
        hint = "; it is said in [call], or an axis" if key in fields.OTHERS else ""
        raise ValueError(f"model: {key!r} is unknown{hint}; a model has {', '.join(_MODEL)}")
    kind = bool if isinstance(_MODEL[key].kind, Flag) else str
    if not isinstance(value, kind):
        raise TypeError(f"model: {key}={brief(value)} should be {'a string' if kind is str else 'true or false'}")
    return value


def _edit(name: str, value: Any) -> dict[str, Any]:
    if not re.fullmatch(r"\w[\w-]*", name) or name in (*fields.names(), FIRST, *stages.later_stages()):
        raise ValueError(
            f"edits: {name!r} should be a name of letters, digits, _ and -, and not that of a setting or stage"
        )
    if isinstance(value, Edit):
        value = {key: getattr(value, key) for key in fields.edit_settings() if getattr(value, key) is not None}
    return dict(_table(f"edits.{name}", value))


def _flat(table: Mapping[str, Any], edits: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of edits, which TOML reads as tables, under keys with a dot."""
    flat: dict[str, Any] = {}
    known = fields.names()
    for key, value in table.items():
        tabled = key in edits or key in stages.later_stages() or (key not in known and "." not in key)
        inner = isinstance(value, Mapping) and tabled
        for name, one in ({f"{key}.{name}": one for name, one in value.items()} if inner else {key: value}).items():
            if name in flat:
                raise ValueError(f"{name!r} is said twice; leave one out")
            flat[name] = one
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, Uniform):
        return {"low": value.low, "high": value.high}
    if isinstance(value, range):
        return {"from": value.start, "count": len(value), "step": value.step}
    if isinstance(value, Progression):
        return {"from": value.start, "count": value.length, "step": value.step}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
