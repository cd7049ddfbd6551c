"""Schedules, guidance, solvers and the sampling loop, all implemented as functions of arrays."""
