"""Files besides a checkpoint's folder, by diffusers' names: single files, LoRAs and textual inversion."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from sega_jax.diffusers_api.base import UNetFace
from sega_jax.nn.vae import AutoencoderKL
from sega_jax.pipelines.adapters import add_words, lora_changes
from sega_jax.weights import hub, lora_files
from sega_jax.weights.lora import merged

_INVERSION = ("learned_embeds.safetensors", "learned_embeds.bin")


class Adapters(NamedTuple):
    """The LoRAs that are merged into a pipeline's networks."""

    before: Any  # the networks without them
    after: Any  # the networks with them
    files: dict[str, tuple[Path, float]]  # their files and weights, by name


class FilesFace(UNetFace):
    """A pipeline of Stable Diffusion or SDXL, with an autoencoder, single files, LoRAs and textual inversion."""

    _adapters: Adapters | None = None

    @property
    def vae(self) -> AutoencoderKL:
        return self.pipeline.models.vae

    @vae.setter
    def vae(self, value: AutoencoderKL) -> None:
        self._exchange("vae", value)

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path: str | Path, *, torch_dtype: Any = None, **options: Any
    ) -> Self:
        """Loads a single file on this machine.

        Args:
            pretrained_model_link_or_path: a .safetensors or .ckpt file.
            torch_dtype: another name of the option `dtype`; it may be torch's own.
            options: the options of `sega_jax.load`, such as `config` and `tokenizer`.

        Raises:
            CheckpointError: the checkpoint is of another family; no weights were read.
            Others as `sega_jax.load`.
        """
        return cls._load(pretrained_model_link_or_path, torch_dtype, options)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path,
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        revision: str | None = None,
    ) -> None:
        """Merges a LoRA into the networks, with weight 1 until `set_adapters` changes it; see `sega_jax.merge_lora`.

        Args:
            pretrained_model_name_or_path_or_dict: a file, or a folder or hub repository that has one.
            adapter_name: its name for `set_adapters`; None is "default_0", "default_1", ...
            weight_name: the name of the file in the folder or repository; None is the name that diffusers or peft give
                it, or the only file with weights.
            revision: the repository's branch, tag or commit.

        Raises:
            ValueError: the name is taken.
            Others as `sega_jax.merge_lora`.
        """
        files = self._files()
        name = f"default_{len(files)}" if adapter_name is None else adapter_name
        if name in files:
            raise ValueError(f"adapter_name={name!r} is taken; give another, or unload_lora_weights() first")
        path = _lora_file(pretrained_model_name_or_path_or_dict, weight_name, revision)
        self._merge({**files, name: (path, 1.0)})

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
        """Merges these of the loaded LoRAs, and no others.

        Args:
            adapter_names: the name of a LoRA, or several names.
            adapter_weights: a weight for all of them, or one for each; None is 1.

        Raises:
            ValueError: a name is not loaded, or the number of weights is wrong.
        """
        files = self._files()
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = list(adapter_weights) if isinstance(adapter_weights, Sequence) else [adapter_weights] * len(names)
        if len(weights) != len(names):
            raise ValueError(f"adapter_weights={adapter_weights!r} should be one for all of {names}, or one for each")
        if unknown := [name for name in names if name not in files]:
            raise ValueError(f"adapter_names has {unknown[0]!r}, loaded are {', '.join(files) or 'none'}")
        active = {name: 1.0 if weight is None else weight for name, weight in zip(names, weights, strict=True)}
        self._merge({name: (path, active.get(name, 0.0)) for name, (path, _) in files.items()})

    def get_active_adapters(self) -> list[str]:
        """Returns the names of the LoRAs that are merged with a weight other than 0."""
        return [name for name, (_, weight) in self._files().items() if weight]

    def fuse_lora(self, lora_scale: float = 1.0) -> None:
        """Merges the LoRAs permanently, with their weights multiplied by `lora_scale`."""
        self._merge({name: (path, weight * lora_scale) for name, (path, weight) in self._files().items()})
        self._adapters = None

    def unload_lora_weights(self) -> None:
        """Restores the weights from before the first `load_lora_weights`."""
        if adapters := self._active():
            self.pipeline.models = adapters.before
        self._adapters = None

    def _active(self) -> Adapters | None:
        """Returns the LoRAs in the current networks; None if there are none, or if the networks were exchanged."""
        adapters = self._adapters
        return adapters if adapters is not None and adapters.after is self.pipeline.models else None

    def _files(self) -> dict[str, tuple[Path, float]]:
        adapters = self._active()
        return {} if adapters is None else adapters.files

    def _merge(self, files: dict[str, tuple[Path, float]]) -> None:
        adapters = self._active()
        before = self.pipeline.models if adapters is None else adapters.before
        # All LoRAs are added in float32 and rounded to the dtype of the weights only once.
        changes = [
            change for path, weight in files.values() if weight for change in lora_changes(before, {path: weight})
        ]
        self.pipeline.models = merged(before, changes)
        self._adapters = Adapters(before, self.pipeline.models, files)

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: str | Path | Sequence[str | Path],
        token: str | Sequence[str] | None = None,
        *,
        weight_name: str | None = None,
        revision: str | None = None,
    ) -> None:
        """Adds words to the tokenizer and the text encoders; see `sega_jax.add_words`.

        Args:
            pretrained_model_name_or_path: a .safetensors, .bin or .pt file, or a folder or hub repository that has
                learned_embeds.safetensors or learned_embeds.bin; or several of them.
            token: the word, or one for each file; None is the file's own.
            weight_name: the name of the file in the folder or repository.
            revision: the repository's branch, tag or commit.

        Raises:
            ValueError: the numbers of words and files differ.
            Others as `sega_jax.add_words`.
        """
        sources: list[str | Path]
        if isinstance(pretrained_model_name_or_path, str | os.PathLike):
            sources = [pretrained_model_name_or_path]
        else:
            sources = list(pretrained_model_name_or_path)
        words = [token] * len(sources) if token is None or isinstance(token, str) else list(token)
        if len(words) != len(sources) or (len(sources) > 1 and isinstance(token, str)):
            raise ValueError(f"token={token!r} should be a word for each of {len(sources)} files, or None")
        models, tokenizer = self.pipeline.models, self.pipeline.tokenizer
        for source, word in zip(sources, words, strict=True):
            path = _file(source, weight_name, _INVERSION, revision)
            models, tokenizer = add_words(models, tokenizer, path if word is None else {word: path})
        self.pipeline.models, self.pipeline.tokenizer = models, tokenizer


