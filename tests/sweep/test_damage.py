"""Every damaged, missing or unknown file in a sweep is named and stops no report; damaged and missing files are made
again."""

import errno
import json
import shutil
from contextlib import nullcontext

import pytest
from click.testing import CliRunner
from support.sweeping import hat_plan, records, same

from sega_jax import sweep
from sega_jax.cli.main import main
from sega_jax.method.naming import Option, as_options
from sega_jax.pipelines import png
from sega_jax.sweep.reporting import report
from sega_jax.sweep.running.folder import Folder
from sega_jax.sweep.running.leases import Leases
from sega_jax.sweep.running.store import Store, host
from sega_jax.sweep.running.writer import BatchWriter

WAYS = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "one_byte": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
    "other_content": lambda data: b"something else",
    "missing": lambda data: None,
}
KINDS = ("pictures", "records", "metrics")
REPORTS = (
    ("sheet", "--across", "hat.scale", "--down", "none", "--force"),
    ("plot", "--x", "hat.scale", "--y", "brightness", "--force"),
    ("plot", "--x", "hat.scale", "--y", "seconds", "--force"),
    ("report", "--force"),
    ("measure", "--distance"),
)


@pytest.fixture(scope="module")
def plan(least_folder):
    return hat_plan(least_folder, 2, [0, 3], share=False)


@pytest.fixture(scope="module")
def done(plan, least, tmp_path_factory):
    folder = tmp_path_factory.mktemp("done")
    sweep.run(plan, folder, least)
    return folder


@pytest.fixture
def measured(done, tmp_path):
    """Returns a copy of the finished sweep that includes a metric."""
    folder = tmp_path / "copy"
    shutil.copytree(done, folder)
    sweep.measure(folder, {"brightness": lambda pictures, rows: pictures.mean((1, 2, 3))})
    return folder


