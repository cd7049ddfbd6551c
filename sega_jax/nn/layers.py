"""Inference layers that equal PyTorch's, channels last.

What torch leaves to defaults is fixed here: explicit padding, epsilons, the exact gelu, and
normalisation and softmax in at least float32. Every layer computes in the dtype of its parameters and
takes inputs of that dtype.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from sega_jax.method.numerics import at_least_float32
from sega_jax.nn.flash_attention import flash


def gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution's share below it, in at least float32, as torch computes it.

    `jax.nn.gelu` takes erfc, a long polynomial that XLA splits into a score of passes over memory on a GPU, and rounds
    in between where x is of half precision.
    """
    wide = x.astype(at_least_float32(x.dtype))
    return (0.5 * wide * (1 + lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "mish": jax.nn.mish,
}


def parameter(*shape: int) -> nnx.Param:
    """A parameter that has a shape and waits for its value."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32))


# The axes of a convolution's input, kernel and output.
_AXES = ("NHWC", "HWIO", "NHWC")
# Attention goes row by row where its logits would be more than this many (1 GiB in float32).
_LOGITS = 2**28
# cuDNN's kernels are slower than XLA's where there are fewer logits: of 1.6 million (3 rows, 8 heads, 256 positions of
# width 160) 48 us against 30 on an H100, of 3.9 million 91 against 44 on an H200, of 16 million 89 against 189.
# TPUs, where nothing was measured, take their kernel from as many on.
_FLASH = 2**22


def along(vector: jax.Array, x: jax.Array) -> jax.Array:
    """A vector [channels] in the rank and dtype of x [..., channels]."""
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def spread(x: jax.Array, like: jax.Array) -> jax.Array:
    """Rows [rows, ...], each as often as `like` [rows x branches, ...] has branches of it, side by side.

    Networks take this where what differs between branches meets what they share. Without branches it is x.
    """
    return x if len(x) >= len(like) else jnp.repeat(x, len(like) // len(x), 0)


class Linear(nnx.Module):
    """y = x W + b over the last axis; a torch weight (out, in) is the transposed kernel (in, out)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True):
        self.kernel = parameter(inputs, outputs)
        self.bias = parameter(outputs) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...]
        return y if self.bias is None else y + along(self.bias[...], y)


class Conv(nnx.Module):
    """2-d convolution over [batch, height, width, channels]; kernel (height, width, in / groups, out).

    `padding` is explicit, ((top, bottom), (left, right)) or one number for all sides: XLA's "SAME" pads
    a strided convolution otherwise than torch does. Each of the `groups` of outputs sees its own inputs only.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int = 3,
        *,
        stride: int = 1,
        padding=None,
        groups: int = 1,
        bias: bool = True,
    ):
        padding = size // 2 if padding is None else padding
        self.stride, self.groups = stride, groups
        self.padding = ((padding, padding),) * 2 if isinstance(padding, int) else padding
        self.kernel = parameter(size, size, inputs // groups, outputs)
        self.bias = parameter(outputs) if bias else None

    def widened(self, x: jax.Array) -> jax.Array:
        """The same with all digits of its sums, in at least float32."""
        wide = at_least_float32(x.dtype)
        return jax.tree.map(lambda leaf: leaf.astype(wide), self)(x.astype(wide))

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        if self.groups == kernel.shape[-1] and self.stride == 1:
            y = lax.platform_dependent(x, kernel, cpu=self._by_shifts, default=self._convolved)
        else:
            y = self._convolved(x, kernel)
        return y if self.bias is None else y + along(self.bias[...], y)

    def _convolved(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=_AXES,
            feature_group_count=self.groups,
        )

    def _by_shifts(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """The same where each output has its own inputs, which XLA's convolution on a CPU takes one by one."""
        (high, wide, own, _), wider = kernel.shape, at_least_float32(x.dtype)
        x = jnp.pad(x, ((0, 0), *self.padding, (0, 0))).astype(wider)
        x = x.reshape(*x.shape[:3], self.groups, own)
        tap = kernel.astype(wider).transpose(0, 1, 3, 2)[:, :, None, None, None]
        height, width = x.shape[1] - high + 1, x.shape[2] - wide + 1
        shifts = [(i, j) for i in range(high) for j in range(wide)]
        y = sum((x[:, i : i + height, j : j + width] * tap[i, j]).sum(-1) for i, j in shifts)
        assert isinstance(y, jax.Array)  # a kernel has at least one position
        return y.astype(kernel.dtype)


