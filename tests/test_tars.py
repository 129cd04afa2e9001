"""Webdataset's shards: read as the folder of their members, and refused where they are odd."""

import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ogdm_jax.data import SourceError, open_source
from ogdm_jax.data.base import fingerprint
from ogdm_jax.data.check import check
from ogdm_jax.data.describe import describe
from ogdm_jax.data.pictures import decode
from ogdm_jax.data.sources import source_name
from tests.support import captions, latents, sets

pytestmark = pytest.mark.fast
PICTURES = [sets.encoded(sets.pixels(8, 8, 3)) for _ in range(5)]


def shard(path: Path, members: dict[str, bytes], *odd: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in odd:
            archive.addfile(member)
    return path


def sample(i: int, **fields: bytes) -> dict[str, bytes]:
    """Key 7 i of a shard: a picture, and fields beside it."""
    more = {f"{7 * i:04d}.{ending}": content for ending, content in fields.items()}
    return {f"{7 * i:04d}.png": PICTURES[i]} | more


@pytest.fixture
def shards(tmp_path):
    """Two: of 3 and 2 images, each with text, class and JSON."""
    for k, rows in enumerate(((0, 1, 2), (3, 4))):
        members = {}
        for i in rows:
            about = {"caption": f"json {i}", "of": {"artist": [f"artist {i}"]}, "width": 8}
            texts = {"txt": f" text {i}\n", "cls": f"{i % 3}\n", "json": json.dumps(about)}
            members |= sample(i, **{key: text.encode() for key, text in texts.items()})
        shard(tmp_path / f"train-{k:05d}.tar", members)
    return tmp_path


def test_shards_are_read_in_the_order_of_their_names(shards):
    """Named by a range, by a star or by their folder; pictures are those that were written."""
    names = [f"train-0000{i > 2:d}.tar/{7 * i:04d}.png" for i in range(5)]
    for pattern in ("train-{00000..00001}.tar", "train-*.tar", "."):
        source = open_source(f"wds:{pattern}?caption=txt", shards, memory_limit=0)
        part = source.take([4, 0, 3])
        assert list(part["caption"]) == ["text 4", "text 0", "text 3"]
        for image, i in zip(part["image"], (4, 0, 3)):
            np.testing.assert_array_equal(image, decode(PICTURES[i]))
        assert [source.reader.where(i) for i in range(5)] == names
        assert source.captioned and not source.num_classes
        assert source.notes == ("left out 10 files that are no pictures (5 .cls, 5 .json)",)
    with pytest.raises(SourceError, match=r"caption, train-00001.tar/0021.json/of/artist, that is"):
        open_source(f"wds:{shards}/train-00001.tar?caption=json/of/artist")
    one = open_source(f"wds:{shards}/train-00001.tar?caption=json/caption")
    assert list(one.take([1, 0])["caption"]) == ["json 4", "json 3"]
    assert source_name(f"{shards}/train-*.tar") == f"wds:{shards}/train-*.tar"


def test_a_folder_is_no_pattern(tmp_path):
    folder = tmp_path / "shards [1]"
    folder.mkdir()
    shard(folder / "a.tar", sample(0))
    assert len(open_source("wds:shards [1]", tmp_path)) == 1


def test_classes_are_members(shards):
    source = open_source(f"wds:{shards}")
    assert source.in_memory and source.num_classes == 3 and list(source.labels) == [0, 1, 2, 0, 1]
    assert "left out 10 files that are no pictures (5 .json, 5 .txt)" in source.notes
    report = check(f"wds:{shards}")
    assert report["readable"] == 5 and report["class_counts"] == [2, 2, 1] and not report["bad"]
    plain = open_source(f"wds:{shard(shards / 'deep.tar', {'./a/1.png': PICTURES[0]})}")
    assert not plain.num_classes and plain.reader is None
    assert plain.notes == ("has no KEY.cls: no classes",)


def test_a_set_is_known_again_and_read_elsewhere(shards, tmp_path_factory):
    """By names and sizes, wherever it lies; worker processes get the places of its members."""
    other = tmp_path_factory.mktemp("other")
    for file in shards.glob("*.tar"):
        (other / file.name).write_bytes(file.read_bytes())
    sets_ = [open_source(f"wds:{place}?caption=txt") for place in (shards, other)]
    assert fingerprint(sets_[0])["contents"] == fingerprint(sets_[1])["contents"]
    reader = pickle.loads(pickle.dumps(sets_[0].reader))
    assert reader.read(3)[1] == "text 3"
    (other / "train-00001.tar").write_bytes(b"gone")
    with pytest.raises(
        SourceError, match=r"train-00001.tar/0021.png is no readable image \(is cut"
    ):
        sets_[1].reader.read(3)


def test_encoding_carries_captions(shards, tmp_path):
    vae = latents.autoencoder(tmp_path / "vae")
    grey = [sets.encoded(sets.pixels(8, 8)) for _ in range(3)]
    members = {f"{i}.png": picture for i, picture in enumerate(grey)}
    members |= {f"{i}.txt": f"grey {i}".encode() for i in range(3)}
    name = f"wds:{shard(tmp_path / 'grey.tar', members)}?caption=txt"
    source = open_source(captions.encoded(name, vae, tmp_path / "latents"))
    assert list(source.captions) == ["grey 0", "grey 1", "grey 2"]
    assert describe(source)["captions"] == 3 and "captions" not in describe(open_source("digits"))


def odd(name: str, kind: bytes = tarfile.SYMTYPE, target: str = "/etc/passwd") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([odd("1.png")], "holds '1.png', a link, a special file or a path out of it"),
        ([odd("1.png", tarfile.LNKTYPE, "0000.png")], "holds '1.png', a link"),
        ([odd("1.png", tarfile.FIFOTYPE)], "holds '1.png', a link, a special"),
        ([odd("/1.png", tarfile.REGTYPE)], "holds '/1.png', a link"),
        ([odd("a/../../1.png", tarfile.REGTYPE)], r"holds 'a/../../1.png', a link"),
        ([odd("0000.png", tarfile.REGTYPE)], "two members 0000.png"),
        ([odd("0000.jpg", tarfile.REGTYPE)], "x.tar/0000.jpg is one of two pictures of a key"),
        ([odd("0001.png", tarfile.REGTYPE)], "1 of 2 images have no caption .*expected x.tar/0001"),
    ],
)
def test_odd_members_are_refused(tmp_path, more, said):
    path = shard(tmp_path / "x.tar", sample(0, txt=b"a"), *more)
    with pytest.raises(SourceError, match=said):
        open_source(f"wds:{path}?caption=txt")


