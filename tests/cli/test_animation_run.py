"""Animations of `sega-jax edit`: the frames, the files, and the command that reproduces a file."""

import shlex
import warnings

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageSequence

from sega_jax import Edit, load
from sega_jax.cli import animation_run
from sega_jax.cli.animation_run import captioned, encoded
from sega_jax.cli.main import main
from sega_jax.pipelines import pipeline, stored_settings
from sega_jax.pipelines.output import Output

pytestmark = pytest.mark.usefixtures("one_by_default")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(*words):
    return CliRunner().invoke(main, list(map(str, words)))


def frames(path):
    with Image.open(path) as image:
        return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]


def picture_maker(batches, flaws=()):
    """Returns a stand-in for `pipeline.run` that records batches. `flaws` has the scales of pictures with NaN."""

    def make(pipe, batch):
        batches.append(batch)
        scales = [edits[0].scale if edits else 0 for edits in batch.edits]
        images = [None if one in flaws else Image.new("RGB", (16, 16), (int(20 * one), 0, 90)) for one in scales]
        finite = np.array([image is not None for image in images])
        return Output(images, finite, batch.seeds, flagged=np.array(scales) == 7)

    return make


@pytest.fixture
def batches(monkeypatch):
    """Replaces the networks, and returns a list that receives the batches."""
    made = []
    monkeypatch.setattr(pipeline, "run", picture_maker(made))
    return made


def animate(folder, out, *words):
    return run(
        "edit", "--model", folder, "--prompt", "a cat", "--edit", "hat:warmup=0", "--steps", 2, *words, "--out", out
    )


