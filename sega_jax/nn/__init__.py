"""Networks: exact ports of published PyTorch modules, deterministic and independent of the sampler.

A new module's parameters are only shapes (`jax.ShapeDtypeStruct`), which `sega_jax.weights.pull` replaces with arrays.
The module is then an immutable pytree, ready for `jax.*` transforms. Attributes are named after the modules in
diffusers and transformers, so the dotted path of a parameter is its key in a published checkpoint.
"""
