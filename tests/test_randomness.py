"""Quick keys: uniform, uncorrelated, and each example's draws its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ogdm_jax import randomness
from ogdm_jax.networks import layers
from ogdm_jax.sampling import generate

pytestmark = pytest.mark.fast
SHAPE = (16, 16, 32)


def keys(n: int = 64):
    return randomness.example_keys(jax.random.key(3), "dropout", jnp.arange(n))


@pytest.fixture(scope="module")
def bits() -> np.ndarray:
    """uint32 [site, example, *SHAPE]."""
    draw = lambda k: jax.random.bits(k, SHAPE, "uint32")
    sites = [
        randomness.fold_in_each(randomness.quick(keys()), f"enc_16x16_block{i}") for i in range(4)
    ]
    return np.stack([np.asarray(jax.vmap(draw)(site)) for site in sites])


def test_every_bit_is_fair(bits):
    """Each of the 32 bits is 1 half of the time, to 4.5 standard errors (32 tries)."""
    shares = [((bits >> b) & 1).mean() for b in range(32)]
    assert np.abs(np.asarray(shares) - 0.5).max() < 4.5 * 0.5 / np.sqrt(bits.size)


@pytest.mark.parametrize("shift", [0, 8, 24])
def test_bytes_are_uniform(bits, shift):
    counts = np.bincount(((bits >> shift) & 255).ravel(), minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-4


def test_pairs_of_neighbours_are_uniform(bits):
    """The top 4 bits of numbers that follow one another, in all 256 combinations; the lowest 4
    too.
    """
    for shift in (28, 0):
        nibble = ((bits >> shift) & 15).reshape(-1)
        counts = np.bincount(nibble[:-1] * 16 + nibble[1:], minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-4


def test_places_examples_and_sites_are_uncorrelated(bits):
    """Correlations of uniform numbers along every axis and of examples and sites with one another:
    noise alone.
    """
    u = (bits / 2.0**32 - 0.5) * np.sqrt(12)
    rows = u.reshape(u.shape[0] * u.shape[1], -1)
    between = rows @ rows.T / rows.shape[1]
    off = between[~np.eye(len(rows), dtype=bool)]
    assert (
        np.abs(off).max() < 6 / np.sqrt(rows.shape[1])
        and abs(off.std() * np.sqrt(rows.shape[1]) - 1) < 0.05
    )
    for axis in (2, 3, 4):
        a, b = (np.take(u, range(i, u.shape[axis] - 1 + i), axis) for i in (0, 1))
        assert abs((a * b).mean()) < 4.5 / np.sqrt(a.size), axis
    # Whether masks of two examples agree is as often as chance has it, in the top bits as well.
    kept = (bits >= 0.13 * 2**32).reshape(u.shape[0] * u.shape[1], -1)
    both = (kept[:-1] & kept[1:]).mean(1)
    assert np.abs(both - 0.87**2).max() < 6 * np.sqrt(0.87**2 * (1 - 0.87**2) / rows.shape[1])


def test_keys_that_differ_in_one_bit_share_nothing():
    words = np.asarray(jax.random.key_data(keys(1)))[0]
    near = np.stack(
        [words]
        + [words ^ np.uint32([[1 << b, 0], [0, 1 << b]][w]) for b in range(32) for w in (0, 1)]
    )
    quick = randomness.quick(jax.random.wrap_key_data(near))
    drawn = np.asarray(jax.vmap(lambda k: jax.random.bits(k, (2000,), "uint32"))(quick))
    flipped = np.unpackbits((drawn[1:] ^ drawn[:1]).view(np.uint8), axis=1).mean(1)
    assert np.abs(flipped - 0.5).max() < 5 * 0.5 / np.sqrt(64_000)
    folded = jax.random.key_data(
        jax.vmap(lambda i: jax.random.fold_in(quick[0], i))(jnp.arange(10_000))
    )
    assert len(np.unique(np.asarray(folded), axis=0)) == 10_000


def test_normal_numbers_have_normal_moments():
    z = np.asarray(randomness.normal(randomness.quick(keys()), (4096,))).ravel()
    assert stats.kstest(z[:100_000], "norm").pvalue > 1e-4
    assert abs(z.mean()) < 4.5 / np.sqrt(z.size) and abs(z.var() - 1) < 4.5 * np.sqrt(2 / z.size)


def test_a_draw_depends_on_its_own_key_alone():
    """The same number in a batch of 1 and of 8, under jit on a mesh of 8 devices, and whatever the
    neighbours.
    """
    drawn = lambda k: layers.dropout(jnp.ones((k.shape[0], 8, 8, 4)), 0.3, k, "site")
    whole = np.asarray(drawn(keys(8)))
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:8]), ("data",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    np.testing.assert_array_equal(np.asarray(jax.jit(drawn, in_shardings=spread)(keys(8))), whole)
    for i in (0, 5):
        np.testing.assert_array_equal(np.asarray(drawn(keys(8)[i : i + 1]))[0], whole[i])
    other = np.asarray(drawn(jnp.stack([*keys(8)[:5], jax.random.key(9), *keys(8)[6:]])))
    np.testing.assert_array_equal(np.delete(other, 5, 0), np.delete(whole, 5, 0))
    assert (other[5] != whole[5]).any()


def test_dropout_keeps_its_rate_and_mean():
    x = jnp.ones((64, 16, 16, 32))
    y = np.asarray(layers.dropout(x, 0.13, keys(), "block"))
    n = y.size
    assert abs((y == 0).mean() - 0.13) < 4.5 * np.sqrt(0.13 * 0.87 / n)
    np.testing.assert_allclose(y[y != 0], 1 / 0.87, rtol=1e-6)


def test_quick_numbers_cost_a_fraction_of_threefrys():
    """Integer operations in the program of one mask: what makes a step's compilation and traffic
    long.
    """

    def operations(quick: bool) -> int:
        def mask(k):
            return jax.random.bernoulli(randomness.quick(k) if quick else k, 0.87, (8, 8))

        text = jax.jit(mask).trace(jax.random.key(0)).lower(lowering_platforms=("tpu",)).as_text()
        return sum(
            text.count(f"stablehlo.{op} ")
            for op in ("add", "xor", "or", "shift_left", "shift_right_logical")
        )

    assert 5 * operations(True) < operations(False)


def test_keys_of_another_generator_become_threefrys():
    """Under vmap JAX's rbg gives all images the numbers of the first key: an image depended on its
    batch where JAX_DEFAULT_PRNG_IMPL=rbg.
    """
    for key in (jax.random.key(7, impl="rbg"), jax.random.PRNGKey(7, impl="rbg")):
        found = randomness.typed(key)
        assert found.dtype == jax.random.key(0).dtype
        np.testing.assert_array_equal(jax.random.key_data(found), [0, 7])
        several = randomness.typed(jax.random.split(jax.random.key(7, impl="rbg"), 3))
        assert len(np.unique(jax.random.key_data(several), axis=0)) == 3
    quick = randomness.quick(jax.random.key(7, impl="rbg"))
    np.testing.assert_array_equal(jax.random.key_data(quick), [0, 7])
    with jax.default_prng_impl("rbg"):
        assert randomness.seeded(0).dtype == randomness.typed(jax.random.PRNGKey(1)).dtype
        assert generate.seed_keys(jnp.arange(2)).dtype == randomness.seeded(0).dtype
