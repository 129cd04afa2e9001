"""Measuring: distances between sets of features (metrics), feature spaces (features), images for
people (report).

    features = feature_space("digits")                  # or an opened, labelled Source; .name
    "fd_digits", .dim feature_space("lite0"), feature_space("inception", weights=FILE)     #
    networks that come with weights features(images)                                    # uint8 [n,
    h, w, c] -> float32 [n, dim] features.classify(images)                           # -> class
    probabilities [n, classes] distance_report(features, samples, reference)       # -> {"n", "fd",
    "floor", "fd_all", "kid", "precision", ...} statistics_report(features, samples,
    load_statistics(FILE.npz))      # against published mu and sigma

samples and reference are images (uint8, or floats in [-1, 1]) or features extracted before. A
distance always comes with the number of images and the real-against-real floor at that number.

On features x (real) [n, d] and y (generated) [m, d], in float64 on the host:
    frechet_distance(mu1, cov1, mu2, cov2)              moments from
    Moments().update(features).finalize() kernel_distance(x, y), kernel_distance_subsets(x, y,
    subsets, size, seed) precision_recall(x, y, k), density_coverage(x, y, k), or all four at once:
    manifolds(x, y, k) inception_score(probabilities, splits)
On images: psnr(a, b, data_range=2.0), ssim(a, b, data_range=2.0, window="gaussian"), one number an
image. Streams of images, a batch at a time: protocol.of_source, protocol.score (EDM's three times
50,000 images). For people: html.page (a training folder as one page), charts.line_chart;
to_uint8(images), grid(images, columns, padding, scale), sheet(images, columns), save_png(path,
image), save_animation(path, frames).
"""

from ogdm_jax.data.pictures import grid, save_animation, save_png, sheet
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
from ogdm_jax.pixels import to_uint8

__all__ = [
    "Moments",
    "Statistics",
    "density_coverage",
    "distance_report",
    "feature_space",
    "frechet_distance",
    "grid",
    "sheet",
    "inception_score",
    "kernel_distance",
    "kernel_distance_subsets",
    "load_statistics",
    "manifolds",
    "precision_recall",
    "psnr",
    "save_animation",
    "save_png",
    "save_statistics",
    "ssim",
    "statistics_report",
    "to_uint8",
    "train_features",
]
