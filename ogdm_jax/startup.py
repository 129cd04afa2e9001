"""What every command line does before JAX starts, and how it ends on bad input."""

import errno
import io
import logging
import os
import select
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax

STOPPED = 130  # exit code after Ctrl-C: 128 and the signal's number, as shells have it
_REMEDIES = {
    errno.ENOSPC: "free some space, then give the same command again",
    errno.EDQUOT: "free some of your quota, then give the same command again",
    errno.EROFS: "expected a place that can be written",
    errno.ENOENT: "expected a path that exists",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def prepare() -> None:
    """Process-wide settings of the entry points; call it before anything of JAX runs, in a notebook
    in the first cell. A user's own settings win.

    On a CPU, jaxlib sends convolutions of up to 64 channels to a path that uses one core; the XLA
    flag sends them back. Compiled programs are kept in a cache on disk, so that the second start of
    a command compiles little.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_experimental_ynn_fusion_type" not in flags:
        os.environ["XLA_FLAGS"] = (
            f"{flags} --xla_cpu_experimental_ynn_fusion_type=-individual_convolution".strip()
        )
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        # a user without a home, as in some containers, has no cache
        folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        if not folder.startswith("~"):
            cache = Path(folder) / "ogdm_jax" / "xla"
            jax.config.update("jax_compilation_cache_dir", str(cache))
    print_lines()
    logging.getLogger("absl").setLevel(logging.WARNING)  # orbax logs dozens of lines a save


def print_lines() -> None:
    """A log in a file has all lines of a killed run, and file names that are no text are shown
    escaped.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turns errors that a user can mend into one sentence on stderr and exit code 1.

    Those are the errors that this package raises itself; whatever comes from inside a library keeps
    its traceback. Ctrl-C ends with the code that shells give it, STOPPED.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        if not _unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (ValueError, RuntimeError) as error:
        if not raised_here(error):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        end_on_interrupt()
        print("stopped", file=sys.stderr)
        raise SystemExit(STOPPED) from None
    except OSError as error:  # a file, a place, space or permission: never a fault of the program
        print(f"error: {sentence_of(error)}", file=sys.stderr)
        raise SystemExit(1) from None


@contextmanager
def command() -> Iterator[None]:
    """What every command runs in: `one_sentence`, after `prepare`."""
    with one_sentence():
        prepare()
        yield


def end_on_interrupt() -> None:
    """From now on Ctrl-C ends the process without a word: it is on its way out."""
    with suppress(ValueError):  # another thread than the main one has no signals
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def sentence_of(error: OSError) -> str:
    """What an error of the operating system says, with the file and what to do."""
    names = [name for name in (error.filename, error.filename2) if name]
    files = " and ".join(repr(os.fspath(name)) for name in names)
    reason = (error.strerror or " ".join(str(error).split()) or type(error).__name__).lower()
    remedy = _REMEDIES.get(error.errno or 0, "expected a file or folder that this user may use")
    return f"{files or 'the operating system'}: {reason}; {remedy}"


def _unread() -> bool:
    """Whether the program that read what this one prints (head, less) has ended."""
    try:
        poll = select.poll()
        poll.register(sys.stdout, select.POLLOUT)
    except OSError:  # standard output is no file
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def raised_here(error: Exception) -> bool:
    """Whether this package wrote the sentence, rather than a library or Python."""
    frames = [
        frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    return frames[-1].split(".")[0] in ("ogdm_jax", "__main__")


def split_overrides(rest: list[str]) -> list[str]:
    """["--config.a.b=1", "--config.c", "2"] -> ["a.b=1", "c=2"].

    Raises:
      ValueError: anything else.
    """
    overrides, words = [], list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--config."):
            spaces = (
                ""
                if word.startswith("-") or not overrides
                else ("; a value with spaces is quoted, as in '--config.train.duration=10 kimg'")
            )
            raise ValueError(
                f"{word}: unknown argument; expected --config.KEY=VALUE or one of those that "
                f"--help lists{spaces}"
            )
        key = word.removeprefix("--config.")
        if "=" not in key and words and not words[0].startswith("--"):
            key = f"{key}={words.pop(0)}"
        overrides.append(key)
    return overrides
