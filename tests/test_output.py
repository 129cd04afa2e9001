"""Images on their way to disk: nothing that was drawn is lost, nothing that was there is replaced."""

import contextlib
import errno
import itertools
import json
import shutil

import numpy as np
import pytest
from etils import epath

from ogdm_jax import places
from ogdm_jax.data import npz, output, pictures
from tests.support.commands import arrays

pytestmark = pytest.mark.fast

SEEDS = np.array([*range(5, 15), 400, 401])
FLOATS = np.random.default_rng(0).uniform(-1.2, 1.2, (len(SEEDS), 4, 4, 3)).astype(np.float32)
PIXELS = np.clip(FLOATS * 127.5 + 128, 0, 255).astype(np.uint8)
SETTINGS = {"--steps": 5, "--churn": float("inf")}
KINDS = ("folder", "file.npz", "file.png")


def opened(path, settings=SETTINGS, seeds=SEEDS, **more):
    return output.Output(epath.Path(path), settings, seeds, **more).opened()


def write(path, out):
    if path.suffix == ".npz":
        npz.write(path, out.columns())
    elif path.suffix == ".png":
        pictures.save_png(path, pictures.sheet(np.concatenate(list(out.images()))))


def draw(path, stop_after=None, batch=4, floats=FLOATS, **more):
    """Adds what is not done yet, at most so many batches; returns the starts of those added."""
    added = []
    with opened(path, **more) as out:
        for start in range(0, len(SEEDS), batch):
            if len(added) == stop_after:
                raise KeyboardInterrupt
            if not out.done[start : start + batch].all():
                out.add(start, floats[start : start + batch])
                added.append(start)
        out.finish(lambda path: write(path, out))
        np.testing.assert_array_equal(np.concatenate(list(out.uint8())), PIXELS[out.good])
    return added


