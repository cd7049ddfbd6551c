"""The options of `sega-jax edit`, and its help pages: a short page, and a page with all options."""

import shlex

import click

from sega_jax.cli import adapters, animation, stages
from sega_jax.cli.concepts import setting_rows
from sega_jax.cli.options import call_options, families, load_arguments, not_empty, option
from sega_jax.method.arguments import arguments
from sega_jax.pipelines import help_pages
from sega_jax.pipelines.load_options import ADAPTERS
from sega_jax.systems.registry import in_words, starting_systems

_PROMPT = click.Option(["--prompt"], required=True, help="What the pictures show.")
_EDITS = click.Option(
    ["--edit", "edits"],
    multiple=True,
    metavar="CONCEPT",
    help='A concept to add, such as "glasses". A leading minus removes the concept, as in "-beard". May be given'
    " several times.",
)
_MODEL = click.Option(
    ["--model"],
    help="The checkpoint: a folder in diffusers layout, owner/name on the Hugging Face hub, or a single file; for a"
    " cascade, its first stage.  [default: the built-in demo model, which draws cartoon portraits]",
)
_OUT = click.Option(
    ["--out"],
    default="sega-jax-out",
    show_default=True,
    metavar="FOLDER",
    callback=not_empty,
    help="The folder for the pictures.",
)
# The options of the short page, in its order.
_COMMON = (
    *("prompt", "edits", "seed", "images_per_prompt", "model", "out", "negative_prompt", "steps", "guidance_scale"),
    *("height", "width", "image", "strength"),
)
_OF_CONCEPTS = 'Settings of a concept, as in --edit "-beard:scale=6,threshold=0.95"'
_HINT = (
    "These are the most common options. `sega-jax edit --help-all` also shows those for prompts, sampling,"
    " animations, loading checkpoints, LoRAs and cascades, and those of single families of models."
)


class EditCommand(help_pages.Command):
    """A command with the options of all registered families."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        calls = {one.name: one for one in call_options(every_default=help_pages.shows_all(ctx))}
        options = {one.name: one for one in (_PROMPT, _EDITS, _MODEL, _OUT)} | calls
        common = [options.pop(name) for name in _COMMON if name in options]
        loads = [option(one) for one in load_arguments().values()]
        own = [*common, *options.values(), *animation.options(), *loads, *adapters.options(), *stages.options()]
        return [*own, *super().get_params(ctx), help_pages.help_all_option()]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parses the command line.

        Raises:
            click.UsageError: the command line is malformed, for example because a prompt is given without --prompt.
        """
        given, words, _ = self.make_parser(ctx).parse_args(args=list(args))
        if words and "prompt" not in given and not ctx.resilient_parsing:
            raise click.UsageError(f"name the prompt with --prompt, as in --prompt {shlex.quote(' '.join(words))}", ctx)
        if words and not ctx.resilient_parsing:
            raise click.UsageError(
                f"{shlex.quote(words[0])} belongs to no option; write texts with spaces in quotation marks", ctx
            )
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the common options, the settings of concepts and, on the page with all options, the others."""
        sections = help_pages.sectioned(ctx, self.get_params(ctx), _sections())
        help_pages.write_section(formatter, "Options", sections.pop("Options"))
        help_pages.write_section(formatter, _OF_CONCEPTS, setting_rows())
        if help_pages.shows_all(ctx):
            for title, rows in sections.items():
                help_pages.write_section(formatter, title, rows)
        else:
            formatter.write_paragraph()
            formatter.write_text(_HINT)


def _sections() -> dict[str, list[str]]:
    """Returns {title: names of options} for the options that the short page omits."""
    declared = {name: (having, arguments(having[0].call)[name]) for name, having in families().items()}
    rare = {name: one for name, one in declared.items() if name not in _COMMON}
    single = {name: having[0] for name, (having, _) in rare.items() if len(having) == 1}
    shared = {name: one for name, (_, one) in rare.items() if name not in single}
    sections = {
        "How edits act": [name for name, one in shared.items() if one.of_edits],
        "How texts are read": [name for name, one in shared.items() if one.of_text],
        "Sampling": [*(name for name, one in shared.items() if not one.of_edits and not one.of_text), "scheduler"],
    }
    for name, system in single.items():
        sections.setdefault(f"Only for {system.title}", []).append(name)
    sections["Animations"] = animation.names()
    sections["Loading the checkpoint"] = [name for name in load_arguments() if name != "scheduler"]
    later = stages.later_stages()
    others = [*stages.names(), *adapters.names()]
    of_stage = {stage: [name for name in others if f"{name}_".startswith(f"{stage}_")] for stage in later}
    sections["LoRAs and textual inversions"] = list(ADAPTERS)
    first = in_words([system.title for system in starting_systems()])
    sections[f"Cascades of {first} and models that enlarge its pictures"] = list(stages.OTHERS)
    return sections | {f"In a cascade, for {system.title}": of_stage[stage] for stage, system in later.items()}
