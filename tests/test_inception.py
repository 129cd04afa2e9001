"""InceptionV3's names, sizes and resizing; its numbers are checked by families/inception.py on the
golden file.
"""

import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax.interop.names_inception import flax_to_inception, inception_entries, inception_to_flax
from ogdm_jax.networks.inception import InceptionV3, _pool, prepare, resize

FULLSIZE = Path(__file__).parent / "golden" / "fullsize" / "inception-fid-2015-12-05.json.gz"


@pytest.fixture(scope="module")
def network():
    return InceptionV3()


@pytest.fixture(scope="module")
def state():
    """All 566 published names and shapes; every tensor is filled with a number of its own."""
    with gzip.open(FULLSIZE) as file:
        entries = json.load(file)["entries"]
    return {name: np.full(shape, i, np.float32) for i, (name, shape, _) in enumerate(entries)}


def test_published_names_convert_with_nothing_left_over_and_come_back(network, state):
    variables = inception_to_flax(state, network)
    assert sum(a.size for a in jax.tree.leaves(variables["params"])) == 23_850_960
    back = flax_to_inception(variables, network)
    counted = {name for name in state if name.endswith("num_batches_tracked")}
    assert set(back) == set(state) - counted
    for name, value in back.items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)


def test_pytorch_fids_wrapper_is_the_same_network_without_a_head(network, state):
    wrapped = {}
    blocks = {"Conv2d_1a_3x3": "0.0", "Conv2d_2a_3x3": "0.1", "Conv2d_2b_3x3": "0.2"}
    blocks |= {"Conv2d_3b_1x1": "1.0", "Conv2d_4a_3x3": "1.1"}
    blocks |= {
        f"Mixed_{name}": f"2.{i}"
        for i, name in enumerate(("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e"))
    }
    blocks |= {f"Mixed_{name}": f"3.{i}" for i, name in enumerate(("7a", "7b", "7c"))}
    for name, value in state.items():
        module, _, rest = name.partition(".")
        if module != "fc":
            wrapped[f"blocks.{blocks[module]}.{rest}"] = value
    raw, ours = inception_to_flax(state, network), inception_to_flax(wrapped, network)
    assert not np.any(ours["params"].pop("fc")["kernel"]) and not np.any(
        ours["params"].pop("fc_bias")
    )
    jax.tree.map(
        np.testing.assert_array_equal, ours["params"], {k: raw["params"][k] for k in ours["params"]}
    )
    jax.tree.map(np.testing.assert_array_equal, ours["buffers"], raw["buffers"])


@pytest.mark.parametrize(
    "change,message",
    [
        (
            lambda s: s.pop("Mixed_6c.branch7x7_2.conv.weight"),
            "Mixed_6c.branch7x7_2.conv.weight is missing",
        ),
        (lambda s: s.update({"Mixed_8a.x": np.zeros(1)}), "Mixed_8a.x has no place"),
        (lambda s: s.update({"fc.bias": np.zeros(1000)}), r"fc.bias has shape \(1000,\)"),
    ],
)
def test_other_networks_are_refused(network, state, change, message):
    state = dict(state)
    change(state)
    with pytest.raises(ValueError, match=message):
        inception_to_flax(state, network)


def test_every_tensor_has_a_path_of_its_own(network):
    entries = inception_entries(network)
    assert (
        len({e.path for e in entries}) == len({e.name for e in entries}) == len(entries) == 566 - 94
    )


def test_resize_routes_on_ramps_and_against_jax():
    ramp = jnp.broadcast_to(jnp.arange(10.0)[None, :, None, None], (1, 10, 10, 1))
    size = 25
    tf1 = np.minimum(np.arange(size) * 10 / size, 9)  # output i samples input i h / size
    np.testing.assert_allclose(resize(ramp, size)[0, :, 3, 0], tf1, rtol=1e-6)
    half = np.clip((np.arange(size) + 0.5) * 10 / size - 0.5, 0, 9)
    np.testing.assert_allclose(
        resize(ramp, size, half_pixel=True)[0, :, 3, 0], half, rtol=1e-6, atol=1e-6
    )
    x = jax.random.uniform(jax.random.key(0), (2, 13, 8, 3))
    for size in (8, 29):
        reference = jax.image.resize(x, (2, size, size, 3), "bilinear", antialias=False)
        np.testing.assert_allclose(resize(x, size, half_pixel=True), reference, atol=2e-6)
    np.testing.assert_array_equal(resize(x[:, :8], 8), x[:, :8])


def test_prepare_repeats_grey_and_scales_either_way():
    grey = jnp.asarray(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1))
    for route, low, high in (("tf", -1, 127 / 128), ("pytorch_fid", -1, 1)):
        x = prepare(grey, route)
        assert x.shape == (1, 299, 299, 3)
        np.testing.assert_array_equal(x[..., 0], x[..., 2])
        assert float(x.min()) == low and float(x.max()) == pytest.approx(high, abs=1e-6)
    with pytest.raises(ValueError, match="expected 'tf' or 'pytorch_fid'"):
        prepare(grey, "clean")
    with pytest.raises(ValueError, match="1 or 3"):
        prepare(grey[..., 0])


def test_average_pool_leaves_the_padding_out():
    np.testing.assert_allclose(_pool(jnp.ones((1, 5, 5, 2)), "avg"), 1)


def test_small_or_grey_inputs_are_refused(network):
    for shape in ((1, 64, 64, 3), (1, 299, 299, 1)):
        with pytest.raises(ValueError, match="at least 75"):
            jax.eval_shape(
                network.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32)
            )
