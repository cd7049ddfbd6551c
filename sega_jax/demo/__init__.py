"""The packaged demo model, its training and its evaluation.

`sega_jax.load()` loads the model from `checkpoint`: a latent diffusion model with Stable Diffusion's architecture that
generates cartoon portraits of 128x128 pixels. `training` draws the portraits and trains the model, `judge` classifies
the attributes of pictures, `evaluate` measures how well edits work, and `settings` has the recommended settings.
"""
