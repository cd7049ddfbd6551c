"""The method: schedules, guidance, solvers and the sampling loop, all as functions of arrays."""
