"""A jax.profiler trace of some steps of a run, for TensorBoard or Perfetto.

train.py --profile FIRST,LAST
"""

import contextlib
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from ogdm_jax import places
from ogdm_jax.config import ConfigError

Steps = tuple[int, int]


def parse(text: str) -> Steps | None:
    """The first and the last step of "10,12", counted as the log counts them; None of "".

    Raises:
      ConfigError: not two numbers, from 1 upwards, in order.
    """
    if not text:
        return None
    numbers = re.fullmatch(r"(\d{1,12}),(\d{1,12})", text.replace(" ", ""))
    steps = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if not 1 <= steps[0] <= steps[1]:
        raise ConfigError(
            f"--profile: {text!r} given; expected FIRST,LAST with 1 <= FIRST <= LAST, such as 10,12"
        )
    return steps


def check(steps: Steps | None, total: int) -> None:
    """Raises ConfigError for steps that the run does not reach."""
    if steps and steps[1] > total:
        raise ConfigError(
            f"--profile: {steps[0]},{steps[1]} given; expected steps up to {total}, where the run "
            "ends"
        )


class Profiler:
    """Traces this process while it takes the steps, into workdir/profile. Use it in a `with`.

    Args:
      steps: the first and the last one; None: none.
      workdir: of the run.
      report: writes a line of the log.
    """

    def __init__(
        self, steps: Steps | None, workdir: epath.Path, report: Callable[[str], None]
    ) -> None:
        self._steps, self._target, self._report = steps, workdir / "profile", report
        self._on, self._open = False, contextlib.ExitStack()

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop()  # a run that is stopped between the steps keeps what it has

    def before(self, step: int) -> None:
        """Call it before the step that makes the count `step`."""
        if not self._steps or self._on or not self._steps[0] <= step <= self._steps[1]:
            return
        self._folder = pathlib.Path(self._target)
        if not places.is_local(self._target):
            self._folder = pathlib.Path(self._open.enter_context(tempfile.TemporaryDirectory()))
        jax.profiler.start_trace(str(self._folder))
        self._on = True

    def after(self, step: int, outputs: Any) -> None:
        """Call it after that step, with arrays that are ready when it has run."""
        if self._on and self._steps and step >= self._steps[1]:
            jax.block_until_ready(outputs)
            self._stop()
            self._report(f"profiled steps {self._steps[0]} to {self._steps[1]}: {self._target}")

    def skipped(self, start: int) -> None:
        """Reports that a resumed run starts behind the steps.

        It is no error: the same command must work after a pre-emption.
        """
        if self._steps and start >= self._steps[1]:
            self._report(
                f"--profile: steps {self._steps[0]} to {self._steps[1]} lie before step {start}; "
                "none is traced"
            )

    def _stop(self) -> None:
        if not self._on:
            return
        self._on = False
        jax.profiler.stop_trace()
        if not places.is_local(self._target):
            places.mirror(self._folder, self._target)
        self._open.close()
