"""Trains a portrait model in stages. After an interruption, training resumes from the last checkpoint.

Every recipe first trains an autoencoder and encodes portraits with it. Then it trains networks on the codes and
captions. `Trainer` runs these stages; each recipe defines its networks and losses.
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from sega_jax.demo.training.dataset import Dataset, caption_portraits, encode_portraits
from sega_jax.pipelines.progress import plainly
from sega_jax.weights.write import network_of, write_diffusers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The numbers of training steps, and the sizes of batches and of the training set."""

    autoencoder_steps: int
    autoencoder_batch: int
    portraits: int = 160_000
    captions: int = 2  # for each portrait
    steps: int  # the steps of the last stage
    batch: int  # the batch size of all stages after the autoencoder stage
    chunk: int = 50  # steps in one call of a compiled program


class Stage(NamedTuple):
    """Networks that are trained together with one loss."""

    name: str
    networks: Any  # with their initial parameters
    loss: Callable  # (networks, key, dataset) -> a scalar; the autoencoder's loss gets None as its dataset
    optimiser: optax.GradientTransformation
    steps: int
    decay: float = 0.999  # the decay rate of the networks' running average
    # (networks, averaged networks of the previous stage) -> the networks to start with. None uses `networks`.
    inherit: Callable[[Any, Any], Any] | None = None


class State(NamedTuple):
    """The training state of a stage."""

    step: jax.Array  # int32
    networks: Any
    average: Any  # the exponential running average of the networks
    optimiser: Any


def begin(networks: Any, optimiser: optax.GradientTransformation) -> State:
    """Returns the state before the first step, with copies of all arrays.

    `take_steps` donates its state's arrays, so they must not be used anywhere else.
    """
    networks, average = (jax.tree.map(jnp.copy, networks) for _ in range(2))
    return State(jnp.zeros((), jnp.int32), networks, average, optimiser.init(networks))


@functools.partial(jax.jit, static_argnames=("loss", "optimiser", "decay", "steps"), donate_argnames="state")
def take_steps(
    state: State, data: Any, *, loss: Callable, optimiser: optax.GradientTransformation, decay: float, steps: int
) -> tuple[State, jax.Array]:
    """Takes optimisation steps on `loss(networks, key, data)`, and returns the new state and the mean loss."""

    def step(state, _):
        value, slope = jax.value_and_grad(loss)(state.networks, jax.random.fold_in(jax.random.key(1), state.step), data)
        change, inner = optimiser.update(slope, state.optimiser, state.networks)
        networks = optax.apply_updates(state.networks, change)
        # At first, the average follows the networks quickly, so that it soon forgets their initial parameters.
        keep = jnp.minimum(decay, (state.step + 1) / (state.step + 10))
        average = jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, state.average, networks)
        return State(state.step + 1, networks, average, inner), value

    state, values = jax.lax.scan(step, state, length=steps)
    return state, values.mean()


