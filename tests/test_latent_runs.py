"""Runs on latents: decoded samples and sheets, STF over draws, guidance through the decoder."""

import ast
import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image
from safetensors.numpy import save_file

from ogdm_jax import cli, parallel
from ogdm_jax import config as configs
from ogdm_jax.cli import data as command
from ogdm_jax.cli import sample
from ogdm_jax.cli import study as command_study
from ogdm_jax.config import ConfigError
from ogdm_jax.data import batches, moments, open_source, pictures, spread
from ogdm_jax.data.latents import SIDECAR
from ogdm_jax.discriminator import generated
from ogdm_jax.discriminator.run import build, planned
from ogdm_jax.discriminator.train import TASK
from ogdm_jax.interop import export, load_pretrained
from ogdm_jax.methods.contract import Own
from ogdm_jax.pixels import to_uint8
from ogdm_jax.sampling.decode import decode
from ogdm_jax.study import runs as study
from ogdm_jax.training import decoding, evaluate, example, heldout, loop
from ogdm_jax.training import run as runs
from ogdm_jax.training.workdir import open_pixels, open_workdir
from ogdm_jax.training.workdir import open_source as source_of
from tests.support import latents as support
from tests.support import tiny

SMALL = (
    *("network.kind=dit", "network.model_channels=8", "network.num_blocks=1", "network.patch=2"),
    *("network.num_heads=1", "data.augment=0", "data.xflip=true", "methods="),
    *("train.duration=2 steps", "train.save_every=0 steps", "log.every=1 steps"),
    "parallel.devices=1",
)
DG = (
    *("train.duration=2 steps", "train.save_every=0 steps", "log.every=1 steps", "data.batch=8"),
    *("sample.every=2 steps", "sample.solver=heun", "sample.steps=3", "dg.num=24", "dg.weights=()"),
    *("network.model_channels=32", "network.channel_mult=(1,)", "network.attn_resolutions=()"),
    "log.tensorboard=false",
    *("optim.decay=0 steps", "evaluate.num=24", "evaluate.every=2 steps", "parallel.devices=2"),
)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    support.autoencoder(folder / "vae")
    out = folder / "set"
    words = ["encode", "digits/test", "--vae", f"{folder}/vae", "--out", str(out)]
    assert command.main(words) == 0
    return out


@pytest.fixture(scope="module")
def workdir(latents):
    place = latents.parent / "run"
    loop.train(tiny.config(*SMALL, f"data.source=latents:{latents}"), place, log=lambda _: None)
    return place


def test_samples_are_decoded_latents(workdir, latents):
    trained, raw = open_workdir(workdir), open_workdir(workdir, vae=None)
    pictures, z = trained.sample(4), raw.sample(4)
    assert pictures.shape == (4, 8, 8, 1) and z.shape == (4, 4, 4, 2)
    decoder = decoding.open_decoder(trained.config, source_of(trained.config).latents)
    assert (decoder.network.scale, decoder.network.shift) == (0.6, 0.2)
    expected = decode(decoder.network, decoder.variables, jnp.asarray(z))
    np.testing.assert_allclose(pictures, expected, atol=2e-5 * float(jnp.abs(expected).max()))
    assert list((workdir / "samples").glob("*.png"))
    pixels = open_pixels(trained.config)
    np.testing.assert_array_equal(pixels.images, open_source("digits/test").images)


def test_the_card_of_an_exported_folder_shows_decoded_samples(workdir, tmp_path):
    """And how to decode; the autoencoder's weights are not among the network's."""
    assert not cli.main(["export", str(workdir), "--out", str(tmp_path / "hub"), "--card"])
    assert pictures.read(tmp_path / "hub" / "samples.png").shape[2] == 1
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "model of 8x8x1 images" in card and "coder.clone(scale=0.6, shift=0.2)" in card
    ast.parse(card.split("```python\n")[1].split("```")[0])
    about = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert about["dropout"] == 0 and load_pretrained(tmp_path / "hub").network.depth == 1


