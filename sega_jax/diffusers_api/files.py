"""LoRAs and textual inversion by diffusers' names."""

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

# The name that diffusers gives a LoRA.
_LORA = "pytorch_lora_weights.safetensors"
_INVERSION = ("learned_embeds.safetensors", "learned_embeds.bin")


class LoraPipeline(UNetPipeline):
    """A pipeline whose networks LoRAs change. They are merged into the weights, and the networks without them are
    kept until they are fused."""

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
        """Merges a LoRA into the networks, with weight 1 until `set_adapters` changes it; see `sega_jax.merge_lora`.

        As in diffusers, the LoRAs that were loaded before get weight 0 in the networks that it changes.

        Args:
            pretrained_model_name_or_path_or_dict: a file, or a folder or hub repository that has one.
            adapter_name: its name for `set_adapters`; None is "default_0", "default_1", ...
            weight_name: the name of the file in the folder or repository; None is the name that diffusers or peft give
                it, or the only file with weights.
            revision: the repository's branch, tag or commit.
            subfolder: the folder of the file in the folder or repository.
            hotswap: whether it replaces the LoRA of this name.
            options: options of diffusers for the hub, such as `cache_dir`, and others without an effect here.

        Raises:
            ValueError: the name is taken, or with `hotswap` not loaded.
            Others as `sega_jax.merge_lora`.
        """
        with hub_options("load_lora_weights", options):
            path = _lora_file(pretrained_model_name_or_path_or_dict, weight_name, revision, subfolder)
        now = self._additions()
        name = f"default_{len(now.all_loras)}" if adapter_name is None else adapter_name
        if hotswap and name not in now.loras:
            raise ValueError(
                f"adapter_name={name!r} is not loaded, so hotswap=True has nothing to replace; leave it out"
            )
        if name in now.all_loras and not hotswap:
            raise ValueError(f"adapter_name={name!r} is taken; give another, or unload_lora_weights() first")
        new, loras = Lora(path), dict(now.loras)
        if hotswap:
            new = dataclasses.replace(now.loras[name], path=path)
        else:
            parts = new.networks(now.models)
            loras = {other: lora.without_networks(now.models, parts) for other, lora in now.loras.items()}
        self._apply(dataclasses.replace(now, loras={**loras, name: new}))

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
        """Merges these of the loaded LoRAs, and no others.

        Args:
            adapter_names: the name of a LoRA, or several names.
            adapter_weights: a weight for all of them, or one for each; None is 1. A weight is a number, or numbers by
                the names of the networks, such as {"unet": 0.8}, with 1 for the others.

        Raises:
            TypeError, ValueError: a name is not loaded, the number of weights is wrong, or one is no number.
        """
        now = self._additions()
        names = self._names(now, adapter_names)
        several = isinstance(adapter_weights, Sequence) and not isinstance(adapter_weights, str)
        weights = list(adapter_weights) if several else [adapter_weights] * len(names)
        if len(weights) != len(names):
            raise ValueError(f"adapter_weights={adapter_weights!r} should be one for all of {names}, or one for each")
        if fused := [name for name in names if name in now.fused]:
            raise ValueError(f"adapter_names has {fused[0]!r}, which is fused; call unfuse_lora() first")
        active = {name: _weight(weight) for name, weight in zip(names, weights, strict=True)}
        loras = {name: Lora(lora.path, active.get(name, 0.0)) for name, lora in now.loras.items()}
        self._apply(dataclasses.replace(now, loras=loras, enabled=True))

    def _names(self, now: Additions, names: str | Sequence[str]) -> list[str]:
        names = [names] if isinstance(names, str) else list(names)
        if unknown := [name for name in names if name not in now.all_loras]:
            raise ValueError(f"adapter_names has {unknown[0]!r}, loaded are {', '.join(now.all_loras) or 'none'}")
        return names

    def get_active_adapters(self) -> list[str]:
        """Returns the names of the LoRAs that are merged with a weight other than 0."""
        now = self._additions()
        loras = {**{name: fused for name, (_, fused) in now.fused.items()}, **(now.loras if now.enabled else {})}
        return [name for name, lora in loras.items() if lora.is_active]

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Returns the names of the loaded LoRAs by the networks that they change."""
        now, found = self._additions(), dict[str, list[str]]()
        for name, lora in now.all_loras.items():
            for part in lora.networks(now.models):
                found.setdefault(part, []).append(name)
        return found

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Takes these LoRAs away.

        Raises:
            ValueError: a name is not loaded.
        """
        now = self._additions()
        gone = self._names(now, adapter_names)
        loras = {name: lora for name, lora in now.loras.items() if name not in gone}
        fused = {name: both for name, both in now.fused.items() if name not in gone}
        self._apply(dataclasses.replace(now, loras=loras, fused=fused))

    def enable_lora(self) -> None:
        """Merges the loaded LoRAs again after `disable_lora`."""
        self._apply(dataclasses.replace(self._additions(), enabled=True))

    def disable_lora(self) -> None:
        """Takes the loaded LoRAs out of the weights until `enable_lora`; fused ones stay."""
        self._apply(dataclasses.replace(self._additions(), enabled=False))

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        """Merges LoRAs permanently, with their weights multiplied by `lora_scale`, so that `unload_lora_weights` leaves
        them in. Until then, `unfuse_lora` takes them out again.

        Args:
            components: the networks; all that the LoRAs change have to be among them.
            safe_fusing: ignored; weights that are not finite are always an error.
            adapter_names: the LoRAs; None is all that are active.
            options: ignored.

        Raises:
            TypeError, ValueError: the scale is no number, or a name is not loaded.
        """
        del safe_fusing, options
        now = self._additions()
        names = self._names(now, self.get_active_adapters() if adapter_names is None else adapter_names)
        if components is not None:
            left = [
                part for name in names for part in now.all_loras[name].networks(now.models) if part not in components
            ]
            if left:
                raise ValueError(f"components={components!r} leaves {left[0]} out, which is fused too; leave it out")
        self._apply(now.fuse(names, check_float("lora_scale", lora_scale)))

    def unfuse_lora(self, *args: Any, **options: Any) -> None:
        """Takes fused LoRAs out of the weights again; they stay loaded, and are merged as `set_adapters` says. After
        `unload_lora_weights` it has no effect, as in diffusers."""
        del args, options
        now = self._additions()
        if now.fused:
            self._apply(now.unfuse())

    def unload_lora_weights(self, *args: Any, **options: Any) -> None:
        """Takes all LoRAs away, so that the weights are those from before the first `load_lora_weights`; fused ones
        stay for good."""
        del args, options
        now = self._additions()
        if not now.loras and now.fused and not now.words:
            # The networks are what is left.
            self._set_additions(Additions(self.pipeline.models, now.tokenizer))
        elif now.all_loras:
            self._apply(now.unload())


