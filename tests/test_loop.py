"""The loop around the steps: what is saved before it ends, in whatever way; the way back; what it
says. Steps cost nothing here: they count.
"""

import dataclasses
import errno
import json
import os
import signal
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax import cluster, data
from ogdm_jax.config import ConfigError
from ogdm_jax.data import SourceError
from ogdm_jax.training import inner, lock, logs, loop, resume, signals
from ogdm_jax.training.checkpoint import CheckpointError, find
from ogdm_jax.training.logs import LogError
from tests.support import tiny


class Plan:
    """What happens at which step: {step: do(state) -> metrics}; Run.compile's stand-in."""

    def __init__(self):
        self.at = {}
        self.losses = {}
        self.states = {}

    def step(self, state, constants, batch, key):
        step = int(state.step) + 1
        if step in self.at:
            self.at[step]()
        state = state.replace(step=state.step + 1)
        state = self.states.get(step, lambda s: s)(state)
        return state, {"loss": jnp.asarray(self.losses.get(step, 1.0))}


@pytest.fixture
def plan(monkeypatch):
    plan = Plan()
    monkeypatch.setattr(loop.runs.Run, "compile", lambda self, like: plan.step)
    quiet = dataclasses.replace(loop.DENOISER, watch=lambda *_: lambda step, state: None)
    monkeypatch.setattr(loop, "DENOISER", quiet)
    return plan


def settings(steps: int, *more: str):
    return tiny.config(
        *tiny.SMALLEST,
        "methods=",
        "train.keep=100",
        "train.save_every=4 steps",
        f"train.duration={steps} steps",
        "log.every=2 steps",
        "parallel.devices=1",
        *more,
    )


def train(workdir, steps: int, *more: str, **words) -> list[str]:
    said = []
    try:
        loop.train(settings(steps, *more), workdir, said.append, **{"stopped_code": 0} | words)
    except cluster.Stopped:
        said.append("left")
    return said


def saved(workdir) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())


def logged(workdir, name=logs.METRICS) -> list[int]:
    return [json.loads(line)["step"] for line in (workdir / name).read_text().splitlines()]


def history(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / resume.HISTORY).read_text().splitlines()]


def test_what_a_run_says(tmp_path, plan):
    said = train(tmp_path, 8, "data.conditional=true", "optim.accumulate=2")
    first, end = said[0].splitlines(), said[-1]
    assert [line.split()[0] for line in first] == [
        *("ogdm_jax", "data", "network", "devices", "memory", "length", "folder")
    ]
    assert "digits, 1,797 images of 8x8x1, 10 classes (0, 1, 2," in first[1]
    assert "denoiser, dit, " in first[2] and "parameters" in first[2]
    assert "1 x cpu, plan mesh; 32 images a step (16 a device, 2 rounds)" in first[3]
    state = jax.tree.leaves(find(tmp_path) and _state(settings(8, "data.conditional=true")))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in state)
    assert f"{size / 1e3:.0f} kB a device" in first[4]
    assert (
        "8 steps = 0.26 kimg; save every 4, log every 2, evaluate never, picture at the end"
        in first[5]
    )
    assert first[6] == f"folder    {tmp_path}: a new run"
    assert all(len(line) <= 160 for line in first)
    assert said[1] == "compiling the train step ..." and said[2].startswith("compiled in ")
    assert end == f"trained to step 8; saved in {tmp_path}"
    assert "resumed from step 8" in train(tmp_path, 12, "data.conditional=true")[0]


def _state(config):
    run = loop.DENOISER.build(config, loop.parallel.make_plan("mesh", 1), None, print, None)
    return jax.eval_shape(run.create, run.key)


