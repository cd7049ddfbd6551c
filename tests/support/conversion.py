"""Conversions by the command line, and functions of `apart.py` in a process of their own."""

import json
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

from convert.__main__ import main


def apart(name, *arguments):
    """Runs a function of `apart.py` and returns what it printed."""
    command = [sys.executable, Path(__file__).with_name("apart.py"), name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def run(*words):
    return CliRunner().invoke(main, list(map(str, words)))
