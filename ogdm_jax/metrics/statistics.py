"""Means and covariances on disk, in the form that EDM, pytorch-fid and OpenAI's evaluator share."""

import dataclasses
import os
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from ogdm_jax import places
from ogdm_jax.brief import brief
from ogdm_jax.data.arrays import DAMAGED
from ogdm_jax.interop.inert import quote
from ogdm_jax.metrics.distances import Moments


@runtime_checkable
class FeatureSpace(Protocol):
    """A function uint8 images [n,h,w,c] -> float32 features [n, dim].

    Attributes:
      name: of the Frechet distance taken in it.
      dim: features of an image.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def dim(self) -> int: ...  # noqa: D102

    def __call__(self, images: np.ndarray) -> np.ndarray: ...  # noqa: D102


def trained_on(space: FeatureSpace) -> str:
    """Digest of what a feature space was trained on, "" of one that was not: spaces that were may
    share a name.
    """
    return getattr(space, "trained_on", "")


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """Moments of a set's features.

    Attributes:
      mu: the mean.
      cov: the covariance.
      count: images of the set; None where the file does not say.
      features: the feature space's name; None where the file does not say.
      trained_on: digest of what that space was trained on; None where it was not, or not said.
    """

    mu: Float[np.ndarray, " d"]
    cov: Float[np.ndarray, "d d"]
    count: int | None = None
    features: str | None = None
    trained_on: str | None = None
    __repr__ = brief

    @property
    def dim(self) -> int:
        """Features of an image."""
        return len(self.mu)

    def require(self, space: FeatureSpace, where: str) -> None:
        """Checks that these can be of a feature space.

        Raises:
          ValueError: they cannot, in a sentence that begins with `where`.
        """
        if self.dim != space.dim or self.features not in (None, space.name):
            what = f"{self.dim} features of {self.features or 'an unnamed space'}"
            raise ValueError(f"{where}: {what}; {space.name} has {space.dim}.")
        known = trained_on(space)
        if self.trained_on and known and self.trained_on != known:
            raise ValueError(
                f"{where}: moments in a space {space.name} that was trained on other images or "
                "labels than this one; expected moments made with the same --features."
            )


def is_statistics(path: str | os.PathLike) -> bool:
    """Whether a file is an .npz with mu and sigma."""
    try:
        with places.place(path).open("rb") as file, np.load(file) as archive:
            return {"mu", "sigma"} <= set(archive.files)
    except DAMAGED:
        return False


def load_statistics(path: str | os.PathLike) -> Statistics:
    """Reads `mu` and `sigma` of an .npz; pickled entries are refused.

    Such are EDM's and NVIDIA's reference files, pytorch-fid's --save-stats, and OpenAI's reference
    batches (whose spatial mu_s and sigma_s are left alone).

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
            mu, cov = archive["mu"], archive["sigma"]
            told = {"count": int, "features": str, "trained_on": str}
            found = {n: kind(archive[n].item()) for n, kind in told.items() if n in archive.files}
    except FileNotFoundError:
        raise ValueError(
            f"statistics: {path} does not exist; expected an .npz file with mu and sigma."
        ) from None
    except DAMAGED as error:
        raise ValueError(
            f"statistics: {path} {quote(str(error))}; expected an .npz file with mu and sigma."
        ) from None
    if mu.ndim != 1 or not mu.size or cov.shape != (len(mu), len(mu)):
        raise ValueError(
            f"statistics: {path} has mu {mu.shape} and sigma {cov.shape}; expected [d] and [d, d]."
        )
    wrong = _wrong(mu, cov, found.get("count"))
    if wrong:
        raise ValueError(f"statistics: {path} {wrong}; expected the moments of a set of images.")
    return Statistics(mu.astype(np.float64), cov.astype(np.float64), **found)


def _wrong(mu: np.ndarray, cov: np.ndarray, count: int | None) -> str:
    """Why these are no moments, or ""."""
    if mu.dtype.kind not in "fiu" or cov.dtype.kind not in "fiu":
        return f"has mu of {mu.dtype} and sigma of {cov.dtype}"
    if not (np.isfinite(mu).all() and np.isfinite(cov).all()):
        return "has NaN or infinity in mu or sigma"
    if np.abs(cov - cov.T).max() > 1e-3 * np.abs(cov).max() or np.diagonal(cov).min() < 0:
        return "has a sigma that is not symmetric, or a negative variance: no covariance"
    if count is not None and count < 2:
        return f"says that it is of {count} images"
    return ""


def save_statistics(
    path: str | os.PathLike, moments: Moments, features: str, trained_on: str | None = None
) -> None:
    """Writes `mu`, `sigma` (EDM's fid.py and pytorch-fid read them), `count`, and what is known of
    the feature space.

    Args:
      path: of the .npz file.
      moments: of the set.
      features: the feature space's name.
      trained_on: that of a space that was trained, whose name others may have.
    """
    mu, cov = moments.finalize()
    with places.written(places.place(path)) as new:
        with new.open("wb") as file:  # by its name np.savez would add .npz to another ending
            told: Any = {"trained_on": trained_on} if trained_on else {}
            np.savez(file, mu=mu, sigma=cov, count=moments.count, features=features, **told)
