"""Functions that add LoRAs and textual-inversion embeddings to a pipeline's networks."""

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
    """Merges LoRAs into the weights of a pipeline's networks.

        pipe.models = merge_lora(pipe.models, {"style.safetensors": 0.8})

    Each weight W becomes W plus the sum of scale (W' - W) over all LoRAs, where W' is the weight with a single LoRA
    applied at scale 1. For a LoRA of rank r, W' = W + alpha / r up down. LoHa, LoKr, DoRA, (IA)^3, GLoRA, OFT and full
    weight differences are also supported (`sega_jax.weights.lora_forms`, `lora_products`). The sums are computed in
    float32 and rounded only once. `models` itself does not change, so keep it if you want to undo the merge.

    At scale 1, the result is the same as with LyCORIS, peft and diffusers' `fuse_lora`, with two exceptions: diffusers
    0.42.1 loses some alphas that differ between layers, and LyCORIS 4.1.3 merges LoHa and LoKr with (alpha / r)^2,
    although it trains them with alpha / r; this function merges them with alpha / r. At other scales, DoRA and BOFT
    also differ: peft scales DoRA's product before it sets the norms, and LyCORIS scales DoRA's norms and each of BOFT's
    rotations. In this function, scale 0 leaves the weights unchanged.

    Args:
        models: The networks of a pipeline (`pipe.models`) for Stable Diffusion or another family that supports LoRAs.
        lora: A LoRA to merge at scale 1: a file, a folder with a LoRA file, or a name on the hub ("owner/name" or
            "owner/name@revision/path/to/file.safetensors"). For other scales or several LoRAs, give {file: scale} with
            finite scales. The files may be .safetensors, .bin, .pt, .pth or .ckpt; code in them is never run. If the
            file has no alpha for a layer, alpha is r.

    Returns:
        New networks of the same type, in the dtypes of `models`.

    Raises:
        TypeError: `models` does not come from a pipeline that supports LoRAs, or `lora` is neither a path nor a
            mapping.
        ValueError: A scale is not a finite number.
        CheckpointError: A file is missing or broken, contains tensors that are not part of a LoRA or do not fit any
            layer of the networks, has tensors of the wrong shape (the message lists the first ones), or was trained for
            a different family (the message names it); or a sum overflows the dtype of the weights.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> from safetensors.numpy import save_file
        >>> import sega_jax
        >>> pipe = sega_jax.load()
        >>> features = pipe.models.unet.time_embedding.linear_1.kernel.shape
        >>> layer = "lora_unet_time_embedding_linear_1"
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "style.safetensors"
        >>> save_file(
        ...     {
        ...         f"{layer}.lora_down.weight": np.ones((1, features[0]), np.float32),
        ...         f"{layer}.lora_up.weight": np.ones((features[1], 1), np.float32),
        ...     },
        ...     path,
        ... )
        >>> before = pipe.models
        >>> pipe.models = sega_jax.merge_lora(before, {path: 0.8})
        >>> type(pipe.models) is type(before)
        True
    """
    return loras.merged(models, lora_changes(models, lora))


def lora_changes(models: Any, lora: str | Path | Mapping[str | Path, float]) -> list[Change]:
    """Reads the weight changes of LoRAs without applying them; `sega_jax.weights.lora.merged` applies them.

    Args:
        models: The networks, with loaded parameters or only with their shapes (`jax.ShapeDtypeStruct`).
        lora: The LoRAs, in any form that `merge_lora` accepts.

    Raises:
        TypeError, ValueError, CheckpointError: As for `merge_lora`.
    """
    names = adapters_of(models).lora
    if not names:
        raise TypeError(
            f"models={type(models).__name__} should be the networks of a pipeline (pipe.models) for Stable Diffusion or"
            " another family that supports LoRAs"
        )
    networks = {part: network for part, network in models._asdict().items() if part in names and network is not None}
    return loras.read(networks, lora, names, single_files(), lora_families(models), warn)


