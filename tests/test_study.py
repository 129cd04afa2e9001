"""`ogdm study` end to end: trains, measures and compares; goes on where it stopped."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from ogdm_jax import cli
from ogdm_jax.config import Sample
from ogdm_jax.sampling import generate
from ogdm_jax.study import runs
from ogdm_jax.training import evaluate, loop
from tests.support import tiny

QUICK = tiny.flags(
    *tiny.SMALLEST, "train.duration=2 steps", "train.save_every=1 steps", "methods=", "data.batch=8"
)


def study(out, *words):
    first = ("study", "--config", "slow=digits", "--config", "fast=digits", "--seeds", "0,3")
    sampler = ("--solvers", "euler", "--steps", "1,2", "--num", "60", "--features", "digits")
    more = ("--fast.optim.learning_rate=0.01", *QUICK, *words)
    return cli.main([*first, *sampler, "--out", str(out), *more])


@pytest.mark.slow
def test_trains_measures_compares_and_goes_on(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert study(out, "--dry-run") == 0 and not out.exists()
    said = capsys.readouterr().out
    assert said.count("to train, 2 steps") == 4 and "euler 2 (plain, newest)" in said

    assert study(out) == 0
    found = json.loads((out / "study.json").read_text())
    assert len(found["reports"]) == 2 * 2 * 2 and found["seeds"] == [0, 3]
    assert {report["arm"] for report in found["reports"]} == {"slow", "fast"}
    two, one = found["summary"][1], found["summary"][0]
    assert (one["steps"], two["steps"]) == (1, 2) and one["nfe"] == 1
    values = {r["arm"]: r["fd"] for r in found["reports"] if (r["seed"], r["steps"]) == (3, 2)}
    assert two["differences"]["fast"]["values"][1] == values["fast"] - values["slow"] != 0
    assert "fast - slow" in (out / "study.md").read_text()

    def refuse(*_, **__):
        pytest.fail("done once more")

    monkeypatch.setattr(loop, "train", refuse)
    before = (out / "study.json").read_text()
    monkeypatch.setattr(evaluate, "distance_report", refuse)
    assert study(out) == 0  # nothing is left to do
    assert json.loads((out / "study.json").read_text()) == json.loads(before)
    assert study(out, "--dry-run") == 0 and capsys.readouterr().out.count("seed0: trained") == 2

    monkeypatch.undo()
    assert study(out, "--config.train.duration=3 steps") == 0  # all go on by a step
    longer = json.loads((out / "study.json").read_text())["reports"]
    assert len(longer) == 8 and {report["step"] for report in longer} == {3}
    assert "resumed from step 2" in capsys.readouterr().out


def test_a_solver_that_needs_noise_has_it(tmp_path, capsys):
    """The default eta 0 of the configuration would make dpmpp_2m of it."""
    study(tmp_path, "--solvers", "euler,dpmpp_2m_sde", "--dry-run")
    assert "dpmpp_2m_sde 2 (plain, newest)" in capsys.readouterr().out
    words = {"solver": "dpmpp_2m_sde"}
    assert generate.replaced(Sample(), words).eta == 1
    assert generate.replaced(Sample(), words | {"eta": 0.5}).eta == 0.5
    assert generate.replaced(Sample(solver="ddim", eta=0.5), words).eta == 0.5
    assert generate.replaced(Sample(steps=1), {"solver": "dopri5"}).steps == 2


def test_a_sampler_that_one_model_cannot_have_is_said_before_training(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(loop, "train", lambda *_, **__: pytest.fail("trained"))
    flow = ("precondition.kind=flow", "noise.distribution=flow", "sample.grid=flow")
    with pytest.raises(SystemExit):
        study(tmp_path / "out", "--solvers", "heun", *(f"--fast.{words}" for words in flow))
    assert "config.sample.solver: 'heun' given" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@dataclasses.dataclass(frozen=True)
class Space:
    name: str = "f"
    dim: int = 1
    trained_on: str = ""

    def __call__(self, images):
        raise AssertionError("nothing is measured here")


def test_finished_runs_are_measured_with_the_sampler_that_is_asked_for(tmp_path, monkeypatch):
    """And not with the one that their folder names; nor is a measurement with that one taken for it."""
    used = []
    folder = SimpleNamespace(config=tiny.config(), step=2, model=None, class_names=())
    monkeypatch.setattr(runs, "opened", lambda *_: folder)

    def measured(trained, samplers, *_):
        used.extend(samplers)
        return [{"fd": 1.0}]

    monkeypatch.setattr(runs, "measure_samplers", measured)
    ruler = runs.Ruler(Space(), None, "digits", 8, lambda _: None, lambda _: {})
    results, way = runs.Results(tmp_path), runs.Way("newest", runs.PLAIN, {"steps": 4})
    for grid in ("edm", "vp", "vp"):
        arm = runs.Arm("a", {0: tiny.config(f"sample.grid={grid}")})
        list(runs.measure(arm, tmp_path, 0, [way], ruler, results))
    assert [(s.grid, s.steps) for s in used] == [("edm", 4), ("vp", 4)]
    assert len(runs.Results(tmp_path).reports) == 2

    def is_new(digest):
        space = Space(trained_on=digest)  # others may have its name
        ruled = dataclasses.replace(ruler, space=space)
        return [new for _, new in runs.measure(arm, tmp_path, 0, [way], ruled, results)]

    assert is_new("a") == [False]  # measurements of before do not say it
    results.reports[-1]["protocol"][runs._SPACE] = "a"
    assert is_new("a") + is_new("b") + is_new("b") == [False, True, False]


@pytest.mark.slow_cases("optim*")
@pytest.mark.parametrize("change", ["network.num_blocks=2", "optim.learning_rate=0.5"])
def test_a_folder_of_other_settings_is_refused(tmp_path, capsys, change):
    alone = ("train.duration=1 steps", "data.batch=8", "parallel.devices=1")
    tiny_run = tiny.config("methods=", *tiny.SMALLEST, *alone)
    loop.train(tiny_run, tmp_path / "slow-seed0", log=lambda _: None)
    with pytest.raises(SystemExit):
        study(tmp_path, f"--config.{change}")
    assert "slow-seed0" in capsys.readouterr().err