@pytest.mark.slow
def test_going_back_moves_what_lies_behind(tmp_path, plan):
    train(tmp_path, 12)
    assert saved(tmp_path) == [4, 8, 12] and logged(tmp_path)[-1] == 12
    with pytest.raises(CheckpointError, match="config.init.step: no checkpoint of step 5"):
        train(tmp_path, 12, "init.step=5")
    lower = ("init.step=4", "optim.learning_rate=1e-4")
    with pytest.raises(ConfigError, match="optim.learning_rate .*--override"):
        train(tmp_path, 12, *lower)
    assert saved(tmp_path) == [4, 8, 12]  # what is refused moves nothing
    plan.at[7] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    said = train(tmp_path, 12, *lower, override=True)
    assert f"went back to step 4; steps 8, 12 are now in {tmp_path}/set_aside/1" in said
    assert "resumed from step 4" in "".join(said) and saved(tmp_path) == [4, 7]
    assert sorted(p.name for p in (tmp_path / "set_aside" / "1").iterdir()) == ["12", "8"]
    assert [line["what"] for line in history(tmp_path)] == ["went back", "override"]
    assert history(tmp_path)[1]["changed"] == {"optim.learning_rate": [1e-3, 1e-4]}
    assert logged(tmp_path, logs.REPLACED) == [6, 8, 10, 12] and logged(tmp_path) == [2, 4, 6]
    del plan.at[7]
    said = train(tmp_path, 12, *lower, override=True)  # the same command goes on
    assert "resumed from step 7" in "".join(said) and saved(tmp_path) == [4, 7, 8, 12]
    assert len(history(tmp_path)) == 2
    said = train(tmp_path, 12, "init.step=0", override=True)
    assert "a new run" in "".join(said) and saved(tmp_path) == [4, 8, 12]
    assert sorted(p.name for p in (tmp_path / "set_aside" / "2").iterdir()) == [
        *("12", "4", "7", "8")
    ]


def test_a_bad_loss_names_the_step_that_is_good_and_advice_that_works(tmp_path, plan):
    plan.losses[9] = float("nan")  # of the state after 8 steps, which is saved then
    with pytest.raises(inner.NotFinite) as error:
        train(tmp_path, 12)
    assert saved(tmp_path) == [4, 8]
    text = str(error.value)
    assert text.startswith("loss is nan at step 9; step 4 in ")
    words = text.partition("same command with ")[2].split(",")[0].split()
    assert words[1] == "--override"
    plan.losses.clear()
    advice = [word.removeprefix("--config.") for word in words if "=" in word]
    said = train(tmp_path, 12, *advice, override=True)
    assert "resumed from step 4" in "".join(said) and saved(tmp_path) == [4, 8, 12]


def test_the_step_that_a_fine_tuned_run_began_with_is_no_way_back(tmp_path, plan):
    """Its init.step names a step of the other folder, whichever its own steps are."""
    train(tmp_path / "from", 8)
    tuned = (f"init.workdir={tmp_path}/from", "init.step=4")
    own = tmp_path / "own"
    train(own, 8, *tuned, "train.save_every=2 steps")
    rate = "optim.learning_rate=1e-4"
    with pytest.raises(ConfigError, match="optim.learning_rate .*--override"):
        train(own, 10, *tuned, rate)
    assert "resumed from step 8" in "".join(train(own, 10, *tuned, rate, override=True))
    assert not (own / "set_aside").exists()
    said = train(own, 10, tuned[0], "init.step=6", rate, override=True)
    assert "went back to step 6" in "".join(said) and saved(own) == [2, 4, 6, 8, 10]


@pytest.mark.parametrize("bad", [3, 7])
def test_advice_for_a_fine_tuned_run_can_be_followed(tmp_path, plan, bad):
    """Without a good save, or where the good step's number is the one that it began with."""
    train(tmp_path / "from", 4)
    more = (f"init.workdir={tmp_path}/from", "init.step=4")
    plan.losses[bad] = float("nan")
    with pytest.raises(inner.NotFinite) as error:
        train(tmp_path / "own", 8, *more)
    text = str(error.value)
    assert "; start again by the same command with another --workdir and --config.optim" in text
    assert "init.step" not in text
    plan.losses.clear()
    said = train(tmp_path / "other", 8, *more, "optim.learning_rate=1e-4")
    assert "fine-tuning" in "".join(said) and saved(tmp_path / "other") == [4, 8]


