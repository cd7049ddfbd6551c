"""Checks every cell of the feature table: a supported feature changes the result, and an unsupported feature is refused
before anything runs. Detailed tests of a feature are in the test folder of its package.
"""

import re
from functools import cached_property

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from support import loras, sdxl_files, tiny
from support.checkpoints import same
from support.features import CALLS, ENLARGING, FAMILIES, SHELLS, SWEEPS, TABLE, WORKS

from sega_jax import CheckpointError, Edit, Pipeline, load, sweep
from sega_jax.cli import options as shell
from sega_jax.cli import stages
from sega_jax.method.arguments import arguments
from sega_jax.pipelines.components import as_scheduler
from sega_jax.pipelines.load_options import ADAPTERS
from sega_jax.sweep.description import fields
from sega_jax.systems.registry import check_adapters, systems
from sega_jax.weights.layout import leaves

pytestmark = [
    pytest.mark.usefixtures("one_by_default"),
    pytest.mark.filterwarnings("ignore:the text encoder reads 12 tokens"),
]


def test_the_table_is_complete():
    """The table has a cell for every argument, setting, option and family."""
    calls = {family: arguments(systems()[family].call) for family in FAMILIES}
    assert set(FAMILIES) == set(systems())
    assert set(CALLS) == {name for declared in calls.values() for name in declared}
    # Only cascades have the setting "edited", which selects the stages that the edits guide
    # (`tests/sweep/test_cascade.py`).
    assert {*SWEEPS, "edited"} == set(fields.names())
    options = {name for system in systems().values() for name in shell.shell_arguments(system.call)}
    assert set(SHELLS) == options | set(ADAPTERS)
    for features in TABLE.values():
        assert all(set(cells) == set(FAMILIES) for cells in features.values())
    for family, declared in calls.items():
        assert {name for name, cells in CALLS.items() if cells[family] == WORKS} == set(declared)


# Pipelines and arguments for checking a cell


RNG = np.random.default_rng(0)
SMALL, OTHER = RNG.random((2, 8, 8, 3))
HAT, STRONG = Edit("hat", warmup=0, threshold=0.5), Edit("hat", scale=90, warmup=0)
# With diffusers' semantics, the first concept's momentum starts only after the second concept's warm-up.
CLOCKS = {"edits": [HAT, Edit("bow", warmup=2)], "momentum_scale": 1.0, "steps": 3}
BASE = {"prompt": "cat", "edits": HAT, "steps": 2, "seed": 3, "progress": False}
# {family: (fixture for its pipeline, arguments for all its calls)}.
PIPES = {
    "stable_diffusion": ("least", {"output": "latent"}),
    "x4_upscaler": ("upscaler", {"output": "latent", "image": SMALL}),
    "sdxl": ("least_xl", {"output": "latent"}),
    "deepfloyd_stage_1": ("first", {"output": "latent"}),
    "deepfloyd_stage_2": ("second", {"output": "latent", "image": SMALL}),
    "paella": ("paella", {"output": "tokens"}),
}


