"""A nan stays a nan: a loss, a gradient, a measurement or a discriminator that is nan for one image
must not give an image that looks restored, and must not touch the others.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax.diffusion import grids, steps
from ogdm_jax.diffusion.bound import variance_bound
from ogdm_jax.diffusion.posterior import stable_target
from ogdm_jax.diffusion.process import Discrete
from ogdm_jax.inverse import networks, operators
from ogdm_jax.methods import ddnm, dg, diffpir, dps, dsg, freedom, lgd, mpgd
from ogdm_jax.sampling.sampler import sample
from tests.support.guidance_cases import DATA, LATENTS, LOSS, MASK, SHAPE, Y

pytestmark = pytest.mark.fast

BAD = Y.copy()
BAD[1, 0, 0, 0] = np.nan  # a pixel that is seen


def run(guidance, solver="ddim", **settings):
    @jax.jit
    def drawn(z):
        more = {"key": jax.random.key(0), "guidance": guidance} | settings
        return sample(DATA.denoise, z, grids.edm(6, 0.02, 20.0), solver, **more)

    return np.asarray(drawn(LATENTS))


def only_the_second(x):
    x = np.asarray(x)
    return np.isnan(x[1]).any() and np.isfinite(x[[0, 2]]).all()


def silent(x0):
    """nan for the second image, by a rule whose gradient is 0 there and not nan."""
    return jnp.where(jnp.arange(3) == 1, jnp.nan, LOSS(x0))


LOSSES = {
    "norm": operators.measurement_loss(operators.inpaint(MASK), BAD, squared=False),
    "square": operators.measurement_loss(operators.inpaint(MASK), BAD),
    "silent": silent,
}
METHODS = {
    "dps": lambda loss: dps.guidance(loss, 0.1),
    "mpgd": lambda loss: mpgd.guidance(loss, 0.1),
    "freedom": lambda loss: freedom.guidance(loss, 0.1),
    "freedom, time": lambda loss: freedom.guidance(loss, 0.1, rule="time"),
    "lgd": lambda loss: lgd.guidance(loss, 0.1),
    "dsg": lambda loss: dsg.guidance(loss, 0.2),
    "dsg, stop": lambda loss: dsg.guidance(loss, 0.2, stop=1.0),
    "dsg, x0": lambda loss: dsg.guidance(loss, 0.2, backward=False),
}


@pytest.mark.slow_cases("square-*")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.default
def test_a_loss_that_is_nan_for_one_image(method, loss):
    assert only_the_second(run(METHODS[method](LOSSES[loss]), eta=1.0))


def test_churns_noise_under_a_loss_that_is_nan():
    assert only_the_second(run(dsg.guidance(silent, 0.2), "heun", churn=4.0))


@pytest.mark.parametrize("std", [0.0, 0.1])
@pytest.mark.parametrize("module", [ddnm, diffpir])
@pytest.mark.default
def test_a_measurement_that_is_nan(module, std):
    for op in (operators.inpaint(MASK), operators.gaussian_blur(3, 0.8)):
        assert only_the_second(run(module.guidance(op, BAD, std), eta=1.0))


@pytest.mark.parametrize("clip", [0.0, 1e-5])
@pytest.mark.default
def test_a_discriminator_that_is_nan(clip):
    """Clipping of the probability makes the gradient of a nan logit 0."""
    logit = lambda x, time, label: jnp.where(jnp.arange(3) == 1, jnp.nan, x.sum((1, 2, 3)))
    ratio = dg.log_ratio(logit, clip)
    for boost in (None, dg.Boost()):
        assert only_the_second(run(dg.guidance(ratio, 0.1, boost=boost), "heun"))


def test_lengths_of_huge_and_tiny_gradients():
    """Squares that overflow or vanish must not switch guidance off without a word."""
    for size in (1e-30, 1.0, 1e30):
        v = jnp.full(SHAPE, size)
        np.testing.assert_allclose(freedom.rms(v), size, rtol=1e-5)
    one, other = (
        run(freedom.guidance(lambda x0, s=s: s * LOSS(x0), 0.1), eta=1.0) for s in (1.0, 1e-28)
    )
    np.testing.assert_allclose(one, other, atol=1e-4)
    assert np.isnan(freedom.rms(jnp.full(SHAPE, jnp.nan))).all()


@pytest.mark.default
def test_a_network_that_is_nan_keeps_its_image_nan():
    broken = lambda x, sigma, label=None: DATA.denoise(x, sigma).at[1].set(jnp.nan)
    for solver in ("heun", "euler", "ddim", "ancestral", "spndm", "fpndm", "dpmpp_2m"):
        for clip in (False, True):
            x = sample(broken, LATENTS, grids.edm(6), solver, key=jax.random.key(0), clip=clip)
            assert only_the_second(x), (solver, clip)


def test_rules_of_one_step():
    ratio = jnp.asarray([1.0, jnp.nan, 2.0])
    down, std = steps.split_sigma(ratio, 0.5 * ratio, 1.0)
    assert np.isnan(down[1]) and np.isnan(std[1]) and np.isfinite(down[0] + std[0])
    fraction = jnp.ones(SHAPE).at[1].set(jnp.nan)
    assert only_the_second(steps.posterior_std(jnp.ones(3), jnp.full(3, 0.5), fraction))
    spread = jnp.ones(SHAPE).at[1, 0, 0, 0].set(jnp.nan)
    assert only_the_second(dsg.spherical_step(LATENTS, spread, LATENTS, LATENTS, 0.2))


@pytest.mark.default
def test_targets_and_bounds():
    x = jnp.asarray(LATENTS).at[1, 0, 0, 0].set(jnp.nan)
    target, size = stable_target(x, jnp.ones(3), jnp.asarray(Y), chunk=2)
    assert only_the_second(target) and np.isnan(size[1])
    assert np.isnan(stable_target(jnp.asarray(LATENTS), jnp.ones(3), BAD)[0]).any()
    bound = functools.partial(variance_bound, Discrete.make(), sigma=jnp.asarray([0.005, 1.0, 9.0]))
    for row in (0, 1, 2):
        fraction = jnp.full(SHAPE, 0.5).at[row, 0, 0, 0].set(jnp.nan)
        found = bound(jnp.zeros(SHAPE), jnp.zeros(SHAPE), fraction=fraction)
        assert np.isnan(found).tolist() == [i == row for i in range(3)]


def test_a_network_of_features_that_is_nan():
    op = networks.embedding(lambda x: x.reshape(3, -1))
    assert only_the_second(op.forward(jnp.asarray(BAD)))
