"""Golden checks of OGDM: discriminator, projection, and both repositories' losses with all draws
supplied.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.diffusion import jumps, precondition
from ogdm_jax.diffusion.process import Discrete
from ogdm_jax.interop.names_discriminator import discriminator_to_flax, flax_to_discriminator
from ogdm_jax.interop.names_edm import edm_network, edm_to_flax, flax_to_edm
from ogdm_jax.methods import ogdm
from ogdm_jax.networks.discriminator import StyleGAN2Discriminator
from tests.support.golden_support import Golden, family, nhwc

# These programs run once: most of their time is XLA's optimiser, which exactness does not need.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def _network(settings: dict) -> StyleGAN2Discriminator:
    names = {"c_dim": "label_dim"}  # the guided-diffusion repository's word
    return StyleGAN2Discriminator(**{names.get(k, k): v for k, v in settings.items() if k != "cls"})


def _discriminator(g: Golden, settings: dict, prefix: str = "", dtype=jnp.float64):
    """(network, variables): the file's weights, widened to dtype."""
    network = _network(settings)
    variables = discriminator_to_flax(g.state_dict(prefix), network)
    return network, jax.tree.map(lambda a: jnp.asarray(a, dtype), variables)


def mapped_condition(network, params, *inputs):
    """What the discriminator's first part makes of the condition."""
    chosen = lambda module, _: module.name == "mapping"
    kept = network.apply({"params": params}, *inputs, capture_intermediates=chosen)[1]
    return kept["intermediates"]["mapping"]["__call__"][0]


def _norms(grads, network) -> dict[str, float]:
    return {k: np.linalg.norm(v) for k, v in flax_to_discriminator(grads, network).items()}


def _wide(a: np.ndarray) -> jax.Array:
    return jnp.asarray(a, jnp.float64)


def _label(g: Golden) -> jax.Array | None:
    return _wide(g["class_labels"]) if g["class_labels"].shape[1] else None


@family("ogdm_disc")
def disc(g: Golden):
    label = g["class_labels"] if g["class_labels"].shape[1] else None

    def both(network, variables, x, cond, label):
        judge = lambda images: network.apply(variables, images, cond, label)
        real, r1 = ogdm.logits_and_r1(judge, x)
        return {"logits_real": real, "logits_fake": judge(0.5 * x), "r1": r1}

    # float32 is what training runs; float64 leaves rounding no excuse.
    network, variables = _discriminator(g, g.config["kwargs"], dtype=jnp.float32)
    for name, value in quick_jit(both, static_argnums=0)(
        network, variables, nhwc(g["x"]), g["time_cond"], label
    ).items():
        g.assert_close(name, value)
    with jax.enable_x64(True):
        network, variables = _discriminator(g, g.config["kwargs"])
        x, cond, label = (
            _wide(nhwc(g["x"])),
            _wide(g["time_cond"]),
            None if label is None else _wide(label),
        )

        def run(params):
            values = both(network, {"params": params}, x, cond, label)
            real, fake, r1 = values.values()
            total = jnp.mean(ogdm.discriminator_loss(real, fake, "hinge") + r1)
            gradient = jax.grad(
                lambda images: jnp.sum(network.apply({"params": params}, images, cond, label))
            )(x)
            return total, values | {
                "total_hinge_r1": total,
                "hinge": ogdm.discriminator_loss(real, fake, "hinge"),
                "logistic": ogdm.discriminator_loss(real, fake, "logistic"),
                "cmap": mapped_condition(network, params, x, cond, label),
                "grad_real": jnp.moveaxis(gradient, -1, 1),
            }

        grads, values = quick_jit(jax.grad(run, has_aux=True))(variables["params"])
    for name, value in values.items():
        g.assert_close(name, value)
    norms = _norms({"params": grads}, network)
    g.assert_norms("grad_norms", norms)
    total = np.sqrt(sum(n**2 for n in norms.values()))
    np.testing.assert_allclose(total, float(g["grad_norm_total"]), rtol=1e-4)


_ANALYTIC = {
    "0.25x/(0.25+s^2)+0.3*tanh(x+ln(s)/4)": lambda x, s: (
        0.25 * x / (0.25 + s**2) + 0.3 * jnp.tanh(x + jnp.log(s) / 4)
    ),
    "x/(1+s^2)": lambda x, s: x / (1 + s**2),
}


def _analytic(g: Golden):
    """The file's denoiser, evaluated in float32 as in the official projection."""
    formula = _ANALYTIC[g.config["denoiser"].removeprefix("D(x,s)=").split(",")[0]]

    def denoise(x, sigma, label=None):
        del label
        x, s = x.astype(jnp.float32), sigma.astype(jnp.float32)[:, None, None, None]
        return formula(x, s).astype(jnp.float64)

    return denoise


