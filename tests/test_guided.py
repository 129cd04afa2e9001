"""Guided sampling by its words: tasks, presets, what the command writes and prints, one sentence
for every mistake.
"""

import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ogdm_jax import config as configs
from ogdm_jax import parallel, startup
from ogdm_jax.cli import guided, sample
from ogdm_jax.diffusion import steps
from ogdm_jax.discriminator import fakes
from ogdm_jax.discriminator import training as discriminator
from ogdm_jax.inverse import tasks as restore
from ogdm_jax.methods import cfg, dg
from ogdm_jax.metrics import distances as metrics
from ogdm_jax.sampling.churn import Info
from ogdm_jax.sampling.solvers import plain_kick
from ogdm_jax.training.checkpoint import Checkpoints, describe
from tests.support import compiling, oracles, tiny
from tests.support.commands import arrays, picture_size

SMALL = ("network.channel_mult=(1,)", "network.attn_resolutions=()")


def save(folder, *more: str):
    """A training folder with fresh weights, as train.py saves them."""
    return _saved(folder, tiny.build("methods=()", *more))


def _saved(folder, run):
    with Checkpoints(folder) as checkpoints:
        about = describe(run.config, run.source.shape, run.source.num_classes)
        checkpoints.save(0, run.init(), about, {"step": 0})
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return save(tmp_path_factory.mktemp("prior"), *SMALL)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    return save(tmp_path_factory.mktemp("conditional"), *SMALL, "data.conditional=true")


@pytest.fixture(scope="module")
def judge(workdir, tmp_path_factory):
    """The folder of a discriminator with fresh weights, whose samples are the workdir's by its own
    sampler.
    """
    folder = tmp_path_factory.mktemp("judge")
    more = (
        *SMALL,
        "dg.num=4",
        "sample.steps=3",
        f"dg.prior={workdir}",
        "evaluate.features=",
        "evaluate.every=0 steps",
    )
    settings = configs.load(tiny.ROOT / "configs" / "digits_dg.py", more)
    about = json.dumps(fakes.origin(settings, discriminator.open_prior(settings), 4))
    np.savez(
        folder / "samples.npz",
        image=np.zeros((4, 8, 8, 1), np.uint8),
        label=np.full(4, -1),
        about=about,
    )
    return _saved(folder, discriminator.build(settings, parallel.make_plan("pmap", 1), folder))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def command(monkeypatch, capsys, workdir):
    """sample.py in this process: (lines of stdout, JSON) or its one sentence."""
    monkeypatch.setattr(startup, "prepare", lambda: None)

    def call(*args: str, workdir=workdir, devices: int = 1):
        monkeypatch.setattr(
            sys, "argv", ["sample.py", "--workdir", str(workdir), "--devices", str(devices), *args]
        )
        try:
            sample.main()
        except SystemExit as stop:
            assert stop.code == 1
            return capsys.readouterr().err
        lines = capsys.readouterr().out.strip().splitlines()
        return json.loads(lines[-1]) if lines[-1].startswith("{") else lines[-1]

    return call


@pytest.mark.parametrize("kick", ["dsg", "ddnm"])
def test_a_kick_restores_and_reports(command, pictures, tmp_path, kick):
    out = tmp_path / "grid.png"
    said = command(
        "--guidance",
        kick,
        "--task",
        "inpaint",
        "--input",
        str(pictures),
        "--steps",
        "3",
        "--out",
        str(out),
    )
    assert said["task"] == "inpaint" and said["guidance"] == kick and said["images"] == 3
    assert (
        said["solver"] == "ddim"
        and np.isfinite([said["psnr"], said["residual_ratio"], said["residual"]]).all()
    )
    assert picture_size(out) == (9 * 66 - 2, 64)  # three triples, each pixel 8 x 8
    each = json.loads(out.with_suffix(".json").read_text())
    np.testing.assert_allclose(np.mean(each["psnr"]), said["psnr"], atol=1e-3)


