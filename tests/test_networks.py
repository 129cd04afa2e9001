"""Networks: layers against closed forms, gradients of the convolution, parameter lists, and rules
of a U-Net.
"""

import functools
import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax import platforms, randomness
from ogdm_jax.interop import names_edm
from ogdm_jax.networks import DhariwalUNet, SongUNet, attention, convolution, cpu, groupnorm, layers

FULLSIZE = Path(__file__).parent / "golden" / "fullsize"
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


# Convolution and resampling


def equal_in_both_orders(custom, plain, *operands):
    """The CPU's own rule gives the value and the gradient that autodiff gives, and the gradient of
    a gradient (an R1 penalty).
    """
    every = tuple(range(len(operands)))
    value = lambda f, *operands: f(*operands)
    score = lambda f, *operands: jnp.sum(jnp.sin(f(*operands)))
    penalty = lambda f, *operands: sum(
        jnp.sum(g**2) for g in jax.grad(lambda *o: jnp.sum(jnp.tanh(f(*o))), every)(*operands)
    )
    for objective in (
        value,
        jax.grad(score, [i + 1 for i in every]),
        jax.grad(penalty, [i + 1 for i in every]),
    ):
        actual, truth = (jit(functools.partial(objective, f))(*operands) for f in (custom, plain))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.max(jnp.abs(b)))),
            actual,
            truth,
        )


@pytest.mark.parametrize("outputs", [2, 4])  # either side of three inputs
@pytest.mark.parametrize(
    ("pads", "sides"),
    [
        (((1, 1), (1, 1)), (3, 3)),
        (((0, 2), (1, 3)), (3, 3)),
        (((0, 0), (3, 3)), (3, 3)),
        (((1, 0), (0, 1)), (2, 2)),
        (((0, 0), (0, 0)), (1, 1)),
        (((1, 1), (0, 0)), (1, 1)),
    ],
)
def test_convolution_of_both_orders(pads, sides, outputs):
    plain = functools.partial(convolution._convolve, pads=pads)
    custom = functools.partial(convolution.conv2d, padding=pads)
    equal_in_both_orders(custom, plain, normal(2, 6, 5, 3), normal(*sides, 3, outputs, seed=1))


def test_convolution_of_doubled_pixels():
    operands = normal(2, 3, 4, 3), normal(3, 3, 3, 2, seed=1)
    equal_in_both_orders(cpu.convolve_doubled, convolution._convolve_doubled, *operands)
    by_hand = convolution.conv2d(jnp.repeat(jnp.repeat(operands[0], 2, 1), 2, 2), operands[1])
    np.testing.assert_allclose(convolution.conv2d_upsampled(*operands), by_hand, atol=1e-5)
    with pytest.raises(ValueError, match="conv2d"):
        convolution.conv2d_upsampled(operands[0], operands[1][:, :, :1])
    for odd in ({"stride": 2}, {"pads": ((0, 1), (0, 1))}):
        layer = layers.Conv(2, 3, jax.nn.initializers.zeros, up=True, **odd)
        with pytest.raises(ValueError, match="Conv: up with"):
            layer.init(jax.random.key(0), operands[0])


