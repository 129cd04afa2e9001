"""The one reader of labels: what is read as classes or vectors, what is said, what is refused."""

import json

import numpy as np
import pytest

from ogdm_jax.data import SourceError, open_source
from tests.support.sets import archive, encoded, folder, pixels

pytestmark = pytest.mark.fast

N = 12
TENTH = np.arange(N) % 4


def _npz(path, labels, **more) -> str:
    np.savez(path / "a.npz", image=pixels(N, 4, 4, 3), label=labels, **more)
    return f"npz:{path}/a.npz"


@pytest.mark.parametrize(
    "labels",
    [
        TENTH[:, None],
        TENTH.astype(np.float32),
        TENTH.astype(np.float64)[:, None],
        TENTH.astype(np.uint8),
        TENTH.astype(">i8"),
        np.eye(4)[TENTH],
        np.eye(4, dtype=bool)[TENTH],
    ],
    ids=["column", "float32", "column of floats", "uint8", "big-endian", "one-hot", "bool one-hot"],
)
def test_classes_as_people_store_them(tmp_path, labels):
    source = open_source(_npz(tmp_path, labels))
    assert source.labels is not None and source.labels.dtype == np.int32
    np.testing.assert_array_equal(source.labels, TENTH)
    assert source.num_classes == 4 and source.label_size == 0
    assert ("one-hot" in "".join(source.notes)) == (labels.ndim == 2 and labels.shape[1] == 4)


def test_one_hot_vectors_keep_classes_that_never_occur(tmp_path):
    source = open_source(_npz(tmp_path, np.eye(6)[TENTH]))
    assert source.num_classes == 6 and "2 of its 6 classes have no image" in source.notes[1]


def test_vectors_stay_vectors(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(N, 3))
    source = open_source(_npz(tmp_path, vectors))
    assert source.label_size == source.num_classes == 3
    np.testing.assert_array_equal(source.labels, vectors.astype(np.float32))
    fractions = open_source(_npz(tmp_path, vectors[:, :1]))  # one number that is no class
    assert fractions.label_size == 1


@pytest.mark.parametrize(
    "labels, words",
    [
        (TENTH + 1, "from 1 to 4, class 0 has no image: subtract 1"),
        (TENTH * 3, "6 of its 10 classes have no image (class 1 first)"),
        (TENTH, ""),
        (TENTH - 1, "images have no class (-1)"),
    ],
    ids=["from 1", "gaps", "plain", "no class"],
)
def test_what_is_said_of_classes(tmp_path, labels, words):
    source = open_source(_npz(tmp_path, labels))
    assert source.notes == () if not words else words in source.notes[0]
    assert source.num_classes == labels.max() + 1


