"""The commands `edit` and `info`: their files and messages, invalid input, and Ctrl-C."""

import os
import random
import shlex
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from sega_jax import Edit, Pipeline, load
from sega_jax.cli.concepts import format_edit, parse_edit
from sega_jax.cli.main import main
from sega_jax.pipelines import png
from sega_jax.weights import hub

pytestmark = pytest.mark.usefixtures("one_by_default")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(*words):
    return CliRunner().invoke(main, list(map(str, words)))


@pytest.fixture(scope="module")
def first_run(least_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "new" / "folder"
    words = ["edit", "--model", least_folder, "--prompt", "a cat, sitting", "--edit", "glasses:scale=4,warmup=1"]
    words += ["--edit", "-hat:threshold=0.5", "--steps", 3, "--seed", 7, "--height", 24, "--out", out]
    return run(*words), out


def test_edit_writes_both_pictures_and_a_sheet(first_run):
    result, out = first_run
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["0001-edited.png", "0001-original.png", "0001-sheet.png"]
    original, edited, sheet = (Image.open(out / f"0001-{name}.png") for name in ("original", "edited", "sheet"))
    assert original.size == edited.size == (8, 24)
    assert np.any(np.asarray(original) != np.asarray(edited))
    # The two pictures are side by side, enlarged by an integer factor.
    assert sheet.width > 2 * 16 * 8
    assert sheet.height > 16 * 24


@pytest.mark.slow
def test_edit_uses_the_defaults_of_the_checkpoint(least_xl_folder, tmp_path):
    """Stable Diffusion XL has its own default guidance scale, and uses zeros for a missing negative prompt."""
    words = ["--prompt", "a cat", "--edit", "hat:warmup=0", "--steps", 2, "--out", tmp_path]
    result = run("edit", "--model", least_xl_folder, *words)
    assert result.exit_code == 0, result.output
    call = {"steps": 2, "seed": [0, 0], "output": "uint8"}
    expected = load(least_xl_folder)(["a cat"] * 2, [[], [Edit("hat", warmup=0)]], **call).images
    for name, image in zip(("original", "edited"), expected, strict=True):
        assert np.array_equal(Image.open(tmp_path / f"0001-{name}.png"), image)


def test_edit_prints_its_settings(first_run):
    output = first_run[0].output
    for part in ("DDIMScheduler, float32", "'a cat, sitting', seed 7, 3 steps", "+ glasses: scale 4", "- hat: scale 5"):
        assert part in output
    assert "Compiled in" in output
    assert "Wrote" in output


def test_the_command_of_info_repeats_the_picture(first_run, tmp_path):
    _, out = first_run
    result = run("info", out / "0001-edited.png")
    assert result.exit_code == 0, result.output
    shown = dict(line.split(maxsplit=1) for line in result.output.splitlines()[:-2])
    expected = {"picture": "edited", "seed": "7", "height": "24", "width": "8"}
    assert {name: shown[name] for name in expected} == expected
    for edit in (
        "+ glasses: scale 4, threshold 0.9, warmup 1, cooldown never",
        "- hat: scale 5, threshold 0.5, warmup 10",
    ):
        assert edit in result.output
    assert "None" not in result.output
    # The values are aligned.
    assert len({len(line) - len(line.split(maxsplit=1)[1]) for line in result.output.splitlines()[:5]}) == 1
    command = shlex.split(result.output.splitlines()[-1])
    assert command[:2] == ["sega-jax", "edit"]
    again = run(*command[1:], "--out", tmp_path)
    assert again.exit_code == 0, again.output
    for name in ("original", "edited"):
        ours, theirs = (np.asarray(Image.open(d / f"0001-{name}.png")) for d in (tmp_path, out))
        np.testing.assert_array_equal(ours, theirs)


def test_another_scheduler_is_in_the_command(least_folder, tmp_path):
    words = ["--prompt", "dog", "--edit", "hat:warmup=0", "--steps", 2, "--scheduler", "EulerDiscreteScheduler"]
    result = run("edit", "--model", least_folder, *words, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "EulerDiscreteScheduler, float32" in result.output
    shown = run("info", tmp_path / "0001-edited.png").output
    assert "--scheduler EulerDiscreteScheduler" in shown.splitlines()[-1]


def test_a_name_on_the_hub_is_repeated_by_its_commit(least_folder, tmp_path, monkeypatch):
    commit = tmp_path / ("c" * 40)
    commit.symlink_to(least_folder)
    monkeypatch.setattr(hub, "fetch", lambda name, files, revision=None: commit)
    words = ["--prompt", "dog", "--edit", "hat:warmup=0", "--steps", 1, "--out", tmp_path / "out"]
    result = run("edit", "--model", "owner/tiny", *words)
    assert result.exit_code == 0, result.output
    command = run("info", tmp_path / "out" / "0001-edited.png").output.splitlines()[-1]
    assert command.startswith(f"sega-jax edit --model owner/tiny --revision {'c' * 40} ")


def test_the_command_quotes_words_that_look_like_options(least_folder, tmp_path):
    words = ["--model", least_folder, "--prompt", "-a cat: b=1", "--negative-prompt", "--x", "--steps", 1]
    words += ["--edit", '"-hat":warmup=0', "--edit", '-"--dog:scale=3":warmup=0']
    result = run("edit", *words, "--out", tmp_path / "first")
    assert result.exit_code == 0, result.output
    shown = run("info", tmp_path / "first" / "0001-edited.png").output.splitlines()[-1]
    again = run(*shlex.split(shown)[1:], "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    pictures = [np.asarray(Image.open(tmp_path / name / "0001-edited.png")) for name in ("first", "again")]
    np.testing.assert_array_equal(*pictures)
    plain = np.asarray(Image.open(tmp_path / "first" / "0001-original.png"))
    assert (plain != pictures[0]).any()


def test_pictures_of_earlier_runs_are_kept(first_run, least_folder):
    _, out = first_run
    before = (out / "0001-edited.png").read_bytes()
    words = ["--prompt", "dog", "--edit", "hat:warmup=0", "--steps", 1, "--out", out]
    result = run("edit", "--model", least_folder, *words)
    assert result.exit_code == 0, result.output
    assert (out / "0001-edited.png").read_bytes() == before
    assert (out / "0002-edited.png").is_file()


EDITS = [
    ("glasses", Edit("glasses")),
    ("-beard", Edit("beard", scale=-5)),
    ("glasses, wearing glasses:scale=6", Edit("glasses, wearing glasses", scale=6)),
    ("-beard:scale=6,threshold=0.95,warmup=8", Edit("beard", scale=-6, threshold=0.95, warmup=8)),
    ("16:9", Edit("16:9")),
    ("a:b=c:weight=1", Edit("a:b=c")),
    ("x:momentum-scale=0.3, momentum_beta=0.6, cooldown=20", Edit("x", 5, None, None, 20, 1, 0.3, 0.6)),
    ("x:scale=-2.5", Edit("x", scale=-2.5)),
    ("twenty-one:scale=1e1", Edit("twenty-one", scale=10)),
    ('"-glasses"', Edit("-glasses")),
    ('-"-glasses":scale=6', Edit("-glasses", scale=-6)),
    ('"a:scale=3":scale=4', Edit("a:scale=3", scale=4)),
    ('"quoted" words', Edit('"quoted" words')),
    ('" spaces "', Edit(" spaces ")),
]


@pytest.mark.parametrize(("text", "edit"), EDITS)
def test_edits_are_read_and_written(text, edit):
    assert parse_edit(text) == edit
    assert parse_edit(format_edit(edit)) == edit


def test_any_words_can_be_written_and_read_again():
    rng = random.Random(0)
    pieces = [*"-:=,\"\\' \n\t", "scale", "weight=1", ":scale=5", "glasses", "é", "猫", "🎩", "\x00", "{", "$(x)"]
    for _ in range(3000):
        words = "".join(rng.choices(pieces, k=rng.randint(1, 6)))
        edit = Edit(words, scale=rng.choice([5, -5, 2.5, -0.25]), warmup=rng.choice([10, 0]))
        (again,) = shlex.split(shlex.quote(format_edit(edit)))
        assert parse_edit(again) == edit
    assert format_edit(Edit("hat", scale=1e30)) == "hat:scale=1e+30"
    # Quotation marks are added only where they are needed.
    assert format_edit(Edit("16:9 glasses", scale=-5)) == "-16:9 glasses"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "there is no concept"),
        ("-", "there is no concept"),
        (":scale=3", "there is no concept"),
        ("x:scales=3", "'scales' is unknown; did you mean x:scale=3\\?"),
        ("x:scale=3,scale=4", "'scale' is given twice"),
        ("x:scale=big", "should be a number"),
        ("x:warmup=2.5", "should be a whole number"),
        ("x:threshold=2", "in \\[0, 1\\]"),
        ("x:weight=-1", "negative scale"),
        ("-x:scale=-3", "already removes"),
    ],
)
def test_malformed_edits_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        parse_edit(text)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"--model": "nowhere"}, "nowhere is not a folder"),
        ({"--edit": "x:threshold=2"}, "threshold=2.0 should be a number in [0, 1]"),
        ({"--steps": 0}, "--steps 0 should be at least 1"),
        ({"--height": 7}, "--height 7 is not a multiple of 2"),
        ({"--dtype": "int8"}, "--dtype int8 should be one of"),
        ({"--guidance-scale": "nan"}, "--guidance-scale nan should be a finite number"),
        ({"--guidance-scale": "0"}, "--guidance-scale 0 ignores the prompt; give 1 to turn"),
        ({"--steps": 1001}, "--steps 1001 should be from 1 to 1000"),
    ],
)
def test_mistakes_end_with_a_message(folder, tmp_path, changed, words):
    options = {"--model": folder, "--prompt": "cat", "--edit": "hat", "--steps": 2, "--out": tmp_path} | changed
    result = run("edit", *(word for option in options.items() for word in option))
    assert result.exit_code == 1
    assert f"Error: {words}" in result.output or words in result.output.split("Error: ")[1]
    assert "Traceback" not in result.output
    assert not list(tmp_path.glob("*.png"))


