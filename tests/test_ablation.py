"""The ablation sampler: published numbers of its combinations, and the defaults as sample()."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax.diffusion import grids
from ogdm_jax.sampling.ablation import Design, ablation
from ogdm_jax.sampling.sampler import Churn, sample
from tests.support.oracles import Gaussian, two_bumps

pytestmark = pytest.mark.fast

DATA = Gaussian(0.0, 0.5)


@pytest.mark.parametrize(
    "grid, schedule, scaling, solver, n, want",
    [
        ("edm", "linear", "none", "euler", 18, 0.42303144),
        ("edm", "linear", "none", "heun", 18, 0.52762464),
        ("vp", "vp", "vp", "euler", 18, 0.48984169),
        ("vp", "vp", "vp", "euler", 128, 0.49825490),
        ("vp", "vp", "vp", "heun", 18, 0.50419564),
        ("vp", "vp", "vp", "heun", 128, 0.50007523),
        ("ve", "ve", "none", "heun", 18, 0.20254780),
        ("ve", "ve", "none", "heun", 128, 0.49464941),
        ("ve", "ve", "none", "euler", 18, 1.59047990),
        ("ve", "ve", "none", "euler", 128, 0.58720908),
        ("iddpm", "linear", "none", "heun", 18, 0.50818586),
        ("iddpm", "linear", "none", "euler", 18, 0.45714309),
        ("edm", "vp", "vp", "heun", 18, 0.50400473),
        ("edm", "vp", "vp", "heun", 128, 0.50007467),
    ],
)
def test_ablation_goldens(grid, schedule, scaling, solver, n, want):
    tolerance = 5e-6 if grid == "iddpm" else 6e-8  # the authors' iDDPM table is float32
    with jax.enable_x64(True):
        z = jnp.ones((1, 1, 1, 1), jnp.float64)
        design = Design(solver=solver, grid=grid, schedule=schedule, scaling=scaling)
        x = ablation(DATA.denoise, z, n, design)
        assert abs(float(x[0, 0, 0, 0]) - want) < tolerance


@pytest.mark.parametrize("churn", [None, Churn(3.0, 0.05, 50.0, 1.003)])
@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_ablation_defaults_equal_sample(solver, churn):
    data, key = two_bumps(), jax.random.key(3)
    with jax.enable_x64(True):
        z = jax.random.normal(jax.random.key(0), (5, 2, 2, 1), jnp.float64)
        a = ablation(data.denoise, z, 12, Design(solver=solver), churn=churn, key=key)
        b = sample(data.denoise, z, grids.edm(12), solver, churn=churn, key=key)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)


class StrangeRule:
    """A churn rule that is not EDM's constants."""

    def init(self, batch):
        return ()

    amounts = evaluate = init


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"solver": "ddim"}, "solver='ddim'; expected one of euler, heun"),
        ({"grid": "log"}, "grid='log'"),
        ({"grid": np.array([1.0, 2.0])}, "decreasing positive levels"),
        ({"schedule": "cosine"}, "schedule='cosine'"),
        ({"scaling": "ve"}, "scaling='ve'"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"churn": 2.0}, "key=None"),
        ({"churn": StrangeRule(), "key": None}, "expected Churn's constants"),
        ({"n": 0}, "n=0"),
    ],
)
def test_bad_ablation_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        how = {name: settings[name] for name in ("n", "churn", "key") if name in settings}
        design = Design(**{name: value for name, value in settings.items() if name not in how})
        ablation(DATA.denoise, jnp.ones((1, 1, 1, 1)), design=design, **how)
