"""Helpers that tests of several packages share: small checkpoints, recorded results and stubs."""
