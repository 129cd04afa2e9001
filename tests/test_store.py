"""What a folder of checkpoints is worth after something happened to it: the newest whole step is
found and said aloud, damage is named, nothing half-written counts.
"""

import contextlib
import json
import os
import shutil
import subprocess

import jax
import numpy as np
import pytest

from ogdm_jax import records
from ogdm_jax.cli import convert
from ogdm_jax.training import checksums, evaluations, lock, steps
from ogdm_jax.training import state as states
from ogdm_jax.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    describe,
    find,
    load_weights,
    resumable,
)
from ogdm_jax.training.workdir import open_workdir
from tests.support import snapshots, tiny

pytestmark = pytest.mark.fast


def filled(shapes) -> states.TrainState:
    """A state in which every tensor of a part has one value."""
    tree = lambda part, value: jax.tree.map(lambda a: np.full(a.shape, value, a.dtype), part)
    return states.TrainState(
        step=np.int32(0),
        params=tree(shapes.params, 1),
        ema=tree(shapes.ema, 2),
        buffers=tree(shapes.buffers, 0),
        opt_state=tree(shapes.opt_state, 3),
        carry={},
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder with steps 10, 20 and 21, run, state's shapes)."""
    folder, run = tmp_path_factory.mktemp("made"), tiny.build("methods=", *tiny.SMALLEST)
    shapes = jax.eval_shape(run.create, run.key)
    about = describe(run.config, run.source.shape, 0)
    with Checkpoints(folder, keep=5) as saved:
        for step in (10, 20, 21):
            saved.save(step, filled(shapes), about, {"step": step})
            saved.wait()
            assert saved.latest() == step
    return folder, run, shapes


@pytest.fixture
def folder(made, tmp_path):
    """A copy that may be spoiled."""
    return shutil.copytree(made[0], tmp_path / "run")


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate_all(step):
    for path in step.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def flip(path, bit: int = 12345):
    content = bytearray(path.read_bytes())
    bit %= 8 * len(content)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def empty(step):
    shutil.rmtree(step)
    step.mkdir()


def a_file(step):
    shutil.rmtree(step)
    step.write_text("what is this")


VISIBLE = {  # also without checksums, as in folders of before
    "empty folder": empty,
    "a file in its place": a_file,
    "no params": lambda step: shutil.rmtree(step / "params"),
    "no state": lambda step: shutil.rmtree(step / "state"),
    "no data": lambda step: shutil.rmtree(step / "data"),
    "no configuration": lambda step: (step / "config" / "metadata").unlink(),
    "no index": lambda step: (step / "ema" / "manifest.ocdbt").unlink(),
    "an empty file": lambda step: largest(step / "params").write_bytes(b""),
    "only empty files": truncate_all,
}
BY_CHECKSUM = {
    "a missing file": lambda step: largest(step / "ema" / "ocdbt.process_0" / "d").unlink(),
    "half a file": lambda step: os.truncate(largest(step / "state"), 100),
    "a longer file": lambda step: os.truncate(largest(step / "params"), 10**6),
    "a flipped bit": lambda step: flip(largest(step / "ema" / "ocdbt.process_0" / "d")),
    "a flipped bit in the list": lambda step: flip(step / checksums.NAME, 8 * 40 + 1),
    "a broken list": lambda step: (step / checksums.NAME).write_text("[1"),
    "another list": lambda step: (step / checksums.NAME).write_text('{"params/x": 3}'),
}


def passed_over(folder, lines: list[str]):
    """What the readers and a resumed run do with a folder whose step 21 is damaged."""
    aloud = []
    assert find(folder, log=aloud.append).step == 20
    assert len(aloud) == 1 and "21" in aloud[0] and "damaged" in aloud[0]
    with pytest.raises(CheckpointError, match=r"--step: checkpoint 21 is damaged .*\[10, 20\]"):
        find(folder, 21)
    assert find(folder, 10).step == 10
    found = resumable(folder, lines.append)
    assert found is not None and found.step == 20
    assert "step 20" in lines[-1] or "step 20" in lines[-2]
    assert steps.present(folder) == steps.complete(folder) == [10, 20]


@pytest.mark.parametrize("how", [*VISIBLE, *BY_CHECKSUM])
def test_a_damaged_newest_step_is_passed_over_aloud(folder, how, capsys):
    (VISIBLE | BY_CHECKSUM)[how](folder / "checkpoints" / "21")
    lines = []
    passed_over(folder, lines)
    aside = folder / "checkpoints" / "21.damaged"
    assert aside.exists() == (how != "empty folder")
    assert any("put aside" in line or "removed" in line for line in lines)


@pytest.mark.parametrize("how", VISIBLE)
def test_so_it_is_in_a_folder_of_before(folder, how):
    for step in (10, 20, 21):
        (folder / "checkpoints" / str(step) / checksums.NAME).unlink()
    VISIBLE[how](folder / "checkpoints" / "21")
    passed_over(folder, [])


def test_a_damaged_step_can_be_saved_again(folder, made):
    _, run, shapes = made
    empty(folder / "checkpoints" / "21")
    flip(largest(folder / "checkpoints" / "20"))
    assert resumable(folder, lambda _: None).step == 10
    with Checkpoints(folder) as saved:
        for step in (20, 21):
            saved.save(step, filled(shapes), describe(run.config, (8, 8, 1), 0), {"step": step})
    assert steps.complete(folder) == [10, 20, 21] and find(folder, 20).step == 20


def test_where_no_step_is_whole_a_person_decides(folder):
    for step in (10, 20, 21):
        flip(largest(folder / "checkpoints" / str(step) / "ema"))
    with pytest.raises(CheckpointError, match="every checkpoint in .* is damaged .*afresh"):
        resumable(folder, lambda _: None)
    assert steps.present(folder) == [10, 20, 21]
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        find(folder, log=lambda _: None)


def test_a_first_save_that_was_cut_is_a_fresh_start(folder):
    top = folder / "checkpoints"
    (top / "21").rename(top / "21.orbax-checkpoint-tmp")
    for step in (10, 20):
        shutil.rmtree(top / str(step))
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find(folder)
    lines = []
    assert resumable(folder, lines.append) is None
    assert len(lines) == 1 and "21.orbax-checkpoint-tmp removed" in lines[0]
    assert not list(top.iterdir())
    empty_folder = top / "3"
    empty_folder.mkdir()
    assert resumable(folder, lines.append) is None and "3 is empty: removed" in lines[1]
    assert resumable(folder / "nowhere", lines.append) is None


def test_what_is_no_step_is_left_alone(folder):
    top = folder / "checkpoints"
    for name in ("007", "²", "notes.txt", "99999999999999999999", "-3", "20 copy"):
        (top / name).mkdir()
    assert steps.present(folder) == [10, 20, 21]
    assert resumable(folder, lambda _: None).step == 21
    assert (top / "notes.txt").is_dir()


def test_a_file_that_cannot_be_read_is_not_put_aside(folder, monkeypatch):
    """The disk or the permissions may come back: an error of the system is no damage."""
    target = str(folder / "checkpoints" / "21" / "params")
    walk = os.walk

    def closed(top, onerror=None, **more):
        for root, folders, names in walk(top, onerror=onerror, **more):
            if str(root).startswith(target):
                onerror(PermissionError(13, "Permission denied", root))
            yield root, folders, names

    monkeypatch.setattr(os, "walk", closed)
    with pytest.raises(PermissionError):
        resumable(folder, lambda _: None)
    assert (folder / "checkpoints" / "21").is_dir()


def test_weights_as_trained_are_compared_before_they_are_read(folder, made):
    _, _, shapes = made
    flip(largest(folder / "checkpoints" / "20" / "params"))
    snapshot = find(folder, 20)
    load_weights(snapshot, shapes.params, shapes.buffers)  # the average is whole
    with pytest.raises(CheckpointError, match="20 is damaged .*params/.*checksum"):
        load_weights(snapshot, shapes.params, shapes.buffers, "params")


# --- evaluations.json


def report(step, fd, **more):
    return {"step": step, "fd": fd, "features": "x", "n": 2, "n_samples": 2} | more


HOSTILE = (
    *("", "{", "[", "null", "3", '"x"', "{}", '{"step": 1}', "[1]", "[null]", '["a"]', "[[]]"),
    *("[{}]", '[{"step": 1}]', '[{"fd": 1}]', '[{"step": "1", "fd": 1}]'),
    *('[{"step": true, "fd": 1}]', '[{"step": -1, "fd": 1}]', '[{"step": 1.0, "fd": 1}]'),
    *('[{"step": 1, "fd": "low"}]', '[{"step": 1, "fd": null}]', '[{"step": 1, "fd": [1]}]'),
    *('[{"step": 1, "fd": 1, "weight": {}}]', "[" * 10_000, "[1e999", "\x00\x00", "[{'step': 1}]"),
)


@pytest.mark.parametrize("content", HOSTILE)
def test_broken_evaluations_are_one_sentence_with_a_remedy(folder, content):
    (folder / evaluations.NAME).write_text(content)
    for read in (evaluations.read, lambda f: find(f, "best"), Checkpoints):
        with pytest.raises(records.RecordError, match="evaluations.json") as caught:
            read(folder)
        assert "take it away" in str(caught.value) and "\n" not in str(caught.value)
    assert find(folder).step == 21  # whoever does not ask for the best is not kept


def test_a_distance_that_was_not_a_number_is_kept_and_never_the_best(folder):
    with Checkpoints(folder) as saved:
        assert saved.record(report(10, 5.0))
        assert saved.record(report(20, 3.0))
        assert not saved.record(report(21, float("nan")))
    json.loads((folder / evaluations.NAME).read_text(), parse_constant=pytest.fail)
    assert np.isnan(evaluations.read(folder)[21]["fd"])
    assert find(folder, "best").step == 20
    flip(largest(folder / "checkpoints" / "20"))
    flip(largest(folder / "checkpoints" / "20" / "ema"))
    lines = []
    assert find(folder, "best", log=lines.append).step == 10 and len(lines) == 1


def test_the_best_of_steps_that_are_gone(folder):
    evaluations.write(folder, {3: report(3, 1.0), 4: report(4, 2.0)})
    with pytest.raises(
        CheckpointError, match=r"no checkpoint .* \(those of \[3, 4\] were, and are"
    ):
        find(folder, "best")
    evaluations.write(folder, {3: report(3, 1.0), 10: report(10, 2.0)})
    assert find(folder, "best").step == 10


def test_evaluations_are_written_whole_or_not_at_all(folder, monkeypatch):
    evaluations.write(folder, {3: report(3, 1.0)})
    before = (folder / evaluations.NAME).read_text()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError):
        evaluations.write(folder, {3: report(3, 9.0)})
    assert (folder / evaluations.NAME).read_text() == before


