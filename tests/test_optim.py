"""EDM's optimiser rules against their formulas (2206.00364, appendix F)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax import platforms
from ogdm_jax.config import ConfigError
from ogdm_jax.training import optim
from tests.support import tiny

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


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_sanitise_replaces_and_counts(platform):
    grads = {"a": jnp.array([1.0, jnp.nan, jnp.inf]), "b": jnp.array([-jnp.inf, 2.0])}
    clean, bad = platforms.traced_for(platform, optim.sanitise)(grads)
    np.testing.assert_array_equal(clean["a"], [1.0, 0.0, 1e5])
    np.testing.assert_array_equal(clean["b"], [-1e5, 2.0])
    assert int(bad) == 3


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_the_norm_is_over_all_numbers(platform):
    grads = {"a": jnp.array([[1.0, 2.0], [4.0, -2.0]]), "b": jnp.array(12.0)}
    np.testing.assert_allclose(platforms.traced_for(platform, optim.norm)(grads), 13, rtol=1e-6)


def test_schedules_against_their_formulas():
    steps = np.array([0, 1, 30, 50, 99, 100, 101, 400])
    shapes = {
        "constant": np.ones(len(steps)),
        "linear": np.maximum(1 - steps / 100, 0),
        "cosine": (1 + np.cos(np.pi * np.minimum(steps / 100, 1))) / 2,
        "inverse_sqrt": 1 / np.sqrt(np.maximum(steps / 100, 1)),
    }
    for shape, expected in shapes.items():
        rate = optim.learning_rate(1e-3, ramp_steps=50, decay_steps=100, shape=shape)
        expected = 1e-3 * np.minimum(steps / 50, 1) * expected
        np.testing.assert_allclose(
            [rate(jnp.int32(s)) for s in steps], expected, rtol=2e-6, atol=1e-10, err_msg=shape
        )


def test_a_schedule_needs_a_length_and_no_rate_is_0_before_the_end():
    few = "train.duration=10 steps"
    for shape in ("cosine", "inverse_sqrt"):
        with pytest.raises(ConfigError, match="optim.decay: '0 steps' given; expected a length"):
            optim.rate_of(tiny.config(few, f"optim.schedule={shape}"))
    with pytest.raises(ConfigError, match="after which the learning rate is 0"):
        optim.rate_of(tiny.config(few, "optim.schedule=cosine", "optim.decay=5 steps"))
    for shape in ("constant", "inverse_sqrt"):
        optim.rate_of(tiny.config(few, f"optim.schedule={shape}", "optim.decay=5 steps"))


def test_clipping_scales_the_whole_gradient_down_to_the_norm():
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    clipped = optim.clip(grads, 2.0)
    np.testing.assert_allclose(clipped["a"], [1.2, 0.0], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], [[1.6]], rtol=1e-6)
    for largest in (0.0, 5.1):
        np.testing.assert_array_equal(optim.clip(grads, largest)["a"], grads["a"])


def test_clipping_and_schedules_keep_the_state_that_checkpoints_have():
    """So that a person may change them in a run, with --override."""
    create = lambda *more: jax.eval_shape((run := tiny.build("methods=", *more)).create, run.key)
    plain, other = create(), create("optim.clip=1", "optim.schedule=cosine", "optim.decay=9 Mimg")
    assert jax.tree.structure(plain) == jax.tree.structure(other)
    assert plain.averages == () and len(create("ema.stds=0.1,0.2").averages) == 2
