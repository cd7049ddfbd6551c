"""Networks: exact ports of published PyTorch modules, deterministic and independent of the sampler.

A module is built without values: its parameters are `jax.ShapeDtypeStruct`s, which `sega_jax.weights.pull` replaces by
arrays. It is then an immutable pytree for `jax.*` transforms. Attributes have the names of the modules in diffusers and
transformers, so the dotted path of a parameter is its key in a published checkpoint.
"""