# --- the JSON files of a checkpoint


def edited(folder, item, content):
    """The folder with other text in the newest step's file, and no list that would tell."""
    (folder / "checkpoints" / "21" / checksums.NAME).unlink()
    path = folder / "checkpoints" / "21" / item / "metadata"
    path.write_text(content(json.loads(path.read_text())) if callable(content) else content)


def without(key):
    return lambda about: json.dumps({k: v for k, v in about.items() if k != key})


def other(**changes):
    return lambda about: json.dumps(about | changes)


def setting(**changes):
    return lambda about: json.dumps(about | {"config": about["config"] | changes})


CONFIGURATIONS = (
    *("{", "[]", "null", "{}", "\x00", "[" * 10_000, '{"config": {}}', "3"),
    *(without("config"), without("image_shape"), without("num_classes")),
    *(other(config=[]), other(config="x"), other(config=None), other(image_shape=[8, 8])),
    *(other(image_shape="888"), other(image_shape=[8, 8, "1"]), other(image_shape=[8, 8, -1])),
    *(other(image_shape=[1e9, 8, 1]), other(num_classes=-1), other(num_classes="10")),
    *(other(num_classes=True), other(num_classes=10**12), other(data_set=[1]), setting(data=3)),
    *(setting(network="song"), setting(seed="x"), setting(methods=3), setting(task=[])),
    *(setting(ema={"halflife": {"float": "x"}}), setting(optim={"learning_rate": None})),
)


