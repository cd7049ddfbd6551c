"""How compiled programs run: on which devices, in which chunks, and for which concepts."""
