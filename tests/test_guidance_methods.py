"""The methods that DSG is compared with, against their formulas, and the transitions that guidance
start from.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax.diffusion import grids, steps
from ogdm_jax.inverse import operators
from ogdm_jax.methods import cfg, classifier, ddnm, diffpir, dps, freedom, lgd, mpgd, pigdm
from ogdm_jax.sampling import gradients
from ogdm_jax.sampling.guidance import Guidance, plain_step
from ogdm_jax.sampling.sampler import sample
from tests.support.guidance_cases import (
    DATA,
    LATENTS,
    LOSS,
    MASK,
    SHAPE,
    Y,
    evaluate_at,
    info_at,
    transition_at,
)


class TestOtherMethods:
    """Each rule against its formula, on a denoiser whose Jacobian is a number."""

    at = info_at(1, 6)
    eps = jax.random.normal(jax.random.key(11), SHAPE)

    def moments(self):
        x0 = DATA.denoise(LATENTS, self.at.sigma)
        mean, std = transition_at(self.at)(x0, LATENTS)
        return x0, mean, std, DATA.std**2 / (DATA.std**2 + 1.0)

    def next_of(self, guidance, at=None):
        at, rule = self.at if at is None else at, guidance.transition
        return jax.jit(lambda x: rule(evaluate_at(at), transition_at(at), x, self.eps, at)[0])(
            LATENTS
        )

    @pytest.mark.parametrize("coordinate", ["ve", "vp"])
    def test_dps(self, coordinate):
        x0, mean, std, jacobian = self.moments()
        factor = np.sqrt((1 + 1.0) * (1 + 0.36)) if coordinate == "vp" else 1.0
        want = mean + std[0] * self.eps - 0.3 * factor * jacobian * 2 * MASK * (x0 - Y)
        np.testing.assert_allclose(
            self.next_of(dps.guidance(LOSS, 0.3, coordinate=coordinate)), want, atol=1e-5
        )

    def test_mpgd(self):
        """As published, in x_vp: x0 moves, the eps of the unguided prediction stays."""
        x0, mean, std, _ = self.moments()
        grad = 2 * MASK * (x0 - Y)
        a, b = 1 / (1 + 1.0), 1 / (1 + 0.36)  # alpha bar of the levels 1 and 0.6
        eps = (np.sqrt(a) * LATENTS - np.sqrt(a) * x0) / np.sqrt(1 - a)
        s = np.sqrt(b) * std[0]
        x_vp = np.sqrt(b) * (x0 - 0.3 * grad) + np.sqrt(1 - b - s**2) * eps + s * self.eps
        got = self.next_of(mpgd.guidance(LOSS, 0.3))
        np.testing.assert_allclose(got, x_vp / np.sqrt(b), atol=1e-5)
        np.testing.assert_allclose(got, mean + std[0] * self.eps - 0.3 * grad, atol=1e-5)

    def test_mpgd_as_released(self):
        """x0 -= scale / sqrt(abar') grad, then DDIM of the unguided eps, all in x_vp."""
        x0, mean, std, _ = self.moments()
        norm = operators.measurement_loss(operators.inpaint(MASK), Y, squared=False)
        residual = MASK * (x0 - Y)
        grad = residual / np.sqrt(np.square(residual).sum((1, 2, 3), keepdims=True))
        b = 1 / (1 + 0.36)
        want = mean + std[0] * self.eps - 0.3 / np.sqrt(b) * grad
        np.testing.assert_allclose(
            self.next_of(mpgd.guidance(norm, 0.3, rule="released")), want, atol=1e-5
        )

    def test_mpgd_takes_no_gradient_at_clipped_pixels(self):
        far = 8 * LATENTS
        clipped, got, plain = (
            rule(evaluate_at(self.at), transition_at(self.at), far, self.eps, self.at)[0]
            for rule in (
                mpgd.guidance(LOSS, 0.3, clip_loss=True).transition,
                mpgd.guidance(LOSS, 0.3).transition,
                plain_step,
            )
        )
        within = np.abs(DATA.denoise(far, self.at.sigma)) < 1
        assert 0.2 < within.mean() < 0.8 and np.abs(got - plain)[~within].max() > 0.1
        np.testing.assert_allclose(clipped[within], got[within], atol=1e-5)
        np.testing.assert_allclose(clipped[~within], plain[~within], atol=1e-5)

    def test_mpgd_moves_churns_noise_and_others_refuse_it(self):
        def run(guidance):
            settings = {"churn": 4.0, "key": jax.random.key(1), "guidance": guidance}
            return sample(DATA.denoise, LATENTS, grids.edm(5, 0.02, 20.0), "heun", **settings)

        assert (LOSS(run(mpgd.guidance(LOSS, 0.2))) < 0.7 * LOSS(run(()))).all()
        op = operators.inpaint(MASK)
        for name, make in (
            ("ddnm", functools.partial(ddnm.guidance, op, Y)),
            ("diffpir", functools.partial(diffpir.guidance, op, Y, 0.1)),
        ):
            for guidance in (make(), make(interval=2, repeats=2)):
                with pytest.raises(
                    ValueError, match=f"{name} under churn: .* expected no churn, with solver="
                ) as error:
                    run(guidance)
                assert "\n" not in str(error.value)

    def test_freedom_ignores_the_losss_scale_and_has_its_length(self):
        x0, mean, std, _ = self.moments()
        move = self.next_of(freedom.guidance(LOSS, 0.3)) - (mean + std[0] * self.eps)
        np.testing.assert_allclose(
            freedom.rms(move), 0.3 * (1 - 0.36) * freedom.rms(LATENTS - x0), rtol=1e-4
        )
        other = self.next_of(freedom.guidance(lambda v: 1e6 * LOSS(v), 0.3))
        np.testing.assert_allclose(other, self.next_of(freedom.guidance(LOSS, 0.3)), atol=1e-5)
        timed = self.next_of(freedom.guidance(LOSS, 0.3, rule="time")) - (mean + std[0] * self.eps)
        direction = self.moments()[3] * 2 * MASK * (x0 - Y)
        np.testing.assert_allclose(timed, -0.3 * np.sqrt(1.36) * direction, atol=1e-5)

    def test_lgd_is_dps_where_its_noise_is_small(self):
        at = info_at(1, 6, 1e-3)
        want = self.next_of(dps.guidance(LOSS, 0.1, coordinate="vp"), at)
        np.testing.assert_allclose(
            self.next_of(lgd.guidance(LOSS, 0.1, samples=4), at), want, atol=3e-3
        )

        @functools.partial(jax.jit, static_argnums=1)
        def value(x, scale):
            loss = gradients.smoothed(lambda v: scale * LOSS(v), 1000, self.at)
            return gradients.through_network(loss, evaluate_at(self.at), x)

        smooth, quiet = value(LATENTS, 1.0), value(LATENTS, 1e-4)
        # small losses average: E|r + s z|^2 = |r|^2 + m s^2, s^2 = 1/2; large ones prefer the best
        # draws
        _, _, _, jacobian = self.moments()
        x0 = DATA.denoise(LATENTS, self.at.sigma)
        np.testing.assert_allclose(quiet[1] * 1e4, LOSS(x0) + MASK.sum() * 2 * 0.5, rtol=0.05)
        assert (smooth[1] < LOSS(x0) + MASK.sum()).all()

    @pytest.mark.parametrize("std", [0.0, 0.3])
    def test_diffpir_solves_the_normal_equations(self, std):
        """min ||y - A x0||^2 + rho ||x0 - D||^2, rho = lambda sigma_n^2 / sigma_k^2 as the authors
        have it: sigma_n of images in [0, 1], sigma_k of images in [-1, 1].
        """
        op = operators.gaussian_blur(5, 0.8)
        y = op.forward(LATENTS)
        matrix = np.asarray(op.forward(jnp.eye(16).reshape(16, 4, 4, 1))).reshape(16, 16).T
        x0, _, _, _ = self.moments()
        rho = 8.0 * (std / 2) ** 2 / 1.0**2
        flat = lambda v: np.moveaxis(np.asarray(v, np.float64), -1, 1).reshape(6, 16)
        solved = np.linalg.solve(
            matrix.T @ matrix + rho * np.eye(16), (flat(y) @ matrix + rho * flat(x0)).T
        ).T
        rule = diffpir.guidance(op, y, std).transition
        args = (evaluate_at(self.at), transition_at(self.at), LATENTS, self.eps)
        _, got = rule(*args, self.at)
        np.testing.assert_allclose(flat(got), solved, atol=2e-3 if std == 0 else 1e-4)
        last = self.at._replace(sigma_next=jnp.zeros(3))
        end, got = rule(*args, last)
        np.testing.assert_allclose(end, got, atol=1e-6)
        np.testing.assert_allclose(flat(got), solved if std == 0 else flat(x0), atol=2e-3)

    def test_ddnm_keeps_what_was_measured_and_the_priors_spread_elsewhere(self):
        latents = jax.random.normal(jax.random.key(0), (512, 4, 4, 1))
        y = jnp.broadcast_to(Y[:1, ..., :1], latents.shape)
        compiled = jax.jit(
            lambda z, guidance: sample(
                DATA.denoise,
                z,
                grids.edm(40),
                "ddim",
                key=jax.random.key(1),
                eta=1.0,
                guidance=guidance,
            ),
            static_argnums=1,
        )
        x, free = (
            compiled(latents, guidance)
            for guidance in (ddnm.guidance(operators.inpaint(MASK), y), Guidance("none"))
        )
        seen = np.broadcast_to(MASK > 0, x.shape)
        np.testing.assert_allclose(x[seen], y[seen], atol=1e-5)
        np.testing.assert_allclose(
            x[~seen], free[~seen], atol=1e-4
        )  # pixels of this prior know nothing of each other

    @pytest.mark.parametrize("std", [0.2, 3.0])
    @pytest.mark.parametrize("eta", [0.85, 0.3])
    def test_ddnm_is_the_authors_step_in_their_coordinate(self, std, eta):
        """x_vp' = a x0_rectified + what is left of sigma_t, a = sqrt(abar'), sigma_t = sqrt(1 -
        abar') (arXiv 2212.00490 eq. 17 to 19 and the released svd code), on both sides of sigma_t.
        """
        op = operators.super_resolution(2, 4)
        basis = op.spectrum((4, 4, 2))
        y = jax.random.normal(jax.random.key(7), (3, 2, 2, 2))
        a, sigma_t = 1 / np.sqrt(1 + 0.36), 0.6 / np.sqrt(1 + 0.36)
        x0 = np.asarray(basis.to(DATA.denoise(LATENTS, self.at.sigma)), np.float64)
        z, s = np.asarray(basis.to(self.eps)), np.broadcast_to(basis.values, x0.shape)
        clean = np.asarray(basis.measured(y)) / np.where(s > 0, s, 1)
        of_y = a * std / np.where(s > 0, s, 1)
        low = sigma_t < of_y
        scale = np.where(low, s * sigma_t * np.sqrt(1 - eta**2) / (a * std), 1)
        fresh = np.where(low, eta * sigma_t, np.sqrt(np.maximum(sigma_t**2 - of_y**2, 0)))
        want = (a * (x0 + scale * (clean - x0)) + fresh * z) / a
        got = np.asarray(basis.to(self.next_of(ddnm.guidance(op, y, std, eta=eta))))
        seen = s > 1e-4
        assert low[seen].any() == low[seen].all() == (std == 3.0)
        np.testing.assert_allclose(got[seen], want[seen], atol=1e-5)
        _, mean, kick, _ = self.moments()
        plain = np.asarray(basis.to(mean + kick[0] * self.eps))
        np.testing.assert_allclose(got[~seen], plain[~seen], atol=1e-5)

    def test_ddnm_budgets_the_measurements_noise_once(self):
        """Noise of the next state, over draws of y's noise and of its own, is its whole level."""
        noise = jax.random.normal(jax.random.key(3), (2, 4000, 4, 4, 1))
        at = self.at._replace(sigma=jnp.ones(4000), sigma_next=jnp.full(4000, 0.6))
        x = jnp.broadcast_to(LATENTS[:1, ..., :1], noise.shape[1:])
        for std in (0.3, 3.0):
            y = 0.2 + std * noise[0]
            args = (evaluate_at(at), transition_at(at), x, noise[1], at)
            x_next, _ = ddnm.guidance(operators.identity(), y, std).transition(*args)
            np.testing.assert_allclose(jnp.std(x_next, axis=0), 0.6, rtol=0.05)

    @pytest.mark.parametrize("method", ["ddnm", "diffpir"])
    def test_heun_is_refused_by_methods_that_replace_x0_hat(self, method):
        module = {"ddnm": ddnm, "diffpir": diffpir}[method]
        guidance = module.guidance(operators.inpaint(MASK), Y, 0.1)
        run = functools.partial(sample, DATA.denoise, LATENTS, grids.edm(5), guidance=guidance)
        for more in ({}, {"eta": 1.0, "key": jax.random.key(0)}):
            with pytest.raises(ValueError, match="expected solver='ancestral', or s") as error:
                run("heun", **more)
            assert "\n" not in str(error.value) and str(error.value).startswith(method)


def test_kernels_of_all_solvers_are_one_kernel():
    """DDIM (eta 1), DDPM's posterior and the ancestral step of EDM: equal mean and std; sigma_up^2
    + sigma_down^2.
    """
    sigma, below = jnp.full(3, 1.7), jnp.full(3, 0.9)
    x0 = DATA.denoise(LATENTS, sigma)
    ddim, ancestral = (
        f(LATENTS, x0, sigma, below, a)
        for f, a in ((steps.ddim_moments, 1.0), (steps.ancestral_moments, "small"))
    )
    for a, b in zip(ddim, ancestral, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    a, b = 1 / (1 + 1.7**2), 1 / (1 + 0.9**2)
    beta = 1 - a / b
    mean_vp = (
        np.sqrt(b) * beta / (1 - a) * x0 + np.sqrt(a / b) * (1 - b) / (1 - a) * np.sqrt(a) * LATENTS
    )
    np.testing.assert_allclose(ddim[0] * np.sqrt(b), mean_vp, atol=1e-6)
    np.testing.assert_allclose(ddim[1] * np.sqrt(b), np.sqrt(beta * (1 - b) / (1 - a)), rtol=1e-6)
    down, up = steps.split_sigma(sigma, below, 0.4)
    np.testing.assert_allclose(down**2 + up**2, below**2, rtol=1e-6)


@pytest.mark.parametrize("method", [ddnm, pigdm])
def test_a_traced_noise_of_float64_keeps_the_type_of_the_latents(method):
    with jax.enable_x64(True):
        z = jnp.asarray(LATENTS, jnp.float32)
        operator = operators.inpaint(np.asarray(MASK))
        draw = lambda std: sample(
            DATA.denoise,
            z,
            grids.edm(3),
            "ancestral",
            jax.random.key(0),
            guidance=method.guidance(operator, Y, std),
        )
        assert jax.eval_shape(draw, jnp.float64(0.1)).dtype == jnp.float32


def test_smoothed_losses_see_the_same_noise_in_both_precisions():
    with jax.enable_x64(True):
        drawn = []
        for dtype in (jnp.float32, jnp.float64):
            x = jnp.asarray(LATENTS, dtype)
            loss = lambda x: jnp.sum((x - 0.3) ** 2, axis=(1, 2, 3))
            drawn.append(gradients.smoothed(loss, 2, info_at(1, 4))(x))
        np.testing.assert_allclose(*drawn, rtol=1e-5)


@pytest.mark.fast
def test_numbers_of_any_kind_are_numbers():
    window = (np.float32(0.1), np.float64(3.0))
    assert cfg.guidance(2.0, window=window) is not None
    log_prob = lambda x, sigma, label=None: -jnp.sum(x**2, axis=(1, 2, 3))
    assert classifier.guidance(log_prob, jnp.float32(2.0)).constants["scale"] == 2
    x, level = jnp.zeros((1, 2, 2, 1)), jnp.ones(1)
    steps.ddim(lambda x, sigma, label=None: x, x, level, level / 2, eta=np.float32(0))
