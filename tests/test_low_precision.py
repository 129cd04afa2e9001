"""Latents of fewer bits: the state is float32 at least, however many steps there are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax.diffusion import grids, precondition
from ogdm_jax.sampling import discrete
from ogdm_jax.sampling.ablation import Design, ablation
from ogdm_jax.sampling.sampler import SOLVERS, sample
from tests.support.oracles import Gaussian, column

DATA = Gaussian(0.0, 0.5)
LATENTS = jax.random.normal(jax.random.key(0), (256, 4, 4, 1))
HALVES = [jnp.bfloat16, jnp.float16]


# float16 takes the same casts: test_samplers_beside_it has it
@pytest.mark.slow_cases(
    "*-float16", "spndm-*", "fpndm-*", "plms-*", "ancestral-*", "ddim-*", "dopri5-*"
)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_thousand_steps_keep_the_spread(solver, dtype):
    """In bfloat16 Heun's spread was .72 and Euler's .38; the data's is .5."""
    more = {"key": jax.random.key(1)} if solver in ("ancestral", "pc", "dpmpp_2m_sde") else {}
    if solver == "pc":
        more["snr"] = 0.02  # Langevin steps of a finite size widen what they keep
    run = jax.jit(lambda z: sample(DATA.denoise, z, grids.edm(1000), solver, **more))
    x, exact = run(LATENTS.astype(dtype)), run(LATENTS.astype(dtype).astype(jnp.float32))
    assert x.dtype == dtype
    # Langevin steps of a finite size widen the spread in every type: to .5188 here
    rtol = 0.05 if solver == "pc" else 0.03
    np.testing.assert_allclose(np.std(x.astype(jnp.float32)), 0.5, rtol=rtol)
    np.testing.assert_array_equal(x, exact.astype(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_samplers_beside_it(dtype):
    """EDM's ablation sampler and those of the index grid."""
    z = LATENTS.astype(dtype)
    x = jax.jit(lambda z: ablation(DATA.denoise, z, 400, Design()))(z)
    assert x.dtype == dtype
    np.testing.assert_allclose(np.std(x.astype(jnp.float32)), 0.5, rtol=0.02)
    table = discrete.Discrete.make()

    def eps(x, t):
        bar = column(jnp.asarray(table.alpha_bar, x.dtype)[t.astype(jnp.int32)], x)
        return jnp.sqrt(1 - bar) / (1 - bar + 0.25 * bar) * x

    for run in (
        lambda z: discrete.ddim(eps, z, 500, clip=False),
        lambda z: discrete.pndm(eps, z, 500),
        lambda z: discrete.pndm(eps, z, 500, order=4),
    ):
        x = jax.jit(run)(z)
        assert x.dtype == dtype
        np.testing.assert_allclose(np.std(x.astype(jnp.float32)), 0.5, rtol=0.03)


def test_a_trajectory_has_the_latents_type_and_float64_is_not_lowered():
    x, path = sample(DATA.denoise, LATENTS.astype(jnp.bfloat16), grids.edm(5), trajectory=True)
    assert {v.dtype for v in (x, *path)} == {jnp.dtype(jnp.bfloat16)}
    with jax.enable_x64(True):
        z = jnp.asarray(LATENTS, jnp.float64)
        x = sample(DATA.denoise, z, grids.edm(200), "heun")
        assert x.dtype == jnp.float64
        np.testing.assert_allclose(x, DATA.ode(80.0 * z, 80.0), rtol=2e-3)
        again = sample(DATA.denoise, z + 1e-12, grids.edm(200), "heun")
        assert 0 < np.abs(again - x).max() < 1e-11


def test_a_network_that_answers_in_half_does_not_lower_the_state():
    half = lambda x, sigma, label=None: DATA.denoise(x, sigma).astype(jnp.bfloat16)
    x = sample(half, LATENTS.astype(jnp.bfloat16), grids.edm(100), "euler")
    np.testing.assert_allclose(np.std(x.astype(jnp.float32)), 0.5, rtol=0.05)
    denoise = precondition.edm(lambda x, c, label: 0 * x)
    assert denoise(LATENTS.astype(jnp.bfloat16), jnp.ones(256)).dtype == jnp.float32


def test_latents_that_are_no_real_numbers_are_refused():
    for z in (jnp.ones((2, 2, 2, 1), jnp.int32), jnp.ones((2, 2, 2, 1), jnp.uint8)):
        with pytest.raises(ValueError, match="latents: u?int.* given; expected floating"):
            sample(DATA.denoise, z, grids.edm(3))
