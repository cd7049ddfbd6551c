"""The judge: a network that classifies the attributes of portraits. Evaluations and sweep metrics use it.

    python -m sega_jax.demo.judge --out judge.safetensors    # takes a minute on an H200
    python -m sega_jax.demo.judge --check

The first command trains a judge. Both commands print the judge's accuracy on portraits that it was not trained on, both
as drawn and after the model's autoencoder has encoded and decoded them. Training the judge and measuring its accuracy
require drawn portraits, so those functions import `sega_jax.demo.training`. Using the judge does not need that package.
"""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import load_file, save_file

from sega_jax.demo.attributes import ATTRIBUTES, COLUMN, SIDE, WORDS, labels, sample, visible
from sega_jax.nn.layers import Conv, GroupNorm, Linear
from sega_jax.pipelines.loading import DEMO, load
from sega_jax.pipelines.progress import plainly
from sega_jax.weights.layout import flax_name

WEIGHTS = Path(__file__).parent / "judge.safetensors"
_WIDTHS = (3, 24, 48, 96, 128, 128)
_SIZES = [len(values) for values in ATTRIBUTES.values()]


class Judge(nnx.Module):
    """Classifies float32 pictures [n, 128, 128, 3] in [-1, 1]. Returns logits [n, values], grouped by attribute."""

    def __init__(self):
        pairs = list(itertools.pairwise(_WIDTHS))
        side = SIDE // 2 ** len(pairs)
        self.convs = nnx.List([Conv(inputs, outputs, stride=2) for inputs, outputs in pairs])
        self.norms = nnx.List([GroupNorm(8, outputs, 1e-5) for _, outputs in pairs])
        self.head = Linear(side * side * _WIDTHS[-1], sum(_SIZES))

    def __call__(self, pictures: jax.Array) -> jax.Array:
        x = pictures
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.silu(norm(conv(x)))
        return self.head(x.reshape(len(x), -1))


class Verdict(NamedTuple):
    """The attributes of pictures, as the judge classifies them."""

    attributes: np.ndarray  # int [n, attributes]: the most likely values
    probability: np.ndarray  # float [n, words]: the probability of each of `WORDS`; 0 if its attribute is hidden

    @property
    def seen(self) -> np.ndarray:
        """bool [n, attributes]: whether each attribute is visible; a bald head has no hair colour."""
        return visible(self.attributes)

    @property
    def words(self) -> np.ndarray:
        """bool [n, words]: whether each of `WORDS` applies."""
        return labels(self.attributes)


def load_judge(path: Path = WEIGHTS) -> Judge:
    """Loads a judge from a file, by default the packaged one."""
    values, judge = load_file(path), Judge()
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(judge)]
    leaves = [jnp.asarray(values[flax_name(path)], jnp.float32) for path in paths]
    return jax.tree.unflatten(jax.tree.structure(judge), leaves)


def save_judge(judge: Judge, path: Path) -> None:
    """Writes a judge to a safetensors file, in float16."""
    leaves = jax.tree_util.tree_leaves_with_path(judge)
    save_file({flax_name(name): np.asarray(leaf, np.float16) for name, leaf in leaves}, path)


def look(judge: Judge, pictures: np.ndarray | jax.Array, block: int = 256) -> Verdict:
    """Classifies uint8 pictures [n, 128, 128, 3], `block` pictures at a time."""
    parts = []
    for i in range(0, len(pictures), block):
        part = np.asarray(pictures[i : i + block])
        padded = np.pad(part, ((0, block - len(part)), (0, 0), (0, 0), (0, 0)))
        parts.append(np.asarray(_probabilities(judge, padded))[: len(part)])
    each = np.split(np.concatenate(parts), np.cumsum(_SIZES)[:-1], 1)
    columns = [(COLUMN[name], ATTRIBUTES[name].index(value)) for name, value in WORDS.values()]
    attributes = np.stack([probability.argmax(1) for probability in each], 1)
    shows = visible(attributes)
    return Verdict(attributes, np.stack([each[column][:, value] * shows[:, column] for column, value in columns], 1))


@jax.jit
def _probabilities(judge: Judge, pictures: jax.Array) -> jax.Array:
    """Returns the probability of every value, float32 [n, values], for uint8 pictures."""
    logits = judge(pictures.astype(jnp.float32) / 127.5 - 1)
    return jnp.concatenate([jax.nn.softmax(part) for part in _split(logits)], -1)


def _split(logits: jax.Array) -> list[jax.Array]:
    """Splits logits [n, values] by attribute."""
    return jnp.split(logits, np.cumsum(_SIZES)[:-1].tolist(), -1)


