"""Batches of a discriminator, half real and half generated, and the images that are held out."""

import dataclasses

import numpy as np

from ogdm_jax import data
from ogdm_jax.data import Rows, Source
from ogdm_jax.latents import Latents


def split(source: Source, share: float) -> tuple[Source, Source]:
    """(kept, held out): a random division that is the same whatever the run's seed."""
    rows = np.random.default_rng(0).permutation(len(source))
    count = round(share * len(source))
    return _subset(source, np.sort(rows[count:])), _subset(source, np.sort(rows[:count]))


def _subset(source: Source, rows: np.ndarray) -> Source:
    labels = None if source.labels is None else source.labels[rows]
    if source.images is not None:
        return dataclasses.replace(source, images=source.images[rows], labels=labels)
    assert source.reader is not None, "a source has images or a reader"
    return dataclasses.replace(source, labels=labels, reader=Rows(source.reader, rows))


class Pairs:
    """Endless batches of real and generated images in turn, as `paired` makes them.

    Each side runs through permutations of its own; a resumed run goes on exactly where it stopped.
    """

    def __init__(
        self,
        real: Source,
        generated: Source,
        batch: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        workers: int = 0,
    ) -> None:
        """Arguments are those of `data.batches`; half of the batch comes from either source."""
        how = {"process_index": process_index, "process_count": process_count, "workers": workers}
        self._real = data.batches(real, batch // 2, seed, **how)
        self._generated = data.batches(generated, batch // 2, seed + 2**32, **how)
        self._latents = real.latents

    def __next__(self) -> dict[str, np.ndarray]:
        return paired(next(self._real), next(self._generated), self._latents)

    def get_state(self) -> dict[str, int]:
        """{"step": the next step}."""
        return self._real.get_state()

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on from a step that `get_state` gave."""
        self._real.set_state(state)
        self._generated.set_state(state)


def paired(
    real: dict[str, np.ndarray], generated: dict[str, np.ndarray], latents: Latents | None = None
) -> dict[str, np.ndarray]:
    """Two batches of n images as one of 2n in turn: every device and round gets half of either.

    Args:
      real, generated: batches of `data.batches`.
      latents: what the real images are, where they are no pixels; generated ones are samples.

    Returns:
      {"image", "label", "index"} as in a denoiser's batch, and "real" int32 [2n], 1 or 0.
    """
    found = {}
    if latents is not None:
        generated = generated | {"image": latents.item_of(generated["image"][:, 0])}
    for name in ("image", "label"):
        both = np.stack([real[name], generated[name]], axis=1)
        found[name] = both.reshape(-1, *real[name].shape[1:])
    index = real["index"]
    found["index"] = np.stack([2 * index, 2 * index + 1], axis=1).reshape(-1)
    found["real"] = np.tile(np.array([1, 0], np.int32), len(index))
    return found
