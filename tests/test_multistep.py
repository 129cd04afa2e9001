"""UniPC and DPM-Solver++(2M) SDE against an independent recursion, orders of convergence and
moments (UniPC's authors' code: test_golden).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax.diffusion import grids
from ogdm_jax.inverse import operators
from ogdm_jax.methods import ddnm, dps, dsg
from ogdm_jax.sampling.multistep import weights
from ogdm_jax.sampling.sampler import sample
from tests.support.oracles import Gaussian, two_bumps

BUMPS = two_bumps()


@pytest.mark.slow_cases("2-bh1", "3-bh2")
@pytest.mark.parametrize("order, bh", [(1, "bh2"), (2, "bh1"), (2, "bh2"), (3, "bh2")])
def test_unipc_has_one_order_more_than_its_prediction(order, bh):
    """Read before the last three levels, whose order is lower by design."""
    grid = lambda n: grids.edm(n + 1, 0.5, 10.0, rho=3.0)[:-1]
    with jax.enable_x64(True):
        z = jax.random.normal(jax.random.key(2), (4, 2, 2, 1), jnp.float64)
        truth = sample(BUMPS.denoise, z, np.linspace(10.0, 0.5, 3001), "fpndm")

        @jax.jit
        def end(sigmas):
            how = {"order": order, "bh": bh, "trajectory": True}
            return sample(BUMPS.denoise, z, sigmas, "unipc", **how)[1].states[-5]

        tail = [0.45, 0.4, 0.35, 0.0]
        errors = [jnp.abs(end(np.append(grid(n), tail)) - truth).max() for n in (48, 96)]
    measured = float(np.log2(errors[0] / errors[1]))
    assert order + 0.7 < measured < order + 1.7, (measured, errors)


def test_weights_in_float32_and_of_equal_levels():
    """The functions phi cancel at small steps; levels that a denoiser's range makes one are no
    steps.
    """
    fine = np.geomspace(80.0, 0.002, 2001)
    with jax.enable_x64(True):
        exact = weights(jnp.asarray(fine), 3, "bh2")
    for got, want in zip(weights(jnp.asarray(fine, jnp.float32), 3, "bh2"), exact, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)  # of numbers near h / 2 = 0.003
    z = jax.random.normal(jax.random.key(0), (2, 2, 2, 1))
    for order in (2, 3):
        twice = jnp.asarray([9.0, 3.0, 3.0, 3.0, 1.0, 0.3, 0.0])
        run = jax.jit(lambda z, s, o=order: sample(BUMPS.denoise, z, s, "unipc", order=o))
        once = sample(BUMPS.denoise, z, [9.0, 3.0, 1.0, 0.3, 0.0], "unipc", order=1)
        assert np.abs(run(z, twice) - once).max() < 0.1


def recursion(denoise, x, sigmas, eta, noise):
    """DPM-Solver++(2M) SDE in half-log-SNR time, midpoint form, in float64."""
    old, h_last = None, None
    for i, (sigma, after) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        x0 = np.asarray(denoise(jnp.asarray(x), jnp.full(len(x), sigma)))
        if after == 0:
            return x0
        h = np.log(sigma) - np.log(after)
        share = -np.expm1(-(1 + eta) * h)
        x = after / sigma * np.exp(-eta * h) * x + share * x0
        if old is not None:
            x = x + 0.5 * share * h / h_last * (x0 - old)
        x = x + after * np.sqrt(-np.expm1(-2 * eta * h)) * noise[i]
        old, h_last = x0, h
    return x


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_dpmpp_2m_sde_is_its_recursion(eta, n=9):
    with jax.enable_x64(True):
        z, *noise = jax.random.normal(jax.random.key(1), (n + 1, 3, 2, 2, 1), jnp.float64)
        sigmas = grids.edm(n, 0.02, 20.0)
        noise = jnp.stack(noise)
        x = sample(BUMPS.denoise, z, sigmas, "dpmpp_2m_sde", eta=eta, noise_fn=lambda i: noise[i])
        want = recursion(BUMPS.denoise, np.asarray(z) * sigmas[0], sigmas, eta, np.asarray(noise))
    np.testing.assert_allclose(x, want, atol=1e-10)


def test_eta_zero_is_the_ode_solver_and_one_the_default():
    z, key = jax.random.normal(jax.random.key(1), (3, 2, 2, 1)), jax.random.key(2)
    run = functools.partial(sample, BUMPS.denoise, z, grids.edm(9), key=key)
    np.testing.assert_array_equal(run("dpmpp_2m_sde", eta=0.0), run("dpmpp_2m"))
    np.testing.assert_array_equal(run("dpmpp_2m_sde", eta=1.0), run("dpmpp_2m_sde"))


@pytest.mark.slow_cases("0.5")
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_moments_and_the_mixtures_shares(eta):
    data = Gaussian(0.3, 0.5)
    z = jax.random.normal(jax.random.key(0), (64, 32, 32, 1))
    run = jax.jit(
        lambda z, d, n: sample(d, z, grids.edm(n), "dpmpp_2m_sde", jax.random.key(1), eta=eta),
        static_argnums=(1, 2),
    )
    x = np.asarray(run(z, data.denoise, 60))
    assert abs(x.std() / 0.5 - 1) < 0.012 and abs(x.mean() - 0.3) < 0.01
    z = jax.random.normal(jax.random.key(0), (4096, 2, 2, 1))
    x, truth = run(z, BUMPS.denoise, 60), BUMPS.draw(jax.random.key(3), 40_000)
    np.testing.assert_allclose(x.mean(0), truth.mean(0), atol=0.03)
    np.testing.assert_allclose(x.std(0), truth.std(0), atol=0.03)


def test_transitions_are_guided_and_replaced_images_refused():
    data, z = Gaussian(0.0, 0.5), jax.random.normal(jax.random.key(0), (64, 4, 4, 1))
    mask = np.zeros((4, 4), np.float32)
    mask[::2] = 1
    operator, y = operators.inpaint(mask), 0.7 * jnp.ones((64, 4, 4, 1)) * mask[None, ..., None]
    loss = operators.measurement_loss(operator, y)
    run = jax.jit(
        lambda z, g: sample(
            data.denoise, z, grids.edm(30), "dpmpp_2m_sde", jax.random.key(1), guidance=g
        ),
        static_argnums=1,
    )
    for guidance in (dsg.guidance(loss, 0.3), dps.guidance(loss, 0.5)):
        x = run(z, guidance)
        assert float(jnp.abs(x[:, ::2].mean() - 0.7)) < 0.15
        assert abs(float(x[:, 1::2].mean())) < 0.1 and 0.3 < float(x[:, 1::2].std()) < 0.6
    for guidance in (ddnm.guidance(operator, y), ddnm.guidance(operator, y, interval=2)):
        with pytest.raises(ValueError, match="ddnm with solver 'dpmpp_2m_sde': it replaces"):
            run(z, guidance)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"solver": "unipc", "order": 4}, "config.sample.order: 4 given"),
        ({"solver": "unipc", "bh": "bh3"}, "config.sample.bh: unknown 'bh3'"),
        ({"solver": "heun", "order": 3}, "order=3 with solver 'heun'; expected solver 'unipc'"),
        ({"solver": "unipc", "snr": 0.2}, "snr=0.2 with solver 'unipc'; expected solver 'pc'"),
        ({"solver": "unipc", "orders": 2}, "orders=2 with solver 'unipc'; expected one of order"),
        ({"solver": "unipc", "eta": 0.5}, "eta=0.5 with solver 'unipc'"),
        ({"solver": "dpmpp_2m_sde"}, "key=None; expected a key"),
        ({"solver": "dpmpp_2m_sde", "churn": 2.0}, "churn with solver 'dpmpp_2m_sde'"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words) as error:
        sample(BUMPS.denoise, jnp.ones((2, 2, 2, 1)), grids.edm(3), **settings)
    assert "\n" not in str(error.value)
