"""The command lines of the package, run by tests: as a process of its own, or in this one."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ogdm_jax import cli, cluster, startup
from tests.support import compiling, tiny


def script(folder: Path, name: str, *words: str) -> subprocess.CompletedProcess:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": compiling.FLAGS}
    command = [sys.executable, str(tiny.ROOT / name), *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=900)


@contextlib.contextmanager
def inside(folder: Path):
    """The command line in this process: its folder, and none of its process-wide settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(startup, "prepare", lambda: None)
        patch.setattr(cluster, "join", cluster.check)  # JAX runs already, wherever the tests run
        yield patch


def ogdm(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """ogdm WORDS, without the start of a process."""
    return _here(folder, cli.main, "ogdm", *words)


def entry(folder: Path, name: str, *words: str) -> subprocess.CompletedProcess:
    """python NAME WORDS, without the start of a process."""
    return _here(
        folder, lambda: runpy.run_path(str(tiny.ROOT / name), run_name="__main__"), name, *words
    )


def arrays(path: Path) -> dict[str, np.ndarray]:
    """What an npz holds; the file is closed."""
    with np.load(path) as saved:
        return dict(saved)


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) of a picture; the file is closed."""
    with Image.open(path) as picture:
        return picture.size


def _here(folder: Path, main: Callable[[], object], *argv: str) -> subprocess.CompletedProcess:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with inside(folder) as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [*argv])
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())
