"""The torch side of every comparison: modules with the same weights, and conversions of layout and precision."""

import contextlib
import functools
import importlib
import itertools
from unittest import mock

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from support import tiny

import sega_jax
from sega_jax.method.schedules import from_config
from sega_jax.systems.programs import POSTERIOR
from sega_jax.weights.layout import from_torch, leaves, torch_name

for library in (diffusers, transformers):
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()


def relative(ours, theirs) -> float:
    """Returns the relative L2 error."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def last(tensor: torch.Tensor) -> np.ndarray:
    """Converts a tensor [..., channels, height, width] to a NumPy array [..., height, width, channels]."""
    return tensor.detach().movedim(-3, -1).numpy()


def first(array: np.ndarray) -> torch.Tensor:
    """Converts an array [..., height, width, channels] to a tensor [..., channels, height, width]."""
    return torch.tensor(np.moveaxis(np.asarray(array), -1, -3))


def precision() -> np.dtype:
    """Returns torch's default dtype: float32, or float64 inside `double`."""
    return np.dtype(str(torch.get_default_dtype()).removeprefix("torch."))


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(precision())


def fill(module, tensors):
    """Returns our module, filled with the tensors of a torch state dict."""

    def read(path, leaf):
        array = jnp.asarray(from_torch(path, np.asarray(tensors[torch_name(path)])), precision())
        assert array.shape == leaf.shape
        return array

    return jax.tree_util.tree_map_with_path(read, module)


def same_names(ours, theirs) -> None:
    """Checks that both modules have the same tensors and shapes. Tied tensors have two names in torch."""
    tensors = theirs.state_dict()
    tied = len(list(theirs.named_parameters(remove_duplicate=False))) - len(list(theirs.parameters()))
    assert leaves(ours) == {renamed(ours, name): tuple(tensor.shape) for name, tensor in tensors.items()}
    assert len(leaves(ours)) == len(tensors) - tied


def renamed(module, name):
    return module.rename(name) if hasattr(module, "rename") else name


def pair(ours, theirs):
    """Fills our module and torch's with the same tensors from `tiny`."""
    same_names(ours, theirs)
    tensors = {name: tiny.values(f"module.{name}", shape) for name, shape in leaves(ours).items()}
    theirs.load_state_dict({name: torch.tensor(tensors[renamed(ours, name)]) for name in theirs.state_dict()})
    return fill(ours, tensors), theirs.eval().requires_grad_(False)


def scheduler(config):
    """Returns diffusers' scheduler for a scheduler_config.json. Inside `double`, the scheduler computes in float64."""
    twin = getattr(diffusers, config["_class_name"]).from_config(config)
    set_timesteps = twin.set_timesteps

    @functools.wraps(set_timesteps)
    def precise(*args, **kwargs):
        with mock.patch.object(np, "float32", precision().type):  # diffusers names this dtype explicitly
            set_timesteps(*args, **kwargs)

    twin.set_timesteps = precise
    return twin


@contextlib.contextmanager
def double():
    """Uses float64 in both libraries, even where torch code requests float32: betas, embedded timesteps, quantiles."""
    default = torch.get_default_dtype()
    explicit = (torch, "float32", torch.float64), (torch.Tensor, "float", torch.Tensor.double)
    with jax.enable_x64(True), mock.patch.object(*explicit[0]), mock.patch.object(*explicit[1]):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def inject(scheduler, draw) -> None:
    """Makes a scheduler use `draw(call)`, an array [batch, height, width, channels], as its fresh noise."""
    step, calls = scheduler.step, itertools.count()
    module = importlib.import_module(type(scheduler).__module__)

    @functools.wraps(step)
    def injected(*args, **kwargs):
        noise = first(draw(next(calls)))
        with mock.patch.object(module, "randn_tensor", create=True, return_value=noise):
            return step(*args, **kwargs)

    scheduler.step = injected


def start(pipeline, seeds, latents):
    """Makes a diffusers img2img pipeline start from the given latents and sample the autoencoder's posterior as our
    pipeline does.

    Returns:
        A context manager that restores the pipeline on exit.
    """
    keys = [jax.random.fold_in(jax.random.key(seed), POSTERIOR) for seed in seeds]
    posterior = np.stack([jax.random.normal(key, latents.shape[1:], precision()) for key in keys])
    stack = contextlib.ExitStack()
    for name, drawn in ((pipeline.__module__, latents), ("diffusers.models.autoencoders.vae", posterior)):
        patch = mock.patch.object(importlib.import_module(name), "randn_tensor", return_value=first(drawn))
        stack.enter_context(patch)
    return stack


def stretch(scheduler, steps) -> None:
    """Makes a scheduler always use the given number of steps.

    diffusers' semantic pipeline records one row per step and crashes if there are more calls than steps. With this
    scheduler, the caller can request as many steps as there are calls.
    """
    set_timesteps = scheduler.set_timesteps

    @functools.wraps(set_timesteps)
    def stretched(_, **kwargs):
        set_timesteps(steps, **kwargs)

    scheduler.set_timesteps = stretched


def fresh(seeds, shape):
    """Returns a function that maps a call's index to the noise [rows, *shape] that our pipeline draws for the given
    seeds."""
    keys = [jax.random.key(seed) for seed in seeds]
    return lambda i: np.stack([jax.random.normal(jax.random.fold_in(key, i), shape, precision()) for key in keys])


def load(folder, dtype, devices):
    """Loads a checkpoint into both our semantic pipeline and diffusers'."""
    reference = diffusers.SemanticStableDiffusionPipeline.from_pretrained(folder)
    reference.set_progress_bar_config(disable=True)
    with jax.enable_x64(dtype == "float64"):
        ours = sega_jax.SemanticStableDiffusionPipeline.from_pretrained(folder, dtype=dtype, devices=devices)
    return ours, reference.to(dtype=getattr(torch, dtype))


def schedule(ours, reference, config) -> None:
    """Gives both pipelines the scheduler that a scheduler_config.json describes."""
    ours.pipeline.scheduler, reference.scheduler = from_config(config), scheduler(config)


def published(configs, part: str):
    """Returns torch's network for a part of a checkpoint, built from the given configs."""
    if part.startswith("text_encoder"):
        kind = transformers.CLIPTextModelWithProjection if part.endswith("2") else transformers.CLIPTextModel
        return kind(transformers.CLIPTextConfig(**configs[part]))
    return getattr(diffusers, {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}[part])(**configs[part])
