"""Image sets, batches and augmentation. Images stay uint8 until they are on the device."""

from typing import Any

from ogdm_jax.data.pipeline import Batches, batches, in_order, indices
from ogdm_jax.data.sources import Source, SourceError, open_source

__all__ = [
    "AugmentPipe",
    "Batches",
    "Source",
    "SourceError",
    "batches",
    "in_order",
    "indices",
    "open_source",
    "xflip",
]


def __getattr__(name: str) -> Any:
    """Augmentation is imported when asked for: the processes that read images need no JAX."""
    if name not in ("AugmentPipe", "xflip"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ogdm_jax.data import augment

    return getattr(augment, name)