# every part with one of the numbers; all numbers: test_soundness_is_the_same_in_any_grouping
@pytest.mark.slow_cases(
    "params-inf", "params-1e+38", "ema-nan", "ema-1e+38", "opt_state-nan", "opt_state-inf"
)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("part", ["params", "ema", "opt_state"])
def test_a_bad_state_is_not_kept(tmp_path, plan, part, wrong):
    def spoil(state):
        tree = getattr(state, part)
        leaves, shape = jax.tree.flatten(tree)
        k = next(k for k, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating))
        leaves[k] = leaves[k].at[(0,) * leaves[k].ndim].set(wrong)
        return state.replace(**{part: jax.tree.unflatten(shape, leaves)})

    plan.states[8] = spoil
    with pytest.raises(inner.NotFinite, match="state after step 8 is not finite; step 4 in "):
        train(tmp_path, 12)
    assert saved(tmp_path) == [4]


@pytest.mark.parametrize("together", [0, 1, 100, 1 << 23])
def test_soundness_is_the_same_in_any_grouping(together):
    state = {"a": jnp.ones((3, 4)), "b": jnp.ones(7, jnp.bfloat16), "n": jnp.zeros((), jnp.int32)}
    assert bool(inner._is_sound(state, together))
    for name in ("a", "b"):
        bad = state | {name: state[name].at[-1].set(jnp.nan)}
        assert not bool(inner._is_sound(bad, together))
    assert bool(inner._is_sound(state | {"a": jnp.full((3, 4), 1e18)}, together))


def test_an_error_of_the_data_saves_first(tmp_path, plan, monkeypatch):
    real = data.Batches.__next__

    def failing(self):
        if self._step == 6:
            raise SourceError("bad/7.png is no readable image")
        return real(self)

    monkeypatch.setattr(data.Batches, "__next__", failing)
    said = []
    with pytest.raises(SourceError, match="7.png"):
        loop.train(settings(12), tmp_path, said.append)
    assert said[-1] == "step 6 is saved; the same command goes on from there"
    assert saved(tmp_path) == [4, 6]
    monkeypatch.setattr(data.Batches, "__next__", real)
    assert "resumed from step 6" in train(tmp_path, 12)[0]
    state = json.loads((tmp_path / "checkpoints/12/data/metadata").read_text())
    assert state == {"step": 12}


def test_an_error_before_the_first_step_saves_nothing(tmp_path, plan, monkeypatch):
    def failing(self):
        raise SourceError("bad/7.png is no readable image")

    monkeypatch.setattr(data.Batches, "__next__", failing)
    with pytest.raises(SourceError):
        train(tmp_path, 12)
    assert saved(tmp_path) == []


def test_an_error_in_a_picture_or_an_evaluation_saves_first(tmp_path, plan, monkeypatch):
    def broken(*_):
        def draw(step, state):
            if step == 6:
                raise OSError(errno.ENOSPC, "No space left on device", "samples/6.png")

        return draw

    monkeypatch.setattr(loop, "DENOISER", dataclasses.replace(loop.DENOISER, watch=broken))
    said = []
    with pytest.raises(OSError, match="6.png"):
        loop.train(settings(12, "sample.every=3 steps"), tmp_path, said.append)
    assert saved(tmp_path) == [4, 6] and said[-1].startswith("step 6 is saved")


@pytest.mark.slow_cases("true")
@pytest.mark.parametrize("tensorboard", ["false", "true"])
def test_a_full_disk_in_the_log_is_one_sentence(tmp_path, plan, monkeypatch, tensorboard):
    def full(self, step, values):
        raise OSError(errno.ENOSPC, "No space left on device")

    if tensorboard == "true":
        monkeypatch.setattr(logs._Events, "write", full)
    else:
        real = logs.records.dumps

        def dumps(value, indent=None):
            if isinstance(value, dict) and value.get("step") == 6 and "loss" in value:
                full(None, None, None)
            return real(value, indent)

        monkeypatch.setattr(logs.records, "dumps", dumps)
    said = []
    with pytest.raises(LogError, match="the log cannot be written: .*no space left.*free some"):
        loop.train(settings(12, f"log.tensorboard={tensorboard}"), tmp_path, said.append)
    last = 2 if tensorboard == "true" else 6
    assert said[-1] == f"step {last} is saved; the same command goes on from there"
    monkeypatch.undo()


