"""One small profile: which ten operations of DDPM++'s bfloat16 train step take the most time on the
device.
"""

import re
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerator_parts import Case, Options, programs, train

STEPS = 3


def cases(options: Options) -> list[Case]:
    return [Case("profile", "plain-bfloat16", "profiling", programs=("plain-bfloat16",))]


prepare = train.prepare


def run(name: str, options: Options, report: Callable[[dict], None]) -> dict[str, Any]:
    jax = programs.start()
    program = programs.load(name, options, prepare)
    state, *rest = program.arguments()
    for _ in range(2):
        state, _ = program.run(state, *rest)
    jax.block_until_ready(state)
    folder = Path(options.scratch) / "trace"
    began = time.perf_counter()
    with jax.profiler.trace(str(folder)):
        for _ in range(STEPS):
            state, _ = program.run(state, *rest)
        jax.block_until_ready(state)
    wall = time.perf_counter() - began
    (trace,) = folder.rglob("*.xplane.pb")
    with (
        warnings.catch_warnings()
    ):  # jaxlib's iterator of a trace's events has no __module__, says Python 3.12
        warnings.simplefilter("ignore", DeprecationWarning)
        host = jax.default_backend() == "cpu"
        found = top(jax.profiler.ProfileData.from_file(str(trace)), host)
    return found | {"steps": STEPS, "wall_ms": 1000 * wall}


def top(trace: Any, host: bool = False, most: int = 10) -> dict[str, Any]:
    """Operations of a jax.profiler.ProfileData by the time they take, over all steps of the trace.

    On an accelerator every event of a device's streams is a kernel, named by the operation of the
    compiled program that it belongs to where the trace says so; on a CPU only such named events
    count. "operations" are single ones, "kinds" add up those whose names differ by a number at the
    end.

    Raises:
      RuntimeError: the program ran on a device (not `host`), of which the trace has nothing.
    """
    planes = list(trace.planes)
    device = [
        plane
        for plane in planes
        if plane.name.startswith("/device:") and "CUSTOM" not in plane.name
    ]
    if not (device or host):
        raise RuntimeError("the trace has no plane of the device: its times are unknown")
    single: Counter = Counter()
    for plane in device or planes:
        for line in plane.lines:
            if device and not line.name.startswith("Stream"):
                continue  # lines derived from the streams would count everything twice
            for event in line.events:
                operation = dict(event.stats).get("hlo_op") or (event.name if device else None)
                if operation:
                    single[str(operation)] += event.duration_ns / 1e6
    kinds: Counter = Counter()
    for operation, ms in single.items():
        kinds[re.sub(r"([._]\d+)+$", "", operation)] += ms
    total = sum(single.values())
    ranked = lambda found: [
        {"name": name, "ms": round(ms, 3), "share": round(ms / total, 4)}
        for name, ms in found.most_common(most)
    ]
    return {"device_ms": round(total, 3), "operations": ranked(single), "kinds": ranked(kinds)}
