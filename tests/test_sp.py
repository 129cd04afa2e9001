"""SP: golden values and identities of spec/sp.md, early exit, gradients, gate, calibration, and the
training slot.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from ogdm_jax import models
from ogdm_jax.diffusion import precondition, process, steps
from ogdm_jax.methods import contract as slots
from ogdm_jax.methods import sp
from tests.support import tiny

RNG = np.random.default_rng
SD = 0.5
LEVELS = [(0.5, 1.5), (2.0, 0.1), (0.002, 80.0), (80.0, 0.002), (0.3, 0.3)]


def golden():
    """spec/sp.md 10, as images [2,2,2,1]."""
    k = np.arange(8)
    y, n, f = np.sin(0.37 * k + 0.1), np.cos(1.3 * k + 0.2), 0.3 * np.sin(k)
    return *(a.reshape(2, 2, 2, 1) for a in (y, n, f)), np.array([0.5, 2.0]), np.array([1.5, 0.1])


def wide(v):
    return np.asarray(v)[:, None, None, None]


def skip_and_out(sigma):
    return SD**2 / (sigma**2 + SD**2), sigma * SD / np.sqrt(sigma**2 + SD**2)


def scaled(x, sigma):
    """The network's input, c_in x: the identity teacher."""
    return x / jnp.sqrt(jnp.square(sigma) + SD**2)[:, None, None, None]


def squares(x, sigma):
    return jnp.square(scaled(x, sigma))


def problem(seed=0, b=5, shape=(8, 8, 1)):
    """x0, eps, x0_hat, and pairs of levels with the extremes among them."""
    rng = RNG(seed)
    x0, eps, x0_hat = rng.normal(size=(3, b, *shape)).astype(np.float32)
    sigma, sigma_next = np.array(LEVELS[:b], np.float32).T
    return x0, eps, x0_hat, sigma, sigma_next


def loss_of(features, x0, eps, x0_hat, sigma, sigma_next, **more):
    eps_hat = process.eps_from_x0(jnp.asarray(x0 + wide(sigma) * eps), x0_hat, sigma)
    return sp.self_perceptual_loss(features, x0, eps, x0_hat, eps_hat, sigma_next, **more)


def predicted_noise(xt, output, sigma, sigma_data):
    """eps_hat from EDM's raw output (spec/sp.md 1), as training gets it from the denoiser."""
    return precondition.edm(lambda *_: output, sigma_data).with_noise(xt, sigma)[1]


@pytest.mark.fast
def test_golden_values():
    with jax.enable_x64(True):
        y, n, f, sigma, sigma_next = (jnp.asarray(a) for a in golden())
        x = y + wide(sigma) * n
        skip, out = skip_and_out(sigma)

        def total(f):
            x0_hat = wide(skip) * x + wide(out) * f
            eps_hat = predicted_noise(x, f, sigma, SD)
            return sp.self_perceptual_loss(squares, y, n, x0_hat, eps_hat, sigma_next)

        x0_hat = wide(skip) * x + wide(out) * f
        np.testing.assert_allclose(
            predicted_noise(x, f, sigma, SD), (x - x0_hat) / wide(sigma), atol=1e-13
        )
        np.testing.assert_allclose(total(f), [0.15661065, 9.41716627], rtol=1e-6)
        grad = jax.grad(lambda f: jnp.mean(total(f)))(f).reshape(2, 4)
        truth = [
            [0.07160215, -0.01464151, 0.00644544, -0.11452527],
            [-0.51438797, -0.55197878, -0.01420197, 0.02698992],
        ]
        np.testing.assert_allclose(grad, truth, rtol=2e-6, atol=1e-8)
        exact = (y - wide(skip) * x) / wide(out)
        np.testing.assert_allclose(total(exact), 0, atol=1e-12)
        np.testing.assert_allclose(
            sp.jump_sine(sigma, sigma_next, SD), [-0.4472136, 0.90373784], rtol=1e-6
        )
        wrong = sp.self_perceptual_loss(
            squares, y, n, wide(skip) * x + wide(out) * f, n, sigma_next
        )
        np.testing.assert_allclose(
            wrong, [0.05614514, 9.59483062], rtol=1e-6
        )  # what the true noise would give


