"""Sets prepared by tensorflow-datasets, read without TensorFlow and without the network."""

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ogdm_jax import places
from ogdm_jax.data import identity
from ogdm_jax.data.base import Label, SourceError, Stored
from ogdm_jax.data.files import plain_caption, split_caption
from ogdm_jax.data.pictures import decode


class TfdsReader:
    """Records of a tfds data source: `image`, encoded or not, and `label` where it is an integer.

    The labels are in the records, so they are not known ahead. captions: the field of texts that
    are read in their place, with a slash between it and a field within it, or "".
    """

    def __init__(
        self, source: str, items: Any, has_label: bool, hash: str, captions: str = ""
    ) -> None:
        self.source, self.items, self.has_label, self.hash = source, items, has_label, hash
        self.captions = captions

    def __len__(self) -> int:
        return len(self.items)

    def where(self, i: int) -> str:
        """The number of the record, for messages."""
        return f"record {i}"

    def contents(self) -> str:
        """A hash of the records' files and of the parts that are read of them."""
        return self.hash

    def read(self, i: int) -> tuple[np.ndarray, Label]:
        """(uint8 [h,w,1 or 3], label, caption or None)."""
        try:
            return self._unpack(self.items[i])
        except SourceError as error:
            raise SourceError(
                f"{self.source}: record {i} has a {self.captions} that {error}; expected a text"
            ) from None
        except Exception as error:  # a damaged record ends in many types of errors
            raise SourceError(
                f"{self.source}: record {i} cannot be read ({type(error).__name__}); prepare the "
                f"set again (ogdm data check {self.source} lists every such record)"
            ) from error

    def read_many(self, rows: Sequence[int]) -> Iterator[tuple[np.ndarray, Label]]:
        """Records that are asked for at once are found several times faster than one by one."""
        try:
            yield from [self._unpack(record) for record in self.items.__getitems__(rows)]
        except Exception:  # one of them is damaged: which?
            yield from map(self.read, rows)

    def _unpack(self, record: dict) -> tuple[np.ndarray, Label]:
        image = record["image"]
        image = decode(image) if isinstance(image, bytes) else np.asarray(image)
        if self.captions:
            return image, _caption(record, self.captions)
        return image, int(record["label"]) if self.has_label else None


def _caption(record: Any, field: str) -> str:
    """The text of a field, the first of several. Raises SourceError, "is ...", for what is none."""
    for part in field.split("/"):
        record = record[part]
    if not isinstance(record, bytes | str):
        if not len(record):
            raise SourceError("is empty")
        record = record[0]
    try:
        return plain_caption(record)
    except ValueError as error:
        raise SourceError(str(error)) from None


def package() -> Any:
    """tensorflow-datasets: imported late, because it takes a while and no other set needs it.

    Raises:
      SourceError: it was uninstalled, as people do who want its 206 MB back.
    """
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise SourceError(
            f"tfds sets need tensorflow-datasets ({error}); pip install tensorflow-datasets"
        ) from None
    return tensorflow_datasets


def open_tfds(source: str, spec: str, data_dir: str | os.PathLike | None) -> Stored:
    """`NAME[/CONFIG][:VERSION][/SPLIT][?caption=FIELD]`, prepared as array_record in data_dir.

    tensorflow-datasets itself would try to download a set that is missing, and hang for minutes
    without a network, so only what is on disk is looked at.

    Raises:
      SourceError: unknown name or split, not prepared, prepared as parquet (that writer loses
        examples) or as tfrecord (no random access), or without a uint8 image or the texts wanted.
    """
    tfds = package()
    spec, field = split_caption(spec)
    if not spec:
        raise SourceError(
            "data source 'tfds:' names no data set; expected for example tfds:cifar10/train"
        )
    if re.match(r"\w+:[a-zA-Z]", spec):  # tensorflow-datasets would ask the network about these
        raise SourceError(
            f"{source}: sets of other sites (NAMESPACE:NAME) are not read; expected for example "
            "tfds:cifar10"
        )
    try:  # array_record maps its files
        folder = str(places.local(data_dir, "data_dir")) if data_dir else None
    except places.PlaceError as error:
        raise SourceError(f"{source}: {error}, or the bucket mounted (gcsfuse)") from None
    try:
        return _open(tfds, source, spec, folder, field)
    except SourceError:
        raise
    except Exception as error:  # damaged files end in many types of errors
        reason = " ".join(str(error).split())[:120]
        raise SourceError(
            f"{source}: its prepared files cannot be read ({type(error).__name__}: {reason}); "
            "prepare the set again"
        ) from None


