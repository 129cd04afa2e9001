"""Image sets, batches and augmentation. Images stay uint8 until they are on the device."""

from ogdm_jax.data.augment import AugmentPipe, xflip
from ogdm_jax.data.pipeline import Batches, batches, in_order, indices
from ogdm_jax.data.sources import Source, SourceError, open_source

__all__ = ["AugmentPipe", "Batches", "Source", "SourceError", "batches", "in_order", "indices", "open_source", "xflip"]
