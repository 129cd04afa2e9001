"""Averages of any length from a real run: tracked, kept across resumes, opened, sampled."""

import shutil

import jax
import numpy as np
import pytest

from ogdm_jax import cli
from ogdm_jax.config import ConfigError
from ogdm_jax.training import loop, snapshots
from ogdm_jax.training.workdir import open_workdir
from tests.support import runs, tiny

SETTINGS = (
    *runs.CHEAP,
    "methods=",
    "ema.stds=0.05,0.07,0.1",
    "ema.snapshots=2 steps",
    "train.save_every=10 steps",
    "optim.clip=1",
)


def train(workdir, steps: int, *more: str, **words):
    said: list[str] = []
    config = tiny.config(*SETTINGS, f"train.duration={steps} steps", *more)
    _, state = loop.train(config, workdir, said.append, **words)
    return state, said


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, train(workdir, 24)[0]


def snapshot_bytes(workdir):
    return {s: snapshots.path_of(workdir, s).read_bytes() for s in snapshots.present(workdir)}


def distance(tree, other) -> float:
    """L2 norm of a difference over that of the second tree."""
    both = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in both]
    return np.sqrt(
        sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(b**2) for _, b in pairs)
    )


def test_a_width_that_was_held_out_equals_the_tracked_one(straight):
    """From those of 0.05 and 0.1, to the rounding of float16: 2^-12 a number at most, 1e-4 typical."""
    workdir, state = straight
    assert snapshots.present(workdir) == list(range(2, 25, 2))
    tracked = state.averages[1]
    (found,), step, errors = snapshots.reconstruct(workdir, (0.05, 0.1), [0.07], state.params)
    assert step == 24 and errors[0] < 0.01
    assert distance(found, tracked) < 3e-4
    moved = distance(state.averages[0], state.averages[2])
    assert moved > 10 * distance(found, tracked)  # the widths are told apart
    assert distance(open_workdir(workdir, ema_std=0.07).params, tracked) < 3e-4


@pytest.mark.slow
def test_a_resumed_run_writes_the_same_snapshots(straight, tmp_path):
    """Killed after step 14: the checkpoint of 10 is the last, its snapshot was not written yet, and
    those behind it are of no use.
    """
    train(tmp_path, 14)
    shutil.rmtree(tmp_path / "checkpoints" / "14")
    snapshots.path_of(tmp_path, 10).unlink()
    for step in (12, 14):
        snapshots.path_of(tmp_path, step).write_bytes(b"stale")
    shutil.copy(snapshots.path_of(tmp_path, 14), snapshots.path_of(tmp_path, 99))
    state, said = train(tmp_path, 24)
    assert "3 snapshots after step 10 removed; the run makes them again" in said
    assert snapshot_bytes(tmp_path) == snapshot_bytes(straight[0])
    tiny.assert_trees(state.averages, straight[1].averages)


@pytest.mark.slow
def test_going_back_puts_later_snapshots_aside(straight, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(straight[0], workdir)
    train(workdir, 22, "init.step=20", "optim.clip=2", "optim.schedule=constant", override=True)
    assert snapshots.present(workdir) == list(range(2, 23, 2))
    aside = workdir / "set_aside" / "1"
    assert (aside / "ema" / "00000022.npz").exists() and (aside / "24").is_dir()
    new, old = (snapshot_bytes(folder) for folder in (workdir, straight[0]))
    assert new[20] == old[20] and new[22] != old[22]


def test_the_command_makes_folders_that_sampling_opens(straight, tmp_path, capsys):
    workdir = straight[0]
    line = ["ema", "--workdir", str(workdir), "--std", "0.06,0.1", "--out", str(tmp_path)]
    assert cli.main(line) == 0
    assert "from 12 snapshots of 0.05, 0.07, 0.1" in capsys.readouterr().out
    for std in (0.06, 0.1):
        model = open_workdir(tmp_path / f"ema-{std}")
        direct = open_workdir(workdir, ema_std=std)
        assert model.step == direct.step == 24
        tiny.assert_trees(model.params, direct.params)
        tiny.assert_trees(model.buffers, direct.buffers)
    images = model.sample(2, steps=2)
    assert np.isfinite(images).all()
    np.testing.assert_array_equal(images, direct.sample(2, steps=2))
    with pytest.raises(SystemExit) as end:
        cli.main(line)
    assert end.value.code == 1 and "already holds checkpoints" in capsys.readouterr().err


def test_an_earlier_average_needs_no_checkpoint_of_its_step(straight):
    assert open_workdir(straight[0], 18, ema_std=0.1).step == 18
    with pytest.raises(ConfigError, match="std: 0.5 given"):
        open_workdir(straight[0], ema_std=0.5)
