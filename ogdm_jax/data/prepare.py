"""Writes image sets, resumable: array_record, read without TensorFlow, or EDM's zip."""

import io
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from tqdm import tqdm

from ogdm_jax import places, records
from ogdm_jax.data import prepared
from ogdm_jax.data.base import Source, SourceError, fingerprint
from ogdm_jax.data.pictures import encode

# uint8 bytes of images a shard; an interrupted run repeats at most one shard.
SHARD_BYTES = 64 << 20
VERSION = "1.0.0"
_PLAN, _LABELS = "plan.json", "labels.json"

Bounds: TypeAlias = list[tuple[int, int]]  # of each shard: its first image, and the next one's
# Writes images start to stop of the set to a file, and calls tick after each.
WriteShard: TypeAlias = Callable[[Path, int, int, Callable[[], object]], None]


def prepare(
    source: Source, out: str | Path, name: str | None = None, shard_images: int | None = None
) -> str:
    """Writes a source to out and returns the name under which open_source reads it.

    Interrupted work lies beside the result (".parts"); the next call with the same source goes on
    with it.

    Args:
      source: any source.
      out: FILE.zip for EDM's archive, else a folder in which the tfds set `name` is prepared as
        split "train".
      name: of the tfds set, in lower case; made from the source's name by default.
      shard_images: images a shard; about 64 MB by default.

    Raises:
      SourceError: out exists, parts of another source lie there, or the source cannot be written in
        this format.
    """
    if source.captioned:
        raise SourceError(
            f"{source.name}: has captions, which this does not write; expected it without "
            "?caption=, or ogdm data encode"
        )
    bounds = bounds_of(source, int(np.prod(source.shape)), shard_images)
    try:
        path = places.local(out, "--out")
    except places.PlaceError as error:
        raise SourceError(f"{error}: prepare it there, then copy it") from None
    if path.suffix == ".zip":
        return _prepare_zip(source, path, bounds)
    return _prepare_records(source, path, name or _default_name(source.name), bounds)


def _prepare_records(source: Source, out: Path, name: str, bounds: Bounds) -> str:
    """The tfds set `name`, split "train", of array_record files."""
    tfds = prepared.package()
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise SourceError(
            f"{source.name}: name {name!r} is no name of a set; expected lower-case letters, "
            "digits and _"
        )
    if source.label_size:
        raise SourceError(
            f"{source.name}: has label vectors, which array_record sets do not hold; write a .zip "
            "instead"
        )
    # tensorflow-datasets takes name and version from the last two folders, so the parts lie in
    # folders of these names.
    final, parts = out / name / VERSION, out / f"{name}.parts" / name / VERSION
    features = _features(tfds, source)
    template = tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(parts), dataset_name=name, split="train", filetype_suffix="array_record"
    )
    shards = [p.name for p in template.sharded_filepaths(len(bounds))]
    write_shards(source, final, parts, shards, bounds, _records(source, features))
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=[stop - start for start, stop in bounds],
        num_bytes=sum((parts / shard).stat().st_size for shard in shards),
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=str(parts),
        features=features,
        split_infos=[split],
        filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        description=f"{source.name}, written by ogdm_jax.data prepare.",
        check_data=False,
    )
    (parts / _PLAN).unlink()
    final.parent.mkdir(parents=True, exist_ok=True)
    os.rename(parts, final)
    shutil.rmtree(out / f"{name}.parts")
    return f"tfds:{name}"


def _records(source: Source, features: Any) -> WriteShard:
    """What writes images of the source as one array_record file."""

    def write(path: Path, start: int, stop: int, tick: Callable[[], object]) -> None:
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for i in range(start, stop):
            item = source[i]
            record: dict[str, Any] = {"image": io.BytesIO(encode(item["image"]))}
            if "label" in features:
                record["label"] = int(item["label"])
            writer.write(features.serialize_example(features.encode_example(record)))
            tick()
        writer.close()

    return write


def _features(tfds: Any, source: Source) -> Any:
    """The features of the set: "image", and "label" where the images have classes."""
    features = {"image": tfds.features.Image(shape=source.shape, encoding_format="png")}
    # Labels that are read with their images do not show ahead how many classes there are.
    has_label = source.num_classes > 0 or bool(getattr(source.reader, "has_label", False))
    if has_label and (source.labels is None or source.labels.min() < 0):
        features["label"] = tfds.features.Scalar(np.int64)  # a ClassLabel cannot say "no class"
    elif has_label:
        named = len(source.class_names) == source.num_classes
        features["label"] = tfds.features.ClassLabel(
            **{"names": source.class_names} if named else {"num_classes": source.num_classes}
        )
    return tfds.features.FeaturesDict(features)