def test_nan_in_the_log_stays_a_word(tmp_path):
    with logs.Writer(loop.places.place(tmp_path), True, True) as writer:
        writer.write(1, {"loss": float("nan"), "x": np.float32("inf")})
    assert json.loads((tmp_path / logs.METRICS).read_text()) == {
        "step": 1,
        "loss": "nan",
        "x": "inf",
    }
    assert len(list((tmp_path / "events").iterdir())) == 1


@pytest.mark.parametrize(
    "raw,step,kept,replaced",
    [
        (b'{"step": 1}\n{"step": 2}\n', None, [1, 2], []),
        (b'{"step": 1}\n{"step": 2, "lo', None, [1], []),  # torn
        (b'{"step": 1}\n{"step": 2}', None, [1, 2], []),  # whole without its end
        (b'{"step": 1}\n{"step": 2, "a": 0.{"step": 2}\n', None, [1], []),  # glued
        (b'{"step": 1}\n\x00\x00\x00\n[3]\n7\n', None, [1], []),
        (b'{"step": 2}\n{"step": 4}\n{"step": 6}\n', 4, [2, 4], [6]),
        (b"", 4, [], []),
    ],
)
def test_metrics_of_a_killed_run_are_made_whole(tmp_path, raw, step, kept, replaced):
    path = tmp_path / logs.METRICS
    path.write_bytes(raw)
    with logs.Writer(loop.places.place(tmp_path), False, True, step) as writer:
        writer.write(9, {"loss": 1.0})
    assert logged(tmp_path) == [*kept, 9]
    if replaced:
        assert logged(tmp_path, logs.REPLACED) == replaced


def test_time_in_words():
    assert [logs.duration(s) for s in (0.4, 99, 100, 5900, 12_000, 190_800)] == [
        *("0 s", "99 s", "2 min", "98 min", "3 h 20 min", "2 d 5 h")
    ]
    assert logs.line(3, {"loss": 1.0}, 130.0).endswith("loss 1  2 min left")
    assert "left" not in logs.line(3, {"loss": 1.0}, 0.2)


def test_a_run_says_soon_how_long_it_will_take(tmp_path, plan, monkeypatch):
    clock, rarely = [0.0], ("train.save_every=1000 steps", "log.tensorboard=false")
    monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=lambda: clock[0], time=time.time))
    for step in range(1, 101):  # the second is slow; the first does not count, it is compiled
        plan.at[step] = lambda step=step: clock.__setitem__(0, clock[0] + (3 if step == 2 else 0.5))
    said = train(tmp_path / "a", 100, "log.every=50 steps", *rarely)
    told = [n for n, line in enumerate(said) if line.startswith("time ")]
    # two steps are timed, the slow one is left out
    assert [said[n] for n in told] == [
        "time      about 48 s for 97 more steps, at 64 images/s (1 timed); saves, "
        "pictures and evaluations come on top"
    ]
    assert said[told[0] - 1].startswith("compiled in") and said[told[0] + 1].startswith("step 50")
    said = train(tmp_path / "b", 9, "log.every=2 steps", *rarely)  # the log line has it
    assert not any(line.startswith("time ") for line in said) and said[4].endswith(" left")


