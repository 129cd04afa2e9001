"""Feature spaces by name, and the distances between generated and real images in one of them."""

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

import numpy as np
from jaxtyping import Num, Shaped

from ogdm_jax.data import Source, open_source
from ogdm_jax.metrics.distances import (
    Features,
    Moments,
    checked_features,
    frechet_distance,
    kernel_distance,
    manifolds,
)
from ogdm_jax.metrics.networks import NetworkFeatures, inception_features, lite0_features
from ogdm_jax.metrics.statistics import FeatureSpace, Statistics
from ogdm_jax.metrics.trained import TrainedFeatures, some_rows, train_features
from ogdm_jax.pixels import check_range, to_uint8, which

MOST_NEIGHBOURS = 10_000  # precision, recall, density and coverage need all pairs of distances
Images = Shaped[np.ndarray, "n h w c"]
Gaussian = tuple[np.ndarray, np.ndarray]  # mean and covariance


def feature_space(
    source: str | Source,
    weights: str | os.PathLike | None = None,
    route: str = "tf",
    size: int = 96,
) -> TrainedFeatures | NetworkFeatures:
    """A feature space by name.

    Args:
      source: "lite0" (networks.lite0_features, named "fd_lite0": colour images, offline);
        "inception" (networks.inception_features, named "fid" or "fid_pytorch"); or a labelled
        source, opened or by a name for data.open_source, on whose labels a classifier is trained
        (trained.py; digits take about 5 seconds on one core, once per process). A space trained on
        digits is named "fd_digits": distances compare between runs that used the same source at the
        same size, say nothing about other data, and are never "FID".
      weights: Inception's file.
      route: of Inception, "tf" or "pytorch_fid".
      size: of lite0, pixels a side.

    Raises:
      ValueError: the source cannot be opened, has no class labels, or a classifier cannot learn
        them; weights are missing.
    """
    if source == "lite0":
        return lite0_features(size)
    if source == "inception":
        return inception_features(weights, route)
    return _trained_on(open_source(source) if isinstance(source, str) else source)


# by name and content, so that one process trains once
_TRAINED: dict[tuple[str, str], TrainedFeatures] = {}


def _trained_on(source: Source) -> TrainedFeatures:
    """The space of a source's labels. No other images are read than those that it is trained on."""
    rng, labels = np.random.default_rng(0), source.labels
    if labels is None:  # not known before images are read
        found = source.take(some_rows(np.arange(len(source)), rng))
        images, labels = found["image"], found["label"]
        _check_labels(source, labels)
    else:
        _check_labels(source, labels)
        rows = some_rows(np.flatnonzero(labels >= 0), rng)
        images, labels = source.take(rows)["image"], labels[rows]
    name = f"fd_{short_name(source.name)}"
    content = hashlib.sha256(repr(images.shape).encode())
    content.update(np.ascontiguousarray(images).data)
    content.update(np.ascontiguousarray(labels).data)
    content.update(repr(source.class_names).encode())
    key = name, content.hexdigest()
    if key not in _TRAINED:
        trained = train_features(name, images, labels, rng)
        more = {"class_names": source.class_names, "trained_on": key[1]}
        _TRAINED[key] = dataclasses.replace(trained, **more)
    return _TRAINED[key]


def _check_labels(source: Source, labels: np.ndarray) -> None:
    if labels.ndim != 1 or np.max(labels, initial=-1) < 1:
        raise ValueError(
            f"{source.name}: no class labels; a trained feature space needs a source with two or "
            "more classes; expected such a one as --features (of ogdm evaluate and report), or "
            "lite0, or inception with --weights"
        )


def short_name(source: str) -> str:
    """The word for a source in a distance's name.

    digits -> digits, tfds:cifar10/train -> cifar10, npz:/data/emoji32.npz?base<1700 -> emoji32.
    """
    kind, separator, rest = source.partition(":")
    rest = rest.partition("?")[0] if separator else kind
    word = rest.split("/")[0] if kind == "tfds" else PurePath(rest).stem
    return re.sub(r"[^A-Za-z0-9_.-]", "_", word) or "source"


def weights_of(space: FeatureSpace) -> dict[str, Any]:
    """What a report says of a feature network's weights; nothing for a space without any."""
    if not isinstance(space, NetworkFeatures) or not space.weights_sha256:
        return {}
    return {"weights_sha256": space.weights_sha256, "weights_verified": space.verified}


def _extracted(space: FeatureSpace, data: Images | Features, name: str) -> np.ndarray:
    """Features [n, dim], in float64, of images or of what was extracted before."""
    data = np.asarray(data)
    if data.ndim == 4:
        if data.dtype != np.uint8 and not np.isfinite(data).all():
            raise ValueError(
                f"{name}: {which(~np.isfinite(data))} NaN or infinity; expected finite images."
            )
        check_range(data, name)
        data = space(to_uint8(data))
    elif data.ndim != 2:
        raise ValueError(
            f"{name}: shape {data.shape}; expected images [n, h, w, c] or their features [n, "
            f"{space.dim}]."
        )
    elif data.shape[1] != space.dim:
        raise ValueError(f"{name}: {data.shape[1]} features; {space.name} has {space.dim}.")
    return checked_features(data, name)


def _gaussian(x: np.ndarray) -> Gaussian:
    return Moments().update(x).finalize()


