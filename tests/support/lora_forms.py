"""The relatives of LoRAs: random tensors of every form for a weight, and what they make of it, by hand in float64."""

import numpy as np


def tucker(mid, up, down):
    return np.einsum("ab...,ao,bi->oi...", mid, up, down)


def lora(rng, shape, rank=3):
    up, down = rng.standard_normal((shape[0], rank)), rng.standard_normal((rank, *shape[1:]))
    own = {"lora_up.weight": up.reshape(*up.shape, *[1] * len(shape[2:])), "lora_down.weight": down, "alpha": 2.0}
    return own, lambda weight: 2 / rank * np.tensordot(up, down, 1)


def mid(rng, shape, rank=3):
    up, down = rng.standard_normal((shape[0], rank)), rng.standard_normal((rank, shape[1]))
    kernel = rng.standard_normal((rank, rank, *shape[2:]))
    ones = [1] * len(shape[2:])
    own = {
        "lora_up.weight": up.reshape(*up.shape, *ones),
        "lora_down.weight": down.reshape(*down.shape, *ones),
        "lora_mid.weight": kernel,
        "scale": 0.3,
    }
    return own, lambda weight: 0.3 * tucker(kernel, up.T, down)


def loha(rng, shape, rank=3):
    firsts = [rng.standard_normal((shape[0], rank)) for _ in "12"]
    seconds = [rng.standard_normal((rank, int(np.prod(shape[1:])))) for _ in "12"]
    own = {f"hada_w{n + 1}_a": firsts[n] for n in (0, 1)} | {f"hada_w{n + 1}_b": seconds[n] for n in (0, 1)}
    product = (firsts[0] @ seconds[0]) * (firsts[1] @ seconds[1])
    return own | {"alpha": 2.0}, lambda weight: 2 / rank * product.reshape(shape)


def loha_tucker(rng, shape, rank=3):
    firsts, seconds = ([rng.standard_normal((rank, size)) for _ in "12"] for size in shape[:2])
    mids = [rng.standard_normal((rank, rank, *shape[2:])) for _ in "12"]
    own = {
        f"hada_{name}": array
        for n in (0, 1)
        for name, array in ((f"w{n + 1}_a", firsts[n]), (f"w{n + 1}_b", seconds[n]), (f"t{n + 1}", mids[n]))
    }
    made = [tucker(mids[n], firsts[n], seconds[n]) for n in (0, 1)]
    return own | {"alpha": 2.0}, lambda weight: 2 / rank * made[0] * made[1]


def halves(size):
    """The two factors of a size, the smaller first."""
    first = next(n for n in range(int(size**0.5), 0, -1) if size % n == 0)
    return first, size // first


def lokr(rng, shape, rank=2, first=False, second=False, middle=False):
    """With w1, w2 or both as products; `middle` also with the kernel between the second's."""
    (a, c), (b, d) = halves(shape[0]), halves(shape[1])
    own = {}
    if first:
        own |= {"lokr_w1_a": rng.standard_normal((a, rank)), "lokr_w1_b": rng.standard_normal((rank, b))}
        w1 = own["lokr_w1_a"] @ own["lokr_w1_b"]
    else:
        w1 = own["lokr_w1"] = rng.standard_normal((a, b))
    if middle:
        own |= {"lokr_w2_a": rng.standard_normal((rank, c)), "lokr_w2_b": rng.standard_normal((rank, d))}
        own["lokr_t2"] = rng.standard_normal((rank, rank, *shape[2:]))
        w2 = tucker(own["lokr_t2"], own["lokr_w2_a"], own["lokr_w2_b"])
    elif second:
        flat = d * int(np.prod(shape[2:]))
        own |= {"lokr_w2_a": rng.standard_normal((c, rank)), "lokr_w2_b": rng.standard_normal((rank, flat))}
        w2 = (own["lokr_w2_a"] @ own["lokr_w2_b"]).reshape(c, d, *shape[2:])
    else:
        w2 = own["lokr_w2"] = rng.standard_normal((c, d, *shape[2:]))
    # Without a rank alpha does not matter.
    factor = 1.5 / rank if first or second or middle else 1
    product = np.kron(w1.reshape(*w1.shape, *[1] * len(shape[2:])), w2)
    return own | {"alpha": 1.5}, lambda weight: factor * product


def difference(rng, shape):
    whole = rng.standard_normal(shape)
    return {"diff": whole}, lambda weight: whole


