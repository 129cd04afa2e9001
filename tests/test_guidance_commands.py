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
from ogdm_jax import models, parallel, startup
from ogdm_jax.cli import guidance
from ogdm_jax.cli import sample as command_line
from ogdm_jax.config import Sample
from ogdm_jax.diffusion import grids, steps
from ogdm_jax.diffusion.denoiser import as_denoiser
from ogdm_jax.discriminator import generated
from ogdm_jax.discriminator import guidance as guide
from ogdm_jax.discriminator import run as discriminator
from ogdm_jax.inverse import files, tasks
from ogdm_jax.inverse.measured import measure
from ogdm_jax.methods import dg, discovery
from ogdm_jax.metrics import distances as metrics
from ogdm_jax.sampling.churn import Info
from ogdm_jax.sampling.guidance import combine, plain_step
from tests.support import compiling, foreign, oracles, tiny
from tests.support.commands import arrays, picture_size

RESTORERS = ("ddnm", "diffpir", "dps", "dsg", "freedom", "lgd", "mpgd", "pigdm")


def save(folder, *more: str):
    """A training folder with fresh weights, as train.py saves them."""
    return tiny.folder(folder, tiny.build("methods=()", *more))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return save(tmp_path_factory.mktemp("prior"), *tiny.SMALLEST)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    return save(tmp_path_factory.mktemp("conditional"), *tiny.SMALLEST, "data.conditional=true")


@pytest.fixture(scope="module")
def judge(workdir, tmp_path_factory):
    """The folder of a discriminator with fresh weights, whose samples are the workdir's by its own
    sampler.
    """
    folder = tmp_path_factory.mktemp("judge")
    more = (
        "network.channel_mult=(1,)",
        "network.attn_resolutions=()",
        "dg.num=4",
        "sample.steps=3",
        f"dg.prior={workdir}",
        "evaluate.features=",
        "evaluate.every=0 steps",
    )
    settings = configs.load(tiny.ROOT / "configs" / "digits_dg.py", more)
    about = json.dumps(generated.origin(settings, discriminator.open_prior(settings), 4))
    np.savez(
        folder / "samples.npz",
        image=np.zeros((4, 8, 8, 1), np.uint8),
        label=np.full(4, -1),
        about=about,
    )
    return tiny.folder(folder, discriminator.build(settings, parallel.make_plan("pmap", 1), folder))


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
        try:
            command_line.main(["--workdir", str(workdir), "--devices", str(devices), *args])
        except SystemExit as stop:
            assert stop.code == 1
            return capsys.readouterr().err
        lines = capsys.readouterr().out.strip().splitlines()
        return json.loads(lines[-1]) if lines[-1].startswith("{") else lines[-1]

    return call


@pytest.mark.parametrize("method", ["dsg", "ddnm"])
def test_a_method_restores_and_reports(command, pictures, tmp_path, method):
    out = tmp_path / "grid.png"
    said = command(
        "--guidance",
        method,
        "--task",
        "inpaint",
        "--input",
        str(pictures),
        "--steps",
        "3",
        "--out",
        str(out),
    )
    assert said["task"] == "inpaint" and said["guidance"] == method and said["images"] == 3
    assert (
        said["solver"] == "ddim"
        and np.isfinite([said["psnr"], said["residual_ratio"], said["residual"]]).all()
    )
    # three triples, each pixel 16 x 16, with space between, headings and the PSNR
    assert picture_size(out) == (9 * 129 - 1 + 2 * 14, 18 + 128 + 18)
    each = json.loads(out.with_suffix(".json").read_text())
    np.testing.assert_allclose(np.mean(each["psnr"]), said["psnr"], atol=1e-3)