class DoublingConv(nnx.Module):
    """The transpose of a convolution of stride 2, from [batch, height, width, in] to twice the height and width.

    torch's of size 2 without padding, and of size 4 with padding 1. The kernel is the transposed convolution's,
    (height, width, out, in).
    """

    def __init__(self, inputs: int, outputs: int, size: int):
        self.kernel = parameter(size, size, outputs, inputs)
        self.bias = parameter(outputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = lax.conv_transpose(x, self.kernel[...], (2, 2), "SAME", dimension_numbers=_AXES, transpose_kernel=True)
        return y + along(self.bias[...], y)


class GroupNorm(nnx.Module):
    """Normalises [batch, ..., channels] over the positions and the channels of each group; a `shift` [batch, channels]
    is added before."""

    def __init__(self, groups: int, channels: int, eps: float):
        self.groups, self.eps = groups, eps
        self.scale = parameter(channels)
        self.bias = parameter(channels)

    def __call__(self, x: jax.Array, shift: jax.Array | None = None) -> jax.Array:
        wide = x.astype(at_least_float32(x.dtype))
        if shift is not None:
            # Here, where it costs no pass over memory: beside a convolution XLA would write it out for all positions.
            wide += shift.astype(wide.dtype).reshape(len(x), *(1,) * (x.ndim - 2), -1)
        mean, variance = self._moments(wide, one_pass=x.dtype != wide.dtype)
        factor = lax.rsqrt(variance + self.eps) * along(self.scale[...], wide)
        return ((wide - mean) * factor + along(self.bias[...], wide)).astype(x.dtype)

    def _moments(self, x: jax.Array, *, one_pass: bool) -> tuple[jax.Array, jax.Array]:
        """Mean and variance of each group at each of its channels, [batch, 1, ..., channels]: those of the channels,
        combined (Chan et al. 1979), since to split the channels of the whole x would cost GPUs a change of its layout.

        A variance is E[(x - mean)²]. One pass over memory takes it as E[(x - a)²] - (mean - a)² with the values a of
        the first position, which loses only digits that x of half precision does not have; with a = 0 it would lose
        all where the mean is large.
        """
        positions, shape = tuple(range(1, x.ndim - 1)), (len(x), *(1,) * (x.ndim - 2), -1)

        def groups(channels):
            means = channels.reshape(len(x), self.groups, -1).mean(-1)
            return means.repeat(x.shape[-1] // self.groups, -1).reshape(shape)

        about = x[(slice(None), *(slice(0, 1),) * (x.ndim - 2))] if one_pass else x.mean(positions, keepdims=True)
        off = x - about
        squares = jnp.square(off).mean(positions, keepdims=True)
        if one_pass:
            offset = off.mean(positions, keepdims=True)
            about, squares = about + offset, squares - jnp.square(offset)
        mean = groups(about)
        return mean, groups(squares + jnp.square(about - mean))


def normalise(x: jax.Array, eps: float) -> jax.Array:
    """x [..., channels] with mean 0 and variance 1 over its last axis, in at least float32."""
    dtype = at_least_float32(x.dtype)
    centred = x.astype(dtype) - x.astype(dtype).mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * lax.rsqrt(variance + eps)


class LayerNorm(nnx.Module):
    """Normalises the last axis."""

    def __init__(self, channels: int, eps: float = 1e-5):
        self.eps = eps
        self.scale = parameter(channels)
        self.bias = parameter(channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        normal = normalise(x, self.eps)
        return (normal * along(self.scale[...], normal) + along(self.bias[...], normal)).astype(x.dtype)


class Embed(nnx.Module):
    """A table of vectors, looked up by integer."""

    def __init__(self, count: int, channels: int):
        self.embedding = parameter(count, channels)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embedding[...][ids]


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    heads: int,
    causal: bool = False,
    mask: jax.Array | None = None,
    implementation: str = "xla",
) -> jax.Array:
    """Scaled dot-product attention of [batch, positions, heads x width] arrays, softmax in >= float32.

    With a `mask`, bool [batch, keys], the other keys are as if they were not there; each row needs one that is.
    `implementation` "xla" runs everywhere; "cudnn", on a GPU in half precision, is used where it is faster and the
    heads are of a width that its kernels take on every such GPU; "pallas", on a TPU in bfloat16 or float32, is used
    where there are as many logits.
    """
    width, logits = query.shape[-1] // heads, len(query) * heads * query.shape[1] * key.shape[1]
    q, k, v = (x.reshape(*x.shape[:2], heads, width) for x in (query, key, value))
    able = width % 8 == 0 and width <= 128 and jnp.finfo(query.dtype).bits == 16
    if implementation == "cudnn" and able and logits >= _FLASH:
        if mask is not None:
            mask = jnp.broadcast_to(mask[:, None, None, :], (len(q), 1, q.shape[1], k.shape[1]))
        found = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation="cudnn")
        return found.reshape(query.shape)
    if implementation == "pallas" and query.dtype in (jnp.bfloat16, jnp.float32) and logits >= _FLASH:
        return flash(q, k, v, mask, causal).reshape(query.shape)
    if logits <= _LOGITS:
        return _attend(q, k, v, mask, causal).reshape(query.shape)
    return jax.lax.map(lambda row: _attend_one(row, causal), (q, k, v, mask)).reshape(query.shape)


def _attend_one(row: tuple[jax.Array, jax.Array, jax.Array, jax.Array | None], causal: bool) -> jax.Array:
    """Attention of one picture's [positions, heads, width], some queries after the others where logits are many."""
    q, k, v, mask = row
    block = _LOGITS // (q.shape[1] * len(k))
    k, v, mask = jax.tree.map(lambda x: x[None], (k, v, mask))
    if causal or block >= len(q):
        return _attend(q[None], k, v, mask, causal)[0]

    def one(query):
        return _attend(query[None, None], k, v, mask, False)[0, 0]

    return jax.lax.map(one, q, batch_size=max(block, 1))


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, causal: bool) -> jax.Array:
    """Attention of [batch, positions, heads, width], with all logits in memory at once.

    JAX's own takes the softmax in float32 where float64 was asked for.
    """
    logits = jnp.einsum("bqhc,bkhc->bhqk", q, k, preferred_element_type=at_least_float32(q.dtype))
    logits = logits / math.sqrt(q.shape[-1])
    if causal:
        past = jnp.tri(logits.shape[-2], logits.shape[-1], dtype=bool)[None, None]
        logits = jnp.where(past, logits, -jnp.inf)
    if mask is not None:
        logits = jnp.where(mask[:, None, None, :], logits, -jnp.inf)
    weights = jax.nn.softmax(logits).astype(v.dtype)
    return jnp.einsum("bhqk,bkhc->bqhc", weights, v)


