"""A jax.profiler trace of some steps of a run (train.py --profile FIRST,LAST), for TensorBoard or
Perfetto.
"""

import contextlib
import re
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from ogdm_jax import places
from ogdm_jax.config import ConfigError, require

Steps = tuple[int, int]


def parse(text: str) -> Steps | None:
    """The (first, last) step of FIRST,LAST such as "10,12", counted as on the log; None of "".

    Raises:
      ConfigError: not two numbers, from 1 upwards, in order.
    """
    if not text:
        return None
    numbers = re.fullmatch(r"(\d{1,12}),(\d{1,12})", text.replace(" ", ""))
    steps = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    need = "FIRST,LAST with 1 <= FIRST <= LAST, such as 10,12"
    require(1 <= steps[0] <= steps[1], "--profile", text, need)
    return steps


def check(steps: Steps | None, total: int) -> None:
    """Raises ConfigError for steps that the run does not reach."""
    if steps and steps[1] > total:
        given = f"--profile: {steps[0]},{steps[1]} given"
        raise ConfigError(f"{given}; expected steps up to {total}, where the run ends")


class Profiler:
    """Traces some steps of the lead process into workdir/profile. Use it in a `with`."""

    def __init__(
        self, steps: Steps | None, workdir: epath.Path, log: Callable[[str], None]
    ) -> None:
        """Traces nothing where steps is None."""
        self._steps, self._target, self._log = steps, workdir / "profile", log
        self._tracing, self._open = False, contextlib.ExitStack()

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: Any) -> None:
        self._open.close()  # a run that is stopped between the steps keeps what it has

    def before(self, step: int) -> None:
        """Call it before the step that makes the count `step`."""
        traced = self._steps and self._steps[0] <= step <= self._steps[1]
        if traced and not self._tracing:
            folder = self._open.enter_context(places.stand_in(self._target))
            jax.profiler.start_trace(str(folder))
            self._open.callback(jax.profiler.stop_trace)
            self._tracing = True

    def after(self, step: int, outputs: Any) -> None:
        """Call it after that step, with arrays that are ready when it has run."""
        if self._steps and self._tracing and step >= self._steps[1]:
            jax.block_until_ready(outputs)
            self._open.close()
            self._tracing = False
            self._log(f"profiled steps {self._steps[0]} to {self._steps[1]}: {self._target}")

    def skipped(self, start: int) -> None:
        """Logs where a run goes on behind the steps: the command of a run that was pre-empted must
        still work.
        """
        if self._steps and start >= self._steps[1]:
            self._log(
                f"--profile: steps {self._steps[0]} to {self._steps[1]} lie before step {start}; "
                "none is traced"
            )