class Bench:
    """A family's pipeline, and the picture that a feature must change."""

    def __init__(self, family, pipe, folder, files):
        self.family, self.pipe, self.folder, self.files = family, pipe, folder, files
        self.call = BASE | PIPES[family][1]
        size = (32, 32) if family == "x4_upscaler" else ()
        self.shape = pipe.latent_shape(*size)

    def make(self, pipe=None, **call):
        out = (pipe or self.pipe)(**self.call | call)
        assert out.finite.all()
        return out

    @cached_property
    def plain(self):
        return self.make().images

    def noise(self, *axes):
        return np.random.default_rng(1).standard_normal((*axes, *self.shape), np.float32)

    def load(self, **options):
        """Loads the checkpoint again on the same devices, so that compiled programs are shared."""
        if self.family == "deepfloyd_stage_2":
            options |= {"text_encoder": self.pipe.models.text_encoder, "tokenizer": self.pipe.tokenizer}
        return load(self.folder, **{"devices": self.pipe.devices} | options)

    @cached_property
    def random(self):
        """A pipeline whose solver draws noise at every call, and the call arguments that this requires."""
        if self.family in ("deepfloyd_stage_1", "deepfloyd_stage_2", "paella"):
            return self.pipe, {}
        return self.ddim, {"eta": 1.0}

    @cached_property
    def ddim(self):
        pipe = Pipeline(**self.pipe.components)
        pipe.scheduler = as_scheduler("DDIMScheduler", pipe.scheduler.config)
        return pipe


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Writes textual inversions and pictures of 8 x 8, 16 x 8 and 8 x 16 pixels, and returns the folder."""
    where, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    for name, shape in {"a": (8, 8, 3), "b": (8, 8, 3), "tall": (16, 8, 3), "wide": (8, 16, 3)}.items():
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(where / f"{name}.png")
    vectors = {"<toy>": (2, 16)}, {"clip_l": (2, 16), "clip_g": (2, 20)}
    for name, shapes in zip(("toy", "toy_xl"), vectors, strict=True):
        arrays = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
        save_file(arrays, where / f"{name}.safetensors")
    return where


@pytest.fixture(scope="module")
def benches():
    return {}


@pytest.fixture
def bench(family, request, benches, files):
    if family not in benches:
        fixture = PIPES[family][0]
        folders = {"first": "stage1", "second": "stage2", "upscaler": "upscaler"}
        if fixture in folders:
            folder = request.getfixturevalue("stages")[folders[fixture]]
        else:
            folder = request.getfixturevalue(f"{fixture}_folder")
        benches[family] = Bench(family, request.getfixturevalue(fixture), folder, files)
    return benches[family]


def lora(bench):
    if bench.family == "paella":
        return bench.files / "toy.safetensors"  # LoRAs are refused before the file is read
    path = bench.files / f"{bench.family}.safetensors"
    return path if path.exists() else loras.write(path, bench.pipe.models, {"unet": ["time_embedding.linear_1"]})


def word(bench):
    return {"<toy>": bench.files / ("toy_xl.safetensors" if bench.family == "sdxl" else "toy.safetensors")}


# The arguments of calls


def sized(bench, height, width):
    """Returns arguments for a picture `height` times as high and `width` times as wide as the default."""
    sizes = bench.pipe.system.sampler.sizes(bench.pipe.models)
    side = sizes.factor * bench.shape[0]
    image = {"image": np.resize(SMALL, (8 * height, 8 * width, 3))} if sizes.enlarges else {}
    return {"height": side * height, "width": side * width} | image


# {argument: [a call that uses it, a call to compare with]}. A single call is compared with `Bench.plain`. A call may
# also be a function that takes a bench.
CHANGES = {
    "prompt": [{"prompt": "dog"}],
    "edits": [{"edits": Edit("bow", warmup=0)}],
    "negative_prompt": [{"negative_prompt": "bad dog"}],
    "seed": [{"seed": 4}],
    "key": [lambda b: {"seed": None, "key": jax.random.key(4)}],
    "steps": [{"steps": 3}],
    "guidance_scale": [{"guidance_scale": -8.0}],
    "momentum_scale": [{"momentum_scale": 1.0}],
    "momentum_beta": [{"momentum_scale": 1.0, "momentum_beta": 0.9}, {"momentum_scale": 1.0, "momentum_beta": 0.0}],
    "semantics": [CLOCKS | {"semantics": "per_concept"}, CLOCKS],
    "support": [{"edits": STRONG, "support": "latent"}, {"edits": STRONG}],
    "guidance_rescale": [{"guidance_rescale": 0.7}],
    "latents": [lambda b: {"latents": b.noise(1)}],
    "long_prompts": [{"prompt": "a cat " * 6, "long_prompts": True}, {"prompt": "a cat " * 6}],
    "weighted": [{"prompt": "a (cat:1.5)", "weighted": True}, {"prompt": "a (cat:1.5)"}],
    "clip_skip": [{"clip_skip": 1}],
    "noise_level": [{"noise_level": 300}],
    "noise_anew": [{"noise_anew": True}],
    "original_size": [{"original_size": (64, 32)}],
    "crops_top_left": [{"crops_top_left": (4, 8)}],
    "target_size": [{"target_size": (64, 32)}],
    "renoise_steps": [{"renoise_steps": 0}],
    "temperature": [{"temperature": 20.0}],
    "choice": [{"choice": "argmax"}],
    "influence": [{"influence": (9.0, 0.0)}],
    "centred": [{"edits": STRONG, "centred": True}, {"edits": STRONG}],
    "tokens": [lambda b: {"tokens": RNG.integers(0, b.shape[2], (1, *b.shape[:2]))}],
    "strength": [{"image": SMALL, "strength": 0.5}, {"image": SMALL, "strength": 1.0}],
    "image": [{"image": OTHER}],
    "image_noise": [
        lambda b: {"image": SMALL, "image_noise": b.noise(1)[..., : 3 if b.family in ENLARGING else 4]},
        {"image": SMALL},
    ],
}


def check_rows(bench):
    pictures = bench.make(images_per_prompt=2).images
    assert len(pictures) == 2
    assert (pictures[0] != pictures[1]).any()


def check_size(bench, height, width):
    h, w = bench.shape[:2]
    pictures = bench.make(**sized(bench, height, width)).images
    assert pictures.shape[1:3] == (height * h, width * w)


def check_output(bench):
    pictures = bench.make(output="uint8").images
    assert pictures.dtype == np.uint8
    assert pictures.shape[3] == 3


def check_noise(bench):
    """Different noise gives different pictures; tests/pipelines/test_noise.py has detailed tests."""
    pipe, call = bench.random
    recorded = bench.make(pipe, record=True, record_noise=True, **call)
    other = bench.make(pipe, noise=jax.tree.map(lambda noise: noise[::-1], recorded.record.noise), **call)
    assert (other.images != recorded.images).any()


def check_record(bench):
    record = bench.make(record=True).record
    assert record.cond.shape == (1, 2, *bench.shape)
    assert record.noise is None
    assert np.abs(record.sem_guidance).max() > 0


def check_recorded_noise(bench):
    pipe, call = bench.random
    noise = jax.tree.leaves(bench.make(pipe, record=True, record_noise=True, **call).record.noise)
    assert noise
    assert all(one.shape[:2] == (2, 1) and np.std(one[0]) > 0.2 for one in noise)


def check_replay(bench):
    """Replayed guidance changes a picture without edits; tests/pipelines/test_replay.py has detailed tests."""
    guidance = np.abs(bench.noise(1, 2)) * 30
    plain, replayed = (bench.make(edits=(), replay=share * guidance).images for share in (0, 1))
    assert (plain != replayed).any()


def check_callback(bench):
    seen = []
    bench.make(callback=lambda *call: seen.append(call))
    assert [call for call, _, _ in seen] == [0, 1]
    assert seen[0][2].shape[1:3] == bench.shape[:2]


def check_callback_steps(bench):
    seen = []
    bench.make(callback=lambda *call: seen.append(call), callback_steps=2, steps=3)
    assert [call for call, _, _ in seen] == [0, 2]


def check_progress(bench, capsys):
    bench.make(progress=True)
    assert "2/2" in capsys.readouterr().err


def check_strict(bench):
    call = bench.call | {"edits": Edit("hat", warmup=1, cooldown=1)}
    with pytest.raises(ValueError, match="ends at cooldown=1, before it begins at warmup=1; give"):
        bench.pipe.prepare(**call)
    with pytest.warns(UserWarning, match="before it begins at warmup=1"):
        bench.pipe.prepare(**call, strict=False)


def check_eta(bench):
    with_noise, without = (bench.make(bench.ddim, eta=eta).images for eta in (1.0, 0.0))
    assert (with_noise != without).any()


def check_rows_at_once(bench):
    """Predicting the rows in several parts gives the same pictures up to rounding."""
    outputs = [bench.make(images_per_prompt=2, rows_at_once=rows) for rows in (1, 2)]
    np.testing.assert_allclose(outputs[0].images, outputs[1].images, rtol=1e-3, atol=1e-3)
    chosen = [bench.pipe.prepare(**bench.call, rows_at_once=rows).static.own.rows_at_once for rows in (1, 2)]
    assert chosen == [1, 2]


def check_tiled(bench):
    side = bench.pipe.models.vae.config.factor * 4
    untiled, tiled = (bench.make(output="float", tiled=tiled).images for tiled in (False, side))
    assert (untiled != tiled).any()


CHECKS = {
    "images_per_prompt": check_rows,
    "height": lambda bench: check_size(bench, 2, 1),
    "width": lambda bench: check_size(bench, 1, 2),
    "output": check_output,
    "noise": check_noise,
    "record": check_record,
    "record_noise": check_recorded_noise,
    "replay": check_replay,
    "callback": check_callback,
    "callback_steps": check_callback_steps,
    "progress": check_progress,
    "strict": check_strict,
    "eta": check_eta,
    "rows_at_once": check_rows_at_once,
    "tiled": check_tiled,
}


def check_call(bench, name, capsys):
    if name in CHECKS:
        return CHECKS[name](bench, capsys) if name == "progress" else CHECKS[name](bench)
    calls = [call(bench) if callable(call) else call for call in CHANGES[name]]
    changed = bench.make(**calls[0]).images
    plain = bench.make(**calls[1]).images if len(calls) > 1 else bench.plain
    assert changed.shape == plain.shape
    assert (changed != plain).any()
    return None


# Features other than call arguments


def check_lora(bench):
    assert (bench.make(bench.load(lora=lora(bench))).images != bench.plain).any()


def check_words(bench):
    """A new word's vectors change the picture; without them, the word is split into letters."""
    call = {"prompt": "a <toy>"}
    images = bench.make(bench.load(textual_inversion=word(bench)), **call).images
    assert (images != bench.make(**call).images).any()


