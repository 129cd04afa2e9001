"""`data check`: reads every picture of a set and says what is bad, odd or left out."""

import collections
import hashlib
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ogdm_jax.data.base import Label, Reader, Stored, by_threads, from_arrays
from ogdm_jax.data.files import FolderReader
from ogdm_jax.data.labels import SourceError, normal
from ogdm_jax.data.pictures import PictureError, fit, with_channels
from ogdm_jax.data.sources import check_size, stored

_HUGE = 4096  # pixels a side
_PLAIN = {"L": "grey", "RGB": "RGB"}
_MODES = {
    "1": "black and white: read as grey",
    "P": "with a palette: read as RGB",
    "CMYK": "CMYK: read as RGB without a profile",
    "YCbCr": "YCbCr: read as RGB",
    "HSV": "HSV: read as RGB",
    "LAB": "LAB: read as RGB",
}


class _Seen(NamedTuple):
    """One picture: why it is bad ("" where it is not), its size and kind, and what is odd of it."""

    bad: str
    size: str = ""
    kind: str = ""
    odd: tuple[str, ...] = ()
    mark: bytes = b""
    label: Label = None


def check(
    name: str,
    data_dir: str | None = None,
    resolution: int | None = None,
    channels: int | None = None,
) -> dict[str, Any]:
    """Reads a whole set, as `open_source` names it, and goes on behind what is bad.

    Returns:
      source; images and readable, their numbers; bad: [{"file", "reason"}]; odd: [{"what", "count",
      "first"}]; ignored: a sentence each; sizes and kinds: {name: number}; classes, class_names and
      class_counts.

    Raises:
      SourceError: the set cannot be opened at all.
    """
    check_size(name, resolution, channels)
    found = stored(name, data_dir, resolution, channels)
    if not isinstance(found, Stored):
        source = from_arrays(name, *found[:3], None, None, found.notes)
        assert source.images is not None, "made of arrays"
        found = Stored(_Array(source.images), source.labels, source.class_names, source.notes)
    reader = found.reader
    look = lambda i: _look(reader, i, resolution, channels)
    pictures = by_threads(look, range(len(reader)))
    seen = list(tqdm(pictures, total=len(reader), disable=None))
    bad = [{"file": reader.where(i), "reason": one.bad} for i, one in enumerate(seen) if one.bad]
    labels = found.labels
    if labels is None and any(one.label is not None for one in seen):
        labels = np.array([-1 if one.label is None else one.label for one in seen])
    about: dict[str, Any] = {"classes": len(found.class_names), "class_counts": []}
    notes = list(found.notes)
    if labels is not None:
        try:
            normed = normal(name, labels, len(reader), found.class_names)
        except SourceError as error:
            bad.insert(0, {"file": "labels", "reason": str(error).removeprefix(f"{name}: ")})
        else:
            labels, notes = normed.values, [*notes, *normed.notes]
            about["classes"] = normed.classes
            if labels.ndim == 1:
                counts = np.bincount(labels[labels >= 0], minlength=normed.classes)
                about["class_counts"] = counts.tolist()
    sizes = collections.Counter(one.size for one in seen if one.size)
    kinds = collections.Counter(one.kind for one in seen if one.kind)
    return {
        "source": name,
        "images": len(reader),
        "readable": sum(not one.bad for one in seen),
        "bad": bad,
        "odd": _odd(reader, seen, labels, sizes if resolution is None else {}),
        "ignored": list(dict.fromkeys(notes)),
        "sizes": dict(sizes.most_common()),
        "kinds": dict(kinds.most_common()),
        "class_names": list(found.class_names),
    } | about


