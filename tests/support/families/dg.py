"""Golden files of discriminator guidance: the clock, extractor and head, and the sampler of
EDM-G++.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.diffusion import grids
from ogdm_jax.interop import names_adm
from ogdm_jax.methods import dg
from ogdm_jax.networks.feature_discriminator import FeatureDiscriminator
from ogdm_jax.sampling.churn import Churn
from ogdm_jax.sampling.sampler import sample
from tests.support.families import adm
from tests.support.families.samplers import CHURN, nhwc_steps
from tests.support.golden_support import Golden, family, nchw, nhwc
from tests.support.oracles import Mixture, column


@family("dg_vp_clock")
def clock(golden: Golden):
    with jax.enable_x64(True):
        sigma, t = jnp.asarray(golden["sigma"]), jnp.asarray(golden["t"])
        np.testing.assert_allclose(dg.vp_time(sigma), golden["tau"], rtol=1e-10)
        np.testing.assert_allclose(dg.vp_scale(t), golden["mean"], rtol=1e-12)
        np.testing.assert_allclose(dg.vp_sigma(t), golden["std"] / golden["mean"], rtol=1e-9)
        np.testing.assert_allclose(dg.cosine_time(t), golden["t_cos"], rtol=1e-9, atol=1e-12)
        # The authors work in float32 here, where exp(B) - 1 at their smallest time is 1.2 % off:
        # the file's Z says what they took for the lower end. With that end the times are ours; the
        # smallest lose digits once more.
        u = jnp.asarray(golden["u"], jnp.float64)
        high = np.log(dg.vp_sigma(np.float64(1.0)))
        times = np.asarray(dg.vp_time(jnp.exp(high - (1 - u) * float(golden["Z"]) / 2)))
        for above, rtol in ((1e-2, 2e-5), (1e-3, 3e-4), (0, 2e-2)):
            rows = times > above
            np.testing.assert_allclose(times[rows], golden["time_importance"][rows], rtol=rtol)
        np.testing.assert_allclose(dg.vp_time(dg.training_sigma(u)), times, rtol=2e-2)
        np.testing.assert_allclose(
            np.log(dg.training_sigma(u)), high - (1 - u) * float(golden["Z"]) / 2, rtol=0, atol=7e-3
        )
        times = dg.vp_time(dg.training_sigma(u, importance=False))
        np.testing.assert_allclose(times, golden["time_uniform"], rtol=1e-5)
    np.testing.assert_allclose(
        dg.vp_time(jnp.asarray(golden["sigma"], jnp.float32)), golden["tau"], rtol=2e-6
    )


def pair(golden: Golden):
    """The file's discriminator, the parameters of its head, and those of its extractor."""
    extractor, head = (
        adm.published("create_classifier", golden.config[f"{name}_kwargs"])[0].clone(
            time_scale=999.0
        )
        for name in ("extractor", "head")
    )
    frozen, params = (
        names_adm.adm_to_flax(golden.state_dict(f"{name}_"), network)["params"]
        for name, network in (("extractor", extractor), ("head", head))
    )
    return FeatureDiscriminator(head, extractor), params, frozen


@family("dg_disc_")
def discriminator(golden: Golden):
    clock = "cosine" if golden.config["img_resolution_arg"] == 64 else "vp"
    network, params, frozen = pair(golden)
    x, sigma = jnp.asarray(nhwc(golden["x"])), jnp.asarray(golden["sigma"])
    label = (
        jnp.asarray(golden["class_labels"].argmax(-1), jnp.int32)
        if "class_labels" in golden
        else None
    )
    tau = dg.vp_time(sigma)
    t_net = dg.cosine_time(tau) if clock == "cosine" else tau
    golden.assert_close("tau", tau)
    golden.assert_close("t_net", t_net)
    np.testing.assert_allclose(jax.lax.rsqrt(1 + sigma**2), golden["alpha"], rtol=1e-5)

    @adm.jit
    def values(params, frozen, x):
        logit = lambda x, t, y: network.logit(params, frozen, x, t, y)
        shift, ratio = dg.correction(dg.log_ratio(logit, 1e-5, clock), x, sigma, label)
        x_vp = x * column(jax.lax.rsqrt(1 + sigma**2), x)
        apply = functools.partial(network.extractor.apply, {"params": frozen}, x_vp, t_net)
        feature = apply(method="features")[:1]
        return logit(x_vp, t_net, label), ratio, shift, feature, apply()

    logit, ratio, shift, feature, classes = values(params, frozen, x)
    golden.assert_close("logit", logit)
    np.testing.assert_allclose(
        ratio, golden["log_ratio"], rtol=0, atol=2 * golden.tolerance("logit")
    )
    golden.assert_close("guidance", nchw(-shift))
    scale = column(sigma, x) ** 2 * column(golden["alpha"], x)
    golden.assert_close("grad_logit_x_vp", nchw(shift / scale))
    golden.assert_close("feature", nchw(feature)[:, ::4])
    np.testing.assert_allclose(classes[:, :8], golden["extractor_logits"], rtol=0, atol=1e-4)