def shell(*words):
    result = CliRunner().invoke(main, ["sweep", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


def change(path, way):
    data = WAYS[way](path.read_bytes())
    path.unlink() if data is None else path.write_bytes(data)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [pytest.param(way, marks=[] if way == "half" else pytest.mark.slow) for way in WAYS])
def test_damaged_files_are_named_and_made_again(measured, done, plan, least, kind, way, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    count = len(list((measured / kind).iterdir()))
    for number in range(count):
        path = sorted((measured / kind).iterdir())[number]
        name, data = f"{kind}/{path.name}", path.read_bytes()
        change(path, way)
        status = shell("status", measured, "--verify")
        assert status.exit_code == 0
        if not (way == "missing" and kind in ("records", "metrics")):  # deleting these files leaves no trace
            assert name in status.output
        if kind == "pictures" and way != "one_byte":
            assert name in shell("status", measured).output
        for command, *options in REPORTS:
            result = shell(command, measured, *options)
            assert "Traceback" not in result.output
            assert result.exit_code == 0 or ("brightness" in options and kind == "metrics"), result.output
        if kind == "pictures":
            assert path.name in shell("sheet", measured, "--across", "hat.scale", "--force").output
        if kind == "metrics":
            path.write_bytes(data)
            continue
        with pytest.warns(UserWarning, match=name) if path.exists() or kind == "pictures" else nullcontext():
            sweep.run(plan, measured, least)
        assert path.read_bytes() == data or kind == "records"
        assert sweep.problems(measured, verify=True) == []
    shutil.rmtree(measured / "metrics")
    same(measured, done)


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_plan_is_named(measured, plan, least, way):
    change(measured / "plan.json", way)
    for words in (("status", measured), ("status", measured, "--verify"), ("sheet", measured), ("report", measured)):
        result = shell(*words)
        assert result.exit_code == 1
        assert "has no plan.json" in result.output if way == "missing" else "plan.json: this is not" in result.output
        assert "Traceback" not in result.output
    if way != "missing":
        with pytest.raises(ValueError, match="delete it and run the same sweep again"):
            sweep.run(plan, measured, least)
        (measured / "plan.json").unlink()
    assert sweep.run(plan, measured, least).done == 4
    assert sweep.problems(measured, verify=True) == []


def test_a_plan_of_another_version_is_refused(measured, least, plan):
    text = (measured / "plan.json").read_text()
    (measured / "plan.json").write_text(text.replace('"version": 5', '"version": 4'))
    with pytest.raises(ValueError, match="its format is 4, but this version reads format 5; start the sweep in a new"):
        sweep.status(measured)


def test_unknown_files_are_named_and_ignored(measured, plan, least):
    for file in ("pictures/photo.png", "records/part-00007.parquet", "records/notes.txt"):
        (measured / file).write_bytes(b"mine")
        assert f"{file} is not part of this sweep" in shell("status", measured).output
    assert sweep.run(plan, measured, least).done == 4
    assert (measured / "pictures" / "photo.png").read_bytes() == b"mine"
    assert len(sweep.Results(measured).rows) == 4


def test_intact_sweeps_have_no_problems(measured):
    assert shell("status", measured).output == "4 of 4 pictures, 2 of 2 batches\n"
    assert shell("status", measured, "--verify").output.endswith("all files are intact\n")


def test_every_changed_byte_of_records_is_noticed(done):
    from sega_jax.sweep.running import records

    path = next((done / "records").iterdir())
    data = path.read_bytes()
    assert records.rows(data)
    for place in range(0, len(data), 97):
        with pytest.raises(ValueError, match="checksum"):
            records.rows(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])


def test_another_plan_never_changes_a_folder(measured, plan, least, tmp_path):
    """The plan is compared before damaged files are removed."""
    change(next((measured / "pictures").iterdir()), "half")
    before = {path: path.read_bytes() for path in measured.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="contains a different sweep"):
        sweep.run(sweep.plan(plan.sweep, plan.facts, rows=3), measured, least)
    text = (measured / "plan.json").read_text().replace('"version": 5', '"version": 4')
    (measured / "plan.json").write_text(text)
    with pytest.raises(ValueError, match="start the sweep in a new folder"):
        sweep.run(plan, measured, least)
    (measured / "plan.json").write_bytes(before[measured / "plan.json"])
    assert {path: path.read_bytes() for path in measured.rglob("*") if path.is_file()} == before


def test_a_failed_write_records_the_other_pictures(plan, least, tmp_path, monkeypatch):
    """One of the last pictures cannot be written. The others stay, and only that one is made again."""
    write, name = Store.write, plan.files[plan.batches[-1].names[-1]]

    def failing(store, file, data):
        if name in file:
            raise OSError("the server is unavailable")
        write(store, file, data)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "write", failing)
        with pytest.raises(OSError, match="unavailable"):
            sweep.run(plan, tmp_path, least)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "pictures").iterdir()}
    assert len(written) == 3
    assert sweep.status(tmp_path).done == 3
    sweep.run(plan, tmp_path, least)
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_lack_of_memory_on_the_host_is_not_taken_for_the_devices(plan, least, tmp_path, monkeypatch):
    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(png, "encoded", fails)
    message = "this machine has too little memory to write the picture .*; use fewer"
    with pytest.raises(OSError, match=f"{message} rows$"):
        sweep.run(plan, tmp_path / "python", least)
    with as_options({"rows": Option("--rows")}), pytest.raises(OSError, match=f"{message} --rows$"):
        sweep.run(plan, tmp_path / "shell", least)


def test_a_worker_without_its_lease_writes_no_records(plan, done, least, tmp_path, monkeypatch):
    """Another worker takes the share, and finishes the batch first."""
    shutil.copytree(done, tmp_path / "copy")
    monkeypatch.setattr(Leases, "holds", lambda _: False)
    (tmp_path / "copy" / "records" / "part-00000.parquet").unlink()
    kept = {path.name: path.read_bytes() for path in (tmp_path / "copy" / "records").iterdir()}
    writer = BatchWriter(
        plan,
        sweep.Folder(tmp_path / "copy"),
        least,
        0,
        kept={},
        present=set(),
        pool=None,
        holds=lambda: False,
        on_recorded=lambda count: pytest.fail("recorded"),
    )
    writer.stop()
    writer.finish()
    assert {path.name: path.read_bytes() for path in (tmp_path / "copy" / "records").iterdir()} == kept


