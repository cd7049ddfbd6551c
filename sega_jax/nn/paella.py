"""Paella's token denoiser, version 3 (Rampas et al. 2022, arXiv 2211.07292; the model published in April 2023).

It is a U-Net of ConvNeXt blocks over a grid of tokens. It is conditioned on the share of tokens that are noise, and on
a sequence of ByT5's hidden states and CLIP's embeddings.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sega_jax.method.numerics import at_least_float32
from sega_jax.nn.attention import attend
from sega_jax.nn.config import build
from sega_jax.nn.layers import (
    Conv,
    DoublingConv,
    Embed,
    Linear,
    along,
    gelu,
    normalise,
    parameter,
    shuffle,
    unshuffle,
)

# The epsilon of all normalisations, which have no parameters.
_EPS = 1e-6
_MAX_PERIOD = 10000


class PaellaConfig(NamedTuple):
    """The arguments of the published class that define the network. The defaults describe `paella_v3.pt`.

    Lists have one entry for each level. An entry of `level_config` is the sequence of blocks that a level repeats: C is
    a convolution, T the noise level, A attention and F a feed-forward layer. `nhead` has no effect on levels without A.
    """

    c_in: int = 256
    c_out: int = 256
    num_labels: int = 8192
    c_r: int = 64
    patch_size: int = 2
    c_cond: int = 1024
    c_hidden: tuple[int, ...] = (640, 1280, 1280)
    nhead: tuple[int, ...] = (1, 16, 16)
    blocks: tuple[int, ...] = (6, 16, 6)
    level_config: tuple[str, ...] = ("CT", "CTA", "CTA")
    clip_embd: int = 1024
    byt5_embd: int = 2560
    clip_seq_len: int = 4
    self_attn: bool = True
    sample_size: int = 64  # the default side of a grid in tokens; the published class has no such argument

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "PaellaConfig":
        """Reads a config.json.

        Raises:
            ValueError: The config describes a network that this module does not support.
        """
        self = build(cls, config, "Paella", fixed={"kernel_size": (3, None)}, ignored=("dropout",))
        for name in ("nhead", "blocks", "level_config"):
            if len(getattr(self, name)) != len(self.c_hidden):
                raise ValueError(
                    f"Paella config: {name} has {len(getattr(self, name))} entries, but c_hidden {len(self.c_hidden)}"
                )
        for channels, heads, kinds in zip(self.c_hidden, self.nhead, self.level_config, strict=True):
            if not kinds or set(kinds) - set("CTAF"):
                raise ValueError(f"Paella config: level_config={kinds!r} should contain only the letters C, T, A and F")
            if "A" in kinds and channels % heads:
                raise ValueError(f"Paella config: {channels} channels (c_hidden) cannot be split into {heads} heads")
        if self.c_r < 4:
            raise ValueError(f"Paella config: c_r={self.c_r} should be at least 4")
        return self

    @property
    def factor(self) -> int:
        """The height and width of a grid must be multiples of this number."""
        return self.patch_size * 2 ** (len(self.c_hidden) - 1)


class Condition(NamedTuple):
    """The text conditioning, with one row for each picture. The order of the tokens has no effect."""

    tokens: jax.Array  # [batch, tokens, c_cond]
    mask: jax.Array  # bool [batch, tokens], False for padding, which has no effect
    weights: jax.Array  # [batch, tokens], factors by which the attention weights are multiplied after the softmax


class Projected(NamedTuple):
    """A condition projected by one attention block, valid for all noise levels and grids."""

    keys: jax.Array  # [batch, tokens, channels]
    values: jax.Array  # [batch, tokens, channels]
    mask: jax.Array  # the condition's mask
    weights: jax.Array  # the condition's weights


def join(conditions: Sequence[Condition]) -> Condition:
    """Concatenates the rows of several conditions, padded to the length of the longest sequence."""
    longest = max(condition.mask.shape[1] for condition in conditions)

    def padded(name: str) -> jax.Array:
        arrays = [getattr(condition, name) for condition in conditions]
        widths = [((0, 0), (0, longest - array.shape[1]), (0, 0))[: array.ndim] for array in arrays]
        return jnp.concatenate([jnp.pad(array, width) for array, width in zip(arrays, widths, strict=True)])

    return Condition(*map(padded, Condition._fields))


def wave(r: jax.Array, channels: int) -> jax.Array:
    """Returns the sinusoidal embedding [batch, channels] of noise levels r [batch] in [0, 1], sines first.

    Frequencies are rounded as in torch, because a difference in their last digit changes the phase by 6e-4 at r = 1.
    """
    dtype = at_least_float32(r.dtype)
    half = channels // 2
    exponent = np.arange(half, dtype=dtype) * np.array(-math.log(_MAX_PERIOD) / (half - 1), dtype)
    frequency = np.exp(exponent.astype(np.float64)).astype(dtype)
    phase = (r.astype(dtype) * _MAX_PERIOD)[:, None] * frequency[None]
    return jnp.pad(jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], -1), ((0, 0), (0, channels % 2)))


class _Inputs(NamedTuple):
    """A block's inputs other than x."""

    level: jax.Array  # the embedded noise level, [batch, c_r]
    text: Condition | Projected | None
    skip: jax.Array | None = None  # for a level's first block on the way up: the skip connection, shaped like x


