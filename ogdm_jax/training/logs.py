"""Where numbers go: a line on the log, a JSON line in metrics.jsonl, TensorBoard events, a tracker.

Only the lead process writes.
"""

import contextlib
import json
import logging
import math
import pathlib
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from ogdm_jax import places, records, startup
from ogdm_jax.training import saving
from ogdm_jax.training.trackers import Tracker
from ogdm_jax.typing import PyTree

METRICS = "metrics.jsonl"
REPLACED = "metrics.replaced.jsonl"  # lines of steps that a resumed run makes again
SOON, LATE = 2.0, 8.0  # seconds of training after which its speed is told, and without a doubt
UPLOAD = 10.0  # seconds between copies of the logs to a bucket, which cannot be appended to,
_SELDOM = 50.0  # or so many times as long as the last one took: training waits for it
_LOG = logging.getLogger("ogdm_jax")
LEVELS = "level/"  # the loss by noise level: "level/LOW-HIGH"
_SHOWN = ("accuracy", "grad_norm", "learning_rate")  # on the log line, after the losses


class LogError(ValueError):
    """The log cannot be written; one sentence names the file."""


class Interval:
    """Metrics and time of the steps of one log interval.

    Metrics stay on the device until they are asked for, so that no step waits for the host.
    """

    def __init__(self) -> None:
        self._steps: list[Mapping[str, jax.Array]] = []
        self._began = time.monotonic()
        self.restart()

    def add(self, metrics: Mapping[str, jax.Array]) -> None:
        """Adds the metrics of one step."""
        self._steps.append(metrics)
        self._timed += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside does not count as time of training."""
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began

    def restart(self) -> float:
        """Measures the speed anew from here on; returns the seconds until now."""
        seconds = time.monotonic() - self._began
        self._timed, self._began = 0, time.monotonic()
        self._waited = (0, 0.0)  # steps and seconds at the last wait of first_speed
        return seconds

    def speed(self, step: int, batch: int) -> dict[str, float]:
        """{"kimg", "images_per_second"} after `step` steps of `batch` images; restarts."""
        images = self._timed * batch
        return {
            "kimg": step * batch / 1000,
            "images_per_second": images / max(self.restart(), 1e-9),
        }

    def first_speed(self, state: PyTree) -> tuple[int, int, float] | None:
        """(first, last, seconds a step) of the interval's newest steps, soon after it began; None
        at other times.

        Waits for the device after 1, 2, 4, 8, ... steps alone: the others are given out ahead, as
        ever. The time is that of the steps since the wait before, so that a slow first one does
        not count; from LATE on it does, where there is no other.

        Args:
          state: that came out of the newest step.
        """
        last = self._timed
        if last & (last - 1):
            return None
        jax.block_until_ready(state)
        seconds = time.monotonic() - self._began
        (first, before), self._waited = self._waited, (last, seconds)
        if seconds < (SOON if first else LATE):
            return None
        return first + 1, last, (seconds - before) / (last - first)

    def bad_loss(self) -> tuple[str, float, int] | None:
        """Name and value of the first loss that was not finite in this interval, and how many steps
        ago that was (0: the last one); waits for the device.
        """
        for number, metrics in enumerate(self._steps):
            for name, value in metrics.items():
                if _is_loss(name) and not math.isfinite(float(np.asarray(value))):
                    return name, float(np.asarray(value)), len(self._steps) - 1 - number
        return None

    def means(self) -> dict[str, float]:
        """Mean over the interval by name, and a fresh interval after it.

        Counts are summed. Steps in which a noise bin was empty (nan) are left out.
        """
        host = [{k: float(np.asarray(v)) for k, v in m.items()} for m in self._steps]
        self._steps = []
        found = {}
        for name in host[0] if host else ():
            values = np.array([m[name] for m in host])
            if name == "grad_nonfinite":
                found[name] = float(values.sum())
            elif _is_loss(name):
                found[name] = float(values.mean())  # a nan must show
            elif np.isfinite(values).any():
                found[name] = float(values[np.isfinite(values)].mean())
        return found


def level_of(name: str) -> tuple[float, float]:
    """(LOW, HIGH) of a metric's name "level/LOW-HIGH"; they may be such as 1e-05."""
    low, high = re.split(r"(?<!e)-", name.removeprefix(LEVELS))
    return float(low), float(high)


def _is_loss(name: str) -> bool:
    return name.partition("/")[0] == "loss"


