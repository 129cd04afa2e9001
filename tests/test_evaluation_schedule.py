"""Evaluation during training: on schedule, logged, and the best checkpoint survives; so does the
record of it.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax.config import ConfigError
from ogdm_jax.training import evaluate, evaluations, loop
from ogdm_jax.training.checkpoint import CheckpointError, find
from ogdm_jax.training.workdir import open_workdir
from tests.support import tiny

DISTANCES = {4: 5.0, 8: 2.0, 12: 3.0, 16: 4.0, 20: 1.0}  # of what the schedule meets


class Pixels:
    """Eight pixels of each image: a feature space that costs nothing."""

    name, dim = "fd_pixels", 8

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1)[:, 20:28].astype(np.float32) / 255


@pytest.fixture
def distances(monkeypatch):
    """The reports of the run, with distances that the test chooses; steps and samples that cost
    nothing.
    """
    made, real = [], evaluate.distance_report

    def report(space, samples, reference):
        assert samples.dtype == np.uint8 and reference.shape == (
            1797,
            8,
        )  # the data's features were taken before
        made.append(real(space, samples, reference) | {"fd": DISTANCES[4 * (len(made) + 1)]})
        return made[-1]

    monkeypatch.setattr(evaluate, "space_of", lambda config: Pixels())
    monkeypatch.setattr(
        evaluate.Evaluator, "samples", lambda self, *_: self._run.source.images[:12]
    )
    no_grids = dataclasses.replace(loop.DENOISER, watch=lambda *_: lambda step, state: None)
    monkeypatch.setattr(loop, "DENOISER", no_grids)
    monkeypatch.setattr(loop.runs.Run, "compile", lambda self, like: _count)
    monkeypatch.setattr(evaluate, "distance_report", report)
    return made


def _count(state, frozen, batch, key):
    return state.replace(step=state.step + 1), {"loss": jnp.zeros(())}


def _train(workdir, steps: int, *more: str) -> list[str]:
    said = []
    settings = (
        *tiny.SMALLEST,
        "methods=",
        "evaluate.features=digits",
        "evaluate.every=4 steps",
        "evaluate.num=12",
        "train.keep=1",
    )
    settings += ("sample.solver=heun",)
    more = (
        "train.save_every=0 steps",
        f"train.duration={steps} steps",
        "parallel.devices=1",
        *more,
    )
    loop.train(tiny.config(*settings, *more), workdir, said.append)
    return said


def _kept(workdir) -> set[int]:
    return {int(path.name) for path in (workdir / "checkpoints").iterdir()}


@pytest.mark.slow
def test_the_best_checkpoint_stays_through_a_resume(tmp_path, distances):
    said = _train(tmp_path, 12)
    assert [line.split()[1] for line in said if line.startswith("fd_pixels")] == [
        "5.000",
        "2.000",
        "3.000",
    ]
    assert "not the best" in next(line for line in said if "fd_pixels 3.000" in line)
    assert (
        _kept(tmp_path) == {8, 12}
        and find(tmp_path, "best").step == 8
        and find(tmp_path).step == 12
    )
    _train(tmp_path, 16)  # another process would find what this one wrote
    assert _kept(tmp_path) == {8, 16} and find(tmp_path, "best").step == 8
    assert open_workdir(tmp_path, "best").step == 8
    _train(tmp_path, 20)
    assert _kept(tmp_path) == {8, 20} or _kept(tmp_path) == {20}  # 8 leaves with the next save
    assert find(tmp_path, "best").step == 20 and len(distances) == 5

    reports = evaluations.read(tmp_path)
    assert {step: report["fd"] for step, report in reports.items()} == DISTANCES
    assert reports[8]["n"] == 12 and reports[8]["floor"] > 0 and reports[8]["nfe"] == 5
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {x["step"]: x["evaluate/fd_pixels"] for x in lines if "evaluate/floor" in x} == DISTANCES
    assert json.loads((tmp_path / "evaluation.json").read_text()) == reports[20]
    assert (tmp_path / "samples.png").is_file()


def test_an_evaluation_that_was_missed_is_made_up(tmp_path, distances):
    _train(tmp_path, 4, "evaluate.features=", "evaluate.every=0 steps")  # saved at 4, not measured
    with pytest.raises(CheckpointError, match="no checkpoint .* was evaluated"):
        find(tmp_path, "best")
    _train(tmp_path, 6)
    assert sorted(evaluations.read(tmp_path)) == [4, 6]


@pytest.mark.slow
def test_samples_are_those_of_the_command_line_on_any_devices():
    """One device or four: the same images, up to rounding of another compiled program; and nothing
    of the batch.
    """
    images = {}
    for devices in (1, 4):
        run = tiny.build("methods=", "evaluate.num=6", devices=devices)
        state = run.plan.local_copy(run.init())
        evaluator = evaluate.Evaluator(run, run.model)
        images[devices] = evaluator.samples(state.ema, state.buffers)
    assert images[1].shape == (6, 8, 8, 1) and images[1].dtype == np.uint8
    assert np.abs(images[1].astype(int) - images[4].astype(int)).max() <= 1
    assert jax.local_device_count() >= 4


def test_only_distances_of_one_protocol_are_compared():
    reports = {1: {"fd": 1.0, "n": 5}, 2: {"fd": 9.0, "n": 50}, 3: {"fd": 8.0, "n": 50}}
    assert (
        evaluations.ranked(reports, [1, 2, 3]) == [3, 2]
        and evaluations.ranked(reports, [1, 2]) == [2]
        and evaluations.ranked({}, [1]) == []
    )


def test_a_sampler_of_other_settings_is_another_measurement():
    """`sample.grid` and others may change on the way; reports of before do not say them."""
    alike = {"features": "fd_x", "solver": "ddim", "steps": 9}
    reports = {
        step: alike | {"fd": fd, "sampler": evaluate._others(tiny.config(*words).sample)}
        for step, fd, *words in (
            (1, 1.0),
            (2, 3.0, "sample.grid=vp", "sample.solver=ddim", "sample.eta=1.0"),
            (3, 4.0, "sample.grid=vp", "sample.solver=ddim", "sample.eta=1.0"),
        )
    }
    assert reports[1]["sampler"] == {} and reports[3]["sampler"] == {"grid": "vp", "eta": 1.0}
    assert evaluations.ranked(reports, [1, 2, 3]) == [2, 3]
    older = reports | {1: alike | {"fd": 1.0}}
    assert evaluations.ranked(older, [1, 2, 3]) == [1, 2, 3]


@pytest.mark.parametrize(
    "setting,message",
    [
        ("evaluate.every=5 apples", "no duration"),
        ("evaluate.keep_best=-1", "evaluate.keep_best"),
        ("evaluate.num=-1", "evaluate.num"),
        ("evaluate.features=inception", "weights file"),
        ("evaluate.features=", "expected '0 steps'"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_compiled(
    tmp_path, setting, message
):
    with pytest.raises(ConfigError, match=message):
        _train(tmp_path, 4, setting)
    assert not (tmp_path / "checkpoints").exists()
