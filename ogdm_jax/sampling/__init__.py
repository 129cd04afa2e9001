"""From noise to images: one sampler, its solvers, churn and guidance."""

from ogdm_jax.sampling.churn import Churn
from ogdm_jax.sampling.guidance import Guidance, per_image
from ogdm_jax.sampling.sampler import sample

__all__ = ["Churn", "Guidance", "per_image", "sample"]
