"""From noise to images: one sampler, its solvers, churn and guidance."""

from ogdm_jax.sampling.sampler import sample

__all__ = ["sample"]
