"""Networks: exact ports of the published PyTorch modules, without randomness, knowing nothing of diffusion.

A module is built without values (its parameters are `jax.ShapeDtypeStruct`s) and filled by
`sega_jax.weights.pull`; afterwards it is an immutable pytree, used with `jax.*` transforms only.
Attributes carry the names of the diffusers and transformers modules, so that the dotted path of a
parameter is its key in a published checkpoint.
"""
