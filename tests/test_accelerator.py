"""benchmarks/accelerator.py: its clock and processes against cases that misbehave, its counting,
and a rehearsal.
"""

import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import tiny

sys.path.insert(0, str(tiny.ROOT / "benchmarks"))
import accelerator
from accelerator_parts import Case, Options, pool, profiling, programs, table, train

PRETEND = """
import os, time
def run(name, options, report):
    if name == "slow":
        report({"half": 1})
        time.sleep(60)
    if name == "fails":
        raise ValueError("no such\\nthing")
    if name == "dies":
        print("last words")
        os._exit(3)
    print("libraries talk")
    return {"name": name, "pid": os.getpid()}
"""


@pytest.fixture
def process(tmp_path):
    """A worker that finds one more part, `pretend`."""
    (tmp_path / "pretend.py").write_text(PRETEND)
    start = f"import accelerator_parts\naccelerator_parts.__path__.append({str(tmp_path)!r})\n"
    (tmp_path / "sitecustomize.py").write_text(start)
    path = os.pathsep.join([str(tmp_path), str(tiny.ROOT / "benchmarks")])
    made = pool.Process(sys.executable, os.environ | {"PYTHONPATH": path}, tmp_path / "log.txt")
    yield made
    made.close()


def ask(process, name, seconds=20.0, report=lambda _: None):
    options = Options(True, "", "", seconds=seconds).to_dict()
    return process.ask(
        {"module": "pretend", "action": "run", "name": name, "options": options}, seconds, report
    )


def test_a_case_that_fails_dies_or_overruns_is_one_answer(process, tmp_path):
    first = ask(process, "good")
    assert ask(process, "fails") == {"error": "ValueError: no such thing"}
    assert ask(process, "good")["pid"] == first["pid"]  # an exception ends no process
    assert ask(process, "dies")["error"] == "the process ended (exit code 3): last words"
    seen = []
    began = time.monotonic()
    assert ask(process, "slow", 2.0, seen.append)["error"].startswith("stopped")
    assert time.monotonic() - began < 10 and seen == [{"half": 1}]
    last = ask(process, "good")
    assert last["name"] == "good" and last["pid"] != first["pid"]
    assert "libraries talk" in (tmp_path / "log.txt").read_text()


def test_an_interpreter_that_cannot_be_run_is_an_answer(tmp_path):
    process = pool.Process(str(tmp_path / "none"), os.environ, tmp_path / "log.txt")
    assert "cannot be run" in ask(process, "good")["error"]


@pytest.mark.fast
def test_jobs_not_begun_in_time_are_left():
    processes = [types.SimpleNamespace(close=lambda: None) for _ in range(2)]
    done = []

    def work(process, job):
        done.append(job)
        time.sleep(0.3)

    left = pool.side_by_side([1, 2, 3, 4], processes, work, time.monotonic() + 0.2)
    assert sorted(done) == [1, 2] and left == [3, 4]


@pytest.mark.fast
def test_a_phase_gets_its_share_of_what_is_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(accelerator.time, "monotonic", lambda: now[0])
    clock = accelerator.Clock(10, ["prepare", "train", "images"])
    assert clock.left() == 600 - accelerator.CLOSING
    shares = accelerator.SHARES
    whole = shares["prepare"] + shares["train"] + shares["images"]
    assert clock.begin("prepare") == pytest.approx(100 + 596 * shares["prepare"] / whole)
    now[0] = 110.0  # nearly nothing was needed: the others share the rest
    assert clock.begin("train") == pytest.approx(
        110 + 586 * shares["train"] / (whole - shares["prepare"])
    )
    assert clock.begin("images") == pytest.approx(110 + 586)


