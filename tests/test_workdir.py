"""A trained model as people use it: its text, its denoiser, its samples."""

import jax
import numpy as np
import pytest

from ogdm_jax import models
from ogdm_jax.config import ConfigError
from ogdm_jax.training.workdir import TrainedModel
from tests.support import tiny

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def trained() -> TrainedModel:
    config = tiny.config("methods=", "sample.solver=euler", "sample.steps=2")
    model = models.build(config, (8, 8, 1), 10)
    params, buffers = jax.jit(model.init)(jax.random.key(0))
    return TrainedModel(config, model, params, buffers, 1200)


def test_it_is_told_in_one_short_line(trained):
    count = f"{models.parameter_count(trained.params):,}"
    assert repr(trained) == f"TrainedModel(digits, 8x8x1, {count} parameters, step 1,200)"


def test_samples_depend_on_their_seed_alone(trained):
    images = trained.sample(5, batch=1)
    assert images.shape == (5, 8, 8, 1) and images.dtype == np.float32
    again = trained.sample(seeds=[4, 2], batch=1, devices=jax.local_devices()[:1])
    np.testing.assert_allclose(again, images[[4, 2]], atol=1e-5)
    assert np.abs(trained.sample(2, steps=3, batch=1) - images[:2]).max() > 1e-4


def test_the_denoiser_holds_the_weights(trained):
    x = np.zeros((2, 8, 8, 1), np.float32)
    assert trained.denoiser(x, np.ones(2, np.float32)).shape == x.shape


@pytest.mark.parametrize(
    "words,message",
    [
        ({"n": 0}, "n: 0 given; expected at least 1 image"),
        ({"label": 3}, "--label: 3 given, but the model is unconditional"),
        ({"solver": "magic"}, "sample.solver: unknown 'magic'; expected one of euler, heun"),
        ({"stepz": 3}, "no setting 'stepz'; expected some of solver, steps"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(trained, words, message):
    with pytest.raises(ConfigError, match=message):
        trained.sample(**words)
