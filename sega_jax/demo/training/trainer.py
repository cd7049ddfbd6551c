"""What trainings share: random values, steps in one program, and a folder from which they go on after a kill."""

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

from sega_jax.nn.layers import Embed
from sega_jax.pipelines.progress import plainly
from sega_jax.systems.registry import weight_stem
from sega_jax.weights.pull import flax_name, to_torch, torch_key

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


def adam(rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW whose rate rises at first and falls to a hundredth as a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(0, rate, min(200, steps // 10), steps, 0.01 * rate)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.01))


class OneHot(Embed):
    """The same table as a product: its gradient is a sum of rows that GPUs take in parallel, that of a lookup is a
    scatter in which the many padding tokens wait for each other."""

    def __call__(self, ids: jax.Array) -> jax.Array:
        table = self.embedding[...]
        return jax.nn.one_hot(ids, len(table), dtype=table.dtype) @ table


class Stages:
    """Stages of a training, over a folder that keeps them.

    Args:
        folder: its `state` has an Orbax checkpoint, renewed every two minutes.
        plan: how much of everything, with a `chunk` of steps in one call of a program; the same in every call on a
            folder.
        minutes: after which to stop.
        say: where progress is told.
    """

    def __init__(self, folder: Path, plan: Any, *, minutes: float = math.inf, say: Callable[[str], Any] = click.echo):
        self.folder, self.plan, self.say = folder.absolute(), plan, say
        self.end = time.monotonic() + 60 * minutes
        self.keep = ocp.CheckpointManager(
            self.folder / "state", options=ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        )
        self._remember(plan)

    def _remember(self, plan: Any) -> None:
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

    def write(self, part: str, module: Any, config: Mapping[str, Any]) -> None:
        """A network of the model, in float16."""
        tensors = {
            torch_key(flax_name(path)): np.ascontiguousarray(to_torch(flax_name(path), np.float16(leaf)))
            for path, leaf in jax.tree_util.tree_leaves_with_path(module)
        }
        write_json(self.folder / "model" / part / "config.json", config)
        save_file(tensors, self.folder / "model" / part / f"{weight_stem(part)}.safetensors", {"format": "pt"})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def command(trainer: Callable[..., Any], plan: Any, model: str) -> click.Command:
    """The command of a training, whose compiled programs its folder keeps."""

    @click.command(context_settings={"show_default": True}, help=f"Trains {model} in FOLDER, or goes on with it.")
    @click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
    @click.option("--minutes", default=math.inf, help="After which to stop.")
    def main(folder: Path, minutes: float) -> None:
        with plainly():
            if jax.config.jax_compilation_cache_dir is None:
                jax.config.update("jax_compilation_cache_dir", str(folder.absolute() / "compiled"))
            done = trainer(folder, plan, minutes=minutes).run()
        click.echo("done" if done else "not done yet: call it again")

    return main
