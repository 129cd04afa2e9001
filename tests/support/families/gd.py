"""guided-diffusion's chain: tables, one-step transitions, losses, and whole loops through this
package's sampler.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax.diffusion import grids, precondition, process
from ogdm_jax.methods import classifier, contract
from ogdm_jax.sampling.sampler import sample
from ogdm_jax.training import objective
from tests.reference.gaussian import Chain
from tests.support.golden_support import Golden, family, nchw, nhwc


def chain(golden: Golden) -> Chain:
    """The chain of create_gaussian_diffusion's arguments."""
    k = golden.config["create_gaussian_diffusion"]
    fixed = "small" if k.get("sigma_small") else "large"
    return Chain.make(
        k.get("noise_schedule", "linear"),
        k.get("steps", 1000),
        k.get("timestep_respacing", ""),
        predict="x0" if k.get("predict_xstart") else "eps",
        variance="learned" if k.get("learn_sigma") else fixed,
        rescale=bool(k.get("rescale_timesteps")),
    )


def network(golden: Golden):
    """The file's analytic model, and its classifier's gradient."""
    m, learned = (
        golden.config["model"],
        golden.config["create_gaussian_diffusion"].get("learn_sigma"),
    )

    def model(x, t, label=None):
        t = t[:, None, None, None].astype(x.dtype)
        output = m["a"] * x + m["b"] * jnp.sin(x + m["c"] * t)
        further = m["d"] * jnp.cos(m["e"] * x + m["f"] * t)
        return jnp.concatenate([output, further], axis=-1) if learned else output

    def gradient(x, t):
        return -0.3 * x + 0.1 * jnp.cos(x) + 0.0002 * t[:, None, None, None].astype(x.dtype)

    return model, gradient


def check_tables(golden: Golden, ours: Chain):
    stride = golden.config.get("table_stride", 1)
    for name, values in (
        ("betas", ours.table.betas),
        ("alphas_cumprod", ours.table.alpha_bar),
        ("posterior_variance", ours.table.posterior_variance),
        ("posterior_log_variance_clipped", ours.log_posterior_variance),
        ("timestep_map", ours.table.timesteps),
    ):
        np.testing.assert_allclose(
            values[::stride], golden[name], rtol=1e-9, atol=1e-12, err_msg=name
        )


def check_steps(golden: Golden, ours: Chain):
    """One step from each t, with and without clamp and classifier."""
    model, gradient = network(golden)
    x, x0, noise, q_noise = (
        jnp.asarray(nhwc(golden[n]).astype(np.float64)) for n in ("x", "x0", "noise", "q_noise")
    )
    t = jnp.asarray(golden["t"])
    assert golden.config["cond_fn"] == "grad = -0.3x + 0.1cos(x) + 0.0002 t"
    values = {
        "q_sample": ours.q_sample(x0, t, q_noise),
        "p_sample_guided": ours.p_sample(model, x, t, noise, gradient=gradient),
        "ddim_guided_eta0": ours.ddim_sample(model, x, t, gradient=gradient),
        "ddim_reverse": ours.ddim_reverse(model, x, t, clip=False),
    }
    for clip, name in ((True, "clip"), (False, "noclip")):
        moments = ours.p_moments(model, x, t, clip)
        values |= {
            f"p_mean_{name}": moments.mean,
            f"p_log_variance_{name}": moments.log_variance,
            f"p_pred_xstart_{name}": moments.x0,
            f"p_sample_{name}": ours.p_sample(model, x, t, noise, clip),
            f"ddim_eta0_{name}": ours.ddim_sample(model, x, t, noise, 0.0, clip),
            f"ddim_eta1_{name}": ours.ddim_sample(model, x, t, noise, 1.0, clip),
        }
    for name, value in values.items():
        if name in golden:
            golden.assert_close(name, nchw(value))


def check_losses(golden: Golden, ours: Chain):
    model, _ = network(golden)
    x0, noise = (jnp.asarray(nhwc(golden[n]).astype(np.float64)) for n in ("x0", "q_noise"))
    t, kind, kept = (
        jnp.asarray(golden["t"]),
        golden.config["loss_type"].removeprefix("LossType."),
        ours.table.timesteps,
    )
    if kind.endswith("KL"):
        x = ours.q_sample(x0, t, noise)
        bound = ours.bound(model(x, ours.model_time(t)), x0, x, t)
        golden.assert_close("train_loss", bound * (len(kept) if kind == "RESCALED_KL" else 1))
        return
    found = ours.losses(model, x0, t, noise, len(kept) / 1000 if kind == "RESCALED_MSE" else 1.0)
    for name, value in found.items():
        golden.assert_close(f"train_{name}", value)
    if ours.variance == "learned" and ours.predict == "eps" and kind == "RESCALED_MSE":
        _check_hybrid(golden, ours, model, x0, noise, ours.table.sigma[golden["t"]])


