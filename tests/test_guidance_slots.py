"""Guidance in the sampler: arrays arrive as arguments, rows follow the seeds, a slot has one
owner.
"""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from ogdm_jax.methods.contract import Guidance
from ogdm_jax.sampling import generate

pytestmark = pytest.mark.fast


class _Model:
    image_shape, label_dim, table = (4, 4, 1), 0, None

    def denoiser(self, params, buffers):
        return lambda x, sigma, label=None: x * params / (params + sigma[:, None, None, None] ** 2)


SETTINGS = ml_collections.ConfigDict(
    {
        "solver": "ddim",
        "steps": 4,
        "num": 1,
        "eta": 1.0,
        "sigma_min": 0.01,
        "sigma_max": 10.0,
        "rho": 7.0,
    }
)
SEEDS, ROWS = np.arange(7), np.arange(7, dtype=np.float32)


def _guidance(scale: float):
    def shift(denoise, frozen):
        return lambda x, sigma, label=None: frozen * denoise(x, sigma, label)

    def kick(frozen, given):
        def rule(evaluate, transition, x, noise, info):
            x0_hat = evaluate(x)
            mean, std = transition(x0_hat, x)
            return mean + std[:, None, None, None] * noise + given[:, None, None, None], x0_hat

        return rule

    return (
        Guidance("a", shift=shift, frozen=jnp.float32(scale)),
        Guidance("b", kick=kick, given=ROWS),
    )


def _images(guidance, devices: int, batch: int) -> np.ndarray:
    compiled = generate.sampler(_Model(), SETTINGS, jax.devices()[:devices], guidance=guidance)
    return np.concatenate(
        list(generate.generate(compiled, jnp.float32(0.25), {}, SEEDS, None, batch, guidance))
    )


def test_rows_follow_the_seeds_on_any_batch_size_and_number_of_devices():
    whole = _images(_guidance(1.0), 1, 7)
    np.testing.assert_allclose(_images(_guidance(1.0), 4, 4), whole, rtol=1e-5, atol=1e-6)
    plain = _images((), 1, 7)
    # The last step of a ddim scan is followed by mean = x0_hat, to which the kick adds its row: the
    # offset shows there.
    moved = np.abs(whole - plain).mean((1, 2, 3))
    assert moved[0] == 0 and (np.diff(moved) > 0).all()


def test_the_frozen_tree_reaches_the_shift():
    assert np.abs(_images(_guidance(1.0)[:1], 1, 7) - _images((), 1, 7)).max() == 0
    assert np.abs(_images(_guidance(0.5)[:1], 1, 7)).mean() < 0.7 * np.abs(_images((), 1, 7)).mean()


@pytest.mark.parametrize("slot", ["kick", "churn"])
def test_two_owners_of_one_slot_are_both_named(slot):
    both = [Guidance(name, **{slot: lambda *_: None}) for name in ("dps", "dsg")]
    with pytest.raises(ValueError, match="dps and dsg both fill the " + slot):
        generate.sampler(_Model(), SETTINGS, jax.devices()[:1], guidance=both)
