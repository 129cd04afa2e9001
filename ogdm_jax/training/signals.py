"""Signals that stop a run: what is not on disk is saved first; a second one ends it at once.

Python runs a handler of signals only between two of its own instructions, and XLA may compile for
minutes. So a thread listens, too (signal.set_wakeup_fd): it says at once what happens, ends the
process on a second signal, and ends it where the main thread does not come back from a place that
may be left.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax

from ogdm_jax import cluster
from ogdm_jax.cluster import end_at_once

PATIENCE = 2.0  # seconds for the main thread to leave, before the listening thread ends the process
SECOND = "a second signal ends it at once, without saving"


class StopSignals:
    """Turns the first SIGTERM or Ctrl-C into an orderly end. Use it in a `with`.

    Between steps the loop asks `received`. Inside `may_leave` nothing has to be saved: there
    cluster.Stopped is raised as soon as the signal comes.

    Among several processes JAX's own handler of SIGTERM stays: through it all of them learn of a
    signal to one, and stop at the same step (Checkpoints.preempted). Ctrl-C is passed on to it.

    Attributes:
      received: whether a signal came that this process answers by itself.
      farewell: what is said and waited for, once, before the process ends.
    """

    def __init__(self, log: Callable[[str], None], code: int | None = None) -> None:
        """code: the exit code after a signal that was answered. None: the process is not this run's
        alone (a notebook); it is never ended, and a second Ctrl-C is Python's KeyboardInterrupt.
        """
        self.received = False
        self.farewell: Callable[[], None] = lambda: None
        self._log, self._code = log, code
        self._doing: str | None = None  # what is interrupted without a loss; None: nothing
        self._several = self._passed_on = False
        self._previous: dict[int, Any] = {}
        self._listener: threading.Thread | None = None
        self._leaving, self._spoken = threading.Lock(), threading.Event()

    def __enter__(self) -> "StopSignals":
        self._several = jax.process_count() > 1
        try:
            for number in (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        except ValueError:
            return self  # not in the main thread (a notebook's worker): nothing can be caught there
        if self._code is None:
            return self
        self._ear, self._mouth = os.pipe()
        os.set_blocking(self._mouth, False)
        self._woken = signal.set_wakeup_fd(self._mouth, warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, daemon=True, name="ogdm_jax.signals")
        self._listener.start()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is cluster.Stopped:
            self.leave_once()
        if self._listener is not None:
            signal.set_wakeup_fd(self._woken)
            os.write(self._mouth, b"\0")
            self._listener.join()
            os.close(self._ear)
            os.close(self._mouth)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def may_leave(self, doing: str | None) -> Iterator[None]:
        """A place that a signal leaves at once. `doing` says what is interrupted and what becomes
        of it; None: inside, a signal waits after all, as for a save.

        Raises:
          cluster.Stopped: a signal came, before or inside.
        """
        before, self._doing = self._doing, doing
        try:
            if doing is not None and self.received:
                raise cluster.Stopped
            yield
        finally:
            self._doing = None if self.received else before

    def leave_once(self) -> None:
        """Says farewell, in whichever thread comes first; the other one does not get past here."""
        if self.received and self._listener is not None:
            self._spoken.wait(1.0)  # the listening thread says first which signal came
        with self._leaving:
            farewell, self.farewell = self.farewell, lambda: None
            farewell()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        """In the main thread, between two instructions."""
        if self._several:
            if self._passed_on:
                end_at_once(128 + number)
            self._passed_on = True
            os.kill(os.getpid(), signal.SIGTERM)
            return
        if self.received:
            return  # the listening thread answers a second one
        self.received = True
        if self._listener is None:
            self._log(f"{signal.Signals(number).name}: {self._doing or 'saving, then leaving'}")
            for heard, handler in self._previous.items():
                signal.signal(heard, handler)
        if self._doing is not None:
            raise cluster.Stopped

    def _listen(self) -> None:
        heard, since = 0, 0.0  # since when the main thread may have left
        while True:
            ready = select.select([self._ear], [], [], 0.1 if heard else None)[0]
            if not ready:
                now = time.monotonic()
                since = since if self._doing is not None else now
                if now - since > PATIENCE:
                    self._leave_for_it()
                continue
            number = os.read(self._ear, 1)[0]
            if number == 0:
                return
            if number not in self._previous or self._several:
                continue
            if heard:
                end_at_once(128 + number)
            heard, since = number, time.monotonic()
            doing = self._doing or "saving, then leaving"
            self._log(f"{signal.Signals(number).name}: {doing}; {SECOND}")
            self._spoken.set()

    def _leave_for_it(self) -> None:
        """Ends the process from the listening thread: the main one is inside a library."""
        try:
            self.leave_once()
        except Exception as error:  # a failed save: the process has to end all the same
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            self._code = 1
        end_at_once(self._code or 0)
