"""Reading processes: the batches, the resume and the errors of reading here, no JAX, and none left
behind.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import psutil
import pytest
from PIL import Image

from ogdm_jax.data import Source, SourceError, batches, open_source
from ogdm_jax.data.prepare import prepare
from ogdm_jax.data.workers import WorkerError, Workers, default_count


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(
        np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a
    )


def children() -> set[int]:
    """Reading processes of this one that are alive."""
    return {c.pid for c in psutil.Process().children() if c.status() != psutil.STATUS_ZOMBIE}


def gone(pids: set[int], seconds: float = 10.0) -> bool:
    """Whether all of these processes end within so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(
            psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE
            for p in pids
        ):
            return True
        time.sleep(0.05)
    return False


class Wrapped:
    """Steps of another object; reading processes import this module to build it."""

    def __init__(self, steps):
        self.steps = steps

    def at(self, step):
        return self.steps.at(step)


class Modules(Wrapped):
    """Which modules the reading process has imported; it also prints, as a talkative library
    might.
    """

    def at(self, step):
        print("a word on the output")
        found = {
            name: np.array(name in sys.modules)
            for name in ("jax", "jaxlib", "grain", "tensorflow", "train")
        }
        return super().at(step) | found | {"pid": np.array(os.getpid())}


class Failing(Wrapped):
    def at(self, step):
        return {"image": {1: np.zeros(1)}[step]}


class Unwilling(Wrapped):
    def __reduce__(self):
        raise TypeError("no copies of me")