def add_words(models: M, tokenizer: T, words: str | Path | Mapping[str, str | Path]) -> tuple[M, T]:
    """Adds textual-inversion embeddings to a pipeline's networks and tokenizer as new words.

        pipe.models, pipe.tokenizer = add_words(pipe.models, pipe.tokenizer, {"<cat-toy>": "cat.safetensors"})

    `models` and `tokenizer` themselves do not change. The token ids and vectors are the same as with diffusers'
    `load_textual_inversion`. A word with several vectors becomes the tokens `<cat-toy>`, `<cat-toy>_1`, ...; in prompts
    and concepts, write only `<cat-toy>`. If the config of Stable Diffusion XL's second text encoder sets `eos_token_id`
    to 2, as in the published checkpoint, that encoder pools at the token with the largest id. In texts that contain a
    new word, this is the new word's token, as in diffusers.

    Args:
        models, tokenizer: The networks and tokenizer of a Stable Diffusion pipeline (`pipe.models`, `pipe.tokenizer`).
        words: {word: file}, or one file that specifies its word. The files may be .safetensors, .bin or .pt; code in
            them is never run.

    Returns:
        The new networks and the new tokenizer.

    Raises:
        TypeError: `models` or `tokenizer` does not belong to a Stable Diffusion pipeline, or `words` is neither a path
            nor {word: path}.
        ValueError: The tokenizer already contains one of the words, or a word contains spaces or special tokens.
        CheckpointError: A file is missing, broken or malicious, contains no textual-inversion embeddings, or was
            trained for different text encoders.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> from safetensors.numpy import save_file
        >>> import sega_jax
        >>> pipe = sega_jax.load()
        >>> width = pipe.models.text_encoder.config.hidden_size
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "cat.safetensors"
        >>> save_file({"<cat-toy>": np.zeros((2, width), np.float32)}, path)
        >>> pipe.models, pipe.tokenizer = sega_jax.add_words(pipe.models, pipe.tokenizer, path)
        >>> pipe.encode("a <cat-toy>").states.shape
        (1, 48, 192)
    """
    return textual_inversion.added(models, tokenizer, new_words(models, tokenizer, words))


def with_adapters(models: M, tokenizer: Any, lora: Any = None, words: Any = None) -> tuple[M, Any]:
    """Adds LoRAs and new words to a pipeline's networks and tokenizer, as `sega_jax.load` does.

    Raises:
        TypeError, ValueError, CheckpointError: As for `merge_lora` and `add_words`.
    """
    changes = [] if lora is None else lora_changes(models, lora)
    new = [] if words is None else new_words(models, tokenizer, words)
    return textual_inversion.added(loras.merged(models, changes), tokenizer, new)


def extended_tokenizer(models: Any, tokenizer: Any, words: str | Path | Mapping[str, str | Path]) -> Any:
    """Returns the tokenizer that `add_words` would return, without changing the networks.

    Args:
        models: The networks, with loaded parameters or only with their shapes (`jax.ShapeDtypeStruct`).
        tokenizer, words: As for `add_words`.

    Raises:
        TypeError, ValueError, CheckpointError: As for `add_words`.
    """
    return textual_inversion.extended_tokenizer(tokenizer, new_words(models, tokenizer, words))[0]


def new_words(models: Any, tokenizer: Any, words: str | Path | Mapping[str, str | Path]) -> list[Word]:
    """Reads new words without adding them; `sega_jax.weights.textual_inversion.added` adds them.

    Args:
        models: The networks, with loaded parameters or only with their shapes (`jax.ShapeDtypeStruct`).
        tokenizer, words: As for `add_words`.

    Raises:
        TypeError, ValueError, CheckpointError: As for `add_words`.
    """
    encoders = adapters_of(models).words
    if encoders is None or not isinstance(tokenizer, Tokenizer | TokenizerPair):
        raise TypeError(
            f"models={type(models).__name__} and tokenizer={type(tokenizer).__name__} should come from a Stable"
            " Diffusion pipeline (pipe.models, pipe.tokenizer)"
        )
    networks = {part: models._asdict()[part] for part in encoders.keys.values()}
    return textual_inversion.read(networks, tokenizer, words, text_encoders())


def text_encoders() -> tuple[textual_inversion.TextEncoders, ...]:
    """Returns the text encoders of all families that support textual inversion."""
    supported = [adapters.words for system in systems().values() if (adapters := system.checkpoint.adapters)]
    return tuple({words.family: words for words in supported if words is not None}.values())
