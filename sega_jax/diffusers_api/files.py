"""diffusers' ways to files beside a checkpoint's folder: single files, LoRAs, textual inversion."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax

from sega_jax.diffusers_api.base import LatentFace
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.loading import load
from sega_jax.systems import registry
from sega_jax.weights import hub
from sega_jax.weights.lora import merged, read
from sega_jax.weights.pull import CheckpointError
from sega_jax.weights.textual_inversion import add_words

F = TypeVar("F", bound="FilesFace")

_LORA = ("pytorch_lora_weights.safetensors",)
_INVERSION = ("learned_embeds.safetensors", "learned_embeds.bin")


class Adapters(NamedTuple):
    """LoRAs in a pipeline's networks."""

    before: Any  # the networks without them
    after: Any
    files: dict[str, tuple[Path, float]]  # and their weights, by name


class FilesFace(LatentFace):
    """A face of Stable Diffusion, also XL, whose files it takes."""

    _adapters: Adapters | None = None

    @classmethod
    def from_single_file(
        cls: type[F],
        pretrained_model_link_or_path: str | Path,
        *,
        config: str | Path | None = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        devices: Sequence[jax.Device] | Devices | None = None,
        attention: str | None = None,
        **components: Any,
    ) -> F:
        """From a single file (.safetensors or .ckpt) on this machine; see `sega_jax.load`, which takes `components`
        (text_encoder, unet, vae, tokenizer, scheduler, prediction_type, ema). `torch_dtype` is another name of `dtype`
        and may be torch's own."""
        dtype = torch_dtype if dtype is None else dtype
        options = {"config": config, "dtype": dtype, "devices": devices, "attention": attention}
        pipeline = load(pretrained_model_link_or_path, **options, **components)
        if (kind := registry.of(pipeline.models)) not in cls._kinds:
            raise CheckpointError(f"{pretrained_model_link_or_path} is {kind.name}, expected {cls._expected()}")
        return cls.from_pipe(pipeline)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path,
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        revision: str | None = None,
    ) -> None:
        """Merges a LoRA into the weights, with weight 1 until `set_adapters` changes it; see `sega_jax.merge_lora`.

        Args:
            pretrained_model_name_or_path_or_dict: a safetensors file, or a folder or a repository on the hub with one.
            adapter_name: for `set_adapters`, "default_0", "default_1", ... otherwise.
            weight_name: of the file in a folder.
            revision: of a repository.

        Raises:
            ValueError: the name is taken.
            As `sega_jax.merge_lora`.
        """
        files = self._loaded()
        name = f"default_{len(files)}" if adapter_name is None else adapter_name
        if name in files:
            raise ValueError(f"adapter_name={name!r} is taken; give another, or unload_lora_weights() first")
        path = _file(pretrained_model_name_or_path_or_dict, weight_name, _LORA, revision)
        self._merge({**files, name: (path, 1.0)})

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
        """Which LoRAs are merged, with which weights, one for all or one each; 1 for None.

        Raises:
            ValueError: a name that is not loaded, or another number of weights.
        """
        files = self._loaded()
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        given = list(adapter_weights) if isinstance(adapter_weights, Sequence) else [adapter_weights] * len(names)
        if len(given) != len(names):
            raise ValueError(f"adapter_weights={adapter_weights!r} should be one for all of {names}, or one each")
        if unknown := [name for name in names if name not in files]:
            raise ValueError(f"adapter_names has {unknown[0]!r}, loaded are {', '.join(files) or 'none'}")
        weights = {name: 1.0 if one is None else one for name, one in zip(names, given, strict=True)}
        self._merge({name: (path, weights.get(name, 0.0)) for name, (path, _) in files.items()})

    def get_active_adapters(self) -> list[str]:
        """The names of the LoRAs that are merged with a weight other than 0."""
        return [name for name, (_, weight) in self._loaded().items() if weight]

    def fuse_lora(self, lora_scale: float = 1.0) -> None:
        """Merges the LoRAs for good, their weights times this."""
        self._merge({name: (path, weight * lora_scale) for name, (path, weight) in self._loaded().items()})
        self._adapters = None

    def unload_lora_weights(self) -> None:
        """Gives back the weights of before the first `load_lora_weights`."""
        if self._loaded():
            self.pipeline.models = self._adapters.before
        self._adapters = None

    def _loaded(self) -> dict[str, tuple[Path, float]]:
        """LoRAs in the networks that there are now."""
        if self._adapters is None or self._adapters.after is not self.pipeline.models:
            return {}
        return self._adapters.files

    def _merge(self, files: dict[str, tuple[Path, float]]) -> None:
        before = self._adapters.before if self._loaded() else self.pipeline.models
        # All at once: the sum is taken in float32 and rounded to the weights' dtype a single time.
        changes = [change for path, weight in files.values() if weight for change in read(before, {path: weight})]
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
        """Adds words; see `sega_jax.add_words`.

        Args:
            pretrained_model_name_or_path: a .safetensors, .bin or .pt file, or a folder or a repository on the hub with
                learned_embeds.safetensors or learned_embeds.bin; or several.
            token: the word, or one each; None is the file's own.
            weight_name: of the file in a folder.
            revision: of a repository.

        Raises:
            ValueError: another number of words than of files.
            As `sega_jax.add_words`.
        """
        one = isinstance(pretrained_model_name_or_path, str | os.PathLike)
        sources = [pretrained_model_name_or_path] if one else list(pretrained_model_name_or_path)
        words = [token] * len(sources) if token is None or isinstance(token, str) else list(token)
        if len(words) != len(sources) or (len(sources) > 1 and isinstance(token, str)):
            raise ValueError(f"token={token!r} should be a word for each of {len(sources)} files, or None")
        models, tokenizer = self.pipeline.models, self.pipeline.tokenizer
        for source, word in zip(sources, words, strict=True):
            path = _file(source, weight_name, _INVERSION, revision)
            models, tokenizer = add_words(models, tokenizer, path if word is None else {word: path})
        self.pipeline.models, self.pipeline.tokenizer = models, tokenizer


def _file(source: Any, name: str | None, usual: Sequence[str], revision: str | None) -> Path:
    """A file itself, or in a folder or a repository.

    Raises:
        TypeError, FileNotFoundError, CheckpointError: there is none.
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"{type(source).__name__} should be the path of a file or a folder, or owner/name on the hub")
    path, names = Path(os.path.expanduser(source)), list(usual) if name is None else [name]
    if not path.exists() and hub.is_id(source):
        path = hub.fetch(source, names, revision)
    if path.is_file():
        return path
    found = [path / one for one in names if (path / one).is_file()]
    if not found:
        raise FileNotFoundError(f"{path} has no {' and no '.join(names)}; give the file, or weight_name=")
    return found[0]