def test_a_perfect_prediction_costs_nothing():
    x0, eps, _, sigma, sigma_next = problem()
    np.testing.assert_array_equal(sp.self_perceptual_loss(squares, x0, eps, x0, eps, sigma_next), 0)
    assert loss_of(squares, x0, eps, x0, sigma, sigma_next).max() < 1e-6


def test_an_equal_level_costs_nothing_whatever_is_predicted():
    x0, eps, x0_hat, sigma, _ = problem()
    loss = loss_of(scaled, x0, eps, x0_hat, sigma, sigma)
    assert loss.max() < 1e-10
    true_noise = sp.self_perceptual_loss(scaled, x0, eps, x0_hat, eps, sigma)
    assert true_noise.max() > 0.1  # the public re-implementation's variant fails this


@pytest.mark.fast
def test_jump_is_the_sampler_step_and_the_identities_hold():
    """Section 3: predicted - real = (1 - s'/s)(D - y), = sin(theta - theta') (F - F*) in the
    network's scale.
    """
    with jax.enable_x64(True):
        x0, eps, x0_hat, sigma, sigma_next = (jnp.asarray(a, jnp.float64) for a in problem())
        x = x0 + wide(sigma) * eps
        jumped = x0_hat + wide(sigma_next) * process.eps_from_x0(x, x0_hat, sigma)
        np.testing.assert_allclose(
            jumped, steps.euler_update(x, x0_hat, sigma, sigma_next), atol=1e-9
        )
        real = x0 + wide(sigma_next) * eps
        np.testing.assert_allclose(
            jumped - real, wide(1 - sigma_next / sigma) * (x0_hat - x0), atol=1e-9
        )
        skip, out = skip_and_out(sigma)
        error = (x0_hat - x0) / wide(out)
        sine = sp.jump_sine(sigma, sigma_next, SD)
        np.testing.assert_allclose(
            sine, np.sin(np.arctan(sigma / SD) - np.arctan(sigma_next / SD)), atol=1e-12
        )
        np.testing.assert_allclose(scaled(jumped - real, sigma_next), wide(sine) * error, atol=1e-9)
        loss = loss_of(scaled, x0, eps, x0_hat, sigma, sigma_next)
        np.testing.assert_allclose(
            loss, sine**2 * jnp.mean(jnp.square(error), (1, 2, 3)), rtol=1e-5, atol=1e-9
        )


def test_linear_features_and_mean_absolute_distance():
    x0, eps, x0_hat, sigma, sigma_next = problem(b=2)
    matrix = RNG(1).normal(size=(64, 7)).astype(np.float32)
    features = lambda x, s: scaled(x, s).reshape(x.shape[0], -1) @ matrix
    moved = (
        (1 - sigma_next / sigma)[:, None]
        * (x0_hat - x0).reshape(2, -1)
        / np.sqrt(sigma_next**2 + SD**2)[:, None]
    )
    truth = moved @ matrix
    np.testing.assert_allclose(
        loss_of(features, x0, eps, x0_hat, sigma, sigma_next), (truth**2).mean(1), rtol=1e-4
    )
    mae = loss_of(features, x0, eps, x0_hat, sigma, sigma_next, distance="mae")
    np.testing.assert_allclose(mae, np.abs(truth).mean(1), rtol=1e-4)
    pair = lambda x, s: [features(x, s), 3 * features(x, s)]
    np.testing.assert_allclose(
        loss_of(pair, x0, eps, x0_hat, sigma, sigma_next), 5 * (truth**2).mean(1), rtol=1e-4
    )
    for scale in (1.0, 100.0):
        relative = loss_of(
            lambda x, s, c=scale: c * features(x, s),
            x0,
            eps,
            x0_hat,
            sigma,
            sigma_next,
            feature_norm="relative",
        )
        size = (
            scaled(jnp.asarray(x0 + wide(sigma_next) * eps), sigma_next).reshape(2, -1) @ matrix
        ) ** 2
        np.testing.assert_allclose(relative, (truth**2).mean(1) / size.mean(1), rtol=1e-4)
    with pytest.raises(ValueError, match="unknown 'huber'"):
        loss_of(features, x0, eps, x0_hat, sigma, sigma_next, distance="huber")


