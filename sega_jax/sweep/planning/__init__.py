"""How a sweep is made: batches, shared prefixes and memory, decided before anything runs."""
