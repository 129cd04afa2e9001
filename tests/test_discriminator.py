"""The discriminator against its published sizes and names, and the grouping of its minibatch
statistics.
"""

import functools
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax.interop.names_discriminator import (
    discriminator_modules,
    discriminator_settings,
    discriminator_to_flax,
    flax_to_discriminator,
)
from ogdm_jax.networks.discriminator import Mapping, StyleGAN2Discriminator, minibatch_deviation
from tests.support import golden_support
from tests.support.discriminators import drawn, shapes
from tests.support.golden_support import FOLDER

pytestmark = pytest.mark.fast

SMALL = {"img_resolution": 8, "img_channels": 3, "channel_base": 64, "channel_max": 8}
FULL = sorted((FOLDER / "fullsize").glob("ogdm-*-discriminator-*.json.gz"))


@pytest.mark.parametrize(
    "settings,count",
    [
        ({"img_resolution": 32}, 23_872_000),
        ({"img_resolution": 32, "label_dim": 10}, 23_877_120),
        ({"img_resolution": 64}, 28_853_760),
    ],
)
def test_published_parameter_counts(settings, count):
    tree = shapes(StyleGAN2Discriminator(**settings, img_channels=3))
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == count


@pytest.mark.parametrize("path", FULL, ids=lambda p: p.name.removesuffix(".json.gz"))
def test_full_size_names_and_shapes(path):
    record = json.loads(gzip.decompress(path.read_bytes()))
    settings = dict(record["constructor"]["kwargs"])
    settings["label_dim"] = settings.pop("label_dim", settings.pop("c_dim", 0))
    network = StyleGAN2Discriminator(**settings)
    truth = [(name, tuple(shape)) for name, shape, kind in record["entries"] if kind == "param"]
    assert sum(np.prod(shape) for _, shape in truth) == record["param_count"]
    # Zero-stride stand-ins: 29 million numbers in 4 bytes each.
    blank = {name: np.broadcast_to(np.float32(0), shape) for name, shape in truth}
    blank |= {
        n: np.broadcast_to(np.float32(0), s) for n, s, kind in record["entries"] if kind == "buffer"
    }
    inferred = discriminator_settings(blank)
    assert {k: inferred[k] for k in settings} == settings
    assert all(
        network.channels(s) == StyleGAN2Discriminator(**inferred).channels(s)
        for s in (4, 8, 16, 32, 64)
    )
    expected = jax.tree.map(lambda leaf: leaf.shape, shapes(network))
    assert jax.tree.map(lambda leaf: leaf.shape, discriminator_to_flax(blank, network)) == expected
    assert [n.rsplit(".", 1)[0] for n, _ in truth if n.endswith("weight")] == discriminator_modules(
        network
    )


def test_names_there_and_back():
    network = StyleGAN2Discriminator(**SMALL, label_dim=3)
    variables, *_ = drawn(network)
    state = flax_to_discriminator(variables, network)
    again = discriminator_to_flax(state, network)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, variables))
    with pytest.raises(ValueError, match="b4.fc.weight is missing"):
        discriminator_to_flax({k: v for k, v in state.items() if k != "b4.fc.weight"}, network)
    with pytest.raises(ValueError, match="b16.skip.weight has no place"):
        discriminator_to_flax(state | {"b16.skip.weight": np.zeros((8, 8, 1, 1))}, network)


@pytest.fixture(scope="module")
def born():
    """(network, fresh variables): large enough for statistics of its weights."""
    network = StyleGAN2Discriminator(
        img_resolution=8, img_channels=3, channel_base=256, channel_max=32
    )
    return network, jax.jit(network.init)(
        jax.random.key(1), jnp.zeros((1, 8, 8, 3)), jnp.ones((1, 2))
    )