def test_stable_noise_at_small_sigma():
    """(x - D) / sigma loses what the network's own output keeps, the more so in half precision."""
    rng = RNG(0)
    x0, eps, f = rng.normal(size=(3, 4, 8, 8, 1)).astype(np.float32)
    sigma = np.full(4, 0.002, np.float32)
    x = (x0 + wide(sigma) * eps).astype(np.float32)
    wide_sigma = wide(sigma).astype(np.float64)
    norm = wide_sigma**2 + SD**2
    truth = wide_sigma / norm * x - SD / np.sqrt(norm) * f
    np.testing.assert_allclose(predicted_noise(x, f, sigma, SD), truth, atol=1e-6)
    x0_hat, eps_hat = precondition.edm(lambda *_: f, SD).with_noise(x, sigma)
    np.testing.assert_allclose(eps_hat, truth, atol=1e-6)
    assert np.abs(process.eps_from_x0(x, x0_hat, sigma) - truth).max() > 1e-5


@pytest.mark.parametrize("kind", ["edm", "vp", "ve", "iddpm", "adm"])
def test_predicted_noise_of_every_preconditioning(kind):
    rng = RNG(0)
    x, f = rng.normal(size=(2, 4, 8, 8, 1)).astype(np.float32)
    sigma = jnp.asarray([0.05, 0.5, 2.0, 20.0])
    for more in ({}, {"predict": "x0"}, {"clip": True}) if kind == "adm" else ({},):
        denoise = getattr(precondition, kind)(lambda *_: f, **more)
        x0_hat, eps_hat = denoise.with_noise(x, sigma)
        np.testing.assert_array_equal(x0_hat, denoise(x, sigma))
        np.testing.assert_allclose(eps_hat, (x - x0_hat) / wide(sigma), atol=2e-5)


def test_training_takes_the_stable_noise():
    """The loss is that of example.eps_hat, and not of (x - x0_hat) / sigma."""
    ex = predicted(example(sigma=np.full(6, 0.002, np.float32)))
    slot = sp.training(sp.Settings(**PAPER), context())
    x0_hat, eps_hat = forward(network(), ex)
    np.testing.assert_array_equal(eps_hat, ex.eps_hat)
    kept = jax.jit(lambda ex, h: slot.distance(ex, h, ex.x0, None, owned(slot))[0])
    sigma_next = sp.draw_sigma_next("sd_uniform", ex.keys("sp/sigma_next"), context())
    features = lambda x, s: denoiser(network(), None, ex.augment).features(x, s, ex.label, at="mid")
    of_noise = lambda noise: sp.self_perceptual_loss(
        features, ex.x0, ex.eps, x0_hat, noise, sigma_next
    )
    np.testing.assert_allclose(kept(ex, x0_hat), of_noise(ex.eps_hat), rtol=1e-5)
    moved = ex.replace(eps_hat=ex.eps_hat + 0.1)
    np.testing.assert_allclose(kept(moved, x0_hat), of_noise(ex.eps_hat + 0.1), rtol=1e-5)


def test_gradient_goes_through_the_prediction_alone():
    x0, eps, x0_hat, sigma, sigma_next = (jnp.asarray(a) for a in problem(b=2))
    total = lambda *a: jnp.sum(loss_of(squares, *a, sigma, sigma_next))
    grad = jax.grad(total, argnums=2)(x0, eps, x0_hat)
    step = 1e-2 * RNG(2).normal(size=x0.shape).astype(np.float32)
    difference = (total(x0, eps, x0_hat + step) - total(x0, eps, x0_hat - step)) / 2
    np.testing.assert_allclose(jnp.vdot(grad, step), difference, rtol=1e-3)
    constant = jax.grad(
        lambda y, n: jnp.sum(sp.self_perceptual_loss(squares, y, n, x0_hat, eps, sigma_next)),
        (0, 1),
    )
    for g in constant(x0, eps):
        np.testing.assert_array_equal(g, 0)


# A toy network in the place of the real one: one hidden layer (the "mid" tap), labels,
# augmentation, dropout.


