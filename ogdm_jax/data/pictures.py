"""Pictures: the one reader and the one writer of image files, grids of images, and `show`."""

import dataclasses
import functools
import io
import math
import os
import re
import struct
import warnings
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from ogdm_jax import places
from ogdm_jax.pixels import to_uint8

# The formats that are read, the usual ones first. Of Pillow's others some only note where another
# program would read them, and PostScript is a program that Ghostscript would run.
_FORMATS = (
    "PNG JPEG GIF WEBP BMP PPM TIFF AVIF JPEG2000 QOI ICO ICNS PSD DDS SGI PCX SUN DIB XBM TGA"
)
# How what is no picture, but often has a picture's name, begins.
_OTHERS = {
    "an HTML page": (b"<!doctype html", b"<html", b"<head"),
    "an XML file (SVG pictures are not read)": (b"<?xml", b"<svg"),
    "a Git LFS pointer (git lfs pull gets the file)": (b"version https://git-lfs",),
    "a zip archive": (b"pk\x03\x04",),
    "a gzip file": (b"\x1f\x8b",),
    "a PDF document": (b"%pdf",),
    "a PostScript file": (b"%!ps",),
    "JSON": (b"{", b"["),
}
# Pixels in a byte that only these formats exceed: deflate has 1,032 bytes in one, of 8 pixels each.
_PIXELS, _DENSE = 9000, ("WEBP", "AVIF", "JPEG2000", "TIFF")
LARGE = 64 << 20  # bytes of a file from which its picture's size is asked first
HEAD = 64 << 10  # bytes that are enough for that
# Pillow warns of half of what it refuses; here what a file says is compared with its bytes.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# What Pillow raises for content that is cut, altered, or no picture at all.
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, KeyError, zlib.error, RuntimeError)
_UNREADABLE += (NotImplementedError, IndexError, TypeError, OverflowError, MemoryError)
_UNREADABLE += (struct.error, AttributeError, ArithmeticError)
_LINE, _GAP = 18, 14  # pixels of a line of words, and between groups of images
# Where Pillow notes that a picture is to be turned or is transparent. TIFF notes it elsewhere.
_CHANGES = frozenset({"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp", "transparency"})
_WIDE_INTEGERS = ("PNG", "PPM")  # formats whose mode "I" holds 0..65535


class PictureError(ValueError):
    """A picture cannot be used; the message says why, without the picture's name."""


def read(path: str | os.PathLike) -> np.ndarray:
    """A picture file, local or in a bucket, as uint8 [h,w,1] (grey) or [h,w,3]; see `decode`.

    Raises:
      PictureError: it cannot be read; the message begins with the path.
    """
    try:
        return decode(places.place(path).read_bytes())
    except PictureError as error:
        raise PictureError(f"{os.fspath(path)} {error}") from None
    except OSError as error:
        raise PictureError(
            f"{os.fspath(path)} is no readable image ({error.strerror or error})"
        ) from None


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS.split() if name in Image.OPEN)


@functools.cache
def endings() -> frozenset[str]:
    """The endings of files that are pictures, in lower case, with the dot."""
    read = _formats()
    return frozenset(e.lower() for e, name in Image.registered_extensions().items() if name in read)


def is_picture(head: bytes) -> bool:
    """Whether a file that begins so is a picture of a format that says so at its beginning."""
    kinds = set(_formats()) & {"PNG", "JPEG", "GIF", "WEBP", "TIFF", "AVIF", "JPEG2000", "QOI"}
    tests = [test for kind, (_, test) in Image.OPEN.items() if kind in kinds and test]
    return len(head) >= 16 and any(test(head) is True for test in tests)


def what_is(head: bytes) -> str:
    """What a file is, by how it begins, for a sentence: "an HTML page"; "" where that says nothing.

    A picture is nothing of these.
    """
    if not head.strip(b"\0"):
        return "nothing but zeros" if head else "an empty file"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return next((what for what, begins in _OTHERS.items() if start.startswith(begins)), "")


