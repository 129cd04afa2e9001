"""Building blocks of the networks."""

from ogdm_jax.networks.convolution import conv2d, downsample, fir, mean_pool, nearest, upsample

__all__ = ["conv2d", "downsample", "fir", "mean_pool", "nearest", "upsample"]
