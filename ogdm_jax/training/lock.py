"""One run at a time in a training folder.

    workdir/lock.json    who writes there: host, process, since when, and a beat

Process 0 of a run holds the file and changes its beat every PERIOD seconds; it goes when the run
ends, also by an error or a signal that is caught. Where a run was killed, it stays. The next run on
that machine sees that the process is gone and takes over at once. On another machine (or in another
container) it watches for SILENCE seconds whether the beat changes: clocks of machines are not
compared. Reading commands never look at it.
"""

import dataclasses
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
from etils import epath

from ogdm_jax import cluster, places, records

NAME = "lock.json"
PERIOD = 15.0  # seconds between beats
SILENCE = 75.0  # seconds without one after which a run on another machine is taken for dead
_SETTLE = 1.0  # seconds after which a bucket, which knows no locks, shows who wrote last


class LockError(ValueError):
    """Another run writes to the folder; one sentence names it."""


@contextmanager
def hold(
    workdir: str | os.PathLike, log: Callable[[str], None] = print, field: str = "--workdir"
) -> Iterator["Lock"]:
    """Keeps other runs out of a training folder, which is made where needed, while the block runs;
    a folder in which nothing was written goes again.

    Process 0 does it for all processes of a run.

    Args:
      workdir: the folder, local or gs://.
      log: gets a line where another machine is waited for, or a dead run's lock is taken over.
      field: the setting that named the folder, for messages.

    Raises:
      LockError: another run is at work there.
    """
    folder = places.place(workdir)
    made = places.make(folder)
    folder.mkdir(parents=True, exist_ok=True)  # in a bucket, too
    lock = Lock(folder, field)
    try:
        if jax.process_index() == 0:
            lock.take(log)
        cluster.meet()
        yield lock
    finally:
        lock.release()
        places.unmake(made)


@dataclasses.dataclass(frozen=True)
class _Owner:
    """Who holds a lock. `machine` tells hosts, their restarts and containers apart."""

    host: str
    machine: str
    process: int
    started: str
    since: str
    token: str

    def __str__(self) -> str:
        return f"process {self.process} of {self.host} since {self.since}"


class Lock:
    """The lock of one folder; see `hold`."""

    def __init__(self, folder: epath.Path, field: str = "--workdir") -> None:
        self._folder, self._path, self._field = folder, folder / NAME, field
        self._me = _Owner(
            socket.gethostname(),
            _machine(),
            os.getpid(),
            _started(os.getpid()),
            time.strftime("%Y-%m-%d %H:%M:%S"),
            uuid.uuid4().hex,
        )
        self._ended, self._thread = threading.Event(), None
        self._lost: str = ""

    def take(self, log: Callable[[str], None]) -> None:
        """Takes the lock, or raises LockError."""
        while True:
            found = self._read()
            if found is not None and not self._gone(found, log):
                raise LockError(
                    f"{self._field}: {str(self._folder)!r} is in use by "
                    f"{found[0] or 'another run'}; wait until it ends, stop it, or give another "
                    "folder"
                )
            # Not for long: the program around this one (flock DIR ogdm train ...) may hold it.
            with places.held(self._folder, wait=2.0):
                if self._read() == found:  # nobody came in between
                    self._write(0)
                    break
        if not places.is_local(self._folder):
            time.sleep(_SETTLE)
            self._beat(1)
            self.check()
        if found is not None:
            log(f"{self._path} was left by {found[0] or 'a run'}, which is gone: taken over")
        self._thread = threading.Thread(target=self._run, daemon=True, name="ogdm_jax.lock")
        self._thread.start()

    def check(self) -> None:
        """Raises LockError where another run has taken over: call it before writing."""
        if self._lost:
            raise LockError(
                f"{self._field}: {str(self._folder)!r} was taken over by {self._lost} while this "
                "run gave no sign of life; it ends without saving over the other's work"
            )

    def release(self) -> None:
        """Gives the lock back, if it is this run's."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(PERIOD)
        with suppress(OSError):
            found = self._read()
            if found is not None and found[0] is not None and found[0].token == self._me.token:
                self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        beat = 1
        while not self._lost and not self._ended.wait(PERIOD):
            beat += 1
            with suppress(Exception):  # a full disk, a storage that is away: the run will meet it
                self._beat(beat)

    def _beat(self, beat: int) -> None:
        found = self._read()
        if found is not None and found[0] is not None and found[0].token != self._me.token:
            self._lost = str(found[0])
        elif self._folder.is_dir() or not places.is_local(self._folder):
            self._write(beat)

    def _write(self, beat: int) -> None:
        records.write(self._path, dataclasses.asdict(self._me) | {"beat": beat})

    def _read(self) -> tuple[_Owner | None, Any] | None:
        """(owner, beat), owner None where the file cannot be understood; None: there is no file."""
        try:
            if not self._path.exists():
                return None
            content = records.read(self._path, dict)
            owner = _Owner(**{f.name: content[f.name] for f in dataclasses.fields(_Owner)})
            return owner, content.get("beat")
        except (records.RecordError, KeyError):
            return (None, 0) if self._path.exists() else None

    def _gone(self, found: tuple[_Owner | None, Any], log: Callable[[str], None]) -> bool:
        """Whether the run that wrote the lock is dead; waits for a beat from another machine."""
        owner, _ = found
        if owner is not None and owner.machine == self._me.machine:
            return _started(owner.process) != owner.started
        log(
            f"{self._path} was written by {owner or 'an unknown run'}: watching for up to "
            f"{SILENCE:.0f} s whether it still runs"
        )
        end = time.monotonic() + SILENCE
        while time.monotonic() < end:
            time.sleep(min(1.0, SILENCE / 10))
            now = self._read()
            if now != found:
                return now is None
        return True


def _machine() -> str:
    """What processes that see each other's numbers have in common: the host, its start, and the
    container.
    """
    words = [socket.gethostname()]
    with suppress(OSError):
        words.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        words.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(words)


def _started(process: int) -> str:
    """When a process of this machine started; "" where there is none, or it is dead.

    Numbers of processes are used again; with its start one is told apart.
    """
    try:
        # After the name, which may hold anything: the state, and 19 fields later the start.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return ""
    except (OSError, OverflowError, TypeError):
        pass
    return "running"
