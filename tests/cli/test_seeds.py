"""Several seeds in the shell: their notation, groups and files, and the command that reproduces each picture."""

import itertools
import random
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from sega_jax.cli.edit_run import groups, most_seeds, numbered, seeds_of
from sega_jax.cli.main import main
from sega_jax.method.arguments import arguments
from sega_jax.pipelines import pipeline, png, stored_settings
from sega_jax.pipelines.output import Output
from sega_jax.systems.call import Call

pytestmark = pytest.mark.usefixtures("one_by_default")
SEED = arguments(Call)["seed"].kind
WORDS = ["--prompt", "a cat", "--edit", "hat:warmup=0", "--edit", "-dog:warmup=1", "--steps", 2]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(*words):
    return CliRunner().invoke(main, list(map(str, words)))


def read(path):
    return np.asarray(Image.open(path)).astype(int)


def picture_maker(flaws):
    """Returns a stand-in for `pipeline.run`. `flaws` maps (seed, edited) to "not finite" or "flagged"."""

    def make(pipe, batch):
        found = [flaws.get((seed, bool(row % 2))) for row, seed in enumerate(batch.seeds)]
        images = [None if flaw == "not finite" else Image.new("RGB", (16, 16), "red") for flaw in found]
        finite = np.array([image is not None for image in images])
        return Output(images, finite, batch.seeds, flagged=np.array([flaw == "flagged" for flaw in found]))

    return make


@pytest.fixture(scope="module")
def several(least_folder, tmp_path_factory):
    """Runs the command with four seeds, and returns its output and folder."""
    out = tmp_path_factory.mktemp("several")
    result = run("edit", "--model", least_folder, *WORDS, "--seed", "1-3,8", "--out", out)
    assert result.exit_code == 0, result.output
    return result.output, out


