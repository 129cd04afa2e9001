"""Random edits of healthy files: what the two kinds of mutants measure and how they run apart."""

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def _memory(what: str) -> int:
    found = re.search(rf"^{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    return int(found[1]) << 10 if found else 0


@contextlib.contextmanager
def measured(done: dict[str, Any], mutant: str) -> Iterator[None]:
    """Names a mutant on stderr; raises done's "seconds" and "megabytes" to what the block took."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, start = _memory("VmRSS"), time.monotonic()
    print(mutant, file=sys.stderr, flush=True)
    yield
    done["seconds"] = max(done["seconds"], time.monotonic() - start)
    done["megabytes"] = max(done["megabytes"], (_memory("VmHWM") - before) / 1e6)


def run(module: str, kind: str, count: int, seed: int, seconds: int) -> dict[str, Any]:
    """What a module prints, in a process of its own; one that ends otherwise names its last
    mutant.
    """
    command = [sys.executable, "-m", module, kind, str(count), str(seed)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    if ended.returncode:
        raise AssertionError(f"exit {ended.returncode}: {ended.stderr[-600:]}")
    return json.loads(ended.stdout.splitlines()[-1])
