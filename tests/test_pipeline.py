"""Batches: every example equally often, the same global batches on resume, on disk and on any
number of processes.
"""

import json

import numpy as np
import pytest

from ogdm_jax.data import batches, from_arrays, in_order, indices, open_source
from ogdm_jax.data.pipeline import reference_indices
from ogdm_jax.data.prepare import prepare

pytestmark = pytest.mark.fast


@pytest.fixture
def source():
    images = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    return from_arrays("ten", images, np.arange(10, dtype=np.int32) % 3)


def rows(batch) -> list[int]:
    return batch["image"][:, 0, 0, 0].tolist()


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(
        np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a
    )


def test_batch_has_uint8_images_labels_and_global_index(source):
    batch = next(batches(source, 4, seed=0))
    assert (
        batch["image"].dtype == np.uint8
        and batch["label"].dtype == batch["index"].dtype == np.int32
    )
    np.testing.assert_array_equal(batch["label"], np.array(rows(batch)) % 3)
    np.testing.assert_array_equal(batch["index"], np.arange(4))


@pytest.mark.parametrize("size", [1, 3, 10, 23])
def test_every_example_once_an_epoch(source, size):
    stream = batches(source, size, seed=1)
    seen = [row for _ in range(30) for row in rows(next(stream))]
    for start in range(0, len(seen) - 9, 10):
        assert sorted(seen[start : start + 10]) == list(range(10))
    assert seen[:10] != seen[10:20]


def test_order_is_uniform():
    counts = np.zeros((4, 4))
    for seed in range(2000):
        counts[np.arange(4), indices(4, 4, seed, 0)] += 1
    assert np.abs(counts / 2000 - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 2000)


def test_resume_is_bit_equal(source):
    whole = batches(source, 4, seed=2)
    expected = [next(whole) for _ in range(9)]
    first = batches(source, 4, seed=2)
    for _ in range(5):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    assert state == {"step": 5}
    resumed = batches(source, 4, seed=2)
    resumed.set_state(state)
    for stream in (resumed, batches(source, 4, seed=2, start_step=5)):
        assert all(equal(next(stream), batch) for batch in expected[5:])


@pytest.mark.parametrize("count", [2, 3])
def test_process_shares_are_disjoint_and_make_the_global_batch(source, count):
    whole = batches(source, 6, seed=3, extra_references=12)
    shares = [
        batches(source, 6, 3, process_index=k, process_count=count, extra_references=12)
        for k in range(count)
    ]
    for _ in range(4):
        parts, batch = [next(s) for s in shares], next(whole)
        assert len({i for p in parts for i in p["index"].tolist()}) == 6
        assert equal({k: np.concatenate([p[k] for p in parts]) for k in batch}, batch)


def test_references_are_other_images_once_each():
    """None of the step's batch, none twice, all equally often; the batches are those without
    references.
    """
    images = np.arange(60, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    source = from_arrays("sixty", images, np.arange(60, dtype=np.int32) % 3)
    plain, stream = batches(source, 13, seed=4), batches(source, 13, seed=4, extra_references=40)
    counts = np.zeros(60)
    for _ in range(200):
        batch, more = next(plain), next(stream)
        reference = more["reference"][:, 0, 0, 0].tolist()
        assert (
            rows(batch) == rows(more)
            and not set(rows(batch)) & set(reference)
            and len(set(reference)) == 40
        )
        np.testing.assert_array_equal(more["reference_label"], np.array(reference) % 3)
        counts[reference] += 1
    assert np.abs(counts / 200 - 40 / 60).max() < 5 * np.sqrt(1 / 3 * 2 / 3 / 200)
    again = batches(source, 13, seed=4, extra_references=40)
    again.set_state({"step": 150})
    assert equal(next(again), stream.at(150)) and not equal(stream.at(150), stream.at(151))


def test_references_of_small_sets_repeat_as_late_as_possible():
    own = np.array([0, 3, 3, 9])
    picked = reference_indices(10, 21, 0, 5, own)
    assert set(picked.tolist()) == {1, 2, 4, 5, 6, 7, 8}
    assert all(len(set(picked[i : i + 7].tolist())) == 7 for i in range(15))
    with pytest.raises(ValueError, match="the batch holds all 4 images"):
        reference_indices(4, 4, 0, 0, np.arange(4))
    assert sorted(reference_indices(10, 7, 1, 0, own).tolist()) == [1, 2, 4, 5, 6, 7, 8]


def test_set_on_disk_gives_the_batches_of_the_set_in_memory(tmp_path):
    name = prepare(open_source("digits"), tmp_path, shard_images=1000)
    memory, disk = open_source(name, tmp_path), open_source(name, tmp_path, memory_limit=0)
    a, b = (
        batches(memory, 16, seed=5, extra_references=8),
        batches(disk, 16, seed=5, extra_references=8, threads=2),
    )
    assert all(equal(next(a), next(b)) for _ in range(4))
    state = b.get_state()
    following = [next(b) for _ in range(3)]
    b.set_state(state)
    assert all(equal(next(b), batch) for batch in following)
    second = batches(
        disk, 16, 5, start_step=4, process_index=1, process_count=2, extra_references=8, threads=2
    )
    assert rows(next(second)) == rows(following[0])[8:]


def test_an_unreadable_image_stops_the_stream_with_its_name(tmp_path):
    from PIL import Image

    from ogdm_jax.data import SourceError

    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    stream = batches(open_source(f"folder:{tmp_path}", memory_limit=0), 2, seed=0, threads=1)
    with pytest.raises(SourceError, match="b.png is no readable image"):
        next(stream)


def test_in_order_passes_once(source):
    parts = list(in_order(source, 4))
    assert [len(p["image"]) for p in parts] == [4, 4, 2]
    assert [r for p in parts for r in rows(p)] == list(range(10))


def test_image_without_a_class_has_label_minus_one(source):
    unlabelled = from_arrays("none", source.images)
    assert next(batches(unlabelled, 3, seed=0))["label"].tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    "settings,message",
    [
        (dict(batch_size=0), "batch_size is 0; expected an integer >= 1"),
        (
            dict(batch_size=5, process_count=2),
            "batch_size is 5; expected a multiple of the 2 processes",
        ),
        (dict(batch_size=4, process_count=2, extra_references=3), "extra_references is 3"),
        (dict(batch_size=4, process_index=1), "process_index is 1; expected 0 to 0"),
        (dict(batch_size=4, seed=-1), "seed is -1"),
        (dict(batch_size=4, start_step=-1), "start_step is -1"),
    ],
)
def test_bad_settings_are_named(source, settings, message):
    with pytest.raises(ValueError, match=message):
        batches(source, **({"seed": 0} | settings))


def test_bad_state_is_named(source):
    with pytest.raises(ValueError, match="state is {'next': 1}"):
        batches(source, 2, seed=0).set_state({"next": 1})
    with pytest.raises(ValueError, match="size is 0"):
        indices(10, 0, 0, 0)
