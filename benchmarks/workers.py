"""Two programs timed against each other, each in its own process, taking turns: a noisy machine
hits both.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable


class Worker:
    """A process that says what it is, then answers every line on its input by working once and
    printing seconds.
    """

    def __init__(self, command: list[str], env: dict[str, str] | None = None):
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=env
        )
        self.about = json.loads(self._line("{"))

    def _line(self, start: str) -> str:
        for line in self._process.stdout:
            if line.startswith(start):
                return line
        sys.exit(
            f"{self._process.args[0]} stopped; expected an interpreter with what it runs, and "
            "enough memory"
        )

    def turn(self) -> tuple[float, float]:
        """Works once: (seconds that passed, seconds of processor time over all threads)."""
        self._process.stdin.write("go\n")
        wall, processor = self._line("seconds ").split()[1:3]
        return float(wall), float(processor)

    def seconds(self) -> float:
        """Works once: seconds that passed."""
        return self.turn()[0]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


def serve(work: Callable[[], None], about: dict, warm: int = 2) -> None:
    """The other end: warms up so many times, says what it is, then works on demand."""
    for _ in range(warm):
        work()
    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        began, spent = time.perf_counter(), time.process_time()
        work()
        # within the wall time: of one thread it is never more
        processor = time.process_time() - spent
        print(f"seconds {time.perf_counter() - began} {processor}", flush=True)


def ratio(first: Worker, second: Worker, rounds: int) -> dict[str, float]:
    """Median over rounds of first / second, with both medians and the range of the ratio.

    The same of processor time, which neighbours on the machine disturb less; `load` is the
    machine's over one minute.
    """
    pairs = []
    for i in range(rounds):
        order = (first, second) if i % 2 == 0 else (second, first)
        turns = {w: w.turn() for w in order}
        pairs.append((turns[first], turns[second]))
    ratios = sorted(a / b for (a, _), (b, _) in pairs)
    processor = [a / b for (_, a), (_, b) in pairs]
    return {
        "ratio": round(statistics.median(ratios), 3),
        "lowest": round(ratios[0], 3),
        "highest": round(ratios[-1], 3),
        "first_ms": round(1000 * statistics.median(a for (a, _), _ in pairs), 1),
        "second_ms": round(1000 * statistics.median(b for _, (b, _) in pairs), 1),
        "processor_ratio": round(statistics.median(processor), 3),
        "first_processor_ms": round(1000 * statistics.median(a for (_, a), _ in pairs), 1),
        "second_processor_ms": round(1000 * statistics.median(b for _, (_, b) in pairs), 1),
        "rounds": rounds,
        "load": round(os.getloadavg()[0], 1),
    }
