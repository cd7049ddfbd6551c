"""Computes the weight differences of LoRAs and other adapters that add to a weight.

Each form of adapter is one class. `sega_jax.weights.lora_products` contains the forms that multiply a weight. Arrays
are float32 and keyed by their roles in the file (`sega_jax.weights.lora_names`). Weights are [out, in] or [out, in,
height, width], as in torch's files. `factor` is alpha / r, where r is the rank.

`fits` checks the shapes before any array is read. This ensures that every product is at most as large as the weight or
a matrix in the file.
"""

import math
from collections.abc import Mapping

import numpy as np

Shapes = Mapping[str, tuple[int, ...]]  # {role: shape} of a layer's tensors
Arrays = Mapping[str, np.ndarray]
Sizes = tuple[int, ...]


class Form:
    """One form of adapter. It defines how tensors describe the change to a layer's weight or bias."""

    name: str
    needs: tuple[frozenset[str], ...]  # alternative sets of required roles; a layer must have all roles of one set
    may_have: frozenset[str] = frozenset()  # optional roles
    of_bias: bool = False  # whether the form changes the layer's bias instead of its weight
    scaled: bool = False  # whether the difference is multiplied by alpha / r

    def rank(self, shapes: Shapes) -> int | None:
        """Returns the rank (the divisor of alpha), or None for a form without alpha or rank."""
        return None

    def sizes(self, shapes: Shapes) -> Sizes | None:
        """Returns (out, in) of the weight that the tensors fit, or None if they do not determine it.

        For a convolution, `in` may include the size of the kernel as a factor.
        """
        return None

    def fits(self, shapes: Shapes, shape: Sizes) -> bool:
        """Returns whether the tensors fit a weight or bias of the given shape."""
        raise NotImplementedError

    def difference(self, arrays: Arrays, weight: np.ndarray, factor: float) -> np.ndarray:
        """Returns the difference to add to `weight` (a weight or bias), in float32 or a wider dtype."""
        raise NotImplementedError


ALPHA, MAGNITUDE = frozenset({"alpha", "scale"}), frozenset({"dora_scale", "magnitude"})


def flat(array: np.ndarray) -> np.ndarray:
    """Reshapes an array to a matrix, keeping the first axis."""
    return array.reshape(len(array), -1)


def _matrices(shapes: Shapes, *roles: str) -> bool:
    """Returns whether the tensors with the given roles are matrices without empty axes."""
    return all(len(shapes[role]) == 2 and min(shapes[role]) > 0 for role in roles)


def without_ones(kernel: Sizes) -> Sizes:
    """Returns a kernel's shape, or () if all its sizes are 1.

    Files may store a 1 x 1 convolution as a linear layer, or vice versa.
    """
    return () if all(size == 1 for size in kernel) else kernel


