"""The options of animations: the notation of settings and values, and mistakes."""

import re

import pytest
from click.testing import CliRunner

from sega_jax.cli.animation import parse_values, read, words
from sega_jax.cli.concepts import parse_edit
from sega_jax.cli.main import main
from sega_jax.systems.registry import named

STABLE = named("stable_diffusion")


def animation(text, *edits, image=False, **options):
    return read({"animate": text, **options}, edits, [parse_edit(edit) for edit in edits], image)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0:8:0.5", [str(i // 2) if i % 2 == 0 else str(i / 2) for i in range(17)]),
        ("0:1:0.1", ["0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "1"]),
        ("8:0:-1", ["8", "7", "6", "5", "4", "3", "2", "1", "0"]),
        ("-1:1:1", ["-1", "0", "1"]),
        ("0,2,4,8", ["0", "2", "4", "8"]),
        (" 0 , 1 : 3 : 1 , .5 ", ["0", "1", "2", "3", "0.5"]),
        ("1e1,+2.50", ["10", "2.5"]),
        ("5:5:1", ["5"]),
        ("1:256:1", [str(i) for i in range(1, 257)]),
    ],
)
def test_values_are_read(text, values):
    assert parse_values(text) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' should be a number such as 0.5, or a range FROM:TO:STEP such as 0:8:0.5"),
        ("a", "'a' should be a number"),
        ("1,", "'' should be a number"),
        ("0:8", "'0:8' should be a number such as 0.5, or a range FROM:TO:STEP"),
        ("0:8:1:2", "'0:8:1:2' should be a number"),
        ("nan", "'nan' should be a number"),
        ("inf", "'inf' should be a number"),
        ("1/2", "'1/2' should be a number"),
        ("1e999999999", "'1e999999999' should be a number"),
        ("0:8:0", "the range 0:8:0 never reaches 8; write 0:8:0.5"),
        ("8:0:0", "the range 8:0:0 never reaches 0; write 8:0:-0.5"),
        ("8:0:1", "the range 8:0:1 never reaches 0; write 8:0:-1"),
        ("0:8:-0.5", "the range 0:8:-0.5 never reaches 8; write 0:8:0.5"),
        ("0:8:3", "the range 0:8:3 passes 8 without reaching it; write 0:6:3, or choose a step that divides"),
        ("0:8:0.01", "0:8:0.01 gives more than 256 values, which is the maximum; give a larger step"),
        ("0:999999999999999:1e-9", "gives more than 256 values"),
        ("0:200:1,200:0:-1", "gives more than 256 values"),
    ],
)
def test_values_that_cannot_be_read(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_values(text)


@pytest.mark.parametrize(
    ("text", "edits", "setting", "index"),
    [
        ("glasses.scale=0,1", ["hat", "glasses:scale=3"], "glasses.scale", 1),
        (" glasses . scale = 0,1", ["glasses"], "glasses.scale", 0),
        ('"red hair".warmup=0,1', ["red hair"], "red hair.warmup", 0),
        ("-beard.threshold=0,1", ["beard", "-beard"], "-beard.threshold", 1),
        ("hat.momentum-beta=0,1", ["hat"], "hat.momentum_beta", 0),
        ('"a=b.c".scale=0,1', ['"a=b.c"'], "a=b.c.scale", 0),
        ('"-hat".scale=0,1', ["-hat", '"-hat"'], '"-hat".scale', 1),
        ("-hat.scale=0,1", ["-hat", '"-hat"'], "-hat.scale", 0),
        ("guidance-scale=1,2", ["hat"], "guidance_scale", None),
        ("steps=1:3:1", [], "steps", None),
    ],
)
def test_settings_are_found(text, edits, setting, index):
    found = animation(text, *edits)
    assert (found.setting, found.edit) == (setting, index)
    assert animation(found.known["animate"], *edits) == found


def test_a_positive_scale_removes_more_of_a_removed_concept():
    edits = ["-beard:scale=3,warmup=2", "hat"]
    frames = animation("-beard.scale=0:8:4", *edits).frames(list(map(parse_edit, edits)), STABLE)
    assert [[edit.scale for edit in frame.edits] for frame in frames] == [[0, 5], [-4, 5], [-8, 5]]
    assert {frame.edits[0].warmup for frame in frames} == {2}


@pytest.mark.parametrize(
    ("edit", "text", "stored", "values"),
    [
        ("hat:scale=-5", "hat.scale=-5:5:5", "-hat.scale=5,0,-5", [-5, 0, 5]),
        ("hat:scale=-5", "hat.warmup=0:2:1", "-hat.warmup=0:2:1", [0, 1, 2]),
        ("-hat:scale=0", "-hat.scale=0:2:1", "hat.scale=0,-1,-2", [0, -1, -2]),
    ],
)
def test_the_stored_setting_has_the_sign_of_the_stored_edit(edit, text, stored, values):
    """The command of `info` writes an edit with a negative scale with a minus, however it was given."""
    found = animation(text, edit)
    assert found.known["animate"] == stored
    assert [getattr(frame.edits[0], found.name) for frame in found.frames([parse_edit(edit)], STABLE)] == values


def test_the_options_are_repeated():
    found = animation("hat.scale=0,4", "hat", animate_format="gif", fps="5", one_way=True)
    expected = ["--animate", "hat.scale=0,4", "--animate-format", "gif", "--fps", "5", "--one-way"]
    assert words(found.known) == expected
    assert words({"seed": 5}) == []


@pytest.mark.parametrize(
    ("format", "fps", "duration", "stored"),
    [
        *(("webp", "40", 25, "40"), ("webp", "24", 42, "24"), ("webp", "0.1", 10_000, "0.1"), ("webp", "50", 20, "50")),
        *(("gif", "40", 30, "33.3333"), ("gif", "24", 40, "25"), ("gif", "6", 170, "5.88235"), ("gif", "50", 20, "50")),
    ],
)
def test_the_nearest_rate_is_played_and_stored(format, fps, duration, stored):
    one = animation("hat.scale=0,4", "hat", animate_format=format, fps=fps)
    assert (one.duration, one.known["fps"]) == (duration, stored)
    again = animation("hat.scale=0,4", "hat", animate_format=format, fps=stored)
    assert (again.duration, again.known["fps"]) == (duration, stored)


@pytest.mark.parametrize(("count", "fps"), [(2, 2), (15, 5), (100, 20)])
def test_the_default_speed_suits_the_number_of_values(count, fps):
    assert animation(f"hat.scale=1:{count}:1", "hat").fps == fps


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--fps", "5"], "--fps is given without --animate; name the setting to animate, or leave --fps out"),
        (["--one-way"], "--one-way is given without --animate"),
        (["--animate", "glasses.scale"], "'glasses.scale': the setting should be followed by its values, as in"),
        (["--animate", "glasses.scale=5"], "5 is one value, but an animation needs at least two; give a range"),
        (["--animate", "glasses.scale=0:8"], "'0:8' should be a number such as 0.5, or a range FROM:TO:STEP"),
        (["--animate", "glasses.scale=0:8:0.001"], "gives more than 256 values"),
        (["--animate", "glasses.scael=0,1"], "'scael' is not a setting of an edit; the settings are scale, threshold"),
        (["--animate", "scale=0,1"], "'scale' cannot be animated; for an edit's scale, name its concept, as in"),
        (["--animate", "=0,1"], "'' cannot be animated; the numbers of a call are steps, guidance_scale, momentum"),
        (["--animate", "height=8,16"], "'height' cannot be animated"),
        (["--animate", "seed=1,2"], "'seed' cannot be animated"),
        (["--animate", "prompt=1,2"], "'prompt' cannot be animated"),
        (["--animate", "smile.scale=0,1"], "no --edit is 'smile'; the edits are glasses, -beard, hat, hat"),
        (["--animate", "beard.scale=0,1"], "no --edit is 'beard'; the edits are glasses, -beard"),
        (["--animate", ".scale=0,1"], "no --edit is ''"),
        (["--animate", "hat.scale=0,1"], "2 edits are 'hat', so it is unclear which of them changes; give one of them"),
        (["--animate", "glasses.threshold=0,2"], "glasses.threshold=2.0 should be a number in [0, 1]"),
        (["--animate", "glasses.warmup=0,0.5"], "glasses.warmup='0.5' should be a whole number"),
        (["--animate", "glasses.scale=0,1e39"], "'1e39' should be a number"),
        (["--animate", "guidance_scale=0:8:1"], "--guidance-scale 0 ignores the prompt; give 1 to turn off"),
        (["--animate", "steps=0:8:1"], "--steps 0 should be at least 1"),
        (["--animate", "strength=0,1"], "strength needs a picture to start from; name one with --image"),
        (["--animate", "glasses.scale=0,1", "--fps", "100"], "--fps 100 should be a number in [0.1, 50]"),
        (["--animate", "glasses.scale=0,1", "--fps", "x"], "--fps x should be a number"),
    ],
)
def test_mistakes_are_reported_before_a_checkpoint_is_read(tmp_path, monkeypatch, given, message):
    monkeypatch.setattr("sega_jax.pipelines.sources.find", lambda *_, **__: pytest.fail("looked for a checkpoint"))
    edits = [part for one in ("glasses", "-beard", "hat", "hat:warmup=1") for part in ("--edit", one)]
    result = CliRunner().invoke(main, ["edit", "--prompt", "cat", *edits, *given, "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_arguments_of_other_families_are_refused(paella_folder, tmp_path):
    words = ["--model", str(paella_folder), "--prompt", "cat", "--animate", "eta=0,1", "--out", str(tmp_path)]
    result = CliRunner().invoke(main, ["edit", *words])
    assert result.exit_code == 1
    assert "--eta applies to" in result.output
