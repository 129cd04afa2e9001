"""Latent models' networks against the authors' numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.diffusion import precondition, process, steps
from ogdm_jax.interop import names_latent
from ogdm_jax.methods import cfg, dsg, sp
from ogdm_jax.networks import clip_text, vae
from ogdm_jax.networks.dit import DiT, position_table
from ogdm_jax.networks.sd_unet import UNet2DCondition
from ogdm_jax.sampling.churn import Info
from ogdm_jax.sampling.guidance import plain_step
from tests.support.golden_support import Golden, family, nchw, nhwc
from tests.support.networks import run

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def norms(state) -> dict[str, float]:
    return {name: float(np.linalg.norm(v.astype(np.float64))) for name, v in state.items()}


def dit(golden: Golden):
    k = golden.config["kwargs"]
    network = DiT(
        img_resolution=k["input_size"],
        img_channels=k["in_channels"],
        out_channels=k["in_channels"] * (2 if k["learn_sigma"] else 1),
        label_dim=k["num_classes"],
        no_class=k["class_dropout_prob"] > 0,
        patch=k["patch_size"],
        width=k["hidden_size"],
        depth=k["depth"],
        heads=k["num_heads"],
        mlp_ratio=k.get("mlp_ratio", 4.0),
    )
    return network, names_latent.dit_to_flax(golden.state_dict(), network)


@family("dit_")
def check_dit(golden: Golden):
    network, variables = dit(golden)
    k = golden.config["kwargs"]
    side = network.img_resolution // network.patch
    if "buffer/pos_embed" in golden:
        table = position_table(side, side, network.width)[None]
        np.testing.assert_allclose(table, golden["buffer/pos_embed"], rtol=0, atol=1e-6)
    count = sum(leaf.size for leaf in jax.tree.leaves(variables)) + side**2 * network.width
    assert count == int(golden["param_count"])
    x, t, y = (jnp.asarray(golden[n]) for n in ("x", "t", "y"))
    x = jnp.asarray(nhwc(golden["x"]))

    def objective(params, x):
        out = network.apply({"params": params}, x, t.astype(jnp.float32), y)
        return jnp.sum(jnp.square(out)), out

    (_, out), (g_params, g_x) = jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))(
        variables["params"], x
    )
    golden.assert_close("out", nchw(out))
    golden.assert_close("grad_x", nchw(g_x), atol=2e-5 * np.abs(golden["grad_x"]).max())
    found = norms(names_latent.flax_to_dit({"params": g_params}, network))
    truth = golden.json("grad_norms")
    golden.assert_norms("grad_norms", {name: found[name] for name in truth})
    n = len(golden["feature"])
    few = x[:n], t[:n].astype(jnp.float32), y[:n]
    emb, mid = run(network, variables, *few, at="emb,mid", method="features")
    golden.assert_close("feature", mid)
    np.testing.assert_allclose(emb, golden.truth("emb")[:n], rtol=0, atol=golden.tolerance("emb"))
    t_float = jnp.asarray(golden["t_float"])
    m = len(t_float)
    golden.assert_close("out_float_t", nchw(run(network, variables, x[:m], t_float, y[:m])))
    back = names_latent.flax_to_dit(variables, network)
    for name, value in golden.state_dict().items():
        if name != "pos_embed":
            np.testing.assert_array_equal(back[name], value, err_msg=name)
    assert k["num_classes"] == network.label_dim


def vae_of(k: dict, remat: bool = False) -> vae.AutoencoderKL:
    return vae.AutoencoderKL(
        widths=tuple(k["block_out_channels"]),
        latent_channels=k["latent_channels"],
        num_blocks=k["layers_per_block"],
        groups=k["norm_num_groups"],
        scale=k["scaling_factor"],
        remat=remat,
    )


@family("vae_")
def check_vae(golden: Golden):
    network = vae_of(golden.config["kwargs"])
    variables = names_latent.vae_to_flax(golden.state_dict(), network)
    assert sum(v.size for v in jax.tree.leaves(variables)) == int(golden["param_count"])
    params, x, z = variables["params"], *(jnp.asarray(nhwc(golden[n])) for n in ("x", "z"))

    def gradients(method, value):
        def objective(params, value):
            out = network.apply({"params": params}, value, method=method)
            return jnp.sum(jnp.square(out)), out

        grad = jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
        (_, out), (g_params, g_value) = grad(params, value)
        found = norms(names_latent.flax_to_vae({"params": g_params}, network))
        truth = golden.json(f"grad_norms_{method}")
        golden.assert_norms(f"grad_norms_{method}", {name: found[name] for name in truth})
        return out, nchw(g_value)

    moments, grad_x = gradients("encode", x)
    golden.assert_close("moments", nchw(moments))
    golden.assert_close("grad_x", grad_x, atol=2e-5 * np.abs(golden["grad_x"]).max())
    decoded, grad_z = gradients("decode", z)
    golden.assert_close("decoded", nchw(decoded))
    golden.assert_close("grad_z", grad_z, atol=2e-5 * np.abs(golden["grad_z"]).max())

    mean, std = vae.posterior(moments)
    golden.assert_close("mean", nchw(mean))
    golden.assert_close("std", nchw(std))
    golden.assert_close("kl", vae.kl_divergence(moments))
    drawn = mean + std * nhwc(golden["noise"])
    golden.assert_close("sample", nchw(drawn))
    golden.assert_close("scaled_latent", nchw(network.to_scaled(drawn)))
    again = network.from_scaled(network.to_scaled(drawn))
    golden.assert_close("roundtrip", nchw(run(network, variables, again, method="decode")))
    odd = jnp.asarray(nhwc(golden["dist_moments"]))
    golden.assert_close("dist_std", nchw(vae.posterior(odd)[1]))
    golden.assert_close("dist_kl", vae.kl_divergence(odd))

    # the other two layouts of the same file
    for layout in (ldm_vae(golden) | {"loss.logvar": np.zeros(1)}, old_vae(golden)):
        jax.tree.map(
            np.testing.assert_array_equal, names_latent.vae_to_flax(layout, network), variables
        )
    back = names_latent.flax_to_vae(variables, network)
    for name, value in golden.state_dict().items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


def ldm_vae(golden: Golden) -> dict[str, np.ndarray]:
    """An autoencoder's tensors as LDM's files have them: attention is 1x1 convolutions."""
    state, found = golden.state_dict(), {}
    for name, (theirs, *_) in golden.json("ldm_map").items():
        squared = ".attn_1." in theirs and state[name].ndim == 2
        found[theirs] = state[name][..., None, None] if squared else state[name]
    return found


def old_vae(golden: Golden) -> dict[str, np.ndarray]:
    """The same as older files of diffusers have them."""
    names = golden.json("deprecated_attention_map")
    return {names.get(name, name): value for name, value in golden.state_dict().items()}


def open_clip(golden: Golden) -> dict[str, np.ndarray]:
    """A text encoder's tensors as open_clip's files have them: q, k and v are one."""
    state, parts = golden.state_dict(), {}
    for name, (theirs, *rows) in golden.json("openclip_map").items():
        parts.setdefault(theirs, {})[int(rows[0][0]) if rows else 0] = state[name]
    return {name: np.concatenate([v[i] for i in sorted(v)]) for name, v in parts.items()}


def unet_of(k: dict) -> UNet2DCondition:
    levels, heads = len(k["block_out_channels"]), k["attention_head_dim"]
    return UNet2DCondition(
        img_resolution=k["sample_size"],
        img_channels=k["in_channels"],
        out_channels=k["out_channels"],
        widths=tuple(k["block_out_channels"]),
        attends=tuple(name.startswith("CrossAttn") for name in k["down_block_types"]),
        heads=tuple(heads) if isinstance(heads, list) else (heads,) * levels,
        context_dim=k["cross_attention_dim"],
        num_blocks=k["layers_per_block"],
        groups=k["norm_num_groups"],
        linear_projection=k["use_linear_projection"],
    )


@family("sd_unet_")
def check_sd_unet(golden: Golden):
    network = unet_of(golden.config["kwargs"])
    variables = names_latent.sd_unet_to_flax(golden.state_dict(), network)
    assert sum(v.size for v in jax.tree.leaves(variables)) == int(golden["param_count"])
    x = jnp.asarray(nhwc(golden["sample"]))
    context, t = (jnp.asarray(golden[n]) for n in ("encoder_hidden_states", "timesteps"))

    def objective(params, x, context, t):
        out = network.apply({"params": params}, x, t, context)
        return jnp.sum(jnp.square(out)), out

    grad = jit(jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True))
    at = t.astype(jnp.float32)
    (_, out), (g_params, g_x, g_context) = grad(variables["params"], x, context, at)
    golden.assert_close("out", nchw(out))
    golden.assert_close("grad_sample", nchw(g_x), atol=2e-5 * np.abs(golden["grad_sample"]).max())
    largest = np.abs(golden["grad_context"]).max()
    golden.assert_close("grad_context", g_context, atol=2e-5 * largest)
    state = names_latent.flax_to_sd_unet({"params": g_params}, network)
    golden.assert_norms("grad_norms", norms(state))

    names = ("emb", "feature", "down0", "up0")
    blocks = "emb,mid,down0,up0"
    tapped = run(network, variables, x, at, context, at=blocks, method="features")
    for name, value in zip(names, tapped, strict=True):
        value = value if name == "emb" else nchw(value)
        golden.assert_close(name, value[: len(golden[name])])
    times = jnp.asarray(golden["timesteps_float"], jnp.float32)
    again = grad(variables["params"], x, context, times)[0][1]
    golden.assert_close("out_float_t", nchw(again))

    state = golden.state_dict()
    ldm = {theirs: state[name] for name, theirs in golden.json("ldm_map").items()}
    jax.tree.map(
        np.testing.assert_array_equal, names_latent.sd_unet_to_flax(ldm, network), variables
    )
    back = names_latent.flax_to_sd_unet(variables, network)
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


@family("clip_text_")
def check_clip_text(golden: Golden):
    k = golden.config["kwargs"]
    network = clip_text.CLIPText(
        vocabulary=k["vocab_size"],
        positions=k["max_position_embeddings"],
        width=k["hidden_size"],
        depth=k["num_hidden_layers"],
        heads=k["num_attention_heads"],
        hidden=k["intermediate_size"],
        quick=k["hidden_act"] == "quick_gelu",
    )
    state = golden.state_dict()
    variables = names_latent.clip_to_flax(state, network)
    assert sum(v.size for v in jax.tree.leaves(variables)) == int(golden["param_count"])
    ids = jnp.asarray(golden["input_ids"].astype(np.int32))

    def objective(params):
        out = network.apply({"params": params}, ids)
        return jnp.sum(jnp.square(out)), out

    (_, out), gradients = jit(jax.value_and_grad(objective, has_aux=True))(variables["params"])
    golden.assert_close("last_hidden_state", out)
    golden.assert_close("pooler_output", clip_text.pooled(out, ids, k["eos_token_id"]))
    golden.assert_close("first5_last_hidden_state", run(network, variables, ids[:1, :5]))
    golden.assert_norms(
        "grad_norms", norms(names_latent.flax_to_clip({"params": gradients}, network))
    )

    # SD 2.x: the same file with its last layer left out
    shorter = network.clone(depth=network.depth - 1)
    cut = names_latent.clip_to_flax(state, shorter)
    golden.assert_close("penultimate_final_ln", run(shorter, cut, ids))

    # the layouts of transformers 5 and of open_clip
    newer = {name.removeprefix("text_model."): value for name, value in state.items()}
    newer["embeddings.position_ids"] = np.arange(77)[None]
    theirs = open_clip(golden) | {"text_projection": np.zeros((2, 2)), "logit_scale": np.zeros(())}
    for layout in (newer, theirs):
        jax.tree.map(
            np.testing.assert_array_equal, names_latent.clip_to_flax(layout, network), variables
        )


@family("latent_sp_")
def check_latent_sp(golden: Golden):
    """The self-perceptual loss of a text U-Net, by eps or by v with a step of pure noise."""
    config = golden.config
    v = config["prediction_type"] == "v_prediction"
    table = process.Discrete.make("scaled_linear", 1000, zero_terminal=config["zero_terminal_snr"])

    def variables(which: str):
        state = golden.state_dict(f"{which}_")
        network = unet_of(config["unet_kwargs"])
        return network, names_latent.sd_unet_to_flax(state, network)["params"]

    network, online = variables("online")
    frozen = variables("frozen")[1]

    def denoiser(params):
        apply = functools.partial(network.apply, {"params": params})
        taps = lambda x, t, label, at: apply(x, t, label, at=at, method="features")
        predict = "v" if v else "eps"
        return precondition.adm(apply, table, predict=predict, taps=taps)

    x0, eps = (jnp.asarray(nhwc(golden[n])) for n in ("x0", "eps"))
    context = jnp.asarray(golden["context"])
    sigma, sigma_next = (jnp.asarray(table.sigma[golden[n]], jnp.float32) for n in ("t", "t_prime"))
    features = lambda x, s: denoiser(frozen).features(x, s, context, at="mid")

    def loss(params):
        x = x0 + sigma[:, None, None, None] * eps
        x0_hat, eps_hat = denoiser(params).with_noise(x, sigma, context)
        each = sp.self_perceptual_loss(features, x0, eps, x0_hat, eps_hat, sigma_next)
        return each.mean(), (each, x0_hat, eps_hat)

    (_, (each, x0_hat, eps_hat)), gradients = jit(jax.value_and_grad(loss, has_aux=True))(online)
    golden.assert_close("x0_hat", nchw(x0_hat), atol=2e-5 * np.abs(golden["x0_hat"]).max())
    golden.assert_close("eps_hat", nchw(eps_hat), atol=2e-5 * np.abs(golden["eps_hat"]).max())
    np.testing.assert_allclose(each, golden.truth("loss_per_sample"), rtol=2e-5)
    golden.assert_norms(
        "grad_norms", norms(names_latent.flax_to_sd_unet({"params": gradients}, network))
    )


@family("latent_dsg_style")
def check_latent_dsg(golden: Golden):
    """DSG's steps through the decoder: guidance of the text, guided and plain steps, time travel."""
    k = golden.config
    network = unet_of(k["unet_kwargs"])
    params = names_latent.sd_unet_to_flax(golden.state_dict("unet_"), network)
    coder = vae_of(k["vae_kwargs"], remat=True)
    decoder = names_latent.vae_to_flax(golden.state_dict("vae_"), coder)
    table = process.Discrete.make("scaled_linear", 1000)
    none, context = (jnp.asarray(golden[n]) for n in ("uncond_context", "context"))
    ref = jnp.asarray(nhwc(golden["ref"]))

    def gram(image):
        of = lambda image: jnp.einsum("bhwc,bhwd->bcd", image, image)
        return jnp.linalg.norm((of(image) - of(ref)).reshape(1, -1), axis=1)

    def pool(image):
        gap = image - ref
        b, h, w, c = gap.shape
        return jnp.linalg.norm(
            gap.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4)).reshape(b, -1), axis=1
        )

    @functools.partial(jit, static_argnums=1)
    def step(weight, loss, params, decoder, x, noise, sigma, sigma_next, rate):
        """A guided step, or without a loss a plain one."""
        denoise = precondition.adm(functools.partial(network.apply, params), table)
        denoise = dataclasses.replace(denoise, unconditional=lambda label: none)
        guided = cfg.guide(denoise, weight)
        decoded = lambda x0: coder.apply(decoder, coder.from_scaled(x0), method="decode")
        evaluate = lambda x: guided(x, sigma, context)
        moments = lambda x0, x: steps.ddim_moments(x, x0, sigma, sigma_next, 1.0)
        owner = dsg.guidance(lambda x0_hat: loss(decoded(x0_hat)), rate)
        rule = owner.transition if loss else plain_step
        return rule(evaluate, moments, x, noise, Info(jnp.int32(0), 2, sigma, sigma_next, None))

    levels = np.sqrt(1 / golden["ddim_alpha_f64"] - 1)
    before = np.sqrt(1 / golden["ddim_alpha_prev_f64"] - 1)
    for name, s in golden.json("settings").items():
        i, repeats = s["index"], s["repeats"]
        sigma, sigma_next = (jnp.asarray(v[i : i + 1], jnp.float32) for v in (levels, before))
        loss = {"gram": gram, "pool": pool}[s["loss"]] if 30 <= i < 70 else None
        vp = lambda level: jax.lax.rsqrt(1 + level**2)[:, None, None, None]
        x = jnp.asarray(nhwc(golden["x"])) / vp(sigma)
        for j in range(repeats):
            noise = jnp.asarray(nhwc(golden[f"noise_{name}"][j]))
            given = params, decoder, x, noise, sigma, sigma_next, s["guidance_rate"]
            x_next, x0_hat = step(s["cfg"], loss, *given)
            again = jnp.asarray(nhwc(golden[f"renoise_{name}"][j]))
            x = x_next + jnp.sqrt(sigma**2 - sigma_next**2)[:, None, None, None] * again
        golden.assert_close(f"x_{name}", nchw(x_next * vp(sigma_next)), atol=1e-4)
        golden.assert_close(f"x0_{name}", nchw(x0_hat), atol=1e-4)