@pytest.mark.parametrize(
    "words,said",
    [
        (["--only", "trian"], "--only: 'trian'"),
        (["--only", "train.nothing"], "--only: 'train.nothing'"),
        (["--minutes", "0"], "--minutes"),
        (["--edm", "/no/such"], "--edm"),
        (["--images", "/no/such.npz"], "--images"),
        (["--torch-python", "/no/such"], "--torch-python"),
        (["--lanes", "-1"], "--lanes"),
        (["--out", "/proc/here"], "--out"),
    ],
)
def test_bad_words_get_one_sentence(words, said, monkeypatch, tmp_path):
    monkeypatch.setattr(
        sys, "argv", ["accelerator.py", "--out", str(tmp_path), "--rehearse", *words]
    )
    monkeypatch.setattr(accelerator.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        accelerator.main()
    assert str(stop.value.code).startswith("error: ") and said in str(stop.value.code)


@pytest.mark.fast
def test_the_parts_hold_what_they_promise():
    options = Options(False, "", "", golden=str(tiny.ROOT / "tests" / "golden"))
    names = {f"{case.part}.{case.name}" for case in accelerator.choose(options, "")}
    families = (
        "edm_adm_a",
        "gd_unet_d",
        "ogdm_losses_euler",
        "stf_targets_a",
        "dsg_p_sample",
        "resume",
        "accumulate",
    )
    assert {f"exact.{name}" for name in families} <= names
    for name in (
        "train.torch-compile-autocast",
        "train.ogdm-heun",
        "sampling.ddim-dsg",
        "images.edm-and-ogdm",
    ):
        assert name in names
    only = accelerator.choose(options, "profile, exact.stf_*")
    assert {case.part for case in only} == {"profile", "exact"} and len(only) == 3


@pytest.fixture
def nothing_cached():
    """On a CPU, a program out of the compilation cache cannot be written again (jaxlib 0.10)."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    yield
    jax.config.update(name, before)


def test_a_program_survives_its_file(tmp_path, nothing_cached):
    options = Options(True, str(tmp_path), "")
    like = {
        "w": jax.ShapeDtypeStruct((4, 3), jnp.float32),
        "image": jax.ShapeDtypeStruct((5, 4), jnp.uint8),
        "key": jax.eval_shape(lambda: jax.random.key(0)),
    }

    def work(tree, scale):
        noise = jax.random.normal(tree["key"], (5, 3))
        return tree["image"].astype(jnp.float32) @ tree["w"] * scale + 0 * noise

    about = programs.save("one", options, jax.jit(work), (like, np.float32(2)), batch=5)
    assert about["tflop"] == 2 * 5 * 4 * 3 / 1e12 and about["batch"] == 5
    programs.COMPILED.clear()  # as in another process
    loaded = programs.load("one", options, lambda *_: pytest.fail("compiled again"))
    tree, scale = loaded.arguments()
    expected = 2 * np.asarray(tree["image"], np.float32) @ np.asarray(tree["w"])
    np.testing.assert_allclose(loaded.run(tree, scale), expected, rtol=1e-5)
    assert np.abs(tree["w"]).min() > 0 and len(np.unique(tree["image"])) > 5  # no zeros


def test_a_step_that_does_not_fit_is_cut_into_rounds(monkeypatch):
    """By the compiler's estimate, and where that was too low, by what the device says."""
    compiled, measured = [], []

    def save(name, options, step, arguments, **about):
        compiled.append(about["accumulate"])
        return about | {"memory_bytes": 100 // about["accumulate"]}

    def measure(name, options):
        measured.append(name)
        if len(measured) < 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return {"ms": 1}

    monkeypatch.setattr(train.programs, "save", save)
    monkeypatch.setattr(train, "measure", measure)
    roomy, tight = (Options(True, "", "", memory=memory) for memory in (0, 60))
    assert train.prepare("plain-float32", tight, None)["accumulate"] == 2 and compiled == [1, 2]
    assert train.run("plain-float32", roomy, None) == {"ms": 1} and compiled == [1, 2, 2]


def event(name, ms, **stats):
    return types.SimpleNamespace(name=name, duration_ns=1e6 * ms, stats=list(stats.items()))


@pytest.mark.fast
def test_a_profile_adds_up_the_kernels_of_the_device():
    stream = [
        event("k1", 2, hlo_op="fusion.1"),
        event("k1", 3, hlo_op="fusion.2"),
        event("memcpy", 1),
    ]
    lines = [types.SimpleNamespace(name="Stream #1", events=stream)]
    lines.append(types.SimpleNamespace(name="XLA Ops", events=stream))  # the same once more
    host = types.SimpleNamespace(name="/host:CPU", lines=lines)
    device = types.SimpleNamespace(name="/device:GPU:0", lines=lines)
    found = profiling.top(types.SimpleNamespace(planes=[host, device]))
    with pytest.raises(RuntimeError, match="no plane of the device"):
        profiling.top(types.SimpleNamespace(planes=[host]))
    assert found["device_ms"] == 6
    assert found["kinds"][0] == {"name": "fusion", "ms": 5, "share": round(5 / 6, 4)}
    assert [row["name"] for row in found["operations"]] == ["fusion.2", "fusion.1", "memcpy"]


@pytest.mark.fast
def test_ratios_and_table():
    speed = lambda value, **more: (
        {"images_per_second": value, "ms": 1.0, "first_ms": 9.0, "batch": 8} | more
    )
    train = {
        "plain-bfloat16": speed(300.0, tflop_per_second=40.0, tflop=0.1),
        "ogdm-euler": speed(100.0) | {"ms": 3.0},
        "torch-eager-float32": speed(100.0),
        "torch-compile-autocast": speed(200.0),
        "torch-adm64-autocast": speed(900.0),
        "product": {"bfloat16_tflop_per_second": 80.0, "size": 8},
        "sp": {"error": "stopped"},
    }
    results = {
        "train": train,
        "exact": {"a": {"passed": True}, "b": {"passed": False, "why": "off"}},
    }
    found = table.ratios(results)
    assert found["train: ours bfloat16 / PyTorch's default (eager float32)"] == 3
    assert found["train: ours bfloat16 / PyTorch's best (compile-autocast)"] == 1.5
    assert found["train: share of the bfloat16 product's rate"] == 0.5
    assert found["time of the step: ogdm-euler / plain"] == 3
    assert not any(
        "ADM" in name or "sp /" in name for name in found
    )  # what was not measured is no ratio
    text = "\n".join(table.lines(results, {"images.edm-and-ogdm": "no time left"}))
    for words in (
        "1 of 2 passed",
        "FAILED: off",
        "FAILED: stopped",
        "edm-and-ogdm | not run: no time left",
    ):
        assert words in text


def rehearse(out, only, minutes=4.0):
    script = str(tiny.ROOT / "benchmarks" / "accelerator.py")
    words = [
        "--rehearse",
        "--lanes",
        "2",
        "--minutes",
        str(minutes),
        "--out",
        str(out),
        "--only",
        only,
    ]
    command = [sys.executable, script, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 * minutes + 60)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "results.json").read_text()), done.stdout


