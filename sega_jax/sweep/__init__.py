"""Ablation sweeps: many pictures of one checkpoint, planned, run and recorded."""

from sega_jax.sweep.description import Sweep as Sweep