@pytest.mark.parametrize("kick", guided.KICKS)
@pytest.mark.parametrize("task", ["inpaint", "deblur"])
def test_every_kick_lowers_the_residual(kick, task):
    """By the words of the command, on a known denoiser."""
    x_next, free, extra = one_step("--guidance", kick, "--task", task, "--input", "digits")
    guided_by, plain = (
        extra.restoration.judge(np.asarray(v))["residual"].mean() for v in (x_next, free)
    )
    assert np.isfinite(x_next).all() and guided_by < plain


@pytest.mark.parametrize("task", ["embedding", "segmentation"])
def test_networks_steer(task, tmp_path):
    file = tmp_path / "network.py"
    file.write_text("def features(x):\n    return x[:, ::2]\n")
    words = ("--task", task, "--input", "digits", "--network", f"{file}:features", "--rate", "0.8")
    x_next, free, extra = one_step("--guidance", "dsg", *words)
    guided_by, plain = (
        extra.restoration.judge(np.asarray(v))["distance"].mean() for v in (x_next, free)
    )
    assert guided_by < plain


def one_step(*argv: str):
    """(guided state, plain state, Guided) after one step to noise level 0.1 of four images."""
    args = guided.prepare(_arguments(*argv))
    model = types.SimpleNamespace(image_shape=(8, 8, 1), label_dim=0)
    settings = types.SimpleNamespace(solver=args.solver, eta=args.eta)
    extra = guided.build(args, types.SimpleNamespace(model=model), settings, np.arange(4))
    (method,) = extra.guidance
    info = Info(
        jnp.int32(0), 20, jnp.full(4, 0.5), jnp.full(4, 0.1), jax.random.split(jax.random.key(0), 4)
    )
    data = oracles.Gaussian(0.0, 0.5)

    @jax.jit
    def states(x, noise, given):
        ends = (
            lambda x: data.denoise(x, info.sigma),
            lambda x0, x: steps.ddim_moments(x, x0, *info[2:4], 1.0),
        )
        return [k(*ends, x, noise, info)[0] for k in (method.kick(None, given), plain_kick)]

    x, noise = (jax.random.normal(jax.random.key(i), (4, 8, 8, 1)) for i in (1, 2))
    given = jax.tree.map(jnp.asarray, method.given)
    return *states(0.5 * x + extra.restoration.images, noise, given), extra


def test_results_do_not_depend_on_batch_or_devices(command, pictures, tmp_path):
    args = ("--guidance", "dsg", "--task", "inpaint", "--input", str(pictures), "--steps", "3")
    found = []
    for i, (batch, devices) in enumerate(((3, 1), (1, 2))):
        out = tmp_path / f"{i}.npz"
        said = command(*args, "--batch", str(batch), "--out", str(out), devices=devices)
        found.append(arrays(out))
    for name in ("input", "measurement", "result", "seeds"):
        np.testing.assert_allclose(found[1][name], found[0][name], atol=1e-4, err_msg=name)
    x, y, result = (found[0][name] for name in ("input", "measurement", "result"))
    hidden = y == 0
    assert 0.2 < hidden.mean() < 0.8 and abs((y - x)[~hidden].std() - 0.05) < 0.02
    np.testing.assert_allclose(
        said["psnr"], metrics.psnr(np.clip(result, -1, 1), x).mean(), atol=1e-2
    )


@pytest.mark.parametrize("task", restore.RESTORING)
def test_every_task_measures(task):
    settings = restore.Settings(factor=2)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 1)).astype(np.float32)
    made = restore.measure(
        restore.make_task(task, settings, x.shape[1:]), settings, x, np.arange(2)
    )
    figures = made.judge(x)
    assert (abs(figures["residual_ratio"] - 1) < 0.35).all(), (
        figures
    )  # the truth explains y up to its noise
    assert np.isposinf(figures["psnr"]).all() and np.allclose(figures["ssim"], 1)
    assert made.pictures(x).shape == (2, 3, 16, 16, 1)
    other = restore.measure(
        restore.make_task(task, settings, x.shape[1:]), settings, x[1:], np.arange(1, 2)
    )
    np.testing.assert_allclose(
        other.y[0], made.y[1], atol=1e-6
    )  # a seed has its own mask and noise


