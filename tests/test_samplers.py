"""Samplers against exact solutions: published numbers, orders of convergence, moments, counts,
seeds and slots.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax.diffusion import grids, precondition
from ogdm_jax.diffusion.denoiser import Denoiser, as_denoiser
from ogdm_jax.sampling.guidance import Guidance, plain_step
from ogdm_jax.sampling.sampler import SOLVERS, Churn, nfe, sample
from ogdm_jax.sampling.solvers import FEWEST_STEPS
from tests.support.oracles import Gaussian, column, two_bumps

DATA = Gaussian(0.0, 0.5)  # the denoiser .25 x / (.25 + sigma^2) of the published numbers
PLAIN = Guidance("plain", transition=plain_step)
FIXED = [name for name in SOLVERS if name != "dopri5"]  # which chooses its steps
DETERMINISTIC = [name for name in SOLVERS if name not in ("ancestral", "pc", "dpmpp_2m_sde")]


def one(value: float = 1.0):
    return jnp.full((1, 1, 1, 1), value, jnp.float64)


def number(x) -> float:
    return float(x[0, 0, 0, 0])


# Published numbers


@pytest.mark.fast
@pytest.mark.parametrize(
    "solver, n, want",
    [
        ("heun", 8, 0.69699380),
        ("heun", 18, 0.52762464),
        ("heun", 256, 0.50009542),
        ("euler", 15, 0.4081489),
        ("euler", 128, 0.48892261),
        ("spndm", 14, 0.4794465),
    ],
)
def test_gaussian_goldens(solver, n, want):
    with jax.enable_x64(True):
        assert abs(number(sample(DATA.denoise, one(), grids.edm(n), solver)) - want) < 6e-8
    assert (
        abs(number(sample(DATA.denoise, jnp.ones((1, 1, 1, 1)), grids.edm(n), solver)) - want)
        < 1e-4
    )


def test_spndm_on_equal_steps_golden():
    with jax.enable_x64(True):
        assert (
            abs(number(sample(DATA.denoise, one(), grids.edm(14, rho=1), "spndm")) - 0.0527392)
            < 6e-8
        )


# Two routes to one result


def test_ddim_is_euler_and_eta_one_is_ancestral():
    data, z, key = (
        two_bumps(),
        jax.random.normal(jax.random.key(0), (3, 2, 2, 1)),
        jax.random.key(5),
    )
    run = functools.partial(sample, data.denoise, z, grids.edm(9), key=key)
    np.testing.assert_array_equal(run("ddim"), run("euler"))
    np.testing.assert_allclose(run("ddim", eta=1.0), run("ancestral"), atol=2e-5)
    assert float(jnp.abs(run("ancestral", variance="large") - run("ancestral")).max()) > 1e-3


# Orders


def warped(n: int) -> np.ndarray:
    return grids.edm(n + 1, 0.5, 10.0, rho=3.0)[:-1]


def even(n: int) -> np.ndarray:
    return np.linspace(4.0, 1.0, n + 1)


@pytest.mark.parametrize(
    "solver, grid, order",
    [
        ("euler", warped, 1),
        ("heun", warped, 2),
        ("dpmpp_2m", warped, 2),
        ("spndm", warped, 2),
        ("spndm", even, 2),
        ("fpndm", even, 4),
    ],
)
def test_order_of_convergence(solver, grid, order):
    """Error ratios of halved steps, on grids that end above 0; constant weights keep order 2 on a
    smoothly warped grid.

    Heun's last step is Euler's in every grid, so its state is read one step before the end of a
    longer one.
    """
    data = two_bumps()
    with jax.enable_x64(True):
        z = jax.random.normal(jax.random.key(2), (4, 2, 2, 1), jnp.float64)

        @functools.partial(jax.jit, static_argnames="solver")
        def end(sigmas, solver):
            if solver != "heun":
                return sample(data.denoise, z, sigmas, solver)
            return sample(data.denoise, z, jnp.append(sigmas, 0.0), solver, trajectory=True)[
                1
            ].states[-2]

        levels = np.array([grid(1)[0], grid(1)[-1]])
        truth = end(np.linspace(*levels, 3001), "fpndm")
        errors = [float(jnp.abs(end(grid(n), solver) - truth).max()) for n in (64, 128)]
    measured = np.log2(errors[0] / errors[1])
    assert order - 0.3 < measured < order + 0.6, (measured, errors)


def test_heun_error_falls_as_published():
    """Against the exact ODE: .0276 at N = 18, .0018 at N = 64."""
    with jax.enable_x64(True):
        exact = float(DATA.ode(one(80.0), 80.0)[0, 0, 0, 0])
        for n, error in ((18, 0.0276), (64, 0.0018)):
            assert (
                abs(abs(number(sample(DATA.denoise, one(), grids.edm(n))) - exact) - error) < 1e-4
            )


# Counts


def counted(data=DATA):
    calls = []

    def denoise(x, sigma, label=None):
        jax.debug.callback(lambda s: calls.append(float(s[0])), sigma)
        return data.denoise(x, sigma)

    return denoise, calls


@pytest.mark.parametrize(
    "solver, settings",
    [
        *((s, {}) for s in FIXED),
        ("heun", {"churn": 2.0}),
        ("heun", {"eta": 0.5}),
        ("ddim", {"eta": 1.0}),
        ("ancestral", {"guidance": PLAIN}),
    ],
)
def test_nfe(solver, settings, n=5):
    denoise, calls = counted()
    sample(denoise, jnp.ones((2, 2, 2, 1)), grids.edm(n), solver, key=jax.random.key(0), **settings)
    jax.effects_barrier()
    assert len(calls) == nfe(solver, n)
    assert min(calls) > 0  # the network never sees sigma 0


@pytest.mark.fast
def test_nfe_numbers():
    assert [nfe("euler", 15), nfe("spndm", 14), nfe("heun", 8), nfe("heun", 18)] == [15, 15, 15, 35]
    assert [nfe("fpndm", 41), nfe("fpndm", 11)] == [50, 20]


def test_one_trace_in_steady_state():
    traces = []

    @jax.jit
    def images(z, sigmas, key):
        traces.append(None)
        return sample(DATA.denoise, z, sigmas, "heun", key=key, churn=2.0)

    for i in range(3):
        z = jax.random.normal(jax.random.key(i), (2, 2, 2, 1))
        images(z, jnp.asarray(grids.edm(5, sigma_max=40.0 + i)), jax.random.key(i))
    assert len(traces) == 1


# Randomness


@pytest.mark.parametrize(
    "solver, settings", [("heun", {}), ("heun", {"churn": 4.0}), ("ancestral", {})]
)
def test_an_image_depends_on_its_key_alone(solver, settings):
    data, n = two_bumps(), 64
    keys = jax.vmap(jax.random.key)(jnp.arange(n))
    z = jax.random.normal(jax.random.key(1), (n, 2, 2, 1))

    @jax.jit
    def images(z, keys):
        return sample(data.denoise, z, grids.edm(6), solver, key=keys, **settings)

    whole = images(z, keys)
    for rows in (slice(3, 4), slice(20, 27)):
        np.testing.assert_allclose(images(z[rows], keys[rows]), whole[rows], rtol=1e-5, atol=2e-6)
    if solver != "heun" or settings:
        assert float(jnp.abs(images(z, keys[::-1]) - whole).max()) > 1e-2


def test_scalar_key_is_folded_with_the_row():
    z, key = jnp.ones((3, 2, 2, 1)), jax.random.key(9)
    rows = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(3))
    a, b = (sample(DATA.denoise, z, grids.edm(5), "ancestral", key=k) for k in (key, rows))
    np.testing.assert_array_equal(a, b)


def test_keys_are_used_once():
    with jax.debug_key_reuse(True):
        jax.jit(
            lambda k: sample(DATA.denoise, jnp.ones((2, 2, 2, 1)), grids.edm(4), churn=2.0, key=k)
        )(jax.random.key(0))


def test_zero_churn_is_deterministic_and_needs_no_key():
    z = jax.random.normal(jax.random.key(1), (2, 2, 2, 1))
    plain = sample(DATA.denoise, z, grids.edm(6))
    for churn in (0, Churn(), {"S_churn": 0.0}):
        np.testing.assert_array_equal(sample(DATA.denoise, z, grids.edm(6), churn=churn), plain)
    outside = sample(
        DATA.denoise, z, grids.edm(6), churn=Churn(9.0, 100.0, 200.0), key=jax.random.key(0)
    )
    np.testing.assert_allclose(outside, plain, rtol=1e-6)


@pytest.mark.parametrize(
    "solver, settings",
    [
        ("heun", {"churn": Churn(8.0, 0.01, 50.0, 1.01)}),
        ("euler", {"churn": 8.0}),
        ("ancestral", {}),
        ("ancestral", {"variance": "large"}),
        ("ddim", {"eta": 0.5}),
        ("heun", {"eta": 1.0}),
    ],
)
def test_gaussian_moments(solver, settings):
    """Mean and spread of 65,536 numbers against the sampler's exact recursion, which tends to the
    data's.
    """
    data = Gaussian(0.3, 0.5)

    @jax.jit
    def images(key):
        z = jax.random.normal(jax.random.fold_in(key, 0), (64, 32, 32, 1))
        return sample(
            data.denoise, z, grids.edm(24), solver, key=jax.random.fold_in(key, 1), **settings
        )

    x = np.asarray(images(jax.random.key(0)))
    std = spread(solver, grids.edm(24), data.std, **settings)
    assert abs(x.std() / std - 1) < 4 / np.sqrt(2 * x.size)
    assert (
        abs(x.mean() - 0.3) < 4 * std / np.sqrt(x.size) + 1e-2 * 0.3
    )  # the grid starts at 80, not at infinity
    settings = {
        k: Churn(v.S_churn, v.S_min, v.S_max) if isinstance(v, Churn) else v
        for k, v in settings.items()
    }
    assert abs(spread(solver, grids.edm(4000), data.std, **settings) / data.std - 1) < 2e-3


def spread(solver, sigmas, data_std, churn=None, eta=0.0, variance="small") -> float:
    """Standard deviation of the result for Gaussian data: solvers are linear there, so variances
    obey a recursion.
    """
    n, v = len(sigmas) - 1, sigmas[0] ** 2
    churn = churn if isinstance(churn, Churn) else Churn(churn or 0.0)

    def slope(s):  # d = slope x
        return s / (data_std**2 + s**2)

    for s, t in zip(sigmas[:-1], sigmas[1:]):
        gamma = min(churn.S_churn / n, np.sqrt(2) - 1) if churn.S_min <= s <= churn.S_max else 0.0
        v += churn.S_noise**2 * ((s * (1 + gamma)) ** 2 - s**2)
        s = s * (1 + gamma)
        noise = 1.0 if solver == "ancestral" else eta
        std = noise * t * np.sqrt(1 - t**2 / s**2)
        down = np.sqrt(t**2 - std**2)
        factor = 1 + (down - s) * slope(s)
        if solver == "heun" and t > 0:
            factor = 1 + (down - s) * (slope(s) + factor * slope(down)) / 2
        if variance == "large" and t > 0:
            std = np.sqrt((1 + t**2) * (s**2 - t**2) / (1 + s**2))
        v = factor**2 * v + std**2
    return float(np.sqrt(v))


# Slots


def test_noise_fn_and_what_a_transition_rule_sees():
    """A rule sees the step, its levels and a key; the plain step is the default."""
    seen = []
    noise = jax.random.normal(jax.random.key(0), (5, 2, 2, 2, 1))

    def rule(evaluate, transition, x, noise, info):
        levels = (info.step, info.sigma[0], info.sigma_next[0])
        jax.debug.callback(lambda *v: seen.append([float(a) for a in v]), *levels, ordered=True)
        assert info.steps == 5 and info.key.shape == (2,)
        return plain_step(evaluate, transition, x, noise, info)

    spy = Guidance("spy", transition=rule)
    run = functools.partial(
        sample, DATA.denoise, jnp.ones((2, 2, 2, 1)), grids.edm(5), key=jax.random.key(1)
    )
    for solver, settings in (("ancestral", {}), ("heun", {"eta": 0.7})):
        seen.clear()
        with jax.disable_jit():  # two compiled programs may round apart
            a = run(solver, guidance=spy, noise_fn=lambda step: noise[step], **settings)
            b = run(solver, noise_fn=lambda step: noise[step], **settings)
        jax.effects_barrier()
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(
            seen, np.stack([np.arange(5), grids.edm(5)[:-1], grids.edm(5)[1:]], 1), rtol=1e-6
        )
        assert float(jnp.abs(run(solver, **settings) - b).max()) > 1e-4


def test_a_rule_takes_a_gradient_through_the_denoiser():
    """A rule may differentiate evaluate: pulling x0_hat to 1 moves the images there."""

    def towards_one(evaluate, transition, x, noise, info):
        grad, x0 = jax.grad(lambda x: ((evaluate(x) - 1) ** 2).sum(), has_aux=False)(x), evaluate(x)
        mean, std = transition(x0, x)
        return mean + column(std, x) * (noise - grad / (1e-6 + jnp.abs(grad))), x0

    z = jax.random.normal(jax.random.key(1), (64, 2, 2, 1))
    run = functools.partial(sample, DATA.denoise, z, grids.edm(12), "ancestral", jax.random.key(2))
    assert run(guidance=Guidance("towards one", transition=towards_one)).mean() > run().mean() + 0.3


def test_heun_uses_the_corrector():
    more = as_denoiser(lambda x, sigma, label=None: DATA.denoise(x, sigma) + 0.1)
    denoise = Denoiser(DATA.denoise, corrector=more)
    z = jnp.ones((1, 1, 1, 1))
    plain = sample(DATA.denoise, z, grids.edm(6))
    assert number(sample(denoise, z, grids.edm(6))) != number(plain)
    assert number(sample(denoise, z, grids.edm(6), "euler")) == number(
        sample(DATA.denoise, z, grids.edm(6), "euler")
    )


@pytest.mark.fast
def test_heun_in_turns_is_heun():
    """Without a corrector each evaluation is a turn of one loop; the denoiser as its own corrector
    goes the other way.
    """
    denoise = as_denoiser(DATA.denoise)
    z = jax.random.normal(jax.random.key(1), (2, 2, 2, 1))
    run = functools.partial(sample, latents=z, sigmas=grids.edm(5), trajectory=True)
    turns, steps = run(denoise), run(Denoiser(denoise.evaluate, corrector=denoise))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), turns, steps)


@pytest.mark.fast
@pytest.mark.parametrize(
    "solver, copies", [("euler", 1), ("heun", 1), ("plms", 3), ("dpmpp_2m", 1), ("unipc", 1)]
)
def test_a_program_holds_the_network_so_many_times(solver, copies):
    """What compiling a sampler takes is about this number of networks."""
    run = jax.jit(lambda z: sample(lambda x, sigma, label: jnp.sin(x), z, grids.edm(6), solver))
    assert run.lower(jnp.ones((1, 2, 2, 1))).as_text().count("stablehlo.sine") == copies


class Alternating:
    """A churn rule with a carry: images whose last x0_hat was positive are churned in the next
    step.
    """

    def init(self, batch):
        return jnp.zeros(batch, bool)

    def amounts(self, carry, info):
        return jnp.where(carry, 0.3, 0.0), jnp.ones_like(info.sigma)

    def evaluate(self, denoise, carry, x, sigma, label, info):
        x0_hat = denoise(x, sigma, label)
        return x0_hat, x0_hat.mean((1, 2, 3)) > 0


def test_churn_rule_with_a_carry_works_per_example():
    z = jnp.stack([jnp.ones((2, 2, 1)), -jnp.ones((2, 2, 1))])
    data = Gaussian(0.0, 0.5)
    run = functools.partial(sample, data.denoise, z, grids.edm(8), key=jax.random.key(0))
    plain, churned = run(), run(churn=Alternating())
    assert float(jnp.abs(churned[0] - plain[0]).max()) > 1e-2
    np.testing.assert_allclose(churned[1], plain[1], rtol=1e-5)


def test_label_and_rounding_reach_the_denoiser():
    def denoise(x, sigma, label=None):
        return DATA.denoise(x, sigma) + column(label, x)

    label = jnp.asarray([0, 1], jnp.int32)
    x = sample(denoise, jnp.zeros((2, 1, 1, 1)), grids.edm(6), label=label)
    assert number(x) == 0 and number(x[1:]) > 0.3

    denoise, calls = counted()
    denoise = Denoiser(denoise, round_sigma=lambda sigma: jnp.maximum(jnp.round(sigma), 1.0))
    sample(
        denoise, jnp.ones((1, 1, 1, 1)), [8.4, 2.6, 0.0], "heun", churn=0.5, key=jax.random.key(0)
    )
    jax.effects_barrier()
    assert sorted(calls) == [
        3.0,
        4.0,
        10.0,
    ]  # 8 (1 + .25) = 10 -> corrector at 3 -> 3 (1 + .25) = 3.75


@pytest.mark.parametrize("kind", ["vp", "ve", "iddpm"])
def test_a_grid_outside_the_network_range_is_clipped(kind):
    """The default grid reaches below what these networks know; iDDPM's table would round 0.002 to
    0.
    """
    denoise = getattr(precondition, kind)(lambda x, c_noise, label=None: 0.3 * x)
    z = jnp.ones((1, 2, 2, 1))
    x = sample(denoise, z, grids.edm(12))
    assert jnp.isfinite(x).all()
    n = int((grids.edm(12)[:-1] > denoise.sigma_min).sum())
    known = np.append(np.maximum(grids.edm(12)[: n + 1], denoise.sigma_min)[: n + (n < 12)], 0.0)
    np.testing.assert_allclose(x, sample(denoise, z, known), rtol=1e-5)


@pytest.mark.slow_cases("ddim", "spndm", "plms", "dopri5", "pc", "dpmpp_2m_sde")
@pytest.mark.parametrize("solver", SOLVERS)
def test_trajectory(solver):
    z = jax.random.normal(jax.random.key(1), (2, 2, 2, 1))
    run = functools.partial(sample, DATA.denoise, z, grids.edm(6), solver, jax.random.key(0))
    x, path = run(trajectory=True)
    assert path.states.shape == (7, *z.shape) and path.x0_hats.shape == (6, *z.shape)
    np.testing.assert_array_equal(path.states[-1], x)
    np.testing.assert_array_equal(path.states[0], z * 80)
    np.testing.assert_allclose(x, run(), rtol=1e-5, atol=1e-6)
    sigma = jnp.asarray(grids.edm(6)[3], jnp.float32)
    np.testing.assert_allclose(
        path.x0_hats[3], DATA.denoise(path.states[3], sigma[None]), rtol=1e-4, atol=1e-6
    )


@pytest.mark.slow_cases("dopri5", "plms", "spndm", "ancestral")
@pytest.mark.parametrize("solver", SOLVERS)
def test_finite_value_and_gradient(solver):
    def total(z):
        return sample(two_bumps().denoise, z, grids.edm(5), solver, key=jax.random.key(0)).sum()

    value, grad = jax.value_and_grad(total)(jax.random.normal(jax.random.key(1), (2, 2, 2, 1)))
    assert jnp.isfinite(value) and jnp.isfinite(grad).all() and jnp.abs(grad).max() > 0


@pytest.mark.parametrize("solver", [s for s in FIXED if FEWEST_STEPS.get(s, 1) == 1])
def test_a_single_step_is_the_denoised_image(solver):
    z = jax.random.normal(jax.random.key(1), (2, 2, 2, 1))
    more = {"corrector_steps": 0} if solver == "pc" else {}
    x = sample(DATA.denoise, z, grids.edm(1), solver, key=jax.random.key(0), **more)
    np.testing.assert_allclose(x, DATA.denoise(80 * z, jnp.full(2, 80.0)), rtol=1e-6)


@pytest.mark.fast
@pytest.mark.parametrize(
    "settings, words",
    [
        (
            {"solver": "rk45"},
            "solver='rk45'; expected one of euler, heun, ddim, ancestral, spndm, fpndm, dpmpp_2m",
        ),
        (
            {"guidance": PLAIN},
            "expected solver='ancestral', or solver='ddim' or 'heun' with eta > 0",
        ),
        ({"guidance": PLAIN, "solver": "ddim"}, "deterministic step"),
        ({"solver": "ancestral"}, "key=None; expected a key"),
        ({"churn": 1.0}, "key=None"),
        ({"eta": 0.5, "solver": "euler"}, "eta=0.5 with solver 'euler'"),
        ({"eta": 2.0}, "from 0 to 1"),
        ({"variance": "large"}, "expected solver 'ancestral'"),
        ({"churn": 1.0, "solver": "ddim"}, "churn with solver 'ddim'"),
        ({"churn": {"churn": 1.0}}, "unknown setting churn; expected S_churn, S_min"),
        ({"churn": -1.0}, "S_churn=-1.0"),
        ({"churn": "much"}, "a ChurnRule"),
        ({"sigmas": [1.0]}, "N of at least 1"),
        ({"sigmas": [1.0, 2.0, 0.0]}, "fall at every step"),
        ({"solver": "spndm", "sigmas": [1.0, 0.0]}, "at least 2"),
        ({"solver": "fpndm", "sigmas": [3.0, 2.0, 1.0, 0.0]}, "at least 4"),
        ({"solver": "ancestral", "key": "keys"}, "one per image"),
    ],
)
def test_bad_settings_say_what_to_change(settings, words):
    settings = {"sigmas": [2.0, 1.0, 0.0], "latents": jnp.ones((2, 1, 1, 1)), **settings}
    if settings.get("key") == "keys":
        settings["key"] = jax.random.split(jax.random.key(0), 3)
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        sample(DATA.denoise, **settings)
