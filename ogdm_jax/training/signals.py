"""Signals that stop a run: it saves before it ends."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Turns the first SIGTERM or Ctrl-C into a flag that the loop reads between steps; a second one
    acts at once.

    Among several processes JAX's own handler of SIGTERM stays: through it all of them learn of a
    signal to one, and stop at the same step (Checkpoints.preempted). Ctrl-C is passed on to it.
    """
    received: list[int] = []
    previous: dict[int, Any] = {}
    several = jax.process_count() > 1

    def handle(number: int, _frame: object) -> None:
        signal.signal(number, previous[number])
        if several:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            received.append(number)

    try:
        for number in (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, handle)
    except ValueError:
        pass  # not in the main thread (a notebook's worker): nothing can be caught there
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