def test_poisson_noise_is_weighed_by_its_own_size():
    settings = restore.Settings(noise=0.0, poisson=1.0)
    x = np.random.default_rng(0).uniform(-0.8, 0.3, (4, 16, 16, 1)).astype(np.float32)
    made = restore.measure(
        restore.make_task("denoise", settings, x.shape[1:]), settings, x, np.arange(4)
    )
    assert abs(made.judge(x)["residual_ratio"].mean() - 1) < 0.1


def test_a_network_says_what_style_is(command, pictures, tmp_path):
    file = tmp_path / "network.py"
    file.write_text(
        "import jax.numpy as jnp\ndef features(x):\n    return jnp.concatenate([x, x**2], -1)\n"
    )
    args = ("--guidance", "dsg", "--rate", "0.5", "--steps", "4", "--out", str(tmp_path / "out"))
    said = command(
        *args, "--task", "style", "--input", str(pictures), "--network", f"{file}:features"
    )
    assert said["task"] == "style" and np.isfinite(said["distance"]) and "psnr" not in said
    assert len(list((tmp_path / "out").glob("*.png"))) == 3
    assert "has no function" in command(
        *args, "--task", "style", "--input", str(pictures), "--network", f"{file}:other"
    )


def test_presets_are_the_published_settings():
    parse = lambda *argv: guided.prepare(_arguments(*argv))
    args = parse("--preset", "super_resolution_100")
    assert (args.guidance, args.task, args.steps, args.solver, args.eta) == (
        "dsg",
        "super_resolution",
        100,
        "ddim",
        1.0,
    )
    assert (args.rate, args.interval) == (0.1, 2)
    args = parse("--preset", "inpaint_1000", "--rate", "0.3", "--steps", "500")
    assert (args.rate, args.steps, args.interval, args.solver, args.eta) == (
        0.3,
        500,
        5,
        "ancestral",
        None,
    )
    args = parse("--preset", "dps_phase_retrieval")
    assert (args.guidance, args.scale, args.steps) == ("dps", 1.0, 1000)
    args = parse("--preset", "face_id", "--network", "f.py:f")
    low, high = guided.window(args.window, "--window")
    assert abs(low - 0.343) < 0.03 and high == float("inf") and args.rate == 0.05  # t > 100 of 1000
    for name in ("style", "style_repeats"):
        low, high = guided.window(name, "--window")
        assert 0.3 < low < high < 6
    assert parse("--preset", "style").repeats == 3
    assert parse("--preset", "deblur_20").clip and not parse("--preset", "style").clip
    discrete, continuous = (
        types.SimpleNamespace(model=types.SimpleNamespace(table=t)) for t in ("steps", None)
    )
    for name, grid in (("inpaint_20", "respaced"), ("dps_deblur", "respaced"), ("face_id", "ddim")):
        args = parse("--preset", name)
        assert (guided.grid_of(args, discrete), guided.grid_of(args, continuous)) == (grid, "")
    assert guided.grid_of(parse("--preset", "inpaint_20", "--grid", "quad"), discrete) == "quad"
    with pytest.raises(ValueError, match="--preset: 'best' given; expected one of inpaint_1000"):
        parse("--preset", "best")


def _arguments(*argv: str):
    import argparse

    parser = argparse.ArgumentParser()
    for option, default in (("--solver", ""), ("--churn", ""), ("--grid", "")):
        parser.add_argument(option, default=default)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--eta", type=float, default=None)
    parser.add_argument("--label", type=int, default=None)
    guided.add_arguments(parser)
    return parser.parse_args(argv)