class LatentPipeline(LoraPipeline):
    """A pipeline of Stable Diffusion or SDXL, with an autoencoder and textual inversion."""

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
        """Adds words to the tokenizer and the text encoders; see `sega_jax.add_words`.

        Args:
            pretrained_model_name_or_path: a .safetensors, .bin or .pt file, or a folder or hub repository that has
                learned_embeds.safetensors or learned_embeds.bin; or several of them.
            token: the word, or one for each file; None is the file's own.
            tokenizer, text_encoder: the pipeline's own, or None.
            weight_name: the name of the file in the folder or repository.
            revision: the repository's branch, tag or commit.
            subfolder: the folder of the file in the folder or repository.
            options: options of diffusers for the hub, such as `cache_dir`, and others without an effect here.

        Raises:
            TypeError, ValueError: the numbers of words and files differ, or vectors are given in place of a file.
            Others as `sega_jax.add_words`.
        """
        del tokenizer, text_encoder
        given = pretrained_model_name_or_path
        sources = [given] if isinstance(given, str | os.PathLike | Mapping) else list(given)
        words = [token] * len(sources) if token is None or isinstance(token, str) else list(token)
        if len(words) != len(sources) or (len(sources) > 1 and isinstance(token, str)):
            raise ValueError(f"token={token!r} should be a word for each of {len(sources)} files, or None")
        now = self._additions()
        with hub_options("load_textual_inversion", options):
            files = [_file(source, weight_name, _INVERSION, revision, subfolder) for source in sources]
        named = [(word or self._own_word(file), file) for word, file in zip(words, files, strict=True)]
        self._apply(dataclasses.replace(now, words=(*now.words, *named)))

    def _own_word(self, file: Path) -> str | None:
        """Returns the word that a file names; None where it has several."""
        names = [word.name for word in new_words(self.pipeline.models, self.pipeline.tokenizer, file)]
        return names[0] if len(names) == 1 else None

    def unload_textual_inversion(
        self, tokens: str | Sequence[str] | None = None, tokenizer: Any = None, text_encoder: Any = None
    ) -> None:
        """Takes words away that `load_textual_inversion` added.

        Args:
            tokens: the words; None is all of them.
            tokenizer, text_encoder: the pipeline's own, or None.

        Raises:
            ValueError: a word was not added.
        """
        del tokenizer, text_encoder
        now = self._additions()
        names = [tokens] if isinstance(tokens, str) else tokens
        known = [word for word, _ in now.words]
        if names is not None and (unknown := [name for name in names if name not in known]):
            loaded = ", ".join(word or "a file's own word" for word in known) or "none"
            raise ValueError(
                f"tokens has {unknown[0]!r}, loaded are {loaded}; give the token that load_textual_inversion was given,"
                " or None for all words"
            )
        kept = () if names is None else tuple(pair for pair in now.words if pair[0] not in names)
        if kept != now.words:
            self._apply(dataclasses.replace(now, words=kept))


