"""Schedules, guidance, solvers and the sampling loop, all implemented as functions on arrays."""
