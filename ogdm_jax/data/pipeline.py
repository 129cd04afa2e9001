"""Endless training batches whose order depends on the seed and the step alone.

Global position p of the endless stream lies in epoch p // N, and every epoch has its own
permutation, drawn from (seed, epoch). Step s of global batch size B takes positions s*B .. (s+1)*B
- 1, of which each process reads its contiguous share. Reference images besides the batch are drawn
from (seed, step) alone. Nothing is carried from step to step: a resumed run, or one on another
number of processes, sees exactly the same global batches, whether the set is in memory or read from
disk.
"""

import dataclasses
import functools
import zlib
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np

from ogdm_jax.data.base import Source
from ogdm_jax.data.workers import Workers, default_count

_STEPS = 2**40  # the length that the endless stream of steps has for grain
_LEAST = {  # of the settings of batches
    "batch_size": 1,
    "extra_references": 0,
    "mates": 0,
    "threads": 1,
    "seed": 0,
    "start_step": 0,
    "process_count": 1,
}


@runtime_checkable
class _ReadAhead(Protocol):
    """Batches of consecutive steps, read before they are asked for."""

    def __next__(self) -> dict[str, np.ndarray]: ...

    def close(self) -> None: ...


def indices(n: int, size: int, seed: int, step: int) -> np.ndarray:
    """Rows [size] int64 of a set of n that step `step` uses.

    Each epoch is a fresh permutation, without repeats.

    Raises:
      ValueError: n or size below 1, or a negative seed or step.
    """
    _check_least("indices", n=(n, 1), size=(size, 1), seed=(seed, 0), step=(step, 0))
    position, stop = step * size, (step + 1) * size
    pieces: list[np.ndarray] = []
    while position < stop:
        epoch, offset = divmod(position, n)
        pieces.append(_permutation(n, seed, epoch)[offset : offset + stop - position])
        position += len(pieces[-1])
    return np.concatenate(pieces)


def _check_least(who: str, **numbers: tuple[int, int]) -> None:
    """Raises ValueError for the first of the numbers, each with its least value, below that."""
    for what, (value, least) in numbers.items():
        if value < least:
            raise ValueError(f"{who}: {what} is {value}; expected an integer >= {least}")


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.default_rng((seed, epoch)).permutation(n)
    order.flags.writeable = False
    return order


def reference_indices(n: int, size: int, seed: int, step: int, batch: np.ndarray) -> np.ndarray:
    """Rows [size] int64 of images besides those of a step's batch, drawn without replacement.

    So a batch's image meets itself among the references exactly once: as itself. Where the set has
    fewer than `size` other images, their random order is repeated, for several devices: any run of
    as many neighbours as there are others is still without repeats, and who asks for references
    sees to it that a device's share is no longer than that.

    Args:
      n: images of the set.
      size: images to draw.
      seed: of the run.
      step: together with seed and n, it determines the draw.
      batch: rows of the step's global batch.

    Raises:
      ValueError: the batch holds the whole set.
    """
    own = np.unique(batch)
    others = n - len(own)
    if others < 1:
        raise ValueError(
            f"reference_indices: the batch holds all {n} images; expected a smaller batch, or size "
            "0"
        )
    rng = np.random.default_rng((seed, step, zlib.crc32(b"references")))
    rank = rng.choice(others, min(size, others), replace=False)
    # The r-th row that is not in `own`: r and the number of own rows in front of it.
    rows = rank + np.searchsorted(own - np.arange(len(own)), rank, side="right")
    return np.resize(rows, size)


def mate_indices(
    labels: np.ndarray, order: np.ndarray, rows: np.ndarray, size: int, seed: int, step: int
) -> np.ndarray:
    """Rows [len(rows), size] int64: for each image independent draws from those of its label.

    Args:
      labels: int [N] of the set.
      order: argsort of them, stable.
      rows: of the step's global batch.
      size: draws for each.
      seed: of the run.
      step: together with seed, it determines the draws.
    """
    rng = np.random.default_rng((seed, step, zlib.crc32(b"mates")))
    first, stop = (
        np.searchsorted(labels, labels[rows], s, sorter=order) for s in ("left", "right")
    )
    return order[rng.integers(first[:, None], stop[:, None], (len(rows), size))]