class Unbuildable(Wrapped):
    def __reduce__(self):
        return int, ("no number",)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Source]:
    """Digits in memory, and as folder, zip and array_record sets that are read from disk."""
    root, digits = tmp_path_factory.mktemp("sets"), open_source("digits")
    part = Source(
        "part", digits.shape, 10, digits.class_names, digits.images[:300], digits.labels[:300]
    )
    for i, (image, label) in enumerate(zip(part.images, part.labels)):
        (root / "folder" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(root / "folder" / str(label) / f"{i:03d}.png")
    prepare(part, root / "part.zip")
    prepare(part, root, "part", shard_images=120)
    names = {
        "folder": f"folder:{root}/folder",
        "zip": f"zip:{root}/part.zip",
        "array_record": "tfds:part",
    }
    where = {kind: root if kind == "array_record" else None for kind in names}
    return {"memory": part} | {
        k: open_source(name, where[k], memory_limit=0) for k, name in names.items()
    }


@pytest.mark.slow_cases("array_record-3")
@pytest.mark.parametrize("kind,workers", [("folder", 2), ("zip", 1), ("array_record", 3)])
def test_batches_are_those_of_threads_and_of_memory_and_resume(sets, kind, workers):
    source = sets[kind]
    memory = (
        sets["memory"] if kind != "folder" else open_source(source.name)
    )  # a folder is in the order of its classes
    known, threads = (
        batches(s, 32, seed=3, extra_references=8, threads=2) for s in (memory, source)
    )
    stream = batches(source, 32, seed=3, extra_references=8, workers=workers)
    expected = [next(known) for _ in range(12)]  # more than an epoch
    assert all(equal(next(threads), e) and equal(next(stream), e) for e in expected[:7])
    state = json.loads(json.dumps(stream.get_state()))
    assert state == {"step": 7}
    assert all(equal(next(stream), e) for e in expected[7:])
    stream.set_state(state)
    assert equal(next(stream), expected[7]) and equal(next(stream), expected[8])
    stream.close()
    assert not children()
    assert equal(next(stream), expected[9])  # it can still be used
    stream.close()
    share = batches(
        source, 32, 3, 8, process_index=1, process_count=2, extra_references=8, workers=2
    )
    second = next(share)
    np.testing.assert_array_equal(second["image"], expected[8]["image"][16:])
    np.testing.assert_array_equal(second["reference"], expected[8]["reference"][4:])
    share.close()


def test_processes_import_no_jax_and_share_the_steps(sets):
    workers = Workers(Modules(batches(sets["zip"], 8, seed=0)), 5, 2)
    seen = [next(workers) for _ in range(6)]
    pids = {int(s["pid"]) for s in seen[:2]}
    assert [int(s["pid"]) for s in seen] == [
        int(s["pid"]) for s in seen[:2]
    ] * 3 and pids == children()
    assert "jax" in sys.modules and not any(
        s[name] for s in seen for name in ("jax", "jaxlib", "grain", "train")
    )
    del workers  # without close
    assert gone(pids)


def test_a_batch_can_be_written_to_like_one_read_here(sets):
    stream = batches(sets["zip"], 8, seed=0, workers=1)
    assert next(stream)["image"].flags.writeable
    stream.close()


def test_an_unreadable_image_is_the_same_sentence_and_the_step_can_be_tried_again(tmp_path):
    for k in range(4):
        Image.new("L", (4, 4), 10 * k).save(tmp_path / f"{k}.png")
    good = (tmp_path / "2.png").read_bytes()
    source = open_source(f"folder:{tmp_path}", memory_limit=0)
    bad = next(step for step in range(4) if 20 in batches(source, 1, 0).at(step)["image"])
    (tmp_path / "2.png").write_bytes(good[:40])
    messages = []
    for settings in (dict(threads=1), dict(workers=1), dict(workers=2)):
        stream = batches(source, 1, 0, **settings)
        for _ in range(bad):
            next(stream)
        with pytest.raises(SourceError, match="2.png is no readable image") as error:
            next(stream)
        messages.append(str(error.value))
        assert stream.get_state() == {"step": bad} and not children()
    assert len(set(messages)) == 1
    (tmp_path / "2.png").write_bytes(good)
    assert 20 in next(stream)["image"]
    stream.close()


def test_a_killed_process_is_one_sentence(sets):
    stream = batches(sets["zip"], 8, seed=0, workers=2)
    next(stream)
    for pid in children():
        os.kill(pid, signal.SIGTERM)  # the training process's to answer
        os.kill(pid, signal.SIGINT)
    pids = children()
    for _ in range(400):  # more than is read ahead
        next(stream)
    assert children() == pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(
        RuntimeError, match=r"reading process of step \d+'s batch ended by signal 9"
    ):
        for _ in range(1000):  # some had arrived
            next(stream)
    step = stream.get_state()["step"]
    assert equal(next(stream), stream.at(step))
    stream.close()


def test_what_nobody_foresaw_keeps_its_traceback(sets):
    workers = Workers(Failing(None), 1, 1)
    next(workers)
    with pytest.raises(WorkerError, match=r"step 2's batch:\s+Traceback[\s\S]+KeyError: 2"):
        next(workers)
    workers.close()


@pytest.mark.parametrize("steps", [Unwilling(None), Unbuildable(None)])
def test_a_source_that_cannot_be_handed_over_is_one_sentence(steps):
    with pytest.raises(
        RuntimeError, match=r"cannot be handed to reading processes .*config.data.workers=0"
    ):
        next(Workers(steps, 0, 1))


SCRIPT = """
    import os, signal, sys, time
    # A shell's background job, such as this test may be part of, ignores Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import jax, jax.numpy as jnp
    assert float(jax.jit(lambda x: x @ x)(jnp.ones((64, 64)))[0, 0]) == 64  # JAX and its threads run
    import psutil
    from ogdm_jax.data import batches, open_source

    try:
        stream = batches(open_source("folder:FOLDER", memory_limit=0), 4, seed=0, workers=2)  # no __main__ guard here
        next(stream)
        print("pids", *[child.pid for child in psutil.Process().children()], flush=True)
        if sys.argv[1] == "exit":
            sys.exit(0)
        while True:
            next(stream)
            time.sleep(0.01)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@pytest.mark.slow_cases("ctrl-c", "SIGTERM")
@pytest.mark.parametrize("way", ["exit", "ctrl-c", "SIGTERM", "SIGKILL"])
def test_no_process_outlives_the_training_process(tmp_path, way):
    for k in range(6):
        Image.new("L", (4, 4), k).save(tmp_path / f"{k}.png")
    script = textwrap.dedent(SCRIPT).replace("FOLDER", str(tmp_path))
    command = [sys.executable, "-W", "error", "-c", script, way]
    program = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        word, *pids = program.stdout.readline().split()
        assert word == "pids" and len(pids) == 2, program.stderr.read()
        if way == "ctrl-c":
            os.killpg(program.pid, signal.SIGINT)  # as a terminal does: to all of the group
        elif way != "exit":
            os.kill(program.pid, getattr(signal, way))
        printed, errors = program.communicate(timeout=60)
        assert gone({int(pid) for pid in pids})
        assert errors == "" and printed == ("interrupted\n" if way == "ctrl-c" else "")
    finally:
        program.kill()
        program.communicate()


def test_number_of_processes_is_checked_and_follows_the_cores(sets, monkeypatch):
    with pytest.raises(
        ValueError, match="workers is -2; expected a number of processes, 0 for threads, or -1"
    ):
        batches(sets["zip"], 4, 0, workers=-2)
    for cores, count in ((1, 1), (2, 1), (5, 2), (16, 8), (112, 8)):
        monkeypatch.setattr(
            os, "sched_getaffinity", lambda _, cores=cores: range(cores), raising=False
        )
        assert default_count() == batches(sets["zip"], 4, 0, workers=-1).workers == count


def test_the_setting_is_checked_and_reaches_the_batches(sets):
    from types import SimpleNamespace

    from ogdm_jax.config import ConfigError
    from ogdm_jax.training.task import DENOISER
    from ogdm_jax.training.workdir import open_source
    from tests.support import tiny

    with pytest.raises(
        ConfigError, match=r"data.workers: -2 given; expected a number of processes, 0 for threads"
    ):
        open_source(tiny.config("data.workers=-2"))
    for given, count in ((-1, default_count()), (0, 0), (3, 3)):
        config = tiny.config(f"data.workers={given}", "data.batch=8")
        run = SimpleNamespace(
            config=config, source=sets["zip"], methods=SimpleNamespace(references=0, mates=0)
        )
        assert DENOISER.batches(run).workers == count
