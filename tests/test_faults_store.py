"""Faults made on purpose in a folder of checkpoints (slow): flipped bits in every file, thousands of
broken JSON files, kill -9 in the middle of saves. What remains opens, or is refused in one sentence.
"""

import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from ogdm_jax.training import arrays, checksums, evaluations, lock, loop, steps
from ogdm_jax.training import state as states
from ogdm_jax.training.checkpoint import Checkpoints, describe, find, load_weights, resumable
from tests.support import tiny

pytestmark = pytest.mark.slow
SECONDS, MEGABYTES = 5.0, 300


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder with steps 1 and 2, run, shapes of its state)."""
    folder, run = tmp_path_factory.mktemp("made"), tiny.build("methods=", *tiny.SMALLEST)
    shapes = jax.eval_shape(run.create, run.key)
    draw = np.random.default_rng(0)
    tree = jax.tree.map(lambda a: jax.numpy.asarray(draw.normal(size=a.shape), a.dtype), shapes)
    about = describe(run.config, run.source.shape, 0, {"images": 3, "class_names": ["a", "b"]})
    with Checkpoints(folder) as saved:
        for step in (1, 2):
            saved.save(step, tree, about, {"step": step})
    report = {"fd": 2.0, "features": "x", "n": 2, "solver": "heun", "weight": 1.5}
    evaluations.write(folder, {step: report | {"step": step} for step in (1, 2)})
    return folder, run, shapes


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "run")


def flipped(content: bytes, bit: int) -> bytes:
    new = bytearray(content)
    new[bit // 8] ^= 1 << bit % 8
    return bytes(new)


def restored(folder, made, step=2):
    _, run, shapes = made
    with Checkpoints(folder) as saved:
        return saved.restore(step, shapes, run.plan)[0]


def refused(call) -> str:
    """The sentence of an intended error, "" where there was none; any other error is raised."""
    began = time.monotonic()
    try:
        call()
    except ValueError as error:
        if not type(error).__module__.startswith("ogdm_jax"):
            raise
        assert "\n" not in str(error)
        return str(error)
    finally:
        assert time.monotonic() - began < SECONDS
    return ""


def test_a_flipped_bit_in_any_file_is_found_or_harmless(folder, made):
    """Three bits in each file of a checkpoint, about 180."""
    step, draw = folder / "checkpoints" / "2", random.Random(1)
    before, flips, harmless = restored(folder, made), 0, set()
    for path in sorted(p for p in step.rglob("*") if p.is_file()):
        content, name = path.read_bytes(), path.relative_to(step).as_posix()
        for _ in range(3):
            path.write_bytes(flipped(content, draw.randrange(8 * len(content))))
            flips += 1
            if checksums.damage(step, checksums.ITEMS):
                lines = []
                taken = find(folder, log=lines.append).step
                read = name.startswith(("ema/", "config/"))  # by sampling
                assert taken == (1 if read else 2) or name == checksums.NAME
                assert bool(lines) == (taken == 1)
                continue
            harmless.add(name)
            assert resumable(folder, pytest.fail).step == 2
            tiny.assert_trees(restored(folder, made), before)
        path.write_bytes(content)
    assert flips >= 60 and harmless <= {"_CHECKPOINT_METADATA", "commit_success.txt"}
    assert not checksums.damage(step, checksums.ITEMS)


def test_a_flipped_bit_in_a_folder_of_before_is_no_traceback(folder, made):
    """Without checksums some flips cannot be seen; none is an error of the storage library."""
    step, draw, found = folder / "checkpoints" / "2", random.Random(2), 0
    (step / checksums.NAME).unlink()
    for path in sorted(p for p in step.rglob("*") if p.is_file()):
        content = path.read_bytes()
        path.write_bytes(flipped(content, draw.randrange(8 * len(content))))
        found += bool(refused(lambda: (find(folder, 2), restored(folder, made))))
        path.write_bytes(content)
    assert found > 10


TOKENS = (
    *(b"null", b"-1", b"1e999", b"NaN", b"true", b'""', b"[]", b"{}", b"99999999999999999999"),
    *(b'"\\ud800"', b"\x00", b"\xff", b"[" * 500, b'{"a":' * 500, b"0.5", b'"nan"', b",", b":"),
)


def mutant(content: bytes, draw: random.Random) -> bytes:
    """The file with one to three changes."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        a, b = sorted(draw.randrange(len(content) + 1) for _ in range(2))
        b = min(b, a + draw.choice((1, 4, 30)))
        kind = draw.randrange(5)
        if kind == 0 and content:
            content = flipped(content, draw.randrange(8 * len(content)))
        elif kind == 1:
            content = content[:a]
        elif kind == 2:
            content = content[:a] + content[b:]
        elif kind == 3:
            content = content[:a] + draw.choice(TOKENS) + content[b:]
        else:  # a value of the same length of life: what stands between two separators
            parts = content.split(b", ")
            at = draw.randrange(len(parts))
            key, colon, _ = parts[at].partition(b": ")
            parts[at] = key + colon + draw.choice(TOKENS) if colon else draw.choice(TOKENS)
            content = b", ".join(parts)
    return content


