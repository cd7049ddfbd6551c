"""Distributes the rows of a batch over the devices of this host. All multi-device code is in this file.

The rows of a batch are independent pictures, so the devices need not exchange data. `jax.pmap` is in maintenance mode
and is implemented as `jit(shard_map)`. Moving to `shard_map` would change only this file; see JAX's migration guide
(https://docs.jax.dev/en/latest/migrate_pmap.html).

A single picture uses only one device; the other devices would only compute copies of it. To use all devices, generate
pictures for several seeds at once.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from sega_jax.pipelines.execution.compile_report import Program

# cuDNN requires kernels [height, width, in, out] to be stored as [out, height, width, in].
_CUDNN = Layout((3, 0, 1, 2))


@jax.tree_util.register_pytree_node_class
class Flat:
    """A tree that is flattened only once. Programs from `Devices.map` accept it, and pass the tree to their functions.

    Flattening a network takes milliseconds on the host. Without this class, every program call would flatten it again.
    """

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
    """The devices of a pipeline, and the programs compiled for them.

    Arrays of rows have the shape [devices, share, ...] if there are several devices, and [share, ...] if there is only
    one; `share` is the number of rows on each device.

    Args:
        devices: A sequence of JAX devices; None means all local devices.

    Raises:
        TypeError: `devices` is not a non-empty sequence of JAX devices.
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None):
        devices = jax.local_devices() if devices is None else devices
        if not isinstance(devices, Sequence) or not devices or not all(isinstance(d, jax.Device) for d in devices):
            raise TypeError(
                f"devices={devices!r} should be a list of JAX devices, such as jax.local_devices()[:1], or None for all"
            )
        self.devices = list(devices)
        self._programs: dict[tuple, Callable] = {}
        self._watched = threading.local()  # its attribute `programs` is the list that this thread's `watch` yields
        mesh = Mesh(np.array(self.devices), ("rows",))
        one = SingleDeviceSharding(self.devices[0])
        self._everywhere = NamedSharding(mesh, PartitionSpec()) if len(self) > 1 else one
        self._spread = NamedSharding(mesh, PartitionSpec("rows")) if len(self) > 1 else one
        self._kernels = Format(_CUDNN, self._everywhere) if self.devices[0].platform == "gpu" else self._everywhere

    def __len__(self) -> int:
        return len(self.devices)

    def place(self, tree: Any) -> Any:
        """Copies the arrays of a tree to every device. When the copy is passed to a program from `map`, its entry in
        `in_axes` is None.

        On GPUs, convolution kernels (all arrays with four axes) get cuDNN's layout. Otherwise, the programs would keep
        a second copy of all kernels.
        """

        def put(leaf):
            layout = leaf.format.layout.major_to_minor if isinstance(leaf, jax.Array) else None
            needs_layout = np.ndim(leaf) == 4 and layout != _CUDNN.major_to_minor
            return jax.device_put(leaf, self._kernels if needs_layout else self._everywhere)

        return jax.tree.map(put, tree)

    def map(self, function: Callable, in_axes: tuple[int | None, ...] | None, **static: Any) -> Callable:
        """Returns a compiled program that applies a function to each device's share of the rows.

        The program is created once for each combination of function and static arguments, so all pipelines with the
        same `Devices` share it.

        Args:
            function: The function, which is called with one device's share of the rows.
            in_axes: One entry for each argument: 0 for arrays from `split`, None for arrays from `place`. If None is
                passed instead of a tuple, the function runs on the device that holds its arguments.
            static: Keyword arguments for the function; they are compile-time constants.
        """
        name = (function, in_axes, *static.items())
        if name not in self._programs:
            bound = self.with_options(function, static)
            use_jit = in_axes is None or len(self) == 1
            compiled = jax.jit(bound) if use_jit else jax.pmap(bound, in_axes=in_axes, devices=self.devices)
            # If several threads reach this line, all of them use the first one's program.
            self._programs.setdefault(name, compiled)
        program = self._programs[name]
        watched = getattr(self._watched, "programs", None)
        return program if watched is None else partial(self._watch, watched, program, function, static.get("concepts"))

    def with_options(self, function: Callable, static: Mapping[str, Any]) -> Callable:
        """Returns a function with its static arguments set, which accepts `Flat` arguments and multiplies float32
        matrices with float32 precision on TPUs.

        By default, JAX rounds float32 matrices to bfloat16 before a TPU multiplies them. Here, a product of float32
        matrices consists of six products of bfloat16 matrices (JAX's precision "highest"), unless the user has set
        `jax_default_matmul_precision`. The setting also applies if a program that is traced on a CPU is compiled for a
        TPU. On GPUs, JAX's default remains. Products of bfloat16 matrices do not change.
        """
        on_gpu = self.devices[0].platform == "gpu"

        @wraps(function)
        def call(*args, **arguments):
            args = tuple(arg.tree if isinstance(arg, Flat) else arg for arg in args)
            is_set = jax.config.jax_default_matmul_precision is not None
            with nullcontext() if is_set or on_gpu else jax.default_matmul_precision("highest"):
                return function(*args, **arguments, **static)

        return call

    @contextmanager
    def watch(self) -> Iterator[list[Program]]:
        """Yields a list that receives a report for each program call by this thread inside the `with` block."""
        self._watched.programs = []
        try:
            yield self._watched.programs
        finally:
            del self._watched.programs

    def _watch(self, watched: list[Program], program: Any, function: Callable, concepts: int | None, *args: Any) -> Any:
        start, memory = time.perf_counter(), None
        if len(self) == 1:
            analysis = program.lower(*args).compile().memory_analysis()
            memory = None if analysis is None else analysis.temp_size_in_bytes
        else:
            # Analysing a pmap program's memory would compile the program a second time.
            jax.block_until_ready(program(*args))
        watched.append(Program(function.__name__, concepts, time.perf_counter() - start, memory))
        return program(*args)

    def split(self, tree: Any) -> Any:
        """Distributes arrays [rows, ...] over the devices in equal shares, after padding the rows with copies of the
        last one."""

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

        # Transferring all arrays at once is faster than transferring them one by one.
        if len(self) == 1:
            return jax.device_put(tree, self._spread)
        return jax.tree.map(wrapped, tree, jax.device_put(jax.tree.map(spread, tree), self._spread))

    def gather(self, tree: Any, rows: int | None = None) -> Any:
        """Returns the results of a program as NumPy arrays [rows, ...].

        Args:
            tree: The results of a program from `map`.
            rows: The number of rows to return, without the padding; None keeps the padding.
        """

        def joined(leaf):
            leaf = np.asarray(leaf)
            return (leaf if len(self) == 1 else leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]))[:rows]

        return jax.tree.map(joined, tree)
