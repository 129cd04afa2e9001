"""What goes wrong while a checkpoint is written or read: one sentence, not the tracebacks of
threads.
"""

import contextlib
import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any, Self

from etils import epath

from ogdm_jax import startup

_CODES = ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "ENOENT", "ENOTDIR", "EIO")
_CODES += ("ESTALE", "EMFILE", "ENFILE", "ENAMETOOLONG")


class Closing:
    """What is closed at the end of a `with`; of two errors the first is the one to be read."""

    def close(self) -> None:
        """Ends what is open; raises where that cannot be."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        with contextlib.suppress(ValueError) if kind else contextlib.nullcontext():
            self.close()


def quiet() -> None:
    """Keeps what orbax and tensorstore print beside an error off the screen, from now on.

    The error itself is raised (of a save, where it is waited for). The threads and tasks of the
    other arrays go on for a while and fail one by one, as late as at the end of the process.
    """
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    if isinstance(sys.unraisablehook, _Hook):
        return
    sys.unraisablehook = _Hook(sys.unraisablehook)
    for name in ("absl", "asyncio"):  # orbax's own, and that of its tasks
        logging.getLogger(name).addFilter(_stays)


def _stays(record: logging.LogRecord) -> bool:
    """A filter: whether a record is no traceback of a save."""
    if not record.exc_info:
        return True
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(record.exc_info[2])]
    return not any("orbax" in text for text in (record.pathname, record.getMessage(), *files))


class _Hook:
    """An unraisablehook that leaves out what is told to an event loop that is gone, and the tasks
    of orbax that end with it.
    """

    def __init__(self, before: Callable[[Any], object]) -> None:
        self._before = before

    def __call__(self, told: Any) -> None:
        code = getattr(told.object, "cr_code", None)
        late = told.object is None and str(told.exc_value) == "Event loop is closed"
        if not late and "orbax" not in getattr(code, "co_filename", ""):
            self._before(told)


def reason(error: BaseException, path: epath.Path) -> str:
    """Why something could not be written at path, from the operating system where it said so."""
    seen: BaseException | None = error
    while seen is not None and not (isinstance(seen, OSError) and seen.errno):
        seen = seen.__cause__ or seen.__context__
    words = " ".join(str(error).split())
    known = (getattr(errno, name) for name in _CODES)
    code = seen.errno if seen else next((c for c in known if os.strerror(c) in words), None)
    if code is None:
        return f"{type(error).__name__}: {words[:300]}"
    return startup.sentence_of(OSError(code, os.strerror(code), str(path)))
