"""The supported families of checkpoints. Each family's main module has the family's name."""