def _lora_file(source: Any, name: str | None, revision: str | None) -> Path:
    """Returns the file of a LoRA, which may be in a folder or hub repository and have this name there.

    Raises:
        TypeError, CheckpointError: there is no such file.
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"{type(source).__name__} should be the path of a file or a folder, or owner/name on the hub")
    if (asked := lora_files.on_hub(source)) is not None:
        asked = asked._replace(revision=revision or asked.revision, path=name or asked.path)
        return lora_files.find(str(asked))
    path = Path(os.path.expanduser(source))
    return lora_files.find(path if name is None or path.is_file() else path / name)


def _file(source: Any, name: str | None, defaults: Sequence[str], revision: str | None) -> Path:
    """Returns a file, or the file of this name in a folder or hub repository; None is the first of the defaults.

    Raises:
        TypeError, FileNotFoundError, CheckpointError: there is no such file.
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"{type(source).__name__} should be the path of a file or a folder, or owner/name on the hub")
    path, names = Path(os.path.expanduser(source)), list(defaults) if name is None else [name]
    if not path.exists() and hub.is_id(source):
        path = hub.fetch(str(source), names, revision)
    if path.is_file():
        return path
    for one in names:
        if (path / one).is_file():
            return path / one
    raise FileNotFoundError(f"{path} has no {' and no '.join(names)}; give the file, or weight_name=")
