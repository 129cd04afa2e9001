"""Guidance in the sampler: arrays arrive as arguments, rows follow the seeds, a slot has one
owner.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax import models
from ogdm_jax.config import Sample
from ogdm_jax.diffusion import grids
from ogdm_jax.diffusion.denoiser import as_denoiser
from ogdm_jax.methods import dsg, mpgd
from ogdm_jax.sampling import generate, sample
from ogdm_jax.sampling.guidance import Guidance, combine, per_image


class _Model(models.Model):
    def denoiser(self, params, buffers):
        return lambda x, sigma, label=None: x * params / (params + sigma[:, None, None, None] ** 2)


SETTINGS = Sample(solver="ddim", steps=4, num=1, eta=1.0, sigma_min=0.01, sigma_max=10.0)
SEEDS, ROWS = np.arange(7), np.arange(7, dtype=np.float32)


def _guidance(scale: float):
    def transform(denoise, constants):
        return lambda x, sigma, label=None: constants * denoise(x, sigma, label)

    def rule(evaluate, transition, x, noise, info):
        x0_hat = evaluate(x)
        mean, std = transition(x0_hat, x)
        return mean + std[:, None, None, None] * noise + info.rows[:, None, None, None], x0_hat

    return (
        Guidance("a", denoiser=transform, constants=jnp.float32(scale)),
        Guidance("b", transition=rule, rows=ROWS),
    )


def _images(guidance, devices: int, batch: int) -> np.ndarray:
    compiled = generate.sampler(
        _Model(None, None, (4, 4, 1), 0), SETTINGS, jax.devices()[:devices], guidance=guidance
    )
    return np.concatenate(
        list(generate.generate(compiled, jnp.float32(0.25), {}, SEEDS, None, batch, guidance))
    )


def test_rows_follow_the_seeds_on_any_batch_size_and_number_of_devices():
    whole = _images(_guidance(1.0), 1, 7)
    np.testing.assert_allclose(_images(_guidance(1.0), 4, 4), whole, rtol=1e-5, atol=1e-6)
    plain = _images((), 1, 7)
    # The last step of a ddim scan is followed by mean = x0_hat, to which the rule adds its row: the
    # offset shows there.
    moved = np.abs(whole - plain).mean((1, 2, 3))
    assert moved[0] == 0 and (np.diff(moved) > 0).all()


def test_the_constants_reach_the_transform():
    assert np.abs(_images(_guidance(1.0)[:1], 1, 7) - _images((), 1, 7)).max() == 0
    assert np.abs(_images(_guidance(0.5)[:1], 1, 7)).mean() < 0.7 * np.abs(_images((), 1, 7)).mean()


def test_guidance_made_from_rows_is_that_of_each_batch():
    """per_image: a method that knows nothing of rows, made anew from those of each batch."""

    def make(rows):
        def rule(evaluate, transition, x, noise, info):
            return _guidance(1.0)[1].transition(
                evaluate, transition, x, noise, info._replace(rows=rows)
            )

        return Guidance("b", transition=rule)

    whole = _images((_guidance(1.0)[1],), 1, 7)
    for devices, batch in ((1, 3), (4, 4)):
        np.testing.assert_allclose(
            _images((per_image(make, ROWS),), devices, batch), whole, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("part, noun", [("transition", "a transition"), ("churn", "churn")])
def test_two_owners_of_one_part_are_both_named(part, noun):
    both = [Guidance(name, **{part: lambda *_: None}) for name in ("dps", "dsg")]
    with pytest.raises(ValueError, match=f"dps and dsg both bring {noun}; choose one of them"):
        generate.sampler(
            _Model(None, None, (4, 4, 1), 0), SETTINGS, jax.devices()[:1], guidance=both
        )


def test_outermost_transforms_come_last():
    order = []

    def transform(name):
        return lambda denoise, constants: order.append(name) or denoise

    several = [Guidance("b", transform("b"), outermost=True), Guidance("a", transform("a"))]
    combine(several).transform(as_denoiser(lambda x, sigma, label=None: x))
    assert order == ["a", "b"]


@pytest.mark.parametrize("method", [dsg, mpgd])
def test_other_noise_levels_measurements_and_sizes_trace_nothing(method):
    """Only the number of steps is a matter of the program."""
    chex.clear_trace_counter()  # it goes by the name of the function

    @jax.jit
    @chex.assert_max_traces(n=1)
    def images(latents, sigmas, y, size):
        loss = lambda x0_hat: jnp.sum(jnp.square(x0_hat - y), (1, 2, 3))
        guidance = method.guidance(loss, size)
        denoise = _Model(None, None, (4, 4, 1), 0).denoiser(jnp.float32(0.25), {})
        key = jax.random.key(0)
        return sample(denoise, latents, sigmas, "ddim", key, guidance=guidance, eta=1.0)

    latents = jnp.ones((2, 4, 4, 1))
    first = images(latents, grids.edm(4), 0.1 * latents, 0.1)
    second = images(latents, grids.edm(4, 0.01, 10.0), 0.3 * latents, 0.5)
    assert np.isfinite(first).all() and np.abs(first - second).max() > 0.01
