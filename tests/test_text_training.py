"""Training on captions: SP's loss beside the same by hand, dropped captions, folders in and out."""

import dataclasses
import functools
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from ogdm_jax import cli, parallel, randomness
from ogdm_jax.config import ConfigError, replace
from ogdm_jax.data import batches, open_source
from ogdm_jax.data.tokens import TokenizerError
from ogdm_jax.interop import export, stable_diffusion
from ogdm_jax.models import TEXT
from ogdm_jax.training import example, loop, objective, texts
from ogdm_jax.training.state import TrainState
from ogdm_jax.training.task import DENOISER
from ogdm_jax.training.workdir import open_workdir
from tests.support import captions as support
from tests.support import networks, tiny

QUIET = {"log": lambda _: None}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of diffusers, sd, and latents with captions."""
    folder = tmp_path_factory.mktemp("texts")
    sd = support.pipeline(folder)
    support.encoded(support.pictures(folder / "set"), sd / "vae", folder / "latents")
    return folder


def config(place, *more):
    where = f"data.source=latents:{place}/latents", f"init.workdir={place}/sd"
    return support.config(*where, *more)


def build(place, *more, plan=None):
    workdir = epath.Path(place / "nothing")
    return DENOISER.build(
        config(place, *more), plan or parallel.make_plan("mesh", 1), workdir, print, None
    )


def shapes(run):
    return run.plan.shapes(jax.eval_shape(run.create, run.key))


def alpha_bar() -> np.ndarray:
    """Of scaled_linear with zero terminal SNR (2305.08891, algorithm 1)."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    root = np.sqrt(np.cumprod(1 - betas))
    return np.square((root - root[-1]) * root[0] / (root[0] - root[-1]))


def test_sp_is_the_papers_loss(place):
    """By hand in variance-preserving coordinates, from networks, tokens and draws; one row is pure
    noise.
    """
    run = build(place, "data.label_dropout=0.5")
    params, text, _ = texts.open_folder(place / "sd", run.config)
    moved = jax.tree.map(lambda leaf: leaf + 0.02, params)  # the model, beside its teacher
    batch = next(batches(run.source, 8, 0))
    draws = lambda key, name: randomness.uniform(randomness.example_keys(key, name, batch["index"]))
    found = lambda i: float(draws(jax.random.key(i), "sigma").max()) >= 0.999
    key = jax.random.key(next(i for i in range(2000) if found(i)))
    state = TrainState(jnp.int32(0), moved, None, {TEXT: text}, None, run.methods.init(run.key))
    constants = run.constants()["weights"]
    loss = objective.denoising(run.config, run.model, run.noise, run.methods, run.plan.gather).loss
    total, sums = jax.jit(loss)(moved, state, constants, batch, key)

    bar = jnp.asarray(alpha_bar(), jnp.float32)
    scales = lambda t: [jnp.sqrt(v)[:, None, None, None] for v in (bar[t], 1 - bar[t])]
    t, after = (
        jnp.floor(draws(key, name) * 1000).astype(int) for name in ("sigma", "sp/sigma_next")
    )
    assert t.max() == 999
    hidden = np.asarray(draws(key, "label_dropout")) < 0.5
    assert hidden.any() and not hidden.all()
    tokenizer = texts.open_words(run.config)
    written = [run.source.captions[row] for row in batch["row"]]
    tokens = tokenizer(["" if gone else one for gone, one in zip(hidden, written)])
    context = networks.run(run.model.text, text, tokens)
    x0 = example.clean_images(run.config, run.model, batch, key)
    eps = randomness.normal(randomness.example_keys(key, "noise", batch["index"]), x0.shape[1:])
    a, s = scales(t)
    xt = a * x0 + s * eps
    network = functools.partial(networks.run, run.model.network)
    v = network({"params": moved}, xt, t.astype(jnp.float32), context)
    clean, noise = a * xt - s * v, s * xt + a * v
    a, s = scales(after)
    judge = lambda x: network(
        {"params": params}, x, after.astype(jnp.float32), context, at="mid", method="features"
    )
    expected = jnp.mean(jnp.square(judge(a * clean + s * noise) - judge(a * x0 + s * eps)))
    assert 1e-6 < float(expected)
    np.testing.assert_allclose(total, expected, rtol=2e-4)
    assert "loss/sp" in sums


