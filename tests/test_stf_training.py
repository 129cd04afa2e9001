"""STF's training slot: reference sources, plans, classes, augmentation modes, metrics, settings."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax import parallel, randomness
from ogdm_jax.data import augment as augmentation
from ogdm_jax.data import from_arrays
from ogdm_jax.diffusion import noise
from ogdm_jax.methods import contract as slots
from ogdm_jax.methods import stf
from ogdm_jax.training import objective
from ogdm_jax.training.context import augmented
from tests.support.oracles import brute_force

RNG = np.random.default_rng
SET = RNG(10).integers(0, 256, (50, 4, 4, 1), dtype=np.uint8)
CLASSES = RNG(11).integers(0, 3, 50).astype(np.int32)
SOURCE = from_arrays("fifty", SET, CLASSES)


def as_image(pixels):
    return (np.asarray(pixels, np.float64) / 127.5 - 1).astype(np.float32)


def example(b=8, seed=0, label=False, augment=None, references=None, low=0.3):
    """A batch whose images are the first b of SET, augmented by flips where the labels say so."""
    clean, sigma = as_image(SET[:b]), np.geomspace(low, 6, b).astype(np.float32)
    x0 = (
        clean
        if augment is None
        else np.asarray(augmentation.flip(jnp.asarray(clean), jnp.asarray(augment)))
    )
    eps = RNG(seed).normal(size=x0.shape).astype(np.float32)
    return slots.Example(
        x0=jnp.asarray(x0),
        image=jnp.asarray(clean),
        label=jnp.asarray(CLASSES[:b]) if label else None,
        augment=None if augment is None else jnp.asarray(augment),
        sigma=jnp.asarray(sigma),
        eps=jnp.asarray(eps),
        xt=jnp.asarray(x0 + sigma[:, None, None, None] * eps),
        index=jnp.arange(b, dtype=jnp.int32),
        key=jax.random.key(5),
        noise_key=jax.random.key(6),
        references=references,
    )


def context(b=8, devices=1, axis=None, **more):
    fields = {
        "batch": b,
        "device_batch": b // devices,
        "devices": devices,
        "axis": axis,
        "image_shape": (4, 4, 1),
    }
    fields |= {
        "xflip": False,
        "text": False,
        "augment": None,
        "mesh": None,
        "label_dim": 3,
        "source": SOURCE,
    }
    return types.SimpleNamespace(**fields | more)


def fill(settings, ex, ctx=None):
    slot = stf.training(stf.Settings(**settings), ctx or context())
    return jax.jit(slot.target)(ex, owned(slot))


def owned(slot):
    """What the step hands the slot."""
    return slots.Own(None if slot.constants is None else slot.constants.make())


def assert_target(got, ex, references, mask=None, rows=slice(None)):
    truth, _ = brute_force(ex.xt[rows], ex.sigma[rows], references, mask)
    np.testing.assert_allclose(np.reshape(got[rows], truth.shape), truth, atol=1e-5)


def test_full_is_the_posterior_of_the_whole_set():
    ex = example()
    target, metrics = fill({"source": "full", "chunk": 16}, ex)
    assert_target(target, ex, as_image(SET))
    values, weights = metrics["stf/moved/0.5-2"]
    np.testing.assert_allclose(
        values, np.sqrt(np.square(target - ex.x0).sum((1, 2, 3))), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(weights, (ex.sigma > 0.5) & (ex.sigma <= 2))
    assert set(metrics) == {
        f"stf/{n}/{b}"
        for n in ("ess", "active", "moved")
        for b in ("0-0.5", "0.5-2", "2-10", "10-inf")
    }
    target, _ = fill({"source": "full"}, ex, context(xflip=True))
    assert_target(target, ex, as_image(np.concatenate([SET, SET[:, :, ::-1]])))


def test_stream_is_the_batch_and_what_the_loader_brought():
    slot = stf.training(stf.Settings(source="stream", n=20), context(devices=2))
    assert slot.references == 2 * (20 - 4)
    given = {"reference": jnp.asarray(SET[20:32]), "reference_label": jnp.asarray(CLASSES[20:32])}
    ex = example(references=given, label=True)
    target, _ = fill({"source": "stream", "n": 20, "class_mask": False}, ex)
    known = np.concatenate([SET[:8], SET[20:32]])
    assert_target(target, ex, as_image(known))
    target, _ = fill({"source": "stream", "n": 20}, ex)
    classes = np.concatenate([CLASSES[:8], CLASSES[20:32]])
    assert_target(target, ex, as_image(known), CLASSES[:8, None] == classes[None])
    ex = example()
    assert_target(fill({"source": "stream", "n": 8}, ex)[0], ex, as_image(SET[:8]))


@pytest.mark.parametrize(
    "source,count", [("stream", 20), ("cache", 20), ("gather", 8), ("full", 50)]
)
def test_the_source_is_a_reference_exactly_once(source, count):
    """spec/stf.md 10.7. At very high noise all references weigh the same, so the effective sample
    size counts them.
    """
    given = {"reference": jnp.asarray(SET[20:32]), "reference_label": jnp.asarray(CLASSES[20:32])}
    ex = example(references=given if source == "stream" else None, low=0.01)
    target, _ = fill({"source": source, "n": 20}, ex)
    np.testing.assert_allclose(target[0], ex.x0[0], atol=1e-6)  # it is there
    ex = ex.replace(sigma=jnp.full((8,), 1e5), xt=ex.x0 + 1e5 * ex.eps)
    target, metrics = fill({"source": source, "n": 20}, ex)
    np.testing.assert_allclose(metrics["stf/ess/10-inf"][0], count, rtol=1e-4)
    known = {"stream": [*range(8), *range(20, 32)], "gather": range(8), "full": range(50)}.get(
        source
    )
    if known:
        np.testing.assert_allclose(
            target, np.broadcast_to(as_image(SET[list(known)]).mean(0), target.shape), atol=1e-3
        )


def test_half_of_a_caches_references_are_mirrored():
    """At very high noise the target is their mean, of many: that of the set both ways round."""
    ex = example()
    ex = ex.replace(sigma=jnp.full((8,), 1e5), xt=ex.x0 + 1e5 * ex.eps)
    target, _ = fill({"source": "cache", "n": 4000}, ex, context(xflip=True))
    mean = as_image(SET).mean(0)
    both = (mean + mean[:, ::-1]) / 2
    assert np.abs(both - mean).max() > 0.08
    np.testing.assert_allclose(target, np.broadcast_to(both, target.shape), atol=0.04)


def test_loss_is_zero_at_the_target_and_edms_without_stf():
    """spec/stf.md 10.12, in the step's own words: nothing but the target changes, and no gradient
    passes through it.
    """
    ex, law = example(), noise.edm()
    slot = stf.training(stf.Settings(source="full"), context())
    on, off, own = slots.combine([slot]), slots.combine([]), owned(slot)

    def loss(methods, ex, x0_hat):
        return objective.denoising_loss(methods, law, ex, x0_hat, None, lambda _: own)[0]

    at_target = jax.jit(lambda ex: loss(on, ex, slot.target(ex, own)[0]))
    np.testing.assert_allclose(at_target(ex), 0, atol=1e-9)
    weight = (np.square(ex.sigma) + 0.25) / np.square(0.5 * ex.sigma)
    for methods, target in ((off, ex.x0), (on, fill({"source": "full"}, ex)[0])):
        truth = weight * np.square(0.9 * ex.xt - target).sum((1, 2, 3))
        slope = (2 * weight * ((0.9 * ex.xt - target) * ex.xt).sum((1, 2, 3))).sum()
        total = jax.jit(jax.value_and_grad(lambda c, f=methods: jnp.sum(loss(f, ex, c * ex.xt))))
        np.testing.assert_allclose(total(0.9), (truth.sum(), slope), rtol=1e-5)


def test_cache_is_the_source_and_independent_draws():
    ex = example()
    np.testing.assert_array_equal(fill({"source": "cache", "n": 1}, ex)[0], ex.x0)
    target, _ = fill({"source": "cache", "n": 20}, ex)
    key = randomness.fold_in_name(
        jax.random.fold_in(randomness.fold_in_name(ex.key, "stf"), 0), "rows"
    )
    rows = np.asarray(jax.random.randint(key, (19,), 0, 50))
    mask = np.concatenate([np.eye(8, dtype=bool), np.ones((8, 19), bool)], 1)
    assert_target(target, ex, as_image(np.concatenate([SET[:8], SET[rows]])), mask)
    # Another accumulation round: other draws, known by the group's first example.
    later = ex.replace(index=ex.index + 8)
    key = randomness.fold_in_name(
        jax.random.fold_in(randomness.fold_in_name(ex.key, "stf"), 8), "rows"
    )
    others = np.asarray(jax.random.randint(key, (19,), 0, 50))
    assert (others != rows).any()
    target, _ = fill({"source": "cache", "n": 20}, later)
    assert_target(target, ex, as_image(np.concatenate([SET[:8], SET[others]])), mask)
    low = example(low=0.01)
    np.testing.assert_allclose(fill({"source": "cache", "n": 20}, low)[0][0], low.x0[0], atol=1e-6)


@pytest.mark.parametrize("source", ["gather", "cache", "stream", "full"])
def test_plans_agree(source):
    """pmap with 4 devices = global arrays on a mesh of 4, labels included; gather and full = one
    device as well.
    """
    given = {"reference": jnp.asarray(SET[10:30]), "reference_label": jnp.asarray(CLASSES[10:30])}
    ex = example(label=True, references=given if source == "stream" else None)
    settings = {"source": source, "n": 7}
    whole, _ = fill(settings, ex, context(devices=4))
    slot = stf.training(stf.Settings(**settings), context(devices=4, axis="data"))
    names = [
        n
        for n in ("x0", "image", "label", "sigma", "eps", "xt", "index", "references")
        if getattr(ex, n) is not None
    ]
    cut = jax.tree.map(lambda a: a.reshape(4, -1, *a.shape[1:]), {n: getattr(ex, n) for n in names})
    split = lambda a: np.reshape(a, (4, -1, *a.shape[1:]))
    divided = slot.constants is not None and slot.constants.divided
    own = jax.tree.map(split, owned(slot)) if divided else owned(slot)
    target = lambda fields, own: slot.target(ex.replace(**fields), own)[0]
    axes = (0, 0 if divided else None)
    run = jax.pmap(target, axis_name="data", in_axes=axes, devices=jax.devices()[:4])
    np.testing.assert_allclose(np.reshape(run(cut, own), whole.shape), whole, atol=1e-6)
    if source == "full":
        for kind in ("mesh", "sharded"):  # the latter's mesh has two axes
            mesh = parallel.make_plan(kind, 4).mesh
            found, _ = fill(settings, ex, context(devices=4, mesh=mesh))
            np.testing.assert_allclose(found, whole, atol=1e-6)
    if source in ("gather", "full"):
        np.testing.assert_allclose(fill(settings, ex)[0], whole, atol=1e-6)
        known = SET[:8] if source == "gather" else SET
        assert_target(whole, ex, as_image(known), CLASSES[:8, None] == CLASSES[None, : len(known)])


def labels_of_flips():
    augment = np.zeros((8, 9), np.float32)
    augment[::2, 0] = augment[2:5, 1] = 1
    augment[6, 7] = 0.4
    return augment


def test_matched_augmentation_flips_queries_and_targets():
    ex = example(augment=labels_of_flips())
    for source in ("full", "gather"):
        target, _ = fill({"source": source}, ex)
        back = ex.replace(xt=augmentation.flip(ex.xt, ex.augment))
        known = as_image(SET) if source == "full" else as_image(SET[:8])
        plain = np.arange(8) != 6
        assert_target(augmentation.flip(target, ex.augment), back, known, rows=plain)
        np.testing.assert_array_equal(target[6], ex.x0[6])  # a translated image keeps its own
    other = labels_of_flips()
    other[:, 0] = 1 - other[:, 0]
    mirrored = example(augment=other).replace(xt=ex.xt[:, :, ::-1], eps=ex.eps[:, :, ::-1])
    np.testing.assert_allclose(
        fill({"source": "full"}, mirrored)[0],
        fill({"source": "full"}, ex)[0][:, :, ::-1],
        atol=1e-6,
    )


def test_dsm_and_official_augmentation():
    ex = example(augment=labels_of_flips())
    target, metrics = fill({"source": "full", "augment": "dsm"}, ex)
    acted = np.any(labels_of_flips() != 0, axis=1)
    np.testing.assert_array_equal(target[acted], ex.x0[acted])
    np.testing.assert_array_equal(metrics["stf/ess/0-0.5"][0][acted], 1)
    assert_target(target, ex, as_image(SET), rows=~acted)
    target, _ = fill({"source": "gather", "augment": "official"}, ex)
    assert_target(target, ex, np.asarray(ex.x0))
    ex = example(augment=np.zeros((8, 9), np.float32))
    settings = {"source": "cache", "n": 20, "augment": "official"}
    same, _ = fill(settings, ex, context(augment=lambda keys, images: images))
    np.testing.assert_allclose(same, fill(settings | {"augment": "matched"}, ex)[0], atol=1e-6)
    upside, _ = fill(settings, ex, context(augment=lambda keys, images: images[:, ::-1]))
    assert np.abs(upside - same).max() > 1e-3


@pytest.mark.parametrize("source", ["cache", "full"])
def test_a_set_on_the_devices_lies_in_rows_of_numbers(source):
    """Else a TPU copies the whole set into another layout in every step."""
    slot = stf.training(stf.Settings(source=source, n=9), context())
    assert slot.constants.make()["image"].shape == (len(SET), SET[0].size)


def test_references_are_augmented_in_parts():
    """The parts' results are those of all images at once, whether or not they divide them."""
    pipe, images = augmentation.AugmentPipe(p=0.9), as_image(SET[:20])
    keys = jax.random.split(jax.random.key(3), 20)
    whole, _ = pipe.augment(keys, jnp.asarray(images))
    for part in (8, 20, 64):
        parts = augmented(pipe, part, keys, jnp.asarray(images))
        np.testing.assert_allclose(parts, whole, atol=1e-5)
    assert np.abs(whole - images).max() > 0.1


