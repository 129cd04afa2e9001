"""Processes that read batches: of n processes each reads every n-th step's batch, ahead of its use.

A process is a fresh interpreter that imports numpy and the readers, never JAX, and none of the
program that trains. It is told on its input which batches to read, writes one after the other to
its output, and waits there until each is fetched. It ends when its input closes: at close(), and
when the training process ends, in whatever way. Ctrl-C and SIGTERM, which reach a whole group of
processes, are answered by the training process alone.
"""

import collections
import concurrent.futures
import contextlib
import itertools
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from typing import IO, Any, Protocol, runtime_checkable

import numpy as np

from ogdm_jax.data.base import SourceError

Batch = dict[str, np.ndarray]
_COMMAND = "from ogdm_jax.data.workers import serve; serve()"
_PATIENCE = 5.0  # seconds for a process to end by itself


class WorkerError(Exception):
    """A reading process failed by an error of another kind; the message is its traceback."""


@runtime_checkable
class Steps(Protocol):
    """What is read: picklable, the same batch for the same step everywhere."""

    def at(self, step: int) -> Batch:
        """The batch of a step."""
        ...


def default_count() -> int:
    """Half of the cores that this process may use, at least 1 and at most 8."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return min(max(cores // 2, 1), 8)


class Workers:
    """An iterator over the batches of steps first, first + 1, ..., read by processes in turn.

    Two batches a process are held ahead, one that is written and one that has arrived, and what
    else a pipe holds.

    Raises (from next):
      SourceError: as reading in this process would.
      RuntimeError: a process was ended from outside, or the source cannot be handed over.
      WorkerError: anything else.
    """

    def __init__(self, steps: Steps, first: int, count: int) -> None:
        try:
            what = pickle.dumps(steps)  # once: it may hold the names of a million files
        except Exception as error:  # pickle passes on what the object's own code raises
            raise RuntimeError(_not_handed_over(error)) from None
        self._processes = [_start() for _ in range(count)]
        self._pool = concurrent.futures.ThreadPoolExecutor(count)
        self._turns = enumerate(itertools.cycle(self._processes), first)
        self._coming = collections.deque(
            self._pool.submit(_receive, process, pickle.dumps((first + k, count)), what)
            for k, process in enumerate(self._processes)
        )
        self._stop = weakref.finalize(self, _stop, self._processes, self._pool)

    def __iter__(self) -> "Workers":
        return self

    def __next__(self) -> Batch:
        step, process = next(self._turns)
        message = self._coming.popleft().result()
        if message is None:
            raise RuntimeError(
                f"the reading process of step {step}'s batch {_ending(process)}; expected it to go "
                "on: see what it printed, give it more memory, or read with threads "
                "(config.data.workers=0)"
            )
        batch, error = message
        if error is not None:
            raise error
        self._coming.append(self._pool.submit(_receive, process))
        return batch

    def close(self) -> None:
        """Ends the processes and waits for their end."""
        self._stop()


def serve() -> None:
    """The reading process, which talks in pickles.

    (first, stride) and steps come in; (batch, None) or (None, error) go out.
    """
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get among the batches
    try:
        try:
            (step, stride), steps = (pickle.load(sys.stdin.buffer) for _ in range(2))
        except Exception as error:
            _send(out, (None, RuntimeError(_not_handed_over(error))))
        else:
            threading.Thread(target=_end_with_input, daemon=True).start()
            while _send(out, _read(steps, step)):
                step += stride
    except BrokenPipeError:
        pass  # nobody waits for batches any more
    os._exit(0)  # past the thread that waits for the input


def _read(steps: Steps, step: int) -> tuple[Batch | None, Exception | None]:
    try:
        return steps.at(step), None
    except SourceError as error:
        return None, error
    except Exception:
        return None, WorkerError(f"reading step {step}'s batch:\n{traceback.format_exc()}")


def _send(out: IO[bytes], message: tuple[Batch | None, Exception | None]) -> bool:
    """Whether there is more to come."""
    pickle.dump(message, out, protocol=5)
    out.flush()
    return message[1] is None


def _end_with_input() -> None:
    os.read(0, 1)
    os._exit(0)


def _start() -> subprocess.Popen:
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    # Reading needs no linear algebra: without this every process would keep a thread a core for it.
    env = {"OPENBLAS_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-P", "-c", _COMMAND]
    # A process inherits which signals are held back, so these never reach it, not even while it
    # starts.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _receive(process: subprocess.Popen, *job: bytes) -> Any:
    """The process's next message, after telling it its job; None where it has ended."""
    try:
        send, receive = _pipes(process)
        send.writelines(job)
        send.flush()
        return pickle.load(receive)
    except (OSError, ValueError, EOFError, pickle.UnpicklingError):
        return None


def _stop(processes: list[subprocess.Popen], pool: concurrent.futures.ThreadPoolExecutor) -> None:
    for process in processes:
        with contextlib.suppress(OSError):
            _pipes(process)[0].close()
    for process in processes:
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    pool.shutdown(cancel_futures=True)
    for process in processes:
        _pipes(process)[1].close()


def _pipes(process: subprocess.Popen) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin is not None and process.stdout is not None, "started with pipes"
    return process.stdin, process.stdout


def _ending(process: subprocess.Popen) -> str:
    try:
        code = process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        return "sends what is no batch"
    return f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"


def _not_handed_over(error: Exception) -> str:
    return (
        f"the data source cannot be handed to reading processes ({type(error).__name__}: {error}); "
        "read with threads (config.data.workers=0)"
    )
