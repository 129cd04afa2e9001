"""Averages of any length (2312.02696) against their integral, quadrature, and tracked ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax.config import ConfigError
from ogdm_jax.training import power, snapshots
from ogdm_jax.training.checkpoint import CheckpointError

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_width_of_a_profile_is_that_of_its_density(std):
    gamma = power.exponent(std)
    assert gamma > 0
    np.testing.assert_allclose(power.width(gamma), std, rtol=1e-12)
    nodes, weights = np.polynomial.legendre.leggauss(200)
    tau, weights = (nodes + 1) / 2, weights / 2
    density = (gamma + 1) * tau**gamma
    mean = np.sum(weights * density * tau)
    np.testing.assert_allclose(
        np.sqrt(np.sum(weights * density * (tau - mean) ** 2)), std, rtol=1e-5
    )


@pytest.mark.parametrize("std", [0.05, 0.1, 0.25])
def test_a_tracked_average_is_the_integral_of_the_path(std):
    """Sum of theta_k times the mass of the profile between k - 1 and k."""
    steps, gamma = 300, power.exponent(std)
    path = np.cumsum(np.random.default_rng(0).normal(size=(steps, 3)), axis=0)

    def body(average, now):
        return power.update(average, now[1], gamma, now[0]), None

    start = jnp.full(3, 1e3)  # nothing is left of it after the first step
    found, _ = jax.lax.scan(body, start, (jnp.arange(1, steps + 1), jnp.asarray(path, jnp.float32)))
    edges = (np.arange(steps + 1) / steps) ** (gamma + 1)
    np.testing.assert_allclose(found, np.diff(edges) @ path, rtol=1e-5)


def test_the_weight_of_a_step_keeps_its_digits_after_a_million():
    gamma, step = power.exponent(0.05), 1_000_000
    found = power.update(jnp.zeros(()), jnp.ones(()), gamma, jnp.int32(step))
    np.testing.assert_allclose(found, -np.expm1((gamma + 1) * np.log1p(-1 / step)), rtol=1e-6)


def test_products_of_profiles_against_quadrature():
    for t, std, other_t, other in [(1, 0.1, 1, 0.1), (3, 0.05, 4, 0.2), (4, 0.05, 3, 0.2)]:
        first, second = power.exponent(std), power.exponent(other)
        nodes, weights = np.polynomial.legendre.leggauss(400)
        top = min(t, other_t)
        tau, weights = (nodes + 1) / 2 * top, weights / 2 * top
        p = (first + 1) / t * (tau / t) ** first
        q = (second + 1) / other_t * (tau / other_t) ** second
        found = power.products(*map(np.float64, (t, first, other_t, second)))
        np.testing.assert_allclose(found, np.sum(weights * p * q), rtol=1e-5)


def walk(tmp_path, tracked=(0.05, 0.1), every=8, steps=256):
    """Snapshots of a path of 1,000 parameters: a random walk around a trend."""
    rng = np.random.default_rng(1)
    path = (
        np.cumsum(rng.normal(size=(steps, 1000)), axis=0) / 16 + np.linspace(0, 3, steps)[:, None]
    )

    def average(std, step):
        edges = (np.arange(step + 1) / step) ** (power.exponent(std) + 1)
        return {"w": np.float32(np.diff(edges) @ path[:step])}

    for step in range(every, steps + 1, every):
        snapshots.write(tmp_path, step, tracked, [average(std, step) for std in tracked])
    return average


@pytest.mark.parametrize("std,limit", [(0.03, 4e-3), (0.07, 5e-4), (0.1, 3e-4), (0.15, 2e-3)])
def test_a_held_out_average_comes_back_to_the_error_of_its_profile_and_of_float16(
    tmp_path, std, limit
):
    average = walk(tmp_path)
    (found,), step, errors = snapshots.reconstruct(
        tmp_path, (0.05, 0.1), [std], average(0.1, 256), None
    )
    expected = average(std, step)["w"]
    off = np.linalg.norm(found["w"] - expected) / np.linalg.norm(expected)
    assert step == 256 and off < limit, (off, errors)


def test_an_earlier_step_and_several_widths_at_once(tmp_path):
    average = walk(tmp_path)
    found, step, _ = snapshots.reconstruct(
        tmp_path, (0.05, 0.1), [0.08, 0.12], average(0.1, 8), 128
    )
    assert step == 128
    for std, tree in zip((0.08, 0.12), found, strict=True):
        np.testing.assert_allclose(tree["w"], average(std, 128)["w"], atol=5e-3)


def test_what_cannot_be_put_together_is_a_sentence(tmp_path):
    average = walk(tmp_path, every=64)
    like = average(0.1, 64)
    make = lambda std, step=None: snapshots.reconstruct(tmp_path, (0.05, 0.1), [std], like, step)
    with pytest.raises(ConfigError, match="std: 0.3 given; expected a number above 0"):
        make(0.3)
    with pytest.raises(ConfigError, match="comes out wrong by .* from 4 snapshots of 0.05, 0.1"):
        make(0.005)
    with pytest.raises(CheckpointError, match=r"no snapshot of step 70 .* \[64, 128, 192, 256\]"):
        make(0.1, 70)
    with pytest.raises(CheckpointError, match="holds no snapshots"):
        snapshots.reconstruct(tmp_path / "none", (0.05, 0.1), [0.1], like)
    with pytest.raises(CheckpointError, match="is of another network: w is"):
        snapshots.reconstruct(tmp_path, (0.05, 0.1), [0.1], {"w": np.zeros(3)})
    file = snapshots.path_of(tmp_path, 128)
    content = bytearray(file.read_bytes())
    content[300] ^= 4
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="00000128.npz is damaged .* delete it to go on"):
        make(0.1)
    file.unlink()
    make(0.1)


def test_numbers_beyond_float16_are_kept_whole(tmp_path):
    tree = {"w": np.float32([1e5, 1.0])}
    snapshots.write(tmp_path, 8, (0.1,), [tree])
    (found,), _, _ = snapshots.reconstruct(tmp_path, (0.1,), [0.1], tree)
    np.testing.assert_array_equal(found["w"], tree["w"])
