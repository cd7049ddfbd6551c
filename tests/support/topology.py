"""Compiles a pipeline's programs for TPUs on a machine without one.

`TopologyDevices` replaces a pipeline's devices. The pipeline then prepares and requests its programs as on a TPU, and
XLA and Mosaic compile them, but nothing runs: every result is zero. This needs the extra `tpu-aot`.
"""

import os
import time
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

# libtpu reads the first two variables, and JAX the third, when they are loaded.
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # several processes may compile at once
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, PartitionSpec

from sega_jax.pipelines.execution.devices import Devices, Flat

# {generation: the smallest topology that the compiler accepts}.
SMALLEST = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


class CompiledProgram(NamedTuple):
    """A program that was compiled for TPUs."""

    name: str  # the name of the function, such as "advance"
    lowered: jax.stages.Lowered
    compiled: jax.stages.Compiled
    seconds: float  # the compilation time


class TopologyDevices(Devices):
    """Devices of a TPU that is not there.

    With several chips, a program is compiled as `jit(shard_map(function))` over a mesh of the chips. `pmap` is
    implemented in the same way, but JAX cannot lower it for absent devices.

    Args:
        topology: The name of a topology, such as "v5e:2x4", or a generation, such as "v5e".
        chips: How many chips of the topology to use.
        only: The names of the programs to compile; None means all. The other programs only determine their results'
            shapes.

    Attributes:
        requested: The names of all programs that were called.
        compiled: The compiled programs, in the order of their calls.
    """

    def __init__(self, topology: str, chips: int = 1, only: Collection[str] | None = None):
        described = topologies.get_topology_desc(platform="tpu", topology_name=SMALLEST.get(topology, topology))
        super().__init__(described.devices[:chips])
        self.only, self.requested, self.compiled = only, set[str](), list[CompiledProgram]()

    def place(self, tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)

    def split(self, tree: Any) -> Any:
        if len(self) == 1:
            return jax.tree.map(jax.numpy.asarray, tree)

        def share(leaf):
            missing = -len(leaf) % len(self)
            index = np.minimum(np.arange(len(leaf) + missing), len(leaf) - 1).reshape(len(self), -1)
            return jax.numpy.asarray(leaf)[index]

        return jax.tree.map(share, tree)

    def map(self, function: Callable, in_axes: tuple[int | None, ...] | None, **static: Any) -> Callable:
        program, is_sharded = self.with_options(function, static), in_axes is not None and len(self) > 1
        if is_sharded:
            program = sharded(program, in_axes, self._spread.mesh)

        def call(*args):
            args = tuple(arg.tree if isinstance(arg, Flat) else arg for arg in args)
            self.requested.add(function.__name__)
            if self.only is None or function.__name__ in self.only:
                self._compile(function.__name__, program, args, in_axes if is_sharded else None)
            return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(program, *args))

        return call

    def _compile(self, name, program, args, in_axes) -> None:
        def placed(sharding):
            return lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        axes = [None] * len(args) if in_axes is None else in_axes
        args = [
            jax.tree.map(placed(self._everywhere if axis is None else self._spread), arg)
            for arg, axis in zip(jax.eval_shape(lambda *args: args, *args), axes, strict=True)
        ]
        out = self._everywhere if in_axes is None else self._spread
        began = time.perf_counter()
        lowered = jax.jit(program, out_shardings=out).trace(*args).lower(lowering_platforms=("tpu",))
        compiled = lowered.compile()
        self.compiled.append(CompiledProgram(name, lowered, compiled, time.perf_counter() - began))


def sharded(function: Callable, in_axes: tuple[int | None, ...], mesh: Mesh) -> Callable:
    """Returns a function that applies `function` to each device's share of arrays [devices, share, ...], like `pmap`.

    Args:
        function: The function.
        in_axes: As for `Devices.map`.
        mesh: A mesh of the devices, with the axis "rows".
    """
    specs = tuple(PartitionSpec() if axis is None else PartitionSpec("rows") for axis in in_axes)

    def of_one_device(*args):
        shares = [
            arg if axis is None else jax.tree.map(lambda leaf: leaf[0], arg)
            for arg, axis in zip(args, in_axes, strict=True)
        ]
        return jax.tree.map(lambda leaf: leaf[None], function(*shares))

    return jax.shard_map(of_one_device, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("rows"), check_vma=False)