def test_dropped_labels_see_every_class():
    ex = example(label=True)
    label = ex.label.at[3].set(-1)
    target, _ = fill({"source": "full"}, ex.replace(label=label))
    mask = CLASSES[:8, None] == CLASSES[None]
    mask[3] = True
    assert_target(target, ex, as_image(SET), mask)


@pytest.mark.parametrize("source", ["full", "cache", "stream", "gather", "class"])
def test_images_that_have_no_class_meet_their_like(source):
    """Images without class are all black, the others white: at any noise their mean is black."""
    labels = np.where(np.arange(50) % 2 == 0, -1, CLASSES).astype(np.int32)
    images = np.where(labels < 0, 0, 255).astype(np.uint8)[:, None, None, None]
    images = np.broadcast_to(images, SET.shape)
    more = {"reference": jnp.asarray(images[8:16]), "reference_label": jnp.asarray(labels[8:16])}
    ex = example(references=more, low=3).replace(label=jnp.asarray(labels[:8]))
    clean = as_image(images[:8])
    ex = ex.replace(x0=jnp.asarray(clean), image=jnp.asarray(clean))
    settings = {"source": source} | ({} if source in ("full", "gather") else {"n": 16})
    told = {"source": from_arrays("half", images, labels), "label_dropout": 0.0}
    target, numbers = fill(settings, ex, context(**told))
    np.testing.assert_allclose(target, clean, atol=1e-5)
    assert max(float(jnp.max(v)) for v, _ in (numbers[k] for k in numbers if "ess" in k)) > 1.5
    # Hidden classes besides: which images a model sees without label is no part of the set.
    mixed = ex.replace(x0=-ex.x0)  # as if all had the other colour
    target, _ = fill(settings, mixed, context(**told | {"label_dropout": 0.5}))
    np.testing.assert_array_equal(target[::2], mixed.x0[::2])


