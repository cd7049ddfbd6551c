"""Computes the weight differences of adapters that multiply a weight, and of DoRA, which sets a weight's norms.

These differences depend on the weight. Classes, roles and shapes are as in `sega_jax.weights.lora_forms`.
"""

import math
from collections.abc import Mapping
from typing import TypeVar

import numpy as np

from sega_jax.weights.lora_forms import (
    ALPHA,
    MAGNITUDE,
    Arrays,
    BiasDifference,
    Difference,
    Form,
    LoHa,
    LoKr,
    Lora,
    Shapes,
    Sizes,
    UpBias,
    flat,
    without_ones,
)

T = TypeVar("T")

# An upper limit on the number of butterfly stages, far more than any weight needs.
_MAX_STAGES = 32


class Ia3(Form):
    """(IA)^3 as LyCORIS stores it (Liu et al. 2022, section 3.3).

    The outputs (role `vector_0`) or the inputs (role `vector_1`) are multiplied by 1 + vector. The tensor `on_input`
    selects between the two. The bias does not change.
    """

    name = "(IA)^3"
    needs = (frozenset({"vector_0"}), frozenset({"vector_1"}))

    def _axis(self, names: Shapes | Arrays) -> int:
        return 0 if "vector_0" in names else 1

    def fits(self, shapes: Shapes, shape: Sizes) -> bool:
        axis = self._axis(shapes)
        vector = shapes[f"vector_{axis}"]
        return len(shape) > 1 and max(vector, default=0) == math.prod(vector) == shape[axis]

    def difference(self, arrays: Arrays, weight: np.ndarray, factor: float) -> np.ndarray:
        axis = self._axis(arrays)
        return weight * arrays[f"vector_{axis}"].reshape([-1 if i == axis else 1 for i in range(weight.ndim)])


class PeftIa3(Form):
    """(IA)^3 as peft stores it (Liu et al. 2022, section 3.3).

    The vector multiplies the outputs (ia3_l is [out, 1]) or the inputs (ia3_l is [1, in]). For a convolution, its shape
    is [1, out, 1, 1] or [1, in, 1, 1]. If `out` equals `in`, the shape is ambiguous, and the layer is rejected.
    """

    name = "(IA)^3"
    needs = (frozenset({"ia3_l"}),)

    def fits(self, shapes: Shapes, shape: Sizes) -> bool:
        vector = shapes["ia3_l"]
        if len(shape) == 2:
            return vector in ((shape[0], 1), (1, shape[1]))
        return len(shape) == 4 and shape[0] != shape[1] and vector in ((1, shape[0], 1, 1), (1, shape[1], 1, 1))

    def difference(self, arrays: Arrays, weight: np.ndarray, factor: float) -> np.ndarray:
        vector = arrays["ia3_l"]
        if weight.ndim == 4 and vector.shape[1] == len(weight):
            vector = vector.transpose(1, 0, 2, 3)
        return weight * (vector - 1)


class PeftIa3Bias(PeftIa3):
    """The bias of a layer that peft's (IA)^3 changes. Only a vector for outputs multiplies the bias."""

    of_bias = True

    def fits(self, shapes: Shapes, shape: Sizes) -> bool:
        return len(shape) == 1

    def difference(self, arrays: Arrays, weight: np.ndarray, factor: float) -> np.ndarray:
        vector = arrays["ia3_l"]
        outputs = vector.shape[0] if vector.ndim == 2 else vector.shape[1]
        if outputs != weight.size:
            return np.zeros_like(weight)
        return weight * (vector.reshape(-1) - 1)