def with_norms(make, axis):
    """DoRA on another form; axis 0 has a norm for each output."""

    def made(rng, shape):
        own, changed = make(rng, shape)
        norms = rng.uniform(0.5, 2, [size if i == axis else 1 for i, size in enumerate(shape)])

        def decomposed(weight):
            total = weight + changed(weight)
            others = tuple(i for i in range(len(shape)) if i != axis)
            return norms * total / np.sqrt((total**2).sum(others, keepdims=True)) - weight

        return own | {"dora_scale": norms}, decomposed

    return made


def ia3(rng, shape, axis=0):
    vector = rng.standard_normal(shape[axis])
    along = [-1 if i == axis else 1 for i in range(len(shape))]
    stored = vector if len(shape) == 2 else vector.reshape(1, -1, 1, 1)
    return {"weight": stored, "on_input": np.array(axis)}, lambda weight: weight * vector.reshape(along)


def glora(rng, shape, rank=3, exchanged=False):
    a1, a2 = rng.standard_normal((shape[1], rank)), rng.standard_normal((rank, shape[1]))
    b1, b2 = rng.standard_normal((shape[0], rank)), rng.standard_normal((rank, *shape[1:]))
    names = ("a2", "a1", "b2", "b1") if exchanged else ("a1", "a2", "b1", "b2")
    own = {f"{name}.weight": array for name, array in zip(names, (a1, a2, b1, b2), strict=True)} | {"alpha": 2.0}
    return own, lambda weight: 2 / rank * (np.einsum("oi...,ij->oj...", weight, a1 @ a2) + np.tensordot(b1, b2, 1))


def rotation(blocks, constraint):
    skew = blocks - np.swapaxes(blocks, -1, -2)
    skew = skew * min(1, constraint / np.linalg.norm(skew))
    one = np.eye(blocks.shape[-1])
    return (one + skew) @ np.linalg.inv(one - skew)


def oft(rng, shape, alpha=0.02):
    """Blocks of a quarter of the outputs, with a constraint that is met and a rescale."""
    size = shape[0] // 4
    blocks, rescale = rng.standard_normal((4, size, size)), rng.uniform(0.5, 2, (shape[0], *[1] * len(shape[1:])))

    def changed(weight):
        turned = np.zeros((shape[0], shape[0]))
        for i, block in enumerate(rotation(blocks, alpha * shape[0])):
            turned[i * size : (i + 1) * size, i * size : (i + 1) * size] = block
        return rescale * np.tensordot(turned.T, weight, 1) - weight

    return {"oft_blocks": blocks, "rescale": rescale, "alpha": alpha}, changed


# For a convolution with a kernel; and whether linear layers have the form, too.
FORMS = {
    "LoRA": (lora, True),
    "LoRA with a kernel between": (mid, False),
    "LoHa": (loha, True),
    "LoHa with kernels between": (loha_tucker, False),
    "LoKr of whole matrices": (lokr, True),
    "LoKr with the first as a product": (lambda *given: lokr(*given, first=True), True),
    "LoKr with the second as a product": (lambda *given: lokr(*given, second=True), True),
    "LoKr with both as products": (lambda *given: lokr(*given, first=True, second=True), True),
    "LoKr with a kernel between": (lambda *given: lokr(*given, middle=True), False),
    "a difference": (difference, True),
    "DoRA of outputs": (with_norms(lora, 0), True),
    "DoRA of inputs": (with_norms(lora, 1), True),
    "DoRA of a LoHa": (with_norms(loha, 0), True),
    "DoRA of a LoKr": (with_norms(lambda *given: lokr(*given, second=True), 1), True),
    "(IA)^3 of outputs": (ia3, True),
    "(IA)^3 of inputs": (lambda *given: ia3(*given, axis=1), True),
    "GLoRA": (glora, True),
    "GLoRA of the first version": (lambda *given: glora(*given, exchanged=True), True),
    "OFT": (oft, True),
}

# One variant of each form.
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
    """A file's tensors, and the functions from weights to differences, for layers and their weights' shapes."""
    rng, found, changed = np.random.default_rng(seed), {}, {}
    make, linear = FORMS[form]
    for layer, shape in layers.items():
        if len(shape) == 4 or linear:
            own, changed[layer] = make(rng, shape)
            for end, array in own.items():
                array = np.asarray(array)
                found[f"{layer}.{end}"] = array if array.dtype.kind == "i" else array.astype(dtype)
    return found, changed
