"""What the step draws for an image, and the loss that it takes, against their formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ogdm_jax import data, parallel
from ogdm_jax.methods.contract import combine
from ogdm_jax.training import power
from ogdm_jax.training.example import draw_example
from ogdm_jax.training.objective import Objective
from ogdm_jax.training.state import TrainState
from ogdm_jax.training.step import make_step
from tests.support import tiny

KEY = jax.random.key(5)


def draw(batch, *more):
    run = tiny.build("methods=", tiny.ONE_LEVEL, *more)
    return draw_example(
        run.config, run.model, run.noise, jax.tree.map(jnp.asarray, batch), KEY, KEY
    )


def batch(n: int = 400, label=None) -> dict:
    pixels = np.random.default_rng(0).integers(0, 256, (n, 8, 8, 1), dtype=np.uint8)
    return {
        "image": pixels,
        "label": np.arange(n) % 10 if label is None else label,
        "index": np.arange(n),
    }


def test_images_levels_and_noise():
    given = batch()
    e = draw(given)
    np.testing.assert_allclose(e.x0, given["image"] / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(e.xt, e.x0 + e.sigma[:, None, None, None] * e.eps, rtol=1e-6)
    logs, eps = np.log(e.sigma), np.asarray(e.eps)
    np.testing.assert_allclose(
        [logs.mean(), logs.std()], [-1.2, 1.2], atol=0.2
    )  # 2206.00364, table 1
    np.testing.assert_allclose([eps.mean(), eps.std()], [0, 1], atol=0.03)


@pytest.mark.fast
def test_draws_belong_to_images_and_not_to_places():
    given = batch(8)
    order = np.random.default_rng(1).permutation(8)
    flags = ("data.xflip=true", "data.conditional=true", "data.label_dropout=0.5")
    straight, moved = draw(given, *flags), draw({k: v[order] for k, v in given.items()}, *flags)
    for name in ("x0", "label", "sigma", "eps"):
        np.testing.assert_array_equal(
            getattr(moved, name), getattr(straight, name)[order], err_msg=name
        )


def test_a_key_of_the_noise_draws_nothing_else():
    run, given = tiny.build("methods=", tiny.ONE_LEVEL, "data.xflip=true"), batch(16)
    keys = (KEY, jax.random.key(6))
    first, second = (
        draw_example(run.config, run.model, run.noise, jax.tree.map(jnp.asarray, given), KEY, key)
        for key in keys
    )
    np.testing.assert_array_equal(first.sigma, second.sigma)
    np.testing.assert_array_equal(first.x0, second.x0)
    assert not np.any(np.asarray(first.eps) == np.asarray(second.eps))


def test_half_of_the_images_are_mirrored():
    given = batch()
    e = draw(given, "data.xflip=true")
    same = np.isclose(e.x0, given["image"] / 127.5 - 1, atol=1e-6).all(axis=(1, 2, 3))
    mirrored = np.isclose(e.x0, given["image"][:, :, ::-1] / 127.5 - 1, atol=1e-6).all(
        axis=(1, 2, 3)
    )
    assert (same ^ mirrored).all() and 0.4 < mirrored.mean() < 0.6


@pytest.mark.parametrize("vector", [False, True])
def test_dropped_labels_are_no_class(vector):
    label = np.arange(400) % 10
    label = np.eye(10, dtype=np.float32)[label] if vector else label
    seen = np.asarray(
        draw(batch(label=label), "data.conditional=true", "data.label_dropout=0.3").label
    )
    assert seen.shape == label.shape
    dropped = (seen == 0).all(axis=1) if vector else seen == -1
    assert 0.2 < dropped.mean() < 0.4
    np.testing.assert_array_equal(seen[~dropped], label[~dropped])


def test_the_loss_is_the_mean_over_images_of_a_weighted_sum_over_pixels():
    run = tiny.build("methods=", tiny.ONE_LEVEL, "data.batch=8")
    state = run.init()
    given = next(data.batches(run.source, 8, 0))
    key = jax.random.fold_in(run.key, 0)
    e = draw_example(run.config, run.model, run.noise, jax.tree.map(jnp.asarray, given), key, key)
    x0_hat = jax.jit(run.model.denoiser(state.params))(e.xt, e.sigma)
    squares = np.square(np.asarray(x0_hat, np.float64) - np.asarray(e.x0)).sum(axis=(1, 2, 3))
    sigma, data_std = np.asarray(e.sigma, np.float64), run.config.precondition.sigma_data
    want = np.mean(
        (sigma**2 + data_std**2) / (sigma * data_std) ** 2 * squares
    )  # 2206.00364, table 1
    _, metrics = run.compile(state)(state, run.constants(), run.plan.place_batch(given), run.key)
    np.testing.assert_allclose(metrics["loss"], want, rtol=1e-4)


def test_a_state_of_given_weights_is_made_of_their_memory():
    """As a fresh one but for them; the moving average has memory of its own."""
    run = tiny.build("methods=ogdm", tiny.ONE_LEVEL)
    fresh = run.init()
    given = jax.tree.map(lambda leaf: leaf + 1, (fresh.params, fresh.buffers))
    params, buffers = jax.tree.map(lambda leaf: leaf + 1, (fresh.params, fresh.buffers))
    state = run.init(given)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given[0]))
    expected = dataclasses.replace(fresh, params=params, ema=params, buffers=buffers)
    tiny.assert_trees(jax.device_get(state), jax.device_get(expected))
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state.params, state.ema))]
    assert len({*places}) == len(places)


@pytest.mark.fast
def test_averages_are_of_the_weights_after_the_step():
    """Two steps of plain descent on w . x, whose gradient over accumulation rounds is the mean."""
    config = tiny.config(
        *("methods=", "data.batch=4", "optim.accumulate=2", "optim.clip=0"),
        *("ema.halflife=8 images", "ema.rampup=0.0", "ema.stds=(0.1,)"),
    )
    loss = lambda params, *rest: (jnp.sum(params["w"] * jnp.mean(rest[2]["image"], 0)), {})
    tx, plan = optax.sgd(1.0), parallel.make_plan("mesh", 1)
    made = make_step(config, Objective(loss), combine([]), tx, lambda step: 1.0, plan)
    w, images = {"w": jnp.ones(2)}, jnp.arange(16.0).reshape(2, 4, 2)
    state = TrainState(
        step=jnp.int32(0),
        params=w,
        ema=w,
        buffers={},
        opt_state=tx.init(w),
        carry={},
        averages=(w,),
    )
    want, mean, gamma = np.ones(2), np.ones(2), power.exponent(0.1)
    tracked = want
    for k, image in enumerate(images):
        state, _ = jax.jit(made)(
            state, {"whole": {}, "divided": {}, "weights": {}}, {"image": image}, KEY
        )
        want = want - np.mean(image, 0)
        beta = 0.5 ** (4 / 8)
        mean = beta * mean + (1 - beta) * want
        share = (k / (k + 1)) ** (gamma + 1)
        tracked = share * tracked + (1 - share) * want
        np.testing.assert_allclose(state.params["w"], want, rtol=1e-6)
        np.testing.assert_allclose(state.ema["w"], mean, rtol=1e-6)
        np.testing.assert_allclose(state.averages[0]["w"], tracked, rtol=1e-5)
