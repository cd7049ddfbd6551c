"""Trains the demo model: an autoencoder on portraits, then a UNet and a text encoder on its latents.

    python -m sega_jax.demo.training.diffusion FOLDER --minutes 9.2

works until it is done or the minutes are over, and goes on where it was when it is called again, also after a kill:
FOLDER/state has an Orbax checkpoint, renewed every two minutes. FOLDER/model is the model, diffusers layout, float16.

The model that comes along took two calls on one H200, of 9.2 and 6.4 minutes, compilation included: 3,000 steps of the
autoencoder (40.0 dB on portraits, which it says at the end), then 14,000 of the denoiser. To expect of plain prompts:
the judge found each of the ten words of `sega_jax.demo.evaluate.TEN` in 128 pictures of 128
(`python -m sega_jax.demo.evaluate.diffusion FOLDER --model FOLDER/model --studies prompts --first-seed 0`).
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sega_jax.demo.training import portraits, wording
from sega_jax.demo.training.configs import DEMO, INDEX, Configs
from sega_jax.demo.training.trainer import OneHot, Stages, adam, begin, command, half, initial, write_json
from sega_jax.method.schedules.spacing import cumulative
from sega_jax.systems.stable_diffusion import Models
from sega_jax.text.tokenizers import Tokenizer


class Plan(NamedTuple):
    """How much of everything."""

    autoencoder_steps: int = 3000
    autoencoder_batch: int = 128
    portraits: int = 160_000
    captions: int = 2  # of each portrait
    steps: int = 14_000
    batch: int = 512
    chunk: int = 50  # steps in one call of a compiled program


def reconstruction(batch: int) -> Callable:
    """The autoencoder's loss: L1 of pixels and of their differences, MSE, and a little of the KL divergence."""

    def loss(vae, key, data):
        del data
        vae, keys = half(vae), jax.random.split(key, 3)
        image = portraits.render(portraits.sample(keys[0], batch), keys[1])
        mean, logvar = (part.astype(jnp.float32) for part in vae.encode(image))
        latents = mean + jnp.exp(logvar / 2) * jax.random.normal(keys[2], mean.shape)
        error = vae.decode(latents).astype(jnp.float32) - image
        edges = sum(jnp.abs(jnp.diff(error, axis=axis)).mean() for axis in (1, 2))
        divergence = (mean**2 + jnp.exp(logvar) - 1 - logvar).mean() / 2
        return jnp.abs(error).mean() + edges + (error**2).mean() + 5e-4 * divergence

    return loss


class Bank(NamedTuple):
    """What the denoiser is trained on."""

    latents: jax.Array  # float16 [portraits, 32, 32, 4], scaled to variance 1
    tokens: jax.Array  # int16 [portraits, captions, tokens]
    empty: jax.Array  # int16 [tokens], of no words


def denoising(batch: int, scheduler: Mapping[str, Any]) -> Callable:
    """The mean square of v's error (Salimans & Ho 2022), weighted by min(1, 5 (1 - abar)): as an error of the picture
    it counts at most five times, as min-SNR weights do (Hang et al. 2023). 10 % of the captions are dropped."""
    bars = cumulative(scheduler)
    levels = np.stack([np.sqrt(bars), np.sqrt(1 - bars), np.minimum(1, 5 * (1 - bars))])

    def loss(networks, key, bank):
        text_encoder, unet = (half(network) for network in networks)
        rows, which, drop, when, fresh = jax.random.split(key, 5)
        row = jax.random.randint(rows, (batch,), 0, len(bank.latents))
        caption = jax.random.randint(which, (batch,), 0, bank.tokens.shape[1])
        dropped = jax.random.uniform(drop, (batch, 1)) < 0.1
        ids = jnp.where(dropped, bank.empty[None], bank.tokens[row, caption]).astype(jnp.int32)
        clean = bank.latents[row].astype(jnp.float32)
        timestep = jax.random.randint(when, (batch,), 0, len(bars))
        signal, noise, weight = jnp.asarray(levels, jnp.float32)[:, timestep, None, None, None]
        epsilon = jax.random.normal(fresh, clean.shape)
        found = unet(signal * clean + noise * epsilon, timestep.astype(jnp.float32), text_encoder(ids))
        return (weight * (found.astype(jnp.float32) - signal * epsilon + noise * clean) ** 2).mean()

    return loss