def check_size(head: bytes, size: int) -> None:
    """PictureError for a file of so many bytes that is no picture of a fitting size.

    Args:
      head: its first bytes, `HEAD` of them.
      size: in bytes.
    """
    if size <= LARGE:
        return
    try:
        with Image.open(io.BytesIO(head), formats=_formats()) as image:
            fits = size <= LARGE + 16 * image.width * image.height
    except (*_UNREADABLE, Image.DecompressionBombError):
        fits = False
    if not fits:
        raise PictureError(
            f"is no readable image ({what_is(head) or 'a file'} of {size >> 20} MB that says of no "
            "picture so large)"
        )


def decode(content: bytes, found: dict[str, Any] | None = None) -> np.ndarray:
    """An encoded picture as uint8 [h,w,1] (grey) or [h,w,3] (everything else).

    It is turned as its EXIF data say, transparent parts are laid on white, palettes become
    colours, and 16-bit grey is scaled to 8 bits (0..65535 to 0..255, rounded). Of several frames
    the first is taken.

    Args:
      content: the bytes of the file.
      found: takes "format", "mode", "size" (width and height as stored) and "frames" (whether there
        are several) as the file has them, for reports.

    Raises:
      PictureError: no picture, a damaged one, one too large, or one of 32-bit numbers.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            _check_claim(image, len(content))
            facts = {"format": image.format, "mode": image.mode, "size": image.size}
            image.load()  # a PNG may say behind its pixels how it is to be turned
            plain = (
                image.mode in ("L", "RGB")
                and image.format != "TIFF"
                and _CHANGES.isdisjoint(image.info)
            )
            array = np.asarray(image if plain else _upright(image))
            if found is not None:
                several = image.format != "MPO" and bool(getattr(image, "is_animated", False))
                found |= facts | {"frames": several}
    except PictureError:
        raise
    except UnidentifiedImageError:
        what = what_is(content) or "of no format that is read, or its beginning is damaged"
        raise PictureError(f"is no readable image ({what})") from None
    except Image.DecompressionBombError as error:
        pixels = re.findall("[0-9]+", str(error))
        raise PictureError(
            f"is too large ({' of at most '.join(pixels)} pixels): reduce it with another program"
        ) from None
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise PictureError(f"is no readable image ({reason})") from None
    if not array.size:
        raise PictureError("is no readable image (it has no pixels)")
    return array[:, :, None] if array.ndim == 2 else array


def _check_claim(image: Image.Image, size: int) -> None:
    """Refuses a picture whose file is too short for its pixels before memory is taken for them."""
    pixels = image.width * image.height
    if image.format not in _DENSE and pixels > _PIXELS * size + (1 << 20):
        raise PictureError(
            f"is no readable image (it says {image.width} x {image.height} pixels and has {size} "
            "bytes)"
        )


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF data say, without transparency, in 8-bit grey or RGB."""
    if image.mode.startswith(("I", "F")):
        return _eight_bits(image)
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if image.mode in ("L", "1") else "RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode == "I" and image.format not in _WIDE_INTEGERS:
        kind = "floating-point numbers" if image.mode == "F" else "32-bit integers"
        raise PictureError(f"holds {kind}, expected 8 or 16 bits a channel")
    values = np.asarray(ImageOps.exif_transpose(image)).astype(np.uint32)
    if "transparency" in image.info:  # the one grey level that is to be seen through
        values = np.where(values == image.info["transparency"], 65535, values)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def opacity(content: bytes) -> np.ndarray | None:
    """The alpha channel of a picture that `decode` reads, uint8 [h,w]; None where it has none."""
    with Image.open(io.BytesIO(content), formats=_formats()) as image:
        image.load()
        if "A" not in image.getbands() and "transparency" not in image.info:
            return None
        if image.mode.startswith("I"):  # one of 65,536 grey levels is to be seen through
            return np.where(np.asarray(image) == image.info["transparency"], 0, 255)
        return np.asarray(ImageOps.exif_transpose(image).convert("RGBA"))[..., 3]


