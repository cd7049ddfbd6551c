"""Rows spread over the accelerators of this host: the only file that knows of several devices.

Every row of a batch is a picture of its own, so devices share nothing but the weights. `jax.pmap` is in
maintenance mode and is itself `jit(shard_map)`; by JAX's migration guide
(https://docs.jax.dev/en/latest/migrate_pmap.html) a move to `shard_map` would change this file only.

One picture uses one device; with more devices than pictures the others compute a copy, so ask for
several seeds at once.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from sega_jax.pipelines.execution.compile_report import Program

# How cuDNN takes kernels [height, width, in, out]: as [out, height, width, in] in memory.
_CUDNN = Layout((3, 0, 1, 2))


@jax.tree_util.register_pytree_node_class
class Flat:
    """A tree that is taken apart once, for programs of `Devices.map`, whose functions are given the tree itself. To
    take a network's modules apart takes the host milliseconds, at every call of a program."""

    def __init__(self, tree: Any):
        self.leaves: Sequence[Any]
        self.leaves, self.structure = jax.tree.flatten(tree)

    @property
    def tree(self) -> Any:
        return jax.tree.unflatten(self.structure, self.leaves)

    def tree_flatten(self) -> tuple[Sequence[Any], Any]:
        return self.leaves, self.structure

    @classmethod
    def tree_unflatten(cls, structure: Any, leaves: Sequence) -> "Flat":
        flat = object.__new__(cls)
        flat.leaves, flat.structure = leaves, structure
        return flat


class Devices:
    """The devices that a pipeline runs on, and the programs that were compiled for them.

    With several, arrays of rows are [devices, share, ...] while they are on them; with one, [share, ...].
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None):
        devices = jax.local_devices() if devices is None else devices
        if not isinstance(devices, Sequence) or not devices or not all(isinstance(d, jax.Device) for d in devices):
            raise TypeError(f"devices={devices!r} should name devices, as of jax.local_devices(), or be None for all")
        self.devices = list(devices)
        self._programs: dict[tuple, Callable] = {}
        self._watched: list[Program] | None = None
        mesh = Mesh(np.array(self.devices), ("rows",))
        one = SingleDeviceSharding(self.devices[0])
        self._everywhere = NamedSharding(mesh, PartitionSpec()) if len(self) > 1 else one
        self._spread = NamedSharding(mesh, PartitionSpec("rows")) if len(self) > 1 else one
        self._kernels = Format(_CUDNN, self._everywhere) if self.devices[0].platform == "gpu" else self._everywhere

    def __len__(self) -> int:
        return len(self.devices)

    def place(self, tree: Any) -> Any:
        """Copies of a tree's arrays on every device, made once: passed to `map` under an axis of None.

        Kernels of convolutions, whose axes are four, lie on GPUs as the programs want them, who would else keep another
        copy of them all.
        """

        def one(leaf):
            lies = leaf.format.layout.major_to_minor if isinstance(leaf, jax.Array) else None
            kernel = np.ndim(leaf) == 4 and lies != _CUDNN.major_to_minor
            return jax.device_put(leaf, self._kernels if kernel else self._everywhere)

        return jax.tree.map(one, tree)

    def map(self, function: Callable, in_axes: tuple[int | None, ...] | None, **static: Any) -> Callable:
        """Compiles a function of one device's share, to be called with split arrays where the axis is 0; without
        axes it runs where its arguments are.

        Made once for a function and its static arguments, so that all who have these `Devices` share it.
        """
        name = (function, in_axes, *static.items())
        if name not in self._programs:

            @wraps(function)
            def bound(*args):
                return function(*(arg.tree if isinstance(arg, Flat) else arg for arg in args), **static)

            alone = in_axes is None or len(self) == 1
            made = jax.jit(bound) if alone else jax.pmap(bound, in_axes=in_axes, devices=self.devices)
            # Of several threads the first.
            self._programs.setdefault(name, made)
        program = self._programs[name]
        return program if self._watched is None else partial(self._watch, program, function, static.get("concepts"))

    @contextmanager
    def watch(self) -> Iterator[list[Program]]:
        """A list that grows by every program that is called."""
        self._watched = []
        try:
            yield self._watched
        finally:
            self._watched = None

    def _watch(self, program: Any, function: Callable, concepts: int | None, *args: Any) -> Any:
        began, memory = time.perf_counter(), None
        if len(self) == 1:
            found = program.lower(*args).compile().memory_analysis()
            memory = None if found is None else found.temp_size_in_bytes
        else:
            # To ask pmap's program for its memory would be to compile it twice.
            jax.block_until_ready(program(*args))
        assert self._watched is not None
        self._watched.append(Program(function.__name__, concepts, time.perf_counter() - began, memory))
        return program(*args)

    def split(self, tree: Any) -> Any:
        """Arrays [rows, ...], padded by their last row to a multiple of the devices and spread over them."""

        def is_key(leaf):
            return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)

        def spread(leaf):
            leaf = np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
            share = -(-len(leaf) // len(self))
            if missing := len(self) * share - len(leaf):
                leaf = np.concatenate([leaf, leaf[-1:].repeat(missing, 0)])
            return leaf.reshape(len(self), share, *leaf.shape[1:])

        def wrapped(leaf, placed):
            return jax.random.wrap_key_data(placed, impl=jax.random.key_impl(leaf)) if is_key(leaf) else placed

        # All at once, which is quicker than one by one.
        if len(self) == 1:
            return jax.device_put(tree, self._spread)
        return jax.tree.map(wrapped, tree, jax.device_put(jax.tree.map(spread, tree), self._spread))

    def gather(self, tree: Any, rows: int | None = None) -> Any:
        """Host arrays [rows, ...] of what `map` returned, without the padding where `rows` is given."""

        def one(leaf):
            leaf = np.asarray(leaf)
            return (leaf if len(self) == 1 else leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]))[:rows]

        return jax.tree.map(one, tree)
