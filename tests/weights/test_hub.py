"""Tests downloads from the hub, both with a stub of the hub's client and with the real client and a local server."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors
from reference import cases
from safetensors.numpy import load_file, save_file
from support import pickling, single_files, tiny
from support.checkpoints import same
from support.hub import COMMIT, NAME, Stub, fetched

import convert
import sega_jax
from sega_jax import CheckpointError, sweep
from sega_jax.pipelines import sources
from sega_jax.pipelines.part_loading import load_text
from sega_jax.weights import hub

pytestmark = pytest.mark.usefixtures("one_by_default")

NEEDED = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}


@pytest.fixture(scope="module")
def repository(small_folder, tmp_path_factory):
    """Returns a checkpoint with additional files that repositories often contain."""
    folder = shutil.copytree(small_folder, tmp_path_factory.mktemp("hub") / "tiny")
    for name in ("README.md", "v1-5-pruned.ckpt", "unet/diffusion_pytorch_model.bin", "vae/model.onnx"):
        (folder / name).write_bytes(b"x")
    for name in ("unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors"):
        (folder / name).write_bytes(b"x")
    return folder


@pytest.fixture
def client(repository, tmp_path, monkeypatch):
    stub = Stub(repository, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stub)
    return stub


def test_only_needed_files_are_downloaded(client, small, one_device):
    pipe = sega_jax.load(NAME, devices=one_device)
    assert {name for name in fetched(client) if not name.startswith("tokenizer/")} == NEEDED
    assert [call[:2] for call in client.calls] == [(NAME, None), (NAME, COMMIT)]
    assert np.array_equal(pipe("cat", steps=2, output="latent").images, small("cat", steps=2, output="latent").images)


def test_a_revision_and_a_network_from_another_pipeline(client, small, one_device):
    sega_jax.load(NAME, revision="v1.0", unet=small.models.unet, devices=one_device)
    assert client.calls[0][:2] == (NAME, "v1.0")
    assert {name for name in fetched(client) if name.startswith("unet")} == set()


def test_configs_for_a_single_file_are_downloaded_without_weights(client, small, one_device, tmp_path):
    save_file(tiny.original(unet=tiny.UNET_1), tmp_path / "model.safetensors")
    pipe = sega_jax.load(tmp_path / "model.safetensors", config=NAME, devices=one_device)
    assert same(pipe, small)
    convert.convert_single(tmp_path / "model.safetensors", tmp_path / "made", config=NAME)
    expected = {name for name in NEEDED if name.endswith(".json")}
    assert {name for name in fetched(client) if not name.startswith("tokenizer/")} == expected


def test_a_variant(client):
    """Only the UNet has the variant. Its file is not a valid checkpoint, so loading fails after the download."""
    message = r"owner/tiny has no weights of the variant 'fp16' for text_encoder, vae; using those without a variant"
    with pytest.warns(UserWarning, match=message), pytest.raises(CheckpointError):
        sega_jax.load(NAME, variant="fp16")
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in fetched(client)
    assert "unet/diffusion_pytorch_model.safetensors" not in fetched(client)
    with pytest.raises(CheckpointError, match="owner/tiny has no weights of the variant 'fp61'"):
        sega_jax.load(NAME, variant="fp61")


def test_only_the_index_of_an_unsupported_pipeline_is_downloaded(client, repository, tmp_path):
    other = shutil.copytree(repository, tmp_path / "other")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"text_encoder_2": ["transformers", "CLIPTextModel"]}))
    client.folder = other
    with pytest.raises(CheckpointError, match="whose text_encoder_2 is CLIPTextModel; expected"):
        sega_jax.load(NAME)
    assert fetched(client) == {"model_index.json"}


def test_needed_files_of_stable_diffusion_xl(client, tmp_path, one_device):
    """Both text encoders and both tokenizers are downloaded. Unrelated files are not downloaded,
    nor are networks that the caller passes in."""
    client.folder = tiny.xl(tmp_path / "xl", **cases.XL)
    needed = {str(path.relative_to(client.folder)) for path in client.folder.rglob("*") if path.is_file()}
    more = ["sd_xl_base_1.0.safetensors", "sd_xl_offset_example-lora_1.0.safetensors", "vae_1_0/config.json"]
    more += ["unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder_2/flax_model.msgpack"]
    more += ["text_encoder_2/model.onnx", "vae_1_0/diffusion_pytorch_model.safetensors"]
    for name in more:
        (client.folder / name).parent.mkdir(exist_ok=True)
        (client.folder / name).write_bytes(b"x")
    pipe = sega_jax.load(NAME, devices=one_device)
    assert fetched(client) == needed
    shutil.rmtree(client.cache)
    parts = {part: getattr(pipe.models, part) for part in ("text_encoder_2", "unet")}
    sega_jax.load(NAME, devices=one_device, tokenizer=pipe.tokenizer, **parts)
    left = {"text_encoder_2/config.json", "unet/config.json"}
    assert fetched(client) == {name for name in needed - left if not name.startswith(("tok", "text_encoder_2", "unet"))}


def test_a_stage_without_its_text_encoder(client, tmp_path, one_device):
    """Downloads neither the text encoder, which is larger than all other files, nor the unsupported safety checker."""
    client.folder = tiny.stage(tmp_path / "stage", tiny.STAGE_2, safety=True)
    (client.folder / "safety_checker").mkdir()
    (client.folder / "safety_checker" / "model.safetensors").write_bytes(b"x")
    (client.folder / "safety_checker" / "config.json").write_bytes(b"{}")
    with pytest.warns(UserWarning, match="safety checker, which is not supported"):
        sega_jax.load(NAME, text_encoder=False, devices=one_device)
    face = sega_jax.SemanticIFPipeline.from_pretrained(NAME, text_encoder=None, devices=one_device)
    assert face.text_encoder is None
    assert fetched(client) == {
        "image_noising_scheduler/scheduler_config.json",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }


def test_encoding_text_downloads_only_the_text_networks(client):
    weights = {"unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"}
    text = load_text(NAME)(["a cat"])
    assert NEEDED - weights <= fetched(client)
    assert not weights & fetched(client)
    np.testing.assert_array_equal(text.states, sega_jax.load(NAME).encode(["a cat"]).states)


def response(status, code=None):
    # The hub's client uses httpx or its successor; both have a `Response` class.
    httpx = sys.modules[errors.HTTPError.__module__.partition(".")[0]]
    headers = {} if code is None else {"X-Error-Code": code}
    return httpx.Response(status, headers=headers, request=httpx.Request("GET", "http://hub.invalid/owner/tiny"))


@pytest.mark.parametrize(
    ("error", "phrases"),
    [
        (lambda: errors.GatedRepoError("x", response=response(403)), ["is gated", "owner/tiny", "hf auth login"]),
        (
            lambda: errors.RepositoryNotFoundError("x", response=response(404)),
            ["nor a repository on the hub", "private"],
        ),
        (lambda: errors.RevisionNotFoundError("x", response=response(404)), ["has no revision 'v9'"]),
        (lambda: errors.LocalEntryNotFoundError("x"), ["cannot be reached", "cache", "HF_HUB_OFFLINE"]),
        (lambda: errors.OfflineModeIsEnabled("x"), ["cannot be reached"]),
        (lambda: errors.HfHubHTTPError("busy", response=response(503)), ["cannot be fetched", "busy"]),
        (lambda: errors.HFValidationError("two dashes"), ["nor a valid repository name", "two dashes"]),
        (lambda: OSError(28, "No space left on device"), ["cannot be fetched", "No space left"]),
    ],
)
def test_errors_name_the_remedy(client, error, phrases):
    client.error = error()
    with pytest.raises(CheckpointError) as caught:
        sega_jax.load(NAME, revision="v9")
    assert all(phrase in str(caught.value) for phrase in [NAME, *phrases]), str(caught.value)


def test_a_repository_without_weights_of_a_network(client, repository, tmp_path, small, one_device):
    other = shutil.copytree(repository, tmp_path / "other")
    (other / "unet/diffusion_pytorch_model.safetensors").unlink()
    weights = (other / "unet/diffusion_pytorch_model.bin").rename(other / "unet/other.bin")
    client.folder = other
    with pytest.raises(
        CheckpointError, match=r"has no unet/diffusion_pytorch_model.safetensors, nor these weights as \.bin"
    ):
        sega_jax.load(NAME)
    pickling.save(load_file(repository / "unet/diffusion_pytorch_model.safetensors"), weights)
    weights.rename(other / "unet/diffusion_pytorch_model.bin")
    assert same(sega_jax.load(NAME, devices=one_device), small)
    assert "vae/diffusion_pytorch_model.bin" not in fetched(client)


def test_a_converted_repository(client, small_folder, small, tmp_path, one_device):
    client.folder = convert.convert(small_folder, tmp_path / "orbax")
    pipe = sega_jax.load(NAME, devices=one_device)
    assert np.array_equal(pipe("cat", steps=1, output="latent").images, small("cat", steps=1, output="latent").images)


def test_revisions_must_be_text():
    with pytest.raises(TypeError, match="revision=3 should be"):
        sega_jax.load(NAME, revision=3)


def test_keyboard_interrupts_are_not_caught(client):
    client.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        sega_jax.load(NAME)


PAGE = "https://huggingface.co/owner/tiny"
ADDRESSES = {
    "owner/tiny": ("owner/tiny", "", None),
    "owner/tiny/a.safetensors": ("owner/tiny", "a.safetensors", None),
    "owner/tiny/vae/a b.safetensors": ("owner/tiny", "vae/a b.safetensors", None),
    PAGE: ("owner/tiny", "", None),
    f"{PAGE}/": ("owner/tiny", "", None),
    f"{PAGE}/tree/v1.0": ("owner/tiny", "", "v1.0"),
    f"{PAGE}/tree/main/vae": ("owner/tiny", "vae", "main"),
    f"{PAGE}/blob/main/v1-5.ckpt": ("owner/tiny", "v1-5.ckpt", "main"),
    f"{PAGE}/resolve/refs%2Fpr%2F3/a%20b.safetensors?download=true": ("owner/tiny", "a b.safetensors", "refs/pr/3"),
    "https://hf.co/owner/tiny": ("owner/tiny", "", None),
    "owner/tiny@refs%2Fpr%2F3/a.bin": ("owner/tiny", "a.bin", "refs/pr/3"),
}


@pytest.mark.parametrize("source", ADDRESSES)
def test_addresses(source):
    result = hub.address(source)
    assert tuple(result) == ADDRESSES[source]
    assert hub.address(str(result)) == result


@pytest.mark.parametrize("source", ["name", "/a/b", "../a/b", "a/b/../c", "~/a/b.ckpt", "", None, 3, Path("a/b")])
def test_other_names_are_not_addresses(source):
    assert hub.address(source) is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://example.org/a/b.safetensors", "download the file and give its path"),
        ("ftp://huggingface.co/owner/tiny", "download the file"),
        (f"{PAGE}/discussions/3", "is not the page of a model"),
        (f"{PAGE}/blob", "is not the page of a model"),
        (f"{PAGE}/blob/main/..%2F..%2Fx.safetensors", "is not the page of a model"),
        ("https://huggingface.co/datasets/owner/tiny", "is not the page of a model"),
        ("https://huggingface.co/", "is not the page of a model"),
    ],
)
def test_other_web_addresses_are_rejected(source, message):
    with pytest.raises(ValueError, match=message):
        sega_jax.load(source)


@pytest.mark.parametrize(
    "ending", ["safetensors", *(pytest.param(ending, marks=pytest.mark.slow) for ending in ("ckpt", "pth"))]
)
def test_a_single_file_by_its_name(client, small, one_device, tmp_path, ending):
    client.folder = tmp_path / "repository"
    (client.folder / "all").mkdir(parents=True)
    path = client.folder / "all" / f"a [1].{ending}"
    tensors = tiny.original(unet=tiny.UNET_1)
    save_file(tensors, path) if ending == "safetensors" else pickling.save({"model": tensors}, path)
    config = tmp_path / "config"
    tiny.checkpoint(config, unet=tiny.UNET_1)
    for source in (f"owner/tiny/all/a [1].{ending}", f"{PAGE}/blob/main/all/a%20%5B1%5D.{ending}"):
        assert same(sega_jax.load(source, config=config, devices=one_device), small)
        shutil.rmtree(tmp_path / "made", ignore_errors=True)
        convert.convert_single(source, tmp_path / "made", config=config)
        assert same(sega_jax.load(tmp_path / "made", devices=one_device), small)
        result = sources.find(source, config=config)
        assert sources.place(result) == (f"owner/tiny/all/a [1].{ending}", COMMIT)
    assert fetched(client) == {f"all/a [1].{ending}"}
    with pytest.raises(CheckpointError, match=r"on the hub owner/tiny has no file all/b\.ckpt at revision main"):
        sega_jax.load("owner/tiny/all/b.ckpt", config=config)
    with pytest.raises(ValueError, match=r"revision='v1' is given, but the address names 'main'; give only one"):
        sega_jax.load(f"{PAGE}/blob/main/all/b.ckpt", revision="v1")
    with pytest.raises(FileNotFoundError, match=r"on the hub, give a repository, owner/name, or a file in it"):
        sega_jax.load("owner/tiny/all")


def test_the_vocabulary_of_a_single_file_is_downloaded(client, small_folder, tmp_path, small, one_device):
    with single_files.resembling(small_folder, tmp_path / "sd-1.5"):
        save_file(tiny.original(unet=tiny.UNET_1), tmp_path / "model.safetensors")
        pipe = sega_jax.load(tmp_path / "model.safetensors", devices=one_device)
        assert client.calls == [("stable-diffusion-v1-5/stable-diffusion-v1-5", None, ["tokenizer/*"])]
        assert np.array_equal(pipe.tokenizer(["a cat"]), small.tokenizer(["a cat"]))
        convert.convert_single(tmp_path / "model.safetensors", tmp_path / "made")
        assert (tmp_path / "made/tokenizer/merges.txt").is_file()
        client.error = errors.OfflineModeIsEnabled("x")
        message = r"fetching it failed, because .*cannot be reached.* As tokenizer, give .*as config"
        with pytest.raises(CheckpointError, match=message):
            sega_jax.load(tmp_path / "model.safetensors")


@pytest.mark.slow
def test_a_sweep_of_a_single_file(client, small_folder, tmp_path):
    """The plan and every run read the vocabulary from the hub's cache."""
    save_file(tiny.original(unet=tiny.UNET_1), tmp_path / "model.safetensors")
    file = str(tmp_path / "model.safetensors")
    description = sweep.Sweep(model={"source": file}, call={"prompt": "a cat", "steps": 1}, grid={"seed": [3, 4]})
    with single_files.resembling(small_folder, tmp_path / "sd-1.5"):
        facts = sweep.Facts.of(description)
        assert facts.model["source"] == file
        sweep.run(sweep.plan(description, facts), tmp_path / "out", progress=False)
    assert len(list((tmp_path / "out").rglob("*.png"))) == 2


