"""Tests the names of pictures' files: readable, unique, short, and safe on every file system."""

import re

import pytest
from support.sweeping import hat_plan

from sega_jax import sweep
from sega_jax.sweep.planning.file_names import FileNames

LONG = "a photo of a woman, with a very long description that goes on and on"


def stems(stages=("",), **tables):
    description = sweep.Sweep(**{"call": {"prompt": "a cat"}, "edits": {"glasses": {}, "big-hat": {}}} | tables)
    names = FileNames(description, stages)
    return [names.of(i) for i in range(len(description))]


def test_names_list_the_axes_that_vary():
    grid = {"steps": [20], "glasses.scale": [-4, 2.5], "seed": {"from": 1, "count": 2}}
    assert stems(grid=grid) == [
        "0000-glasses.scale=-4-seed=1",
        "0001-glasses.scale=-4-seed=2",
        "0002-glasses.scale=2.5-seed=1",
        "0003-glasses.scale=2.5-seed=2",
    ]
    assert stems() == ["0000"]


@pytest.mark.parametrize(
    ("axis", "values", "words"),
    [
        ("prompt", [LONG, "a cat"], ["a_photo_of_a_woman_with_a_very", "a_cat"]),
        ("prompt", ["y" * 200, "y"], ["y" * 32, "y"]),
        ("prompt", ["Ünïcode Café", 'a\\b/c:d*e?f"g<h>i|j'], ["Unicode_Cafe", "a_b_c_d_e_f_g_h_i_j"]),
        ("prompt", ["北京", "猫 cat", "кошка"], ["value1", "cat", "value3"]),
        ("prompt", ["../..", ".hidden $HOME `x` %41 #&;", " "], ["value1", "hidden_HOME_x_41", "empty"]),
        ("edits", [[], ["glasses", "big-hat"]], ["none", "glasses_big_hat"]),
        ("glasses.cooldown", ["never", 9], ["never", "9"]),
        ("guidance_scale", [7, 12345678.0], ["7", "1.23457e07"]),
        ("tiled", [True, False], ["true", "false"]),
        ("scheduler", ["DDIMScheduler", "PNDMScheduler"], ["DDIMScheduler", "PNDMScheduler"]),
    ],
)
def test_values(axis, values, words):
    tables = {"call": {}} if axis == "prompt" else {}
    expected = [f"{i:04}-{axis}={word}" for i, word in enumerate(words)]
    assert stems(grid={axis: values}, **tables) == expected


def test_edits_without_ascii_letters_are_numbered():
    tables = {"edits": {"glasses": {}, "帽子": {}, "bière": {}}, "zip": {"帽子.scale": [1, 2], "bière.scale": [3, 4]}}
    assert stems(**tables) == ["0000-edit2.scale=1-biere.scale=3", "0001-edit2.scale=2-biere.scale=4"]


def test_draws_and_zipped_axes():
    sample = {"count": 2, "glasses.momentum_scale": {"low": 0.0, "high": 0.6}, "seed": [3]}
    for name in stems(zip={"steps": [5, 10], "glasses.warmup": [1, 2]}, sample=sample):
        assert re.fullmatch(r"000\d-steps=\d+-glasses.warmup=\d-glasses.momentum_scale=0\.\d+", name)


def test_names_are_short_unique_and_safe():
    grid = {f"{'e' * 90}.scale": [1, 2], "prompt": [LONG, LONG.upper(), LONG[:-1]], "seed": range(2)}
    grid |= {"negative_prompt": [LONG, "x"], "scheduler": ["EulerAncestralDiscreteScheduler", "DDIMScheduler"]}
    names = stems(call={}, edits={"e" * 90: {}}, grid=grid)
    assert len({name.lower() for name in names}) == len(names) == 48
    assert all(re.fullmatch(r"[0-9]{4}[A-Za-z0-9._=-]*[A-Za-z0-9]", name) for name in names)
    assert max(map(len, names)) <= 115


def test_numbers_are_padded_to_the_number_of_points():
    description = sweep.Sweep(call={"prompt": "a cat"}, grid={"seed": range(10**5)})
    assert FileNames(description, {""}).of(42) == "00042-seed=42"


def test_only_the_given_stages_are_listed():
    tables = {"model": {"source": "a", "stage2": "b"}, "grid": {"seed": [0, 1], "stage2.noise_level": [10, 20]}}
    assert stems(**tables)[1] == "0001-seed=0"
    assert stems({"", "stage2"}, **tables)[1] == "0001-seed=0-stage2.noise_level=20"


def test_points_that_share_a_picture_share_its_first_number(least_folder):
    plan = hat_plan(least_folder, 2, [3, 0, 3])
    assert list(plan.files.values()) == [
        "0000-seed=0-hat.scale=3.png",
        "0001-seed=0-hat.scale=0.png",
        "0003-seed=1-hat.scale=3.png",
        "0004-seed=1-hat.scale=0.png",
    ]
