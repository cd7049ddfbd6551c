"""diffusers' classes of networks, which load one network to take the place of a checkpoint's."""

import os
from pathlib import Path
from typing import Any

from sega_jax.diffusers_api.options import hub_options
from sega_jax.diffusers_api.torch_values import devices_of, one_dtype
from sega_jax.nn.unet import UNet2DConditionModel as UNet
from sega_jax.nn.unet import UNetConfig
from sega_jax.nn.vae import AutoencoderConfig
from sega_jax.nn.vae import AutoencoderKL as Autoencoder
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.load_options import pick_attention, pick_dtype
from sega_jax.pipelines.loading import filled
from sega_jax.pipelines.sources import open_weights
from sega_jax.systems.base import Network
from sega_jax.weights import hub, orbax_reader
from sega_jax.weights.pull import CheckpointError, read_json, weight_files

_NETWORKS = {
    "AutoencoderKL": Network(Autoencoder, AutoencoderConfig),
    "UNet2DConditionModel": Network(UNet, UNetConfig),
}


class AutoModel:
    """Loads a network of a class that its config.json names."""

    _name: str | None = None  # of the one class that it takes; None for any

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        subfolder: str | None = None,
        torch_dtype: Any = None,
        dtype: Any = None,
        variant: str | None = None,
        revision: str | None = None,
        device_map: Any = None,
        **options: Any,
    ) -> Any:
        """Loads a network, for `vae=` or `unet=` of a pipeline.

        Args:
            pretrained_model_name_or_path: its folder, or "owner/name" on the hub.
            subfolder: the folder in it, such as "vae".
            torch_dtype, dtype, variant, revision: as of `sega_jax.load`.
            device_map: as the device of a pipeline's `to`.
            options: options of the hub, and others without an effect here.

        Raises:
            TypeError, ValueError: an option is unknown, or has a value that is not supported.
            CheckpointError: the network is of another class, or its files are missing or broken.
        """
        source = pretrained_model_name_or_path
        if not isinstance(source, str | os.PathLike):
            raise TypeError(f"{type(source).__name__} should be the path of a folder, or owner/name on the hub")
        devices = devices_of(device_map if isinstance(device_map, str) else None, Devices())
        chosen = pick_dtype(one_dtype(dtype if torch_dtype is None else torch_dtype), devices)
        folder, parts = Path(os.path.expanduser(source)), f"{subfolder}/" if subfolder else ""
        with hub_options(f"{cls.__name__}.from_pretrained", options):
            if not folder.exists() and hub.is_id(source):
                stem = next(iter(_NETWORKS.values())).stem
                files = ["config.json", *weight_files(stem, variant), *orbax_reader.FILES]
                folder = hub.fetch(source, [parts + name for name in files], revision)
        folder = folder / parts
        config = read_json(folder / "config.json")
        name = config.get("_class_name")
        if name not in _NETWORKS or cls._name not in (None, name):
            expected = cls._name or " or ".join(_NETWORKS)
            raise CheckpointError(f"{folder} is {name}, expected {expected}; give the folder of one with subfolder=")
        network = _NETWORKS[name]
        extra = [pick_attention(None, chosen, devices)] if network.module is UNet else []
        try:
            module = network.module(network.config.from_dict(config), *extra)
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from None
        return filled(open_weights(folder, variant, module.rename, network.stem), module, chosen, devices)


class AutoencoderKL(AutoModel):
    """Loads an autoencoder."""

    _name = "AutoencoderKL"


class UNet2DConditionModel(AutoModel):
    """Loads a UNet."""

    _name = "UNet2DConditionModel"
