"""Numbers of an unknown range are refused; a NaN is never averaged away."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax import metrics, pixels
from ogdm_jax.data import augment, pictures
from ogdm_jax.inverse import degradations, operators, tasks
from ogdm_jax.inverse.measured import measure as measurements
from ogdm_jax.metrics.protocol import paired

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("without_shape_checks")]


def pair(n: int = 3, side: int = 16) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return tuple(rng.integers(0, 256, (n, side, side, 1), np.uint8) for _ in range(2))


@pytest.mark.parametrize("measure", [metrics.psnr, metrics.ssim])
def test_the_type_says_the_range(measure):
    a, b = pair()
    np.testing.assert_allclose(measure(a, b, 255), measure(a, b), rtol=0)
    np.testing.assert_allclose(measure(a / 255, b / 255, 1.0), measure(a, b), rtol=1e-9)
    if measure is metrics.psnr:  # SSIM compares means, so it is another number of shifted images
        floats = measure(pixels.to_float(a, np.float64), pixels.to_float(b, np.float64))
        np.testing.assert_allclose(measure(a, b), floats, rtol=1e-12)
    half = jnp.asarray(pixels.to_float(a), jnp.bfloat16)
    assert np.isfinite(measure(half, half * 0.5)).all()


def test_psnr_of_uint8_is_its_closed_form():
    a = np.full((1, 4, 4, 1), 200, np.uint8)
    assert metrics.psnr(a, a - 100)[0] == pytest.approx(20 * np.log10(255 / 100))  # no wrap-around
    assert metrics.psnr(a - 100, a)[0] == pytest.approx(20 * np.log10(255 / 100))


WRONG = {
    "int64": lambda a: a.astype(np.int64),
    "uint16": lambda a: a.astype(np.uint16) * 257,
    "bool": lambda a: a > 127,
    "floats of 0 to 255": lambda a: a.astype(np.float32),
    "infinity": lambda a: np.where(a == a.max(), np.inf, 0.0),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("measure", [metrics.psnr, metrics.ssim])
def test_other_ranges_are_refused(measure, kind):
    a, b = (WRONG[kind](v) for v in pair())
    with pytest.raises(ValueError, match="images: .*expected"):
        measure(a, b)


@pytest.mark.parametrize("measure", [metrics.psnr, metrics.ssim])
def test_ranges_that_contradict_the_values_are_refused(measure):
    a, b = pair()
    for wrong in (2.0, 1.0, 0.0, -255.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="data_range"):
            measure(a, b, wrong)
    with pytest.raises(ValueError, match="types uint8 and float32"):
        measure(a, pixels.to_float(b))


class Space:
    """Eight pixels as features."""

    name, dim = "fd_x", 8

    def __call__(self, images):
        assert images.dtype == np.uint8
        return images.reshape(len(images), -1)[:, :8].astype(np.float32)


@pytest.mark.parametrize("kind", WRONG)
def test_a_report_takes_no_images_of_another_range(kind):
    a, b = pair(40)
    for samples, reference in ((WRONG[kind](a), b), (a, WRONG[kind](b))):
        with pytest.raises(ValueError, match="(samples|reference): .*expected"):
            metrics.distance_report(Space(), samples, reference)
    truth = metrics.distance_report(Space(), a, b)
    assert metrics.distance_report(Space(), pixels.to_float(a), b) == truth


@pytest.mark.parametrize("kind", ["int64", "uint16", "bool"])
def test_pixels_take_no_other_integers(kind):
    a = WRONG[kind](pair()[0])
    for call in (pixels.to_float, pixels.to_uint8, pictures.grid, pictures.show, pictures.encode):
        with pytest.raises(ValueError, match="images: type .* expected uint8"):
            call(a)
    with pytest.raises(ValueError, match="images: type"):
        pixels.to_float(jnp.asarray(a))


@pytest.mark.parametrize("measure", [metrics.psnr, metrics.ssim])
def test_a_nan_stays_with_its_image(measure):
    a, b = (pixels.to_float(v) for v in pair())
    a[1, 2, 3] = np.nan
    found = measure(a, b)
    assert np.isnan(found[1]) and np.isfinite(found[[0, 2]]).all() and np.isnan(found.mean())
    assert np.isnan(measure(a[1], b[1]))
    mean = paired(a, b)
    assert np.isnan(mean["psnr"]) and np.isnan(mean["ssim"]) and mean["identical"] == 0


def test_images_with_nan_are_named():
    a = pixels.to_float(pair(40)[0])
    a[3, 0, 0], a[7, 0, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match="number 3 and 1 more of 40 hold NaN or infinity"):
        pixels.to_uint8(a)
    a[7] = 0
    with pytest.raises(ValueError, match="samples: number 3 of 40 holds NaN or infinity"):
        metrics.distance_report(Space(), a, pair(40)[1])


FEATURES = {
    "kernel_distance": metrics.kernel_distance,
    "kernel_distance_subsets": lambda x, y: metrics.kernel_distance_subsets(x, y, 2, 5),
    "precision_recall": metrics.precision_recall,
    "density_coverage": metrics.density_coverage,
    "manifolds": lambda x, y: metrics.manifolds(x, y, 3),
    "distance_report": lambda x, y: metrics.distance_report(Space(), x, y),
    "statistics_report": lambda x, y: metrics.statistics_report(
        Space(), y, metrics.Statistics(np.zeros(8), np.eye(8))
    ),
    "Moments": lambda x, y: metrics.Moments().update(x).update(y),
    "inception_score": lambda x, y: metrics.inception_score(y, 2),
}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", FEATURES)
def test_features_with_nan_are_named(name, bad):
    x, y = np.random.default_rng(1).normal(size=(2, 40, 8))
    y[5, 2] = bad
    with pytest.raises(ValueError, match="example 5 of 40: NaN or infinity"):
        FEATURES[name](x, y)


def test_frechet_distance_of_nan_moments_is_refused():
    for place in range(4):
        moments = [np.zeros(3), np.eye(3), np.zeros(3), np.eye(3)]
        moments[place][0] = np.nan
        with pytest.raises(ValueError, match="NaN or infinity"):
            metrics.frechet_distance(*moments)


MEASURING = {
    "inpaint": lambda x: operators.inpaint(np.ones((16, 16))).forward(x),
    "super_resolution": lambda x: operators.super_resolution(2, 16).forward(x),
    "gaussian_blur": lambda x: operators.gaussian_blur(5, 1.0).forward(x),
    "motion_blur": lambda x: operators.motion_blur(np.full((3, 3), 1 / 9)).forward(x),
    "nonlinear_blur": lambda x: operators.nonlinear_blur(np.full((3, 3), 1 / 9)).forward(x),
    "phase_retrieval": lambda x: operators.phase_retrieval().forward(x),
    "high_dynamic_range": lambda x: operators.high_dynamic_range().forward(x),
    "identity": lambda x: operators.identity().forward(x),
    "gaussian_noise": lambda x: degradations.gaussian_noise(keys(), x, 0.1),
    "poisson_noise": lambda x: degradations.poisson_noise(keys(), x),
    "augment": lambda x: augment.AugmentPipe(p=1.0).augment(keys(), x),
    "measure": lambda x: measurements(
        tasks.make_task("denoise", tasks.Settings(), (16, 16, 1)), tasks.Settings(), x, np.arange(3)
    ),
}


def keys() -> jax.Array:
    return jax.random.split(jax.random.key(0), 3)


@pytest.mark.parametrize("name", MEASURING)
@pytest.mark.default
def test_what_computes_with_images_takes_floats(name):
    """A kernel, a noise or a mask in the type of integers would be cut off to 0 and 1."""
    image = pair()[0]
    MEASURING[name](jnp.asarray(pixels.to_float(image)))
    for wrong in (image, image.astype(np.int32), image > 127):
        with pytest.raises(ValueError, match="type (uint8|int32|bool); expected floats in"):
            MEASURING[name](jnp.asarray(wrong))


def test_what_is_measured_lies_in_the_range():
    with pytest.raises(ValueError, match="images: number 0 and 2 more of 3 hold numbers up to 255"):
        MEASURING["measure"](pair()[0].astype(np.float32))
