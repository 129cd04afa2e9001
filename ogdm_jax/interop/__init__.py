"""Reads checkpoints of other programs without running their code; writes weights that they read."""

from ogdm_jax.interop.inert import UnsafeFileError
from ogdm_jax.interop.pretrained import Pretrained, from_torch, load_pretrained
from ogdm_jax.interop.recognise import UnrecognisedError
from ogdm_jax.interop.torch_state import read_torch

__all__ = [
    "Pretrained",
    "UnrecognisedError",
    "UnsafeFileError",
    "from_torch",
    "load_pretrained",
    "read_torch",
]