@pytest.mark.parametrize(
    "change,message",
    [
        ({"source": "bank"}, "config.stf.source: unknown 'bank'"),
        ({"augment": "all"}, "config.stf.augment: unknown 'all'"),
        ({"source": "stream", "n": 7}, "config.stf.n: 7 given; expected at least 8"),
        (
            {"source": "stream", "n": 51},
            "config.stf.n: 51 given; expected at most 50 with stream, as the set has 50 ",
        ),
        ({"source": "cache", "n": 0}, "config.stf.n: 0 given"),
        (
            {"source": "full", "augment": "official"},
            "config.stf.augment: 'official' given; expected matched or dsm",
        ),
    ],
)
def test_wrong_settings_are_one_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        stf.training(stf.Settings(**change), context(augment=lambda keys, images: images))


def test_sources_of_data_that_do_not_fit_are_one_sentence():
    with pytest.raises(
        ValueError,
        match="config.stf.source: 'full' given; expected stream or gather.*not in memory",
    ):
        stf.training(
            stf.Settings(source="full"), context(source=types.SimpleNamespace(images=None))
        )
    vectors = context(
        source=from_arrays("vectors", SET, RNG(0).normal(size=(50, 3)).astype(np.float32))
    )
    with pytest.raises(ValueError, match="config.stf.class_mask: True given; expected false"):
        stf.training(stf.Settings(), vectors)
    stf.training(stf.Settings(class_mask=False), vectors)