def check_scheduler(bench):
    """Changes the timestep spacing without recompiling; tests/method/test_solvers.py tests other solvers."""
    scheduler = bench.pipe.scheduler.config | {"timestep_spacing": "trailing"}
    assert (bench.make(bench.load(scheduler=scheduler)).images != bench.plain).any()


def single_files(family, where):
    """Writes a checkpoint as a folder and as a single file with the original names."""
    path = where / f"{family}.safetensors"
    if family == "sdxl":
        save_file(tiny.original(unet=sdxl_files.UNET, vae=tiny.VAE_1, text_2=tiny.TEXT_XL_2), path)
        return path, tiny.xl(where / family, unet=sdxl_files.UNET, vae=tiny.VAE_1)
    save_file(tiny.original(unet=tiny.UNET_1), path)
    return path, tiny.checkpoint(where / family, unet=tiny.UNET_1)


def check_single_file(bench, where):
    """A single file gives exactly the same weights as the folder."""
    path, folder = single_files(bench.family, where)
    assert same(load(path, config=folder, devices=bench.pipe.devices), load(folder, devices=bench.pipe.devices))


def check_devices(bench):
    """Two devices give the same pictures as one device."""
    pipe = bench.load(devices=jax.devices()[:2])
    together = bench.make(pipe, images_per_prompt=2).images
    one_by_one = np.concatenate([bench.make(seed=seed).images for seed in (3, 4)])
    np.testing.assert_allclose(together, one_by_one, rtol=1e-3, atol=1e-3)


