"""Measurement operators against dense matrices, published numbers and identities; noise against its
moments.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax.diffusion import grids
from ogdm_jax.inverse import degradations as degrade
from ogdm_jax.inverse import networks, operators
from ogdm_jax.methods import ddnm, diffpir, pigdm
from ogdm_jax.sampling.sampler import sample

SIZE = 16
RNG = np.random.default_rng(0)
KERNEL = degrade.motion_kernel(np.random.default_rng(3), 7)
MASK = degrade.random_mask(np.random.default_rng(1), SIZE)
LINEAR = {
    "inpaint": operators.inpaint(MASK),
    "super_resolution": operators.super_resolution(4, SIZE),
    "gaussian_blur": operators.gaussian_blur(9, 1.2),
    "motion_blur": operators.motion_blur(KERNEL),
    "identity": operators.identity(),
}


def images(n: int = 2, channels: int = 3, size: int = SIZE):
    return jnp.asarray(RNG.normal(size=(n, size, size, channels)), jnp.float32)


def dense(op, size: int = 8):
    """The operator as a matrix, for one channel."""
    basis = jnp.eye(size * size).reshape(-1, size, size, 1)
    return np.asarray(op.forward(basis)).reshape(size * size, -1).T


@pytest.mark.parametrize("name", LINEAR)
def test_adjoints_and_singular_values(name):
    op = LINEAR[name]
    x = images()
    y = op.forward(x)
    other = jnp.asarray(RNG.normal(size=y.shape), jnp.float32)
    np.testing.assert_allclose(
        jnp.vdot(y, other), jnp.vdot(x, op.adjoint(other)), rtol=2e-5, atol=2e-4
    )
    assert op.adjoint(other).shape == x.shape and op.linear
    if op.spectrum is None:
        return
    basis = op.spectrum(x.shape[1:])
    v = basis.to(x)
    np.testing.assert_allclose(basis.back(v), x, atol=3e-6)
    np.testing.assert_allclose(basis.measured(y), basis.values * v, atol=2e-5)  # U^T A x = S V^T x
    np.testing.assert_allclose(
        basis.back(basis.values * basis.measured(y)), op.adjoint(y), atol=2e-5
    )


def test_super_resolution_numbers_of_the_published_operator():
    weights = np.array(
        [
            -0.00170898,
            -0.01098633,
            -0.01831055,
            -0.01196289,
            0.02270508,
            0.09741211,
            0.18188477,
            0.2409668,
        ]
    )
    matrix = degrade.resize_matrix(4, 256)
    np.testing.assert_allclose(matrix[32, 122:138], np.r_[weights, weights[::-1]], atol=1e-8)
    np.testing.assert_array_equal(
        np.flatnonzero(matrix[0]), np.arange(10)
    )  # folded: 5 4 3 2 1 0 0 1 .. 9
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)
    ramp = np.linspace(0, 1, 256)[:, None] * np.linspace(-1, 1, 256)[None]
    y = matrix @ ramp @ matrix.T
    np.testing.assert_allclose(
        [y[0, 0], y[10, 20], y[63, 63]], [-0.0052759, -0.0587159, 0.9840585], atol=1e-7
    )
    resized = jax.image.resize(jnp.asarray(ramp, jnp.float32), (64, 64), "cubic", antialias=True)
    np.testing.assert_allclose(resized[3:-3, 3:-3], y[3:-3, 3:-3], atol=2e-6)


def test_gaussian_kernel_of_the_published_operator():
    taps = degrade.gaussian_taps(61, 3.0)
    assert np.flatnonzero(taps).size == 25
    np.testing.assert_allclose(taps[30] ** 2, 0.01768488749, atol=1e-11)
    g = np.exp(-(np.arange(-12, 13) ** 2) / 18)
    np.testing.assert_allclose(taps[18:43], g / g.sum(), atol=1e-15)


def test_blurs_mirror_the_border_without_repeating_it():
    x = images(1, 1)
    taps = degrade.gaussian_taps(9, 1.2)
    padded = np.pad(np.asarray(x)[0, :, :, 0], 4, mode="reflect")
    want = sum(
        taps[i] * taps[j] * padded[i : i + SIZE, j : j + SIZE] for i in range(9) for j in range(9)
    )
    np.testing.assert_allclose(LINEAR["gaussian_blur"].forward(x)[0, ..., 0], want, atol=2e-6)
    np.testing.assert_allclose(
        operators.motion_blur(np.outer(taps, taps)).forward(x),
        LINEAR["gaussian_blur"].forward(x),
        atol=2e-6,
    )
    padded = np.pad(np.asarray(x)[0, :, :, 0], 3, mode="reflect")
    want = sum(
        KERNEL[i, j] * padded[i : i + SIZE, j : j + SIZE] for i in range(7) for j in range(7)
    )
    np.testing.assert_allclose(LINEAR["motion_blur"].forward(x)[0, ..., 0], want, atol=2e-6)


def test_kernels_larger_than_the_image_still_fold_back():
    matrix = dense(operators.gaussian_blur(61, 3.0), 4)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("method", [ddnm, diffpir, pigdm])
def test_what_a_mask_darkens_is_restored(method):
    """y = x0 / 2 was taken for x0 / 4."""
    operator, x0 = operators.inpaint(np.full((4, 4), 0.5)), 0.5 * images(2)[:, :4, :4]
    y = operator.forward(x0)
    np.testing.assert_array_equal(operator.count(y), x0[0].size)
    shrink = lambda x, sigma, label=None: x / (1 + 4 * sigma[:, None, None, None] ** 2)
    z = jax.random.normal(jax.random.key(0), x0.shape)
    how = {"key": jax.random.key(1), "guidance": method.guidance(operator, y, 0.0)}
    found = sample(shrink, z, grids.edm(8), "ancestral", **how)
    np.testing.assert_allclose(found, x0, atol=2e-5)


def test_masks():
    rng = np.random.default_rng(0)
    for _ in range(5):
        hidden = 1 - degrade.random_mask(rng, 256, 0.3, 0.7).mean()
        assert 0.3 - 1e-4 <= hidden <= 0.7
    assert (degrade.random_mask(rng, 256, 0.92, 0.92) == 0).sum() == int(65536 * 0.92)
    for _ in range(5):
        rows, columns, _ = np.nonzero(degrade.box_mask(rng, 256, 128) == 0)
        assert rows.size == 128 * 128 and rows.min() >= 16 and columns.min() >= 16
        assert rows.max() - rows.min() == 127 and rows.max() < 240
    per_image = np.stack([MASK, 1 - MASK])
    x = images(2)
    y = operators.inpaint(per_image).forward(x)
    np.testing.assert_array_equal(y[1], x[1] * (1 - MASK))
    np.testing.assert_allclose(
        operators.inpaint(per_image).count(y), [3 * MASK.sum(), 3 * (1 - MASK).sum()]
    )


def test_motion_kernels_differ_and_are_normal():
    line = degrade.motion_kernel(np.random.default_rng(0), 61, 0.0)
    walk = degrade.motion_kernel(np.random.default_rng(0), 61, 1.0)
    for kernel in (line, walk):
        assert kernel.shape == (61, 61) and kernel.min() >= 0 and abs(kernel.sum() - 1) < 1e-12
        at = np.indices(kernel.shape).reshape(2, -1) - 30
        assert np.abs((kernel.ravel() * at).sum(1)).max() < 16  # it stays around the middle
    spread = [np.linalg.svd(k, compute_uv=False) for k in (line, walk)]
    assert np.linalg.matrix_rank(walk) > 5 and np.abs(line - walk).sum() > 0.5 and spread[0][0] > 0


def test_phase_retrieval_keeps_energy_and_forgets_shifts():
    op = operators.phase_retrieval(2.0)
    inner = jnp.pad(images(1, 1, 8), [(0, 0), (4, 4), (4, 4), (0, 0)])
    y = op.forward(inner)
    assert y.shape == (1, 24, 24, 1) and op.forward(images(1, 1, 32)).shape == (1, 48, 48, 1)
    np.testing.assert_allclose(jnp.sum(y**2), jnp.sum(inner**2), rtol=1e-5)  # orthonormal
    np.testing.assert_allclose(op.forward(jnp.roll(inner, (2, -3), (1, 2))), y, atol=1e-5)
    np.testing.assert_allclose(
        y[0, 12, 12, 0], abs(float(inner.sum())) / 24, rtol=1e-4
    )  # centred: the mean is inside
    grad = jax.grad(lambda x: op.forward(x).sum())(jnp.zeros((1, 8, 8, 1)))
    assert jnp.isfinite(grad).all()
    with pytest.raises(ValueError, match="'phase_retrieval' has no adjoint"):
        op.adjoint(y)


def test_nonlinear_operators():
    x = images(1) * 0.4
    np.testing.assert_array_equal(operators.high_dynamic_range().forward(x), jnp.clip(2 * x, -1, 1))
    flat = jnp.full((1, 8, 8, 1), 0.3)
    blur = operators.nonlinear_blur(KERNEL)
    np.testing.assert_allclose(
        blur.forward(flat), flat, atol=1e-5
    )  # light of a constant image is constant
    half = jnp.concatenate([jnp.full((1, 8, 4, 1), -1.0), jnp.full((1, 8, 4, 1), 1.0)], axis=2)
    box = np.full((3, 3), 1 / 9)
    grey = operators.nonlinear_blur(box).forward(half)[0, 4, 4, 0]
    np.testing.assert_allclose(
        grey, 2 * (2 / 3) ** (1 / 2.2) - 1, atol=2e-3
    )  # two thirds of the light, not of the value
    assert jnp.isfinite(
        jax.grad(lambda v: blur.forward(v).sum())(jnp.full((1, 8, 8, 1), -1.0))
    ).all()
    doubled = operators.nonlinear_blur(KERNEL, network=lambda v: v / 2)
    np.testing.assert_allclose(doubled.forward(flat), flat / 2 - 0.5, atol=1e-6)


def test_style_embedding_and_segmentation():
    x = images(2)
    f = x.reshape(2, -1, 3)
    gram = networks.style(lambda v: v).forward(x)
    np.testing.assert_allclose(gram, jnp.stack([a.T @ a for a in f]), rtol=1e-5, atol=1e-4)
    shuffled = x[:, ::-1]  # a style does not know where things are
    loss = operators.measurement_loss(networks.style(lambda v: v), gram)
    np.testing.assert_allclose(loss(shuffled) / jnp.sum(gram**2, (1, 2)), 0, atol=1e-9)
    e = networks.embedding(lambda v: v.mean((1, 2)))
    np.testing.assert_allclose(jnp.sum(e.forward(x) ** 2, 1), 1, rtol=1e-5)
    assert jnp.isfinite(jax.grad(lambda v: e.forward(v).sum())(jnp.zeros((1, 4, 4, 3)))).all()
    labels = jnp.argmax(x, -1)
    segment = networks.label_loss(networks.segmentation(lambda v: 50 * v), labels)
    assert segment(x).shape == (2,) and (segment(x) < segment(-x)).all()
    with pytest.raises(ValueError, match="labels: shape"):
        networks.label_loss(networks.segmentation(lambda v: v), labels[:, :4])(x)


def test_measurement_loss_is_a_sum_per_image_and_smooth_at_zero():
    op = LINEAR["super_resolution"]
    x = images(3)
    y = op.forward(x)
    loss = operators.measurement_loss(op, y)
    np.testing.assert_allclose(loss(x), 0, atol=1e-6)
    moved = x + 0.1
    np.testing.assert_allclose(loss(moved), 0.01 * 3 * 16, rtol=1e-4)  # weights sum to 1
    root = operators.measurement_loss(op, y, squared=False)
    np.testing.assert_allclose(root(moved) ** 2, loss(moved), rtol=1e-5)
    exact = operators.measurement_loss(operators.identity(), x, squared=False)
    assert (jax.grad(lambda v: exact(v).sum())(x) == 0).all()
    with pytest.raises(ValueError, match=r"y: shape \(3, 4, 4, 1\); expected \(3, 4, 4, 3\)"):
        operators.measurement_loss(op, y[..., :1])(x)


def test_noise_has_its_moments_and_explains_its_residual():
    keys = jax.random.split(jax.random.key(0), 64)
    x = jnp.broadcast_to(jnp.linspace(-0.9, 0.9, 16)[None, :, None, None], (64, 16, 16, 1))
    noisy = degrade.gaussian_noise(keys, x, 0.05)
    np.testing.assert_allclose(jnp.std(noisy - x), 0.05, rtol=0.03)
    np.testing.assert_allclose(
        degrade.gaussian_noise(keys[3:4], x[:1], 0.05)[0], noisy[3], atol=1e-7
    )
    for rate in (0.5, 4.0):
        counted = degrade.poisson_noise(keys, x, rate)
        deviation = jnp.std(counted - x, axis=(0, 2, 3))
        dark = slice(0, 12)  # brighter pixels are clipped at 1
        np.testing.assert_allclose(
            deviation[dark], degrade.poisson_std(x[0, dark, 0, 0], rate), rtol=0.12
        )
        np.testing.assert_allclose(jnp.mean((counted - x)[:, dark]), 0, atol=0.01)
    op = operators.inpaint(MASK)
    ratio = operators.residual_ratio(op, degrade.gaussian_noise(keys, op.forward(x), 0.05), x, 0.05)
    np.testing.assert_allclose(ratio, 1, atol=0.3)
    np.testing.assert_allclose(jnp.mean(ratio), 1, atol=0.03)


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: operators.inpaint(np.ones(4)), "mask: shape"),
        (lambda: operators.inpaint(MASK).forward(jnp.ones((1, 8, 8, 1))), "mask: .* pixels"),
        (lambda: operators.super_resolution(3, 16), "factor=3, size=16"),
        (lambda: operators.gaussian_blur(8, 1.0), "size=8"),
        (lambda: operators.gaussian_blur(9, 0.0), "std=0.0"),
        (lambda: operators.motion_blur(np.ones((4, 4))), "kernel: shape"),
        (lambda: operators.nonlinear_blur(KERNEL, gamma=0.0), "gamma=0.0"),
        (lambda: operators.phase_retrieval(-1.0), "oversample=-1.0"),
        (lambda: degrade.random_mask(RNG, 8, 0.7, 0.3), "low=0.7"),
        (lambda: degrade.box_mask(RNG, 16, 16), "box=16"),
        (lambda: degrade.motion_kernel(RNG, 3), "size=3"),  # one point: no blur
        (lambda: degrade.motion_kernel(RNG, 4), "size=4"),
        (
            lambda: degrade.poisson_noise(
                jax.random.split(jax.random.key(0), 1), jnp.ones((1, 1, 1, 1)), 0.0
            ),
            "rate=0",
        ),
    ],
)
def test_bad_settings_say_what_to_change(make, words):
    with pytest.raises(ValueError, match=words):
        make()
