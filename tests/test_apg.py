"""APG against its formulas: equal to classifier-free guidance where it should be, the recursion of
its momentum, and what it costs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax.config import ConfigError
from ogdm_jax.diffusion import grids
from ogdm_jax.methods import apg, autoguidance, cfg, dsg
from ogdm_jax.sampling.sampler import sample
from tests.support.oracles import Gaussian, column, two_bumps

Z = jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
LABEL = jnp.asarray([1, 2, 1], jnp.int32)
BUMPS, WIDE = two_bumps(), Gaussian(0.0, 0.8)
GRID = grids.edm(8, 0.02, 20.0)


def denoise(x, sigma, label):
    """Two classes that bend differently, and a wide Gaussian without one."""
    a, b = BUMPS.denoise(x, sigma), -BUMPS.denoise(-x, sigma)
    return jnp.where(
        column(label, x) == 1, a, jnp.where(column(label, x) == 2, b, WIDE.denoise(x, sigma))
    )


def run(guidance, solver="euler", **more):
    how = {"key": jax.random.key(1), "label": LABEL, "guidance": guidance, **more}
    return jax.jit(lambda z: sample(denoise, z, GRID, solver, **how))(Z)


@pytest.mark.slow_cases("unipc", "ancestral")
@pytest.mark.parametrize("solver", ["heun", "unipc", "ancestral"])
def test_eta_one_is_classifier_free_guidance(solver):
    for window in (None, (0.1, 5.0)):
        ours = run(apg.guidance(3.0, eta=1.0, window=window), solver)
        np.testing.assert_allclose(ours, run(cfg.guidance(3.0, window), solver), atol=2e-5)


def by_hand(weight, norm, eta, momentum):
    """Euler's recursion with APG's update in numpy, float64."""
    x, m = np.asarray(Z, np.float64) * GRID[0], 0.0
    flat = lambda v: np.asarray(v, np.float64).reshape(3, -1)
    for sigma, after in zip(GRID[:-1], GRID[1:]):
        s = jnp.full(3, sigma)
        d, plain = (flat(denoise(jnp.asarray(x), s, c)) for c in (LABEL, -jnp.ones_like(LABEL)))
        m = d - plain + momentum * m
        u = m * np.minimum(1, norm / np.linalg.norm(m, axis=1, keepdims=True)) if norm else m
        along = d / np.linalg.norm(d, axis=1, keepdims=True)
        parallel = (u * along).sum(1, keepdims=True) * along
        x0 = (d + (weight - 1) * (u - parallel + eta * parallel)).reshape(x.shape)
        x = x0 + after / sigma * (x - x0)
    return x


@pytest.mark.parametrize(
    "norm, eta, momentum", [(0, 0, 0), (0.3, 0, 0), (0.3, 0.5, -0.5), (0, 1, -0.75)]
)
def test_the_recursion(norm, eta, momentum):
    with jax.enable_x64(True):
        guidance = apg.guidance(4.0, norm, eta, momentum)
        z = jnp.asarray(Z, jnp.float64)
        x = sample(denoise, z, GRID, "euler", label=LABEL, guidance=guidance)
        # the weight is an array of float32 there, 4 exactly
        np.testing.assert_allclose(x, by_hand(4.0, norm, eta, momentum), atol=1e-6)


@pytest.mark.slow_cases("spndm", "dpmpp_2m", "ddim")
@pytest.mark.parametrize("solver", ["euler", "ddim", "unipc", "dpmpp_2m", "spndm", "heun", "pc"])
def test_momentum_with_every_kind_of_solver_costs_nothing_more(solver):
    calls = []

    def counted(x, sigma, label):
        jax.debug.callback(lambda s: calls.append(s), sigma[0])
        return denoise(x, sigma, label)

    how = {"key": jax.random.key(1), "label": LABEL}
    plain = sample(counted, Z, GRID, solver, guidance=cfg.guidance(3.0), **how)
    jax.effects_barrier()
    count = len(calls)
    calls.clear()
    x = sample(counted, Z, GRID, solver, guidance=apg.guidance(3.0, momentum=-0.5), **how)
    jax.effects_barrier()
    more = {"pc": len(GRID) - 1}.get(solver, 0)  # its evaluations are in a loop
    assert count <= len(calls) <= count + more
    assert np.isfinite(x).all() and np.abs(x - plain).max() > 1e-3


def test_an_image_depends_on_itself_alone():
    guidance = apg.guidance(3.0, 0.3, momentum=-0.5)
    x = run(guidance)
    one = sample(denoise, Z[1:2], GRID, "euler", label=LABEL[1:2], guidance=guidance)
    np.testing.assert_allclose(one, x[1:2], atol=1e-5)


def test_in_company():
    momentum = apg.guidance(3.0, momentum=-0.5)
    with pytest.raises(ValueError, match="apg and cfg both bring a comparison with no condition"):
        run([momentum, cfg.guidance(2.0)])
    auto = autoguidance.guidance(lambda x, s, label: 0.9 * denoise(x, s, label), 1.5)
    np.testing.assert_allclose(run([momentum, auto]), run([auto, momentum]), atol=1e-5)
    loss = lambda x0: jnp.sum((x0 - 0.8) ** 2, (1, 2, 3))
    x = run([momentum, dsg.guidance(loss, 0.3)], "ancestral")
    assert np.isfinite(x).all() and np.abs(x - run(momentum, "ancestral")).max() > 1e-3
    x = run(momentum, "heun", churn=4.0)
    assert np.isfinite(x).all()


def test_what_is_refused():
    with pytest.raises(ConfigError, match="apg.momentum: -1.0 given"):
        apg.guidance(momentum=-1.0)
    with pytest.raises(ConfigError, match="apg.norm: -1.0 given"):
        apg.guidance(norm=-1.0)
    with pytest.raises(ValueError, match="label=None"):
        run(apg.guidance(), label=None)