def check_encode(bench):
    """Prompts and concepts may be given as embeddings."""
    cat, hat = bench.pipe.encode("cat"), bench.pipe.encode("hat")
    images = bench.make(prompt=cat, edits=Edit(hat, warmup=0, threshold=0.5)).images
    np.testing.assert_array_equal(images, bench.plain)


def check_function(bench):
    """Only traces the pure function; tests/systems/test_programs.py compares its pictures with a call's."""
    function, inputs = bench.pipe.as_function(**{**bench.call, "output": "float"})
    image = jax.eval_shape(function, **inputs)
    factor = bench.pipe.system.sampler.sizes(bench.pipe.models).factor
    assert image.shape == (1, *(factor * side for side in bench.shape[:2]), 3)
    assert image.dtype == np.float32


def check_other(bench, name, where):
    checks = {
        "lora": check_lora,
        "textual_inversion": check_words,
        "scheduler": check_scheduler,
        "single_file": lambda bench: check_single_file(bench, where),
        "devices": check_devices,
        "encode": check_encode,
        "as_function": check_function,
    }
    checks[name](bench)


def refuse_other(bench, name, where):
    if name == "single_file":
        arrays = {key: np.zeros(shape, np.float32) for key, shape in leaves(bench.pipe.models[-1]).items()}
        save_file(arrays, where / "file.safetensors")
        load(where / "file.safetensors")
    options = {"lora": bench.files / "toy.safetensors", "textual_inversion": word(bench), "scheduler": "DDIMScheduler"}
    bench.load(**{name: options[name]})


# Sweeps