def _with_kernel(mid: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Returns a convolution's weight [out, in, height * width] from mid [r, r, height, width], up [out, r] and down [r,
    in].

    The smaller product is computed first. It is no larger than the weight, unless r is larger than both `in` and `out`.
    """
    mid = mid.reshape(*mid.shape[:2], -1)
    if down.shape[1] >= len(up):
        return np.einsum("obk,bi->oik", np.einsum("oa,abk->obk", up, mid, optimize=True), down, optimize=True)
    return np.einsum("oa,aik->oik", up, np.einsum("abk,bi->aik", mid, down, optimize=True), optimize=True)


class Lora(Form):
    """LoRA: the product of up [out, r] and down [r, in] (Hu et al. 2022, section 4.1).

    For a convolution, the kernel is stored in down, which is then [r, in, height, width], or in a third tensor between
    up and down, mid [r, r, height, width].
    """

    name = "LoRA"
    scaled = True
    needs = (frozenset({"up", "down"}),)
    may_have = frozenset({"mid"}) | ALPHA | MAGNITUDE

    def rank(self, shapes: Shapes) -> int | None:
        return shapes["down"][0] if shapes["down"] else None

    def sizes(self, shapes: Shapes) -> Sizes | None:
        up, down = shapes["up"], shapes["down"]
        return (up[0], down[1]) if len(up) > 1 and len(down) > 1 else None

    def fits(self, shapes: Shapes, shape: Sizes) -> bool:
        up, down = shapes["up"], shapes["down"]
        if len(down) < 2 or len(up) < 2 or len(shape) < 2:
            return False
        rank, inputs, *kernel = down
        if (mid := shapes.get("mid")) is not None:
            if without_ones(tuple(kernel)) or mid[:2] != (rank, rank):
                return False
            kernel = list(mid[2:])
        wanted, stored = without_ones(shape[2:]), without_ones(tuple(kernel))
        return (
            rank > 0
            and up[:2] == (shape[0], rank)
            and up[2:] in ((), (1, 1))
            and (inputs, stored) == (shape[1], wanted)
        )

    def difference(self, arrays: Arrays, weight: np.ndarray, factor: float) -> np.ndarray:
        up, down = flat(arrays["up"]), flat(arrays["down"])
        product = up @ down if "mid" not in arrays else _with_kernel(arrays["mid"], up, down)
        return np.float32(factor) * product.reshape(weight.shape)


class LoHa(Form):
    """LoHa: the element-wise product of two matrices of rank r (Hyeon-Woo et al. 2022, proposition 1).

    The difference is (w1_a w1_b) * (w2_a w2_b), where w1_a and w2_a are [out, r], and w1_b and w2_b are [r, in * height
    * width]. For a convolution, t1 and t2 [r, r, height, width] may store the kernel (proposition 3). In that case w1_a
    and w2_a are [r, out], and w1_b and w2_b are [r, in].
    """

    name = "LoHa"
    scaled = True
    needs = (frozenset(f"hada_w{n}_{side}" for n in (1, 2) for side in "ab"),)
    may_have = frozenset({"hada_t1", "hada_t2"}) | ALPHA | MAGNITUDE

    def rank(self, shapes: Shapes) -> int | None:
        return shapes["hada_w1_b"][0] if shapes["hada_w1_b"] else None

    def sizes(self, shapes: Shapes) -> Sizes | None:
        first, second = shapes["hada_w1_a"], shapes["hada_w1_b"]
        if len(first) != 2 or len(second) != 2:
            return None
        return (first[1] if "hada_t1" in shapes else first[0], second[1])

    def fits(self, shapes: Shapes, shape: Sizes) -> bool:
        if len(shape) < 2 or not _matrices(shapes, *self.needs[0]) or ("hada_t1" in shapes) != ("hada_t2" in shapes):
            return False
        rank = shapes["hada_w1_b"][0]
        if "hada_t1" in shapes:
            kernels = {shapes["hada_t1"], shapes["hada_t2"]}
            first, second, allowed = (rank, shape[0]), (rank, shape[1]), kernels == {(rank, rank, *shape[2:])}
        else:
            first, second, allowed = (shape[0], rank), (rank, math.prod(shape[1:])), True
        firsts = {shapes["hada_w1_a"], shapes["hada_w2_a"]}
        return allowed and firsts == {first} and {shapes["hada_w1_b"], shapes["hada_w2_b"]} == {second}

    def difference(self, arrays: Arrays, weight: np.ndarray, factor: float) -> np.ndarray:
        def product(n: int) -> np.ndarray:
            first, second = arrays[f"hada_w{n}_a"], arrays[f"hada_w{n}_b"]
            if "hada_t1" in arrays:
                # The first axis of t is contracted with w_a, the second with w_b.
                return _with_kernel(arrays[f"hada_t{n}"], first.T, second).reshape(weight.shape)
            return (first @ second).reshape(weight.shape)

        total = product(1)
        total *= product(2)
        return np.float32(factor) * total


class LoKr(Form):
    """LoKr: the Kronecker product of w1 and w2 (Yeh et al. 2024).

    w1 is [a, b] and w2 is [c, d] or [c, d, height, width], where out = a * c and in = b * d. Each may be stored as a
    product of rank r, w1_a w1_b or w2_a w2_b. For a convolution whose w2 is stored as a product, either w2_b is [r, d *
    height * width], or t2 [r, r, height, width] stores the kernel and w2_a is [r, c]. If neither w1 nor w2 is stored as
    a product, there is no rank, and the alpha in the file is ignored, as in LyCORIS. Alpha and r in peft's settings
    still apply.
    """

    name = "LoKr"
    scaled = True
    needs = tuple(
        frozenset(first | second)
        for first in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
        for second in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})
    )
    may_have = frozenset({"lokr_t2"}) | ALPHA | MAGNITUDE

    def rank(self, shapes: Shapes) -> int | None:
        role = next((role for role in ("lokr_w1_b", "lokr_w2_b") if shapes.get(role)), None)
        return None if role is None else shapes[role][0]

    def sizes(self, shapes: Shapes) -> Sizes | None:
        first, second = self._first(shapes), self._second(shapes)
        return None if first is None or second is None else (first[0] * second[0], first[1] * second[1])

    def _first(self, shapes: Shapes) -> Sizes | None:
        """Returns the shape of w1, or None if its tensors are inconsistent."""
        if "lokr_w1" in shapes:
            return shapes["lokr_w1"] if _matrices(shapes, "lokr_w1") else None
        left, right = shapes["lokr_w1_a"], shapes["lokr_w1_b"]
        valid = _matrices(shapes, "lokr_w1_a", "lokr_w1_b") and left[1] == right[0] == self.rank(shapes)
        return (left[0], right[1]) if valid else None

    def _second(self, shapes: Shapes) -> Sizes | None:
        """Returns the shape of w2 (its second axis may include the kernel), or None if its tensors are inconsistent."""
        if "lokr_w2" in shapes:
            second = shapes["lokr_w2"]
            return second if len(second) in (2, 4) and min(second) > 0 and "lokr_t2" not in shapes else None
        left, right, rank = shapes["lokr_w2_a"], shapes["lokr_w2_b"], self.rank(shapes)
        if min(len(left), len(right)) < 2 or min(*left, *right) < 1 or len(left) > 2 or right[0] != rank:
            return None
        if (mid := shapes.get("lokr_t2")) is not None:
            valid = mid[:2] == (rank, rank) and len(mid) == 4 and left[0] == rank and len(right) == 2
            return (left[1], right[1], *mid[2:]) if valid else None
        return (left[0], math.prod(right[1:])) if left[1] == rank else None

    def fits(self, shapes: Shapes, shape: Sizes) -> bool:
        first, second = self._first(shapes), self._second(shapes)
        if len(shape) < 2 or first is None or second is None:
            return False
        inputs = math.prod(shape[1:])
        kernel = without_ones(shape[2:])
        explicit = len(second) == 2 or without_ones(second[2:]) == kernel
        # If w2 is a matrix, its second axis has d * height * width entries, so the kernel's size must divide it.
        flat = len(second) == 4 or second[1] % math.prod(kernel) == 0
        return explicit and flat and first[0] * second[0] == shape[0] and first[1] * math.prod(second[1:]) == inputs

    def difference(self, arrays: Arrays, weight: np.ndarray, factor: float) -> np.ndarray:
        first = arrays["lokr_w1"] if "lokr_w1" in arrays else arrays["lokr_w1_a"] @ arrays["lokr_w1_b"]
        if "lokr_w2" in arrays:
            second = arrays["lokr_w2"]
        elif "lokr_t2" in arrays:
            second = _with_kernel(arrays["lokr_t2"], arrays["lokr_w2_a"].T, arrays["lokr_w2_b"])
        else:
            second = arrays["lokr_w2_a"] @ flat(arrays["lokr_w2_b"])
        product = np.einsum("ab,cd->acbd", first * np.float32(factor), flat(second))
        return product.reshape(weight.shape)


class Difference(Form):
    """The full change to a weight (`diff`) or to a normalisation layer's scale (`w_norm`). Alpha is ignored."""

    name = "a difference"
    needs = (frozenset({"diff"}), frozenset({"w_norm"}))
    may_have = ALPHA

    def _role(self, names: Shapes | Arrays) -> str:
        return next(role for needed in self.needs for role in needed if role in names)

    def sizes(self, shapes: Shapes) -> Sizes | None:
        shape = shapes[self._role(shapes)]
        return shape[:2] if len(shape) > 1 else None

    def fits(self, shapes: Shapes, shape: Sizes) -> bool:
        stored = shapes[self._role(shapes)]
        return stored[:2] == shape[:2] and without_ones(stored[2:]) == without_ones(shape[2:])

    def difference(self, arrays: Arrays, weight: np.ndarray, factor: float) -> np.ndarray:
        return np.float32(factor) * arrays[self._role(arrays)].reshape(weight.shape)


class BiasDifference(Difference):
    """The full change to a layer's bias (`diff_b`) or to a normalisation layer's bias (`b_norm`)."""

    name = "a bias's difference"
    of_bias = True
    needs = (frozenset({"diff_b"}), frozenset({"b_norm"}))


class UpBias(Form):
    """The bias of the up projection in peft's LoRAs. It is added to the layer's bias."""

    name = "the bias of a LoRA"
    of_bias = scaled = True
    needs = (frozenset({"up", "down", "up_bias"}),)
    may_have = ALPHA

    def rank(self, shapes: Shapes) -> int | None:
        return shapes["down"][0] if shapes["down"] else None

    def fits(self, shapes: Shapes, shape: Sizes) -> bool:
        return shapes["up_bias"] == shape

    def difference(self, arrays: Arrays, weight: np.ndarray, factor: float) -> np.ndarray:
        return np.float32(factor) * arrays["up_bias"]
