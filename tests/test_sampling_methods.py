"""What holds for every sampling method's file, alone and in pairs; and for one of another package."""

import dataclasses
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax import models
from ogdm_jax.cli import guidance as words
from ogdm_jax.cli import options
from ogdm_jax.cli import sample as command_line
from ogdm_jax.config import ConfigError
from ogdm_jax.diffusion import grids
from ogdm_jax.inverse import operators, tasks
from ogdm_jax.inverse.measured import Measured
from ogdm_jax.methods import dg, discovery
from ogdm_jax.methods.session import Session
from ogdm_jax.sampling import Guidance, sample
from ogdm_jax.sampling.guidance import combine
from tests.support import foreign

pytestmark = pytest.mark.fast

METHODS = discovery.sampling()
SHAPE = (2, 4, 4, 1)
MASK = np.zeros((1, 4, 4, 1), np.float32)
MASK[:, ::2] = 1
LATENTS = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


def ratio(x, sigma, label=None):
    return -jnp.sum((x - 1) ** 2, (1, 2, 3)) / (1 + sigma**2)


def denoise(x, sigma, label=None):
    """Of a Gaussian with variance 1/4 whose mean is the class; no class: mean 0."""
    mean = 0.0 if label is None else 0.3 * jnp.maximum(label, 0)[:, None, None, None]
    return mean + (x - mean) * 0.25 / (0.25 + sigma[:, None, None, None] ** 2)


def weak(x, sigma, label=None):
    return 0.9 * denoise(x, sigma, label)


SESSION = Session(
    model=models.Model(None, None, SHAPE[1:], 3),
    config=types.SimpleNamespace(data=types.SimpleNamespace(label_dropout=0.1)),
    sampling=types.SimpleNamespace(solver="ddim", eta=1.0),
    settings={},
    measured=Measured("inpaint", operators.inpaint(MASK), jnp.ones(SHAPE) * MASK, 0.05),
    open_discriminator=lambda settings: dg.guidance(ratio),
    open_model=lambda *words: types.SimpleNamespace(
        model=types.SimpleNamespace(
            label_dim=3,
            image_shape=SHAPE[1:],
            latents=None,
            denoiser=lambda params, buffers: weak,
        ),
        params={},
        buffers={},
    ),
)
NEEDS = {"autoguidance": {"workdir": "folder"}, "dg": {"discriminator": "folder"}}


def build(name: str) -> Guidance:
    if name == "classifier":  # what it opens is a file: tests/test_classifier.py
        return METHODS[name].guidance(ratio)
    settings = METHODS[name].Settings(**NEEDS.get(name, {}))
    return METHODS[name].build(settings, SESSION)


def images(*guidance: Guidance) -> np.ndarray:
    settings = {"key": jax.random.key(1), "eta": 1.0, "label": jnp.array([1, 2])}
    run = lambda z: sample(
        denoise, z, grids.edm(3, 0.1, 10.0), "ddim", guidance=guidance, **settings
    )
    return np.asarray(jax.jit(run)(LATENTS))


@pytest.mark.parametrize("name", METHODS)
def test_settings_are_declared_with_help_and_limits(name):
    settings = METHODS[name].Settings
    assert dataclasses.is_dataclass(settings) and settings.__dataclass_params__.frozen
    for field in dataclasses.fields(settings):
        assert field.metadata["help"], field.name
        if "float" in str(field.type) and "tuple" not in str(field.type):
            with pytest.raises(ConfigError, match=f"{name}.{field.name}: ") as error:
                settings(**{field.name: float("nan")})
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", METHODS)
def test_options_are_the_settings(name):
    """Every field's default, written as an option, gives the field's default."""
    settings = METHODS[name].Settings
    given, expected = [], {}
    for field in dataclasses.fields(settings):
        if field.default is not None:
            given += [f"--{name}.{field.name}", str(field.default)]
            expected[field.name] = field.default
    args = command_line.parser().parse_args(["--workdir", "x", *given])
    assert options.values(name, settings, options.given(args)) == expected


@pytest.mark.parametrize("name", METHODS)
def test_presets_are_settings_and_words_of_the_command(name):
    for preset in getattr(METHODS[name], "PRESETS", {}).values():
        METHODS[name].Settings(**preset.settings)
        assert set(preset.sampling) <= {"task", "steps", "solver", "eta", "grid", "clip"}
        assert preset.sampling.get("task", "inpaint") in tasks.TASKS


def test_no_two_presets_have_one_name():
    names = [name for module in METHODS.values() for name in getattr(module, "PRESETS", {})]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_alone_guides(name):
    guidance = build(name)
    assert guidance.name == name
    found, plain = images(guidance), images()
    assert np.isfinite(found).all() and np.abs(found - plain).max() > 1e-3


@pytest.mark.parametrize("names", [*itertools.combinations(METHODS, 2)], ids="-".join)
@pytest.mark.default
def test_two_methods_meet_or_are_refused_by_name(names):
    pair = [build(name) for name in names]
    if all(guidance.transition for guidance in pair):
        with pytest.raises(ValueError, match=f"{names[0]} and {names[1]} both bring a transition"):
            combine(pair)
        return
    if all(guidance.outermost < 0 for guidance in pair):
        with pytest.raises(ValueError, match=f"{names[0]} and {names[1]} both bring a comparison"):
            combine(pair)
        return
    orders = [images(*order) for order in (pair, pair[::-1])]
    np.testing.assert_allclose(orders[0], orders[1], atol=1e-5)
    assert np.isfinite(orders[0]).all()


@pytest.fixture
def brighter(tmp_path, monkeypatch):
    foreign.install(tmp_path, monkeypatch)
    yield
    discovery.modules.cache_clear()


def test_a_method_of_another_package_is_one_of_the_command(brighter, capsys):
    read = lambda *argv: words.read(command_line.parser().parse_args(["--workdir", "x", *argv]))
    request = read("--guidance", "brighter", "--brighter.level", "0.9", "--brighter.interval", "2")
    assert request.sampling == {"solver": "ddim", "eta": 1.0}
    module = discovery.sampling()["brighter"]
    bright = images(module.build(request.settings["brighter"], SESSION))
    assert abs(bright.mean() - 0.9) < abs(images().mean() - 0.9)
    with pytest.raises(ConfigError, match="brighter.level: 2.0 given; expected"):
        read("--guidance", "brighter", "--brighter.level", "2")
    with pytest.raises(SystemExit):
        command_line.main(["--help"])
    assert "--brighter.level FLOAT" in capsys.readouterr().out
