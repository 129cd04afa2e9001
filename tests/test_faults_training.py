"""Training that is cut at any moment goes on, and ends with the same bits; asked for by name.

pytest -m slow tests/test_faults_training.py
"""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from ogdm_jax.training import steps
from ogdm_jax.training.checkpoint import find
from ogdm_jax.training.logs import METRICS
from tests.support.runs import Run, finish

pytestmark = pytest.mark.slow

LENGTH = 60
SETTINGS = {
    "plain": ("methods=",),
    "ogdm and stf": ("methods=ogdm,stf", "stf.source=stream", "stf.n=8", "ogdm.k=0.5"),
}
RUN = (
    f"train.duration={LENGTH} steps",
    "train.save_every=7 steps",
    "log.every=1 steps",
    "evaluate.features=digits",
    "evaluate.every=20 steps",
    "evaluate.num=16",
)


def bits(workdir, step: int) -> dict[str, bytes]:
    """Every array of a checkpoint, as bytes, and where the loader stood."""
    import orbax.checkpoint as ocp

    found = {}
    with ocp.StandardCheckpointer() as reader:
        for item in ("params", "ema", "state"):
            tree = reader.restore(steps.folder(workdir) / str(step) / item)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                found[f"{item}{jax.tree_util.keystr(path)}"] = np.asarray(leaf).tobytes()
    data = steps.folder(workdir) / str(step) / "data" / "metadata"
    return found | {"data": data.read_bytes()}


def straight(folder, *settings: str) -> dict[str, bytes]:
    """What the run ends with where nothing happens to it."""
    finish(folder / "straight", *RUN, *settings)
    return bits(folder / "straight", LENGTH)


def _wait_for(moment: str, run: Run, folder, chance: random.Random) -> None:
    """Returns at a random time of a kind of moment, or when the run has ended."""
    over = lambda: run.process.poll() is not None
    if moment == "start":
        return time.sleep(chance.uniform(0.5, 6))
    run.wait_until(lambda: "compiled in" in run.text or over(), ends=True)
    if moment == "steps":
        time.sleep(chance.uniform(0.0, 0.3))
    if moment == "save":
        half = lambda: any((folder / "checkpoints").glob("*tmp*"))
        run.wait_until(lambda: half() or over(), ends=True)
        time.sleep(chance.uniform(0, 0.02))
    if moment == "evaluation":
        step = lambda: any(f"step {n} " in run.text for n in (20, 40, 60))
        run.wait_until(lambda: step() or over(), ends=True)
        time.sleep(chance.uniform(0, 1.0))


@pytest.mark.parametrize("methods", SETTINGS)
def test_twenty_kills_at_random_moments_change_no_bit(tmp_path, methods):
    expected = straight(tmp_path, *SETTINGS[methods])
    chance, folder = random.Random(15), tmp_path / "killed"
    killed = {"start": 0, "steps": 0, "save": 0, "evaluation": 0}
    moments = [*("start", "steps", "steps", "save", "save", "evaluation") * 3, "steps", "save"]
    assert len(moments) == 20
    for moment in moments:
        run = Run(folder, *RUN, *SETTINGS[methods])
        _wait_for(moment, run, folder, chance)
        ended = run.process.poll() is not None
        run.send(signal.SIGKILL)
        code = run.end()
        if ended:  # it came to its end first: begin once more
            assert code == 0 and bits(folder, LENGTH) == expected, run.text
            shutil.rmtree(folder)
        killed[moment] += not ended
    finish(folder, *RUN, *SETTINGS[methods])
    assert bits(folder, LENGTH) == expected
    assert sum(killed.values()) >= 15, killed
    print(killed)
    logged = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    losses = [line["step"] for line in logged if "loss" in line]
    assert losses == sorted(set(losses)) and losses[-1] == LENGTH


LONG = ("methods=", "train.duration=100000 steps", "log.every=1 steps", "train.save_every=0 steps")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["data", "compiling", "stepping", "saving", "evaluating"])
def test_a_signal_at_five_moments(tmp_path, moment, number):
    """It leaves in seconds with exit code 7, which was asked for; the same command goes on."""
    more = {
        "saving": ("train.save_every=1 steps",),
        "evaluating": ("evaluate.features=lite0", "evaluate.every=3 steps", "evaluate.num=50000"),
    }.get(moment, ())
    run = Run(tmp_path / "w", *LONG, *more, words=("--stopped-code", "7"))
    if moment == "data":
        run.wait_until(lambda: (tmp_path / "w" / "lock.json").exists())
    elif moment == "compiling":
        run.wait_for("compiling")
    elif moment == "stepping":
        run.wait_for("step 5 ")
    elif moment == "saving":
        run.wait_until(lambda: [*(tmp_path / "w" / "checkpoints").glob("*tmp*")])
    else:
        run.wait_for("step 3 ")
        time.sleep(2)
    began = time.monotonic()
    run.send(number)
    code = run.end(60)
    took = time.monotonic() - began
    assert code == 7 and "Traceback" not in run.text, run.text
    assert took < 12, (took, run.text)  # a busy machine; the forced way out begins after 2 s
    assert f"{signal.Signals(number).name}: " in run.text and "a second signal ends it" in run.text
    last = run.lines[-1]
    done = steps.complete(tmp_path / "w") if (tmp_path / "w").exists() else []
    if moment in ("data", "compiling"):
        assert "starts afresh" in last or "trained" in last, run.text
    else:
        assert last == f"stopped at step {done[-1]}; saved, the same command goes on from here"
        logged = [json.loads(text) for text in (tmp_path / "w" / METRICS).read_text().splitlines()]
        assert max(line["step"] for line in logged) == done[-1]
    assert not (tmp_path / "w" / "lock.json").exists() or moment in ("compiling", "evaluating")
    if moment == "evaluating":
        assert done[-1] == 3
    end = (done[-1] if done else 0) + 2
    few = ("evaluate.num=16",) if moment == "evaluating" else ()
    text = finish(tmp_path / "w", *LONG, *more, f"train.duration={end} steps", *few)
    assert (f"resumed from step {done[-1]}" if done else "a new run") in text
    if moment == "evaluating":
        assert text.count("fd_lite0") == 2 or text.count("lite0 ") >= 2, text


