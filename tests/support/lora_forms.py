"""Adapters in every supported form. Each has random tensors for one weight, and the change that they make to it, in
float64.

The function for a form returns {end of a key: array} and a function from the weight to the change.
"""

import numpy as np


def tucker(mid, up, down):
    return np.einsum("ab...,ao,bi->oi...", mid, up, down)


def lora(rng, shape, rank=3):
    up, down = rng.standard_normal((shape[0], rank)), rng.standard_normal((rank, *shape[1:]))
    entries = {"lora_up.weight": up.reshape(*up.shape, *[1] * len(shape[2:])), "lora_down.weight": down, "alpha": 2.0}
    return entries, lambda weight: 2 / rank * np.tensordot(up, down, 1)


def mid(rng, shape, rank=3):
    up, down = rng.standard_normal((shape[0], rank)), rng.standard_normal((rank, shape[1]))
    kernel = rng.standard_normal((rank, rank, *shape[2:]))
    ones = [1] * len(shape[2:])
    entries = {
        "lora_up.weight": up.reshape(*up.shape, *ones),
        "lora_down.weight": down.reshape(*down.shape, *ones),
        "lora_mid.weight": kernel,
        "scale": 0.3,
    }
    return entries, lambda weight: 0.3 * tucker(kernel, up.T, down)


def loha(rng, shape, rank=3):
    firsts = [rng.standard_normal((shape[0], rank)) for _ in "12"]
    seconds = [rng.standard_normal((rank, int(np.prod(shape[1:])))) for _ in "12"]
    entries = {f"hada_w{n + 1}_a": firsts[n] for n in (0, 1)} | {f"hada_w{n + 1}_b": seconds[n] for n in (0, 1)}
    product = (firsts[0] @ seconds[0]) * (firsts[1] @ seconds[1])
    return entries | {"alpha": 2.0}, lambda weight: 2 / rank * product.reshape(shape)


def loha_tucker(rng, shape, rank=3):
    firsts, seconds = ([rng.standard_normal((rank, size)) for _ in "12"] for size in shape[:2])
    mids = [rng.standard_normal((rank, rank, *shape[2:])) for _ in "12"]
    entries = {
        f"hada_{name}": array
        for n in (0, 1)
        for name, array in ((f"w{n + 1}_a", firsts[n]), (f"w{n + 1}_b", seconds[n]), (f"t{n + 1}", mids[n]))
    }
    factors = [tucker(mids[n], firsts[n], seconds[n]) for n in (0, 1)]
    return entries | {"alpha": 2.0}, lambda weight: 2 / rank * factors[0] * factors[1]


def halves(size):
    """Factorises a size into two factors that are as close together as possible, and returns the smaller one first."""
    first = next(n for n in range(int(size**0.5), 0, -1) if size % n == 0)
    return first, size // first


def lokr(rng, shape, rank=2, first=False, second=False, middle=False):
    """Returns a LoKr whose first or second factor is a product of two matrices.

    With `middle`, the second factor is a Tucker decomposition with a kernel between the matrices.
    """
    (a, c), (b, d) = halves(shape[0]), halves(shape[1])
    entries = {}
    if first:
        entries |= {"lokr_w1_a": rng.standard_normal((a, rank)), "lokr_w1_b": rng.standard_normal((rank, b))}
        w1 = entries["lokr_w1_a"] @ entries["lokr_w1_b"]
    else:
        w1 = entries["lokr_w1"] = rng.standard_normal((a, b))
    if middle:
        entries |= {"lokr_w2_a": rng.standard_normal((rank, c)), "lokr_w2_b": rng.standard_normal((rank, d))}
        entries["lokr_t2"] = rng.standard_normal((rank, rank, *shape[2:]))
        w2 = tucker(entries["lokr_t2"], entries["lokr_w2_a"], entries["lokr_w2_b"])
    elif second:
        flat = d * int(np.prod(shape[2:]))
        entries |= {"lokr_w2_a": rng.standard_normal((c, rank)), "lokr_w2_b": rng.standard_normal((rank, flat))}
        w2 = (entries["lokr_w2_a"] @ entries["lokr_w2_b"]).reshape(c, d, *shape[2:])
    else:
        w2 = entries["lokr_w2"] = rng.standard_normal((c, d, *shape[2:]))
    # Alpha has no effect on full matrices, which have no rank.
    factor = 1.5 / rank if first or second or middle else 1
    product = np.kron(w1.reshape(*w1.shape, *[1] * len(shape[2:])), w2)
    return entries | {"alpha": 1.5}, lambda weight: factor * product


def difference(rng, shape):
    change = rng.standard_normal(shape)
    return {"diff": change}, lambda weight: change


