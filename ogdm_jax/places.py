"""Where files are: the one door from a user's words to a path, local or in a bucket.

`place("runs/x")` and `place("gs://bucket/runs/x")` are paths of the same class (etils.epath, as in
orbax and tensorflow-datasets), with pathlib's methods. What has to be a file of this machine
(memory-mapped weights, array_record) asks `local`, which refuses a URI; `written` gives code that
can only write local files one, and puts it where it belongs, whole or not at all.
"""

import errno
import fcntl
import hashlib
import importlib.util
import itertools
import os
import pathlib
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress

from etils import epath

# What reads and writes a scheme: the module that epath asks for, and how it is installed.
LIBRARIES = {
    "gs": ("gcsfs", "pip install 'ogdm_jax[gcs]'"),
    "s3": ("s3fs", "pip install s3fs"),
    "az": ("adlfs", "pip install adlfs"),
    "hf": ("huggingface_hub", "pip install huggingface_hub"),
}
TRAINING = ("gs",)  # of the schemes above: where orbax can write checkpoints
_NO_FOLDER = (errno.ENOTDIR, errno.EEXIST)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class PlaceError(ValueError):
    """A path cannot be used; the message is one sentence that names the setting and the path."""


def place(text: str | os.PathLike, field: str = "path") -> epath.Path:
    """The path that a user's words mean.

    Args:
      text: a local path, or a URI with a scheme of LIBRARIES (file:// is local).
      field: the setting, for messages.

    Raises:
      PlaceError: an unknown scheme, one whose library is not installed, a URI without a bucket, a
        URI that went through pathlib.Path and lost a slash, or no path at all.
    """
    words = os.fspath(text)
    if "\0" in words:
        raise PlaceError(f"{field}: {words!r} has a zero in it; expected a path")
    scheme, separator, rest = words.partition("://")
    if not separator:
        first, colon, rest = words.partition(":")
        if colon and first in LIBRARIES and not pathlib.Path(f"{first}:").exists():
            has = "one slash (pathlib.Path takes the other away)" if rest[:1] == "/" else "no slash"
            raise PlaceError(f"{field}: {words!r} has {has}; expected {first}://")
        return epath.Path(os.path.expanduser(words))
    if scheme == "file":
        return epath.Path(rest)
    if scheme not in LIBRARIES:
        raise PlaceError(
            f"{field}: {words!r} has an unknown scheme; expected a local path or "
            f"{_schemes(LIBRARIES)}"
        )
    library, remedy = LIBRARIES[scheme]
    if importlib.util.find_spec(library) is None and not _tensorflow():
        raise PlaceError(
            f"{field}: {words!r} needs the package {library}; expected it to be installed: {remedy}"
        )
    if not rest.partition("/")[0]:
        raise PlaceError(f"{field}: {words!r} names no bucket; expected {scheme}://BUCKET/FOLDER")
    return epath.Path(words)


def _schemes(names: Iterable[str]) -> str:
    return ", ".join(f"{name}://" for name in names)


def _tensorflow() -> bool:
    """Whether epath reads buckets through TensorFlow, which it prefers where that is installed."""
    return os.environ.get("EPATH_USE_TF", "") not in ("0", "false") and bool(
        importlib.util.find_spec("tensorflow")
    )


def is_local(path: str | os.PathLike) -> bool:
    """Whether a path is on this machine: not a URI, or one of file://."""
    words = os.fspath(path)
    return "://" not in words or words.startswith("file://")


def local(text: str | os.PathLike, field: str = "path") -> pathlib.Path:
    """A path on this machine. Raises PlaceError for a URI: what reads this file needs it here."""
    if not is_local(text):
        raise PlaceError(
            f"{field}: {os.fspath(text)!r} is read on this machine only; expected a local copy of "
            "it"
        )
    return pathlib.Path(os.fspath(text).removeprefix("file://"))