class _Array(Reader):
    """Images that are an array already."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def read(self, i: int) -> tuple[np.ndarray, Label]:
        return self.images[i], None

    def where(self, i: int) -> str:
        return f"image {i}"


def _look(reader: Reader, i: int, resolution: int | None, channels: int | None) -> _Seen:
    facts: dict[str, Any] = {}
    try:
        if isinstance(reader, FolderReader):
            image, label = reader.look(i, facts), reader.caption(i)
        else:
            image, label = reader.read(i)
        height, width = image.shape[-3:-1]
        wide, high = facts.get("size", (width, height))
        size = f"{width}x{height}"
        if channels:
            with_channels(fit(image, resolution), channels)
    except (PictureError, SourceError) as error:
        words = str(error).partition(f"{reader.where(i)} ")[2] or str(error)
        return _Seen(words.partition("; replace")[0])
    mode = facts.get("mode", "L" if image.shape[-1] == 1 else "RGB")
    wider = "of 16 bits: scaled to 8" if mode.startswith("I") else "transparent: laid on white"
    odd = {
        "of several frames: the first is read": facts.get("frames"),
        _MODES.get(mode, wider): mode not in _PLAIN,
        "turned by their EXIF data": (wide, high) != (width, height),
        f"larger than {_HUGE} pixels": max(width, height) > _HUGE,
        f"smaller than {resolution} pixels: enlarged": min(width, height) < (resolution or 0),
        "not square: cropped": resolution and width != height,
        "of one colour": image.min() == image.max(),
    }
    if image.ndim == 4:
        mode = f"latents, {image.dtype}"
    mark = hashlib.blake2b(repr(image.shape).encode() + image.tobytes(), digest_size=12).digest()
    kind = f"{facts['format']} {mode}" if facts else _PLAIN.get(mode, mode)
    found = tuple(words for words, is_so in odd.items() if is_so)
    return _Seen("", size, kind, found, mark, None if isinstance(label, str) else label)


def _odd(
    reader: Reader, seen: list[_Seen], labels: np.ndarray | None, sizes: dict[str, int]
) -> list[dict[str, Any]]:
    """What is odd: [{"what", "count", "first": the names of three of them}]."""
    rows: dict[str, list[int]] = collections.defaultdict(list)
    first: dict[bytes, int] = {}
    usual = max(sizes, key=lambda size: sizes[size], default="")
    for i, one in enumerate(seen):
        for what in one.odd:
            rows[what].append(i)
        if one.bad:
            continue
        if sizes and one.size != usual:
            rows[f"of other sizes than {usual}: needs a resolution"].append(i)
        other = first.setdefault(one.mark, i)
        if other != i:
            rows["copies of earlier ones"].append(i)
            if labels is not None and np.any(labels[other] != labels[i]):
                rows["copies of earlier ones with another label"].append(i)
    if sizes and (side := usual.split("x"))[0] != side[1]:
        rows[f"of {usual} pixels, no squares: training needs a resolution"] = [
            i for i, one in enumerate(seen) if one.size == usual
        ]
    return [
        {"what": what, "count": len(found), "first": [reader.where(i) for i in found[:3]]}
        for what, found in rows.items()
    ]


def in_words(report: dict[str, Any], most: int = 20) -> str:
    """A report of `check` as lines to read."""

    def table(values: dict[str, int]) -> str:
        shown = ", ".join(f"{count} {name}" for name, count in list(values.items())[:6])
        return shown + (f", and {len(values) - 6} more" if len(values) > 6 else "")

    lines = [
        f"source   {report['source']}",
        f"images   {report['images']}, of which {report['readable']} can be read",
        f"sizes    {table(report['sizes'])}",
        f"kinds    {table(report['kinds'])}",
        f"classes  {report['classes']}",
    ]
    lines += [f"bad      {one['file']}: {one['reason']}" for one in report["bad"][:most]]
    if len(report["bad"]) > most:
        lines.append(f"bad      and {len(report['bad']) - most} more (--json lists all)")
    lines += [
        f"odd      {one['count']} {one['what']} ({', '.join(one['first'])}"
        f"{', ...' if one['count'] > len(one['first']) else ''})"
        for one in report["odd"]
    ]
    lines += [f"ignored  {note}" for note in report["ignored"]]
    return "\n".join(lines)
