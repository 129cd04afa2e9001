"""STF: closed forms, brute force in float64, exactness by enumeration, sharding, masks and
memory.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from ogdm_jax.data import augment as augmentation
from ogdm_jax.methods import stf
from tests.support.oracles import brute_force, parametrised

RNG = np.random.default_rng
stable = jax.jit(stf.stable_target, static_argnames=("chunk", "axis_name"))


def problem(b=6, n=21, shape=(4, 4, 3), seed=0, low=0.3, high=8.0):
    """References, of which the first b are the sources, and noisy queries at noise levels where
    several compete.
    """
    rng = RNG(seed)
    references = rng.uniform(-1, 1, (n, *shape)).astype(np.float32)
    sigma = np.geomspace(low, high, b).astype(np.float32)
    x = references[:b] + sigma.reshape(b, *[1] * len(shape)) * rng.normal(size=(b, *shape)).astype(
        np.float32
    )
    return x.astype(np.float32), sigma, references


def assert_like_brute_force(result, x, sigma, references, mask=None, atol=3e-6):
    target, ess = brute_force(x, sigma, references, mask)
    assert result[0].shape == x.shape and result[0].dtype == jnp.float32
    np.testing.assert_allclose(np.reshape(result[0], target.shape), target, atol=atol)
    np.testing.assert_allclose(result[1], ess, rtol=2e-4)


@pytest.mark.parametrize("chunk", [None, 1, 5, 20, 100])
@pytest.mark.parametrize("shape", [(4, 4, 3), (2,)])
def test_equals_brute_force_in_float64(chunk, shape):
    args = problem(shape=shape)
    assert_like_brute_force(stable(*args, chunk=chunk), *args)


def test_float64_is_exact():
    with jax.enable_x64(True):
        x, sigma, references = (jnp.asarray(a, jnp.float64) for a in problem(low=0.05, high=50))
        for chunk in (None, 4):
            target, ess = stable(x, sigma, references, chunk=chunk)
            truth, truth_ess = brute_force(x, sigma, references)
            np.testing.assert_allclose(target.reshape(truth.shape), truth, atol=1e-12)
            np.testing.assert_allclose(ess, truth_ess, rtol=1e-10)


@pytest.mark.fast
def test_golden_case_of_the_authors_code():
    """spec/stf.md 11, case A: output of EDMLoss.stf_targets."""
    references = np.sin(0.37 * np.arange(20) + 0.1).reshape(5, 2, 2, 1).astype(np.float32)
    eps = np.cos(1.3 * np.arange(12) + 0.2).reshape(3, 2, 2, 1).astype(np.float32)
    sigma = np.array([0.1, 0.5, 2], np.float32)
    target, ess = stable(references[:3] + sigma[:, None, None, None] * eps, sigma, references)
    truth = [
        [0.0998334, 0.4528863, 0.7446431, 0.9356160],
        [0.9963189, 0.9269998, 0.7322156, 0.4383294],
        [0.0441018, 0.0883443, 0.1206298, 0.1365887],
    ]
    np.testing.assert_allclose(np.reshape(target, (3, 4)), truth, atol=2e-6)
    np.testing.assert_allclose(ess, [1, 1.007958, 4.912684], rtol=1e-5)


def test_golden_case_b_of_the_authors_code():
    """spec/stf.md 11, case B: sums of the output rows."""
    references = np.moveaxis(np.sin(0.37 * np.arange(384) + 0.1).reshape(8, 3, 4, 4), 1, -1).astype(
        np.float32
    )
    eps = np.moveaxis(np.cos(1.3 * np.arange(192) + 0.2).reshape(4, 3, 4, 4), 1, -1).astype(
        np.float32
    )
    sigma = np.array([0.002, 0.3, 1.5, 80], np.float32)
    target, ess = stable(references[:4] + sigma[:, None, None, None] * eps, sigma, references)
    target = np.asarray(target, np.float64)
    np.testing.assert_allclose(
        target.sum((1, 2, 3)), [1.659278, 2.78624, 0.98102, 0.610555], atol=3e-5
    )
    np.testing.assert_allclose(
        (target**2).sum((1, 2, 3)), [24.37534, 22.827957, 24.061985, 1.170315], rtol=2e-6
    )
    np.testing.assert_allclose(
        target[3, 0, :4, 0], [-0.119406, -0.04205, 0.040998, 0.118496], atol=2e-6
    )
    np.testing.assert_allclose(ess, [1, 1.000143, 1.101911, 7.999807], rtol=2e-6)


@pytest.mark.fast
@pytest.mark.parametrize(
    "x,sigma,truth",
    [
        ((0.2, 0.1, -0.4, 0.9), 0.7, (0.3359258, -0.4479011, 0, 0.1679629)),
        ((-1, 0.5, 0.3, 0), 1.9, (-0.1620804, 0.2161072, 0, -0.0810402)),
    ],
)
@pytest.mark.parametrize(
    "repeat", [1, 8]
)  # 4 numbers: exact differences; 32: the matrix-product form
def test_two_points_have_the_tanh_posterior(x, sigma, truth, repeat):
    mu = np.tile(np.array([[0.6, -0.8, 0, 0.3]], np.float32), (1, repeat)) / np.sqrt(repeat)
    x = np.tile(np.array([x], np.float32), (1, repeat)) / np.sqrt(repeat)
    target, _ = stable(x, jnp.full((1,), sigma), np.concatenate([mu, -mu]))
    np.testing.assert_allclose(target[0, :4] * np.sqrt(repeat), truth, atol=1e-6)


@pytest.mark.parametrize("shape", [(3,), (8, 8, 3)])
def test_one_reference_is_the_target_exactly(shape):
    x, sigma, references = problem(b=3, n=1 + 3, shape=shape)
    target, ess = stable(x[:1], sigma[:1], references[:1])
    np.testing.assert_array_equal(target, references[:1])
    np.testing.assert_array_equal(ess, 1)
    only = np.eye(3, 4, dtype=bool)
    np.testing.assert_array_equal(stable(x, sigma, references, only)[0], references[:3])


def test_low_noise_gives_the_clean_image_bit_for_bit():
    x, _, references = problem(b=4, n=40, shape=(8, 8, 3))
    x = references[:4] + 0.002 * RNG(1).normal(size=x.shape).astype(np.float32)
    target, ess = stable(x, jnp.full((4,), 0.002), references, chunk=7)
    np.testing.assert_array_equal(target, references[:4])
    np.testing.assert_array_equal(ess, 1)


def test_high_noise_gives_the_mean():
    x, _, references = problem()
    target, ess = stable(x, jnp.full((6,), 1e4), references)
    np.testing.assert_allclose(target[0], references.mean(0), atol=1e-4)
    np.testing.assert_allclose(ess, 21, rtol=1e-5)


def test_gaussian_data_shrink():
    """Data N(0, s^2): E[y | x] = x s^2 / (s^2 + sigma^2), up to the Monte-Carlo error of n
    references.
    """
    references = 0.5 * RNG(0).normal(size=(200_000, 1)).astype(np.float32)
    x = jnp.linspace(-1.0, 1.0, 5)[:, None]
    target, _ = stable(x, jnp.full((5,), 0.8), references)
    np.testing.assert_allclose(target, x * 0.25 / (0.25 + 0.64), atol=5e-3)


def test_full_set_is_the_score_of_the_empirical_mixture():
    x, sigma, references = problem(n=9)
    flat = jnp.asarray(references).reshape(9, -1)

    def log_density(x, sigma):
        return jax.nn.logsumexp(-jnp.sum(jnp.square(x.reshape(1, -1) - flat), -1) / (2 * sigma**2))

    score = jax.vmap(jax.grad(log_density))(jnp.asarray(x), jnp.asarray(sigma))
    target, _ = stable(x, sigma, references)
    np.testing.assert_allclose(
        parametrised("score", jnp.asarray(x), target, sigma), score, rtol=1e-4, atol=1e-4
    )


def enumerate_targets(replace: bool, include: bool):
    """Mean bias and variance ratio of the target given x, over all reference batches of 3 out of 6
    points.
    """
    points = np.array([[0.0, 1.0], [0.5, -0.4], [-1.0, 0.3], [0.9, 0.8], [-0.6, -0.9], [0.1, 0.2]])
    sigma, grid = 0.7, np.array([[0.3, 0.1], [-0.5, 0.4], [0.9, -0.2]])
    draws = (
        list(itertools.product(range(6), repeat=3))
        if replace
        else list(itertools.permutations(range(6), 3))
    )
    likelihood = np.exp(-np.square(grid[:, None] - points[None]).sum(-1) / (2 * sigma**2))
    posterior = likelihood / likelihood.sum(1, keepdims=True)
    truth = posterior @ points
    first, run = np.zeros_like(truth), jax.jit(stf.stable_target)
    second = np.zeros(len(grid))
    for draw in draws:  # source = draw[0], with probability given x proportional to its likelihood
        weight = likelihood[:, draw[0]] / sum(likelihood[:, d[0]] for d in draws)
        references = points[list(draw if include else draw[1:])]
        target = np.asarray(
            run(jnp.asarray(grid), jnp.full((3,), sigma), jnp.asarray(references))[0]
        )
        first += weight[:, None] * target
        second += weight * np.square(target - truth).sum(-1)
    dsm = np.einsum("xk,xk->x", posterior, np.square(points[None] - truth[:, None]).sum(-1))
    return np.abs(first - truth).max(), (second / dsm).max()


@pytest.mark.parametrize("replace", [False, True])
def test_target_is_unbiased_and_of_smaller_variance(replace):
    with jax.enable_x64(True):
        bias, ratio = enumerate_targets(replace, include=True)
        assert bias < 1e-12 and ratio < 0.9
        assert (
            enumerate_targets(replace, include=False)[0] > 0.1
        )  # the check sees a source that is dropped


def test_symmetries():
    x, sigma, references = problem()
    base, _ = stable(x, sigma, references)
    order = RNG(2).permutation(21)
    np.testing.assert_allclose(stable(x, sigma, references[order])[0], base, atol=1e-6)
    np.testing.assert_allclose(stable(x + 0.5, sigma, references + 0.5)[0], base + 0.5, atol=1e-5)
    np.testing.assert_allclose(stable(3 * x, 3 * sigma, 3 * references)[0], 3 * base, atol=1e-5)
    turn = np.linalg.qr(RNG(3).normal(size=(48, 48)))[0].astype(np.float32)
    turned = [a.reshape(-1, 48) @ turn for a in (x, references)]
    rotated, _ = stable(turned[0], sigma, turned[1])
    np.testing.assert_allclose(rotated, base.reshape(-1, 48) @ turn, atol=1e-5)


def test_vp_coordinates_are_rescaled_ve_coordinates():
    x, sigma, references = problem()
    alpha = 1 / np.sqrt(1 + sigma**2)
    scaled = x * alpha[:, None, None, None]
    logits = -np.square(
        (scaled[:, None] - alpha[:, None, None, None, None] * references[None]).astype(np.float64)
    ).sum((2, 3, 4)) / (2 * np.square(alpha * sigma)[:, None])
    weights = np.exp(logits - logits.max(1, keepdims=True))
    truth = np.einsum("bn,nhwc->bhwc", weights / weights.sum(1, keepdims=True), references)
    np.testing.assert_allclose(stable(x, sigma, references)[0], truth, atol=3e-6)


def test_targets_of_all_parametrisations_agree():
    rng = RNG(0)
    clean, noise = rng.normal(size=(2, 5, 4, 4, 1)).astype(np.float32)
    angle = np.linspace(0.1, 1.4, 5).astype(np.float32)
    alpha, sigma = np.cos(angle), np.sin(angle)
    wide = lambda a: a[:, None, None, None]
    x = jnp.asarray(wide(alpha) * clean + wide(sigma) * noise)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5)
    close(parametrised("x0", x, clean, sigma, alpha), clean)
    close(parametrised("eps", x, clean, sigma, alpha), noise)
    close(parametrised("score", x, clean, sigma, alpha), -noise / wide(sigma))
    close(parametrised("v", x, clean, sigma, alpha), wide(alpha) * noise - wide(sigma) * clean)
    t = np.linspace(0.1, 0.9, 5).astype(np.float32)
    flow = jnp.asarray(wide(1 - t) * clean + wide(t) * noise)
    close(parametrised("flow", flow, clean, t), noise - clean)
    x = jnp.asarray(clean + wide(sigma) * noise)
    norm = np.sqrt(sigma**2 + 0.25)
    truth = (clean - wide(0.25 / norm**2) * x) / wide(sigma * 0.5 / norm)
    close(parametrised("F", x, clean, sigma), truth)
    with pytest.raises(ValueError, match="kind is 'w'"):
        parametrised("w", x, clean, sigma)


def test_masks_select_references():
    x, sigma, references = problem()
    one = RNG(4).uniform(size=21) < 0.5
    one[:6] = True
    each = RNG(5).uniform(size=(6, 21)) < 0.4
    each[np.arange(6), np.arange(6)] = True
    for chunk in (None, 4):
        assert_like_brute_force(stable(x, sigma, references, one, chunk), x, sigma, references, one)
        assert_like_brute_force(
            stable(x, sigma, references, each, chunk), x, sigma, references, each
        )
    subset = stable(x, sigma, references[one])[0]
    np.testing.assert_allclose(stable(x, sigma, references, one)[0], subset, atol=1e-6)
    assert np.isnan(stable(x, sigma, references, np.zeros(21, bool), 5)[0]).all()


def test_class_masks():
    """spec/stf.md 5: class-blind 0.236; classes -0.888 and 0.894. A query without a class uses
    everything.
    """
    references = np.array([-1.0, -0.8, 0.8, 1.0], np.float32)[:, None]
    classes = jnp.array([0, 0, 1, 1])
    x, sigma, label = jnp.full((3, 1), 0.3), jnp.ones(3), jnp.array([-1, 0, 1])
    target, _ = stable(x, sigma, references, label=label, reference_label=classes, chunk=3)
    np.testing.assert_allclose(target[:, 0], [0.236, -0.888, 0.894], atol=1e-3)
    mask = stf.class_mask(label, classes)
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]])
    np.testing.assert_allclose(stable(x, sigma, references, mask)[0], target, atol=1e-6)
    np.testing.assert_array_equal(stf.class_mask(jnp.array([2]), jnp.array([-1, 2])), [[0, 1]])


def test_uint8_references_are_scaled_like_images():
    x, sigma, _ = problem()
    stored = RNG(6).integers(0, 256, (21, 4, 4, 3), dtype=np.uint8)
    as_float = (stored.astype(np.float32) / np.float32(127.5) - 1).astype(np.float32)
    for chunk in (None, 4):
        got = stable(x, sigma, stored, chunk=chunk)
        want = stable(x, sigma, as_float, chunk=chunk)
        np.testing.assert_allclose(got[0], want[0], atol=1e-6)
    exact, _ = stable(as_float[:6], jnp.full((6,), 0.01), stored)
    np.testing.assert_allclose(
        exact, as_float[:6], atol=2.4e-7
    )  # one rounding: a compiler multiplies by 1 / 127.5


def test_a_source_of_its_own_equals_a_masked_reference():
    x, sigma, references = problem()
    mask = np.concatenate([np.eye(6, dtype=bool), np.ones((6, 15), bool)], 1)
    got = stable(x, sigma, references[6:], source=references[:6], chunk=4)
    assert_like_brute_force(got, x, sigma, references, mask)


def test_no_gradient_passes():
    x, sigma, references = (jnp.asarray(a) for a in problem())
    total = lambda x, s, r: jnp.sum(stable(x, s, r, source=x)[0])
    for grad in jax.grad(total, argnums=(0, 1, 2))(x, sigma, references):
        np.testing.assert_array_equal(grad, 0)


@pytest.mark.slow_cases("1-pmap", "4-pmap", "8-pmap")
@pytest.mark.parametrize(
    "devices,way", [(1, "pmap"), (2, "pmap"), (4, "pmap"), (8, "pmap"), (4, "shard_map")]
)
def test_sharded_equals_whole(devices, way):
    x, sigma, references = problem(b=8, n=40)
    label, classes = RNG(7).integers(-1, 3, 8), RNG(8).integers(0, 3, 40)
    classes[:8] = np.where(label < 0, classes[:8], label)
    keep = RNG(9).uniform(size=40) < 0.7
    keep[:8] = True

    def local(x, sigma, references, keep, label, classes, source):
        labels = {"label": label, "reference_label": classes}
        return (
            stable(x, sigma, references, chunk=3, axis_name="data"),
            stable(x, sigma, references, keep, axis_name="data", **labels),
            stable(x, sigma, references, axis_name="data", source=source),
        )

    args = [
        jnp.asarray(a) for a in (x, sigma, references, keep, label, classes, references[::-1][:8])
    ]
    if way == "pmap":
        cut = [a.reshape(devices, -1, *a.shape[1:]) for a in args]
        got = jax.pmap(local, axis_name="data", devices=jax.devices()[:devices])(*cut)
        got = jax.tree.map(lambda a: np.asarray(a).reshape(8, *a.shape[2:]), got)
    else:
        mesh, spec = Mesh(np.asarray(jax.devices()[:devices]), ("data",)), PartitionSpec("data")
        got = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec))(*args)
    mask = stf.class_mask(jnp.asarray(label), jnp.asarray(classes)) & keep[None]
    want = (
        stable(x, sigma, references),
        stable(x, sigma, references, mask),
        stable(x, sigma, references, source=args[-1]),
    )
    for (target, ess), (whole, whole_ess) in zip(got, want):
        np.testing.assert_allclose(target, whole, atol=1e-6)
        np.testing.assert_allclose(ess, whole_ess, rtol=1e-5)


def test_masks_across_devices():
    """All shapes of a mask under sharding, and replicated queries; different queries with such a
    mask give nan.
    """
    x, sigma, references = problem(b=8, n=40)
    mask = RNG(5).uniform(size=(8, 40)) < 0.4
    mask[np.arange(8), np.arange(8)] = True
    want, _ = stable(x, sigma, references, mask)
    cut = references.reshape(4, 10, *references.shape[1:])
    own = x.reshape(4, 2, *x.shape[1:]), sigma.reshape(4, 2)
    run = jax.pmap(
        lambda x, s, r, m: stable(x, s, r, m, axis_name="i")[0],
        axis_name="i",
        devices=jax.devices()[:4],
    )
    columns = np.moveaxis(mask.reshape(8, 4, 10), 1, 0)
    for each in (
        columns,
        mask.reshape(4, 2, 40),
    ):  # [all queries, own references], [own queries, all references]
        np.testing.assert_allclose(np.reshape(run(*own, cut, each), x.shape), want, atol=1e-6)
    same = [np.broadcast_to(a, (4, *a.shape)) for a in (x, sigma)]
    np.testing.assert_allclose(run(*same, cut, columns)[2], want, atol=1e-6)
    assert np.isnan(run(*own, cut, columns[:, :2])).all()


def sizes(jaxpr):
    """Numbers in every intermediate value of a jaxpr, sub-jaxprs included."""
    for equation in jaxpr.eqns:
        yield from (int(np.prod(v.aval.shape)) for v in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)


def test_no_array_of_batch_by_references_by_pixels():
    """b 128, n 4096, 3072 numbers: at most 32 MB of temporaries where the authors' form needs 6.4
    GB arrays.
    """
    shapes = [(128, 32, 32, 3), (128,), (4096, 32, 32, 3)]
    for dtype in (jnp.float32, jnp.uint8):
        args = [
            jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, (jnp.float32, jnp.float32, dtype))
        ]
        jaxpr = jax.make_jaxpr(stf.stable_target)(*args)
        assert max(sizes(jaxpr.jaxpr)) <= 4096 * 3072  # the references themselves, reshaped
        memory = jax.jit(stf.stable_target).lower(*args).compile().memory_analysis()
        assert memory.temp_size_in_bytes <= 32e6
    toy = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((50, 10), (50,), (300, 10))]
    assert max(sizes(jax.make_jaxpr(stf.stable_target)(*toy).jaxpr)) < 50 * 300 * 2


def near_duplicates(n=1024, width=3072):
    """uint8 images, among them copies that differ by one grey level here and there, as float32."""
    rng = RNG(0)
    half = rng.integers(0, 255, (n // 2, width))
    pixels = np.concatenate([half, half + (rng.uniform(size=half.shape) < 0.5)])
    return (pixels / 127.5 - 1).astype(np.float32)


@pytest.mark.parametrize("sigma", [0.002, 0.05, 0.2, 1.0, 5.0, 80.0])
def test_precision_with_near_duplicates(sigma):
    references = near_duplicates()
    x = references[:16] + sigma * RNG(1).normal(size=(16, 3072)).astype(np.float32)
    args = x.astype(np.float32), np.full(16, sigma, np.float32), references
    target, _ = stable(*args)
    truth, _ = brute_force(*args)
    np.testing.assert_allclose(target, truth, atol=1e-5 if sigma >= 0.2 else 1e-3)


def test_shared_references_reduce_the_batch_error_by_n_over_b():
    """spec/stf.md 4: at high noise the error of the batch mean of targets is var(y)/n, against
    var(y)/b for DSM.
    """
    rng, b, n = RNG(0), 8, 128
    run = jax.jit(lambda x, r: stable(x, jnp.full((b,), 30.0), r)[0])
    shared, plain = [], []
    for _ in range(300):
        references = rng.normal(size=(n, 8)).astype(np.float32)
        x = references[:b] + 30 * rng.normal(size=(b, 8)).astype(np.float32)
        posterior = x / 901
        shared.append(np.square((run(x, references) - posterior).mean(0)).sum())
        plain.append(np.square((references[:b] - posterior).mean(0)).sum())
    np.testing.assert_allclose(np.mean(shared) / np.mean(plain), b / n, rtol=0.25)


def test_flips_undo_themselves_and_isometric_sees_the_rest():
    images = jnp.asarray(RNG(0).normal(size=(5, 4, 4, 3)), jnp.float32)
    augment = np.zeros((5, 9), np.float32)
    augment[1, 0] = augment[2, 1] = augment[3, 0] = augment[3, 1] = 1
    augment[4, 6] = -0.3
    augment = jnp.asarray(augment)
    np.testing.assert_array_equal(
        augmentation.flip(augmentation.flip(images, augment), augment), images
    )
    np.testing.assert_array_equal(augmentation.flip(images, augment)[1], images[1][:, ::-1])
    np.testing.assert_array_equal(augmentation.flip(images, augment)[3], images[3][::-1, ::-1])
    np.testing.assert_array_equal(augmentation.isometric(augment), [1, 1, 1, 1, 0])


@pytest.mark.fast
@pytest.mark.parametrize(
    "change,message",
    [
        ({"references": np.zeros((4, 5, 4, 3))}, "references have shape"),
        ({"references": np.zeros((0, 4, 4, 3))}, "n >= 1"),
        ({"sigma": np.ones(3)}, "sigma has shape"),
        ({"chunk": 0}, "chunk is 0"),
        ({"mask": np.ones((3, 21), bool)}, "mask has shape"),
        ({"source": np.zeros((6, 4, 4, 1))}, "source has shape"),
        ({"label": np.zeros(6, int)}, "partner"),
    ],
)
def test_wrong_shapes_are_one_sentence(change, message):
    x, sigma, references = problem()
    with pytest.raises(ValueError, match=message):
        stf.stable_target(**{"xt": x, "sigma": sigma, "references": references} | change)
