"""Two processes on this machine (jax.distributed, gloo) give the one-process numbers, save and end
together.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from ogdm_jax import data, parallel
from ogdm_jax.training import evaluations
from ogdm_jax.training import run as runs
from ogdm_jax.training.checkpoint import Checkpoints, complete, find
from tests.support import compiling, tiny

STEPS = 5


def launch(
    workdir, processes: int, devices: int, *more: str, meanwhile=None, each=((), ())
) -> list[str]:
    """Runs train.py in several processes, and meanwhile(them) if given; their outputs. All have to
    end well.
    """
    outs, codes = run(workdir, processes, devices, *more, meanwhile=meanwhile, each=each)
    assert not any(codes), "\n".join(outs)
    return outs


def run(
    workdir, processes: int, devices: int, *more: str, meanwhile=None, each=((), ())
) -> tuple[list[str], list[int]]:
    """(outputs, exit codes) of train.py in several processes. each: further settings of the single
    ones.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {
        "XLA_FLAGS": f"{compiling.FLAGS} --xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    running = []
    for process in range(processes):
        joined = (
            [
                "--coordinator",
                f"127.0.0.1:{port}",
                "--processes",
                str(processes),
                "--process",
                str(process),
            ]
            if processes > 1
            else []
        )
        settings = (f"train.duration={STEPS} steps", "log.every=1 steps", *more, *each[process])
        words = [
            "train.py",
            "--workdir",
            str(workdir),
            *joined,
            *tiny.flags(*tiny.SMALLEST, *settings),
        ]
        piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running.append(subprocess.Popen([sys.executable, *words], cwd=tiny.ROOT, env=env, **piped))
    try:
        if meanwhile:
            meanwhile(running)
        outs = [p.communicate(timeout=300)[0] for p in running]
    finally:
        for p in running:
            p.kill()
    return outs, [p.returncode for p in running]


def losses(workdir) -> np.ndarray:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    steps = [
        values for values in map(json.loads, lines) if "loss" in values
    ]  # evaluations have lines of their own
    known = [k for k in ("loss", "loss/ogdm_discriminator", "grad_norm") if k in steps[0]]
    return np.array([[values[k] for k in known] for values in steps])


def final_params(workdir):
    run = runs.build(
        find(workdir).config, data.open_source("digits"), parallel.make_plan("pmap", 1)
    )
    with Checkpoints(workdir) as checkpoints:
        state, _ = checkpoints.restore(STEPS, jax.eval_shape(run.create, run.key), run.plan)
    return state.params


@pytest.mark.parametrize(
    "plan,evaluated",
    [
        ("pmap", ("methods=",)),  # OGDM on several devices: test_plans.py
        pytest.param("pmap", (), marks=pytest.mark.slow),
        pytest.param("sharded", (), marks=pytest.mark.slow),
        pytest.param(
            "mesh", ("evaluate.features=digits", "evaluate.num=45"), marks=pytest.mark.slow
        ),
    ],
)
def test_two_processes_equal_one(tmp_path, plan, evaluated):
    outs = launch(tmp_path / "two", 2, 2, f"parallel.plan={plan}", *evaluated)
    assert (
        "step" in outs[0] and "images/s" in outs[0] and "images/s" not in outs[1]
    )  # only the lead process logs
    launch(tmp_path / "one", 1, 1, *evaluated)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=2e-4)
    for a, b in zip(
        jax.tree.leaves(final_params(tmp_path / "two")),
        jax.tree.leaves(final_params(tmp_path / "one")),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-3)
    if len(evaluated) == 2:  # each process samples its share, the lead one measures
        two, one = (evaluations.read(tmp_path / name)[STEPS] for name in ("two", "one"))
        assert two["n"] == one["n"] == 45 and two["features"] == "fd_digits"
        np.testing.assert_allclose(two["fd"], one["fd"], rtol=0.02)


ENDLESS = ("train.duration=100000 steps", "methods=", "train.save_every=4 steps")


