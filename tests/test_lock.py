"""Two runs never write to one folder, and a dead one keeps nobody out."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ogdm_jax import places
from ogdm_jax.training import lock
from tests.support import bucket as buckets

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "PERIOD", 0.05)
    monkeypatch.setattr(lock, "SILENCE", 0.5)
    monkeypatch.setattr(lock, "_SETTLE", 0.05)


def silent(text: str) -> None:
    raise AssertionError(f"nothing is to be said, but: {text}")


def edit(folder, **changes):
    """The lock's file with other entries."""
    path = folder / lock.NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_second_is_refused_by_name_and_may_come_after_the_first(tmp_path):
    with lock.hold(tmp_path, silent) as held:
        with pytest.raises(lock.LockError) as caught, lock.hold(tmp_path, silent):
            pass
        words = str(caught.value)
        assert str(tmp_path) in words and f"process {os.getpid()} of " in words
        assert "since 20" in words and "wait until it ends" in words
        held.check()
    assert not list(tmp_path.iterdir())
    with lock.hold(tmp_path, silent):
        pass


def test_it_goes_with_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), lock.hold(tmp_path, silent):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


PROGRAM = """
import sys, time
from ogdm_jax.training import lock
with lock.hold(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_killed_process_of_this_machine_is_known_at_once(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", PROGRAM, tmp_path], stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(lock.LockError, match=f"process {other.pid} "):
        lock.Lock(places.place(tmp_path)).take(silent)
    other.send_signal(signal.SIGKILL)
    while lock._started(other.pid):  # not waited for: it stays in the list, dead
        time.sleep(0.01)
    lines = []
    with lock.hold(tmp_path, lines.append):
        assert len(lines) == 1 and f"process {other.pid} " in lines[0] and "taken over" in lines[0]
    other.communicate()


def test_a_number_that_another_process_has_now_is_no_sign_of_life(tmp_path):
    with lock.hold(tmp_path, silent):
        edit(tmp_path, started="1")
        lines = []
        with lock.hold(tmp_path, lines.append):
            assert "taken over" in lines[0]


def test_another_machine_is_watched(tmp_path):
    with lock.hold(tmp_path, silent):
        edit(tmp_path, token="x", machine="another", host="faraway")
    lines = []
    with lock.hold(tmp_path, lines.append):
        assert "watching for up to" in lines[0] and "of faraway" in lines[0]
        assert "taken over" in lines[1]


def test_another_machine_that_beats_is_left_alone(tmp_path, monkeypatch):
    with lock.hold(tmp_path, silent):
        monkeypatch.setattr(lock, "_machine", lambda: "another")
        with pytest.raises(lock.LockError, match="in use by process"):
            lock.Lock(places.place(tmp_path)).take(lambda _: None)


def test_who_was_taken_over_learns_it_and_leaves_the_file(tmp_path):
    with lock.hold(tmp_path, silent) as held:
        edit(tmp_path, token="y", host="thief")
        end = time.monotonic() + 5
        while time.monotonic() < end and not held._lost:
            time.sleep(0.01)
        with pytest.raises(lock.LockError, match="taken over by process .* of thief"):
            held.check()
    assert json.loads((tmp_path / lock.NAME).read_text())["host"] == "thief"


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"{}", b"\xff\x00", b'{"token": 3}'])
def test_a_broken_file_keeps_nobody_out(tmp_path, content):
    (tmp_path / lock.NAME).write_bytes(content)
    lines = []
    with lock.hold(tmp_path, lines.append):
        assert "unknown run" in lines[0] and "taken over" in lines[1]


def test_a_folder_that_is_gone_is_not_made_again(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with lock.hold(folder, silent):
        (folder / lock.NAME).unlink()
        (folder).rmdir()
        time.sleep(0.3)
        assert not folder.exists()


def test_a_file_that_somebody_took_away_comes_back(tmp_path):
    with lock.hold(tmp_path, silent):
        (tmp_path / lock.NAME).unlink()
        end = time.monotonic() + 5
        while time.monotonic() < end and not (tmp_path / lock.NAME).exists():
            time.sleep(0.01)
        assert (tmp_path / lock.NAME).exists()


def test_a_bucket(tmp_path, monkeypatch):
    there = buckets.install(tmp_path, monkeypatch) / "runs" / "x"
    with lock.hold("gs://bucket/runs/x", silent):
        assert (there / lock.NAME).is_file()
        with pytest.raises(lock.LockError), lock.hold("gs://bucket/runs/x", silent):
            pass
    assert not (there / lock.NAME).exists()


@pytest.mark.default
def test_of_many_that_start_at_once_one_gets_it(tmp_path):
    program = """
import sys, time
from ogdm_jax.training import lock
print("ready", flush=True); sys.stdin.readline()
try:
    with lock.hold(sys.argv[1]):
        print("held", flush=True); sys.stdin.readline()
except lock.LockError:
    print("refused", flush=True)
"""
    (tmp_path / lock.NAME).write_text("{}")  # of a run that died
    with lock.hold(tmp_path, lambda _: None):
        edit(tmp_path, started="1")
        stale = (tmp_path / lock.NAME).read_text()
    (tmp_path / lock.NAME).write_text(stale)
    pipe = subprocess.PIPE
    others = [
        subprocess.Popen([sys.executable, "-c", program, tmp_path], stdin=pipe, stdout=pipe)
        for _ in range(4)
    ]
    for other in others:
        assert other.stdout.readline() == b"ready\n"
    for other in others:
        other.stdin.write(b"\n")
        other.stdin.flush()
    said = [next(w for w in other.stdout if w in (b"held\n", b"refused\n")) for other in others]
    for other in others:
        other.communicate(b"\n")
    assert sorted(said) == [b"held\n"] + [b"refused\n"] * 3
