"""Latent models' networks against the authors' numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.interop import names_latent
from ogdm_jax.networks.dit import DiT, position_table
from tests.support.golden_support import Golden, family, nchw, nhwc

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
    features = functools.partial(network.apply, variables, method="features")
    n = len(golden["feature"])
    emb, mid = features(x[:n], t[:n].astype(jnp.float32), y[:n], at="emb,mid")
    golden.assert_close("feature", mid)
    np.testing.assert_allclose(emb, golden.truth("emb")[:n], rtol=0, atol=golden.tolerance("emb"))
    t_float = jnp.asarray(golden["t_float"])
    m = len(t_float)
    golden.assert_close("out_float_t", nchw(network.apply(variables, x[:m], t_float, y[:m])))
    back = names_latent.flax_to_dit(variables, network)
    for name, value in golden.state_dict().items():
        if name != "pos_embed":
            np.testing.assert_array_equal(back[name], value, err_msg=name)
    assert k["num_classes"] == network.label_dim