INPAINT = ("--guidance", "dsg", "--task", "inpaint")


@pytest.mark.parametrize(
    "args,words",
    [
        (("--guidance", "magic"), "--guidance: 'magic' given; expected some of dg, cfg, dsg"),
        (("--guidance", "dsg,dps", "--task", "inpaint"), "dsg and dps both fill the kick slot"),
        (("--guidance", "dsg,dsg", "--task", "inpaint"), "names a method twice"),
        (("--guidance", "dsg"), "--task: '' given for dsg; expected one of inpaint"),
        (("--guidance", "dsg", "--task", "sharpen"), "--task: 'sharpen' given"),
        (("--task", "inpaint"), "expected --guidance with one of"),
        (INPAINT, "--input: not given"),
        ((*INPAINT, "--input", "/no/such/folder"), "is no file, folder or data source"),
        (
            (*INPAINT, "--input", "digits", "--solver", "heun"),
            "a deterministic step has no noise to guide; expected",
        ),
        ((*INPAINT, "--input", "digits", "--solver", "euler"), "deterministic"),
        ((*INPAINT, "--input", "digits", "--rate", "2"), "rate=2.0"),
        ((*INPAINT, "--input", "digits", "--interval", "0"), "interval=0"),
        ((*INPAINT, "--input", "digits", "--window", "5"), "--window: '5' given"),
        ((*INPAINT, "--input", "digits", "--mask", "oval"), "--mask: 'oval' given"),
        ((*INPAINT, "--input", "digits", "--measurement-noise", "-1"), "--measurement-noise"),
        (
            (
                "--guidance",
                "dsg",
                "--task",
                "super_resolution",
                "--input",
                "digits",
                "--factor",
                "3",
            ),
            "factor=3",
        ),
        (("--guidance", "dsg", "--task", "style", "--input", "digits"), "--network: '' given"),
        (
            ("--guidance", "ddnm", "--task", "phase_retrieval", "--input", "digits"),
            "known singular values",
        ),
        (("--guidance", "dg"), "--discriminator: not given"),
        (("--guidance", "dg", "--discriminator", "/no/such/run"), "/no/such/run"),
        (("--discriminator", "x"), "expected --guidance dg"),
        (("--guidance", "cfg"), "the model is unconditional"),
        (("--preset", "best"), "--preset: 'best'"),
        (("--preset", "cifar10"), "--discriminator: not given"),
        (
            ("--preset", "cifar10", "--guidance", "dsg", "--task", "inpaint"),
            "'cifar10' is for dg; expected --guidance",
        ),
        (("--preset", "inpaint_20,deblur_20"), "holds two of one method"),
        (("--rate", "0.5"), "--rate: 0.5 given, but plain sampling does not use it; expected dsg"),
        (
            ("--guidance", "dps", "--task", "inpaint", "--rate", "0.5"),
            "but dps inpaint does not use it",
        ),
        (
            ("--guidance", "mpgd", "--task", "inpaint", "--strength", "1"),
            "--strength: 1.0 given, but mpgd",
        ),
        (
            (*INPAINT, "--scale", "1"),
            "--scale: 1.0 given, but dsg inpaint does not use it; expected dps or mpgd",
        ),
        ((*INPAINT, "--factor", "2"), "--factor: 2 given"),
        ((*INPAINT, "--repeat-window", "1,2"), "expected --repeats of at least 2"),
        ((*INPAINT, "--stop", "-1"), "--stop: -1 given; expected at least 0"),
        ((*INPAINT, "--stop", "1", "--measurement-noise", "0"), "a task with measurement noise"),
        (
            (*INPAINT, "--poisson", "1", "--measurement-noise", "0.1"),
            "given with --poisson; expected one of them",
        ),
        (
            ("--guidance", "ddnm", "--task", "inpaint", "--poisson", "1"),
            "--poisson: 1 given for ddnm",
        ),
        (
            ("--guidance", "diffpir", "--task", "inpaint", "--churn", "1,0,9,1"),
            "brings a transition of its own",
        ),
        (
            ("--guidance", "dsg", "--task", "deblur", "--input", "digits", "--blur", "0"),
            "--blur: 0.0 given",
        ),
        (
            ("--guidance", "dsg", "--task", "motion_deblur", "--input", "digits", "--blur", "0"),
            "--blur: 0.0 given",
        ),
        (("--guidance-weight", "2"), "--guidance-weight: 2.0 given, but plain sampling"),
        (("--discriminator-weight", "2"), "--discriminator-weight: 2.0 given"),
        (
            ("--grid", "respaced"),
            "config.sample.grid: 'respaced' given; expected one of edm, vp, ve, iddpm: the model",
        ),
        (("--grid", "log"), "config.sample.grid: 'log' given; expected one of edm"),
    ],
    ids=lambda v: " ".join(v)[-40:] if isinstance(v, tuple) else "",
)
def test_mistakes_are_one_sentence_before_anything_is_compiled(command, monkeypatch, args, words):
    monkeypatch.setattr(
        "ogdm_jax.sampling.generate.sampler", lambda *a, **k: pytest.fail("compiled")
    )
    said = command(*args, "--num", "2")
    assert said.startswith("error: ") and words in said and said.count("\n") == 1


