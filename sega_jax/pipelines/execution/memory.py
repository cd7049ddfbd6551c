"""Reports a lack of memory as an error that suggests remedies, if possible before a call runs."""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax

from sega_jax.method.naming import assignment, name_of

# Programs are analysed only if their pictures take more than this fraction of the memory. The analysis takes time, and
# a network's temporary memory is much larger than its pictures.
_SMALL = 1e-3


@contextmanager
def enough_memory(shape: tuple[int, ...]) -> Iterator[None]:
    """Turns JAX's out-of-memory error inside a `with` block into a MemoryError that suggests remedies.

    Args:
        shape: The shape of the batch, rows first.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        # Some allocators report INTERNAL or UNKNOWN errors; only their text mentions the lack of memory.
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        raise MemoryError(
            f"a batch of shape {shape} (rows first) does not fit in the device's memory; {_remedy()}"
        ) from error


def memory_of(device: jax.Device) -> float:
    """Returns the memory of a device in bytes; infinity if it is unknown. A CPU's memory is that of this machine or
    container."""
    if device.platform != "cpu":
        with suppress(jax.errors.JaxRuntimeError):  # some backends do not implement statistics
            return (device.memory_stats() or {}).get("bytes_limit") or math.inf
        return math.inf
    memory: float = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # without a limit, the file says "max"
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory


def check_size(rows: int, height: int, width: int, device: jax.Device, devices: int) -> None:
    """Checks that the pictures of a call alone fit in memory, before anything is allocated for them.

    Raises:
        MemoryError: The pictures do not fit.
    """
    needed = 3 * rows * height * width
    available = memory_of(device) * (1 if device.platform == "cpu" else devices)
    if needed > available:
        raise MemoryError(
            f"{rows} pictures of {height}x{width} pixels take {_gib(needed)} without the networks, but only"
            f" {_gib(available)} of memory is available; make fewer or smaller pictures in each call"
        )


def is_small(pixels: int, device: jax.Device) -> bool:
    """Returns whether a batch with this number of pixels on the device is too small to need an analysis."""
    return 3 * pixels < _SMALL * memory_of(device)


def check_programs(programs: Mapping[str, Any], shape: tuple[int, ...], device: jax.Device) -> None:
    """Checks that compiled programs fit in a device's memory, before they run.

    Args:
        programs: {name: lowered program}.
        shape: The shape of the batch, rows first.
        device: One of the devices that run the programs.

    Raises:
        MemoryError: A program does not fit.
    """
    for name, lowered in programs.items():
        analysis = lowered.compile().memory_analysis()
        if analysis is None:
            continue
        needed = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes + analysis.output_size_in_bytes
        if needed > memory_of(device):
            raise MemoryError(
                f"a batch of shape {shape} (rows first) needs {_gib(needed)} to {name}, but only"
                f" {_gib(memory_of(device))} of memory is available; {_remedy()}"
            )


def _remedy() -> str:
    return (
        "reduce the number of pictures, the number of concepts or the picture size, use"
        f" {name_of('rows_at_once')} or {name_of('tiled')} if the model supports them, or load with"
        f" {assignment('dtype', 'bfloat16')}"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