@pytest.mark.parametrize("method", RESTORERS)
@pytest.mark.parametrize("task", ["inpaint", "deblur"])
def test_every_method_lowers_the_residual(method, task):
    """By the words of the command, on a known denoiser."""
    x_next, free, extra = one_step("--guidance", method, "--task", task, "--input", "digits")
    guided_by, plain = (
        extra.restoration.judge(np.asarray(v))["residual"].mean() for v in (x_next, free)
    )
    assert np.isfinite(x_next).all() and guided_by < plain


@pytest.mark.parametrize("task", ["embedding", "segmentation"])
def test_networks_steer(task, tmp_path):
    file = tmp_path / "network.py"
    file.write_text("def features(x):\n    return x[:, ::2]\n")
    words = ("--task", task, "--input", "digits", "--task.network", f"{file}:features")
    x_next, free, extra = one_step("--guidance", "dsg", "--dsg.rate", "0.8", *words)
    guided_by, plain = (
        extra.restoration.judge(np.asarray(v))["distance"].mean() for v in (x_next, free)
    )
    assert guided_by < plain


def one_step(*argv: str):
    """(guided state, plain state, Guided) after one step to noise level 0.1 of four images."""
    request = _request(*argv)
    model = models.Model(None, None, (8, 8, 1), 0)
    run = types.SimpleNamespace(model=model, config=None, buffers={}, class_names=())
    extra = guidance.build(
        request, run, configs.Sample(**request.sampling), np.arange(4), label=None
    )
    (method,) = extra.guidance
    info = Info(
        jnp.int32(0), 20, jnp.full(4, 0.5), jnp.full(4, 0.1), jax.random.split(jax.random.key(0), 4)
    )
    data = oracles.Gaussian(0.0, 0.5)

    @jax.jit
    def states(x, noise, rows):
        ends = (
            lambda x: data.denoise(x, info.sigma),
            lambda x0, x: steps.ddim_moments(x, x0, *info[2:4], 1.0),
        )
        at = info._replace(rows=rows)
        return [rule(*ends, x, noise, at)[0] for rule in (method.transition, plain_step)]

    x, noise = (jax.random.normal(jax.random.key(i), (4, 8, 8, 1)) for i in (1, 2))
    rows = jax.tree.map(jnp.asarray, method.rows)
    return *states(0.5 * x + extra.restoration.images, noise, rows), extra


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


@pytest.mark.parametrize("task", tasks.RESTORING)
def test_every_task_measures(task):
    settings = tasks.Settings(factor=2)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 1)).astype(np.float32)
    made = measure(tasks.make_task(task, settings, x.shape[1:]), settings, x, np.arange(2))
    figures = made.judge(x)
    assert (abs(figures["residual_ratio"] - 1) < 0.35).all(), (
        figures
    )  # the truth explains y up to its noise
    assert np.isposinf(figures["psnr"]).all() and np.allclose(figures["ssim"], 1)
    shown = files.side_by_side(made, x)
    assert {k: v.shape for k, v in shown.items()} == dict.fromkeys(
        ["input", "measurement", "result"], (2, 16, 16, 1)
    )
    other = measure(tasks.make_task(task, settings, x.shape[1:]), settings, x[1:], np.arange(1, 2))
    np.testing.assert_allclose(
        other.y[0], made.y[1], atol=1e-6
    )  # a seed has its own mask and noise


def test_poisson_noise_is_weighed_by_its_own_size():
    settings = tasks.Settings(noise=0.0, poisson=1.0)
    x = np.random.default_rng(0).uniform(-0.8, 0.3, (4, 16, 16, 1)).astype(np.float32)
    made = measure(tasks.make_task("denoise", settings, x.shape[1:]), settings, x, np.arange(4))
    assert abs(made.judge(x)["residual_ratio"].mean() - 1) < 0.1