@functools.cache
def network():
    rng = RNG(7)
    shapes = {"enc": (64, 16), "label": (3, 16), "augment": (9, 16), "dec_block": (16, 64)}
    return {name: 0.3 * rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def denoiser(params, buffers=None, augment=None, dropout_keys=None):
    def hidden(x, c_noise, label):
        h = (
            x.reshape(x.shape[0], -1) @ params["enc"]
            + augment @ params["augment"]
            + c_noise[:, None]
        )
        h = jnp.tanh(h + jax.nn.one_hot(label, 3) @ params["label"])
        if dropout_keys is not None:
            h = h * jax.vmap(lambda k: jax.random.bernoulli(k, 0.5, (16,)))(dropout_keys)
        return h

    def call(x, c_noise, label=None):
        return (hidden(x, c_noise, label) @ params["dec_block"]).reshape(x.shape)

    def taps(x, c_noise, label, at):
        assert at == "mid"
        return hidden(x, c_noise, label)

    return precondition.edm(call, SD, taps=taps)


def trained(params, ex):
    """The denoiser of an example in training."""
    return denoiser(params, None, ex.augment, ex.keys("dropout"))


def example(b=6, seed=0, sigma=None):
    rng = RNG(seed)
    x0, eps = np.tanh(rng.normal(size=(2, b, 8, 8, 1))).astype(np.float32)
    sigma = np.geomspace(0.1, 20, b).astype(np.float32) if sigma is None else sigma
    augment = np.zeros((b, 9), np.float32)
    augment[::2, 0] = 1
    return slots.Example(
        x0=jnp.asarray(x0),
        image=jnp.asarray(x0),
        label=jnp.arange(b) % 3,
        augment=jnp.asarray(augment),
        sigma=jnp.asarray(sigma),
        eps=jnp.asarray(eps),
        xt=jnp.asarray(x0 + wide(sigma) * eps),
        index=jnp.arange(b, dtype=jnp.int32),
        key=jax.random.key(3),
        noise_key=jax.random.key(4),
    )


def context(**more):
    law = types.SimpleNamespace(
        sample=lambda keys: jnp.exp(-1.2 + 1.2 * jax.vmap(jax.random.normal)(keys)),
        weight=lambda s: (jnp.square(s) + SD**2) / jnp.square(s * SD),
    )
    fields = dict(
        image_shape=(8, 8, 1),
        label_dim=3,
        batch=6,
        device_batch=6,
        devices=1,
        axis=None,
        sigma_data=SD,
        sigma_min=0.002,
        sigma_max=80.0,
        denoiser=denoiser,
        learning_rate=1e-3,
        noise=law,
        weights=lambda *_: (network(), {}, 7),
        layers=tuple(sorted(network())),
    )
    return types.SimpleNamespace(**fields | more)


def forward(params, ex):
    """(x0_hat, eps_hat) of the network in training."""
    return trained(params, ex).with_noise(ex.xt, ex.sigma, ex.label)


def predicted(ex, params=None):
    """The example as the step hands it on."""
    return ex.replace(eps_hat=forward(network() if params is None else params, ex)[1])


def owned(slot):
    """What the step hands the slot at the start of a run."""
    return slots.Own(slot.constants.make(), slot.carry.init(jax.random.key(0)))


def run(settings=None, ex=None, params=None, carry=None, target=None, **more):
    """(loss [b], metrics, gradient of the loss's mean by parameter) of the distance slot."""
    ex, slot = ex or example(), sp.training(sp.Settings(**settings or {}), context(**more))
    own = owned(slot)
    own = own if carry is None else own.replace(carry=carry)
    target = ex.x0 if target is None else target

    @jax.jit
    def loss(params, own):
        x0_hat, eps_hat = forward(params, ex)
        known = ex.replace(eps_hat=jax.lax.stop_gradient(eps_hat))
        each, metrics = slot.distance(known, x0_hat, target, None, own)
        return jnp.mean(each), (each, metrics)

    grads, (each, metrics) = jax.grad(loss, has_aux=True)(
        network() if params is None else params, own
    )
    return each, metrics, grads


PAPER = sp.PRESETS["paper"]


def test_the_teachers_decoder_plays_no_part():
    broken = network() | {"dec_block": np.full((16, 64), np.nan, np.float32)}
    plain, _, _ = run(PAPER)
    again, _, _ = run(PAPER, weights=lambda *_: (broken, {}, 7))
    np.testing.assert_array_equal(again, plain)


def test_paper_preset_is_the_loss_of_the_definition():
    ex, params = example(), network()
    loss, metrics, grads = run(PAPER)
    assert np.isfinite(loss).all() and (loss > 0).all()
    x0_hat = trained(params, ex)(ex.xt, ex.sigma, ex.label)
    sigma_next = sp.draw_sigma_next("sd_uniform", ex.keys("sp/sigma_next"), context())
    features = lambda x, s: denoiser(params, None, ex.augment).features(x, s, ex.label, at="mid")
    eps_hat = (ex.xt - x0_hat) / wide(ex.sigma)
    truth = sp.self_perceptual_loss(features, ex.x0, ex.eps, x0_hat, eps_hat, sigma_next)
    np.testing.assert_allclose(loss, truth, rtol=1e-4)
    norms = jax.tree.map(lambda g: float(jnp.linalg.norm(g)), grads)
    assert max(jax.tree.leaves(norms)) > 0
    assert (np.abs(metrics["sp/cosine"]) <= 1 + 1e-5).all()


def test_zero_weight_is_the_squared_error():
    ex, params = example(), network()
    loss, _, grads = run({"weight": 0.0})
    plain = jax.jit(lambda h: slots.squared_error(ex, h, ex.x0, context().noise.weight))
    x0_hat = jax.jit(lambda p: trained(p, ex)(ex.xt, ex.sigma, ex.label))
    np.testing.assert_allclose(loss, plain(x0_hat(params)), rtol=1e-5)
    assert np.isfinite(ravel_pytree(grads)[0]).all()


def test_stf_changes_the_squared_error_alone():
    ex = example()
    target = 0.5 * ex.x0
    _, metrics, _ = run(PAPER, target=target)
    _, plain, _ = run(PAPER)
    np.testing.assert_array_equal(metrics["loss/sp"], plain["loss/sp"])
    assert (metrics["loss/mse"] != plain["loss/mse"]).all()


def test_gate_silences_high_noise_exactly():
    high = example(sigma=np.full(6, 3.0, np.float32))
    loss, _, grads = run(PAPER | {"sigma_max": 2.3}, high)
    np.testing.assert_array_equal(loss, 0)
    np.testing.assert_array_equal(ravel_pytree(grads)[0], 0)
    loss, _, _ = run(PAPER | {"sigma_max": 2.3})
    np.testing.assert_array_equal(loss > 0, example().sigma <= 2.3)


def test_normalised_jump_divides_by_the_sine():
    ex = example()
    plain, _, _ = run(PAPER)
    normalised, _, _ = run(PAPER | {"normalize_jump": True})
    sigma_next = sp.draw_sigma_next("sd_uniform", ex.keys("sp/sigma_next"), context())
    sine = np.sin(np.arctan(ex.sigma / SD) - np.arctan(sigma_next / SD))
    np.testing.assert_allclose(normalised, plain / np.maximum(sine**2, 0.05), rtol=1e-4)


def test_the_teacher_is_in_eval_mode():
    """spec/sp.md 9.8: it never hears of dropout, while the trained network has it."""

    def quiet(params, buffers, augment):  # anything else, dropout_keys above all, is an error
        return denoiser(params, buffers, augment)

    np.testing.assert_array_equal(run(PAPER, denoiser=quiet)[0], run(PAPER)[0])


def test_remat_changes_nothing():
    plain, _, grads = run(PAPER)
    again, _, same = run(PAPER | {"remat": True})
    np.testing.assert_allclose(again, plain, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, same)


def test_another_teacher_is_noticed():
    slot = sp.training(sp.Settings(), context())
    other = jax.tree.map(lambda p: p + 1e-3, network())
    changed = sp.training(sp.Settings(), context(weights=lambda *_: (other, {}, 9)))
    first, later = owned(slot), owned(changed)
    slot.carry.check(first.carry, first.constants)
    with pytest.raises(
        ValueError,
        match="other weights at step 9 than this .*; expected .*config.sp.teacher_step=7$",
    ):
        slot.carry.check(first.carry, later.constants)
    loss, _, _ = run(PAPER, carry=later.carry)
    assert np.isnan(loss).all()
    assert np.array_equal(
        models.fingerprint({"a": np.ones(3)}), models.fingerprint({"a": np.ones(3)})
    )
    assert not np.array_equal(
        models.fingerprint({"a": np.ones(3)}), models.fingerprint({"b": np.ones(3)})
    )


def test_calibration_reaches_the_share_and_freezes():
    """The weighted SP gradient has 0.2 of the squared error's size once measured, and later steps
    change nothing.
    """
    slot = sp.training(sp.Settings(calibration=2), context())
    carry, ex, weights = (
        owned(slot).carry,
        example(sigma=np.geomspace(0.1, 2, 6).astype(np.float32)),
        [],
    )
    for _ in range(4):
        _, metrics, _ = run({"calibration": 2}, ex, carry=carry)
        weights.append(float(metrics["sp/weight"][0]))
        means = {k: jnp.mean(v) for k, v in metrics.items() if not isinstance(v, tuple)}
        carry, _ = slot.carry.update(carry, types.SimpleNamespace(metrics=means))
    assert weights[0] == 0 and weights[1] > 0 and weights[2] == weights[3] and carry["count"] == 2

    params = network()
    x0_hat = trained(params, ex)(ex.xt, ex.sigma, ex.label)
    scale = wide(ex.sigma * SD / np.sqrt(np.square(ex.sigma) + SD**2))

    def size(weight, mse_weight):
        settings = sp.Settings(auto=False, weight=weight, mse_weight=mse_weight)
        slot = sp.training(settings, context())
        known, own = predicted(ex), owned(slot)
        loss = lambda h: jnp.sum(slot.distance(known, h, ex.x0, None, own)[0])
        return float(jnp.linalg.norm(scale * jax.grad(loss)(x0_hat)))

    np.testing.assert_allclose(size(weights[1], 0.0) / size(0.0, 1.0), 0.2, rtol=1e-3)


def test_calibration_state_is_a_running_ratio():
    state = sp.calibration()
    assert sp.calibrated_weight(state, 0.2) == 0
    for mse, perceptual in ((4.0, 1.0), (0.0, 3.0), (100.0, 0.0)):
        state = sp.calibrate(state, mse, perceptual, 2)
    assert state["count"] == 2
    np.testing.assert_allclose(sp.calibrated_weight(state, 0.2), 0.2)


def test_laws_of_the_second_level():
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(20_000))
    draw = jax.jit(lambda kind: sp.draw_sigma_next(kind, keys, context()), static_argnums=0)
    logs = np.log(np.asarray(draw("sd_uniform")) / SD)
    np.testing.assert_allclose([logs.mean(), logs.std()], [0.776, 1.587], atol=0.03)
    angle = np.arctan(np.asarray(draw("angle_uniform")) / SD)
    low, high = np.arctan(0.002 / SD), np.arctan(80 / SD)
    np.testing.assert_allclose(
        np.quantile(angle, [0.25, 0.5, 0.75]),
        low + (high - low) * np.array([1, 2, 3]) / 4,
        atol=0.02,
    )
    logs = np.log(np.asarray(draw("same")))
    np.testing.assert_allclose([logs.mean(), logs.std()], [-1.2, 1.2], atol=0.03)
    for kind in sp.SIGMA_NEXT:
        assert draw(kind).min() >= 0.002 and draw(kind).max() <= 80
        np.testing.assert_allclose(
            draw(kind)[7:9], sp.draw_sigma_next(kind, keys[7:9], context()), rtol=1e-6
        )