def kill(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


@pytest.mark.slow_cases("2")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_steps_saves_then_says_so(tmp_path, plan, number):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    plan.at[6] = lambda: kill(number)
    said = train(tmp_path, 12)
    assert saved(tmp_path) == [4, 6]
    name = signal.Signals(number).name
    line = f"{name}: saving, then leaving; a second signal ends it at once, without saving"
    assert line in said[-4:]
    assert said[-2:] == ["stopped at step 6; saved, the same command goes on from here", "left"]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("where", ["build", "first step"])
def test_a_signal_before_the_first_step_leaves_at_once(tmp_path, plan, monkeypatch, where):
    def slow(*_):
        kill()
        time.sleep(20)

    if where == "build":
        monkeypatch.setattr(
            loop, "DENOISER", dataclasses.replace(loop.DENOISER, build=lambda *_: slow())
        )
    else:
        plan.at[1] = slow
    began = time.monotonic()
    said = train(tmp_path / "w", 12)
    assert time.monotonic() - began < 15
    assert said[-1] == "left" and "starts afresh" in said[-2]
    assert any("SIGTERM: nothing has been trained since the last save, leaving" in s for s in said)
    assert where != "build" or not (tmp_path / "w").exists()


@pytest.mark.parametrize("where", ["watch", "evaluation"])
def test_a_signal_in_something_long_saves_and_leaves(tmp_path, plan, monkeypatch, where):
    """The picture at step 6 is not one of a step that is saved: it is saved on the way out."""
    calls = []

    def slow(*_):
        calls.append(1)
        if len(calls) == 1:
            kill()
            time.sleep(20)
        return {"step": 6, "fd": 1.0, "floor": 0.0, "n": 2, "features": "digits"} | {
            name: 0.0 for name in ("kid", "precision", "recall", "nfe", "solver")
        }

    long = {where: lambda *_: slow}
    monkeypatch.setattr(loop, "DENOISER", dataclasses.replace(loop.DENOISER, **long))
    more = ("sample.every=6 steps",)
    if where == "evaluation":
        more = ("evaluate.every=6 steps", "evaluate.features=digits")
    said = train(tmp_path, 7, *more)
    assert saved(tmp_path) == [4, 6] and len(calls) == 1
    assert said[-2:] == ["stopped at step 6; saved, the same command goes on from here", "left"]
    if where == "evaluation":
        train(tmp_path, 7, *more)
        assert len(calls) == 3  # what was interrupted, and the one of the end


def test_saved_is_said_after_the_save_is_closed(tmp_path, plan, monkeypatch):
    order, wait = [], inner.Checkpoints.wait
    monkeypatch.setattr(
        inner.Checkpoints, "wait", lambda self: (wait(self), order.append("closed"))
    )
    plan.at[6] = kill

    def log(line):
        order.append(line)
        if "saved" in line and line.startswith("stopped"):
            assert 6 in saved(tmp_path)

    with pytest.raises(cluster.Stopped):
        loop.train(settings(12), tmp_path, log)
    assert (
        order[order.index("stopped at step 6; saved, the same command goes on from here") - 1]
        == "closed"
    )


def test_another_data_set_is_refused_and_accepted(tmp_path, plan, monkeypatch):
    train(tmp_path, 4)
    real = data.fingerprint
    other = lambda source: real(source) | {"class_names": ["z", *"123456789"]}
    monkeypatch.setattr(data, "fingerprint", other)
    with pytest.raises(ConfigError, match="config.data.source: is another data set"):
        train(tmp_path, 8)
    said = train(tmp_path, 8, override=True)
    assert any("--override: another data set" in line for line in said)
    assert "data.source" in history(tmp_path)[0]["changed"]
    train(tmp_path, 12)  # the newest checkpoint is of that set


def test_in_a_notebook_a_signal_stops_the_run_and_never_ends_the_process(tmp_path, monkeypatch):
    """Without an exit code nothing may end the process; the handlers of before come back."""
    before, said = signal.getsignal(signal.SIGINT), []
    monkeypatch.setattr(signals, "end_at_once", lambda code: pytest.fail(f"ended with {code}"))
    with pytest.raises(cluster.Stopped), signals.StopSignals(said.append) as stop:
        with stop.may_leave("leaving the evaluation"):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    assert said == ["SIGINT: leaving the evaluation"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_whose_folder_was_taken_over_saves_nothing(tmp_path, monkeypatch):
    """It was away (a suspended machine): the lock says so, and nothing is written over the other's."""
    calls = []

    def lost(self):
        calls.append(1)
        if len(calls) > 3:
            raise lock.LockError("--workdir: taken over")

    monkeypatch.setattr(lock.Lock, "check", lost)
    with pytest.raises(lock.LockError, match="taken over"):
        loop.train(settings(12), tmp_path, lambda line: None)
    assert not saved(tmp_path)


@pytest.mark.slow
def test_going_back_to_the_same_step_with_other_settings_goes_back_again(tmp_path):
    train(tmp_path, 6)
    for rate in (0.0005, 0.0001):
        more = ("init.step=4", f"optim.learning_rate={rate}")
        said = "\n".join(train(tmp_path, 6, *more, override=True))
        assert "resumed from step 4" in said, said
    assert "resumed from step 6" in "\n".join(train(tmp_path, 6, *more, override=True))
