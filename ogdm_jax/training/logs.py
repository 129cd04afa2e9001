"""Where numbers go: one line on the log, one JSON line in metrics.jsonl, TensorBoard events. Lead
process only.
"""

import json
import math
import pathlib
import tempfile
import time
from collections.abc import Mapping

import numpy as np
from etils import epath

from ogdm_jax import places

UPLOAD = 10.0  # seconds between copies of the logs to a bucket, which cannot be appended to

# Shown on the log line, in this order, where present; everything else is in the files.
_LINE = ("loss", "loss/denoise", "loss/ogdm", "loss/ogdm_companion", "loss/sp", "accuracy")
_LINE += ("grad_norm", "learning_rate")


class Interval:
    """Collects the metrics of the steps of one log interval on the device, so that no step waits
    for the host.
    """

    def __init__(self):
        self._steps: list[Mapping] = []

    def add(self, metrics: Mapping) -> None:
        self._steps.append(metrics)

    def bad_loss(self) -> tuple[str, float] | None:
        """Name and value of a loss that was not finite in this interval; waits for the device."""
        for metrics in self._steps:
            for name, value in metrics.items():
                if name.split("/")[0] == "loss" and not math.isfinite(float(np.asarray(value))):
                    return name, float(np.asarray(value))
        return None

    def means(self) -> dict[str, float]:
        """Mean over the interval by name (counts are summed), ignoring steps in which a noise bin
        was empty.
        """
        host = [{k: float(np.asarray(v)) for k, v in m.items()} for m in self._steps]
        self._steps = []
        out = {}
        for name in host[0] if host else ():
            values = np.array([m[name] for m in host])
            if name == "grad_nonfinite":
                out[name] = float(values.sum())
            elif name == "loss" or name.startswith("loss/"):
                out[name] = float(values.mean())  # a nan must show
            elif np.isfinite(values).any():
                out[name] = float(values[np.isfinite(values)].mean())
        return out


class Writer:
    """Writes one interval's numbers. Use it in a `with`, or close it.

    For a bucket, files grow on this machine and are copied there every UPLOAD seconds and at the
    end.
    """

    def __init__(self, workdir: epath.Path, tensorboard: bool, lead: bool):
        self._file = self._events = self._local = None
        if not lead:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        folder = pathlib.Path(workdir)
        if not places.is_local(workdir):
            self._local, self._target, self._copied = (
                tempfile.TemporaryDirectory(),
                workdir,
                time.monotonic(),
            )
            folder = pathlib.Path(self._local.name)
            if (workdir / "metrics.jsonl").exists():
                (workdir / "metrics.jsonl").copy(epath.Path(folder) / "metrics.jsonl")
        self._file = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 - closed by close()
        if tensorboard:
            from tensorboardX import SummaryWriter  # only where events are wanted

            self._events = SummaryWriter(str(folder / "events"), flush_secs=10)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._file is None:
            return
        finite = {
            k: v if math.isfinite(v) else str(v) for k, v in values.items()
        }  # JSON has no nan
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
        if self._local is not None and time.monotonic() - self._copied > UPLOAD:
            self._copy()

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """A uint8 [h,w,c] picture for TensorBoard."""
        if self._events is not None:
            self._events.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
        if self._file is not None:
            self._file.close()
        if self._local is not None:
            self._copy()
            self._local.cleanup()
        self._file = self._events = self._local = None

    def _copy(self) -> None:
        if self._events is not None:
            self._events.flush()
        places.mirror(pathlib.Path(self._local.name), self._target)
        self._copied = time.monotonic()


def line(step: int, values: Mapping[str, float]) -> str:
    """One log line: step, kimg, images/s, then the losses."""
    head = (
        f"step {step}  {values.get('kimg', 0.0):.1f} kimg  "
        f"{values.get('images_per_second', 0.0):.0f} images/s"
    )
    shown = [f"{name.replace('loss/', '')} {values[name]:.4g}" for name in _LINE if name in values]
    bad = values.get("grad_nonfinite", 0.0)
    return "  ".join([head, *shown] + ([f"non-finite gradients {bad:.0f}"] if bad else []))
