"""The processes of one run: how they find each other, agree on settings, and end together.

A step of several processes waits for all of them. Where one dies, JAX ends the others after
minutes, by SIGABRT under a C++ stack, and one that refuses its settings leaves the others waiting.
Here every process beats once a second in the key-value store of process 0; process 0 judges, and
all end with one sentence and exit code 1.
"""

import ctypes
import importlib.util
import itertools
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax

from ogdm_jax.config import ConfigError, require

PERIOD = 1.0  # seconds between beats
SILENCE = 40.0  # seconds without a beat after which a process is lost; JAX's own limit is 100
SUSPECTED = 8.0  # the same once an exchange with it has failed
GRACE = 4.0  # seconds for every process to print its own error, before it is told of another's
JOINING = 300.0  # seconds for all processes to find each other
# milliseconds to wait for what another process says; it may read or draw for hours, and where it
# dies meanwhile, this process ends
PATIENCE = 24 * 3_600_000
_BEAT, _ENDED, _VERDICT = "ogdm_jax/beat/", "ogdm_jax/ended/", "ogdm_jax/verdict"
_LEFT = "left"


class Stopped(SystemExit):
    """The run was told to stop, and has saved; the exit code is 0 unless --stopped-code asks."""

    def __init__(self) -> None:
        super().__init__(0)