def after_steps(workdir, steps: int, act):
    """What to do meanwhile: act(processes) once so many steps are logged."""

    def wait(running):
        log = workdir / "metrics.jsonl"
        while not (log.exists() and log.read_text().count("\n") >= steps):
            assert all(p.poll() is None for p in running)
            time.sleep(0.1)
        act(running)

    return wait


@pytest.mark.slow
@pytest.mark.parametrize(
    "number,to",
    [(signal.SIGTERM, 1), (signal.SIGINT, 0)],
    ids=["SIGTERM", "SIGINT"],
)
def test_a_signal_to_one_process_stops_both_at_the_same_step(tmp_path, number, to):
    """Ctrl-C goes through JAX's SIGTERM: one process alone must not enter a save that needs
    both.
    """
    signal_one = after_steps(tmp_path, 2, lambda running: running[to].send_signal(number))
    outs = launch(tmp_path, 2, 1, *ENDLESS, meanwhile=signal_one)
    stopped = find(tmp_path).step
    assert f"stopped at step {stopped}; saved" in outs[0] and 2 <= stopped < 100_000
    outs = launch(tmp_path, 2, 1, *ENDLESS, f"train.duration={stopped + 2} steps")
    assert f"resumed from step {stopped}" in outs[0] and find(tmp_path).step == stopped + 2


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_the_survivor_of_a_killed_process_names_it_and_the_safe_step(tmp_path, victim):
    """kill -9, as a machine dies: without this, JAX ends the other one after a minute under a C++
    stack.
    """
    died = []

    def kill(running):
        running[victim].kill()
        died.append(time.monotonic())

    outs, codes = run(tmp_path, 2, 1, *ENDLESS, meanwhile=after_steps(tmp_path, 10, kill))
    survived = 1 - victim
    assert time.monotonic() - died[0] < 45
    assert codes[victim] == -signal.SIGKILL and codes[survived] == 1
    safe = complete(tmp_path)[-1]
    *_, last = outs[survived].splitlines()
    assert last == f"error: process {victim} of 2 is lost; step {safe} in {tmp_path} is safe; " + (
        "the same command in all processes goes on from there"
    )
    assert "Traceback" not in outs[survived] and outs[survived].count("error: ") == 1 and safe >= 4
    outs = launch(tmp_path, 2, 1, *ENDLESS, f"train.duration={safe + 2} steps")
    assert f"resumed from step {safe}" in outs[0] and find(tmp_path).step == safe + 2


def test_different_settings_are_refused_by_both_before_anything_is_compiled(tmp_path):
    each = ((), ("optim.learning_rate=0.1", "seed=3"))
    outs, codes = run(tmp_path, 2, 1, each=each)
    assert codes == [1, 1]
    for out in outs:
        (sentence,) = [line for line in out.splitlines() if line.startswith("error: ")]
        assert sentence == (
            "error: config.seed: 0 in process 0, 3 in process 1; expected the same settings in all "
            "processes of a run"
        ) or sentence.startswith(
            "error: config.optim.learning_rate: 0.001 in process 0, 0.1 in process 1; "
        )
        assert "compiled" not in out and "Traceback" not in out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_other_too(tmp_path):
    """Data that lies on one machine alone: the other process would wait for it in the first step,
    for minutes.
    """
    (tmp_path / "here").mkdir()
    images = np.zeros((40, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "here" / "set.npz", image=images, label=np.arange(40) % 2)
    each = tuple((f"data.data_dir={tmp_path / where}",) for where in ("here", "missing"))
    started = time.monotonic()
    outs, codes = run(
        tmp_path / "run", 2, 1, "data.source=npz:set.npz", "methods=", *ENDLESS[:1], each=each
    )
    assert codes == [1, 1] and time.monotonic() - started < 120
    assert "error: npz:set.npz: there is no file" in outs[1] and "is lost" not in outs[1]
    assert "error: process 1 of 2 ended with an error of its own; no checkpoint in" in outs[0]
    assert "Traceback" not in outs[0] + outs[1]
