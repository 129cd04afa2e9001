"""How processes find each other and end together, without starting any; tests/test_two_processes.py
starts them.
"""

import logging
import re
import threading
import time
from types import SimpleNamespace

import pytest

from ogdm_jax import cluster
from ogdm_jax.config import ConfigError
from tests.support import tiny
from tests.support.commands import entry

ALL = {"coordinator": "10.0.0.2:1234", "processes": 2, "process": 1}


@pytest.mark.parametrize("names", [n.split() for n in ("coordinator", "processes", "process")] + [
    n.split() for n in ("coordinator processes", "coordinator process", "processes process")
])  # fmt: skip
def test_any_subset_of_the_flags_is_refused(names):
    with pytest.raises(ConfigError, match="together, or none") as found:
        cluster.check(
            **{"coordinator": None, "processes": None, "process": None} | {n: ALL[n] for n in names}
        )
    given, missing = (
        str(found.value).split(":")[0],
        str(found.value).partition("without ")[2].partition(";")[0],
    )
    assert given.split(", ") == [f"--{n}" for n in names]
    assert set(missing.split(" and ")) == {f"--{n}" for n in ALL} - {f"--{n}" for n in names}


@pytest.mark.parametrize(
    "changed,sentence",
    [
        ({"coordinator": "host"}, "--coordinator: 'host' given; expected HOST:PORT"),
        ({"coordinator": "host:0"}, "--coordinator: 'host:0' given"),
        ({"coordinator": "host:70000"}, "--coordinator: 'host:70000' given"),
        ({"coordinator": ""}, "--coordinator: '' given"),
        ({"processes": 0, "process": 0}, "--processes: 0 given; expected their number"),
        ({"process": 2}, "--process: 2 given; expected 0 to 1, as --processes is 2"),
        ({"process": -1}, "--process: -1 given"),
    ],
)
def test_flags_out_of_range_are_refused(changed, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        cluster.check(**ALL | changed)


def test_all_or_none_of_the_flags_pass():
    cluster.check(None, None, None)
    cluster.check(**ALL)
    cluster.check("[fe80::1]:80", 1, 0)


def test_train_refuses_a_subset_before_it_waits_for_anyone(tmp_path):
    done = entry(tmp_path, "train.py", "--processes", "2", *tiny.flags())
    assert done.returncode == 1 and done.stderr.startswith(
        "error: --processes: given without --coordinator and "
    )
    assert done.stderr.count("\n") == 1 and not (tmp_path / "runs").exists()


@pytest.fixture
def joining(monkeypatch):
    """State of a process that joins; `ended` is set where it is ended at once."""
    state = SimpleNamespace(process_id=1, num_processes=2, coordinator_address="10.0.0.2:1234")
    state.ended = threading.Event()
    monkeypatch.setattr(cluster, "_state", lambda: state)
    monkeypatch.setattr(cluster, "_reachable", lambda: False)
    monkeypatch.setattr(cluster, "end_at_once", lambda code: state.ended.set())
    monkeypatch.setattr(cluster, "JOINING", 0.05)
    return state


@pytest.mark.parametrize(
    "process,words",
    [(1, "process 0 does not answer at 10.0.0.2:1234"), (0, "not all of 2 processes have come")],
)
def test_processes_that_do_not_come_together_say_so(joining, process, words, monkeypatch, capsys):
    def waits(*_, initialization_timeout):
        assert initialization_timeout > cluster.JOINING  # JAX's own end is an abort in C++
        assert joining.ended.wait(10)
        raise RuntimeError("the test goes on where the process has ended")

    joining.process_id = process
    monkeypatch.setattr(cluster.jax.distributed, "initialize", waits)
    with pytest.raises(ConfigError):
        cluster.join(**ALL)
    assert capsys.readouterr().err.startswith(f"error: {words} after 0 s; expected each of them")


@pytest.mark.parametrize("process,said", [(0, True), (1, False)])
def test_notes_of_the_data_are_said_by_the_lead_process_alone(joining, process, said, monkeypatch):
    log, joining.process_id = logging.getLogger("ogdm_jax"), process
    before, started = log.level, []
    monkeypatch.setattr(cluster.jax.distributed, "initialize", lambda *_, **__: None)
    monkeypatch.setattr(cluster._watch, "start", lambda *numbers: started.append(numbers))
    try:
        cluster.join(**ALL)
        assert log.isEnabledFor(logging.WARNING) == said and started == [(process, 2)]
    finally:
        log.setLevel(before)


def test_a_port_that_is_taken_is_one_sentence(joining, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("UNKNOWN: Failed to start RPC server")

    monkeypatch.setattr(cluster.jax.distributed, "initialize", fails)
    with pytest.raises(ConfigError, match="cannot join .*RPC server.*10.0.0.2:1234, a port"):
        cluster.join(**ALL)
    assert not joining.ended.is_set()


@pytest.mark.parametrize(
    "env,found",
    [
        ({}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"SLURM_JOB_ID": "7"}, False),  # inside salloc or sbatch, without srun: one process
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "host:1"}, True),
    ],
)
def test_clusters_are_detected(env, found, monkeypatch):
    for name in (
        "TPU_WORKER_HOSTNAMES",
        "SLURM_STEP_NUM_TASKS",
        "OMPI_COMM_WORLD_SIZE",
        "JAX_COORDINATOR_ADDRESS",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cluster, "_tpu_vm", lambda: False)
    assert cluster.detected() == found


