"""Checkpoints of other programs, read without running their code, and weights that others can read."""

from ogdm_jax.interop.restricted_pickle import UnsafeFileError
from ogdm_jax.interop.torch_state import read_torch

__all__ = ["UnsafeFileError", "read_torch"]
