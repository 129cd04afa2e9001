"""The discrete chain: closed forms, the denoiser that a DDPM network makes, and both routes to the
same samples.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax.diffusion import grids, noise, precondition, process, steps
from ogdm_jax.diffusion.bound import pixel_log_likelihood, variance_bound
from ogdm_jax.methods import cfg, dg, dsg
from ogdm_jax.sampling.guidance import Guidance, plain_step
from ogdm_jax.sampling.sampler import sample
from tests.reference.gaussian import Chain, gaussian_kl
from tests.support.oracles import column

STD = 0.6  # of Gaussian data, whose exact eps is linear in x_t


def exact(table: process.Discrete, learned: bool = False):
    """The exact eps of N(0, STD^2) at original steps; further channels v = 0.4 sin(3 x) - 0.2."""

    def model(x, t, label=None):
        bar = column(jnp.asarray(table.alpha_bar, x.dtype)[t.astype(jnp.int32)], x)
        eps = jnp.sqrt(1 - bar) / (1 - bar + STD**2 * bar) * x
        return jnp.concatenate([eps, 0.4 * jnp.sin(3 * x) - 0.2], axis=-1) if learned else eps

    return model


def test_posterior_is_the_product_of_its_two_gaussians():
    chain = Chain.make("cosine", spacing="50")
    with jax.enable_x64(True):
        t = jnp.asarray([1, 20, 49])
        x0, x = jax.random.normal(jax.random.key(0), (2, 3, 2, 2, 1), jnp.float64)
        found = chain.posterior(x0, x, t)
        before, beta = (
            column(jnp.asarray(v)[t], x) for v in (chain.table.alpha_bar_before, chain.table.betas)
        )
        precision = 1 / (1 - before) + (1 - beta) / beta
        mean = (jnp.sqrt(before) * x0 / (1 - before) + jnp.sqrt(1 - beta) * x / beta) / precision
        np.testing.assert_allclose(found.mean, mean, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(
            np.exp(found.log_variance), np.broadcast_to(1 / precision, x.shape), rtol=1e-10
        )


def test_learned_variance_ends_at_both_fixed_ones():
    table = process.Discrete.make()
    x, t = jnp.ones((3, 2, 2, 1)), jnp.asarray([0, 3, 999])
    for v, log_variance in (
        (-1.0, Chain(table).log_posterior_variance),
        (1.0, np.log(table.betas)),
    ):
        chain = Chain(table, variance="learned")
        found = chain.p_moments(
            lambda x, t, v=v: jnp.concatenate([x, jnp.full_like(x, v)], -1), x, t
        )
        np.testing.assert_allclose(
            found.log_variance[:, 0, 0, 0], log_variance[[0, 3, 999]], rtol=1e-6
        )
    with pytest.raises(ValueError, match="1 output channels; expected 2"):
        Chain(table, variance="learned").p_moments(lambda x, t: x, x, t)
    with pytest.raises(ValueError, match="Chain.variance: 'huge'"):
        Chain(table, variance="huge")


def test_bound_parts():
    """KL against its definition by quadrature; all bins' masses add up to 1; eps gets no gradient
    from the bound.
    """
    grid = np.linspace(-12, 12, 20001)
    density = lambda m, v: np.exp(-((grid - m) ** 2) / (2 * v)) / np.sqrt(2 * np.pi * v)
    p, q = density(0.3, 0.5), density(-0.2, 0.8)
    kl = np.sum(p * np.log(p / q)) * (grid[1] - grid[0])
    np.testing.assert_allclose(gaussian_kl(0.3, np.log(0.5), -0.2, jnp.log(0.8)), kl, rtol=1e-5)
    bins = jnp.asarray(np.arange(256) / 127.5 - 1, jnp.float32)
    mass = jnp.exp(pixel_log_likelihood(bins, jnp.float32(0.1), jnp.log(jnp.float32(0.2))))
    np.testing.assert_allclose(mass.sum(), 1, rtol=1e-5)

    chain = Chain.make(variance="learned")
    x0, eps = jax.random.normal(jax.random.key(1), (2, 2, 2, 2, 1))
    t = jnp.asarray([0, 500])

    def part(w, name):
        model = lambda x, t: jnp.concatenate([w[0] * x, w[1] * x], axis=-1)
        return jnp.sum(chain.losses(model, x0, t, eps)[name])

    mse, vb = (jax.grad(part)(jnp.asarray([0.5, 0.2]), name) for name in ("mse", "vb"))
    assert mse[0] != 0 and mse[1] == 0 and vb[0] == 0 and vb[1] != 0


def test_the_variances_loss_is_the_chains_bound():
    """Value and gradient of guided-diffusion's term, from x0_hat and the fraction alone."""
    table, t = process.Discrete.make("cosine", 50), jnp.asarray([0, 1, 20, 49])
    chain = Chain(table, 50, variance="learned")
    x0, noise, eps_hat, v = jax.random.uniform(jax.random.key(0), (4, 4, 3, 3, 2), minval=-1)
    x = chain.q_sample(x0, t, noise)
    sigma = jnp.asarray(table.sigma, jnp.float32)[t]

    def theirs(v):
        return chain.bound(jnp.concatenate([eps_hat, v], axis=-1), x0, x, t)

    def ours(v):
        return variance_bound(table, x0, chain.x0_from_eps(x, eps_hat, t), sigma, (v + 1) / 2)

    np.testing.assert_allclose(ours(v), theirs(v), rtol=1e-4)
    slopes = (jax.grad(lambda v, f=f: f(v).sum())(v) for f in (ours, theirs))
    np.testing.assert_allclose(*slopes, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_adm_denoiser(schedule):
    """The exact eps gives the exact posterior mean at every level of the table, and time steps
    round-trip.
    """
    table = process.Discrete.make(schedule)
    told = []
    network = lambda x, t, label=None: told.append(np.asarray(t)) or exact(table)(x, t)
    denoise = precondition.adm(network, schedule)
    t = np.array([0, 1, 499, 998, 999])
    with jax.enable_x64(True):
        sigma = jnp.asarray(table.sigma[t])
        x = jax.random.normal(jax.random.key(0), (5, 2, 2, 1), jnp.float64) * column(
            sigma, jnp.ones((5, 2, 2, 1))
        )
        wiener = STD**2 / (STD**2 + column(sigma, x) ** 2)
        np.testing.assert_allclose(denoise(x, sigma), wiener * x, rtol=1e-8, atol=1e-10)
        np.testing.assert_array_equal(told[-1], t)
        denoise(x, sigma * 1.0005)
        np.testing.assert_array_equal(told[-1], t)
        np.testing.assert_allclose(denoise.round_sigma(sigma * 1.0005), sigma, rtol=1e-12)
    assert (denoise.sigma_min, denoise.sigma_max) == (table.sigma[0], table.sigma[-1])
    clipped = precondition.adm(exact(table), schedule, clip=True)
    assert jnp.abs(clipped(jnp.full((1, 2, 2, 1), 9.0), jnp.asarray([0.1]))).max() == 1
    scaled = precondition.adm(network, "linear", 4000, rescale_timesteps=True)
    scaled(jnp.ones((1, 2, 2, 1)), jnp.asarray([1e3]))
    assert told[-1] == 3999 / 4
    with pytest.raises(ValueError, match="predict 'score'"):
        precondition.adm(network, predict="score")


def chain_by_hand(chain: Chain, model, x, noises, step):
    for i, t in enumerate(range(len(chain.table.timesteps) - 1, -1, -1)):
        x = step(model, x, jnp.full(x.shape[:1], t), noises[i])
    return x


@pytest.mark.parametrize("clip", [True, False])
def test_ancestral_with_a_learned_variance_is_p_sample(clip):
    """The loop of guided-diffusion in x_vp against sample() on the respaced grid, alone, guided
    by the plain step, decorated.
    """
    table, spacing = process.Discrete.make("cosine"), "6,4"
    chain = Chain.make("cosine", spacing=spacing, variance="learned")
    model, sigmas = exact(table, learned=True), grids.respaced(spacing, "cosine")
    with jax.enable_x64(True):
        z, noises = jax.random.normal(jax.random.key(0), (2, 3, 3, 1), jnp.float64), None
        noises = jax.random.normal(jax.random.key(1), (10, 2, 3, 3, 1), jnp.float64)
        want = chain_by_hand(
            chain, model, z, noises, lambda m, x, t, e: chain.p_sample(m, x, t, e, clip)
        )
        denoise = precondition.adm(model, "cosine", learned_variance=True, clip=clip)
        start = z * np.sqrt(1 + sigmas[0] ** 2) / sigmas[0]
        settings = {"solver": "ancestral", "noise_fn": lambda step: noises[step]}
        np.testing.assert_allclose(
            sample(denoise, start, sigmas, **settings), want, rtol=0, atol=1e-9
        )
        same = Guidance("same", transition=plain_step)
        np.testing.assert_allclose(
            sample(denoise, start, sigmas, guidance=same, **settings), want, rtol=0, atol=1e-9
        )

        decorated = dataclasses.replace(denoise, evaluate=lambda *at: denoise(*at))
        np.testing.assert_allclose(
            sample(decorated, start, sigmas, **settings), want, rtol=0, atol=1e-9
        )
        small = sample(denoise, start, sigmas, variance="small", **settings)
        assert np.abs(small - want).max() > 1e-3


def test_a_learned_variance_costs_no_second_evaluation():
    calls = []
    model = exact(process.Discrete.make(), learned=True)
    denoise = precondition.adm(
        lambda x, t, label=None: calls.append(1) or model(x, t), learned_variance=True
    )
    sigmas = grids.respaced("5")
    z = jnp.ones((1, 2, 2, 1))
    sample(denoise, z, sigmas, "ancestral", key=jax.random.key(0))
    assert len(calls) == 1  # traced once for the whole scan
    with pytest.raises(ValueError, match="variance='learned'.*no learned variance"):
        sample(
            lambda x, s, label=None: x,
            z,
            sigmas,
            "ancestral",
            key=jax.random.key(0),
            variance="learned",
        )
    with pytest.raises(ValueError, match="besides the 1 of the image"):
        bare = precondition.adm(exact(process.Discrete.make()), learned_variance=True)
        bare(z, jnp.ones(1))


def test_spherical_guidance_of_a_learned_variance_moves_on_its_sphere():
    """DSG's step at rate 1 lands at distance |std| (the norm of the map) from the mean, whatever
    the variance map.
    """
    denoise = precondition.adm(exact(process.Discrete.make(), learned=True), learned_variance=True)
    sigmas = np.array([2.0, 1.0])
    distance = lambda x0: jnp.sum(jnp.square(x0 - 0.3), axis=(1, 2, 3))
    spherical = dsg.guidance(distance, rate=1.0).transition
    gaps = []

    def watched(evaluate, transition, x, noise, info):
        mean, std = transition(evaluate(x), x)
        assert std.shape == x.shape
        after, x0_hat = spherical(evaluate, transition, x, noise, info)
        length = lambda v: jnp.sqrt(jnp.sum(jnp.square(v), axis=(1, 2, 3)))
        gaps.append(jnp.abs(length(after - mean) / length(std) - 1).max())
        return after, x0_hat

    z = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    guidance = Guidance("watched", transition=watched)
    watched_run = sample(denoise, z, sigmas, "ancestral", key=jax.random.key(1), guidance=guidance)
    assert np.isfinite(watched_run).all() and len(gaps) == 1 and gaps[0] < 1e-5


@pytest.mark.fast
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_is_ddim_sample(eta):
    table, spacing = process.Discrete.make(), "ddim10"
    chain, sigmas = Chain.make(spacing=spacing), grids.respaced(spacing)
    with jax.enable_x64(True):
        z = jax.random.normal(jax.random.key(0), (2, 3, 3, 1), jnp.float64)
        noises = jax.random.normal(jax.random.key(1), (10, 2, 3, 3, 1), jnp.float64)
        step = lambda m, x, t, e: chain.ddim_sample(m, x, t, e, eta)
        want = chain_by_hand(chain, exact(table), z, noises, step)
        start = z * np.sqrt(1 + sigmas[0] ** 2) / sigmas[0]
        denoise = precondition.adm(exact(table), clip=True)
        x = sample(denoise, start, sigmas, "ddim", eta=eta, noise_fn=lambda step: noises[step])
        np.testing.assert_allclose(x, want, rtol=0, atol=1e-10)


def test_respaced_grids():
    np.testing.assert_allclose(
        grids.respaced("250")[::-1][1:3], process.Discrete.make().sigma[[0, 4]]
    )
    assert len(grids.respaced("", "cosine", 100)) == 101 and len(grids.respaced("10,10")) == 21
    with pytest.raises(ValueError, match="spacing='ddim400'"):
        grids.respaced("ddim400")


def test_ddpm_noise_law_is_uniform_over_the_table_and_weighs_eps():
    law, table = noise.ddpm("cosine", 50), process.Discrete.make("cosine", 50)
    sigma = law.sample(jax.random.split(jax.random.key(0), 20000))
    counts = np.bincount(np.asarray(table.index(sigma)), minlength=50)
    assert np.abs(counts - 400).max() < 5 * 20 and set(np.asarray(sigma)) == set(
        table.sigma.astype(np.float32)
    )
    np.testing.assert_array_equal(
        law.sigma(jnp.asarray([0.0, 1.0])), table.sigma[[0, 49]].astype(np.float32)
    )
    eps, eps_hat = jax.random.normal(jax.random.key(1), (2, 3, 2, 2, 1))
    levels = jnp.asarray([0.02, 1.0, 30.0])
    s = column(levels, eps)
    loss = law.weight(levels) * jnp.sum(
        jnp.square((0.3 + s * eps - s * eps_hat) - 0.3), axis=(1, 2, 3)
    )
    np.testing.assert_allclose(loss, jnp.sum(jnp.square(eps - eps_hat), axis=(1, 2, 3)), rtol=1e-4)


@pytest.mark.parametrize("method", ["cfg", "dg"])
def test_guided_denoisers_keep_what_samplers_need(method):
    """Range, rounding, and the learned variance: an ancestral step has the guided mean and the
    base's variance.
    """
    model = exact(process.Discrete.make(), learned=True)
    network = lambda x, t, label: model(x, t) + 0.1 * column(label, x)
    denoise = precondition.adm(network, learned_variance=True)
    guided = {
        "cfg": lambda: cfg.guide(denoise, 2.0),
        "dg": lambda: dg.guide(denoise, lambda x, sigma, label: jnp.sum(x, (1, 2, 3)), 0.5),
    }[method]()
    assert (guided.sigma_min, guided.sigma_max) == (denoise.sigma_min, denoise.sigma_max)
    assert guided.round_sigma is denoise.round_sigma
    z, eps = jax.random.normal(jax.random.key(0), (2, 2, 3, 3, 1))
    label = jnp.asarray([0, 1])
    levels = [denoise.round_sigma(jnp.full(2, v)) for v in (2.0, 1.0)]
    x = z * levels[0][0]
    plain, fraction = denoise.variance(x, levels[0], label)
    moved = guided(x, levels[0], label)
    mean, std = steps.ancestral_moments(x, moved, *levels, fraction)
    assert np.abs(moved - plain).max() > 0.1
    assert (
        np.abs(std - column(steps.posterior_std(*levels), x)).max() > 0.1
    )  # "small" is something else
    grid = np.asarray([levels[0][0], levels[1][0]])
    for variance in (None, "learned"):
        settings = {"label": label, "variance": variance, "noise_fn": lambda step: eps}
        np.testing.assert_allclose(
            sample(guided, z, grid, "ancestral", **settings), mean + std * eps, atol=1e-5
        )
    fixed = precondition.adm(exact(process.Discrete.make()))
    assert cfg.guide(fixed, 2.0).variance is None
