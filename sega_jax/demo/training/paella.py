"""Trains a small Paella on the demo model's portraits: first a VQGAN, then a byte encoder, then a denoiser for the
VQGAN's tokens.

    python -m sega_jax.demo.training.paella FOLDER

The command trains until the model is finished, and resumes if it was stopped, as in
`sega_jax.demo.training.diffusion`. `sega_jax.load` reads the model from FOLDER/model.

`sega_jax.demo.evaluate.paella` measured a model whose training took seven minutes on one H200: 2,000 steps for the
VQGAN, 1,500 steps for the byte encoder, and 4,000 steps for the denoiser. The command also prints the quality of the
VQGAN (26.4 dB on portraits) and the number of tokens in use (603 of 625).
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sega_jax.demo.attributes import ATTRIBUTES
from sega_jax.demo.training import portraits, trainer
from sega_jax.demo.training.dataset import Dataset
from sega_jax.demo.training.networks import OneHot, attention, half, initial
from sega_jax.demo.training.trainer import Stage, Trainer, adam, command, picture_loss, write_json
from sega_jax.nn.layers import Linear
from sega_jax.nn.paella import Paella, PaellaConfig
from sega_jax.nn.t5 import T5Config, T5EncoderModel
from sega_jax.nn.vqgan import VQConfig, VQModel
from sega_jax.text.tokenizers import ByteTokenizer
from sega_jax.weights.layout import flax_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(trainer.Plan):
    """The training steps and batch sizes of the measured model."""

    autoencoder_steps: int = 2000
    autoencoder_batch: int = 128
    reading_steps: int = 1500  # of the byte encoder
    steps: int = 4000
    batch: int = 256


class Configs(NamedTuple):
    """The contents of each network's config.json."""

    byt5: dict[str, Any]
    denoiser: dict[str, Any]
    vqgan: dict[str, Any]


# The number of values that each of the four latent channels can have. The vocabulary consists of all combinations.
VALUES = 5
BYTES = 192  # the maximum number of tokens in a caption, including the end token

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
        clip_embd=8,  # unused, because this model has no CLIP encoder
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

# The last parameters of residual branches, and other parameters that also start at zero in the published networks.
_ZERO = (".o.kernel", "wo.kernel", "channelwise.4.kernel", "out_proj.kernel", ".mapper.kernel", "gamma", "beta")
# Parameters that are not trained: the lattice, and the statistics of a normalisation. Training the normalisation's
# scale and bias is enough.
_FIXED = ("codebook.embedding", "running_mean", "running_var")


def lattice(values: int = VALUES, channels: int = 4) -> np.ndarray:
    """Returns a fixed codebook, [values ** channels, channels]. It contains all vectors whose entries are among
    `values` evenly spaced numbers in [-1, 1].

    A fixed codebook needs no loss of its own, and its unused entries need not be revived (finite scalar quantisation,
    Mentzer et al. 2024).
    """
    axis = np.linspace(-1, 1, values, dtype=np.float32)
    return np.stack(np.meshgrid(*[axis] * channels, indexing="ij"), -1).reshape(-1, channels)


def initial_vqgan(vqgan: VQModel, key: jax.Array) -> VQModel:
    """Initialises the VQGAN with the lattice as its codebook and every residual block as the identity."""
    vqgan = initial(vqgan, key, ("gammas",))
    vqgan.vquantizer.codebook.embedding[...] = jnp.asarray(lattice())
    normal = vqgan.down_blocks[-1][1]
    normal.running_mean[...] = jnp.zeros_like(normal.running_mean[...])
    normal.running_var[...] = jnp.ones_like(normal.running_var[...])
    return vqgan


