"""DiT, the autoencoder, the text U-Net and encoder: what holds beside the authors' numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax.networks import DiT
from ogdm_jax.networks.clip_text import CLIPText
from ogdm_jax.networks.sd_unet import UNet2DCondition
from ogdm_jax.networks.vae import AutoencoderKL
from tests.support.networks import drawn, fresh, run

DIT = DiT(img_resolution=8, out_channels=8, label_dim=3, width=32, depth=3, heads=4)
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (2, 8, 8, 4))
T = jnp.asarray([3.0, 700.5])
Y = jnp.asarray([0, 2])
CONTEXT = jax.random.normal(jax.random.key(2), (2, 5, 16))
TINY = {"widths": (8, 16), "attends": (True, False), "heads": (2, 2), "context_dim": 16}
UNET = UNet2DCondition(img_resolution=8, num_blocks=1, groups=4, **TINY)
VAE = AutoencoderKL(widths=(8, 16), num_blocks=1, groups=4)


def test_fresh_dit_gives_zero_and_every_block_is_the_identity():
    variables = fresh(DIT, X, T, Y)
    assert not np.any(run(DIT, variables, X, T, Y))
    first, last = run(DIT, variables, X, T, Y, at="block0,block2", method="features")
    np.testing.assert_array_equal(first, last)


def test_the_bound_of_fresh_qkv_is_that_of_the_joint_matrix():
    kernel = fresh(DIT, X, T, Y)["params"]["blocks"]["attn.qkv"]["kernel"]
    bound = np.sqrt(6 / (4 * 32))
    assert 0.97 * bound < np.abs(kernel).max() <= bound
    assert kernel.shape == (3, 32, 96)
    assert np.any(kernel[0] != kernel[1])


def test_no_class_is_the_last_row_and_fractions_of_time_count():
    variables = drawn(DIT, X, T, Y)
    none = run(DIT, variables, X, T, None)
    np.testing.assert_array_equal(none, run(DIT, variables, X, T, jnp.asarray([-1, -1])))
    np.testing.assert_array_equal(none, run(DIT, variables, X, T, jnp.asarray([3, 3])))
    assert np.abs(none - run(DIT, variables, X, T, Y)).max() > 1e-2
    assert np.abs(none - run(DIT, variables, X, T + 0.5, None)).max() > 1e-5


def test_a_dit_without_the_row_refuses_no_class():
    without = DIT.clone(no_class=False)
    variables = drawn(without, X, T, Y)
    with pytest.raises(ValueError, match="label=None; this network has no row"):
        without.apply(variables, X, T, None)
    assert np.isnan(run(without, variables, X, T, jnp.asarray([-1, 0]))[0]).all()


@pytest.mark.slow_cases("unet")
@pytest.mark.parametrize("network,label", [(DIT, Y), (UNET, CONTEXT)], ids=["dit", "unet"])
def test_remat_changes_no_gradient(network, label):
    variables = drawn(network, X, T, label)

    def gradient(network):
        loss = lambda v: jnp.sum(jnp.square(network.apply(v, X, T, label)))
        return jax.jit(jax.grad(loss))(variables)

    plain, again = gradient(network), gradient(network.clone(remat=True))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(plain))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)
    jax.tree.map(close, plain, again)


@pytest.mark.parametrize("network,label", [(DIT, Y), (UNET, CONTEXT)], ids=["dit", "unet"])
def test_bfloat16_is_near_and_the_time_stays_float32(network, label):
    variables = drawn(network, X, T, label)
    low = network.clone(dtype=jnp.bfloat16)
    exact, near = (run(n, variables, X, T, label) for n in (network, low))
    assert near.dtype == jnp.float32
    assert np.abs(exact - near).max() < 0.05 * np.abs(exact).max()
    embs = (run(n, variables, X, T, label, at="emb", method="features") for n in (network, low))
    np.testing.assert_array_equal(*embs)


@pytest.mark.parametrize("network,label", [(DIT, Y), (UNET, CONTEXT)], ids=["dit", "unet"])
def test_an_image_does_not_depend_on_its_batch(network, label):
    variables = drawn(network, X, T, label)
    both = run(network, variables, X, T, label)
    alone = run(network, variables, X[:1], T[:1], label[:1])
    np.testing.assert_allclose(both[:1], alone, rtol=0, atol=1e-5 * np.abs(both).max())


def test_nothing_behind_the_middle_is_computed():
    """SP's frozen network: the way up is not part of the program."""
    variables = drawn(UNET, X, T, CONTEXT)
    program = lambda **more: str(
        jax.make_jaxpr(lambda v: UNET.apply(v, X, T, CONTEXT, **more))(variables)
    )
    whole = program().count("conv_general_dilated")
    assert program(at="mid", method="features").count("conv_general_dilated") < 0.6 * whole


def test_an_encoder_of_the_decoder_and_its_sizes():
    image = jax.random.normal(KEY, (2, 12, 8, 3))
    variables = drawn(VAE, image)
    moments = run(VAE, variables, image, method="encode")
    assert moments.shape == (2, 6, 4, 8)
    assert run(VAE, variables, moments[..., :4], method="decode").shape == image.shape
    np.testing.assert_allclose(VAE.from_scaled(VAE.to_scaled(moments)), moments, rtol=1e-6)


@pytest.mark.parametrize(
    "call,said",
    [
        (lambda: DIT.init(KEY, X[:, :7], T, Y), "sides divisible by 2"),
        (lambda: DIT.init(KEY, X, T, jnp.ones((2, 3))), "expected integers"),
        (lambda: DIT.init(KEY, X, T, Y, jnp.ones((2, 9))), "augmentation labels"),
        (lambda: DIT.clone(heads=5).init(KEY, X, T, Y), "width 32"),
        (
            lambda: DIT.apply(drawn(DIT, X, T, Y), X, T, Y, at="block3", method="features"),
            "no layer 'block3'",
        ),
        (lambda: UNET.init(KEY, X[:, :7], T, CONTEXT), "sides divisible by 2"),
        (lambda: UNET.init(KEY, X, T, None), "expected a text's tokens"),
        (lambda: UNET.init(KEY, X, T, CONTEXT[..., :3]), "expected a text's tokens"),
        (lambda: UNET.clone(groups=3).init(KEY, X, T, CONTEXT), "multiple of the 3 groups"),
        (lambda: VAE.init(KEY, jnp.ones((1, 7, 8, 3))), "sides divisible by 2"),
        (
            lambda: CLIPText(10, 4, 8, 1, 2, 16).init(KEY, jnp.ones((1, 5), jnp.int32)),
            "at most 4",
        ),
    ],
)
def test_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()