def adam(rate: float, steps: int) -> optax.GradientTransformation:
    """Returns AdamW with gradient clipping. The learning rate warms up to `rate` and then decays along a cosine to a
    hundredth of `rate`."""
    schedule = optax.warmup_cosine_decay_schedule(0, rate, min(200, steps // 10), steps, 0.01 * rate)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.01))


def picture_loss(error: jax.Array) -> jax.Array:
    """Returns the sum of the pixels' L1 error, the L1 error of differences between neighbouring pixels, and the mean
    square error.

    Args:
        error: the difference between pictures in [-1, 1], [n, height, width, channels].
    """
    edges = sum(jnp.abs(jnp.diff(error, axis=axis)).mean() for axis in (1, 2))
    return jnp.abs(error).mean() + edges + (error**2).mean()


class Trainer:
    """Trains a model stage by stage, and stores its progress in a folder.

    A recipe defines `stages`, `encode`, `tokenise` and `write_model`.

    Args:
        folder: the folder in which the trainer writes `model` and `state`. `state` is an Orbax checkpoint that is
            updated every two minutes.
        plan: the training plan, which must be the same in every run with the same folder.
        minutes: the time limit in minutes.
        say: a function that is called with each line of the progress report.
    """

    def __init__(self, folder: Path, plan: Plan, *, minutes: float = math.inf, say: Callable[[str], Any] = click.echo):
        self.folder, self.plan, self.say = folder.absolute(), plan, say
        self.end = time.monotonic() + 60 * minutes
        self.keep = ocp.CheckpointManager(
            self.folder / "state", options=ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        )
        self._check_plan()

    def stages(self) -> Sequence[Stage]:
        """Returns the stages in order. The first stage trains the autoencoder, and the last one trains the model's
        networks."""
        raise NotImplementedError

    def encode(self, autoencoder: Any, key: jax.Array, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Draws and encodes n portraits, as `sega_jax.demo.training.dataset.Encode` describes."""
        raise NotImplementedError

    def tokenise(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the token ids of captions, [texts, length]."""
        raise NotImplementedError

    def write_model(self, autoencoder: Any, networks: Any, dataset: Dataset) -> None:
        """Writes the trained networks to `folder / "model"`, in diffusers layout."""
        raise NotImplementedError

    def run(self) -> bool:
        """Trains until the model is finished or the time limit is reached, and returns whether the model is finished.

        In both cases, the model is written if the last stage was reached.

        Raises:
            FloatingPointError: the loss is not finite. The last checkpoint before the failure is still in the folder.
        """
        first, *between, last = self.stages()
        states = self.restore({stage.name: begin(stage.networks, stage.optimiser) for stage in (first, *between, last)})
        autoencoder = average = self.train(first, states)
        if autoencoder is None:
            return False
        dataset = self.dataset(autoencoder)
        for stage in between:
            average = self.train(stage, states, dataset, average)
            if average is None:
                return False
        networks = self.train(last, states, dataset, average)
        self.write_model(autoencoder, networks or states[last.name].average, dataset)
        return networks is not None

    def dataset(self, autoencoder: Any) -> Dataset:
        """Draws, encodes and captions the plan's portraits."""
        began = time.monotonic()
        attributes, codes, decibels = encode_portraits(self.encode, autoencoder, self.plan.portraits)
        captions, empty = caption_portraits(attributes, self.plan.captions, self.tokenise)
        self.say(f"{len(codes)} portraits at {decibels:.1f} dB, with captions, in {time.monotonic() - began:.0f} s")
        return Dataset(jnp.asarray(attributes), codes, captions, empty)

    def train(
        self, stage: Stage, states: dict[str, State], dataset: Dataset | None = None, before: Any = None
    ) -> Any | None:
        """Trains a stage to its last step, and updates its state in `states`.

        Args:
            stage: the stage to train.
            states: {stage: state} for all stages.
            dataset: the training set; None for the autoencoder.
            before: the averaged networks of the previous stage.

        Returns:
            The averaged networks, or None if the time limit was reached.
        """
        name = stage.name
        first = int(states[name].step)
        if not first and stage.inherit is not None:
            states[name] = begin(stage.inherit(stage.networks, before), stage.optimiser)
        options = {"loss": stage.loss, "optimiser": stage.optimiser, "decay": stage.decay}
        saved = began = time.monotonic()
        while (step := int(states[name].step)) < stage.steps:
            if time.monotonic() > self.end:
                self.save(states)
                return None
            chunk = min(self.plan.chunk, stage.steps - step)
            states[name], value = take_steps(states[name], dataset, **options, steps=chunk)
            value, now = float(value), time.monotonic()
            reached = int(states[name].step)
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"{name}: the loss is {value} after step {reached}; the last checkpoint before this is still in"
                    " the folder"
                )
            if step // self.plan.chunk % 10 == 0:
                pace = (reached - first) / (now - began)
                self.say(f"{name} {reached:6} of {stage.steps}  loss {value:.5f}  {pace:.2f} steps per second")
            if now > saved + 120:
                self.save(states)
                saved = now
        if first < stage.steps:
            self.save(states)
        return states[name].average

    def restore(self, states: dict[str, State]) -> dict[str, State]:
        """Returns the states of the newest checkpoint, or `states` if there is none."""
        if (latest := self.keep.latest_step()) is None:
            return states
        leaves, tree = jax.tree.flatten(states)
        kept = self.keep.restore(latest, args=ocp.args.StandardRestore(leaves))
        self.say(f"resuming from step {latest}")
        return jax.tree.unflatten(tree, kept)

    def save(self, states: dict[str, State]) -> None:
        """Writes a checkpoint, numbered by the sum of all stages' steps."""
        step = sum(int(state.step) for state in states.values())
        self.keep.save(step, args=ocp.args.StandardSave(jax.tree.leaves(states)))

    def write(self, part: str, module: Any, config: Mapping[str, Any]) -> None:
        """Writes one of the model's networks, in float16, and its config."""
        # transformers and diffusers use different file names, and only transformers' configs have a `model_type`.
        stem = "model" if "model_type" in config else "diffusion_pytorch_model"
        folder = self.folder / "model" / part
        write_json(folder / "config.json", config)
        write_diffusers(folder, network_of(module, np.float16), stem)

    def _check_plan(self) -> None:
        """Writes the plan, or checks that the folder has the same plan, because the learning rate depends on it."""
        path, plan = self.folder / "plan.json", dataclasses.asdict(self.plan)
        if path.is_file() and (before := json.loads(path.read_text())) != plan:
            raise ValueError(
                f"{self.folder} was started with the plan {before}; use the same plan or a different folder"
            )
        write_json(path, plan)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file, and creates its folder if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def command(trainer: Callable[..., Trainer], plan: Plan, model: str) -> click.Command:
    """Returns a shell command that trains a model. Compiled programs are cached in the training folder.

    Args:
        trainer: the recipe's class.
        plan: the training plan.
        model: the model's name in the command's help.
    """

    @click.command(context_settings={"show_default": True}, help=f"Trains {model} in FOLDER, or resumes its training.")
    @click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
    @click.option("--minutes", default=math.inf, help="Stop after this many minutes.")
    def main(folder: Path, minutes: float) -> None:
        with plainly():
            # JAX adds its options to `jax.config` at run time, where mypy cannot see them.
            if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
                jax.config.update("jax_compilation_cache_dir", str(folder.absolute() / "compiled"))
            done = trainer(folder, plan, minutes=minutes).run()
        click.echo("done" if done else "not done yet; run the command again to resume")

    return main
