"""Whether the files of a checkpoint are those that were written.

    checkpoints/STEP/checksums.json    {"params/manifest.ocdbt": [bytes, crc32], ...}

The thread that saves reads the finished files once more and writes the list before the folder gets
its name. (Of a checkpoint's files, tensorstore has checksums of its own in the nodes of its index
alone: an array's bytes are read as they are.) Checkpoints of before have no list: what can be seen
of them is that files are missing or empty. Nor have those in buckets, whose storage compares
checksums itself; to read all of it once more would double the transfer.
"""

import pathlib
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from ogdm_jax import places, records

ITEMS = ("params", "ema", "state", "config", "data")
NAME = "checksums.json"
_CHUNK = 1 << 22
_THREADS = 4  # crc32 reads about 3 GB/s each
# Without them orbax finds nothing in an item's folder.
_LEAST = {item: ("_METADATA", "manifest.ocdbt") for item in ("params", "ema", "state")}
_LEAST |= {item: ("metadata",) for item in ("config", "data")}


def write(step: epath.Path) -> None:
    """Writes the list of a checkpoint's folder; nothing in a bucket.

    What lies beside the items is left out: orbax still writes there, and nothing is read from it.
    """
    if not places.is_local(step):
        return
    names = [name for name in _sizes(step) if name.partition("/")[0] in ITEMS]
    records.write(step / NAME, _sums(step, names))


def damage(step: epath.Path, items: Sequence[str] = ()) -> str:
    """What is wrong with a checkpoint, in words for a sentence; "" where nothing is.

    All files have to be there, in their full size; in buckets they are.

    Args:
      step: its folder.
      items: those whose files are read to compare their checksums.

    Raises:
      OSError: files are there that cannot be read.
    """
    if not step.is_dir():
        return "is no folder"
    try:
        return "" if not places.is_local(step) else _difference(step, items)
    except FileNotFoundError as error:  # removed while it is looked at
        return f"{error.filename} is missing"


def _difference(step: epath.Path, items: Sequence[str]) -> str:
    sizes = _sizes(step)
    for name in (f"{item}/{name}" for item in ITEMS for name in _LEAST[item]):
        if name not in sizes:
            return f"{name} is missing"
    if NAME not in sizes:
        empty = [name for name, size in sizes.items() if not size]
        return f"{empty[0]} is empty" if empty else ""
    try:
        listed = records.read(step / NAME, dict, "checkpoint")
    except records.RecordError as error:
        return str(error)
    wrong = [name for name, entry in listed.items() if [sizes.get(name)] != _part(entry, 0)]
    if wrong:
        what = "has another size than was written" if wrong[0] in sizes else "is missing"
        return f"{wrong[0]} {what}"
    names = [name for name in listed if name.partition("/")[0] in items]
    for name, found in _sums(step, names).items():
        if found[1:] != _part(listed[name], 1):
            return f"{name} has another checksum than was written"
    return ""


def _part(entry: object, index: int) -> list[object]:
    return entry[index : index + 1] if isinstance(entry, list) else []


def _sizes(step: epath.Path) -> dict[str, int]:
    """{name: bytes} of all files below a local folder. Raises OSError where one is closed to us."""
    top = pathlib.Path(step)
    return {name: (top / name).stat().st_size for name in places.files_below(step)}


def _sums(step: epath.Path, names: Sequence[str]) -> dict[str, list[int]]:
    """{name: [bytes, crc32]} of files, which are read."""

    def of(name: str) -> list[int]:
        size = value = 0
        with open(pathlib.Path(step) / name, "rb") as file:
            while chunk := file.read(_CHUNK):
                size, value = size + len(chunk), zlib.crc32(chunk, value)
        return [size, value]

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(of, names), strict=True))
