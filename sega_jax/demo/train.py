"""Trains the demo model: an autoencoder on portraits, then a UNet and a text encoder on its latents.

    python -m sega_jax.demo.train FOLDER --minutes 9.2

works until it is done or the minutes are over, and goes on where it was when it is called again, also after a kill:
FOLDER/state has an Orbax checkpoint, renewed every two minutes. FOLDER/model is the model, diffusers layout, float16.

The model that comes along took two calls on one H200, of 9.2 and 6.4 minutes, compilation included: 3,000 steps of the
autoencoder (40.0 dB on portraits, which it says at the end), then 14,000 of the denoiser. To expect of plain prompts:
the judge found each of the ten words of `sega_jax.demo.evaluate.TEN` in 128 pictures of 128
(`python -m sega_jax.demo.evaluate FOLDER --model FOLDER/model --studies prompts --first-seed 0`).
"""

import functools
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from safetensors.numpy import save_file

from sega_jax.checkpoint import flax_name, to_torch, torch_key
from sega_jax.cli import plainly
from sega_jax.demo import portraits, wording
from sega_jax.demo.configs import DEMO, INDEX, Configs
from sega_jax.kinds import weight_stem
from sega_jax.nn.layers import Embed
from sega_jax.schedules.noise import cumulative
from sega_jax.systems.stable_diffusion import Models
from sega_jax.text import Tokenizer


class Plan(NamedTuple):
    """How much of everything."""

    autoencoder_steps: int = 3000
    autoencoder_batch: int = 128
    portraits: int = 160_000
    captions: int = 2  # of each portrait
    steps: int = 14_000
    batch: int = 512
    chunk: int = 50  # steps in one call of a compiled program


# Convolutions and projections that end a residual branch begin at zero, so that the branch does.
_ENDS = ("conv2.kernel", "proj_out.kernel", "to_out.0.kernel", "ff.net.2.kernel", "fc2.kernel", "out_proj.kernel")


def initial(module: Any, key: jax.Array, zero: tuple[str, ...] = _ENDS) -> Any:
    """The module with random values: kernels N(0, 1 / fan in), embeddings N(0, 0.02²), scales 1, biases 0."""
    leaves = jax.tree_util.tree_leaves_with_path(module)

    def value(path, leaf, key):
        name = flax_name(path)
        if name.endswith("scale"):
            return jnp.ones(leaf.shape)
        if name.endswith("bias") or name.endswith(zero):
            return jnp.zeros(leaf.shape)
        deviation = 0.02 if name.endswith("embedding") else 1 / math.sqrt(math.prod(leaf.shape[:-1]))
        return deviation * jax.random.truncated_normal(key, -2, 2, leaf.shape)

    @jax.jit
    def values(key):
        keys = jax.random.split(key, len(leaves))
        return [value(path, leaf, key) for (path, leaf), key in zip(leaves, keys, strict=True)]

    return jax.tree.unflatten(jax.tree.structure(module), values(key))


def half(module: Any) -> Any:
    """In bfloat16 where the accelerator computes in it."""
    return module if jax.default_backend() == "cpu" else jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), module)


class State(NamedTuple):
    """What a stage trains; all trees of arrays."""

    step: jax.Array  # int32
    networks: Any
    average: Any  # exponential, of the networks
    optimiser: Any


def begin(networks: Any, optimiser: optax.GradientTransformation) -> State:
    return State(jnp.zeros((), jnp.int32), networks, jax.tree.map(jnp.copy, networks), optimiser.init(networks))


@functools.partial(jax.jit, static_argnames=("loss", "optimiser", "decay", "steps"), donate_argnames="state")
def train(
    state: State, data: Any, *, loss: Callable, optimiser: optax.GradientTransformation, decay: float, steps: int
) -> tuple[State, jax.Array]:
    """Takes steps on `loss(networks, key, data)` and returns its mean."""

    def step(state, _):
        value, slope = jax.value_and_grad(loss)(state.networks, jax.random.fold_in(jax.random.key(1), state.step), data)
        change, inner = optimiser.update(slope, state.optimiser, state.networks)
        networks = optax.apply_updates(state.networks, change)
        # Young averages follow quickly.
        keep = jnp.minimum(decay, (state.step + 1) / (state.step + 10))
        average = jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, state.average, networks)
        return State(state.step + 1, networks, average, inner), value

    state, values = jax.lax.scan(step, state, length=steps)
    return state, values.mean()


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


class OneHot(Embed):
    """The same table as a product: its gradient is a sum of rows that GPUs take in parallel, that of a lookup is a
    scatter in which the many padding tokens wait for each other."""

    def __call__(self, ids: jax.Array) -> jax.Array:
        table = self.embedding[...]
        return jax.nn.one_hot(ids, len(table), dtype=table.dtype) @ table