def test_latents_are_kept_on_demand(workdir, tmp_path, capsys):
    line = ["sample", "--workdir", str(workdir), "--num", "4", "--latents", "--out"]
    assert not cli.main([*line, f"{tmp_path}/z.npz"])
    with np.load(tmp_path / "z.npz") as kept:
        np.testing.assert_array_equal(kept["images"], open_workdir(workdir, vae=None).sample(4))
    with pytest.raises(SystemExit):
        cli.main([*line, f"{tmp_path}/z.png"])
    assert "FILE.npz with --latents" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*line, f"{tmp_path}/z.npz", "--animate", f"{tmp_path}/z.webp"])
    assert "--animate: given; expected decoded images" in capsys.readouterr().err


def test_the_autoencoder_is_known_again(workdir, latents, tmp_path):
    config = open_workdir(workdir, vae=None).config
    told = source_of(config).latents
    other = support.autoencoder(tmp_path / "other", 1)
    moved = dataclasses.replace(told, vae={**told.vae, "path": str(other)})
    with pytest.raises(
        ConfigError, match=r"has other weights .*expected these, or this one by name"
    ):
        decoding.open_decoder(config, moved)
    assert decoding.open_decoder(config, moved, str(other)).path == str(other)
    gone = dataclasses.replace(told, vae={**told.vae, "path": "/nothing"})
    with pytest.raises(ConfigError, match="is no longer at /nothing"):
        decoding.open_decoder(config, gone)
    with pytest.raises(ConfigError, match=r"data.vae: '' given"):
        decoding.open_decoder(config, dataclasses.replace(told, vae={}))
    with pytest.raises(ConfigError, match="^--vae: '' given"):
        decoding.open_decoder(config, dataclasses.replace(told, vae={}), "", "--vae")


def test_a_study_takes_an_autoencoder_that_moved(workdir, latents, tmp_path):
    """What it advises works: said before anything is trained, and taken where runs are opened."""
    old, new = latents.parent / "vae", tmp_path / "vae"
    line = ["--config", f"one={tiny.ROOT}/configs/base.py", "--seeds", "0", "--num", "8"]
    line += ["--out", f"{tmp_path}/out", "--features", "digits"]
    line += [f"--one.{text}" for text in (*SMALL, f"data.source=latents:{latents}")]

    def ruler(*more):
        args, rest = command_study.parse([*line, *more])
        arms = command_study.read_arms(args.config, rest, [0])
        return arms[0], command_study.open_ruler(
            args, arms, [0], command_study.read_ways(args, arms, 0)
        )

    old.rename(new)
    try:
        with pytest.raises(ConfigError, match="--vae: not given, and the autoencoder"):
            ruler()
        arm, made = ruler("--vae", str(new))
        opened = study.opened(arm, workdir, "newest", study.PLAIN, made.vae)
        other = ruler("--vae", str(support.autoencoder(tmp_path / "other", 1)))[1]
    finally:
        new.rename(old)
    assert opened.model.autoencoder is not None
    words = opened.settings()
    assert "autoencoder" not in made.protocol(opened, words)  # the same one, elsewhere
    assert other.protocol(opened, words)["autoencoder"] == other.decoder != ""


def test_without_the_pixels_decoded_means_stand_for_them(latents, caplog, monkeypatch):
    source = open_source(f"latents:{latents}")
    gone = dataclasses.replace(
        source, latents=dataclasses.replace(source.latents, pixels={"name": "folder:/nothing"})
    )
    decoder = decoding.open_decoder(tiny.config(), source.latents)
    found = decoding.pixels(gone, lambda: decoder)
    assert found.images.shape == (len(source), 8, 8, 1) and "compared with decoded" in caplog.text
    np.testing.assert_array_equal(found.labels, source.labels)
    assert decoding.pixels(source, lambda: None).name == "digits/test"
    monkeypatch.setattr(decoding, "MOST", 140)  # of a larger set a part, each with its own label
    part, rows = decoding.pixels(gone, lambda: decoder), spread(len(source), 140)
    np.testing.assert_array_equal(part.images, found.images[rows])
    np.testing.assert_array_equal(part.labels, source.labels[rows])


