"""Ablation sweeps: many pictures of one checkpoint, planned, run and recorded."""

from sega_jax.sweep.description import Sweep as Sweep
from sega_jax.sweep.plan import Plan as Plan
from sega_jax.sweep.plan import plan as plan
from sega_jax.sweep.points import Facts as Facts
