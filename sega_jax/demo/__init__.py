"""The small model that comes along, and how it was made and judged.

`sega_jax.load()` gives it: a latent diffusion model of Stable Diffusion's architecture, of cartoon portraits of 128x128
pixels, in `checkpoint`. `training` draws what it was trained on and holds the recipe, `judge` reads attributes off
pictures, `evaluate` says how well edits work, and `settings` has the settings that suit it.
"""
