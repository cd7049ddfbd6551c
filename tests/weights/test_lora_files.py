"""Tests the search for LoRAs in files, folders and hub repositories, from Python, the shell and sweeps."""

import json
import shutil

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors
from safetensors.numpy import save_file
from support import pickling
from support.hub import COMMIT, Stub, fetched

from sega_jax import CheckpointError
from sega_jax.cli import adapters
from sega_jax.pipelines.adapter_options import Loras
from sega_jax.weights import torch_pickle
from sega_jax.weights.hub import Address
from sega_jax.weights.lora_files import digest, find, on_hub, pinned
from sega_jax.weights.tensors import ENDINGS

NAME = "owner/style"
CONTENT = {"unet.conv_in.lora_A.weight": np.ones((1, 2), np.float32)}


def fill(folder, *names):
    """Writes small files that contain weights or an empty JSON object, depending on their extensions."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            save_file(CONTENT, path)
        elif name.endswith((".bin", ".pt", ".pth", ".ckpt")):
            pickling.save(CONTENT, path)
        else:
            path.write_text("{}")
    return folder


@pytest.fixture
def client(tmp_path, monkeypatch):
    stub = Stub(tmp_path / "repository", tmp_path / "cache")
    stub.folder.mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stub)
    monkeypatch.setattr(huggingface_hub, "model_info", stub.model_info)
    monkeypatch.chdir(tmp_path)
    return stub


CHOICES = [
    (["pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "other.safetensors"], 0),
    (["pytorch_lora_weights.bin", "other.safetensors", "README.md"], 0),
    (["adapter_model.safetensors", "adapter_config.json", "other.bin"], 0),
    (["adapter_model.bin", "adapter_config.json", "training.pt"], 0),
    (["a style.safetensors", "README.md", "picture.png"], 0),
    (["style.ckpt", "x/other.ckpt"], 0),
]
NO_CHOICES = [
    (["a.safetensors", "b.pt"], "has several files that could be the LoRA: a.safetensors, b.pt; name the file"),
    (["adapter_model.safetensors", "b.pt"], "several files that could be the LoRA: adapter_model.safetensors, b.pt"),
    (
        ["README.md", "x/a.safetensors", "y/b.pt"],
        "has weight files only in its subfolders: x/a.safetensors, y/b.pt; name",
    ),
    (["README.md"], "has no LoRA; it contains README.md; name the file, for example "),
    ([f"{i:02}.pt" for i in range(30)], "19.pt and 10 more; name the file"),
]


@pytest.mark.parametrize(("names", "index"), CHOICES)
def test_the_lora_in_a_folder(tmp_path, names, index):
    fill(tmp_path, *names)
    assert find(tmp_path) == tmp_path / names[index]
    assert pinned(str(tmp_path)) == str(tmp_path / names[index])
    assert Loras().located("lora", {".": 0.5}, tmp_path) == ((str(tmp_path / names[index]), 0.5),)


@pytest.mark.parametrize(("names", "message"), NO_CHOICES)
def test_a_folder_without_a_clear_choice_is_rejected(tmp_path, names, message):
    fill(tmp_path, *names)
    for attempt in (find, pinned):
        with pytest.raises(CheckpointError) as caught:
            attempt(tmp_path)
        assert f"{tmp_path} has" in str(caught.value)
        assert message in str(caught.value)
    with pytest.raises(CheckpointError, match=r"^call: lora: .* has "):
        Loras().located("call: lora", ".", tmp_path)


def test_missing_files_are_rejected(tmp_path, monkeypatch):
    monkeypatch.chdir(fill(tmp_path, "a.pt"))
    for name in ("", "b.pt", "x" * 5000, f"{'x' * 300}/a.pt", "a\0.pt"):
        with pytest.raises(CheckpointError, match="is missing; give a file, a folder, or owner/name on the hub"):
            find(name)


def test_an_empty_folder_is_rejected(tmp_path):
    with pytest.raises(CheckpointError, match="has no LoRA; it contains nothing; name"):
        find(tmp_path)


def test_the_content_of_a_file_determines_its_format(tmp_path):
    """Only files with a weight file's extension are read. Their content, not the extension, determines the format."""
    for ending in (".bin", ".pt", ".pth", ".ckpt"):
        save_file(CONTENT, tmp_path / f"a{ending}")
    pickling.save(CONTENT, tmp_path / "a.safetensors")
    for ending in ENDINGS:
        with torch_pickle.opened(find(tmp_path / f"a{ending}")) as tensors:
            assert tensors.shapes == {"unet.conv_in.lora_A.weight": (1, 2)}
    with pytest.raises(CheckpointError, match=r"a\.txt should have one of the extensions \.safetensors, \.ckpt"):
        find(fill(tmp_path, "a.txt") / "a.txt")


