"""ogdm_jax: five improvements of diffusion models as one composable system in JAX.

Importing this package starts no backend and reads no device.
"""

__version__ = "0.3.0"