# {setting: (two values, other arguments of the call)}
AXES = {
    "prompt": (["cat", "dog"], {}),
    "negative_prompt": (["bad", "worse"], {}),
    "seed": ([1, 2], {}),
    "steps": ([2, 3], {}),
    "guidance_scale": ([3, 4.5], {}),
    "edits": ([[], ["hat"]], {}),
    "momentum_scale": ([0.1, 0.5], {}),
    "momentum_beta": ([0.1, 0.5], {}),
    "semantics": (["diffusers", "per_concept"], {}),
    "support": (["channel", "latent"], {}),
    "guidance_rescale": ([0, 0.7], {}),
    "eta": ([0, 1], {"scheduler": "DDIMScheduler"}),
    "long_prompts": ([False, True], {}),
    "weighted": ([False, True], {}),
    "clip_skip": ([0, 1], {}),
    "tiled": ([False, True], {}),
    "image": (["a.png", "b.png"], {}),
    "strength": ([0.5, 1], {"image": "a.png"}),
    "noise_level": ([20, 30], {}),
    "noise_anew": ([False, True], {}),
    "original_size": ([[8, 8], [16, 8]], {}),
    "crops_top_left": ([[0, 0], [16, 8]], {}),
    "target_size": ([[8, 8], [16, 8]], {}),
    "renoise_steps": ([0, 1], {}),
    "temperature": ([1, [1, 0.5]], {}),
    "choice": (["sample", "argmax"], {}),
    "influence": ([[1, 1], [1.2, 0.4]], {}),
    "centred": ([False, True], {}),
    "scheduler": (["DDIMScheduler", "PNDMScheduler"], {}),
    "lora": ([{}, "{lora}"], {}),
    "textual_inversion": ([{}, "{word}"], {}),
}


def planned(bench, name):
    """Plans two pictures that differ only in one setting."""
    blocks = {}
    call = {"prompt": "a cat", "steps": 4}
    if bench.family in ENLARGING:
        call["image"] = "a.png"
    if name in ("height", "width"):
        side = bench.pipe.system.sampler.sizes(bench.pipe.models)
        default = (side.default or (32, 32))[["height", "width"].index(name)]
        blocks[name] = [default, 2 * default]
        if bench.family in ENLARGING:
            blocks["image"] = ["a.png", "tall.png" if name == "height" else "wide.png"]
    else:
        values, others = AXES[name]
        named = {"{lora}": lambda: str(lora(bench)), "{word}": lambda: {k: str(v) for k, v in word(bench).items()}}
        blocks[name] = [named[value]() if isinstance(value, str) and value in named else value for value in values]
        call |= {key: value for key, value in others.items() if key == "scheduler" or CALLS[key][bench.family] == WORKS}
    call = {key: value for key, value in call.items() if key not in blocks}
    model = {"source": str(bench.folder)}
    two = sweep.Sweep(model=model, call=call, edits={"hat": {"warmup": 1}}, zip=blocks, folder=bench.files)
    return sweep.plan(two, sweep.Facts.of(two))


def check_sweep(bench, name):
    """The plan has two pictures, and their points differ in this setting."""
    plan = planned(bench, name)
    assert plan.counts.pictures == 2
    points = [plan.point(i) for i in range(2)]
    if name == "edits":
        assert [list(point.edits) for point in points] == [[], ["hat"]]
    elif name in ADAPTERS:
        assert [bool(dict(point.adapters).get(name)) for point in points] == [False, True]
    elif name == "scheduler":
        assert [point.scheduler for point in points] == AXES[name][0]
    else:
        edited = [getattr(point.edits["hat"], name, None) for point in points]
        values = edited if any(edited) else [point.call[name] for point in points]
        assert values[0] != values[1]


# The shell


def check_shell(bench, name):
    """The option exists, and a value that is converted to text is parsed back to the same value."""
    system = bench.pipe.system
    if name in ADAPTERS:
        return check_adapters(system, {name: "a file"})
    stages.check_family(system, "MODEL", {}, image=system.name in ENLARGING)
    shell.check_family(system, "MODEL", [name])
    (option,) = (option for option in shell.call_options() if option.name == name)
    one = arguments(system.call)[name]
    texts = {"seed": "4", "negative_prompt": "bad", "image": str(bench.files / "a.png"), "tiled": "16"}
    text = texts.get(name) or one.kind.show(_another(one))
    value = option.is_flag or text  # click parses flags itself
    parsed = shell.parsed(system.call, {name: value})[name]
    assert one.kind.show(parsed) == text
    assert parsed != one.default
    return None


def _another(one):
    """Returns a value that is not the default."""
    values, _ = AXES.get(one.name, ([16, 32], {}))
    checked = [one.check(tuple(value) if isinstance(value, list) else value) for value in values]
    return next(value for value in checked if value != one.default)