def test_a_network_says_what_style_is(command, pictures, tmp_path):
    file = tmp_path / "network.py"
    file.write_text(
        "import jax.numpy as jnp\ndef features(x):\n    return jnp.concatenate([x, x**2], -1)\n"
    )
    args = (
        "--guidance",
        "dsg",
        "--dsg.rate",
        "0.5",
        "--steps",
        "4",
        "--out",
        str(tmp_path / "out"),
    )
    said = command(
        *args, "--task", "style", "--input", str(pictures), "--task.network", f"{file}:features"
    )
    assert said["task"] == "style" and np.isfinite(said["distance"]) and "psnr" not in said
    assert len(list((tmp_path / "out").glob("*.png"))) == 3
    assert "has no function" in command(
        *args, "--task", "style", "--input", str(pictures), "--task.network", f"{file}:other"
    )


def test_presets_are_the_published_settings():
    def read(*argv: str):
        request = _request(*argv)
        ((name, settings),) = request.settings.items()
        return name, settings, request

    name, settings, request = read("--preset", "super_resolution_100")
    assert (name, request.task, settings.rate, settings.interval) == (
        "dsg",
        "super_resolution",
        0.1,
        2,
    )
    assert request.sampling == {"steps": 100, "solver": "ddim", "eta": 1.0, "grid": "respaced"}
    assert settings.clip_loss and settings.clip_mean
    name, settings, request = read("--preset", "inpaint_1000", "--dsg.rate", "0.3")
    assert (settings.rate, settings.interval, request.sampling) == (
        0.3,
        5,
        {"steps": 1000, "solver": "ancestral", "grid": "respaced"},
    )
    name, settings, request = read("--preset", "dps_phase_retrieval")
    assert (name, settings.scale, request.sampling["steps"]) == ("dps", 1.0, 1000)
    _, settings, request = read("--preset", "face_id", "--task.network", "f.py:f")
    low, high = settings.window
    assert abs(low - 0.343) < 0.03 and high == float("inf") and settings.rate == 0.05  # t > 100
    assert (request.task, request.sampling["grid"]) == ("face_id", "ddim")
    _, settings, request = read("--preset", "style")
    spacing = request.sampling["grid"]
    levels = np.float32(grids.ddim(100, "scaled_linear", spacing, offset=Sample.offset)[:-1])
    for window, count in ((settings.window, 40), (settings.repeat_window, 30)):
        low, high = np.float32(window)
        assert ((levels >= low) & (levels <= high)).sum() == count
    assert settings.repeats == 3 and not settings.clip_loss
    with pytest.raises(ValueError, match="--preset: 'best' given; expected one of adm64"):
        read("--preset", "best")


@pytest.mark.parametrize(
    "preset, words, discrete, continuous",
    [
        ("inpaint_20", (), ("ddim", 20, 1.0, "respaced"), ("ddim", 20, 1.0, "")),
        ("face_id", (), ("ddim", 100, 1.0, "ddim"), ("ddim", 100, 1.0, "")),
        (
            "inpaint_20",
            ("--grid", "quad", "--steps", "5", "--solver", "heun"),
            ("heun", 5, 1.0, "quad"),
            ("heun", 5, 1.0, "quad"),
        ),
    ],
)
def test_what_is_asked_for_comes_before_a_presets_sampler(preset, words, discrete, continuous):
    args = _arguments("--preset", preset, *words)
    for table, expected in (("steps", discrete), (None, continuous)):
        run = types.SimpleNamespace(
            model=types.SimpleNamespace(table=table), settings=lambda **words: words
        )
        found = command_line._sampler(args, guidance.read(args).sampling, run, 4)
        assert tuple(found[k] for k in ("solver", "steps", "eta", "grid")) == expected


def _arguments(*argv: str):
    return command_line.parser().parse_args(["--workdir", "x", *argv])


def _request(*argv: str):
    return guidance.read(_arguments(*argv))


INPAINT = ("--guidance", "dsg", "--task", "inpaint")


