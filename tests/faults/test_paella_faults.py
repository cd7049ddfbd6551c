"""Faults in Paella's networks, condition, sampler and prior, shown by results recorded from the original code."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import paella as cases
from support import tiny

from faults.damage import fields, halves, instead, replaced, result, scaled, unchanged
from faults.views import QUICK, Fault, View, Views
from sega_jax import Edit, Edits
from sega_jax.method import solvers
from sega_jax.method.schedules import tokens
from sega_jax.nn import layers
from sega_jax.nn import paella as net
from sega_jax.nn.prior import PriorConfig, PriorModel
from sega_jax.nn.vqgan import VectorQuantize, VQConfig, VQModel
from sega_jax.systems import base, paella, paella_prior, programs
from sega_jax.systems.paella_text import PaellaText

pytestmark = pytest.mark.fault
EDIT = Edit("", scale=-7, warmup=2, threshold=0, momentum_scale=0)


def denoiser(config=tiny.PAELLA, dtype=np.float32):
    return tiny.filled(net.Paella(net.PaellaConfig.from_dict(config)), dtype)


def vqgan(config=tiny.VQGAN, dtype=np.float32):
    return tiny.filled(VQModel(VQConfig.from_dict(config)), dtype)


def condition(model, name):
    return model.condition(**cases.CONDITIONS[name], influence=cases.INFLUENCE if name == "influenced" else None)


def logits(name):
    model = denoiser()
    return model(*cases.paella_inputs(name), condition(model, name))


def padded():
    """Runs two texts of different lengths in one call, so that the shorter one is padded."""
    model, names = denoiser(), ["empty", "pictures"]
    x, level = (np.concatenate(arrays) for arrays in zip(*map(cases.paella_inputs, names), strict=True))
    return model(x, level, net.join([condition(model, name) for name in names]))


def at(module, path):
    for part in path.split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    return module


def denoiser_blocks():
    """Runs each kind of denoiser block on inputs with a variance so small that the norm layers' epsilon matters."""
    model, outputs = denoiser(), []
    for path, channels in cases.BLOCKS.items():
        x, skip, level, states = map(jnp.asarray, cases.block_inputs(channels, 0.01))
        text = net.Condition(states, jnp.ones(states.shape[:2], bool), jnp.ones(states.shape[:2], states.dtype))
        outputs.append(at(model, path)(x, net._Inputs(level, text, skip)))
    return outputs


def autoencoder():
    model = vqgan()
    tokens, latents = model.encode(cases.IMAGE)
    return tokens, latents, model.decode(cases.LATENTS), model.decode_indices(cases.TOKENS)


def known(*names, dtype="float32"):
    return lambda: [cases.recorded(dtype)[name] for name in names]


def texts(names):
    """Returns the recorded texts, padded to the same length, for a batch of two."""
    byt5, mask = np.full((2, len(names), 9, 18), 3.0), np.zeros((2, len(names), 9), bool)
    for i, name in enumerate(names):
        states = cases.BRANCHES[name]["byt5"]
        byt5[:, i, : states.shape[1]], mask[:, i, : states.shape[1]] = states, True
    clip = np.stack([np.repeat(cases.BRANCHES[name]["clip"], 2, 0) for name in names], 1).astype(np.float64)
    image = np.broadcast_to(cases.BRANCHES["cond"]["clip_image"].astype(np.float64), clip.shape)
    return PaellaText(byt5, mask, clip, np.ones(mask.shape[:2], bool), image)


def recorded_chances(key, call, shape, dtype):
    return solvers.Chances(jnp.asarray(cases.GUMBEL, dtype)[call], jnp.asarray(cases.UNIFORM, dtype)[call])


def grids(name):
    """Returns every grid except the first, sampled with the noise of the recorded run."""
    return run(name, [EDIT] if name == "edited" else [])[0]


def replayed():
    """Records the guidance of the edited run, and returns the grids of a run that replays it without the edit."""
    _, guidance = run("edited", [EDIT], record=True)
    return run("edited", [], replay=guidance)[0]


