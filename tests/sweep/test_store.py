"""Tests a sweep's files, in local folders and at remote addresses: each file is either complete or absent, and is
created only once."""

import json
import os
import re
import subprocess
import sys
import threading
import uuid

import pytest
from fsspec.registry import known_implementations
from support import creating

from sega_jax.sweep.running.store import Store, host

NOBODY = 2**22 + 1  # larger than any process id


@pytest.fixture(params=["folder", "file://", "memory://"])
def any_store(request, tmp_path):
    names = {"folder": tmp_path, "file://": f"file://{tmp_path}", "memory://": f"memory://bucket/{uuid.uuid4()}"}
    store = Store(names[request.param])
    store.begin(("records",))
    return store


def test_reading_and_writing_files(any_store):
    assert any_store.read("records/a") is None
    assert not any_store.has("records/a")
    assert any_store.names("records") == any_store.names("nowhere") == set()
    any_store.write("records/a", b"1")
    any_store.write("records/a", b"2")
    any_store.create("records/b", b"3")
    assert any_store.names("records") == {"a", "b"}
    assert any_store.has("records/b")
    assert any_store.read("records/a") == b"2"
    any_store.remove("records/a")
    any_store.remove("records/a")
    assert any_store.names("records") == {"b"}


def test_a_file_is_created_once(any_store):
    any_store.create("records/a", b"first")
    with pytest.raises(FileExistsError):
        any_store.create("records/a", b"second")
    assert any_store.read("records/a") == b"first"
    assert any_store.names("records") == {"a"}
    any_store.remove("records/a")
    any_store.create("records/a", b"third")
    assert any_store.read("records/a") == b"third"


def test_stores_accept_any_folder_name(tmp_path, monkeypatch):
    """A folder may have any name. A store keeps using the same folder if the process changes its working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("a::b", "[1]*", "file:c"):
        store = Store(name)
        assert str(store) == name
        store.begin(("records",))
        store.create("records/a", b"1")
        monkeypatch.chdir(tmp_path / name)
        assert store.read("records/a") == (tmp_path / name / "records/a").read_bytes() == b"1"
        monkeypatch.chdir(tmp_path)
    assert str(Store("memory://bucket/a/")) == "memory://bucket/a"
    assert str(Store("~/a")) == os.path.expanduser("~/a")


@pytest.mark.parametrize(
    ("address", "reason"),
    [("nowhere://a", "Protocol not known: nowhere"), ("lacking://a", "install lackfs to read lacking")],
)
def test_unsupported_addresses_are_refused(address, reason, monkeypatch):
    lacking = {"class": "lackfs.FileSystem", "err": "install lackfs to read lacking"}
    monkeypatch.setitem(known_implementations, "lacking", lacking)
    with pytest.raises(ValueError, match=re.escape(f"{address} cannot be reached ({reason})")):
        Store(address)


def test_unfinished_files_of_ended_processes_are_removed(tmp_path):
    kept = {f".a.{host()}-{os.getpid()}-0f", f".b.elsewhere-{NOBODY}-0f", ".c", "d", f"e.{host()}-{NOBODY}-0f"}
    for folder in (tmp_path, tmp_path / "records"):
        folder.mkdir(exist_ok=True)
        for name in kept | {f".part.0.{host()}-{NOBODY}-0f"}:
            (folder / name).write_bytes(b"")
    Store(tmp_path).begin(("records",))
    assert {path.name for path in tmp_path.iterdir()} == kept | {"records"}
    assert {path.name for path in (tmp_path / "records").iterdir()} == kept


def test_a_failed_write_leaves_no_files(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    store = Store(tmp_path)
    store.write("a", b"1")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        store.write("a", b"2")
    assert store.names("") == {"a"}
    assert store.read("a") == b"1"


def test_creating_files_without_links(tmp_path, monkeypatch):
    """File systems without hard links, such as a bucket mounted as a folder, are supported."""

    def link(*_):
        raise PermissionError

    store = Store(tmp_path)
    monkeypatch.setattr(os, "link", link)
    store.create("a.json", b"1")
    with pytest.raises(FileExistsError):
        store.create("a.json", b"2")
    assert store.read("a.json") == b"1"
    assert store.names("") == {"a.json"}


def test_readers_see_complete_files(tmp_path):
    store, ended, lengths = Store(tmp_path), threading.Event(), set()
    store.write("a", b"")

    def read():
        while not ended.is_set():
            lengths.add(len(store.read("a")))

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(200):
        store.write("a", bytes(i % 2 * 2**20))
    ended.set()
    reader.join()
    assert lengths <= {0, 2**20}


def check(folder, created):
    """Checks that every file was created once and has its creator's content."""
    owners = {name: thread for one in created for name, thread in one.items()}
    assert sum(map(len, created)) == len(creating.NAMES)
    store = Store(folder)
    assert {name: store.read(name) for name in creating.NAMES} == {
        name: creating.content(thread) for name, thread in owners.items()
    }
    assert store.names("") == {"go", *creating.NAMES}


def test_threads_create_a_file_once(tmp_path):
    (tmp_path / "go").touch()
    check(tmp_path, [creating.create(tmp_path, "thread")])


@pytest.mark.slow
def test_processes_create_a_file_once(tmp_path):
    command = [sys.executable, creating.__file__, tmp_path]
    processes = [subprocess.Popen([*command, who], stdout=subprocess.PIPE) for who in ("first", "second", "third")]
    assert [process.stdout.readline() for process in processes] == [b"ready\n"] * 3
    (tmp_path / "go").touch()
    check(tmp_path, [json.loads(process.communicate()[0]) for process in processes])


@pytest.mark.parametrize("address", ["gs://", "://", "s3:///", "x://y"])
def test_addresses_without_a_folder_are_refused(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="names no folder; give a path"):
        Store(address)
    assert not list(tmp_path.iterdir())