@pytest.mark.parametrize(
    "args,words",
    [
        (
            ("--guidance", "magic"),
            "--guidance: 'magic' given; expected some of apg, autoguidance, cfg, classifier",
        ),
        (
            ("--guidance", "dsg,dps", "--task", "inpaint", "--input", "digits"),
            "dsg and dps both bring a transition; choose one of them",
        ),
        (("--guidance", "dsg,dsg", "--task", "inpaint"), "names a method twice"),
        (("--guidance", "dsg"), "--task: not given for dsg; expected one of inpaint"),
        (("--guidance", "dsg", "--task", "sharpen"), "--task: 'sharpen' given"),
        (("--task", "inpaint"), "expected --guidance with one of"),
        (INPAINT, "--input: not given"),
        ((*INPAINT, "--input", "/no/such/folder"), "is no file, folder or data source"),
        (
            (*INPAINT, "--input", "digits", "--solver", "heun"),
            "a deterministic step has no noise to guide; expected",
        ),
        ((*INPAINT, "--input", "digits", "--solver", "euler"), "deterministic"),
        ((*INPAINT, "--dsg.rate", "2"), "dsg.rate: 2.0 given; expected a number from 0 to 1"),
        ((*INPAINT, "--dsg.rate", "much"), "--dsg.rate: 'much' is of another type"),
        ((*INPAINT, "--dsg.interval", "0"), "dsg.interval: 0 given"),
        ((*INPAINT, "--dsg.window", "5"), "--dsg.window: '5' given"),
        ((*INPAINT, "--input", "digits", "--task.mask", "oval"), "--task.mask: 'oval' given"),
        ((*INPAINT, "--input", "digits", "--task.noise", "-1"), "--task.noise: -1.0 given"),
        (
            (
                *("--guidance", "dsg", "--task", "super_resolution", "--input", "digits"),
                *("--task.factor", "3"),
            ),
            "factor=3",
        ),
        (
            ("--guidance", "dsg", "--task", "embedding", "--input", "digits"),
            "--task.network: '' given",
        ),
        (
            ("--guidance", "ddnm", "--task", "phase_retrieval", "--input", "digits"),
            "known singular values",
        ),
        (("--guidance", "dg"), "--dg.discriminator: not given"),
        (("--guidance", "dg", "--dg.discriminator", "/no/such/run"), "/no/such/run"),
        (("--dg.discriminator", "x"), "--dg.discriminator: x given, but dg is not in --guidance"),
        (("--guidance", "cfg"), "the model is unconditional"),
        (("--preset", "best"), "--preset: 'best'"),
        (("--preset", "cifar10"), "--dg.discriminator: not given"),
        (
            ("--preset", "cifar10", "--guidance", "dsg", "--task", "inpaint"),
            "'cifar10' is for dg; expected --guidance",
        ),
        (("--preset", "inpaint_20,deblur_20"), "holds two of one method"),
        (("--dsg.rate", "0.5"), "--dsg.rate: 0.5 given, but dsg is not in --guidance"),
        (
            ("--guidance", "dps", "--task", "inpaint", "--dsg.rate", "0.5"),
            "dsg is not in --guidance; expected --guidance dps,dsg",
        ),
        (
            (*INPAINT, "--task.factor", "2"),
            "--task.factor: 2 given, but --task inpaint does not use it; expected --task super",
        ),
        (("--task.mask", "box"), "--task.mask: box given, but there is no --task; expected"),
        ((*INPAINT, "--dsg.repeat_window", "1,2"), "expected dsg.repeats of at least 2"),
        ((*INPAINT, "--dsg.stop_ratio", "-1"), "dsg.stop_ratio: -1.0 given"),
        (
            (*INPAINT, "--input", "digits", "--dsg.stop_ratio", "1", "--task.noise", "0"),
            "a task with measurement noise",
        ),
        (
            (*INPAINT, "--task.poisson", "1", "--task.noise", "0.1"),
            "given with --task.poisson; expected one of them",
        ),
        (
            (
                *("--guidance", "ddnm", "--task", "inpaint", "--input", "digits"),
                *("--task.poisson", "1"),
            ),
            "--task.poisson: 1 given for ddnm",
        ),
        (
            (
                *("--guidance", "diffpir", "--task", "inpaint", "--input", "digits"),
                *("--churn", "1,0,9,1", "--solver", "heun"),
            ),
            "brings a transition of its own",
        ),
        (
            ("--guidance", "dsg", "--task", "deblur", "--input", "digits", "--task.blur", "0"),
            "--task.blur: 0.0 given",
        ),
        (
            (
                *("--guidance", "dsg", "--task", "motion_deblur", "--input", "digits"),
                *("--task.blur", "3"),
            ),
            "--task.blur: 3.0 given",
        ),
        (
            (
                *("--guidance", "dsg", "--task", "phase_retrieval", "--input", "digits"),
                *("--task.poisson", "1"),
            ),
            "--task.poisson: 1 given, but --task phase_retrieval does not use it",
        ),
        (("--rate", "0.5"), "--rate: is spelled --dsg.rate now"),
        (("--scale=2",), "--scale: is spelled --METHOD.scale such as --dps.scale"),
        (("--guidance-weight", "2"), "--guidance-weight: is spelled --cfg.weight now"),
        (("--discriminator", "x"), "--discriminator: is spelled --dg.discriminator now"),
        (("--mask", "box"), "--mask: is spelled --task.mask now"),
        (
            ("--grid", "respaced"),
            "config.sample.grid: 'respaced' given; expected one of edm, vp, ve, iddpm: the model",
        ),
        (("--grid", "log"), "config.sample.grid: unknown 'log'; expected one of edm"),
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
    args += ("--overwrite",)
    assert "--label: not given" in command(*args, "--input", str(pictures), workdir=conditional)
    assert (
        command(*args, "--input", str(pictures), "--label", "3", workdir=conditional)["images"] == 2
    )
    assert (
        command(*args, "--input", "digits", workdir=conditional)["images"] == 2
    )  # its classes are the model's
    assert "never saw hidden labels" in command("--guidance", "cfg", workdir=conditional)


@pytest.mark.slow
def test_a_single_picture_as_a_process_with_heun_and_time_travel(workdir, pictures, tmp_path):
    out = tmp_path / "one"
    done = subprocess.run(
        [
            sys.executable,
            str(tiny.ROOT / "sample.py"),
            "--workdir",
            str(workdir),
            *INPAINT,
            "--task.mask",
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
            "--dsg.strength",
            "1",
        ]
        + ["--dsg.repeats", "2", "--out", str(out)],
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
        "--dg.discriminator",
        str(judge),
        "--num",
        "2",
        "--out",
        str(tmp_path / "x.npz"),
    )
    assert "wrote 2 images of step 0 (euler, 3 steps)" in command(*words)
    found = arrays(tmp_path / "x.npz")["images"]
    command(*words, "--overwrite", "--dg.weight", "30000")
    assert (found != arrays(tmp_path / "x.npz")["images"]).any()


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
        command("--guidance", "dg", "--dg.discriminator", str(judge), "--num", "2", *words)
    assert capsys.readouterr().out.partition("differ in ")[2].strip() == differ


def _not_compiled(*_, **__):
    raise RuntimeError("enough")


@pytest.mark.slow
def test_both_guidances_and_presets_in_one_scan(command, judge, tmp_path):
    words = (
        "--preset",
        "inpaint_20,second",
        "--dg.discriminator",
        str(judge),
        "--input",
        "digits",
        "--num",
        "2",
    )
    words += ("--steps", "2", "--out", str(tmp_path / "x.npz"))
    found = []
    for weight in ("0", "30000"):
        said = command(*words, "--overwrite", "--dg.weight", weight)
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
        guidance, "_open_discriminator", lambda *_: dg.guidance(ratio, corrector_weight=0.0)
    )
    run = types.SimpleNamespace(
        model=models.Model(None, None, (8, 8, 1), 10),
        buffers={},
        config=types.SimpleNamespace(data=types.SimpleNamespace(label_dropout=0.1)),
    )
    request = _request("--guidance", names, "--dg.discriminator", "x", "--cfg.weight", "3")
    settings = configs.Sample(solver="heun", eta=0.0)
    extra = guidance.build(request, run, settings, np.arange(2))
    denoise = as_denoiser(
        lambda x, sigma, label: x * (1 + label[:, None, None, None].astype(x.dtype))
    )
    denoise = combine(extra.guidance).transform(denoise)
    x, label = jnp.ones((2, 8, 8, 1)), jnp.asarray([1, 4])
    out = denoise(x, jnp.ones(2), label)
    assert [rows for rows, _ in asked] == [2] and asked[0][1] is label
    np.testing.assert_allclose(
        out[:, 0, 0, 0], 3 * (1 + label) - 2, rtol=1e-6
    )  # and the ratio adds -2 sigma^2 x


@pytest.mark.parametrize("said", [{}, {"weight": 2.0}, {"weight": 1.5, "time_min": 0.01}])
def test_options_of_dg_are_taken_as_said_where_they_equal_the_presets(said, monkeypatch):
    """cifar10's weight is 2, of Heun; under another solver it is followed, unless it was given."""
    heard, plain = [], dg.guidance(lambda x, sigma, label: x.sum((1, 2, 3)))
    monkeypatch.setattr(
        guide, "open_guidance", lambda folder, use, labels, **words: heard.append(words) or plain
    )
    options = [word for name, value in said.items() for word in (f"--dg.{name}", str(value))]
    words = ("--guidance", "dg", "--preset", "cifar10", "--dg.discriminator", "x", *options)
    run = types.SimpleNamespace(
        model=models.Model(None, None, (8, 8, 1), 0), buffers={}, config=None
    )
    guidance.build(_request(*words), run, configs.Sample(solver="euler"), np.arange(2))
    assert heard == [{"preset": "cifar10", **said}]


def test_stopping_knows_the_size_of_poisson_noise():
    words = (
        "--guidance",
        "dsg",
        "--task",
        "inpaint",
        "--input",
        "digits",
        "--task.poisson",
        "1",
        "--dsg.stop_ratio",
    )
    x_next, free, _ = one_step(*words, "200")
    np.testing.assert_allclose(x_next, free, atol=1e-6)
    x_next, free, _ = one_step(*words, "0.1")
    assert np.abs(x_next - free).max() > 0.01


@pytest.mark.parametrize("method", ["ddnm", "diffpir"])
def test_a_window_holds_for_methods_with_a_transition_of_their_own(method):
    words = ("--guidance", method, "--task", "inpaint", "--input", "digits")
    x_next, free, _ = one_step(*words, f"--{method}.window", "2,5")  # the step is at 0.5
    np.testing.assert_allclose(x_next, free, atol=1e-6)


@pytest.mark.fast
def test_unguided_sampling_is_as_before(command, tmp_path):
    assert "wrote 2 images" in command(
        "--num", "2", "--steps", "2", "--out", str(tmp_path / "x.npz")
    )
    assert arrays(tmp_path / "x.npz")["images"].shape == (2, 8, 8, 1)
    assert jax.device_count() == 8


def test_a_method_of_another_package_guides_by_the_command(command, tmp_path, monkeypatch):
    foreign.install(tmp_path, monkeypatch)
    try:
        found = []
        for level in ("-1", "1"):
            out = ("--num", "2", "--steps", "4", "--overwrite", "--out", str(tmp_path / "x.npz"))
            assert "wrote 2 images" in command(
                "--guidance", "brighter", "--brighter.level", level, *out
            )
            found.append(arrays(tmp_path / "x.npz")["images"].mean())
        assert found[0] < found[1]
        assert "brighter.level: 7.0 given" in command(
            "--guidance", "brighter", "--brighter.level", "7"
        )
    finally:
        discovery.modules.cache_clear()