@family("ogdm_edm_step")
def edm_step(g: Golden):
    with jax.enable_x64(True):
        sigma, u, x = jnp.asarray(g["sigma_t"]), jnp.asarray(g["u"]), _wide(nhwc(g["x_t"]))
        np.testing.assert_allclose(jumps.tau(sigma), g["tau"], rtol=0, atol=2e-6)
        g.assert_close("sigma_of_tau_grid", jumps.sigma_of_tau(_wide(g["tau_grid"])))
        for name, run in g.json("settings").items():
            below = jumps.next_sigma(sigma, u, run["k"])
            np.testing.assert_allclose(below, g[f"sigma_s_k{run['k']}"], rtol=1e-5, err_msg=name)
            # The official state has x's dtype; from its own level, so that only the projection is
            # compared.
            wide = run["x_dtype"].endswith("float64")
            start = x if wide else x.astype(jnp.float32)
            solver = "euler" if run["ddim"] else "heun"
            end = ogdm.project(
                _analytic(g), start, sigma, jnp.asarray(g[f"sigma_s_k{run['k']}"]), solver
            )
            truth = nhwc(g[f"x_s_{name}"])
            # The denoiser is float32 in both; Heun divides its rounding by sigma_s.
            np.testing.assert_allclose(
                end, truth, rtol=0, atol=2e-6 * max(1.0, np.abs(truth).max()), err_msg=name
            )
        if "discrete_grid" not in g:
            return
        grid, sigma = g["discrete_grid"], _wide(g["discrete_grid"])[g["discrete_index"]]
        below = jumps.next_sigma(sigma, jnp.zeros_like(sigma), len(grid))
        np.testing.assert_allclose(below, g["discrete_sigma_s"], rtol=1e-12)
        end = ogdm.project(_analytic(g), x, sigma, below)
        np.testing.assert_allclose(end, nhwc(g["discrete_x_s"]), rtol=0, atol=2e-6)


def _sigmas(normal: np.ndarray) -> jax.Array:
    """EDM's log-normal levels, clipped as in the OGDM code."""
    return jnp.clip(jnp.exp(1.2 * _wide(normal).reshape(-1) - 1.2), 0.002, 80.0)


def _denoiser(g: Golden):
    """(variables -> denoise, variables, gradients -> norms by PyTorch name) of the file's EDM
    network.
    """
    network = edm_network(g.config["kwargs_net"], dtype=jnp.float64)
    variables = jax.tree.map(_wide, edm_to_flax(g.state_dict("net_"), network))
    frozen = {k: v for k, v in variables.items() if k != "params"}

    def denoiser(params, augment=None):
        variables = {"params": params, **frozen}
        return precondition.edm(functools.partial(network.apply, variables, augment=augment))

    def norms(grads):
        return {k: np.linalg.norm(v) for k, v in flax_to_edm({"params": grads}, network).items()}

    return denoiser, variables["params"], norms


@family("ogdm_losses")
def losses(g: Golden):
    with jax.enable_x64(True):
        network, variables = _discriminator(g, g.config["kwargs_disc"], "disc_")
        denoiser, params, norms_of = _denoiser(g)
        settings = ogdm.Settings(
            **ogdm.PRESETS["edm"]
            | {
                "k": g.config["k"],
                "gamma": g.config["gamma"],
                "solver": "euler" if g.config["ddim"] else "heun",
            }
        )
        label, augment, y = _label(g), _wide(g["augment_labels"]), _wide(nhwc(g["images"]))
        pixels = y[0].size

        def draws(kind):
            sigma = _sigmas(g[f"{kind}_rnd_normal"])
            pair = ogdm.draw_pair(settings, sigma, _wide(g[f"{kind}_rnd_uniform_gap"]).reshape(-1))
            return pair, _wide(nhwc(g[f"{kind}_noise_unit"]))

        def judge(disc_params):
            return lambda x, pair: network.apply(
                disc_params, x, ogdm.condition(pair, settings), label
            )

        def generator(net_params):
            pair, eps = draws("G")
            denoise = denoiser(net_params)
            s = pair.sigma[:, None, None, None]
            xt = y + s * eps
            augmented = denoiser(net_params, augment)
            squared = jnp.square(augmented(xt, pair.sigma, label) - y)
            loss = (s**2 + 0.25) / (0.5 * s) ** 2 * squared
            fake = ogdm.project_pair(denoise, xt, pair, label, settings)
            logits = judge(variables)(fake, pair)
            added = settings.gamma * pixels * ogdm.generator_loss(logits)
            total = jnp.mean(jnp.sum(loss, axis=(1, 2, 3)) + added)
            return total, {"loss": jnp.moveaxis(loss, -1, 1), "fake_pred": logits, "G": total}

        def discriminator(disc_params):
            pair, eps = draws("D")
            xt = y + pair.sigma[:, None, None, None] * eps
            real = y + pair.sigma_next[:, None, None, None] * eps
            fake = ogdm.project(
                denoiser(params), xt, pair.sigma, pair.sigma_next, settings.solver, label
            )
            loss, metrics = ogdm.own_loss(judge(disc_params), real, fake, pair, settings)
            loss, r1 = loss / pixels, metrics["ogdm/r1"]
            return jnp.mean(loss), {"lossD": loss - settings.r1 * r1, "r1": r1}

        for function, at, prefix in (
            (generator, params, "G_net"),
            (discriminator, variables, "D_disc"),
        ):
            grads, values = quick_jit(jax.grad(function, has_aux=True))(at)
            for name, value in values.items():
                g.assert_close(name, value)
            g.assert_norms(
                f"grad_norms_{prefix}", norms_of(grads) if at is params else _norms(grads, network)
            )


