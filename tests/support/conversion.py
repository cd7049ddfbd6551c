"""Runs conversions through the command line, and the functions of `apart.py` in a separate process."""

import json
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

from convert.__main__ import main


def apart(name, *arguments):
    """Runs a function of `apart.py` in a new process and returns its result."""
    command = [sys.executable, Path(__file__).with_name("apart.py"), name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def run(*words):
    """Runs the command in this process and returns click's result."""
    return CliRunner().invoke(main, list(map(str, words)))