def test_the_mean_gradient_is_the_squared_errors_direction_for_an_identity_teacher():
    """Section 3: with f = identity, E over s' of the gradient is parallel to that of EDM's loss."""
    x0, eps, x0_hat, sigma, _ = (jnp.asarray(a) for a in problem(b=1))

    def perceptual(h):
        levels = jnp.geomspace(0.01, 50.0, 40)
        each = [loss_of(scaled, x0, eps, h, sigma, s[None]) for s in levels]
        return jnp.sum(sum(each))

    g = np.ravel(jax.grad(perceptual)(x0_hat))
    truth = np.ravel(x0_hat - x0)
    np.testing.assert_allclose(g @ truth / np.linalg.norm(g) / np.linalg.norm(truth), 1, rtol=1e-5)


@pytest.mark.fast
@pytest.mark.parametrize(
    "change,message",
    [
        ({"sigma_next": "uniform"}, "config.sp.sigma_next: unknown 'uniform'"),
        ({"distance": "l1"}, "config.sp.distance"),
        ({"weight": -1.0}, "config.sp.weight: -1.0 given"),
        ({"auto": True, "mse_weight": 0.0}, "config.sp.auto"),
        ({"auto": True, "calibration": 0}, "config.sp.calibration: 0 given"),
        (
            {"tap": "emb"},
            "config.sp.tap: 'emb' given; expected mid, or blocks among augment, dec_block, enc, "
            "label",
        ),
        ({"tap": "enc,map_noise"}, "config.sp.tap: 'enc,map_noise' given"),
        ({"tap": ""}, "config.sp.tap: '' given"),
    ],
)
def test_wrong_settings_are_one_sentence(change, message):
    weights = lambda *_: (network() | {"map_noise": np.zeros(3)}, {}, 7)
    with pytest.raises(ValueError, match=message):
        sp.training(sp.Settings(**change), context(weights=weights))


