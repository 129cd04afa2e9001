"""DiT's sampler on analytic mixtures: respacing, learned variance, guidance on three channels, DG."""

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.diffusion import grids, precondition
from ogdm_jax.methods import cfg, dg
from ogdm_jax.sampling.sampler import sample
from tests.reference.gaussian import Chain
from tests.support.golden_support import Golden, family, nchw, nhwc
from tests.support.oracles import Mixture, column


def network(golden: Golden):
    """(x_t, t, label) -> eps and the variance's channels; the last class is the one for none."""
    shape = golden.config["shape"]
    classes = [Mixture.golden({**c, "shape": shape}) for c in golden.config["classes"]]
    table = Chain.make("linear", 1000, "").table
    amplitude = golden.config["var_amp"]

    def model(x, t, label):
        sigma = jnp.asarray(table.sigma)[t.astype(jnp.int32)]
        scale = 1 / jnp.sqrt(1 + sigma**2)
        each = jnp.stack([c.denoise(x / column(scale, x), sigma) for c in classes])
        chosen = each[jnp.where(label < 0, len(classes) - 1, label), jnp.arange(len(x))]
        eps = (x - column(scale, x) * chosen) / column(sigma * scale, x)
        further = amplitude * jnp.sin(x + 0.01 * column(t, x))
        return jnp.concatenate([eps, further], axis=-1)

    return model


def check_tables(golden: Golden, spacing: str):
    table = Chain.make("linear", 1000, spacing).table
    np.testing.assert_array_equal(table.timesteps, golden[f"timestep_map_{spacing}"])
    np.testing.assert_allclose(table.betas, golden[f"betas_{spacing}"], rtol=1e-9)


def check_steps(golden: Golden, model, spacing: str):
    """The transition at a few steps, and DiT's training loss: mse + vb, with the bound's weight 1."""
    chain = Chain.make("linear", 1000, spacing, variance="learned")
    t, x, y = jnp.asarray(golden[f"t_{spacing}"]), *(golden[n] for n in ("p_x", "p_y"))
    conditional = lambda x, time: model(x, time, jnp.asarray(y))
    moments = chain.p_moments(conditional, jnp.asarray(nhwc(x), jnp.float64), t, clip=False)
    golden.assert_close(f"p_mean_{spacing}", nchw(moments.mean))
    golden.assert_close(f"p_log_variance_{spacing}", nchw(moments.log_variance))
    golden.assert_close(f"p_pred_xstart_{spacing}", nchw(moments.x0))
    x0, noise = (jnp.asarray(nhwc(golden[f"train_{n}"]), jnp.float64) for n in ("x0", "noise"))
    losses = chain.losses(conditional, x0, t, noise)
    for name, value in losses.items():
        golden.assert_close(f"train_{name}_{spacing}", value)


def check_sampling(golden: Golden, model, name: str, settings: dict, guidance=()):
    """A whole chain by sample() in our coordinate, from the noise that the file has."""
    sigmas = grids.respaced(settings["respacing"], "linear", 1000)
    denoise = precondition.adm(model, "linear", 1000, learned_variance=True)
    noise = jnp.asarray(np.moveaxis(golden[f"noise_{name}"].astype(np.float64), 2, -1))
    start = nhwc(golden["latents"]).astype(np.float64) * np.sqrt(1 + sigmas[0] ** 2) / sigmas[0]
    eta = settings.get("ddim")
    how = {"solver": "ancestral", "variance": "learned"} if eta is None else {"solver": "ddim"}
    x = sample(
        denoise,
        jnp.asarray(start),
        sigmas,
        label=jnp.asarray(golden["y"]),
        noise_fn=lambda step: noise[step],
        guidance=guidance,
        **how,
        **({} if eta is None else {"eta": eta}),
    )
    np.testing.assert_allclose(nchw(x), golden.truth(f"x_{name}"), rtol=0, atol=1e-9, err_msg=name)


@family("dit_sampling_respaced")
def check_respaced(golden: Golden):
    model = network(golden)
    with jax.enable_x64(True):
        for spacing in ("250", "50", "ddim25"):
            check_tables(golden, spacing)
            check_steps(golden, model, spacing)
        for name, settings in golden.json("settings").items():
            guidance = ()
            if settings["mode"] == "cfg":  # the published rule: on three of four channels
                guidance = cfg.guidance(settings["cfg_scale"], channels=3)
            check_sampling(golden, model, name, settings, guidance)


def log_ratio(x, sigma, label):
    """The file's discriminator: of the state itself and t / 999, asked at the chain's own times."""
    table = Chain.make("linear", 1000, "").table
    t = jnp.asarray(table.timesteps)[table.index(sigma)].astype(x.dtype)
    state = x / column(jnp.sqrt(1 + sigma**2), x)
    sums = 0.3 * jnp.sin(state + 0.1 * column(label, x)) - 0.02 * state**2
    value = (1.2 - t / 999) * sums.sum((1, 2, 3))
    limit = np.log1p(-1e-5) - np.log(1e-5)
    return jnp.clip(value, -limit, limit)


@family("dit_sampling_dg")
def check_dg(golden: Golden):
    """Two scales of classifier-free guidance on three channels, and DG by the mean above a time."""
    model, levels = network(golden), Chain.make("linear", 1000, "").table.sigma
    between = lambda t: float(np.sqrt(levels[t] * levels[t + 1]))  # between steps t and t + 1
    with jax.enable_x64(True):
        for spacing in ("250", "50"):
            check_tables(golden, spacing)
            check_steps(golden, model, spacing)
        for name, s in golden.json("settings").items():
            below = (between(s["branch_time"]), s["ST_cfg"])
            guidance = [cfg.guidance(s["LT_cfg"], channels=3, below=below)]
            if s["time_min"] < 999:
                low = between(s["time_min"])
                guidance.append(dg.guidance(log_ratio, s["dg_scale"], low, rule="mean"))
            check_sampling(golden, model, name, s, guidance)