@pytest.mark.parametrize("source", ["owner/name", "a/b.c_d-e", "stable-diffusion-v1-5/stable-diffusion-v1-5"])
def test_names_of_repositories(source):
    assert hub.is_id(source)


@pytest.mark.parametrize("source", ["name", "/a/b", "./a", "../a", "a/b/c", "~/a", "a /b", "", Path("a/b"), None, 3])
def test_other_names_are_not_repositories(source):
    assert not hub.is_id(source)


def test_a_local_folder_takes_precedence_and_has_no_revision(client, small_folder, monkeypatch, tmp_path):
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "tiny").symlink_to(small_folder)
    monkeypatch.chdir(tmp_path)
    sega_jax.load(NAME)
    assert not client.calls
    with pytest.raises(ValueError, match=r"revision='main' applies only to the hub, but .* is a local folder"):
        sega_jax.load(NAME, revision="main")


# With the real client


class Server(http.server.BaseHTTPRequestHandler):
    """Answers the hub client's requests for the list of a revision's files and for the files themselves."""

    folder: Path
    asked: list

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.asked.append(path)
        if "/gated/" in path:
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if NAME not in path:
            return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if "/v9" in path:
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if path.startswith("/api/"):
            return self.api(path)
        data = (self.folder / path.partition(f"/resolve/{COMMIT}/")[2]).read_bytes()
        etag = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return self.answer(200, data, etag)

    def api(self, path):
        files = sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file())
        if "/tree/" in path:
            sizes = [(name, (self.folder / name).stat().st_size) for name in files]
            listed = [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in sizes]
            return self.answer(200, json.dumps(listed).encode())
        info = {"id": NAME, "sha": COMMIT, "private": False, "siblings": [{"rfilename": name} for name in files]}
        return self.answer(200, json.dumps(info).encode())

    def answer(self, status, body, headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


SCRIPT = """
import json, sys, warnings
warnings.simplefilter("ignore")
import sega_jax

results = []
for name, revision in json.loads(sys.argv[1]):
    try:
        pipe = sega_jax.load(name, revision=revision)
        results.append(float(abs(pipe("cat", steps=1, output="latent").images).sum()))
    except sega_jax.CheckpointError as error:
        results.append(str(error))
print(json.dumps(results))
"""


@pytest.mark.slow
def test_the_real_client(repository, small, tmp_path):
    """Downloads a repository, loads it offline from the cache, and gets errors for gated and missing repositories."""
    handler = type("Handler", (Server,), {"folder": repository, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    env = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    env |= {"JAX_PLATFORMS": "cpu", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*", "no_proxy": "*"}

    def run(*sources, **extra):
        command = [sys.executable, "-c", SCRIPT, json.dumps(sources)]
        process = subprocess.run(command, env=env | extra, capture_output=True, text=True, check=False, timeout=300)
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout.splitlines()[-1])

    expected = float(np.abs(small("cat", steps=1, output="latent").images).sum())
    try:
        result, *refused = run((NAME, None), ("owner/gated", None), ("owner/none", None), (NAME, "v9"))
    finally:
        server.shutdown()
        server.server_close()
    assert abs(result - expected) < 1e-3
    assert f"accept its conditions at {address}/owner/gated" in refused[0]
    assert "nor a repository on the hub" in refused[1]
    assert "has no revision 'v9'" in refused[2]
    assert not [path for path in handler.asked if path.endswith((".bin", ".ckpt", ".onnx", "ema.safetensors"))]
    offline = run((NAME, None), ("owner/none", None), HF_HUB_OFFLINE="1")
    assert abs(offline[0] - expected) < 1e-3
    assert "cannot be reached" in offline[1]
    unreachable = run((NAME, None), ("owner/none", None))
    assert abs(unreachable[0] - expected) < 1e-3
    assert "cannot be reached" in unreachable[1]


def test_a_local_file_with_the_name_of_a_folder_in_a_repository_is_ignored(
    client, monkeypatch, tmp_path, small, one_device
):
    """A folder in a repository is used even if there is a local file with the folder's name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unet").write_bytes(b"PK\3\4")
    pipe = sega_jax.load(NAME, unet=f"{NAME}/unet", devices=one_device)
    assert same(pipe, small)
    with pytest.raises(ValueError, match="ema=True applies only to single files"):
        sega_jax.load(NAME, unet=f"{NAME}/nowhere", ema=True)


def test_encoding_text_with_a_single_file(client, small_folder, tmp_path, small):
    with single_files.resembling(small_folder, tmp_path / "sd-1.5"):
        save_file(tiny.original(unet=tiny.UNET_1), tmp_path / "model.safetensors")
        text = load_text(tmp_path / "model.safetensors")(["a cat"])
    np.testing.assert_array_equal(text.states, small.encode(["a cat"]).states)