@pytest.mark.slow
def test_a_rehearsal(tmp_path):
    found, said = rehearse(
        tmp_path, "exact.stf_targets_a,train.product,profile,train.torch-product"
    )
    parts = found["parts"]
    assert (
        found["finished"]
        and found["machine"]["platform"] == "cpu"
        and found["machine"]["versions"]["jax"]
    )
    assert parts["exact"] == {"stf_targets_a": {"passed": True}}
    assert parts["train"]["product"]["bfloat16_tflop_per_second"] > 0
    profile = parts["profile"]["plain-bfloat16"]
    assert profile["device_ms"] > 0 and 3 <= len(profile["kinds"]) <= 10
    assert found["not_run"] == {"train.torch-product": "--edm was not given"}
    assert json.loads((tmp_path / "train.json").read_text()) == parts["train"]
    assert "| profile | plain-bfloat16 |" in said and found["table"][-1] in said
    assert len(list(tmp_path.iterdir())) <= 8


@pytest.mark.fast
def test_the_script_needs_what_its_page_says():
    """On the bare machine nothing else is there: array_record was imported, and most of it failed."""
    missing = (
        "array_record grain tensorboardX tensorflow_datasets sklearn mlxtend pytest diffrax".split()
    )
    program = f"""
import importlib, sys
sys.path[:0] = {[str(tiny.ROOT), str(tiny.ROOT / "benchmarks")]!r}
sys.modules.update(dict.fromkeys({missing!r}))
import accelerator
from accelerator_parts import Options, edm_code, exact, images, profiling, sampling, train
options = Options(True, ".", ".", golden={str(tiny.ROOT / "tests" / "golden")!r})
train.build("plain-bfloat16", options, 1)
images.build("edm", options)
sampling._guidance("dsg", (8, 8, 3), 2)
for name in exact.MODULES:
    importlib.import_module("tests.support.families." + name)
for name in ("distutils", "click"):
    sys.modules.pop(name, None)
real = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in ("distutils", "click") else real(name)
edm_code._stand_ins()
importlib.util.find_spec = real
edm_code._stand_ins()
import distutils.util
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_a_stopped_run_leaves_a_table_and_no_process(tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable,
        str(tiny.ROOT / "benchmarks" / "accelerator.py"),
        "--rehearse",
        "--out",
        str(out),
    ]
    env = os.environ | {"TMPDIR": str(tmp_path)}
    running = subprocess.Popen(
        [*command, "--only", "train.product"], env=env, stdout=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 30
    while not _workers(tmp_path) and time.monotonic() < until:
        time.sleep(0.05)
    assert _workers(tmp_path)
    running.terminate()
    said, _ = running.communicate(timeout=30)
    found = json.loads((out / "results.json").read_text())
    assert running.returncode == 143 and not found["finished"]
    assert (
        found["not_run"] == {"train.product": "the run was stopped"} and found["table"][-1] in said
    )
    until = time.monotonic() + 10  # a killed process is there until its memory is given back
    while _workers(tmp_path) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _workers(tmp_path)


def _workers(scratch):
    """Processes whose environment names a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += [path] if f"{scratch}/accelerator-".encode() in path.read_bytes() else []
        except OSError:
            continue
    return found


