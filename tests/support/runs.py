"""Training runs as processes that are cut short: started cheaply, read line by line."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.support import compiling, tiny

CHEAP = (
    *tiny.SMALLEST,
    "data.batch=8",
    "train.keep=100",
    "sample.num=1",
    "sample.steps=1",
    "sample.solver=euler",
    "parallel.devices=1",
)


class Run:
    """One `python train.py`; its lines are kept as they come."""

    def __init__(self, workdir: Path, *settings: str, words: tuple[str, ...] = ()):
        flags = tiny.flags(*CHEAP, *settings)
        env = os.environ | {"XLA_FLAGS": compiling.FLAGS, "JAX_PLATFORMS": "cpu"}
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "train.py", "--workdir", str(workdir), *flags, *words],
            cwd=tiny.ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def wait_for(self, words: str, seconds: float = 240) -> None:
        """Returns once a line has these words."""
        self.wait_until(lambda: any(words in line for line in list(self.lines)), seconds)

    def wait_until(self, true, seconds: float = 240, ends: bool = False) -> None:
        """Returns once true() is. ends: the run may end meanwhile."""
        end = time.monotonic() + seconds
        while not true():
            assert (ends or self.process.poll() is None) and time.monotonic() < end, self.text
            time.sleep(0.005)

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self, seconds: float = 240) -> int:
        """The exit code, once the process has ended by itself."""
        try:
            code = self.process.wait(seconds)
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join(10)
            self.process.stdout.close()
        return code

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def finish(workdir: Path, *settings: str, words: tuple[str, ...] = ()) -> str:
    """The output of a run that ends well."""
    run = Run(workdir, *settings, words=words)
    code = run.end()
    assert code == 0, run.text
    return run.text
