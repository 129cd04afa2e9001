"""guided-diffusion's networks and its time embedding, against the authors' numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.interop import names_adm
from ogdm_jax.networks import layers
from ogdm_jax.networks.adm_openai import ADMEncoder, ADMUNet
from tests.support import golden_support
from tests.support.golden_support import Golden, nchw, nhwc

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# The multipliers that guided-diffusion, OGDM_adm and DG choose by image size where none are given.
MULTIPLIERS = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}
ENCODER_MULTIPLIERS = MULTIPLIERS | {32: (1, 2, 4), 16: (1, 2), 8: (1,)}


def common(k: dict) -> dict:
    return {
        "img_resolution": k["image_size"],
        "img_channels": k["in_channels"],
        "out_channels": k["out_channels"],
        "model_channels": k["model_channels"],
        "channel_mult": tuple(k["channel_mult"]),
        "num_blocks": k["num_res_blocks"],
        "attn_resolutions": tuple(
            k["image_size"] // factor for factor in k["attention_resolutions"]
        ),
        "num_heads": k["num_heads"],
        "head_channels": max(k["num_head_channels"], 0),
        "scale_shift": k["use_scale_shift_norm"],
        "resblock_updown": k["resblock_updown"],
        "dropout": k.get("dropout", 0.0),
    }


def unet(k: dict) -> ADMUNet:
    """ADMUNet of UNetModel's keyword arguments."""
    return ADMUNet(label_dim=k.get("num_classes") or 0, **common(k))


def encoder(k: dict) -> ADMEncoder:
    """ADMEncoder of EncoderUNetModel's keyword arguments."""
    return ADMEncoder(pool=k["pool"], **common(k))


def order(k: dict) -> str:
    return "new" if k.get("use_new_attention_order") else "legacy"


