"""Reads the fenced blocks of a README and runs them as a reader would.

    python3 tests/support/readme.py --setup          # prints the commands that set up the environment
    python3 -P tests/support/readme.py "Sweeps"      # runs the blocks of one section in the current folder

A section begins with a level-2 heading. The blocks of a section run in order; `python` blocks share one process:

    sh      a bash script, which stops at the first command that fails
    python  code
    toml    a file, whose first line is a comment with its name: `# glasses.toml`
    text    output; nothing runs

A `sh` block that creates an environment (`-m venv`) is a set-up block, and `.ci/run` runs it. `.ci/run` also contains
the README's other commands from `.venv/`, such as those that run the test tiers. Installing JAX for an accelerator is
skipped. Everything else runs. Unknown languages and programs are errors, so that nothing is skipped without notice.

Only the standard library is used, because `.ci/run` starts with this script.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

README = Path(__file__).parents[2] / "README.md"
LANGUAGES = ("sh", "python", "toml", "text")
PROGRAMS = ("sega-jax", "sega-jax-convert", "python", "pip", "hf", "export")
ACCELERATORS = {"cuda", "cuda12", "tpu"}


class ReadmeError(ValueError):
    """An error that says which block cannot be run and on which line it begins."""


class Block(NamedTuple):
    section: str  # the level-2 heading, or "" before the first heading
    line: int  # the line of the opening fence, counted from 1
    language: str
    text: str

    @property
    def sets_up(self) -> bool:
        return self.language == "sh" and "-m venv" in self.text

    @property
    def file(self) -> str:
        """The name of the file that a toml block contains."""
        match = re.match(r"# ([\w.-]+\.toml)\n", self.text)
        if match is None:
            raise ReadmeError(
                f"line {self.line}: the first line of a toml block should be a comment with its file's name"
            )
        return match[1]

    @property
    def commands(self) -> list[str]:
        """The commands of a sh block, without comments and with continued lines joined."""
        commands, command = [], ""
        for line in self.text.splitlines():
            command += line
            if command.endswith("\\"):
                command = command[:-1]
                continue
            try:
                words = shlex.split(command, comments=True)
            except ValueError:  # a quotation continues on the next line
                command += "\n"
                continue
            if words:
                commands.append(command)
            command = ""
        if command:
            raise ReadmeError(f"line {self.line}: {command!r} is incomplete")
        return commands


def blocks(text: str) -> list[Block]:
    """Returns the fenced blocks of a markdown text."""
    section, opened, found = "", None, []
    for number, line in enumerate(text.splitlines(), 1):
        if opened is None and line.startswith("```"):
            opened, language, body = number, line[3:].strip(), []
            if language not in LANGUAGES:
                raise ReadmeError(f"line {number}: a block in {language or 'no language'}, expected one of {LANGUAGES}")
        elif opened is not None and line == "```":
            found.append(Block(section, opened, language, "".join(f"{one}\n" for one in body)))
            opened = None
        elif opened is not None:
            body.append(line)
        elif line.startswith("## "):
            section = line[3:].strip()
    if opened is not None:
        raise ReadmeError(f"line {opened}: the block is never closed")
    return found


def kind(command: str) -> str:
    """Returns where a command outside set-up blocks runs: "run" means in this script, "ci" in `.ci/run`, "accelerator"
    nowhere.

    Raises:
        ReadmeError: the program is unknown.
    """
    words = shlex.split(command, comments=True)
    if words[0].startswith(".venv/"):
        return "ci"
    if words[:2] == ["pip", "install"] and any(ACCELERATORS & set(re.split(r"[\[\],]", word)) for word in words):
        return "accelerator"
    program = next((word for word in words if not re.fullmatch(r"\w+=.*", word)), "")
    if program not in PROGRAMS:
        raise ReadmeError(f"{command!r} starts {program or 'nothing'}, expected one of {', '.join(PROGRAMS)}")
    return "run"


def script(commands: list[str]) -> str:
    """Returns a script for `bash -e` that stops at the first command that fails.

    Each command is followed by a check, since `bash -e` itself ignores a failure to the left of `&&`.
    """
    return "".join(f"{command}\n[ $? = 0 ]\n" for command in commands)


def set_up(text: str) -> str:
    """Returns the script of all set-up blocks."""
    return script([command for block in blocks(text) if block.sets_up for command in block.commands])


def steps(section: list[Block]) -> Iterator[tuple[Block, str, list[str]]]:
    """Yields the parts of a section: (block, action, its lines, commands or file)."""
    for block in section:
        if block.language == "python":
            yield block, "run", block.text.splitlines()
        elif block.language == "toml":
            yield block, "write", [block.file]
        elif block.language == "text":
            yield block, "output", block.text.splitlines()
        elif block.sets_up:
            yield block, "ci", block.commands
        else:
            for command in block.commands:
                yield block, kind(command), [command]


def run(section: list[Block]) -> None:
    """Runs the blocks of a section in the current folder, and prints the action for each line.

    Raises:
        subprocess.CalledProcessError: a command failed.
    """
    names = {"__name__": "__main__"}
    for block in section:
        parts = [(what, line) for _, what, lines in steps([block]) for line in lines]
        for what, line in parts:
            print(f"{block.line:4} {what:11} {line}", flush=True)
        if block.language == "python":
            # Empty lines before the code make the line numbers in tracebacks match those in the README.
            exec(compile("\n" * block.line + block.text, README.name, "exec"), names)
        elif block.language == "toml":
            Path(block.file).write_text(block.text)
        elif block.language == "sh":
            subprocess.run(["bash", "-e", "-c", script([line for what, line in parts if what == "run"])], check=True)


if __name__ == "__main__":
    if sys.argv[1] == "--setup":
        print(set_up(README.read_text()), end="")
    else:
        run([block for block in blocks(Path("README.md").read_text()) if block.section == sys.argv[1]])
