"""Worker processes under a clock: a case that fails, is killed or overruns is one entry, and the
others go on.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Report = Callable[[dict[str, Any]], None]


class Process:
    """An interpreter that runs accelerator_parts.worker; started by the first request, again after
    it died.

    Args:
      python: the interpreter.   env: its environment.   log: the file that its standard error is
        appended to.
    """

    def __init__(self, python: str, env: Mapping[str, str], log: Path):
        self._command = [python, "-m", "accelerator_parts.worker"]
        self._env, self._log = dict(env), log
        self._process: subprocess.Popen | None = None
        self._over = False
        self._lines: queue.Queue[str | None] = queue.Queue()

    def ask(
        self, request: Mapping[str, Any], seconds: float, report: Report = lambda _: None
    ) -> dict[str, Any]:
        """The answer to a request, or {"error": why there is none}. Never raises for what the
        worker does.

        Args:
          seconds: after this time the process is killed.   report: called with each preliminary
            answer.
        """
        until = time.monotonic() + max(seconds, 0.1)
        try:
            process, lines = self._start()
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        except OSError as error:
            self.close()
            return {"error": f"{self._command[0]} cannot be run: {error.strerror or error}"}
        while True:
            try:
                line = lines.get(timeout=max(until - time.monotonic(), 0.001))
            except queue.Empty:
                self.close()
                return {"error": f"stopped: not done in its {seconds:.0f} s"}
            if line is None:
                code = process.wait()
                self.close()
                return {"error": f"the process ended (exit code {code}): {_tail(self._log)}"}
            answer = json.loads(line)
            if "done" in answer:
                return answer["done"]
            report(answer["so_far"])

    def close(self) -> None:
        """Ends the process and all that it started; another request starts it again."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with contextlib.suppress(OSError):  # what was not sent yet
            process.stdin.close()

    def end(self) -> None:
        """As close(), for good."""
        self._over = True
        self.close()

    def _start(self) -> "tuple[subprocess.Popen, queue.Queue[str | None]]":
        if self._over:
            raise OSError("the run is over")
        if self._process is None or self._process.poll() is not None:
            self.close()
            with self._log.open("a") as log:
                self._process = subprocess.Popen(
                    self._command,
                    env=self._env,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    start_new_session=True,  # so that close() reaches its children, too
                )
            self._lines = queue.Queue()
            threading.Thread(
                target=_read, args=(self._process.stdout, self._lines), daemon=True
            ).start()
        return self._process, self._lines


def _read(stream, lines: "queue.Queue[str | None]") -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)


def _tail(log: Path, size: int = 4000) -> str:
    """The last line of a log that says something."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - size))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    return next((line[:300] for line in reversed(lines) if line), "it said nothing")


def side_by_side(
    jobs: list[Any], processes: list[Process], work: Callable[[Process, Any], None], until: float
) -> list[Any]:
    """Gives each job to the next free process, in order, and returns those that were not begun by
    then.

    Args:
      work: (process, job) -> None, called in a thread of its process.   until: time.monotonic()
        after which no job is begun.
    """
    waiting = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)

    def lane(process: Process) -> None:
        while time.monotonic() < until:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                break
            work(process, job)
        process.close()

    threads = [threading.Thread(target=lane, args=(process,), daemon=True) for process in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    left = []
    while not waiting.empty():
        left.append(waiting.get_nowait())
    return left
