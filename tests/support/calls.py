"""A call of a pipeline, with several pictures and edits."""

from sega_jax import Edit

CALL = {
    "prompt": ["cat", "dog"],
    "edits": [[Edit("a", warmup=1), Edit("b", warmup=1)], [Edit("c", warmup=2)]],
    "steps": 4,
    "output": "uint8",
}