def _weight(value: Any) -> float | dict[str, float]:
    if not isinstance(value, Mapping):
        return 1.0 if value is None else check_float("adapter_weights", value)
    if nested := [part for part, weight in value.items() if isinstance(weight, Mapping)]:
        raise ValueError(
            f"adapter_weights: {nested[0]!r} has weights for blocks, which are not supported; give one number for each"
            " network"
        )
    return {part: check_float(f"adapter_weights: {part}", weight) for part, weight in value.items()}


def _lora_file(source: Any, name: str | None, revision: str | None, subfolder: str | None) -> Path:
    """Returns the file of a LoRA, which may be in a folder or hub repository and have this name there.

    Raises:
        TypeError, CheckpointError: there is no such file.
    """
    _check_path(source)
    if (asked := lora_files.on_hub(source)) is not None:
        if subfolder:
            name = f"{subfolder}/{name or _LORA}"
        asked = asked._replace(revision=revision or asked.revision, path=name or asked.path)
        return lora_files.find(str(asked))
    path = Path(os.path.expanduser(source)) / (subfolder or "")
    return lora_files.find(path if name is None or path.is_file() else path / name)


def _check_path(source: Any) -> None:
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"{type(source).__name__} should be the path of a file or a folder, or owner/name on the hub, not"
            f" {brief(source)[:40]}; tensors are read from files alone"
        )


def _file(
    source: Any, name: str | None, defaults: Sequence[str], revision: str | None, subfolder: str | None = None
) -> Path:
    """Returns a file, or the file of this name in a folder or hub repository; None is the first of the defaults.

    Raises:
        TypeError, FileNotFoundError, CheckpointError: there is no such file.
    """
    _check_path(source)
    path, names = Path(os.path.expanduser(source)), list(defaults) if name is None else [name]
    names = [f"{subfolder}/{one}" for one in names] if subfolder else names
    if not path.exists() and hub.is_id(source):
        path = hub.fetch(str(source), names, revision)
    if path.is_file():
        return path
    for one in names:
        if (path / one).is_file():
            return path / one
    raise FileNotFoundError(f"{path} has no {' and no '.join(names)}; give the file, or weight_name=")