def test_stream_refuses_sets_without_enough_other_images():
    """Per device: its images and as many others as are not in the global batch; devices may share
    those.
    """
    stream = {"source": "stream", "n": 46}
    assert stf.training(stf.Settings(**stream), context(devices=2)).references == 2 * 42
    with pytest.raises(ValueError, match="config.stf.n: 47 given; expected at most 46 with stream"):
        stf.training(stf.Settings(**stream | {"n": 47}), context(devices=2))
    stf.training(stf.Settings(**stream | {"n": 60}), context(b=60))  # nothing besides the batch
    with pytest.raises(ValueError, match="config.stf.n: 61 given; expected at most 60 with stream"):
        stf.training(stf.Settings(**stream | {"n": 61}), context(b=60))


@pytest.mark.parametrize("source", ["cache", "stream"])
def test_training_holds_no_float_copy_of_the_references(source):
    """b 128, n 4096, 32x32x3: 32 MB of temporaries, mirrored images included; as float32 they alone
    would take 50.
    """
    b, n, size = 128, 4096, (32, 32, 3)
    big = from_arrays("big", np.broadcast_to(np.uint8(0), (5000, *size)))
    ctx = context(b, image_shape=size, source=big, xflip=True, label_dim=0)
    slot = stf.training(stf.Settings(source=source, n=n), ctx)
    abstract = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    pixels, row, key = abstract(b, *size), abstract(b), jax.eval_shape(jax.random.key, 0)
    given = {
        "reference": abstract(n - b, *size, dtype=jnp.uint8),
        "reference_label": abstract(n - b, dtype=jnp.int32),
    }
    ex = slots.Example(
        x0=pixels,
        image=pixels,
        label=None,
        augment=None,
        sigma=row,
        eps=pixels,
        xt=pixels,
        index=abstract(b, dtype=jnp.int32),
        key=key,
        noise_key=key,
        references=given if source == "stream" else None,
    )
    frozen = {
        "image": abstract(50_000, *size, dtype=jnp.uint8),
        "label": abstract(50_000, dtype=jnp.int32),
    }
    own = slots.Own(frozen)
    program = jax.jit(lambda ex, own: slot.target(ex, own)[0]).lower(ex, own).compile()
    assert program.memory_analysis().temp_size_in_bytes <= 32e6