def _example(latents, *more):
    """(run, example, constants) of a step of STF; the key of the step is 3."""
    config = tiny.config(*SMALL, "methods=stf", f"data.source=latents:{latents}", *more)
    run = runs.build(config, source_of(config), parallel.make_plan("mesh", 1))
    batch = {
        name: jnp.asarray(value)
        for name, value in next(
            batches(run.source, config.data.batch, 0, extra_references=run.methods.references)
        ).items()
    }
    key = jax.random.key(3)
    made = example.draw_example(config, run.model, run.noise, batch, key, key)
    whole = run.methods.constants()
    constants = (whole["whole"] | whole["divided"]).get("stf")
    return run, made, batch, constants


def test_stf_full_is_the_posterior_mean_over_the_steps_draws(latents):
    run, made, batch, constants = _example(latents, "stf.source=full")
    target, _ = run.methods.target.target(made, Own(constants))
    source, rows = run.source, np.arange(len(run.source))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
        example.randomness.fold_in_name(made.key, "latent"), rows
    )
    views = [
        moments.draw(source.latents, jnp.asarray(source.images), keys, jnp.full(len(rows), view))
        for view in (False, True)
    ]
    bank = np.concatenate([np.asarray(view, np.float64) for view in views]).reshape(
        2 * len(rows), -1
    )
    x0 = np.asarray(made.x0, np.float64).reshape(len(made.x0), -1)
    nearest = np.abs(x0[:, None] - bank[None]).max(-1).min(1)
    assert nearest.max() == 0  # the batch's own samples are among them
    xt, sigma = np.asarray(made.xt, np.float64).reshape(len(x0), -1), np.asarray(made.sigma)
    weight = -((xt[:, None] - bank[None]) ** 2).sum(-1) / (2.0 * sigma[:, None] ** 2)
    weight = np.exp(weight - weight.max(1, keepdims=True))
    expected = (weight / weight.sum(1, keepdims=True)) @ bank
    np.testing.assert_allclose(np.asarray(target).reshape(len(x0), -1), expected, atol=2e-3)


@pytest.mark.slow_cases("stream", "cache")
@pytest.mark.parametrize("where", ["cache", "stream", "class", "gather"])
def test_stf_targets_lie_among_samples(latents, where):
    """At a low level the target is the example's own sample; at a high one the mean of the set."""
    more = [f"stf.source={where}", "stf.n=200"] if where != "gather" else ["stf.source=gather"]
    more += ["data.conditional=true", "stf.class_mask=true"] if where == "class" else []
    run, made, _, constants = _example(latents, *more)
    for sigma in (1e-3, 1e3):
        level = jnp.full_like(made.sigma, sigma)
        at = made.replace(sigma=level, xt=made.x0 + sigma * made.eps)
        target, _ = run.methods.target.target(at, Own(constants))
        if sigma < 1:
            np.testing.assert_allclose(target, made.x0, atol=1e-5)
        else:
            assert np.asarray(target).std() < 0.8 * np.asarray(made.x0).std()


def test_guidance_through_the_decoder_restores(workdir, tmp_path, capsys):
    """The command runs, and the measured pixels come nearer than without guidance."""
    line = ["sample", "--workdir", str(workdir), "--task", "inpaint", "--input", "digits"]
    line += ["--num", "2", "--solver", "ddim", "--eta", "1", "--steps", "6", "--guidance", "dsg"]
    assert not cli.main([*line, "--dsg.rate", "1", "--out", f"{tmp_path}/r.png"])
    assert "residual" in capsys.readouterr().out


def test_presets_of_pixels_do_not_clip_latents(workdir, tmp_path, capsys):
    """Their clipping is off, with a word; asked for, it is refused at the one door of the sampler."""
    line = ["--workdir", str(workdir), "--task", "inpaint", "--input", "digits", "--num", "2"]
    line += ["--out", f"{tmp_path}/r.png"]
    for preset in ("inpaint_20", "dps_inpaint"):
        plan = sample.read(sample.parser().parse_args([*line, "--preset", preset]))
        (chosen,) = plan.request.settings.values()
        assert not chosen.clip_loss and not chosen.clip_mean
        said = f"without --{chosen.GROUP}.clip_loss, --{chosen.GROUP}.clip_mean, as latents have"
        assert said in capsys.readouterr().err
    for words, said in (
        (("--preset", "inpaint_20", "--dsg.clip_mean"), "--dsg.clip_mean: True given; expected"),
        (("--guidance", "dsg", "--clip"), "sample.clip: True given; expected false with latents"),
    ):
        with pytest.raises(ConfigError, match=said):
            sample.read(sample.parser().parse_args([*line, *words]))
    config = tiny.config(*SMALL, f"data.source=latents:{workdir.parent}/set", "sample.clip=true")
    with pytest.raises(ConfigError, match="sample.clip: True given; expected false"):
        loop.train(config, tmp_path / "run", log=lambda _: None)


