"""Captions of data: read beside pictures and from fields of records, carried by encoding, refused."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ogdm_jax.cli import data as command
from ogdm_jax.data import SourceError, open_source
from ogdm_jax.data.check import check
from ogdm_jax.data.latents import SIDECAR
from ogdm_jax.data.sources import source_name
from tests.support import captions as support
from tests.support import latents, sets

pytestmark = pytest.mark.fast


@pytest.fixture
def pictures(tmp_path):
    return support.pictures(tmp_path / "set", 6)


def test_each_picture_has_the_text_of_its_stem(pictures, tmp_path):
    """Sub-folders are no classes; a text without picture is said; such sets stay on disk."""
    (tmp_path / "set" / "b" / "alone.txt").write_text("nothing")
    source = open_source(pictures)
    assert source.captioned and not source.in_memory and not source.num_classes
    part = source.take([3, 0])
    order = ["a/00", "a/02", "a/04", "b/01", "b/03", "b/05"]
    texts = [support.TEXTS[int(name[-2:]) % 4] for name in order]
    assert list(part["caption"]) == [texts[3], texts[0]] and list(part["label"]) == [-1, -1]
    assert source[1]["label"] == -1
    assert any("left out 1 captions without image (b/alone.txt first)" in n for n in source.notes)
    assert not open_source(pictures.partition("?")[0]).captioned
    assert source_name(pictures.removeprefix("folder:")) == pictures


@pytest.mark.default
def test_encoding_carries_them(pictures, tmp_path):
    """Also over shards; their hash is in the fingerprint, their number in latents.json."""
    vae, out = latents.autoencoder(tmp_path / "vae"), tmp_path / "latents"
    source = open_source(support.encoded(pictures, vae, out))
    assert list(source.captions) == list(open_source(pictures).take(np.arange(6))["caption"])
    assert source.captioned and source.labels is None and source.hashes["labels"]
    assert json.loads((out / SIDECAR).read_text())["captions"] == 6
    file = next(out.glob("captions*.json"))
    (out / "kept").write_text(file.read_text())
    file.write_text(json.dumps(["a"] * 5))
    with pytest.raises(SourceError, match="holds 5 captions for 6 latents"):
        open_source(source.name)
    file.write_text(json.dumps(["a"] * 5 + [""]))
    with pytest.raises(SourceError, match=r"has '' at 5; expected a text for each latent"):
        open_source(source.name)
    file.unlink()
    with pytest.raises(SourceError, match="holds 0 captions for 6 latents"):
        open_source(source.name)


def test_what_is_no_caption_is_refused(pictures, tmp_path, capsys):
    folder = tmp_path / "set"
    (folder / "a" / "02.txt").write_text(" \n")
    (folder / "b" / "03.txt").write_bytes(b"\xff\xfea")
    report = check(pictures)
    assert [one["reason"] for one in report["bad"]] == [
        "has a caption, a/02.txt, that is empty",
        "has a caption, b/03.txt, that is no UTF-8",
    ]
    vae = latents.autoencoder(tmp_path / "vae")
    words = ["encode", pictures, "--vae", str(vae), "--out", str(tmp_path / "out")]
    assert command.main(words) == 1
    said = capsys.readouterr().err
    assert "a/02.png has a caption, a/02.txt, that is empty; replace it, or remove both" in said
    (folder / "a" / "02.txt").unlink()
    with pytest.raises(SourceError, match=r"1 of 6 images have no caption \(a/02.png first: exp"):
        open_source(pictures)
    assert command.main(["prepare", pictures.replace("/set", "/set/b"), "--out", "x.zip"]) == 1
    assert "has captions, which this does not write" in capsys.readouterr().err


def test_a_field_of_records(tmp_path):
    """A text, and the first text of a sequence, which is said; another field is refused."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from etils import epath

    place = tmp_path / "spoken" / "1.0.0"
    place.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(4, 4, 3), encoding_format="png"),
            "title": tfds.features.Text(),
            "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
        }
    )
    template = tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(place),
        dataset_name="spoken",
        split="train",
        filetype_suffix="array_record",
    )
    file = template.sharded_filepaths(1)[0]
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for i, title in enumerate(("one", "two", "")):
        record: dict[str, Any] = {"image": io.BytesIO(sets.encoded(sets.pixels(4, 4, 3)))}
        record |= {"title": title, "captions": {"text": [f"first {i}", f"second {i}"]}}
        writer.write(features.serialize_example(features.encode_example(record)))
    writer.close()
    info = tfds.core.SplitInfo(
        name="train",
        shard_lengths=[3],
        num_bytes=Path(file).stat().st_size,
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=str(place),
        features=features,
        split_infos=[info],
        filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        check_data=False,
    )
    source = open_source("tfds:spoken/train?caption=title", tmp_path)
    assert list(source.take([1, 0])["caption"]) == ["two", "one"]
    with pytest.raises(SourceError, match="record 2 has a title that is empty"):
        source.take([2])
    several = open_source("tfds:spoken/train?caption=captions/text", tmp_path)
    assert list(several.take([0, 2])["caption"]) == ["first 0", "first 2"]
    assert several.notes == ("takes the first text of captions/text",)
    for field in ("image", "captions", "name"):
        with pytest.raises(SourceError, match=f"'{field}' is no text; its features are"):
            open_source(f"tfds:spoken?caption={field}", tmp_path)
