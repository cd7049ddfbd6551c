"""A family outside the library, with a one-layer network, its own type of text, and its own argument."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

import sega_jax
from sega_jax import Predictions, Sampler, Setup, argument, changed
from sega_jax.method.solvers import SOLVERS
from sega_jax.nn.layers import Linear
from sega_jax.systems import diffusion
from sega_jax.systems.sizes import state_shape


class Config(NamedTuple):
    size: int = 8

    @classmethod
    def from_dict(cls, config):
        return cls(config["size"])


class ToyNet(nnx.Module):  # predicts noise [rows, height, width, 3] from the state and letters [rows, 4]
    rename = staticmethod(str)

    def __init__(self, config: Config):
        self.config, self.mix = config, Linear(7, 3)

    def __call__(self, x, letters, wobble):
        letters = jnp.broadcast_to(letters[:, None, None], (*x.shape[:3], 4))
        return jnp.tanh(self.mix(jnp.concatenate([x, letters], -1))) * (1 + wobble[:, None, None, None])


class Models(NamedTuple):
    net: ToyNet


@sega_jax.conditioning
class Letters(sega_jax.Text):
    letters: Any  # [texts, 4], the first four letters of each text as numbers


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ToyCall(sega_jax.Call):
    steps: Any = changed(sega_jax.Call, "steps", 6)
    guidance_scale: Any = changed(sega_jax.Call, "guidance_scale", 3.0)
    wobble: Any = argument(0.0, sega_jax.Real(0, 1), "strengthens the prediction", varies="row", sweep=True, shell=True)


def read_letters(words, warn):
    return np.array([[ord(letter) for letter in f"{word:4.4}"] for word in words], np.float32) / 128


def setup(call, given):
    wobble = diffusion.per_row("wobble", call.wobble, given).astype(given.dtype)
    shape = state_shape(sizes(given.models), call.height, call.width)
    return Setup(shape, given.scheduler.table(call.steps), wobble, given.scheduler.solver)


def sizes(models):
    return sega_jax.Sizes(channels=3, factor=1, multiple=1, default=(models.net.config.size,) * 2)


def denoiser(net, text, settings, own, x):
    branches = text.letters.shape[1]

    def predictions(x, call):
        letters, wobble = text.letters.reshape(-1, 4), jnp.repeat(jnp.asarray(settings.own), branches)
        out = net(jnp.repeat(x, branches, 0), letters, wobble).reshape(len(x), branches, *x.shape[1:])
        return Predictions(out[:, 0], out[:, 1], out[:, 2:])

    return predictions


CHECKPOINT = sega_jax.Checkpoint(
    recognise=lambda index: index.get("_class_name") == "Toy",
    models=Models,
    networks={"net": sega_jax.Network(ToyNet, Config)},
    build=lambda net, attention="xla": Models(net if isinstance(net, ToyNet) else ToyNet(Config.from_dict(net))),
    tokenizer=lambda folder, models, given: read_letters,
)
SAMPLER = Sampler(
    sizes=sizes,
    networks=lambda models: models.net,
    table=lambda call, scheduler: scheduler.table(call.steps),
    static=lambda call, scheduler: scheduler.solver,
    setup=setup,
    initial=diffusion.initial,
    denoiser=denoiser,
    solver=lambda net, settings, own: SOLVERS[own](0.0),
    draw=diffusion.draw,
    decoder=lambda models: None,
    decode=lambda _, x: (jnp.clip(x / 2 + 0.5, 0, 1), jnp.isfinite(x).all((1, 2, 3))),
)
TEXT = sega_jax.TextReader(Letters, ("net",), lambda models: models.net, lambda net, ids: Letters(ids))
SYSTEM = sega_jax.System("toy", "the toy family", CHECKPOINT, TEXT, SAMPLER, ToyCall)
