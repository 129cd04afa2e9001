"""A tracker gets the numbers of a run, goes on with the same run, and cannot end the training."""

import json
import sys
import types

import numpy as np
import pytest
from etils import epath

from ogdm_jax.config import ConfigError
from ogdm_jax.training import logs, loop, trackers
from tests.support import tiny

pytestmark = pytest.mark.fast


@pytest.fixture
def fake(monkeypatch):
    """Modules in place of wandb and trackio; (name, function, words) of every call."""
    calls = []
    for name in ("wandb", "trackio"):
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace(name=name)
        for function in ("init", "log", "finish"):
            said = lambda *args, _f=function, _n=name, **words: calls.append((_n, _f, args, words))
            setattr(module, function, said)
        module.Image = lambda array: ("picture", array.shape)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_is_the_same_run(fake, tmp_path, name):
    config, folder = tiny.config(f"log.tracker={name}", "log.project=mine"), epath.Path(tmp_path)
    for step in (1, 2):
        tracker = trackers.Tracker(config, folder)
        with logs.Writer(folder, tensorboard=False, lead=True, tracker=tracker) as writer:
            writer.write(step, {"loss": 0.5})
            writer.image(step, "samples", np.zeros((4, 6, 1), np.uint8))
    assert {owner for owner, *_ in fake} == {name}
    functions = [function for _, function, *_ in fake]
    assert functions == ["init", "log", "log", "finish"] * 2
    first, second = (words for _, function, _, words in fake if function == "init")
    assert first == second and first["project"] == "mine" and first["resume"] == "allow"
    known = json.loads((tmp_path / "tracker.json").read_text())
    assert known["id"] in first["id" if name == "wandb" else "name"]
    assert first["config"]["data.batch"] == 32
    assert fake[1][2:] == (({"loss": 0.5},), {"step": 1})
    assert fake[2][2] == ({"samples": ("picture", (4, 6))},)


def test_another_project_is_another_run(fake, tmp_path):
    ids = []
    for project in ("one", "two"):
        config = tiny.config("log.tracker=wandb", f"log.project={project}")
        trackers.Tracker(config, epath.Path(tmp_path))
        ids.append(fake[-1][3]["id"])
    assert ids[0] != ids[1]


def test_one_that_fails_is_left_alone(fake, tmp_path, monkeypatch, caplog):
    tracker = trackers.Tracker(tiny.config("log.tracker=wandb"), epath.Path(tmp_path))

    def fails(*_, **__):
        raise ConnectionError("no network\nhere")

    monkeypatch.setattr(sys.modules["wandb"], "log", fails)
    for step in range(3):
        tracker.write(step, {"loss": 1.0})
    tracker.close()
    assert caplog.text.count("wandb failed") == 1 and "no network here" in caplog.text
    assert fake[-1][1] == "init"


def test_one_that_is_not_installed_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"log\.tracker.*'trackio'.*pip install trackio"):
        loop.train(tiny.config("log.tracker=trackio"), tmp_path / "run", log=lambda _: None)
    assert not (tmp_path / "run").exists()