def fit(image: np.ndarray, resolution: int | None, nearest: bool = False) -> np.ndarray:
    """Centre-crops uint8 [h,w,c] to a square and resizes it to [resolution,resolution,c].

    Args:
      image: the picture; one that already has this size, or any with resolution None, passes.
      resolution: the side of the result in pixels.
      nearest: take the nearest pixel, for masks; else Lanczos.
    """
    height, width, channels = image.shape
    if resolution is None or (height, width) == (resolution, resolution):
        return image
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    how = Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS
    planes = [
        Image.fromarray(np.ascontiguousarray(square[..., c])).resize((resolution, resolution), how)
        for c in range(channels)
    ]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def with_channels(image: np.ndarray, channels: int | None) -> np.ndarray:
    """An image [h,w,c] with so many channels: grey is repeated, colour never becomes grey.

    Raises:
      PictureError: colours where one channel is expected. Equal channels are grey.
    """
    if channels in (None, image.shape[-1]):
        return image
    if image.shape[-1] == 1:
        return np.repeat(image, channels, axis=-1)
    if channels == 1 and (image == image[..., :1]).all():
        return image[..., :1]
    raise PictureError(
        "has colour where grey images are expected; make it grey, or make every image RGB by "
        "--config.data.channels=3 (train.py) or --channels 3 (ogdm data)"
    )