class Attention(nnx.Module):
    """Self- or cross-attention with diffusers' names, over [batch, positions, channels]: to the keys and values that
    `project` makes of a context, which may have several branches of each picture."""

    def __init__(self, channels: int, context: int, heads: int, *, bias: bool = False, implementation="xla"):
        self.heads, self.implementation = heads, implementation
        self.to_q = Linear(channels, channels, bias=bias)
        self.to_k = Linear(context, channels, bias=bias)
        self.to_v = Linear(context, channels, bias=bias)
        self.to_out = nnx.List([Linear(channels, channels)])

    def project(self, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.to_k(context), self.to_v(context)

    def __call__(self, x: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        query = spread(self.to_q(x), keys)
        return self.to_out[0](attend(query, keys, values, heads=self.heads, implementation=self.implementation))


class ResnetBlock(nnx.Module):
    """Two convolutions with a shortcut; with `embedding`, the time is added in between."""

    def __init__(self, inputs: int, outputs: int, *, embedding: int | None, groups: int, eps: float, activation: str):
        self.activation = activation
        self.norm1 = GroupNorm(groups, inputs, eps)
        self.conv1 = Conv(inputs, outputs)
        self.time_emb_proj = Linear(embedding, outputs) if embedding else None
        self.norm2 = GroupNorm(groups, outputs, eps)
        self.conv2 = Conv(outputs, outputs)
        self.conv_shortcut = Conv(inputs, outputs, 1) if inputs != outputs else None

    def __call__(self, x: jax.Array, embedding: jax.Array | None = None) -> jax.Array:
        act = ACTIVATIONS[self.activation]
        h, shift = self.conv1(act(self.norm1(x))), None
        if self.time_emb_proj is not None:
            assert embedding is not None
            shift = spread(self.time_emb_proj(act(embedding)), h)
            h = spread(h, shift)
        h = self.conv2(act(self.norm2(h, shift)))
        return h + spread(x if self.conv_shortcut is None else self.conv_shortcut(x), h)


class Downsample(nnx.Module):
    """A convolution of stride 2 under diffusers' name `conv`."""

    def __init__(self, channels: int, *, padding=1):
        self.conv = Conv(channels, channels, stride=2, padding=padding)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest-neighbour upsampling by two and a convolution of size 3 under diffusers' name `conv`, from
    [batch, height, width, channels] to twice the height and width, or to one less where `size` says so."""

    def __init__(self, channels: int):
        self.conv = Conv(channels, channels)

    def __call__(self, x: jax.Array, size: tuple[int, ...] | None = None) -> jax.Array:
        batch, height, width, channels = x.shape
        if size not in (None, (2 * height, 2 * width)):
            return self.conv(double(x)[:, : size[0], : size[1]])
        # Of the doubled picture's 3 x 3, each of the four positions that a position becomes sees 2 x 2 positions, some
        # through a sum of the kernel's values: four small convolutions with 4/9 of the products.
        kernel = self.conv.kernel[...]
        sums = jnp.pad(kernel.astype(at_least_float32(kernel.dtype)), ((1, 1), (1, 1), (0, 0), (0, 0)))
        sums = sums[:-1] + sums[1:]
        sums = (sums[:, :-1] + sums[:, 1:]).astype(kernel.dtype)

        def phase(i, j):
            padding = ((1 - i, i), (1 - j, j))
            return lax.conv_general_dilated(x, sums[i::2, j::2], (1, 1), padding, dimension_numbers=_AXES)

        y = jnp.stack([jnp.stack([phase(i, j) for j in (0, 1)], 3) for i in (0, 1)], 2)
        y = y.reshape(batch, 2 * height, 2 * width, channels)
        assert self.conv.bias is not None
        return y + along(self.conv.bias[...], y)


def double(x: jax.Array) -> jax.Array:
    """Nearest-neighbour upsampling by two of [batch, height, width, channels]."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def halve(x: jax.Array) -> jax.Array:
    """Means of 2 x 2 positions of [batch, height, width, channels].

    Raises:
        ValueError: the height or the width is odd.
    """
    batch, height, width, channels = x.shape
    if height % 2 or width % 2:
        raise ValueError(f"a picture of {height}x{width} positions cannot be halved")
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def unshuffle(x: jax.Array, size: int) -> jax.Array:
    """Squares of size x size positions become channels: [batch, height, width, c] -> [batch, height / size,
    width / size, c x size x size], all of the first of the c channels first, as torch orders them."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, height // size, width // size, -1)


def shuffle(x: jax.Array, size: int) -> jax.Array:
    """The inverse of `unshuffle`."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, channels // size**2, size, size)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(batch, height * size, width * size, -1)
