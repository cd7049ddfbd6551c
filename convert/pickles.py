"""Where a network's weights are torch's pickles."""

from pathlib import Path

from sega_jax.weights import flax_msgpack, orbax_reader
from sega_jax.weights.pull import weight_names


def stem(safetensors: str) -> str:
    """The name of a pickled weight file without ending, from that of the safetensors file in its place."""
    return "pytorch_model" if safetensors == "model" else safetensors


def is_only_choice(folder: Path, safetensors: str, variant: str | None) -> bool:
    """Whether a network's weights are there as pickles, and neither as safetensors nor from Flax or Orbax."""

    def there(name: str, ending: str) -> bool:
        return any((folder / file).is_file() for file in weight_names(name, variant, ending))

    better = (folder / orbax_reader.ARRAYS).is_dir() or there(safetensors, "safetensors")
    better = better or flax_msgpack.is_only_choice(folder, safetensors, variant)
    return there(stem(safetensors), "bin") and not better
