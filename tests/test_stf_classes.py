"""STF's references by class: the law of the draws, the target against brute force, banks and plans,
the loader's part, and whole runs.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax import config as configs
from ogdm_jax.data import batches, from_arrays
from ogdm_jax.methods import contract, stf, stf_classes
from tests.support import tiny
from tests.support.oracles import brute_force

RNG = np.random.default_rng
SET = RNG(10).integers(0, 256, (50, 4, 4, 1), dtype=np.uint8)
CLASSES = RNG(11).integers(0, 3, 50).astype(np.int32)
SOURCE = from_arrays("fifty", SET, CLASSES)


def as_image(pixels):
    return (np.asarray(pixels, np.float64) / 127.5 - 1).astype(np.float32)


def example(b=8, sigma=None, step=5, label=CLASSES[:8], mates=None):
    clean = as_image(SET[:b])
    sigma = np.geomspace(0.3, 6, b).astype(np.float32) if sigma is None else np.full(b, sigma, "f4")
    eps = RNG(0).normal(size=clean.shape).astype(np.float32)
    return contract.Example(
        x0=jnp.asarray(clean),
        image=jnp.asarray(clean),
        label=jnp.asarray(label),
        augment=None,
        sigma=jnp.asarray(sigma),
        eps=jnp.asarray(eps),
        xt=jnp.asarray(clean + sigma[:, None, None, None] * eps),
        index=jnp.arange(b, dtype=jnp.int32),
        key=jax.random.key(step),
        noise_key=jax.random.key(6),
        mates=mates,
    )


def context(b=8, devices=1, axis=None, **more):
    fields = {"batch": b, "device_batch": b // devices, "devices": devices, "axis": axis}
    fields |= {
        "image_shape": (4, 4, 1),
        "xflip": False,
        "text": False,
        "augment": None,
        "mesh": None,
    }
    return types.SimpleNamespace(**fields | {"label_dim": 3, "source": SOURCE} | more)


def slot_of(ctx=None, **settings):
    return stf.training(stf.Settings(source="class", **settings), ctx or context())


def owned(slot):
    return contract.Own(None if slot.constants is None else slot.constants.make())


def fill(ex, ctx=None, **settings):
    slot = slot_of(ctx, **settings)
    return jax.jit(slot.target)(ex, owned(slot))


def truth(ex, i, references):
    """The posterior mean and the effective sample size of query i, float64."""
    return [v[0] for v in brute_force(ex.xt[i : i + 1], ex.sigma[i : i + 1], references)]


ORDERED = SET[np.argsort(CLASSES, kind="stable")]


@pytest.mark.parametrize("chunk", [0, 5])
def test_each_image_meets_itself_and_draws_from_its_class(chunk):
    ex = example()
    target, metrics = fill(ex, n=20, chunk=chunk, bins=(100.0,))
    drawn = np.asarray(stf_classes.rows(context(), ex, 19))
    assert drawn.shape == (8, 19)
    ordered = np.sort(CLASSES)
    for i in range(8):
        assert (ordered[drawn[i]] == CLASSES[i]).all()
        known = as_image(np.concatenate([SET[i : i + 1], ORDERED[drawn[i]]]))
        mean, ess = truth(ex, i, known)
        np.testing.assert_allclose(np.ravel(target[i]), np.ravel(mean), atol=1e-5)
        np.testing.assert_allclose(metrics["stf/ess/0-100"][0][i], ess, rtol=1e-4)
    again, _ = fill(ex, n=20, chunk=chunk)
    np.testing.assert_array_equal(target, again)
    assert (stf_classes.rows(context(), example(step=6), 19) != drawn).any()


def test_as_many_references_as_set_with_a_thousand_classes():
    """The effective sample size counts them where all weigh the same; a shared batch has few."""
    labels = np.repeat(np.arange(1000, dtype=np.int32), 2)
    images = RNG(1).integers(0, 256, (2000, 4, 4, 1), dtype=np.uint8)
    source = from_arrays("thousand", images, labels)
    ex = example(sigma=1e5, label=labels[:8])
    ctx = context(source=source, label_dim=1000)
    for n in (1, 16, 64):
        ess = fill(ex, ctx, n=n, bins=(1.0,))[1]["stf/ess/1-inf"][0]
        np.testing.assert_allclose(ess, n, rtol=1e-4)
    shared = stf.training(stf.Settings(source="cache", n=64, bins=(1.0,)), ctx)
    assert shared.target(ex, owned(shared))[1]["stf/ess/1-inf"][0].max() < 4


def test_many_draws_give_the_posterior_of_the_class():
    ex = example()
    target, _ = fill(ex, n=20_000)
    for i in range(8):
        mean, _ = truth(ex, i, as_image(SET[CLASSES == CLASSES[i]]))
        np.testing.assert_allclose(np.ravel(target[i]), np.ravel(mean), atol=0.03)


def test_draws_are_uniform_over_the_class_or_the_set():
    label = CLASSES[:8].copy()
    label[3] = -1  # hidden
    drawn = np.asarray(stf_classes.rows(context(), example(label=label), 20_000))
    for i in (0, 3):
        size = 50 if i == 3 else int((CLASSES == CLASSES[i]).sum())
        values, counts = np.unique(drawn[i], return_counts=True)
        assert len(values) == size
        assert np.square(counts - 20_000 / size).sum() / (20_000 / size) < size + 5 * size**0.5


def test_hidden_labels_meet_the_set_and_low_noise_is_the_image():
    label = CLASSES[:8].copy()
    label[3] = -1
    ex = example(label=label)
    target, _ = fill(ex, n=20_000)
    mean, _ = truth(ex, 3, as_image(SET))
    np.testing.assert_allclose(np.ravel(target[3]), np.ravel(mean), atol=0.03)
    low = example(sigma=0.002)
    np.testing.assert_allclose(fill(low, n=20)[0], low.x0, atol=1e-6)  # draws may repeat it


@pytest.mark.slow_cases("True-resident", "False-divided")
@pytest.mark.parametrize("bank", ["resident", "divided"])
@pytest.mark.parametrize("xflip", [False, True])
def test_banks_and_plans_agree(bank, xflip):
    ex = example()
    whole, _ = fill(ex, context(xflip=xflip), n=9)
    ctx = {"devices": 4, "xflip": xflip}
    slot = slot_of(context(axis="data", **ctx), n=9, bank=bank)
    names = ("x0", "image", "label", "sigma", "eps", "xt", "index")
    cut = {n: getattr(ex, n).reshape(4, 2, *getattr(ex, n).shape[1:]) for n in names}
    own = owned(slot)
    assert slot.constants.divided == (bank == "divided")
    assert own.constants["image"].ndim == 2  # else a TPU copies the set before it draws
    if slot.constants.divided:
        assert len(own.constants["image"]) == 52
        own = jax.tree.map(lambda a: np.reshape(a, (4, -1, *a.shape[1:])), own)
    run = jax.pmap(
        lambda fields, own: slot.target(ex.replace(**fields), own)[0],
        axis_name="data",
        in_axes=(0, 0 if slot.constants.divided else None),
        devices=jax.devices()[:4],
    )
    np.testing.assert_allclose(np.reshape(run(cut, own), whole.shape), whole, atol=1e-6)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:4]), ("data",))
    got, _ = fill(ex, context(mesh=mesh, **ctx), n=9, bank=bank)
    np.testing.assert_allclose(got, whole, atol=1e-6)


def test_the_loader_brings_images_of_the_class():
    """The same for every process count and after a restart; never of another class."""
    marked = np.broadcast_to(np.arange(50, dtype=np.uint8)[:, None, None, None], (50, 4, 4, 1))
    source = from_arrays("marked", np.ascontiguousarray(marked), CLASSES)
    first = batches(source, 8, seed=3, mates=6)
    items = [next(first) for _ in range(3)]
    for item in items:
        assert item["mates"].shape == (8, 6, 4, 4, 1)
        rows = item["mates"][:, :, 0, 0, 0]
        np.testing.assert_array_equal(CLASSES[rows], np.repeat(item["label"][:, None], 6, 1))
    assert (items[0]["mates"] != items[1]["mates"]).any()
    later = batches(source, 8, seed=3, mates=6, start_step=2)
    np.testing.assert_array_equal(next(later)["mates"], items[2]["mates"])
    parts = [next(batches(source, 8, 3, 2, p, 2, mates=6))["mates"] for p in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts), items[2]["mates"])
    np.testing.assert_array_equal(next(batches(source, 8, 3, 2))["image"], items[2]["image"])
    drawn = np.concatenate([first.at(s)["mates"][:, :, 0, 0, 0].ravel() for s in range(200)])
    assert len(np.unique(drawn)) == 50


def test_what_the_loader_brought_is_the_reference_batch():
    label = CLASSES[:8].copy()
    label[2] = -1
    mates = SET[RNG(4).integers(0, 50, (8, 11))]
    ex = example(label=label, mates=jnp.asarray(mates))
    slot = slot_of(context(), bank="read", n=12)
    assert slot.mates == 11 and slot.constants is None
    target, _ = jax.jit(slot.target)(ex, owned(slot))
    for i in range(8):
        known = as_image(np.concatenate([SET[i : i + 1], mates[i]]))
        mean = as_image(SET[2]) if i == 2 else truth(ex, i, known)[0]
        np.testing.assert_allclose(np.ravel(target[i]), np.ravel(mean), atol=1e-5)


@pytest.mark.parametrize(
    "change,settings,message",
    [
        ({"label_dim": 0}, {}, "stf.source: 'class' given; .*data.conditional"),
        ({}, {"class_mask": False}, "stf.class_mask: False given; expected true"),
        ({}, {"bank": "other"}, "stf.bank: unknown 'other'"),
        (
            {"augment": lambda keys, images: images},
            {"augment": "official"},
            "stf.augment: 'official' given; expected matched or dsm with stf.source class",
        ),
        (
            {"source": types.SimpleNamespace(images=None, labels=CLASSES, label_size=0)},
            {},
            "stf.bank: 'resident' given; expected read",
        ),
        (
            {"source": types.SimpleNamespace(images=SET, labels=None, label_size=0)},
            {},
            "stf.source: 'class' given; expected a source whose labels are known",
        ),
    ],
)
def test_wrong_settings_are_one_sentence(change, settings, message):
    with pytest.raises(ValueError, match=message):
        slot_of(context(**change), **settings)


def test_the_authors_settings_are_a_preset():
    settings = stf.preset("official")
    assert settings["augment"] == "official" and not settings["class_mask"]
    slot = stf.training(stf.Settings(**settings), context(b=2))
    assert slot.references == 14  # 8 x 2 - 2: the authors' 1,024 for the 128 images of a device
    two = stf.training(stf.Settings(**settings), context(b=4, devices=2))
    assert two.references == 28
    with pytest.raises(ValueError, match="stf.n: 20 given; expected none with stf.per_image=8"):
        stf.Settings(**settings | {"n": 20})
    with pytest.raises(configs.ConfigError, match="stf.preset: unknown 'paper'"):
        stf.preset("paper")


@pytest.mark.slow  # test_banks_and_plans_agree has its slot
@pytest.mark.parametrize("bank,plan", [("divided", "mesh"), ("read", "pmap")])
def test_runs_train(bank, plan):
    words = ("methods=stf", "data.conditional=true", "stf.source=class", "stf.n=5")
    words += (f"stf.bank={bank}", tiny.ONE_LEVEL, "data.augment=0", "noise.mean=1")
    words += ("optim.accumulate=2",)
    run = tiny.build(*words, plan=plan, devices=2)
    _, metrics = tiny.train(run, 2)
    assert np.isfinite(metrics["loss"]) and 1 < metrics["stf/ess/2-10"] <= 5