def test_an_unwritable_folder_is_refused_before_sampling(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Pipeline, "__call__", lambda *_, **__: pytest.fail("sampled"))
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        result = run("edit", "--model", folder, "--prompt", "cat", "--edit", "hat", "--out", out)
        assert result.exit_code == 1
        assert "cannot be written to" in result.output


def test_a_command_that_fails_leaves_no_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Pipeline, "__call__", lambda *_, **__: pytest.fail("sampled"))
    for words in (["--model", tmp_path / "nowhere"], ["--model", folder, "--steps", 10**6]):
        result = run("edit", *words, "--prompt", "cat", "--out", tmp_path / "new" / "folder")
        assert result.exit_code == 1
    assert not (tmp_path / "new").exists()


def test_pictures_that_are_not_finite_are_not_written(least_folder, tmp_path):
    words = ["--steps", 2, "--edit", "hat:scale=3e38,warmup=0", "--out", tmp_path]
    result = run("edit", "--model", least_folder, "--prompt", "cat", *words)
    assert result.exit_code == 1
    assert "pictures with NaN or infinity were not written: edited;" in result.output
    assert [path.name for path in tmp_path.glob("*.png")] == ["0001-original.png"]


def test_info_refuses_other_files(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (4, 4)).save(tmp_path / "foreign.png")
    for name, words in (("none.png", "does not exist"), ("text.png", "be read"), ("foreign.png", "not made by")):
        result = run("info", tmp_path / name)
        assert result.exit_code == 1
        assert words in result.output


