"""The families of checkpoints, one file per family."""
