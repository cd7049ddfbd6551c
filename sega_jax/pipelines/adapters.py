"""LoRAs and textual inversion, added to a pipeline's networks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sega_jax.pipelines.messages import warn
from sega_jax.systems.registry import adapters_of, lora_families, single_files, systems
from sega_jax.text.tokenizers import Tokenizer, TokenizerPair
from sega_jax.weights import lora as loras
from sega_jax.weights import textual_inversion
from sega_jax.weights.lora import Change
from sega_jax.weights.textual_inversion import Word

M = TypeVar("M", bound=NamedTuple)
T = TypeVar("T", Tokenizer, TokenizerPair)


def merge_lora(models: M, lora: str | Path | Mapping[str | Path, float]) -> M:
    """Returns a pipeline's networks with LoRAs and their relatives merged into their weights.

        pipe.models = merge_lora(pipe.models, {"style.safetensors": 0.8})

    Each weight W becomes W + sum of scale (W' - W), where W' is the weight that one LoRA alone makes: W + alpha / r up
    down, or what LoHa, LoKr, DoRA, (IA)^3, GLoRA, OFT and whole differences make of it (`sega_jax.weights.lora_forms`,
    `lora_products`). Sums are in float32 and are rounded once. The given networks do not change, so `pipe.models =
    before` undoes the merge.

    At scale 1, the result equals that of LyCORIS, peft and diffusers' `fuse_lora`, with three exceptions. diffusers
    0.42.1 loses some alphas that differ from layer to layer. LyCORIS 4.1.3 merges LoHa and LoKr with (alpha / r)^2,
    although it trains them with alpha / r, as here. At other scales, DoRA and BOFT differ: peft scales DoRA's product
    before it sets the norms, and LyCORIS scales the norms or each rotation, but here scale 0 changes nothing.

    Args:
        models: the networks of a pipeline of Stable Diffusion or another family that LoRAs change (`pipe.models`).
        lora: a file of any of these kinds (.safetensors, or .bin, .pt, .pth or .ckpt, of which nothing is run), a
            folder with one, or a name on the hub, "owner/name" or "owner/name@revision/path/to/file.safetensors", whose
            scale is 1; or {file: scale} for several. A layer without an alpha in the file has alpha r.

    Raises:
        TypeError: `models` is no such value, or `lora` is neither a path nor {path: scale}.
        ValueError: a scale is no finite number.
        CheckpointError: a file is missing or broken, has tensors of no LoRA or of no layer of these networks, does not
            fit (the error lists the first such tensors), or is of another family, which the error names; or a sum
            overflows the dtype of the weights.
    """
    return loras.merged(models, lora_changes(models, lora))


def lora_changes(models: Any, lora: str | Path | Mapping[str | Path, float]) -> list[Change]:
    """Reads the differences that `merge_lora` adds, for networks with or without values.

    `sega_jax.weights.lora.merged` adds them.

    Raises:
        TypeError, ValueError, CheckpointError: as `merge_lora`.
    """
    names = adapters_of(models).lora
    if not names:
        raise TypeError(
            f"models={type(models).__name__} should be of a pipeline of Stable Diffusion or another family that LoRAs"
            " change (pipe.models)"
        )
    networks = {part: network for part, network in models._asdict().items() if part in names and network is not None}
    return loras.read(networks, lora, names, single_files(), lora_families(models), warn)


def add_words(models: M, tokenizer: T, words: str | Path | Mapping[str, str | Path]) -> tuple[M, T]:
    """Returns a pipeline's networks and tokenizer with new words of textual inversion.

        pipe.models, pipe.tokenizer = add_words(pipe.models, pipe.tokenizer, {"<cat-toy>": "cat.safetensors"})

    The given networks and tokenizer do not change. Tokens and vectors are the same as with diffusers'
    `load_textual_inversion`. A word with several vectors becomes the tokens `<cat-toy>`, `<cat-toy>_1`, ..., although
    prompts and concepts contain it once. As in diffusers, Stable Diffusion XL takes its pooled text at the new word if
    the config of its second text encoder makes it look for the token of the largest number (`eos_token_id` 2, as
    published).

    Args:
        models, tokenizer: the networks and tokenizer of a pipeline of Stable Diffusion (`pipe.models`,
            `pipe.tokenizer`).
        words: {word: file}, or one file that names its word. Files are .safetensors, .bin or .pt; reading them runs no
            code that they contain.

    Raises:
        TypeError: `models` or `tokenizer` is no such value, or `words` is neither a path nor {word: path}.
        ValueError: the tokenizer has a word already, or a word contains spaces or special tokens.
        CheckpointError: a file is missing, broken, hostile, of another kind, or made for other text encoders.
    """
    return textual_inversion.added(models, tokenizer, new_words(models, tokenizer, words))


def with_adapters(models: M, tokenizer: Any, lora: Any = None, words: Any = None) -> tuple[M, Any]:
    """Returns a pipeline's networks and tokenizer with LoRAs and new words, as `sega_jax.load` adds them; None for
    none.

    Raises:
        TypeError, ValueError, CheckpointError: as `merge_lora` and `add_words`.
    """
    changes = [] if lora is None else lora_changes(models, lora)
    new = [] if words is None else new_words(models, tokenizer, words)
    return textual_inversion.added(loras.merged(models, changes), tokenizer, new)


def extended_tokenizer(models: Any, tokenizer: Any, words: str | Path | Mapping[str, str | Path]) -> Any:
    """Returns a tokenizer with the words that `add_words` adds, for networks with or without values.

    Raises:
        TypeError, ValueError, CheckpointError: as `add_words`.
    """
    return textual_inversion.extended_tokenizer(tokenizer, new_words(models, tokenizer, words))[0]


def new_words(models: Any, tokenizer: Any, words: str | Path | Mapping[str, str | Path]) -> list[Word]:
    """Reads the words that `add_words` adds, for networks with or without values.

    `sega_jax.weights.textual_inversion.added` adds them.

    Raises:
        TypeError, ValueError, CheckpointError: as `add_words`.
    """
    encoders = adapters_of(models).words
    if encoders is None or not isinstance(tokenizer, Tokenizer | TokenizerPair):
        raise TypeError(
            f"models={type(models).__name__} and tokenizer={type(tokenizer).__name__} should be of a pipeline of Stable"
            " Diffusion (pipe.models, pipe.tokenizer)"
        )
    networks = {part: models._asdict()[part] for part in encoders.keys.values()}
    return textual_inversion.read(networks, tokenizer, words, text_encoders())


def text_encoders() -> tuple[textual_inversion.TextEncoders, ...]:
    """Returns the text encoders of all families whose words can be learnt."""
    known = [adapters.words for system in systems().values() if (adapters := system.checkpoint.adapters)]
    return tuple({words.family: words for words in known if words is not None}.values())