class GlobalResponseNorm(nnx.Module):
    """Scales channels by their norms over all positions, relative to the mean norm (Woo et al. 2023, ConvNeXt V2)."""

    def __init__(self, channels: int):
        self.gamma = parameter(1, 1, 1, channels)
        self.beta = parameter(1, 1, 1, channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(at_least_float32(x.dtype))
        total = jnp.square(wide).sum((1, 2), keepdims=True)
        # The square root has no gradient at 0, and the total is 0 if the gelu sets a channel to zero everywhere.
        size = jnp.where(total > 0, jnp.sqrt(jnp.where(total > 0, total, 1)), 0)
        share = size / (size.mean(-1, keepdims=True) + 1e-6)
        gamma, beta = (p[...].astype(wide.dtype) for p in (self.gamma, self.beta))
        return (gamma * (wide * share) + beta + wide).astype(x.dtype)


class FeedForward(nnx.Module):
    """x + channelwise(norm(x)); only the response norm mixes positions."""

    def __init__(self, channels: int):
        # None replaces the gelu and the dropout in torch's list, which have no parameters.
        hidden = 4 * channels
        self.channelwise: nnx.List[Any] = nnx.List(
            [Linear(channels, hidden), None, GlobalResponseNorm(hidden), None, Linear(hidden, channels)]
        )

    def __call__(self, x: jax.Array, inputs: _Inputs) -> jax.Array:
        return x + self._mix(x)

    def _mix(self, x: jax.Array) -> jax.Array:
        first, _, norm, _, last = self.channelwise
        x = first(normalise(x, _EPS).astype(x.dtype))
        return last(norm(gelu(x)))


class ResBlock(FeedForward):
    """A depthwise convolution followed by the layers of `FeedForward`; the residual is x.

    With a skip connection, output g depends on the channels 2g and 2g + 1 of [x, skip], so the first half of the
    outputs depends only on x, and the second half depends only on the skip connection.
    """

    def __init__(self, channels: int, *, skips: bool):
        super().__init__(channels)
        self.skips = skips
        self.depthwise = Conv(2 * channels if skips else channels, channels, groups=channels)

    def __call__(self, x: jax.Array, inputs: _Inputs) -> jax.Array:
        h = x
        if self.skips:
            assert inputs.skip is not None
            h = jnp.concatenate([x, inputs.skip], -1)
        return x + self._mix(self.depthwise(h))


class TimestepBlock(nnx.Module):
    """Scales and shifts channels, depending on the noise level."""

    def __init__(self, channels: int, level: int):
        self.mapper = Linear(level, 2 * channels)

    def __call__(self, x: jax.Array, inputs: _Inputs) -> jax.Array:
        scale, shift = jnp.split(self.mapper(inputs.level)[:, None, None, :], 2, -1)
        return x * (1 + scale) + shift


class MultiheadAttention(nnx.Module):
    """torch's multi-head attention, which stores the projections of queries, keys and values in one array."""

    def __init__(self, channels: int, heads: int, implementation: str):
        self.heads, self.implementation = heads, implementation
        self.in_proj_weight = parameter(3 * channels, channels)
        self.in_proj_bias = parameter(3 * channels)
        self.out_proj = Linear(channels, channels)

    def project(self, x: jax.Array) -> list[jax.Array]:
        """Returns the queries, keys and values of tokens [batch, tokens, channels]."""
        parts = zip(*(jnp.split(p[...], 3) for p in (self.in_proj_weight, self.in_proj_bias)), strict=True)
        return [x @ weight.T + along(bias, x) for weight, bias in parts]

    def attend(
        self, query: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array, weights: jax.Array
    ) -> jax.Array:
        """Attends to the keys that `mask` allows, and multiplies the attention weight of each key by its factor."""
        # Scaling the values is equivalent to scaling the attention weights.
        values = values * weights[..., None].astype(values.dtype)
        out = attend(query, keys, values, heads=self.heads, mask=mask, implementation=self.implementation)
        return self.out_proj(out)


class Attention2D(nnx.Module):
    def __init__(self, channels: int, heads: int, implementation: str):
        self.attn = MultiheadAttention(channels, heads, implementation)


class AttnBlock(nnx.Module):
    """Attention of every position to all positions and to the text, with a single softmax."""

    def __init__(self, channels: int, text: int, heads: int, *, self_attn: bool, implementation: str):
        self.self_attn = self_attn
        self.attention = Attention2D(channels, heads, implementation)
        # None replaces the silu in torch's list.
        self.kv_mapper: nnx.List[Any] = nnx.List([None, Linear(text, channels)])

    def project(self, text: Condition) -> Projected:
        _, keys, values = self.attention.attn.project(self.kv_mapper[1](jax.nn.silu(text.tokens)))
        return Projected(keys, values, text.mask, text.weights)

    def __call__(self, x: jax.Array, inputs: _Inputs) -> jax.Array:
        attn, text = self.attention.attn, inputs.text
        assert text is not None
        keys, values, mask, weights = self.project(text) if isinstance(text, Condition) else text
        positions = normalise(x, _EPS).astype(x.dtype).reshape(len(x), -1, x.shape[-1])
        query, self_keys, self_values = attn.project(positions)
        if self.self_attn:
            keys, values = jnp.concatenate([self_keys, keys], 1), jnp.concatenate([self_values, values], 1)
            before = ((0, 0), (positions.shape[1], 0))
            mask, weights = (jnp.pad(array, before, constant_values=1) for array in (mask, weights))
        return x + attn.attend(query, keys, values, mask, weights).reshape(x.shape)


class Resampling(nnx.List):
    """A normalisation and a convolution between two levels."""

    def __call__(self, x: jax.Array, inputs: _Inputs) -> jax.Array:
        return self[1](normalise(x, _EPS).astype(x.dtype))


class Paella(nnx.Module):
    """Paella's denoiser. `__call__(x, r, text)` returns the logits of the clean tokens.

    x: int32 [batch, height, width] below `num_labels`, with a height and width divisible by `config.factor`;
    r: [batch] in [0, 1], the share of tokens that are noise (kept in float32 or wider);
    text: the result of `condition`, or its projection by `project` -> [batch, height, width, num_labels] in the dtype
    of the parameters.

    Args:
        config: The config of the network.
        attention: The implementation of `sega_jax.nn.attention.attend`: "xla", "cudnn" or "pallas".

    Raises:
        ValueError: The height or width of x is not a multiple of `config.factor`.
    """

    def __init__(self, config: PaellaConfig, attention: str = "xla"):
        c, levels = config, range(len(config.c_hidden))
        patch, first = c.patch_size**2, c.c_hidden[0]
        self.config = c
        self.byt5_mapper = Linear(c.byt5_embd, c.c_cond)
        self.clip_mapper = Linear(c.clip_embd, c.clip_seq_len * c.c_cond)
        self.clip_image_mapper = Linear(c.clip_embd, c.clip_seq_len * c.c_cond)
        self.in_mapper = nnx.List([Embed(c.num_labels, c.c_in)])
        self.embedding: nnx.List[Any] = nnx.List([None, Conv(patch * c.c_in, first, 1)])
        self.down_blocks = nnx.List([_down(c, level, attention) for level in levels])
        self.up_blocks = nnx.List([_up(c, level, attention) for level in reversed(levels)])
        self.clf: nnx.List[Any] = nnx.List([None, Conv(first, patch * c.c_out, 1)])
        self.out_mapper: nnx.List[Any] = nnx.List([None, Conv(c.c_out, c.num_labels, 1, bias=False)])

    @staticmethod
    def rename(name: str) -> str:
        return name

    def condition(
        self,
        byt5: jax.Array,
        clip: jax.Array | None = None,
        clip_image: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        has_clip: jax.Array | None = None,
        has_image: jax.Array | None = None,
        influence: tuple[Any, Any] | None = None,
    ) -> Condition:
        """Returns the conditioning on texts.

        Args:
            byt5: ByT5's hidden states [batch, bytes, byt5_embd].
            clip: OpenCLIP's unnormalised text embeddings [batch, clip_embd]; None omits their tokens.
            clip_image: OpenCLIP's picture embeddings [batch, clip_embd] or [batch, pictures, clip_embd], or None.
            mask: bool [batch, bytes], False for padding; None means no padding. The published code differs: it also
                attends to padding.
            has_clip, has_image: bool [batch], True for rows that have these embeddings; None means all rows.
            influence: (text, picture), factors by which the attention weights are multiplied after the softmax. Each is
                a number or [batch, 1]. The published inference script uses (1.2, 0.4). As in that script, they apply
                only to the last N tokens, where N is the number of bytes: the second factor to the last `clip_seq_len`
                of them, and the first to the rest. CLIP's tokens are at the end, so the first bytes get no factor.
        """
        c, dtype = self.config, self.byt5_mapper.kernel[...].dtype
        mask = jnp.ones(byt5.shape[:2], bool) if mask is None else mask.astype(bool)
        lengths, parts, masks = mask.sum(1, keepdims=True), [self.byt5_mapper(byt5.astype(dtype))], [mask]
        for mapper, embedding, has in (
            (self.clip_mapper, clip, has_clip),
            (self.clip_image_mapper, clip_image, has_image),
        ):
            if embedding is not None:
                parts.append(mapper(embedding.astype(dtype)).reshape(len(byt5), -1, c.c_cond))
                has = jnp.ones(len(byt5), bool) if has is None else has
                masks.append(jnp.broadcast_to(has[:, None], parts[-1].shape[:2]))
        tokens = normalise(jnp.concatenate(parts, 1), _EPS).astype(dtype)
        mask = jnp.concatenate(masks, 1)
        weights = jnp.ones(mask.shape, dtype)
        if influence is not None:
            text, picture = (jnp.asarray(factor, dtype) for factor in influence)
            place = jnp.cumsum(mask[:, ::-1], 1)[:, ::-1]
            factors = jnp.where(place > c.clip_seq_len, text, picture)
            weights = jnp.where(place > lengths, weights, factors)
        return Condition(tokens, mask, weights)

    def project(self, text: Condition) -> list[Projected]:
        """Projects the text for all attention blocks, in their order. Calls with the same text can share the result."""
        blocks = (block for level in (*self.down_blocks, *self.up_blocks) for block in level)
        return [block.project(text) for block in blocks if isinstance(block, AttnBlock)]

    def __call__(self, x: jax.Array, r: jax.Array, text: Condition | Sequence[Projected]) -> jax.Array:
        c, dtype = self.config, self.byt5_mapper.kernel[...].dtype
        if x.shape[1] % c.factor or x.shape[2] % c.factor:
            raise ValueError(f"the grid has {x.shape[1]}x{x.shape[2]} tokens; use multiples of {c.factor}")
        texts = iter(self.project(text) if isinstance(text, Condition) else text)
        inputs = _Inputs(wave(r, c.c_r).astype(dtype), None)

        def run(block: nnx.Module, x: jax.Array) -> jax.Array:
            return block(x, inputs._replace(text=next(texts)) if isinstance(block, AttnBlock) else inputs)

        x = unshuffle(normalise(self.in_mapper[0](x), _EPS).astype(dtype), c.patch_size)
        x = normalise(self.embedding[1](x), _EPS).astype(dtype)
        outputs = []
        for level in self.down_blocks:
            for block in level:
                x = run(block, x)
            outputs.append(x)
        for level in self.up_blocks:
            inputs = inputs._replace(skip=outputs.pop())
            for block in level:
                x = run(block, x)
        x = self.clf[1](normalise(x, _EPS).astype(dtype))
        return self.out_mapper[1](normalise(shuffle(x, c.patch_size), _EPS).astype(dtype))


def _down(c: PaellaConfig, level: int, attention: str) -> nnx.List:
    above, channels = c.c_hidden[max(level - 1, 0)], c.c_hidden[level]
    down = [Resampling([None, Conv(above, channels, 2, stride=2, padding=0)])] if level else []
    kinds = c.blocks[level] * c.level_config[level]
    return nnx.List(down + [_block(c, level, kind, attention) for kind in kinds])


def _up(c: PaellaConfig, level: int, attention: str) -> nnx.List:
    above, channels = c.c_hidden[max(level - 1, 0)], c.c_hidden[level]
    kinds = c.blocks[level] * c.level_config[level]
    blocks = [_block(c, level, kinds[0], attention, skips=level < len(c.c_hidden) - 1)]
    blocks += [_block(c, level, kind, attention) for kind in kinds[1:]]
    return nnx.List(blocks + ([Resampling([None, DoublingConv(channels, above, 2)])] if level else []))


def _block(c: PaellaConfig, level: int, kind: str, attention: str, *, skips: bool = False) -> nnx.Module:
    channels = c.c_hidden[level]
    if kind == "C":
        return ResBlock(channels, skips=skips)
    if kind == "T":
        return TimestepBlock(channels, c.c_r)
    if kind == "F":
        return FeedForward(channels)
    return AttnBlock(channels, c.c_cond, c.nhead[level], self_attn=c.self_attn, implementation=attention)
