"""Feature spaces by name, and the distances between generated and real images in one of them."""

import hashlib
import re
from pathlib import PurePath
from typing import Protocol

import numpy as np

from ogdm_jax.metrics import distances as metrics
from ogdm_jax.metrics.statistics import Statistics
from ogdm_jax.metrics.trained import TrainedFeatures, train_features
from ogdm_jax.pixels import to_uint8

MOST_NEIGHBOURS = 10_000  # precision, recall, density and coverage need all pairs of distances


class FeatureSpace(Protocol):
    """uint8 images [n, h, w, c] -> float32 [n, dim]. `name` is the name of the Frechet distance
    taken in it.
    """

    name: str
    dim: int

    def __call__(self, images: np.ndarray) -> np.ndarray: ...


def feature_space(
    source, weights: str | None = None, route: str = "tf", size: int = 96
) -> FeatureSpace:
    """A feature space by name: a labelled image source, "lite0", or "inception" with a weights
    file.

    source: a name for data.open_source or an opened Source: a classifier is trained on its labels
        (evaluation.trained; digits: about 5 seconds on one core, once per process, nothing written
        to disk). feature_space("digits").name == "fd_digits". Distances compare between runs that
        used the same source at the same size; a number called fd_digits says nothing about other
        data and is never "FID".
    "lite0": evaluation.networks.lite0_features(size), name "fd_lite0": colour images, offline.
    "inception": evaluation.networks.inception_features(weights, route), name "fid" or
    "fid_pytorch".

    Raises:
      ValueError: the source cannot be opened, has no class labels, or a classifier cannot learn
      them; weights missing.
    """
    if not isinstance(source, str):
        return _of_source(source)
    if source in ("lite0", "inception"):
        from ogdm_jax.metrics import (
            networks,  # only here: the trained features need no network of another package
        )

        return (
            networks.lite0_features(size)
            if source == "lite0"
            else networks.inception_features(weights, route)
        )
    return _of_name(source)


_TRAINED: dict[
    tuple[str, str], TrainedFeatures
] = {}  # by name and content, so that one process trains once


def _of_name(name: str) -> TrainedFeatures:
    from ogdm_jax.data import open_source  # only here: who brings a Source needs no reader

    return _of_source(open_source(name))


def _of_source(source) -> TrainedFeatures:
    taken = source.images is None
    everything = (
        source.take(np.arange(len(source)))
        if taken
        else {"image": source.images, "label": source.labels}
    )
    images, labels = everything["image"], everything["label"]
    if labels is None or np.asarray(labels).ndim != 1 or np.max(labels, initial=-1) < 1:
        raise ValueError(
            f"{source.name}: no class labels; a trained feature space needs a source with two or "
            "more classes."
        )
    name = f"fd_{short_name(source.name)}"
    content = hashlib.sha256(repr(images.shape).encode())
    content.update(np.ascontiguousarray(images))
    content.update(np.ascontiguousarray(labels))
    key = name, content.hexdigest()
    if key not in _TRAINED:
        _TRAINED[key] = train_features(name, images, labels)
    return _TRAINED[key]


def short_name(source: str) -> str:
    """digits -> digits, tfds:cifar10/train -> cifar10, npz:/data/emoji32.npz?base<1700 ->
    emoji32.
    """
    kind, separator, rest = source.partition(":")
    rest = rest.partition("?")[0] if separator else kind
    word = rest.split("/")[0] if kind == "tfds" else PurePath(rest).stem
    return re.sub(r"[^A-Za-z0-9_.-]", "_", word) or "source"


def _extracted(features: FeatureSpace, data, name: str) -> np.ndarray:
    data = np.asarray(data)
    if data.ndim == 2:
        if data.shape[1] != features.dim:
            raise ValueError(
                f"{name}: {data.shape[1]} features; {features.name} has {features.dim}."
            )
        return data
    if data.ndim != 4:
        raise ValueError(
            f"{name}: shape {data.shape}; expected images [n, h, w, c] or their features [n, "
            f"{features.dim}]."
        )
    return features(to_uint8(data))


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return metrics.Moments().update(x).finalize()


