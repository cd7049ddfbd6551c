"""Faults in sampling: the guidance chain, the loop and its random keys, starting pictures, chunks, and tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import oracle
from support import tiny

from faults.damage import argument, fields, instead, replaced, result
from faults.views import Fault, View, Views, compiled, normal
from sega_jax import Edit, Edits
from sega_jax.method import guidance, schedules
from sega_jax.nn import vae_tiling
from sega_jax.nn.vae import AutoencoderConfig, AutoencoderKL
from sega_jax.pipelines import batch
from sega_jax.pipelines.execution import chunks
from sega_jax.systems import base, diffusion, latent_space, programs
from sega_jax.systems.clip_text import ClipText
from sega_jax.systems.stable_diffusion import SAMPLER

pytestmark = pytest.mark.fault


class Network:
    """A network whose prediction depends on x, the timestep, and a branch's text, which has two numbers per channel."""

    def project(self, text):
        return text

    def __call__(self, x, timestep, text):
        x, timestep = (jnp.repeat(leaf, len(text) // len(x), 0) for leaf in (x, timestep))
        return jnp.tanh(x * text[:, :1, None] + text[:, 1:2, None] * timestep[:, None, None, None] / 1000)


SEEDS, CALLS, SHAPE = [3, 4], 4, (3, 4, 2)
SCALES, SHARES = np.array([3.0, 7.0]), np.array([0.5, 1.0])
EDITS = [Edit("", warmup=0, threshold=0.5), Edit("", scale=-3, warmup=1, threshold=0.3, cooldown=3)]
# The texts are small numbers, because predictions that round to 1 would have equal magnitudes.
BRANCHES, RECORD = 0.2 * normal(2, 4, 2, 2), normal(2, 3, *SHAPE, seed=1)
ANCESTRAL = schedules.from_config(tiny.SCHEDULERS["Euler ancestral"])


def loop():
    """Runs the ancestral sampler on two rows and returns their final states.

    The guidance consists of rescaled classifier-free guidance, one concept that is predicted and one that is not, and
    the replay of three recorded calls. The network predicts one row at a time.
    """
    keys, edits = jax.vmap(jax.random.key)(np.uint32(SEEDS)), Edits.stack([EDITS] * 2)
    settings = base.Settings(keys, SCALES, edits, SHARES, RECORD, diffusion.DiffusionSettings(np.zeros(2)))
    own = diffusion.DiffusionStatic(ANCESTRAL.solver, rows_at_once=1)
    table, options = ANCESTRAL.table(CALLS), {"sampler": SAMPLER, "static": base.Static(own=own)}

    def run(settings, text):
        scale = table.initial_scale[0]
        carry = programs.start(settings, None, scale, shape=SHAPE, dtype=np.float32, **options)
        return programs.advance(Network(), text, carry, table, settings, concepts=1, **options)[0].x

    return compiled(run, settings, ClipText(BRANCHES))


def by_a_plain_loop():
    """Returns the states of `loop`, computed with NumPy from the same table and keys."""
    return np.stack([row_by_a_plain_loop(row) for row in range(2)])


def row_by_a_plain_loop(row):
    table, key = ANCESTRAL.table(CALLS), jax.random.key(SEEDS[row])

    def noise(tag):
        return np.asarray(jax.random.normal(jax.random.fold_in(key, tag), SHAPE), np.float64)

    names = ("scale", "threshold", "warmup", "cooldown", "weight")
    settings = {name: [getattr(edit, name) for edit in EDITS] for name in names}
    settings |= {"reverse": [False] * 2, "momentum_scale": [0.1] * 2, "momentum_beta": [0.4] * 2}
    x, past = table.initial_scale[0] * noise(2**32 - 1), []
    for i in range(CALLS):
        seen = x * table.input_scale[i]
        u, p, e, _ = np.tanh(seen * BRANCHES[row, :, :1, None] + BRANCHES[row, :, 1:, None] * table.timestep[i] / 1000)
        guided = u + SCALES[row] * (p - u)
        guided *= SHARES[row] * p.std() / guided.std() + 1 - SHARES[row]
        past.append((u, np.stack([e, u])))
        uncond, edits = map(np.stack, zip(*past, strict=True))
        guided += oracle.guidance(uncond, edits, **settings, semantics="diffusers")[-1]
        guided += RECORD[row, i] if i < 3 else 0
        x = x + table.solver.x_from_memory[i, 0] * guided + table.solver.noise[i] * noise(i)
    return x


class Encoder:
    """An autoencoder whose encoder returns a mean of 2 and a standard deviation of 3."""

    config = AutoencoderConfig(scaling_factor=0.5)

    def encode(self, picture):
        mean = jnp.full((len(picture), 2, 2, 4), 2.0)
        return mean, jnp.full_like(mean, 2 * np.log(np.float32(3)))


def started():
    """Returns the latents of two pictures, and the noised state from which sampling starts."""
    keys = jax.random.split(jax.random.key(0), 2)
    clean = latent_space.encode_image(Encoder(), keys, jnp.zeros((2, 4, 4, 3)))
    settings = base.Settings(keys, np.ones(2), own=diffusion.DiffusionSettings(np.zeros(2)))
    static, latents = base.Static(own=diffusion.DiffusionStatic()), np.ones((2, 2, 2, 4), np.float32)
    options = {"sampler": SAMPLER, "static": static, "shape": (2, 2, 4), "dtype": np.float32}
    return clean, programs.start(settings, latents, 0.6, clean, 0.8, **options).x


def started_by_the_formula():
    keys = jax.random.split(jax.random.key(0), 2)
    z = np.stack([jax.random.normal(jax.random.fold_in(key, 2**32 - 3), (2, 2, 4)) for key in keys])
    clean = (2 + 3 * z) * 0.5
    return clean, 0.8 * clean + 0.6


LATENTS = normal(1, 8, 20, 4)


def decoder():
    return tiny.filled(AutoencoderKL(AutoencoderConfig.from_dict(tiny.VAE_1)))


def tiled():
    """Decodes a picture in tiles of 8 positions and returns the left part of the picture."""
    return decoder().decode(LATENTS, 8)[:, :6, :12]


def joined():
    """Joins the two tiles with NumPy, blending from the first to the second where they overlap."""
    left, right = (np.asarray(decoder().decode(LATENTS[:, :, at : at + 8]))[:, :6] for at in (0, 6))
    return np.concatenate([left[:, :, :7], (left[:, :, 7:] + right[:, :, 1:2]) / 2, right[:, :, 2:6]], 2)


@pytest.fixture(scope="module")
def views(least):
    def call():
        """Returns the latents and seeds of two pictures for one prompt, sampled in several chunks of the schedule."""
        options = {"images_per_prompt": 2, "seed": 3, "steps": 4, "output": "latent", "progress": False}
        out = least("a", [Edit("b", warmup=1)], callback=lambda *_: None, callback_steps=2, **options)
        return out.images, out.seeds

    return Views(
        {
            "loop": View(loop, by_a_plain_loop, 1e-5),
            "start": View(started, started_by_the_formula, 1e-5),
            "tiles": View(tiled, joined, 1e-5),
            "call": View(call),
        }
    )


def rescaled_last(chain):
    """Rescales the estimate only after semantic guidance."""

    def damaged(settings, static):
        sound, last = chain(settings._replace(guidance_rescale=None), static), guidance.rescale(SHARES)

        def update(estimate, state, preds):
            guided, after = sound.update(estimate, state, preds)
            return last.update(guided, optax.EmptyState(), preds)[0], after

        return optax.GradientTransformation(sound.init, update)

    return damaged


def completed_by_the_prompt(complete):
    """Uses the prompt's prediction for concepts that are not predicted."""
    return lambda preds, settings: complete(preds._replace(uncond=preds.cond), settings)._replace(uncond=preds.uncond)


FAULTS = {
    # The guidance chain
    "the guidance scale is relative to the conditional estimate": Fault(
        "loop", guidance, "cfg", argument(0, lambda scale: scale + 1)
    ),
    "rescaling comes after semantic guidance": Fault("loop", programs, "guidance", rescaled_last),
    "recorded guidance is replayed one call late": Fault(
        "loop", guidance, "replay", argument(0, lambda record: jnp.roll(record, 1, 1))
    ),
    # The loop
    "every call draws the same noise": Fault("loop", programs, "normal", argument(1, lambda tag: 0)),
    "every row draws the same noise": Fault(
        "loop", programs, "normal", argument(0, lambda keys: jnp.broadcast_to(keys[:1], keys.shape))
    ),
    "the initial noise is not scaled": Fault("loop", programs, "start", argument(2, lambda scale: np.float64(1))),
    "the network's input is not scaled": Fault(
        "loop", diffusion, "predict", argument(3, lambda row: replaced(row, input_scale=jnp.ones_like))
    ),
    "concepts that are not predicted count as the prompt": Fault("loop", programs, "complete", completed_by_the_prompt),
    "chunks of rows get the branches of other rows": Fault(
        "loop", diffusion, "in_chunks", argument(3, lambda texts: jnp.roll(texts, len(texts) // 2, 0))
    ),
    # Starting pictures
    "the latents of a picture use the initial noise": Fault(
        "start", latent_space, "POSTERIOR", instead(programs.INITIAL)
    ),
    "the latents of a picture are not scaled": Fault(
        "start", latent_space, "encode_image", result(lambda latents: latents / 0.5)
    ),
    # Tiles
    "tiles do not fade into each other": Fault("tiles", vae_tiling, "_faded", argument(2, lambda fade: 0)),
    # Calls
    "pictures of one prompt share their seed": Fault(
        "call", batch, "_seeds", result(lambda seeds: seeds[:1] * len(seeds))
    ),
    "padding calls of a chunk are run": Fault("call", chunks, "chunk", fields(live=np.ones_like)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_view_shows_the_fault(name, views, monkeypatch):
    assert views.sees(FAULTS[name], monkeypatch)


def test_no_view_differs_without_faults(views):
    assert views.wrong() == set()