def test_initial_statistics_are_those_of_equalised_learning_rate(born):
    """Stored weights N(0, 1), the mapping's N(0, 100^2), biases 0."""
    for path, leaf in jax.tree.leaves_with_path(born[1]["params"]):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name.endswith("bias"):
            assert not np.any(leaf), name
        elif leaf.size > 1000:
            scale = 100 if name.startswith("mapping.fc") else 1
            np.testing.assert_allclose(
                np.std(leaf) / scale, 1, atol=5 / np.sqrt(2 * leaf.size), err_msg=name
            )


def test_at_birth_only_the_ratio_of_raw_levels_is_seen(born):
    """No bias, then second-moment normalisation: (1000 t, 1000 s) maps almost where (t, s) does
    (spec 1.5).
    """
    network, variables = born
    mapping = {"params": variables["params"]["mapping"]}
    run = jax.jit(functools.partial(Mapping(network.channels(4)).apply, mapping))
    near, far, other = (run(jnp.array([c])) for c in ([1.0, 0.5], [1000.0, 500.0], [1.0, 0.1]))
    np.testing.assert_allclose(near, far, atol=3e-4 * np.abs(near).max())
    assert np.abs(near - other).max() > 1e-2


@pytest.mark.default
def test_a_normalised_condition_is_the_mapped_one_at_mean_square_1(born):
    """Same weights, same direction, mean square 1: whatever size a fresh mapping has by chance."""
    network, variables = born
    mapping, told = {"params": variables["params"]["mapping"]}, np.array([[1.0, 0.5], [0.1, 0.02]])
    told = told.astype(np.float32)
    plain = Mapping(network.channels(4)).apply(mapping, told)
    unit = Mapping(network.channels(4), normalised=True).apply(mapping, told)
    size = np.sqrt(np.mean(np.square(plain), axis=1, keepdims=True))
    np.testing.assert_allclose(unit, plain / size, rtol=1e-5)
    # the logit is linear in the condition: each is that of the plain network over its own size
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
    logits = [network.clone(normalised=on).apply(variables, x, told) for on in (False, True)]
    np.testing.assert_allclose(logits[1], logits[0] / size[:, 0], rtol=1e-4)


@pytest.mark.parametrize("width,least,most", [(16, 10.0, 1000.0), (512, 1.0, 4.0)])
@pytest.mark.default
def test_the_size_of_a_narrow_mapping_is_chance(width, least, most):
    """Largest over smallest mean square of fresh ones: that is what `normalised` takes away."""
    told = np.array([[-0.2, -0.5]], np.float32)
    fresh = jax.jit(lambda key: Mapping(width).init_with_output(key, told)[0])
    sizes = [float(np.mean(np.square(fresh(jax.random.key(seed))))) for seed in range(10)]
    assert least < max(sizes) / min(sizes) < most


@pytest.mark.parametrize("side,channels", [(8, 1), (16, 3), (64, 2)])
def test_sides_and_grey_images(side, channels):
    network = StyleGAN2Discriminator(
        img_resolution=side, img_channels=channels, channel_base=64, channel_max=8
    )
    x, cond = (
        jax.ShapeDtypeStruct((4, side, side, channels), jnp.float32),
        jax.ShapeDtypeStruct((4, 2), jnp.float32),
    )
    assert jax.eval_shape(network.apply, shapes(network), x, cond).shape == (4,)


@pytest.mark.parametrize("side", [4, 12, 28])
def test_other_sides_are_refused_in_one_sentence(side):
    network = StyleGAN2Discriminator(img_resolution=side, img_channels=3)
    with pytest.raises(
        ValueError, match=f"img_resolution: {side} given; expected a power of two of at least 8"
    ):
        shapes(network)


def test_wrong_shapes_are_refused():
    network = StyleGAN2Discriminator(**SMALL)
    variables, x, cond = drawn(network)
    with pytest.raises(ValueError, match=r"cond_t: shape \(4, 3\) given"):
        network.apply(variables, x, np.ones((4, 3), np.float32))
    with pytest.raises(ValueError, match=r"x: shape \(4, 8, 4, 3\) given"):
        network.apply(variables, x[:, :, :4], cond)


