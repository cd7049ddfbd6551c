"""Running compiled programs: distribution over devices, chunks of the schedule, and the choice of active concepts."""
