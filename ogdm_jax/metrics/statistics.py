"""Means and covariances on disk, in the one form that EDM, pytorch-fid and OpenAI's evaluator
share.
"""

import dataclasses
import os
from typing import Any

import numpy as np

from ogdm_jax import places
from ogdm_jax.data.arrays import DAMAGED
from ogdm_jax.interop.restricted_pickle import quote
from ogdm_jax.metrics.distances import Moments


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """mu [d], cov [d, d] of a set's features; count and features (the space's name) where the file
    says so.
    """

    mu: np.ndarray
    cov: np.ndarray
    count: int | None = None
    features: str | None = None

    @property
    def dim(self) -> int:
        return len(self.mu)

    def require(self, features: Any, where: str) -> None:
        """Raises ValueError, in a sentence that begins with where, unless these can be of that
        feature space.
        """
        if self.dim != features.dim or self.features not in (None, features.name):
            what = f"{self.dim} features of {self.features or 'an unnamed space'}"
            raise ValueError(f"{where}: {what}; {features.name} has {features.dim}.")


def is_statistics(path: str | os.PathLike) -> bool:
    """Whether a file is an .npz with mu and sigma."""
    try:
        with places.place(path).open("rb") as file, np.load(file) as archive:
            return isinstance(archive, np.lib.npyio.NpzFile) and {"mu", "sigma"} <= set(
                archive.files
            )
    except DAMAGED:
        return False


def load_statistics(path: str | os.PathLike) -> Statistics:
    """Reads `mu` and `sigma` of an .npz: EDM's and NVIDIA's reference files, pytorch-fid's
    --save-stats, and OpenAI's reference batches (whose spatial mu_s and sigma_s are left alone).
    Pickled entries are refused.

    The formats do not say which network and which resizing made the numbers: EDM's are of the
    TensorFlow-1 route ("fid"), pytorch-fid's of the half-pixel one ("fid_pytorch"), OpenAI's of
    another Inception graph; a distance across them is wrong without any sign of it. Files written
    by save_statistics do say.

    Raises:
      ValueError: no such file, no mu and sigma, or shapes that do not belong together.
    """
    try:
        with places.place(path).open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if not {"mu", "sigma"} <= set(archive.files):
                raise ValueError(f"has {', '.join(sorted(archive.files)[:5])}")
            mu, cov = (
                np.asarray(archive["mu"], np.float64),
                np.asarray(archive["sigma"], np.float64),
            )
            count = int(archive["count"].item()) if "count" in archive.files else None
            features = str(archive["features"].item()) if "features" in archive.files else None
    except FileNotFoundError:
        raise ValueError(
            f"statistics: {path} does not exist; expected an .npz file with mu and sigma."
        ) from None
    except (*DAMAGED, AttributeError, TypeError) as error:
        raise ValueError(
            f"statistics: {path} {quote(str(error))}; expected an .npz file with mu and sigma."
        ) from None
    if mu.ndim != 1 or cov.shape != (len(mu), len(mu)):
        raise ValueError(
            f"statistics: {path} has mu {mu.shape} and sigma {cov.shape}; expected [d] and [d, d]."
        )
    return Statistics(mu, cov, count, features)


def save_statistics(path: str | os.PathLike, moments: Moments, features: str) -> None:
    """Writes `mu`, `sigma` (EDM's fid.py and pytorch-fid read them) and, for us, `count` and
    `features`.
    """
    mu, cov = moments.finalize()
    with (
        places.written(places.place(path)) as new,
        new.open("wb") as file,
    ):  # np.savez would add .npz to another ending
        np.savez(file, mu=mu, sigma=cov, count=moments.count, features=features)
