"""Messages name arguments in the spelling of Python or of the shell command that runs."""

import numpy as np
import pytest

from sega_jax.method.checks import check_choice, check_int
from sega_jax.method.naming import Option, as_options, assignment, brief, in_python, name_of, of_stage

OPTIONS = {
    "steps": Option("--steps"),
    "share": Option("--share", "--no-share"),
    "ema": Option("--ema"),
    "source": Option("--model"),
    "stage2": Option("--stage2"),
    "stage2_steps": Option("--stage2-steps"),
}


def test_names_in_python_and_in_the_shell():
    assert (name_of("steps"), name_of("record")) == ("steps", "record")
    with as_options(OPTIONS):
        # The command has no option for the second argument.
        assert (name_of("steps"), name_of("record")) == ("--steps", "record")
    assert name_of("steps") == "steps"


def test_names_in_the_stages_of_a_cascade():
    with of_stage("stage2"):
        assert (name_of("steps"), assignment("steps", 0)) == ("stage2's steps", "stage2's steps=0")
        with as_options(OPTIONS):
            assert (name_of("steps"), name_of("ema")) == ("--stage2-steps", "--ema")
            assert assignment("source", "nowhere") == "--stage2 nowhere"
    with as_options(OPTIONS):
        assert assignment("source", "nowhere") == "--model nowhere"


@pytest.mark.parametrize(
    ("name", "value", "in_shell"),
    [
        ("steps", 20, "--steps 20"),
        ("steps", 20.0, "--steps 20"),
        ("steps", 0.5, "--steps 0.5"),
        ("steps", 1e300, "--steps 1e+300"),
        ("steps", "two words", "--steps 'two words'"),
        ("steps", "", "--steps ''"),
        ("steps", (1.0, 0.5), "--steps 1,0.5"),
        ("steps", float("nan"), "--steps nan"),
        ("share", True, "--share"),
        ("share", False, "--no-share"),
        ("ema", True, "--ema"),
        ("--rows", -1, "--rows -1"),
        ("[call]: steps", 0, "[call]: steps=0"),
        ("steps", "x" * 250, f"--steps {'x' * 250}"),
        ("steps", "x" * 251, f"--steps {'x' * 247}..."),
    ],
)
def test_values_in_the_shell(name, value, in_shell):
    with as_options(OPTIONS):
        assert assignment(name, value) == in_shell


def test_values_in_python():
    assert assignment("dtype", "float32") == "dtype='float32'"
    assert assignment("share", False) == "share=False"
    assert len(brief(np.zeros(1000))) <= 80


def test_checks_name_the_option():
    with as_options(OPTIONS):
        with pytest.raises(ValueError, match=r"^--steps 0 should be at least 1$"):
            check_int("steps", 0, 1)
        with pytest.raises(ValueError, match=r"^--steps fst should be one of fast, slow; did you mean fast"):
            check_choice("steps", "fst", ["fast", "slow"])
    with pytest.raises(ValueError, match=r"^steps=0 should be at least 1$"):
        check_int("steps", 0, 1)


def test_words_that_only_make_sense_in_python():
    assert in_python(" (pipe.models)") == " (pipe.models)"
    with as_options({}):
        assert in_python(" (pipe.models)") == ""
