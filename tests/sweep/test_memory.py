"""Tests a sweep's estimates of memory (from the compiler's analysis) and of time (from the records)."""

import jax
import numpy as np
import pytest
from click.testing import CliRunner

from sega_jax import Edit, sweep
from sega_jax.cli.main import main
from sega_jax.sweep.planning import memory
from sega_jax.sweep.planning.memory import Memory
from sega_jax.sweep.running import records
from sega_jax.sweep.running.folder import Folder, part

pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def ablation(least_folder):
    return sweep.Sweep(
        model={"source": str(least_folder)},
        call={"prompt": "a cat", "steps": 6},
        edits={"hat": {"cooldown": 5, "threshold": 0.5}},
        grid={"seed": range(32), "hat.scale": [0, 2, 4, 6], "hat.warmup": [2, 3]},
    )


@pytest.fixture(scope="module")
def facts(ablation):
    return sweep.Facts.of(ablation)


@pytest.mark.slow
def test_memory_matches_the_compiled_program(ablation, facts, least, one_by_default):
    """The estimated memory of a row is at least the memory that the pipeline's own program needs per row."""
    estimate = sweep.needed(sweep.plan(ablation, facts, 2))
    networks = [least.models, *([] if least.safety is None else [least.safety.checker])]
    assert estimate.weights == sum(leaf.nbytes for leaf in jax.tree.leaves(networks))
    taken = least.compile(["a cat"] * 2, [Edit("hat", warmup=2)], steps=6, record=True).memory
    assert taken <= 2 * estimate.row < 4 * taken
    assert estimate.there is None
    assert estimate.rows == 8


GIB = 2**30


@pytest.mark.parametrize(
    ("weights", "row", "there", "rows"),
    [(2, 1, 20 * GIB, 16), (2, 1, 3 * GIB, 1), (2, 1, GIB, 1), (0, 1e-9, GIB, 64), (0, 1, None, 8)],
)
def test_rows_that_fit_into_memory(weights, row, there, rows):
    """A tenth of the memory stays free, and there is at least one row."""
    assert Memory(weights * GIB, row * GIB, there).rows == rows


class Device:
    platform = "cpu"

    def memory_stats(self):
        return {"bytes_limit": GIB}


@pytest.mark.parametrize(("fit", "expected"), [(64, 32), (16, 16), (1, 1)])
def test_a_plan_has_rows_that_fit(ablation, facts, monkeypatch, fit, expected):
    """With 32 trunks, half of 64 rows would be padding."""
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    monkeypatch.setattr(memory, "needed", lambda plan: Memory(0, 9 * GIB // (10 * fit), GIB))
    assert {batch.program.rows for batch in memory.fitted(ablation, facts).batches} == {expected}


def test_pace_leaves_out_the_first_batch(ablation, facts, tmp_path):
    """The time of the first batch includes compilation."""
    plan, folder = sweep.plan(ablation, facts, 8, share=False), Folder(tmp_path)
    folder.begin(plan)
    assert sweep.pace(tmp_path) is None
    (program,) = {batch.program for batch in plan.batches}
    assert program.rows == 8
    for number, seconds in enumerate([100.0, 2.0, 4.0]):
        rows = [{"name": name, "seconds": seconds / 8} for name in plan.batches[number].names]
        folder.store.write(part(number), records.part(rows, ablation, facts))
        expected = seconds if number == 0 else np.mean([2.0, 4.0][:number])
        assert sweep.pace(tmp_path) == pytest.approx(expected / (8 * 3 * 6))
    left = plan.counts.evaluations - 3 * 8 * 3 * 6
    assert sweep.status(tmp_path).evaluations_left == left


def test_the_shell(ablation, facts, least_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = f"[model]\nsource = {str(least_folder)!r}\n[call]\nprompt = 'a cat'\nsteps = 6\n[grid]\nseed = [1, 2]"
    (tmp_path / "cats.toml").write_text(text)
    monkeypatch.setattr(memory, "needed", lambda plan: Memory(GIB, GIB // 4, 8 * GIB))
    monkeypatch.setattr(sweep, "needed", memory.needed)
    result = CliRunner().invoke(main, ["sweep", "cats.toml", "--dry-run"])
    assert result.exit_code == 0, result.output
    shown = "1.50 GiB of memory on each device, of 8.0 GiB: 1.00 GiB for the weights, plus 256 MiB for each picture"
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    result = CliRunner().invoke(main, ["sweep", "cats.toml", "--dry-run"])
    assert shown in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["cats.toml"]
