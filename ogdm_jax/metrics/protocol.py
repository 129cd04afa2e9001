"""Whole measurements: of a set of images, and of EDM's three sets while they are drawn.

EDM (arXiv 2206.00364, appendix F.1) draws 50,000 images three times, from seeds 0-49999,
50000-99999 and 100000-149999, and reports the smallest of the three distances to the whole training
set. No more than one batch of images is in memory.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ogdm_jax.brief import brief
from ogdm_jax.data import Source
from ogdm_jax.metrics import features
from ogdm_jax.metrics.distances import Moments, frechet_distance, inception_score, psnr, ssim
from ogdm_jax.metrics.features import Gaussian
from ogdm_jax.metrics.networks import NetworkFeatures
from ogdm_jax.metrics.statistics import Statistics
from ogdm_jax.metrics.trained import TrainedFeatures


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """What samples are compared with.

    Attributes:
      whole: the Gaussian (mean, covariance) of all real images.
      count: of the real images; None where published statistics do not say.
      n: images of each half.
      halves: Gaussians of two disjoint halves (A, B) of n real images, for each random split.
    """

    whole: Gaussian
    count: int | None
    n: int = 0
    halves: Sequence[tuple[Gaussian, Gaussian]] = ()
    __repr__ = brief


def seed_ranges(num: int, ranges: int, first: int = 0) -> list[range]:
    """[first..first + num - 1], and so many more of the same length behind it.

    Raises:
      ValueError: an empty range, or seeds beyond 32 bits.
    """
    if num < 2 or ranges < 1 or first < 0 or first + num * ranges > 2**32:
        raise ValueError(
            f"--num, --ranges, --first: {num}, {ranges}, {first} given; expected at least 2, 1 "
            "and 0, and seeds below 2^32"
        )
    return [range(first + i * num, first + (i + 1) * num) for i in range(ranges)]


def of_statistics(space: features.FeatureSpace, published: Statistics) -> Reference:
    """Published moments as a reference: nothing to split, so no floor.

    Raises:
      ValueError: they are of another feature space.
    """
    published.require(space, "--reference")
    return Reference((published.mu, published.cov), published.count)


def of_source(
    space: features.FeatureSpace,
    source: Source,
    num: int,
    splits: int | None = None,
    seed: int = 0,
    batch: int = 4096,
) -> Reference:
    """Reads a source once as a reference.

    Args:
      space: where distances are measured.
      source: of the real images.
      num: images of a set of samples; n is this number, or half of the source.
      splits: None takes `default_splits`.
      seed: of the splits.
      batch: images in memory at a time.

    Raises:
      ValueError: fewer than four images.
    """
    n = min(num, len(source) // 2)
    if n < 2:
        raise ValueError(
            f"--reference: {source.name} has {len(source)} images; expected at least 4 for a floor"
        )
    splits = features.default_splits(space) if splits is None else splits
    rng = np.random.default_rng(seed)
    # at[i] is where image i comes in a split: below n in A, below 2 n in B
    splitting = [np.argsort(rng.permutation(len(source))) for _ in range(splits)]
    whole, pairs = Moments(), [(Moments(), Moments()) for _ in range(splits)]
    for start in range(0, len(source), batch):
        rows = np.arange(start, min(start + batch, len(source)))
        values = space(source.take(rows)["image"])
        whole.update(values)
        for at, (a, b) in zip(splitting, pairs, strict=True):
            a.update(values[at[rows] < n])
            b.update(values[(at[rows] >= n) & (at[rows] < 2 * n)])
    halves = [(a.finalize(), b.finalize()) for a, b in pairs]
    return Reference(whole.finalize(), len(source), n, halves)


def score(
    space: features.FeatureSpace, batches: Iterable[np.ndarray], reference: Reference
) -> dict[str, Any]:
    """The distances of one set of images.

    Args:
      space: where distances are measured.
      batches: of uint8 images, taken one by one and forgotten.
      reference: what they are compared with.

    Returns:
      {"n_samples", "n_reference", "fd_all", "n", "fd", "floor", "fd_over_floor"}: fd_all of all
      samples against the whole reference; fd of the first n samples against n real images (mean
      over the splits) and floor of n other real images against the same ones; the last four are
      None against published statistics.
    """
    everything, first = Moments(), Moments()
    for images in batches:
        values = space(images)
        first.update(values[: max(0, reference.n - everything.count)])
        everything.update(values)
    result: dict[str, Any] = {
        "n_samples": everything.count,
        "n_reference": reference.count,
        "fd_all": frechet_distance(*everything.finalize(), *reference.whole),
    }
    result |= dict.fromkeys(("n", "fd", "floor", "fd_over_floor"))
    if reference.halves:
        samples = first.finalize()
        splits = [(samples, a, b) for a, b in reference.halves]
        result |= {"n": first.count} | features.over_floor(splits)
    return result | features.singular(space, min(everything.count, reference.n or everything.count))


def score_ranges(
    space: features.FeatureSpace,
    reference: Reference,
    ranges: Sequence[range],
    draw: Callable[[range, str], Iterable[np.ndarray]],
    tell: Callable[[str], None],
    finished: Sequence[dict[str, Any]] = (),
    keep: Callable[[Sequence[dict[str, Any]]], None] = lambda sets: None,
) -> dict[str, Any]:
    """Draws and measures one set of images for each range of seeds.

    Args:
      space: where distances are measured.
      reference: what the sets are compared with.
      ranges: of seeds, see `seed_ranges`.
      draw: (seeds, title) -> batches of uint8 images.
      tell: hears the distance of each of several sets.
      finished: sets that were measured before, the first ones.
      keep: gets all sets that are measured, after each.

    Returns:
      As `smallest`.
    """
    sets = list(finished)
    for seeds in ranges[len(sets) :]:
        name = f"{seeds[0]}-{seeds[-1]}"
        sets.append({"seeds": name} | score(space, draw(seeds, f"seeds {name}"), reference))
        if len(ranges) > 1:
            tell(f"seeds {name}: {space.name} {sets[-1]['fd_all']:.4f}")
        keep(sets)
    return smallest(space, sets)


def smallest(space: features.FeatureSpace, sets: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The smallest fd_all as "fd_all_min", with what was measured beside it, and all "sets".

    What published statistics cannot tell is None.
    """
    # a NaN is the smallest: it must show
    best = min(sets, key=lambda report: (not math.isnan(report["fd_all"]), report["fd_all"]))
    keys = ("n_samples", "n_reference", "n", "fd", "floor", "fd_over_floor")
    figure = {"features": space.name, "fd_all_min": best["fd_all"]}
    figure |= {key: best[key] for key in ("nfe", "nfe_range") if key in best}  # of dopri5
    return figure | {key: best.get(key) for key in keys} | {"sets": list(sets)}