@pytest.mark.parametrize(
    ("given", "seeds"),
    [
        ({}, [0]),
        ({"seed": "7"}, [7]),
        ({"seed": "1-4"}, [1, 2, 3, 4]),
        ({"seed": "1,4,9"}, [1, 4, 9]),
        ({"seed": " 1-3, 8 "}, [1, 2, 3, 8]),
        ({"seed": "9,1-2"}, [9, 1, 2]),
        ({"seed": "5-5"}, [5]),
        ({"seed": "4294967295"}, [2**32 - 1]),
        ({"images_per_prompt": "3"}, [0, 1, 2]),
        ({"seed": "7", "images_per_prompt": "2"}, [7, 8]),
        ({"seed": "4-6", "images_per_prompt": "3"}, [4, 5, 6]),
        ({"seed": "4294967294", "images_per_prompt": "2"}, [2**32 - 2, 2**32 - 1]),
        ({"seed": "1-256"}, list(range(1, 257))),
    ],
)
def test_seeds_are_read(given, seeds):
    assert seeds_of(given) == seeds


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "8-1"], "--seed 8-1: the range 8-1 is empty; write 1-8"),
        (["--seed", "a"], "--seed a should be a whole number such as 7, a range such as 1-8 or a list such as 1,4,9"),
        (["--seed", ""], "--seed '' should be a whole number"),
        (["--seed", "1,"], "--seed 1, should be a whole number"),
        (["--seed", "1.5"], "--seed 1.5 should be a whole number"),
        (["--seed", "1-2-3"], "--seed 1-2-3 should be a whole number"),
        (["--seed", "-1"], "--seed -1 should be from 0 to 4294967295"),
        (["--seed", "3,-1"], "--seed -1 should be from 0 to 4294967295"),
        (["--seed", "4294967296"], "--seed 4294967296 should be from 0 to 4294967295"),
        (["--seed", "0-4294967296"], "--seed 4294967296 should be from 0 to"),
        (["--seed", "9" * 5000], "should be a whole number such as 7"),
        (["--seed", "1,4,1"], "--seed 1,4,1 gives the seed 1 more than once; give each seed once"),
        (["--seed", "1-5,3"], "gives the seed 3 more than once"),
        (["--seed", "0-1000000000"], "--seed 0-1000000000 gives too many seeds; give at most 65536"),
        (["--seed", "1-257"], "pictures from 257 seeds, but sega-jax edit makes at most 256 at a time; give fewer"),
        (["--images-per-prompt", "1000000000"], "--images-per-prompt 1000000000 should be from 1 to 65536"),
        (["--images-per-prompt", "257"], "makes at most 256 at a time"),
        (["--images-per-prompt", "0"], "--images-per-prompt 0 should be from 1 to 65536"),
        (["--images-per-prompt", "x"], "--images-per-prompt x should be a whole number"),
        (
            ["--seed", "1-3", "--images-per-prompt", "2"],
            "--seed 1-3 gives 3 seeds, but --images-per-prompt is 2; leave --images-per-prompt out, or give one seed",
        ),
        (
            ["--seed", "4294967295", "--images-per-prompt", "2"],
            "needs seeds up to 4294967296, but the largest is 4294967295; give a smaller seed",
        ),
    ],
)
def test_mistakes_are_reported_before_a_checkpoint_is_read(tmp_path, monkeypatch, words, message):
    monkeypatch.setattr("sega_jax.pipelines.sources.find", lambda *_, **__: pytest.fail("looked for a checkpoint"))
    result = run("edit", "--prompt", "cat", "--edit", "hat", *words, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_any_seeds_are_written_so_that_they_are_read():
    rng = random.Random(0)
    for _ in range(500):
        span = rng.choice([4, 20, 2**32 - 1])
        seeds = rng.sample(range(span), k=rng.randint(1, min(span, 12)))
        seeds = sorted(seeds) if rng.random() < 0.5 else seeds
        assert seeds_of({"seed": SEED.show(seeds)}) == seeds
    assert SEED.show([1, 2, 3, 4, 8, 9]) == "1-4,8,9"


def test_groups_have_one_size_and_every_seed_once():
    for count, most in itertools.product(range(1, 40), range(1, 12)):
        found = list(groups(range(count), most))
        assert [seed for group, size in found for seed in group[:size]] == list(range(count))
        assert len({len(group) for group, _ in found}) == 1
        assert len(found[0][0]) <= most
        assert len(found) == -(-count // most)


def test_groups_are_larger_where_each_loads_the_networks():
    assert most_seeds(1, low_memory=False) == 1
    assert most_seeds(4, low_memory=False) == 4
    assert most_seeds(1, low_memory=True) > 1


def test_every_seed_has_its_files(several):
    output, out = several
    names = [f"0001-seed{seed}-{kind}.png" for seed in (1, 2, 3, 8) for kind in ("edited", "original")]
    assert sorted(path.name for path in out.iterdir()) == [*names, "0001-sheet.png"]
    for part in ("'a cat', seeds 1-3,8, 2 steps", "(4 of 4)", "0001-sheet.png", "sega-jax info"):
        assert part in output


def test_the_command_of_a_picture_repeats_it_whatever_the_other_seeds(several, tmp_path):
    _, out = several
    shown = run("info", out / "0001-seed8-edited.png").output
    assert "seed             8\n" in shown
    result = run(*shlex.split(shown.splitlines()[-1])[1:], "--out", tmp_path)
    assert result.exit_code == 0, result.output
    for kind in ("original", "edited"):
        expected = read(out / f"0001-seed8-{kind}.png")
        assert abs(read(tmp_path / f"0001-{kind}.png") - expected).max() <= 1
        assert (read(out / f"0001-seed3-{kind}.png") != expected).any()
    first, again = (
        stored_settings.read(path) for path in (out / "0001-seed8-edited.png", tmp_path / "0001-edited.png")
    )
    assert first == again


def test_the_command_of_the_sheet_asks_for_all_seeds(several, tmp_path, monkeypatch):
    _, out = several
    monkeypatch.setattr(pipeline, "run", picture_maker({}))
    shown = run("info", out / "0001-sheet.png").output
    assert "seed             1-3,8\n" in shown
    result = run(*shlex.split(shown.splitlines()[-1])[1:], "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in out.iterdir())
    first, again = (stored_settings.read(folder / "0001-sheet.png") for folder in (out, tmp_path))
    assert first == again
    assert first["seed"] == [1, 2, 3, 8]


def test_several_pictures_without_edits_have_a_sheet(least_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "run", picture_maker({}))
    for words in (["--images-per-prompt", 2], ["--seed", 1]):
        result = run("edit", "--model", least_folder, "--prompt", "cat", *words, "--out", tmp_path)
        assert result.exit_code == 0, result.output
    expected = ["0001-seed0-original.png", "0001-seed1-original.png", "0001-sheet.png", "0002-original.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected


def test_a_warning_is_printed_once_for_all_seeds(least_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "run", picture_maker({}))
    words = ["--model", least_folder, "--prompt", "cat", "--edit", "hat:warmup=9", "--steps", 1]
    result = run("edit", *words, "--seed", "1-3", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert result.output.count("begins at warmup=9") == 1


def test_missing_pictures_do_not_lose_the_others(least_folder, tmp_path, monkeypatch):
    flaws = {(2, True): "not finite", (3, False): "not finite", (3, True): "not finite", (4, False): "flagged"}
    monkeypatch.setattr(pipeline, "run", picture_maker(flaws))
    words = ["--model", least_folder, "--prompt", "cat", "--edit", "hat", "--seed", "1-4", "--out", tmp_path]
    result = run("edit", *words)
    assert result.exit_code == 1
    assert "were not written: seed 2 edited, seed 3 original, seed 3 edited; lower the scales" in result.output
    assert "Flagged by the safety checker: seed 4 original\n" in result.output
    written = {path.name for path in tmp_path.iterdir()}
    pairs = ["seed1-original", "seed1-edited", "seed2-original", "seed4-original", "seed4-edited", "sheet"]
    assert written == {f"0001-{name}.png" for name in pairs}


def test_no_sheet_without_pictures(least_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "run", picture_maker(dict.fromkeys([(0, False), (0, True)], "not finite")))
    result = run("edit", "--model", least_folder, "--prompt", "cat", "--edit", "hat", "--out", tmp_path)
    assert result.exit_code == 1
    assert "were not written: original, edited;" in result.output
    assert not list(tmp_path.iterdir())


def test_the_pictures_of_finished_seeds_stay_when_a_later_one_fails(least_folder, tmp_path, monkeypatch):
    good = picture_maker({})

    def make(pipe, batch):
        if 3 in batch.seeds:
            raise MemoryError("out of memory")
        return good(pipe, batch)

    monkeypatch.setattr(pipeline, "run", make)
    words = ["--model", least_folder, "--prompt", "cat", "--seed", "1-4", "--out", tmp_path]
    result = run("edit", *words)
    assert result.exit_code == 1
    assert "out of memory" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0001-seed1-original.png", "0001-seed2-original.png"]


def test_runs_at_the_same_time_have_different_numbers(tmp_path):
    (tmp_path / "0002-seed5-edited.png").touch()
    (tmp_path / "notes.txt").touch()
    barrier = Barrier(8)

    def number(i):
        barrier.wait()
        with numbered(tmp_path) as name:
            (tmp_path / f"{name}-seed{i}-original.png").touch(exist_ok=False)
            return name

    with ThreadPoolExecutor(8) as pool:
        found = sorted(pool.map(number, range(8)))
    assert len(set(found)) == 8
    assert "0002" not in found
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_folder_that_another_run_removes_is_created_again(tmp_path, monkeypatch):
    """The other run fails and removes the folder while it is empty."""
    mkdir, removals = Path.mkdir, iter(range(2))

    def removed(path, *arguments, **options):
        mkdir(path, *arguments, **options)
        if next(removals, None) is not None:
            path.rmdir()

    monkeypatch.setattr(Path, "mkdir", removed)
    with numbered(tmp_path / "new") as name:
        (tmp_path / "new" / f"{name}-original.png").touch()
    assert next(removals, None) is None
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["0001-original.png"]


def test_pictures_of_earlier_versions_are_read(tmp_path):
    path = tmp_path / "0001-edited.png"
    edit = {"concept": "hat", "scale": 5.0, "threshold": 0.9, "warmup": 10, "cooldown": None, "weight": 1.0}
    known = {"picture": "edited", "model": "folder", "revision": None, "system": "stable_diffusion", "prompt": "cat"}
    png.save(Image.new("RGB", (8, 8)), path, {**known, "edits": [edit], "seed": 7, "steps": 50})
    result = run("info", path)
    assert result.exit_code == 0, result.output
    edits = "--edit hat:threshold=0.9,warmup=10 --seed 7 --steps 50"
    assert result.output.splitlines()[-1] == f"sega-jax edit --model folder --prompt cat {edits}"