def package(name: str) -> pathlib.Path | None:
    """The folder of an installed package of Python, of which nothing is run; None: not installed.

    Args:
      name: its top-level name, as in import.
    """
    spec = importlib.util.find_spec(name)
    found = spec.submodule_search_locations if spec is not None else None
    return pathlib.Path(found[0]) if found else None


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file of this machine, of which little at a time is in memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def absolute(path: epath.Path) -> epath.Path:
    """As pathlib's: the working folder before a relative path; a URI is absolute."""
    return epath.Path(pathlib.Path(path).absolute()) if is_local(path) else path


def is_uri(word: str) -> bool:
    """Whether a word is a URI: no local path, and no data source such as folder:gs://bucket/x."""
    scheme, separator, _ = word.partition("://")
    return bool(separator) and ":" not in scheme


def join(folder: str | os.PathLike | None, rest: str) -> str:
    """The path of `rest` below a folder.

    It is `rest` alone where there is no folder, or where `rest` is absolute or a URI.
    """
    return str(place(folder) / rest) if folder and is_local(rest) else rest


def workdir(text: str | os.PathLike, field: str = "--workdir") -> epath.Path:
    """As `place`, for a folder with checkpoints.

    Raises:
      PlaceError: as `place`, and for schemes that orbax cannot write to.
    """
    scheme = os.fspath(text).partition("://")[0]
    if scheme in LIBRARIES and scheme not in TRAINING:
        raise PlaceError(
            f"{field}: {os.fspath(text)!r} cannot hold checkpoints (orbax has no {scheme}://); "
            f"expected a local folder or {_schemes(TRAINING)}"
        )
    return place(text, field)


def writable(path: epath.Path, field: str, file: bool = False, keep: bool = False) -> epath.Path:
    """The path, once a file could be written there: to try before hours of computing.

    Args:
      path: a folder, or the file itself with file=True; neither has to exist.
      field: the setting, for messages.
      file: whether the path is that of a file.
      keep: leave the folders that were made for it (for several processes that try at once).

    Raises:
      PlaceError: a file where a folder is needed or the other way round, no permission, no space,
        or an error of the bucket.
    """
    folder = path.parent if file else path
    probe, made = folder / f".ogdm_jax_{os.uname().nodename}_{os.getpid()}", []
    try:
        if file and path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        if file:
            _refuse_device(path)
        made = make(folder)
        probe.write_bytes(bytes(4096))
    except Exception as error:  # bucket libraries raise classes of their own
        raise PlaceError(f"{field}: {str(path)!r} {_reason(error, path, file)}") from None
    finally:
        with suppress(Exception):
            probe.unlink(missing_ok=True)
        unmake(() if keep else made)
    return path


def _refuse_device(path: epath.Path) -> None:
    """A rename onto /dev/null would put a file in its place."""
    if is_local(path) and path.exists() and not (os.path.isfile(path) or path.is_dir()):
        raise OSError(errno.EINVAL, "a device or a pipe, no file", str(path))


def unused(path: epath.Path) -> epath.Path:
    """The path where nothing is yet, else the first of PATH.1, PATH.2, ... where nothing is."""
    names = (path.with_name(f"{path.name}.{n}") for n in itertools.count(1))
    return next(one for one in itertools.chain([path], names) if not one.exists())


def make(folder: epath.Path) -> list[epath.Path]:
    """Makes a folder; returns those that were not there, the deepest first. Buckets have none."""
    if not is_local(folder):
        return []
    missing, at = [], absolute(folder)
    while not at.exists() and at != at.parent:
        missing.append(at)
        at = at.parent
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def begin(folder: epath.Path) -> None:
    """Makes a folder into which `rename` moves: in a bucket, which has no empty ones, by a file."""
    folder.mkdir(parents=True, exist_ok=True)
    if not is_local(folder):
        (folder / ".folder").write_bytes(b"")


def unmake(folders: Iterable[epath.Path]) -> None:
    """Removes what `make` made, where nothing was written."""
    for folder in folders:
        with suppress(OSError):
            os.rmdir(folder)


