"""An exported folder with a model card: what it says, and that it loads back as what it was."""

import jax
import numpy as np
import pytest
import yaml

from ogdm_jax import cli, parallel, records
from ogdm_jax.data import open_source
from ogdm_jax.data.pictures import read
from ogdm_jax.interop import load_pretrained
from ogdm_jax.training import convert, evaluations
from ogdm_jax.training import run as runs
from ogdm_jax.training.workdir import TrainedModel, open_workdir
from tests.support import tiny

REPORT = {"step": 0, "features": "fd_digits", "solver": "euler", "steps": 10, "nfe": 10, "n": 898}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(training folder of a conditional model, exported folder)."""
    top = tmp_path_factory.mktemp("card")
    own = "data.source=folder:mine", "data.resolution=8", "data.conditional=true"
    config = tiny.config("methods=()", *tiny.SMALLEST, *own)
    run = runs.build(config, open_source("digits"), parallel.make_plan("pmap", 1))
    names = ["zero", *map(str, range(1, 10))]
    about = {"images": 1797, "contents": "0123456789abcdef", "class_names": names}
    tiny.folder(top / "run", run, about)
    evaluations.write(top / "run", {0: REPORT | {"fd": 7.5, "floor": 2.9}})
    more = [REPORT | {"steps": 5, "nfe": 5, "fd": 40.0, "floor": 2.9}, REPORT | {"step": 9}]
    (top / "run" / "distances.json").write_text(records.dumps(more))
    assert cli.main(["export", str(top / "run"), "--out", str(top / "hub" / "mine"), "--card"]) == 0
    return top / "run", top / "hub" / "mine"


def test_it_loads_back_as_it_was(folders):
    workdir, folder = folders
    run, back = open_workdir(workdir), load_pretrained(folder)
    own = {"source": "folder:mine", "data_dir": "", "resolution": 8, "channels": 0}
    assert back.images == own  # not the set of others that is known to have this size
    assert convert.data_of(back) == {f"data.{name}": value for name, value in own.items()}
    x = np.asarray(jax.random.normal(jax.random.key(0), (3, 8, 8, 1)))
    sigma, label = np.float32([0.1, 1, 9]), np.int32([1, 0, 7])
    assert back.precondition == "edm" and back.sigma_data == run.config.precondition.sigma_data
    np.testing.assert_allclose(
        jax.jit(back.denoiser())(x, sigma, label), jax.jit(run.denoiser)(x, sigma, label), atol=1e-6
    )


def test_the_card_says_what_people_ask(folders):
    _, folder = folders
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    said = yaml.safe_load(front)
    assert said["license"] == "unknown" and "nobody has said one" in body
    assert said["library_name"] == "ogdm_jax" and "diffusion" in said["tags"]
    assert "class-conditional diffusion model of 8x8x1" in body and "zero, 1, 2" in body
    assert "contents: 0123456789abcdef" in body and "data.conditional=True" in body
    rows = [line for line in body.splitlines() if line.startswith("| fd_digits")]
    assert [row.split(" | ")[3:] for row in rows] == [
        ["5", "898", "40", "2.9 |"],
        ["10", "898", "7.5", "2.9 |"],
    ]
    assert read(folder / "samples.png").shape == (4 * (64 + 18) + 3, 8 * 65 - 1, 1)


def test_distances_are_those_of_the_weights(folders, monkeypatch, tmp_path):
    """Those that are measured are of the moving average."""
    drawn = np.zeros((32, 8, 8, 1), np.float32)
    monkeypatch.setattr(TrainedModel, "batches", lambda *_, **__: iter([drawn]))
    words = ["--out", str(tmp_path / "raw"), "--card", "--weights", "params"]
    assert cli.main(["export", str(folders[0]), *words]) == 0
    body = (tmp_path / "raw" / "README.md").read_text()
    assert "No distance of these weights was measured" in body and "fd_digits" not in body


@pytest.mark.slow  # half a minute of compilation
def test_its_snippet_runs(folders, monkeypatch):
    _, folder = folders
    monkeypatch.chdir(folder.parent)
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    for long, short in (("(16,", "(2,"), ("zeros(16", "zeros(2"), ("edm(18)", "edm(2)")):
        code = code.replace(long, short)
    exec(compile(code, "card", "exec"), {})
