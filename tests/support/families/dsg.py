"""Golden files of DSG and DPS: the conditioning step, measurement operators, and the transitions
they start from.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.diffusion import steps
from ogdm_jax.diffusion.process import Discrete, space_timesteps, vp_scale
from ogdm_jax.inverse import degradations as degrade
from ogdm_jax.inverse import operators
from ogdm_jax.methods import dps, dsg
from ogdm_jax.sampling import gradients
from tests.support.golden_support import Golden, family, nchw, nhwc


def operator(name: str, golden: Golden) -> operators.Operator:
    size = golden["x_t"].shape[-1]
    if name == "inpaint":
        return operators.inpaint(nhwc(golden["mask"]))
    if name == "blur":
        size, std = re.search(
            r"(\d+)x\d+, std ([\d.]+)", golden.config["operators"]["blur"]
        ).groups()
        return operators.gaussian_blur(int(size), float(std))
    if name.startswith("sr"):
        return operators.super_resolution(int(name[2:]), size)
    k = int(name.removeprefix("stride"))
    return operators.Operator(name, lambda x: x[:, ::k, ::k])


@family("dsg_step")
def check_step(golden: Golden):
    sigma, law = golden.config["sigma"], golden.config["x0hat"]
    mean, x, sample = (nhwc(golden[name]) for name in ("x_mean", "x_t", "x_sample"))
    eps = (sample - mean) / sigma

    def evaluate(x):
        return law["a"] * x - law["b"] * x**3 + law["c"] * jnp.roll(x, 1, axis=2)

    for name in (key[len("y_") :] for key in golden.arrays if key.startswith("y_")):
        y = jnp.asarray(nhwc(golden[f"y_{name}"]))
        loss = operators.measurement_loss(operator(name, golden), y, squared=False)
        _, residual, grad = gradients.through_network(loss, evaluate, jnp.asarray(x))
        golden.assert_close(f"residual_norm_{name}", residual[0], 1e-5 * float(residual[0]))
        golden.assert_close(f"grad_{name}", nchw(grad))
        for rate in golden.config["guidance_rates"]:
            out = dsg.spherical_step(jnp.asarray(mean), sigma, jnp.asarray(eps), grad, rate)
            key = f"out_{name}_g{rate:g}"
            golden.assert_close(
                key, nchw(out), max(golden.tolerance(key), 2e-6 * float(jnp.abs(out).max()))
            )
        for key in (
            k for k in golden.arrays if k.startswith("dps_scale") and k.endswith(f"_{name}")
        ):
            scale = float(key.removeprefix("dps_scale").removesuffix(f"_{name}"))
            golden.assert_close(key, nchw(dps.dps_step(mean, sigma, eps, grad, scale)), 3e-6)


@family("dsg_super_resolution")
def check_super_resolution(golden: Golden):
    for case in golden.config["cases"]:
        key, factor, size = case["key"], case["scale"], case["in_size"]
        matrix = np.zeros((size // factor, size))
        rows = np.broadcast_to(np.arange(size // factor), golden[f"weights_{key}"].shape)
        np.add.at(matrix, (rows, golden[f"field_of_view_{key}"]), golden[f"weights_{key}"])
        np.testing.assert_allclose(degrade.resize_matrix(factor, size), matrix, atol=1e-7)
        op = operators.super_resolution(factor, size)
        if f"x_{key}" in golden:
            golden.assert_close(
                f"y_{key}", nchw(op.forward(jnp.asarray(nhwc(golden[f"x_{key}"])))), 2e-6
            )
        if case == golden.config["cases"][0]:
            ramp = np.linspace(0, 1, size)[:, None] * np.linspace(-1, 1, size)[None]
            y = op.forward(jnp.asarray(ramp, jnp.float32)[None, ..., None])
            golden.assert_close("ramp_y", np.asarray(y)[0, ..., 0], 2e-6)


@family("dsg_gaussian_blur")
def check_gaussian_blur(golden: Golden):
    for case in golden.config["cases"]:
        key, size, std = case["key"], case["kernel_size"], case["std"]
        taps = degrade.gaussian_taps(size, std)
        np.testing.assert_allclose(
            np.outer(taps, taps), golden[f"kernel_{key}"], rtol=0, atol=1e-15
        )
        assert np.flatnonzero(taps).max() - size // 2 == case["nonzero_radius"]
        x = jnp.asarray(nhwc(golden[f"x_{key}"]))
        for op in (operators.gaussian_blur(size, std), operators.motion_blur(np.outer(taps, taps))):
            golden.assert_close(f"y_{key}", nchw(op.forward(x)), 3e-6)


@family("dsg_p_sample")
def check_transition(golden: Golden):
    """Mean and std of DDIM (eta 1) and DDPM (learned variance) in our coordinate, carried to
    theirs; clipped x0.
    """
    law = golden.config["model"]
    for key, at in golden.json("settings").items():
        with jax.enable_x64(True):
            table = Discrete.make(keep=space_timesteps(1000, [at["N"]]))
            i = at["index"]
            assert float(table.timesteps[i]) == at["model_t"]
            sigma = jnp.asarray(table.sigma[i : i + 1])
            below = jnp.asarray(table.sigma[i - 1 : i] if i else np.zeros(1))
            x_vp = jnp.asarray(nhwc(golden["x"]), jnp.float64)
            eps = law["a"] * x_vp + law["b"] * jnp.cos(x_vp)
            x = x_vp / steps.per_example(vp_scale(sigma), x_vp)
            x0 = jnp.clip(x - steps.per_example(sigma, x) * eps, -1, 1)
            if at["sampler"] == "ddim":
                mean, std = steps.ddim_moments(x, x0, sigma, below, 1.0)
            else:
                fraction = (law["c"] * jnp.sin(law["d"] * x_vp) + 1) / 2
                mean, std = steps.ancestral_moments(x, x0, sigma, below, fraction)
            scale = steps.per_example(vp_scale(below), x)
            std_vp = np.broadcast_to(np.asarray(steps.spread(std, x) * scale), x.shape)
            mean_vp = np.asarray(mean * scale)
        golden.assert_close(f"x0_{key}", nchw(x0), 2e-5)
        golden.assert_close(f"mean_{key}", nchw(mean_vp), 2e-5)
        if (
            at["sampler"] == "ddim" or i > 0
        ):  # at index 0 DDPM states a std there that it never uses; ours is 0
            golden.assert_close(f"sigma_t_{key}", nchw(std_vp), 2e-6)