@family("sampler_dg")
def sampler(golden: Golden):
    with jax.enable_x64(True):
        model, data = (Mixture.golden(golden.config[name]) for name in ("model_gmm", "data_gmm"))
        latents = jnp.asarray(nhwc(golden["latents"]), jnp.float64)
        for name, settings in golden.json("settings").items():
            seen = []

            def logit(x_vp, time, label, seen=seen):
                m = dg.vp_scale(time)
                value = data.log_density(x_vp, jnp.sqrt(1 - m**2), m) - model.log_density(
                    x_vp, jnp.sqrt(1 - m**2), m
                )
                jax.debug.callback(lambda v: seen.append(np.asarray(v)), value, ordered=True)
                return value

            low, high = (
                float(dg.vp_sigma(np.float64(settings[k]))) for k in ("time_min", "time_max")
            )
            guided = dg.guide(
                lambda x, sigma, label=None: model.denoise(x, sigma),
                dg.log_ratio(logit),
                settings["dg_weight_1st_order"],
                low,
                high,
                corrector_weight=settings["dg_weight_2nd_order"],
                gating="batch",
            )
            churn = Churn(**{k: settings[k] for k in CHURN if k in settings})
            if settings["boosting"]:
                churn = dg.Boost(base=churn)
            noise = (
                jnp.asarray(nhwc_steps(golden[f"noise_{name}"]))
                if f"noise_{name}" in golden
                else None
            )
            n, grid = (
                settings.get("num_steps", 18),
                {k: settings[k] for k in ("sigma_min", "sigma_max", "rho") if k in settings},
            )
            x = sample(
                guided,
                latents,
                grids.edm(n, **grid),
                solver="heun",
                churn=churn,
                noise_fn=None if noise is None else lambda step, noise=noise: noise[step],
            )
            jax.effects_barrier()
            np.testing.assert_allclose(
                nchw(x), golden[f"x_{name}"], rtol=0, atol=1e-4, err_msg=name
            )
            ratios = golden[f"log_ratio_{name}"]
            assert len(seen) == len(ratios), name
            if seen:
                np.testing.assert_allclose(
                    np.stack(seen), ratios, rtol=1e-4, atol=1e-4, err_msg=name
                )


@family("dit_sampling_latent_disc")
def latent_discriminator(golden: Golden):
    """DG's discriminator of DiT latents: t / 999 of the discrete chain, gradient at x_t itself."""
    network, params, frozen = pair(golden)
    x, t, label = jnp.asarray(nhwc(golden["x"])), golden["t"] / 999, jnp.asarray(golden["y"])
    t = jnp.asarray(t, jnp.float32)

    @adm.jit
    def values(params, frozen, x):
        def total(x):
            logit = network.logit(params, frozen, x, t, label)
            return logit.sum(), logit

        grad, logit = jax.grad(total, has_aux=True)(x)
        feature = network.extractor.apply({"params": frozen}, x, t, method="features")[:1]
        return logit, grad, feature

    logit, grad, feature = values(params, frozen, x)
    golden.assert_close("log_ratio", logit)
    golden.assert_close("probability", jax.nn.sigmoid(logit))
    golden.assert_close("grad", nchw(grad))
    shown = nchw(feature)[0]
    golden.assert_close("feature", shown[:: len(shown) // len(golden["feature"])])