def test_presets_are_whole_settings():
    assert sp.preset("pixel_edm") == dataclasses.asdict(sp.Settings())
    assert sp.preset("paper") == dataclasses.asdict(sp.Settings(**PAPER))
    assert tiny.config(name="cifar10_sp_paper").others["sp"] == sp.preset("paper")
    with pytest.raises(
        ValueError, match="config.sp.preset: unknown 'edm'; expected one of paper, pixel_edm"
    ):
        sp.preset("edm")


def test_what_the_run_tells_the_method(monkeypatch):
    """Second levels lie where the teacher was trained, and are drawn one by one even where the
    first are stratified.
    """
    told = []
    monkeypatch.setattr(
        sp, "training", lambda settings, context: told.append(context) or slots.Slots("sp")
    )
    run = tiny.build(
        "methods=('sp',)", "precondition.kind=ve", "noise.distribution=ve", "noise.stratified=true"
    )
    assert run.noise.stratified and (told[0].sigma_min, told[0].sigma_max) == (0.02, 80.0)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(4))
    for kind in sp.SIGMA_NEXT:
        assert (sp.draw_sigma_next(kind, keys, told[0]) >= 0.02).all()
    with pytest.raises(
        ValueError,
        match="config.init.workdir: '' given; expected a trained folder, .*config.sp.teach",
    ):
        told[0].weights("", "ema", None, "config.sp.teacher")


