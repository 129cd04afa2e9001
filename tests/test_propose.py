"""Own images: what is proposed for a set, and `ogdm new` from a folder to samples."""

import json

import numpy as np
import pytest
from PIL import Image

from ogdm_jax import config as configs
from ogdm_jax.data import propose
from ogdm_jax.data.base import from_arrays
from ogdm_jax.data.describe import describe
from tests.support import commands

GPUS = propose.Devices(8, True, 16 << 30)
TINY = (
    "network.model_channels=8",
    "network.channel_mult=(1,)",
    "network.attn_resolutions=(4,)",
    "data.augment=0",
    "data.batch=8",
    "train.duration=3 steps",
    "optim.ramp=1 steps",
    "parallel.devices=1",
    "log.tensorboard=false",
    "sample.steps=2",
    "sample.every=0 steps",
    "sample.solver=euler",
    "sample.num=4",
)


def images(n: int, side: int) -> np.ndarray:
    """Pictures of 4 x 4 coloured squares."""
    blocks = np.random.default_rng(side).integers(0, 256, (n, 4, 4, 3), np.uint8)
    return np.repeat(np.repeat(blocks, -(-side // 4), 1), -(-side // 4), 2)[:, :side, :side]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """60 small pictures of unequal sizes, two classes."""
    root = tmp_path_factory.mktemp("own")
    for name in ("cat", "dog"):
        (root / "pictures" / name).mkdir(parents=True)
        for i in range(30):
            picture = Image.fromarray(images(1, 18 + i % 7)[0])
            picture.save(root / "pictures" / name / f"{i}.png")
    return root


@pytest.mark.parametrize("side", [8, 12, 16, 20, 28, 30, 31, 32, 48, 64, 100])
@pytest.mark.parametrize("devices", [propose.Devices(), GPUS, propose.Devices(6, True)])
def test_a_proposal_is_a_configuration_whose_levels_are_whole(side, devices):
    source = from_arrays("npz:a", images(40, side))
    found = {
        k: v
        for k, (v, _) in propose.settings(source, describe(source), "as stored", devices).items()
    }
    config = configs.replace(configs.Config(), found)
    levels = len(config.network.channel_mult)
    assert side % 2 ** (levels - 1) == 0
    assert config.network.attn_resolutions[0] in [side >> level for level in range(levels)]
    assert config.data.batch % devices.count == 0 and config.data.batch <= 40
    assert not config.data.conditional  # no labels
    edges = (config.optim.ramp, config.train.save_every, config.train.duration)
    steps = [config.steps(text) for text in edges]
    assert steps == sorted(steps) and steps[0] > 0


def test_a_large_set_on_accelerators_has_edms_network_and_a_batch_that_fits():
    source = from_arrays("npz:a", np.zeros((12_000, 32, 32, 3), np.uint8))
    found = {
        k: v for k, (v, _) in propose.settings(source, describe(source), "as stored", GPUS).items()
    }
    assert found["network.model_channels"] == 128 and found["network.channel_mult"] == (2, 2, 2)
    assert found["network.attn_resolutions"] == (16,)
    assert (found["data.batch"], found["train.duration"]) == (512, "48000 kimg")
    # docs/plans.md: 64 images of this network take 1.89 GiB in bfloat16, about twice that in float32
    little = propose.Devices(8, True, 4 << 30)
    assert propose.settings(source, describe(source), "", little)["data.batch"][0] == 8 * 32


def test_describe_proposes_a_side_for_pictures_of_unequal_sizes(pictures):
    done = commands.ogdm(pictures, "data", "describe", "folder:pictures", "--json")
    facts = json.loads(done.stdout)
    assert facts["proposed"]["data.resolution"] == facts["width"] == 16  # of sides from 18 to 24
    assert facts["proposed"]["precondition.sigma_data"] == round(facts["sigma_data"], 2)
    text = commands.ogdm(pictures, "data", "describe", "folder:pictures").stdout
    assert "sides are 18 to 24" in text and "`ogdm new`" in text


@pytest.mark.slow
def test_from_a_folder_to_samples_in_three_commands(pictures):
    new = ("new", "--data", "pictures", "--out", "configs/mine.py")
    done = commands.ogdm(pictures, *new)
    assert done.returncode == 0, done.stderr
    assert "--image-shape 16,16,3 --classes 2 --images 60" in done.stdout  # of ogdm plan
    printed = "ogdm train --config configs/mine.py\nogdm sample --workdir runs/mine --out mine.png"
    assert printed in done.stdout  # which run in any folder
    text = (pictures / "configs" / "mine.py").read_text()
    assert max(map(len, text.splitlines())) <= 100
    again = commands.ogdm(pictures, *new)
    assert again.returncode == 1 and "is there already; expected a new FILE.py" in again.stderr
    assert (pictures / "configs" / "mine.py").read_text() == text
    config = configs.load(pictures / "configs" / "mine.py")
    assert config.data.conditional and config.data.resolution == 16

    words = [f"--config.{text}" for text in TINY]
    done = commands.ogdm(pictures, "train", "--config", "configs/mine.py", *words)
    assert done.returncode == 0 and "2 classes (cat, dog)" in done.stdout, done.stderr
    sample = ("--workdir", "runs/mine", "--num", "4", "--label", "dog", "--out", "mine.png")
    done = commands.ogdm(pictures, "sample", *sample)
    assert done.returncode == 0, done.stderr
    assert min(commands.picture_size(pictures / "mine.png")) >= 16


@pytest.mark.fast
def test_names_of_classes_and_folders_are_never_code(tmp_path):
    """A class named so in a stranger's archive was run by `ogdm train`."""
    names = ["a\n    raise SystemExit('ran')#", 'b"""']
    found = {
        "data.source": ('zip:us\\user""".zip', "2 images"),
        "data.conditional": (True, f"2 classes: {', '.join(names)}"),
    }
    file = tmp_path / "mine.py"
    file.write_text(propose.as_file(found, 'out\\user"""\nraise SystemExit'))
    config = configs.load(file, ())
    assert config.data.conditional and config.data.source == found["data.source"][0]