def test_damaged_archives_are_refused(tmp_path):
    """Cut anywhere, a header that is damaged where tarfile would end in silence, two joined."""
    good = shard(tmp_path / "x.tar", sample(0, txt=b"a") | sample(1, txt=b"b")).read_bytes()
    end = good.rindex(b"b" + bytes(511)) + 512
    bad, path = bytearray(good), tmp_path / "x.tar"
    start = good.index(b"0007.png")
    bad[start + 100] ^= 7
    cuts = [
        good[:cut] for cut in (0, 100, 700, start + 100, start + 512, end - 600, end, end + 100)
    ]
    others = (bytes(bad), good + good, gzip.compress(good), b"<!DOCTYPE html><html>", bytes(100))
    for content in (*cuts, *others):
        path.write_bytes(content)
        with pytest.raises(SourceError, match="is no plain tar archive, or cut short or damaged"):
            open_source(f"wds:{path}?caption=txt")
    path.write_bytes(good[: end + 512])
    assert len(open_source(f"wds:{path}?caption=txt")) == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wds:train-{00000..00002}.tar", "there is no file .*train-00002.tar; expected shards"),
        ("wds:none-*.tar", "there is no file"),
        ("wds:train-{3..2}.tar", "there is no file .*train-{3..2}.tar"),
        ("wds:", "names no path"),
        ("wds:empty.tar", r"has no images; expected files such as KEY.jpg"),
        ("wds:word.tar", r"word.tar/0000.cls holds no class \(invalid literal"),
        ("wds:some.tar", "1 of 2 images have no label .*expected some.tar/0007.cls"),
        ("wds:long.tar?caption=txt", "has a caption, long.tar/0000.txt, that is of 1048577 bytes"),
        ("wds:train-00000.tar?caption=json", "0000.json, that is no text"),
        ("wds:train-00000.tar?caption=npy", "3 of 3 images have no caption"),
    ],
)
def test_what_cannot_be_read_is_said(shards, name, said):
    shard(shards / "empty.tar", {})
    shard(shards / "word.tar", sample(0, cls=b"cat"))
    shard(shards / "some.tar", sample(0, cls=b"1") | sample(1))
    shard(shards / "long.tar", sample(0, txt=b"a" * (1 + (1 << 20))))
    with pytest.raises(SourceError, match=said):
        open_source(name, shards).take([0])