def factors(resolutions, size: int) -> list[int]:
    """Downsampling factors of a flag like "32,16,8"; a side above the image's gives factor 0, which
    nothing has.
    """
    return [f for f in (size // int(r) for r in str(resolutions).split(",")) if f]


def published(cls: str, flags: dict) -> tuple[ADMUNet | ADMEncoder, str]:
    """(network, qkv order) of the flags of create_model, sr_create_model, create_classifier (DG's
    included).
    """
    if cls == "create_classifier":
        k = {name.removeprefix("classifier_"): value for name, value in flags.items()}
        size, channels = k["image_size"], k.get("in_channels", 3)
        latent = size == 32 and channels == 4
        network = ADMEncoder(
            img_resolution=size,
            img_channels=channels,
            out_channels=k.get("out_channels", 1000),
            label_dim=1000 if k.get("condition") else 0,
            model_channels=k["width"],
            channel_mult=(1, 2, 3) if latent else ENCODER_MULTIPLIERS[size],
            num_blocks=k["depth"],
            attn_resolutions=tuple(size // f for f in factors(k["attention_resolutions"], size)),
            head_channels=64,
            scale_shift=k["use_scale_shift_norm"],
            resblock_updown=k["resblock_updown"],
            pool=k["pool"],
        )
        return network, "legacy"
    size = flags.get("image_size") or flags["large_size"]
    multipliers = {512: (1, 1, 2, 2, 4, 4)} if cls == "sr_create_model" else {}
    network = unet(
        {
            "image_size": size,
            "in_channels": 6 if cls == "sr_create_model" else 3,
            "out_channels": 6 if flags["learn_sigma"] else 3,
            "model_channels": flags["num_channels"],
            "channel_mult": (MULTIPLIERS | multipliers)[size],
            "num_res_blocks": flags["num_res_blocks"],
            "attention_resolutions": factors(flags["attention_resolutions"], size),
            "num_classes": 1000 if flags["class_cond"] else None,
            **{name: flags[name] for name in ("num_heads", "num_head_channels", "dropout")},
            **{name: flags[name] for name in ("use_scale_shift_norm", "resblock_updown")},
        }
    )
    return network, order(flags)


def norms(state: dict) -> dict[str, float]:
    return {name: float(np.linalg.norm(value.astype(np.float64))) for name, value in state.items()}


@golden_support.family("gd_unet_")
def check_unet(golden: Golden):
    k = golden.config["kwargs"]
    network = unet(k)
    params = names_adm.adm_to_flax(golden.state_dict(), network, order(k))["params"]
    assert sum(value.size for value in jax.tree.leaves(params)) == int(golden["param_count"])
    x, t = jnp.asarray(nhwc(golden["x"])), jnp.asarray(golden["timesteps"], jnp.int32)
    y = jnp.asarray(golden["y"], jnp.int32) if "y" in golden else None

    def objective(params, x, t):
        out = network.apply({"params": params}, x, t, y)
        return jnp.sum(jnp.square(out)), out

    value = jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
    (_, out), (g_params, g_x) = value(params, x, t.astype(jnp.float32))
    golden.assert_close("out", nchw(out))
    golden.assert_norms(
        "grad_norms", norms(names_adm.flax_to_adm({"params": g_params}, network, order(k)))
    )
    golden.assert_close("grad_x", nchw(g_x), atol=2e-5 * float(np.max(np.abs(golden["grad_x"]))))
    fractions = jnp.asarray([12.5, 333.25, *t[2:]], jnp.float32)
    n = len(golden["out_float_t"])
    actual = nchw(value(params, x, fractions)[0][1])[:n]
    np.testing.assert_allclose(
        actual, golden["out_float_t"], rtol=0, atol=2 * golden.tolerance("out")
    )

    @jit
    def taps(x, t):
        return network.apply({"params": params}, x, t, y, at="emb,mid", method="features")

    emb, feature = taps(x, t)
    # Stored in front of the silu that every block applies.
    np.testing.assert_allclose(
        emb, jax.nn.silu(golden.truth("emb")), rtol=0, atol=golden.tolerance("emb")
    )
    golden.assert_close("feature", nchw(feature)[: len(golden["feature"])])


@golden_support.family("gd_classifier_")
def check_classifier(golden: Golden):
    k = golden.config["kwargs"]
    network = encoder(k)
    params = names_adm.adm_to_flax(golden.state_dict(), network, order(k))["params"]
    assert sum(value.size for value in jax.tree.leaves(params)) == int(golden["param_count"])
    x, t, y = jnp.asarray(nhwc(golden["x"])), jnp.asarray(golden["timesteps"]), golden["y"]

    def log_prob(params, x):
        logits = network.apply({"params": params}, x, t)
        return jnp.sum(
            jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(y)[:, None], axis=1)
        ), logits

    (total, logits), (g_params, g_x) = jit(jax.value_and_grad(log_prob, (0, 1), has_aux=True))(
        params, x
    )
    golden.assert_close("logits", logits)
    golden.assert_close("grad_log_prob", nchw(g_x))
    np.testing.assert_allclose(-total / len(y), golden["cross_entropy"], rtol=1e-5)
    state = names_adm.flax_to_adm({"params": g_params}, network, order(k))
    golden.assert_norms("grad_norms", {name: norm / len(y) for name, norm in norms(state).items()})
    feature = jit(functools.partial(network.apply, method="features"))({"params": params}, x, t)
    golden.assert_close("feature", nchw(feature)[: len(golden["feature"])])


@golden_support.family("gd_timestep_embedding")
def check_embedding(golden: Golden):
    actual = layers.positional_embedding(jnp.asarray(golden["t"]), golden.config["dim"])
    np.testing.assert_allclose(actual, golden["emb"], rtol=0, atol=1e-4)
    with jax.enable_x64(True):  # the stored numbers are float32 cosines of angles of up to 1000
        exact = layers.positional_embedding(
            jnp.asarray(golden["t"].astype(np.float64)), golden.config["dim"]
        )
        np.testing.assert_allclose(exact, golden["emb"], rtol=0, atol=1e-4)
