"""train.py and sample.py as people run them: what they write, and one clear sentence for every
wrong word.
"""

import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from ogdm_jax import startup
from ogdm_jax.data import pictures
from tests.support import compiling, tiny
from tests.support.commands import arrays, entry, picture_size

ENV = os.environ | {"JAX_PLATFORMS": "cpu"}


def run(script: str, *args: str, devices: int = 1) -> subprocess.CompletedProcess:
    env = ENV | {"XLA_FLAGS": f"{compiling.FLAGS} --xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, str(tiny.ROOT / script), *args]
    return subprocess.run(
        command, cwd=tiny.ROOT, env=env, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A trained folder: class-conditional, so that labels are tested too."""
    folder = tmp_path_factory.mktemp("cli")
    more = (
        "train.duration=6 steps",
        "sample.every=3 steps",
        "log.tensorboard=true",
        "data.conditional=true",
        "methods=",
        "parallel.devices=1",
    )
    words = ("--workdir", str(folder), *tiny.flags(*tiny.SMALLEST, *more))
    done = entry(tiny.ROOT, "train.py", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def events(folder):
    """TensorBoard's events, read without TensorFlow: records of length (8 bytes), checksum (4),
    event, checksum (4).
    """
    (file,) = folder.iterdir()
    data, at = file.read_bytes(), 0
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        yield event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
        at += size + 16


@pytest.mark.fast
def test_training_writes_what_it_promises(workdir):
    names = {p.name for p in workdir.iterdir()}
    assert {"checkpoints", "metrics.jsonl", "events", "samples", "config.json"} <= names
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "kimg", "images_per_second", "loss", "learning_rate", "grad_norm"} <= set(
        lines[-1]
    )
    assert sorted(p.name for p in (workdir / "samples").iterdir()) == [
        "00000003.png",
        "00000006.png",
    ]
    tags = {value.tag for event in events(workdir / "events") for value in event.summary.value}
    assert {"loss", "grad_norm", "samples"} <= tags


def test_an_image_depends_on_its_seed_alone(workdir, tmp_path):
    """Batch 1, 4 and 7, one and four devices, alone or among others: the same pixels."""
    sampled = {}
    for name, args, devices in (
        ("all", ("--num", "8", "--batch", "8"), 1),
        ("small", ("--num", "8", "--batch", "3"), 1),
        ("many", ("--num", "8", "--batch", "1"), 4),
        ("part", ("--seeds", "5-7", "--batch", "8"), 1),
    ):
        out = tmp_path / f"{name}.npz"
        words = ("--workdir", str(workdir), "--steps", "3", "--out", str(out))
        done = entry(tiny.ROOT, "sample.py", *words, "--devices", str(devices), *args)
        assert done.returncode == 0, done.stderr
        sampled[name] = arrays(out)
    for name in ("small", "many"):
        difference = np.abs(
            sampled[name]["images"].astype(int) - sampled["all"]["images"].astype(int)
        )
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01, (
            name
        )  # rounding of another compiled program
        np.testing.assert_array_equal(sampled[name]["labels"], sampled["all"]["labels"])
    difference = np.abs(
        sampled["part"]["images"].astype(int) - sampled["all"]["images"][5:8].astype(int)
    )
    assert difference.max() <= 1


@pytest.mark.parametrize(
    "solver,steps", [("euler", 3), ("ddim", 3), ("ancestral", 3), ("dpmpp_2m", 3), ("spndm", 3)]
)
def test_solvers_and_outputs(workdir, tmp_path, solver, steps):
    out = tmp_path / ("folder" if solver == "euler" else "grid.png")
    args = (
        "--num",
        "4",
        "--solver",
        solver,
        "--steps",
        str(steps),
        "--label",
        "3",
        "--out",
        str(out),
    )
    done = entry(tiny.ROOT, "sample.py", "--workdir", str(workdir), "--devices", "1", *args)
    assert done.returncode == 0, done.stderr
    if solver == "euler":
        files = sorted(p.name for p in out.iterdir())
        assert len(files) == 4 and picture_size(out / files[0]) == (8, 8)
    else:
        assert picture_size(out)[0] >= 16


@pytest.mark.parametrize(
    "args,words",
    [
        (("--solver", "magic"), "sample.solver"),
        (("--steps", "0"), "sample.steps"),
        (("--num", "0"), "--num"),
        (("--seeds", "9-2"), "--seeds"),
        (("--step", "5"), "--step"),
        (("--weights", "best"), "--weights"),
        (("--label", "11"), "--label"),
        (("--churn", "1,2"), "--churn"),
        (("--churn", "40,0.05,50,1.003", "--solver", "ddim"), "--churn"),
        (("--eta", "1.0", "--solver", "euler"), "sample.eta"),
        (("--out", "samples.bmp"), "--out"),
        (("--devices", "77"), "parallel.devices"),
    ],
)
def test_sample_refuses_with_one_sentence(workdir, args, words):
    done = entry(tiny.ROOT, "sample.py", "--workdir", str(workdir), *args)
    assert done.returncode == 1
    assert (
        done.stderr.startswith("error: ") and words in done.stderr and done.stderr.count("\n") == 1
    )


def test_a_process_refuses_with_one_line(workdir):
    done = run("sample.py", "--workdir", str(workdir), "--step", "5")
    assert (
        done.returncode == 1
        and done.stderr.startswith("error: --step: ")
        and done.stderr.count("\n") == 1
    )


@pytest.mark.fast
@pytest.mark.parametrize(
    "args,words",
    [
        (("--config.data.btach=3",), "unknown key 'btach'"),
        (("--config.data.batch=x",), "expected int"),
        (("--config", "configs/none.py"), "is no file"),
        (("--confg=x",), "unknown argument"),
        (("--config.data.source=folder:/no/such/folder",), "/no/such/folder"),
        (("--config.data.source=tfds:cifar10/train",), "cifar10"),
        (("--config.data.batch=31", "--config.parallel.devices=2"), "data.batch"),
        (("--config.methods=ogdn",), "methods"),
        (("--config.sample.solver=magic",), "sample.solver"),
        (("--config.init.workdir=/no/such/run",), "config.init.workdir: '/no/such/run'"),
        (
            ("--config.methods=sp", "--config.sp.teacher=/no/such/run"),
            "config.sp.teacher: '/no/such/run'",
        ),
    ],
)
def test_train_refuses_with_one_sentence(tmp_path, args, words):
    done = entry(tiny.ROOT, "train.py", "--workdir", str(tmp_path / "new"), *tiny.flags(), *args)
    assert done.returncode == 1, done.stdout
    assert (
        done.stderr.startswith("error: ") and words in done.stderr and done.stderr.count("\n") == 1
    )
    assert "compiled" not in done.stdout and not (tmp_path / "new").exists()


@pytest.mark.slow
def test_labels_of_an_unconditional_model_are_refused(tmp_path):
    words, alone = ("--workdir", str(tmp_path)), ("methods=", "parallel.devices=1")
    done = entry(
        tiny.ROOT, "train.py", *words, *tiny.flags(*tiny.SMALLEST, "train.duration=1 steps", *alone)
    )
    assert done.returncode == 0, done.stderr
    done = entry(tiny.ROOT, "sample.py", *words, "--label", "3")
    assert done.returncode == 1 and "unconditional" in done.stderr and done.stderr.count("\n") == 1


def test_a_user_without_a_home_and_names_that_are_no_text(tmp_path):
    """As in some containers, and as archives of old Windows are unpacked."""
    for name in (b"a", b"\xe9"):
        place = os.fsencode(tmp_path) + b"/set/" + name
        os.makedirs(place)
        pictures.save_png(os.fsdecode(place + b"/1.png"), np.zeros((8, 8, 1), np.uint8))
    env = ENV | {"PYTHONIOENCODING": "utf-8:strict"}
    words = [sys.executable, "-m", "ogdm_jax", "data", "describe", f"folder:{tmp_path}/set"]
    done = subprocess.run(words, cwd=tiny.ROOT, env=env, capture_output=True, timeout=100)
    assert done.returncode == 0 and b"\\udce9" in done.stdout, done
    program = (
        "import os, jax; from ogdm_jax import startup; os.setuid(54321); startup.prepare(); "
        "print(jax.config.jax_compilation_cache_dir)"
    )
    nobody = {key: value for key, value in ENV.items() if key not in ("HOME", "XDG_CACHE_HOME")}
    nobody.pop("JAX_COMPILATION_CACHE_DIR", None)
    if os.getuid() == 0:
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tiny.ROOT, env=nobody, capture_output=True
        )
        assert done.stdout == b"None\n", done


def test_a_reader_that_has_seen_enough_ends_a_command_quietly():
    """As `ogdm train --dry-run | head -1`, with a reader that is gone before the first line."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "ogdm_jax", "train", "--dry-run"]
    with os.fdopen(writer, "wb") as gone:
        done = subprocess.run(
            command, cwd=tiny.ROOT, env=ENV, stdout=gone, stderr=subprocess.PIPE, timeout=300
        )
    assert done.returncode == 1 and done.stderr == b""


@pytest.mark.fast
def test_a_pipe_of_something_else_that_breaks_is_shown():
    with pytest.raises(BrokenPipeError), startup.one_sentence():
        raise BrokenPipeError
