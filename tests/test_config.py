"""Configurations: every file builds, every wrong setting is one sentence."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from ogdm_jax import config as configs
from ogdm_jax import data, parallel
from ogdm_jax.methods import discovery
from ogdm_jax.training import run as runs
from tests.support import tiny

NAMES = tiny.CONFIGURATIONS


@pytest.mark.fast
@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_loads_and_survives_json(name):
    config = configs.load(tiny.ROOT / "configs" / f"{name}.py")
    discovery.check_settings(config)
    again = configs.from_json(configs.to_json(config))
    json.loads(configs.to_json(config), parse_constant=pytest.fail)  # Infinity and NaN are no JSON
    assert configs.flatten(again) == configs.flatten(config)
    assert configs.to_json(again) == configs.to_json(config)


# Discriminators of DG are built from a prior: test_dg_training.py; autoencoders: test_autoencoder.py.
# networks and methods that another one of the same kind has, or that other tests train; all are loaded above
@pytest.mark.slow_cases(
    "celeba64_ogdm",
    "emoji32",
    "digits",
    "digits_sp",
    "digits_stf",
    "cifar10_flow",
    "imagenet256_dit_s*",
    "lsun256_adm",
    "imagenet256_adm",
    "cifar10_adm_ogdm",
    "celeba64_adm",
    "cifar10_sp",
    "cifar10_sp_paper",
    "cifar10_ogdm*",
    "ffhq64_edm",
    "mnist_edm",
    "cifar10_edm",
    "cifar10_stf",
    "cifar10_stf_v*",
)
@pytest.mark.parametrize("name", [n for n in NAMES if not n.endswith(("_dg", "_vae"))])
def test_every_configuration_builds_and_its_step_traces(name, monkeypatch):
    """A shrunk network on random images of the right size; the step is traced in full, only not
    compiled.
    """
    side = 64 if "64" in name else 8 if "digits" in name else 32
    shrink = [
        "data.batch=8",
        "network.model_channels=32",
        "network.num_blocks=1",
        "parallel.plan=mesh",
        "network.text_layers=1",
    ]
    references = "stf.per_image=2" if name == "cifar10_stf_paper" else "stf.n=16"
    shrink += ["ogdm.channel_max=8", references, "network.head_channels=0"]
    levels = "(1.0,2.0)" if "sd21" in name else "(1,2)"
    shrink += [] if "dit" in name else [f"network.channel_mult={levels}"]
    config = configs.load(tiny.ROOT / "configs" / f"{name}.py", shrink)
    channels = 1 if side == 8 else 4 if "dit" in name or "sd21" in name else 3
    empty = np.zeros(77, np.int32) if "sd21" in name else None
    labels = np.zeros((16, 77) if "sd21" in name else 16, np.int32)
    pictures = np.zeros((16, side, side, channels), np.uint8)
    source = data.Source(
        name=name,
        shape=pictures.shape[1:],
        num_classes=10,
        images=pictures,
        labels=labels,
        empty=empty,
    )
    fresh = types.SimpleNamespace(step=0)  # SP's teacher: fresh weights do
    monkeypatch.setattr("ogdm_jax.training.checkpoint.find", lambda *_: fresh)
    monkeypatch.setattr(
        "ogdm_jax.training.checkpoint.load_weights",
        lambda snapshot, *shapes: jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes[:2]),
    )
    run = runs.build(config, source, parallel.make_plan("mesh", 1))
    state = jax.eval_shape(run.create, run.key)
    batch = {
        "image": pictures[:8],
        "label": labels[:8],
        "index": np.arange(8, dtype=np.int32),
    }
    if empty is not None:
        batch["empty"] = labels[:8]
    if run.methods.mates:
        batch["mates"] = np.zeros((8, run.methods.mates, *source.shape), np.uint8)
    constants = run.methods.constants()
    after, metrics = jax.eval_shape(run.step, state, constants, batch, run.key)
    assert jax.tree.structure(after) == jax.tree.structure(state) and metrics["loss"].shape == ()


@pytest.mark.fast
@pytest.mark.parametrize(
    "text,words",
    [
        ("optim.learnig_rate=1", "unknown key 'learnig_rate'"),
        ("nothing.at.all=1", "unknown key 'nothing'"),
        ("data.batch=many", "expected int"),
        ("data.batch=1.5", "expected int"),
        ("optim.learning_rate=fast", "expected float"),
        ("data.xflip=perhaps", "expected true or false"),
        ("optim=3", "group of settings"),
        ("data.batch", "no value given"),
        ("network.channel_mult=('a','b')", "entries of another type"),
    ],
)
def test_wrong_overrides_are_one_sentence(text, words):
    with pytest.raises(configs.ConfigError, match=words) as error:
        tiny.config(text)
    assert "\n" not in str(error.value)


@pytest.mark.fast
def test_overrides_keep_types():
    config = tiny.config(
        "optim.learning_rate=1", "network.channel_mult=1,2,2", "methods=", "data.source=npz:a=b.npz"
    )
    assert config.optim.learning_rate == 1.0 and isinstance(config.optim.learning_rate, float)
    assert config.network.channel_mult == (1, 2, 2)
    assert config.methods == ()
    assert config.data.source == "npz:a=b.npz"
    assert tiny.config("sp.sigma_max=inf").others["sp"]["sigma_max"] == float("inf")


@pytest.mark.fast
@pytest.mark.parametrize(
    "text,steps",
    [
        ("10 steps", 10),
        ("640 images", 10),
        ("1 kimg", 16),
        ("1.28 kimg", 20),
        ("7", 7),
        ("0 Mimg", 0),
    ],
)
def test_durations(text, steps):
    assert configs.duration(text, 64) == steps


@pytest.mark.fast
def test_a_duration_is_of_the_digits_that_were_written():
    """As a float, 4.03 kimg are 4030.0000000000005 images, and 8.06 kimg no multiple of 10."""
    assert configs.duration("4.03 kimg", 1) == 4030 and configs.duration("8.06 kimg", 10) == 806


@pytest.mark.fast
@pytest.mark.parametrize("text", ["ten steps", "10 parsecs", "-1 steps", "nan kimg"])
def test_wrong_durations(text):
    with pytest.raises(configs.ConfigError, match="train.duration.*no duration"):
        configs.duration(text, 64, "train.duration")


@pytest.mark.fast
@pytest.mark.parametrize(
    "text,field",
    [
        ("methods=ogdn", "methods"),
        ("network.kind=resnet", "network.kind"),
        ("network.channel_mult=(1,2,2,2,2)", "network.channel_mult"),
        ("precondition.kind=none", "precondition.kind"),
        ("precondition.sigma_data=0", "precondition.sigma_data"),
        ("noise.distribution=flat", "noise.distribution"),
        ("optim.learning_rate=0", "optim.learning_rate"),
        ("optim.betas=(0.9,1.0)", "optim.betas"),
        ("data.label_dropout=2", "data.label_dropout"),
        ("network.dropout=1.0", "network.dropout: 1.0 given; expected a probability below 1"),
        ("network.num_blocks=0", "network.num_blocks: 0 given"),
        ("network.model_channels=0", "network.model_channels: 0 given"),
        ("optim.eps=-1e-8", "optim.eps"),
        ("optim.weight_decay=-0.1", "optim.weight_decay"),
        ("ema.rampup=-1.0", "ema.rampup"),
        ("seed=-1", "seed: -1 given"),
        ("train.duration=soon", "train.duration"),
        ("parallel.plan=magic", "parallel.plan"),
        ("parallel.devices=99", "parallel.devices"),
        ("data.batch=0", "data.batch"),
        ("network.dtype=int8", "network.dtype"),
    ],
)
def test_settings_out_of_range_are_refused_before_compiling(text, field):
    with pytest.raises(ValueError, match=field) as error:
        config = tiny.config(text)
        plan = parallel.make_plan(config.parallel.plan, config.parallel.devices)
        runs.build(config, data.open_source("digits"), plan)
    assert "\n" not in str(error.value)


@pytest.mark.fast
def test_locked(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("x = 1\n")
    with pytest.raises(configs.ConfigError, match="get_config"):
        configs.load(file)
    with pytest.raises(configs.ConfigError, match="is no file"):
        configs.load(tmp_path / "none.py")
    base = (
        "from ogdm_jax.configs import base\n\ndef get_config():\n    config = base.get_config()\n"
    )
    file.write_text(base + "    config.optim.learning_rate = float('nan')\n    return config\n")
    with pytest.raises(
        configs.ConfigError, match="config.optim.learning_rate: nan given; expected a number"
    ):
        configs.load(file)
    misspelled = "    config.ogdm.gama = 3.0\n    return config\n"
    file.write_text(base + misspelled)
    with pytest.raises(configs.ConfigError, match="gama.*gamma") as error:
        configs.load(file)
    assert "\n" not in str(error.value)
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny.config().data.batch = 1
