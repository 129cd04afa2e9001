"""Sampling grids by the configuration's words."""

import dataclasses
import json
import types

import numpy as np
import pytest

from ogdm_jax import config as configs
from ogdm_jax import models
from ogdm_jax.config import ConfigError, Sample, groups
from ogdm_jax.diffusion import grids
from ogdm_jax.sampling import generate
from ogdm_jax.sampling.sampler import SOLVERS
from ogdm_jax.training.workdir import TrainedModel
from tests.support import tiny

pytestmark = pytest.mark.fast

ADM = ("network.kind=openai", "network.model_channels=32", "precondition.kind=adm")


@pytest.fixture(scope="module", params=["edm", "adm"])
def model(request):
    return models.build(tiny.config(*(ADM if request.param == "adm" else ())), (8, 8, 1), 0)


def _settings(grid: str | None, steps: int = 20) -> Sample:
    said = {} if grid is None else {"grid": grid}
    return Sample(steps=steps, **said)


def test_every_grid(model):
    low, high = (0.002, 80.0) if model.table is None else (float(model.table.sigma[0]), 80.0)
    expected = {
        None: grids.edm(20, low, high),  # folders from before the setting
        "edm": grids.edm(20, low, high),
        "vp": grids.vp(20, low, high),
        "ve": grids.ve(20, low, high),
        "iddpm": grids.iddpm(20, low, high),
    }
    if model.table is not None:  # exact to the steps, whatever config.sample.sigma_max
        expected |= {
            "respaced": grids.respaced("20"),
            "ddim": grids.ddim(20),
            "quad": grids.ddim(20, spacing="quad"),
            "trailing": grids.ddim(20, spacing="trailing"),
        }
    for name, levels in expected.items():
        np.testing.assert_allclose(
            generate.noise_levels(model, _settings(name)), levels, rtol=1e-12, err_msg=str(name)
        )


def test_grids_that_cannot_be_are_one_sentence(model):
    discrete = model.table is not None
    words = (
        "steps: 1001 given for the grid 'respaced'"
        if discrete
        else "grid: 'respaced' given; expected one of edm"
    )
    with pytest.raises(ConfigError, match=words) as error:
        generate.noise_levels(model, _settings("respaced", 1001))
    assert "\n" not in str(error.value)
    with pytest.raises(
        ConfigError,
        match="sample.grid: unknown 'log'; expected one of edm, vp, ve, iddpm, flow, respaced",
    ):
        _settings("log")


def test_the_names_that_settings_allow_are_those_that_there_are():
    assert set(groups.SOLVERS) == set(SOLVERS)
    assert set(groups.GRIDS) == {*generate.CONTINUOUS, *generate.DISCRETE, generate.PNDM, "flow"}


def test_folders_from_before_the_settings_open_again():
    older = json.loads(configs.to_json(tiny.config()))
    del older["sample"]["eta"], older["sample"]["grid"]
    config = configs.from_json(json.dumps(older))
    trained = TrainedModel(config, models.build(tiny.config(), (8, 8, 1), 0), {}, {}, 0)
    settings = trained.settings(steps=5)
    assert (settings.eta, settings.grid, settings.steps) == (0.0, "edm", 5)
    assert trained.settings(grid="vp").grid == "vp"
    with pytest.raises(ConfigError, match="sample.grid: 'quad'"):
        trained.settings(grid="quad")


@pytest.mark.parametrize(
    "said,words",
    [
        ({"solver": "spndm", "steps": 1}, "sample.steps: 1 given; expected at least 2"),
        ({"solver": "fpndm", "steps": 3}, "sample.steps: 3 given; expected at least 4"),
        ({"solver": "ddim", "eta": 2.0}, "sample.eta: 2.0 given; expected a number from 0 to 1"),
        ({"rho": 0.0}, "sample.rho: 0.0 given; expected a number of at least 0.1"),
        ({"sigma_min": 0.0}, "sample.sigma_min: 0.0 given"),
    ],
)
def test_settings_are_refused_before_any_grid(said, words):
    with pytest.raises(ConfigError, match=words):
        generate.check_settings(dataclasses.replace(tiny.config().sample, **said))


@pytest.mark.fast
@pytest.mark.parametrize(
    "shape, most", [((8, 8), 256), ((64, 48), 170), ((256, 256), 8), ((1024, 1024), 1)]
)
def test_of_large_pictures_few_are_drawn_at_a_time(shape, most):
    """A grid of 64 at 256 pixels, all at once, does not fit on a TPU v5e."""
    model = types.SimpleNamespace(picture_shape=(*shape, 3))
    assert generate.most_at_a_time(model) == most
    assert generate.most_at_a_time(model, 64) == min(most, 64)