def test_captions_are_dropped_by_each_images_own_key(place):
    run = build(place, "data.label_dropout=0.25")
    n, key = 2048, jax.random.key(5)
    rows = np.arange(n) % len(run.source)
    batch = run.source.take(rows) | {"row": rows, "index": np.arange(n)}
    batch["empty"] = np.repeat(run.source.empty[None], n, 0)
    drawn = lambda part: np.asarray(
        example.draw_example(run.config, run.model, run.noise, part, key, key).label["prompt"]
    )
    tokens = drawn(batch)
    hidden = (tokens == run.source.empty).all(1)
    assert abs(hidden.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / n)
    np.testing.assert_array_equal(tokens[~hidden], batch["label"][~hidden])
    other = np.random.default_rng(0).permutation(n)[:64]
    np.testing.assert_array_equal(drawn({k: v[other] for k, v in batch.items()}), tokens[other])


def test_what_cannot_be_is_refused(place, tmp_path):
    """In one sentence, before anything is compiled; words that it advises are taken."""
    latents = f"data.source=latents:{place}/latents"
    refused = [
        (("methods=stf",), "methods: 'stf' given.*posterior mean is over images of all captions"),
        (("init.workdir=",), "init.workdir: '' given; expected a folder of diffusers, or of a run"),
        (("precondition.kind=adm", "noise.distribution=ddpm"), "--config.precondition.kind=v"),
        (("network.num_blocks=2",), "--config.network.num_blocks=1"),
        (("init.weights=params", "methods="), "ema or text, and no init.step"),
        (("data.source=digits",), "'digits' given with network.kind=sd; expected latents"),
    ]
    for words, said in refused:
        with pytest.raises(ConfigError, match=said):
            run = build(place, *words)
            loop._initial_weights(run, jax.eval_shape(run.create, run.key))
    other = ("precondition.zero_terminal=false", "noise.distribution=ddpm", "methods=")
    found, _, said = texts.initial(
        config(place, *other, "init.partial=true"),
        shapes(build(place, "methods=")),
    )
    assert "fine-tuning the U-Net" in said and jax.tree.leaves(found)
    run = build(place, "methods=", "init.weights=text")
    params, buffers, said = texts.initial(run.config, shapes(run))
    assert isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct) and "text encoder" in said
    tiny.assert_trees(buffers[TEXT], texts.open_folder(place / "sd", run.config)[1])
    noted = tiny.config("network.kind=dit", "data.augment=0", "network.num_heads=1", latents)
    plan = parallel.make_plan("mesh", 1)
    told = DENOISER.build(replace(noted, {"methods": ()}), plan, epath.Path(tmp_path), print, None)
    assert any("its captions are not used" in note for note in told.source.notes)


@pytest.mark.parametrize("references", [0, 4])
def test_reading_processes_hold_no_texts(place, references):
    """Of twelve million captions each of eight held 4.5 GiB; its batches are those of threads."""
    source = open_source(f"latents:{place}/latents", memory_limit=0)
    source = texts.tokenised(source, texts.open_words(config(place)))
    stream = batches(source, 4, seed=0, workers=1, extra_references=references)
    given = pickle.dumps(stream._for_a_process())
    assert source.captions[0].encode() not in given
    assert (source.labels.tobytes() in given) == bool(references)
    for step in range(2):
        found, expected = next(stream), stream.at(step)
        assert found.keys() == expected.keys()
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    stream.close()


def test_half_of_a_tokenizer_is_copied_again(place, tmp_path):
    """A full disk or a kill while a fresh run keeps it: every later start was refused."""
    whole = {path.name: path.read_bytes() for path in (place / "sd" / "tokenizer").iterdir()}
    kept, last = tmp_path / "tokenizer", "merges.txt" if "merges.txt" in whole else "tokenizer.json"
    kept.mkdir()  # nothing is in it yet
    assert texts.open_words(config(place), tmp_path).length == 77
    texts.keep(config(place), tmp_path)
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == whole
    (kept / last).unlink()
    with pytest.raises(TokenizerError, match="expected vocab.json and merges.txt"):
        texts.open_words(replace(config(place), {"init.workdir": ""}), tmp_path)