def test_classes_of_measured_images(command, conditional, pictures, tmp_path):
    args = (*INPAINT, "--steps", "2", "--num", "2", "--out", str(tmp_path / "x.png"))
    assert "--label: not given" in command(*args, "--input", str(pictures), workdir=conditional)
    assert (
        command(*args, "--input", str(pictures), "--label", "3", workdir=conditional)["images"] == 2
    )
    assert (
        command(*args, "--input", "digits", workdir=conditional)["images"] == 2
    )  # its classes are the model's
    assert "never saw hidden labels" in command("--guidance", "cfg", workdir=conditional)


def test_a_single_picture_as_a_process_with_heun_and_time_travel(workdir, pictures, tmp_path):
    out = tmp_path / "one"
    done = subprocess.run(
        [
            sys.executable,
            str(tiny.ROOT / "sample.py"),
            "--workdir",
            str(workdir),
            *INPAINT,
            "--mask",
            "box",
        ]
        + [
            "--input",
            str(pictures / "1.png"),
            "--solver",
            "heun",
            "--eta",
            "1",
            "--steps",
            "3",
            "--strength",
            "1",
        ]
        + ["--repeats", "2", "--out", str(out)],
        cwd=tiny.ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": compiling.FLAGS},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert said["images"] == 1 and said["solver"] == "heun" and (out / "img00000000.png").is_file()


def test_a_discriminator_guides_by_the_command(command, judge, tmp_path):
    words = (
        "--preset",
        "cifar10",
        "--discriminator",
        str(judge),
        "--num",
        "2",
        "--out",
        str(tmp_path / "x.npz"),
    )
    assert "wrote 2 images of step 0 (euler, 3 steps)" in command(*words)
    guided = arrays(tmp_path / "x.npz")["images"]
    command(*words, "--discriminator-weight", "30000")
    assert (guided != arrays(tmp_path / "x.npz")["images"]).any()


@pytest.mark.parametrize(
    "words,differ",
    [
        ((), ""),
        (("--solver", "heun", "--steps", "2"), "solver, steps"),
        (("--grid", "vp"), "grid"),
        (("--churn", "1,0,inf,1"), "churn"),
    ],
)
def test_a_discriminator_of_another_sampler_is_told(
    command, judge, monkeypatch, capsys, words, differ
):
    monkeypatch.setattr("ogdm_jax.sampling.generate.sampler", _not_compiled)
    with pytest.raises(RuntimeError, match="enough"):
        command("--guidance", "dg", "--discriminator", str(judge), "--num", "2", *words)
    assert capsys.readouterr().out.partition("differ in ")[2].strip() == differ


def _not_compiled(*_, **__):
    raise RuntimeError("enough")


def test_both_guidances_and_presets_in_one_scan(command, judge, tmp_path):
    words = (
        "--preset",
        "inpaint_20,second",
        "--discriminator",
        str(judge),
        "--input",
        "digits",
        "--num",
        "2",
    )
    words += ("--steps", "2", "--out", str(tmp_path / "x.npz"))
    found = []
    for weight in ("0", "30000"):
        said = command(*words, "--discriminator-weight", weight)
        assert (said["guidance"], said["task"], said["solver"], said["grid"]) == (
            "dsg,dg",
            "inpaint",
            "ddim",
            "edm",
        )
        assert said["steps"] == 2 and np.isfinite(said["psnr"])
        found.append(arrays(tmp_path / "x.npz")["result"])
    assert np.isfinite(found[1]).all() and np.abs(found[1] - found[0]).max() > 1e-4


@pytest.mark.parametrize("names", ["dg,cfg", "cfg,dg"])
def test_cfg_is_inside_dg_whatever_comes_first(monkeypatch, names):
    """The discriminator sees each image once, and never the label of no class (spec/dg.md 8)."""
    asked = []

    def ratio(x, sigma, label):
        asked.append((x.shape[0], label))
        return -(x**2).sum((1, 2, 3))

    monkeypatch.setattr(
        guided, "_discriminator", lambda *_: dg.guidance(lambda frozen: ratio, weight=1.0)
    )
    monkeypatch.setattr(guided, "_classifier_free", lambda *_: cfg.guidance(3.0))
    run = types.SimpleNamespace(model=types.SimpleNamespace(image_shape=(8, 8, 1), label_dim=10))
    args = guided.prepare(_arguments("--guidance", names, "--discriminator", "x"))
    extra = guided.build(args, run, types.SimpleNamespace(solver="heun", eta=0.0), np.arange(2))
    denoise = lambda x, sigma, label: x * (1 + label[:, None, None, None].astype(x.dtype))
    for method in extra.guidance:
        denoise = method.shift(denoise, method.frozen)
    x, label = jnp.ones((2, 8, 8, 1)), jnp.asarray([1, 4])
    out = denoise(x, jnp.ones(2), label)
    assert [rows for rows, _ in asked] == [2] and asked[0][1] is label
    np.testing.assert_allclose(
        out[:, 0, 0, 0], 3 * (1 + label) - 2, rtol=1e-6
    )  # and the ratio adds -2 sigma^2 x


def test_stopping_knows_the_size_of_poisson_noise():
    words = (
        "--guidance",
        "dsg",
        "--task",
        "inpaint",
        "--input",
        "digits",
        "--poisson",
        "1",
        "--stop",
    )
    x_next, free, _ = one_step(*words, "200")
    np.testing.assert_allclose(x_next, free, atol=1e-6)
    x_next, free, _ = one_step(*words, "0.1")
    assert np.abs(x_next - free).max() > 0.01


@pytest.mark.parametrize("kick", ["ddnm", "diffpir"])
def test_a_window_holds_for_kicks_with_a_transition_of_their_own(kick):
    words = ("--guidance", kick, "--task", "inpaint", "--input", "digits")
    x_next, free, _ = one_step(*words, "--window", "2,5")  # the step is at 0.5
    np.testing.assert_allclose(x_next, free, atol=1e-6)


@pytest.mark.fast
def test_unguided_sampling_is_as_before(command, tmp_path):
    assert "wrote 2 images" in command(
        "--num", "2", "--steps", "2", "--out", str(tmp_path / "x.npz")
    )
    assert arrays(tmp_path / "x.npz")["images"].shape == (2, 8, 8, 1)
    assert jax.device_count() == 8