def grid(
    images: npt.ArrayLike, columns: int | None = None, padding: int = 0, scale: int = 1
) -> np.ndarray:
    """Images [n,h,w,c] (uint8, or floats in [-1, 1]) -> one uint8 array [rows*h, columns*w, c].

    Args:
      images: placed row by row; empty places are white.
      columns: default the square root of n, rounded up.
      padding: white pixels between images.
      scale: each pixel becomes scale x scale, for images of a few pixels.

    Raises:
      ValueError: other shapes, or an argument out of range.
    """
    images = to_uint8(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4) or len(images) == 0:
        raise ValueError(
            f"images: shape {images.shape}; expected [n, h, w, c] with n > 0 and c = 1, 3 or 4."
        )
    n, h, w, c = images.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    if columns < 1 or padding < 0 or scale < 1:
        raise ValueError(
            f"columns, padding, scale: {columns}, {padding}, {scale}; expected at least 1, 0 and 1."
        )
    rows = -(-n // columns)
    cells = np.full((rows * columns, h * scale + padding, w * scale + padding, c), 255, np.uint8)
    cells[:n, : h * scale, : w * scale] = images.repeat(scale, axis=1).repeat(scale, axis=2)
    page = cells.reshape(rows, columns, *cells.shape[1:]).swapaxes(1, 2)
    page = page.reshape(rows * cells.shape[1], -1, c)
    return page[: page.shape[0] - padding, : page.shape[1] - padding]


def sheet(
    images: npt.ArrayLike,
    columns: int | None = None,
    captions: Sequence[str] = (),
    headings: Sequence[str] = (),
    group: int = 0,
    side: int = 64,
) -> np.ndarray:
    """A `grid` for people: a line between the images, small ones enlarged by whole pixels, words.

    Args:
      images: as of `grid`.
      columns: default the square root of n, rounded up.
      captions: one below each image, such as its class; "" leaves the place empty.
      headings: above the columns, each over an equal share of them.
      group: images of a row that belong together; space lies between one group and the next.
      side: pixels that small images are enlarged to about.

    Returns:
      uint8 [height, width, c]. Words that are longer than their place are set smaller, then cut.

    Raises:
      ValueError: as `grid`; columns that headings or groups do not divide.
    """
    cells = to_uint8(images)
    grid(cells[:1], columns)  # refuses other shapes
    columns = columns or math.ceil(math.sqrt(len(cells)))
    if columns % max(len(headings), 1) or columns % (group or 1):
        raise ValueError(
            f"columns: {columns} for {len(headings)} headings and groups of {group}; expected a "
            "multiple of both"
        )
    (_, h, w, c), line = cells.shape, 1
    scale = max(1, side // h)
    cells = cells.repeat(scale, axis=1).repeat(scale, axis=2)
    if captions:
        cells = np.concatenate([cells, np.stack([_text(s, w * scale, c) for s in captions])], 1)
    page, pitch = grid(cells, columns, padding=line), w * scale + line
    if group:
        edges = [i * pitch for i in range(group, columns, group)]
        page = np.insert(page, np.repeat(edges, _GAP).astype(int), 255, axis=1)
    if headings:
        share = columns // len(headings)
        top = np.full((_LINE, page.shape[1], c), 255, np.uint8)
        for i, words in enumerate(headings):
            left = i * share * pitch + (i * share // group * _GAP if group else 0)
            place = top[:, left : left + share * pitch - line]
            place[:] = _text(words, place.shape[1], c)
        page = np.concatenate([top, page])
    return page


@functools.cache
def _font(size: int) -> Any:
    """DejaVu Sans, which matplotlib brings: letters of Europe and more; else Pillow's own."""
    where = places.package("matplotlib")
    file = where and where / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(file, size) if file and file.is_file() else ImageFont.load_default()


@functools.lru_cache(4096)
def _text(words: str, width: int, channels: int) -> np.ndarray:
    """One line of words, dark on white, in the middle of uint8 [_LINE, width, channels]."""
    fonts = [_font(size) for size in (12, 11, 10, 9)]
    font = next((f for f in fonts if f.getlength(words) <= width), fonts[-1])
    while font.getlength(words) > width and len(words) > 1:
        words = words.rstrip("…")[:-1] + "…"
    image = Image.new("L", (width, _LINE), 255)
    ImageDraw.Draw(image).text((width / 2, _LINE / 2), words, 40, font, anchor="mm")
    strip = np.repeat(np.asarray(image)[:, :, None], channels, axis=2)
    strip[..., 3:] = 255  # opaque
    return strip


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Picture:
    """A picture, uint8 [h,w,c], that a notebook displays."""

    pixels: np.ndarray

    def _repr_png_(self) -> bytes:
        return encode(self.pixels)

    def __repr__(self) -> str:
        return f"<picture of {self.pixels.shape[1]} x {self.pixels.shape[0]} pixels>"


def show(
    images: npt.ArrayLike, columns: int | None = None, captions: Sequence[str] = ()
) -> Picture:
    """Images [n,h,w,c] or one image [h,w,c] or [h,w] as a picture that a notebook displays.

    Args:
      images: uint8, or floats in [-1, 1], of NumPy or JAX.
      columns: of the `sheet`; default the square root of n, rounded up.
      captions: one below each image.
    """
    images = to_uint8(images)
    if images.ndim < 4:
        images = images.reshape(1, *images.shape[:2], -1)
    return Picture(sheet(images, columns, captions))


def encode(image: npt.ArrayLike, compress_level: int = 6) -> bytes:
    """One image [h,w] or [h,w,1, 3 or 4] as PNG; compress_level 0 (uncompressed) to 9."""
    content = io.BytesIO()
    _pillow(image).save(content, "PNG", compress_level=compress_level)
    return content.getvalue()


def save_png(path: str | os.PathLike, image: npt.ArrayLike) -> None:
    """Writes one image [h,w] or [h,w,c] (uint8, or floats in [-1, 1]); makes the folder if needed.

    Raises:
      ValueError: another shape.
    """
    content, path = encode(image), places.place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def save_animation(
    path: str | os.PathLike, frames: Sequence[npt.ArrayLike], milliseconds: int | Sequence[int] = 80
) -> None:
    """Writes frames [t] of equal shape as a looping animation: .webp, .gif or .png (APNG).

    Args:
      path: of the file.
      frames: [h,w] or [h,w,c] each.
      milliseconds: of every frame, or of each [t].

    Raises:
      ValueError: another ending, or no frames.
    """
    pictures = [_pillow(frame) for frame in frames]
    ending = os.path.splitext(path)[1].lower()
    if not pictures or ending not in (".webp", ".gif", ".png"):
        raise ValueError(
            f"path, frames: '{path}', {len(pictures)}; expected .webp, .gif or .png and at least "
            "one frame."
        )
    shown = milliseconds if isinstance(milliseconds, int) else list(milliseconds)
    options: dict[str, Any] = {"duration": shown, "loop": 0}
    if ending == ".webp":
        options["lossless"] = True  # pixels that were enlarged stay squares
    with places.written(places.place(path)) as new:
        pictures[0].save(new, save_all=True, append_images=pictures[1:], **options)


def _pillow(image: npt.ArrayLike) -> Image.Image:
    image = to_uint8(image)
    if image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[-1] not in (3, 4)):
        raise ValueError(
            f"image: shape {image.shape}; expected [h, w], [h, w, 1], [h, w, 3] or [h, w, 4]."
        )
    return Image.fromarray(image)
