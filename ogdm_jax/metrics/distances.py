"""Distances between sets of feature vectors, and image fidelity, in float64 on the host.

The functions take what any feature network returned (x, y [n, d]) and do not know which network it
was; the name of the feature space belongs beside every number (features.py). Arrays may be of NumPy
or JAX, of any type of number.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import threadpoolctl
from jaxtyping import Float, Num
from numpy.typing import ArrayLike
from scipy.ndimage import correlate1d

from ogdm_jax.pixels import check_range, check_type, which

# rows of a distance matrix held at once (x 50,000 float64 = 1.6 GB); of a kernel matrix columns too
_CHUNK = 4096
Features = Num[Any, "n d"]
Images = Num[Any, "*n h w c"]  # one image or n of them


def _threads(work: float) -> contextlib.AbstractContextManager:
    """One thread for linear algebra of less than about 5 seconds' work.

    BLAS threads wait for each other by spinning: beside a busy training process the Frechet
    distance of 160 features took 22 s with two threads and 0.2 s with one.
    """
    return _pools().limit(limits=1, user_api="blas") if work < 5e10 else contextlib.nullcontext()


@functools.cache
def _pools() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController()  # looks through all loaded libraries: once


def checked_features(x: ArrayLike, name: str) -> np.ndarray:
    """Features [n, d] as float64; ValueError with the first example that is not finite."""
    array = np.asarray(x, np.float64)
    if array.ndim != 2:
        raise ValueError(f"{name}: shape {array.shape}; expected [number of examples, features].")
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise ValueError(
            f"{name}: example {bad[0]}{more} of {len(array)}: NaN or infinity; expected finite "
            "features."
        )
    return array


def _pair(x: ArrayLike, y: ArrayLike, least: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = checked_features(x, "x"), checked_features(y, "y")
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"x, y: {x.shape[1]} and {y.shape[1]} features; expected the same feature space."
        )
    if min(len(x), len(y)) < least:
        raise ValueError(f"x, y: {len(x)} and {len(y)} examples; expected at least {least} each.")
    return x, y


class Moments:
    """Mean and covariance of a stream, in float64.

    Chan, Golub and LeVeque's update of (n, mean, centred second moment): no cancellation of F^T F
    against n mu mu^T, which the usual one-pass formula suffers from when |mu| is large against the
    spread.
    """

    def __init__(self, dim: int = 0) -> None:
        """Nothing seen yet; dim: features of a row, 0 to take it from the first batch."""
        self.count = 0
        self.mean = np.zeros(dim)
        self._scatter = np.zeros((dim, dim))

    def update(self, features: Num[Any, "b d"]) -> "Moments":
        """Adds a batch; returns self."""
        batch = checked_features(features, "features")
        if len(batch) == 0:
            return self
        mean = batch.mean(0)
        centred = batch - mean[None]
        with _threads(batch.size * len(mean)):
            return self._add(len(batch), mean, centred.T @ centred)

    def merge(self, other: "Moments") -> "Moments":
        """Adds what another stream (another process, another device) has seen; returns self."""
        return self if other.count == 0 else self._add(other.count, other.mean, other._scatter)

    def _add(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> "Moments":
        if self.count == 0 and len(self.mean) == 0:
            self.mean, self._scatter = np.zeros_like(mean), np.zeros_like(scatter)
        if self.mean.shape != mean.shape:
            raise ValueError(f"features: {len(mean)} a row; expected {len(self.mean)} as before.")
        total = self.count + count
        between = mean - self.mean
        self._scatter = (
            self._scatter + scatter + np.outer(between, between) * (self.count * count / total)
        )
        self.mean = self.mean + between * (count / total)
        self.count = total
        return self

    def finalize(self) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
        """(mu, cov) with the divisor n - 1, as EDM's fid.py and numpy.cov.

        Raises:
          ValueError: fewer than two examples were seen.
        """
        if self.count < 2:
            raise ValueError(
                f"Moments: {self.count} examples seen; expected at least 2 for a covariance."
            )
        cov = self._scatter / (self.count - 1)
        return self.mean.copy(), (cov + cov.T) / 2


def _root(cov: np.ndarray, name: str) -> np.ndarray:
    """R [r, d] with cov = R^T R over the eigenvectors whose eigenvalue is more than rounding."""
    values, vectors = np.linalg.eigh((cov + cov.T) / 2)
    largest = max(values[-1], 0.0)
    if values[0] < -1e-6 * max(largest, np.finfo(float).tiny):
        raise ValueError(
            f"{name}: smallest eigenvalue {values[0]:.3g}; expected a positive semi-definite "
            "covariance."
        )
    kept = values > np.finfo(float).eps * len(values) * largest
    return np.sqrt(values[kept])[:, None] * vectors[:, kept].T


def frechet_distance(
    mu1: Num[Any, " d"], cov1: Num[Any, "d d"], mu2: Num[Any, " d"], cov2: Num[Any, "d d"]
) -> float:
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), squared Wasserstein-2 distance of Gaussians.

    Source: Heusel et al., arXiv 1706.08500, eq. 6 (FID is this on Inception's pool3 features).

    The official code takes scipy.linalg.sqrtm of the product, which is not symmetric, turns complex
    on rank-deficient covariances and needs a guard (adding 1e-6 to the diagonal). Here tr (C1
    C2)^(1/2) is the sum of singular values of R1 R2^T with C = R^T R from symmetric
    eigen-decompositions: real, never negative, no squaring, any rank. It agrees with the sqrtm
    route to 1e-6 wherever that one is well conditioned.

    Raises:
      ValueError: shapes that do not belong together, numbers that are not finite, or a covariance
        with a negative eigenvalue.
    """
    mu1, mu2 = (np.atleast_1d(np.asarray(mu, np.float64)) for mu in (mu1, mu2))
    cov1, cov2 = (np.atleast_2d(np.asarray(cov, np.float64)) for cov in (cov1, cov2))
    dim = len(mu1)
    if mu2.shape != (dim,) or cov1.shape != (dim, dim) or cov2.shape != (dim, dim):
        shapes = f"{mu1.shape}, {cov1.shape}, {mu2.shape}, {cov2.shape}"
        raise ValueError(
            f"mu1, cov1, mu2, cov2: shapes {shapes}; expected [d], [d, d], [d], [d, d]."
        )
    if not all(np.isfinite(a).all() for a in (mu1, cov1, mu2, cov2)):
        raise ValueError(
            "mu1, cov1, mu2, cov2: contain NaN or infinity; expected finite statistics."
        )
    with _threads(10.0 * dim**3):
        cross = np.linalg.svd(_root(cov1, "cov1") @ _root(cov2, "cov2").T, compute_uv=False).sum()
    distance = np.sum((mu1 - mu2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * cross
    return max(float(distance), 0.0)  # of equal statistics rounding leaves about -1e-13


def _kernel_sum(x: np.ndarray, y: np.ndarray) -> float:
    """Sum of the kernel over all pairs; pairs of chunks of a set with itself are computed once."""
    same, total = x is y, 0.0
    for i in range(0, len(x), _CHUNK):
        rows = x[i : i + _CHUNK]
        for j in range(i if same else 0, len(y), _CHUNK):
            kernel = rows @ y[j : j + _CHUNK].T
            kernel /= x.shape[1]
            kernel += 1
            total += (2 if same and j > i else 1) * float(np.vdot(kernel, kernel * kernel))
    return total


def _kernel_diagonal(x: np.ndarray) -> float:
    return float(((np.einsum("nd,nd->n", x, x) / x.shape[1] + 1) ** 3).sum())


def kernel_distance(x: Features, y: Num[Any, "m d"]) -> float:
    """KID, the unbiased squared MMD with k(a, b) = (a . b / d + 1)^3.

    Source: Binkowski et al., arXiv 1801.01401. Over all pairs (i != j within a set), so it does not
    depend on a random choice of subsets; its expectation is 0 for equal distributions and a single
    estimate may be negative.

    Raises:
      ValueError: fewer than two examples, or other numbers of features.
    """
    x, y = _pair(x, y, 2)
    with _threads((len(x) + len(y)) ** 2 * x.shape[1]):
        own_x, own_y = (_kernel_sum(v, v) - _kernel_diagonal(v) for v in (x, y))
        cross = _kernel_sum(x, y)
    n, m = len(x), len(y)
    return float(own_x / (n * (n - 1)) + own_y / (m * (m - 1)) - 2 * cross / (n * m))


def kernel_distance_subsets(
    x: Features, y: Num[Any, "m d"], subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """(mean, standard deviation) of KID over random subsets, as papers usually print it.

    Args:
      x: features of one set.
      y: features of the other.
      subsets: how many are drawn.
      size: examples of each, without replacement.
      seed: of the draws.

    Raises:
      ValueError: a subset larger than a set.
    """
    x, y = _pair(x, y, 2)
    if not 2 <= size <= min(len(x), len(y)):
        raise ValueError(
            f"size: {size}; expected between 2 and {min(len(x), len(y))}, the smaller set."
        )
    rng = np.random.default_rng(seed)
    draw = [
        kernel_distance(
            x[rng.choice(len(x), size, replace=False)], y[rng.choice(len(y), size, replace=False)]
        )
        for _ in range(subsets)
    ]
    return float(np.mean(draw)), float(np.std(draw))


def _squared_distances(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (rows, squared distances [rows, m]) of x against y by matrix products."""
    y2 = np.einsum("md,md->m", y, y)
    for i in range(0, len(x), _CHUNK):
        rows = x[i : i + _CHUNK]
        distances = np.einsum("nd,nd->n", rows, rows)[:, None] + y2[None] - 2 * rows @ y.T
        yield slice(i, i + len(rows)), np.maximum(distances, 0)


def _radii(x: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each row to its k-th neighbour."""
    radii = np.empty(len(x))
    for rows, distances in _squared_distances(x, x):
        itself = np.arange(len(distances)), np.arange(rows.start, rows.stop)
        distances[itself] = -1  # no neighbour
        radii[rows] = np.partition(distances, k, axis=1)[:, k]
    return radii


def manifolds(x: Features, y: Num[Any, "m d"], k: int) -> dict[str, float]:
    """Precision, recall, density and coverage of generated y against real x, from one pass.

    precision = share of y within the ball of some x_i, whose radius is the distance to x_i's k-th
    neighbour in x (borders count); recall = the same with the sets exchanged. Source: Kynkaanniemi
    et al., arXiv 1904.06991, eq. 1-2. density = 1/(k m) * the number of pairs with y_j inside the
    open ball of x_i (1 on average for equal distributions, may exceed 1); coverage = share of the
    open balls that hold some y_j. Source: Naeem et al., arXiv 2002.09797, eq. 3-4.

    Raises:
      ValueError: k neighbours are more than a set has, or other numbers of features.
    """
    real, generated = _pair(x, y, 2)
    n, m = len(real), len(generated)
    if not 1 <= k < min(n, m):
        raise ValueError(f"k: {k}; expected between 1 and {min(n, m) - 1}, below the smaller set.")
    centre = real.mean(0)[None]  # taken away so that the matrix products cancel little
    real, generated = real - centre, generated - centre
    # A copy of a training image lies exactly on spheres; this is how far the rounding of a matrix
    # product can move it.
    tie = 1e-12 * max(float((v**2).sum(1).max()) for v in (real, generated))
    near_real, near_generated, covered = (np.zeros(size, bool) for size in (m, n, n))
    pairs = 0
    with _threads((n + m) ** 2 * real.shape[1]):
        real_radii, generated_radii = _radii(real, k), _radii(generated, k)
        for rows, distances in _squared_distances(real, generated):
            near_real |= (distances <= real_radii[rows, None] + tie).any(0)
            near_generated[rows] = (distances <= generated_radii[None] + tie).any(1)
            inside = distances < real_radii[rows, None] - tie
            covered[rows] = inside.any(1)
            pairs += int(inside.sum())
    return {
        "precision": float(near_real.mean()),
        "recall": float(near_generated.mean()),
        "density": pairs / (k * m),
        "coverage": float(covered.mean()),
    }


def precision_recall(x: Features, y: Num[Any, "m d"], k: int = 3) -> tuple[float, float]:
    """(precision, recall) of generated y against real x, see `manifolds`."""
    found = manifolds(x, y, k)
    return found["precision"], found["recall"]


def density_coverage(x: Features, y: Num[Any, "m d"], k: int = 5) -> tuple[float, float]:
    """(density, coverage) of generated y against real x, see `manifolds`."""
    found = manifolds(x, y, k)
    return found["density"], found["coverage"]


def inception_score(probabilities: Num[Any, "n classes"], splits: int = 10) -> tuple[float, float]:
    """(mean, standard deviation) over splits of exp E KL(p(y|x) || p(y)).

    Source: Salimans et al., arXiv 1606.03498. Each split has its own p(y); a score lies between 1
    and the number of classes.

    Args:
      probabilities: of the classes, rows sum to 1.
      splits: parts of the set.

    Raises:
      ValueError: rows that are no probabilities, or fewer of them than splits.
    """
    p = checked_features(probabilities, "probabilities")
    if p.min(initial=0) < 0 or np.abs(p.sum(1) - 1).max(initial=0) > 1e-3:
        raise ValueError(
            "probabilities: rows are not distributions; expected non-negative rows that sum to 1."
        )
    if not 1 <= splits <= len(p):
        raise ValueError(
            f"splits: {splits}; expected between 1 and {len(p)}, the number of examples."
        )
    scores = []
    for part in np.array_split(p, splits):
        marginal = np.broadcast_to(part.mean(0)[None], part.shape)
        ratio = np.divide(part, marginal, out=np.ones_like(part), where=part > 0)  # 0 log 0 = 0
        scores.append(np.exp((part * np.log(ratio)).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def _images(
    a: ArrayLike, b: ArrayLike, data_range: float | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Both as float64, and the range of their values."""
    pair = np.asarray(a), np.asarray(b)
    shapes, types = [image.shape for image in pair], [image.dtype for image in pair]
    if shapes[0] != shapes[1] or len(shapes[0]) not in (3, 4):
        raise ValueError(
            f"images: shapes {shapes[0]} and {shapes[1]}; expected equal shapes [n, h, w, c] or "
            "[h, w, c]."
        )
    for image in pair:
        check_type(image.dtype) if data_range else check_range(image)
    if (types[0] == np.uint8) != (types[1] == np.uint8):
        raise ValueError(
            f"images: types {types[0]} and {types[1]}; expected both uint8, or both floats."
        )
    if data_range is None:
        data_range = 255.0 if types[0] == np.uint8 else 2.0
    first, second = (image.astype(np.float64) for image in pair)
    wide = (np.abs(first) > 2 * data_range) | (np.abs(second) > 2 * data_range)
    if not 0 < data_range < np.inf or wide.any():
        raise ValueError(
            f"data_range: {data_range:g} given, but of the images {which(wide)} larger numbers; "
            "expected the largest possible value minus the smallest, 255 for uint8."
        )
    return first, second, data_range


def psnr(
    a: Images, b: Images, data_range: float | None = None
) -> Float[np.ndarray, " n"] | np.float64:
    """10 log10(range^2 / mean squared error) in dB, one number an image; infinite for equal images.

    Args:
      a: one image or several, uint8 or floats. An image with a NaN scores NaN.
      b: as many of the same shape and type.
      data_range: largest minus smallest possible value; None: 255 for uint8, else 2 for [-1, 1].

    Raises:
      ValueError: shapes or types differ, or the values cannot be of this range.
    """
    a, b, data_range = _images(a, b, data_range)
    error = np.mean((a - b) ** 2, axis=(-3, -2, -1))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(data_range**2 / error)


def ssim(
    a: Images, b: Images, data_range: float | None = None, window: str = "gaussian"
) -> Float[np.ndarray, " n"] | np.float64:
    """Structural similarity in [-1, 1], one number an image, mean over positions and channels.

    (2 ma mb + C1)(2 cov + C2) / ((ma^2 + mb^2 + C1)(va + vb + C2)) with local moments, C = (0.01
    L)^2 and (0.03 L)^2. Source: Wang et al. 2004. Only positions whose window lies inside the image
    count, as in scikit-image. It compares means, so images in [-1, 1] score otherwise than the same
    ones in [0, 255] or [0, 1], of which papers report it.

    Args:
      a: one image or several, uint8 or floats. An image with a NaN scores NaN.
      b: as many of the same shape and type.
      data_range: L, largest minus smallest possible value; None: 255 for uint8, else 2 for [-1, 1].
      window: "gaussian" (11 x 11, std 1.5, as published) or "uniform" (7 x 7 with sample
        covariances, scikit-image's default).

    Raises:
      ValueError: shapes or types differ, values that cannot be of this range, images smaller than
        the window, or an unknown window.
    """
    a, b, data_range = _images(a, b, data_range)
    if window == "gaussian":
        taps = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
        correction = 1.0
    elif window == "uniform":
        taps = np.ones(7)
        correction = 49 / 48
    else:
        raise ValueError(f"window: '{window}'; expected 'gaussian' or 'uniform'.")
    taps, pad = taps / taps.sum(), len(taps) // 2
    if min(a.shape[-3:-1]) < len(taps):
        size = f"{a.shape[-3]} x {a.shape[-2]}"
        raise ValueError(
            f"images: {size}; expected at least {len(taps)} x {len(taps)} for window '{window}'."
        )

    def local(v: np.ndarray) -> np.ndarray:
        sums = correlate1d(correlate1d(v, taps, axis=-3), taps, axis=-2)
        return sums[..., pad:-pad, pad:-pad, :]

    ma, mb = local(a), local(b)
    va, vb, cov = (
        correction * (local(u * v) - m)
        for u, v, m in ((a, a, ma**2), (b, b, mb**2), (a, b, ma * mb))
    )
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    value = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return value.mean(axis=(-3, -2, -1))
