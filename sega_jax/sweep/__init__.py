"""Ablation sweeps: plan, run, record, measure and view many pictures of one checkpoint or cascade."""

from sega_jax.sweep.description.facts import Facts as Facts
from sega_jax.sweep.description.sweep_file import Sweep as Sweep
from sega_jax.sweep.planning.memory import Memory as Memory
from sega_jax.sweep.planning.memory import fitted as fitted
from sega_jax.sweep.planning.memory import needed as needed
from sega_jax.sweep.planning.outline import check as check
from sega_jax.sweep.planning.plan import Plan as Plan
from sega_jax.sweep.planning.plan import plan as plan
from sega_jax.sweep.reporting.metrics import clip_score as clip_score
from sega_jax.sweep.reporting.metrics import distance as distance
from sega_jax.sweep.reporting.metrics import judge as judge
from sega_jax.sweep.reporting.metrics import measure as measure
from sega_jax.sweep.reporting.plots import plot as plot
from sega_jax.sweep.reporting.report import report as report
from sega_jax.sweep.reporting.results import Results as Results
from sega_jax.sweep.reporting.results import show as show
from sega_jax.sweep.reporting.sheets import sheets as sheets
from sega_jax.sweep.running.folder import Folder as Folder
from sega_jax.sweep.running.run import keep as keep
from sega_jax.sweep.running.run import kept as kept
from sega_jax.sweep.running.run import run as run
from sega_jax.sweep.running.status import Status as Status
from sega_jax.sweep.running.status import pace as pace
from sega_jax.sweep.running.status import seconds_left as seconds_left
from sega_jax.sweep.running.status import stages as stages
from sega_jax.sweep.running.status import status as status