@pytest.mark.parametrize(("names", "index"), CHOICES)
def test_the_lora_in_a_repository(client, names, index):
    fill(client.folder, *names)
    assert find(NAME) == client.cache / COMMIT / names[index]
    assert pinned(NAME) == f"{NAME}@{COMMIT}/{names[index]}"
    settings = {"adapter_config.json"} & set(names)
    known = {name for name in names if name.startswith(("pytorch_lora", "adapter_model"))}
    assert fetched(client) == settings | (known or {names[index]})


@pytest.mark.parametrize(("names", "message"), NO_CHOICES)
def test_a_repository_without_a_clear_choice_is_rejected(client, names, message):
    fill(client.folder, *names)
    with pytest.raises(CheckpointError) as caught:
        find(NAME)
    assert message in str(caught.value)
    assert not {name for name in fetched(client) if name in names and not name.startswith("adapter")}


def test_a_file_in_a_repository_and_a_revision(client):
    fill(client.folder, "styles/a b.safetensors", "styles/adapter_config.json", "styles/c.pt", "d.pt")
    expected = client.cache / COMMIT / "styles" / "a b.safetensors"
    assert find(f"{NAME}/styles/a b.safetensors") == expected
    assert fetched(client) == {"styles/a b.safetensors", "styles/adapter_config.json"}
    assert find(f"{NAME}@v1.0/styles/a b.safetensors") == expected
    assert client.calls[-1][:2] == (NAME, "v1.0")
    assert pinned(f"{NAME}@v1.0/styles/a b.safetensors") == f"{NAME}@{COMMIT}/styles/a b.safetensors"
    assert find(f"{NAME}@v1.0") == client.cache / COMMIT / "d.pt"
    assert {call[1] for call in client.calls[-2:]} == {"v1.0", COMMIT}
    calls = len(client.calls)
    assert pinned(f"{NAME}@{COMMIT}/d.pt") == f"{NAME}@{COMMIT}/d.pt"
    assert len(client.calls) == calls
    with pytest.raises(CheckpointError, match=r"owner/style has no none\.pt; it has d\.pt, styles/a b\.safetensors"):
        find(f"{NAME}/none.pt")
    with pytest.raises(CheckpointError, match=r"README\.md should have one of the extensions"):
        find(f"{NAME}/README.md")


