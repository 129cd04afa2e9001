"""A training folder of before states had carries: it is sampled and goes on.

tests/fixtures/run_401c2e5/run.tar.gz was written by commit 401c2e5 (digits, OGDM, 3 steps at tiny
sizes); next_step.jsonl has the numbers of the fourth step as that commit's code logged them.
"""

import json
import shutil
import tarfile

import jax
import numpy as np
import pytest

from ogdm_jax.cli import train
from ogdm_jax.training.workdir import open_workdir
from tests.support import tiny

FOLDER = tiny.ROOT / "tests" / "fixtures" / "run_401c2e5"
FLAGS = (
    *("methods=ogdm", "network.model_channels=4", "network.channel_mult=(1,)"),
    *("network.num_blocks=1", "network.attn_resolutions=()", "ogdm.channel_base=16"),
    *("ogdm.channel_max=4", "data.batch=8", "log.every=1 steps", "log.tensorboard=False"),
    *("sample.num=1", "sample.steps=2", "train.save_every=0 steps", "parallel.devices=1"),
    # as it was then: now the rate of the digits falls until the end of the run
    *("evaluate.features=", "optim.decay=800 steps"),
)


@pytest.fixture
def folder(tmp_path):
    """A copy of the folder."""
    # Python 3.11 before .4 (Debian 12's) knows no filters
    known = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    shutil.unpack_archive(FOLDER / "run.tar.gz", tmp_path, **known)
    return tmp_path


def test_it_is_sampled(folder):
    model = open_workdir(folder)
    assert model.step == 3
    images = model.sample(2, steps=2)
    assert images.shape == (2, 8, 8, 1) and len(np.unique(np.asarray(images))) > 10


@pytest.mark.slow
def test_it_goes_on_as_it_would_have_then(folder, capsys):
    """The discriminator and its Adam come out of the old layout: the fourth step has its numbers."""
    flags = [f"--config.{flag}" for flag in (*FLAGS, "train.duration=4 steps")]
    train.main(["--workdir", str(folder), *flags])
    assert "resumed from step 3" in capsys.readouterr().out
    now = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    then = json.loads((FOLDER / "next_step.jsonl").read_text())
    assert now["step"] == then.pop("step") == 4
    for name, value in then.items():
        name = name.replace("ogdm_companion", "ogdm_discriminator")
        if name != "images_per_second":
            np.testing.assert_allclose(now[name], value, rtol=1e-4, atol=1e-7, err_msg=name)


@pytest.mark.slow
def test_a_second_checkpoint_is_of_the_new_layout(folder):
    flags = [f"--config.{flag}" for flag in FLAGS]
    train.main(["--workdir", str(folder), *flags, "--config.train.duration=4 steps"])
    train.main(["--workdir", str(folder), *flags, "--config.train.duration=5 steps"])
    assert open_workdir(folder).step == 5
    assert jax.tree.leaves(open_workdir(folder).params)