def _prepare_zip(source: Source, out: Path, bounds: Bounds) -> str:
    """EDM's layout: stored members IDX//1000/imgIDX.png, uncompressed PNG, then dataset.json."""
    if source.labels is not None:
        _zip_labels(source, source.labels)  # before the work, not after it

    def member(i: int) -> str:
        return f"{i // 1000:05d}/img{i:08d}.png"

    def write(path: Path, start: int, stop: int, tick: Callable[[], object]) -> None:
        labels = []
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for i in range(start, stop):
                item = source[i]
                labels.append(item["label"].tolist())
                archive.writestr(member(i), encode(item["image"], compress_level=0))
                tick()
            archive.writestr(_LABELS, json.dumps(labels))

    parts = out.with_name(out.name + ".parts")
    shards = [f"{k:05d}.zip" for k in range(len(bounds))]
    write_shards(source, out, parts, shards, bounds, write)
    read: list = []
    with zipfile.ZipFile(parts / "whole.zip", "w", zipfile.ZIP_STORED) as archive:
        for shard in shards:
            with zipfile.ZipFile(parts / shard) as part:
                for name in part.namelist():
                    if name == _LABELS:
                        read += json.loads(part.read(name))
                    else:
                        archive.writestr(name, part.read(name))
        labels = _zip_labels(source, np.array(read))
        table = None if labels is None else [[member(i), label] for i, label in enumerate(labels)]
        about = {"labels": table} | ({"class_names": source.class_names} if table else {})
        archive.writestr("dataset.json", json.dumps(about))
    os.rename(parts / "whole.zip", out)
    shutil.rmtree(parts)
    return f"zip:{out}"


def _zip_labels(source: Source, labels: np.ndarray) -> list | None:
    """The labels as dataset.json has them: None where no image has a class."""
    if labels.ndim == 1 and labels.max() < 0:
        return None
    if labels.ndim == 1 and labels.min() < 0:
        missing = int(np.sum(labels < 0))
        raise SourceError(
            f"{source.name}: {missing} images have no class (-1), which EDM's zip cannot say; "
            "leave them out first"
        )
    return labels.tolist()


def bounds_of(source: Source, image_bytes: int, shard_images: int | None) -> Bounds:
    """Shards of `shard_images` images, or of about SHARD_BYTES."""
    size = shard_images or max(1, SHARD_BYTES // image_bytes)
    return [(start, min(start + size, len(source))) for start in range(0, len(source), size)]


def write_shards(
    source: Source,
    final: Path,
    parts: Path,
    shards: list[str],
    bounds: Bounds,
    write: WriteShard,
    made: dict[str, str] | None = None,
) -> None:
    """Writes the shards that are not there yet; a shard takes its name only when it is whole.

    Args:
      source: of the images.
      final: the result, which must not be there.
      parts: the folder of unfinished work.
      shards: names of files.
      bounds: of each.
      write: what writes one.
      made: {words: how} that unfinished work has to share, beside the source.
    """
    if final.exists():
        raise SourceError(
            f"{source.name}: {final} exists already; remove it or choose another --out"
        )
    plan = {
        "source": source.name,
        "images": len(source),
        "shape": list(source.shape),
        "shards": len(shards),
        "contents": fingerprint(source),
        **(made or {}),
    }
    parts.mkdir(parents=True, exist_ok=True)
    note = parts / _PLAN
    begun: dict[str, Any] = plan
    if note.exists():
        try:
            begun = records.read(note, dict, "--out")
        except records.RecordError:  # torn
            begun = {}
    if begun and "contents" not in begun:  # of a version that did not note them
        begun = begun | {"contents": plan["contents"]}
    for words, how in (made or {}).items():
        if begun and begun.get(words) != how:
            raise SourceError(
                f"{source.name}: {parts} holds unfinished work {words} {begun.get(words)}, not "
                f"{how}; remove it or finish that one"
            )
    if begun != plan and begun.get("source") == source.name:  # its files have changed since
        aside = places.unused(epath.Path(parts))
        os.rename(parts, aside)
        parts.mkdir(parents=True)
        print(f"{source.name} has changed: what was begun is in {aside}", file=sys.stderr)
    elif begun != plan:
        raise SourceError(
            f"{source.name}: {parts} holds the unfinished work of another call; remove it or "
            "finish that one"
        )
    records.write(epath.Path(note), plan)
    with tqdm(total=len(source), desc=str(final), unit="image", disable=None) as bar:
        for shard, (start, stop) in zip(shards, bounds):
            if (parts / shard).exists():
                bar.update(stop - start)
                continue
            unfinished = parts / f"{shard}.unfinished"
            with _told(source, unfinished):
                write(unfinished, start, stop, bar.update)
            os.replace(unfinished, parts / shard)


@contextmanager
def _told(source: Source, path: Path) -> Iterator[None]:
    """Errors of the disk, as array_record has them, become one sentence."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition(";")[0]
        raise SourceError(
            f"{source.name}: {path} cannot be written ({reason}); make room or choose another "
            "--out, then give the same command again"
        ) from None


def _default_name(source: str) -> str:
    """A name that tensorflow-datasets accepts, of the name of a source."""
    kind, _, rest = source.partition(":")
    stem = (
        Path(rest.partition("?")[0].rstrip("/")).stem
        if kind in ("folder", "wds", "zip", "npz")
        else rest or kind
    )
    name = re.sub(r"[^a-z0-9]+", "_", stem.lower()).strip("_")
    return name if name[:1].isalpha() else f"set_{name}"