def test_convolution_in_loops_and_batches():
    """The rule under scan, checkpoint and vmap, in both precisions."""
    x, kernel = normal(2, 4, 4, 3), 0.3 * normal(3, 3, 3, 3, seed=1)
    direct = lambda k: jnp.sum(convolution.conv2d(convolution.conv2d(x, k), k) ** 2)
    step = jax.checkpoint(lambda h, k: convolution.conv2d(h, k))
    looped = lambda k: jnp.sum(jax.lax.scan(lambda h, _: (step(h, k), None), x, None, 2)[0] ** 2)
    truth = jit(jax.grad(direct))(kernel)
    np.testing.assert_allclose(jit(jax.grad(looped))(kernel), truth, rtol=1e-4, atol=1e-4)
    kernels = jnp.stack([kernel, 2 * kernel])
    batched = jit(jax.vmap(jax.grad(direct)))(kernels)[0]
    np.testing.assert_allclose(batched, truth, rtol=1e-4, atol=1e-4)
    half = jax.grad(lambda k: jnp.sum(convolution.conv2d(x.astype(k.dtype), k).astype(jnp.float32)))
    assert half(kernel.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_compute_once_is_the_identity_of_every_order():
    x, parameter = normal(2, 3, 3, 4), jnp.ones(4)
    cube = lambda f: lambda x: jnp.sum(f(x) ** 3)
    once = lambda x: cpu.compute_once(x, parameter)
    identity = lambda x: x
    hessian = lambda f: jax.grad(lambda x: jnp.sum(jnp.sin(jax.grad(cube(f))(x))))
    for of in (cube, lambda f: jax.grad(cube(f)), hessian):
        np.testing.assert_allclose(jax.jit(of(once))(x), of(identity)(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(jax.vmap(once)(x[:, None]), x[:, None])
    np.testing.assert_array_equal(jax.grad(lambda p: jnp.sum(cpu.compute_once(x, p)))(parameter), 0)


def test_strided_convolution_and_errors():
    x, kernel = normal(1, 6, 6, 2), normal(3, 3, 2, 4, seed=1)
    np.testing.assert_allclose(
        convolution.conv2d(x, kernel, 1, stride=2),
        convolution.conv2d(x, kernel, 1)[:, ::2, ::2],
        atol=1e-5,
    )
    with pytest.raises(ValueError, match="conv2d"):
        convolution.conv2d(x, kernel[:, :, :1])


@pytest.mark.parametrize(
    "side,size,stride", [(6, 3, 1), (6, 3, 2), (7, 5, 2), (5, 5, 1), (2, 5, 2), (3, 1, 2)]
)
def test_depthwise_convolution_on_cpu_is_the_grouped_one(side, size, stride):
    x, kernel = normal(2, side, side + 1, 3), normal(size, size, 1, 3, seed=1)

    def run(x, kernel):
        weighed = lambda x, k: jnp.sum(jnp.sin(convolution.depthwise(x, k, stride)))
        return convolution.depthwise(x, kernel, stride), *jax.grad(weighed, (0, 1))(x, kernel)

    ours, grouped = jit(run), jit(platforms.traced_for("tpu", run))
    for a, b in zip(ours(x, kernel), grouped(x, kernel), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    with pytest.raises(ValueError, match="depthwise: x .* and kernel .*: expected"):
        convolution.depthwise(x, kernel[..., :1])


@pytest.mark.fast
@pytest.mark.parametrize(
    "up,down,padding", [(1, 1, 0), (2, 1, (2, 1)), (1, 2, 1), (2, 2, (3, -1)), (3, 1, (0, 2))]
)
def test_fir_is_upfirdn(up, down, padding):
    """Against NumPy: insert up - 1 zeros after each pixel, pad, convolve with the outer product,
    keep every down-th.
    """
    x, taps = np.asarray(normal(2, 5, 4, 3)), [0.1, 0.5, 0.3, -0.2]
    before, after = (padding, padding) if isinstance(padding, int) else padding
    wide = np.zeros((2, 5 * up, 4 * up, 3))
    wide[:, ::up, ::up] = x
    wide = np.pad(wide, [(0, 0), (before, max(after, 0)), (before, max(after, 0)), (0, 0)])
    wide = wide[:, : wide.shape[1] + min(after, 0), : wide.shape[2] + min(after, 0)]
    f, n = np.outer(taps, taps)[::-1, ::-1], len(taps)
    h, w = wide.shape[1] - n + 1, wide.shape[2] - n + 1
    truth = sum(f[i, j] * wide[:, i : i + h, j : j + w] for i in range(n) for j in range(n))[
        :, ::down, ::down
    ]
    np.testing.assert_allclose(
        convolution.fir(jnp.asarray(x), taps, up, down, padding), truth, atol=1e-6
    )


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_resampling(taps):
    """Constants stay (inside), [1,1] is nearest and mean, and upsample is 4 times the transpose of
    downsample.
    """
    x = normal(1, 6, 4, 2)
    up, down = convolution.upsample(x, taps), convolution.downsample(x, taps)
    assert up.shape == (1, 12, 8, 2) and down.shape == (1, 3, 2, 2)
    for resample in (convolution.upsample, convolution.downsample):
        np.testing.assert_allclose(
            resample(jnp.ones((1, 8, 8, 1)), taps)[:, 1:-1, 1:-1], 1, rtol=1e-6
        )
    small = normal(1, 3, 2, 2, seed=1)
    transpose = jax.vjp(lambda v: convolution.downsample(v, taps), x)[1](small)[0]
    np.testing.assert_allclose(convolution.upsample(small, taps), 4 * transpose, atol=1e-6)
    if taps == (1, 1):
        np.testing.assert_array_equal(up, np.repeat(np.repeat(x, 2, 1), 2, 2))
        np.testing.assert_allclose(down[0, 1, 0], np.mean(x[0, 2:4, 0:2], (0, 1)), rtol=1e-6)


# Norm, embeddings, initialisers, attention, dropout


@pytest.mark.fast
@pytest.mark.parametrize(
    "channels,groups,expected",
    [(8, 0, 2), (96, 0, 24), (256, 0, 32), (64, 32, 32), (1024, 0, 32)],
)
def test_groupnorm(channels, groups, expected):
    """Biased statistics of min(32, C/4) groups, also where the mean is 1000 times the spread."""
    for offset in (0.0, 1000.0):
        x = np.asarray(normal(2, 5, 4, channels)) + np.float32(offset)
        norm = layers.GroupNorm(1e-5, groups)
        variables = {
            "params": {"scale": 1 + 0.1 * normal(channels), "bias": normal(channels, seed=1)}
        }
        wide = x.astype(np.float64).reshape(2, 20, expected, -1)
        centred = wide - wide.mean((1, 3), keepdims=True)
        truth = (centred / np.sqrt(wide.var((1, 3), keepdims=True) + 1e-5)).reshape(x.shape)
        truth = truth * np.asarray(variables["params"]["scale"]) + np.asarray(
            variables["params"]["bias"]
        )
        np.testing.assert_allclose(
            norm.apply(variables, jnp.asarray(x)), truth, atol=2e-5 if not offset else 1e-3
        )


def test_groupnorm_of_a_constant_is_its_bias():
    x = jnp.full((1, 4, 4, 8), 3.0)
    variables = {"params": {"scale": jnp.ones(8), "bias": jnp.arange(8.0)}}
    y, gradient = jax.value_and_grad(lambda x: jnp.sum(layers.GroupNorm(1e-5).apply(variables, x)))(
        x
    )
    assert float(y) == pytest.approx(16 * 28, rel=1e-5) and np.all(np.isfinite(gradient))
    with pytest.raises(ValueError, match="10 channels"):
        layers.GroupNorm(1e-5, 4).init(jax.random.key(0), jnp.zeros((1, 2, 2, 10)))


@pytest.mark.fast
def test_a_wide_groupnorm_brings_no_large_constant():
    """A U-Net of 2,560 channels was traced with 2 GB of them."""
    x, scale = jnp.zeros((1, 2, 2, 2560)), jnp.ones((1, 1, 1, 2560))
    traced = jax.make_jaxpr(lambda x, s: groupnorm.normalise(x, s, s, 32, 1e-5)[0])(x, scale)
    literals = [v for equation in traced.eqns for v in equation.invars if hasattr(v, "val")]
    held = [np.size(c) for c in [*traced.consts, *(v.val for v in literals)]]
    assert 2560 * 32 in held and max(held) == 2560 * 32


@pytest.mark.parametrize("groups", [1, 4, 24])
def test_groupnorms_closed_gradient_is_autodiffs(groups):
    """In float64 to rounding, the gradient of the gradient too; with a mean 1000 times the spread;
    in bfloat16.
    """
    plain = lambda *a: groupnorm.normalise(*a)[0]  # whose gradient is autodiff's
    with jax.enable_x64(True):
        x, along = (jnp.asarray(normal(2, 5, 4, 24, seed=s), jnp.float64) for s in (0, 1))
        scale, bias = (jnp.asarray(normal(1, 1, 1, 24, seed=s), jnp.float64) for s in (2, 3))

        def both(of, atol):
            rules = (groupnorm.group_norm, plain)
            ours, truth = (
                jax.jit(of(lambda *a, r=r: r(*a, groups, 1e-5)))(x, scale, bias) for r in rules
            )
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=0, atol=atol), ours, truth
            )

        total = lambda norm: lambda *a: jnp.sum(jnp.sin(norm(*a)) * along)
        first = lambda norm: jax.grad(total(norm), (0, 1, 2))
        both(first, 1e-12)
        both(
            lambda norm: jax.grad(
                lambda *a: jnp.sum(jnp.cos(first(norm)(*a)[0]) * along), (0, 1, 2)
            ),
            1e-10,
        )
        x = x + 1000
        both(first, 1e-9)
        truth = first(lambda *a: plain(*a, groups, 1e-5))(x, scale, bias)[0]
    narrow = [jnp.asarray(a, jnp.float32) for a in (x, scale, bias)]
    ours = jax.grad(
        lambda *a: jnp.sum(
            jnp.sin(groupnorm.group_norm(*a, groups, 1e-5)) * along.astype(jnp.float32)
        )
    )(*narrow)
    np.testing.assert_allclose(ours, truth, atol=2e-3 * np.abs(truth).max())
    half = [narrow[0].astype(jnp.bfloat16), *narrow[1:]]
    grads = jax.grad(
        lambda *a: jnp.sum(groupnorm.group_norm(*a, groups, 1e-5).astype(jnp.float32)), (0, 1, 2)
    )(*half)
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32, jnp.float32]


@pytest.mark.fast
@pytest.mark.parametrize("mode,variance", [("xavier_uniform", 2 / 90), ("kaiming_normal", 1 / 36)])
def test_initialisers(mode, variance):
    """Variance of a 3x3 kernel 4 -> 6: fans 36 and 54; a bias follows its kernel's fans."""
    init = layers.scaled_init(mode, 2.0)
    for shape, fans in (((3, 3, 4, 6), None), ((6,), (36, 54))):
        values = jax.vmap(lambda k, shape=shape, fans=fans: init(k, shape, fans=fans))(
            jax.random.split(jax.random.key(0), 400)
        )
        assert float(jnp.var(values)) == pytest.approx(4 * variance, rel=0.1)
    if mode.endswith("uniform"):
        assert float(jnp.max(jnp.abs(values))) <= 2 * np.sqrt(3 * variance)
    with pytest.raises(ValueError, match="'he_uniform'"):
        layers.scaled_init("he_uniform")


@pytest.mark.fast
def test_embeddings():
    c = jnp.asarray([0.0, 1.5, 999.0])
    for endpoint in (False, True):
        f = 10000.0 ** (-np.arange(4) / (4 - endpoint))
        truth = np.concatenate([np.cos(np.outer(c, f)), np.sin(np.outer(c, f))], 1)
        np.testing.assert_allclose(layers.positional_embedding(c, 8, endpoint), truth, atol=1e-4)
    module = layers.FourierEmbedding(2000)
    variables = module.init(jax.random.key(0), c)
    assert set(variables) == {"buffers"} and float(
        jnp.std(variables["buffers"]["freqs"])
    ) == pytest.approx(16, rel=0.1)


def test_attention_is_that_of_the_library():
    general, attend = jax.nn.dot_product_attention, attention.attend
    q, k, v = normal(2, 5, 2, 3), normal(2, 4, 2, 3, seed=1), normal(2, 4, 2, 3, seed=2)
    equal_in_both_orders(attend, general, q, k, v)
    half = [t.astype(jnp.bfloat16) for t in (q, k, v)]
    assert attend(*half).dtype == jnp.bfloat16
    np.testing.assert_allclose(
        attend(*half).astype(jnp.float32), general(*half).astype(jnp.float32), atol=0.03
    )
    gradients = jax.grad(lambda *o: jnp.sum(attend(*o).astype(jnp.float32)), (0, 1, 2))(*half)
    assert all(g.dtype == jnp.bfloat16 for g in gradients)


@pytest.mark.parametrize("width", [64, 40, 72, 80])
@pytest.mark.parametrize("attend", [jax.nn.dot_product_attention, attention.attend])
def test_logits_of_bfloat16_networks_are_float32(attend, width):
    """Near 55 bfloat16 has steps of 0.25: rounded to it, logits would put weights off by 15 %, and
    keys divided by the root of 72 (DiT-XL/2's heads) by 5 %.
    """
    common = normal(1, width)
    q = 3 * common + 0.5 * normal(16, width, seed=1)
    k = 2.7 * common + 0.15 * normal(16, width, seed=2)
    q, k = (t.astype(jnp.bfloat16)[None, :, None] for t in (q, k))
    v = jnp.eye(16, width, dtype=jnp.bfloat16)[None, :, None]
    logits = np.einsum("bqhc,bkhc->qk", *(np.asarray(t, np.float64) for t in (q, k)))
    logits /= np.sqrt(width)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    found = np.asarray(attend(q, k, v), np.float64)[0, :, 0, :16]
    np.testing.assert_allclose(found, weights, rtol=0.01)


@pytest.mark.parametrize("width", [32, 64])
def test_gradients_of_attention_in_bfloat16_are_near_those_in_float64(width):
    """Of sharp weights: 2 % off where dout v^T and its mean were rounded to bfloat16."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.normal(size=(2, 64, 2, width)) * s for s in (4, 4, 1, 1))
    q, k, v, dout = (jnp.asarray(t, jnp.bfloat16) for t in (q, k, v, dout))
    found = jax.vjp(attention.attend, q, k, v)[1](dout)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(t, np.float64)) for t in (q, k, v, dout)]
        of_library = jax.vjp(jax.nn.dot_product_attention, *wide[:3])[1](wide[3])
        want = jax.tree.map(np.asarray, of_library)
    for one, other in zip(found, want, strict=True):
        error = np.linalg.norm(np.asarray(one, np.float64) - other) / np.linalg.norm(other)
        assert error < 0.01


def test_attention_mixes_values_by_similarity():
    """Far apart keys select one value; equal keys give the mean; heads do not mix."""
    q = jnp.broadcast_to(jnp.asarray([50.0, 0.0, 50.0, 0.0]), (1, 2, 2, 4))
    pixels = jnp.eye(4)[:, :2].reshape(1, 2, 2, 2)
    k = jnp.concatenate([50.0 * pixels, jnp.zeros((1, 2, 2, 2))], -1)
    v = normal(1, 2, 2, 4)
    out = layers.attention(jnp.concatenate([q, k, v], -1), 2)
    np.testing.assert_allclose(out[0, 1, 1, :2], v[0, 0, 0, :2], rtol=1e-5)
    np.testing.assert_allclose(out[0, 1, 1, 2:], v.mean((0, 1, 2))[2:], rtol=1e-5)


def test_dropout_belongs_to_the_example_and_the_site():
    x, keys = (
        jnp.ones((64, 8, 8, 4)),
        randomness.example_keys(jax.random.key(0), "dropout", jnp.arange(64)),
    )
    y = layers.dropout(x, 0.25, keys, "a")
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)} and abs(float(y.mean()) - 1) < 0.02
    np.testing.assert_array_equal(layers.dropout(x[8:16], 0.25, keys[8:16], "a"), y[8:16])
    assert np.any(layers.dropout(x, 0.25, keys, "b") != y) and np.any(y[0] != y[1])
    np.testing.assert_array_equal(layers.dropout(x, 0.25, None, "a"), x)


# Whole networks

SONG = dict(
    img_resolution=8, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,)
)
KINDS = {
    "ddpmpp": functools.partial(SongUNet, **SONG),
    "ncsnpp": functools.partial(
        SongUNet,
        **SONG,
        embedding_type="fourier",
        channel_mult_noise=2,
        encoder_type="residual",
        resample_filter=(1, 3, 3, 1),
    ),
    "adm": functools.partial(DhariwalUNet, **SONG | {"model_channels": 32}),
}


@functools.cache
def randomised(kind: str, **more):
    """A network and variables in which nothing is zero (initial zeros would hide half the
    network).
    """
    network = KINDS[kind](**more)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.zeros(1))
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    values = [
        rng.normal(size=s.shape).astype(np.float32)
        * (0.3 if s.ndim < 2 else s.shape[-2] ** -0.5 / 2)
        for s in leaves
    ]
    return network, jax.tree.unflatten(tree, values)


def run(network, variables, *arguments, **more):
    return jit(lambda v, a, m: network.apply(v, *a, **m))(variables, arguments, more)


def inputs(n: int = 4):
    return normal(n, 8, 8, 3), jnp.linspace(-1.0, 1.0, n)


@pytest.mark.slow_cases("ncsnpp")
@pytest.mark.parametrize("kind", KINDS)
def test_examples_do_not_meet(kind):
    """Each row of the output depends on its own row only; dropout follows its key; without keys
    nothing is dropped.
    """
    network, variables = randomised(kind, label_dim=3, augment_dim=9, dropout=0.5)
    x, c = inputs()
    label, augment = jnp.asarray([0, 2, -1, 1]), normal(4, 9)
    keys = randomness.example_keys(jax.random.key(0), "dropout", jnp.arange(4))
    call = jit(
        lambda x, c, label, augment, keys: network.apply(variables, x, c, label, augment, keys)
    )
    y = call(x, c, label, augment, keys)
    assert y.shape == x.shape and y.dtype == jnp.float32 and np.all(np.isfinite(y))
    order = np.asarray([2, 0, 3, 1])
    rows = [a[order] for a in (x, c, label, augment, keys)]
    np.testing.assert_allclose(call(*rows), y[order], atol=2e-5)
    assert np.max(np.abs(call(x, c, label, augment, keys[order]) - y)) > 1e-2
    still = run(network, variables, x, c, label, augment)
    assert np.max(np.abs(still - y)) > 1e-2
    other = run(
        randomised(kind, label_dim=3, augment_dim=9, dropout=0.1)[0],
        variables,
        x,
        c,
        label,
        augment,
    )
    np.testing.assert_array_equal(still, other)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_and_scalars(kind):
    """-1, None and a row of zeros are "no class"; integers are their one-hot rows; a scalar c_noise
    is everybody's.
    """
    network, variables = randomised(kind, label_dim=3, augment_dim=9)
    x, c = inputs()
    emb = functools.partial(network.apply, variables, x, at="emb", method="features")
    zeros = emb(c, jnp.zeros((4, 3)), jnp.zeros((4, 9)))
    np.testing.assert_array_equal(emb(c), zeros)
    np.testing.assert_array_equal(emb(c, jnp.full(4, -1), None), zeros)
    integers = jnp.asarray([0, 2, 1, -1])
    np.testing.assert_array_equal(emb(c, integers), emb(c, jax.nn.one_hot(integers, 3)))
    assert np.any(emb(c, integers)[:3] != zeros[:3])
    np.testing.assert_array_equal(emb(0.25), emb(jnp.full(4, 0.25)))
    with pytest.raises(ValueError, match="label: shape"):
        emb(c, jnp.zeros((4, 2)))


@pytest.mark.slow
def test_remat_changes_no_number():
    x, c = inputs(2)
    variables = randomised("adm")[1]

    def gradient(**more):
        loss = lambda v: jnp.sum(jnp.square(KINDS["adm"](**more).apply(v, x, c)))
        return jit(jax.grad(loss))(variables)

    for a, b in zip(
        jax.tree.leaves(gradient(remat=True)), jax.tree.leaves(gradient()), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, float(jnp.max(jnp.abs(b)))))


@pytest.mark.slow_cases("ncsnpp")
@pytest.mark.parametrize("kind", ["ncsnpp", "adm"])
def test_half_precision(kind):
    """bfloat16 stays near float32; parameters and outputs are float32."""
    x, c = inputs(2)
    network, variables = randomised(kind)
    half = KINDS[kind](dtype=jnp.bfloat16)
    y, y_half = run(network, variables, x, c), run(half, variables, x, c)
    assert y_half.dtype == jnp.float32
    assert 0 < float(jnp.linalg.norm(y_half - y)) < 0.05 * float(jnp.linalg.norm(y))
    shapes = jax.eval_shape(half.init, jax.random.key(0), x, c)
    assert {s.dtype for s in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}


@pytest.mark.slow_cases("ddpmpp", "ncsnpp")
@pytest.mark.parametrize("kind", KINDS)
def test_initial_output_is_almost_zero(kind):
    network = KINDS[kind]()
    x, c = inputs(2)
    variables = jit(network.init)(
        jax.random.key(0, impl="rbg"), x, c
    )  # threefry would compile for long
    assert float(jnp.max(jnp.abs(run(network, variables, x, c)))) < 1e-3


@pytest.mark.slow_cases("16", "64")
@pytest.mark.parametrize("resolution", [16, 28, 64])
def test_shapes_and_features(resolution):
    """Features have their documented shapes at other resolutions; "mid" needs no decoder."""
    side = resolution // 4
    settings = dict(
        img_resolution=resolution, channel_mult=(1, 2, 2), num_blocks=2, attn_resolutions=(side,)
    )
    x, c = (
        jax.ShapeDtypeStruct((2, resolution, resolution, 1), jnp.float32),
        jax.ShapeDtypeStruct((2,), jnp.float32),
    )
    for network in (
        SongUNet(img_channels=1, model_channels=16, **settings),
        DhariwalUNet(img_channels=1, out_channels=2, model_channels=16, **settings),
    ):
        variables = jax.eval_shape(network.init, jax.random.key(0), x, c)

        def shape(at, network=network, variables=variables):
            apply = functools.partial(network.apply, at=at, method="features")
            return jax.eval_shape(apply, variables, x, c).shape

        y = jax.eval_shape(network.apply, variables, x, c)
        assert y.shape == (2, resolution, resolution, network.out_channels or 1)
        assert shape("mid") == (2, side, side, 32) and shape("emb") == (2, 64)
        encoder = {
            k: v for k, v in variables["params"].items() if not k.startswith("dec_") or "_in" in k
        }
        features = functools.partial(network.apply, method="features")
        jax.eval_shape(features, {"params": encoder}, x, c)


def test_attention_placement():
    """SongUNet: encoder at the resolutions named, last decoder block, in0. Dhariwal: every decoder
    block, C >= 64.
    """

    def attends(network):
        shapes = jax.eval_shape(
            network.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.zeros(1)
        )["params"]
        return {name for name, block in shapes.items() if "qkv" in block}

    small = dict(img_resolution=8, channel_mult=(1, 2), num_blocks=2)
    assert attends(SongUNet(model_channels=8, attn_resolutions=(8,), **small)) == {
        "enc_8x8_block0",
        "enc_8x8_block1",
        "dec_8x8_block2",
        "dec_4x4_in0",
    }
    assert attends(DhariwalUNet(model_channels=32, attn_resolutions=(8, 4), **small)) == {
        "enc_4x4_block0",
        "enc_4x4_block1",
        "dec_4x4_in0",
        "dec_4x4_block0",
        "dec_4x4_block1",
        "dec_4x4_block2",
    }


def test_wrong_settings_and_inputs():
    with pytest.raises(ValueError, match="encoder_type: 'skip'"):
        SongUNet(8, encoder_type="skip")
    network, variables = randomised("ddpmpp")
    x, c = inputs()
    for wrong in (x[..., :2], x[:, :7], x[0]):
        with pytest.raises(ValueError, match="x has shape"):
            network.apply(variables, wrong, c)
    with pytest.raises(ValueError, match="no block 'deep'; expected 'mid', 'emb' or .*dec_4x4_in0"):
        network.apply(variables, x, c, at="mid,deep", method="features")


# Published checkpoints

COUNTS = {  # 2206.00364's models as published
    "edm-cifar10-32x32-uncond-vp": 55_733_891,
    "edm-cifar10-32x32-cond-vp": 55_735_299,
    "edm-cifar10-32x32-uncond-ve": 56_397_827,
    "edm-cifar10-32x32-cond-ve": 56_400_643,
    "edm-ffhq-64x64-uncond-vp": 61_805_571,
    "edm-ffhq-64x64-uncond-ve": 62_761_091,
    "edm-imagenet-64x64-cond-adm": 295_899_267,
    "baseline-imagenet-64x64-cond-adm": 295_904_454,
}
EDM_LISTS = [*FULLSIZE.glob("edm-*"), *FULLSIZE.glob("stf-*"), *FULLSIZE.glob("baseline-*")]


# test_pretrained.py reads the same lists; one of each kind of network here
@pytest.mark.slow_cases(
    "edm-afhq*", "edm-ffhq*", "edm-cifar10-32x32-cond*", "*-ve", "stf-*", "baseline-imagenet*"
)
@pytest.mark.parametrize("path", EDM_LISTS, ids=lambda p: p.name.split(".")[0])
def test_tensors_of_published_checkpoints(path):
    """Name and shape of every tensor, nothing left over, and the exact number of parameters;
    nothing is allocated.
    """
    listed = json.loads(gzip.open(path).read())
    network = names_edm.edm_network(listed["constructor"]["kwargs"], listed["constructor"]["cls"])
    entries = names_edm.edm_entries(network)
    wanted = {name: (tuple(shape), kind) for name, shape, kind in listed["entries"]}
    ours = {
        e.name: (e.torch_shape, "param" if e.path[0] == "params" else "buffer") for e in entries
    }
    filters = names_edm._resample_filters(network, list(ours))
    ours |= {name: (value.shape, "buffer") for name, value in filters.items()}
    wanted.pop("u", None)
    assert ours == wanted
    count = sum(int(np.prod(e.shape)) for e in entries if e.path[0] == "params")
    assert count == listed["param_count"] == COUNTS.get(listed["name"], count)


@pytest.mark.parametrize("kind", KINDS)
def test_names_round_trip(kind):
    """To PyTorch's names and back is the identity; constants may be present; anything else is named
    in the error.
    """
    network, variables = randomised(kind, label_dim=2, augment_dim=9)
    state = names_edm.flax_to_edm(variables, network, constants=True)
    back = names_edm.edm_to_flax(state | {"u": np.zeros(1001)}, network)
    jax.tree.map(np.testing.assert_array_equal, back, dict(variables))
    bare = {name.removeprefix("model."): value for name, value in state.items()}
    jax.tree.map(
        np.testing.assert_array_equal, names_edm.edm_to_flax(bare, network), dict(variables)
    )
    with pytest.raises(ValueError, match="model.map_layer0.bias is missing"):
        names_edm.edm_to_flax(
            {k: v for k, v in state.items() if k != "model.map_layer0.bias"}, network
        )
    with pytest.raises(ValueError, match="model.extra has no place"):
        names_edm.edm_to_flax(state | {"model.extra": np.zeros(1)}, network)
    with pytest.raises(ValueError, match=r"map_layer0.weight has shape \(1,\)"):
        names_edm.edm_to_flax(state | {"model.map_layer0.weight": np.zeros(1)}, network)
