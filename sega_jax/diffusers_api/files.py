"""diffusers' methods for LoRAs and textual inversion."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sega_jax.diffusers_api.additions import Additions, Lora
from sega_jax.diffusers_api.base import UNetPipeline
from sega_jax.diffusers_api.options import hub_options
from sega_jax.method.checks import brief, check_float
from sega_jax.pipelines.adapters import new_words
from sega_jax.weights import hub, lora_files

# The file names that diffusers writes.
_LORA = "pytorch_lora_weights.safetensors"
_INVERSION = ("learned_embeds.safetensors", "learned_embeds.bin")


class LoraPipeline(UNetPipeline):
    """A pipeline that supports LoRAs.

    LoRAs are merged into the weights. The original networks stay in memory, so that LoRAs can be removed again.
    """

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path,
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        hotswap: bool = False,
        **options: Any,
    ) -> None:
        """Merges a LoRA into the networks with weight 1; see `sega_jax.merge_lora`.

        As in diffusers, LoRAs that were loaded earlier get weight 0 in the networks that the new LoRA changes. Use
        `set_adapters` to change the weights.

        Args:
            pretrained_model_name_or_path_or_dict: a LoRA file, or a folder or hub repository that contains one.
            adapter_name: a name for `set_adapters`. None means "default_0", "default_1", ...
            weight_name: the file's name in the folder or repository. None means the default name in diffusers or peft,
                or the only weight file.
            revision: the branch, tag or commit of the repository.
            subfolder: the subfolder that contains the file, inside the folder or repository.
            hotswap: whether to replace the loaded LoRA named `adapter_name`, keeping its weight.
            options: diffusers' options for the hub, such as `cache_dir`, and options that have no effect here.

        Raises:
            ValueError: `adapter_name` is already in use, or `hotswap` is set and `adapter_name` is not loaded.
            Others: as for `sega_jax.merge_lora`.
        """
        with hub_options("load_lora_weights", options):
            path = _lora_file(pretrained_model_name_or_path_or_dict, weight_name, revision, subfolder)
        additions = self._additions()
        name = f"default_{len(additions.all_loras)}" if adapter_name is None else adapter_name
        if hotswap and name not in additions.loras:
            raise ValueError(
                f"adapter_name={name!r} is not loaded, so hotswap=True has nothing to replace; leave hotswap out"
            )
        if name in additions.all_loras and not hotswap:
            raise ValueError(
                f"adapter_name={name!r} is already loaded; choose a different name, or call unload_lora_weights() first"
            )
        new, loras = Lora(path), dict(additions.loras)
        if hotswap:
            new = dataclasses.replace(additions.loras[name], path=path)
        else:
            changed = new.networks(additions.models)
            loras = {other: lora.without_networks(additions.models, changed) for other, lora in additions.loras.items()}
        self._apply(dataclasses.replace(additions, loras={**loras, name: new}))

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
        """Merges the named LoRAs and gives all others weight 0.

        Args:
            adapter_names: the name of a loaded LoRA, or several names.
            adapter_weights: one weight for all LoRAs, or one for each; None means 1. A weight is a number or {network:
                number}, such as {"unet": 0.8}. Networks that this mapping omits have weight 1.

        Raises:
            TypeError, ValueError: `adapter_names` includes a LoRA that is fused or not loaded, the number of weights is
                wrong, or a weight is not a number.
        """
        additions = self._additions()
        names = self._names(additions, adapter_names)
        several = isinstance(adapter_weights, Sequence) and not isinstance(adapter_weights, str)
        weights = list(adapter_weights) if several else [adapter_weights] * len(names)
        if len(weights) != len(names):
            raise ValueError(
                f"adapter_weights={adapter_weights!r} should be one weight for all of {names}, or one for each"
            )
        if fused := [name for name in names if name in additions.fused]:
            raise ValueError(f"the LoRA {fused[0]!r} in adapter_names is fused; call unfuse_lora() first")
        active = {name: _weight(weight) for name, weight in zip(names, weights, strict=True)}
        loras = {name: Lora(lora.path, active.get(name, 0.0)) for name, lora in additions.loras.items()}
        self._apply(dataclasses.replace(additions, loras=loras, enabled=True))

    def _names(self, additions: Additions, names: str | Sequence[str]) -> list[str]:
        names = [names] if isinstance(names, str) else list(names)
        if unknown := [name for name in names if name not in additions.all_loras]:
            raise ValueError(
                f"the LoRA {unknown[0]!r} in adapter_names is not loaded; loaded LoRAs:"
                f" {', '.join(additions.all_loras) or 'none'}"
            )
        return names

    def get_active_adapters(self) -> list[str]:
        """Returns the names of the merged LoRAs whose weight is not 0."""
        additions = self._additions()
        loras = {
            **{name: fused for name, (_, fused) in additions.fused.items()},
            **(additions.loras if additions.enabled else {}),
        }
        return [name for name, lora in loras.items() if lora.is_active]

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Returns, for each network, the names of the loaded LoRAs that change it."""
        additions, names_by_network = self._additions(), dict[str, list[str]]()
        for name, lora in additions.all_loras.items():
            for network in lora.networks(additions.models):
                names_by_network.setdefault(network, []).append(name)
        return names_by_network

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Removes the named LoRAs.

        Raises:
            ValueError: `adapter_names` includes a LoRA that is not loaded.
        """
        additions = self._additions()
        deleted = self._names(additions, adapter_names)
        loras = {name: lora for name, lora in additions.loras.items() if name not in deleted}
        fused = {name: versions for name, versions in additions.fused.items() if name not in deleted}
        self._apply(dataclasses.replace(additions, loras=loras, fused=fused))

    def enable_lora(self) -> None:
        """Merges the loaded LoRAs again after `disable_lora`."""
        self._apply(dataclasses.replace(self._additions(), enabled=True))

    def disable_lora(self) -> None:
        """Removes the loaded LoRAs from the weights until `enable_lora` is called. Fused LoRAs stay."""
        self._apply(dataclasses.replace(self._additions(), enabled=False))

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        """Fuses LoRAs into the weights. `unload_lora_weights` keeps fused LoRAs; `unfuse_lora` undoes the fusing.

        Args:
            components: the networks to fuse LoRAs into. They must include every network that the LoRAs change.
            lora_scale: multiplies the weights of the LoRAs.
            safe_fusing: ignored. Weights that are not finite always raise an error.
            adapter_names: the LoRAs to fuse. None means all active ones.
            options: ignored.

        Raises:
            TypeError, ValueError: `lora_scale` is not a number, `adapter_names` includes a LoRA that is not loaded, or
                `components` lacks a network that the LoRAs change.
        """
        del safe_fusing, options
        additions = self._additions()
        names = self._names(additions, self.get_active_adapters() if adapter_names is None else adapter_names)
        if components is not None:
            missing = [
                network
                for name in names
                for network in additions.all_loras[name].networks(additions.models)
                if network not in components
            ]
            if missing:
                raise ValueError(
                    f"components={components!r} does not include {missing[0]!r}, which the LoRAs also change; leave"
                    " components out to fuse all networks"
                )
        self._apply(additions.fuse(names, check_float("lora_scale", lora_scale)))

    def unfuse_lora(self, *args: Any, **options: Any) -> None:
        """Undoes `fuse_lora`. The LoRAs stay loaded, with the weights that they had before fusing.

        As in diffusers, this has no effect after `unload_lora_weights`.
        """
        del args, options
        additions = self._additions()
        if additions.fused:
            self._apply(additions.unfuse())

    def unload_lora_weights(self, *args: Any, **options: Any) -> None:
        """Removes all unfused LoRAs from the weights. Fused LoRAs become a permanent part of the weights."""
        del args, options
        additions = self._additions()
        if not additions.loras and additions.fused and not additions.words:
            # The current networks become the originals.
            self._set_additions(Additions(self.pipeline.models, additions.tokenizer))
        elif additions.all_loras:
            self._apply(additions.unload())


class LatentPipeline(LoraPipeline):
    """A latent diffusion pipeline, which has an autoencoder and supports textual inversion."""

    @property
    def vae(self) -> Any:
        return self.pipeline.models.vae

    @vae.setter
    def vae(self, value: Any) -> None:
        self._replace_network("vae", value)

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: str | Path | Sequence[str | Path],
        token: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        text_encoder: Any = None,
        *,
        weight_name: str | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        **options: Any,
    ) -> None:
        """Adds new words to the tokenizer and the text encoders; see `sega_jax.add_words`.

        Args:
            pretrained_model_name_or_path: a .safetensors, .bin or .pt file, or a folder or hub repository that contains
                learned_embeds.safetensors or learned_embeds.bin; or a list of these.
            token: the new word, or a list with one word for each file. None means the word stored in the file.
            tokenizer, text_encoder: ignored.
            weight_name: the file's name in the folder or repository.
            revision: the branch, tag or commit of the repository.
            subfolder: the subfolder that contains the file, inside the folder or repository.
            options: diffusers' options for the hub, such as `cache_dir`, and options that have no effect here.

        Raises:
            TypeError, ValueError: the numbers of words and files differ, or tensors are given instead of a file.
            Others: as for `sega_jax.add_words`.
        """
        del tokenizer, text_encoder
        path_or_paths = pretrained_model_name_or_path
        sources = [path_or_paths] if isinstance(path_or_paths, str | os.PathLike | Mapping) else list(path_or_paths)
        words = [token] * len(sources) if token is None or isinstance(token, str) else list(token)
        if len(words) != len(sources) or (len(sources) > 1 and isinstance(token, str)):
            raise ValueError(
                f"token={token!r} should be a list with one word for each of the {len(sources)} files, or None"
            )
        additions = self._additions()
        with hub_options("load_textual_inversion", options):
            files = [_file(source, weight_name, _INVERSION, revision, subfolder) for source in sources]
        named_files = [(word or self._word_in_file(file), file) for word, file in zip(words, files, strict=True)]
        self._apply(dataclasses.replace(additions, words=(*additions.words, *named_files)))

    def _word_in_file(self, file: Path) -> str | None:
        """Returns the word that a file contains, or None if it contains several."""
        names = [word.name for word in new_words(self.pipeline.models, self.pipeline.tokenizer, file)]
        return names[0] if len(names) == 1 else None

    def unload_textual_inversion(
        self, tokens: str | Sequence[str] | None = None, tokenizer: Any = None, text_encoder: Any = None
    ) -> None:
        """Removes words that `load_textual_inversion` added.

        Args:
            tokens: the words to remove. None means all of them.
            tokenizer, text_encoder: ignored.

        Raises:
            ValueError: `tokens` includes a word that was not added.
        """
        del tokenizer, text_encoder
        additions = self._additions()
        names = [tokens] if isinstance(tokens, str) else tokens
        added = [word for word, _ in additions.words]
        if names is not None and (unknown := [name for name in names if name not in added]):
            loaded = ", ".join(word or "the words of a file" for word in added) or "none"
            raise ValueError(
                f"the word {unknown[0]!r} in tokens was not added; loaded words: {loaded}. Use the token given to"
                " load_textual_inversion, or None to remove all words"
            )
        kept = () if names is None else tuple(pair for pair in additions.words if pair[0] not in names)
        if kept != additions.words:
            self._apply(dataclasses.replace(additions, words=kept))


def _weight(value: Any) -> float | dict[str, float]:
    if not isinstance(value, Mapping):
        return 1.0 if value is None else check_float("adapter_weights", value)
    if nested := [network for network, weight in value.items() if isinstance(weight, Mapping)]:
        raise ValueError(
            f"adapter_weights: {nested[0]!r} has weights for individual blocks, which are not supported; give one"
            " number for each network"
        )
    return {network: check_float(f"adapter_weights: {network}", weight) for network, weight in value.items()}


def _lora_file(source: Any, name: str | None, revision: str | None, subfolder: str | None) -> Path:
    """Returns the local path of a LoRA file, downloading the file if it is on the hub.

    Args:
        source: the file, or a folder or hub repository.
        name: the file's name in the folder or repository. None means the default name in diffusers or peft, or the only
            weight file.
        revision: the branch, tag or commit of the repository.
        subfolder: the subfolder that contains the file, inside the folder or repository.

    Raises:
        TypeError, CheckpointError: there is no such file.
    """
    _check_path(source)
    if (address := lora_files.on_hub(source)) is not None:
        if subfolder:
            name = f"{subfolder}/{name or _LORA}"
        address = address._replace(revision=revision or address.revision, path=name or address.path)
        return lora_files.find(str(address))
    path = Path(os.path.expanduser(source)) / (subfolder or "")
    return lora_files.find(path if name is None or path.is_file() else path / name)


def _check_path(source: Any) -> None:
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"the LoRA or textual inversion {brief(source)[:40]} has type {type(source).__name__}; expected the path of"
            " a file or folder, or owner/name on the hub. Save tensors to a file first"
        )


def _file(
    source: Any, name: str | None, defaults: Sequence[str], revision: str | None, subfolder: str | None = None
) -> Path:
    """Returns the local path of a file, downloading the file if it is on the hub.

    Args:
        source: the file, or a folder or hub repository.
        name: the file's name in the folder or repository, or None.
        defaults: the file names to try, in order, if `name` is None.
        revision: the branch, tag or commit of the repository.
        subfolder: the subfolder that contains the file, inside the folder or repository.

    Raises:
        TypeError, FileNotFoundError, CheckpointError: there is no such file.
    """
    _check_path(source)
    path, names = Path(os.path.expanduser(source)), list(defaults) if name is None else [name]
    names = [f"{subfolder}/{file_name}" for file_name in names] if subfolder else names
    if not path.exists() and hub.is_id(source):
        path = hub.fetch(str(source), names, revision)
    if path.is_file():
        return path
    for file_name in names:
        if (path / file_name).is_file():
            return path / file_name
    raise FileNotFoundError(f"{path} does not contain {' or '.join(names)}; give the file's path, or weight_name=")
