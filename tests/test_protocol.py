"""Distances of streams: equal to those of whole arrays, one batch at a time; and the commands of a
training folder.
"""

import json
import shutil
import types

import numpy as np
import pytest

from ogdm_jax import parallel, startup
from ogdm_jax.cli import card, evaluate, measuring, report
from ogdm_jax.cli.protocol import Sets
from ogdm_jax.config import ConfigError
from ogdm_jax.data import open_source
from ogdm_jax.metrics import Statistics, frechet_distance, protocol
from ogdm_jax.report import inputs
from ogdm_jax.training import loop
from ogdm_jax.training import run as runs
from ogdm_jax.training import workdir as workdirs
from tests.support import tiny


class Pixels:
    """Eight pixels of each image, and how many images came at once."""

    name, dim = "fd_pixels", 8

    def __init__(self):
        self.most = 0

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.most = max(self.most, len(images))
        return images.reshape(len(images), -1)[:, 20:28].astype(np.float32) / 255


def gaussian(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.mean(0), np.cov(x.T)


def test_a_stream_scores_as_the_whole_array():
    source, space = open_source("digits"), Pixels()
    reference = protocol.of_source(space, source, 300, splits=2, batch=100)
    assert (reference.n, reference.count, len(reference.halves)) == (
        300,
        1797,
        2,
    ) and space.most == 100
    fakes = np.random.default_rng(0).integers(0, 17, (700, 8, 8, 1), np.uint8) * 15
    asked = []

    def batches():
        for i in range(0, 700, 64):
            asked.append(i)
            yield fakes[i : i + 64]

    stream = batches()
    assert asked == []
    result = protocol.score(space, stream, reference)
    assert space.most == 100 and len(asked) == 11
    real, values = space(source.images).astype(np.float64), space(fakes).astype(np.float64)
    np.testing.assert_allclose(
        result["fd_all"], frechet_distance(*gaussian(values), *gaussian(real)), rtol=1e-9
    )
    distances = [frechet_distance(*gaussian(values[:300]), *a) for a, _ in reference.halves]
    np.testing.assert_allclose(result["fd"], np.mean(distances), rtol=1e-9)
    assert (
        result["n"] == 300 and result["n_samples"] == 700 and result["fd"] > 5 * result["floor"] > 0
    )


def test_the_halves_are_disjoint_and_random():
    """With images that are their own numbers, means tell which ones a half holds."""

    class Numbers:
        name, dim = "fd_numbers", 2

        def __call__(self, images):
            return images[:, 0, 0, :2].astype(np.float64)

    class Source:
        name, shape = "numbers", (1, 1, 2)

        def __len__(self):
            return 200

        def take(self, rows):
            return {"image": np.stack([rows, rows % 7], 1)[:, None, None].astype(np.uint8)}

    reference = protocol.of_source(Numbers(), Source(), 10_000, splits=3, batch=64)
    assert reference.n == 100 and len({tuple(a[0]) for a, _ in reference.halves}) == 3
    for a, b in reference.halves:
        np.testing.assert_allclose(
            (a[0] + b[0]) / 2, reference.whole[0]
        )  # together they are everything
        assert 80 < a[0][0] < 120


def test_published_statistics_have_no_floor_and_other_spaces_are_refused():
    space, mu, cov = Pixels(), np.zeros(8), np.eye(8)
    reference = protocol.of_statistics(space, Statistics(mu, cov, 50_000))
    images = open_source("digits").images
    result = protocol.score(space, [images[:900], images[900:]], reference)
    assert (
        result["floor"] is None and result["n_reference"] == 50_000 and result["n_samples"] == 1797
    )
    values = space(images).astype(np.float64)
    np.testing.assert_allclose(
        result["fd_all"], frechet_distance(*gaussian(values), mu, cov), rtol=1e-9
    )
    for wrong in (Statistics(np.zeros(3), np.eye(3)), Statistics(mu, cov, None, "fid")):
        with pytest.raises(ValueError, match="fd_pixels has 8"):
            protocol.of_statistics(space, wrong)


def test_seed_ranges_are_edms():
    ranges = protocol.seed_ranges(50_000, 3)
    assert [(r[0], r[-1]) for r in ranges] == [(0, 49_999), (50_000, 99_999), (100_000, 149_999)]
    for bad in ((1, 3), (5, 0), (2**31, 3), (5, 1, -1)):
        with pytest.raises(ValueError, match="--num, --ranges, --first"):
            protocol.seed_ranges(*bad)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A folder as training leaves it: nothing was trained, and what the log would say is made
    up.
    """
    folder = tmp_path_factory.mktemp("commands")
    settings = (
        *tiny.SMALLEST,
        "methods=",
        "train.duration=0 steps",
        "parallel.devices=1",
        "sample.steps=2",
        "sample.solver=heun",
    )
    loop.train(tiny.config(*settings), folder, lambda _: None)
    lines = [
        {"step": n, "kimg": n * 0.032, "loss": 9 / n, "learning_rate": 1e-3} for n in (1, 2, 3)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "object.json").write_text('{"features": "fd_pixels"}')
    (folder / "partial.json").write_text(
        '[{"features": "fd_pixels", "solver": "heun", "steps": 2, "nfe": "3"}]'
    )
    return folder


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    """The test's process has its own settings, and pixels are features enough."""
    monkeypatch.setattr(startup, "prepare", lambda: None)
    monkeypatch.setattr(measuring, "open_model_space", lambda *_: Pixels())


def test_protocol_command(workdir, capsys):
    out = workdir / "protocol.json"
    words = f"protocol --workdir {workdir} --num 40 --ranges 2 --first 8 --batch 8 --devices 1 --out {out}"
    assert evaluate.main(words.split()) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert json.loads(out.read_text()) == result and "seeds 8-47: fd_pixels" in said.err
    sets = result["sets"]
    assert [s["seeds"] for s in sets] == ["8-47", "48-87"] and sets[0]["fd_all"] != sets[1][
        "fd_all"
    ]
    assert "reference" not in result  # the data that was trained on
    assert result["fd_all_min"] == min(s["fd_all"] for s in sets) and result["floor"] > 0
    assert (result["n"], result["n_samples"], result["n_reference"], result["nfe"]) == (
        40,
        40,
        1797,
        3,
    )


def test_report_command(workdir, capsys):
    words = f"--workdir {workdir} --num 12 --solvers heun --steps 2 --batch 8 --devices 1"
    words += " --reference digits/test"
    assert report.main(words.split()) == 0
    assert "wrote" in capsys.readouterr().out
    page = (workdir / "report.html").read_text()
    titles = (
        "Distance against",
        "Samples",
        "Nearest",
        "Trajectories",
        "Training",
        "Samples during",
    )
    assert all(f"<h2>{title}" in page for title in titles) and "step 0" in page
    saved = json.loads((workdir / "distances.json").read_text())
    assert [(r["solver"], r["steps"], r["nfe"], r["n"]) for r in saved] == [
        ("heun", 2, 3, 12)
    ] and saved[0]["floor"] > 0
    # other images than those that were trained on are named, wherever the distances are shown
    assert saved[0]["reference"] == "digits/test"
    assert "Nearest images of digits/test" in page and "at random from digits/test" in page
    assert "<li>compared with digits/test" in page and "training images" not in page
    assert [r["features"] for r in card.distances(str(workdir), 0)] == [
        "fd_pixels, against digits/test"
    ]


def test_a_reports_trajectories_have_the_classes_of_its_samples(tmp_path, monkeypatch):
    """Both are of the seeds from 0: a page showed two images of one seed."""
    config = tiny.config("methods=", *tiny.SMALLEST, "data.conditional=true")
    run = runs.build(config, open_source("digits"), parallel.make_plan("pmap", 1))
    tiny.folder(tmp_path, run)
    seen = {}

    def batches(self, settings, seeds, labels, **_):
        seen["samples"] = labels
        yield np.zeros((len(seeds), 8, 8, 1), np.float32)

    def path(self, seeds, labels=None):
        seen["path"] = labels
        raise ConfigError("none is kept")

    monkeypatch.setattr(workdirs.TrainedModel, "batches", batches)
    monkeypatch.setattr(workdirs.TrainedModel, "path", path)
    assert report.main(f"--workdir {tmp_path} --solvers  --devices 1".split(" ")) == 0
    np.testing.assert_array_equal(seen["path"], seen["samples"][:3])


def test_report_of_a_folder_with_broken_files(workdir, tmp_path):
    """It is written all the same, and says what it left out."""
    folder = tmp_path / "run"
    shutil.copytree(workdir, folder)
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 4, "loss": NaN}\n\x00\xff\n{"step": 5, "lo')
    (folder / "evaluations.json").write_text('[{"step": 0, "fd": ')
    (folder / "samples").mkdir(exist_ok=True)
    (folder / "samples" / "7.png").write_text("<html>")
    out = folder / "page.html"
    words = f"--workdir {folder} --solvers  --batch 8 --devices 1 --out {out}".split(" ")
    assert report.main(words) == 0
    page = out.read_text()
    assert "Left out or changed" in page and "loss: 1 of 4 values are not finite" in page
    assert "2 of 6 lines are cut" in page and "evaluations.json" in page
    assert "samples/7.png is no readable image" in page and "<h2>Training" in page


def test_a_model_that_draws_nan_is_refused_by_its_seed():
    class Trained:
        def batches(self, settings, seeds, **_):
            for first in range(0, len(seeds), 4):
                part = np.zeros((4, 8, 8, 1), np.float32)
                part[2] = np.nan if first else 0
                yield part

    args = types.SimpleNamespace(batch=4, devices=1)
    draw = measuring.drawing(args, Trained())(None, range(10, 18), "seeds")
    assert next(draw).shape == (4, 8, 8, 1)
    with pytest.raises(ValueError, match="the image of seed 16 .* holds NaN or infinity"):
        next(draw)


def test_lines_of_a_killed_run_are_left_out(tmp_path):
    """Its last line is cut, in the middle of a letter of several bytes here; the next run went on
    behind it.
    """
    lines = b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo{"step": 3, "loss": 1.0}\n{"step": 4}\n7\n{"step": 5, "\xc3'
    (tmp_path / "metrics.jsonl").write_bytes(lines)
    found = inputs.metrics(str(tmp_path))
    assert [line["step"] for line in found.values] == [1, 4]
    assert found.notes == ["metrics.jsonl: 3 of 5 lines are cut or no objects"]
    assert inputs.metrics(str(tmp_path / "nothing")) == ([], ())


@pytest.mark.parametrize(
    "words,message",
    [
        ("report --workdir WORK --steps 3,x", "--steps: '3,x' given"),
        ("report --workdir WORK --solvers magic --steps 2", "sample.solver"),
        ("report --workdir WORK --step best", "was evaluated"),
        ("evaluate protocol --workdir WORK --step newest", "a number or best"),
        ("evaluate protocol --workdir WORK --ranges 0", "--ranges"),
        ("evaluate protocol --workdir nowhere", "holds no checkpoint"),
        (
            "report --workdir WORK --distances WORK/nothing.json",
            "nothing.json' cannot be read (No such file",
        ),
        (
            "report --workdir WORK --distances WORK/metrics.jsonl",
            "metrics.jsonl' is no JSON (Extra data",
        ),
        (
            "report --workdir WORK --distances WORK/object.json",
            "object.json' holds dict; expected a list",
        ),
        (
            "report --workdir WORK --distances WORK/partial.json",
            "partial.json has no nfe of the right type",
        ),
    ],
)
def test_commands_refuse_in_one_sentence(workdir, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        command, _, rest = words.partition(" ")
        run = {"report": report.main, "evaluate": evaluate.main}[command]
        run(rest.replace("WORK", str(workdir)).split())
    error = capsys.readouterr().err.strip()
    assert (
        stop.value.code == 1
        and message in error
        and error.startswith("error: ")
        and "\n" not in error
    )


def test_an_option_of_the_older_spelling_is_answered_with_the_newer_one(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--samples", "x.npz", "--save_statistics=y.npz"])
    assert "--save_statistics; expected --save-statistics" in capsys.readouterr().err


@pytest.mark.slow
def test_the_protocol_goes_on_with_the_sets_that_are_missing(
    workdir, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "p.json"
    words = f"protocol --workdir {workdir} --num 16 --ranges 3 --batch 8 --devices 1".split()
    assert evaluate.main([*words, "--out", str(tmp_path / "whole.json")]) == 0
    real, drawn = protocol.score, []

    def score(space, batches, reference):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(1)
        return real(space, batches, reference)

    with monkeypatch.context() as patch:
        patch.setattr(protocol, "score", score)
        with pytest.raises(SystemExit) as stop:
            evaluate.main([*words, "--out", str(out)])
        assert stop.value.code == 130 and not out.exists()
    kept = json.loads((tmp_path / "p.json.sets").read_text())
    assert [s["seeds"] for s in kept["sets"]] == ["0-15", "16-31"]
    capsys.readouterr()
    for change, words_ in (
        (("--steps", "4"), " steps 2, now it is 4"),
        (("--num", "8"), "--num 16, now it is 8"),
        (("--first", "1"), "--first 0, now it is 1"),
    ):
        with pytest.raises(SystemExit) as stop:
            evaluate.main([*words, *change, "--out", str(out)])
        assert stop.value.code == 1 and words_ in capsys.readouterr().err
    drawn[:] = [1]  # one more is allowed
    monkeypatch.setattr(protocol, "score", score)
    assert evaluate.main([*words, "--out", str(out)]) == 0
    assert "2 sets are in" in capsys.readouterr().err
    assert out.read_text() == (tmp_path / "whole.json").read_text()
    assert {p.name for p in tmp_path.iterdir()} == {"p.json", "whole.json"}


def test_a_set_keeps_the_evaluations_of_its_own_images(tmp_path):
    """A command that goes on told those of the images that it drew itself as those of all."""
    args, counts = types.SimpleNamespace(out=f"{tmp_path}/p.json"), []
    sets, done = Sets(args, {"how": 1}, counts), []
    for fd, drawn in ((2.0, [[10, 12], [14]]), (3.0, [[40]])):
        counts += map(np.array, drawn)
        done.append({"fd_all": fd})
        sets.keep(done)
    again = Sets(args, {"how": 1}, []).finished
    assert [s["nfe"] for s in again] == [12, 40]
    found = protocol.smallest(Pixels(), again)
    assert (found["nfe"], found["nfe_range"]) == (12, [10, 14])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"drawn_with": {}, "sets": 3', "\xff"])
def test_sets_that_cannot_be_read_are_one_sentence(workdir, tmp_path, capsys, content):
    (tmp_path / "p.json.sets").write_text(content, "latin-1")
    words = f"protocol --workdir {workdir} --num 16 --batch 8 --devices 1 --out {tmp_path}/p.json"
    with pytest.raises(SystemExit) as stop:
        evaluate.main(words.split())
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.startswith("error: --out: ") and said.count("\n") == 1