def test_long_captions_are_counted(place):
    source = open_source(f"latents:{place}/latents")
    long = dataclasses.replace(source, captions=["cat " * 90, *source.captions[1:]])
    found = texts.tokenised(long, texts.open_words(config(place)))
    assert found.notes == (
        "1 of 12 captions are longer than 77 tokens and lose their ends (caption 0 first)",
    )
    assert found.labels.shape == (12, 77) and found.labels.dtype == np.int32


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("sample.solver=plms", "sample.grid=leading", "precondition.zero_terminal=false"),
        ("precondition.kind=adm", "precondition.schedule=cosine", "sample.end=first"),
        ("precondition.zero_terminal=false", "sample.solver=dpmpp_2m_sde", "sample.eta=1"),
        ("precondition.zero_terminal=false", "sample.solver=unipc", "sample.order=3"),
        ("precondition.zero_terminal=false", "sample.solver=unipc", "sample.bh=bh1"),
        ("sample.solver=euler", "sample.start=ve"),
        ("sample.solver=ancestral", "sample.grid=linspace"),
        ("sample.solver=dpmpp_2m", "sample.grid=leading"),
    ],
)
def test_schedulers_are_read_as_they_are_written(more):
    """Settings -> scheduler_config.json -> settings: each of the sampler's."""
    given = support.config("sample.steps=50", *more)
    written = stable_diffusion.scheduler_config(given)
    found, notes = stable_diffusion.scheduler_settings(written)
    assert not notes and not stable_diffusion.unwritten(given, written)
    every = replace(given, {key: value for key, value in found.items() if "sample." in key})
    assert every.sample == given.sample
    for key in ("schedule", "kind", "zero_terminal", "diffusion_steps"):
        value = getattr(given.precondition, key)
        expected = value and given.precondition.kind == "v" if key == "zero_terminal" else value
        assert found[f"precondition.{key}"] == expected


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("sample.steps=30", "sample.eta=0.5"), "steps 30 (read as 50), eta 0.5 (read as 0.0)"),
        (("sample.solver=spndm",), "solver 'spndm' (read as 'ddim')"),
        (("sample.solver=plms",), "solver 'plms' (read as 'ddim')"),
        (("sample.solver=euler", "sample.end=first"), "start 'vp' (read as 've'), end 'first'"),
        (("sample.grid=leading", "sample.offset=0"), "offset 0 (read as 1)"),
        (("sample.grid=edm", "sample.rho=5"), "grid 'edm' (read as 'trailing'), sigma_min 0.02"),
        (("sample.solver=ancestral", "sample.variance=large"), "variance 'large' (read as 'auto')"),
        (("sample.clip=true",), "clip True (read as False)"),
    ],
)
def test_what_a_scheduler_cannot_hold_is_said(more, said):
    given = support.config("sample.steps=50", *more)
    left = stable_diffusion.unwritten(given, stable_diffusion.scheduler_config(given))
    assert left.startswith("the scheduler of diffusers does not hold these of sample: ")
    assert said in left
    with pytest.raises(ConfigError, match="rescale_timesteps: True given; expected false"):
        odd = {"precondition.rescale_timesteps": True, "precondition.diffusion_steps": 500}
        stable_diffusion.scheduler_config(replace(given, odd))


def test_a_pipeline_of_ours_is_known_again(place):
    """It may be written anew; that of others, whose index says no such thing, may not."""
    folder, index = epath.Path(place / "sd"), epath.Path(place / "sd" / stable_diffusion.INDEX)
    there = {path.name for path in folder.iterdir()}
    assert there == {path.name for path in stable_diffusion.written(folder)}
    export.check_free(stable_diffusion.written(folder), index)