CASES = {  # file below the workdir: (mutants, whether the list of checksums is there)
    evaluations.NAME: (600, True),
    f"checkpoints/2/{checksums.NAME}": (500, True),
    "checkpoints/2/config/metadata": (1000, False),
    "checkpoints/2/data/metadata": (150, False),
    "checkpoints/2/_CHECKPOINT_METADATA": (150, True),
    "checkpoints/2/ema/_METADATA": (250, False),
    "checkpoints/2/ema/_sharding": (100, False),
    "checkpoints/2/ema/array_metadatas/process_0": (100, False),
    "checkpoints/2/state/_METADATA": (100, False),
    "checkpoints/2/params/_METADATA": (50, False),
}


@pytest.mark.parametrize("name", CASES)
def test_mutants_of_json_files_are_read_or_refused(folder, made, name):
    """3,000 in all; each in 5 s and 300 MB."""
    _, _, shapes = made
    (count, listed), path, draw = CASES[name], folder / name, random.Random(3)
    content = path.read_bytes()
    if not listed:
        (folder / "checkpoints" / "2" / checksums.NAME).unlink()

    def sample():
        load_weights(find(folder, log=lambda _: None), shapes.params, shapes.buffers)

    readers = {
        evaluations.NAME: lambda: find(folder, "best", log=lambda _: None),
        "config/metadata": lambda: find(folder, 2),
        "data/metadata": lambda: restored(folder, made),
        "state/_METADATA": lambda: restored(folder, made),
        "params/_METADATA": lambda: restored(folder, made),
        checksums.NAME: lambda: find(folder, 2),
    }
    read = next((r for end, r in readers.items() if name.endswith(end)), sample)
    read()
    before, sentences = peak(), 0
    for _ in range(count):
        path.write_bytes(mutant(content, draw))
        sentences += bool(refused(read))
    assert peak() - before < MEGABYTES
    assert sentences > (0 if "_CHECKPOINT" in name or "_sharding" in name else count / 10) - 1


def peak() -> float:
    """The most memory that this process has used, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


SAVER = """
import sys, numpy as np
from ogdm_jax import config
from ogdm_jax.training import state
from ogdm_jax.training.checkpoint import Checkpoints, describe, resumable
about = describe(config.load("configs/digits.py"), (8, 8, 1), 10)
found = resumable(sys.argv[1], print)
step = found.step if found else 0
with Checkpoints(sys.argv[1], keep=3) as saved:
    while True:
        step += 1
        tree = {"w": np.full(30_000, step, np.int32)}
        saved.save(step, state.TrainState(np.int32(step), tree, tree, {}, tree, {}), about, {"step": step})
        if step % 3 == 0:
            saved.wait()
            print("saved", step, flush=True)
