"""The benchmarks' common parts: turns of two programs, and the readers' figures on a tiny set."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
WORK = """
import sys, time
sys.path.insert(0, {folder!r})
import workers

def busy():
    began = time.process_time()
    while time.process_time() - began < 0.03:
        pass

workers.serve({work}, {{"name": {name!r}}})
"""


def test_turns_tell_wall_time_from_processor_time(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import workers

    def worker(name: str, work: str) -> workers.Worker:
        return workers.Worker(
            [sys.executable, "-c", WORK.format(folder=str(FOLDER), name=name, work=work)]
        )

    sleeper, other = worker("sleeper", "lambda: time.sleep(0.2)"), worker("other", "busy")
    assert sleeper.about == {"name": "sleeper"} and sleeper.seconds() >= 0.2
    wall, processor = other.turn()
    assert wall >= processor >= 0.03
    found = workers.ratio(sleeper, other, 3)
    assert (
        found["first_ms"] >= 200
        and found["first_processor_ms"] < 30 <= found["second_processor_ms"]
    )
    assert found["processor_ratio"] < 1 and found["lowest"] <= found["ratio"] <= found["highest"]
    assert found["rounds"] == 3 and json.loads(json.dumps(found)) == found
    sleeper.close()
    other.close()


@pytest.mark.slow
def test_readers_print_a_line_per_source_and_reader():
    sizes = [
        "--images=60",
        "--batch=16",
        "--batches=3",
        "--repeats=1",
        "--readers=threads:1,workers:1",
    ]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])
    }
    done = subprocess.run(
        [sys.executable, str(FOLDER / "readers.py"), *sizes],
        capture_output=True,
        text=True,
        timeout=300,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    found = [(line["source"], line["reader"]) for line in lines]
    assert found == [
        (s, r) for s in ("folder", "zip", "array_record") for r in ("threads:1", "workers:1")
    ]
    assert all(line["images_per_second"] > 0 and line["cpu_s_per_1000"] >= 0 for line in lines)
