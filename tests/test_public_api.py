"""Names and arguments that people import stay as they are: the table of public functions."""

import importlib
import inspect

import jaxtyping
import numpy as np
import pytest

from ogdm_jax import metrics

pytestmark = pytest.mark.fast

PUBLIC = {
    "diffusion.denoiser": {"Denoiser": None, "as_denoiser": "fn"},
    "diffusion.precondition": {
        "adm": "network_fn",
        "edm": "network_fn, sigma_data=0.5",
        "vp": "network_fn",
        "ve": "network_fn",
        "iddpm": "network_fn",
        "v_prediction": "network_fn",
        "flow": "network_fn",
    },
    "diffusion.grids": {
        "edm": "n, sigma_min=0.002, sigma_max=80.0, rho=7.0",
        "vp": "n",
        "ve": "n",
        "iddpm": "n",
        "ddim": "n",
        "flow": "n",
    },
    "sampling": {
        "sample": "denoise, latents, sigmas, solver='heun', key=None, churn=None, "
        "label=None, guidance=(), trajectory=False",
        "Guidance": "name",
    },
    "inverse.operators": {
        "inpaint": "mask",
        "super_resolution": "factor, size",
        "gaussian_blur": "size, std",
        "motion_blur": "kernel",
        "phase_retrieval": "oversample",
        "measurement_loss": "operator, y",
    },
    "methods.dg": {
        "vp_time": "sigma",
        "vp_scale": "t",
        "guide": "denoise, log_ratio, weight=1.0, sigma_min=0.0, sigma_max=float('inf')",
        "guidance": "log_ratio, weight=1.0",
    },
    "methods.dsg": {
        "spherical_step": "mean, std, eps, grad, rate",
        "guidance": "loss, rate=0.2, interval=1",
    },
    "methods.dps": {
        "dps_step": "mean, std, eps, grad, scale",
        "guidance": "loss, scale",
    },
    **{f"methods.{name}": {"guidance": "loss, scale"} for name in ("mpgd", "freedom", "lgd")},
    "methods.ddnm": {"guidance": "operator, y, std"},
    "methods.diffpir": {"guidance": "operator, y, std, strength=8.0"},
    "methods.cfg": {"guidance": "weight, window=None"},
    "methods.autoguidance": {"guidance": "weak, weight, window=None"},
    "methods.pigdm": {"guidance": "operator, y, std"},
    "methods.classifier": {"guidance": "log_prob, scale=1.0, window=None"},
    "methods.stf": {
        "stable_target": "xt, sigma, references, mask=None, chunk=None, axis_name=None"
    },
    "methods.sp": {"self_perceptual_loss": "features, x0, eps, x0_hat, eps_hat, sigma_next"},
    "methods.ogdm": {
        "next_sigma": "sigma, u, k, sigma_min=0.002, sigma_max=80.0, rho=7.0",
        "project": "denoise, xt, sigma, sigma_next, solver='euler'",
        "generator_loss": "logits, kind='hinge'",
        "discriminator_loss": "real_logits, fake_logits, kind='hinge'",
        "r1_penalty": "discriminate, images",
    },
    "networks": dict.fromkeys(
        (
            "SongUNet",
            "DhariwalUNet",
            "ADMUNet",
            "ADMEncoder",
            "StyleGAN2Discriminator",
            "InceptionV3",
        )
    ),
    "interop": {"read_torch": "path", "from_torch": "state, kind", "load_pretrained": "path"},
    "metrics": {
        "frechet_distance": "mu1, cov1, mu2, cov2",
        "kernel_distance": "x, y",
        "precision_recall": "x, y, k",
        "density_coverage": "x, y, k",
        "Moments": None,
        "psnr": "a, b",
        "ssim": "a, b",
    },
    "training.workdir": {"open_workdir": "workdir"},
    "data.pictures": {"show": "images"},
}
CASES = [
    (module, name, promised) for module, names in PUBLIC.items() for name, promised in names.items()
]


@pytest.mark.parametrize("module,name,promised", CASES, ids=lambda value: str(value)[:24])
def test_public_names_keep_their_arguments(module, name, promised):
    """Every promised argument in its place with its default; more arguments with defaults may
    follow.
    """
    thing = getattr(importlib.import_module(f"ogdm_jax.{module}"), name)
    assert thing.__doc__
    if promised is None:
        return
    found = list(inspect.signature(thing).parameters.values())
    for parameter, text in zip(found, promised.split(", "), strict=False):
        argument, _, default = text.partition("=")
        assert parameter.name == argument
        if default:
            assert parameter.default == eval(default)
    promised_count = len(promised.split(", "))
    assert len(found) >= promised_count
    for extra in found[promised_count:]:
        assert (
            extra.default is not inspect.Parameter.empty
            or extra.kind is inspect.Parameter.VAR_KEYWORD
        ), extra


def test_shapes_in_types_are_checked_while_tests_run():
    """conftest.py's hook: a mean and a covariance of other sizes do not come as far as our own
    check.
    """
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'cov1'"):
        metrics.frechet_distance(np.zeros(3), np.eye(2), np.zeros(3), np.eye(3))