def optimisers(plan: Plan) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Of the autoencoder, and of (text encoder, UNet), the words learning faster."""
    text, unet = adam(1e-3, plan.steps), adam(5e-4, plan.steps)
    both = optax.multi_transform({"text": text, "unet": unet}, ("text", "unet"))
    return adam(1e-3, plan.autoencoder_steps), both


class Trainer(Stages):
    """The autoencoder, then the denoiser with its text encoder.

    Args:
        folder: for `state` and `model`.
        plan, configs: how much of everything, and of which networks; the same in every call on a folder.
        options: of `Stages`.
    """

    def __init__(self, folder: Path, plan: Plan, *, configs: Configs = DEMO, **options: Any):
        super().__init__(folder, plan, **options)
        wording.tokenizer(self.folder / "model" / "tokenizer")
        vocabulary = json.loads((self.folder / "model" / "tokenizer" / "vocab.json").read_text())
        special = {f"{name}_token_id": vocabulary[f"<|{word}|>"] for name, word in _SPECIAL.items()}
        self.configs = configs._replace(text_encoder=configs.text_encoder | {"vocab_size": len(vocabulary)} | special)
        self.tokens = Tokenizer(self.folder / "model" / "tokenizer", wording.LENGTH, len(vocabulary))
        attention = "cudnn" if jax.default_backend() == "gpu" else "xla"
        text_encoder, unet, vae, _ = self.configs
        self.models = Models.build(text_encoder, unet, vae, attention=attention)
        self.models.text_encoder.embeddings.token_embedding = OneHot(len(vocabulary), text_encoder["hidden_size"])

    def run(self) -> bool:
        """Whether the model is done; it is written as soon as there is an autoencoder.

        Raises:
            FloatingPointError: the loss is not finite; the checkpoint is from before.
        """
        plan, (coder, denoiser) = self.plan, optimisers(self.plan)
        keys = jax.random.split(jax.random.key(0), 3)
        text_encoder, unet = initial(self.models.text_encoder, keys[0]), initial(self.models.unet, keys[1])
        unet.conv_out.kernel[...] = jnp.zeros_like(unet.conv_out.kernel[...])
        states = {
            "autoencoder": begin(initial(self.models.vae, keys[2]), coder),
            "denoiser": begin((text_encoder, unet), denoiser),
        }
        states = self.restore(states)
        loss = reconstruction(plan.autoencoder_batch)
        vae = self.stage(states, "autoencoder", loss, None, coder, 0.999, plan.autoencoder_steps)
        if vae is None:
            return False
        bank, deviation = self.bank(vae)
        loss = denoising(plan.batch, self.configs.scheduler)
        networks = self.stage(states, "denoiser", loss, bank, denoiser, 0.9995, plan.steps)
        text_encoder, unet = networks or states["denoiser"].average
        self.finish(Models(text_encoder, unet, vae), 1 / deviation)
        return networks is not None

    def bank(self, vae: Any) -> tuple[Bank, float]:
        """Portraits as latents and captions as tokens, and the latents' standard deviation before scaling."""
        began, plan, size = time.monotonic(), self.plan, min(256, self.plan.portraits)

        @jax.jit
        def encode(vae, key):
            keys = jax.random.split(key, 3)
            attributes = portraits.sample(keys[0], size)
            image = portraits.render(attributes, keys[1])
            mean, logvar = half(vae).encode(image)
            spread = jnp.exp(logvar.astype(jnp.float32) / 2) * jax.random.normal(keys[2], mean.shape)
            drawn = mean.astype(jnp.float32) + spread
            error = half(vae).decode(drawn).astype(jnp.float32) - image
            return attributes, drawn.astype(jnp.float16), jnp.mean(error**2)

        parts = [encode(vae, jax.random.fold_in(jax.random.key(2), i)) for i in range(-(-plan.portraits // size))]
        attributes = np.concatenate([np.asarray(part) for part, _, _ in parts])[: plan.portraits]
        latents = jnp.concatenate([part for _, part, _ in parts])[: plan.portraits]
        decibels = 10 * math.log10(4 / np.mean([float(error) for _, _, error in parts]))
        deviation = float(latents.astype(jnp.float32).std())
        rng = np.random.default_rng(3)
        words = [portraits.captions(attributes, rng) for _ in range(plan.captions)]
        ids = [np.concatenate([self.tokens(w[i : i + 5000]) for i in range(0, len(w), 5000)]) for w in words]
        tokens = jnp.asarray(np.stack(ids, 1), jnp.int16)
        seconds = time.monotonic() - began
        self.say(f"{len(latents)} portraits, {decibels:.1f} dB, of deviation {deviation:.3f}, in {seconds:.0f} s")
        return Bank(latents / jnp.float16(deviation), tokens, jnp.asarray(self.tokens([""])[0], jnp.int16)), deviation

    def finish(self, models: Models, scaling_factor: float) -> None:
        """Writes the checkpoint in diffusers layout."""
        configs = self.configs._asdict()
        configs["vae"] = configs["vae"] | {"scaling_factor": scaling_factor}
        for part, module in models._asdict().items():
            self.write(part, module, configs[part])
        write_json(self.folder / "model" / "scheduler" / "scheduler_config.json", self.configs.scheduler)
        write_json(self.folder / "model" / "model_index.json", INDEX)


_SPECIAL = {"bos": "startoftext", "eos": "endoftext", "pad": "endoftext"}


main = command(Trainer, Plan(), "the demo model")

if __name__ == "__main__":
    main()
