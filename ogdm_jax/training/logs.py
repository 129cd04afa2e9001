"""Where numbers go: a line on the log, a JSON line in metrics.jsonl, TensorBoard events.

Only the lead process writes.
"""

import contextlib
import json
import math
import pathlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from ogdm_jax import places

UPLOAD = 10.0  # seconds between copies of the logs to a bucket, which cannot be appended to
_SHOWN = ("accuracy", "grad_norm", "learning_rate")  # on the log line, after the losses


class Interval:
    """Metrics and time of the steps of one log interval.

    Metrics stay on the device until they are asked for, so that no step waits for the host.
    """

    def __init__(self) -> None:
        self._steps: list[Mapping[str, jax.Array]] = []
        self._timed, self._began = 0, time.monotonic()

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
        return seconds

    def speed(self, step: int, batch: int) -> dict[str, float]:
        """{"kimg", "images_per_second"} after `step` steps of `batch` images; restarts."""
        images = self._timed * batch
        return {
            "kimg": step * batch / 1000,
            "images_per_second": images / max(self.restart(), 1e-9),
        }

    def bad_loss(self) -> tuple[str, float] | None:
        """Name and value of a loss that was not finite in this interval; waits for the device."""
        for metrics in self._steps:
            for name, value in metrics.items():
                if _is_loss(name) and not math.isfinite(float(np.asarray(value))):
                    return name, float(np.asarray(value))
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


def _is_loss(name: str) -> bool:
    return name.partition("/")[0] == "loss"


class Writer:
    """Writes numbers and pictures of a run. Use it in a `with`, or close it.

    A bucket's files grow on this machine; they are copied there every UPLOAD seconds and when the
    writer is closed.
    """

    def __init__(self, workdir: epath.Path, tensorboard: bool, lead: bool) -> None:
        """A process that does not lead writes nothing."""
        self._target, self._copied = workdir, time.monotonic()
        self._file = self._events = self._local = None
        if not lead:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        folder = pathlib.Path(workdir)
        if not places.is_local(workdir):
            self._local = tempfile.TemporaryDirectory()
            folder = pathlib.Path(self._local.name)
            if (workdir / "metrics.jsonl").exists():
                (workdir / "metrics.jsonl").copy(epath.Path(folder) / "metrics.jsonl")
        self._file = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 - closed by close()
        if tensorboard:
            from tensorboardX import SummaryWriter  # only where events are wanted

            self._events = SummaryWriter(str(folder / "events"), flush_secs=10)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the numbers of a step to metrics.jsonl and to TensorBoard."""
        if self._file is None:
            return
        # JSON has no nan and no inf.
        finite = {name: v if math.isfinite(v) else str(v) for name, v in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
        if time.monotonic() - self._copied > UPLOAD:
            self._copy()

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """A uint8 [h,w,c] picture for TensorBoard."""
        if self._events is not None:
            self._events.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Ends the files, and copies them to a bucket."""
        if self._events is not None:
            self._events.close()
        if self._file is not None:
            self._file.close()
        self._copy()
        if self._local is not None:
            self._local.cleanup()
        self._file = self._events = self._local = None

    def _copy(self) -> None:
        """Copies the files to a bucket, if they are meant for one."""
        self._copied = time.monotonic()
        if self._local is None:
            return
        if self._events is not None:
            self._events.flush()
        places.mirror(pathlib.Path(self._local.name), self._target)
        self._copied = time.monotonic()


def line(step: int, values: Mapping[str, float]) -> str:
    """One log line: step, kimg, images/s, then every loss and what _SHOWN names, where present."""
    head = (
        f"step {step}  {values.get('kimg', 0.0):.1f} kimg  "
        f"{values.get('images_per_second', 0.0):.0f} images/s"
    )
    names = [*filter(_is_loss, values), *(name for name in _SHOWN if name in values)]
    shown = [f"{name.replace('loss/', '')} {values[name]:.4g}" for name in names]
    bad = values.get("grad_nonfinite", 0.0)
    return "  ".join([head, *shown] + ([f"non-finite gradients {bad:.0f}"] if bad else []))