def test_devices_agree():
    """pmap over 4 devices gives the single device's losses and gradient."""
    slot = sp.training(sp.Settings(**PAPER), context())
    own, ex = owned(slot), example(b=8)
    names = ("x0", "image", "label", "augment", "sigma", "eps", "xt", "index")

    def loss(params, fields):
        part = ex.replace(**fields)
        denoise = denoiser(params, None, part.augment)
        x0_hat, eps_hat = denoise.with_noise(part.xt, part.sigma, part.label)
        part = part.replace(eps_hat=jax.lax.stop_gradient(eps_hat))
        return jnp.mean(slot.distance(part, x0_hat, part.x0, None, own)[0])

    fields = {n: getattr(ex, n) for n in names}
    cut = {n: a.reshape(4, 2, *a.shape[1:]) for n, a in fields.items()}
    whole = jax.jit(jax.value_and_grad(loss))(network(), fields)
    step = lambda p, f: jax.lax.pmean(jax.value_and_grad(loss)(p, f), "data")
    parts = jax.pmap(step, axis_name="data", in_axes=(None, 0), devices=jax.devices()[:4])(
        network(), cut
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[3], b, rtol=2e-3, atol=1e-5), parts, whole
    )


def test_any_block_can_be_the_tap():
    """Blocks by name, several at once; what lies behind the deepest of them is not computed."""
    run = tiny.build("methods=()")
    shapes, rng = jax.eval_shape(run.model.init, jax.random.key(0)), RNG(0)
    params, buffers = jax.tree.map(
        lambda s: (0.2 * rng.normal(size=s.shape)).astype(s.dtype), shapes
    )
    x, sigma = rng.normal(size=(2, 8, 8, 1)).astype(np.float32), jnp.array([0.5, 2.0])

    def features(tap):
        denoise = lambda p: run.model.denoiser(p, buffers)
        if tap is None:
            return jax.jit(lambda p: denoise(p)(x, sigma))
        return jax.jit(lambda p: denoise(p).features(x, sigma, at=tap))

    both = "enc_8x8_block0,dec_4x4_in1"
    compiled = {
        t: features(t).lower(params).compile() for t in ("enc_8x8_block0", "mid", both, None)
    }
    early, mid = compiled[both](params)
    assert early.shape == (2, 8, 8, 8)
    np.testing.assert_array_equal(mid, compiled["mid"](params))
    flops = {t: program.cost_analysis()["flops"] for t, program in compiled.items()}
    assert flops["enc_8x8_block0"] < flops["mid"] / 2 < flops[None] / 4
    with pytest.raises(
        ValueError, match="no block 'enc_3x3'; expected 'mid', 'emb' or some of .*dec_4x4_in0"
    ):
        features("dec_4x4_in1,enc_3x3")(params)