def _check_hybrid(golden: Golden, ours: Chain, model, x0, noise, sigma):
    """L_hybrid as training adds it up, per image; the file's is a mean over pixels."""
    denoise = precondition.adm(
        model, ours.table, learned_variance=True, rescale_timesteps=ours.rescale
    )
    xt = x0 + sigma.reshape(-1, 1, 1, 1) * noise
    example = types.SimpleNamespace(xt=xt, x0=x0, sigma=jnp.asarray(sigma), label=None)
    x0_hat, _, bound = objective._denoised(ours.table, denoise, example)
    square = contract.squared_error(example, x0_hat, x0, lambda sigma: 1 / sigma**2)
    pixels = x0[0].size
    golden.assert_close("train_vb", bound / pixels)
    golden.assert_close("train_mse", square / pixels)
    golden.assert_close("train_loss", (square + bound) / pixels)


def check_loops(golden: Golden, ours: Chain):
    """Whole loops by sample() in this package's coordinate, from the denoiser that precondition.adm
    makes.
    """
    if "loop_noise" not in golden:
        return
    model, _ = network(golden)
    k = golden.config["create_gaussian_diffusion"]
    schedule, steps = k.get("noise_schedule", "linear"), k.get("steps", 1000)
    denoise = precondition.adm(
        model,
        schedule,
        steps,
        predict=ours.predict,
        learned_variance=ours.variance == "learned",
        clip=True,
        rescale_timesteps=ours.rescale,
    )
    sigmas = grids.respaced(k.get("timestep_respacing", ""), schedule, steps)
    noise = jnp.asarray(np.moveaxis(golden["loop_noise"].astype(np.float64), 2, -1))
    start = nhwc(golden["loop_xT"]).astype(np.float64) * np.sqrt(1 + sigmas[0] ** 2) / sigmas[0]
    for name, settings in (
        (
            "loop_ancestral",
            {"solver": "ancestral", "variance": None if k.get("learn_sigma") else ours.variance},
        ),
        ("loop_ddim0", {"solver": "ddim"}),
        ("loop_ddim1", {"solver": "ddim", "eta": 1.0}),
    ):
        if name in golden:
            x = sample(
                denoise, jnp.asarray(start), sigmas, noise_fn=lambda step: noise[step], **settings
            )
            np.testing.assert_allclose(nchw(x), golden.truth(name), rtol=0, atol=1e-9, err_msg=name)


def check_guided(golden: Golden, ours: Chain):
    """Classifier guidance of sample() by both rules: one step from each t. (The released p_sample
    also shifts the mean at t = 0, by at most 1e-4 of the gradient.)
    """
    model, _ = network(golden)
    denoise = precondition.adm(
        model,
        ours.table,
        predict=ours.predict,
        learned_variance=ours.variance == "learned",
        clip=True,
        rescale_timesteps=ours.rescale,
    )
    times = jnp.asarray(ours.model_time(jnp.arange(len(ours.table.timesteps))))

    def log_prob(x, sigma, label):  # whose gradient is the file's
        x_vp = x / jnp.sqrt(1 + sigma**2)[:, None, None, None]
        t = times[ours.table.index(sigma)][:, None, None, None]
        return jnp.sum(-0.15 * x_vp**2 + 0.1 * jnp.sin(x_vp) + 0.0002 * t * x_vp, (1, 2, 3))

    fixed = {} if ours.variance == "learned" else {"variance": ours.variance}
    for name, rule, settings in (
        ("p_sample_guided", "mean", {"solver": "ancestral", **fixed}),
        ("ddim_guided_eta0", "score", {"solver": "ddim"}),
    ):
        guidance = classifier.guidance(log_prob, rule=rule)

        @jax.jit
        def step(x, noise, levels, guidance=guidance, settings=settings):
            x = x * jnp.sqrt(1 + levels[0] ** 2) / levels[0]
            drawn = sample(
                denoise, x, levels, guidance=guidance, noise_fn=lambda _: noise, **settings
            )
            return drawn / jnp.sqrt(1 + levels[1] ** 2)

        levels = np.append(0.0, ours.table.sigma)
        for row, t in enumerate(golden["t"]):
            x, noise = (nhwc(golden[n][row : row + 1]).astype(np.float64) for n in ("x", "noise"))
            if t or rule == "score":
                drawn = nchw(step(x, noise, levels[[t + 1, t]]))
                truth = golden.truth(name)[row : row + 1]
                atol = golden.tolerance(name)
                np.testing.assert_allclose(drawn, truth, rtol=0, atol=atol, err_msg=f"{name} {t}")


@family("gd_diffusion")
def check_diffusion(golden: Golden):
    ours = chain(golden)
    check_tables(golden, ours)
    with jax.enable_x64(True):
        check_steps(golden, ours)
        check_losses(golden, ours)
        check_loops(golden, ours)
        check_guided(golden, ours)


@family("gd_respacing")
def check_respacing(golden: Golden):
    for case in golden.json("lists"):
        kept = process.space_timesteps(case["num_timesteps"], case["section_counts"])
        assert kept.tolist() == case["timesteps"], case["section_counts"]
    for case in golden.json("errors"):
        with pytest.raises(ValueError, match="spacing"):
            process.space_timesteps(case["num_timesteps"], case["section_counts"])
    for name in golden.arrays:
        if name.startswith("betas_"):
            _, schedule, steps = name.split("_")
            ours = process.betas(schedule, int(steps))[:: int(steps) // 100]
            np.testing.assert_allclose(ours, golden[name], rtol=1e-9, err_msg=name)
