"""Two processes on this machine (jax.distributed, gloo) give the one-process numbers, and both save."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import compiling
import jax
import numpy as np
import pytest
import tiny

from ogdm_jax import data, parallel
from ogdm_jax.training import run as runs
from ogdm_jax.training.checkpoint import Checkpoints, evaluations, find

STEPS = 5


def launch(workdir, processes: int, devices: int, *more: str, meanwhile=None) -> list[str]:
    """Runs train.py in several processes, and meanwhile(them) if given; their outputs."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {
        "XLA_FLAGS": f"{compiling.FLAGS} --xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    settings = tiny.flags(tiny.ONE_LEVEL, f"train.duration={STEPS} steps", "log.every=1 steps", *more)
    running = []
    for process in range(processes):
        joined = (
            ["--coordinator", f"127.0.0.1:{port}", "--processes", str(processes), "--process", str(process)]
            if processes > 1
            else []
        )
        command = [sys.executable, "train.py", "--workdir", str(workdir), *joined, *settings]
        running.append(
            subprocess.Popen(
                command, cwd=tiny.ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    try:
        if meanwhile:
            meanwhile(running)
        outs = [p.communicate(timeout=300)[0] for p in running]
    finally:
        for p in running:
            p.kill()
    assert all(p.returncode == 0 for p in running), "\n".join(outs)
    return outs


def losses(workdir) -> np.ndarray:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    steps = [values for values in map(json.loads, lines) if "loss" in values]  # evaluations have lines of their own
    return np.array([[values[k] for k in ("loss", "loss/ogdm_companion", "grad_norm")] for values in steps])


def final_params(workdir):
    run = runs.build(find(workdir).config, data.open_source("digits"), parallel.make_plan("pmap", 1))
    with Checkpoints(workdir) as checkpoints:
        state, _ = checkpoints.restore(STEPS, jax.eval_shape(run.create, run.key), run.plan)
    return state.params


@pytest.mark.parametrize(
    "plan,evaluated",
    [
        ("pmap", ()),
        pytest.param("mesh", ("evaluate.features=digits", "evaluate.num=45"), marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one(tmp_path, plan, evaluated):
    outs = launch(tmp_path / "two", 2, 2, f"parallel.plan={plan}", *evaluated)
    assert "step" in outs[0] and "images/s" in outs[0] and "images/s" not in outs[1]  # only the lead process logs
    launch(tmp_path / "one", 1, 1, *evaluated)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=2e-4)
    for a, b in zip(
        jax.tree.leaves(final_params(tmp_path / "two")), jax.tree.leaves(final_params(tmp_path / "one")), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-3)
    if evaluated:  # each process samples its share, the lead one measures
        two, one = (evaluations(tmp_path / name)[STEPS] for name in ("two", "one"))
        assert two["n"] == one["n"] == 45 and two["features"] == "fd_digits"
        np.testing.assert_allclose(two["fd"], one["fd"], rtol=0.02)


def test_a_signal_to_one_process_stops_both_at_the_same_step(tmp_path):
    """Ctrl-C, which goes through JAX's SIGTERM: one process alone must not enter a save that needs both."""
    log = tmp_path / "metrics.jsonl"

    def interrupt(running):
        while not (log.exists() and log.read_text().count("\n") >= 2):
            assert all(p.poll() is None for p in running)
            time.sleep(0.1)
        running[0].send_signal(signal.SIGINT)

    outs = launch(tmp_path, 2, 1, "train.duration=100000 steps", "methods=", meanwhile=interrupt)
    stopped = find(tmp_path).step
    assert f"stopped at step {stopped}; saved" in outs[0] and 2 <= stopped < 100_000
