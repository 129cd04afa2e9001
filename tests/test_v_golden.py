"""v-prediction, zero terminal SNR and their samplers against diffusers' schedulers: what of the golden
files sd_schedule_* the package has (not PLMS, and of step lists DDIM's trailing and linspace).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax.diffusion import grids, precondition, process
from ogdm_jax.diffusion.process import Discrete
from ogdm_jax.sampling.sampler import sample
from tests.support.golden_support import FOLDER, Golden, nchw, nhwc
from tests.support.oracles import Mixture, column

pytestmark = pytest.mark.fast


def golden(name: str) -> Golden:
    return Golden(FOLDER / f"sd_schedule_{name}.npz")


def table_of(settings: dict) -> Discrete:
    zero = settings.get("rescale_betas_zero_snr", False)
    return Discrete.make(settings["beta_schedule"], zero_terminal=zero)


def test_tables():
    """alpha_bar, betas and levels in float64; sigma 0 in the file stands for an infinite one."""
    tables = golden("tables")
    for name, settings in tables.json("settings").items():
        ours, rows = table_of(settings), tables["table_index"]
        for key, value in (("alphas_cumprod", ours.alpha_bar), ("betas", ours.betas)):
            atol = 1e-6 if "ztsnr" in name else 1e-12  # 1 - beta_T is (sigma_T-1 / PURE_NOISE)^2
            np.testing.assert_allclose(value[rows], tables[f"{key}_{name}_f64"], atol=atol)
        sigma = tables[f"sigma_f64_{name}"]
        theirs = np.where(sigma == 0, process.PURE_NOISE, sigma)
        np.testing.assert_allclose(ours.sigma[rows], theirs, rtol=1e-9)


@pytest.mark.parametrize("n", [10, 30, 50])
def test_steps(n):
    tables = golden("tables")
    for theirs, ours in (("trailing", "trailing"), ("linspace", "even")):
        np.testing.assert_array_equal(
            grids.ddim_timesteps(n, 1000, ours)[::-1], tables[f"timesteps_DDIM_{theirs}0_{n}"]
        )


@pytest.mark.parametrize("name", ["sd", "ztsnr"])
def test_conversions(name):
    """x0_hat and eps_hat of the same output, at the step of pure noise too; the target v."""
    tables, t = golden("tables"), golden("tables")["conv_t"]
    chain = Discrete.make("scaled_linear", zero_terminal=name == "ztsnr")
    with jax.enable_x64(True):
        sigma, out = jnp.asarray(chain.sigma[t]), jnp.asarray(nhwc(tables["conv_out"]), jnp.float64)
        z = jnp.asarray(nhwc(tables["conv_x"]), jnp.float64)
        x = z * column(jnp.sqrt(1 + sigma**2), z)
        denoise = precondition.v_prediction(lambda z, t, label: out, chain)
        x0_hat, eps_hat = denoise.with_noise(x, sigma)
    np.testing.assert_allclose(nchw(x0_hat), tables[f"conv_{name}_v_x0_f64"], atol=3e-7)
    np.testing.assert_allclose(nchw(eps_hat), tables[f"conv_{name}_v_eps_f64"], atol=3e-7)


def network(mixture: Mixture, chain: Discrete, predict: str, z, t, label=None):
    """eps or v of the mixture at the step t, in the coordinate z = a x0 + s eps."""
    bar = jnp.asarray(np.where(chain.sigma < process.PURE_NOISE, chain.alpha_bar, 0.0))
    bar = bar[t.astype(jnp.int32)]
    a, s = jnp.sqrt(bar), jnp.sqrt(1 - bar)
    log, means = mixture._parts(z, s, a)
    weights = jax.nn.softmax(log, axis=1)
    x0 = jnp.sum(weights.reshape(*weights.shape, 1, 1, 1) * means, axis=1)
    eps = (z - column(a, z) * x0) / column(s, z)
    return eps if predict == "eps" else column(a, z) * eps - column(s, z) * x0


TRAJECTORIES = golden("trajectories")
# PLMS is not ours; linspace mixes two step lists: it calls t 999, 888, .. and steps to t - 100.
KEYS = [k for k in TRAJECTORIES.json("settings") if "plms" not in k and "linspace" not in k]
SOLVERS = {
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
}


@pytest.mark.parametrize("key", KEYS)
def test_trajectories(key):
    """Whole trajectories in float64; pure noise is told from infinity by 6e-8."""
    file, settings = TRAJECTORIES, TRAJECTORIES.json("settings")[key]
    chain = table_of(settings)
    predict = "eps" if settings["prediction_type"] == "epsilon" else "v"
    mixture = Mixture.golden(file.config["gmm"])
    model = functools.partial(network, mixture, chain, predict)
    denoise = precondition.adm(model, chain, predict=predict)
    times = np.asarray(file.json("t_calls")[key], int)
    last = 0.0 if settings.get("set_alpha_to_one", True) else chain.sigma[0]
    sigmas, noise = np.append(chain.sigma[times], last), f"noise_{key}"
    with jax.enable_x64(True):
        start = jnp.asarray(nhwc(file["latents"]), jnp.float64)
        steps = jnp.asarray(np.moveaxis(file[noise], 2, -1)) if noise in file else None
        x = sample(
            denoise,
            start * float(np.sqrt(1 + sigmas[0] ** -2)),
            sigmas,
            SOLVERS[settings["cls"]],
            eta=settings["eta"],
            noise_fn=None if steps is None else lambda step: steps[step],
        )
    x_vp = nchw(x) / np.sqrt(1 + last**2)
    exact = file[f"x_{key}_f64"]
    np.testing.assert_allclose(x_vp, exact, atol=1e-6 if "ztsnr" in key else 1e-9)
