"""Measuring: distances between sets of features, feature spaces, and whole protocols.

    space = feature_space("digits")       # or "lite0", or feature_space("inception", weights=FILE)
    space.name, space.dim                 # "fd_digits", features of an image
    space(images)                         # uint8 [n,h,w,c] -> float32 [n, dim]
    distance_report(space, samples, reference)       # {"n", "fd", "floor", "kid", ...}

Samples and reference are images (uint8, or in [-1, 1]) or features that were extracted before. A
distance always comes with the number of images and the real-against-real floor at that number.

- distances: mathematics on features [n, d] and on images, in float64 on the host
- features: feature spaces by name, and reports of distances in them
- trained, networks: the spaces: a small classifier, Inception, EfficientNet-Lite0
- statistics: means and covariances on disk
- protocol: EDM's three sets of 50,000 images, measured while they are drawn
"""

from ogdm_jax.metrics.distances import (
    Moments,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    kernel_distance_subsets,
    manifolds,
    precision_recall,
    psnr,
    ssim,
)
from ogdm_jax.metrics.features import distance_report, feature_space, statistics_report
from ogdm_jax.metrics.statistics import Statistics, load_statistics, save_statistics
from ogdm_jax.metrics.trained import train_features

__all__ = [
    "Moments",
    "Statistics",
    "density_coverage",
    "distance_report",
    "feature_space",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "kernel_distance_subsets",
    "load_statistics",
    "manifolds",
    "precision_recall",
    "psnr",
    "save_statistics",
    "ssim",
    "statistics_report",
    "train_features",
]
