"""Which files of a folder or an archive are the pictures of a set, and what their classes are."""

import collections
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from ogdm_jax.data.labels import Classes, SourceError, one_form
from ogdm_jax.data.pictures import endings, is_picture

# What systems and programs leave beside people's files; names that begin with a dot count too.
_SYSTEM = frozenset(
    "__macosx thumbs.db ehthumbs.db desktop.ini @eadir $recycle.bin lost+found __pycache__ icon\r "
    "#recycle #snapshot".split(" ")
) | {"system volume information"}
_LEFTOVERS = (".bak", "~", ".tmp", ".part", ".crdownload", ".orig", ".old", ".swp", ".download")
# Folders that are parts of a set, as train, train2017, val_images, test-set; no classes.
_PART = r"[-_]?(images?|imgs?|sets?|data|split|[0-9]+)?"
_TRAIN = re.compile(rf"train(ing)?{_PART}", re.IGNORECASE)
_OTHER = re.compile(rf"(val(id(ation)?)?|dev|test(ing)?|eval|holdout){_PART}", re.IGNORECASE)
_SNIFFED = 16  # files of an unknown ending that are looked into before the rest is left out


class Files(NamedTuple):
    """What lies below a folder: names of files and of folders, relative, and notes."""

    names: list[str]
    folders: list[str]
    notes: list[str]


def walk(source: str, root: str) -> Files:
    """Everything below a local folder but hidden and system files; links are followed.

    Within a sub-folder of the root every folder is read once, so links in a circle end.

    Raises:
      SourceError: a folder that cannot be read.
    """
    files, hidden, lost, again = Files([], [], []), [], [], []
    top = os.stat(root)
    seen: dict[str, set] = collections.defaultdict(lambda: {(top.st_dev, top.st_ino)})
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(os.path.join(root, folder)) as found:
                entries = sorted(found, key=lambda entry: (entry.is_symlink(), entry.name))
        except OSError as error:
            raise SourceError(
                f"{source}: the folder {os.path.join(root, folder)!r} cannot be read "
                f"({error.strerror}); expected folders that this user may read"
            ) from None
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            kind = _kind(entry)
            if is_hidden(entry.name):
                hidden.append(name)
            elif kind == "folder":
                status = entry.stat()
                known, mark = seen[name.split("/")[0]], (status.st_dev, status.st_ino)
                (again if mark in known else files.folders).append(name)
                waiting += [] if mark in known else [name]
                known.add(mark)
            else:
                (files.names if kind == "file" else lost).append(name)
    left = {
        "hidden or system files or folders": hidden,
        "links to folders that are read already": again,
        "links that lead nowhere, or special files": lost,
    }
    return files._replace(notes=[note for what in left for note in _left_out(left[what], what)])


def _kind(entry: os.DirEntry) -> str:
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else ""
    except OSError:  # a link to itself
        return ""


def is_hidden(name: str) -> bool:
    """Whether a path has a part that a system or a program made for itself."""
    parts = name.split("/")
    return any(part.startswith(".") or part.lower() in _SYSTEM for part in parts)


def _left_out(names: Sequence[str], what: str) -> list[str]:
    return [f"left out {len(names)} {what} ({min(names)!r} first)"] if names else []


def pictures(names: Iterable[str], head: Callable[[str], bytes]) -> tuple[list[str], list[str]]:
    """The pictures among files, sorted, and notes on the others.

    A file is a picture by its ending. Of each other ending a few files are looked into; where one
    of them is a picture, all are.

    Args:
      names: of files.
      head: the first bytes of a file; b"" where it cannot be read.
    """
    known, kept, unknown = endings(), [], collections.defaultdict(list)
    hidden, left = [], collections.Counter()
    for name in sorted(names, key=_in_one_form):
        ending = PurePosixPath(name).suffix.lower()
        if is_hidden(name):
            hidden.append(name)
        elif name.lower().endswith(_LEFTOVERS):
            left[ending] += 1
        elif ending in known:
            kept.append(name)
        elif name.split("/")[-1] != "dataset.json":
            unknown[ending].append(name)
    other = []
    for ending, files in unknown.items():
        some = [name for name in files[:_SNIFFED] if is_picture(head(name))]
        if some:
            some += [name for name in files[_SNIFFED:] if is_picture(head(name))]
        other += some
        left[ending or "without ending"] += len(files) - len(some)
    notes = _left_out(hidden, "hidden or system files")
    if total := left.total():
        kinds = ", ".join(f"{count} {ending}" for ending, count in left.most_common(5) if count)
        notes.append(f"left out {total} files that are no pictures ({kinds})")
    if other:
        notes.append(f"reads {len(other)} pictures of other endings ({min(other)!r} first)")
    return sorted(kept + other, key=_in_one_form), notes


