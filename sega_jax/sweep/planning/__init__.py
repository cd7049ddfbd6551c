"""The plan of a sweep, made before anything runs: its batches, shared prefixes and memory."""