def initial_byt5(config: T5Config, key: jax.Array) -> T5EncoderModel:
    """Returns a byte encoder with scaled-down query projections, because T5 does not divide its logits by √width."""
    byt5 = T5EncoderModel(config)
    byt5.shared = OneHot(config.vocab_size, config.d_model)
    first = byt5.encoder.block[0].layer[0].SelfAttention
    first.relative_attention_bias = OneHot(config.relative_attention_num_buckets, first.heads)
    byt5 = initial(byt5, key, _ZERO)
    for block in byt5.encoder.block:
        query = block.layer[0].SelfAttention.q.kernel
        query[...] = query[...] * byt5.config.d_kv**-0.5
    return byt5


def initial_denoiser(config: PaellaConfig, key: jax.Array) -> Paella:
    """Returns a denoiser whose residual blocks start as the identity."""
    denoiser = Paella(config, attention())
    denoiser.in_mapper[0] = OneHot(config.num_labels, config.c_in)
    return initial(denoiser, key, _ZERO)


def reconstruction(batch: int) -> Callable:
    """Returns the VQGAN's loss: `picture_loss` plus 0.25 times the mean square distance between latents and their
    codes.

    The gradients of the codes are passed straight through to the latents (van den Oord et al. 2017).
    """

    def loss(vqgan, key, data):
        del data
        vqgan, keys = half(vqgan), jax.random.split(key)
        image = (portraits.render(portraits.sample(keys[0], batch), keys[1]) + 1) / 2
        tokens, latents = vqgan.encode(image)
        codes = vqgan.vquantizer.codebook(tokens)
        error = 2 * (vqgan.decode(latents + jax.lax.stop_gradient(codes - latents)).astype(jnp.float32) - image)
        distance = jnp.square((latents - jax.lax.stop_gradient(codes)).astype(jnp.float32)).mean()
        return picture_loss(error) + 0.25 * distance

    return loss


def reading(batch: int) -> Callable:
    """Returns the byte encoder's loss: the cross entropy of a portrait's attributes, predicted from its caption.

    A linear head predicts them from the mean hidden state of the caption's bytes. This stage replaces ByT5's
    pretraining on large amounts of text.
    """
    counts = [len(values) for values in ATTRIBUTES.values()]

    def loss(networks, key, data):
        byt5, head = (half(network) for network in networks)
        row, ids = data.draw(batch, *jax.random.split(key))
        share = (ids > 0) / (ids > 0).sum(1, keepdims=True)
        state = jnp.einsum("bl,blc->bc", share, byt5(ids, ids > 0).astype(jnp.float32))
        logits = jnp.split(head(state.astype(head.kernel.dtype)).astype(jnp.float32), np.cumsum(counts)[:-1], -1)
        entropy = optax.softmax_cross_entropy_with_integer_labels
        return sum(entropy(part, data.attributes[row, i]).mean() for i, part in enumerate(logits))

    return loss


def naming(batch: int, labels: int) -> Callable:
    """Returns the denoiser's loss: the cross entropy of the clean tokens, which are predicted from noisy tokens (Rampas
    et al. 2022). At a noise level r, every token is replaced by a random one with probability r. 10 % of the captions
    are empty.

    r is 1 - u⁴, where u is uniform in [0, 1]. A uniform r would waste steps, because the caption helps only if few
    clean tokens (presumably less than 5 %) are left to show the portrait.
    """

    def loss(networks, key, data):
        byt5, denoiser = (half(network) for network in networks)
        *keys, when, where, what = jax.random.split(key, 6)
        row, ids = data.draw(batch, *keys)
        clean, level = data.codes[row].astype(jnp.int32), 1 - jax.random.uniform(when, (batch,)) ** 4
        noise = jax.random.randint(what, clean.shape, 0, labels)
        noisy = jnp.where(jax.random.uniform(where, clean.shape) < level[:, None, None], noise, clean)
        text = denoiser.condition(byt5(ids, ids > 0), mask=ids > 0)
        logits = denoiser(noisy, level, text).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, clean).mean()

    return loss


