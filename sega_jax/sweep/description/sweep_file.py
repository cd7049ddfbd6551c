"""A sweep as data: a TOML file, or a Python object with the same content.

[model]                                   # arguments of sega_jax.load; the default is the demo model
source = "stable-diffusion-v1-5/stable-diffusion-v1-5"

[call]                                    # arguments of Pipeline that all pictures share
steps = 50

[edits.glasses]                           # an edit and its settings; `concept` defaults to the edit's name
threshold = 0.95

[grid]                                    # every combination of these values
prompt = ["a photo of a woman", "a photo of a man"]
image = { glob = "photos/*.png" }         # or { file = "photos.txt" }, with one path per line
lora = [{}, { "style.safetensors" = 0.5 }, { "style.safetensors" = 1.0 }]
seed = { from = 0, count = 8 }
glasses.scale = [0, 2, 4, 6]

[zip]                                     # values that vary in parallel, combined with every point of the other tables
glasses.warmup = [5, 10]
glasses.cooldown = [25, "never"]

[sample]                                  # `count` random draws, combined with every point of the other tables
count = 10
glasses.momentum_scale = { low = 0.0, high = 0.6 }

A cascade lists the checkpoints of its later stages by stage name. Settings of a later stage begin with its name:

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
from sega_jax.method.checks import brief, check_int, did_you_mean
from sega_jax.method.guidance import Edit
from sega_jax.pipelines.cascade import FIRST
from sega_jax.pipelines.load_options import LoadOptions
from sega_jax.sweep.description import axes, fields, stages
from sega_jax.sweep.description.axes import Block, Progression, Uniform
from sega_jax.sweep.description.fields import check_setting

# More points are usually a mistake, and would make the plan file too large.
MOST = 1_000_000
FORMATS = ("png", "webp")
# The options of `load` that a sweep may set.
MODEL_OPTIONS = {name: one for name, one in arguments(LoadOptions).items() if one.sweep}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep: a sequence of points, each of which holds the settings of one picture.

    Settings are named after `Pipeline`'s arguments ("prompt", "seed", "steps", "guidance_scale", ...); "scheduler"
    names a scheduler, and "edits" lists the active edits. Settings of an edit start with its name ("glasses.scale"),
    and settings of a later stage of a cascade start with the stage's name ("stage2.steps"); "edited" lists the stages
    that the edits guide.

    An axis is the list of values of one setting. It may also be written as {"from", "count", "step"} for equally
    spaced numbers, {"file"} for the lines of a text file, {"glob"} for the files that match a pattern, or, in a sample,
    {"low", "high"} for a range. Relative paths start from `folder`; for a TOML file, this is the file's folder.

    The points are all combinations of the axes in `grid`, the blocks of `zip` and the draws of `sample`. The last axis
    varies fastest.

    Attributes:
        model: arguments of `sega_jax.load`: source, revision, dtype, variant, safety_checker and attention; if empty,
            the demo model is used. For a cascade, they describe the first stage. The checkpoint of a later stage is
            given under the stage's name, such as stage2.
        call: settings that all points share.
        edits: {name: settings of `Edit`}; `concept` defaults to the edit's name.
        grid: {setting: axis}; every combination of the axes' values is a point.
        zip: {setting: axis} with axes of equal length whose values vary in parallel, or a list of such blocks.
        sample: {setting: axis}; `count` points are drawn from these axes at random. Each value of a list has the same
            probability. The integer `key` (default 0) seeds the draws.
        format: the pictures' file format, "png" or "webp" (lossless).
        files: {path: facts} for the files that settings name. The facts are the SHA-256 and, for a picture, the height
            and width. Files that are not listed are read. A plan stores these facts, so that its results can be viewed
            after the files are gone.
        folder: the folder that relative paths start from; it is not stored.

    Raises:
        FileNotFoundError: a picture or an adapter does not exist.
        TypeError, ValueError: a setting is unknown or given twice, or its value has the wrong type or is out of range;
            a file cannot be read; or the sweep has no points or more than 1,000,000.

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
        self._set("model", {key: _model_option(key, value) for key, value in self.model.items()})
        self._set("edits", {name: _edit(name, value) for name, value in self.edits.items()})
        for edit, settings in self.edits.items():
            for name, value in settings.items():
                settings[name] = check_setting(f"{edit}.{name}", value, self.edits, "edits")
        call = _flat(self.call, self.edits)
        self._set("call", {key: check_setting(key, value, self.edits, "call", folder) for key, value in call.items()})
        if misplaced := [key for key in self.call if "." in key and not stages.split(key)[0]]:
            raise ValueError(
                f"call: {misplaced[0]!r} belongs to an edit; give it in [edits.{misplaced[0].rpartition('.')[0]}]"
            )

        def read(where, table, draws=False):
            table = _flat(table, self.edits)
            return {key: axes.read(key, value, self.edits, folder, where, draws) for key, value in table.items()}

        self._set("grid", read("grid", self.grid))
        blocks = [self.zip] if isinstance(self.zip, Mapping) else self.zip
        if not isinstance(blocks, Sequence) or isinstance(blocks, str):
            raise TypeError(f"zip={brief(blocks)} should be a table of axes, or a list of such tables")
        blocks = [read("zip", _table("zip", block)) for block in blocks]
        for block in blocks:
            lengths = {key: len(values) for key, values in block.items()}
            if len(set(lengths.values())) > 1:
                listed = ", ".join(f"{key} has {count}" for key, count in lengths.items())
                raise ValueError(f"zip: the axes of a block should have the same number of values, but {listed}")
        self._set("zip", tuple(block for block in blocks if block))
        self._set("sample", self._sample(read))
        self._check_once()
        self._check_count()
        self._set("files", self._read_files(self.files))

    def _read_files(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the facts about all files that settings name. Files that are not in `known` are read."""
        listed: list[tuple[str, str, Sequence[Any]]] = [("call", key, [value]) for key, value in self.call.items()]
        for place, table in self._tables:
            listed += [(place, key, values) for key, values in table.items() if isinstance(values, tuple)]
        facts: dict[str, Any] = {}
        for place, key, values in listed:
            kind = fields.kind_of(key)
            if kind is None or not kind.of_files:
                continue
            for path in (path for value in values if value is not None for path in kind.files(value)):
                try:
                    facts[path] = known[path] if path in known else kind.known(path)
                except (FileNotFoundError, ValueError) as error:
                    raise type(error)(f"{place}: {key}: {error}") from None
        return facts

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _sample(self, read: Any) -> dict[str, Any]:
        if not self.sample:
            return {}
        drawn = {key: value for key, value in self.sample.items() if key not in ("count", "key")}
        if "count" not in self.sample or not drawn:
            raise ValueError("sample should have `count`, the number of draws, and at least one axis to draw from")
        count = check_int("sample: count", self.sample["count"], 0)
        if not count:
            raise ValueError("sample: count=0, so the sweep has no points; give at least 1")
        return {"count": count, "key": check_int("sample: key", self.sample.get("key", 0), 0)} | read(
            "sample", drawn, True
        )

    def _check_once(self) -> None:
        """Checks that no setting is given twice, and that there is a prompt."""
        tables = dict.fromkeys(self.call, "call")
        tables |= {f"{edit}.{name}": f"edits.{edit}" for edit, settings in self.edits.items() for name in settings}
        for place, table in self._tables:
            for key in table:
                if key in tables:
                    raise ValueError(f"{key!r} is given twice, in [{tables[key]}] and in [{place}]; remove one")
                tables[key] = place
        if "prompt" not in tables:
            raise ValueError("the sweep has no prompt; give one in [call], or a list of prompts in [grid]")

    def _check_count(self) -> None:
        if len(self) > MOST:
            axes = {key: len(values) for key, values in self.grid.items()}
            axes |= {" with ".join(block): len(next(iter(block.values()))) for block in self._zipped}
            axes |= {"the sample": self.sample["count"]} if self.sample else {}
            largest = sorted(axes.items(), key=lambda item: -item[1])[:3]
            listed = ", ".join(f"{key} has {count:,}" for key, count in largest)
            raise ValueError(
                f"the sweep has {len(self):,} points ({listed}), more than {MOST:,}; split it into several sweeps"
            )

    @property
    def _zipped(self) -> Sequence[Mapping[str, Any]]:
        """The blocks of `zip`, which the checks have turned into a tuple."""
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
        """All axes, grouped into blocks that vary together. The last block varies fastest."""
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
        """Returns the settings that the sweep specifies for point i, {key: value}; other settings have their
        defaults."""
        if not 0 <= i < len(self):
            raise IndexError(f"point {i} does not exist; the sweep has {len(self)} points, counted from 0")
        settings = dict(self.call)
        settings |= {f"{edit}.{name}": value for edit, table in self.edits.items() for name, value in table.items()}
        for block in reversed(self.blocks):
            i, at = divmod(i, block.length)
            for key, value in block.settings(at).items():
                listed = isinstance(block.axes[key], tuple)
                settings[key] = value if listed else check_setting(key, value, self.edits, "a point")
        return settings

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def as_dict(self) -> dict[str, Any]:
        """Returns the sweep as JSON-compatible arguments for `Sweep(**...)`. Values that come from files are
        included."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return _plain(fields)

    @classmethod
    def read(cls, path: str | Path) -> "Sweep":
        """Reads a sweep from a TOML file.

        Raises:
            FileNotFoundError: the file does not exist.
            TypeError, ValueError: the file is not TOML, or as for `Sweep`; the message starts with the file's path.
        """
        path = Path(path).expanduser()
        try:
            content = tomllib.loads(path.read_text("utf-8-sig"))
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} does not exist; give the TOML file of a sweep") from None
        except IsADirectoryError:
            progress = f", or run sega-jax sweep status {path} to see its progress"
            is_sweep = (path / "plan.json").is_file()
            raise ValueError(f"{path} is a folder; give the TOML file of a sweep{progress * is_sweep}") from None
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not UTF-8 text; save it in UTF-8") from None
        except tomllib.TOMLDecodeError as error:
            raise ValueError(
                f"{path} is not valid TOML: {error}; write texts in quotation marks, and lists in square brackets"
            ) from None
        except ValueError:  # from Python, which limits the number of digits
            raise ValueError(f"{path} has a number with too many digits") from None
        except RecursionError:
            raise ValueError(f"{path} has too many nested brackets; a sweep needs at most three levels") from None
        known = [field.name for field in dataclasses.fields(cls) if field.name != "files"]
        if unknown := [key for key in content if key not in known]:
            hint = did_you_mean(unknown[0], known)
            raise ValueError(f"{path}: {unknown[0]!r} is unknown{hint}; the parts of a sweep are {', '.join(known)}")
        try:
            return cls(**content, folder=path.parent)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from None


def _table(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{name}={brief(value)} should be a table of settings (name = value)")
    return value


def _model_option(key: str, value: Any) -> Any:
    if key in stages.later_stages():
        options = {"source": value} if isinstance(value, str) else value
        if not isinstance(options, Mapping) or "source" not in options or not options.keys() <= {"source", "revision"}:
            raise TypeError(
                f"model: {key}={brief(value)} should be this stage's checkpoint, or a table with source and revision"
            )
        return {name: _model_option(name, one) for name, one in options.items()}
    if key not in MODEL_OPTIONS:
        hint = "; give it in [call] or as an axis" if key in fields.OTHERS else ""
        raise ValueError(f"model: {key!r} is unknown{hint}; the options of [model] are {', '.join(MODEL_OPTIONS)}")
    kind = bool if isinstance(MODEL_OPTIONS[key].kind, Flag) else str
    if not isinstance(value, kind):
        raise TypeError(f"model: {key}={brief(value)} should be {'a string' if kind is str else 'true or false'}")
    return value


def _edit(name: str, value: Any) -> dict[str, Any]:
    if not re.fullmatch(r"\w[\w-]*", name) or name in (*fields.names(), FIRST, *stages.later_stages()):
        raise ValueError(
            f"edits: {name!r} may contain only letters, digits, _ and -, and must not name a setting or a stage"
        )
    if isinstance(value, Edit):
        value = {key: getattr(value, key) for key in fields.edit_settings() if getattr(value, key) is not None}
    return dict(_table(f"edits.{name}", value))


def _flat(table: Mapping[str, Any], edits: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens the nested tables that TOML makes from keys such as `glasses.scale` into dotted keys, for edits and
    stages."""
    flat: dict[str, Any] = {}
    known = fields.names()
    for key, value in table.items():
        may_nest = key in edits or key in stages.later_stages() or (key not in known and "." not in key)
        nested = isinstance(value, Mapping) and may_nest
        for name, one in ({f"{key}.{name}": one for name, one in value.items()} if nested else {key: value}).items():
            if name in flat:
                raise ValueError(f"{name!r} is given twice; remove one")
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