@pytest.mark.slow
def test_a_run_as_its_users_have_it(place, tmp_path, capsys):
    """Trained, resumed bit for bit, drawn from prompts, exported, and trained from what it wrote."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = ("train.save_every=1 steps", "data.label_dropout=0.3")
    held = f"data.heldout=latents:{tmp_path}/held"
    other = support.pictures(tmp_path / "other", 5, seed=1)
    support.encoded(other, place / "sd/vae", tmp_path / "held")
    given = config(place, *more, "sample.every=2 steps", held, "evaluate.every=2 steps")
    _, one = loop.train(given, whole, **QUIET)
    loop.train(replace(given, {"train.duration": "1 steps"}), cut, **QUIET)
    _, two = loop.train(replace(given, {"init.workdir": f"{place}/sd"}), cut, **QUIET)
    tiny.assert_trees(jax.device_get(two), jax.device_get(one))
    line = [json.loads(text) for text in (whole / "metrics.jsonl").read_text().splitlines()][-1]
    assert np.isfinite([v for v in line.values() if isinstance(v, float)]).all()
    assert (whole / "samples" / "00000002.png").is_file()
    trained = open_workdir(whole)
    drawn = trained.sample(2, prompt=["a cat", "the dog"])
    assert drawn.shape == (2, 8, 8, 1) and np.isfinite(drawn).all()
    out = tmp_path / "x.npz"
    words = ["sample", "--workdir", str(whole), "--prompt", "a cat", "--guidance", "cfg"]
    assert not cli.main([*words, "--num", "2", "--out", str(out)])
    assert np.load(out)["images"].shape == (2, 8, 8, 1)
    for line, said in (
        (["sample", "--workdir", str(whole), "--out", str(out)], "--prompt: not given"),
        (["export", str(whole), "--out", f"{tmp_path}/x.pt"], "expected a FOLDER"),
        (["report", "--workdir", str(whole)], "draw those by ogdm sample --prompts FILE"),
    ):
        with pytest.raises(SystemExit):
            cli.main(line)
        assert said in capsys.readouterr().err
    assert not cli.main(["export", str(whole), "--out", f"{tmp_path}/sd"])
    assert "does not hold these of sample: steps 2 (read as 50)\n" in capsys.readouterr().out
    params, text, _ = texts.open_folder(tmp_path / "sd", config(place))
    tiny.assert_trees(params, jax.device_get(trained.params))
    tiny.assert_trees(text, jax.device_get(trained.buffers[TEXT]))
    further = config(place, f"init.workdir={tmp_path}/sd", "train.duration=1 steps")
    loop.train(further, tmp_path / "further", **QUIET)
    loop.train(
        replace(further, {"init.workdir": str(whole), "methods": ()}), tmp_path / "own", **QUIET
    )


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["mesh", "sharded", "pmap"])
def test_two_devices_are_one(place, plan):
    """One step of two devices has the numbers of one device's."""
    steps = []
    for kind, devices in (("mesh", 1), (plan, 2)):
        run = build(place, "data.label_dropout=0.5", plan=parallel.make_plan(kind, devices))
        params, buffers, _ = texts.initial(run.config, shapes(run))
        state = dataclasses.replace(run.init(), params=params, buffers=buffers)
        state = dataclasses.replace(state, ema=jax.tree.map(jnp.copy, params))
        batch = run.plan.place_batch(next(batches(run.source, 8, 0)))
        state, metrics = run.compile(state)(state, run.constants(), batch, run.key)
        steps.append((float(np.asarray(metrics["loss"]).ravel()[0]), run.plan.local_copy(state)))
    np.testing.assert_allclose(steps[1][0], steps[0][0], rtol=1e-5)
    tiny.assert_trees(steps[1][1].ema, steps[0][1].ema, atol=2e-6)


@pytest.mark.slow
def test_ogdm_trains_on_captions(place, tmp_path):
    """Its projections see the caption, its discriminator the latent alone, of at least 8x8. (DG,
    which judges by classes, is refused.)
    """
    pictures = support.pictures(tmp_path / "wide", side=16)
    latents = (
        f"data.source={support.encoded(pictures, place / 'sd/vae', tmp_path / 'wide_latents')}",
        "methods=ogdm",
        "ogdm.channel_base=64",
        "ogdm.channel_max=8",
        "ogdm.distribution=edm",
    )
    run = build(place, *latents, "precondition.zero_terminal=false", "init.partial=true")
    _, metrics = tiny.train(run, 1)
    known = [value for name, value in metrics.items() if not name.startswith("level/")]
    assert np.isfinite(known).all()  # a level that no image of the batch has is NaN
