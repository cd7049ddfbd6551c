"""The supported families of checkpoints. The main module of each family is named after it."""