def test_a_published_dit_becomes_a_run_with_its_autoencoder(workdir, latents, tmp_path, capsys):
    """Weights in the authors' names give the samples of the run that they are from."""
    trained = open_workdir(workdir)
    state = export.to_torch(trained.model.network, {"params": trained.params})
    save_file(state, tmp_path / "dit.safetensors")
    words = ["convert", f"{tmp_path}/dit.safetensors", "--out", f"{tmp_path}/new"]
    words += ["--set", "heads=1", "--set", "img_resolution=4"]
    words += ["--config.data.source=latents:DIR"]
    with pytest.raises(SystemExit):
        cli.main(words)
    assert "config.data.vae: '' given; expected the autoencoder" in capsys.readouterr().err
    words += [f"--config.data.vae={latents.parent}/vae"]
    with pytest.raises(SystemExit):
        cli.main([*words, "--config.precondition.sigma_data=0.7"])
    assert "config.precondition.sigma_data: 0.7 given; expected" in capsys.readouterr().err
    cli.main(words)
    new = open_workdir(tmp_path / "new")
    assert new.sample(2, steps=2).shape == (2, 8, 8, 1)
    assert new.model.autoencoder == trained.model.autoencoder
    jax.tree.map(np.testing.assert_array_equal, new.params, trained.params)


@pytest.fixture(scope="module")
def discriminator(workdir):
    """A folder of two steps of DG on the run's latents, evaluated once, and its log."""
    place, lines = workdir.parent / "dg", []
    config = configs.load(tiny.ROOT / "configs" / "digits_dg.py", (*DG, f"dg.prior={workdir}"))
    run, state = loop.train(config, place, lines.append, TASK)
    assert int(state.step) == 2
    return place, run, lines


def test_a_discriminators_run_is_measured_by_the_shape_of_decoded_pictures(workdir):
    config = configs.load(tiny.ROOT / "configs" / "digits_dg.py", (*DG, f"dg.prior={workdir}"))
    prior = open_workdir(workdir, vae=None).config
    run = planned(config, source_of(prior), parallel.make_plan("mesh", 1))
    run = decoding.with_decoder(run, prior.data.vae)
    evaluate.check_images(run, (8, 8, 1))
    with pytest.raises(ConfigError, match=r"images of \(8, 8, 1\) .* and not of \(4, 4, 2\)"):
        evaluate.check_images(run, (4, 4, 2))


@pytest.mark.slow  # on pixels: test_dg_training.py; of latents: dit_sampling_latent_disc
def test_a_discriminator_of_latents_trains(discriminator):
    """Its generated side is what the prior draws, its real side draws of either view; samples that
    are judged are decoded."""
    place, run, _ = discriminator
    real, drawn = run.kept[0], generated.read(place / "samples.npz", None, run.source.latents)
    seeds = generated.FIRST_SEED + np.arange(24)
    z = np.concatenate(list(run.prior.batches(run.config.sample, seeds)))
    keys = jax.random.split(jax.random.key(0), 24)
    assert drawn.images.shape == (24, 1, *real.shape)  # a sample once, in memory, too
    items = real.latents.item_of(drawn.images[:, 0])
    for mirrored in (None, jnp.ones(24, bool)):
        found = moments.draw(real.latents, jnp.asarray(items), keys, mirrored)
        np.testing.assert_allclose(found, z, atol=2e-5 * np.abs(z).max())
    batch, planned = next(run.batches(0, 1)), jax.eval_shape(run.example_batch)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in planned.items()
    }
    assert real.dtype == np.float16 and drawn.dtype == np.float32
    assert np.asarray(Image.open(place / "samples.png")).shape[0] > 8
    report = json.loads((place / "evaluation.json").read_text())
    assert (
        report["features"] == "fd_digits" and np.isfinite([report["fd"], report["unguided"]]).all()
    )