@pytest.mark.slow  # every part in tiny form: minutes
def test_the_whole_rehearsal(tmp_path):
    found, _ = rehearse(tmp_path, "", minutes=12)
    assert set(found["not_run"].values()) == {"--edm was not given"}
    for part, cases in found["parts"].items():
        for name, answer in cases.items():
            assert (
                "error" not in answer and answer.get("passed", True) and answer.get("finite", True)
            ), (part, name)
    images = found["parts"]["images"]["edm-and-ogdm"]
    assert images["loss"]["edm"] != images["loss"]["ogdm"] and images["images_seen"] > 0
    cells = images["cells"]
    assert {cell["method"] for cell in cells} == {"edm", "ogdm"} and all(
        cell["floor"] > 0 for cell in cells
    )
    assert (tmp_path / "images.png").exists() and len(list(tmp_path.iterdir())) <= 8


@pytest.mark.fast
def test_cases_are_named_once():
    options = Options(True, "", "", golden=str(tiny.ROOT / "tests" / "golden"))
    cases = accelerator.choose(options, "")
    assert len({(case.part, case.name) for case in cases}) == len(cases)
    assert all(
        isinstance(case, Case) and case.phase in (*accelerator.SHARES, "exact") for case in cases
    )


@pytest.mark.slow  # traces every network of the full sizes, without compiling
@pytest.mark.parametrize("name", train.STEPS)
def test_full_sizes_are_settings_that_exist(name):
    run = train.build(name, Options(False, "", ""), 1)
    state, _, batch, _ = run.shapes()
    expected = {"adm64-bfloat16": (128, 64, 64, 3)}.get(name, (512, 32, 32, 3))
    assert batch["image"].shape == expected
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert parameters == {"adm64-bfloat16": 295_899_267}.get(name, 55_733_891)  # EDM's own networks