def refuse_in_shell(bench, name):
    if name in ADAPTERS:
        check_adapters(bench.pipe.system, {name: "a file"})
    else:
        shell.check_family(bench.pipe.system, "MODEL", [name])


@pytest.mark.parametrize("family", ENLARGING)
def test_the_shell_needs_a_picture_to_enlarge(bench):
    message = r"enlarges pictures: give it as --(upscaler|stage2), .*; or name a small picture with --image"
    with pytest.raises(ValueError, match=message):
        stages.check_family(bench.pipe.system, "MODEL", {})


# Invalid arguments and combinations of arguments

HUGE = 10**400  # too large for a float
BLACK = np.zeros((8, 8, 3))
INVALID = [
    ({"steps": HUGE}, "steps=10{50,}... should be from 1 to"),
    ({"images_per_prompt": 10**30}, "images_per_prompt=10{30} should be from 1 to 65536"),
    ({"guidance_scale": 1e39}, r"guidance_scale=1e\+39 is beyond the range of float32; use numbers up to 3.4e\+38"),
    ({"guidance_scale": HUGE}, "guidance_scale=10+... is beyond the range of float32"),
    ({"guidance_scale": float("nan")}, "guidance_scale=nan should be a finite number"),
    ({"guidance_scale": [float("inf")]}, "guidance_scale=inf should be a finite number"),
    ({"momentum_scale": HUGE}, r"momentum_scale=10+... should be a number in \[0, 1\]"),
    ({"height": HUGE}, "height=10+... should be from 1 to 1048576"),
    ({"guidance_rescale": HUGE}, r"guidance_rescale=10+... should be a number in \[0, 1\]"),
    ({"tiled": 2**70}, "tiled=1180591620717411303424 should be from 1 to 1048576"),
    ({"strength": float("nan")}, r"strength=nan should be a number in \[0, 1\]"),
    ({"original_size": (HUGE, 1)}, "original_size=10+... should be from 1 to 1048576"),
    ({"crops_top_left": (0, 2**70)}, "crops_top_left=1180591620717411303424 should be from 0 to 1048576"),
    ({"temperature": (1e39, 1.0)}, r"temperature=1e\+39 is beyond the range of float32"),
    ({"influence": HUGE}, "influence=10+... is beyond the range of float32"),
    ({"tokens": [[1], [1, 2]]}, r"tokens=\[\[1\], \[1, 2\]\] should be integers \[pictures, height / f, width / f\]"),
    ({"tokens": [[[1.5]]]}, r"tokens have dtype float64 and shape \(1, 1, 1\), expected integers"),
    # Bytes are not a sequence of numbers.
    ({"prompt": ["a", "b"], "guidance_scale": b"ab"}, "guidance_scale=b'ab' should be a finite number"),
    ({"prompt": ["a", "b"], "seed": b"ab"}, "seed=b'ab' should be a whole number, from 0 to 4294967295"),
    ({"edits": b"ab"}, "edits=b'ab' should be a list of strings and Edits, or one such list for each prompt"),
    ({"prompt": b"ab"}, "prompt=b'ab' should be a string"),
    ({"steps": b"ab"}, "steps=b'ab' should be a whole number"),
    ({"edits": [b"a"] * 200}, "edits: b'a' should be a string or an Edit"),
    ({"edits": [["a"], "b"]}, "edits mixes lists with single edits; give one list for all prompts, or one for each"),
    ({"edits": [HAT, None]}, "edits: None should be a string or an Edit"),
    # Arguments that contradict each other.
    ({"seed": 1, "key": jax.random.key(0)}, "seed and key were both given, but key replaces seed; give only one"),
    ({"seed": [1, 2]}, "seed has 2 entries, expected 1, one for each picture"),
    ({"strength": 0.5}, "strength=0.5 needs a picture to start from; give one as image, or leave out strength"),
    ({"image": BLACK, "strength": 0.0}, "strength=0.0 leaves 0 of 2 steps to run; use a strength of at least 0.5"),
    ({"renoise_steps": 3}, "renoise_steps=3 should be from 0 to 2"),
    ({"record_noise": True}, "record_noise=True needs a record; give record=True as well"),
    ({"image": "x" * 300}, "image='x+... does not exist or is not a file"),
    ({"image": "a\0b"}, "does not exist or is not a file"),
]
DETERMINISTIC = (
    "noise needs a solver that adds noise at model calls, but this call's solver adds none; leave it out, or use an"
)


