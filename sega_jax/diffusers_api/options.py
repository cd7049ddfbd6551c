"""The options of diffusers for loading: those that mean the same here, those without an effect, and the others."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sega_jax.diffusers_api.torch_values import one_dtype
from sega_jax.method.arguments import arguments
from sega_jax.method.checks import brief
from sega_jax.pipelines.load_options import LoadOptions
from sega_jax.weights import hub

# Options that the hub's client takes by the same names.
_HUB = ("cache_dir", "token", "local_files_only", "force_download")
# Options that say how torch loads. There is nothing to choose here: the best form of weight files in a folder is read,
# one tensor after another, to the devices.
_WITHOUT_EFFECT = (
    *("use_safetensors", "low_cpu_mem_usage", "max_memory", "offload_folder", "offload_state_dict", "offload_buffers"),
    *("disable_mmap", "trust_remote_code", "mirror", "use_onnx", "use_flashpack", "resume_download"),
    *("load_connected_pipeline", "requires_safety_checker", "load_safety_checker", "safe_serialization"),
)
# Options that would make another pipeline, each with the remedy; None and False are accepted.
_REFUSED = {
    "custom_pipeline": "give long_prompts=True or weighted=True to calls for what lpw pipelines do; leave it out",
    "custom_revision": "it is of custom pipelines; leave it out",
    "quantization_config": "quantised weights are not supported; give torch_dtype='bfloat16' to save memory",
    "load_in_8bit": "quantised weights are not supported; give torch_dtype='bfloat16' to save memory",
    "load_in_4bit": "quantised weights are not supported; give torch_dtype='bfloat16' to save memory",
    "proxies": "set the environment variable HTTPS_PROXY",
    "output_loading_info": "missing and extra tensors are always reported; leave it out",
    "subfolder": "name the checkpoint's whole folder",
    "dduf_file": "name a folder in diffusers layout, or a single file",
    "original_config": "name a folder in diffusers layout with config=",
    "original_config_file": "name a folder in diffusers layout with config=",
    "controlnet": "ControlNets are not supported",
    "adapter": "adapters are not supported",
    "motion_adapter": "adapters are not supported",
    "image_encoder": "IP-Adapters are not supported",
    "provider": "it is ONNX's; leave it out",
    "enable_pag": "perturbed attention guidance is not supported; leave it out",
    "add_watermarker": "there is no watermark; leave it out",
    "watermarker": "there is no watermark; leave it out",
    "feature_extractor": "there is no safety checker for it; leave it out",
}
_DTYPES = ("torch_dtype", "dtype")
NAMES = (*_HUB, *_WITHOUT_EFFECT, *_REFUSED, *_DTYPES, "device_map", "use_auth_token")


def load_options(options: dict[str, Any], what: str) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Splits options of diffusers and of `sega_jax.load` into those of `load`, those of the hub's client, and
    `device_map`.

    Raises:
        TypeError: an option is unknown, or would make another pipeline.
        ValueError: dtypes contradict each other.
    """
    known = [*arguments(LoadOptions), *NAMES]
    for name, value in options.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else "sega_jax.load documents what there is"
            raise TypeError(f"{name} is not an argument of {what}; {hint}")
        if name in _REFUSED and name not in arguments(LoadOptions) and value not in (None, False):
            raise TypeError(f"{name}={brief(value)} is not supported: {_REFUSED[name]}")
    ours = {name: value for name, value in options.items() if name not in NAMES}
    dtypes = [one_dtype(options[name]) for name in _DTYPES if options.get(name) is not None]
    if len(dtypes) > 1 and str(dtypes[0]) != str(dtypes[1]):
        raise ValueError(f"torch_dtype={dtypes[0]} and dtype={dtypes[1]} were both given; they say the same, give one")
    if dtypes:
        ours["dtype"] = dtypes[0]
    _check_components(ours)
    return ours, hub_choices(options), options.get("device_map")


def hub_choices(options: dict[str, Any]) -> dict[str, Any]:
    """Selects diffusers' options that the hub's client takes."""
    found = {name: options[name] for name in _HUB if name in options}
    if options.get("use_auth_token") is not None:
        found.setdefault("token", options["use_auth_token"])
    # The client's default of these is False.
    return {name: value for name, value in found.items() if value is not None}


@contextmanager
def hub_options(what: str, options: dict[str, Any]) -> Iterator[None]:
    """Fetches with the hub's options among options of diffusers for files, and ignores those without an effect.

    Raises:
        TypeError: an option is unknown.
    """
    harmless = (*_WITHOUT_EFFECT, "prefix", "mean_resizing", "user_agent")
    known = (*_HUB, "use_auth_token", "proxies", *harmless)
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, [*known, "weight_name", "adapter_name", "subfolder", "revision"], 1)
            hint = f"did you mean {close[0]}?" if close else "leave it out"
            raise TypeError(f"{name} is not an argument of {what}; {hint}")
    if options.get("proxies"):
        raise TypeError(f"proxies={brief(options['proxies'])} is not supported: {_REFUSED['proxies']}")
    with hub.using(**hub_choices(options)):
        yield


def _check_components(options: dict[str, Any]) -> None:
    """Refuses networks, tokenizers and schedulers of torch's libraries, but for schedulers, which are read.

    Raises:
        TypeError: one is given.
    """
    for name, value in options.items():
        library = type(value).__module__.partition(".")[0]
        if library in ("torch", "diffusers", "transformers", "peft") and name not in ("scheduler", "dtype"):
            raise TypeError(
                f"{name} is a {type(value).__name__} of {library}, which is not read; write it to a checkpoint with"
                " save_pretrained and load that, or give another pipeline's"
            )