def test_frames_equal_pictures_and_the_command_of_info_repeats_the_file(
    least_folder, tmp_path, monkeypatch, compilations
):
    made, counts, original = [], [], pipeline.run
    monkeypatch.setattr(pipeline, "run", lambda *batch: (original(*batch), counts.append(len(compilations)))[0])
    monkeypatch.setattr(animation_run, "encoded", lambda images, *rest: made.append(images) or encoded(images, *rest))
    words = ["--animate", "hat.scale=0:8:2", "--seed", 3, "--no-captions"]
    result = animate(least_folder, tmp_path / "out", *words)
    assert result.exit_code == 0, result.output
    assert "hat.scale from 0 to 8 in 5 frames" in result.output
    assert len(counts) == 3
    assert counts[0] == counts[2]  # later groups of frames compile nothing
    path = tmp_path / "out" / "0001-animation.webp"
    assert [one.name for one in path.parent.iterdir()] == [path.name]

    pipe = load(least_folder)
    for image, scale in zip(made[0], (0, 2, 4, 6, 8, 6, 4, 2), strict=True):
        edits = [[Edit("hat", scale=scale, warmup=0)]] * 2
        expected = pipe(["a cat"] * 2, edits, steps=2, seed=[3, 3], output="uint8").images[0]
        assert np.array_equal(image, expected)

    shown = run("info", path).output
    assert "animate          hat.scale=0:8:2\n" in shown
    assert "values           0; 2; 4; 6; 8\n" in shown
    again = run(*shlex.split(shown.splitlines()[-1])[1:], "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("format", "duration", "stored"), [("webp", 167, "6"), ("gif", 170, "5.88235")])
def test_the_file_plays_forward_and_back_for_ever(least_folder, tmp_path, batches, format, duration, stored):
    words = ["--animate", "hat.scale=0:8:1", "--animate-format", format, "--seed", 3, "--fps", 6]
    for _ in range(2):
        result = animate(least_folder, tmp_path, *words)
        assert result.exit_code == 0, result.output
    names = [f"{number}-animation.{format}" for number in ("0001", "0002")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    with Image.open(tmp_path / names[0]) as image:
        image.load()
        assert (image.n_frames, image.info["duration"], image.info["loop"]) == (16, duration, 0)
    shown = frames(tmp_path / names[0])
    red = [frame[20, 20, 0] for frame in shown]
    assert np.abs(np.subtract(red, [20 * abs(scale) for scale in [*range(9), *range(7, 0, -1)]])).max() <= 6
    known = stored_settings.read(tmp_path / names[0])
    assert known["picture"] == "animation"
    assert known["fps"] == stored
    assert f"frames, {1000 / duration:.3g} frames per second\n" in result.output
    assert known["values"] == list(range(9))
    # A run without an animation makes two pictures at once, so a group has two frames. All have the same noise.
    assert {batch.rows for batch in batches} == {2}
    assert {seed for batch in batches for seed in batch.seeds} == {3}


def test_each_seed_has_its_animation(least_folder, tmp_path, batches):
    result = animate(least_folder, tmp_path, "--animate", "hat.scale=0,5", "--seed", "1,4", "--one-way")
    assert result.exit_code == 0, result.output
    names = ["0001-seed1-animation.webp", "0001-seed4-animation.webp"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert "(2 of 2)" in result.output
    assert [batch.seeds for batch in batches] == [[1, 1], [4, 4]]
    assert stored_settings.read(tmp_path / names[1])["seed"] == 4
    assert len(frames(tmp_path / names[1])) == 2


@pytest.mark.parametrize(
    ("setting", "sizes"), [("guidance_scale=1:4:1", [2, 2]), ("steps=1:4:1", [1] * 4), ("momentum_scale=0,0.5", [1, 1])]
)
def test_numbers_of_the_call_change(least_folder, tmp_path, batches, setting, sizes):
    result = animate(least_folder, tmp_path, "--animate", setting)
    assert result.exit_code == 0, result.output
    assert [batch.rows for batch in batches] == sizes
    if setting.startswith("guidance"):
        assert [x for batch in batches for x in batch.settings.guidance_scale.tolist()] == [1, 2, 3, 4]
    if setting.startswith("steps"):
        assert [batch.calls for batch in batches] == [1, 2, 3, 4]


def test_low_memory_groups_are_larger(stages, tmp_path, monkeypatch):
    sizes = []

    def make(prompt, edits, *, seed, **call):
        sizes.append(len(prompt))
        return Output([Image.new("RGB", (16, 16))] * len(prompt), np.ones(len(prompt), bool), seed)

    monkeypatch.setattr("sega_jax.pipelines.cascade.Cascade.__call__", lambda _, *args, **call: make(*args, **call))
    result = animate(stages["stage1"], tmp_path, "--animate", "hat.scale=1:20:1", "--low-memory")
    assert result.exit_code == 0, result.output
    assert sizes == [20]


def test_frames_with_nan_are_reported_and_left_out(least_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "run", picture_maker([], flaws=(2, 3)))
    result = animate(least_folder, tmp_path, "--animate", "hat.scale=0:7:1", "--one-way")
    assert result.exit_code == 1
    assert "were not written: hat.scale=2, hat.scale=3; lower the scales" in result.output
    assert "Flagged by the safety checker: hat.scale=7\n" in result.output
    path = tmp_path / "0001-animation.webp"
    assert stored_settings.read(path)["values"] == [0, 1, 4, 5, 6, 7]
    assert len(frames(path)) == 6


def test_no_file_without_frames(least_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "run", picture_maker([], flaws=(1, 2)))
    result = animate(least_folder, tmp_path, "--animate", "hat.scale=1,2")
    assert result.exit_code == 1
    assert not list(tmp_path.iterdir())


def test_every_frame_is_checked_before_the_first_is_made(least_folder, tmp_path, batches):
    words = ["--edit", "dog:warmup=0,cooldown=3", "--animate", "dog.warmup=0:4:1"]
    result = animate(least_folder, tmp_path, *words)
    assert result.exit_code == 1
    assert "ends at cooldown=3, before it begins at warmup=3; give a cooldown above the warmup" in result.output
    assert not batches
    assert not list(tmp_path.iterdir())


def test_warnings_are_printed_once(least_folder, tmp_path, monkeypatch):
    make = picture_maker([])

    def run_with_bar(pipe, batch):
        with warnings.catch_warnings():  # as progress bars do; it makes Python forget which warnings it has shown
            return make(pipe, batch)

    monkeypatch.setattr(pipeline, "run", run_with_bar)
    result = animate(least_folder, tmp_path, "--animate", "hat.warmup=0,1,2,2,3,3", "--seed", "1-3")
    assert result.exit_code == 0, result.output
    assert [result.output.count(f"begins at warmup={i},") for i in range(4)] == [0, 0, 1, 1]


def test_captions_are_below_the_pictures_and_pages_have_one_size():
    images = [Image.new("RGB", (8, 16), "red"), Image.new("RGB", (8, 16), "blue")]
    pages = captioned(images, ["short", "a long caption that needs several lines " * 3])
    assert pages[0].size == pages[1].size
    for page, colour in zip(pages, ("red", "blue"), strict=True):
        pixels = np.asarray(page)
        inside = (pixels == np.asarray(Image.new("RGB", (1, 1), colour))).all(-1)
        rows, columns = np.nonzero(inside.any(1))[0], np.nonzero(inside.any(0))[0]
        # The picture is complete, and its caption begins below it.
        assert inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert (pixels[rows[-1] + 1 :] < 128).any()
        assert (pixels[: rows[0]] == 255).all()


@pytest.mark.parametrize("format", ["webp", "gif"])
def test_smooth_areas_have_no_bands(format, tmp_path):
    """The mean colour of each small area is kept, although GIFs have only 256 colours."""
    y, x = np.mgrid[:128, :128] / 127
    smooth = np.stack([255 * x, 255 * y, 127 * (x + y)], -1).astype(np.uint8)
    (tmp_path / "a").write_bytes(encoded([Image.fromarray(smooth), Image.fromarray(smooth[::-1])], format, 200, {}))
    for shown, expected in zip(frames(tmp_path / "a"), (smooth, smooth[::-1]), strict=True):
        means = [one.reshape(16, 8, 16, 8, 3).astype(float).mean((1, 3)) for one in (shown, expected)]
        assert np.quantile(np.abs(means[0] - means[1]), 0.95) < 2.5
