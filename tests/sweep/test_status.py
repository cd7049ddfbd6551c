"""Tests of a sweep's progress and the estimate of its remaining time."""

from collections import Counter

import pytest
from support.drawn_sweeps import draw

from sega_jax import sweep
from sega_jax.sweep.running.status import overview
from sega_jax.sweep.running.store import Store


@pytest.fixture
def folder(tmp_path):
    ablation = sweep.Sweep(call={"prompt": "a cat", "steps": 12}, grid={"seed": range(12)})
    draw(tmp_path, ablation, batches=2, missing=[1])
    (tmp_path / "pictures" / "other.png").touch()
    return tmp_path


def test_the_overview_is_the_same_as_its_parts(folder):
    whole = overview(folder)
    assert whole.stages == {"": sweep.status(folder)}
    assert whole.stages[""].done == 8
    assert whole.seconds_left == whole.seconds[""] == sweep.seconds_left(folder) > 0
    assert whole.without_files == sweep.without_files(folder) == {"not finite": 1, "flagged": 0}
    assert [str(problem) for problem in whole.problems] == sweep.problems(folder)
    assert len(whole.problems) == 1


def test_the_overview_reads_each_file_once(folder, monkeypatch):
    reads, read = Counter(), Store.read

    def counted(store, name):
        reads[name] += 1
        return read(store, name)

    monkeypatch.setattr(Store, "read", counted)
    assert overview(folder).stages[""].batches_done == 2
    assert reads == dict.fromkeys(["plan.json", "records/part-00000.parquet", "records/part-00001.parquet"], 1)