def _open(tfds: Any, source: str, spec: str, folder: str | None, field: str) -> Stored:
    builder, split = _find(tfds, source, spec, folder)
    image, label = _features(tfds, source, builder)
    notes = (f"takes the first text of {field}",) if _several(tfds, source, builder, field) else ()
    label = None if field else label
    try:
        items = builder.as_data_source(split, file_format="array_record")
    except ValueError as error:
        raise SourceError(
            f"{source}: split {split!r} is not understood ({str(error).splitlines()[0]})"
        ) from None
    if isinstance(image, tfds.features.Image):
        # It stays encoded: `decode` reads it like every other picture, and faster.
        items.decoders = {"image": tfds.decode.SkipDecoding()}
    names = () if label is None else tuple(getattr(label, "names", None) or ())
    reader = TfdsReader(source, items, label is not None, _contents(builder, split), field)
    return Stored(reader, None, names, notes)


def _several(tfds: Any, source: str, builder: Any, field: str) -> bool:
    """Whether a field has several texts of an image. Raises SourceError where it has none."""
    feature: Any = builder.info.features
    several = False
    for part in field.split("/") if field else ():
        inside = dict(feature.items()) if isinstance(feature, tfds.features.FeaturesDict) else {}
        feature = inside.get(part)
        if hasattr(feature, "feature"):
            feature, several = feature.feature, True
    if field and not isinstance(feature, tfds.features.Text):
        raise SourceError(
            f"{source}: {field!r} is no text; its features are {sorted(builder.info.features)}, "
            "expected the name of one of texts, as ?caption=caption or ?caption=captions/text"
        )
    return several


def _contents(builder: Any, split: str) -> str:
    """A hash of which records of which files a split is, and of their bytes."""
    files = builder.info.splits[split].file_instructions
    sizes = [n for file in files for n in (file.skip, file.take)]
    size = builder.info.splits[_base_split(split)].num_bytes
    return identity.of_names([Path(file.filename).name for file in files], [*sizes, size or 0])


def _find(tfds: Any, source: str, spec: str, folder: str | None) -> tuple[Any, str]:
    """The builder and the split that a name means, prepared in a format that can be read."""
    head, _, tail = spec.rpartition("/")
    # "a/b" is a set and a split, or a set and its config: the reading that is prepared and has the
    # split wins.
    readings = ([(head, tail)] if head else []) + [(spec, "train")]
    builders = [(_builder(tfds, name, folder), split) for name, split in readings]
    found = [(builder, split) for builder, split in builders if builder is not None]
    where = folder or str(tfds.core.constants.DATA_DIR)
    if not found:
        known = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(spec.split("/")[0], known, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise SourceError(
            f"{source}: no such set is known to tensorflow-datasets or prepared in {where}{hint}"
        )
    ready = [(b, s) for b, s in found if (Path(b.data_path) / "dataset_info.json").is_file()]
    if not ready:
        raise SourceError(f"{source}: is not prepared in {where}; {_recipe(found[0][0], folder)}")
    builder, split = next(((b, s) for b, s in ready if _base_split(s) in b.info.splits), ready[0])
    splits = list(builder.info.splits)
    if _base_split(split) not in splits:
        raise SourceError(
            f"{source}: has no split {split!r}; expected one of {', '.join(splits)}, or a slice: "
            f"{splits[0]}[:10%]"
        )
    formats = {f.value for f in builder.info.available_file_formats()}
    if "array_record" not in formats:
        reason = (
            "parquet, whose writer silently loses examples"
            if "parquet" in formats
            else "tfrecord, which has no random access"
        )
        raise SourceError(
            f"{source}: is prepared as {reason}; delete it or choose another data_dir, and "
            f"{_recipe(builder, folder)}"
        )
    return builder, split


def _features(tfds: Any, source: str, builder: Any) -> tuple[Any, Any]:
    """The feature "image", and the feature "label" where it is an integer, else None."""
    features = builder.info.features
    known = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    image, label = known.get("image"), known.get("label")
    if (
        image is None
        or len(image.shape) != 3
        or np.dtype(image.np_dtype) != np.uint8
        or image.shape[-1] not in (1, 3)
    ):
        raise SourceError(
            f"{source}: its features are {sorted(known)}; expected a uint8 'image' [H,W,1 or 3]"
        )
    if label is None or label.shape != () or not np.issubdtype(label.np_dtype, np.integer):
        return image, None
    return image, label


def _builder(tfds: Any, name: str, folder: str | None) -> Any:
    """The builder of a name, by its code or by its prepared files; None where neither exists."""
    try:
        return tfds.builder(name, data_dir=folder)
    except (ValueError, AttributeError, ImportError, tfds.core.registered.DatasetNotFoundError):
        return None


def _base_split(split: str) -> str:
    return split.split("+")[0].split("[")[0]


def _recipe(builder: Any, folder: str | None) -> str:
    """How to prepare a set where there are a network and TensorFlow, which most builders need."""
    config = f"/{builder.builder_config.name}" if builder.builder_config else ""
    place = "" if folder is None else f"data_dir={folder!r}, "
    return (
        "where TensorFlow and a network are at hand run: import tensorflow_datasets as tfds; "
        f"tfds.builder('{builder.name}{config}', "
        f"{place}file_format='array_record').download_and_prepare()"
    )
