"""What people hand to the public functions: keys of either style, NumPy's numbers, arrays of their
own, None; and what is refused in one sentence.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax.diffusion import grids, precondition
from ogdm_jax.inverse import operators
from ogdm_jax.methods import apg, autoguidance, cfg, ddnm, dg, diffpir, dps, dsg, mpgd, ogdm, pigdm
from ogdm_jax.sampling import Churn, sample
from ogdm_jax.sampling.likelihood import dequantised, log_likelihood

pytestmark = pytest.mark.fast

GRID = grids.edm(3)
LATENTS = np.random.default_rng(0).normal(size=(2, 4, 4, 1)).astype(np.float32)
HALF = np.tile([[1.0, 0.0]], (4, 2))
Y = HALF[None, ..., None] * np.full((2, 4, 4, 1), 0.5)


def gaussian(x, sigma, label=None):
    """The denoiser of N(0, I), shifted by the class."""
    x0_hat = x / (1 + sigma[:, None, None, None] ** 2)
    return x0_hat if label is None else x0_hat + 0.1 * label[:, None, None, None].astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("solver", "eta"))
def drawn(key, latents=LATENTS, solver="ancestral", eta=None):
    return sample(gaussian, latents, GRID, solver, key, eta=eta)


@pytest.mark.parametrize("batch", [1, 2])
def test_keys_of_either_style_are_one(batch):
    typed, words = jax.random.key(3), jax.random.PRNGKey(3)
    expected = drawn(typed, LATENTS[:batch])
    np.testing.assert_array_equal(drawn(words, LATENTS[:batch]), expected)
    keys = jax.random.split(typed, batch)
    words, each = jax.random.key_data(keys), drawn(keys, LATENTS[:batch])
    np.testing.assert_array_equal(drawn(words, LATENTS[:batch]), each)


@pytest.mark.parametrize("key", [0, np.zeros(2), np.zeros(3, np.uint32)])
def test_what_is_no_key_is_refused(key):
    with pytest.raises(ValueError, match=r"key=.*expected jax.random.key\(SEED\)"):
        sample(gaussian, LATENTS, GRID, "ancestral", key)


def test_numpys_float64_is_no_warning():
    expected = sample(gaussian, LATENTS, GRID, "euler")
    wide = LATENTS.astype(np.float64)
    np.testing.assert_array_equal(sample(gaussian, wide, GRID, "euler"), expected)
    np.testing.assert_array_equal(sample(gaussian, wide.tolist(), GRID, "euler"), expected)
    denoise = precondition.edm(lambda x, c_noise, label=None: x)
    for operator in (operators.inpaint(HALF), operators.gaussian_blur(3, 1.0)):
        np.testing.assert_array_equal(operator.forward(wide), operator.forward(LATENTS))
    answer = denoise(LATENTS, np.float32([1, 2]))
    np.testing.assert_array_equal(denoise(wide, np.array([1.0, 2.0])), answer)


def test_numpys_numbers_are_numbers():
    key = jax.random.key(0)
    np.testing.assert_array_equal(
        drawn(None, solver="ddim", eta=np.float32(0)), drawn(None, solver="euler")
    )
    np.testing.assert_array_equal(
        drawn(key, solver="ddim", eta=np.int64(1)), drawn(key, solver="ddim", eta=1)
    )
    with pytest.raises(ValueError, match="eta=3.0; expected a number from 0 to 1"):
        sample(gaussian, LATENTS, GRID, "ddim", key, eta=np.float32(3))
    churned = lambda churn: sample(gaussian, LATENTS, GRID, "euler", key, churn=churn)
    for churn in (np.int64(2), np.float32(2), jnp.float32(2)):
        np.testing.assert_allclose(churned(churn), churned(2), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(churned)(2.0), churned(2), rtol=1e-5)
    for churn in (np.float32(-1), Churn(np.float32(-1))):
        with pytest.raises(ValueError, match="S_churn=-1.0; expected a number of at least 0"):
            churned(churn)
    assert cfg.Settings(np.int64(2), window=np.array([0.5, 2])) == cfg.Settings(2.0, (0.5, 2.0))
    loss = lambda x0_hat: jnp.sum(jnp.square(x0_hat), (1, 2, 3))
    for module, words in ((dsg, "dsg.rate"), (dps, "dps.scale")):
        with pytest.raises(ValueError, match=f"{words}: -1.0 given"):
            module.guidance(loss, np.float32(-1))


GUIDED = {
    "cfg": cfg.guidance,
    "apg": apg.guidance,
    "autoguidance": functools.partial(autoguidance.guidance, lambda x, sigma, label: 0.9 * x),
    "dg": functools.partial(dg.guidance, lambda x, sigma, label: -jnp.sum(x**2, (1, 2, 3))),
}


@pytest.mark.parametrize("name", GUIDED)
def test_a_weight_may_be_traced_or_of_each_image(name):
    label = jnp.arange(2)
    run = jax.jit(
        lambda weight: sample(
            gaussian, LATENTS, GRID, "euler", label=label, guidance=GUIDED[name](weight)
        )
    )
    both = run(jnp.float32([1.5, 3.0]))
    for image, weight in enumerate((1.5, 3.0)):
        np.testing.assert_allclose(run(weight)[image], both[image], rtol=1e-5, atol=1e-6)
    known = jax.jit(
        lambda: sample(gaussian, LATENTS, GRID, "euler", label=label, guidance=GUIDED[name](3))
    )()
    np.testing.assert_allclose(known, run(3.0), rtol=1e-5, atol=1e-6)


def test_no_guidance_and_what_is_none():
    expected = sample(gaussian, LATENTS, GRID, "euler")
    np.testing.assert_array_equal(sample(gaussian, LATENTS, GRID, "euler", guidance=None), expected)
    for wrong in (gaussian, [gaussian], "dsg"):
        with pytest.raises(ValueError, match="guidance: .* given; expected what a method gives"):
            sample(gaussian, LATENTS, GRID, guidance=wrong)


def test_masks_are_of_ones_and_zeros_and_fit():
    x = jnp.ones((2, 4, 4, 1))
    for mask in (HALF.tolist(), HALF.astype(bool), HALF.astype(np.uint8), jnp.asarray(HALF)):
        np.testing.assert_array_equal(operators.inpaint(mask).forward(x)[0, :, :, 0], HALF)
        np.testing.assert_array_equal(
            jax.jit(lambda x, mask=mask: operators.inpaint(mask).forward(x))(x)[1, :, :, 0], HALF
        )
    with pytest.raises(ValueError, match="mask: numbers from 0.0 to 255.0; expected 1 where"):
        operators.inpaint(255 * HALF)
    for shape in ((4, 4, 3), (3, 4, 4, 1)):
        with pytest.raises(
            ValueError, match=r"mask: shape .*expected one that fits \(2, 4, 4, 1\)"
        ):
            operators.inpaint(np.ones(shape)).forward(x)


SOLVED = {"ddnm": ddnm.guidance, "diffpir": diffpir.guidance, "pigdm": pigdm.guidance}


@pytest.mark.parametrize("name", SOLVED)
def test_the_noise_of_measurements_is_known_traced_or_refused(name):
    operator, key = operators.inpaint(HALF), jax.random.key(0)

    def run(std, y=Y):
        guidance = SOLVED[name](operator, y, std)
        return sample(gaussian, LATENTS, GRID, "ancestral", key, guidance=guidance)

    expected = jax.jit(lambda: run(0.1))()
    np.testing.assert_allclose(jax.jit(run)(0.1), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda: run(jnp.float32(0.1)))(), expected, rtol=1e-6)
    exact = np.asarray(jax.jit(run)(0.0))
    np.testing.assert_allclose(exact[:, :, ::2], 0.5, atol=1e-5)  # as measured
    for std in (-0.1, np.float32(np.nan), np.ones(2)):
        with pytest.raises(ValueError, match=f"{name}: std=.*expected a number of at least 0"):
            run(std)
    with pytest.raises(ValueError, match=r"y: shape \(2, 4, 4, 3\); expected \(2, 4, 4, 1\)"):
        run(0.1, np.repeat(Y, 3, -1))
    with pytest.raises(ValueError, match="y: type uint8; expected floats"):
        run(0.1, Y.astype(np.uint8))


def test_measurements_take_the_type_of_the_images():
    with jax.enable_x64(True):
        for name, method in SOLVED.items():
            guidance = method(operators.inpaint(HALF), Y, 0.1)  # float64, as NumPy makes it
            how = {"key": jax.random.key(0), "guidance": guidance}
            images = jax.eval_shape(
                lambda z, how=how: sample(gaussian, z, GRID, "ancestral", **how), LATENTS
            )
            assert images.dtype == np.float32, name


def test_one_number_for_each_image():
    total = lambda x0_hat: jnp.mean(x0_hat)
    run = lambda guidance: sample(
        gaussian, LATENTS, GRID, "ancestral", jax.random.key(0), guidance=guidance
    )
    for module in (dsg, dps, mpgd):
        with pytest.raises(
            ValueError, match=r"loss: gives shape \(\); expected one number per image"
        ):
            run(module.guidance(total, 0.1))
    column = lambda x, sigma, label: jnp.sum(x, (1, 2, 3))[:, None]
    with pytest.raises(ValueError, match=r"log_ratio: gives shape \(2, 1\); expected one number"):
        sample(gaussian, LATENTS, GRID, "euler", guidance=dg.guidance(column))
    with pytest.raises(ValueError, match="y: type uint8; expected floats"):
        operators.measurement_loss(operators.identity(), Y.astype(np.uint8))


def test_a_jump_goes_to_levels_that_are_there():
    for k in (1.2, 1.5, 18.5):
        with pytest.raises(
            ValueError, match=f"k: {k} given; expected a number from 0 to 1, or a whole"
        ):
            ogdm.next_sigma(jnp.ones(1), jnp.zeros(1), k)
    whole = ogdm.next_sigma(np.array([1, 2]), np.zeros(2), 18)  # levels between whole numbers
    np.testing.assert_allclose(whole, ogdm.next_sigma(jnp.float32([1, 2]), np.zeros(2), 18))


def test_discriminator_guidance_under_shard_map():
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("d",))
    part, guidance = jax.sharding.PartitionSpec("d"), GUIDED["dg"](1e-2)
    run = lambda z: sample(gaussian, z, GRID, "euler", guidance=guidance)
    divided = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=part, out_specs=part))(LATENTS)
    np.testing.assert_allclose(divided, jax.jit(run)(LATENTS), rtol=1e-5, atol=1e-6)


def test_a_likelihood_takes_what_sampling_takes():
    key, x0 = jax.random.key(0), jnp.asarray(LATENTS, jnp.bfloat16)  # exact in float32
    expected = jax.jit(lambda x0, key: log_likelihood(gaussian, x0, key, probe="exact"))
    found = expected(x0, key)
    density = jax.scipy.stats.norm.logpdf(x0.astype(jnp.float32)).sum((1, 2, 3))
    np.testing.assert_allclose(found.nats, density, atol=2e-2)
    np.testing.assert_array_equal(found.nats, expected(x0.astype(jnp.float32), key).nats)
    levels = np.zeros((2, 4, 4, 1), np.uint8)
    each = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(2))
    np.testing.assert_array_equal(dequantised(levels, key), dequantised(levels, each))
    np.testing.assert_array_equal(
        dequantised(levels, jax.random.PRNGKey(0)), dequantised(levels, each)
    )
    with pytest.raises(ValueError, match="x0: uint8 given; expected floating-point numbers"):
        log_likelihood(gaussian, levels, key)
    with pytest.raises(ValueError, match="key=None; expected"):
        log_likelihood(gaussian, x0, None)
