"""When a disk fills up, nothing that was reported as written is lost. The disk is a small tmpfs, which only root may
mount."""

import re
import subprocess

import pytest
from click.testing import CliRunner
from PIL import Image
from support.sweeping import hat_plan, same

from convert.__main__ import main as convert
from sega_jax import sweep
from sega_jax.cli.main import main

pytestmark = pytest.mark.slow
POINTS = 50


def mount(*words):
    return subprocess.run(["mount", *map(str, words)], capture_output=True, check=False).returncode == 0


@pytest.fixture
def disk(tmp_path):
    """Returns a folder on a small disk, and a function that sets the disk's size in KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=4k", "tmpfs", folder):
        pytest.skip("mounting a tmpfs needs root")
    yield folder, lambda size: mount("-o", f"remount,size={size}k", folder)
    subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.fixture(scope="module")
def plan(least_folder):
    return hat_plan(least_folder, 4, [-4, 2, 3])


def test_a_sweep(disk, plan, least, tmp_path):
    """The disk grows by 4 KiB whenever it is full, until the sweep is finished."""
    folder, grow = disk
    sweep.run(plan, tmp_path / "done", least)
    messages, size, done = [], 4, 0
    while True:
        try:
            status = sweep.run(plan, folder / "sweep", least)
            break
        except OSError as error:
            messages.append(str(error))
        if (folder / "sweep" / "plan.json").exists():
            assert sweep.problems(folder / "sweep", verify=True) == []
            assert sweep.status(folder / "sweep").done >= done
            done = sweep.status(folder / "sweep").done
        size += 4
        assert grow(size)
    assert status.done == 12
    assert len(messages) >= 15
    assert all("disk or a quota is full" in message or "No space left" in message for message in messages), messages
    same(folder / "sweep", tmp_path / "done")


def test_an_edit(disk, least_folder):
    folder, grow = disk
    words = ["edit", "--model", least_folder, "--prompt", "a cat", "--edit", "hat:warmup=0", "--steps", 2]
    words += ["--seed", "1-3", "--out", folder / "out"]
    for size in range(4, 4 + 4 * (POINTS // 4), 4):
        grow(size)
        result = CliRunner().invoke(main, list(map(str, words)))
        assert "Traceback" not in result.output
        assert result.exit_code in (0, 1)
        reported = re.findall(r"(\S+\.png)", " ".join(re.findall(r"Wrote (.*)", result.output)))
        for name in reported:
            with Image.open(folder / "out" / name.rpartition("/")[2]) as image:
                image.load()
        if result.exit_code:
            assert "full" in result.output or "No space left" in result.output, result.output
        if (folder / "out").exists():
            assert not [path for path in (folder / "out").iterdir() if path.name.startswith(".")]
            for path in (folder / "out").iterdir():
                path.unlink()


def test_a_conversion(disk, least_folder):
    folder, grow = disk
    total = sum(path.stat().st_size for path in least_folder.rglob("*") if path.is_file()) // 1024
    for point in range(1, POINTS // 4):
        grow(4 + total * point // (POINTS // 4))
        result = CliRunner().invoke(convert, [str(least_folder), str(folder / "converted")])
        assert "Traceback" not in result.output
        if result.exit_code:
            assert not list(folder.iterdir()), "a failed conversion left files"
            continue
        subprocess.run(["rm", "-r", str(folder / "converted")], check=True)
