"""Sweeps as data: what a file says, which points it means, and what is wrong with a bad one."""

import json

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


def test_the_points_of_a_file(sweep):
    assert len(sweep) == 2 * 2 * 3 * 3 * 2 * 5
    points = list(sweep)
    assert points[0].items() >= {"prompt": "a cat", "seed": 3, "steps": 6, "edits": ()}.items()
    assert points[-1].items() >= {"prompt": "a dog in the rain", "seed": 4, "glasses.cooldown": None}.items()
    assert {point["guidance_scale"] for point in points} == {1.1, 1.2, 1.3}
    assert {(point["glasses.warmup"], point["glasses.cooldown"]) for point in points} == {(1, 4), (2, None)}
    # In the sweep's order of edits.
    assert {point["edits"] for point in points} == {(), ("glasses",), ("glasses", "beard")}
    assert {point["beard.scale"] for point in points} == {-8.0}
    assert len({json.dumps(point) for point in points}) == len(points)
    assert sweep.axes == [
        *("prompt", "seed", "edits", "guidance_scale"),
        *("glasses.warmup", "glasses.cooldown", "glasses.scale", "beard.warmup", "beard.threshold"),
    ]


def test_a_point_is_made_alone(sweep):
    assert [sweep[i] for i in (0, 17, 359)] == [list(sweep)[i] for i in (0, 17, 359)]
    with pytest.raises(IndexError, match="point 360 of 360"):
        sweep[360]


def test_an_object_says_the_same(sweep):
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


def test_it_survives_json(sweep):
    again = Sweep(**json.loads(json.dumps(sweep.as_dict())))
    assert again == sweep
    assert list(again) == list(sweep)


def test_edits_of_the_library_are_taken():
    sweep = Sweep(call={"prompt": "a cat"}, edits={"hat": Edit("a red hat", scale=4, warmup=3)})
    assert sweep[0].items() >= {"hat.concept": "a red hat", "hat.scale": 4.0, "hat.warmup": 3}.items()
    assert len(sweep) == 1


def drawn(count, key=0, **more):
    axes = {"eta": {"low": 0.0, "high": 1.0}, "seed": {"low": 0, "high": 9}, "prompt": ["a", "b", "c"]}
    sweep = Sweep(sample={"count": count, "key": key} | axes | more)
    return [(point["eta"], point["seed"], point["prompt"]) for point in sweep]


def test_draws():
    draws = drawn(2000)
    etas, seeds, prompts = zip(*draws, strict=True)
    assert abs(sum(etas) / 2000 - 0.5) < 0.03
    for values, known in ((seeds, range(10)), (prompts, "abc")):
        counts = [values.count(value) for value in known]
        assert sum(counts) == 2000
        assert min(counts) > 0.8 * 2000 / len(known)


def test_draws_do_not_depend_on_each_other():
    assert drawn(50)[:10] == drawn(10) == drawn(10, guidance_scale={"low": 1.0, "high": 9.0})
    assert not set(drawn(10)) & set(drawn(10, key=1))


def test_draws_stay_the_same():
    """Those of plans that are on disk."""
    assert drawn(2) == [(0.9556987358846211, 3, "c"), (0.9564233676753604, 6, "c")]


