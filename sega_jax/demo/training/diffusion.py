"""Trains the demo model: an autoencoder on portraits, then a UNet and a text encoder on its latents.

    python -m sega_jax.demo.training.diffusion FOLDER --minutes 9.2

The command trains until the model is finished or the time limit is reached. The next run resumes the training, even if
the process was killed: FOLDER/state contains an Orbax checkpoint that is updated every two minutes. FOLDER/model
contains the model in diffusers layout, in float16.

The packaged model was trained in two runs of 9.2 and 6.4 minutes on one H200, including compilation. The autoencoder
was trained for 3,000 steps and then, according to the log, reconstructed portraits at 40.0 dB; the denoiser was trained
for 14,000 steps. A model that was trained in this way follows prompts without edits: the judge found each of the ten
words of `sega_jax.demo.evaluate.evaluation.TEN` in 128 of 128 pictures
(`python -m sega_jax.demo.evaluate.diffusion FOLDER --model FOLDER/model --studies prompts --first-seed 0`).
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sega_jax.demo.settings import RECOMMENDED
from sega_jax.demo.training import portraits, trainer, wording
from sega_jax.demo.training.configs import DEMO, INDEX, Configs
from sega_jax.demo.training.dataset import Dataset
from sega_jax.demo.training.networks import OneHot, attention, half, initial
from sega_jax.demo.training.trainer import Stage, Trainer, adam, command, picture_loss, write_json
from sega_jax.method.schedules.spacing import cumulative
from sega_jax.nn.clip import CLIPTextConfig, CLIPTextModel
from sega_jax.nn.unet import UNet2DConditionModel, UNetConfig
from sega_jax.nn.vae import AutoencoderConfig, AutoencoderKL
from sega_jax.pipelines.recommended import FILE
from sega_jax.text.tokenizers import Tokenizer

_SPECIAL = {"bos": "startoftext", "eos": "endoftext", "pad": "endoftext"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(trainer.Plan):
    """The training steps and batch sizes of the packaged model."""

    autoencoder_steps: int = 3000
    autoencoder_batch: int = 128
    steps: int = 14_000
    batch: int = 512


def reconstruction(batch: int) -> Callable:
    """Returns the autoencoder's loss: `picture_loss` plus 5e-4 times the KL divergence."""

    def loss(vae, key, data):
        del data
        vae, keys = half(vae), jax.random.split(key, 3)
        image = portraits.render(portraits.sample(keys[0], batch), keys[1])
        mean, logvar = (part.astype(jnp.float32) for part in vae.encode(image))
        latents = mean + jnp.exp(logvar / 2) * jax.random.normal(keys[2], mean.shape)
        error = vae.decode(latents).astype(jnp.float32) - image
        divergence = (mean**2 + jnp.exp(logvar) - 1 - logvar).mean() / 2
        return picture_loss(error) + 5e-4 * divergence

    return loss


def denoising(batch: int, scheduler: Mapping[str, Any]) -> Callable:
    """Returns the denoiser's loss: the mean square error of v (Salimans & Ho 2022), weighted by min(1, 5 (1 - abar)).

    If the loss is expressed as the error of the clean latents, the weight is at most 5, as with min-SNR weights (Hang
    et al. 2023).
    10 % of the captions are empty.
    """
    bars = cumulative(scheduler)
    levels = np.stack([np.sqrt(bars), np.sqrt(1 - bars), np.minimum(1, 5 * (1 - bars))])

    def loss(networks, key, data):
        text_encoder, unet = (half(network) for network in networks)
        *keys, when, fresh = jax.random.split(key, 5)
        row, ids = data.draw(batch, *keys)
        clean = data.codes[row].astype(jnp.float32)
        timestep = jax.random.randint(when, (batch,), 0, len(bars))
        signal, noise, weight = jnp.asarray(levels, jnp.float32)[:, timestep, None, None, None]
        epsilon = jax.random.normal(fresh, clean.shape)
        prediction = unet(signal * clean + noise * epsilon, timestep.astype(jnp.float32), text_encoder(ids))
        return (weight * (prediction.astype(jnp.float32) - signal * epsilon + noise * clean) ** 2).mean()

    return loss


