"""Measuring: distances between sets of features (metrics), feature spaces (features), images for people (report)."""

from ogdm_jax.evaluation.metrics import (
    Moments,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    kernel_distance_subsets,
    precision_recall,
    psnr,
    ssim,
)

__all__ = [
    "Moments",
    "density_coverage",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "kernel_distance_subsets",
    "precision_recall",
    "psnr",
    "ssim",
]
