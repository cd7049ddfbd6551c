"""Faults made on purpose in Paella's networks: each changes what is recorded of the public code by more than the
tests tolerate."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from reference import paella as cases
from test_mutations import damage, error
from test_paella import at, condition, given, paella, prior, vqgan

from sega_jax.nn import layers
from sega_jax.nn import paella as net
from sega_jax.nn import prior as embed
from sega_jax.nn import vqgan as vq
from sega_jax.weights import pull

pytestmark = pytest.mark.fault


def view_logits(name):
    model = paella(cases.paella(name))
    text = condition(model, name)
    return {f"sequence {name}": text.tokens, f"logits {name}": model(*cases.paella_inputs(name), text)}


def view_padded():
    """Two texts in one call, of which one is padded."""
    model, names = paella(), ["empty", "pictures"]
    x, r = (np.concatenate(arrays) for arrays in zip(*(cases.paella_inputs(name) for name in names), strict=True))
    logits = model(x, r, net.join([condition(model, name) for name in names]))
    return {f"logits {name}": row[None] for name, row in zip(names, logits, strict=True)}


def view_blocks(std):
    """Every kind of block of all three networks."""
    made, model, autoencoder = {}, paella(), vqgan()
    for path, channels in cases.BLOCKS.items():
        x, skip, level, tokens = map(jnp.asarray, cases.block_inputs(channels, std))
        made[f"{path} {std:g}"] = at(model, path)(x, given(level, tokens, skip))
    for path, channels in cases.VQ_BLOCKS.items():
        x = jnp.asarray(cases.block_inputs(channels, std)[0])
        made[f"vqgan.{path} {std:g}"] = at(autoencoder, path)(x)
    made[f"prior.{cases.PRIOR_BLOCK} {std:g}"] = at(prior(), cases.PRIOR_BLOCK)(cases.prior_block_input(std))
    return made


def view_vqgan():
    model = vqgan()
    tokens, latents = model.encode(cases.IMAGE)
    decoded = {"decoded": model.decode(cases.LATENTS), "decoded tokens": model.decode_indices(cases.TOKENS)}
    return {"tokens": tokens, "latents": latents} | decoded


VIEWS = {
    "full": partial(view_logits, "full"),
    "influenced": partial(view_logits, "influenced"),
    "padded": view_padded,
    "blocks": partial(view_blocks, 1.0),
    "small blocks": partial(view_blocks, 0.01),
    "vqgan": view_vqgan,
    "wave": lambda: {"wave": net.wave(cases.LEVELS, 64)},
    "prior": lambda: {"prior": prior()(*cases.PRIOR)},
}

# The view that must show it, the function, a piece of its source and what takes its place.
FAULTS = {
    # Blocks of the denoiser
    "tanh in the gelu": ("blocks", net.FeedForward._mix, "gelu(x)", "jax.nn.gelu(x)"),
    "gelu behind the response norm": (
        "blocks",
        net.FeedForward._mix,
        "norm(gelu(x))",
        "gelu(norm(x))",
    ),
    "no response norm": ("blocks", net.FeedForward._mix, "last(norm(", "last(("),
    "responses of every position": ("blocks", net.GlobalResponseNorm.__call__, "sum((1, 2)", "sum((3,)"),
    "responses not shared out": (
        "blocks",
        net.GlobalResponseNorm.__call__,
        "size / (size.mean(",
        "size / (1 + 0 * size.mean(",
    ),
    "no residual in the response norm": ("blocks", net.GlobalResponseNorm.__call__, "+ beta + wide)", "+ beta)"),
    "gamma and beta swapped": (
        "blocks",
        net.GlobalResponseNorm.__call__,
        "for p in (self.gamma, self.beta)",
        "for p in (self.beta, self.gamma)",
    ),
    "the convolution in the residual": (
        "blocks",
        net.ResBlock.__call__,
        "return x + self._mix(self.depthwise(seen))",
        "x = self.depthwise(seen); return x + self._mix(x)",
    ),
    "skip before x": ("blocks", net.ResBlock.__call__, "[x, given.skip]", "[given.skip, x]"),
    "x and skip seen by all": (
        "blocks",
        net.ResBlock.__call__,
        "jnp.concatenate([x, given.skip], -1)",
        "jnp.stack([x, given.skip], -1).reshape(*x.shape[:-1], -1)",
    ),
    "scale and shift swapped": ("blocks", net.TimestepBlock.__call__, "scale, shift = jnp", "shift, scale = jnp"),
    "scaled by nothing at 0": ("blocks", net.TimestepBlock.__call__, "(1 + scale)", "scale"),
    "projections in another order": (
        "blocks",
        net.AttnBlock.__call__,
        "query, *own = attn.project(places)",
        "query, *own = attn.project(places)[::-1]",
    ),
    "projections interleaved by head": (
        "blocks",
        net.MultiheadAttention.project,
        "jnp.split(p[...], 3)",
        "[p[...][i::3] for i in range(3)]",
    ),
    "heads used as their width": (
        "blocks",
        net.MultiheadAttention.attend,
        "heads=self.heads",
        "heads=query.shape[-1] // self.heads",
    ),
    "text not activated": ("blocks", net.AttnBlock.project, "jax.nn.silu(text.tokens)", "text.tokens"),
    "no attention to the picture": ("blocks", net.AttnBlock.__call__, "if self.self_attn", "if False"),
    "attention to what is not normalised": (
        "blocks",
        net.AttnBlock.__call__,
        "attn.project(places)",
        "attn.project(x.reshape(places.shape))",
    ),
    "no residual around the attention": ("blocks", net.AttnBlock.__call__, "return x + attn", "return attn"),
    "no norm between levels": ("blocks", net.Resampling.__call__, "normalise(x, _EPS).astype(x.dtype)", "x"),
    "epsilon of the layers": ("small blocks", net.FeedForward._mix, "normalise(x, _EPS)", "normalise(x, 1e-5)"),
    "epsilon of the attention": ("small blocks", net.AttnBlock.__call__, "normalise(x, _EPS)", "normalise(x, 1e-5)"),
    "epsilon between levels": ("small blocks", net.Resampling.__call__, "normalise(x, _EPS)", "normalise(x, 1e-5)"),
    "transposed kernel not flipped": (
        "blocks",
        layers.DoublingConv.__call__,
        "x, self.kernel[...],",
        "x, self.kernel[...][::-1, ::-1],",
    ),
    # The denoiser as a whole
    "cosine before sine": ("full", net.wave, "[jnp.sin(phase), jnp.cos(phase)]", "[jnp.cos(phase), jnp.sin(phase)]"),
    "frequencies not to the last": ("full", net.wave, "(half - 1)", "half"),
    "frequencies rounded at the end": (
        "wave",
        net.wave,
        "np.array(-math.log(_FARTHEST) / (half - 1), dtype)",
        "np.array(-math.log(_FARTHEST), dtype) / np.array(half - 1, dtype)",
    ),
    "levels in [0, 1]": ("full", net.wave, "r.astype(dtype) * _FARTHEST", "r.astype(dtype)"),
    "text not normalised": (
        "full",
        net.Paella.condition,
        "normalise(jnp.concatenate(parts, 1), _EPS)",
        "jnp.concatenate(parts, 1)",
    ),
    "the picture's mapper for the text": (
        "full",
        net.Paella.condition,
        "(self.clip_image_mapper, clip_image",
        "(self.clip_mapper, clip_image",
    ),
    "tokens of CLIP interleaved": (
        "full",
        net.Paella.condition,
        ".reshape(len(byt5), -1, c.c_cond)",
        ".reshape(len(byt5), c.c_cond, -1).swapaxes(1, 2)",
    ),
    "padding that is text": ("padded", net.join, "jnp.pad(array, width)", "jnp.pad(array, width, constant_values=1)"),
    "padding seen": ("padded", net.MultiheadAttention.attend, ", mask=mask", ""),
    "influence on the first tokens": ("influenced", net.Paella.condition, "mask[:, ::-1], 1)[:, ::-1]", "mask, 1)"),
    "influences swapped": (
        "influenced",
        net.Paella.condition,
        "text, picture = (",
        "picture, text = (",
    ),
    "influence on all tokens": ("influenced", net.Paella.condition, "place > lengths", "place > 99"),
    "influence before the softmax": (
        "influenced",
        net.MultiheadAttention.attend,
        "values = values * weights",
        "keys = keys * weights",
    ),
    "no norm of the tokens": (
        "full",
        net.Paella.__call__,
        "normalise(self.in_mapper[0](x), _EPS)",
        "self.in_mapper[0](x)",
    ),
    "no norm of the patches": (
        "full",
        net.Paella.__call__,
        "normalise(self.embedding[1](x), _EPS)",
        "self.embedding[1](x)",
    ),
    "no norm of the logits": (
        "full",
        net.Paella.__call__,
        "normalise(shuffle(x, c.patch_size), _EPS)",
        "shuffle(x, c.patch_size)",
    ),
    "patches with the channels last": (
        "full",
        layers.unshuffle,
        "transpose(0, 1, 3, 5, 2, 4)",
        "transpose(0, 1, 3, 2, 4, 5)",
    ),
    "patches with the channels first": (
        "full",
        layers.shuffle,
        "channels // size**2, size, size)\n    return x.transpose(0, 1, 4, 2, 5, 3)",
        "size, size, channels // size**2)\n    return x.transpose(0, 1, 3, 2, 4, 5)",
    ),
    "square kernels not transposed": (
        "full",
        pull.from_torch,
        "if _is_kernel(flax_name(path)) else array",
        "if _is_kernel(flax_name(path)) and array.shape[0] != array.shape[1] else array",
    ),
    # The VQGAN and the prior
    "padded with zeros": ("blocks", vq.ResBlock.__call__, 'mode="edge"', 'mode="constant"'),
    "tanh in the VQGAN": ("blocks", vq.ResBlock.__call__, "gelu(", "jax.nn.gelu("),
    "gammas in another order": ("blocks", vq.ResBlock.__call__, "g[0], g[1]", "g[1], g[0]"),
    "the same gammas twice": ("blocks", vq.ResBlock.__call__, "g[3], g[4]", "g[0], g[1]"),
    "no last gamma": ("blocks", vq.ResBlock.__call__, "* g[5]", ""),
    "epsilon of the VQGAN": ("small blocks", vq.ResBlock._modulated, "1e-6", "1e-5"),
    "epsilon of the batch norm": ("vqgan", vq.BatchNorm.__call__, "1e-5", "1e-3"),
    "statistics of the picture": (
        "vqgan",
        vq.BatchNorm.__call__,
        "(wide - mean)",
        "(wide - wide.mean((0, 1, 2), keepdims=True))",
    ),
    "no scale of the latents": ("vqgan", vq.VQModel.encode, "x / self.config.scale_factor", "x"),
    "latents divided again": ("vqgan", vq.VQModel.decode, "latents * self", "latents / self"),
    "tokens scaled as latents are": (
        "vqgan",
        vq.VQModel.decode_indices,
        "self.vquantizer.codebook(tokens)",
        "self.vquantizer.codebook(tokens) * self.config.scale_factor",
    ),
    "the most alike, not the nearest": (
        "vqgan",
        vq.VectorQuantize.__call__,
        "along(jnp.square(codes).sum(-1), near) - 2 * near",
        "-near",
    ),
    "the farthest": ("vqgan", vq.VectorQuantize.__call__, "jnp.argmin", "jnp.argmax"),
    "no residual in the prior": ("prior", embed.PriorModel.__call__, "x = x + block(", "x = block("),
    "level before the text": (
        "prior",
        embed.PriorModel.__call__,
        "[text.astype(dtype), wave(r, self.config.c_r).astype(dtype)]",
        "[wave(r, self.config.c_r).astype(dtype), text.astype(dtype)]",
    ),
    "no gelu in the prior": (
        "blocks",
        embed.Block.__call__,
        "gelu(norm(first(x)))",
        "norm(first(x))",
    ),
    "tanh in the prior": ("blocks", embed.Block.__call__, "gelu(", "jax.nn.gelu("),
    "no last norm in the prior": ("blocks", embed.Block.__call__, "norm_out(last(", "(last("),
}


def seen(view):
    """The largest relative error of what a view shows; tokens are compared exactly."""
    made, theirs = VIEWS[view](), cases.recorded("float32")
    if (made.pop("tokens", theirs["tokens"]) != theirs["tokens"]).any():
        return np.inf
    return error(made, {name: theirs[name] for name in made})


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(name, monkeypatch):
    view, *fault = FAULTS[name]
    damage(monkeypatch, *fault)
    assert seen(view) > 1e-5


def test_without_a_fault_nothing_is_seen():
    assert {view for view in VIEWS if seen(view) > 1e-5} == set()
