"""Image files: folders (sub-folders are classes) and EDM's zip archives, read with Pillow."""

import io
import json
import threading
import zipfile
import zlib
from pathlib import PurePath

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ogdm_jax.data.sources import SourceError
from ogdm_jax.places import files_below, is_local, place

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, KeyError, zlib.error, zipfile.BadZipFile)
_UNREADABLE += (UnidentifiedImageError, Image.DecompressionBombError, NotImplementedError, RuntimeError)


class FolderReader:
    """Files below a folder, in the order of `names` (paths relative to it)."""

    def __init__(self, source: str, root: str, names: list[str], labels: np.ndarray | None):
        self.source, self.root, self.names, self.labels = source, root, names, labels

    def __len__(self) -> int:
        return len(self.names)

    def where(self, i: int) -> str:
        return self.names[i]

    def content(self, name: str) -> bytes:
        return (place(self.root) / name).read_bytes()

    def read(self, i: int) -> tuple[np.ndarray, None]:
        """(uint8 [h,w,1 or 3], None): labels are known ahead."""
        try:
            return decode(self.content(self.names[i])), None
        except _UNREADABLE as error:
            raise SourceError(
                f"{self.source}: {self.names[i]} is no readable image ({type(error).__name__}); replace or remove it"
            ) from None


class ZipReader(FolderReader):
    """Members of a zip archive; each thread and each unpickled copy opens its own handle."""

    def __init__(self, *settings):
        super().__init__(*settings)
        self._local = threading.local()

    def __reduce__(self):
        return ZipReader, (self.source, self.root, self.names, self.labels)

    def content(self, name: str) -> bytes:
        if not hasattr(self._local, "archive"):
            file = place(self.root)
            self._local.archive = zipfile.ZipFile(file if is_local(file) else file.open("rb"))
        return self._local.archive.read(name)


def open_folder(source: str, path: str) -> tuple[FolderReader, tuple[str, ...]]:
    """A folder of images, sorted by path. Classes: dataset.json as in EDM's zip where present, else sub-folder names.

    Returns:
      (reader, class names). Images directly in the folder and in sub-folders at once are refused: the former would
      have no class.
    """
    root = place(path)
    if not root.is_dir():
        raise SourceError(f"{source}: there is no folder {path}; expected a folder of images, one sub-folder a class")
    names = sorted(name for name in files_below(root) if PurePath(name).suffix.lower() in SUFFIXES)
    if not names:
        raise SourceError(f"{source}: has no images; expected files such as CLASS/NAME.png or NAME.png in it")
    if (root / "dataset.json").is_file():
        labels = _json_labels(source, (root / "dataset.json").read_bytes(), names)
        return FolderReader(source, path, names, labels), ()
    classes = sorted({n.split("/")[0] for n in names if "/" in n})
    if classes and any("/" not in n for n in names):
        raise SourceError(
            f"{source}: has images both at its top and in sub-folders; put every image in a class's sub-folder"
        )
    labels = np.array([classes.index(n.split("/")[0]) for n in names], np.int32) if classes else None
    return FolderReader(source, path, names, labels), tuple(classes)


def open_zip(source: str, path: str) -> tuple[ZipReader, tuple[str, ...]]:
    """EDM's archive: images sorted by name; dataset.json {"labels": [[name, integer or float vector], ...] or null}."""
    if not place(path).is_file():
        raise SourceError(
            f"{source}: there is no file {path}; make one by python -m ogdm_jax.data prepare folder:DIR --out {path}"
        )
    try:
        with place(path).open("rb") as file, zipfile.ZipFile(file) as archive:
            members = archive.namelist()
            table = archive.read("dataset.json") if "dataset.json" in members else None
    except _UNREADABLE as error:
        raise SourceError(f"{source}: {path} is no readable zip archive ({type(error).__name__})") from None
    names = sorted(n for n in members if PurePath(n).suffix.lower() in SUFFIXES and not n.startswith("__MACOSX"))
    if not names:
        raise SourceError(f"{source}: has no images; expected files such as 00000/img00000000.png in it")
    labels = None if table is None else _json_labels(source, table, names)
    return ZipReader(source, path, names, labels), ()


def decode(content: bytes) -> np.ndarray:
    """An encoded image as uint8 [h,w,1] (grey) or [h,w,3]; transparency is laid on white, EXIF rotation applied."""
    with Image.open(io.BytesIO(content)) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError("more than 8 bits a channel")
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        grey = image.mode in ("L", "1")
        array = np.asarray(image.convert("L" if grey else "RGB"))
    return array[:, :, None] if grey else array


def encode(image: np.ndarray, compress_level: int = 6) -> bytes:
    """uint8 [h,w,1 or 3] as PNG; compress_level 0 to 9, 0 = uncompressed."""
    buffer = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[-1] == 1 else image).save(
        buffer, "PNG", compress_level=compress_level
    )
    return buffer.getvalue()


def _json_labels(source: str, content: bytes, names: list[str]) -> np.ndarray | None:
    try:
        pairs = json.loads(content)["labels"]
        table = None if pairs is None else {str(name).replace("\\", "/"): label for name, label in pairs}
    except (ValueError, KeyError, TypeError):
        raise SourceError(
            f'{source}: dataset.json is malformed; expected {{"labels": [[name, label], ...]}} or null'
        ) from None
    if table is None:
        return None
    missing = next((n for n in names if n not in table), None)
    if missing is not None:
        raise SourceError(f"{source}: dataset.json has no label for {missing}; expected one for every image, or null")
    labels = [table[n] for n in names]
    try:
        return np.array(labels)
    except ValueError:
        raise SourceError(
            f"{source}: dataset.json mixes kinds of labels; expected all integers or all vectors of one length"
        ) from None
