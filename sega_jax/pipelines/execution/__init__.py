"""Running compiled programs: the devices, the chunks of the schedule, and the active concepts."""
