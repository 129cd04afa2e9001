"""EDM's networks under the four preconditionings, and the three losses, against the authors'
numbers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.diffusion import noise, precondition, process
from ogdm_jax.interop.names_edm import edm_network, edm_to_flax, flax_to_edm
from tests.support import golden_support
from tests.support.golden_support import Golden, nchw, nhwc

WRAP = {
    "EDMPrecond": precondition.edm,
    "VPPrecond": precondition.vp,
    "VEPrecond": precondition.ve,
    "iDDPMPrecond": precondition.iddpm,
}


# Most of the time goes into compiling; a lower level halves it and changes no number beyond
# rounding.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def model(path: str, cls: str):
    """(network, variables, wrap) of a file."""
    golden = golden_support.load(path)
    network = edm_network(golden.config["kwargs"], cls)
    return network, edm_to_flax(golden.state_dict(), network), WRAP[cls]


def norms(gradients, network) -> dict[str, float]:
    state = flax_to_edm({"params": gradients}, network)
    return {name: float(np.linalg.norm(value.astype(np.float64))) for name, value in state.items()}


def optional(golden: Golden, name: str):
    value = golden[name] if name in golden else None
    return None if value is None or value.shape[-1] == 0 else jnp.asarray(value)


@golden_support.family("edm_")
@golden_support.family("precond_")
def check_denoiser(golden: Golden):
    cls = golden.config["cls"]
    network, variables, wrap = model(str(golden.path), cls)
    sizes = [value.size for value in jax.tree.leaves(variables["params"])]
    assert sum(sizes) == int(golden["param_count"])
    x, sigma = jnp.asarray(nhwc(golden["x"])), jnp.asarray(golden["sigma"]).reshape(-1)
    label, augment = optional(golden, "class_labels"), optional(golden, "augment_labels")

    def denoiser(params, augment):
        fn = functools.partial(network.apply, {**variables, "params": params}, augment=augment)
        taps = lambda x, c_noise, label, at: fn(x, c_noise, label, at=at, method="features")
        return wrap(fn, taps=taps)

    def objective(params, x, sigma, label, augment):
        denoise = denoiser(params, augment)
        d = denoise(x, sigma, label)
        scale = 1.0 if cls == "EDMPrecond" else 1 / (1 + sigma)[:, None, None, None]
        return jnp.sum(jnp.square(d * scale)), (d, denoise.features(x, sigma, label, at="mid"))

    # one compiled function for everything
    run = jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
    (_, (d, mid)), (g_params, g_x) = run(variables["params"], x, sigma, label, augment)
    golden.assert_close("D_x", nchw(d))
    golden.assert_norms("grad_norms", norms(g_params, network))
    largest = np.max(np.abs(golden["grad_x"]))
    golden.assert_close(
        "grad_x", nchw(g_x), atol=2e-5 * largest if cls != "VPPrecond" else 2e-3 * largest
    )

    # Missing labels are zeros (that None is zeros, the embedding shows).
    n = len(golden["feature"])
    golden.assert_close("feature", nchw(mid[:n]))
    nothing = lambda a: None if a is None else jnp.zeros_like(a)
    few = [None if a is None else a[:n] for a in (x, sigma, label, augment)]
    emb = lambda label, augment: denoiser(variables["params"], augment).features(
        *few[:2], label, at="emb"
    )
    np.testing.assert_allclose(
        emb(*few[2:]), golden.truth("emb")[:n], rtol=0, atol=golden.tolerance("emb")
    )
    np.testing.assert_array_equal(emb(None, None), emb(*map(nothing, few[2:])))
    variants = {
        "D_x_no_class": (x, sigma, nothing(label), augment),
        "D_x_no_augment": (x, sigma, label, nothing(augment)),
        "D_x_scalar_sigma": (
            x,
            jnp.full_like(sigma, golden["sigma"].reshape(-1)[2]),
            label,
            nothing(augment),
        ),
    }
    for name, arguments in variants.items():
        if name in golden:
            stored = golden[name]
            actual = nchw(run(variables["params"], *arguments)[0][1][0])[: len(stored)]
            np.testing.assert_allclose(
                actual, stored, rtol=0, atol=golden.tolerance("D_x"), err_msg=name
            )
    check_levels(golden, wrap)


def check_levels(golden: Golden, wrap):
    """c_noise, the rounding and the tables of a preconditioning."""
    seen = {}
    denoise = wrap(lambda x, c_noise, label=None: seen.update(c_noise=c_noise) or x)
    sigma = jnp.asarray(golden["sigma"]).reshape(-1)
    denoise(jnp.zeros((sigma.size, 1, 1, 3)), sigma)
    golden.assert_close("c_noise", np.ravel(seen["c_noise"]))
    golden.assert_close("round_sigma", np.ravel(denoise.round_sigma(sigma)))
    for name in ("sigma_min", "sigma_max"):
        # The authors' VP sigma_min is a float32 artefact, 9.77e-4 for 1.0005e-3.
        stored = golden[f"net_{name}"] if f"net_{name}" in golden else golden.config[f"net_{name}"]
        np.testing.assert_allclose(getattr(denoise, name), float(stored), rtol=0.03, err_msg=name)
    with jax.enable_x64(True):
        if "sigma_of_t" in golden:
            np.testing.assert_allclose(
                process.VP().sigma(golden["t"]), golden["sigma_of_t"], rtol=1e-6, atol=1e-6
            )
            time = process.VP().time(np.asarray(golden["sigma"], np.float64))
            np.testing.assert_allclose(time, golden["sigma_inv_f64"], rtol=1e-9)
        if "u" in golden:
            # The authors' recursion runs in float32; its last levels are off by up to 5e-4 of
            # themselves.
            np.testing.assert_allclose(process.iddpm_levels(), golden["u"], rtol=3e-5, atol=5e-6)
            np.testing.assert_array_equal(
                precondition.iddpm_index(golden["sigma"]), golden["round_index"]
            )
            probe = golden["probe_sigma"]
            np.testing.assert_array_equal(precondition.iddpm_index(probe), golden["probe_index"])
            np.testing.assert_allclose(
                denoise.round_sigma(probe), golden["probe_round"], rtol=3e-5, atol=5e-6
            )


LAWS = {
    "EDMLoss": (noise.edm, "EDMPrecond"),
    "VPLoss": (noise.vp, "VPPrecond"),
    "VELoss": (noise.ve, "VEPrecond"),
}


@golden_support.family("loss_edm")
@golden_support.family("loss_vp")
@golden_support.family("loss_ve")
def check_loss(golden: Golden):
    make, _ = LAWS[golden.config["loss"]]
    renamed = {"P_mean": "mean", "P_std": "std"}
    law = make(**{renamed.get(k, k): v for k, v in golden.config["loss_kwargs"].items()})
    network, variables, wrap = model(str(golden.path), golden.config["precond"])
    draw = golden["rnd_normal" if law.kind_of_draw == "normal" else "rnd_uniform"].reshape(-1)
    sigma = law.sigma(jnp.asarray(draw))
    # The authors' float32 sigma of the VP law cancels for small t; ours does not.
    np.testing.assert_allclose(sigma, golden.truth("sigma").reshape(-1), rtol=2e-5)
    images, unit = nhwc(golden["images"]), nhwc(golden["noise_unit"])
    x_noisy = images + unit * sigma[:, None, None, None]
    golden.assert_close(
        "x_noisy", nchw(x_noisy), atol=2e-5 * float(np.max(np.abs(golden["x_noisy"])))
    )
    label, augment = optional(golden, "labels"), optional(golden, "augment_labels")

    def objective(params):
        fn = functools.partial(network.apply, {**variables, "params": params}, augment=augment)
        d = wrap(fn)(x_noisy, sigma, label)
        loss = law.weight(sigma)[:, None, None, None] * jnp.square(d - images)
        return jnp.sum(loss) / len(images), loss

    (_, loss), gradients = jit(jax.value_and_grad(objective, has_aux=True))(variables["params"])
    golden.assert_close("loss", nchw(loss))
    golden.assert_norms("grad_norms", norms(gradients, network))
