"""Messages in the shell name the options of the command that runs, and misplaced words get a helpful answer."""

import pytest
from click.testing import CliRunner
from PIL import Image

from convert.__main__ import main as convert
from sega_jax.cli.main import main


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder, a text file, a picture and a few sweeps in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "plan.json").write_text("{}")
    (tmp_path / "file").write_text("text")
    (tmp_path / "sweep.toml").write_text('[call]\nprompt = "x"\n')
    (tmp_path / "steps.toml").write_text('[call]\nprompt = "x"\nsteps = 0\n')
    (tmp_path / "scheduler.toml").write_text('[call]\nprompt = "x"\nscheduler = "Foo"\n')
    (tmp_path / "revision.toml").write_text('[model]\nrevision = "a"\n[call]\nprompt = "x"\n')
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "0001-edited.png")


EDIT = ["edit", "--prompt", "x"]
MESSAGES = [
    (["edit", "a cat"], "name the prompt with --prompt, as in --prompt 'a cat'"),
    (["edit", "a", "cat", "--edit", "hat"], "as in --prompt 'a cat'"),
    (["edit", "--prompt", "a", "cat"], "cat belongs to no option; write texts with spaces in quotation marks"),
    (["edit"], "Missing option '--prompt'"),
    ([*EDIT, "--out", ""], "Invalid value for '--out': it is empty; give a path"),
    ([*EDIT, "--model", ""], "--model '' is not a folder"),
    ([*EDIT, "--model", "folder", "--revision", "a"], "--revision a applies only to the hub"),
    ([*EDIT, "--revision", ""], "--revision '' needs a repository on the hub"),
    ([*EDIT, "--model", "owner/name@a", "--revision", "b"], "--revision b is given, but the address names 'a'"),
    ([*EDIT, "--model", "folder", "--config", "folder"], "--config folder applies only to single files"),
    ([*EDIT, "--variant", ""], "--variant '' is empty; give a name, or leave the option out"),
    ([*EDIT, "--variant", "fp16"], "has no weights of the variant 'fp16'; leave out --variant"),
    ([*EDIT, "--dtype", "fp32"], "--dtype fp32 should be one of float32, bfloat16, float16; did you mean float32?"),
    (
        [*EDIT, "--dtype", "float64"],
        "--dtype float64 needs 64-bit JAX; set the environment variable JAX_ENABLE_X64=1\n",
    ),
    ([*EDIT, "--devices", "0"], "--devices 0 should be from 1 to"),
    ([*EDIT, "--ema"], "--ema applies only to single files"),
    ([*EDIT, "--lora", ""], "--lora '' is empty"),
    ([*EDIT, "--tokenizer", ""], "--tokenizer '' is not a folder"),
    ([*EDIT, "--unet", "none"], "--unet none is neither a file nor a folder"),
    ([*EDIT, "--unet", ""], "a weight file, or owner/name on the hub\n"),
    ([*EDIT, "--image", ""], "--image '' does not exist"),
    ([*EDIT, "--image", "folder"], "--image folder does not exist or is not a file"),
    ([*EDIT, "--image", "file"], "--image file cannot be read as a picture"),
    ([*EDIT, "--steps", str(10**30)], f"--steps {10**30} should be from 1 to 1000, the number of training timesteps"),
    ([*EDIT, "--height", "130"], "--height 130 is not a multiple of 4, this checkpoint's factor; try 128"),
    ([*EDIT, "--clip-skip", "99"], "--clip-skip 99 should be from 0 to"),
    ([*EDIT, "--image", "pictures/0001-edited.png"], "resize it, or give --height 8 and --width 8"),
    ([*EDIT, "--original-size", "3"], "such as 64,32"),
    ([*EDIT, "--temperature", "warm"], "--temperature warm should be a number above 0"),
    ([*EDIT, "--stage2", ""], "--stage2 '' is not a folder"),
    ([*EDIT, "--stage2", "folder", "--stage2-revision", "a"], "--stage2-revision a applies only to the hub"),
    ([*EDIT, "--stage2", "folder", "--stage2-scheduler", "Foo"], "--stage2-scheduler Foo is neither a folder nor"),
    (["verify", "--tolerance", "nan", "folder"], "--tolerance nan should be a number in [0, 1]"),
    (["verify", "--devices", "", "folder"], "--devices '' should be a number of devices"),
    (["verify", ""], "MODEL '' is not a folder"),
    (["info", "folder"], "folder is a folder; give the file of a picture\n"),
    (["info", "pictures"], "give the file of a picture, such as pictures/0001-edited.png"),
    (["info", "none.png"], "none.png does not exist; correct the path"),
    (["sweep", "folder"], "folder is a folder; give the TOML file of a sweep\n"),
    (["sweep", "made"], "give the TOML file of a sweep, or run sega-jax sweep status made to see its progress"),
    (["sweep", "staus", "folder"], "staus is neither a file nor a command; did you mean status?"),
    (["sweep", "sweep.toml", "--rows", "0"], "--rows 0 should be at least 1"),
    (["sweep", "sweep.toml", "--out", ""], "Invalid value for '--out': it is empty"),
    (["sweep", "sweep.toml", "--worker", ""], "--worker '' should be the worker's number"),
    (["sweep", "steps.toml"], "steps.toml: call: steps=0 should be at least 1"),
    (["sweep", "scheduler.toml"], "scheduler.toml: call: scheduler='Foo' is neither a folder nor"),
    (["sweep", "revision.toml"], "revision='a' applies only to the hub"),
]


@pytest.mark.parametrize(("words", "message"), MESSAGES)
def test_messages_name_the_options(words, message):
    result = CliRunner().invoke(main, words)
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit)
    assert message in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["folder", "out", "--tokenizer", "x"], "--tokenizer applies only to single files"),
        (["file.ckpt", "out", "--variant", "fp16"], "--variant fp16 cannot be used"),
        (["", "out"], "SOURCE '' is not a folder"),
        (["folder", "out", "--typ", "x"], "No such option '--typ'"),
    ],
)
def test_the_converter_names_its_own_options(words, message):
    result = CliRunner().invoke(convert, words)
    assert result.exit_code != 0
    assert message in result.output
