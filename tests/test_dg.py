"""Discriminator guidance against closed forms: clock, correction, sampling, boosting,
composition.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax import models
from ogdm_jax.config import Sample
from ogdm_jax.diffusion import grids, steps
from ogdm_jax.diffusion.denoiser import Denoiser, as_denoiser
from ogdm_jax.methods import cfg, dg, dsg
from ogdm_jax.sampling import generate
from ogdm_jax.sampling.churn import Churn, Info
from ogdm_jax.sampling.sampler import SOLVERS, sample
from tests.support.oracles import Gaussian, Mixture, column

MODEL, DATA = Gaussian(-0.3, 0.5), Gaussian(0.2, 0.5)


def ratio(x, sigma, label=None, model=MODEL, data=DATA):
    return data.log_density(x, sigma) - model.log_density(x, sigma)


def bumps(weights, means, std) -> Mixture:
    """A mixture on 1x1 grey images."""
    return Mixture(weights, [std] * len(means), np.reshape(means, (-1, 1, 1, 1)))


# The clock


def test_times_of_the_table():
    sigma = jnp.asarray([0.002, 0.044688, 0.1, 0.5, 1, 10, 80])
    tau = [4.0e-5, 0.01, 0.026995, 0.144814, 0.25896, 0.676045, 0.933511]
    np.testing.assert_allclose(dg.vp_time(sigma), tau, rtol=5e-5, atol=2e-7)
    np.testing.assert_allclose(
        dg.vp_scale(dg.vp_time(sigma)), 1 / np.sqrt(1 + np.asarray(sigma) ** 2), rtol=2e-5
    )
    cosine = [0.021753, 0.202562, 0.817109, 0.989093]
    np.testing.assert_allclose(
        dg.cosine_time(jnp.asarray([0.01, 0.1, 0.5, 0.9])), cosine, rtol=1e-4
    )


@pytest.mark.fast
def test_time_and_sigma_invert_each_other_in_float32():
    sigma = jnp.logspace(-3, 2, 200, dtype=jnp.float32)
    np.testing.assert_allclose(dg.vp_sigma(dg.vp_time(sigma)), sigma, rtol=1e-5)


def test_cosine_time_has_the_same_signal_to_noise():
    with jax.enable_x64(True):
        t = jnp.linspace(0.001, 0.999, 50)
        abar = lambda t: jnp.cos((t + 0.008) / 1.008 * jnp.pi / 2) ** 2
        np.testing.assert_allclose(
            abar(dg.cosine_time(t)) / abar(0.0), dg.vp_scale(t) ** 2, rtol=1e-9, atol=1e-12
        )


@pytest.mark.fast
def test_training_levels_are_log_uniform():
    u = jax.random.uniform(jax.random.key(0), (200_000,))
    log = np.sort(np.log(np.asarray(dg.training_sigma(u), np.float64)))
    low, high = np.log(1.0005e-3), np.log(152.17)
    assert np.isfinite(log).all() and log[0] > -6.9075 and log[-1] < 5.0251
    empirical = np.arange(1, len(log) + 1) / len(log)
    distance = np.abs(empirical - (log - low) / (high - low)).max()
    assert distance * np.sqrt(len(log)) < 1.95  # Kolmogorov-Smirnov, p > 1e-3
    assert 0.99 < log.std() * np.sqrt(12) / (high - low) < 1.01


# The correction


def test_no_weight_is_the_denoiser_itself_bit_for_bit():
    latents = jax.random.normal(jax.random.key(1), (3, 2, 2, 1))
    none = dg.guide(MODEL.denoise, ratio, 0.0)
    traced = lambda w: dg.guide(MODEL.denoise, ratio, w)
    for churn in (None, 5.0):
        draw = functools.partial(sample, churn=churn, key=jax.random.key(2))
        plain, same = jax.jit(
            lambda z, d=draw: [d(f, z, grids.edm(5)) for f in (MODEL.denoise, none)]
        )(latents)
        np.testing.assert_array_equal(same, plain)
        zero = jax.jit(lambda w, draw=draw: draw(traced(w), latents, grids.edm(5)))(0.0)
        np.testing.assert_allclose(zero, plain, rtol=0, atol=2e-6)
        with (
            jax.disable_jit()
        ):  # bit for bit for a weight that is data, too (two compiled programs may round apart)
            found = [
                draw(f, latents, grids.edm(5)) for f in (MODEL.denoise, traced(jnp.float32(0.0)))
            ]
        np.testing.assert_array_equal(*found)


def test_a_blind_discriminator_changes_nothing():
    latents = jax.random.normal(jax.random.key(1), (3, 2, 2, 1))
    blind = dg.guide(MODEL.denoise, lambda x, sigma, label=None: jnp.zeros(x.shape[0]))
    with jax.disable_jit():  # as above: Heun without a corrector is another program
        guided, plain = (sample(f, latents, grids.edm(5)) for f in (blind, MODEL.denoise))
    np.testing.assert_array_equal(guided, plain)


@pytest.mark.slow_cases("1-*")
@pytest.mark.parametrize("x64, rtol, atol", [(True, 1e-12, 1e-14), (False, 1e-5, 1e-6)])
@pytest.mark.parametrize("side", [1, 2])
def test_the_exact_ratio_recovers_the_score_of_the_data(side, x64, rtol, atol):
    with jax.enable_x64(x64):
        rng = np.random.default_rng(side)
        mix = lambda: Mixture([0.3, 0.7], [0.3, 0.5], rng.normal(size=(2, 1, side, 1)))
        model, data = mix(), mix()
        sigma = jnp.asarray([0.01, 0.1, 1.0, 10.0])
        x = data.draw(jax.random.key(0), 4) + column(sigma, jnp.zeros((4, 1, side, 1))) * 0.3
        guided = dg.guide(model.denoise, functools.partial(ratio, model=model, data=data))
        np.testing.assert_allclose(guided(x, sigma), data.denoise(x, sigma), rtol=rtol, atol=atol)


def test_eps_x0_v_and_mean_forms_say_the_same():
    """Section 1.1 of the table in dg.py: with c_vp = c / m, each form is the same corrected
    denoiser.
    """
    with jax.enable_x64(True):
        check_every_form(jnp.asarray([0.3, 1.0, 5.0]))


def check_every_form(sigma):
    x = jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
    x0 = MODEL.denoise(x, sigma)
    shift, _ = dg.correction(ratio, x, sigma)
    a = 1 / column(jnp.sqrt(1 + sigma**2), x)
    b = column(sigma, x) * a
    c_vp = shift / column(sigma, x) ** 2 / a
    x_vp, corrected = a * x, x0 + shift
    eps, v = (x_vp - a * x0) / b, a * (x_vp - a * x0) / b - b * x0
    eps_new, v_new = eps - b * c_vp, v - b / a * c_vp
    same = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12)
    same((x_vp - b * eps_new) / a, corrected)
    same(x0 + b**2 / a * c_vp, corrected)
    same(a * x_vp - b * v_new, corrected)
    next_sigma = sigma / 2
    mean = lambda x0: steps.ancestral_moments(x, x0, sigma, next_sigma)
    (plain, std), (moved, _) = mean(x0), mean(corrected)
    # VE form of mean + Sigma c: the posterior std is sigma' sqrt(1 - sigma'^2 / sigma^2).
    c = shift / column(sigma, x) ** 2
    change = column(sigma**2 - next_sigma**2, x)
    same(moved - plain, change * c)
    same(column(std, x) ** 2, change * column(next_sigma / sigma, x) ** 2)


def test_the_ratio_differentiates_through_the_scaling():
    """The chain rule between the coordinates: c_ve = m c_vp."""
    logit = lambda x, t, label: jnp.sum(jnp.sin(x) * t.reshape(-1, 1, 1, 1), (1, 2, 3))
    for x64, rtol in ((False, 2e-5), (True, 1e-12)):
        with jax.enable_x64(x64):
            sigma = jnp.asarray([0.1, 1.0, 80.0])
            x = 3 * jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
            time = dg.vp_time(sigma)
            m = column(1 / jnp.sqrt(1 + sigma**2), x)
            shift, value = dg.correction(dg.log_ratio(logit), x, sigma)
            c_vp = jax.grad(lambda v, t=time: logit(v, t, None).sum())(m * x)
            np.testing.assert_allclose(shift, column(sigma, x) ** 2 * m * c_vp, rtol=rtol)
            np.testing.assert_allclose(c_vp, jnp.cos(m * x) * column(time, x), rtol=rtol)
            np.testing.assert_allclose(value, logit(m * x, time, None), rtol=rtol)


def test_derivatives_of_the_guided_denoiser_are_those_of_the_base():
    """Loss guidance differentiates through D alone; the correction moves the mean (spec/dsg.md
    6.7).
    """
    sigma = jnp.asarray([0.3, 1.0, 5.0])
    x = jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
    guided = dg.guide(MODEL.denoise, ratio, weight=2.0)
    slope = lambda denoise: jax.grad(lambda x: jnp.sum(jnp.sin(x) * denoise(x, sigma)))(x)
    moved = jnp.cos(x) * (
        guided(x, sigma) - MODEL.denoise(x, sigma)
    )  # of the factor sin(x), not of D
    assert (jnp.abs(moved) > 1e-3).any()
    np.testing.assert_allclose(slope(guided), slope(MODEL.denoise) + moved, rtol=1e-4, atol=1e-5)


def test_a_saturated_discriminator_gives_no_gradient():
    logit = lambda x, t, label: x[:, 0, 0, 0]
    sigma = jnp.full((3,), 1e-3)
    x = jnp.asarray([5.0, 11.6, -20.0])[:, None, None, None]
    shift, value = dg.correction(dg.log_ratio(logit), x, sigma)
    np.testing.assert_allclose(value, [5.0, 11.512915, -11.512915], rtol=1e-5)
    assert shift[0] != 0 and (shift[1:] == 0).all()
    assert (dg.correction(dg.log_ratio(logit, clip=0.0), x, sigma)[0] != 0).all()


def test_the_window_is_per_example_and_skips_the_network():
    calls = []

    def counted(x, sigma, label=None):
        jax.debug.callback(lambda: calls.append(1))
        return ratio(x, sigma)

    guided = dg.guide(MODEL.denoise, counted, 1.0, 0.044688, 10.0, corrector_weight=0.0)
    x, sigma = jnp.ones((3, 1, 1, 1)), jnp.asarray([0.04, 1.0, 11.0])
    away = guided(x, sigma) != MODEL.denoise(x, sigma)
    assert away[:, 0, 0, 0].tolist() == [False, True, False]
    jax.block_until_ready(
        sample(
            dg.guide(MODEL.denoise, counted, 1.0, 0.044688, corrector_weight=0.0), x, grids.edm(18)
        )
    )
    jax.effects_barrier()
    assert len(calls) == 1 + 15  # the authors' grid: the last three steps are not guided


def test_ranges_of_the_network_are_handed_on():
    denoise = Denoiser(MODEL.denoise, 0.02, 50.0, lambda sigma: jnp.round(sigma, 2))
    for guided in (dg.guide(denoise, ratio, 2.0, corrector_weight=0.0), cfg.guide(denoise, 2.0)):
        assert (guided.sigma_min, guided.sigma_max) == (0.02, 50.0)
        assert guided.round_sigma is denoise.round_sigma
    assert dg.guide(denoise, ratio, 2.0, corrector_weight=0.0).corrector is denoise


# Sampling


@pytest.fixture(scope="module")
def heun():
    """(weights, low, n, x64) -> final number of the toy of spec/dg.md 5.2: latent 0."""

    def run(w1, w2, low, n, x64=True):
        with jax.enable_x64(x64):
            go = jax.jit(
                lambda w1, w2: sample(
                    dg.guide(MODEL.denoise, ratio, w1, low, corrector_weight=w2),
                    jnp.zeros((1, 1, 1, 1)),
                    grids.edm(n),
                )
            )
            return float(go(w1, w2)[0, 0, 0, 0])

    return run


@pytest.mark.slow_cases("[12]")
@pytest.mark.parametrize("column_", range(3))
def test_published_toy_numbers(heun, column_):
    n = (18, 40, 256)[column_]
    table = {
        (0.0, 0.0): (-0.298021, -0.298107, -0.298125),
        (1.0, 1.0): (0.198681, 0.198738, 0.198750),
        (2.0, 0.0): (0.028239, 0.135201, 0.189947),
        (1.0, 0.0): (-0.134891, -0.081453, -0.054089),
        (2.0, 2.0): (0.695383, 0.695582, 0.695624),
    }
    for (w1, w2), expected in table.items():
        np.testing.assert_allclose(
            heun(w1, w2, 0.0, n), expected[column_], atol=1.5e-6, err_msg=f"{w1}, {w2}"
        )
        in_float32 = heun(w1, w2, 0.0, n, x64=False)
        np.testing.assert_allclose(
            in_float32, expected[column_], atol=1e-4, err_msg=f"float32: {w1}, {w2}"
        )
    gated = {(1.0, 1.0): (0.197306, 0.196112, 0.196684), (2.0, 0.0): (0.027435, 0.133048, 0.187933)}
    for (w1, w2), expected in gated.items():
        np.testing.assert_allclose(
            heun(w1, w2, 0.04469, n), expected[column_], atol=1.5e-6, err_msg=f"{w1}, {w2}"
        )


def test_a_misspecified_mixture_recovers_the_data():
    data, model = bumps([0.5, 0.5], [-1, 1], 0.2), bumps([0.8, 0.2], [-0.9, 1.1], 0.25)
    exact = functools.partial(ratio, model=model, data=data)
    n = 20_000
    latents = jax.random.normal(jax.random.key(0), (n, 1, 1, 1))
    real = np.sort(np.asarray(data.draw(jax.random.key(1), n)).ravel())

    @jax.jit
    def draw(w1, w2):
        return sample(
            dg.guide(model.denoise, exact, w1, corrector_weight=w2), latents, grids.edm(18)
        )

    found = {w: np.sort(np.asarray(draw(*w)).ravel()) for w in ((0.0, 0.0), (1.0, 1.0), (2.0, 0.0))}
    w1 = {w: np.abs(x - real).mean() for w, x in found.items()}
    right = {w: (x > 0).mean() for w, x in found.items()}
    assert 0.45 < w1[0.0, 0.0] < 0.6 and w1[1.0, 1.0] < 0.05 and 0.10 < w1[2.0, 0.0] < 0.25, w1
    np.testing.assert_allclose([right[w] for w in found], [0.199, 0.494, 0.408], atol=0.02)
    assert draw._cache_size() == 1  # weights are data


@pytest.mark.parametrize("solver", ["euler", "ddim", "ancestral", "spndm", "fpndm", "dpmpp_2m"])
def test_every_solver_is_guided(solver):
    latents = jax.random.normal(jax.random.key(3), (256, 1, 1, 1))
    guided = dg.guide(MODEL.denoise, ratio)
    x = sample(guided, latents, grids.edm(40), solver=solver, key=jax.random.key(4))
    same = sample(DATA.denoise, latents, grids.edm(40), solver=solver, key=jax.random.key(4))
    np.testing.assert_allclose(x, same, rtol=0, atol=5e-4)  # float32, sigma^2 c of up to 6,400


# Boosting


def info(step: int, n: int = 10, batch: int = 3) -> Info:
    return Info(jnp.asarray(step), n, jnp.full((batch,), 1.0), jnp.full((batch,), 0.5), None)


def test_boosting_touches_only_images_below_zero():
    rule = dg.Boost(base=Churn(1.0, S_noise=1.003))
    carry = jnp.asarray([-1.0, 1.0, np.inf])
    gamma, scale = rule.amounts(carry, info(5))
    np.testing.assert_allclose(gamma, [0.4, 0.1, 0.1], rtol=1e-6)
    np.testing.assert_allclose(scale, [1.0, 1.003, 1.003], rtol=1e-6)
    np.testing.assert_allclose(rule.amounts(carry, info(4))[0], 0.1, rtol=1e-6)
    np.testing.assert_allclose(rule.amounts(rule.init(3), info(0))[0], 0.1, rtol=1e-6)
    np.testing.assert_allclose(
        dataclasses.replace(rule, churn=0.0).amounts(carry, info(5))[0], 0.1, rtol=1e-6
    )

    guided = dg.guide(MODEL.denoise, ratio, 1.0)
    x, sigma = jnp.asarray([-2.0, 2.0, -1.0])[:, None, None, None], jnp.ones((3,))
    x0, shift, value = guided.evaluate.parts(x, sigma)
    for step, factors in ((2, [2.0, 1.0, 2.0]), (3, [1.0, 1.0, 1.0])):
        out, carry = rule.evaluate(guided, rule.init(3), x, sigma, None, info(step))
        np.testing.assert_allclose(out, x0 + column(np.array(factors), x) * shift, rtol=1e-6)
        np.testing.assert_array_equal(carry, value)


def test_boosting_goes_by_the_discriminator_that_was_given_it():
    """With another one, in whatever order: it went by the last."""
    never = lambda x, sigma, label=None: 5 + 0 * jnp.sum(x, axis=(1, 2, 3))
    always = lambda x, sigma, label=None: -5 + 0 * jnp.sum(x, axis=(1, 2, 3))
    boosted, other = dg.guidance(always, boost=dg.Boost()), dg.guidance(never)
    z = jax.random.normal(jax.random.key(0), (4, 1, 1, 1))
    draw = lambda *guidance: sample(
        MODEL.denoise, z, grids.edm(6), "heun", jax.random.key(1), guidance=guidance
    )
    alone = draw(boosted)
    assert np.abs(alone - draw(other)).max() > 1e-3
    for both in ((boosted, other), (other, boosted)):
        np.testing.assert_allclose(draw(*both), alone, atol=1e-5)


def test_boosting_needs_a_guided_denoiser():
    with pytest.raises(ValueError, match="expected dg.guide as its outermost decorator"):
        draw = functools.partial(sample, churn=dg.Boost(), key=jax.random.key(0))
        jax.eval_shape(lambda z: draw(MODEL.denoise, z, grids.edm(3)), jnp.zeros((1, 1, 1, 1)))


@pytest.mark.fast
def test_wrong_arguments_are_one_sentence():
    for call, words in (
        (lambda: dg.guide(MODEL.denoise, ratio, 1.0, 2.0, 1.0), "sigma_min <= sigma_max"),
        (lambda: dg.guide(MODEL.denoise, ratio, gating="row"), "expected 'example' or 'batch'"),
        (lambda: dg.log_ratio(ratio, clock="sine"), "expected one of vp, cosine"),
        (lambda: dg.log_ratio(ratio, clip=0.7), "clip=0.7"),
        (lambda: dg.guidance(ratio, sigma_min=2.0, sigma_max=1.0), "sigma_min <= sigma_max"),
        (lambda: cfg.guide(MODEL.denoise, 2.0, 2.0, 1.0), "sigma_min <= sigma_max"),
        (
            lambda: cfg.guide(MODEL.denoise, 2.0)(jnp.zeros((1, 1, 1, 1)), jnp.ones(1)),
            "expects labels",
        ),
    ):
        with pytest.raises(ValueError, match=words) as error:
            call()
        assert "\n" not in str(error.value)


# Composition


MEANS = np.array([-0.8, 0.6], np.float32)


def by_class(x, sigma, label=None):
    """Gaussian data of two classes; label -1 is told a third mean."""
    mean = jnp.where(label < 0, 0.1, jnp.asarray(MEANS)[jnp.maximum(label, 0)])
    s2 = column(sigma, x) ** 2
    return (0.25 * x + s2 * column(mean, x)) / (0.25 + s2)


def test_classifier_free_guidance_in_an_interval():
    x, label = jnp.ones((3, 2, 2, 1)), jnp.asarray([0, 1, -1])
    sigma = jnp.asarray([1.0, 5.0, 1.0])
    guided = cfg.guide(by_class, 3.0, 0.5, 2.0)(x, sigma, label)
    with_class, without = by_class(x, sigma, label), by_class(x, sigma, jnp.full((3,), -1))
    expected = jnp.where(column(sigma, x) == 5.0, with_class, without + 3 * (with_class - without))
    np.testing.assert_allclose(guided, expected, rtol=1e-6)
    assert cfg.guide(by_class, 1.0) == as_denoiser(by_class)
    np.testing.assert_allclose(
        cfg.guide(by_class, 3.0, 6.0, 7.0)(x, sigma, label), with_class, rtol=1e-6
    )


def test_dg_adds_to_classifier_free_guidance():
    x, label, sigma = jnp.ones((2, 2, 2, 1)), jnp.asarray([0, 1]), jnp.asarray([0.5, 2.0])

    def by_label(x, sigma, label):
        return jnp.sum(x, (1, 2, 3)) * (1.0 + label)

    both = dg.guide(cfg.guide(by_class, 2.0), by_label, 0.5)(x, sigma, label)
    shift = 0.5 * column(sigma**2 * (1 + label), x)
    np.testing.assert_allclose(both, cfg.guide(by_class, 2.0)(x, sigma, label) + shift, rtol=1e-6)


@pytest.mark.parametrize("corrector_weight", [None, 0.0, 0.4])
def test_both_orders_of_composition_say_the_same(corrector_weight):
    """The ratio knows no label: then guidance of the labels and the correction add up, whichever is
    outermost.
    """
    by_ratio = functools.partial(
        dg.guide, log_ratio=ratio, weight=0.5, corrector_weight=corrector_weight
    )
    outside, inside = by_ratio(cfg.guide(by_class, 3.0)), cfg.guide(by_ratio(by_class), 3.0)
    z, label, sigma = (
        jax.random.normal(jax.random.key(0), (2, 2, 2, 1)),
        jnp.asarray([0, 1]),
        jnp.asarray([0.5, 2.0]),
    )
    np.testing.assert_allclose(
        inside(z, sigma, label), outside(z, sigma, label), rtol=1e-5, atol=1e-6
    )
    for solver in ("heun", "euler"):  # heun asks the corrector as well
        draw = lambda f, solver=solver: sample(f, z, grids.edm(6), solver, label=label)
        np.testing.assert_allclose(draw(inside), draw(outside), rtol=1e-4, atol=1e-4)


@dataclasses.dataclass(frozen=True)
class Toy(models.Model):
    """A model of two classes without a network."""

    def denoiser(self, params, buffers=None):
        return by_class


SETTINGS = Sample(solver="heun", steps=6, num=8)


def methods(weight: float, boost: bool = False):
    def ratio_of(network):
        return lambda x, sigma, label: network["slope"] * jnp.sum(x, (1, 2, 3)) * (1.0 + label)

    low = float(dg.vp_sigma(np.float64(0.01)))
    params = {"slope": np.float32(-0.1)}
    churn = dg.Boost() if boost else None
    return dg.guidance(
        ratio_of, weight, low, float(dg.vp_sigma(1.0)), 0.5, params=params, boost=churn
    ), cfg.guidance(1.5)


@pytest.mark.parametrize("boost", [False, True])
def test_devices_agree_and_other_weights_compile_nothing(boost):
    seeds, labels = np.arange(8), np.arange(8) % 2
    images = {
        n: generate.sampler(
            Toy(None, None, (2, 2, 1), 2), SETTINGS, jax.devices()[:n], guidance=methods(1.0, boost)
        )
        for n in (1, 4)
    }
    draw = lambda n, w: np.concatenate(
        list(generate.generate(images[n], {}, {}, seeds, labels, 8, methods(w, boost)))
    )
    np.testing.assert_allclose(draw(4, 1.0), draw(1, 1.0), rtol=1e-5)
    assert np.abs(draw(1, 3.0) - draw(1, 1.0)).max() > 1e-3
    assert images[1]._cache_size() == 1


def test_dg_and_dsg_run_in_one_scan():
    """Another weight and other noise are not traced again, the number of traces does not depend on
    the number of steps, and four devices give what one gives."""
    traces = []
    latents, keys = (
        jax.random.normal(jax.random.key(0), (4, 2, 2, 1)),
        jax.random.split(jax.random.key(1), 4),
    )
    guidance = dsg.guidance(lambda x0: jnp.sum((x0 - 0.7) ** 2, (1, 2, 3)), rate=0.2)

    def counted(x, sigma, label=None):
        traces.append(1)
        return MODEL.denoise(x, sigma)

    def images(w, z, keys, n=12):
        guided = dg.guide(counted, ratio, w)
        return sample(guided, z, grids.edm(n), solver="ancestral", key=keys, guidance=guidance)

    def compiled(devices):
        mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:devices]), ("images",))
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("images"))
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        return jax.jit(images, in_shardings=(whole, rows, rows), out_shardings=rows)

    draw = compiled(1)
    both = draw(1.0, latents, keys)
    once = len(traces)
    alone, other = draw(0.0, latents, keys), draw(1.0, latents + 1, keys)
    assert len(traces) == once and draw._cache_size() == 1
    jax.eval_shape(functools.partial(images, n=24), 1.0, latents, keys)
    assert len(traces) == 2 * once
    near = lambda x: np.abs(np.asarray(x) - 0.7).mean()
    plain = sample(MODEL.denoise, latents, grids.edm(12), solver="ancestral", key=keys)
    assert np.isfinite(both).all() and near(both) < near(plain)
    assert np.abs(both - alone).max() > 1e-3 and np.abs(both - other).max() > 1e-3
    np.testing.assert_allclose(compiled(4)(1.0, latents, keys), both, rtol=0, atol=2e-5)


def test_the_second_weight_is_heuns_alone():
    """S-PNDM's first step evaluates twice, too: with the default weights (1, 0) it was half guided."""
    draw = lambda second: sample(
        MODEL.denoise,
        jnp.zeros((1, 1, 1, 1)),
        grids.edm(3),
        "spndm",
        guidance=dg.guidance(ratio, 1.0, corrector_weight=second),
    )
    np.testing.assert_allclose(draw(0.0), draw(None), rtol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_default_weight_follows_the_solver(solver):
    """A model whose mean is .5 off, a discriminator that knows: the corrected mean is the data's.

    The authors' weight 2 is for Heun's two slopes, of which one is guided; with the others it gave
    .68 in place of .2.
    """
    data, model = Gaussian(0.2, 0.5), Gaussian(-0.3, 0.5)

    def ratio(x, sigma, label=None):
        return data.log_density(x, sigma) - model.log_density(x, sigma)

    weight = dg.default_weight(solver)
    guidance = dg.guidance(ratio, weight, corrector_weight=0.0)
    z = jax.random.normal(jax.random.key(0), (256, 4, 4, 1))
    run = jax.jit(
        lambda z: sample(
            model.denoise, z, grids.edm(60), solver, key=jax.random.key(1), guidance=guidance
        )
    )
    assert abs(float(run(z).mean()) - 0.2) < 0.08
    assert dg.default_weight("heun", 1.0) == 1.0 and dg.default_weight("euler", 1.0) == 1.0
    alike = dg.weight_under(weight, 0.0, solver, "heun"), dg.weight_under(2.0, 0.0, "heun", solver)
    assert alike == (2.0, weight)
