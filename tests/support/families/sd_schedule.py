"""Stable Diffusion's schedules, grids and samplers against diffusers' schedulers."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.diffusion import grids, precondition, process
from ogdm_jax.diffusion.process import Discrete
from ogdm_jax.methods import cfg
from ogdm_jax.sampling import generate
from ogdm_jax.sampling.sampler import sample
from tests.support.golden_support import Golden, family, nchw, nhwc
from tests.support.oracles import Mixture, column

SOLVERS = {
    "DDIM": "ddim",
    "DDPM": "ancestral",
    "EulerDiscrete": "euler",
    "DPMSolverMultistep": "dpmpp_2m",
    "PNDM": "plms",
}
LISTS = re.compile(r"timesteps_(\w+?)_(ztsnr_|karras_)?([a-z]+)(\d)_(\d+)")


def table_of(settings: dict) -> Discrete:
    zero = settings.get("rescale_betas_zero_snr", False)
    return Discrete.make(settings["beta_schedule"], zero_terminal=zero)


def levels_of(table: Discrete, cls: str, spacing: str, offset: int, n: int, end="zero"):
    """The grid as the sampler's settings give it."""
    further = spacing in ("leading", "linspace") and SOLVERS[cls] in generate.FURTHER
    how = {"offset": offset, "further": further, "end": end}
    return grids.ddim(n, table, generate.DISCRETE[spacing], **how)


@family("sd_schedule_tables")
def check_tables(golden: Golden):
    every = golden.json("settings")
    for name, settings in every.items():
        ours, rows = table_of(settings), golden["table_index"]
        for key, value in (("alphas_cumprod", ours.alpha_bar), ("betas", ours.betas)):
            atol = 1e-6 if "ztsnr" in name else 1e-12  # 1 - beta_T is (sigma_T-1 / PURE_NOISE)^2
            np.testing.assert_allclose(value[rows], golden[f"{key}_{name}_f64"], atol=atol)
        sigma = golden[f"sigma_f64_{name}"]
        theirs = np.where(sigma == 0, process.PURE_NOISE, sigma)  # 0 stands for an infinite one
        np.testing.assert_allclose(ours.sigma[rows], theirs, rtol=1e-9)
    _check_lists(golden, every)
    _check_rescale(golden)
    for name in ("sd", "ztsnr"):
        _check_conversions(golden, name)


def _check_lists(golden: Golden, every: dict):
    """Steps and levels of every scheduler, spacing, offset and length."""
    seen = 0
    for key in golden.arrays:
        match = LISTS.fullmatch(key)
        if match is None:
            continue
        cls, more, spacing, offset, n = match[1], match[2] or "", match[3], int(match[4]), match[5]
        table = table_of(every["sd_ztsnr" if more == "ztsnr_" else "sd"])
        levels = levels_of(table, cls, spacing, offset, int(n))
        if more == "karras_":  # DPM++'s between the ends of the table, Euler's of its own grid
            ends = levels[-2::-1] if cls == "EulerDiscrete" else table.sigma
            levels = grids.edm(int(n), ends[0], ends[-1])
        sigmas, times = golden.arrays.get(f"sigmas_{key[10:]}"), golden[key]
        fractional = cls == "EulerDiscrete" and spacing == "linspace" and n != "10"
        if more != "karras_":
            at = table.index(jnp.asarray(levels[:-1], jnp.float32))
            ours = np.insert(at, 1, at[1]) if cls == "PNDM" else np.asarray(at)
            # EulerDiscrete asks between the steps; the grid here has the nearest ones.
            np.testing.assert_allclose(ours, times, atol=0.5 if fractional else 0, err_msg=key)
        if sigmas is not None and not fractional:
            levels = np.where(levels == process.PURE_NOISE, 4096, levels)  # what Euler has for it
            np.testing.assert_allclose(levels, sigmas, rtol=2e-5, err_msg=key)
        seen += 1
    assert seen > 50


