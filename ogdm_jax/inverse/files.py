"""Images to measure, read from wherever they are, and results, written for people and programs."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from ogdm_jax import places, records
from ogdm_jax.data import Source, SourceError, open_pictures, pictures
from ogdm_jax.data.sources import MEMORY_LIMIT
from ogdm_jax.inverse import given, tasks
from ogdm_jax.inverse.measured import Restoration
from ogdm_jax.inverse.tasks import Task
from ogdm_jax.pixels import check_range, to_float, to_uint8

_SIDE = 128  # pixels that small images are enlarged to, so that a figure fits below


class Inputs(NamedTuple):
    """What a command measures, or what was measured elsewhere.

    Attributes:
      values: [k,...] images in [-1, 1], or measurements.
      labels: [k] classes of the model, or None.
      names: [k] of the pictures.
      total: how many there are where these were taken from.
    """

    values: np.ndarray
    labels: np.ndarray | None
    names: np.ndarray
    total: int


class Classes(NamedTuple):
    """Those of a model: their number, and their names where known."""

    number: int
    names: Sequence[str] = ()


def open_input(where: str, shape: tuple[int, int, int], memory_limit: int = MEMORY_LIMIT) -> Source:
    """Images to measure: a picture, a folder or archive of pictures, or a data source by name.

    They are cropped and resized to the model's shape (H, W, C).

    Raises:
      ValueError: nothing there, unreadable, or colour for a grey model.
    """
    if not where:
        raise ValueError(
            "--input: not given; expected the picture or the folder of pictures to measure, or "
            "--measured with what was measured already"
        )
    try:
        return open_pictures(where, shape[0], shape[2], memory_limit)
    except ValueError as error:
        raise ValueError(f"--input: {_reason(error)}") from None


def read_input(
    where: str, shape: tuple[int, int, int], most: int, classes: Classes, mask: str = ""
) -> Inputs:
    """At most so many images of `open_input`, for a model of these classes.

    Raises:
      ValueError: as `open_input`; a mask of other proportions than the pictures.
    """
    source = open_input(where, shape, 0)
    reader = source.reader
    if mask and reader is not None:
        stored = (reader.read(i)[0].shape for i in range(min(most, len(reader))))
        given.check_mask(mask, ((height, width) for height, width, _ in stored))
    return _first(source, most, classes)


def read_measured(
    where: str, task: Task, shape: tuple[int, int, int], most: int, classes: Classes
) -> Inputs:
    """At most so many measurements, as they are: pictures, or an array of NumPy.

    Args:
      where: pictures as of `open_input`, or .npy [h,w], [h,w,c] or [n,h,w,c]: uint8 of pictures,
        or floats in the units of y (images in [-1, 1]).
      task: what was measured.
      shape: of the model's images.
      most: measurements that are read.
      classes: of the model.

    Raises:
      ValueError: unreadable, or of another size than the task's measurements.
    """
    wanted = tasks.measured_shape(task, shape)
    picture = wanted[-1] in (1, 3) and task.name in tasks.PICTURES
    path = places.place(where, "--measured")
    if path.suffix == ".npy" and path.is_file():
        y = given.array(path, "--measured")
        if y.dtype == np.uint8 and not picture:
            raise ValueError(
                f"--measured: {where!r} is uint8, the numbers of a picture; {task.name} measures "
                "none; expected floats in the units of y"
            )
        y = y.reshape(1, *y.shape, 1) if y.ndim == 2 else y.reshape(-1, *y.shape[-3:])
        y = to_float(y)
        if picture:
            check_range(y, "--measured")
        _check_size(where, y.shape[1:], wanted, task.name, shape)
        names = np.array([f"{path.name}[{i}]" if len(y) > 1 else path.name for i in range(len(y))])
        return Inputs(y[:most], None, names[:most], len(y))
    if not picture:
        raise ValueError(
            f"--measured: {where!r} given; {task.name} measures no picture; expected a .npy of "
            f"numbers {list(wanted)}"
        )
    try:
        source = open_pictures(where, None, wanted[-1], 0)
        _check_size(where, source.shape, wanted, task.name, shape)
        return _first(source, most, classes)
    except SourceError as error:
        raise ValueError(f"--measured: {_reason(error)}") from None


def _reason(error: ValueError) -> str:
    """The words of an error without the remedies that a finished model, which decides on the size
    and the channels, does not have.
    """
    return re.split("; crop and resize|, or make every image RGB", str(error))[0]


def _check_size(
    where: str,
    found: tuple[int, ...],
    wanted: tuple[int, ...],
    task: str,
    shape: tuple[int, int, int],
) -> None:
    if found == wanted:
        return
    remedy = "crop or resize it with another program, before it is measured"
    if task == "super_resolution" and found[0] == found[1] and shape[0] % found[0] == 0:
        remedy = f"--task.factor {shape[0] // found[0]} fits it"
    raise ValueError(
        f"--measured: {where!r} is {'x'.join(map(str, found))}, and is not resized; expected "
        f"{'x'.join(map(str, wanted))} (height, width, channels), which {task} makes of this "
        f"model's images; {remedy}"
    )


def _first(source: Source, most: int, classes: Classes) -> Inputs:
    count = min(most, len(source))
    found = source.take(np.arange(count))
    labels = None
    if classes.number and not source.label_size:
        labels = _of_model(source, found["label"], classes)
    where = (lambda i: f"{source.name}[{i}]") if source.reader is None else source.reader.where
    return Inputs(
        to_float(found["image"]), labels, np.array([where(i) for i in range(count)]), len(source)
    )


def _of_model(source: Source, labels: np.ndarray, classes: Classes) -> np.ndarray | None:
    """The model's class of each label of a source: by name, else by number where there are as many.
    None where the model lacks one.
    """
    if not (source.class_names and classes.names):
        return labels if source.num_classes == classes.number else None
    known = {name: k for k, name in enumerate(classes.names)} | {"": -1}
    called = [source.class_names[k] if k >= 0 else "" for k in labels]
    return np.array([known[c] for c in called], np.int32) if known.keys() >= {*called} else None


def side_by_side(restoration: Restoration, restored: np.ndarray) -> dict[str, np.ndarray]:
    """{heading: uint8 [n,H,W,C]} of input (where somebody knows it), measurement and result
    [n,H,W,C] in [-1, 1].
    """
    images, shown = restoration.images, {"example": restoration.images}
    if restoration.task.restores:
        shown = {"input": images, "measurement": _as_pictures(restoration.y, restored.shape)}
    parts = shown | {"result": restored}
    return {k: to_uint8(np.clip(v, -1, 1)) for k, v in parts.items() if v is not None}


def write(
    path: epath.Path,
    restoration: Restoration,
    restored: np.ndarray,
    figures: Mapping[str, np.ndarray],
) -> None:
    """Input (where it is known), measurement and result side by side, with PSNR and headings.

    Args:
      path: FILE.png for one sheet; FILE.npz for the float arrays input, measurement, result and the
        seeds; else a folder for one picture an image. Figures per image go beside it as JSON.
      restoration: what was measured.
      restored: [n,H,W,C] in [-1, 1].
      figures: what `restoration.judge` says of them.
    """
    rows = side_by_side(restoration, restored)
    n, parts, headings = len(restored), len(rows), [*rows]
    images = np.stack([*rows.values()], axis=1).reshape(-1, *restored.shape[1:])
    captions = [""] * (n * parts)
    for name, words in (("psnr", "PSNR {:.1f} dB"), ("distance", "distance {:.3f}")):
        if name in figures:  # below the result
            captions[parts - 1 :: parts] = map(words.format, figures[name])
    if path.suffix == ".npz":
        arrays: dict[str, Any] = {"measurement": restoration.y, "result": restored}
        if restoration.images is not None:
            arrays["input"] = restoration.images
        with places.written(path) as new:
            np.savez_compressed(new, seeds=restoration.seeds, **arrays)
    elif path.suffix == ".png":
        abreast = min(n, 4)
        how = {"headings": headings * abreast, "group": parts, "side": _SIDE}
        pictures.save_png(path, pictures.sheet(images, parts * abreast, captions, **how))
    else:
        for i, seed in enumerate(restoration.seeds):
            at = slice(i * parts, (i + 1) * parts)
            one = pictures.sheet(images[at], parts, captions[at], headings, side=_SIDE)
            pictures.save_png(path / f"img{int(seed):08d}.png", one)
    about: dict[str, Any] = {"seeds": restoration.seeds}
    if restoration.names is not None:
        about["pictures"] = restoration.names
    for name, values in figures.items():
        about[name] = [round(float(v), 5) for v in values]
    records.write(path.with_suffix(".json") if path.suffix else path / "figures.json", about)


def _as_pictures(y: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Measurements [n,h,w,c] as images of the input's size: nearest pixels; amplitudes by their
    logarithm.
    """
    _, height, width, _ = shape
    if y.shape == shape:
        return y
    if y.shape[1] > height:
        y = np.log(np.maximum(y, 1e-3))
        low, high = (f(y, axis=(1, 2, 3), keepdims=True) for f in (np.min, np.max))
        y = 2 * (y - low) / np.maximum(high - low, 1e-9) - 1
    rows, columns = (
        np.arange(a) * b // a for a, b in zip((height, width), y.shape[1:3], strict=True)
    )
    return y[:, rows][:, :, columns]
