"""EDM's optimiser rules against their formulas (2206.00364, appendix F)."""

import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax.training import optim

pytestmark = pytest.mark.fast


def test_learning_rate_ramp_starts_at_zero_and_is_full_at_its_end():
    rate = optim.learning_rate(1e-3, ramp_steps=100, decay_steps=0)
    np.testing.assert_allclose(
        [rate(jnp.int32(s)) for s in (0, 50, 100, 10_000)], [0, 5e-4, 1e-3, 1e-3], rtol=1e-6
    )


def test_linear_decay_reaches_zero():
    rate = optim.learning_rate(1e-3, ramp_steps=0, decay_steps=200)
    np.testing.assert_allclose(
        [rate(jnp.int32(s)) for s in (0, 100, 200, 300)], [1e-3, 5e-4, 0, 0], atol=1e-9
    )


@pytest.mark.parametrize(
    "batch,halflife,beta",
    [(512, 0.5e6, 0.99929047), (256, 0.5e6, 0.99964517), (4096, 50e6, 0.99994322)],
)
def test_ema_beta_table(batch, halflife, beta):
    """Full-ramp values of EDM's recipes."""
    step = jnp.int32(10**9 // batch)
    np.testing.assert_allclose(optim.ema_beta(step, batch, halflife, 0.05), beta, atol=2e-7)
    np.testing.assert_allclose(optim.ema_beta(jnp.int32(0), batch, halflife, 0.05), 0.0, atol=0)
    np.testing.assert_allclose(optim.ema_beta(jnp.int32(0), batch, halflife, 0.0), beta, atol=2e-7)


def test_ema_ramp_is_a_share_of_the_images_seen():
    expected = 0.5 ** (64 / (0.05 * 64 * 100))
    np.testing.assert_allclose(optim.ema_beta(jnp.int32(100), 64, 1e9, 0.05), expected, rtol=1e-6)


def test_sanitise_replaces_and_counts():
    grads = {"a": jnp.array([1.0, jnp.nan, jnp.inf]), "b": jnp.array([-jnp.inf, 2.0])}
    clean, bad = optim.sanitise(grads)
    np.testing.assert_array_equal(clean["a"], [1.0, 0.0, 1e5])
    np.testing.assert_array_equal(clean["b"], [-1e5, 2.0])
    assert int(bad) == 3