@pytest.mark.slow
def test_a_discriminator_of_latents_guides(discriminator, workdir, tmp_path, capsys):
    """The command knows its prior again, though it decodes, and draws other pictures than without."""
    line = ["sample", "--workdir", str(workdir), "--num", "4", "--solver", "heun", "--steps", "3"]
    line += ["--guidance", "dg", "--dg.discriminator", str(discriminator[0]), "--dg.weight", "50"]
    assert not cli.main([*line, "--out", f"{tmp_path}/x.npz"])
    assert "differ in" not in "".join(capsys.readouterr())
    plain = open_workdir(workdir).sample(4, solver="heun", steps=3)
    with np.load(tmp_path / "x.npz") as found:
        assert found["images"].shape == plain.shape == (4, 8, 8, 1)
        assert (found["images"] != to_uint8(plain)).any()


def test_a_discriminator_wants_the_priors_latents(workdir, latents, tmp_path):
    config = configs.load(tiny.ROOT / "configs" / "digits_dg.py", (*DG, f"dg.prior={workdir}"))
    told = json.loads((latents / SIDECAR).read_text())
    for name, changes, words in (
        ("scaled", {"scale": 0.5}, "scale 0.5 and 0.6"),
        ("others", {"views": 1}, "no latents of the mirrored images"),
    ):
        shutil.copytree(latents, tmp_path / name)
        if name == "others":
            for file in (tmp_path / name).glob("*.array_record"):
                file.unlink()
            np.save(tmp_path / name / "all.npy", np.zeros((40, 4, 4, 4), np.float32))
            np.save(tmp_path / name / "labels.npy", np.arange(40) % 10)
        (tmp_path / name / SIDECAR).write_text(json.dumps(told | changes))
        other = configs.replace(config, {"data.source": f"latents:{tmp_path / name}"})
        with pytest.raises(ConfigError, match=words):
            build(other, parallel.make_plan("mesh", 1), epath.Path(tmp_path / "run"))


def test_evaluation_without_a_name_is_of_the_pixels(workdir, tmp_path, capsys):
    line = ["sample", "--workdir", str(workdir), "--num", "12", "--evaluate", "--out"]
    assert not cli.main([*line, f"{tmp_path}/x.npz"])
    assert '"features": "fd_test"' in capsys.readouterr().out


def test_finished_latents_are_not_drawn_again(workdir, tmp_path, capsys, monkeypatch):
    line = ["sample", "--workdir", str(workdir), "--num", "4", "--latents"]
    assert not cli.main([*line, "--out", f"{tmp_path}/z.npz"])
    capsys.readouterr()
    assert not cli.main([*line, "--out", f"{tmp_path}/z.npz"])
    assert "4 of 4 images are in" in capsys.readouterr().err
    for more, words in (
        (["--animate", f"{tmp_path}/a.webp"], "--animate: given; expected decoded images"),
        (["--clip"], "config.sample.clip: True given; expected false with latents"),
    ):
        with pytest.raises(SystemExit):
            cli.main([*line, *more, "--out", f"{tmp_path}/more.npz"])
        assert words in capsys.readouterr().err


def test_held_out_latents_are_of_one_kind(latents, tmp_path):
    shutil.copytree(latents, tmp_path / "other")
    told = json.loads((latents / SIDECAR).read_text())
    (tmp_path / "other" / SIDECAR).write_text(json.dumps(told | {"scale": 0.5}))
    config = tiny.config(*SMALL, f"data.source=latents:{latents}")
    config = configs.replace(config, {"data.heldout": f"latents:{tmp_path / 'other'}"})
    with pytest.raises(ConfigError, match=r"other numbers than data.source \(scale 0.6 and 0.5\)"):
        heldout.open_images(config, source_of(config), classes=False)