def optimisers(plan: Plan) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Of the autoencoder, and of (text encoder, UNet), the words learning faster."""

    def adam(rate, steps):
        schedule = optax.warmup_cosine_decay_schedule(0, rate, min(200, steps // 10), steps, 0.01 * rate)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.01))

    text, unet = adam(1e-3, plan.steps), adam(5e-4, plan.steps)
    both = optax.multi_transform({"text": text, "unet": unet}, ("text", "unet"))
    return adam(1e-3, plan.autoencoder_steps), both


class Trainer:
    """The two stages over a folder that keeps them.

    Args:
        folder: for `state` and `model`.
        plan, configs: how much of everything, and of which networks; the same in every call on a folder.
        minutes: after which to stop.
        say: where progress is told.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        *,
        configs: Configs = DEMO,
        minutes: float = math.inf,
        say: Callable[[str], Any] = click.echo,
    ):
        self.folder, self.plan, self.say = folder.absolute(), plan, say
        self.end = time.monotonic() + 60 * minutes
        self.keep = ocp.CheckpointManager(
            self.folder / "state", options=ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        )
        self._remember(plan)
        wording.tokenizer(self.folder / "model" / "tokenizer")
        vocabulary = json.loads((self.folder / "model" / "tokenizer" / "vocab.json").read_text())
        special = {f"{name}_token_id": vocabulary[f"<|{word}|>"] for name, word in _SPECIAL.items()}
        self.configs = configs._replace(text_encoder=configs.text_encoder | {"vocab_size": len(vocabulary)} | special)
        self.tokens = Tokenizer(self.folder / "model" / "tokenizer", wording.LENGTH, len(vocabulary))
        attention = "xla" if jax.default_backend() == "cpu" else "cudnn"
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
        self.write(Models(text_encoder, unet, vae), 1 / deviation)
        return networks is not None

    def _remember(self, plan: Plan) -> None:
        """Another plan would give the learning rate's schedule another end."""
        path = self.folder / "plan.json"
        if path.is_file() and (before := json.loads(path.read_text())) != plan._asdict():
            raise ValueError(f"{self.folder} was begun with {before}; go on with that, or name another folder")
        write_json(path, plan._asdict())

    def restore(self, states: dict[str, State]) -> dict[str, State]:
        """The newest checkpoint, where there is one."""
        if (latest := self.keep.latest_step()) is None:
            return states
        leaves, tree = jax.tree.flatten(states)
        kept = self.keep.restore(latest, args=ocp.args.StandardRestore(leaves))
        self.say(f"goes on from step {latest}")
        return jax.tree.unflatten(tree, kept)

    def save(self, states: dict[str, State]) -> None:
        step = sum(int(state.step) for state in states.values())
        self.keep.save(step, args=ocp.args.StandardSave(jax.tree.leaves(states)))

    def stage(
        self,
        states: dict[str, State],
        name: str,
        loss: Callable,
        data: Any,
        optimiser: optax.GradientTransformation,
        decay: float,
        steps: int,
    ) -> Any:
        """Trains up to this step; its average, or None where the time is over."""
        saved = began = time.monotonic()
        first = int(states[name].step)
        while (step := int(states[name].step)) < steps:
            if time.monotonic() > self.end:
                self.save(states)
                return None
            states[name], value = train(
                states[name],
                data,
                loss=loss,
                optimiser=optimiser,
                decay=decay,
                steps=min(self.plan.chunk, steps - step),
            )
            value, now = float(value), time.monotonic()
            if not math.isfinite(value):
                raise FloatingPointError(f"{name}: the loss is {value} after step {int(states[name].step)}")
            if step // self.plan.chunk % 10 == 0:
                pace = (int(states[name].step) - first) / (now - began)
                self.say(f"{name} {int(states[name].step):6} of {steps}  loss {value:.5f}  {pace:.2f} steps a second")
            if now > saved + 120:
                self.save(states)
                saved = now
        if first < steps:
            self.save(states)
        return states[name].average

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

    def write(self, models: Models, scaling_factor: float) -> None:
        """The checkpoint in diffusers layout, in float16."""
        configs = self.configs._asdict()
        configs["vae"] = configs["vae"] | {"scaling_factor": scaling_factor}
        for part, module in models._asdict().items():
            tensors = {
                torch_key(flax_name(path)): np.ascontiguousarray(to_torch(flax_name(path), np.float16(leaf)))
                for path, leaf in jax.tree_util.tree_leaves_with_path(module)
            }
            write_json(self.folder / "model" / part / "config.json", configs[part])
            save_file(tensors, self.folder / "model" / part / f"{weight_stem(part)}.safetensors", {"format": "pt"})
        write_json(self.folder / "model" / "scheduler" / "scheduler_config.json", self.configs.scheduler)
        write_json(self.folder / "model" / "model_index.json", INDEX)


_SPECIAL = {"bos": "startoftext", "eos": "endoftext", "pad": "endoftext"}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


@click.command(context_settings={"show_default": True})
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--minutes", default=math.inf, help="After which to stop.")
def main(folder: Path, minutes: float) -> None:
    """Trains the demo model in FOLDER, or goes on with it."""
    with plainly():
        if jax.config.jax_compilation_cache_dir is None:
            jax.config.update("jax_compilation_cache_dir", str(folder.absolute() / "compiled"))
        done = Trainer(folder, Plan(), minutes=minutes).run()
    click.echo("done" if done else "not done yet: call it again")


if __name__ == "__main__":
    main()
