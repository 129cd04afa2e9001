"""Spherical Gaussian guidance: the step's geometry, its place in every stochastic solver, and its
law on a Gaussian.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax.diffusion import grids, steps
from ogdm_jax.inverse import operators
from ogdm_jax.methods import ddnm, diffpir, dps, dsg, freedom, mpgd
from ogdm_jax.sampling.churn import Info
from ogdm_jax.sampling.guidance import Guidance, plain_step
from ogdm_jax.sampling.sampler import sample
from ogdm_jax.sampling.schedule import Schedule, scheduled
from tests.support.guidance_cases import (
    DATA,
    LATENTS,
    LOSS,
    MASK,
    SHAPE,
    Y,
    evaluate_at,
    info_at,
    norms,
    transition_at,
)
from tests.support.oracles import Gaussian

ROOT_N = np.sqrt(32)
STD = np.array([0.3, 1.0, 7.0], np.float32)
step = jax.jit(dsg.spherical_step)


def draws(seed: int = 0, shape=SHAPE):
    return [jax.random.normal(k, shape) for k in jax.random.split(jax.random.key(seed), 3)]


@pytest.mark.fast
class TestStep:
    @pytest.mark.parametrize("rate", [0.0, 0.05, 0.2, 0.5, 1.0])
    def test_it_lands_on_the_sphere(self, rate):
        mean, eps, grad = draws()
        x = step(mean, STD, eps, grad, rate)
        np.testing.assert_allclose(norms(x - mean), ROOT_N * STD, rtol=1e-5)
        d = (1 - rate) * eps - rate * ROOT_N * grad / norms(grad)[:, None, None, None]
        want = ROOT_N * STD[:, None, None, None] * d / norms(d)[:, None, None, None]
        np.testing.assert_allclose(x - mean, want, atol=2e-5)
        if rate == 1:
            straight = (
                mean - ROOT_N * STD[:, None, None, None] * grad / norms(grad)[:, None, None, None]
            )
            np.testing.assert_allclose(x, straight, rtol=1e-6, atol=4e-6)
        with (
            jax.disable_jit()
        ):  # an image does not see the others: bit for bit where the same operations run
            whole = dsg.spherical_step(mean, STD, eps, grad, rate)
            for i in range(3):
                one = dsg.spherical_step(*(v[i : i + 1] for v in (mean, STD, eps, grad)), rate)
                np.testing.assert_array_equal(one[0], whole[i])

    def test_rate_0_is_the_noise_projected_on_the_sphere(self):
        mean, eps, grad = draws(1, (2, 64, 64, 3))
        x = step(mean, 0.5, eps, grad, 0.0)
        gap = norms(x - (mean + 0.5 * eps)) / norms(0.5 * eps)
        np.testing.assert_allclose(gap, abs(1 - np.sqrt(12288) / norms(eps)), atol=1e-5)
        assert gap.max() < 4 / np.sqrt(2 * 12288)

    @pytest.mark.parametrize("factor", [1e-30, 1e-20, 1.0, 1e20, 1e25])
    def test_only_the_gradients_direction_counts(self, factor):
        mean, eps, grad = draws(2)
        np.testing.assert_allclose(
            step(mean, STD, eps, factor * grad, 0.3),
            step(mean, STD, eps, grad, 0.3),
            rtol=0,
            atol=4e-6,
        )

    def test_rotations_turn_the_step(self):
        mean, eps, grad = draws(3)
        q = jnp.linalg.qr(jax.random.normal(jax.random.key(9), (32, 32)))[0]
        turn = lambda v: (v.reshape(3, -1) @ q).reshape(v.shape)
        turned = step(turn(mean), STD, turn(eps), turn(grad), 0.2)
        np.testing.assert_allclose(turned, turn(step(mean, STD, eps, grad, 0.2)), atol=2e-5)

    def test_cosine_law_and_its_inverse(self):
        mean, eps, grad = draws(4, (1, 256, 256, 3))
        for rate, published in (
            (0.05, 0.0526),
            (0.1, 0.1104),
            (0.2, 0.2425),
            (0.3, 0.3939),
            (0.5, 0.7071),
            (1, 1),
        ):
            move = step(mean, 1.0, eps, grad, float(rate)) - mean
            cosine = -float(jnp.vdot(move, grad)) / (norms(move)[0] * norms(grad)[0])
            assert abs(cosine - published) < 0.005
            np.testing.assert_allclose(
                dsg.rate_of_cosine(rate / np.hypot(rate, 1 - rate)), rate, rtol=1e-6
            )

    def test_degenerate_inputs_stay_finite_and_a_broken_gradient_is_seen(self):
        mean, eps, grad = draws(5)
        zero = jnp.zeros(SHAPE)
        for rate in (0.0, 0.3, 1.0):
            projected = step(mean, STD, eps, zero, rate)
            np.testing.assert_allclose(projected, step(mean, STD, eps, grad, 0.0), atol=1e-5)
            np.testing.assert_array_equal(step(mean, STD, zero, zero, rate), mean)
            np.testing.assert_array_equal(step(mean, jnp.zeros(3), eps, grad, rate), mean)
            for broken in (jnp.nan, jnp.inf):
                for at in (1, (1, 0, 0, 0)):
                    x = step(mean, STD, eps, grad.at[at].set(broken), rate)
                    assert jnp.isnan(x[1]).all() and jnp.isfinite(x[0]).all()
        one = step(mean[:1], 0.5, zero[:1], grad[:1], 0.3)  # no noise: straight down
        np.testing.assert_allclose(
            one, mean[:1] - ROOT_N * 0.5 * grad[:1] / norms(grad[:1])[0], atol=1e-5
        )
        slopes = jax.grad(lambda m, s, e, g: step(m, s, e, g, 0.3).sum(), argnums=(0, 1, 2, 3))(
            mean, STD, eps, zero
        )
        assert all(jnp.isfinite(v).all() for v in slopes)
        for dtype in (jnp.bfloat16, jnp.float16):
            x = step(*(v.astype(dtype) for v in (mean, STD, eps, 1e-4 * grad)), 0.2)
            assert x.dtype == dtype and jnp.isfinite(x).all()
            np.testing.assert_allclose(norms(x - mean.astype(dtype)), ROOT_N * STD, rtol=0.02)

    def test_a_learned_variance_keeps_the_radius_of_its_squares(self):
        mean, eps, grad = draws(6)
        spread = jnp.exp(0.3 * draws(7)[0])
        x = step(mean, spread, eps, grad, 0.2)
        np.testing.assert_allclose(norms(x - mean), norms(spread), rtol=1e-5)
        np.testing.assert_allclose(
            step(mean, jnp.full(SHAPE, 0.4), eps, grad, 0.2),
            step(mean, 0.4, eps, grad, 0.2),
            atol=1e-5,
        )

    def test_dps_step(self):
        mean, eps, grad = draws(8)
        want = mean + STD[:, None, None, None] * eps - 0.3 * grad
        np.testing.assert_allclose(dps.dps_step(mean, STD, eps, grad, 0.3), want, atol=1e-6)

    def test_bad_rates_are_refused(self):
        mean, eps, grad = draws()
        with pytest.raises(ValueError, match="rate=1.5; expected a number from 0 to 1"):
            dsg.spherical_step(mean, STD, eps, grad, 1.5)


GRID = grids.edm(5, 0.02, 20.0)


def run(guidance=(), denoise=DATA.denoise, solver="ddim", grid=GRID, **settings):
    settings = {"eta": 1.0} | settings if solver in ("ddim", "heun") else settings
    call = lambda z, key: sample(denoise, z, grid, solver, key=key, guidance=guidance, **settings)
    return jax.jit(call)(LATENTS, jax.random.key(7))


def residual(x):
    return float(jnp.sqrt(jnp.mean(LOSS(x)) / (MASK.sum() * 2)))


class TestKick:
    @pytest.mark.parametrize(
        "settings",
        [
            {"solver": "ddim"},
            {"solver": "ddim", "eta": 0.6},
            {"solver": "ancestral"},
            {"solver": "ancestral", "variance": "large"},
            {"solver": "ancestral", "variance": 0.5},
            {"solver": "heun"},
            {"solver": "heun", "eta": 0.0, "churn": {"S_churn": 4.0}},
            {"solver": "euler", "churn": {"S_churn": 4.0}},
        ],
        ids=str,
    )
    def test_every_stochastic_solver_is_guided(self, settings):
        x, path = run(dsg.guidance(LOSS, 0.4), trajectory=True, **settings)
        plain, plain_path = run(trajectory=True, **settings)
        assert residual(x) < 0.8 * residual(plain) and jnp.isfinite(x).all()
        if "churn" in settings:
            return
        for i in range(
            5
        ):  # every state lies on the sphere around the mean of the solver's own transition
            sigma, below = (jnp.full(3, GRID[j], jnp.float32) for j in (i, i + 1))
            state, x0 = path.states[i], path.x0_hats[i]
            if settings["solver"] == "heun" and i < 4:
                mean, std = steps.heun_moments(DATA.denoise, state, x0, sigma, below)
            elif settings["solver"] == "ancestral":
                mean, std = steps.ancestral_moments(
                    state, x0, sigma, below, settings.get("variance", "small")
                )
            else:
                mean, std = steps.ddim_moments(state, x0, sigma, below, settings.get("eta", 1.0))
            np.testing.assert_allclose(
                norms(path.states[i + 1] - mean), ROOT_N * std, rtol=1e-3, atol=2e-5
            )
        np.testing.assert_allclose(
            x, path.x0_hats[-1], atol=1e-5
        )  # the last step has no noise: nothing to guide

    @pytest.mark.parametrize(
        "settings", [{"solver": "euler"}, {"solver": "heun", "eta": 0.0}, {"solver": "dpmpp_2m"}]
    )
    def test_deterministic_solvers_are_refused(self, settings):
        with pytest.raises(
            ValueError, match="deterministic step has no noise .* expected solver='ancestral', or"
        ):
            run(dsg.guidance(LOSS), **settings)

    def test_increasing_functions_of_the_loss_change_no_step(self):
        at, eps = info_at(1, 6), draws(9)[1]

        @functools.partial(jax.jit, static_argnums=0)
        def one(loss, *args):
            rule = dsg.guidance(loss, 0.3).transition
            return rule(evaluate_at(at), transition_at(at), *args, at)[0]

        want = one(LOSS, LATENTS, eps)
        for other in (
            operators.measurement_loss(operators.inpaint(MASK), Y, squared=False),
            lambda x0: 1e-20 * LOSS(x0),
            lambda x0: 1e20 * LOSS(x0),
            lambda x0: LOSS(x0) ** 2 + 3,
            lambda x0: jnp.exp(LOSS(x0) / 2),
            lambda x0: jnp.log(LOSS(x0)),
            lambda x0: jnp.arctan(LOSS(x0)),
        ):
            np.testing.assert_allclose(one(other, LATENTS, eps), want, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("squared", [True, False])
    @pytest.mark.parametrize("rate", [0.3, 1.0])
    def test_a_residual_of_exactly_0_leaves_the_projected_noise(self, squared, rate):
        at, eps = info_at(1, 6), draws(9)[1]
        with jax.disable_jit():  # so that y is what the guidance sees, bit for bit
            x0 = evaluate_at(at)(LATENTS)
            y = operators.inpaint(MASK).forward(x0)
            loss = operators.measurement_loss(operators.inpaint(MASK), y, squared)
            assert (loss(x0) == 0).all()
            rule = dsg.guidance(loss, rate).transition
            x, _ = rule(evaluate_at(at), transition_at(at), LATENTS, eps, at)
        mean, std = transition_at(at)(x0, LATENTS)
        want = mean + ROOT_N * steps.per_example(std, x) * eps / norms(eps)[:, None, None, None]
        np.testing.assert_allclose(x, want, atol=1e-5)

    def test_increasing_functions_of_the_loss_change_nothing(self):
        want = run(dsg.guidance(LOSS))
        for other in (
            operators.measurement_loss(operators.inpaint(MASK), Y, squared=False),
            lambda x0: 1e-12 * LOSS(x0) + 3,
            lambda x0: jnp.exp(LOSS(x0) / 50),
        ):
            np.testing.assert_allclose(run(dsg.guidance(other)), want, rtol=0, atol=1e-4)

    def test_images_do_not_see_each_other(self):
        whole = run(dsg.guidance(LOSS))
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(7), jnp.arange(3))
        alone = operators.measurement_loss(operators.inpaint(MASK), Y[1:2])
        x = sample(
            DATA.denoise,
            LATENTS[1:2],
            GRID,
            "ddim",
            key=keys[1:2],
            guidance=dsg.guidance(alone),
            eta=1.0,
        )
        np.testing.assert_allclose(x[0], whole[1], atol=2e-5)

    def test_guided_steps_are_counted_back_from_the_last_and_the_others_are_plain(self):
        """Bit for bit: without jit both routes run the same operations (two compiled programs may
        round apart).
        """

        def is_plain(guidance, at):
            args = (evaluate_at(at), transition_at(at), LATENTS, Y, at)
            with jax.disable_jit():
                return np.array_equal(guidance.transition(*args)[0], plain_step(*args)[0])

        every_third = dsg.guidance(LOSS, 0.5, interval=3)
        assert [is_plain(every_third, info_at(i, 6)) for i in range(6)] == [
            True,
            True,
            False,
            True,
            True,
            False,
        ]
        windowed = dsg.guidance(LOSS, 0.5, window=(0.3, 0.7))
        assert [is_plain(windowed, info_at(i, 6, sigma)) for i, sigma in ((0, 1.0), (1, 0.5))] == [
            True,
            False,
        ]

    @pytest.mark.parametrize("make", [dsg.guidance, dps.guidance])
    def test_unguided_steps_are_clipped_as_the_guided_ones(self, make):
        at, eps, far = info_at(0, 6), draws(9)[1], 8 * LATENTS
        x0_hat = np.clip(evaluate_at(at)(far), -1, 1)
        mean, std = transition_at(at)(x0_hat, far)
        guidance = make(LOSS, 0.5, interval=3, clip_mean=True)
        assert (
            np.abs(
                plain_step(evaluate_at(at), transition_at(at), far, eps, at)[0]
                - mean
                - std[0] * eps
            ).max()
            > 0.1
        )
        np.testing.assert_allclose(
            guidance.transition(evaluate_at(at), transition_at(at), far, eps, at)[0],
            mean + std[0] * eps,
            atol=1e-5,
        )

    @pytest.mark.parametrize("settings", [{"interval": 2}, {"window": (0.5, 4.0)}], ids=str)
    @pytest.mark.parametrize("solver", ["ddim", "heun", "ancestral"])
    def test_unguided_steps_of_a_whole_run_are_those_of_the_base_sampler(self, solver, settings):
        """Bit for bit: from each state of the guided run, the plain sampler's step wherever the
        guidance does not act.
        """
        noise = jax.random.normal(jax.random.key(8), (5, *SHAPE))
        eta = {} if solver == "ancestral" else {"eta": 1.0}

        def at_each(rule, states):
            """The state after each step, every step taken from the given state."""

            def placed(evaluate, transition, x, eps, info):
                return rule(evaluate, transition, states[int(info.step)], eps, info)

            found = sample(
                DATA.denoise,
                LATENTS,
                GRID,
                solver,
                guidance=Guidance("placed", transition=placed),
                trajectory=True,
                noise_fn=lambda i: noise[i],
                **eta,
            )
            return found[1].states

        guidance = dsg.guidance(LOSS, 0.5, **settings)
        with jax.disable_jit():
            _, path = sample(
                DATA.denoise,
                LATENTS,
                GRID,
                solver,
                guidance=guidance,
                trajectory=True,
                noise_fn=lambda i: noise[i],
                **eta,
            )
            plain = at_each(plain_step, path.states)
        same = [np.array_equal(a, b) for a, b in zip(path.states[1:], plain[1:], strict=True)]
        if "window" in settings:
            acts = [0.5 <= sigma <= 4.0 for sigma in GRID[:-1]]
        else:
            acts = [True, False, True, False, False]  # the last step is due, but has no noise
        assert same == [not a for a in acts] and 0 < sum(acts) < 4

    def test_an_interval_that_leaves_only_the_last_step_needs_churn(self):
        guidance = dsg.guidance(LOSS, 0.5, interval=6)
        at = info_at(5, 6)
        rule, eps = guidance.transition, draws(9)[1]
        call = lambda at: rule(evaluate_at(at), transition_at(at), LATENTS, eps, at)[0]
        with pytest.raises(
            ValueError,
            match="dsg.interval: 6 given for 6 steps, which leaves only the last one, without noise",
        ):
            call(at)
        plain = plain_step(evaluate_at(at), transition_at(at), LATENTS, draws(9)[1], at)[0]
        assert (
            np.abs(call(at._replace(churned=True)) - plain).max() > 0.1
        )  # churn adds noise before the last step too

    @pytest.mark.parametrize("interval, guided", [(1, 7), (4, 1)])
    def test_one_trace_and_gradients_on_guided_steps_only(self, interval, guided):
        traces, forward, backward = [], [], []

        @jax.custom_vjp
        def count(x):
            jax.debug.callback(lambda: forward.append(1))
            return x

        def pull(_, g):
            jax.debug.callback(lambda: backward.append(1))
            return (g,)

        count.defvjp(lambda x: (count(x), None), pull)

        def denoise(x, sigma, label=None):
            traces.append(1)
            return DATA.denoise(count(x), sigma)

        guidance = dsg.guidance(LOSS, interval=interval)
        compiled = jax.jit(
            lambda z: sample(
                denoise, z, grids.edm(8), "ddim", key=jax.random.key(0), guidance=guidance, eta=1.0
            )
        )
        jax.block_until_ready(compiled(LATENTS))
        traced = len(traces)
        jax.block_until_ready(compiled(LATENTS + 1))
        jax.effects_barrier()
        # The last step is due, but has no noise to guide and takes no gradient: of steps 3 and 7, 3
        # is left.
        assert len(traces) == traced <= 4 and len(forward) == 2 * 8 and len(backward) == 2 * guided

    def test_without_backward_pass(self):
        @jax.custom_vjp
        def closed(x):
            return x

        closed.defvjp(lambda x: (x, None), lambda _, g: 1 / 0)

        def denoise(x, sigma, label=None):
            return DATA.denoise(closed(x), sigma)

        for guidance in (dsg.guidance(LOSS, 0.4, backward=False), mpgd.guidance(LOSS, 0.25)):
            assert residual(run(guidance, denoise)) < 0.8 * residual(run())
        # This denoiser scales all numbers alike, so that both gradients have one direction.
        cheap = run(dsg.guidance(LOSS, 0.4, backward=False), denoise)
        np.testing.assert_allclose(cheap, run(dsg.guidance(LOSS, 0.4)), atol=1e-4)

    def test_stop_leaves_explained_images_alone(self):
        at = info_at(1, 6)
        threshold = float(jnp.median(LOSS(evaluate_at(at)(LATENTS))))
        guidance = dsg.guidance(LOSS, 0.5, stop=threshold)
        with jax.disable_jit():  # bit for bit, as above
            got = guidance.transition(evaluate_at(at), transition_at(at), LATENTS, Y, at)[0]
            free = plain_step(evaluate_at(at), transition_at(at), LATENTS, Y, at)[0]
        same = [np.array_equal(a, b) for a, b in zip(got, free, strict=True)]
        assert (
            same == (LOSS(evaluate_at(at)(LATENTS)) <= threshold).tolist()
            and any(same)
            and not all(same)
        )

    def test_time_travel_repeats_from_the_steps_level(self):
        """Of plain steps it changes nothing in distribution: a Gaussian keeps its marginal at the
        next level.
        """
        travelling = scheduled(plain_step, Schedule(repeats=3))
        keys = jax.random.split(jax.random.key(0), 4000)
        info = Info(jnp.int32(1), 6, jnp.full(4000, 1.0), jnp.full(4000, 0.6), keys)
        data = Gaussian(0.0, 0.5)

        @jax.jit
        def states(key):
            x = jnp.sqrt(0.25 + 1.0) * jax.random.normal(key, (4000, 2, 2, 1))
            eps = jax.random.normal(jax.random.fold_in(key, 1), x.shape)
            return [
                k(lambda x: data.denoise(x, info.sigma), transition_at(info), x, eps, info)[0]
                for k in (plain_step, travelling)
            ]

        once, thrice = states(jax.random.key(3))
        np.testing.assert_allclose(
            thrice.std(), once.std(), rtol=0.06
        )  # both lose some variance in a coarse step
        assert abs(np.corrcoef(once.ravel(), thrice.ravel())[0, 1]) < 0.5
        levels = []

        def spy(evaluate, transition, x, noise, info):
            levels.append(x)
            return plain_step(evaluate, transition, x, noise, info)

        at = info_at(1, 6)
        with jax.disable_jit():
            rule = scheduled(spy, Schedule(repeats=3))
            x, _ = rule(evaluate_at(at), transition_at(at), LATENTS, Y, at)
        assert len(levels) == 3 and not np.array_equal(levels[1], levels[2])
        with pytest.raises(
            ValueError, match="key=None; expected a key, because time travel draws noise"
        ):
            scheduled(spy, Schedule(repeats=2))(
                evaluate_at(at), transition_at(at), LATENTS, Y, at._replace(key=None)
            )

    def test_strength_is_the_rate_of_the_step_count_law(self):
        np.testing.assert_allclose(
            dsg.rate_of_strength(1.08, 20), 0.2, atol=0.002
        )  # published rows
        np.testing.assert_allclose(dsg.rate_of_strength(0.55, 100, 2), 0.1, atol=0.002)
        assert dsg.rate_of_strength(100.0, 4) == 1.0
        rate = dsg.rate_of_strength(1.0, 5)
        np.testing.assert_allclose(
            run(dsg.guidance(LOSS, strength=1.0)), run(dsg.guidance(LOSS, rate)), atol=1e-6
        )

    def test_churn_outside_its_window_is_untouched_and_costs_nothing(self):
        churn = {"S_churn": 4.0, "S_min": 30.0, "S_max": 40.0}
        with jax.disable_jit():  # bit for bit, as above
            guided = run(dsg.guidance(LOSS, 0.5), solver="heun", eta=0.0, churn=churn)
            plain = run(solver="heun", eta=0.0, churn=churn)
        np.testing.assert_array_equal(guided, plain)

    @pytest.mark.parametrize("method", ["dps", "dsg", "mpgd"])
    def test_churn_of_one_image_leaves_the_others_alone(self, method):
        """Boosting churns some images only: an image alone is what it is beside a boosted one."""

        class First:
            def init(self, batch):
                return jnp.arange(batch) if batch > 1 else jnp.ones(1, jnp.int32)

            def amounts(self, carry, info):
                return jnp.where(carry == 0, 0.3, 0.0), jnp.ones_like(info.sigma)

            def evaluate(self, denoise, carry, x, sigma, label, info):
                return denoise(x, sigma, label), carry

        def images(part):
            loss = operators.measurement_loss(operators.inpaint(MASK), Y[part])
            make = {"dps": dps, "dsg": dsg, "mpgd": mpgd}[method].guidance
            keys = jax.random.split(jax.random.key(7), 3)[part]
            run = lambda z: sample(
                DATA.denoise, z, GRID, "heun", keys, First(), guidance=make(loss, 0.2)
            )
            return jax.jit(run)(LATENTS[part])

        beside, alone = images(slice(None)), images(slice(1, 2))
        np.testing.assert_allclose(beside[1], alone[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            alone, sample(DATA.denoise, LATENTS[1:2], GRID, "heun"), rtol=1e-5, atol=1e-6
        )

    def test_clipping_and_smoothing_reach_the_sampler(self):
        """A prior outside [-1, 1]: clipped for the transition, the images lie inside; for the loss,
        nothing pulls.
        """
        far = Gaussian(1.5, 0.1)
        free = run(dsg.guidance(LOSS, 0.3), far.denoise)
        assert (free > 1).mean() > 0.9
        assert (np.abs(run(dsg.guidance(LOSS, 0.3, clip_mean=True), far.denoise)) <= 1).all()
        pulled, unmoved = (
            run(dps.guidance(LOSS, 0.2, clip_loss=clip), far.denoise) for clip in (False, True)
        )
        np.testing.assert_allclose(unmoved[:, ::2], run((), far.denoise)[:, ::2], atol=1e-4)
        assert residual(pulled) < 0.9 * residual(unmoved)
        smoothed, sharp = (run(dsg.guidance(LOSS, 0.4, samples=samples)) for samples in (2, 0))
        assert residual(smoothed) < 0.8 * residual(run()) and np.abs(smoothed - sharp).max() > 1e-2

    def test_one_and_four_devices_agree(self):
        latents = jnp.tile(LATENTS, (3, 1, 1, 1))[:8]
        y = jax.random.normal(jax.random.key(1), latents.shape)
        keys = jax.random.split(jax.random.key(2), 8)

        def images(z, keys, y):
            loss = operators.measurement_loss(operators.inpaint(MASK), y * MASK)
            guidance = dsg.guidance(loss, 0.3, interval=2, repeats=2)
            return sample(DATA.denoise, z, GRID, "ddim", key=keys, guidance=guidance, eta=1.0)

        found = []
        for n in (1, 4):
            mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:n]), ("images",))
            divided = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("images"))
            found.append(
                jax.jit(images, in_shardings=divided, out_shardings=divided)(latents, keys, y)
            )
        np.testing.assert_allclose(found[1], found[0], atol=2e-6)

    def test_a_transform_and_a_transition_in_one_scan(self):
        """A wrong model with the exact log ratio is the right model; guided, both give the same
        images.
        """
        right, wrong = DATA, Gaussian(-0.2, 0.8)

        def shifted(x, sigma, label=None):
            grad = jax.grad(
                lambda v: (right.log_density(v, sigma) - wrong.log_density(v, sigma)).sum()
            )(x)
            return wrong.denoise(x, sigma) + steps.per_example(sigma, x) ** 2 * grad

        guidance = dsg.guidance(LOSS, 0.3)
        np.testing.assert_allclose(run(guidance, shifted), run(guidance, right.denoise), atol=2e-3)

    @pytest.mark.parametrize(
        "make,words",
        [
            (lambda: dsg.guidance(LOSS, 1.2), "dsg.rate: 1.2 given; expected a number from 0 to 1"),
            (lambda: dsg.guidance(LOSS, interval=0), "dsg.interval: 0 given"),
            (
                lambda: run(dsg.guidance(LOSS, interval=5)),
                "dsg.interval: 5 given for 5 steps",
            ),
            (lambda: dsg.guidance(LOSS, window=(2.0, 1.0)), "dsg.window: .2.0, 1.0. given"),
            (lambda: dsg.guidance(LOSS, repeats=0), "dsg.repeats: 0 given"),
            (lambda: dsg.guidance(LOSS, strength=-1.0), "dsg.strength: -1.0 given"),
            (lambda: dsg.guidance(LOSS, samples=2, backward=False), "dsg.samples: 2 given"),
            (lambda: dps.guidance(LOSS, 1.0, coordinate="pixels"), "coordinate='pixels'"),
            (lambda: run(dsg.guidance(lambda x0: jnp.sum(x0))), "one number per image"),
            (lambda: freedom.guidance(LOSS, 0.02, rule="none"), "freedom.rule: unknown 'none'"),
            (
                lambda: diffpir.guidance(operators.identity(), Y, 0.1, 8.0, share=2.0),
                "diffpir.share: 2.0 given",
            ),
            (
                lambda: run(ddnm.guidance(operators.phase_retrieval(), Y)),
                "ddnm with operator 'phase_retrieval'",
            ),
        ],
    )
    def test_bad_settings_say_what_to_change(self, make, words):
        with pytest.raises(ValueError, match=words):
            make()