class GLora(Form):
    """GLoRA: the difference W a1 a2 + b1 b2 for a weight W (Chavan et al. 2023, without the paper's vectors).

    a1 is [in, r], a2 [r, in], b1 [out, r] and b2 [r, in]. For a convolution, b2 includes the kernel and is [r, in,
    height, width]. In files from the first version of LyCORIS, the two matrices of each pair are swapped.
    """

    name = "GLoRA"
    scaled = True
    needs = (frozenset(f"glora_{name}" for name in ("a1", "a2", "b1", "b2")),)
    may_have = ALPHA

    def rank(self, shapes: Shapes) -> int | None:
        first = shapes["glora_a1"]
        return min(first[:2]) if len(first) > 1 else None

    def sizes(self, shapes: Shapes) -> Sizes | None:
        first, second = shapes["glora_b1"], shapes["glora_b2"]
        return (first[0], second[1]) if min(len(first), len(second)) > 1 else None

    def fits(self, shapes: Shapes, shape: Sizes) -> bool:
        return len(shape) > 1 and (self._fits(shapes, shape) or self._fits(_swapped(shapes), shape))

    def _fits(self, shapes: Shapes, shape: Sizes) -> bool:
        a1, a2, b1, b2 = (shapes[f"glora_{name}"] for name in ("a1", "a2", "b1", "b2"))
        if min(map(len, (a1, a2, b1, b2))) < 2 or not 0 < a1[1] <= shape[1]:
            return False
        rank, ones = a1[1], all(without_ones(matrix[2:]) == () for matrix in (a1, a2, b1))
        inner = (a1[:2], a2[:2], b1[:2]) == ((shape[1], rank), (rank, shape[1]), (shape[0], rank))
        return ones and inner and b2[:2] == (rank, shape[1]) and without_ones(b2[2:]) == without_ones(shape[2:])

    def difference(self, arrays: Arrays, weight: np.ndarray, factor: float) -> np.ndarray:
        if not self._fits({role: array.shape for role, array in arrays.items()}, weight.shape):
            arrays = _swapped(arrays)
        a1, a2, b1, b2 = (flat(arrays[f"glora_{name}"]) for name in ("a1", "a2", "b1", "b2"))
        inputs = np.einsum("oi...,ir->or...", weight, a1, optimize=True)
        inputs = np.einsum("or...,ri->oi...", inputs, a2, optimize=True)
        return np.float32(factor) * (inputs + (b1 @ b2).reshape(weight.shape))


def _swapped(values: Mapping[str, T]) -> dict[str, T]:
    """Swaps the two matrices in each GLoRA pair."""
    pairs = (("a1", "a2"), ("a2", "a1"), ("b1", "b2"), ("b2", "b1"))
    return {f"glora_{name}": values[f"glora_{other}"] for name, other in pairs}


