"""Tests the description of sweeps: files, objects, points, random draws, and errors for invalid sweeps."""

import json
import re

import pytest

from sega_jax import Edit
from sega_jax.sweep import Sweep

TEXT = """
format = "webp"

[model]
source = "path/to/a model"
dtype = "bfloat16"

[call]
steps = 6

[edits.glasses]
concept = "glasses, wearing glasses"
threshold = 0.95

[edits.beard]
scale = -8

[grid]
prompt = { file = "prompts.txt" }
seed = { from = 3, count = 2 }
edits = [[], ["glasses"], ["beard", "glasses"]]
guidance_scale = { from = 1.1, step = 0.1, count = 3 }

[zip]
glasses.warmup = [1, 2]
glasses.cooldown = [4, "never"]

[sample]
count = 5
key = 7
glasses.scale = { low = 2.0, high = 6.0 }
beard.warmup = { low = 1, high = 3 }
beard.threshold = [0.5, 0.7]
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "prompts.txt").write_text("a cat\n\n  a dog in the rain \n", "utf-8")
    (folder / "sweep.toml").write_text(TEXT, "utf-8")
    return folder / "sweep.toml"


@pytest.fixture(scope="module")
def sweep(path):
    return Sweep.read(path)


def test_a_file_gives_its_points(sweep):
    assert len(sweep) == 2 * 2 * 3 * 3 * 2 * 5
    points = list(sweep)
    assert points[0].items() >= {"prompt": "a cat", "seed": 3, "steps": 6, "edits": ()}.items()
    assert points[-1].items() >= {"prompt": "a dog in the rain", "seed": 4, "glasses.cooldown": None}.items()
    assert {point["guidance_scale"] for point in points} == {1.1, 1.2, 1.3}
    assert {(point["glasses.warmup"], point["glasses.cooldown"]) for point in points} == {(1, 4), (2, None)}
    # Active edits are in the order of the sweep's edits.
    assert {point["edits"] for point in points} == {(), ("glasses",), ("glasses", "beard")}
    assert {point["beard.scale"] for point in points} == {-8.0}
    assert len({json.dumps(point) for point in points}) == len(points)
    assert sweep.axes == [
        *("prompt", "seed", "edits", "guidance_scale"),
        *("glasses.warmup", "glasses.cooldown", "glasses.scale", "beard.warmup", "beard.threshold"),
    ]


def test_points_are_indexed(sweep):
    assert [sweep[i] for i in (0, 17, 359)] == [list(sweep)[i] for i in (0, 17, 359)]
    with pytest.raises(IndexError, match="point 360 does not exist; the sweep has 360 points"):
        sweep[360]


def test_an_object_equals_its_file(sweep):
    same = Sweep(
        format="webp",
        model={"source": "path/to/a model", "dtype": "bfloat16"},
        call={"steps": 6},
        edits={"glasses": {"concept": "glasses, wearing glasses", "threshold": 0.95}, "beard": {"scale": -8}},
        grid={
            "prompt": ["a cat", "a dog in the rain"],
            "seed": range(3, 5),
            "edits": [[], ["glasses"], ["beard", "glasses"]],
            "guidance_scale": {"from": 1.1, "step": 0.1, "count": 3},
        },
        zip=[{"glasses.warmup": [1, 2], "glasses.cooldown": [4, None]}],
        sample={
            "count": 5,
            "key": 7,
            "glasses.scale": {"low": 2.0, "high": 6.0},
            "beard": {"warmup": {"low": 1, "high": 3}},
            "beard.threshold": [0.5, 0.7],
        },
    )
    assert same == sweep
    assert list(same) == list(sweep)


def test_json_round_trip(sweep):
    again = Sweep(**json.loads(json.dumps(sweep.as_dict())))
    assert again == sweep
    assert list(again) == list(sweep)


def test_edits_may_be_edit_objects():
    sweep = Sweep(call={"prompt": "a cat"}, edits={"hat": Edit("a red hat", scale=4, warmup=3)})
    assert sweep[0].items() >= {"hat.concept": "a red hat", "hat.scale": 4.0, "hat.warmup": 3}.items()
    assert len(sweep) == 1


def drawn(count, key=0, **more):
    axes = {"eta": {"low": 0.0, "high": 1.0}, "seed": {"low": 0, "high": 9}, "prompt": ["a", "b", "c"]}
    sweep = Sweep(sample={"count": count, "key": key} | axes | more)
    return [(point["eta"], point["seed"], point["prompt"]) for point in sweep]


def test_draws_are_uniform():
    draws = drawn(2000)
    etas, seeds, prompts = zip(*draws, strict=True)
    assert abs(sum(etas) / 2000 - 0.5) < 0.03
    for values, known in ((seeds, range(10)), (prompts, "abc")):
        counts = [values.count(value) for value in known]
        assert sum(counts) == 2000
        assert min(counts) > 0.8 * 2000 / len(known)


def test_draws_are_independent_of_each_other():
    assert drawn(50)[:10] == drawn(10) == drawn(10, guidance_scale={"low": 1.0, "high": 9.0})
    assert not set(drawn(10)) & set(drawn(10, key=1))


def test_draws_do_not_change_between_versions():
    """The random draws must stay the same, because plans that earlier versions saved depend on them."""
    assert drawn(2) == [(0.9556987358846211, 3, "c"), (0.9564233676753604, 6, "c")]


PROMPT = {"prompt": ["a"]}
GLASSES = {"glasses": {}}
BAD = {
    "an unknown setting": (
        {"grid": PROMPT | {"sede": [1]}},
        "grid: 'sede' is unknown; did you mean seed\\?; the settings are prompt",
    ),
    "a setting of edits": ({"grid": PROMPT | {"scale": [1]}}, "'scale' is unknown .for an edit, use NAME.scale"),
    "an unknown setting of an edit": (
        {"edits": {"glasses": {"scael": 1}}, "grid": PROMPT},
        "edits: 'glasses.scael' is unknown; did you mean glasses.scale\\?; the settings are glasses",
    ),
    "an unknown edit": (
        {"edits": GLASSES, "grid": PROMPT | {"hat": {"scale": [1]}}},
        "'hat.scale' belongs to the edit 'hat', which the sweep does not have; its edits are glasses",
    ),
    "an unknown part of the model": ({"model": {"scheduler": "x"}, "grid": PROMPT}, "model: 'scheduler' is unknown"),
    "a model that is not a string": ({"model": {"source": 1}, "grid": PROMPT}, "model: source=1 should be a string"),
    "an impossible threshold": (
        {"edits": GLASSES, "grid": PROMPT | {"glasses.threshold": [0.5, 1.5]}},
        r"grid: glasses.threshold=1.5 should be a number in \[0, 1\]",
    ),
    "an impossible end of a range": (
        {"edits": GLASSES, "sample": {"count": 1, "glasses.threshold": {"low": 0.5, "high": 2}} | PROMPT},
        r"sample: glasses.threshold=2 should be a number in \[0, 1\]",
    ),
    "an impossible end of a progression": (
        {"call": {"prompt": "a"}, "grid": {"eta": {"from": 0.5, "step": 0.5, "count": 3}}},
        "grid: eta=1.5 should be",
    ),
    "a range of fractional seeds": (
        {"call": {"prompt": "a"}, "sample": {"count": 1, "seed": {"low": 0.5, "high": 2.5}}},
        "sample: seed=0.5 should be a whole number",
    ),
    "a reversed range": (
        {"call": {"prompt": "a"}, "sample": {"count": 1, "eta": {"low": 1, "high": 0}}},
        "sample: eta: low=1 should be below high=0",
    ),
    "a negative weight": (
        {"edits": {"glasses": {"weight": -1}}, "grid": PROMPT},
        "edits: glasses.weight=-1 should be a number of at least 0; to remove a concept, use a negative scale",
    ),
    "text for an integer": ({"grid": PROMPT | {"steps": ["twenty"]}}, "grid: steps='twenty' should be a whole number"),
    "text for a number": ({"grid": PROMPT | {"guidance_scale": ["7"]}}, "grid: guidance_scale='7' should be a finite"),
    "a scale that ignores the prompt": (
        {"grid": PROMPT | {"guidance_scale": [7, 0]}},
        "grid: guidance_scale=0 ignores the prompt; give 1",
    ),
    "true for a number": ({"grid": PROMPT | {"seed": [True]}}, "grid: seed=True should be a whole number"),
    "one value for a list": ({"grid": PROMPT | {"seed": 3}}, "grid: seed=3 should be a list of values"),
    "a list for one value": ({"call": {"seed": [3]}, "grid": PROMPT}, r"call: seed=\[3\] should be a whole number"),
    "an axis of an unknown form": (
        {"grid": PROMPT | {"seed": {"start": 3}}},
        "grid: seed has 'start', but an axis should be a list",
    ),
    "an edit in the call": (
        {"call": {"glasses": {"scale": 1}}, "edits": GLASSES, "grid": PROMPT},
        r"'glasses.scale' belongs to an edit; give it in \[edits.glasses\]",
    ),
    "a missing file": ({"grid": {"prompt": {"file": "no.txt"}}}, "grid: prompt.file: no.txt cannot be read .No such"),
    "no values": ({"grid": PROMPT | {"seed": []}}, "grid: seed has no values, so the sweep has no points"),
    "an empty progression": ({"grid": PROMPT | {"seed": {"from": 0, "count": 0}}}, "grid: seed has no values"),
    "no draws": ({"call": {"prompt": "a"}, "sample": {"count": 0, "eta": [0]}}, "sample: count=0, so the"),
    "a sample without axes": ({"sample": {"count": 3}, "grid": PROMPT}, "sample should have `count`, the number of"),
    "a thousand million points": (
        {"grid": PROMPT | {"seed": {"from": 0, "count": 10**9}}},
        "1,000,000,000 points .seed has 1,000,000,000, prompt has 1., more than 1,000,000",
    ),
    "many small axes": (
        {
            "grid": PROMPT
            | {"seed": range(1000), "steps": range(1, 1001), "eta": {"from": 0.0, "count": 999, "step": 1e-3}}
        },
        "999,000,000 points .seed has 1,000, steps has 1,000, eta has 999.",
    ),
    "a block of unequal axes": (
        {"grid": PROMPT, "zip": {"seed": [1, 2], "eta": [0]}},
        "zip: the axes of a block should have the same number of values, but seed has 2, eta has 1",
    ),
    "no prompt": ({"grid": {"seed": [1]}}, "the sweep has no prompt"),
    "a setting given twice": (
        {"call": {"seed": 1}, "grid": PROMPT | {"seed": [1]}},
        r"'seed' is given twice, in \[call\] and in \[grid\]",
    ),
    "a setting of an edit given twice": (
        {"edits": {"glasses": {"scale": 1}}, "grid": PROMPT, "zip": {"glasses.scale": [1]}},
        r"'glasses.scale' is given twice, in \[edits.glasses\] and in \[zip\]",
    ),
    "an unknown active edit": (
        {"edits": GLASSES, "grid": PROMPT | {"edits": [["hat"]]}},
        "grid: edits names the unknown edit 'hat'; the sweep's edits are glasses",
    ),
    "an edit with the name of a setting": ({"edits": {"seed": {}}, "grid": PROMPT}, "edits: 'seed' may contain only"),
    "an unknown scheduler": (
        {"grid": PROMPT | {"scheduler": ["DDIM"]}},
        "grid: scheduler='DDIM' is neither",
    ),
    "an unknown format": ({"format": "jpg", "grid": PROMPT}, "format='jpg' should be one of png, webp"),
    "a number for a table": ({"call": 3, "grid": PROMPT}, "call=3 should be a table"),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_sweeps_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, message = BAD[name]
    with pytest.raises((TypeError, ValueError), match=message):
        Sweep(**content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid = [", "is not valid TOML: "),
        ("prompt = 'a'", "'prompt' is unknown; the parts of a sweep are model, call, edits, grid, zip, sample, format"),
        ("folder = '/'", "'folder' is unknown"),
        ("[grid]\nseed = [1]", "the sweep has no prompt"),
        ("[grid]\nprompt = { file = 'no.txt' }", "prompt.file: .*no.txt cannot be read"),
        (None, "does not exist"),
    ],
)
def test_errors_name_the_file(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=f"bad.toml:? {message}|bad.toml: .*{message}"):
        Sweep.read(path)


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [
        ('[call]\npromt = "a"', "did you mean prompt?"),
        ('[gird]\nseed = [1]\n[call]\nprompt = "a"', "did you mean grid?"),
        ('[call]\nprompt = "a"\n[edits.glasses]\nscal = 3', "did you mean glasses.scale?"),
        ('[call]\nprompt = "a"\n[edits.glasses]\n[grid]\nglases.scale = [1]', "did you mean glasses?"),
        ("[call]\nprompt = a woman", "write texts in quotation marks"),
    ],
)
def test_misspelt_files_get_a_suggestion(tmp_path, text, suggestion):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(suggestion)):
        Sweep.read(tmp_path / "a.toml")
