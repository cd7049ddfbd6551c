"""The arguments of a pipeline call with two pictures and three edits."""

from sega_jax import Edit

CALL = {
    "prompt": ["cat", "dog"],
    "edits": [[Edit("a", warmup=1), Edit("b", warmup=1)], [Edit("c", warmup=2)]],
    "steps": 4,
    "output": "uint8",
}
