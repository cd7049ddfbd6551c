"""Measures how well edits work on the demo models. The judge (`sega_jax.demo.judge`) decides which edits succeeded."""
