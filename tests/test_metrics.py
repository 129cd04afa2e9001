"""Distances against closed forms, definitions written as loops, and the libraries people use."""

import beartype
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from scipy.linalg import sqrtm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ogdm_jax.metrics import distances as metrics

pytestmark = pytest.mark.fast


def _stats(rng, dim, examples=400):
    x = rng.normal(size=(examples, dim)) @ rng.normal(size=(dim, dim)) / np.sqrt(dim) + rng.normal(
        size=(1, dim)
    )
    return x.mean(0), np.cov(x.T)


def test_frechet_distance_of_commuting_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    a, b = rng.uniform(0.1, 3, 12), rng.uniform(0.1, 3, 12)
    mu1, mu2 = rng.normal(size=12), rng.normal(size=12)
    truth = np.sum((mu1 - mu2) ** 2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    value = metrics.frechet_distance(mu1, basis * a @ basis.T, mu2, basis * b @ basis.T)
    np.testing.assert_allclose(value, truth, rtol=1e-12)


@pytest.mark.parametrize("dim", [2, 31, 200])
def test_frechet_distance_agrees_with_scipy_sqrtm(dim):
    rng = np.random.default_rng(dim)
    (mu1, cov1), (mu2, cov2) = _stats(rng, dim), _stats(rng, dim)
    truth = np.sum((mu1 - mu2) ** 2) + np.trace(cov1 + cov2 - 2 * np.real(sqrtm(cov1 @ cov2)))
    np.testing.assert_allclose(metrics.frechet_distance(mu1, cov1, mu2, cov2), truth, rtol=1e-6)


def test_frechet_distance_of_equal_statistics_is_zero_even_rank_deficient():
    x = np.random.default_rng(1).normal(size=(20, 64))  # rank 19 of 64
    mu, cov = x.mean(0), np.cov(x.T)
    assert metrics.frechet_distance(mu, cov, mu, cov) < 1e-10
    assert metrics.frechet_distance(mu, 0 * cov, mu, 0 * cov) == 0


def test_frechet_distance_of_rank_deficient_gaussians_is_that_of_their_span():
    rng = np.random.default_rng(2)
    (mu1, cov1), (mu2, cov2) = _stats(rng, 6), _stats(rng, 6)
    lift = np.linalg.qr(rng.normal(size=(40, 6)))[0].T  # 6 dimensions laid isometrically in 40
    lifted = metrics.frechet_distance(
        mu1 @ lift, lift.T @ cov1 @ lift, mu2 @ lift, lift.T @ cov2 @ lift
    )
    np.testing.assert_allclose(lifted, metrics.frechet_distance(mu1, cov1, mu2, cov2), rtol=1e-9)


@pytest.mark.usefixtures("without_shape_checks")
def test_frechet_distance_refuses_what_is_no_gaussian():
    eye = np.eye(3)
    with pytest.raises(ValueError, match="expected \\[d\\], \\[d, d\\]"):
        metrics.frechet_distance(np.zeros(3), eye, np.zeros(2), eye)
    with pytest.raises(ValueError, match="cov2: smallest eigenvalue"):
        metrics.frechet_distance(np.zeros(3), eye, np.zeros(3), np.diag([1.0, 1.0, -0.5]))
    with pytest.raises(ValueError, match="NaN"):
        metrics.frechet_distance(np.full(3, np.nan), eye, np.zeros(3), eye)


def test_moments_of_ragged_batches_and_merged_streams_are_numpys():
    rng = np.random.default_rng(3)
    x = (rng.normal(size=(101, 5)) * 0.01 + 1e4).astype(
        np.float32
    )  # a large mean: where F^T F - n mu mu^T fails
    first, second = metrics.Moments(), metrics.Moments(5)
    for part in np.split(x[:60], [1, 8, 40]):
        first.update(part)
    second.update(x[60:]).update(x[:0])
    mu, cov = first.merge(second).merge(metrics.Moments(5)).finalize()
    assert first.count == 101
    np.testing.assert_allclose(mu, x.astype(np.float64).mean(0), rtol=1e-14)
    np.testing.assert_allclose(cov, np.cov(x.T.astype(np.float64)), rtol=1e-8)  # n - 1
    with pytest.raises(ValueError, match="at least 2"):
        metrics.Moments().update(x[:1]).finalize()
    with pytest.raises(ValueError, match="expected 5"):
        first.update(x[:, :4])


def _kernel_distance_by_definition(x, y):
    def k(a, b):
        return (a @ b / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_kernel_distance_is_its_definition(monkeypatch):
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(13, 6)), rng.normal(size=(9, 6)) + 0.3
    truth = _kernel_distance_by_definition(x, y)
    np.testing.assert_allclose(metrics.kernel_distance(x, y), truth, rtol=1e-10)
    monkeypatch.setattr(metrics, "_CHUNK", 4)
    np.testing.assert_allclose(metrics.kernel_distance(x, y), truth, rtol=1e-10)


def test_kernel_distance_is_unbiased_at_small_n_and_sees_a_shift():
    rng = np.random.default_rng(5)
    draws = [
        metrics.kernel_distance(rng.normal(size=(8, 4)), rng.normal(size=(8, 4)))
        for _ in range(500)
    ]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / np.sqrt(len(draws))
    mean, spread = metrics.kernel_distance_subsets(
        rng.normal(size=(300, 4)), rng.normal(size=(300, 4)) + 0.7, 10, 100
    )
    assert mean > 3 * spread > 0


def _distance(a, b):
    return np.linalg.norm(a - b)


def _radius(points, i, k):
    return sorted(_distance(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("chunk", [7, 4096])
def test_manifold_metrics_are_their_definitions(monkeypatch, k, chunk):
    monkeypatch.setattr(metrics, "_CHUNK", chunk)
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(40, 3)), rng.normal(size=(30, 3)) * 0.8 + 0.4
    y[:15] = x[:15]  # copies lie exactly on spheres of their neighbours
    x, y = x + 100, y + 100  # far from the origin: the matrix products must not cancel
    rx, ry = [_radius(x, i, k) for i in range(40)], [_radius(y, j, k) for j in range(30)]
    d = np.array([[_distance(a, b) for b in y] for a in x])
    edge = np.isclose(d, np.array(rx)[:, None], rtol=1e-9)
    assert edge.any()
    precision = np.mean([any(d[i, j] <= rx[i] or edge[i, j] for i in range(40)) for j in range(30)])
    recall = np.mean([any(d[i, j] <= ry[j] * (1 + 1e-9) for j in range(30)) for i in range(40)])
    inside = (d < np.array(rx)[:, None]) & ~edge
    np.testing.assert_allclose(metrics.precision_recall(x, y, k), (precision, recall), rtol=1e-12)
    np.testing.assert_allclose(
        metrics.density_coverage(x, y, k), (inside.sum() / (k * 30), inside.any(1).mean())
    )


def test_manifold_metrics_of_a_set_with_itself():
    x = np.random.default_rng(7).normal(size=(50, 4))
    assert metrics.precision_recall(x, x, 3) == (1.0, 1.0)
    assert metrics.density_coverage(x, x, 3) == (
        1.0,
        1.0,
    )  # itself and k - 1 neighbours strictly inside each ball


def test_recall_and_coverage_see_dropped_modes_and_precision_sees_bad_images():
    rng = np.random.default_rng(8)
    modes = rng.normal(size=(4, 5)) * 20
    x, same = (modes[rng.integers(4, size=300)] + rng.normal(size=(300, 5)) for _ in range(2))
    dropped, bad = (
        modes[rng.integers(2, size=300)] + rng.normal(size=(300, 5)),
        same + 8 * rng.normal(size=(300, 5)),
    )
    assert (
        metrics.precision_recall(x, dropped)[0] > 0.9
        and metrics.precision_recall(x, dropped)[1] < 0.6
    )
    assert metrics.density_coverage(x, dropped)[1] < 0.6 < metrics.density_coverage(x, same)[1]
    assert metrics.precision_recall(x, bad)[0] < 0.3 < metrics.precision_recall(x, same)[0]


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("call", [metrics.precision_recall, metrics.density_coverage])
def test_manifold_metrics_refuse_wrong_k_and_mixed_features(call):
    x = np.zeros((5, 3))
    with pytest.raises(ValueError, match="k: 5; expected between 1 and 4"):
        call(x, x, 5)
    with pytest.raises(ValueError, match="3 and 2 features"):
        call(x, x[:, :2], 2)


def test_inception_score_of_certain_balanced_and_of_undecided_predictions():
    certain = np.tile(np.eye(10), (30, 1))
    np.testing.assert_allclose(metrics.inception_score(certain, 3), (10, 0), atol=1e-9)
    np.testing.assert_allclose(
        metrics.inception_score(np.full((60, 10), 0.1), 3), (1, 0), atol=1e-9
    )
    rng = np.random.default_rng(9)
    p = rng.dirichlet(np.ones(4), 50)
    truth = np.exp(np.mean([np.sum(row * np.log(row / p.mean(0))) for row in p]))
    np.testing.assert_allclose(metrics.inception_score(p, 1)[0], truth, rtol=1e-12)
    with pytest.raises(ValueError, match="sum to 1"):
        metrics.inception_score(np.ones((4, 4)))


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_and_ssim_agree_with_scikit_image(channels):
    rng = np.random.default_rng(10)
    a = rng.uniform(-1, 1, (3, 20, 24, channels))
    b = np.clip(a + 0.2 * rng.normal(size=a.shape), -1, 1)
    for window, settings in (
        ("uniform", {}),
        ("gaussian", {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}),
    ):
        truth = [
            structural_similarity(u, v, data_range=2, channel_axis=-1, **settings)
            for u, v in zip(a, b)
        ]
        np.testing.assert_allclose(metrics.ssim(a, b, window=window), truth, rtol=1e-10)
    truth = [peak_signal_noise_ratio(u, v, data_range=2) for u, v in zip(a, b)]
    np.testing.assert_allclose(metrics.psnr(a, b), truth, rtol=1e-12)
    assert metrics.psnr(a[0], b[0]).shape == () and np.isinf(metrics.psnr(a, a)).all()
    np.testing.assert_allclose(metrics.ssim(a, a), 1)
    with pytest.raises(ValueError, match="at least 11 x 11"):
        metrics.ssim(a[:, :8, :8], b[:, :8, :8])
    with pytest.raises(ValueError, match="equal shapes"):
        metrics.psnr(a, b[:2])


def test_the_declared_shapes_are_those_of_the_arrays():
    """Arrays of NumPy and JAX pass, other shapes do not: what a type checker in a notebook sees."""
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(20, 4)), jnp.asarray(rng.normal(size=(30, 4)))
    checked = lambda call: jaxtyping.jaxtyped(call, typechecker=beartype.beartype)
    mean, cov = checked(metrics.Moments.finalize)(metrics.Moments().update(x))
    assert checked(metrics.frechet_distance)(mean, cov, mean, cov) < 1e-9
    assert isinstance(checked(metrics.kernel_distance)(x, y), float)
    assert len(checked(metrics.precision_recall)(x, y, 3)) == 2
    assert len(checked(metrics.density_coverage)(x, y, 3)) == 2
    images = rng.uniform(-1, 1, (2, 16, 16, 1))
    assert checked(metrics.psnr)(images, images).shape == (2,)
    assert checked(metrics.ssim)(images[0], images[1]).shape == ()
    with pytest.raises(jaxtyping.TypeCheckError):
        checked(metrics.kernel_distance)(x[0], y)
