"""Ablation sweeps: many pictures of one checkpoint, planned, run and recorded."""

from sega_jax.sweep.description import Sweep as Sweep
from sega_jax.sweep.folder import Folder as Folder
from sega_jax.sweep.plan import Plan as Plan
from sega_jax.sweep.plan import plan as plan
from sega_jax.sweep.points import Facts as Facts
from sega_jax.sweep.run import Status as Status
from sega_jax.sweep.run import keep as keep
from sega_jax.sweep.run import kept as kept
from sega_jax.sweep.run import run as run
from sega_jax.sweep.run import status as status
