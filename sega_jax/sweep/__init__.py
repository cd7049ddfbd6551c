"""Ablation sweeps: many pictures of one checkpoint, planned, run, recorded and looked at."""

from sega_jax.sweep.description import Sweep as Sweep
from sega_jax.sweep.folder import Folder as Folder
from sega_jax.sweep.memory import Memory as Memory
from sega_jax.sweep.memory import fitted as fitted
from sega_jax.sweep.memory import needed as needed
from sega_jax.sweep.metrics import clip_score as clip_score
from sega_jax.sweep.metrics import distance as distance
from sega_jax.sweep.metrics import judge as judge
from sega_jax.sweep.metrics import measure as measure
from sega_jax.sweep.plan import Plan as Plan
from sega_jax.sweep.plan import plan as plan
from sega_jax.sweep.plots import plot as plot
from sega_jax.sweep.points import Facts as Facts
from sega_jax.sweep.report import report as report
from sega_jax.sweep.results import Results as Results
from sega_jax.sweep.results import show as show
from sega_jax.sweep.run import Status as Status
from sega_jax.sweep.run import keep as keep
from sega_jax.sweep.run import kept as kept
from sega_jax.sweep.run import pace as pace
from sega_jax.sweep.run import run as run
from sega_jax.sweep.run import status as status
from sega_jax.sweep.sheets import sheets as sheets
