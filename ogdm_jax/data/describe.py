"""What a training run needs to know of an image set."""

from typing import Any

import numpy as np

from ogdm_jax.data.base import Source

SAMPLE = 20_000  # images that are read of a set that is not in memory
_PART = 512


def describe(source: Source) -> dict[str, Any]:
    """Sizes, classes and statistics of a set, measured on images in [-1, 1].

    Returns:
      name, images, height, width, channels, classes, class_names, class_counts (of the images
      read), measured (how many images were read), the range of the values (of 0 to 255), mean and
      std per channel, and sigma_data: the
      root of the mean of the channels' variances, the value at which EDM's preconditioning (arXiv
      2206.00364, table 1) gives the network inputs of unit variance.
    """
    height, width, channels = source.shape
    total, square, parts = np.zeros(channels), np.zeros(channels), []
    count = len(source) if source.in_memory else min(len(source), SAMPLE)
    low, high = 255, 0
    rows = np.linspace(0, len(source) - 1, count).astype(np.int64)
    for start in range(0, count, _PART):
        part = source.take(rows[start : start + _PART])
        low, high = min(low, part["image"].min()), max(high, part["image"].max())
        pixels = part["image"].reshape(-1, channels).astype(np.float64)
        total, square = total + pixels.sum(0), square + (pixels**2).sum(0)
        parts.append(part["label"])
    mean = total / (count * height * width)
    variance = np.maximum(square / (count * height * width) - mean**2, 0.0)
    labels = np.concatenate(parts)
    counts = []
    if labels.ndim == 1:
        counts = np.bincount(labels[labels >= 0], minlength=source.num_classes).tolist()
    return {
        "name": source.name,
        "images": len(source),
        "height": height,
        "width": width,
        "channels": channels,
        "classes": source.num_classes,
        "class_names": list(source.class_names),
        "class_counts": counts,
        "measured": count,
        "range": [int(low), int(high)],
        "mean": (mean / 127.5 - 1).tolist(),
        "std": (np.sqrt(variance) / 127.5).tolist(),
        "sigma_data": float(np.sqrt(variance.mean()) / 127.5),
    }
