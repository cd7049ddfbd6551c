"""The families of checkpoints, with one file for each family."""
