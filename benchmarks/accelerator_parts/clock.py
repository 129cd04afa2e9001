"""How long a piece of work takes on a device that works behind the caller's back."""

import statistics
import time
from collections.abc import Callable


def timed(
    work: Callable[[], None], wait: Callable[[], None], seconds: float, least: int = 3
) -> dict[str, float]:
    """Median time of `work` over rounds of as many calls as fill a third of a second, each closed
    by `wait`.

    Three calls before them are not counted; the first one is told apart. Calls of a round follow
    each other without waiting, as in a long run.

    Args:
      work: enqueues one piece.   wait: returns when everything enqueued is done.
      seconds: no round begins after this time.   least: rounds that are measured in any case.

    Returns:
      {"ms", "lowest_ms", "highest_ms": of one piece, "rounds", "per_round", "first_ms": of the very
      first call}.
    """

    def round_of(n: int) -> float:
        began = time.perf_counter()
        for _ in range(n):
            work()
        wait()
        return (time.perf_counter() - began) / n

    first = round_of(1)
    round_of(1)
    per_round = max(1, round(min(0.33, seconds / 4) / max(round_of(1), 1e-6)))
    until, times = time.perf_counter() + seconds, []
    while len(times) < least or time.perf_counter() < until:
        times.append(round_of(per_round))
    ms = [1000 * t for t in (statistics.median(times), min(times), max(times), first)]
    names = ("ms", "lowest_ms", "highest_ms", "first_ms")
    return {k: round(v, 4) for k, v in zip(names, ms)} | {
        "rounds": len(times),
        "per_round": per_round,
    }
