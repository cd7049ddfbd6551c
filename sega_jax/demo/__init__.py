"""The small model that comes along, and how it was made and judged.

`sega_jax.load()` gives it: a latent diffusion model of Stable Diffusion's architecture, of cartoon portraits of 128x128
pixels, in `checkpoint`. `portraits` draws what it was trained on (attributes, `wording`), `train` is the recipe,
`judge` reads attributes off pictures, `evaluate` and `report` say how well edits work, `settings` which suit it.
"""
