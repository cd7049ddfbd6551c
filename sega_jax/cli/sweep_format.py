"""The part of the help page that describes the files of sweeps, and an example of such a file."""

from pathlib import Path

import sega_jax.sweep
from sega_jax.pipelines.cascade import FIRST
from sega_jax.pipelines.help_pages import Rows
from sega_jax.sweep.description import fields, stages
from sega_jax.sweep.description.sweep_file import FORMATS, MODEL_OPTIONS


def example() -> str:
    """Returns a TOML file with every table of the format, and with comments."""
    return (Path(sega_jax.sweep.__file__).parent / "example.toml").read_text("utf-8")


def sections() -> dict[str, Rows]:
    """Returns {title: (notation, explanation) of each line} for the help page."""
    later = ", ".join(stages.later_stages())
    first_later = next(iter(stages.later_stages()))
    call = ", ".join(name for name in fields.names() if name not in fields.OTHERS)
    tables = [
        (
            f'format = "{FORMATS[0]}"',
            f"The pictures' file format, above all tables: {' or '.join(FORMATS)} (lossless).",
        ),
        ("[model]", f"The checkpoint: {', '.join(MODEL_OPTIONS)}.  [default: the demo model]"),
        ("[call]", "Settings that all pictures share."),
        ("[edits.NAME]", "An edit and its settings; one table for each edit."),
        ("[grid]", "Settings with several values; every combination of these values gives a picture."),
        ("[zip]", "Settings whose values vary together, from lists of equal length; [[zip]] may be repeated."),
        ("[sample]", "Settings drawn at random: `count` draws; `key` is the seed of the draws.  [default: 0]"),
    ]
    axes = [
        ("[0, 2, 4]", "These values."),
        ("{ from = 0, count = 8 }", "The numbers 0 to 7; `step` is the distance of neighbours.  [default: 1]"),
        ('{ file = "prompts.txt" }', "The lines of a text file. Paths start from the folder of FILE."),
        ('{ glob = "photos/*.png" }', "The files that match a pattern."),
        ("{ low = 0.0, high = 0.6 }", "In [sample]: numbers from this range; whole numbers if both ends are whole."),
    ]
    names = [
        ("of a picture", f"{call}. `sega-jax edit --help-all` explains them."),
        (
            "of an edit",
            f"{', '.join(fields.edit_settings())}; outside [edits.NAME] with the name of the edit, as in NAME.scale."
            ' A cooldown may be "never". `sega-jax edit --help` explains them.',
        ),
        ("edits", 'The active edits, as in `edits = [[], ["glasses"]]`.  [default: all]'),
        ("scheduler", 'The name of a scheduler, such as "EulerDiscreteScheduler", or its folder.'),
        ("lora", 'LoRAs and their strengths, as in `lora = [{}, { "style.safetensors" = 0.5 }]`.'),
        ("textual_inversion", 'Learned words and their files, as in `[{ "<cat-toy>" = "cat.safetensors" }]`.'),
        (
            "of a cascade",
            f"Its later stages are {later}. [model] names their checkpoints, and their settings begin with the stage,"
            f' as in {first_later}.steps. `edited` lists the stages in which the edits act.  [default: ["{FIRST}"]]',
        ),
    ]
    return {
        "FILE is in TOML (every part may be left out, but a prompt is needed)": tables,
        "Several values in [grid], [zip] and [sample]": axes,
        "Names of settings": names,
    }