"""


def test_kill_in_the_middle_of_saves(tmp_path):
    """Ten times at random moments, in one folder: what was said to be saved is there and whole."""
    draw, said = random.Random(4), 0
    for _ in range(10):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, tmp_path],
            cwd=tiny.ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        line = next(line for line in process.stdout if line.startswith("saved"))
        time.sleep(draw.random())
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].splitlines()
        said = max(int(text.split()[1]) for text in [line, *rest] if text.startswith("saved"))
        snapshot = find(tmp_path, log=pytest.fail)
        assert snapshot.step >= said
        for step in steps.complete(tmp_path):
            path = find(tmp_path, step).path
            assert not checksums.damage(path, checksums.ITEMS)
            for item in ("params", "ema"):
                like = {"w": jax.ShapeDtypeStruct((30_000,), np.int32)}
                like = {"params": like, "buffers": {}} if item == "ema" else like
                found = jax.tree.leaves(arrays.read(path, item, like))
                assert all((np.asarray(leaf) == step).all() for leaf in found)
    assert resumable(tmp_path, lambda _: None).step >= said


def test_the_checksums_cost_little(tmp_path, capsys):
    """A state of 96 MB: the time to list it against the time to save it."""
    draw = np.random.default_rng(0)
    tree = {f"w{n}": draw.normal(size=(1 << 20,)).astype(np.float32) for n in range(6)}
    run = tiny.build("methods=", *tiny.SMALLEST)
    state = states.TrainState(np.int32(0), tree, tree, {}, {"m": tree, "v": tree}, {})
    began = time.monotonic()
    with Checkpoints(tmp_path) as saved:
        saved.save(1, state, describe(run.config, (8, 8, 1), 0), {"step": 1})
    whole = time.monotonic() - began
    step = find(tmp_path).path
    began = time.monotonic()
    checksums.write(step)
    listing = time.monotonic() - began
    size = sum(p.stat().st_size for p in Path(step).rglob("*") if p.is_file()) / 2**20
    with capsys.disabled():
        print(f"\n{size:.0f} MB saved in {whole:.2f} s, of which checksums {listing:.3f} s")
    assert listing < 0.5 * whole
    assert len(json.loads((Path(step) / checksums.NAME).read_text())) > 20


TOGETHER = """
import sys
from ogdm_jax import cluster, startup
from ogdm_jax.training import lock, steps
with cluster.ending_together(), startup.one_sentence():
    startup.prepare()
    cluster.join(sys.argv[2], 2, int(sys.argv[3]))
    with lock.hold(sys.argv[1], print):
        print("found", steps.newest_whole(sys.argv[1], print), flush=True)
"""


def together(folder) -> list[tuple[int, str]]:
    """(exit code, output) of the two processes of a run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, folder, address, str(process)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    return [(process.returncode, out) for process, out in zip(processes, outputs, strict=True)]


def test_the_processes_of_a_run_share_one_lock_and_one_answer(folder):
    """Process 0 holds the lock and judges the files; the other waits, and takes its answer."""
    path = next((folder / "checkpoints" / "2" / "state").rglob("manifest.ocdbt"))
    path.write_bytes(flipped(path.read_bytes(), 100))
    (_, first), (_, second) = ends = together(folder)
    assert [code for code, _ in ends] == [0, 0], ends
    assert "found 1" in first and "found 1" in second
    assert "2 is damaged" in first and "damaged" not in second
    assert not (folder / lock.NAME).exists()
    with lock.hold(folder):
        ends = together(folder)
    assert [code for code, _ in ends] == [1, 1], ends
    assert "is in use by process" in ends[0][1] and "process 0 of 2 ended" in ends[1][1]


def test_a_run_goes_on_from_what_is_whole_bit_for_bit(tmp_path, monkeypatch):
    """Its newest step damaged, the next one cut, and another run's lock left behind."""
    settings = lambda steps: tiny.config(
        *("methods=", *tiny.SMALLEST, "train.save_every=1 steps", "train.keep=10"),
        f"train.duration={steps} steps",
    )
    silent = lambda _: None
    loop.train(settings(4), tmp_path / "straight", log=silent)
    spoiled, lines = tmp_path / "spoiled", []
    cut = spoiled / "checkpoints" / "1.orbax-checkpoint-tmp" / "params"
    cut.mkdir(parents=True)
    loop.train(settings(3), spoiled, log=lines.append)
    assert "1.orbax-checkpoint-tmp removed" in "\n".join(lines)
    path = next((spoiled / "checkpoints" / "3" / "ema").rglob("manifest.ocdbt"))
    path.write_bytes(flipped(path.read_bytes(), 77))
    (spoiled / lock.NAME).write_text("")
    monkeypatch.setattr(lock, "SILENCE", 0.5)
    del lines[:]
    loop.train(settings(4), spoiled, log=lines.append)
    said = "\n".join(lines)
    assert "3 is damaged" in said and "going on from step 2" in said and "taken over" in said
    assert steps.complete(spoiled) == [1, 2, 3, 4]
    run = tiny.build("methods=", *tiny.SMALLEST)
    made = (None, run, jax.eval_shape(run.create, run.key))
    for step in (3, 4):
        found = (restored(tmp_path / name, made, step) for name in ("straight", "spoiled"))
        tiny.assert_trees(*found)