@pytest.mark.parametrize("content", CONFIGURATIONS)
@pytest.mark.default
def test_a_broken_configuration_is_one_sentence(folder, content):
    edited(folder, "config", content)
    with pytest.raises(ValueError) as caught:
        open_workdir(folder)
    assert type(caught.value).__module__.startswith("ogdm_jax"), repr(caught.value)
    assert "config/metadata" in str(caught.value) and "\n" not in str(caught.value)
    assert open_workdir(folder, 20).step == 20


POSITIONS = (
    *("{", "[]", "null", "", "3", "{}", '{"step": -1}', '{"step": "7"}', '{"step": 1.5}'),
    *('{"step": null}', '{"step": [1]}', '{"step": true}', '{"stp": 1}', '{"step": 20}', "NaN"),
    *('{"step": {"a": 1}}', "\x00", "[" * 10_000, '"step"', '{"step": 1e999}', '{"step": NaN}'),
)


@pytest.mark.parametrize("content", POSITIONS)
def test_a_broken_position_is_one_sentence(folder, made, content):
    _, run, shapes = made
    edited(folder, "data", content)
    with Checkpoints(folder) as saved, pytest.raises(ValueError) as caught:
        saved.restore(21, shapes, run.plan)
    assert type(caught.value).__module__.startswith("ogdm_jax"), repr(caught.value)
    assert "data/metadata" in str(caught.value) and "\n" not in str(caught.value)