def join(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins the processes of a run. Call it before anything else of JAX.

    With no arguments it joins only where a cluster is detected that JAX can join by itself (Cloud
    TPU, Slurm's srun, Open MPI, or JAX_COORDINATOR_ADDRESS): other machines are left alone.

    Args:
      coordinator: HOST:PORT of process 0.
      processes: their number.
      process: which one this is, from 0.

    Raises:
      ConfigError: an incomplete set of arguments, numbers that do not fit together, or a port that
        cannot be used.
    """
    check(coordinator, processes, process)
    if coordinator is None and not detected():
        return
    late = threading.Timer(JOINING, _not_together)  # JAX ends in C++ then, under a stack
    late.daemon = True
    late.start()
    try:
        more = int(JOINING) + 60
        jax.distributed.initialize(coordinator, processes, process, initialization_timeout=more)
    except (OSError, RuntimeError) as error:
        why = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"the processes of this run cannot join ({why}); expected process 0 at "
            f"{_state().coordinator_address}, a port that no other program of its machine holds"
        ) from error
    finally:
        late.cancel()
    state = _state()
    if state.process_id:  # what is to be said of the data, the lead process says
        logging.getLogger("ogdm_jax").setLevel(logging.ERROR)
    if state.num_processes > 1:
        _watch.start(state.process_id, state.num_processes)


def _not_together() -> None:
    """Ends a process that waits for others in vain."""
    state = _state()
    missing = f"not all of {state.num_processes} processes have come"
    if state.process_id and not _reachable():
        missing = f"process 0 does not answer at {state.coordinator_address}"
    print(
        f"error: {missing} after {JOINING:.0f} s; expected each of them to be started once, and a "
        f"network that lets all of them reach {state.coordinator_address}",
        file=sys.stderr,
    )
    end_at_once(1)


def check(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Raises ConfigError unless all three are given, or none, and they fit together."""
    values = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    given = [name for name, value in values.items() if value is not None]
    if not given:
        return
    missing = [name for name in values if name not in given]
    if coordinator is None or processes is None or process is None:
        raise ConfigError(
            f"{', '.join(given)}: given without {' and '.join(missing)}; expected --coordinator "
            "HOST:PORT, --processes N and --process 0..N-1 together, or none of them where JAX "
            "finds the cluster by itself"
        )
    port = re.fullmatch(r"\S+:(\d{1,5})", coordinator)
    known = port is not None and 0 < int(port[1]) < 65536
    need = "HOST:PORT of process 0, such as 10.0.0.2:1234"
    require(known, "--coordinator", coordinator, need)
    require(processes >= 1, "--processes", processes, "their number, at least 1")
    need = f"0 to {processes - 1}, as --processes is {processes}"
    require(0 <= process < processes, "--process", process, need)


def detected() -> bool:
    """Whether this is one of several processes that JAX can join by itself.

    On a TPU VM it may be the only one.
    """
    env = os.environ
    hosts = [h for h in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if h]
    return (
        len(hosts) > 1
        or _tpu_vm()
        or int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1  # of srun; salloc alone starts one process
        or int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
        or "JAX_COORDINATOR_ADDRESS" in env
    )


def _tpu_vm() -> bool:
    """Whether this is a Cloud TPU VM, whose metadata server tells JAX of the other hosts.

    A single host may join as well: it becomes the only process.
    """
    chips = (*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*"))
    return importlib.util.find_spec("libtpu") is not None and bool(chips)


def compare(settings: Mapping[str, object]) -> None:
    """Refuses processes of different settings, which would train different functions on one batch.

    Every process must call it, and waits for the others. The settings go through the key-value
    store as text; nothing is compiled, and no exchange times out.

    Raises:
      ConfigError: the first setting that differs, with both values; the same in every process.
    """
    if jax.process_count() == 1:
        return
    client, process = _client(), jax.process_index()
    key = f"ogdm_jax/settings/{next(_comparisons)}/"  # a process may train more than once
    mine = {name: repr(value) for name, value in settings.items()}
    client.key_value_set(f"{key}{process}", json.dumps(mine))
    if process == 0:
        read = lambda other: json.loads(client.blocking_key_value_get(f"{key}{other}", PATIENCE))
        found = (_difference(mine, read(other), other) for other in range(1, jax.process_count()))
        client.key_value_set(f"{key}verdict", next(filter(None, found), "alike"))
    verdict = client.blocking_key_value_get(f"{key}verdict", PATIENCE)
    if verdict != "alike":
        raise ConfigError(verdict)


_comparisons = itertools.count(1)  # counted alike in all processes


def meet() -> None:
    """Waits until every process is here, for as long as it takes: JAX's own exchanges time out."""
    compare({})


def _difference(mine: Mapping[str, str], theirs: Mapping[str, str], other: int) -> str:
    """The sentence on the first setting that differs, or ""."""
    for name in (*mine, *theirs):
        here, there = (texts.get(name, "missing") for texts in (mine, theirs))
        if here != there:
            alike = "expected the same settings in all processes of a run"
            return f"{name}: {here} in process 0, {there} in process {other}; {alike}"
    return ""


def keep_safe(describe: Callable[[], str]) -> None:
    """Sets what the last sentence of a run says of its checkpoints when a process is lost.

    describe() gives it, such as "step 50 in DIR is safe; ...".
    """
    _watch.safe = describe


@contextmanager
def ending_together() -> Iterator[None]:
    """Around the main function of a process: an error in it ends the other processes, too.

    When one process dies, the step's exchange fails in all others; they print a sentence that names
    the dead one.
    """
    try:
        yield
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if not _watch.running or code in (None, 0):
            _watch.leave()
            raise
        if not isinstance(error, SystemExit | KeyboardInterrupt):
            _watch.wait_for_verdict()  # does not return where another process is lost
            sys.excepthook(type(error), error, error.__traceback__)
        _watch.fail(code if isinstance(code, int) else 1)
    else:
        _watch.leave()


class _Watch:
    """Beats for this process and, in process 0, notices which process stopped beating.

    One thread, two in the processes other than 0; none in a run of one process.
    """

    def __init__(self) -> None:
        self.running = False
        self.safe: Callable[[], str] = lambda: "the same command goes on from the newest checkpoint"
        self._stopped = threading.Event()
        self._once = threading.Lock()
        self._limit = SILENCE

    def start(self, process: int, processes: int) -> None:
        """Starts to beat as one of so many processes."""
        self._process, self._processes, self.running = process, processes, True
        self._heard = time.monotonic()
        self._seen = {
            other: ("", time.monotonic()) for other in range(processes) if other != process
        }
        logging.getLogger("absl").addFilter(self._adds_something)
        if process:
            self._catch_abort()
        for task in (self._run, self._wait_for_process_0)[: 1 + bool(process)]:
            threading.Thread(target=task, daemon=True, name="ogdm_jax.cluster").start()

    def leave(self) -> None:
        """The normal end: this process says that it leaves, and stops beating."""
        if self.running:
            self._stopped.set()
            with suppress(Exception):
                _client().key_value_set(f"{_BEAT}{self._process}", _LEFT, allow_overwrite=True)

    def fail(self, code: int) -> None:
        """Ends this process, whose error is printed, without waiting at JAX's barriers."""
        self._stopped.set()
        with suppress(Exception):
            _client().key_value_set(f"{_ENDED}{self._process}", "1", allow_overwrite=True)
            if self._process == 0:  # the others need its key-value store to end themselves
                end = time.monotonic() + GRACE + 4 * PERIOD
                while time.monotonic() < end and len(self._keys(_ENDED)) < self._processes:
                    time.sleep(PERIOD / 4)
        end_at_once(code)

    def wait_for_verdict(self) -> None:
        """Waits after a failed exchange until it is known which process is lost.

        Returns where none is; otherwise this process ends here.
        """
        self._limit = SUSPECTED
        end = time.monotonic() + (SUSPECTED if self._process == 0 else SILENCE) + 3 * PERIOD
        # locked: another thread is printing, and ends the process
        while time.monotonic() < end or self._once.locked():
            if self._process and not _reachable():
                self._mourn(0)
            time.sleep(PERIOD / 4)

    def _run(self) -> None:
        count = 0
        while not self._stopped.wait(PERIOD):
            count += 1
            try:
                _client().key_value_set(f"{_BEAT}{self._process}", str(count), allow_overwrite=True)
                self._judge() if self._process == 0 else self._listen()
                self._heard = time.monotonic()
            except Exception:  # JAX's errors of a store that is gone have no common class
                if self._process and not self._stopped.is_set() and not _reachable():
                    self._mourn(0)

    def _wait_for_process_0(self) -> None:
        """Ends this process where process 0 hangs: no call to its store would end by itself.

        Ticks are counted, not time: a call may have kept this process's Python from running.
        """
        heard, ticks = self._heard, 0
        while not self._stopped.wait(PERIOD):
            ticks = ticks + 1 if heard == self._heard else 0
            heard = self._heard
            if ticks * PERIOD >= SILENCE:
                self._mourn(0)

    def _judge(self) -> None:
        now, beats, ended = time.monotonic(), self._keys(_BEAT), self._keys(_ENDED)
        for other, (value, since) in self._seen.items():
            beat = f"ended {ended[other]}" if other in ended else beats.get(other, "")
            if beat != value:
                self._seen[other] = (beat, now)
            elif beat != _LEFT and now - since > (GRACE if other in ended else self._limit):
                why = "ended with an error of its own" if other in ended else "is lost"
                _client().key_value_set(_VERDICT, f"{other} {why}", allow_overwrite=True)
                self._mourn(other, why)

    def _listen(self) -> None:
        found = self._keys(_ENDED)
        if 0 in found:
            if not self._stopped.wait(GRACE):
                self._mourn(0, "ended with an error of its own")
        with suppress(Exception):  # no verdict: the usual case is an error
            other, why = _client().key_value_try_get(_VERDICT).split(" ", 1)
            if int(other) != self._process:
                self._mourn(int(other), why)

    def _keys(self, prefix: str) -> dict[int, str]:
        return {
            int(key.rpartition("/")[2]): value for key, value in _client().key_value_dir_get(prefix)
        }

    def _mourn(self, other: int, why: str = "is lost") -> None:
        """Prints the sentence, once, and ends the process."""
        if not self._once.acquire(blocking=False):
            time.sleep(60)  # another thread is at it
        self._stopped.set()
        try:
            safe = self.safe()
        except Exception as error:  # a storage that fails, too, must not keep the process
            safe = f"its checkpoints cannot be listed ({type(error).__name__})"
        print(
            f"error: process {other} of {self._processes} {why}; {safe}",
            file=sys.stderr,
            flush=True,
        )
        if self._process == 0:
            time.sleep(3 * PERIOD)  # the others read the verdict here
        end_at_once(1)

    def _adds_something(self, record: logging.LogRecord) -> bool:
        """Whether an entry of the log says more than the sentence on a lost process.

        The error of a save that waits for that process does not.
        """
        return not (
            record.exc_info and (self._once.locked() or (self._process and not _reachable()))
        )

    def _catch_abort(self) -> None:
        """Prints the sentence before C++ ends this process, as it does when process 0 is gone.

        JAX's coordination service lives in process 0; without it, SIGABRT follows within a second.
        Python's own handlers never run then, as abort() does not return; a C function as handler
        does run, in the thread that aborts.
        """

        def aborted(_number: int) -> None:
            # A machine that hangs may still accept connections.
            silent = time.monotonic() - self._heard > SUSPECTED
            if not self._stopped.is_set() and (silent or not _reachable()):
                self._mourn(0)
            if self._once.locked():
                time.sleep(60)  # another thread is printing, and ends the process
            ctypes.CDLL(None).signal(signal.SIGABRT, None)  # the default: it was another abort

        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)  # kept: C holds no reference
        ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)


_watch = _Watch()


def end_at_once(code: int) -> None:
    """Ends the process without a word more: the usual way out waits for others. What was printed is
    written out.
    """
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _state() -> Any:
    from jax._src import distributed  # it has no public name; orbax reads it here, too

    return distributed.global_state


def _client() -> Any:
    return _state().client


def _reachable() -> bool:
    """Whether process 0 still answers at its address."""
    host, _, port = _state().coordinator_address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
    except OSError:
        return False
    return True
