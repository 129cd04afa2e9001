"""OpenAI's ADM networks: the tensors of every published checkpoint, name round trips, heads, pools,
errors.
"""

import functools
import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax.interop import names_adm
from ogdm_jax.interop.names_shared import EDM_ORDER, LEGACY_ORDER, NEW_ORDER, _reorder
from ogdm_jax.networks import ADMEncoder, ADMUNet
from tests.support.families.adm import published

FULLSIZE = Path(__file__).parent / "golden" / "fullsize"
CLASSES = ("create_model", "sr_create_model", "create_classifier")
LISTS = {
    p.name.split(".")[0]: json.loads(gzip.open(p).read())
    for p in sorted(FULLSIZE.glob("*.json.gz"))
}
LISTS = {name: listed for name, listed in LISTS.items() if listed["constructor"]["cls"] in CLASSES}
SMALL = dict(
    img_resolution=8, model_channels=32, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,)
)


def randomised(network, seed: int = 0):
    shapes = jax.eval_shape(
        network.init, jax.random.key(0), jnp.zeros((1, 8, 8, network.img_channels)), jnp.zeros(1)
    )
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    values = [
        rng.normal(size=s.shape).astype(np.float32) * (s.shape[-2] ** -0.5 if s.ndim > 1 else 0.3)
        for s in leaves
    ]
    return jax.tree.unflatten(tree, values)


# wider and deeper, of the same layers
@pytest.mark.slow_cases(
    "guided-diffusion-[125]*",
    "guided-diffusion-lsun*",
    "guided-diffusion-64x64_classifier",
    "dg-extractor-[26]*",
    "dg-head-uncond",
    "dsg-imagenet*",
    "ogdm*-64",
)
@pytest.mark.parametrize("name", LISTS)
def test_tensors_of_published_checkpoints(name):
    """Name and shape of every tensor and the exact number of parameters; nothing is allocated."""
    listed = LISTS[name]
    network, order = published(listed["constructor"]["cls"], listed["constructor"]["kwargs"])
    entries = names_adm.adm_entries(network, order)
    assert {e.name: e.torch_shape for e in entries} == {
        name: tuple(shape) for name, shape, _ in listed["entries"]
    }
    assert sum(int(np.prod(e.shape)) for e in entries) == listed["param_count"]


@pytest.mark.parametrize("order", ["legacy", "new"])
@pytest.mark.parametrize("updown", [True, False])
def test_names_round_trip(order, updown):
    network = ADMUNet(label_dim=3, num_heads=2, resblock_updown=updown, **SMALL)
    variables = randomised(network)
    state = names_adm.flax_to_adm(variables, network, order)
    assert state["output_blocks.1.1.qkv.weight"].shape == (192, 64, 1)
    assert ("output_blocks.1.2.conv.weight" in state) is not updown
    jax.tree.map(
        np.testing.assert_array_equal, names_adm.adm_to_flax(state, network, order), dict(variables)
    )
    with pytest.raises(ValueError, match="label_emb.weight is missing"):
        names_adm.adm_to_flax(
            {k: v for k, v in state.items() if k != "label_emb.weight"}, network, order
        )
    with pytest.raises(ValueError, match="qkv_order: 'edm'"):
        names_adm.adm_to_flax(state, network, "edm")


def test_orders_of_attention_channels():
    """Where head h, channel c of q, k, v stands in each order, by its definition, for 2 heads of 3
    channels.
    """
    new = np.arange(18)  # x * 6 + h * 3 + c
    legacy, edm = _reorder(new, 2, NEW_ORDER, LEGACY_ORDER), _reorder(new, 2, NEW_ORDER, EDM_ORDER)
    for x in range(3):
        for h in range(2):
            for c in range(3):
                assert (
                    legacy[h * 9 + x * 3 + c] == edm[(h * 3 + c) * 3 + x] == new[x * 6 + h * 3 + c]
                )


@pytest.mark.slow_cases("spatial*")
@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
def test_pools(pool):
    """Logits of every pool have their shape and names, and belong to their own example."""
    network = ADMEncoder(out_channels=5, pool=pool, head_channels=16, **SMALL)
    variables = randomised(network)
    state = names_adm.flax_to_adm(variables, network)
    jax.tree.map(
        np.testing.assert_array_equal,
        names_adm.adm_to_flax(state, network),
        dict(variables),
    )
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))
    call = jax.jit(network.apply, compiler_options={"xla_backend_optimization_level": 0})
    logits = call(variables, x, jnp.asarray([0.0, 10.0, 999.0]))
    assert logits.shape == (3, 5) and np.all(np.isfinite(logits)) and float(jnp.std(logits)) > 1e-3
    np.testing.assert_allclose(
        call(variables, x[::-1], jnp.asarray([999.0, 10.0, 0.0]))[::-1], logits, atol=1e-5
    )


def test_time_scale_and_labels():
    """DG feeds times in [0, 1]; a conditional head reads labels; -1 is no class."""
    network = ADMEncoder(out_channels=1, label_dim=4, head_channels=16, time_scale=999.0, **SMALL)
    variables = randomised(network)
    plain = ADMEncoder(out_channels=1, label_dim=4, head_channels=16, **SMALL)
    x, t = jnp.zeros((2, 8, 8, 3)), jnp.asarray([0.25, 0.5])
    emb = functools.partial(network.apply, variables, x, at="emb", method="features")
    steps = plain.apply(variables, x, 999 * t, at="emb", method="features")
    np.testing.assert_allclose(emb(t), steps, atol=1e-5)
    np.testing.assert_array_equal(emb(t, jnp.full(2, -1)), emb(t))
    assert np.any(emb(t, jnp.zeros(2, jnp.int32)) != emb(t))


def test_errors():
    with pytest.raises(ValueError, match="pool: 'max'"):
        ADMEncoder(8, out_channels=1, pool="max")
    with pytest.raises(ValueError, match="out_channels: None"):
        ADMEncoder(8)
    key, x, c = jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.zeros(1)
    with pytest.raises(ValueError, match="augmentation labels"):
        jax.eval_shape(ADMUNet(**SMALL).init, key, x, c, None, jnp.zeros((1, 9)))
    with pytest.raises(ValueError, match="do not divide into heads"):
        jax.eval_shape(ADMUNet(num_heads=3, **SMALL).init, key, x, c)
