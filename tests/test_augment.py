"""EDM's augmentation: labels, frequencies, directions, a second route of the resampling. Numbers:
families/.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax.data.augment import SYM6, AugmentPipe, warp, xflip

OFF = dict(xflip=0, yflip=0, scale=0, rotate_frac=0, aniso=0, translate_frac=0)


def keys(count: int):
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(0), jnp.arange(count))


def images(batch: int, height: int, width: int, channels: int = 2) -> jax.Array:
    """Smooth pictures, on which a band-limited resampling is exact to about a percent."""
    y, x, c = np.meshgrid(
        np.linspace(-1, 1, height), np.linspace(-1, 1, width), np.arange(channels), indexing="ij"
    )
    return jnp.asarray(
        np.stack([np.sin(1.5 * x + c + b) * np.cos(y - 0.3 * b) for b in range(batch)]), jnp.float32
    )


def draws(pipe: AugmentPipe, **fixed) -> dict[str, jax.Array]:
    own = pipe.draw(keys(3)) | {
        name: jnp.zeros_like(value)
        for name, value in pipe.draw(keys(3)).items()
        if name.endswith("u")
    }
    return own | {name: jnp.asarray(value, jnp.float32) for name, value in fixed.items()}


def test_nine_labels_zero_when_p0():
    _, labels = jax.jit(AugmentPipe(p=0.0).augment)(keys(5), images(5, 8, 8))
    assert labels.shape == (5, 9) and AugmentPipe().label_dim == 9
    np.testing.assert_array_equal(labels, np.zeros((5, 9)))


@pytest.mark.parametrize("shape", [(8, 8), (7, 12)])
def test_p0_identity(shape):
    x = jax.random.uniform(jax.random.key(1), (2, *shape, 3), minval=-1.0)
    out, _ = jax.jit(AugmentPipe(p=0.0).augment)(keys(2), x)
    np.testing.assert_allclose(out, x, atol=1e-4)


def test_xflip_half_yflip_p_half():
    count, p = 4000, 0.2
    pipe = AugmentPipe(**(OFF | dict(p=p, xflip=1e8, yflip=1)))
    x = images(1, 4, 4, 1) * jnp.ones((count, 1, 1, 1))
    out, labels = jax.jit(pipe.augment)(keys(count), x)
    for column, rate in ((0, 0.5), (1, p / 2)):
        assert abs(labels[:, column].mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / count)
    expected = np.where(labels[:, :1, None, None] == 1, x[:, :, ::-1], x)
    np.testing.assert_array_equal(
        out, np.where(labels[:, 1:, None, None] == 1, expected[:, ::-1], expected)
    )


def test_op_frequencies():
    count, p = 4000, 0.3
    pipe = AugmentPipe(p=p)
    labels = np.asarray(
        jax.jit(lambda k: pipe.apply(pipe.draw(k), jnp.zeros((count, 2, 2, 1)))[1])(keys(count))
    )
    bound = 4 * np.sqrt(p * (1 - p) / count)
    acted = labels != 0
    for column in (2, 3, 4, 5, 7, 8):
        assert abs(acted[:, column].mean() - p) < bound, column
    assert abs(acted[:, 6].mean() - p / 2) < bound  # the stretch keeps its axes half of the time
    np.testing.assert_array_equal(acted[:, 7], acted[:, 8])
    scale, shift = labels[acted[:, 2], 2], labels[acted[:, 7], 7:]
    for normal in (scale, shift.ravel()):
        assert abs(normal.mean()) < 4 / np.sqrt(normal.size) and abs(
            normal.std() - 1
        ) < 4 / np.sqrt(2 * normal.size)
    cosine, sine = labels[acted[:, 3], 3] + 1, labels[acted[:, 3], 4]
    np.testing.assert_allclose(cosine**2 + sine**2, 1, atol=1e-5)
    assert abs(cosine.mean()) < 4 / np.sqrt(2 * len(cosine)) and abs(sine.mean()) < 4 / np.sqrt(
        2 * len(sine)
    )
    for a, b in ((2, 3), (3, 5), (5, 7)):  # different operations act independently
        assert abs((acted[:, a] & acted[:, b]).mean() - p * p) < bound


def test_pure_translation_and_rotation_direction():
    x = jax.random.uniform(jax.random.key(2), (3, 16, 16, 1), minval=-1.0)
    pipe = AugmentPipe(**(OFF | dict(p=1.0, translate_frac=1)))
    w = np.zeros((2, 3))
    w[:, 1], w[:, 2] = (1, 0), (0, -1.5)  # 2 pixels to the right; 3 pixels up
    out, labels = jax.jit(pipe.apply)(draws(pipe, trans_w=w), x)
    np.testing.assert_allclose(out[0], x[0], atol=1e-4)
    np.testing.assert_allclose(out[1, :, 2:], x[1, :, :-2], atol=1e-4)
    np.testing.assert_allclose(
        out[1, :, :2], x[1, :, 2:0:-1], atol=1e-4
    )  # reflected, without the edge pixel twice
    np.testing.assert_allclose(out[2, :-3], x[2, 3:], atol=1e-4)
    np.testing.assert_allclose(labels, w.T)
    pipe = AugmentPipe(**(OFF | dict(p=1.0, rotate_frac=1)))
    smooth = images(3, 16, 16)
    out, labels = jax.jit(pipe.apply)(
        draws(pipe, rot_v=[0.75, 0.25, 0.5]), smooth
    )  # +90, -90 and 0 degrees
    np.testing.assert_allclose(labels, [[-1, 1], [-1, -1], [0, 0]], atol=1e-6)
    for i, turns in enumerate((1, -1, 0)):  # positive angles turn the picture counter-clockwise
        np.testing.assert_allclose(out[i], np.rot90(smooth[i], turns), atol=0.03)


def test_scale_enlarges():
    pipe = AugmentPipe(**(OFF | dict(p=1.0, scale=1)))
    x = jnp.asarray(
        np.linspace(-0.75, 0.75, 16)[None, None, :, None] * np.ones((3, 16, 1, 1)), jnp.float32
    )
    out, labels = jax.jit(pipe.apply)(
        draws(pipe, scale_w=[5.0, -2.5, 0.0]), x
    )  # factors 2, 2^-0.5 and 1
    np.testing.assert_allclose(labels[:, 0], [5, -2.5, 0])
    centre = np.s_[6:10]
    np.testing.assert_allclose(out[0, 8, centre, 0], x[0, 8, centre, 0] / 2, atol=5e-3)
    np.testing.assert_allclose(out[1, 8, centre, 0], x[1, 8, centre, 0] * np.sqrt(2), atol=5e-3)


def test_warp_equals_direct_loops():
    """The matrices and the gather against padding, convolution and per-pixel interpolation written
    out.
    """
    height, width = 5, 6
    x = np.random.default_rng(0).normal(size=(height, width))
    matrix = np.array([[0.8, -0.5, 1.3], [0.4, 1.1, -0.7]])
    padded = np.pad(x, [(height - 1,) * 2, (width - 1,) * 2], mode="reflect")
    fine = np.zeros((2 * padded.shape[0] - 1, 2 * padded.shape[1] - 1))
    fine[::2, ::2] = padded
    for axis in (0, 1):  # convolution = correlation with reversed taps
        fine = np.apply_along_axis(
            lambda row: np.convolve(np.pad(row, 6), SYM6, "valid"), axis, fine
        )
    centre = np.array(fine.shape) / 2 - 0.5
    warped = np.zeros((2 * height + 12, 2 * width + 12))
    at = lambda i, j: fine[i, j] if 0 <= i < fine.shape[0] and 0 <= j < fine.shape[1] else 0.0
    for i, j in np.ndindex(*warped.shape):
        # fine output -> image (a fine pixel is half a pixel, its lattice shifted by a quarter) ->
        # fine input
        v, h = (
            (i + 0.5 - warped.shape[0] / 2) / 2 + 0.25,
            (j + 0.5 - warped.shape[1] / 2) / 2 + 0.25,
        )
        column, row = matrix @ [h, v, 1]
        r, c = 2 * (row - 0.25) + centre[0], 2 * (column - 0.25) + centre[1]
        r0, c0 = int(np.floor(r)), int(np.floor(c))
        for dr, dc in np.ndindex(2, 2):
            warped[i, j] += abs(1 - dr - (r - r0)) * abs(1 - dc - (c - c0)) * at(r0 + dr, c0 + dc)
    for axis in (0, 1):
        warped = np.apply_along_axis(
            lambda row: np.correlate(np.pad(row, 5), SYM6, "valid")[::2][3:-3], axis, warped
        )
    out = warp(
        jnp.asarray(x[None, :, :, None], jnp.float32), jnp.asarray(matrix[None], jnp.float32)
    )
    np.testing.assert_allclose(out[0, :, :, 0], warped, atol=2e-5)


def test_static_shapes_under_jit():
    pipe, traces = AugmentPipe(p=0.5), []

    @jax.jit
    def step(keys, x):
        traces.append(1)
        return pipe.augment(keys, x)

    for seed in range(3):
        out, labels = step(jax.random.split(jax.random.key(seed), 4), images(4, 8, 8))
        assert out.shape == (4, 8, 8, 2) and labels.shape == (4, 9) and jnp.isfinite(out).all()
    assert len(traces) == 1


def test_example_depends_on_its_own_key_and_other_operations_do_not_move_its_draws():
    pipe, x = AugmentPipe(p=0.8), images(4, 8, 8)
    augment = jax.jit(pipe.augment)
    out, labels = augment(keys(4), x)
    alone, label = augment(keys(4)[2:3], x[2:3])
    np.testing.assert_allclose(alone[0], out[2], atol=1e-6)
    np.testing.assert_allclose(label[0], labels[2], atol=1e-6)
    _, scale_only = AugmentPipe(**(OFF | dict(p=0.8, scale=1))).apply(
        AugmentPipe(**(OFF | dict(p=0.8, scale=1))).draw(keys(4)), x[:, :2, :2]
    )
    np.testing.assert_array_equal(scale_only[:, 0], labels[:, 2])


def test_xflip_flips_half_and_keeps_bytes():
    x = jnp.arange(1000 * 6, dtype=jnp.uint8).reshape(1000, 1, 6, 1)
    out = jax.jit(xflip)(keys(1000), x)
    flipped = np.asarray((out == x[:, :, ::-1]).all(axis=(1, 2, 3)))
    assert out.dtype == jnp.uint8 and abs(flipped.mean() - 0.5) < 4 * 0.5 / np.sqrt(1000)
    np.testing.assert_array_equal(out[~flipped], x[~flipped])


@pytest.mark.parametrize(
    "settings", [dict(p=1.5), dict(p=-0.1), dict(scale=-1), dict(p=float("nan"))]
)
def test_bad_settings_are_named(settings):
    with pytest.raises(ValueError, match=f"AugmentPipe: {next(iter(settings))} is"):
        AugmentPipe(**settings)


@pytest.mark.usefixtures("without_shape_checks")
def test_bad_images_are_named():
    with pytest.raises(ValueError, match="images have shape"):
        AugmentPipe().augment(keys(1), jnp.zeros((1, 8, 8)))


def test_without_operations_nothing_changes():
    x = images(2, 4, 4)
    out, labels = AugmentPipe(**OFF).augment(keys(2), x)
    np.testing.assert_array_equal(out, x)
    assert labels.shape == (2, 0)