def learn(vae: Any, key: jax.Array, *, steps: int = 1500, batch: int = 256) -> Judge:
    """Trains a judge on portraits. Half of the portraits are first encoded and decoded by the autoencoder, with noise
    added to their latents.

    Args:
        vae: the model's autoencoder, in float32 or bfloat16.
    """
    from sega_jax.demo.training.networks import initial

    schedule = optax.warmup_cosine_decay_schedule(0, 1e-3, steps // 20, steps)
    optimiser = optax.adamw(schedule, weight_decay=1e-3)
    judge = initial(Judge(), jax.random.fold_in(key, steps))
    state = judge, optimiser.init(judge)
    for i in range(0, steps, chunk := min(100, steps)):
        state = _learn(state, vae, jax.random.fold_in(key, i), optimiser=optimiser, batch=batch, steps=chunk)
    return state[0]


@functools.partial(jax.jit, static_argnames=("optimiser", "batch", "steps"))
def _learn(
    state: Any, vae: Any, key: jax.Array, *, optimiser: optax.GradientTransformation, batch: int, steps: int
) -> Any:
    """Takes training steps. The state consists of the judge and the optimiser's state."""

    def loss(judge, key):
        attributes, pictures = _examples(vae, key, batch)
        shows = visible(attributes)
        # Hair hidden by a hat is labelled as bald. Otherwise the judge would have to guess, and might see long hair.
        column = COLUMN["hair"]
        attributes = attributes.at[:, column].multiply(shows[:, column].astype(jnp.int32))
        shows = shows.at[:, column].set(True)
        each = zip(_split(judge(pictures)), attributes.T, shows.T, strict=True)
        return sum(
            jnp.where(seen, optax.softmax_cross_entropy_with_integer_labels(logits, value), 0).mean()
            for logits, value, seen in each
        )

    def step(state, key):
        judge, inner = state
        change, inner = optimiser.update(jax.grad(loss)(judge, key), inner, judge)
        return (optax.apply_updates(judge, change), inner), None

    return jax.lax.scan(step, state, jax.random.split(key, steps))[0]


def _examples(vae: Any, key: jax.Array, batch: int) -> tuple[jax.Array, jax.Array]:
    """Draws random attributes and the corresponding portraits, slightly shifted and tinted, with added noise."""
    from sega_jax.demo.training.portraits import render

    keys = jax.random.split(key, 7)
    attributes = sample(keys[0], batch)
    pictures = render(attributes, keys[1])
    pictures = jnp.concatenate([_decoded(vae, pictures[: batch // 2], keys[2]), pictures[batch // 2 :]])
    pictures = jax.vmap(lambda picture, by: jnp.roll(picture, by, (0, 1)))(
        pictures, jax.random.randint(keys[3], (batch, 2), -2, 3)
    )
    tint = 0.06 * jax.random.normal(keys[4], (batch, 1, 1, 3))
    spread = 0.1 * jax.random.uniform(keys[5], (batch, 1, 1, 1))
    noise = spread * jax.random.normal(keys[6], pictures.shape)
    return attributes, (pictures + tint + noise).clip(-1, 1)


def _decoded(vae: Any, pictures: jax.Array, key: jax.Array) -> jax.Array:
    """Encodes pictures, adds noise of up to 0.2 standard deviations to their latents, and decodes them."""
    mean, _ = vae.encode(pictures)
    keys = jax.random.split(key)
    share = jax.random.uniform(keys[0], (len(pictures), 1, 1, 1), maxval=0.2)
    noise = jax.random.normal(keys[1], mean.shape)
    return vae.decode(mean.astype(jnp.float32) + share * mean.std() * noise).astype(jnp.float32).clip(-1, 1)


def accuracy(judge: Judge, vae: Any | None, key: jax.Array, count: int, block: int = 250) -> dict[str, float]:
    """Returns the judge's accuracy for each attribute, over the portraits that show the attribute.

    Args:
        vae: an autoencoder that encodes and decodes the portraits first. With None, they are judged as drawn.
    """
    from sega_jax.demo.training.portraits import render

    @jax.jit
    def draw(vae, key):
        keys = jax.random.split(key)
        attributes = sample(keys[0], block)
        pictures = render(attributes, keys[1])
        if vae is not None:
            pictures = vae.decode(vae.encode(pictures)[0]).astype(jnp.float32).clip(-1, 1)
        return attributes, jnp.round(127.5 * (pictures + 1)).astype(jnp.uint8)

    right, seen = np.zeros(len(ATTRIBUTES)), np.zeros(len(ATTRIBUTES))
    for i in range(-(-count // block)):
        attributes, pictures = map(np.asarray, draw(vae, jax.random.fold_in(key, i)))
        shows = visible(attributes)
        right += ((look(judge, pictures).attributes == attributes) & shows).sum(0)
        seen += shows.sum(0)
    return dict(zip(ATTRIBUTES, (right / seen).tolist(), strict=True))


def report(
    judge: Judge, vae: Any, say: Callable[[str], Any] = click.echo, *, count: int = 20_000, block: int = 250
) -> None:
    """Prints the judge's accuracy on portraits that it was not trained on."""
    key = jax.random.key(10**6)
    drawn, decoded = (accuracy(judge, part, key, count, block) for part in (None, vae))
    for name in ATTRIBUTES:
        say(f"{name:15} {drawn[name]:8.2%} as drawn {decoded[name]:8.2%} through the autoencoder")


@click.command(context_settings={"show_default": True})
@click.option("--model", default=str(DEMO), show_default="the demo model", help="Checkpoint with an autoencoder.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Train a judge and write it to this file.")
@click.option("--check", is_flag=True, help="Measure the packaged judge without training.")
@click.option("--count", type=click.IntRange(1), default=20_000, help="Number of portraits to measure the accuracy on.")
@click.option("--seed", default=0)
@click.option("--steps", type=click.IntRange(1), default=1500)
@click.option("--batch", type=click.IntRange(2), default=256)
def main(model: str, out: Path | None, check: bool, count: int, seed: int, steps: int, batch: int) -> None:
    """Trains a judge, or loads the packaged one, and prints its accuracy."""
    if check is (out is not None):
        raise click.UsageError("give either --out, to train a judge, or --check")
    with plainly():
        vae = load(model).models.vae
        if out is not None:
            out.open("ab").close()  # fail before training if the file cannot be written
            save_judge(learn(vae, jax.random.key(seed), steps=steps, batch=batch), out)
        report(load_judge(WEIGHTS if out is None else out), vae, count=count)


if __name__ == "__main__":
    main()
