"""Image sets and batches. Images stay uint8 until they are on the device.

Augmentation (ogdm_jax.data.augment) is not imported here: it needs JAX, which the processes that
read images (workers.py) never import.
"""

from ogdm_jax.data.base import Rows, Source, SourceError, fingerprint, from_arrays, spread
from ogdm_jax.data.pipeline import Batches, batches, in_order, indices
from ogdm_jax.data.sources import open_pictures, open_source

__all__ = [
    "Batches",
    "Rows",
    "Source",
    "SourceError",
    "batches",
    "fingerprint",
    "from_arrays",
    "in_order",
    "indices",
    "open_pictures",
    "open_source",
    "spread",
]
