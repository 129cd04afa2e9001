"""Sets prepared by tensorflow-datasets, read by random access without TensorFlow and without
touching the network.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ogdm_jax import places
from ogdm_jax.data.files import decode
from ogdm_jax.data.sources import SourceError


class TfdsReader:
    """Items of a tfds data source: the features `image`, encoded or not, and `label` where it is an
    integer.
    """

    labels = None  # each record holds its own

    def __init__(self, source: str, items, has_label: bool):
        self.source, self.items, self.has_label = source, items, has_label

    def __len__(self) -> int:
        return len(self.items)

    def where(self, i: int) -> str:
        return f"record {i}"

    def read(self, i: int) -> tuple[np.ndarray, int | None]:
        """(uint8 [h,w,1 or 3], label or None)."""
        try:
            return self._unpack(self.items[i])
        except (
            Exception
        ) as error:  # damaged files end in many error types of the record reader and the decoder
            raise SourceError(
                f"{self.source}: record {i} cannot be read ({type(error).__name__}); prepare the "
                "set again"
            ) from error

    def read_many(self, rows: Sequence[int]) -> Iterator[tuple[np.ndarray, int | None]]:
        """Records that are asked for at once are found several times faster than one by one."""
        try:
            yield from [self._unpack(record) for record in self.items.__getitems__(rows)]
        except Exception:  # one of them is damaged: which?
            yield from map(self.read, rows)

    def _unpack(self, record: dict) -> tuple[np.ndarray, int | None]:
        image = record["image"]
        image = decode(image) if isinstance(image, bytes) else np.asarray(image)
        return image, int(record["label"]) if self.has_label else None


def open_tfds(
    source: str, spec: str, data_dir: str | Path | None
) -> tuple[TfdsReader, tuple[str, ...]]:
    """`NAME[/CONFIG][:VERSION][/SPLIT]`, prepared as array_record in data_dir.

    tensorflow-datasets itself would try to download a set that is missing, and hang for minutes
    without a network, so only what is on disk is looked at.

    Raises:
      SourceError: unknown name or split, not prepared, prepared as parquet (that writer loses
      examples) or as tfrecord
        (no random access), or without a uint8 image.
    """
    import tensorflow_datasets as tfds

    if not spec:
        raise SourceError(
            "data source 'tfds:' names no data set; expected for example tfds:cifar10/train"
        )
    try:
        data_dir = (
            places.local(data_dir, "data_dir") if data_dir else data_dir
        )  # array_record maps its files
    except places.PlaceError as error:
        raise SourceError(f"{source}: {error}, or the bucket mounted (gcsfuse)") from None
    where = str(data_dir) if data_dir else str(tfds.core.constants.DATA_DIR)
    if re.match(r"\w+:[a-zA-Z]", spec):  # tensorflow-datasets would ask the network about these
        raise SourceError(
            f"{source}: sets of other sites (NAMESPACE:NAME) are not read; expected for example "
            "tfds:cifar10"
        )
    head, _, tail = spec.rpartition("/")
    # "a/b" is a set and a split, or a set and its config: the reading that is prepared and has the
    # split wins.
    readings = ([(head, tail)] if head else []) + [(spec, "train")]
    found = [
        (builder, split)
        for name, split in readings
        if (builder := _builder(tfds, name, data_dir)) is not None
    ]
    if not found:
        near = difflib.get_close_matches(
            spec.split("/")[0], tfds.list_builders(with_community_datasets=False), 1
        )
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise SourceError(
            f"{source}: no such set is known to tensorflow-datasets or prepared in {where}{hint}"
        )
    ready = [
        (builder, split)
        for builder, split in found
        if (Path(builder.data_path) / "dataset_info.json").is_file()
    ]
    if not ready:
        raise SourceError(f"{source}: is not prepared in {where}; {_recipe(found[0][0], data_dir)}")
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
            f"{_recipe(builder, data_dir)}"
        )
    features = (
        dict(builder.info.features.items())
        if isinstance(builder.info.features, tfds.features.FeaturesDict)
        else {}
    )
    image, label = features.get("image"), features.get("label")
    if (
        image is None
        or len(image.shape) != 3
        or np.dtype(image.np_dtype) != np.uint8
        or image.shape[-1] not in (1, 3)
    ):
        raise SourceError(
            f"{source}: its features are {sorted(features)}; expected a uint8 'image' [H,W,1 or 3]"
        )
    try:
        items = builder.as_data_source(split, file_format="array_record")
    except ValueError as error:
        raise SourceError(
            f"{source}: split {split!r} is not understood ({str(error).splitlines()[0]})"
        ) from None
    if isinstance(
        image, tfds.features.Image
    ):  # stays encoded: `decode` reads it like every other picture, and faster
        items.decoders = {"image": tfds.decode.SkipDecoding()}
    has_label = (
        label is not None and label.shape == () and np.issubdtype(label.np_dtype, np.integer)
    )
    return TfdsReader(source, items, has_label), tuple(
        getattr(label, "names", None) or ()
    ) if has_label else ()


def _builder(tfds, name: str, data_dir: str | Path | None):
    """The builder of a name, from its code or from its prepared files alone; None where neither
    exists.
    """
    try:
        return tfds.builder(name, data_dir=None if data_dir is None else str(data_dir))
    except (ValueError, AttributeError, ImportError, tfds.core.registered.DatasetNotFoundError):
        return None


def _base_split(split: str) -> str:
    return split.split("+")[0].split("[")[0]


def _recipe(builder, data_dir: str | Path | None) -> str:
    """How to prepare a set, for a machine that has a network (and TensorFlow, which most builders
    need).
    """
    config = f"/{builder.builder_config.name}" if builder.builder_config else ""
    folder = "" if data_dir is None else f"data_dir={str(data_dir)!r}, "
    return (
        "where TensorFlow and a network are at hand run: import tensorflow_datasets as tfds; "
        f"tfds.builder('{builder.name}{config}', "
        f"{folder}file_format='array_record').download_and_prepare()"
    )