@pytest.mark.parametrize(
    "numbers", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT)]
)
@pytest.mark.parametrize("moment", ["compiling", "stepping", "saving"])
def test_a_second_signal_ends_it_at_once(tmp_path, moment, numbers):
    more = ("train.save_every=1 steps",) if moment == "saving" else ()
    run = Run(tmp_path, *LONG, *more)
    run.wait_for({"compiling": "compiling", "stepping": "step 2 ", "saving": "step 2 "}[moment])
    run.send(numbers[0])  # two at once may become one signal on their way
    run.wait_until(
        lambda: "a second signal" in run.text or run.process.poll() is not None, ends=True
    )
    run.send(numbers[1])
    began = time.monotonic()
    code = run.end(30)
    assert "Traceback" not in run.text and time.monotonic() - began < 5, run.text
    # 0: it had ended in order by then; by the signal itself: it was on its way out
    assert code in (128 + numbers[1], -numbers[1], 0), run.text
    finish(tmp_path, *LONG, *more, f"train.duration={(find_step(tmp_path) or 0) + 1} steps")


def find_step(workdir) -> int | None:
    return next(reversed(steps.complete(workdir)), None)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1.5 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "none", str(folder)], capture_output=True
    )
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.decode()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def sentence(run: Run) -> str:
    errors = [line for line in run.lines if line.startswith("error: ")]
    warned = run.text.count(
        "ResourceWarning: unclosed file"
    )  # of tests: errors that users never see
    assert len(errors) == 1 and run.text.count("Traceback") <= warned, run.text
    return errors[0]


def test_a_full_disk_at_save_and_the_same_command_with_room(small_disk):
    run = Run(small_disk / "w", *LONG, "train.save_every=2 steps", "train.duration=400 steps")
    assert run.end() == 1, run.text
    text, step = sentence(run), find_step(small_disk / "w")
    assert step and "no space left" in text and f"step {step} is safe" in text, text
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    end = f"train.duration={step + 4} steps"
    assert f"resumed from step {step}" in finish(small_disk / "w", *LONG, end)


@pytest.mark.parametrize("tensorboard", ["false", "true"])
def test_a_full_disk_at_the_log(small_disk, tensorboard):
    run = Run(small_disk / "w", *LONG, f"log.tensorboard={tensorboard}")
    run.wait_for("step 3 ")
    filler = small_disk / "filler"
    with open(filler, "wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 4096):
                pass
        except OSError:
            pass
    assert run.end() == 1, run.text
    assert "no space left" in sentence(run) and "free some space" in sentence(run)
    assert "is not saved" in run.text or "is saved" in run.text  # what became of the last step
    filler.unlink()
    end = f"train.duration={(find_step(small_disk / 'w') or 0) + 3} steps"
    finish(small_disk / "w", *LONG, end)
    for line in (small_disk / "w" / METRICS).read_text().splitlines():
        json.loads(line)


def test_a_folder_that_cannot_be_written(tmp_path):
    places = {"read-only": tmp_path / "read", "a file": tmp_path / "file", "/proc": "/proc/w"}
    (tmp_path / "file").write_text("")
    made = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "ro", "none", str(tmp_path / "read")],
            capture_output=True,
        )
        if not (tmp_path / "read").mkdir()
        else None
    )
    if made.returncode:
        del places["read-only"]
    try:
        for place in places.values():
            run = Run(place, *LONG)
            assert run.end() == 1 and len(run.lines) <= 2, run.text
            assert "--workdir" in sentence(run)
    finally:
        if not made.returncode:
            subprocess.run(["umount", "-l", str(tmp_path / "read")], check=True)


def test_a_folder_that_vanishes(tmp_path):
    run = Run(tmp_path / "w", *LONG, "train.save_every=50 steps")
    run.wait_for("step 3 ")
    os.rename(tmp_path / "w", tmp_path / "elsewhere")
    assert run.end() == 1
    assert "is gone" in sentence(run) or "no such file" in sentence(run)


def test_a_second_run_in_the_folder_is_refused_and_harms_nothing(tmp_path):
    first = Run(tmp_path, *LONG, "train.save_every=5 steps")
    first.wait_for("compiled in")
    second = Run(tmp_path, *LONG, "train.save_every=5 steps")
    assert second.end() == 1 and "--workdir" in sentence(second)
    assert str(first.process.pid) in sentence(second)
    first.send(signal.SIGKILL)
    first.end()
    before = find_step(tmp_path)  # a dead run's lock is taken over
    end = f"train.duration={(before or 0) + 5} steps"
    text = finish(tmp_path, *LONG, end)
    assert before is None or f"resumed from step {before}" in text
    assert find(tmp_path).step == (before or 0) + 5


def test_a_redirected_log_of_a_killed_run_has_its_lines(tmp_path):
    with open(tmp_path / "log", "w") as log:
        run = Run(tmp_path / "w", *LONG)  # its pipe is no terminal either
        run.wait_for("step 3 ")
        run.send(signal.SIGKILL)
        run.end()
        log.write(run.text)
    assert "step 3 " in (tmp_path / "log").read_text()
