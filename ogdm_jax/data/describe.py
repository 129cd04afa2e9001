"""What a training run needs to know of an image set."""

import dataclasses
from typing import Any

import numpy as np

from ogdm_jax.data.base import Source

SAMPLE = 20_000  # images that are read of a set that is not in memory
_PART = 512


def describe(source: Source) -> dict[str, Any]:
    """Sizes, classes and statistics of a set, measured on images in [-1, 1], or on latents as a
    network sees them.

    Returns:
      name, images, height, width, channels, classes, class_names, class_counts (of the images
      read), measured (how many images were read), the range of the values (of 0 to 255; of
      latents' means), mean and std per channel, and sigma_data: the root of the mean of the
      channels' variances, the value at which EDM's preconditioning (arXiv 2206.00364, table 1)
      gives the network inputs of unit variance. Of latents also what they are; where images have
      captions, their number.
    """
    height, width, channels = source.shape
    total, square, parts = np.zeros(channels), np.zeros(channels), []
    count = len(source) if source.in_memory else min(len(source), SAMPLE)
    low, high = np.inf, -np.inf
    rows = np.linspace(0, len(source) - 1, count).astype(np.int64)
    for start in range(0, count, _PART):
        part = source.take(rows[start : start + _PART])
        values, noise = _values(source, part["image"])
        low, high = min(low, values.min()), max(high, values.max())
        total, square = total + values.sum(0), square + (values**2 + noise**2).sum(0)
        parts.append(part["label"])
    mean = total / (count * height * width)
    variance = np.maximum(square / (count * height * width) - mean**2, 0.0)
    if source.latents is None:  # from 0..255 to [-1, 1]
        low, high, mean, variance = int(low), int(high), mean / 127.5 - 1, variance / 127.5**2
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
        "range": [float(low), float(high)] if source.latents else [low, high],
        "mean": mean.tolist(),
        "std": np.sqrt(variance).tolist(),
        "sigma_data": float(np.sqrt(variance.mean())),
        **({"captions": len(source)} if source.captioned else {}),
    } | ({"latents": dataclasses.asdict(source.latents)} if source.latents else {})


def _values(source: Source, items: np.ndarray) -> tuple[np.ndarray, np.ndarray | float]:
    """Numbers [n, C] as they are stored, of latents scaled ones, and their standard deviations."""
    latents = source.latents
    if latents is None:
        return items.reshape(-1, source.shape[-1]).astype(np.float64), 0.0
    flat, channels = items[:, 0].reshape(-1, items.shape[-1]).astype(np.float64), source.shape[-1]
    noise = flat[:, channels:] * (1.0 if latents.scaled else latents.scale)
    return latents.scaled_of(flat[:, :channels]), noise if latents.moments else 0.0
