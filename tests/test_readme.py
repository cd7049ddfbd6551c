"""Checks that the README is short, and that every command and every line of code in it runs as written.

    pytest -m readme -rP tests/test_readme.py      # and prints what was run

Each section runs in a separate process, following the rules in `support/readme.py`, in a folder that looks like a
checkout. The folder contains links to the files of this checkout and a `.venv` environment based on the current one, so
`pip install` changes nothing else. Checkpoints on the hub are replaced with tiny random checkpoints from
`support/hub_cache.py`.
"""

import os
import re
import shlex
import subprocess
import sys
import sysconfig
import venv

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from support import readme
from support.readme import ReadmeError, blocks, kind

ROOT = readme.README.parent
TEXT = readme.README.read_text()
NOT_LINKED = {".git", ".venv", "build", "dist", "sega-jax-out"}


def picture(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)


def lora(path):
    """Writes a LoRA for one layer of Stable Diffusion 1.5 to the hub's cache."""
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    shapes = {"lora_A.weight": (2, 8), "lora_B.weight": (8, 2)}
    save_file({f"{layer}.{end}": np.ones(shape, np.float32) for end, shape in shapes.items()}, path)


# {file that a reader would have: function that writes a substitute}
FILES = {"house.png": picture, "style.safetensors": lora}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.name not in NOT_LINKED:
            (folder / path.name).symlink_to(path)
    venv.create(folder / ".venv", with_pip=True, symlinks=True)
    (packages,) = (folder / ".venv" / "lib").glob("python*/site-packages")
    (packages / "present.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    for name, write in FILES.items():
        if name in TEXT:
            write(folder / name)
    return folder


@pytest.fixture
def environment(checkout, hub_cache, tmp_path_factory):
    """Returns the environment variables that a reader would have, without `conftest.py`'s settings for short
    programs."""
    settings = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    own = {name: value for name, value in os.environ.items() if name not in settings}
    folders = [checkout / ".venv" / "bin", sysconfig.get_path("scripts"), os.environ["PATH"]]
    cache = str(tmp_path_factory.getbasetemp() / "readme-xla")
    return own | {"PATH": ":".join(map(str, folders)), "MPLBACKEND": "agg", "JAX_COMPILATION_CACHE_DIR": cache}


@pytest.mark.readme
@pytest.mark.parametrize("section", dict.fromkeys(block.section for block in blocks(TEXT)))
def test_a_section_runs(section, checkout, environment):
    command = [checkout / ".venv" / "bin" / "python", "-P", readme.__file__, section]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=checkout, env=environment, check=False, timeout=600, **output)
    print(done.stdout)
    assert done.returncode == 0


def test_ci_runs_what_the_sections_leave_out():
    ci = (ROOT / ".ci" / "run").read_text()
    assert "tests/support/readme.py --setup" in ci
    lines = [shlex.split(line, comments=True) for line in ci.splitlines()]
    steps = readme.steps([block for block in blocks(TEXT) if not block.sets_up])
    for command in [command for _, what, commands in steps if what == "ci" for command in commands]:
        for part in command.split("&&"):
            words = shlex.split(part, comments=True)
            assert any(line[: len(words)] == words for line in lines), f".ci/run lacks {part}"


def test_every_checkpoint_on_the_hub_has_a_stand_in(hub_folder):
    owners = "|".join({path.name.split("--")[1] for path in (hub_folder / "hub").iterdir()})
    code = "".join(block.text for block in blocks(TEXT))
    for name in re.findall(rf"(?:{owners})/[\w.-]+", code):
        assert (hub_folder / "hub" / f"models--{name.replace('/', '--')}").is_dir(), name


def test_the_readme_is_short():
    assert TEXT.count("\n") <= 220


SAMPLE = """# Sample

## First

```sh
python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/sega-jax edit
```

```python
value = 1
```

```toml
# numbers.toml
four = 4
```

```sh
pip install ".[cuda,sweep]"
export GREETING="hello \\
world"   # a comment
python -c "import os; print(
    os.environ['GREETING'])"
```

```python
import tomllib
value += tomllib.load(open("numbers.toml", "rb"))["four"]
print("value", value)
```

## Tests

```sh
.venv/bin/pytest -m slow  # processes
```
"""


def run_sample(text, section, folder):
    (folder / "README.md").write_text(text)
    return subprocess.run(
        [sys.executable, "-P", readme.__file__, section], cwd=folder, capture_output=True, text=True, check=False
    )


def test_what_happens_to_the_blocks_of_a_sample(tmp_path):
    first = [block for block in blocks(SAMPLE) if block.section == "First"]
    kinds = [what for _, what, _ in readme.steps(first)]
    assert kinds == ["ci", "run", "write", "accelerator", "run", "run", "run"]
    assert readme.set_up(SAMPLE).splitlines()[0].endswith(".venv/bin/sega-jax edit")
    done = run_sample(SAMPLE, "First", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "hello world" in done.stdout
    assert "value 5" in done.stdout


def test_a_failure_left_of_another_command_stops_the_section(tmp_path):
    broken = SAMPLE.replace("python -c", "python -c 'raise SystemExit(1)' && python -c ''\npython -c")
    done = run_sample(broken, "First", tmp_path)
    assert done.returncode != 0
    assert "hello" not in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("```python", "```rust", "a block in rust"),
        ("```python", "```", "a block in no language"),
        ("# numbers.toml", "# numbers", "its file's name"),
        ("pip install", "curl", "starts curl"),
        ('world"   # a comment', "world", "is incomplete"),
        ("processes\n```", "processes", "never closed"),
    ],
)
def test_nothing_is_skipped_without_notice(old, new, message):
    with pytest.raises(ReadmeError, match=message):
        list(readme.steps(blocks(SAMPLE.replace(old, new))))


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ('pip install ".[sweep]"', "run"),
        ('pip install ".[if,tpu]"  # for TPUs', "accelerator"),
        ("pip install .[cuda12]", "accelerator"),
        ("pip install gcsfs", "run"),
        (".venv/bin/pytest", "ci"),
        ("XLA_FLAGS=--x python file.py", "run"),
    ],
)
def test_who_runs_a_command(command, expected):
    assert kind(command) == expected
