"""ogdm export: what is written reads back as what it was, and replaces nothing of others."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from ogdm_jax import cli, models, places
from ogdm_jax.config import Precondition
from ogdm_jax.config import replace as replaced
from ogdm_jax.interop import diffusers, export, load_pretrained, stable_diffusion
from ogdm_jax.interop.settings import PROCESS
from ogdm_jax.training import checkpoint, convert
from ogdm_jax.training.workdir import open_workdir
from tests.support import networks, tiny

DIT = ("network.kind=dit", "network.num_heads=2", "data.conditional=true", "network.dropout=0")


def folder(path, *more):
    """A training folder that has not begun."""
    config = tiny.config("methods=()", "data.augment=0", tiny.ONE_LEVEL, *more)
    model = models.build(config, (8, 8, 1), 10)
    params, buffers = networks.born(jax.eval_shape(model.init, jax.random.key(0)))
    about = checkpoint.describe(config, (8, 8, 1), 10)
    convert.write_folder(path, config, {"params": params, "buffers": buffers}, about)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("dit") / "run", *DIT)


ADM = ("precondition.kind=adm", "noise.distribution=ddpm", "precondition.interpolate=true")
ADM += ("precondition.diffusion_steps=500", "precondition.rescale_timesteps=true")
V = ("precondition.kind=v", "noise.distribution=v", "precondition.interpolate=true")
V += ("precondition.zero_terminal=true", "precondition.schedule=cosine")
V += ("sample.grid=trailing", "sample.solver=euler")
VE = ("precondition.kind=ve", "noise.distribution=ve", "precondition.sigma_max=60")


@pytest.mark.parametrize(
    "settings,out",
    [
        (ADM, "net.safetensors"),
        (V, "net.pt"),
        (VE, "net.safetensors"),
        (("precondition.sigma_data=0.3", *DIT), "net"),
        ((*ADM, *DIT), "net"),
    ],
    ids=["adm", "v", "ve", "dit", "dit-adm"],
)
def test_what_is_exported_reads_back_as_it_was(settings, out, tmp_path):
    run = open_workdir(folder(tmp_path / "run", *settings))
    assert not cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / out)])
    found = load_pretrained(tmp_path / out)
    assert all(map(np.array_equal, *map(jax.tree.leaves, (found.variables["params"], run.params))))
    read = convert.settings_of(found, run.config)
    process = {name: value for name, value in read.items() if name.startswith("precondition.")}
    assert replaced(tiny.config(), process).precondition == run.config.precondition
    assert read["network.kind"] == run.config.network.kind


def test_every_setting_of_a_process_is_exported():
    """Or it stands in the file by another name: the variance in the number of channels."""
    apart = {"kind", "sigma_data", "schedule", "learned_variance"}
    assert set(PROCESS) | apart == {field.name for field in dataclasses.fields(Precondition)}


@pytest.mark.parametrize(
    "theirs,out",
    [
        ("hub/README.md", ("hub", "--card")),
        ("hub/config.json", ("hub", "--card")),
        ("net.json", ("net.safetensors",)),
        ("net.pt", ("net.pt",)),
        ("dit/config.json", ("dit",)),
        ("run/checkpoints/0/README.md", ("run", "--card")),
        ("run/checkpoints/0/README.md", ("run",)),
    ],
)
def test_files_of_others_are_not_replaced(theirs, out, plain, tmp_path, capsys):
    path = tmp_path / theirs
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"mine": 1}')
    there = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit):
        cli.main(["export", str(plain), "--out", str(tmp_path / out[0]), *out[1:]])
    said = capsys.readouterr().err
    assert "--out: " in said and ("is there already" in said or "is a training folder" in said)
    assert sorted(tmp_path.rglob("*")) == there and path.read_text() == '{"mine": 1}'


def test_json_of_another_program_beside_weights_is_not_ours(tmp_path):
    """Programs of others write NAME.json beside NAME.safetensors; one that began as ours is refused."""
    (tmp_path / "net.safetensors").touch()
    (tmp_path / "net.json").write_text('{"description": "", "sd version": "SD2"}')
    assert export.read_about(tmp_path / "net.safetensors") is None
    (tmp_path / "net.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="is not what export writes"):
        export.read_about(tmp_path / "net.safetensors")


@pytest.mark.parametrize("run,out", [("plain", "net.pt"), ("dit", "net")])
def test_an_earlier_export_is_replaced(run, out, tmp_path, request):
    line = ["export", str(request.getfixturevalue(run)), "--out", str(tmp_path / out)]
    assert not cli.main(line)
    assert not cli.main(line)


def test_a_pipeline_is_replaced_only_where_export_wrote_it(tmp_path):
    place = places.place(tmp_path)
    free = lambda: export.check_free(stable_diffusion.written(place), place / "model_index.json")
    free()
    (tmp_path / "unet").mkdir()
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30.0"}
    for content in ("{", json.dumps(index)):
        (tmp_path / "model_index.json").write_text(content)
        with pytest.raises(ValueError, match="model_index.json' is there already, and no export"):
            free()
    (tmp_path / "model_index.json").write_text(json.dumps(index | {diffusers.MARK: 1}))
    free()