def takes(bench, call):
    return call.keys() <= arguments(bench.pipe.system.call).keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_invalid_arguments_are_refused(bench):
    """Invalid arguments raise an error before anything runs, and the message names the argument."""
    for call, message in INVALID:
        if takes(bench, call) and not (bench.family in ENLARGING and call.get("strength") == 0.0):
            with pytest.raises((OSError, TypeError, ValueError), match=message):
                bench.pipe.prepare(**bench.call | {"seed": None} | call)


@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_that_the_solver_would_ignore_are_refused(bench):
    """The cases are `noise` for a solver that adds no noise, and `eta` for a scheduler without this option."""
    pipe = bench.pipe
    if bench.random[1]:
        with pytest.raises(ValueError, match=DETERMINISTIC):
            pipe.prepare(**bench.call, noise=bench.noise(2, 1))
    if bench.family in ("sdxl", "deepfloyd_stage_1", "deepfloyd_stage_2"):
        with pytest.raises(ValueError, match=r"eta=0.5 applies to DDIM and TCD only, not to \w+; leave it out"):
            pipe.prepare(**bench.call, eta=0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_lists_have_an_entry_for_each_prompt_or_picture(bench):
    """This applies to every argument that may differ between the rows of a batch."""
    two = {"prompt": ["cat", "dog"], "images_per_prompt": 2, "edits": (), "seed": None}
    values = {"negative_prompt": "bad", "guidance_scale": 3.0, "guidance_rescale": 0.5, "eta": 0.0, "noise_level": 3}
    values |= {"original_size": (8, 8), "crops_top_left": (0, 0), "target_size": (8, 8), "image": SMALL}
    declared = arguments(bench.pipe.system.call)
    varying = {name for name, one in declared.items() if one.varies == "row"} - {"prompt", "seed"}
    assert varying <= values.keys()
    for name in [*varying, "edits"]:
        value = values.get(name, [HAT])
        for count in (2, 4):
            bench.pipe.prepare(**bench.call | two | {name: [value] * count})
        for count in (3, 5):
            message = f"{name} has {count} entries, expected 2, one for each prompt, or 4, one for each picture"
            with pytest.raises(ValueError, match=message):
                bench.pipe.prepare(**bench.call | two | {name: [value] * count})
    with pytest.raises(ValueError, match=r"seed has 2 entries, expected 4, one for each picture, or a single number"):
        bench.pipe.prepare(**bench.call | two | {"seed": [1, 2]})


# The test of every cell

# Features that need a different program than the plain call. Each feature is also tested elsewhere in the default tier.
COMPILES = {"images_per_prompt", "height", "width", "semantics", "support", "replay", "output", "noise", "record"}
COMPILES |= {"record_noise", "guidance_rescale", "eta", "rows_at_once", "long_prompts", "tiled", "strength", "choice"}
COMPILES |= {"image_noise", "centred", "devices", "as_function", "clip_skip"}
# The default tier checks only these cells of such features, because their networks are the smallest.
QUICK = {(name, "stable_diffusion") for name in ("output", "record", "guidance_rescale", "strength", "as_function")}


def cells():
    for part, features in TABLE.items():
        for name, families in features.items():
            for family, cell in families.items():
                compiles = part in ("call", "other") and cell == WORKS and name in COMPILES
                marks = [pytest.mark.slow] if compiles and (name, family) not in QUICK else []
                yield pytest.param(part, name, family, id=f"{part}-{name}-{family}", marks=marks)


@pytest.mark.parametrize(("part", "name", "family"), list(cells()))
def test_cell(part, name, family, bench, tmp_path, capsys):
    cell = TABLE[part][name][family]
    if cell == WORKS:
        check = {
            "call": lambda: check_call(bench, name, capsys),
            "other": lambda: check_other(bench, name, tmp_path),
            "sweep": lambda: check_sweep(bench, name),
            "shell": lambda: check_shell(bench, name),
        }
        check[part]()
        return
    refusals = {
        "call": lambda: bench.pipe(**bench.call | {name: None}),
        "other": lambda: refuse_other(bench, name, tmp_path),
        "sweep": lambda: planned(bench, name),
        "shell": lambda: refuse_in_shell(bench, name),
    }
    message = cell.format(name=name, title=re.escape(bench.pipe.system.title), option=name.replace("_", "-"))
    with pytest.raises((CheckpointError, TypeError, ValueError), match=message):
        refusals[part]()