def over_floor(splits: Iterable[tuple[Gaussian, Gaussian, Gaussian]]) -> dict[str, float]:
    """The mean distances of samples to A ("fd") and of B to A ("floor") over splits (samples, A, B)
    and their ratio ("fd_over_floor").
    """
    pairs = [(frechet_distance(*s, *a), frechet_distance(*b, *a)) for s, a, b in splits]
    fd, floor = np.mean(pairs, axis=0).tolist()
    return {"fd": fd, "floor": floor, "fd_over_floor": fd / floor if floor > 0 else float("inf")}


def statistics_report(
    space: FeatureSpace, samples: Images | Features, reference: Statistics
) -> dict[str, Any]:
    """The Frechet distance to published moments, as in papers; no floor can be measured.

    Args:
      space: where distances are measured.
      samples: images [n,h,w,c] or features [n, dim].
      reference: the moments.

    Returns:
      {"features", "n_samples", "n_reference" (None where the file does not say), "fd_all",
      "floor": None}.

    Raises:
      ValueError: the statistics have another number of features, or say that they are of another
        feature space.
    """
    reference.require(space, "reference")
    moments = Moments().update(_extracted(space, samples, "samples"))
    if moments.count < 2:
        raise ValueError(f"samples: {moments.count} images; expected at least 2 for a covariance.")
    return {
        "features": space.name,
        "n_samples": moments.count,
        "n_reference": reference.count,
        "fd_all": frechet_distance(*moments.finalize(), reference.mu, reference.cov),
        "floor": None,
        **singular(space, moments.count),
    }


def distance_report(
    space: FeatureSpace,
    samples: Images | Features,
    reference: Shaped[np.ndarray, "m h w c"] | Num[Any, "m d"],
    k: int = 5,
    splits: int | None = None,
    seed: int = 0,
    paired: bool = False,
) -> dict[str, Any]:
    """Distances between samples and reference, with their numbers and what real images score.

    A Frechet distance falls with the number of images even for equal distributions, so it means
    something only beside the floor: the reference is split in random halves A and B, and with
    n = min(len(samples), len(reference) // 2)

        fd    = distance of n samples to n images of A, mean over `splits` random splits
        floor = distance of n images of B to the same n of A, mean over the same splits

    `fd` at `floor` is as good as real; clearly below it, the samples copy the reference. `fd_all`
    uses all samples and the whole reference, as papers do: smaller because of the larger numbers,
    and not comparable with `floor`. kid (unbiased) uses everything; kid_floor is B against A.
    precision, recall, density and coverage take n_neighbours images of either side of the first
    split, each with its floor (B against A).

    Args:
      space: where distances are measured.
      samples: images [n,h,w,c], uint8 or in [-1, 1], or features [n, dim].
      reference: the same of real images.
      k: neighbours of precision, recall, density and coverage.
      splits: None takes 4, or 1 above 512 features.
      seed: of the splits.
      paired: sample i was made of reference i, as a reconstruction is: the samples that are
        compared with A are those of B. Then `fd` is at `floor` where nothing was lost.

    Returns:
      {"features": name, "n", "n_samples", "n_reference", "fd", "floor", "fd_over_floor", "fd_all",
      "kid", "kid_floor", "n_neighbours", "precision", "precision_floor", ...}; plain numbers, and
      "singular" in words where n is no more than the number of features.

    Raises:
      ValueError: too few images, other shapes, or no split.
    """
    x, y = _extracted(space, reference, "reference"), _extracted(space, samples, "samples")
    n = min(len(y), len(x) // 2)
    if paired and len(x) != len(y):
        raise ValueError(f"samples: {len(y)} of {len(x)} images given; expected one of each")
    if n <= k:
        raise ValueError(
            f"samples, reference: {len(y)} and {len(x)} images; expected more than {k} and "
            f"{2 * k + 1} for {k} neighbours (--k)."
        )
    splits = default_splits(space) if splits is None else splits
    if splits < 1:
        raise ValueError(f"splits: {splits}; expected at least 1.")
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(splits):
        order, chosen = rng.permutation(len(x)), rng.permutation(len(y))[:n]
        a, b = order[:n], order[n : 2 * n]
        parts.append((b if paired else chosen, a, b))
    moments = ((_gaussian(y[rows]), _gaussian(x[a]), _gaussian(x[b])) for rows, a, b in parts)
    generated, a, b = y[parts[0][0]], x[parts[0][1]], x[parts[0][2]]
    result = {
        "features": space.name,
        "n": n,
        "n_samples": len(y),
        "n_reference": len(x),
        **over_floor(moments),
        "fd_all": frechet_distance(*_gaussian(y), *_gaussian(x)),
        "kid": kernel_distance(x, y),
        "kid_floor": kernel_distance(a, b),
        "n_neighbours": min(n, MOST_NEIGHBOURS),
        **singular(space, n),
    }
    a, b, generated = (part[:MOST_NEIGHBOURS] for part in (a, b, generated))
    for ending, part in (("", generated), ("_floor", b)):
        result |= {name + ending: value for name, value in manifolds(a, part, k).items()}
    return result


def singular(space: FeatureSpace, n: int) -> dict[str, str]:
    """What a report says where n images are too few for a covariance of full rank."""
    if n > space.dim:
        return {}
    text = f"{n} images for {space.dim} features: the covariance is singular, so compare at equal n"
    return {"singular": text}


def default_splits(space: FeatureSpace) -> int:
    """Random splits that a floor is the mean of: 4, or 1 where a Frechet distance takes long."""
    return 4 if space.dim <= 512 else 1