def with_norms(make, axis):
    """Adds DoRA's norms to another form: one norm for each output (axis 0) or input (axis 1)."""

    def make_with_norms(rng, shape):
        entries, changed = make(rng, shape)
        norms = rng.uniform(0.5, 2, [size if i == axis else 1 for i, size in enumerate(shape)])

        def decomposed(weight):
            updated = weight + changed(weight)
            others = tuple(i for i in range(len(shape)) if i != axis)
            return norms * updated / np.sqrt((updated**2).sum(others, keepdims=True)) - weight

        return entries | {"dora_scale": norms}, decomposed

    return make_with_norms


def ia3(rng, shape, axis=0):
    vector = rng.standard_normal(shape[axis])
    along = [-1 if i == axis else 1 for i in range(len(shape))]
    stored = vector if len(shape) == 2 else vector.reshape(1, -1, 1, 1)
    return {"weight": stored, "on_input": np.array(axis)}, lambda weight: weight * vector.reshape(along)


def glora(rng, shape, rank=3, exchanged=False):
    a1, a2 = rng.standard_normal((shape[1], rank)), rng.standard_normal((rank, shape[1]))
    b1, b2 = rng.standard_normal((shape[0], rank)), rng.standard_normal((rank, *shape[1:]))
    names = ("a2", "a1", "b2", "b1") if exchanged else ("a1", "a2", "b1", "b2")
    entries = {f"{name}.weight": array for name, array in zip(names, (a1, a2, b1, b2), strict=True)} | {"alpha": 2.0}
    return entries, lambda weight: 2 / rank * (np.einsum("oi...,ij->oj...", weight, a1 @ a2) + np.tensordot(b1, b2, 1))


def rotation(blocks, constraint):
    skew = blocks - np.swapaxes(blocks, -1, -2)
    skew = skew * min(1, constraint / np.linalg.norm(skew))
    one = np.eye(blocks.shape[-1])
    return (one + skew) @ np.linalg.inv(one - skew)


def oft(rng, shape, alpha=0.02):
    """Returns an OFT with four blocks, rescaled outputs, and a constraint that limits the rotations."""
    size = shape[0] // 4
    blocks, rescale = rng.standard_normal((4, size, size)), rng.uniform(0.5, 2, (shape[0], *[1] * len(shape[1:])))

    def changed(weight):
        rotations = np.zeros((shape[0], shape[0]))
        for i, block in enumerate(rotation(blocks, alpha * shape[0])):
            rotations[i * size : (i + 1) * size, i * size : (i + 1) * size] = block
        return rescale * np.tensordot(rotations.T, weight, 1) - weight

    return {"oft_blocks": blocks, "rescale": rescale, "alpha": alpha}, changed


# {form: (the function, whether linear layers can have this form)}. Convolutions can have all forms.
FORMS = {
    "LoRA": (lora, True),
    "LoRA with a kernel between": (mid, False),
    "LoHa": (loha, True),
    "LoHa with kernels between": (loha_tucker, False),
    "LoKr of full matrices": (lokr, True),
    "LoKr with the first as a product": (lambda *args: lokr(*args, first=True), True),
    "LoKr with the second as a product": (lambda *args: lokr(*args, second=True), True),
    "LoKr with both as products": (lambda *args: lokr(*args, first=True, second=True), True),
    "LoKr with a kernel between": (lambda *args: lokr(*args, middle=True), False),
    "a difference": (difference, True),
    "DoRA of outputs": (with_norms(lora, 0), True),
    "DoRA of inputs": (with_norms(lora, 1), True),
    "DoRA of a LoHa": (with_norms(loha, 0), True),
    "DoRA of a LoKr": (with_norms(lambda *args: lokr(*args, second=True), 1), True),
    "(IA)^3 of outputs": (ia3, True),
    "(IA)^3 of inputs": (lambda *args: ia3(*args, axis=1), True),
    "GLoRA": (glora, True),
    "GLoRA of the first version": (lambda *args: glora(*args, exchanged=True), True),
    "OFT": (oft, True),
}

# One variant of each form except LoRA.
SIMPLEST = (
    "LoHa with kernels between",
    "LoKr with both as products",
    "a difference",
    "DoRA of outputs",
    "(IA)^3 of inputs",
    "GLoRA",
    "OFT",
)


def tensors(layers, form, seed=0, dtype=np.float32):
    """Returns a file's tensors and, for each layer, the function from the weight to the change.

    `layers` maps the names of layers to the shapes of their weights.
    """
    rng, arrays, changed = np.random.default_rng(seed), {}, {}
    make, linear = FORMS[form]
    for layer, shape in layers.items():
        if len(shape) == 4 or linear:
            entries, changed[layer] = make(rng, shape)
            for end, array in entries.items():
                array = np.asarray(array)
                arrays[f"{layer}.{end}"] = array if array.dtype.kind == "i" else array.astype(dtype)
    return arrays, changed
