"""Malicious, damaged and random files: refused with one sentence, nothing runs, memory stays near
the file's size.
"""

import resource
import subprocess
import sys
import time

import numpy as np
import pytest

from ogdm_jax.interop import UnsafeFileError, read_torch
from tests.support import hostile

CASES = hostile.table()
WATCHED = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "exec",
    "compile",
    "pickle.find_class",
    "socket.connect",
)
_seen: list[str] | None = None


def _hook(event: str, _args: tuple) -> None:
    if _seen is not None and event in WATCHED:
        _seen.append(event)


sys.addaudithook(_hook)  # cannot be removed: does nothing while _seen is None


def read_watched(path) -> tuple[Exception | None, list[str]]:
    """What reading a file raised, and the events of running code."""
    global _seen
    _seen, error = [], None
    try:
        read_torch(path)
    except ValueError as caught:
        error = caught
    finally:
        events, _seen = _seen, None
    return error, events


@pytest.mark.fast
@pytest.mark.parametrize("name", CASES)
def test_refused_with_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, fragment = CASES[name]
    path = tmp_path / name
    path.write_bytes(data)
    error, events = read_watched(path)
    assert isinstance(error, UnsafeFileError), f"{name} was read"
    message = str(error)
    assert fragment in message and str(path) in message, message
    assert "\n" not in message and message.endswith(".") and len(message) < len(str(path)) + 260, (
        message
    )
    assert not events and not (tmp_path / "executed").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux", reason="a process's peak memory is read as Linux gives it"
)
def test_memory_and_time_of_refusals_stay_near_the_files_size(tmp_path):
    for name, (data, _) in CASES.items():
        (tmp_path / name).write_bytes(data)
    measured = hostile.read_apart(tmp_path, CASES)
    assert list(measured) == list(CASES)
    for name, (data, fragment) in CASES.items():
        said, peak, seconds = measured[name]
        assert fragment in said
        instructions = 200 * min(
            len(data), 1_000_000
        )  # an instruction of one byte can make an object of about 100
        allowed = 4 * len(data) + (20 << 20) + (instructions if name.endswith(".pkl") else 0)
        assert peak < allowed, f"{name}: {peak / 1e6:.0f} MB"
        assert seconds < 10, f"{name}: {seconds:.1f} s"


def test_missing_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_torch(tmp_path / "nothing.pt")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_torch(tmp_path)


@pytest.mark.parametrize("name", hostile.good())
def test_every_truncation_is_refused(name, tmp_path):
    data = hostile.good()[name]
    path = tmp_path / name
    path.write_bytes(data)
    assert read_torch(path)
    for cut in sorted({*range(0, len(data), max(1, len(data) // 200)), len(data) - 1}):
        path.write_bytes(data[:cut])
        with pytest.raises(UnsafeFileError):
            read_torch(path)


@pytest.mark.parametrize("name", hostile.good())
def test_fuzz(name, tmp_path):
    """Random edits of healthy files: they are read or refused, within memory, and nothing else
    happens.
    """
    global _seen
    rng, path = np.random.default_rng(len(name)), tmp_path / name
    start, refused, rounds = time.monotonic(), 0, 0
    data = hostile.good()[name]
    _seen = []
    try:
        while rounds < 1500 and time.monotonic() - start < 2.0:
            edited = bytearray(data)
            for _ in range(rng.integers(1, 4)):
                at, kind = int(rng.integers(len(edited))), rng.integers(4)
                if kind == 0:
                    edited[at] ^= 1 << int(rng.integers(8))
                elif kind == 1:
                    edited[at] = int(rng.integers(256))
                elif kind == 2:
                    del edited[at : at + int(rng.integers(1, 9))]
                else:
                    edited[at:at] = rng.bytes(int(rng.integers(1, 9)))
            path.write_bytes(edited)
            rounds += 1
            try:
                read_torch(path)
            except UnsafeFileError as error:
                refused += 1
                assert "\n" not in str(error)
    finally:
        events, _seen = _seen, None
    assert not events
    assert refused > rounds // 10, (refused, rounds)


def test_pickles_of_random_instructions(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "x.pkl"
    from ogdm_jax.interop.restricted_pickle import _INSTRUCTIONS

    codes, start = np.array(sorted(_INSTRUCTIONS)), time.monotonic()
    for _ in range(3000):
        if time.monotonic() - start > 2.0:
            break
        path.write_bytes(b"\x80\x04" + bytes(rng.choice(codes, 60).astype(np.uint8)) + b".")
        with pytest.raises(UnsafeFileError):
            read_torch(path)


def test_a_process_with_little_memory_survives(tmp_path):
    """The refusals need no memory that a 64 MB allowance over the interpreter's own does not
    give.
    """
    names = [
        name
        for name in CASES
        if "huge" in name or "expanded" in name or "bomb" in name or "header_shape" in name
    ]
    for name in names:
        (tmp_path / name).write_bytes(CASES[name][0])
    code = f"""
import resource, sys
from ogdm_jax.interop import UnsafeFileError, read_torch
used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
for name in {names!r}:
    try:
        read_torch(name)
        sys.exit(1)
    except UnsafeFileError:
        pass
"""
    if not hasattr(resource, "RLIMIT_AS") or sys.platform != "linux":
        pytest.skip("needs Linux's memory limits")
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