def _in_one_form(name: str) -> tuple[str, str]:
    """What files are sorted by: a Mac's copy of a folder has names in another form of Unicode."""
    return unicodedata.normalize("NFC", name), name


def classes(source: str, names: list[str], folders: Iterable[str]) -> Classes:
    """The classes of pictures: the first folder of each, sorted, in the order of numbers where all
    are numbers. A folder that everything lies in is no class.

    Raises:
      SourceError: pictures beside folders of pictures, or folders that are splits.
    """
    start, notes = len(_shared(names)), []
    if start:
        notes.append(f"everything lies in {names[0][:start]!r}: its sub-folders are the classes")
    tops = [name[start:].partition("/")[0] if "/" in name[start:] else "" for name in names]
    tops = one_form(tops)
    found = sorted(set(tops))
    if found == [""]:
        return Classes(notes=tuple(notes))
    if "" in found:
        raise SourceError(
            f"{source}: has images both at its top ({names[tops.index('')]}) and in sub-folders; "
            "put every image in a class's sub-folder"
        )
    trains = [top for top in found if _TRAIN.fullmatch(top)]
    others = [top for top in found if _OTHER.fullmatch(top)]
    if trains and others or len(found) == len(others) > 1:
        kind, _, path = source.partition(":")
        first = (trains or others)[0]
        folder = f"{path.rstrip('/').removesuffix('.zip')}/{names[0][:start]}{first}"
        raise SourceError(
            f"{source}: its sub-folders are splits ({', '.join(trains + others)}), no classes; "
            f"{'' if kind == 'folder' else 'unpack it and '}open one of them: folder:{folder}"
        )
    if all(re.fullmatch("[0-9]{5}", top) for top in found) and all(
        re.search(r"/img[0-9]{8}\.\w+$", name) for name in names
    ):
        return Classes(notes=(*notes, "has EDM's numbered folders and no dataset.json: no classes"))
    if all(re.fullmatch("[0-9]+", top) for top in found):
        found.sort(key=lambda top: (int(top), top))
        if other := [f"{top!r} is class {k}" for k, top in enumerate(found) if int(top) != k]:
            notes.append(f"its folders are not numbered from 0 without gaps: folder {other[0]}")
    inside = {*one_form([f[start:].split("/")[0] for f in folders if len(f) > start])}
    notes += _left_out(sorted(inside - {*found, ""}), "sub-folders without pictures: no classes")
    if len(found) == 1:
        notes.append(f"has one class only, the folder {found[0]!r}")
    deep = [name for name in names if name.count("/", start) > 1]
    if deep:
        notes.append(
            f"{len(deep)} pictures lie deeper than one sub-folder ({deep[0]} first): their class "
            "is the first folder"
        )
    number = {top: k for k, top in enumerate(found)}
    labels = np.array([number[top] for top in tops], np.int32)
    return Classes(labels, tuple(found), tuple(notes))


def _shared(names: Sequence[str]) -> str:
    """The folders that all pictures lie in, with a slash, as far as folders lie in them."""
    shared = ""
    while True:
        start = len(shared)
        first, slash, rest = names[0][start:].partition("/")
        more = f"{shared}{first}/"
        if not slash or not all(name.startswith(more) for name in names):
            return shared
        if not any("/" in name[len(more) :] for name in names):
            return shared
        shared = more
