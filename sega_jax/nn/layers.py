"""Inference layers that give the same results as PyTorch's, with channels last.

Everything for which torch has a default is explicit here: padding, epsilons, the exact gelu, and normalisation and
softmax in at least float32. Every layer computes in the dtype of its parameters and expects inputs of that dtype.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from sega_jax.method.numerics import at_least_float32
from sega_jax.nn.attention import attend


def gelu(x: jax.Array) -> jax.Array:
    """Computes the exact gelu, x Phi(x), using erf in at least float32, as torch does.

    `jax.nn.gelu` uses erfc, a long polynomial that XLA splits into about twenty passes over memory on a GPU, and rounds
    intermediate values to half precision if x is in half precision.
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
    """Returns a parameter that is only a shape (`jax.ShapeDtypeStruct`)."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32))


# The axis orders of a convolution's input, kernel and output.
_AXES = ("NHWC", "HWIO", "NHWC")


def along(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Converts a vector [channels] to the rank and dtype of x [..., channels]."""
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def spread(x: jax.Array, like: jax.Array) -> jax.Array:
    """Repeats every row of x [rows, ...] once for each of its adjacent branches in `like` [rows x branches, ...].

    It is used to combine activations that are the same for all branches with activations that differ between branches.
    """
    return x if len(x) >= len(like) else jnp.repeat(x, len(like) // len(x), 0)


class Linear(nnx.Module):
    """y = x W + b over the last axis. The kernel (in, out) is the transpose of torch's weight (out, in)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True):
        self.kernel = parameter(inputs, outputs)
        self.bias = parameter(outputs) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...]
        return y if self.bias is None else y + along(self.bias[...], y)


class Conv(nnx.Module):
    """2-d convolution over [batch, height, width, channels] with a kernel (height, width, in / groups, out).

    `padding` is ((top, bottom), (left, right)), or one number for all sides; None means size // 2. XLA's "SAME" would
    pad strided convolutions differently from torch. Each group of outputs depends on only one group of inputs.
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
        """Applies the convolution in at least float32 and does not round the result to the dtype of x."""
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
        """Computes, as a sum of shifted products, a convolution with one output for each group, because XLA's
        convolution processes the groups one by one on a CPU."""
        (rows, columns, inputs, _), wider = kernel.shape, at_least_float32(x.dtype)
        x = jnp.pad(x, ((0, 0), *self.padding, (0, 0))).astype(wider)
        x = x.reshape(*x.shape[:3], self.groups, inputs)
        tap = kernel.astype(wider).transpose(0, 1, 3, 2)[:, :, None, None, None]
        height, width = x.shape[1] - rows + 1, x.shape[2] - columns + 1
        shifts = [(i, j) for i in range(rows) for j in range(columns)]
        y = sum((x[:, i : i + height, j : j + width] * tap[i, j]).sum(-1) for i, j in shifts)
        assert isinstance(y, jax.Array)  # for mypy; a kernel has at least one position
        return y.astype(kernel.dtype)


class DoublingConv(nnx.Module):
    """A transposed convolution with stride 2 that doubles the height and width of [batch, height, width, in].

    It equals torch's layer with size 2 and no padding, or size 4 and padding 1. The kernel is (height, width, out, in).
    """

    def __init__(self, inputs: int, outputs: int, size: int):
        self.kernel = parameter(size, size, outputs, inputs)
        self.bias = parameter(outputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = lax.conv_transpose(x, self.kernel[...], (2, 2), "SAME", dimension_numbers=_AXES, transpose_kernel=True)
        return y + along(self.bias[...], y)


class GroupNorm(nnx.Module):
    """Adds an optional `shift` [batch, channels] to x [batch, ..., channels] and normalises each group of channels."""

    def __init__(self, groups: int, channels: int, eps: float):
        self.groups, self.eps = groups, eps
        self.scale = parameter(channels)
        self.bias = parameter(channels)

    def __call__(self, x: jax.Array, shift: jax.Array | None = None) -> jax.Array:
        wide = x.astype(at_least_float32(x.dtype))
        if shift is not None:
            # Adding the shift here needs no pass over memory; after a convolution, XLA would materialise the sum.
            wide += shift.astype(wide.dtype).reshape(len(x), *(1,) * (x.ndim - 2), -1)
        mean, variance = self._moments(wide, one_pass=x.dtype != wide.dtype)
        factor = lax.rsqrt(variance + self.eps) * along(self.scale[...], wide)
        return ((wide - mean) * factor + along(self.bias[...], wide)).astype(x.dtype)

    def _moments(self, x: jax.Array, *, one_pass: bool) -> tuple[jax.Array, jax.Array]:
        """Returns the mean and variance of each channel's group, [batch, 1, ..., channels].

        Moments are computed for each channel and then combined (Chan et al. 1979), because splitting the channel axis
        of x would change its layout on a GPU. With `one_pass`, the variance is E[(x - a)²] - (mean - a)², where a is x
        at the first position. This loses only digits that a half-precision x does not have. With a = 0, the variance
        loses all significant digits if the mean is large.
        """
        positions, shape = tuple(range(1, x.ndim - 1)), (len(x), *(1,) * (x.ndim - 2), -1)

        def groups(channels):
            means = channels.reshape(len(x), self.groups, -1).mean(-1)
            return means.repeat(x.shape[-1] // self.groups, -1).reshape(shape)

        centre = x[(slice(None), *(slice(0, 1),) * (x.ndim - 2))] if one_pass else x.mean(positions, keepdims=True)
        deviation = x - centre
        squares = jnp.square(deviation).mean(positions, keepdims=True)
        if one_pass:
            offset = deviation.mean(positions, keepdims=True)
            centre, squares = centre + offset, squares - jnp.square(offset)
        mean = groups(centre)
        return mean, groups(squares + jnp.square(centre - mean))


def normalise(x: jax.Array, eps: float) -> jax.Array:
    """Normalises the last axis of x [..., channels] to mean 0 and variance 1, in at least float32."""
    dtype = at_least_float32(x.dtype)
    centred = x.astype(dtype) - x.astype(dtype).mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * lax.rsqrt(variance + eps)


class LayerNorm(nnx.Module):
    """Normalises the last axis and applies a learned scale and bias."""

    def __init__(self, channels: int, eps: float = 1e-5):
        self.eps = eps
        self.scale = parameter(channels)
        self.bias = parameter(channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        normal = normalise(x, self.eps)
        return (normal * along(self.scale[...], normal) + along(self.bias[...], normal)).astype(x.dtype)


class Embed(nnx.Module):
    """A table of vectors, indexed by integers."""

    def __init__(self, count: int, channels: int):
        self.embedding = parameter(count, channels)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embedding[...][ids]


class Attention(nnx.Module):
    """Self- or cross-attention over [batch, positions, channels], with diffusers' names. `project` returns the keys and
    values of a context, which may have several branches for each picture."""

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
    """Two convolutions and a shortcut; the projected time embedding, if any, is added between the convolutions."""

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
    """A convolution with stride 2, named `conv` as in diffusers."""

    def __init__(self, channels: int, *, padding=1):
        self.conv = Conv(channels, channels, stride=2, padding=padding)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest-neighbour upsampling by two, then a 3 x 3 convolution, named `conv` as in diffusers. `size` is the height
    and width of the result; each may be one less than twice that of x."""

    def __init__(self, channels: int):
        self.conv = Conv(channels, channels)

    def __call__(self, x: jax.Array, size: tuple[int, ...] | None = None) -> jax.Array:
        batch, height, width, channels = x.shape
        if size not in (None, (2 * height, 2 * width)):
            return self.conv(double(x)[:, : size[0], : size[1]])
        # Each input position becomes four output positions. The 3 x 3 window of an output position covers only 2 x 2
        # input positions, so kernel values for the same input position can be summed in advance. The result is four
        # 2 x 2 convolutions with 4/9 of the multiplications.
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
    """Doubles the height and width of [batch, height, width, channels] by nearest-neighbour interpolation."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def halve(x: jax.Array) -> jax.Array:
    """Halves the height and width of [batch, height, width, channels] by averaging 2 x 2 positions.

    Raises:
        ValueError: The height or width is odd.
    """
    batch, height, width, channels = x.shape
    if height % 2 or width % 2:
        raise ValueError(f"{height}x{width} positions cannot be halved; the height and width should be even")
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def unshuffle(x: jax.Array, size: int) -> jax.Array:
    """Turns squares of size x size positions into channels: [batch, height, width, c] -> [batch, height / size,
    width / size, c x size x size], in torch's order, with the original channel outermost."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, height // size, width // size, -1)


def shuffle(x: jax.Array, size: int) -> jax.Array:
    """Inverts `unshuffle`."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, channels // size**2, size, size)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(batch, height * size, width * size, -1)
