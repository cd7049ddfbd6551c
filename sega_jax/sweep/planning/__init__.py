"""Plans a sweep before anything runs: its batches, shared prefixes and memory."""
