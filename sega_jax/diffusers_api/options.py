"""Sorts diffusers' loading options into three groups: used, ignored and refused options."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sega_jax.diffusers_api.torch_values import one_dtype
from sega_jax.method.arguments import arguments
from sega_jax.method.checks import brief
from sega_jax.pipelines.load_options import LoadOptions
from sega_jax.weights import hub

# Options that have the same names in the hub client.
_HUB = ("cache_dir", "token", "local_files_only", "force_download")
# Options that control how torch loads weights. This library offers no such choices: loading always reads the best
# weight files in a folder and moves the tensors to the devices one by one.
_WITHOUT_EFFECT = (
    *("use_safetensors", "low_cpu_mem_usage", "max_memory", "offload_folder", "offload_state_dict", "offload_buffers"),
    *("disable_mmap", "trust_remote_code", "mirror", "use_onnx", "use_flashpack", "resume_download"),
    *("load_connected_pipeline", "requires_safety_checker", "load_safety_checker", "safe_serialization"),
)
# {option that would change the pipeline: remedy}. None and False are accepted.
_REFUSED = {
    "custom_pipeline": "leave it out; calls accept long_prompts=True and weighted=True for long and weighted prompts",
    "custom_revision": "sega_jax has no custom pipelines; leave it out",
    "quantization_config": "sega_jax has no quantised weights; use torch_dtype='bfloat16' to save memory",
    "load_in_8bit": "sega_jax has no quantised weights; use torch_dtype='bfloat16' to save memory",
    "load_in_4bit": "sega_jax has no quantised weights; use torch_dtype='bfloat16' to save memory",
    "proxies": "set the environment variable HTTPS_PROXY instead",
    "output_loading_info": "missing and extra tensors are always reported; leave it out",
    "subfolder": "give the checkpoint's top folder",
    "dduf_file": "give a folder in diffusers layout, or a single file",
    "original_config": "give a folder in diffusers layout as config=",
    "original_config_file": "give a folder in diffusers layout as config=",
    "controlnet": "sega_jax has no ControlNets; leave it out",
    "adapter": "sega_jax has no adapters; leave it out",
    "motion_adapter": "sega_jax has no adapters; leave it out",
    "image_encoder": "sega_jax has no IP-Adapters; leave it out",
    "provider": "sega_jax does not use ONNX; leave it out",
    "enable_pag": "sega_jax has no perturbed attention guidance; leave it out",
    "add_watermarker": "sega_jax adds no watermark; leave it out",
    "watermarker": "sega_jax adds no watermark; leave it out",
    "feature_extractor": "this pipeline has no safety checker to use it; leave it out",
}
_DTYPES = ("torch_dtype", "dtype")
NAMES = (*_HUB, *_WITHOUT_EFFECT, *_REFUSED, *_DTYPES, "device_map", "use_auth_token")


def load_options(options: dict[str, Any], caller: str) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Splits options into options for `sega_jax.load`, options for the hub client, and `device_map`.

    Args:
        options: {name: value}.
        caller: the name of the public function, for error messages.

    Returns:
        The options for `sega_jax.load`, the options for the hub client, and the value of `device_map`.

    Raises:
        TypeError: an option is unknown or not supported.
        ValueError: `torch_dtype` and `dtype` differ.
    """
    known = [*arguments(LoadOptions), *NAMES]
    for name, value in options.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else "help(sega_jax.load) lists the options"
            raise TypeError(f"{name} is not an argument of {caller}; {hint}")
        if name in _REFUSED and name not in arguments(LoadOptions) and value not in (None, False):
            raise TypeError(f"{name}={brief(value)} is not supported: {_REFUSED[name]}")
    native = {name: value for name, value in options.items() if name not in NAMES}
    dtypes = [one_dtype(options[name]) for name in _DTYPES if options.get(name) is not None]
    if len(dtypes) > 1 and str(dtypes[0]) != str(dtypes[1]):
        raise ValueError(
            f"torch_dtype={dtypes[0]} and dtype={dtypes[1]} differ; they are the same option, so give only one"
        )
    if dtypes:
        native["dtype"] = dtypes[0]
    _check_components(native)
    return native, hub_choices(options), options.get("device_map")


def hub_choices(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the diffusers options that the hub client uses."""
    choices = {name: options[name] for name in _HUB if name in options}
    if options.get("use_auth_token") is not None:
        choices.setdefault("token", options["use_auth_token"])
    # None means the client's default.
    return {name: value for name, value in choices.items() if value is not None}


@contextmanager
def hub_options(caller: str, options: dict[str, Any]) -> Iterator[None]:
    """Applies the hub client's options inside a `with` block. Options that have no effect are ignored.

    Args:
        caller: the name of the public function, for error messages.
        options: diffusers' options for downloading a file.

    Raises:
        TypeError: an option is unknown or not supported.
    """
    harmless = (*_WITHOUT_EFFECT, "prefix", "mean_resizing", "user_agent")
    known = (*_HUB, "use_auth_token", "proxies", *harmless)
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, [*known, "weight_name", "adapter_name", "subfolder", "revision"], 1)
            hint = f"did you mean {close[0]}?" if close else "leave it out"
            raise TypeError(f"{name} is not an argument of {caller}; {hint}")
    if options.get("proxies"):
        raise TypeError(f"proxies={brief(options['proxies'])} is not supported: {_REFUSED['proxies']}")
    with hub.using(**hub_choices(options)):
        yield


def _check_components(options: dict[str, Any]) -> None:
    """Checks that no network or tokenizer is an object from a torch library. diffusers' schedulers are allowed.

    Raises:
        TypeError: a network or tokenizer comes from a torch library.
    """
    for name, value in options.items():
        library = type(value).__module__.partition(".")[0]
        if library in ("torch", "diffusers", "transformers", "peft") and name not in ("scheduler", "dtype"):
            raise TypeError(
                f"{name} is a {type(value).__name__} from {library}, which is not supported; save it with"
                " save_pretrained and give the folder, or use another pipeline's component"
            )