def _frechet(x: np.ndarray, y: np.ndarray) -> float:
    return metrics.frechet_distance(*_moments(x), *_moments(y))


def statistics_report(
    features: FeatureSpace, samples, reference: Statistics
) -> dict[str, float | int | str | None]:
    """The Frechet distance to published moments: papers' protocol, in which no floor can be
    measured.

    Returns: {"features", "n_samples", "n_reference" (None where the file does not say), "fd_all",
    "floor": None}.

    Raises:
      ValueError: the statistics have another number of features, or say that they are of another
      feature space.
    """
    reference.require(features, "reference")
    y = _extracted(features, samples, "samples").astype(np.float64)
    return {
        "features": features.name,
        "n_samples": len(y),
        "n_reference": reference.count,
        "fd_all": metrics.frechet_distance(*_moments(y), reference.mu, reference.cov),
        "floor": None,
    }


def distance_report(
    features: FeatureSpace, samples, reference, k: int = 5, splits: int | None = None, seed: int = 0
) -> dict[str, float | int | str]:
    """Distances between samples and reference, each with the number of images and what real images
    score.

    samples, reference: uint8 or [-1, 1] images [n, h, w, c], or features [n, dim] extracted before
      (2-D).

    A Frechet distance falls with the number of images even for equal laws, so it means something
    only beside the floor: the reference is split in random halves A and B, and with n =
        min(len(samples), len(reference) // 2) fd    = distance of n samples to n images of A,
        mean over `splits` random splits floor = distance of n images of B to the same n of A,
        mean over the same splits
    `fd` at `floor` is as good as real; clearly below it, the samples copy the reference. `fd_all`
    uses all samples and
    the whole reference, as papers do: smaller than fd through the larger numbers, and not
    comparable with `floor`. kid (unbiased) uses everything; kid_floor is B against A. precision,
    recall, density, coverage (k neighbours) take n_neighbours images of either side of the first
    split, each with its floor (B against A).

    Returns: {"features": name, "n", "n_samples", "n_reference", "fd", "floor", "fd_over_floor",
    "fd_all", "kid", "kid_floor", "n_neighbours", "precision", "precision_floor", ...}; plain
    numbers, ready for JSON.
    """
    x, y = _extracted(features, reference, "reference"), _extracted(features, samples, "samples")
    n = min(len(y), len(x) // 2)
    if n <= k:
        raise ValueError(
            f"samples, reference: {len(y)} and {len(x)} images; expected more than {k} and "
            f"{2 * k + 1}."
        )
    splits = (4 if features.dim <= 512 else 1) if splits is None else splits
    if splits < 1:
        raise ValueError(f"splits: {splits}; expected at least 1.")
    x, y = x.astype(np.float64), y.astype(np.float64)
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(splits):
        order, chosen = rng.permutation(len(x)), rng.permutation(len(y))[:n]
        a, b, generated = x[order[:n]], x[order[n : 2 * n]], y[chosen]
        pairs.append((_frechet(generated, a), _frechet(b, a)))
        if i == 0:
            first = a, b, generated
    fd, floor = (float(np.mean(column)) for column in zip(*pairs))
    a, b, generated = first
    result = {
        "features": features.name,
        "n": n,
        "n_samples": len(y),
        "n_reference": len(x),
        "fd": fd,
        "floor": floor,
        "fd_over_floor": fd / floor if floor > 0 else float("inf"),
        "fd_all": _frechet(y, x),
        "kid": metrics.kernel_distance(x, y),
        "kid_floor": metrics.kernel_distance(a, b),
        "n_neighbours": min(n, MOST_NEIGHBOURS),
    }
    a, b, generated = (part[:MOST_NEIGHBOURS] for part in first)
    for ending, part in (("", generated), ("_floor", b)):
        result |= {name + ending: value for name, value in metrics.manifolds(a, part, k).items()}
    return result