REFUSED = {
    "NaN": (np.where(TENTH == 2, np.nan, TENTH), "the label of image 2 is nan"),
    "NaN in vectors": (np.full((N, 3), np.nan), "the label of image 0 is [nan nan nan]"),
    "infinite": (np.where(TENTH == 2, np.inf, TENTH), "the label of image 2 is inf"),
    "fractions": (TENTH + 0.5, "no whole numbers (0.5)"),
    "negative": (TENTH - 2, "labels go from -2 to 1"),
    "absurd": (np.where(TENTH == 2, 10**9, TENTH), "labels go from 0 to 1000000000 in 12 images"),
    "64 bits": (np.full(N, 2**63, np.uint64), "labels go from 9223372036854775808"),
    "huge float": (np.full(N, 1e300), "labels go from 1e+300"),
    "short": (TENTH[:-1], "has 11 labels for 12 images"),
    "long": (np.arange(N + 1), "has 13 labels for 12 images"),
    "one number": (np.array(3), "has 1 labels for 12 images"),
    "texts": (np.array(["cat", "dog"] * 6), "names, numbers = np.unique(labels, return_inverse"),
    "complex": (TENTH * 1j, "labels have type complex128"),
    "three axes": (np.zeros((N, 2, 2)), "shape (12, 2, 2)"),
    "no columns": (np.zeros((N, 0)), "shape (12, 0)"),
    "objects": (np.array([*TENTH[:-1], None], object), "holds Python objects, which are not read"),
    "huge vectors": (np.full((N, 2), 1e300), "that float32 can hold"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_labels_that_are_refused(tmp_path, key):
    labels, words = REFUSED[key]
    name = _npz(tmp_path, labels)
    with pytest.raises(SourceError) as caught:
        open_source(name)
    assert words in str(caught.value) and name in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_for_too_few_classes_are_refused(tmp_path):
    with pytest.raises(SourceError, match="labels go up to 3, but there are names for 3 classes"):
        open_source(_npz(tmp_path, TENTH, label_names=np.array(["a", "b", "c"])))
    named = open_source(_npz(tmp_path, TENTH, class_names=np.array(list("abcd"))))
    assert named.class_names == tuple("abcd")


FILES = ["a.png", "b.png"]
TABLES = {
    "names alone": (["a.png", "b.png"], "malformed"),
    "text": ("a.png", "malformed"),
    "number": (3, "malformed"),
    "triples": ([["a.png", 0, 1], ["b.png", 1, 1]], "malformed"),
    "missing": ([["a.png", 0]], "no label for b.png"),
    "twice": ([["a.png", 0], ["b.png", 1], ["./a.png", 1]], "gives ./a.png the labels 0 and 1"),
    "null": ([["a.png", 0], ["b.png", None]], "labels have type object"),
    "texts": ([["a.png", "cat"], ["b.png", "dog"]], "labels have type <U3"),
    "mixed": ([["a.png", 0], ["b.png", "dog"]], "labels have type <U"),
    "lengths": ([["a.png", [1.5, 2]], ["b.png", [1.5]]], "mixes kinds"),
    "beyond 64 bits": ([["a.png", 10**40], ["b.png", 1]], "labels have type object"),
    "not a number": ([["a.png", float("nan")], ["b.png", 1]], "label of image 0 is nan"),
    "absurd": ([["a.png", 10**9], ["b.png", 1]], "labels go from 1 to 1000000000"),
    "deep": ([["a.png", [[[1]]]], ["b.png", [[[1]]]]], "shape (2, 1, 1, 1)"),
    "dictionaries": ([["a.png", {"class": 1}], ["b.png", {"class": 0}]], "labels have type object"),
}


@pytest.mark.parametrize("key", TABLES)
def test_tables_that_are_refused(tmp_path, key):
    labels, words = TABLES[key]
    content = json.dumps({"labels": labels}).encode()
    for name in (
        archive(tmp_path / "a.zip", FILES, labels),
        folder(tmp_path / "a", {name: encoded() for name in FILES} | {"dataset.json": content}),
    ):
        with pytest.raises(SourceError) as caught:
            open_source(name)
        assert words in str(caught.value) and name in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"null", b'{"labels"', b"\xff\xfe", b"[" * 100_000, b'{"labels": 1e999}'],
    ids=["empty", "list", "no labels", "null", "cut", "no text", "deep", "infinite"],
)
def test_a_table_that_is_none_is_malformed(tmp_path, content):
    name = folder(tmp_path, {"a.png": encoded(), "dataset.json": content})
    with pytest.raises(SourceError, match="dataset.json is malformed"):
        open_source(name)


def test_tables_that_are_read(tmp_path):
    columns = open_source(archive(tmp_path / "a.zip", FILES, [["b.png", [1]], ["a.png", [0]]]))
    assert columns.labels is not None and columns.labels.tolist() == [0, 1]
    more = [["a.png", 0], ["b.png", 1], ["a.png", 0], ["c.png", 7]]
    extra = open_source(archive(tmp_path / "b.zip", FILES, more))
    assert extra.num_classes == 2
    assert "labels for 1 files that are no images of the set (c.png first)" in extra.notes[0]


def test_a_table_may_be_a_dictionary(tmp_path):
    source = open_source(archive(tmp_path / "a.zip", FILES, {"b.png": 1, "a.png": 0}))
    assert source.labels.tolist() == [0, 1]
