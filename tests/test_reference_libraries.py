"""Distances against scipy, scikit-learn's real images and, where they are installed, the libraries
that papers used.

metrics.py needs numpy and scipy alone and is loaded from its file, so that this module also runs
where torch is and JAX
is not: pip install torch pytorch-fid torch-fidelity prdc, then pytest --noconftest
  tests/test_reference_libraries.py.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from scipy.linalg import sqrtm

pytestmark = pytest.mark.fast

_FILE = Path(__file__).parent.parent / "ogdm_jax" / "metrics" / "distances.py"
_SPEC = importlib.util.spec_from_file_location("metrics_alone", _FILE)
metrics = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(metrics)


def _random() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(48, 48)) / 7
    return rng.normal(size=(700, 48)) @ mix, rng.normal(size=(600, 48)) @ mix * 1.1 + 0.05


def _real() -> tuple[np.ndarray, np.ndarray]:
    """Those pixels of real digits that vary, against blurred digits.

    A little noise, or many of the distances would be exactly equal: on the edge of a ball the
    libraries differ.
    """
    from sklearn.datasets import load_digits

    images = load_digits().images / 16
    blurred = (images + np.roll(images, 1, axis=2) + np.roll(images, 1, axis=1)) / 3
    kept = images.std(0) > 0.01
    noise = 1e-3 * np.random.default_rng(1).normal(size=(1797, kept.sum()))
    return (images[:, kept] + noise)[:900], (blurred[:, kept] + noise)[900:]


@pytest.fixture(params=[_random, _real], ids=["random", "real"])
def features(request):
    pytest.importorskip("sklearn") if request.param is _real else None
    return request.param()


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return metrics.Moments().update(x[:100]).update(x[100:]).finalize()


def test_frechet_distance_is_that_of_scipys_square_root(features):
    (mu1, cov1), (mu2, cov2) = map(_moments, features)
    root = np.real(sqrtm(cov1 @ cov2))
    truth = np.sum((mu1 - mu2) ** 2) + np.trace(cov1 + cov2 - 2 * root)
    np.testing.assert_allclose(metrics.frechet_distance(mu1, cov1, mu2, cov2), truth, rtol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_frechet_distance_is_pytorch_fids(features):
    library = pytest.importorskip("pytorch_fid.fid_score")
    (mu1, cov1), (mu2, cov2) = map(_moments, features)
    for x, mu, cov in zip(features, (mu1, mu2), (cov1, cov2), strict=True):  # its moments
        np.testing.assert_allclose(mu, np.mean(x, axis=0), rtol=1e-12)
        np.testing.assert_allclose(cov, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-15)
    truth = library.calculate_frechet_distance(mu1, cov1, mu2, cov2)
    np.testing.assert_allclose(metrics.frechet_distance(mu1, cov1, mu2, cov2), truth, rtol=1e-6)


def test_frechet_and_kernel_distance_are_torch_fidelitys(features):
    torch = pytest.importorskip("torch")
    frechet = pytest.importorskip("torch_fidelity.metric_fid")
    kernel = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = features
    stats = [frechet.fid_features_to_statistics(torch.from_numpy(part)) for part in (x, y)]
    truth = frechet.fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    np.testing.assert_allclose(
        metrics.frechet_distance(*_moments(x), *_moments(y)), truth, rtol=1e-6
    )
    n = min(len(x), len(y))
    both = [torch.from_numpy(part[:n]) for part in features]
    settings = {
        "kid_subsets": 1,
        "kid_subset_size": n,
        "verbose": False,
    }  # one subset of everything
    truth = kernel.kid_features_to_metric(*both, **settings)["kernel_inception_distance_mean"]
    np.testing.assert_allclose(metrics.kernel_distance(x[:n], y[:n]), truth, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("k", [3, 5])
def test_precision_recall_density_coverage_are_prdcs(features, k):
    library = pytest.importorskip("prdc")
    x, y = features
    truth = library.compute_prdc(real_features=x, fake_features=y, nearest_k=k)
    np.testing.assert_allclose(
        metrics.precision_recall(x, y, k), (truth["precision"], truth["recall"]), atol=1e-12
    )
    np.testing.assert_allclose(
        metrics.density_coverage(x, y, k), (truth["density"], truth["coverage"]), atol=1e-12
    )