class Writer(saving.Closing):
    """Writes numbers and pictures of a run. Use it in a `with`, or close it.

    A bucket's files grow on this machine; they are copied there every UPLOAD seconds, large ones
    more seldom, and when the writer is closed.
    """

    def __init__(
        self,
        workdir: epath.Path,
        tensorboard: bool,
        lead: bool,
        step: int | None = None,
        tracker: Tracker | None = None,
    ) -> None:
        """A process that does not lead writes nothing.

        Args:
          workdir: the training folder.
          tensorboard: whether events are written, too.
          lead: whether this process leads.
          step: where the run goes on; lines of later steps are moved to REPLACED.
          tracker: gets the numbers, too.
        """
        self._target, self._next = workdir, time.monotonic() + UPLOAD  # when it is copied
        self._file = None
        self._others: list[_Events | Tracker] = []
        self._open = contextlib.ExitStack()
        if not lead:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        self._folder = self._open.enter_context(places.stand_in(workdir))
        for name in (METRICS, REPLACED):
            if not places.is_local(workdir) and (workdir / name).exists():
                (workdir / name).copy(epath.Path(self._folder) / name)
        with self._told():
            if (self._folder / METRICS).exists():
                mend(self._folder / METRICS, step)
            self._file = self._open.enter_context(open(self._folder / METRICS, "a", buffering=1))
            events = _Events(self._folder / "events") if tensorboard else None
            self._others = [other for other in (events, tracker) if other is not None]
            for other in self._others:
                self._open.callback(other.close)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the numbers of a step to metrics.jsonl and to TensorBoard.

        Raises:
          LogError: it cannot be written.
        """
        if self._file is None:
            return
        with self._told():
            self._file.write(records.dumps({"step": step, **values}) + "\n")
            for other in self._others:
                other.write(step, values)
        if time.monotonic() > self._next and not places.is_local(self._target):
            self._copy()

    def _copy(self) -> None:
        """Copies the files to the bucket. They stay here, so that it may fail once."""
        began = time.monotonic()
        try:
            places.mirror(self._folder, self._target)
        except Exception as error:  # bucket libraries raise classes of their own
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            _LOG.warning(
                "the log is not copied to %s, and will be tried again (%s)", self._target, why
            )
        now = time.monotonic()
        self._next = now + max(UPLOAD, _SELDOM * (now - began))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """A uint8 [h,w,c] picture for TensorBoard and the tracker."""
        with self._told():
            for other in self._others:
                other.image(step, name, image)

    def close(self) -> None:
        """Ends the files, and copies them to a bucket. Raises LogError as `write`."""
        self._file, self._others = None, []
        with self._told():
            self._open.close()  # all of them, whatever fails

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Errors of the disk become one sentence with the place."""
        try:
            yield
        except OSError as error:
            place = OSError(error.errno, error.strerror, str(self._target))
            raise LogError(f"the log cannot be written: {startup.sentence_of(place)}") from error


class _Events:
    """TensorBoard's events, written in this thread: tensorboardX's own writer has another one, in
    which an error is a traceback and, later, a queue that nobody empties.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        from tensorboardX import event_file_writer, summary  # only where events are wanted

        folder.mkdir(parents=True, exist_ok=True)
        protocol: Any = event_file_writer.event_pb2  # its names are made at run time
        self._summary, self._event = summary, protocol.Event
        self._file = event_file_writer.EventsWriter(str(folder / "events"))
        self._file.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._add(step, self._summary.scalar(name, value))
        self._file.flush()

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._add(step, self._summary.image(name, image, dataformats="HWC"))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _add(self, step: int, part: Any) -> None:
        self._file.write_event(self._event(wall_time=time.time(), step=step, summary=part))


def mend(path: pathlib.Path, step: int | None = None) -> None:
    """Makes a metrics.jsonl whole that a killed run left: a torn last line is dropped, and lines of
    steps after `step`, which are made again, go to REPLACED beside it.
    """
    raw = path.read_bytes()
    kept, replaced = [], []
    for line in raw.splitlines():
        number = _step_of(line)
        if number is not None:
            (kept if step is None or number <= step else replaced).append(line)
    whole = b"".join(line + b"\n" for line in kept)
    if replaced:
        with open(path.with_name(REPLACED), "ab") as file:
            file.writelines(line + b"\n" for line in replaced)
    if whole != raw:
        with places.written(epath.Path(path)) as new:
            new.write_bytes(whole)


def _step_of(line: bytes) -> int | None:
    """The step of a line of metrics.jsonl; None where it is torn."""
    try:
        number = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return number if isinstance(number, int) else None


def line(step: int, values: Mapping[str, float], left: float | None = None) -> str:
    """One log line: step, kimg, images/s, then every loss and what _SHOWN names, where present, the
    loss by noise level from the lowest up, and how many seconds are `left`.
    """
    head = (
        f"step {step}  {values.get('kimg', 0.0):.1f} kimg  "
        f"{values.get('images_per_second', 0.0):.0f} images/s"
    )
    names = [*filter(_is_loss, values), *(name for name in _SHOWN if name in values)]
    shown = [f"{name.replace('loss/', '')} {values[name]:.4g}" for name in names]
    bins = sorted((name for name in values if name.startswith(LEVELS)), key=level_of)
    levels = [f"{values[name]:.3g}" for name in bins]
    shown += ["by level " + "/".join(levels)] if levels else []
    bad = values.get("grad_nonfinite", 0.0)
    shown += [f"non-finite gradients {bad:.0f}"] if bad else []
    return "  ".join([head, *shown] + ([f"{duration(left)} left"] if left and left >= 1 else []))


def duration(seconds: float) -> str:
    """A time in words: "40 s", "12 min", "3 h 20 min", "2 d 5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