def run(name, edits, replay=None, record=False):
    """Samples with the noise of the recorded run; returns every grid except the first, and the guidance."""
    influence = (1.0, 1.0) if name == "published" else cases.INFLUENCE
    stacked = Edits.stack([edits] * 2) if edits else None
    keys = jax.random.split(jax.random.key(0))
    own = paella.PaellaSettings(np.tile(influence, (2, 1)))
    settings = base.Settings(keys, np.full(2, cases.CFG), stacked, own=own, replay=replay)
    static = base.Static(record=record, own=paella.PaellaStatic("nearest" if name == "quantised" else "sample"))
    options = {"sampler": paella.SYSTEM.sampler, "static": static}
    sampler, parts = cases.SAMPLERS[name], tiny.PAELLA_PARTS
    table = tokens.renoising(sampler["steps"], renoise_steps=sampler["renoise_steps"], temperature=cases.TEMPERATURE)
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        patch.setattr(paella, "chances", recorded_chances)
        codebook = vqgan(parts["vqgan"], np.float64).vquantizer.codebook.embedding
        predictor = paella.Predictor(denoiser(parts["denoiser"], np.float64), codebook)
        text, start = texts(["uncond", "cond", "edit"][: 2 + len(edits)]), cases.START.astype(np.int32)
        carry = programs.start(settings, start, 1, shape=(4, 8, 20), dtype=np.float64, **options)
        advance, outputs = jax.jit(partial(programs.advance, **options), compiler_options=QUICK), []
        for i in range(sampler["steps"]):
            row = jax.tree.map(lambda column, i=i: column[i : i + 1], table)
            carry, record_of_call = advance(predictor, text, carry, row, settings)
            outputs.append((carry.x, record_of_call.sem_guidance if record else np.zeros((2, 0))))
        grids, guidance = zip(*outputs, strict=True)
        return np.stack(grids), np.concatenate(guidance, 1)


def imagined():
    with jax.enable_x64(True):
        model = tiny.filled(PriorModel(PriorConfig.from_dict(tiny.PRIOR)), np.float64)
        return paella_prior.sample_prior(model, *(jnp.asarray(array, np.float64) for array in cases.IMAGINED))


VIEWS = Views(
    {
        "logits": View(lambda: logits("full"), known("logits full"), 1e-5),
        "influence": View(lambda: logits("influenced"), known("logits influenced"), 1e-5),
        "padding": View(padded, lambda: np.concatenate(known("logits empty", "logits pictures")()), 1e-5),
        "blocks": View(denoiser_blocks, known(*(f"{path} 0.01" for path in cases.BLOCKS)), 1e-5),
        "autoencoder": View(autoencoder, known("tokens", "latents", "decoded", "decoded tokens"), 1e-5),
        "imagined": View(imagined, lambda: cases.recorded("float64")["imagined"], 1e-9),
        "replayed": View(replayed, lambda: cases.recorded("float64")["grids edited"][1:]),
    }
    | {
        name: View(partial(grids, name), lambda name=name: cases.recorded("float64")[f"grids {name}"][1:])
        for name in cases.SAMPLERS
    }
)


def with_update(by):
    """Changes the arguments of the update in Paella's solver."""

    def change(renoise):
        def damaged(*args, **options):
            sound = renoise(*args, **options)
            return solvers.Solver(sound.init, lambda *args: sound.update(*by(*args)))

        return damaged

    return change


def flipped(convolve):
    """Convolves the flipped picture and flips the result, which is equivalent to flipping the kernel."""
    return lambda self, x: convolve(self, x[:, ::-1, ::-1])[:, ::-1, ::-1]


def condition_with(name, by):
    """Changes one argument of Paella's condition to `by(options)`."""

    def change(condition):
        def damaged(self, *args, **options):
            return condition(self, *args, **options | {name: by(options)})

        return damaged

    return change


def columns(**changes):
    """Changes the table columns that the solver uses."""
    return fields(solver=lambda row: replaced(row, **changes))


FAULTS = {
    # Networks
    "sines and cosines of the noise level are exchanged": Fault("logits", net, "wave", result(halves)),
    "the response norm is skipped": Fault("blocks", net.GlobalResponseNorm, "__call__", unchanged(1)),
    "the kernel of a transposed convolution is flipped": Fault("logits", layers.DoublingConv, "__call__", flipped),
    "padding counts as text": Fault("padding", net, "join", fields(mask=jnp.ones_like)),
    "the influences of text and picture are exchanged": Fault(
        "influence", net.Paella, "condition", condition_with("influence", lambda options: options["influence"][::-1])
    ),
    "pictures become the farthest tokens": Fault("autoencoder", VectorQuantize, "__call__", scaled(1, -1.0)),
    # The sampler
    "every branch gets the picture of the prompt": Fault(
        "edited", net.Paella, "condition", condition_with("has_image", lambda options: options["has_clip"])
    ),
    "positions return to their current token instead of the first one": Fault(
        "published", solvers, "renoise", with_update(lambda x, start, *rest: (x, x, *rest))
    ),
    "positions are renoised to the end": Fault("edited", tokens, "renoising", columns(renoises=np.ones_like)),
    "the expected code becomes the farthest token": Fault("quantised", solvers, "_distances", result(jnp.negative)),
    "replayed guidance is ignored": Fault("replayed", programs, "replay", instead(lambda recorded: optax.identity())),
    # The prior
    "the prior has the wrong guidance scale": Fault("imagined", paella_prior, "SCALE", instead(4.0)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_view_shows_the_fault(name, monkeypatch):
    assert VIEWS.sees(FAULTS[name], monkeypatch)


def test_no_view_differs_without_faults():
    assert VIEWS.wrong() == set()