class Oft(Form):
    """OFT: rotates blocks of outputs, R W with R = (1 + Q) (1 - Q)^-1 and Q = B - B^T (Qiu et al. 2023).

    `oft_blocks` is [blocks, size, size], or [stages, blocks, size, size] for butterfly OFT (Liu et al. 2024). `rescale`
    [out, 1, ...] multiplies the outputs afterwards. Here alpha is a constraint: the norm of all Q together is at most
    alpha * `out`. An alpha of 0 means no constraint.
    """

    name = "OFT"
    needs = (frozenset({"oft_blocks"}),)
    may_have = frozenset({"alpha", "rescale"})

    def fits(self, shapes: Shapes, shape: Sizes) -> bool:
        blocks = shapes["oft_blocks"]
        if len(shape) < 2 or len(blocks) not in (3, 4) or min(blocks) < 1:
            return False
        *stages, count, size, width = blocks
        butterflies = not stages or (
            stages[0] < _MAX_STAGES and size % 2 == 0 and shape[0] % (2 ** (stages[0] - 1) * size) == 0
        )
        rescale = shapes.get("rescale", (shape[0],))
        return size == width and count * size == shape[0] == math.prod(rescale) == rescale[0] and butterflies

    def difference(self, arrays: Arrays, weight: np.ndarray, factor: float) -> np.ndarray:
        blocks = arrays["oft_blocks"]
        skew = blocks - blocks.swapaxes(-1, -2)
        constraint = len(weight) * float(arrays["alpha"].reshape(-1)[0]) if "alpha" in arrays else 0.0
        norm = float(np.linalg.norm(skew)) + 1e-8
        if 0 < constraint < norm:
            skew *= np.float32(constraint / norm)
        identity = np.eye(blocks.shape[-1], dtype=skew.dtype)
        try:
            rotations = (identity + skew) @ np.linalg.inv(identity - skew)
        except np.linalg.LinAlgError:  # the entries are so large that adding 1 has no effect
            return np.full_like(weight, np.nan)
        rows = flat(weight)
        if blocks.ndim == 3:
            # LyCORIS and kohya's scripts multiply by the transposed block.
            rows = rotations.swapaxes(1, 2) @ rows.reshape(*blocks.shape[:2], -1)
        for stage, rotation in enumerate(rotations if blocks.ndim == 4 else ()):
            rows = _butterfly(rotation, rows, 2**stage * (blocks.shape[-1] // 2))
        rotated = rows.reshape(weight.shape)
        if "rescale" in arrays:
            rotated = rotated * arrays["rescale"].reshape(-1, *[1] * (weight.ndim - 1))
        return rotated - weight


def _butterfly(blocks: np.ndarray, rows: np.ndarray, stride: int) -> np.ndarray:
    """Rotates blocks of rows [out, n]. Each block combines rows that are `stride` apart."""
    out, size = len(rows), blocks.shape[-1]
    gathered = rows.reshape(-1, 2, stride, rows.shape[-1]).swapaxes(1, 2).reshape(-1, size, rows.shape[-1])
    mixed = (blocks @ gathered).reshape(-1, stride, 2, rows.shape[-1]).swapaxes(1, 2)
    return mixed.reshape(out, -1)


def magnitude_fits(shapes: Shapes, shape: Sizes) -> bool:
    """Returns whether DoRA's norms fit a weight of the given shape. Returns True if the layer has no norms."""
    present = [role for role in MAGNITUDE if role in shapes]
    return len(present) < 2 and all(_axis(role, shapes[role], shape) is not None for role in present)


def _axis(role: str, norms: Sizes, shape: Sizes) -> int | None:
    """Returns the axis of DoRA's norms (0 for outputs, 1 for inputs), or None if they do not fit the weight.

    LyCORIS and OneTrainer store `dora_scale` as [out, 1, ...] or [1, in, ...]. peft's vector is for outputs: [out] for
    linear layers and [1, out, 1, 1] for convolutions.
    """
    size = math.prod(norms)
    if len(shape) < 2 or max(norms, default=0) != size:
        return None
    if size == shape[0] and (role == "magnitude" or norms[0] == size):
        return 0
    return 1 if role == "dora_scale" and len(norms) > 1 and size == shape[1] == norms[1] else None


def decomposed(arrays: Arrays, weight: np.ndarray, difference: np.ndarray) -> np.ndarray:
    """Applies DoRA's norms m to a weight W and its difference D: m (W + D) / |W + D| - W (Liu et al. 2024, equation 5).

    Without norms, D is returned unchanged. The norm is computed over all axes except the axis of m. Where the norm is
    0, the new weight is 0; LyCORIS adds 1.2e-7 to every norm instead.
    """
    role = next((role for role in MAGNITUDE if role in arrays), None)
    if role is None:
        return difference
    axis = _axis(role, arrays[role].shape, weight.shape)
    assert axis is not None
    total = weight + difference
    others = tuple(i for i in range(weight.ndim) if i != axis)
    norms = np.sqrt(np.sum(np.square(total), axis=others, keepdims=True, dtype=np.float64)).astype(total.dtype)
    wanted = arrays[role].reshape(norms.shape)
    return total * np.divide(wanted, norms, out=np.zeros_like(norms), where=norms > 0) - weight


FORMS: tuple[Form, ...] = (
    Lora(),
    LoHa(),
    LoKr(),
    Difference(),
    Ia3(),
    PeftIa3(),
    GLora(),
    Oft(),
    BiasDifference(),
    UpBias(),
    PeftIa3Bias(),
)