def test_records_of_another_batch_are_noticed(measured, plan, least, done):
    first, second = sorted((measured / "records").iterdir())
    first.write_bytes(second.read_bytes())
    assert f"records/{first.name} is damaged: it does not hold the records" in shell("status", measured).output
    with pytest.warns(UserWarning, match=f"records/{first.name} is damaged"):
        assert len(sweep.Results(measured).rows) == 2
    with pytest.warns(UserWarning, match=f"records/{first.name} is damaged"):
        sweep.run(plan, measured, least)
    assert len(sweep.Results(measured).rows) == 4
    shutil.rmtree(measured / "metrics")
    same(measured, done)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_in_place_of_a_file(measured, plan, least, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = min((measured / kind).iterdir())
    path.unlink()
    path.mkdir()
    assert f"{kind}/{path.name} cannot be read (Is a directory)" in shell("status", measured, "--verify").output
    assert shell("report", measured).exit_code == 0
    if kind != "metrics":
        with pytest.raises(ValueError, match=rf"{kind}/{path.name} cannot be read \(Is a directory\); remove it"):
            sweep.run(plan, measured, least)
        path.rmdir()
        sweep.run(plan, measured, least)
        assert sweep.problems(measured, verify=True) == []


def test_records_in_place_of_a_metric(measured):
    shutil.copy(next((measured / "records").iterdir()), measured / "metrics" / "foo.parquet")
    assert "metrics/foo.parquet is not a metric; remove it" in shell("status", measured).output
    with pytest.warns(UserWarning, match="is not a metric"):
        assert sweep.Results(measured).rows[0]["brightness"] is not None


@pytest.mark.parametrize("lease", ["[1]", "5", '"x"', "[" * 9999, '{"host": 1}', "", "process=huge", "process=text"])
def test_odd_leases_are_ignored(measured, plan, least, lease):
    if lease.startswith("process"):
        process = 10**30 if lease.endswith("huge") else "x"
        lease = json.dumps({"host": host(), "process": process, "token": "t"})
    next((measured / "records").iterdir()).unlink()
    (measured / "leases" / "share-1-of-1.json").write_text(lease)
    assert sweep.run(plan, measured, least).done == 4


def test_a_report_on_many_seeds(measured, monkeypatch):
    """Sheets that are too large for WebP are PNG files."""
    assert "data:image/webp" in sweep.report(sweep.Results(measured))
    monkeypatch.setattr(report, "_WEBP", 100)
    page = sweep.report(sweep.Results(measured))
    assert "data:image/png" in page
    assert "data:image/webp" not in page


@pytest.mark.parametrize("command", [("sheet",), ("plot", "--x", "hat.scale", "--y", "seconds"), ("report",)])
def test_missing_output_folders(measured, tmp_path, command):
    result = shell(command[0], measured, *command[1:], "--out", tmp_path / "no" / "such.png")
    assert result.exit_code == 1
    assert ".png cannot be written, because" in result.output
    assert "is not a folder; create it, or choose another" in result.output


def test_too_many_workers_are_refused(plan, least, measured):
    with pytest.raises(ValueError, match="should be from 1 to 1048576"):
        sweep.run(plan, measured, least, worker=(1, 10**22))


def test_a_file_that_cannot_be_read_is_kept(measured, plan, least, monkeypatch):
    """The reason may be a failure of the disk or the network, so the file may be intact."""
    path, read = min((measured / "pictures").iterdir()), Store.read

    def failing(store, name):
        if name.endswith(path.name):
            raise OSError(errno.EIO, "Input/output error")
        return read(store, name)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "read", failing)
        with pytest.raises(ValueError, match=r"cannot be read \(Input/output error\)"):
            sweep.run(plan, measured, least)
    assert path.exists()
    assert sweep.problems(measured, verify=True) == []


def test_no_picture_is_recorded_twice(plan, done, least, tmp_path):
    """A process that is killed while it finishes a batch may leave two files of records. One of them is removed by
    the next run, even if it has nothing to make, or at the end of the run of another worker."""
    shutil.copytree(done, tmp_path / "copy")
    [first, *_] = sorted((tmp_path / "copy" / "records").iterdir())
    second = first.with_name(f"{first.stem}-unfinished.parquet")
    shutil.copy(first, second)
    sweep.run(plan, tmp_path / "copy", least)
    assert not second.exists()
    assert len(records(tmp_path / "copy")) == 4
    shutil.copy(first, second)
    Folder(tmp_path / "copy").remove_superseded()
    assert first.exists()
    assert not second.exists()
