"""StyleGAN2 discriminators as after some training."""

import jax
import jax.numpy as jnp
import numpy as np


def shapes(network, batch=4):
    """Parameter shapes, nothing computed."""
    label = jnp.zeros((batch,), jnp.int32) if network.label_dim else None
    x = jnp.zeros((batch, network.img_resolution, network.img_resolution, network.img_channels))
    cond = jnp.zeros((batch, network.t_dim))
    return jax.eval_shape(network.init, jax.random.key(0), x, cond, label)


def drawn(network, seed=0, batch=4):
    """Variables as after some training, with biases: scales as at birth; an input; a condition."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        slow = jax.tree_util.keystr(path, simple=True, separator=".").startswith("mapping.fc")
        return ((100 if slow else 1) * rng.standard_normal(shape.shape)).astype(np.float32)

    params = jax.tree.map_with_path(leaf, shapes(network)["params"])
    side, channels = network.img_resolution, network.img_channels
    x = rng.standard_normal((batch, side, side, channels)).astype(np.float32)
    cond = np.abs(rng.standard_normal((batch, network.t_dim))).astype(np.float32)
    return {"params": params}, x, cond