class Store(dict):
    """JAX's key-value store, in one process."""

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self
        self[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.items() if key.startswith(prefix)]

    def key_value_try_get(self, key):
        return self[key]

    def blocking_key_value_get(self, key, _):
        return self[key]


@pytest.fixture
def watch(monkeypatch):
    """make(process) -> a watch of three processes that start beating now, with its clock in your
    hands.
    """
    store, clock, filters = Store(), [time.monotonic()], len(logging.getLogger("absl").filters)

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(cluster, "_client", lambda: store)
    monkeypatch.setattr(cluster, "end_at_once", leave)
    monkeypatch.setattr(cluster.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(cluster.time, "sleep", lambda _: None)
    monkeypatch.setattr(cluster.threading.Thread, "start", lambda _: None)
    monkeypatch.setattr(cluster._Watch, "_catch_abort", lambda _: None)

    def make(process):
        made = cluster._Watch()
        made.start(process, 3)
        made.safe = lambda: "step 5 is safe"
        return made, store, clock

    yield make
    for left in logging.getLogger("absl").filters[filters:]:
        logging.getLogger("absl").removeFilter(left)


def test_process_0_names_the_one_that_fell_silent(watch, capsys):
    lead, store, clock = watch(0)
    for beat in range(60):  # a minute; 2 says nothing from the start
        clock[0] += 1
        store["ogdm_jax/beat/1"] = str(beat)
        if beat < cluster.SILENCE:
            lead._judge()
        if beat > cluster.SILENCE:
            with pytest.raises(SystemExit) as ended:
                lead._judge()
            break
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: process 2 of 3 is lost; step 5 is safe\n"
    other, *_ = watch(1)
    with pytest.raises(SystemExit):
        other._listen()
    assert capsys.readouterr().err == "error: process 2 of 3 is lost; step 5 is safe\n"


def test_a_process_0_that_hangs_is_noticed_though_its_store_never_answers(
    watch, monkeypatch, capsys
):
    follower, *_ = watch(1)
    ticks = []

    def wait(_):
        ticks.append(1)
        if len(ticks) == 20:
            follower._heard += 1  # it answered once more
        return False

    monkeypatch.setattr(follower._stopped, "wait", wait)
    with pytest.raises(SystemExit):
        follower._wait_for_process_0()
    assert 20 + cluster.SILENCE <= len(ticks) <= 22 + cluster.SILENCE
    assert capsys.readouterr().err == "error: process 0 of 3 is lost; step 5 is safe\n"


def test_one_that_ended_with_an_error_is_named_after_a_moment_and_one_that_left_never(
    watch, capsys
):
    lead, store, clock = watch(0)
    store |= {"ogdm_jax/beat/1": cluster._LEFT, "ogdm_jax/beat/2": "7", "ogdm_jax/ended/2": "1"}
    lead._judge()
    clock[0] += cluster.GRACE - 0.5  # the time in which this process may print an error of its own
    lead._judge()
    assert capsys.readouterr().err == ""
    clock[0] += 1
    with pytest.raises(SystemExit):
        lead._judge()
    assert (
        capsys.readouterr().err
        == "error: process 2 of 3 ended with an error of its own; step 5 is safe\n"
    )
    del store["ogdm_jax/ended/2"]
    again, store, clock = watch(0)
    store |= {"ogdm_jax/beat/1": cluster._LEFT, "ogdm_jax/beat/2": cluster._LEFT}
    for _ in range(100):
        clock[0] += 10
        again._judge()


def test_the_sentence_comes_although_the_storage_fails(watch, capsys):
    lead, *_ = watch(0)
    lead.safe = lambda: 1 / 0
    with pytest.raises(SystemExit):
        lead._mourn(1)
    assert "its checkpoints cannot be listed (ZeroDivisionError)" in capsys.readouterr().err


def test_a_background_save_that_fails_with_a_lost_process_says_nothing_more(watch, monkeypatch):
    follower, *_ = watch(1)
    record = logging.LogRecord(
        "absl", logging.ERROR, "", 0, "save failed", None, (ValueError, ValueError(), None)
    )
    monkeypatch.setattr(cluster, "_reachable", lambda: True)
    assert follower._adds_something(record)
    monkeypatch.setattr(cluster, "_reachable", lambda: False)
    assert not follower._adds_something(record)


def test_a_difference_names_the_setting_and_both_values():
    same = {"config.seed": "0", "config.methods": "('ogdm',)"}
    assert cluster._difference(same, dict(same), 1) == ""
    said = cluster._difference(same, same | {"config.seed": "1"}, 3)
    assert said.startswith("config.seed: 0 in process 0, 1 in process 3; expected the same")
    assert "config.new: missing in process 0, 2 in process 1" in cluster._difference(
        same, same | {"config.new": "2"}, 1
    )