def score_set(
    space: TrainedFeatures | NetworkFeatures,
    samples: Mapping[str, np.ndarray],
    reference: Statistics | np.ndarray,
    k: int = 5,
    seed: int = 0,
    class_names: Sequence[str] = (),
) -> tuple[dict[str, Any], Moments]:
    """The report of a set of images in memory, and the moments of its features.

    Beside the distances it has the Inception score (of ten random parts) in Inception's own space,
    and in the space of a trained classifier the share of samples whose label is the classifier's:
    "label_agreement", None with "labels" in words where the classifier does not know their classes.

    Args:
      space: where distances are measured.
      samples: {"image": uint8 [n,h,w,c], "label": int [n], -1 for none}.
      reference: published moments, or features [n, dim] of real images.
      k: neighbours of precision, recall, density and coverage.
      seed: of the splits.
      class_names: of the samples' labels, where known.

    Raises:
      ValueError: too few images, or moments of another feature space.
    """
    values, probabilities = space.both(samples["image"])
    if isinstance(reference, Statistics):
        result = features.statistics_report(space, values, reference)
    else:
        result = features.distance_report(space, values, reference, k, seed=seed)
    labels = samples["label"]
    if isinstance(space, TrainedFeatures):
        if labels.ndim == 1 and (labels >= 0).all():
            result |= _agreement(space, probabilities, labels, class_names)
    elif space.name.startswith("fid"):
        # folders come class by class: a split in that order would hold one class
        order = np.random.default_rng(seed).permutation(len(values))
        mean, spread = inception_score(probabilities[order], min(10, len(values)))
        result |= {"inception_score": mean, "inception_score_std": spread}
    return result, Moments().update(values)


def _agreement(
    space: TrainedFeatures, probabilities: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> dict[str, Any]:
    """The share of labels [n] that the classifier sees. Classes are matched by name where both
    sides have names, else by number.
    """
    if names and space.class_names:
        number = {name: k for k, name in enumerate(space.class_names)}
        labels = np.array([number.get(name, -1) for name in names])[labels]
    unknown = ~np.isin(labels, space.classes)
    if unknown.any():
        words = f"{unknown.sum()} of {len(labels)} samples have classes that {space.name} has not"
        return {"label_agreement": None, "labels": words}
    return {"label_agreement": float((space.classes[probabilities.argmax(1)] == labels).mean())}


def repeats(samples: np.ndarray, reference: np.ndarray | None = None) -> dict[str, int]:
    """How many samples are copies, where there are any: "copies" of reference images, bit by bit,
    and "repeated", equal to a sample before them.
    """
    digest = lambda images: [hashlib.sha256(image.tobytes()).digest() for image in images]
    own = digest(samples)
    found = {"repeated": len(own) - len(set(own))}
    if reference is not None and reference.shape[1:] == samples.shape[1:]:
        real = set(digest(reference))
        found["copies"] = sum(one in real for one in own)
    return {name: count for name, count in found.items() if count}


def paired(samples: np.ndarray, reference: np.ndarray) -> dict[str, float | int | None]:
    """Mean PSNR and SSIM of uint8 image i against image i.

    The PSNR of equal images is infinite: they are left out of the mean (None without any other) and
    counted as "identical". SSIM needs 11 pixels a side (else None).

    Raises:
      ValueError: the shapes differ.
    """
    if samples.shape != reference.shape:
        raise ValueError(
            f"--paired: {samples.shape} samples, {reference.shape} references; expected equal "
            "shapes"
        )
    decibels = np.atleast_1d(psnr(samples, reference))
    different = decibels[~np.isposinf(decibels)]
    return {
        "psnr": float(different.mean()) if different.size else None,
        "identical": len(decibels) - len(different),
        "ssim": float(ssim(samples, reference).mean()) if min(samples.shape[1:3]) >= 11 else None,
    }