class DiffusionTrainer(Trainer):
    """Trains the autoencoder, then the UNet together with the text encoder.

    Args:
        folder, plan, options: as for `Trainer`.
        configs: the networks' configs, which must be the same in every run with the same folder.
    """

    def __init__(self, folder: Path, plan: Plan, *, configs: Configs = DEMO, **options: Any):
        super().__init__(folder, plan, **options)
        wording.tokenizer(self.folder / "model" / "tokenizer")
        vocabulary = json.loads((self.folder / "model" / "tokenizer" / "vocab.json").read_text())
        special = {f"{name}_token_id": vocabulary[f"<|{word}|>"] for name, word in _SPECIAL.items()}
        self.configs = configs._replace(text_encoder=configs.text_encoder | {"vocab_size": len(vocabulary)} | special)
        self.tokenizer = Tokenizer(self.folder / "model" / "tokenizer", wording.LENGTH, len(vocabulary))

    def stages(self) -> Sequence[Stage]:
        """Returns two stages: one for the autoencoder, and one for the text encoder and the UNet.

        The text encoder has a higher learning rate than the UNet.
        """
        plan, keys = self.plan, jax.random.split(jax.random.key(0), 3)
        text, net = CLIPTextConfig.from_dict(self.configs.text_encoder), UNetConfig.from_dict(self.configs.unet)
        text_encoder, unet = CLIPTextModel(text), UNet2DConditionModel(net, attention())
        text_encoder.embeddings.token_embedding = OneHot(text.vocab_size, text.hidden_size)
        text_encoder, unet = initial(text_encoder, keys[0]), initial(unet, keys[1])
        unet.conv_out.kernel[...] = jnp.zeros_like(unet.conv_out.kernel[...])
        vae = initial(AutoencoderKL(AutoencoderConfig.from_dict(self.configs.vae)), keys[2])
        rates = {"text": adam(1e-3, plan.steps), "unet": adam(5e-4, plan.steps)}
        coding, reading = reconstruction(plan.autoencoder_batch), denoising(plan.batch, self.configs.scheduler)
        return (
            Stage("autoencoder", vae, coding, adam(1e-3, plan.autoencoder_steps), plan.autoencoder_steps),
            Stage(
                "denoiser",
                (text_encoder, unet),
                reading,
                optax.multi_transform(rates, ("text", "unet")),
                plan.steps,
                decay=0.9995,
            ),
        )

    def encode(self, vae: AutoencoderKL, key: jax.Array, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Draws n portraits, and samples their latents from the autoencoder's posterior."""
        keys = jax.random.split(key, 3)
        attributes = portraits.sample(keys[0], n)
        image = portraits.render(attributes, keys[1])
        mean, logvar = half(vae).encode(image)
        spread = jnp.exp(logvar.astype(jnp.float32) / 2) * jax.random.normal(keys[2], mean.shape)
        latents = mean.astype(jnp.float32) + spread
        error = half(vae).decode(latents).astype(jnp.float32) - image
        return attributes, latents.astype(jnp.float16), jnp.mean(error**2) / 4

    def tokenise(self, texts: Sequence[str]) -> np.ndarray:
        """Returns token ids from CLIP's tokenizer, [texts, length]."""
        return self.tokenizer(texts)

    def dataset(self, vae: AutoencoderKL) -> Dataset:
        """Makes the training set. Its latents are divided by their standard deviation."""
        data = super().dataset(vae)
        deviation = float(data.codes.astype(jnp.float32).std())
        self.say(f"latents of standard deviation {deviation:.3f}")
        return data._replace(codes=data.codes / jnp.float16(deviation), deviation=deviation)

    def write_model(self, vae: AutoencoderKL, networks: tuple[Any, Any], data: Dataset) -> None:
        """Writes the checkpoint in diffusers layout."""
        configs = self.configs._asdict()
        configs["vae"] = configs["vae"] | {"scaling_factor": 1 / data.deviation}
        for part, module in zip(("text_encoder", "unet", "vae"), (*networks, vae), strict=True):
            self.write(part, module, configs[part])
        write_json(self.folder / "model" / "scheduler" / "scheduler_config.json", self.configs.scheduler)
        write_json(self.folder / "model" / FILE, RECOMMENDED.as_dict())
        write_json(self.folder / "model" / "model_index.json", INDEX)


main = command(DiffusionTrainer, Plan(), "the demo model")

if __name__ == "__main__":
    main()
