"""diffusers' network classes. Each class loads a single network, which can replace a checkpoint's network."""

import os
from pathlib import Path
from typing import Any

from sega_jax.diffusers_api.options import hub_options
from sega_jax.diffusers_api.torch_values import devices_of, one_dtype
from sega_jax.nn.unet import UNet2DConditionModel as UNet
from sega_jax.nn.unet import UNetConfig
from sega_jax.nn.vae import AutoencoderConfig
from sega_jax.nn.vae import AutoencoderKL as Autoencoder
from sega_jax.pipelines.device_defaults import pick_attention, pick_dtype
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.loading import filled
from sega_jax.pipelines.network_sources import NetworkSource, find_network
from sega_jax.systems.base import Network
from sega_jax.text.files import CheckpointError
from sega_jax.weights import hub

# {folder in a checkpoint: network}.
_NETWORKS = {
    "vae": Network(Autoencoder, AutoencoderConfig),
    "unet": Network(UNet, UNetConfig),
}


class AutoModel:
    """Loads an autoencoder or a UNet, depending on its config.json."""

    _folders: tuple[str, ...] = tuple(_NETWORKS)  # the supported networks

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
        """Loads a network to pass to a pipeline as `vae` or `unet`.

        Args:
            pretrained_model_name_or_path: the network's folder, or "owner/name" on the hub.
            subfolder: the network's folder inside that folder or repository, such as "vae".
            torch_dtype, dtype, variant, revision: as in `sega_jax.load`.
            device_map: a device, as accepted by a pipeline's `to` method.
            options: options of the hub client, and diffusers' options that have no effect here.

        Raises:
            TypeError, ValueError: an option is unknown or has an unsupported value.
            FileNotFoundError, CheckpointError: the network has the wrong class, or its files are missing or broken.
        """
        source = _located(pretrained_model_name_or_path, subfolder, revision)
        devices = devices_of(device_map if isinstance(device_map, str) else None, Devices())
        chosen = pick_dtype(one_dtype(dtype if torch_dtype is None else torch_dtype), devices)
        with hub_options(f"{cls.__name__}.from_pretrained", options):
            *others, last = cls._folders
            for name in others:
                try:
                    files = find_network(name, source, _NETWORKS[name], (), variant)
                except CheckpointError:  # the next class may fit
                    continue
                return _loaded(name, source, files, chosen, devices)
            return _loaded(last, source, find_network(last, source, _NETWORKS[last], (), variant), chosen, devices)

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path_or_dict: str | Path, **options: Any) -> str | Path:
        """Returns the file's path unchanged.

        The path can be passed to a pipeline as `vae` or `unet`. The file is then read with the checkpoint's config.
        """
        with hub_options(f"{cls.__name__}.from_single_file", options):
            return pretrained_model_link_or_path_or_dict


def _located(source: Any, subfolder: str | None, revision: str | None) -> str | Path:
    """Returns the path of a local folder, or the address of a folder on the hub, including the revision.

    Raises:
        TypeError: `source` is not a path.
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"pretrained_model_name_or_path has type {type(source).__name__}; expected a folder or owner/name on the"
            " hub"
        )
    folder = Path(os.path.expanduser(source))
    address = None if os.path.exists(folder) else hub.address(source)
    if address is None:
        return folder / (subfolder or "")
    return str(address._replace(path=subfolder or address.path, revision=revision or address.revision))


def _loaded(name: str, source: str | Path, files: NetworkSource, dtype: Any, devices: Devices) -> Any:
    network = _NETWORKS[name]
    if files.config is None:
        raise CheckpointError(f"{source} is a file without a config.json; pass its path to a pipeline as {name}=")
    extra = [pick_attention(None, dtype, devices)] if network.module in (UNet, Autoencoder) else []
    try:
        module = network.module(network.config.from_dict(files.config), *extra)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None
    return filled(files.open(module), module, dtype, devices)


class AutoencoderKL(AutoModel):
    """Loads an autoencoder."""

    _folders = ("vae",)


class UNet2DConditionModel(AutoModel):
    """Loads a UNet."""

    _folders = ("unet",)