PROMPT = {"prompt": ["a"]}
GLASSES = {"glasses": {}}
BAD = {
    "an unknown setting": ({"grid": PROMPT | {"sede": [1]}}, "grid: 'sede' is unknown; the settings are prompt"),
    "a setting of edits": ({"grid": PROMPT | {"scale": [1]}}, "'scale' is unknown .of an edit it is NAME.scale"),
    "an unknown setting of an edit": (
        {"edits": {"glasses": {"scael": 1}}, "grid": PROMPT},
        "edits: 'glasses.scael' is unknown; the settings are glasses.concept, glasses.scale",
    ),
    "an unknown edit": (
        {"edits": GLASSES, "grid": PROMPT | {"hat": {"scale": [1]}}},
        "'hat.scale' is of an edit 'hat' that the sweep does not have; its edits are glasses",
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
    "a range of half seeds": (
        {"call": {"prompt": "a"}, "sample": {"count": 1, "seed": {"low": 0.5, "high": 2.5}}},
        "sample: seed=0.5 should be a whole number",
    ),
    "an upside down range": (
        {"call": {"prompt": "a"}, "sample": {"count": 1, "eta": {"low": 1, "high": 0}}},
        "sample: eta: low=1 should be below high=0",
    ),
    "a negative weight": (
        {"edits": {"glasses": {"weight": -1}}, "grid": PROMPT},
        "edits: glasses.weight=-1 should be a number of at least 0; to remove a concept, use a negative scale",
    ),
    "a number in words": ({"grid": PROMPT | {"steps": ["twenty"]}}, "grid: steps='twenty' should be a whole number"),
    "words in a number": ({"grid": PROMPT | {"guidance_scale": ["7"]}}, "grid: guidance_scale='7' should be a finite"),
    "a scale that ignores the prompt": (
        {"grid": PROMPT | {"guidance_scale": [7, 0]}},
        "grid: guidance_scale=0 ignores the prompt; give 1",
    ),
    "true for a number": ({"grid": PROMPT | {"seed": [True]}}, "grid: seed=True should be a whole number"),
    "one value for a list": ({"grid": PROMPT | {"seed": 3}}, "grid: seed=3 should be a list of values"),
    "a list for one value": ({"call": {"seed": [3]}, "grid": PROMPT}, r"call: seed=\[3\] should be a whole number"),
    "an axis of something else": (
        {"grid": PROMPT | {"seed": {"start": 3}}},
        "grid: seed has 'start'; an axis is a list",
    ),
    "an edit in the call": (
        {"call": {"glasses": {"scale": 1}}, "edits": GLASSES, "grid": PROMPT},
        r"'glasses.scale' is of an edit; say it in \[edits.glasses\]",
    ),
    "a missing text": ({"grid": {"prompt": {"file": "no.txt"}}}, "grid: prompt.file: no.txt cannot be read .No such"),
    "no values": ({"grid": PROMPT | {"seed": []}}, "grid: seed has no values, so that the sweep has no points"),
    "none of a progression": ({"grid": PROMPT | {"seed": {"from": 0, "count": 0}}}, "grid: seed has no values"),
    "no draws": ({"call": {"prompt": "a"}, "sample": {"count": 0, "eta": [0]}}, "sample: count=0, so that"),
    "a sample of nothing": ({"sample": {"count": 3}, "grid": PROMPT}, "sample should have a count of draws, and axes"),
    "a thousand million points": (
        {"grid": PROMPT | {"seed": {"from": 0, "count": 10**9}}},
        "1,000,000,000 points .seed has 1,000,000,000, prompt has 1.; the most are 1,000,000",
    ),
    "many small axes": (
        {
            "grid": PROMPT
            | {"seed": range(1000), "steps": range(1, 1001), "eta": {"from": 0.0, "count": 999, "step": 1e-3}}
        },
        "999,000,000 points .seed has 1,000, steps has 1,000, eta has 999.",
    ),
    "uneven sides": (
        {"grid": PROMPT, "zip": {"seed": [1, 2], "eta": [0]}},
        "zip: axes side by side have as many values each, but seed has 2, eta has 1",
    ),
    "no prompt": ({"grid": {"seed": [1]}}, "the sweep has no prompt"),
    "a setting said twice": (
        {"call": {"seed": 1}, "grid": PROMPT | {"seed": [1]}},
        r"'seed' is said twice, in \[call\] and in \[grid\]",
    ),
    "a setting of an edit said twice": (
        {"edits": {"glasses": {"scale": 1}}, "grid": PROMPT, "zip": {"glasses.scale": [1]}},
        r"'glasses.scale' is said twice, in \[edits.glasses\] and in \[zip\]",
    ),
    "edits that are none": (
        {"edits": GLASSES, "grid": PROMPT | {"edits": [["hat"]]}},
        "grid: edits names 'hat', which is none; the sweep's edits are glasses",
    ),
    "an edit with the name of a setting": ({"edits": {"seed": {}}, "grid": PROMPT}, "edits: 'seed' should be a name"),
    "an unknown scheduler": ({"grid": PROMPT | {"scheduler": ["DDIM"]}}, "grid: scheduler: scheduler='DDIM' is no"),
    "an unknown format": ({"format": "jpg", "grid": PROMPT}, "format='jpg' should be one of png, webp"),
    "no table": ({"call": 3, "grid": PROMPT}, "call=3 should be a table"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sweeps(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said, message = BAD[name]
    with pytest.raises((TypeError, ValueError), match=message):
        Sweep(**said)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid = [", "is no TOML: "),
        ("prompt = 'a'", "'prompt' is unknown; a sweep has model, call, edits, grid, zip, sample, format"),
        ("folder = '/'", "'folder' is unknown"),
        ("[grid]\nseed = [1]", "the sweep has no prompt"),
        ("[grid]\nprompt = { file = 'no.txt' }", "prompt.file: .*no.txt cannot be read"),
        (None, "does not exist"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=f"bad.toml:? {message}|bad.toml: .*{message}"):
        Sweep.read(path)