def _reason(error: Exception, path: epath.Path, file: bool) -> str:
    code = getattr(error, "errno", None)
    if code == errno.EISDIR:
        return "is a folder; expected a file"
    if isinstance(error, NotADirectoryError | FileExistsError) or code in _NO_FOLDER:
        return "is a file, or lies below one; expected a folder that can be written"
    if code in _NO_SPACE:
        return "is on a full disk (4 kB could not be written); expected free space"
    what = (
        getattr(error, "strerror", None)
        or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    )
    return (
        f"cannot be written ({what}); expected a {'file' if file else 'folder'} that this user may "
        "write"
    )


@contextmanager
def written(path: epath.Path) -> Iterator[pathlib.Path]:
    """Yields a local file to write, which becomes `path` when the block ends without an error.

    Otherwise it is removed. Errors of the system name `path` where they name no file.
    """
    with tempfile.TemporaryDirectory() if not is_local(path) else nullcontext("") as folder:
        new = pathlib.Path(folder, path.name)
        if is_local(path):
            _refuse_device(path)
            path = epath.Path(os.path.realpath(path))  # a link stays, and what it names is written
            # No name that people give: what lies there is what a killed process left.
            new = pathlib.Path(path).with_name(f".{path.stem}.unfinished{path.suffix}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new.touch()
            mode = new.stat().st_mode  # by the umask; safetensors makes files for one user alone
            yield new
            new.chmod(mode)
            if is_local(path):
                os.replace(new, path)
            else:
                epath.Path(new).copy(path, overwrite=True)
        except OSError as error:
            error.filename = error.filename or str(path)
            raise
        finally:
            with suppress(OSError):
                new.unlink(missing_ok=True)


@contextmanager
def fetched(*paths: epath.Path) -> Iterator[list[pathlib.Path]]:
    """Yields local files of these names: themselves where they are local, else copies."""
    if all(map(is_local, paths)):
        yield [pathlib.Path(path) for path in paths]
        return
    with tempfile.TemporaryDirectory() as folder:
        yield [pathlib.Path(path.copy(epath.Path(folder) / path.name)) for path in paths]


def files_below(root: epath.Path) -> list[str]:
    """The names of all files below a folder, relative to it, with slashes; in no order.

    Raises:
      OSError: a folder below is closed to this user, or cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    if is_local(root):
        here = pathlib.Path(root)
        walk = os.walk(here, onerror=refuse)
        paths = (pathlib.Path(at, name) for at, _, names in walk for name in names)
        return [path.relative_to(here).as_posix() for path in paths if path.is_file()]
    found, top = [], None
    for at, _, names in root.walk():
        at = str(at)
        top = at if top is None else top  # with or without gs://, as the library has it
        found += [f"{at}/{name}"[len(top) :].lstrip("/") for name in names]
    return found


@contextmanager
def stand_in(folder: epath.Path) -> Iterator[pathlib.Path]:
    """Yields a local folder to write into: the folder itself, or one that is copied to the bucket
    when the block ends.
    """
    if is_local(folder):
        yield pathlib.Path(folder)
        return
    with tempfile.TemporaryDirectory() as made:
        try:
            yield pathlib.Path(made)
        finally:
            mirror(pathlib.Path(made), folder)


@contextmanager
def held(folder: epath.Path, wait: float = 0.0) -> Iterator[bool]:
    """Holds a folder against other processes of this machine while the block runs.

    Yields whether it is held alone. A bucket and a file system without locks hold nothing, and say
    that they do.

    Args:
      folder: that exists.
      wait: seconds to wait for another process.
    """
    if not is_local(folder):
        yield True
        return
    descriptor, end, alone = os.open(folder, os.O_RDONLY), time.monotonic() + wait, False
    try:
        while not alone:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= end:
                    break
                time.sleep(0.05)
                continue
            except OSError:  # the file system has no locks
                pass
            alone = True
        yield alone
    finally:
        os.close(descriptor)


def mirror(folder: pathlib.Path, target: epath.Path) -> None:
    """Copies the files below a local folder to the same names below target."""
    for root, _, names in os.walk(folder):
        for name in names:
            file = pathlib.Path(root, name)
            copy = target / file.relative_to(folder).as_posix()
            copy.parent.mkdir(parents=True, exist_ok=True)
            epath.Path(file).copy(copy, overwrite=True)
