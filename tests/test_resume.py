"""Train n + kill + resume = train n + 10, bit for bit, through the command line; stopping politely
loses nothing.
"""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import pytest

from ogdm_jax import data, parallel
from ogdm_jax.training import run as runs
from ogdm_jax.training.checkpoint import CheckpointError, Checkpoints, find, load_weights
from tests.support import compiling, tiny

ENV = os.environ | {
    "XLA_FLAGS": f"{compiling.FLAGS} --xla_force_host_platform_device_count=2",
    "JAX_PLATFORMS": "cpu",
}
PLAIN = "methods="  # where the discriminator adds nothing but its compilation


def start(workdir, *more: str) -> subprocess.Popen:
    flags = tiny.flags(*tiny.SMALLEST, "train.keep=1000", *more)
    command = [sys.executable, "train.py", "--workdir", str(workdir), *flags]
    return subprocess.Popen(
        command, cwd=tiny.ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == code, out
    return out


def refusal(out: str) -> str:
    """The one sentence of a command that ended before it did anything."""
    *before, sentence = out.splitlines()
    assert not before or [line[:14] for line in before] == ["without effect"], out
    return sentence


def wait_for_checkpoint(workdir, process, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not any(p.name.isdigit() for p in (workdir / "checkpoints").glob("*")):
        assert process.poll() is None and time.monotonic() < end, process.stdout.read()
        time.sleep(0.01)


def saved_state(workdir, step: int):
    """Everything a checkpoint holds, on this process's first device, and the loader's position."""
    config = find(workdir).config
    run = runs.build(config, data.open_source("digits"), parallel.make_plan("pmap", 1))
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore(step, jax.eval_shape(run.create, run.key), run.plan)


@pytest.mark.parametrize(
    "methods",
    # all methods in one process: test_methods.py
    [(), pytest.param(("ogdm",), marks=pytest.mark.slow)],
)
def test_kill_and_resume_is_bit_exact(tmp_path, methods):
    on = f"methods={methods!r}"
    killed = start(tmp_path / "a", "train.duration=100000 steps", on)
    wait_for_checkpoint(tmp_path / "a", killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    step = find(tmp_path / "a").step
    out = finish(start(tmp_path / "a", f"train.duration={step + 10} steps", on))
    assert f"resumed from step {step}" in out
    finish(start(tmp_path / "b", f"train.duration={step + 10} steps", on))
    resumed, straight = (saved_state(tmp_path / w, step + 10) for w in ("a", "b"))
    assert resumed[1] == straight[1] == {"step": step + 10}
    assert set(straight[0].carry) == set(methods)
    tiny.assert_trees(resumed[0], straight[0])


@pytest.mark.slow_cases("2")  # in one process: test_loop.py
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_saves_and_exits_zero(tmp_path, number):
    process = start(
        tmp_path,
        "train.duration=100000 steps",
        "train.save_every=0 steps",
        "log.every=1 steps",
        PLAIN,
    )
    log = tmp_path / "metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.send_signal(number)
    out = finish(process)
    step = find(tmp_path).step
    assert f"stopped at step {step}" in out
    done = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert done[-1] == step  # every step that was logged is in the checkpoint


@pytest.mark.slow
def test_resume_on_another_device_count_and_plan(tmp_path):
    finish(start(tmp_path, "train.duration=10 steps"))
    before, _ = saved_state(tmp_path, 10)
    out = finish(start(tmp_path, "train.duration=12 steps", "parallel.plan=sharded"))
    assert "resumed from step 10" in out
    run = runs.build(
        find(tmp_path).config, data.open_source("digits"), parallel.make_plan("sharded", 8)
    )
    with Checkpoints(tmp_path) as checkpoints:
        eight, _ = checkpoints.restore(10, jax.eval_shape(run.create, run.key), run.plan)
    tiny.assert_trees(run.plan.local_copy(eight), before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    finish(start(workdir, "train.duration=10 steps", PLAIN))
    return workdir


def test_workdir_of_another_configuration_is_refused(trained):
    out = finish(start(trained, "network.model_channels=16", PLAIN), code=1)
    sentence = refusal(out)
    assert sentence.startswith(
        "error: --workdir holds a run of another configuration: network.model_channels"
    )


def test_damaged_checkpoint_is_one_sentence_and_nothing_is_lost(trained, tmp_path):
    import shutil

    copy = tmp_path / "w"
    shutil.copytree(trained, copy)
    victims = [
        p
        for p in (copy / "checkpoints" / "10" / "params").rglob("*")
        if p.is_file() and p.stat().st_size > 0
    ]
    for path in victims:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    out = finish(start(copy, "train.duration=20 steps", PLAIN), code=1)
    assert "error: --workdir: every checkpoint" in out and "is damaged (" in out
    assert (copy / "checkpoints" / "10").is_dir()


def test_missing_or_other_networks_are_named(trained, tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="no checkpoint of step 7"):
        find(trained, 7)
    with pytest.raises(CheckpointError, match="config.sp.teacher_step: no checkpoint of step 7"):
        find(trained, 7, "config.sp.teacher")
    for setting, misfit in (
        (
            "network.model_channels=16",
            r"\(params/\S+ is \(1, 48\) there, \(1, 96\) here; 19 of 20 tensors",
        ),
        (
            "data.conditional=true",
            r"\(params/\S+ is missing there, \(11, 8\) here; 1 of 21 tensors",
        ),
    ):
        other = tiny.build(*tiny.SMALLEST, PLAIN, setting)
        shapes = jax.eval_shape(other.create, other.key)
        with pytest.raises(
            CheckpointError, match=rf"sp.teacher: checkpoint .* is of another network {misfit}"
        ):
            load_weights(find(trained, field="config.sp.teacher"), shapes.params, shapes.buffers)
    with pytest.raises(
        CheckpointError, match="config.sp.teacher_weights: 'best' given; expected ema or params"
    ):
        load_weights(
            find(trained, field="config.sp.teacher"), shapes.params, shapes.buffers, "best"
        )


def test_a_misfit_to_fine_tune_is_one_sentence_of_the_process_and_leaves_nothing(trained, tmp_path):
    out = finish(
        start(tmp_path / "new", f"init.workdir={trained}", "network.model_channels=16", PLAIN),
        code=1,
    )
    assert refusal(out).startswith("error: config.init.workdir: checkpoint ")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_fine_tuning_starts_from_the_moving_average(trained, tmp_path):
    finish(start(tmp_path, f"init.workdir={trained}", "train.duration=0 steps", "methods="))
    source, _ = saved_state(trained, 10)
    config = find(tmp_path).config
    run = runs.build(config, data.open_source("digits"), parallel.make_plan("pmap", 1))
    with Checkpoints(tmp_path) as checkpoints:
        tuned, _ = checkpoints.restore(0, jax.eval_shape(run.create, run.key), run.plan)
    tiny.assert_trees(tuned.params, source.ema)
    tiny.assert_trees(tuned.ema, source.ema)


@pytest.mark.slow
def test_a_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(trained, tmp_path):
    import shutil

    copy = tmp_path / "w"
    shutil.copytree(trained, copy)
    out = finish(
        start(copy, "train.duration=20 steps", "sample.sigma_max=80.0", "log.every=1 steps", PLAIN)
    )
    assert find(copy).step == 20, out
    bad = tmp_path / "bad"
    flags = (
        "train.duration=40 steps",
        "optim.learning_rate=1e30",
        "train.save_every=1 steps",
        PLAIN,
    )
    out = finish(start(bad, *flags), code=1)
    assert "error: the state after step 1 is not finite; no step before it is saved" in out
