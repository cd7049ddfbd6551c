"""Trains a model of portraits in stages, in a folder from which training resumes after a stop or a kill.

Every recipe trains an autoencoder first, encodes portraits with it, and trains networks on their codes and captions.
`Trainer` is this course; a recipe adds its networks and losses.
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
    """The amount of training."""

    autoencoder_steps: int
    autoencoder_batch: int
    portraits: int = 160_000
    captions: int = 2  # for each portrait
    steps: int  # of the last stage
    batch: int
    chunk: int = 50  # steps in one call of a compiled program


class Stage(NamedTuple):
    """Networks that one loss trains together."""

    name: str
    networks: Any  # with their initial values
    loss: Callable  # (networks, key, dataset) -> a scalar; the autoencoder's gets None as its dataset
    optimiser: optax.GradientTransformation
    steps: int
    decay: float = 0.999  # of the running average of the networks
    # (networks, average networks of the stage before) -> the networks to start with; None starts with the initial ones.
    inherit: Callable[[Any, Any], Any] | None = None


class State(NamedTuple):
    """The state of a stage, in trees of arrays."""

    step: jax.Array  # int32
    networks: Any
    average: Any  # the exponential running average of the networks
    optimiser: Any


def begin(networks: Any, optimiser: optax.GradientTransformation) -> State:
    """Returns the state before the first step; it shares no array with `networks`.

    `take_steps` donates its state, so that no other state may share an array with it.
    """
    networks, average = (jax.tree.map(jnp.copy, networks) for _ in range(2))
    return State(jnp.zeros((), jnp.int32), networks, average, optimiser.init(networks))


@functools.partial(jax.jit, static_argnames=("loss", "optimiser", "decay", "steps"), donate_argnames="state")
def take_steps(
    state: State, data: Any, *, loss: Callable, optimiser: optax.GradientTransformation, decay: float, steps: int
) -> tuple[State, jax.Array]:
    """Takes steps on `loss(networks, key, data)` and returns the new state and the mean loss."""

    def step(state, _):
        value, slope = jax.value_and_grad(loss)(state.networks, jax.random.fold_in(jax.random.key(1), state.step), data)
        change, inner = optimiser.update(slope, state.optimiser, state.networks)
        networks = optax.apply_updates(state.networks, change)
        # A young average follows quickly.
        keep = jnp.minimum(decay, (state.step + 1) / (state.step + 10))
        average = jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, state.average, networks)
        return State(state.step + 1, networks, average, inner), value

    state, values = jax.lax.scan(step, state, length=steps)
    return state, values.mean()


def adam(rate: float, steps: int) -> optax.GradientTransformation:
    """Returns AdamW with a learning rate that warms up and then falls to a hundredth along a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(0, rate, min(200, steps // 10), steps, 0.01 * rate)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.01))


def picture_loss(error: jax.Array) -> jax.Array:
    """Sums L1 of the pixels, L1 of the differences between neighbouring pixels, and the mean square.

    error: [n, height, width, channels] of pictures in [-1, 1].
    """
    edges = sum(jnp.abs(jnp.diff(error, axis=axis)).mean() for axis in (1, 2))
    return jnp.abs(error).mean() + edges + (error**2).mean()


class Trainer:
    """Trains a model stage by stage, and keeps the stages in a folder.

    A recipe defines `stages`, `encode`, `tokenise` and `write_model`.

    Args:
        folder: gets `state`, an Orbax checkpoint that is renewed every two minutes, and `model`.
        plan: the amount of training; the same in every run on a folder.
        minutes: when to stop.
        say: takes each line of the progress report.
    """

    def __init__(self, folder: Path, plan: Plan, *, minutes: float = math.inf, say: Callable[[str], Any] = click.echo):
        self.folder, self.plan, self.say = folder.absolute(), plan, say
        self.end = time.monotonic() + 60 * minutes
        self.keep = ocp.CheckpointManager(
            self.folder / "state", options=ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        )
        self._check_plan()

    def stages(self) -> Sequence[Stage]:
        """Returns the stages in order: the first trains the autoencoder, the last the networks of the model."""
        raise NotImplementedError

    def encode(self, autoencoder: Any, key: jax.Array, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Draws and encodes n portraits (`sega_jax.demo.training.dataset.Encode`)."""
        raise NotImplementedError

    def tokenise(self, texts: Sequence[str]) -> np.ndarray:
        """Returns token ids [texts, length] of captions."""
        raise NotImplementedError

    def write_model(self, autoencoder: Any, networks: Any, dataset: Dataset) -> None:
        """Writes the trained networks to `folder / "model"`, in diffusers layout."""
        raise NotImplementedError

    def run(self) -> bool:
        """Trains until the model is finished or the time is over. Returns whether it is finished.

        The model is written in either case, once the last stage is reached.

        Raises:
            FloatingPointError: the loss is not finite; the checkpoint in the folder is from before.
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
        """Draws, encodes and captions the portraits of the plan."""
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
            before: the average networks of the stage before.

        Returns:
            The average networks, or None if the time is over.
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
                raise FloatingPointError(f"{name}: the loss is {value} after step {reached}")
            if step // self.plan.chunk % 10 == 0:
                pace = (reached - first) / (now - began)
                self.say(f"{name} {reached:6} of {stage.steps}  loss {value:.5f}  {pace:.2f} steps a second")
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
        self.say(f"goes on from step {latest}")
        return jax.tree.unflatten(tree, kept)

    def save(self, states: dict[str, State]) -> None:
        """Writes a checkpoint, under the sum of all stages' steps."""
        step = sum(int(state.step) for state in states.values())
        self.keep.save(step, args=ocp.args.StandardSave(jax.tree.leaves(states)))

    def write(self, part: str, module: Any, config: Mapping[str, Any]) -> None:
        """Writes a network of the model and its config, in float16."""
        # transformers and diffusers name their files differently; a `model_type` is in transformers' configs only.
        stem = "model" if "model_type" in config else "diffusion_pytorch_model"
        folder = self.folder / "model" / part
        write_json(folder / "config.json", config)
        write_diffusers(folder, network_of(module, np.float16), stem)

    def _check_plan(self) -> None:
        """Writes the plan, or checks that the folder's is the same: another would end the learning rate elsewhere."""
        path, plan = self.folder / "plan.json", dataclasses.asdict(self.plan)
        if path.is_file() and (before := json.loads(path.read_text())) != plan:
            raise ValueError(f"{self.folder} was begun with {before}; go on with that, or name another folder")
        write_json(path, plan)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file, and its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def command(trainer: Callable[..., Trainer], plan: Plan, model: str) -> click.Command:
    """Returns the shell's command for a training. The training's folder keeps its compiled programs."""

    @click.command(context_settings={"show_default": True}, help=f"Trains {model} in FOLDER, or resumes its training.")
    @click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
    @click.option("--minutes", default=math.inf, help="When to stop.")
    def main(folder: Path, minutes: float) -> None:
        with plainly():
            # JAX adds its options to this object at run time.
            if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
                jax.config.update("jax_compilation_cache_dir", str(folder.absolute() / "compiled"))
            done = trainer(folder, plan, minutes=minutes).run()
        click.echo("done" if done else "not done yet: call it again")

    return main