def test_without_a_connection(client):
    fill(client.folder, "style.safetensors")
    expected = find(NAME)
    client.error, client.offline = errors.OfflineModeIsEnabled("x"), True
    assert find(NAME) == find(f"{NAME}/style.safetensors") == expected
    assert pinned(NAME) == f"{NAME}@{COMMIT}/style.safetensors"
    with pytest.raises(CheckpointError, match=r"has no other\.pt, or it is not in the cache"):
        find(f"{NAME}/other.pt")
    expected.unlink()
    with pytest.raises(CheckpointError, match=r"the hub cannot be reached, and the cache has no LoRA.*HF_HUB_OFFLINE"):
        find(NAME)
    shutil.rmtree(client.cache)
    with pytest.raises(CheckpointError, match=r"the hub cannot be reached.*connect to the internet once"):
        find(NAME)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a/b", Address("a/b", "", None)),
        ("a/b.c@v1", Address("a/b.c", "", "v1")),
        ("a/b/c.safetensors", Address("a/b", "c.safetensors", None)),
        ("a/b/[c].pt", Address("a/b", "[c].pt", None)),
        ("a/b@v1/c/d e.pt", Address("a/b", "c/d e.pt", "v1")),
        *((text, None) for text in ("a", "a.pt", "/a/b", "./a/b", "../a/b", "~/a", "a/b.safetensors", "a/b/../c.pt")),
        *((text, None) for text in ("a/b/*.pt", "a//b", "a/b/", "a/b//c.pt", "")),
    ],
)
def test_names_on_the_hub(text, name):
    assert on_hub(text) == name
    assert name is None or str(name) == text


def test_local_paths_take_precedence(client, tmp_path):
    fill(tmp_path / "owner", "style/a.pt", "style2/b.pt")
    assert find(NAME).resolve() == tmp_path / "owner/style/a.pt"
    assert find(f"{NAME}/a.pt").resolve() == tmp_path / "owner/style/a.pt"
    assert Loras().located("lora", "style2", tmp_path / "owner") == ((str(tmp_path / "owner/style2/b.pt"), 1.0),)
    assert client.calls == []


def test_sweeps_identify_loras_by_their_content(client, tmp_path):
    """peft's settings are part of the content. A file with a known digest is not downloaded or read again."""
    fill(client.folder, "adapter_model.safetensors", "adapter_config.json")
    kind = Loras()
    value = kind.located("lora", NAME, tmp_path)
    assert value == ((f"{NAME}@{COMMIT}/adapter_model.safetensors", 1.0),)
    here = tmp_path / "here"
    shutil.copytree(client.folder, here)
    (path,) = kind.files(value)
    known = kind.known(path)
    assert known == kind.known(str(here / "adapter_model.safetensors"))
    (here / "adapter_config.json").write_text(json.dumps({"r": 3}))
    assert digest(str(here / "adapter_model.safetensors")) != known["digest"]
    shutil.copy(here / "adapter_model.safetensors", here / "of_others.safetensors")
    plain = digest(str(here / "of_others.safetensors"))
    (here / "adapter_config.json").unlink()
    assert digest(str(here / "adapter_model.safetensors")) == plain
    calls = len(client.calls)
    assert kind.located("lora", list(value), tmp_path) == value
    gone = str(tmp_path / "gone.safetensors")
    assert kind.located("lora", gone, tmp_path) == ((gone, 1.0),)
    assert len(client.calls) == calls


def test_the_shell(client, tmp_path):
    """The command that reproduces a call names the file in a repository or folder, and the repository's commit."""
    fill(client.folder, "style.safetensors")
    fill(tmp_path, "here/a.pt", "several/a.pt", "several/b.pt")
    chosen = {"lora": (f"{NAME}:0.5", "here:-1", f"{NAME}@v2/style.safetensors")}
    adapters.check(chosen, {})
    assert client.calls == []
    file = f"{NAME}@{COMMIT}/style.safetensors"
    options = [f"{file}:0.5", f"{tmp_path / 'here/a.pt'}:-1.0", f"{file}:1.0"]
    kept = adapters.located(chosen)
    assert kept == {"lora": options}
    assert adapters.read({"lora": options[:2]}) == {"lora": {file: 0.5, str(tmp_path / "here/a.pt"): -1.0}}
    assert adapters.command_words(kept) == [part for word in options for part in ("--lora", word)]
    with pytest.raises(CheckpointError, match="several has several files"):
        adapters.check({"lora": ("several",)}, {})
    for text in ("nowhere.pt", "./a/b", "a/b.pt:2"):
        with pytest.raises(FileNotFoundError, match="is not a file; correct the path"):
            adapters.check({"lora": (text,)}, {})