@dataclasses.dataclass(eq=False)
class Batches:
    """An endless iterator of one process's share of the global batches.

    Every item: "image" uint8 [b,H,W,C], "label" int32 [b] (-1 = no class) or float32 [b,k], "index"
    int32 [b] (the example's place in the step's global batch), b = batch_size / process_count. With
    extra_references = n also "reference" uint8 [n / process_count,H,W,C] and "reference_label":
    this process's share of n more images, none of them in the step's global batch and none twice
    (`reference_indices` says what small sets allow). With mates = m also "mates" uint8 [b,m,H,W,C]:
    for each image so many of its class (`mate_indices`). Sets of latents have items as they are
    stored in the place of images, and "row" int32 [b], their rows in the set. Labels that are
    tokens of captions are int32 [b,M], and "empty" [b,M] has those of the empty one in every row.

    Sets on disk are read ahead by grain's threads, or by processes (`workers`). `get_state()` is
    {"step": the next step} in every case, the same in every process and for every process count;
    `set_state` takes it back. `at(step)` is the batch of any step.

    Attributes:
      source: from open_source.
      batch_size: of the global batch, over all processes.
      seed: of the order; not negative.
      start_step: the first step, for a resumed run.
      process_index: which process this is, as jax.process_index().
      process_count: how many there are, as jax.process_count().
      extra_references: images per step, over all processes, besides the batch: a reference batch;
        0 for none.
      threads: batches that are read at once where the source is not in memory.
      workers: processes that do so instead of threads; 0 for threads, -1 for half of the cores (1
        to 8).
      mates: images of its own class with each image, where the set's labels are known; 0 for none.

    Raises:
      ValueError: a size below 1, or one that the process count does not divide.
    """

    source: Source
    batch_size: int
    seed: int
    start_step: int = 0
    process_index: int = 0
    process_count: int = 1
    extra_references: int = 0
    threads: int = 8
    workers: int = 0
    mates: int = 0

    def __post_init__(self) -> None:
        settings = {what: (getattr(self, what), least) for what, least in _LEAST.items()}
        _check_least("batches", **settings)
        if self.workers < -1:
            raise ValueError(
                f"batches: workers is {self.workers}; expected a number of processes, 0 for "
                "threads, or -1"
            )
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(
                f"batches: process_index is {self.process_index}; expected 0 to "
                f"{self.process_count - 1}"
            )
        for what in ("batch_size", "extra_references"):
            value = getattr(self, what)
            if value % self.process_count:
                raise ValueError(
                    f"batches: {what} is {value}; expected a multiple of the {self.process_count} "
                    "processes"
                )
        if self.workers < 0:
            self.workers = default_count()
        self._step = self.start_step
        self._ahead: _ReadAhead | None = None

    def at(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step, read now."""
        rows = indices(len(self.source), self.batch_size, self.seed, step)
        batch = self.source.take(self._share(rows))
        batch["index"] = self._share(np.arange(self.batch_size, dtype=np.int32))
        if self.source.latents is not None:
            batch["row"] = self._share(rows.astype(np.int32))
        if self.source.empty is not None:
            batch["empty"] = np.resize(self.source.empty, batch["label"].shape)
        if self.extra_references:
            size = self.extra_references
            others = reference_indices(len(self.source), size, self.seed, step, rows)
            reference = self.source.take(self._share(others))
            batch |= {"reference": reference["image"], "reference_label": reference["label"]}
        if self.mates:
            labels = np.asarray(self.source.labels)
            others = mate_indices(labels, self._order, rows, self.mates, self.seed, step)
            mates = self.source.take(self._share(others).reshape(-1))["image"]
            batch["mates"] = mates.reshape(-1, self.mates, *self.source.item_shape)
        return batch

    @functools.cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(np.asarray(self.source.labels), kind="stable")

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self.source.in_memory:
            batch = self.at(self._step)
        else:
            try:
                if self._ahead is None:
                    self._ahead = _read_ahead(self, self._step)
                batch = self._with_tokens(next(self._ahead))
            except BaseException:
                self.close()  # the next call, after an error or Ctrl-C, reads this step again
                raise
        self._step += 1
        return batch

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_ahead": None}

    def _for_a_process(self) -> "Batches":
        """What a reading process gets: without the captions of all images, and without their tokens
        where each image's own, which `_with_tokens` puts in, are all that is needed.
        """
        source = dataclasses.replace(self.source, captions=())
        if source.empty is not None and not (self.extra_references or self.mates):
            source = dataclasses.replace(source, labels=None, empty=None)
        return dataclasses.replace(self, source=source)

    def _with_tokens(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self.source.empty is None or "empty" in batch:
            return batch
        assert self.source.labels is not None  # tokens
        label = self.source.labels[batch["row"]]
        return batch | {"label": label, "empty": np.resize(self.source.empty, label.shape)}

    def get_state(self) -> dict[str, int]:
        """{"step": the step that the next item belongs to}: plain JSON, for the checkpoint."""
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues at state["step"]."""
        step = state.get("step") if isinstance(state, dict) else None
        if not isinstance(step, (int, np.integer)) or step < 0:
            raise ValueError(f"batches: state is {state!r}; expected {{'step': an integer >= 0}}")
        self.close()
        self._step = int(step)

    def close(self) -> None:
        """Ends the threads or processes that read ahead; the next `next` starts them again."""
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = None

    def _share(self, values: np.ndarray) -> np.ndarray:
        size = len(values) // self.process_count
        return values[self.process_index * size : (self.process_index + 1) * size]


batches = Batches  # a function by this name is what people call


def in_order(source: Source, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """The whole set once, in its own order, batch_size rows at a time, the last batch shorter.

    Yields:
      {"image": uint8 [b,H,W,C], "label": int32 [b] or float32 [b,k]}.

    Raises:
      ValueError: batch_size below 1.
    """
    _check_least("in_order", batch_size=(batch_size, 1))
    for start in range(0, len(source), batch_size):
        yield source.take(np.arange(start, min(start + batch_size, len(source))))


def _read_ahead(owner: Batches, step: int) -> _ReadAhead:
    """Batches from `step` on, read by processes or by grain's threads, at most 2 of each ahead."""
    if owner.workers:
        return Workers(owner._for_a_process(), step, owner.workers)
    import grain  # only here: the processes that read images, and sets in memory, need none of it

    options = grain.ReadOptions(num_threads=owner.threads, prefetch_buffer_size=2 * owner.threads)
    iterator = iter(grain.MapDataset.range(_STEPS).map(owner.at).to_iter_dataset(options))
    iterator.set_state({"next_index": step})
    return iterator
