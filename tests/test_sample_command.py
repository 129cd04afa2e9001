"""ogdm sample at scale: written as drawn, resumed by the same command, nothing silently wrong."""

import json
import random
import re
import signal
import subprocess
import sys
import time
import types
import unicodedata

import numpy as np
import pytest

from ogdm_jax import parallel, places
from ogdm_jax.cli import sample as command_line
from ogdm_jax.config import ConfigError, Sample
from ogdm_jax.data import from_arrays, open_source, output
from ogdm_jax.inverse import tasks
from ogdm_jax.methods import cfg, dg
from ogdm_jax.training import evaluate
from ogdm_jax.training import run as runs
from ogdm_jax.training.workdir import TrainedModel
from tests.support import tiny
from tests.support.commands import arrays, ogdm

NAMES = ("null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "7 sieben", "8", "5")


def made(folder, *words, names=(), source="digits"):
    config = tiny.config("methods=()", *tiny.SMALLEST, *words)
    source = open_source(source) if isinstance(source, str) else source
    run = runs.build(config, source, parallel.make_plan("pmap", 1))
    about = {"images": 1797, "class_names": list(names)} if names else None
    return tiny.folder(folder, run, about)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A training folder with fresh weights and named classes."""
    return made(tmp_path_factory.mktemp("model"), "data.conditional=true", names=NAMES)


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory):
    return made(tmp_path_factory.mktemp("unconditional"))


def sample(folder, model, *words):
    words = ("--batch", "8", "--steps", "2", "--devices", "1", *words)
    return ogdm(folder, "sample", "--workdir", str(model), *words)


def contents(path):
    if path.is_file():
        return path.read_bytes()
    return {file.name: file.read_bytes() for file in path.iterdir()}


def stopped_after(monkeypatch, count, error=KeyboardInterrupt):
    """Lets so many batches be written."""
    real, left = output.Output.add, [count]

    def add(self, start, images):
        if not left[0]:
            raise error
        left[0] -= 1
        real(self, start, images)

    monkeypatch.setattr(output.Output, "add", add)


@pytest.fixture
def reached(monkeypatch):
    """How many images were computed by the network."""
    found, real = [], TrainedModel.batches

    def batches(self, *args, **words):
        for part in real(self, *args, **words):
            found.append(len(part))
            yield part

    monkeypatch.setattr(TrainedModel, "batches", batches)
    return found


# the three kinds of output part ways in test_output.py
@pytest.mark.slow_cases("folder", "file.npz")
@pytest.mark.parametrize("name", ["folder", "file.npz", "file.png"])
def test_the_same_command_goes_on(model, tmp_path, monkeypatch, reached, name):
    words = ("--num", "20", "--out", name)
    (tmp_path / "whole").mkdir()
    (tmp_path / "parted").mkdir()
    done = sample(tmp_path / "whole", model, *words)
    assert done.returncode == 0 and "wrote 20 images of step 0" in done.stdout, done.stderr
    assert "Ctrl-C stops, and the same command goes on" in done.stderr
    with monkeypatch.context() as patch:
        stopped_after(patch, 2)
        done = sample(tmp_path / "parted", model, *words)
        assert done.returncode == 130 and "Traceback" not in done.stderr
    reached.clear()
    done = sample(tmp_path / "parted", model, *words)
    assert done.returncode == 0 and "16 of 20 images are in " in done.stderr and reached == [4]
    assert contents(tmp_path / "parted" / name) == contents(tmp_path / "whole" / name)
    reached.clear()
    done = sample(tmp_path / "parted", model, *words)
    assert done.returncode == 0 and sum(reached) == (20 if name == "file.png" else 0)
    for change, named in (
        (("--steps", "3"), "--steps 2, now it is 3"),
        (("--label", "zwei"), "--label None, now it is 2"),
        (("--solver", "heun"), "--solver 'euler', now it is 'heun'"),
        (("--guidance", "cfg"), "cfg"),
        (("--weights", "params"), "--weights 'ema', now it is 'params'"),
        (("--churn", "1,0,inf,1"), "--churn '', now it is '1,0,inf,1'"),
    ):
        before = contents(tmp_path / "parted" / name)
        done = sample(tmp_path / "parted", model, *words, *change)
        assert done.returncode == 1 and named in done.stderr and done.stderr.count("\n") == 1
        assert contents(tmp_path / "parted" / name) == before


def test_evaluations_of_a_part_are_not_told_as_those_of_all():
    """What a command that goes on draws may cost more or less than the rest."""
    for before in (False, True):
        out = types.SimpleNamespace(done=np.array([before, False]), where="x", folder="x")
        out.add, asked = lambda start, images: None, {}

        def batches(settings, seeds, counts, asked=asked, **_):
            asked["counts"] = counts
            yield np.zeros((2, 8, 8, 1), np.float32)

        found = {"batches": batches}
        plan = types.SimpleNamespace(trained=types.SimpleNamespace(**found), settings=None, batch=2)
        plan.seeds, plan.devices, plan.churn = np.arange(2), [0], None
        plan.guided, counts = types.SimpleNamespace(labels=None, guidance=()), []
        assert command_line._draw(plan, out, counts) == 2
        assert asked["counts"] is (None if before else counts)


def test_records_of_before_go_on(model, tmp_path, monkeypatch, reached):
    """Settings that came later are told only where they are not what everybody had."""
    words = ("--num", "16", "--out", "file.npz")
    stopped_after(monkeypatch, 1)
    sample(tmp_path, model, *words)
    monkeypatch.undo()
    record = json.loads((tmp_path / "file.npz.json").read_text())
    told = set(record["drawn_with"])
    assert "--steps" in told and not told & set(command_line.LATER)
    for name, value in command_line.LATER.items():
        group, _, field = name.removeprefix("--").rpartition(".")
        owner = {"": Sample, "cfg": cfg.Settings, "dg": dg.Settings, "task": tasks.Settings}[group]
        assert getattr(owner, field) == value


def test_another_model_is_another_request(model, tmp_path):
    sample(tmp_path, model, "--num", "4", "--out", "d")
    other = made(tmp_path / "other", "data.conditional=true", "seed=5")
    done = sample(tmp_path, other, "--num", "4", "--out", "d")
    assert done.returncode == 1 and "'d' was drawn with weights" in done.stderr


@pytest.mark.slow_cases("folder", "file.png")
@pytest.mark.parametrize("name", ["folder", "file.npz", "file.png"])
def test_images_that_are_not_finite_are_listed(model, tmp_path, monkeypatch, name):
    real = TrainedModel.batches

    def batches(self, *args, **words):
        for part in real(self, *args, **words):
            part = part.copy()
            part[1] = np.nan
            yield part

    monkeypatch.setattr(TrainedModel, "batches", batches)
    for _ in range(2):
        done = sample(tmp_path, model, "--seeds", "40-59", "--out", name, "--evaluate")
        assert done.returncode == 1 and "wrote 17 images" in done.stdout
        assert "3 of 20 images are not finite and were left out" in done.stderr
        assert "their seeds are 41,49,57 (" in done.stderr
        report = json.loads(done.stdout.splitlines()[-1])
        assert report["not_finite"] == 3 and report["n_samples"] == 17
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["not_finite"] == [41, 49, 57]


def test_a_full_disk_names_what_is_safe(model, tmp_path, monkeypatch):
    whole = sample(tmp_path, model, "--num", "20", "--out", "whole.npz")
    assert whole.returncode == 0
    real, count = places.written, iter(range(100))

    def written(path):
        if next(count) == 3:  # the record and two parts
            raise OSError(28, "No space left on device", str(path))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(places, "written", written)
        done = sample(tmp_path, model, "--num", "20", "--out", "x.npz")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: --out: ")
    assert "no space left on device; free some space" in done.stderr
    assert "16 of 20 images are safe in 'x.npz.parts', and the same command goes" in done.stderr
    assert sample(tmp_path, model, "--num", "20", "--out", "x.npz").returncode == 0
    assert contents(tmp_path / "x.npz") == contents(tmp_path / "whole.npz")


def test_the_evaluation_of_what_is_on_disk(tmp_path, monkeypatch):
    """All kinds of output give one report, that of the images as a whole array, which have the
    classes of the data.
    """
    reports, model = [], made(tmp_path / "model", "data.conditional=true")
    for name in ("folder", "file.npz", "file.png", "file.npz"):
        done = sample(tmp_path, model, "--num", "30", "--out", name, "--evaluate")
        assert done.returncode == 0, done.stderr
        reports.append(json.loads(done.stdout.splitlines()[-1]))
    assert all(report == reports[0] for report in reports) and reports[0]["n"] == 30
    images, labels = (arrays(tmp_path / "file.npz")[name] for name in ("images", "labels"))
    order = np.random.default_rng(0).permutation(1797)[:30]
    np.testing.assert_array_equal(labels, open_source("digits").labels[order])
    assert reports[0].pop("conditions") == "as frequent as in the reference"
    config = tiny.config("evaluate.features=digits")
    space = evaluate.space_of(config)
    data = evaluate.references(evaluate.open_pixels(config))
    direct = evaluate.distance_report(space, images, data)
    found = {k: v for k, v in reports[0].items() if k != "features"}
    near = lambda v: v if isinstance(v, str) else pytest.approx(v, rel=1e-4)
    assert {k: near(v) for k, v in direct.items() if k != "features"} == found
    monkeypatch.setattr(evaluate, "MOST_KEPT", 20)
    found = evaluate.ruler(config, 30)([images[:8], images[8:25], images[25:]])
    assert found["n_kept"] == found["n"] == 20 and found["n_samples"] == 30
    assert found["fd_all"] == pytest.approx(direct["fd_all"], rel=1e-6)
    first = evaluate.distance_report(space, images[:20], data)
    assert {k: found[k] for k in ("fd", "kid", "recall")} == {
        k: pytest.approx(first[k], rel=1e-4) for k in ("fd", "kid", "recall")
    }


INPAINT = ("--guidance", "dsg", "--task", "inpaint", "--input", "digits", "--num", "12")


@pytest.mark.slow_cases("folder", "file.png")
@pytest.mark.parametrize("name", ["folder", "file.npz", "file.png"])
def test_restoring_goes_on_too(unconditional, tmp_path, monkeypatch, reached, name):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    whole.mkdir()
    parted.mkdir()
    words = (*INPAINT, "--batch", "4", "--out", name)
    first = sample(whole, unconditional, *words)
    assert first.returncode == 0, first.stderr
    with monkeypatch.context() as patch:
        stopped_after(patch, 1)
        assert sample(parted, unconditional, *words).returncode == 130
    reached.clear()
    done = sample(parted, unconditional, *words)
    assert done.returncode == 0 and reached == [4, 4]
    if name == "file.npz":
        for key, value in arrays(whole / name).items():
            np.testing.assert_array_equal(arrays(parted / name)[key], value)
    else:
        assert contents(parted / name) == contents(whole / name)
    said = [json.loads(result.stdout.splitlines()[-1]) for result in (first, done)]
    assert said[0]["psnr"] == said[1]["psnr"] and said[1]["images"] == 12
    done = sample(parted, unconditional, *words, "--task.noise", "0.3")
    assert done.returncode == 1 and "--task.noise 0.05, now it is 0.3" in done.stderr


def test_restored_images_that_are_not_finite_are_listed(unconditional, tmp_path, monkeypatch):
    real = TrainedModel.batches

    def batches(self, *args, **words):
        for part in real(self, *args, **words):
            part = part.copy()
            part[0] = np.nan
            yield part

    monkeypatch.setattr(TrainedModel, "batches", batches)
    done = sample(tmp_path, unconditional, *INPAINT, "--batch", "8", "--out", "x.npz")
    assert done.returncode == 1 and "2 of 12 images are not finite" in done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["images"] == 10 and said["not_finite"] == 2 and np.isfinite(said["psnr"])
    assert arrays(tmp_path / "x.npz")["seeds"].tolist() == [1, 2, 3, 4, 5, 6, 7, 9, 10, 11]


def test_a_class_by_its_name(model, tmp_path):
    by_number = sample(tmp_path, model, "--num", "3", "--label", "2", "--out", "a.npz")
    by_name = sample(tmp_path, model, "--num", "3", "--label", "zwei", "--out", "b.npz")
    assert ", class 2 (zwei)) to" in by_number.stdout and ", class 2 (zwei)) to" in by_name.stdout
    for key, value in arrays(tmp_path / "a.npz").items():
        np.testing.assert_array_equal(arrays(tmp_path / "b.npz")[key], value)
    done = sample(tmp_path, model, "--label", "zwie", "--out", "c.npz")
    assert done.returncode == 1 and "no class is called 'zwie'; expected one of null" in done.stderr


@pytest.mark.parametrize(
    "words,message",
    [
        (("--batch", "0"), "--batch: '0' given"),
        (("--batch", "-3"), "--batch: '-3' given"),
        (("--steps", "0"), "sample.steps: 0"),
        (("--steps", "-1"), "sample.steps: -1"),
        (("--eta", "nan", "--solver", "ddim"), "sample.eta: nan"),
        (("--eta", "inf", "--solver", "ddim"), "sample.eta: inf"),
        (("--churn", "junk"), "--churn: 'junk'"),
        (("--churn", "1,2,3"), "--churn: '1,2,3'"),
        (("--churn", "1,nan,3,1"), "--churn: '1,nan,3,1'"),
        (("--churn", "1,0,inf,nan"), "--churn: '1,0,inf,nan'"),
        (("--churn", "1,0,inf,inf"), "--churn: '1,0,inf,inf'"),
        (("--churn", "1,5,2,1"), "S_min <= S_max"),
        (("--devices", "99"), "99 given; expected at most the"),
        (("--devices", "-1"), "--devices: '-1' given; expected"),
        (("--num", "1000000000000"), "--num: '1000000000000' given"),
        (("--num", "-5"), "--num: '-5' given"),
        (("--seeds", "0-4294967295"), "images; expected at most 10,000,000"),
        (("--step", "x"), "--step: 'x' given"),
        (("--step", "-1"), "--step: '-1' given"),
        (("--step", "99"), "no checkpoint of step 99"),
        (("--label", "10"), "--label: 10 given; expected 0 to 9"),
        (("--label", "-2"), "--label: -2 given; expected 0 to 9"),
        (("--label", "1.5"), "no class is called '1.5'"),
        (("--label", "99999999999999"), "no class is called"),
        (("--grid", "x"), "sample.grid: unknown 'x'"),
        (("--weights", ""), "--weights"),
        (("--out", "x.jpg"), "--out: 'x.jpg' given"),
        (("--out", "x.npz.gz"), "--out: 'x.npz.gz' given"),
        (("--out", "/proc/x"), "--out: '/proc/x' "),
        (("--out", "/proc/1/x.npz"), "--out: '/proc/1/x.npz' "),
        (("--out", "taken"), "no 'taken.json' beside it says how it was drawn"),
        (("--out", "taken/mine.png"), "no 'mine.png.json' beside it"),
        (("--out", "nope://x/y"), "unknown scheme"),
        (("--out", "gs:/x/y"), "has one slash"),
        (("--num", "5000", "--out", "x.png"), "a grid holds at most 4,096"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)
def test_refused_before_anything_is_compiled(model, tmp_path, monkeypatch, words, message):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.png").write_bytes(b"precious")
    monkeypatch.setattr(
        "ogdm_jax.sampling.generate.sampler", lambda *a, **k: pytest.fail("compiled")
    )
    done = ogdm(tmp_path, "sample", "--workdir", str(model), "--num", "4", *words)
    assert done.returncode == 1 and done.stderr.startswith("error: "), done.stderr
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]
    assert contents(tmp_path / "taken") == {"mine.png": b"precious"}


def test_an_unconditional_model_has_no_labels(unconditional, tmp_path):
    for label in ("3", "cat", "-1"):
        done = sample(tmp_path, unconditional, "--label", label)
        assert done.returncode == 1 and "the model is unconditional; leave" in done.stderr


def test_a_missing_folder_is_made(model, tmp_path):
    assert sample(tmp_path, model, "--num", "2", "--out", "a/b/c").returncode == 0
    assert len(list((tmp_path / "a" / "b" / "c").iterdir())) == 2


@pytest.mark.fast
@pytest.mark.parametrize(
    "text,expected",
    [
        ("5", [5]),
        ("0", [0]),
        ("4294967295", [2**32 - 1]),
        ("3-5", [3, 4, 5]),
        ("1,3,10-12", [1, 3, 10, 11, 12]),
        (" 1, 3 ,10 - 12 ", [1, 3, 10, 11, 12]),
        ("10-12,1", [10, 11, 12, 1]),
        ("007", [7]),
    ],
)
def test_seeds(text, expected):
    assert command_line.parse_seeds(text, 64).tolist() == expected
    assert command_line.parse_seeds("", 3).tolist() == [0, 1, 2]


@pytest.mark.fast
@pytest.mark.parametrize(
    "text",
    [",", "1,,2", "1,", ",1", "9-2", "-5", "5-", "-", "1--3", "1-2-3", "a", "1.5", "1e3", "0x10"]
    + ["4294967296", "0-4294967296", "1,1", "1-5,3", "3,1-5", "²", "1 2", "1;2", "nan", "9" * 30],
)
def test_seeds_that_are_none(text):
    with pytest.raises(ConfigError, match="^--seeds: ") as error:
        command_line.parse_seeds(text, 64)
    assert "\n" not in str(error.value)


@pytest.mark.fast
def test_labels_by_number_and_name():
    read = lambda text, classes=10, names=NAMES: command_line.parse_label(text, classes, names)
    assert [read(t) for t in ("", "3", "-1", "drei", "fünf", "7 sieben")] == [None, 3, -1, 3, 5, 7]
    assert read(unicodedata.normalize("NFD", "fünf")) == 5
    assert read("8") == 8 and read("5") == 5  # a number is the class's number, also where named
    assert read("12", 2, ("11", "12")) == 1 and read("12", 2, ()) == 12  # no number: a name
    for text, classes, names, words in (
        ("cat", 10, (), "does not say what its classes are called; expected a number from 0 to 9"),
        ("cat", 0, (), "the model is unconditional; leave the option out"),
        ("Drei", 10, NAMES, "is called 'Drei'; expected one of null, eins"),
        ("xyz", 10, NAMES, "expected one of null, eins"),
        ("c999", 1000, tuple(f"c{i}x" for i in range(1000)), ", ... (1000 of them)"),
    ):
        with pytest.raises(ConfigError, match="^--label: ") as error:
            read(text, classes, names)
        assert words in str(error.value) and len(str(error.value)) < 400


# What follows starts processes.


def started(folder, model, *words):
    command = [sys.executable, str(tiny.ROOT / "sample.py"), "--workdir", str(model), *words]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


LONG = ("--num", "120", "--batch", "4", "--steps", "40", "--devices", "1")


def drawn(path):
    """Files that hold images of an unfinished output."""
    folder = path if not path.suffix else path.with_name(f"{path.name}.parts")
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return [name for name in names if re.fullmatch(r"img\d+\.png|\d+-\d+\.npy", name)]


def when_drawn(process, path, count):
    while process.poll() is None and len(drawn(path)) < count:
        time.sleep(0.002)


@pytest.mark.slow_cases("SIGTERM")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_is_one_line_and_the_same_command_goes_on(model, tmp_path, number):
    process = started(tmp_path, model, *LONG, "--out", "x.npz")
    when_drawn(process, tmp_path / "x.npz", 2)
    sent = time.monotonic()
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - sent < 5
    assert process.returncode == 128 + number, said
    assert "Traceback" not in said and re.search(
        r"stopped by (Ctrl-C|SIGTERM): \d+ of 120 images are safe in 'x.npz.parts', and the same "
        r"command goes on with the rest\n$",
        said,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["folder", "file.npz"])
def test_ten_kills_at_random_moments(model, tmp_path, name):
    """kill -9 ten times, then to the end: the bytes of the run that nobody stopped."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "parted").mkdir()
    process = started(tmp_path / "whole", model, *LONG, "--out", name)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    draw, kills, progress = random.Random(7), 0, []
    for kill in range(10):
        process = started(tmp_path / "parted", model, *LONG, "--out", name)
        if kill % 3:  # else at any moment of the start
            before = len(drawn(tmp_path / "parted" / name))
            when_drawn(process, tmp_path / "parted" / name, before + draw.randint(1, 6))
            time.sleep(draw.random() * 0.05)
        else:
            time.sleep(draw.random() * 5)
        kills += process.poll() is None
        process.kill()
        process.communicate()
        progress.append(len(drawn(tmp_path / "parted" / name)))
    assert kills >= 5 and len(set(progress)) > 3, (kills, progress)
    process = started(tmp_path / "parted", model, *LONG, "--out", name)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert contents(tmp_path / "parted" / name) == contents(tmp_path / "whole" / name)
    assert {p.name for p in (tmp_path / "parted").iterdir()} == {name, f"{name}.json"}
    print(f"{name}: {kills} kills, after {progress} files")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["folder", "file.npz"])
def test_memory_does_not_grow_with_the_number_of_images(tmp_path, name):
    source = from_arrays("noise", np.zeros((32, 32, 32, 3), np.uint8), None)
    model, most = made(tmp_path / "model", source=source), []
    for num in (2000, 20000):
        script = (
            "import resource, sys; from ogdm_jax.cli.sample import main; main(sys.argv[1:]); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        words = ("--workdir", str(model), "--num", str(num), "--batch", "50", "--steps", "1")
        words += ("--devices", "1", "--out", f"{num}_{name}")
        done = subprocess.run(
            [sys.executable, "-c", script, *words], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        most.append(int(done.stdout.splitlines()[-1]) / 1024)
    print(f"{name}: {most[0]:.0f} MB for 2,000 images, {most[1]:.0f} MB for 20,000")
    assert most[1] - most[0] < 40, most  # 18,000 images of 3 kB are 55 MB, as floats 221 MB
