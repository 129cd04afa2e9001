"""score_sde's networks, read through their own names, against the authors' outputs and scores."""

import functools

import jax
import numpy as np

from ogdm_jax.diffusion import precondition, process, score_sde
from ogdm_jax.interop import from_torch
from tests.support import golden_support
from tests.support.golden_support import Golden, nchw, nhwc


def process_of(golden: Golden) -> str:
    """Our preconditioning of a file's network."""
    kind = golden.config["sde"]
    return kind if golden.config["continuous"] else {"ve": "smld", "vp": "adm"}[kind]


def truth(golden: Golden) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, sigma, x0_hat) in our coordinates, float64 and NHWC, from the authors' score by the
    process's own formula x0_hat = (x_t + std^2 score) / alpha (2011.13456, eq. 29).
    """
    t, x = golden["t"].astype(np.float64), nhwc(golden["x"]).astype(np.float64)
    score = nhwc(golden["score_f64"])
    if golden.config["sde"] == "ve":
        std, alpha = 0.01 * 5000.0**t, np.ones_like(t)
    elif not golden.config["continuous"]:
        bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[np.round(t * 999).astype(int)]
        std, alpha = np.sqrt(1 - bar), np.sqrt(bar)
    else:
        alpha = np.exp(-0.25 * 19.9 * t**2 - 0.05 * t)
        std = np.sqrt(1 - alpha**2) if golden.config["sde"] == "vp" else 1 - alpha**2
    wide = lambda v: v[:, None, None, None]
    x0_hat, ours, sigma = (x + wide(std**2) * score) / wide(alpha), x / wide(alpha), std / alpha
    if not golden.config["centered"]:  # their images lie in [0, 1]
        return 2 * ours - 1, 2 * sigma, 2 * x0_hat - 1
    return ours, sigma, x0_hat


@golden_support.family("score_sde_")
def check(golden: Golden):
    given = {"img_resolution": golden.config["image_size"]}
    network, variables = from_torch(golden.state_dict(), "score_sde", **given)
    prefixed = {f"module.{name}": value for name, value in golden.state_dict().items()}
    again, _ = from_torch(prefixed, **given)
    assert again == network
    assert network.num_blocks == 1 and network.widths == [16, 32]
    assert tuple(network.attn_resolutions) == (8,)
    fourier = golden.config["model"]["embedding_type"] == "fourier"
    assert network.embedding_type == ("fourier" if fourier else "positional")

    with jax.enable_x64(True):
        variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
        apply = jax.jit(functools.partial(network.clone(dtype=np.float64).apply, variables))
        labels = golden["labels_f64"].astype(np.float64)
        x = nhwc(golden["x"]).astype(np.float64)
        if not golden.config["centered"]:
            x = 2 * x - 1
        wide = golden["labels_f64"][:, None, None, None] if fourier else 1.0
        if golden.config["scale_by_sigma"] and not fourier:
            wide = golden["buffer/sigmas"].astype(np.float64)[golden["labels"]][:, None, None, None]
        out = apply(x, np.log(labels) if fourier else labels) / wide
        largest = np.abs(golden["out_f64"]).max()
        np.testing.assert_allclose(nchw(out), golden["out_f64"], rtol=0, atol=1e-5 * largest)

        # the denoiser, by the levels that we give their times
        xt, sigma, x0_hat = truth(golden)
        where = score_sde if hasattr(score_sde, process_of(golden)) else precondition
        make = getattr(where, process_of(golden))
        denoise = make(lambda x, c_noise, label=None: apply(x, c_noise))
        got = np.asarray(denoise(xt, sigma))
        moved = np.abs(x0_hat - xt).max(axis=(1, 2, 3), keepdims=True)
        np.testing.assert_array_less(np.abs(got - x0_hat) / moved, 2e-5)
        np.testing.assert_allclose(denoise.round_sigma(sigma), sigma, rtol=1e-5)
        if process_of(golden) == "subvp":
            np.testing.assert_allclose(process.SubVP().time(sigma), golden["t"], rtol=1e-6)
