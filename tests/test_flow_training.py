"""Training on the velocity: each method over flow matching and v-prediction with zero terminal SNR."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax import config as configs
from ogdm_jax import data, parallel
from ogdm_jax.cli import export as export_command
from ogdm_jax.diffusion.process import PURE_NOISE
from ogdm_jax.interop import load_pretrained
from ogdm_jax.sampling import generate
from ogdm_jax.training import run as runs
from ogdm_jax.training.checkpoint import Checkpoints, describe
from ogdm_jax.training.workdir import open_workdir
from tests.support import networks, tiny

SMALL = (tiny.ONE_LEVEL, "data.batch=16", "stf.source=full", "ogdm.condition=log_sigma")
KINDS = {
    "flow": (
        "precondition.kind=flow",
        "noise.distribution=flow",
        "sample.grid=flow",
        "noise.clip=false",
    ),
    "v": (
        "precondition.kind=v",
        "precondition.schedule=scaled_linear",
        "precondition.zero_terminal=true",
        "noise.distribution=v",
        "sample.grid=trailing",
        "noise.clip=false",
    ),
}


def run_of(kind: str, *more: str):
    return tiny.build(*SMALL, *KINDS[kind], *more)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A training folder for SP of each kind."""
    folders = {}
    for kind in KINDS:
        run, folder = run_of(kind, "methods=()"), tmp_path_factory.mktemp(kind)
        with Checkpoints(folder) as checkpoints:
            about = describe(run.config, run.source.shape, run.model.label_dim)
            checkpoints.save(0, run.init(), about, {"step": 0})
        folders[kind] = folder
    return folders


def _cases():
    """Half of them are slow: a program takes seconds to compile."""
    for kind in KINDS:
        for method in ("", "ogdm", "stf", "sp"):
            often = (kind == "flow") == (method in ("", "sp"))
            marks = [] if often else [pytest.mark.slow]
            yield pytest.param(kind, method, marks=marks, id=f"{kind}-{method or 'none'}")


@pytest.mark.slow_cases("flow-none", "flow-sp", "v-ogdm", "v-stf")
@pytest.mark.parametrize("kind,method", list(_cases()))
def test_the_loss_falls_under_each_method(kind, method, teachers):
    """The loss of one batch over steps on it, levels up to pure noise; gradients stay finite."""
    start = (f"init.workdir={teachers[kind]}",) if method == "sp" else ()
    on = f"methods={(method,) if method else ()!r}"
    run = run_of(kind, on, "optim.learning_rate=0.002", *start)
    constants, state = run.constants(), run.init()
    step = run.compile(state)
    batch = next(data.batches(run.source, 16, 0, extra_references=run.methods.references))
    losses = []
    for _ in range(12):
        state, metrics = step(state, constants, run.plan.place_batch(batch), run.key)
        for name, value in metrics.items():  # bins of noise levels without an image are nan
            assert not name.startswith("loss") or np.isfinite(np.asarray(value)).all(), name
        assert not np.asarray(metrics["grad_nonfinite"]).any()
        losses.append(float(np.asarray(metrics["loss/denoise"]).mean()))
    assert np.mean(losses[-3:]) < np.mean(losses[:3]), losses


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_velocitys_mean_squared_error(kind):
    """Of the network in its own coordinates z and times, as the papers write it."""
    run = run_of(kind, "methods=()")
    rng = np.random.default_rng(1)
    params, _ = networks.born(jax.eval_shape(run.model.init, jax.random.key(0)))
    params = jax.tree.map(lambda p: p + 0.05 * rng.normal(size=p.shape).astype(p.dtype), params)
    x0, eps = 0.7 * jax.random.normal(jax.random.key(2), (2, 4, 8, 8, 1))
    wide = lambda v: jnp.asarray(v, jnp.float32)[:, None, None, None]
    if kind == "flow":
        t = np.array([0.02, 0.4, 0.9, 1.0])
        a, b, told = 1 - t, t, 1000 * t
        v, sigma = eps - x0, np.minimum(t / np.maximum(1 - t, 1e-30), PURE_NOISE)
    else:
        table = run.model.table
        told = np.array([0, 300, 900, 999])
        a, b = np.sqrt(table.alpha_bar[told]), np.sqrt(1 - table.alpha_bar[told])
        v, sigma = wide(a) * eps - wide(b) * x0, table.sigma[told]

    @jax.jit
    def both(params):
        level = jnp.asarray(sigma, jnp.float32)
        x0_hat = run.model.denoiser(params)(x0 + wide(sigma) * eps, level)
        ours = run.noise.weight(level) * jnp.sum(jnp.square(x0_hat - x0), axis=(1, 2, 3))
        z, told_ = wide(a) * x0 + wide(b) * eps, jnp.asarray(told, jnp.float32)
        output = run.model.network.apply({"params": params}, z, told_)
        return ours, jnp.sum(jnp.square(output - v), axis=(1, 2, 3))

    ours, theirs = both(params)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_export_carries_the_process(kind, teachers, tmp_path, capsys):
    """What is exported is read as the same denoiser, at the level of pure noise too."""
    file = tmp_path / "net.safetensors"
    export_command.main([str(teachers[kind]), "--out", str(file)])
    capsys.readouterr()
    ours, theirs = open_workdir(teachers[kind]).denoiser, load_pretrained(file)
    assert theirs.precondition == kind
    sigma = jnp.asarray([0.5, 20.0, PURE_NOISE])
    x = sigma[:, None, None, None] * jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    np.testing.assert_allclose(ours(x, sigma), theirs.denoiser()(x, sigma), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_samplers_start_from_pure_noise(kind, teachers):
    trained = open_workdir(teachers[kind])
    levels = generate.noise_levels(trained.model, trained.config.sample)
    assert levels[0] == PURE_NOISE and levels[-1] == 0
    assert np.isfinite(np.asarray(trained.sample(2))).all()


@pytest.mark.parametrize(
    "texts,words",
    [
        ((*KINDS["v"], "noise.distribution=ddpm"), "noise.distribution: 'ddpm' given.*pure noise"),
        ((*KINDS["v"], "ogdm.distribution=adm"), "ogdm.distribution=edm"),
        ((*KINDS["flow"], "ogdm.condition=sigma"), "ogdm.condition: 'sigma' given; expected log"),
        ((*KINDS["flow"], "ogdm.solver=heun"), "ogdm.solver: 'heun' given; expected euler"),
    ],
)
def test_what_pure_noise_forbids_is_one_sentence(texts, words):
    with pytest.raises(configs.ConfigError, match=words) as error:
        config = tiny.config(*SMALL, *texts)
        runs.build(config, data.open_source("digits"), parallel.make_plan("pmap", 1))
    assert "\n" not in str(error.value)
