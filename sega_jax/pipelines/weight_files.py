"""Finds a network's weight files in a folder or on the hub, in the best format available."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sega_jax.method.checks import did_you_mean
from sega_jax.method.naming import assignment, name_of
from sega_jax.text.files import CheckpointError
from sega_jax.weights import flax_msgpack, hub, orbax_reader, torch_pickle
from sega_jax.weights.flax_msgpack import FlaxTensors
from sega_jax.weights.orbax_reader import OrbaxTensors
from sega_jax.weights.tensors import Tensors, Weights, has_weights, in_words, variants, weight_files
from sega_jax.weights.torch_pickle import PickledTensors

Rename = Callable[[str], str | None]


class Form(NamedTuple):
    """A format of weight files. The `stem` is the safetensors file's name without its extension."""

    variants: Callable[[Path, str], list[str]]  # (folder, stem) -> existing variants; "" for files without a variant
    files: Callable[[str, str | None], Sequence[str]]  # (stem, variant) -> file name patterns
    has: Callable[[Path, str, str | None], bool]  # (folder, stem, variant) -> whether such files exist
    open: Callable[[Path, str, str | None, Rename], Weights]  # (folder, stem, variant, rename) -> weights


SAFETENSORS = Form(variants, weight_files, has_weights, Tensors)
ORBAX = Form(
    lambda folder, stem: [],
    lambda stem, variant: orbax_reader.FILES,
    lambda folder, stem, variant: (folder / orbax_reader.ARRAYS).is_dir(),
    lambda folder, stem, variant, rename: OrbaxTensors(folder, rename),
)
FLAX = Form(
    lambda folder, stem: variants(folder, flax_msgpack.flax_stem(stem), FlaxTensors.ending),
    flax_msgpack.files,
    lambda folder, stem, variant: has_weights(folder, flax_msgpack.flax_stem(stem), variant, FlaxTensors.ending),
    FlaxTensors,
)
PICKLES = Form(
    lambda folder, stem: variants(folder, torch_pickle.stem(stem), "bin"),
    lambda stem, variant: weight_files(torch_pickle.stem(stem), variant, "bin"),
    lambda folder, stem, variant: has_weights(folder, torch_pickle.stem(stem), variant, "bin"),
    lambda folder, stem, variant, rename: PickledTensors(folder, torch_pickle.stem(stem), variant, rename),
)


_FORMS = (SAFETENSORS, FLAX, PICKLES)  # the formats that have variants


class Choice(NamedTuple):
    """A format of weight files, and a variant (or None for files without a variant)."""

    form: Form
    variant: str | None = None


def _choices(variant: str | None) -> list[list[Choice]]:
    """Returns all choices, best first. Files for all choices in an inner list are fetched together."""
    plain = [[Choice(ORBAX), Choice(SAFETENSORS)], [Choice(FLAX)], [Choice(PICKLES)]]
    return plain if variant is None else [[Choice(form, variant)] for form in _FORMS] + plain


def find_weights(folder: Path, stem: str, variant: str | None = None) -> Choice | None:
    """Returns the best choice among a folder's weight files; None if the folder has none."""
    every = [choice for together in _choices(variant) for choice in together]
    return next((choice for choice in every if choice.form.has(folder, stem, choice.variant)), None)


def weight_paths(folder: Path, stem: str, variant: str | None = None) -> list[Path]:
    """Lists the files that `open_weights` reads."""
    choice = find_weights(folder, stem, variant)
    if choice is None:
        return []
    patterns = [f"{orbax_reader.ARRAYS}/**/*"] if choice.form is ORBAX else choice.form.files(stem, choice.variant)
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def open_weights(folder: Path, stem: str, variant: str | None, rename: Rename) -> Weights:
    """Opens a folder's weight files in the best available format.

    Args:
        folder: The network's folder.
        stem: The name of the safetensors file without its extension.
        variant: The preferred variant; files without a variant are used if it does not exist.
        rename: As for `sega_jax.weights.tensors.Tensors`.

    Raises:
        CheckpointError: The weights are missing or broken.
    """
    choice = find_weights(folder, stem, variant)
    if choice is None:
        # Opening this format raises an error that lists the existing variants.
        forms = [form for form in _FORMS if form.variants(folder, stem)]
        choice = Choice(forms[0] if forms else SAFETENSORS, variant)
    return choice.form.open(folder, stem, choice.variant, rename)


def fetch_weights(
    repository: str, commit: str | None, stems: Mapping[str, str], variant: str | None, others: Sequence[str] = ()
) -> Path:
    """Fetches the weights of networks, each in the best format that the repository has.

    Args:
        repository: The name of the repository, "owner/name".
        commit: The branch, tag or commit; None means the default branch.
        stems: {folder in the repository: stem of its weight files}; "" means the repository's root.
        variant: The preferred variant; files without a variant are used if it does not exist.
        others: Patterns for further files to fetch.

    Returns:
        The local folder of the repository's snapshot.

    Raises:
        CheckpointError: A network has no weights, or they cannot be fetched.
    """
    lacking = dict(stems)
    for number, together in enumerate(_choices(variant)):
        patterns = [
            f"{part}/{name}".removeprefix("/")
            for part, stem in lacking.items()
            for choice in together
            for name in choice.form.files(stem, choice.variant)
        ]
        folder = hub.fetch(repository, [*(others if number == 0 else ()), *patterns], commit)
        # Errors about missing folders are raised later, when the checkpoint's parts are checked.
        lacking = {
            part: stem
            for part, stem in lacking.items()
            if (folder / part).is_dir() and not find_weights(folder / part, stem, variant)
        }
        if not lacking:
            return folder
    part, stem = next(iter(lacking.items()))
    name = f"{part}/{stem}.safetensors".removeprefix("/")
    raise CheckpointError(
        f"{repository} has no {name}, nor these weights as .bin or .msgpack files or in sega-jax-convert's"
        f" format; if it has variants, give one, such as {assignment('variant', 'fp16')}"
    )


def check_variant(name: str | Path, folders: Mapping[str, Path], stems: Mapping[str, str], variant: str) -> str | None:
    """Checks which networks have weights in a given variant.

    Args:
        name: The name of the checkpoint, to show in messages.
        folders, stems: {network: folder of its weight files} and {network: stem of its weight files}.
        variant: The variant.

    Returns:
        A warning if only some networks have the variant, otherwise None.

    Raises:
        CheckpointError: No network has the variant.
    """
    chosen = {part: find_weights(folder, stems[part], variant) for part, folder in folders.items()}
    if not any(choice is not None and choice.variant == variant for choice in chosen.values()):
        places = [(folder, stems[part]) for part, folder in folders.items()]
        known = {one for folder, stem in places for form in _FORMS for one in form.variants(folder, stem)}
        remedy = f"it has weights for {in_words(sorted(known))}" if any(known) else f"leave out {name_of('variant')}"
        guess = did_you_mean(variant, filter(None, known))
        raise CheckpointError(f"{name} has no weights of the variant {variant!r}; {remedy}{guess}")
    plain = [part for part, choice in chosen.items() if choice is not None and choice.variant is None]
    if not plain:
        return None
    return f"{name} has no weights of the variant {variant!r} for {', '.join(plain)}; using those without a variant"