def test_captions_stay_inside_a_general_sheet():
    captions = ["a" * 300, "few words " * 200, "猫" * 500, ""]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="pictures show")
        page = png.sheet([Image.new("RGB", (8, 8), c) for c in ("red", "blue", "green", "red")], captions)
    assert page.height < 2 * 256
    white = np.asarray(page) == 255
    assert white[:, -4:].all()
    assert white[-4:].all()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_an_interruption_exits_cleanly(folder, tmp_path):
    words = ["--model", str(folder), "--prompt", "cat", "--edit", "hat", "--steps", "900", "--out", str(tmp_path)]
    # Processes started in the background ignore Ctrl-C unless they set a handler.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", f"{listen}; from sega_jax.cli.main import main; main()", "edit", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("  + hat"):
            break
    # Python ignores an interruption that arrives in some of its callbacks, so the test presses Ctrl-C repeatedly.
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(1)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Aborted!" in rest
    assert "Traceback" not in rest
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.slow
def test_the_command_repeats_further_options_of_stable_diffusion(least_folder, tmp_path):
    """Covers a starting picture, rescaled guidance, tiles, and long and weighted prompts."""
    path = tmp_path / "start.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    words = ["--prompt", "a (cat:1.3), on a mat, in b", "--edit", "(hat:1.2):warmup=0", "--steps", 4]
    words += ["--image", path, "--strength", 0.5, "--guidance-rescale", 0.5, "--tiled", "--long-prompts", "--weighted"]
    result = run("edit", "--model", least_folder, *words, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    shown = run("info", tmp_path / "out" / "0001-edited.png").output.splitlines()[-1]
    for part in (str(path), "--strength 0.5", "--guidance-rescale 0.5", "--tiled", "--long-prompts", "--weighted"):
        assert part in shown
    again = run(*shlex.split(shown)[1:], "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    ours, theirs = (np.asarray(Image.open(tmp_path / name / "0001-edited.png")) for name in ("out", "again"))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_the_command_repeats_long_and_weighted_prompts_of_stable_diffusion_xl(least_xl_folder, tmp_path):
    words = ["--prompt", "dog, (black:1.4), on the mud", "--edit", "(hat:1.2):warmup=0", "--steps", 2]
    result = run("edit", "--model", least_xl_folder, *words, "--long-prompts", "--weighted", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "cut from the end" not in result.output
    call = {"steps": 2, "seed": [0, 0], "output": "uint8", "long_prompts": True, "weighted": True}
    edits = [[], [Edit("(hat:1.2)", warmup=0)]]
    expected = load(least_xl_folder)([words[1]] * 2, edits, **call).images
    for name, image in zip(("original", "edited"), expected, strict=True):
        assert np.array_equal(Image.open(tmp_path / f"0001-{name}.png"), image)
    command = run("info", tmp_path / "0001-edited.png").output.splitlines()[-1]
    assert "--long-prompts" in command
    assert "--weighted" in command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--strength", 0.5], "--strength is given without --image"),
        (["--image", "nowhere.png"], "--image nowhere.png does not exist"),
        (["--image", "start.png", "--strength", 2], "--strength 2 should be a number in [0, 1]"),
        (["--image", "start.png"], "--image has 8x8 pixels (height x width), expected 16x16"),
    ],
)
def test_unsuitable_starting_pictures_are_refused(folder, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("start.png")
    result = run("edit", "--model", folder, "--prompt", "dog", "--edit", "hat", *words, "--out", tmp_path)
    assert result.exit_code == 1
    assert message in result.output