@family("ogdm_adm_losses")
def adm_losses(g: Golden):
    """All in the package's coordinate x / sqrt(abar); compared in the official one."""
    with jax.enable_x64(True):
        values, sigma = jax.device_get(quick_jit(lambda: _adm_values(g))())
    for name, value in values.items():
        # Tables are float32 in the official code: x0 is off by the rounding of x / sqrt(abar), of
        # order sigma * 1e-7.
        rounding = 4e-7 * sigma.reshape((-1,) + (1,) * (value.ndim - 1))
        scale = 2e-5 if name.startswith(("lossG", "lossD_", "grad")) else 2e-6
        error = np.abs(value - g[name])
        assert np.all(error <= scale * max(1.0, np.abs(g[name]).max()) + rounding), (
            name,
            error.max(),
        )


def _adm_values(g: Golden):
    model, chain = g.config["eps_model"], Discrete.make(g.config["schedule"], g.config["T"])
    settings = ogdm.Settings(**ogdm.PRESETS["adm"])
    pair = jumps.index_pair(jnp.asarray(g["t"]), jnp.asarray(g["s"]), chain.sigma)
    s, t = (v.astype(jnp.float64)[:, None, None, None] for v in (pair.sigma, pair.index))
    x0 = _wide(nhwc(g["x0"]))

    def denoise(x, sigma, label=None):
        del sigma, label
        x_vp = x / jnp.sqrt(1 + s**2)
        return x - s * (model["a"] * jnp.tanh(x_vp) + model["b"] * t + model.get("c", 0) * x_vp)

    if g.config["disc"].startswith("toy"):
        judge = lambda x, pair: jnp.mean(x**2, axis=(1, 2, 3)) + 0.001 * (pair.index - pair.gap)
    else:
        network, variables = _discriminator(g, g.config["kwargs_disc"], "disc_")
        judge = lambda x, pair: network.apply(variables, x, ogdm.condition(pair, settings))
    seen = lambda x: ogdm.view(x, pair, settings)
    official = lambda x: jnp.moveaxis(seen(x), -1, 1)

    xt = x0 + s * _wide(nhwc(g["noise_G"]))
    x0_hat = denoise(xt, pair.sigma)
    fake = ogdm.project_pair(denoise, xt, pair, None, settings, x0_hat)
    logits = judge(seen(fake), pair)
    values = {
        "abar_t": 1 / (1 + pair.sigma**2),
        "abar_target": 1 / (1 + pair.sigma_next**2),
        "x_t": jnp.moveaxis(xt / jnp.sqrt(1 + s**2), -1, 1),
        "xhat0": jnp.moveaxis(x0_hat, -1, 1),
        "lossDM": jnp.mean((x0_hat - x0) ** 2, axis=(1, 2, 3)) / pair.sigma**2,
        "fake": official(fake),
        "ddim_step_of_x0": official(
            ogdm.project(denoise, xt, pair.sigma, pair.sigma_next, "ddim", x0_hat=x0)
        ),
    }
    noise = _wide(nhwc(g["noise_D"]))
    real = x0 + pair.sigma_next[:, None, None, None] * noise
    fake = ogdm.project(denoise, x0 + s * noise, pair.sigma, pair.sigma_next, settings.solver)
    for kind in ("hinge", "logistic"):
        values[f"lossG_{kind}"] = ogdm.generator_loss(logits, kind)
        loss, metrics = ogdm.own_loss(
            judge, seen(real), seen(fake), pair, dataclasses.replace(settings, loss=kind)
        )
        values[f"lossD_{kind}"] = loss - settings.r1 * metrics["ogdm/r1"]
    return values | {"grad_penalty": metrics["ogdm/r1"]}, pair.sigma