def contents(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", KINDS)
def test_a_request_goes_on_where_it_stopped_and_gives_the_same_files(tmp_path, name):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert draw(whole / name) == [0, 4, 8]
    for expected in (2, 1):
        with contextlib.suppress(KeyboardInterrupt):
            draw(parted / name, stop_after=expected)
    assert contents(parted) == contents(whole)
    assert set(contents(whole)) & {name, f"{name}.json"} and not list(whole.glob("*.parts"))
    if name == "folder":
        for seed, image in zip(SEEDS, PIXELS, strict=True):
            np.testing.assert_array_equal(pictures.read(whole / name / f"img{seed:08d}.png"), image)
    if name.endswith("npz"):
        found = arrays(whole / name)
        assert list(found) == ["images", "seeds"]
        np.testing.assert_array_equal(found["images"], PIXELS)
        np.testing.assert_array_equal(found["seeds"], SEEDS)


def test_a_finished_request_draws_nothing_again(tmp_path):
    for name in ("folder", "file.npz"):
        draw(tmp_path / name)
        before = contents(tmp_path)
        assert draw(tmp_path / name) == [] and contents(tmp_path) == before


def test_half_a_batch_of_pictures_is_drawn_whole(tmp_path):
    """As in a run that was not stopped: a batch of other images may round differently."""
    draw(tmp_path / "d")
    (tmp_path / "d" / "img00000010.png").unlink()
    assert draw(tmp_path / "d") == [4]


def test_another_batch_uses_what_is_there(tmp_path):
    with contextlib.suppress(KeyboardInterrupt):
        draw(tmp_path / "f.npz", stop_after=2)  # images 0 to 7
    assert draw(tmp_path / "f.npz", batch=5) == [5, 10]
    np.testing.assert_array_equal(arrays(tmp_path / "f.npz")["images"], PIXELS)


def test_further_seeds_join_a_folder_and_no_npz(tmp_path):
    draw(tmp_path / "d")
    with opened(tmp_path / "d", seeds=np.arange(12, 20)) as out:
        assert out.done.tolist() == [True] * 3 + [False] * 5
    draw(tmp_path / "f.npz")
    with pytest.raises(output.OutputError, match="--seeds '5-14,400-401', now it is '12-19'"):
        opened(tmp_path / "f.npz", seeds=np.arange(12, 20)).__enter__()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_and_what_the_sentence_advises_works(tmp_path, name, finished):
    with contextlib.suppress(KeyboardInterrupt):
        draw(tmp_path / name, stop_after=None if finished else 1)
    before = contents(tmp_path)
    other = SETTINGS | {"--steps": 6}
    with pytest.raises(output.OutputError, match=f"{name}' was drawn with --steps 5, now it is 6"):
        draw(tmp_path / name, settings=other)
    assert contents(tmp_path) == before
    with pytest.raises(output.OutputError, match="--cfg 2, now it is None"):
        draw(tmp_path / "x" / name, settings=SETTINGS | {"--cfg": 2}, stop_after=None)
        draw(tmp_path / "x" / name)
    assert draw(tmp_path / name, settings=other, overwrite=True) == [0, 4, 8]
    again = draw(tmp_path / name, settings=other, overwrite=True)
    assert again == ([0, 4, 8] if name == "file.png" else [])
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["drawn_with"]["--steps"] == 6


def test_overwriting_replaces_only_what_was_drawn(tmp_path):
    draw(tmp_path / "d")
    (tmp_path / "d" / "notes.txt").write_text("mine")
    (tmp_path / "photo.png").write_bytes(b"precious")
    with pytest.raises(output.OutputError, match="no 'photo.png.json' beside it"):
        draw(tmp_path / "photo.png", overwrite=True)
    draw(tmp_path / "d", settings={"--steps": 7}, overwrite=True)
    assert (tmp_path / "d" / "notes.txt").read_text() == "mine"
    draw(tmp_path / "f.npz")
    before = (tmp_path / "f.npz").read_bytes()
    with contextlib.suppress(KeyboardInterrupt):
        draw(tmp_path / "f.npz", settings={"--steps": 7}, overwrite=True, stop_after=1)
    assert (tmp_path / "f.npz").read_bytes() == before  # until the new one is there
    assert draw(tmp_path / "f.npz", settings={"--steps": 7}) == [4, 8]
    (tmp_path / "d" / "img00009999.png").write_bytes(b"of another seed")
    with pytest.raises(output.OutputError, match="holds 1 images of other seeds"):
        draw(tmp_path / "d", settings={"--steps": 8}, overwrite=True)


def test_what_was_there_before_is_not_replaced(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"precious")
    (tmp_path / "set.npz").write_bytes(b"precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "img00000005.png").write_bytes(b"precious")
    (tmp_path / "new.npz.json").write_text('{"precious": 1}')
    (tmp_path / "bad.npz.json").write_text('{"precious')
    (tmp_path / "list.json").write_text("[]")
    before = contents(tmp_path)
    for name in ("photo.png", "set.npz", "folder", "new.npz", "bad.npz", "list"):
        with pytest.raises(ValueError, match="^--out: ") as error:
            draw(tmp_path / name)
        assert "\n" not in str(error.value) and contents(tmp_path) == before
        assert set(tmp_path.iterdir()) == {tmp_path / n.split("/")[0] for n in before}
    (tmp_path / "empty").mkdir()
    assert draw(tmp_path / "empty") == [0, 4, 8]


def test_a_record_of_an_output_that_was_removed_binds_nobody(tmp_path):
    draw(tmp_path / "f.npz")
    (tmp_path / "f.npz").unlink()
    assert draw(tmp_path / "f.npz", settings={"--steps": 9}) == [0, 4, 8]
    assert json.loads((tmp_path / "f.npz.json").read_text())["drawn_with"]["--steps"] == 9


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_image_that_is_not_finite_is_listed_and_never_written(tmp_path, name, value):
    floats = FLOATS.copy()
    floats[6, 1, 2, 0] = value
    for expected in ([0, 4, 8], [8] if name == "file.png" else []):
        if name == "file.png":  # a grid is drawn again, and is the same
            expected = [0, 4, 8]
        assert draw(tmp_path / name, floats=floats) == expected
        with opened(tmp_path / name) as out:
            assert out.bad == {11} and out.good.sum() == 11
            assert "1 of 12 images are not finite" in out.missing() and "are 11 (" in out.missing()
        assert json.loads((tmp_path / f"{name}.json").read_text())["not_finite"] == [11]
    if name == "folder":
        assert not (tmp_path / name / "img00000011.png").exists()
        assert len(list((tmp_path / name).iterdir())) == 11
    if name == "file.npz":
        found = arrays(tmp_path / name)
        assert found["not_finite"].tolist() == [11] and 11 not in found["seeds"]
        assert len(found["images"]) == len(found["seeds"]) == 11


@pytest.mark.parametrize("name", KINDS)
def test_no_finite_image_writes_nothing(tmp_path, name):
    with pytest.raises(output.OutputError, match="none of 12 images is finite, so nothing"):
        draw(tmp_path / name, floats=np.full_like(FLOATS, np.nan))
    assert not (tmp_path / name).is_file()


@pytest.mark.parametrize("name", KINDS)
def test_a_full_disk_says_what_is_safe_and_the_same_command_goes_on(tmp_path, name, monkeypatch):
    """The disk is full at every write in turn; at last everything is there."""
    draw(tmp_path / "whole" / name)
    real, said = places.written, []
    for full in itertools.count(0):
        count = itertools.count()

        @contextlib.contextmanager
        def written(path, count=count, full=full):
            if next(count) == full:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            with real(path) as new:
                yield new

        monkeypatch.setattr(places, "written", written)
        try:
            draw(tmp_path / "parted" / name)
            break
        except (output.OutputError, OSError) as error:
            said.append(str(error))
        finally:
            monkeypatch.setattr(places, "written", real)
    assert any("4 of 12 images are safe in '" in s and "same command goes on" in s for s in said)
    assert all("no space left" in s.lower() for s in said)
    assert contents(tmp_path / "parted") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["folder", "file.npz"])
def test_a_folder_that_vanishes_is_noticed(tmp_path, name):
    with pytest.raises(output.OutputError, match="vanished while images were drawn"):
        with opened(tmp_path / name) as out:
            out.add(0, FLOATS[:4])
            shutil.rmtree(out.folder)
            out.add(4, FLOATS[4:8])
    assert draw(tmp_path / name) == [0, 4, 8]


def test_pictures_that_vanish_are_noticed_at_the_end(tmp_path):
    with pytest.raises(output.OutputError, match="2 images vanished.*10 of 12 images are safe"):
        with opened(tmp_path / "d") as out:
            out.add(0, FLOATS)
            for seed in (5, 6):
                (tmp_path / "d" / f"img{seed:08d}.png").unlink()
            out.finish(lambda path: None)


def test_two_processes_do_not_write_into_one_place(tmp_path):
    for name in KINDS:
        with opened(tmp_path / name) as out:
            out.add(0, FLOATS[:4])
            with pytest.raises(output.OutputError, match="another process is writing to"):
                draw(tmp_path / name)
        assert draw(tmp_path / name) == [4, 8]


@pytest.mark.parametrize("damage", [b"", b"x" * 50, None])
def test_a_damaged_part_is_drawn_again(tmp_path, damage):
    with contextlib.suppress(KeyboardInterrupt):
        draw(tmp_path / "f.npz", stop_after=2)
    part = sorted((tmp_path / "f.npz.parts").iterdir())[0]
    part.write_bytes(part.read_bytes()[:-5] if damage is None else damage)
    assert draw(tmp_path / "f.npz") == [0, 8]
    np.testing.assert_array_equal(arrays(tmp_path / "f.npz")["images"], PIXELS)


def test_floats_are_kept_as_they_are(tmp_path):
    found = []
    for stop in (1, None):
        with contextlib.suppress(KeyboardInterrupt), opened(tmp_path / "d", floats=True) as out:
            for start in (0, 6):
                if not out.done[start : start + 6].all():
                    out.add(start, FLOATS[start : start + 6])
                if stop:
                    raise KeyboardInterrupt
            found = np.concatenate(list(out.images()))
            out.finish(lambda path: path.mkdir())
    np.testing.assert_array_equal(found, FLOATS)
    assert not (tmp_path / "d.parts").exists()


def test_places_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dir.npz").mkdir()
    for name, words in (
        ("a.jpg", "expected FILE.png"),
        ("file", "is there already"),
        ("dir.npz", "is there already"),
        ("file/below.npz", "lies below one"),
        ("a.png", "a grid holds at most 4,096"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            output.check_output(str(tmp_path / name), 5000)
        assert str(error.value).startswith("--out: ")
    for place in ("/proc/x/a.npz", "/proc/x", "nope://bucket/x", "gs:/bucket/x.npz"):
        with pytest.raises(ValueError, match="^--out: "):
            output.check_output(place, 5)
    assert not output.check_output(str(tmp_path / "new" / "folder"), 5000).exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dir.npz", "file"]


def test_columns_come_back_in_pieces(tmp_path):
    rows = np.arange(60, dtype=np.int16).reshape(20, 3)
    path = epath.Path(tmp_path / "a.npz")
    npz.write(
        path, {"rows": (rows.shape, rows.dtype, [rows[:7], rows[7:]]), "n": npz.column("word")}
    )
    pieces = list(npz.read(path, "rows", 8))
    assert [len(piece) for piece in pieces] == [8, 8, 4]
    np.testing.assert_array_equal(np.concatenate(pieces), rows)
    assert str(arrays(tmp_path / "a.npz")["n"]) == "word"
    assert output.spell(np.array([3, 4, 5, 9, 1])) == "3-5,9,1" and output.spell([7]) == "7"
