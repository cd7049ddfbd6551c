"""Trains a small Paella on the demo model's portraits: a VQGAN, a byte encoder, then a denoiser of the VQGAN's tokens.

    python -m sega_jax.demo.training.paella FOLDER --minutes 9.2

works until it is done or the minutes are over, and goes on where it was when it is called again, as
`sega_jax.demo.training.diffusion` does. FOLDER/model is then the model, which `sega_jax.load` reads.

The model that `sega_jax.demo.evaluate.paella` was run on took two calls on one H200, the second of 9.4 minutes: 2,000
steps of the VQGAN (26.4 dB on portraits, 603 of 625 tokens in use), 1,500 of the byte encoder, and 5,950 of the 6,500
of the denoiser, when the minutes were over.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sega_jax.demo.attributes import ATTRIBUTES
from sega_jax.demo.training import portraits
from sega_jax.demo.training.trainer import OneHot, Stages, adam, begin, command, half, initial, write_json
from sega_jax.nn.layers import Linear
from sega_jax.nn.paella import PaellaConfig
from sega_jax.nn.vqgan import VQConfig
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.loading import pick_attention
from sega_jax.systems.paella import Models
from sega_jax.text.tokenizers import ByteTokenizer
from sega_jax.weights.pull import flax_name


class Plan(NamedTuple):
    """How much of everything."""

    autoencoder_steps: int = 2000
    autoencoder_batch: int = 128
    portraits: int = 160_000
    captions: int = 2  # of each portrait
    reading_steps: int = 1500
    steps: int = 6500
    batch: int = 256
    chunk: int = 50  # steps in one call of a compiled program


class Configs(NamedTuple):
    """What each network is."""

    byt5: dict[str, Any]
    denoiser: dict[str, Any]
    vqgan: dict[str, Any]


# Values of each of the four latents: their combinations are the vocabulary.
VALUES = 5
BYTES = 192  # that captions have at most, with the end token

SMALL = Configs(
    byt5={
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": 384,
        "d_model": 192,
        "d_kv": 32,
        "d_ff": 512,
        "num_layers": 4,
        "num_heads": 6,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
    },
    denoiser=PaellaConfig(
        c_in=128,
        c_out=128,
        num_labels=VALUES**4,
        c_cond=192,
        c_hidden=(160, 320),
        nhead=(5, 10),
        blocks=(2, 4),
        level_config=("CTA", "CTA"),
        clip_embd=8,  # there is no CLIP
        byt5_embd=192,
        sample_size=portraits.SIDE // 4,
    )._asdict(),
    vqgan=VQConfig(bottleneck_blocks=4, c_hidden=128, codebook_size=VALUES**4, scale_factor=1.0)._asdict(),
)

INDEX = {
    "_class_name": "PaellaPipeline",
    "byt5": ["transformers", "T5EncoderModel"],
    "clip": [None, None],
    "tokenizer": [None, None],
    "prior": [None, None],
    "denoiser": ["sega_jax", "Paella"],
    "vqgan": ["sega_jax", "VQModel"],
}

# The ends of residual branches, and what is nothing at first in the published networks, too.
_ZERO = (".o.kernel", "wo.kernel", "channelwise.4.kernel", "out_proj.kernel", ".mapper.kernel", "gamma", "beta")
# Not learned: the lattice, and the statistics of a normalisation that is left to its scale and bias.
_FIXED = ("codebook.embedding", "running_mean", "running_var")


def lattice(values: int = VALUES, channels: int = 4) -> np.ndarray:
    """All vectors of so many channels with even values in [-1, 1], [values ** channels, channels].

    As a codebook that is not learned, it needs neither revival of entries nor a loss of its own (finite scalar
    quantisation, Mentzer et al. 2024).
    """
    axis = np.linspace(-1, 1, values, dtype=np.float32)
    return np.stack(np.meshgrid(*[axis] * channels, indexing="ij"), -1).reshape(-1, channels)


def initial_vqgan(vqgan: Any, key: jax.Array) -> Any:
    """With the lattice, and every residual block as if it were not there."""
    vqgan = initial(vqgan, key, ("gammas",))
    vqgan.vquantizer.codebook.embedding[...] = jnp.asarray(lattice())
    normal = vqgan.down_blocks[-1][1]
    normal.running_mean[...] = jnp.zeros_like(normal.running_mean[...])
    normal.running_var[...] = jnp.ones_like(normal.running_var[...])
    return vqgan


def initial_denoiser(byt5: Any, denoiser: Any, key: jax.Array) -> tuple[Any, Any]:
    keys = jax.random.split(key)
    byt5, denoiser = initial(byt5, keys[0], _ZERO), initial(denoiser, keys[1], _ZERO)
    for block in byt5.encoder.block:
        # T5's logits are not divided by the root of the width.
        query = block.layer[0].SelfAttention.q.kernel
        query[...] = query[...] * byt5.config.d_kv**-0.5
    return byt5, denoiser


def reconstruction(batch: int) -> Callable:
    """The VQGAN's loss: L1 of pixels and of their differences, MSE, and the distance of latents from their codes.

    Codes pass gradients on to the latents as if they were these (van den Oord et al. 2017).
    """

    def loss(vqgan, key, data):
        del data
        vqgan, keys = half(vqgan), jax.random.split(key)
        image = (portraits.render(portraits.sample(keys[0], batch), keys[1]) + 1) / 2
        tokens, latents = vqgan.encode(image)
        codes = vqgan.vquantizer.codebook(tokens)
        error = 2 * (vqgan.decode(latents + jax.lax.stop_gradient(codes - latents)).astype(jnp.float32) - image)
        edges = sum(jnp.abs(jnp.diff(error, axis=axis)).mean() for axis in (1, 2))
        distance = jnp.square((latents - jax.lax.stop_gradient(codes)).astype(jnp.float32)).mean()
        return jnp.abs(error).mean() + edges + (error**2).mean() + 0.25 * distance

    return loss


class Bank(NamedTuple):
    """What the byte encoder and the denoiser are trained on."""

    attributes: jax.Array  # int32 [portraits, attributes]
    tokens: jax.Array  # int16 [portraits, 32, 32]
    words: jax.Array  # int16 [portraits, captions, bytes], 0 is padding
    empty: jax.Array  # int16 [bytes], of no words


def reading(batch: int) -> Callable:
    """The cross entropy of a portrait's attributes, told from the mean state of the bytes of its caption.

    ByT5 has read much before Paella is trained on its states; this is the small one's reading.
    """
    counts = [len(values) for values in ATTRIBUTES.values()]

    def loss(networks, key, bank):
        byt5, head = (half(network) for network in networks)
        rows, which = jax.random.split(key)
        row = jax.random.randint(rows, (batch,), 0, len(bank.tokens))
        caption = jax.random.randint(which, (batch,), 0, bank.words.shape[1])
        ids = bank.words[row, caption].astype(jnp.int32)
        share = (ids > 0) / (ids > 0).sum(1, keepdims=True)
        state = jnp.einsum("bl,blc->bc", share, byt5(ids, ids > 0).astype(jnp.float32))
        logits = jnp.split(head(state.astype(head.kernel.dtype)).astype(jnp.float32), np.cumsum(counts)[:-1], -1)
        entropy = optax.softmax_cross_entropy_with_integer_labels
        return sum(entropy(part, bank.attributes[row, i]).mean() for i, part in enumerate(logits))

    return loss


def naming(batch: int, labels: int) -> Callable:
    """The cross entropy of tokens under noise (Rampas et al. 2022): at a noise level r every token is another, at
    random, with probability r. 10 % of the captions are dropped.

    r is 1 - u⁴ for a u that is uniform in [0, 1], not uniform itself: words are of use only where few tokens are left
    to tell of a portrait, presumably less than a twentieth.
    """

    def loss(networks, key, bank):
        byt5, denoiser = (half(network) for network in networks)
        rows, which, drop, when, where, what = jax.random.split(key, 6)
        row = jax.random.randint(rows, (batch,), 0, len(bank.tokens))
        caption = jax.random.randint(which, (batch,), 0, bank.words.shape[1])
        dropped = jax.random.uniform(drop, (batch, 1)) < 0.1
        ids = jnp.where(dropped, bank.empty[None], bank.words[row, caption]).astype(jnp.int32)
        clean, level = bank.tokens[row].astype(jnp.int32), 1 - jax.random.uniform(when, (batch,)) ** 4
        noise = jax.random.randint(what, clean.shape, 0, labels)
        noisy = jnp.where(jax.random.uniform(where, clean.shape) < level[:, None, None], noise, clean)
        text = denoiser.condition(byt5(ids, ids > 0), mask=ids > 0)
        logits = denoiser(noisy, level, text).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, clean).mean()

    return loss


def optimisers(plan: Plan) -> dict[str, optax.GradientTransformation]:
    """Of the VQGAN, of (byte encoder, head), and of (byte encoder, denoiser)."""

    def label(vqgan):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "fixed" if flax_name(path).endswith(_FIXED) else "learned", vqgan
        )

    coder = {"learned": adam(1e-3, plan.autoencoder_steps), "fixed": optax.set_to_zero()}
    return {
        "vqgan": optax.multi_transform(coder, label),
        "byt5": adam(1e-3, plan.reading_steps),
        "denoiser": adam(1e-3, plan.steps),
    }


class Trainer(Stages):
    """The VQGAN, the byte encoder, then the denoiser with it.

    Args:
        folder: for `state` and `model`.
        plan, configs: how much of everything, and of which networks; the same in every call on a folder.
        options: of `Stages`.
    """

    def __init__(self, folder: Path, plan: Plan, *, configs: Configs = SMALL, **options: Any):
        super().__init__(folder, plan, **options)
        self.configs, self.words = configs, ByteTokenizer(configs.byt5["vocab_size"])
        attention = pick_attention(None, jnp.dtype(jnp.bfloat16), Devices())
        self.models = Models.build(configs.byt5, None, None, configs.denoiser, configs.vqgan, attention)
        self.head = Linear(configs.byt5["d_model"], sum(map(len, ATTRIBUTES.values())))
        net, first = self.models.denoiser.config, self.models.byt5.encoder.block[0].layer[0].SelfAttention
        self.models.byt5.shared = OneHot(configs.byt5["vocab_size"], configs.byt5["d_model"])
        first.relative_attention_bias = OneHot(configs.byt5["relative_attention_num_buckets"], first.heads)
        self.models.denoiser.in_mapper[0] = OneHot(net.num_labels, net.c_in)

    def run(self) -> bool:
        """Whether the model is done; it is written as soon as there is a byte encoder.

        Raises:
            FloatingPointError: the loss is not finite; the checkpoint is from before.
        """
        plan, rules = self.plan, optimisers(self.plan)
        keys = jax.random.split(jax.random.key(0), 3)
        byt5, denoiser = initial_denoiser(self.models.byt5, self.models.denoiser, keys[1])
        networks = {
            "vqgan": initial_vqgan(self.models.vqgan, keys[0]),
            "byt5": (byt5, initial(self.head, keys[2])),
            "denoiser": (byt5, denoiser),
        }
        states = {name: begin(network, rules[name]) for name, network in networks.items()}
        # A state is given away to the program that trains it, and may share no array with another.
        states = self.restore(jax.tree.map(jnp.copy, states))
        coding = reconstruction(plan.autoencoder_batch)
        vqgan = self.stage(states, "vqgan", coding, None, rules["vqgan"], 0.999, plan.autoencoder_steps)
        if vqgan is None:
            return False
        bank = self.bank(vqgan)
        read = self.stage(states, "byt5", reading(plan.batch), bank, rules["byt5"], 0.999, plan.reading_steps)
        if read is None:
            return False
        if not int(states["denoiser"].step):
            states["denoiser"] = begin(jax.tree.map(jnp.copy, (read[0], denoiser)), rules["denoiser"])
        loss = naming(plan.batch, self.models.denoiser.config.num_labels)
        networks = self.stage(states, "denoiser", loss, bank, rules["denoiser"], 0.9995, plan.steps)
        byt5, denoiser = networks or states["denoiser"].average
        for part, module in {"byt5": byt5, "denoiser": denoiser, "vqgan": vqgan}.items():
            self.write(part, module, getattr(self.configs, part))
        write_json(self.folder / "model" / "model_index.json", INDEX)
        return networks is not None

    def bank(self, vqgan: Any) -> Bank:
        """Portraits as tokens and captions as bytes."""
        began, plan, size = time.monotonic(), self.plan, min(256, self.plan.portraits)

        @jax.jit
        def encode(vqgan, key):
            keys = jax.random.split(key)
            attributes = portraits.sample(keys[0], size)
            image = (portraits.render(attributes, keys[1]) + 1) / 2
            tokens, _ = half(vqgan).encode(image)
            error = half(vqgan).decode_indices(tokens).astype(jnp.float32) - image
            return attributes, tokens.astype(jnp.int16), jnp.mean(error**2)

        parts = [encode(vqgan, jax.random.fold_in(jax.random.key(2), i)) for i in range(-(-plan.portraits // size))]
        attributes = np.concatenate([np.asarray(part) for part, _, _ in parts])[: plan.portraits]
        tokens = jnp.concatenate([part for _, part, _ in parts])[: plan.portraits]
        decibels = -10 * math.log10(np.mean([float(error) for _, _, error in parts]))
        used = len(np.unique(np.asarray(tokens[:1000])))
        rng = np.random.default_rng(3)
        words = np.zeros((len(tokens), plan.captions, BYTES), np.int16)
        for i in range(plan.captions):
            for row, caption in zip(words[:, i], portraits.captions(attributes, rng), strict=True):
                ids = self.words([caption])[0, 0, :BYTES]
                row[: len(ids)] = ids
        empty = np.zeros(BYTES, np.int16)
        empty[0] = 1  # the end token
        seconds = time.monotonic() - began
        self.say(f"{len(tokens)} portraits, {decibels:.1f} dB, {used} tokens in use, in {seconds:.0f} s")
        return Bank(jnp.asarray(attributes), tokens, jnp.asarray(words), jnp.asarray(empty))


main = command(Trainer, Plan(), "a small Paella")

if __name__ == "__main__":
    main()
