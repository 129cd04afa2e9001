"""Distances of streams of images: EDM's protocol with no more than one batch of images in memory.

EDM (arXiv 2206.00364, appendix F.1) draws 50,000 images three times, from seeds 0-49999,
50000-99999 and 100000-149999, and reports the smallest of the three distances to the whole training
set.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ogdm_jax.data import Source
from ogdm_jax.metrics.distances import Moments, frechet_distance
from ogdm_jax.metrics.features import FeatureSpace
from ogdm_jax.metrics.statistics import Statistics

Gaussian = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """The Gaussian of the real images; for the floor, those of n images twice, in each of some
    random splits.

    count: of the real images, None where published statistics do not say.   halves: ((A, B), ...),
      both of n images.
    """

    whole: Gaussian
    count: int | None
    n: int = 0
    halves: Sequence[tuple[Gaussian, Gaussian]] = ()


def seed_ranges(num: int, ranges: int, first: int = 0) -> list[range]:
    """[0..num-1], [num..2 num - 1], ...; raises ValueError where there is nothing, or seeds go
    beyond 32 bits.
    """
    if num < 2 or ranges < 1 or first < 0 or first + num * ranges > 2**32:
        given = f"{num}, {ranges}, {first}"
        raise ValueError(
            f"--num, --ranges, --first: {given} given; expected at least 2, 1 and 0, and seeds "
            "below 2^32"
        )
    return [range(first + i * num, first + (i + 1) * num) for i in range(ranges)]


def of_statistics(space: FeatureSpace, published: Statistics) -> Reference:
    """Published moments: nothing to split, so no floor. Raises ValueError where they are of another
    feature space.
    """
    published.require(space, "--reference")
    return Reference((published.mu, published.cov), published.count)


def of_source(
    space: FeatureSpace,
    source: Source,
    num: int,
    splits: int | None = None,
    seed: int = 0,
    batch: int = 4096,
) -> Reference:
    """Reads a source once, `batch` images at a time. n = min(num, half of the source); splits: 4,
    or 1 above 512 dims.

    Raises:
      ValueError: fewer than four images.
    """
    n = min(num, len(source) // 2)
    if n < 2:
        raise ValueError(
            f"--reference: {source.name} has {len(source)} images; expected at least 4 for a floor"
        )
    splits = (4 if space.dim <= 512 else 1) if splits is None else splits
    rng = np.random.default_rng(seed)
    places = [
        np.argsort(rng.permutation(len(source))) for _ in range(splits)
    ]  # place[i]: where image i comes
    whole, pairs = Moments(), [(Moments(), Moments()) for _ in range(splits)]
    for start in range(0, len(source), batch):
        rows = np.arange(start, min(start + batch, len(source)))
        values = space(source.take(rows)["image"])
        whole.update(values)
        for place, (a, b) in zip(places, pairs, strict=True):
            a.update(values[place[rows] < n])
            b.update(values[(place[rows] >= n) & (place[rows] < 2 * n)])
    halves = [(a.finalize(), b.finalize()) for a, b in pairs]
    return Reference(whole.finalize(), len(source), n, halves)


def score(
    space: FeatureSpace, batches: Iterable[np.ndarray], reference: Reference
) -> dict[str, Any]:
    """One set's distances; `batches` of uint8 images are taken one by one and forgotten.

    Returns:
      {"n_samples", "n_reference", "fd_all", "n", "fd", "floor", "fd_over_floor"}: fd_all of all
      samples against the whole reference; fd of the first n samples against n real images (mean
      over the splits) and floor of n other real images against the same ones; the last four None
      against published statistics.
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
        mine = first.finalize()
        fd = float(np.mean([frechet_distance(*mine, *a) for a, _ in reference.halves]))
        floor = float(np.mean([frechet_distance(*b, *a) for a, b in reference.halves]))
        ratio = fd / floor if floor > 0 else float("inf")
        result |= {"n": first.count, "fd": fd, "floor": floor, "fd_over_floor": ratio}
    return result


def smallest(space: FeatureSpace, sets: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The protocol's figure with its conditions (None where a set has none), and every set's beside
    it.
    """
    best = min(sets, key=lambda report: report["fd_all"])
    keys = ("n_samples", "n_reference", "n", "fd", "floor", "fd_over_floor")
    figure = {"features": space.name, "fd_all_min": best["fd_all"]} | {
        key: best.get(key) for key in keys
    }
    return figure | {"sets": list(sets)}
