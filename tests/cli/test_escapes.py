"""Control characters in prompts, metadata and file names are shown as escape sequences."""

import subprocess
import sys

import pytest
from click.testing import CliRunner
from PIL import Image

from sega_jax.cli.main import main
from sega_jax.cli.terminal import quoted
from sega_jax.pipelines import png
from sega_jax.pipelines.progress import printable

RED = "\x1b[31mred\x1b[0m"
ODD = [
    RED,
    "it's\x07 a \\ backslash",
    "\x9b2J",
    "a\u202eb",
    "plain",
    "it's",
    "two\nlines",
    "猫 👩\u200d🚀",
    "黒い猫\u3000帽子 \xa0«»",
]


@pytest.mark.parametrize("text", ODD)
def test_text_without_control_characters_is_unchanged(text):
    shown = printable(text)
    assert not any(c in shown for c in "\x1b\x07\x9b\u202e")
    assert (shown == text) == (text in ODD[4:])


@pytest.mark.skipif(sys.platform == "win32", reason="needs bash")
@pytest.mark.parametrize("text", ODD)
def test_bash_reads_quoted_words(text):
    command = f"printf %s {quoted([text])}"
    environment = {"LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin"}
    shown = subprocess.run(["bash", "-c", command], capture_output=True, check=True, env=environment).stdout
    assert "\x1b" not in command
    assert shown.decode("utf-8") == text


def test_info_escapes_metadata(tmp_path):
    known = {"picture": "original", "model": RED, "prompt": RED, "seed": 1, "steps": 2, "edits": []}
    known |= {"device": "\x1b]0;title\x07", "system": "stable_diffusion", "revision": None}
    png.save(Image.new("RGB", (8, 8)), tmp_path / "a.png", known)
    result = CliRunner().invoke(main, ["info", str(tmp_path / "a.png")])
    assert result.exit_code == 0, result.output
    assert not any(c in result.output for c in "\x1b\x07")
    assert r"\x1b[31mred" in result.output


def test_errors_and_warnings_are_escaped(tmp_path):
    for words in (["info", f"{RED}.png"], ["sweep", f"{RED}.toml"], ["sweep", "status", RED], ["edit", "--model", RED]):
        result = CliRunner().invoke(main, [*words, *(["--prompt", "a"] if words[0] == "edit" else [])])
        assert result.exit_code
        assert "\x1b" not in result.output