def coder_optimiser(steps: int) -> optax.GradientTransformation:
    """Returns the VQGAN's optimiser, which does not change the lattice or the normalisation's statistics."""

    def label(vqgan):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "fixed" if flax_name(path).endswith(_FIXED) else "trained", vqgan
        )

    return optax.multi_transform({"trained": adam(1e-3, steps), "fixed": optax.set_to_zero()}, label)


class PaellaTrainer(Trainer):
    """Trains the VQGAN, then the byte encoder, then the denoiser together with the byte encoder.

    Args:
        folder, plan, options: as for `Trainer`.
        configs: the networks' configs, which must be the same in every run with the same folder.
    """

    plan: Plan

    def __init__(self, folder: Path, plan: Plan, *, configs: Configs = SMALL, **options: Any):
        super().__init__(folder, plan, **options)
        self.configs, self.tokenizer = configs, ByteTokenizer(configs.byt5["vocab_size"])

    def stages(self) -> Sequence[Stage]:
        """Returns three stages: the VQGAN, the byte encoder with a head, and the byte encoder with the denoiser."""
        plan, keys = self.plan, jax.random.split(jax.random.key(0), 3)
        text, net = T5Config.from_dict(self.configs.byt5), PaellaConfig.from_dict(self.configs.denoiser)
        vqgan = initial_vqgan(VQModel(VQConfig.from_dict(self.configs.vqgan)), keys[0])
        # keys[1] is for both networks of the denoiser's stage, and keys[2] is for the head.
        text_key, net_key = jax.random.split(keys[1])
        byt5, denoiser = initial_byt5(text, text_key), initial_denoiser(net, net_key)
        head = initial(Linear(text.d_model, sum(map(len, ATTRIBUTES.values()))), keys[2])
        coding, coder = reconstruction(plan.autoencoder_batch), coder_optimiser(plan.autoencoder_steps)
        return (
            Stage("vqgan", vqgan, coding, coder, plan.autoencoder_steps),
            Stage("byt5", (byt5, head), reading(plan.batch), adam(1e-3, plan.reading_steps), plan.reading_steps),
            Stage(
                "denoiser",
                (byt5, denoiser),
                naming(plan.batch, net.num_labels),
                adam(1e-3, plan.steps),
                plan.steps,
                decay=0.9995,
                inherit=lambda networks, before: (before[0], networks[1]),
            ),
        )

    def encode(self, vqgan: VQModel, key: jax.Array, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Draws n portraits and encodes them as tokens."""
        keys = jax.random.split(key)
        attributes = portraits.sample(keys[0], n)
        image = (portraits.render(attributes, keys[1]) + 1) / 2
        tokens, _ = half(vqgan).encode(image)
        error = half(vqgan).decode_indices(tokens).astype(jnp.float32) - image
        return attributes, tokens.astype(jnp.int16), jnp.mean(error**2)

    def tokenise(self, texts: Sequence[str]) -> np.ndarray:
        """Returns token ids from ByT5's tokenizer, truncated or padded with 0 to `BYTES`."""
        ids = self.tokenizer(texts)[:, 0, :BYTES]
        return np.pad(ids, ((0, 0), (0, BYTES - ids.shape[1])))

    def dataset(self, vqgan: VQModel) -> Dataset:
        """Makes the training set, and reports how many different tokens the first 1000 portraits use."""
        data = super().dataset(vqgan)
        self.say(f"tokens in use: {len(np.unique(np.asarray(data.codes[:1000])))}")
        return data

    def write_model(self, vqgan: VQModel, networks: tuple[Any, Any], data: Dataset) -> None:
        """Writes a checkpoint in diffusers layout for `sega_jax.load`."""
        del data
        for part, module in zip(("byt5", "denoiser", "vqgan"), (*networks, vqgan), strict=True):
            self.write(part, module, getattr(self.configs, part))
        write_json(self.folder / "model" / "model_index.json", INDEX)


main = command(PaellaTrainer, Plan(), "a small Paella")

if __name__ == "__main__":
    main()
