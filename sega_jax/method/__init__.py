"""The theory: schedules, guidance, solvers and the sampling loop, on arrays alone."""