# --- saving


def save(saved, made, step):
    _, run, shapes = made
    saved.save(step, filled(shapes), describe(run.config, run.source.shape, 0), {"step": step})


def test_a_folder_that_is_gone_is_one_sentence(made, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(CheckpointError, match="is gone, so that step 2 cannot"):
        with Checkpoints(folder) as saved:
            save(saved, made, 1)
            saved.wait()
            shutil.rmtree(folder)
            save(saved, made, 2)
    assert not folder.exists()


@pytest.mark.default
def test_a_save_that_fails_is_told_once_and_by_whoever_looks(made, tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as saved:
        save(saved, made, 1)
        saved.wait()
        saved.check()
    full = OSError(28, "No space left on device", "/x")
    monkeypatch.setattr(checksums, "write", lambda _: (_ for _ in ()).throw(full))
    for look in ("wait", "check", "save", "close"):
        saved = Checkpoints(tmp_path)
        save(saved, made, 2)
        with pytest.raises(CheckpointError) as caught:
            if look == "save":
                save(saved, made, 3)
            while look != "save":
                getattr(saved, look)()
        words = str(caught.value)
        assert words.startswith("step 2 was not saved (") and "no space left" in words
        assert "step 1 is safe" in words and "\n" not in words
        saved.close()  # says nothing more
        assert saved.latest() == 1
    assert resumable(tmp_path, lambda _: None).step == 1


def test_the_first_error_is_the_one_that_is_seen(made, tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "write", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path) as saved:
        save(saved, made, 2)
        raise ZeroDivisionError


@pytest.mark.slow_cases("300", "620", "700")
@pytest.mark.parametrize("kilobytes", [300, 620, 700, 900])
@pytest.mark.default
def test_a_full_disk_is_one_sentence_and_the_same_goes_on_with_room(made, tmp_path, kilobytes):
    """Several checkpoints of 0.3 MB each on a small file system, which then grows."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        with pytest.raises(CheckpointError) as caught, Checkpoints(tmp_path, keep=100) as saved:
            for step in range(1, 30):
                save(saved, made, step)
        words = str(caught.value)
        assert "no space left on device; free some space" in words and "\n" not in words
        whole = steps.complete(tmp_path)
        assert (f"step {whole[-1]} is safe" if whole else "no checkpoint is complete") in words
        more = ["mount", "-o", "remount,size=20m", str(tmp_path)]
        subprocess.run(more, check=True, capture_output=True)
        found = resumable(tmp_path, lambda _: None)
        assert (found.step if found else None) == (whole[-1] if whole else None)
        with Checkpoints(tmp_path, keep=100) as saved:
            save(saved, made, 40)
        assert find(tmp_path).step == 40
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            subprocess.run(["umount", "-l", str(tmp_path)], check=True, capture_output=True)


def test_a_folder_that_becomes_read_only_is_read_and_not_written(folder, made):
    """Sampling needs no right to write; whoever saves is told in a sentence."""
    for options in (["--bind", str(folder)], ["-o", "remount,bind,ro", str(folder)]):
        words = ["mount", *options] + ([str(folder)] if "--bind" in options else [])
        if options[0] == "-o":
            saved = Checkpoints(folder)
            save(saved, made, 29)
            saved.wait()
        if subprocess.run(words, capture_output=True).returncode:
            pytest.skip("needs the right to mount")
    try:
        assert open_workdir(folder).step == 29
        with pytest.raises(CheckpointError) as caught:
            save(saved, made, 30)
            saved.wait()
        assert "read-only file system" in str(caught.value) and "29 is safe" in str(caught.value)
        saved.close()
        with pytest.raises(OSError), lock.hold(folder):
            pass
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


def test_a_checkpoints_folder_that_is_none(tmp_path):
    """A link to a disk that is not there is no fresh start."""
    for spoil in (
        lambda path: path.write_text(""),
        lambda path: path.symlink_to("/nowhere/at/all"),
        lambda path: path.symlink_to(path),
    ):
        spoil(tmp_path / "checkpoints")
        with pytest.raises((OSError, CheckpointError)):
            resumable(tmp_path, lambda _: None)
            Checkpoints(tmp_path)
        (tmp_path / "checkpoints").unlink()


def test_reading_asks_no_lock_and_says_aloud_what_it_passes_over(folder, capsys):
    with lock.hold(folder):
        assert open_workdir(folder).step == 21 and not capsys.readouterr().err
        flip(largest(folder / "checkpoints" / "21" / "ema"))
        assert open_workdir(folder).step == 20
    said = capsys.readouterr()
    assert "checkpoints/21 is damaged" in said.err and said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize("step", [7, "newest", "", np.int64(7), 1.5])
def test_a_step_that_is_not_there(folder, step):
    with pytest.raises(CheckpointError, match=r"--step: no checkpoint of step .*\[10, 20, 21\]"):
        find(folder, step)
    assert find(folder, np.int64(20)).step == 20


@pytest.mark.default
def test_a_conversion_that_was_cut_is_given_again(tmp_path, capsys):
    source, out = snapshots.published(tmp_path), tmp_path / "w"
    cut = out / "checkpoints" / "0.orbax-checkpoint-tmp"
    (cut / "params").mkdir(parents=True)
    (cut / "params" / "_METADATA").write_text("{")
    words = [str(source), "--out", str(out)]
    convert.main(words)
    assert open_workdir(out).step == 0 and not checksums.damage(find(out).path, checksums.ITEMS)
    with pytest.raises(SystemExit):
        convert.main(words)
    assert "already holds checkpoints" in capsys.readouterr().err
    assert steps.present(out) == [0]