def test_minibatch_deviation_is_numpys_standard_deviation():
    x = np.random.default_rng(2).standard_normal((8, 4, 4, 3)).astype(np.float32)
    truth = np.zeros((8, 4, 4, 1))
    for i in range(2):  # group of example i: i, i + 2, i + 4, i + 6
        truth[i::2] = np.sqrt(x[i::2].astype(np.float64).var(axis=0) + 1e-8).mean()
    np.testing.assert_allclose(minibatch_deviation(x), truth, rtol=1e-5)


def test_permuting_a_group_leaves_logits_to_their_examples():
    network = StyleGAN2Discriminator(**SMALL)
    variables, x, cond = drawn(network, batch=8)
    run = jax.jit(network.apply)
    inside = np.array([4, 1, 2, 7, 0, 5, 6, 3])  # exchanges 0 and 4 (group 0), 3 and 7 (group 1)
    across = np.array([1, 0, 2, 3, 4, 5, 6, 7])
    plain = run(variables, x, cond)
    np.testing.assert_allclose(
        run(variables, x[inside], cond[inside]), plain[inside], rtol=1e-4, atol=1e-5
    )
    assert np.abs(run(variables, x[across], cond[across]) - plain[across]).max() > 1e-3


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.default
def test_chunked_statistics_do_not_know_the_number_of_devices(devices):
    network = StyleGAN2Discriminator(**SMALL, mbstd_batch=4)
    variables, x, cond = drawn(network, batch=16)
    run = jax.jit(network.apply)
    parts = [run(variables, a, c) for a, c in zip(np.split(x, devices), np.split(cond, devices))]
    np.testing.assert_allclose(np.concatenate(parts), run(variables, x, cond), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size,group,batch", [(6, 4, None), (10, 4, 4), (12, 4, 6)])
def test_batches_that_cannot_be_grouped_are_refused(size, group, batch):
    with pytest.raises(
        ValueError, match=f"discriminator batch: {size} examples given; expected a multiple of"
    ):
        jax.eval_shape(
            lambda x: minibatch_deviation(x, group, batch),
            jax.ShapeDtypeStruct((size, 4, 4, 2), jnp.float32),
        )


def test_a_batch_smaller_than_a_group_is_one_group():
    assert minibatch_deviation(jnp.ones((3, 4, 4, 2))).shape == (3, 4, 4, 1)
    np.testing.assert_allclose(
        minibatch_deviation(jnp.ones((1, 4, 4, 2))), 1e-4, rtol=1e-5
    )  # sqrt(0 + 1e-8)


@pytest.mark.default
def test_condition_and_class_change_logits():
    network = StyleGAN2Discriminator(**SMALL, label_dim=3)
    variables, x, cond = drawn(network)
    run = jax.jit(network.apply)
    labels = [np.full((4,), i, np.int32) for i in (-1, 0, 1)]
    none, zero, one = (run(variables, x, cond, label) for label in labels)
    assert np.abs(zero - one).min() > 1e-4 and np.abs(zero - none).min() > 1e-4
    np.testing.assert_array_equal(run(variables, x, cond), none)
    np.testing.assert_array_equal(
        run(variables, x, cond, np.eye(3, dtype=np.float32)[[1] * 4]), one
    )
    assert (
        np.abs(run(variables, x, cond * np.array([[1.0, 2.0]], np.float32), labels[1]) - zero).min()
        > 1e-4
    )


def test_golden_state_infers_its_settings():
    g = golden_support.load(str(FOLDER / "ogdm_disc_r8_labels.npz"))
    inferred = discriminator_settings(g.state_dict())
    assert {k: inferred[k] for k in ("img_resolution", "img_channels", "label_dim")} == {
        k: g.config["kwargs"][k] for k in ("img_resolution", "img_channels", "label_dim")
    }
    truth = jax.tree.map(
        lambda leaf: leaf.shape, shapes(StyleGAN2Discriminator(**g.config["kwargs"]))
    )
    assert (
        jax.tree.map(lambda leaf: leaf.shape, shapes(StyleGAN2Discriminator(**inferred))) == truth
    )
