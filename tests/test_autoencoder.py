"""Training an autoencoder: its loss, the loop, and the folder that it leaves."""

import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ogdm_jax import config as configs
from ogdm_jax import data, parallel
from ogdm_jax.interop import load_pretrained
from ogdm_jax.networks import vae
from ogdm_jax.pixels import to_float
from ogdm_jax.planning import program
from ogdm_jax.training import autoencoder, loop
from tests.support import commands, tiny

SMALL = (
    "data.source=digits/train",
    "data.heldout=digits/test",
    "data.batch=16",
    "network.model_channels=8",
    "network.channel_mult=(1,)",
    "vae.groups=4",
    "optim.decay=0 steps",
    "train.save_every=2 steps",
    "log.every=1 steps",
    "parallel.devices=2",
    "log.tensorboard=false",
    "sample.every=0 steps",
    "sample.num=20",
    "evaluate.num=100",
    "evaluate.heldout=50",
)


def config(*more: str):
    return configs.load(tiny.ROOT / "configs" / "digits_vae.py", (*SMALL, *more))


class Flat:
    """An autoencoder whose posterior is one Gaussian and whose images are grey: z spread out."""

    mean, log_variance = 0.5, -1.0

    def apply(self, variables, x, method):
        if method == "decode":
            return x
        return jnp.concatenate(
            [jnp.full_like(x, self.mean), jnp.full_like(x, self.log_variance)], 3
        )


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_loss_of_a_known_posterior(kind):
    """z ~ N(1/2, e^-1) whatever the image: E|z - x| and E(z - x)^2 are those of a Gaussian."""
    settings = config(f"vae.loss={kind}", "vae.kl=0.25")
    image = np.full((512, 8, 8, 1), 204, np.uint8)  # x = 0.6
    batch = {"image": image, "index": np.arange(512)}
    network: Any = Flat()
    state: Any = None
    key = jax.random.key(3)
    loss, sums = autoencoder.training_loss(settings, network)({}, state, {}, batch, key)
    far, var = Flat.mean - 0.6, np.exp(-1.0)
    tail = jax.scipy.stats.norm.cdf(-far / np.sqrt(var))
    folded = np.sqrt(2 * var / np.pi) * np.exp(-(far**2) / (2 * var)) + far * (1 - 2 * tail)
    pixel = folded if kind == "l1" else var + far**2
    kl = 64 * (Flat.mean**2 + var - 1 + 1.0) / 2
    value, count = sums[f"loss/{kind}"]
    np.testing.assert_allclose(value / count, pixel, rtol=0.02)
    np.testing.assert_allclose(sums["kl"][0] / 512, kl, rtol=1e-5)
    np.testing.assert_allclose(loss, 64 * value / count + 0.25 * kl, rtol=1e-5)


@pytest.mark.slow_cases("emoji_vae")
@pytest.mark.fast
@pytest.mark.parametrize("name", ["digits_vae", "emoji_vae"])
def test_the_step_of_a_shipped_configuration_traces(name):
    settings = configs.load(tiny.ROOT / "configs" / f"{name}.py", ("data.batch=8",))
    run = program.build(settings, program.source_like(settings), parallel.make_plan("mesh", 1))
    state, metrics = jax.eval_shape(run.step, *run.shapes())
    assert state.step.shape == () and {"loss", "loss/l1", "kl"} <= metrics.keys()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, state) of four steps without a pause."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, loop.train(config("train.duration=4 steps"), folder, print, autoencoder.TASK)[1]


def test_a_resumed_run_is_the_uninterrupted_one(trained, tmp_path):
    folder, lines = tmp_path / "again", []
    shutil.copytree(trained[0], folder)
    shutil.rmtree(folder / "vae")
    again = config("train.duration=4 steps", "init.step=2", "evaluate.features=", "data.heldout=")
    _, state = loop.train(again, folder, lines.append, autoencoder.TASK)
    assert "resumed from step 2" in "\n".join(lines)
    tiny.assert_trees(state, trained[1])
    weights = [load_pretrained(f / "vae").variables for f in (folder, trained[0])]
    tiny.assert_trees(*weights)


def test_the_folder_holds_the_average_and_a_measured_scale(trained):
    found = load_pretrained(trained[0] / "vae")
    network: Any = found.network
    assert (found.kind, network.groups, network.img_channels) == ("autoencoder", 4, 1)
    jax.tree.map(np.testing.assert_array_equal, found.variables["params"], trained[1].ema)
    images = to_float(data.open_source("digits/train").take(np.arange(1500))["image"])
    moments = network.apply(found.variables, images, method="encode")
    mean, std = vae.posterior(moments)
    z = network.to_scaled(mean + std * jax.random.normal(jax.random.key(0), mean.shape))
    np.testing.assert_allclose(np.std(z), 1, rtol=0.02)


def test_what_a_run_writes(trained):
    folder = trained[0]
    sheet = np.asarray(Image.open(folder / "samples" / "00000004.png"))
    assert sheet.shape == (4 * 65 - 1, 8 * 65 - 1)  # 16 of 20 images in two rows, and theirs below
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {name: value for line in lines for name, value in line.items()}
    assert 0 < found["heldout/psnr"] < 40 and 0 < found["train/psnr"] < 40
    report = json.loads((folder / "evaluation.json").read_text())
    assert report["solver"] == "reconstructions" and report["fd"] > 0


@pytest.mark.slow
def test_the_documented_chain(tmp_path):
    """docs/latents.md, with few steps: train, encode, train on the latents, sample, measure."""

    def run(*words: str) -> str:
        done = commands.ogdm(tmp_path, *words)
        assert done.returncode == 0, (words, done.stdout[-500:], done.stderr[-500:])
        return done.stdout

    configurations = tiny.ROOT / "configs"
    few = ("--config.train.duration=3 steps", "--config.sample.num=4", "--config.data.batch=16")
    run(
        "train", "--config", f"{configurations}/digits_vae.py", "--workdir", "runs/digits_vae", *few
    )
    run("data", "encode", "digits", "--vae", "runs/digits_vae", "--out", "runs/digits_latents")
    about = run("data", "describe", "latents:runs/digits_latents")
    assert "size        4 x 4, 2 channel(s)" in about
    few += ("--config.optim.decay=0 steps", "--config.evaluate.num=20", "--config.sample.steps=2")
    words = ["--config", f"{configurations}/digits_latent.py", "--workdir", "runs/digits_latent"]
    run("train", *words, *few)
    sheet = np.asarray(Image.open(tmp_path / "runs/digits_latent/samples/00000003.png"))
    assert sheet.shape == (2 * 65 - 1, 2 * 65 - 1)  # decoded: 8 pixels, not the latents' 4
    run("sample", "--workdir", "runs/digits_latent", "--num", "4", "--out", "samples.npz")
    assert commands.arrays(tmp_path / "samples.npz")["images"].shape == (4, 8, 8, 1)
    report = json.loads((tmp_path / "runs/digits_latent/evaluation.json").read_text())
    assert report["features"] == "fd_digits" and np.isfinite(report["fd"])
