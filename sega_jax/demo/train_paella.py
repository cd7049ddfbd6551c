"""Trains a small Paella on the demo model's portraits: a VQGAN, then a denoiser of its tokens and a byte encoder.

    python -m sega_jax.demo.train_paella FOLDER --minutes 9.2

works until it is done or the minutes are over, and goes on where it was when it is called again, as
`sega_jax.demo.train` does. FOLDER/model is then the model, which `sega_jax.load` reads.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax

from sega_jax.checkpoint import flax_name
from sega_jax.demo import portraits
from sega_jax.demo.training import OneHot, Stages, adam, begin, half, initial, write_json
from sega_jax.nn.paella import PaellaConfig
from sega_jax.nn.vqgan import VQConfig
from sega_jax.shell import plainly
from sega_jax.systems.paella import Models
from sega_jax.text import ByteTokenizer


class Plan(NamedTuple):
    """How much of everything."""

    autoencoder_steps: int = 3000
    autoencoder_batch: int = 128
    portraits: int = 160_000
    captions: int = 2  # of each portrait
    steps: int = 8000
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
    """What the denoiser is trained on."""

    tokens: jax.Array  # int16 [portraits, 32, 32]
    words: jax.Array  # int16 [portraits, captions, bytes], 0 is padding
    empty: jax.Array  # int16 [bytes], of no words


def naming(batch: int, labels: int) -> Callable:
    """The cross entropy of tokens under noise (Rampas et al. 2022): at a noise level r, uniform in [0, 1], every token
    is another, at random, with probability r. 10 % of the captions are dropped."""

    def loss(networks, key, bank):
        byt5, denoiser = (half(network) for network in networks)
        rows, which, drop, when, where, what = jax.random.split(key, 6)
        row = jax.random.randint(rows, (batch,), 0, len(bank.tokens))
        caption = jax.random.randint(which, (batch,), 0, bank.words.shape[1])
        dropped = jax.random.uniform(drop, (batch, 1)) < 0.1
        ids = jnp.where(dropped, bank.empty[None], bank.words[row, caption]).astype(jnp.int32)
        clean, level = bank.tokens[row].astype(jnp.int32), jax.random.uniform(when, (batch,))
        noise = jax.random.randint(what, clean.shape, 0, labels)
        noisy = jnp.where(jax.random.uniform(where, clean.shape) < level[:, None, None], noise, clean)
        text = denoiser.condition(byt5(ids, ids > 0), mask=ids > 0)
        logits = denoiser(noisy, level, text).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, clean).mean()

    return loss


def optimisers(plan: Plan) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Of the VQGAN, and of (byte encoder, denoiser)."""

    def label(vqgan):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "fixed" if flax_name(path).endswith(_FIXED) else "learned", vqgan
        )

    coder = {"learned": adam(1e-3, plan.autoencoder_steps), "fixed": optax.set_to_zero()}
    both = {"byt5": adam(1e-3, plan.steps), "denoiser": adam(1e-3, plan.steps)}
    return optax.multi_transform(coder, label), optax.multi_transform(both, ("byt5", "denoiser"))


class Trainer(Stages):
    """The VQGAN, then the denoiser with its byte encoder.

    Args:
        folder: for `state` and `model`.
        plan, configs: how much of everything, and of which networks; the same in every call on a folder.
        options: of `Stages`.
    """

    def __init__(self, folder: Path, plan: Plan, *, configs: Configs = SMALL, **options: Any):
        super().__init__(folder, plan, **options)
        self.configs, self.words = configs, ByteTokenizer(configs.byt5["vocab_size"])
        self.models = Models.build(configs.byt5, None, None, configs.denoiser, configs.vqgan)
        net = self.models.denoiser.config
        self.models.byt5.shared = OneHot(configs.byt5["vocab_size"], configs.byt5["d_model"])
        self.models.denoiser.in_mapper[0] = OneHot(net.num_labels, net.c_in)

    def run(self) -> bool:
        """Whether the model is done; it is written as soon as there is a VQGAN.

        Raises:
            FloatingPointError: the loss is not finite; the checkpoint is from before.
        """
        plan, (coder, namer) = self.plan, optimisers(self.plan)
        keys = jax.random.split(jax.random.key(0))
        states = {
            "vqgan": begin(initial_vqgan(self.models.vqgan, keys[0]), coder),
            "denoiser": begin(initial_denoiser(self.models.byt5, self.models.denoiser, keys[1]), namer),
        }
        states = self.restore(states)
        loss = reconstruction(plan.autoencoder_batch)
        vqgan = self.stage(states, "vqgan", loss, None, coder, 0.999, plan.autoencoder_steps)
        if vqgan is None:
            return False
        loss = naming(plan.batch, self.models.denoiser.config.num_labels)
        networks = self.stage(states, "denoiser", loss, self.bank(vqgan), namer, 0.9995, plan.steps)
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
        return Bank(tokens, jnp.asarray(words), jnp.asarray(empty))


@click.command(context_settings={"show_default": True})
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--minutes", default=math.inf, help="After which to stop.")
def main(folder: Path, minutes: float) -> None:
    """Trains a small Paella in FOLDER, or goes on with it."""
    with plainly():
        if jax.config.jax_compilation_cache_dir is None:
            jax.config.update("jax_compilation_cache_dir", str(folder.absolute() / "compiled"))
        done = Trainer(folder, Plan(), minutes=minutes).run()
    click.echo("done" if done else "not done yet: call it again")


if __name__ == "__main__":
    main()