def _check_rescale(golden: Golden):
    """cfg.rescale on what a network gives, whatever that is and at any level."""
    cond, uncond = (nhwc(golden[name]) for name in ("cond", "uncond"))
    x, sigma = jnp.asarray(nhwc(golden["uncond"])) * 3 + 1, jnp.full(len(cond), 2.5)
    label = jnp.zeros(len(cond), jnp.int32)
    both = jnp.concatenate([jnp.asarray(cond), jnp.asarray(uncond)])
    for predict in ("eps", "v"):
        denoise = precondition.adm(lambda z, t, label: both, "scaled_linear", predict=predict)
        skip, out = denoise.parts(sigma)
        for key in golden.arrays:
            match = re.fullmatch(r"cfg_([\d.]+)_rescale_([\d.]+)", key)
            if match is None:
                continue
            guided = cfg.guide(denoise, float(match[1]), rescale=float(match[2]))
            F = (guided(x, sigma, label) - column(skip, x) * x) / column(out, x)
            golden.assert_close(key, nchw(F), atol=2e-5 * np.abs(golden[key]).max())


def _check_conversions(golden: Golden, name: str):
    """x0_hat and eps_hat of the same output, at the step of pure noise too."""
    t, chain = golden["conv_t"], Discrete.make("scaled_linear", zero_terminal=name == "ztsnr")
    with jax.enable_x64(True):
        sigma, out = jnp.asarray(chain.sigma[t]), jnp.asarray(nhwc(golden["conv_out"]), jnp.float64)
        z = jnp.asarray(nhwc(golden["conv_x"]), jnp.float64)
        x = z * column(jnp.sqrt(1 + sigma**2), z)
        denoise = precondition.v_prediction(lambda z, t, label: out, chain)
        x0_hat, eps_hat = denoise.with_noise(x, sigma)
    np.testing.assert_allclose(nchw(x0_hat), golden[f"conv_{name}_v_x0_f64"], atol=3e-7)
    np.testing.assert_allclose(nchw(eps_hat), golden[f"conv_{name}_v_eps_f64"], atol=3e-7)


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


@family("sd_schedule_trajectories")
def check_trajectories(golden: Golden):
    for key, settings in golden.json("settings").items():
        _check_trajectory(golden, key, settings)


def _check_trajectory(golden: Golden, key: str, settings: dict):
    """A whole trajectory in float64, and its states; pure noise is told from infinity by 6e-8."""
    chain = table_of(settings)
    predict = "eps" if settings["prediction_type"] == "epsilon" else "v"
    model = functools.partial(network, Mixture.golden(golden.config["gmm"]), chain, predict)
    denoise = precondition.adm(model, chain, predict=predict)
    n, cls = settings["num_inference_steps"], settings["cls"].removesuffix("Scheduler")
    spacing = settings.get("timestep_spacing", "leading")
    end = "zero" if settings.get("set_alpha_to_one", True) else "first"
    levels = levels_of(chain, cls, spacing, settings.get("steps_offset", 0), n, end)
    with jax.enable_x64(True):
        z = jnp.asarray(nhwc(golden["latents"]), jnp.float64)
        noise = golden.arrays.get(f"noise_{key}")
        noise = None if noise is None else jnp.asarray(np.moveaxis(noise, 2, -1))
        if spacing == "linspace":  # their DDIM asks at 999, 888, .. and steps down by 100
            states = []
            for t in np.asarray(golden.json("t_calls")[key], int):
                low = chain.sigma[t - 1000 // n] if t >= 1000 // n else 0.0
                start = z * float(np.sqrt(1 + chain.sigma[t] ** -2))
                x = sample(denoise, start, np.asarray([chain.sigma[t], low]), "ddim")
                z = x / np.sqrt(1 + low**2)
                states.append(z)
        else:
            x, path = sample(
                denoise,
                z * float(np.sqrt(1 + levels[0] ** -2)),
                levels,
                SOLVERS[cls],
                eta=settings["eta"],
                noise_fn=None if noise is None else lambda step: noise[step],
                trajectory=True,
            )
            states = [x / np.sqrt(1 + s**2) for x, s in zip(path.states[1:], levels[1:])]
    atol = 1e-6 if "ztsnr" in key else 1e-9
    np.testing.assert_allclose(nchw(states[-1]), golden[f"x_{key}_f64"], atol=atol, err_msg=key)
    if cls != "EulerDiscrete":  # the file has its states in the other coordinate
        trace = golden[f"trace_{key}_f64"][-n:]
        found = np.stack([nchw(s[:1])[0] for s in states])
        np.testing.assert_allclose(found, trace, atol=10 * atol, err_msg=key)
