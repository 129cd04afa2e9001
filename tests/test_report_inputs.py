"""A report never falls over the files of a training folder; its page says what it left out."""

import json
import os

import numpy as np
import pytest

from ogdm_jax.data.pictures import encode
from ogdm_jax.report import html, inputs
from ogdm_jax.report.findings import Findings
from ogdm_jax.report.numbers import nice

pytestmark = pytest.mark.fast

GOOD = b'{"step": 1, "kimg": 0.1, "loss": 2.0}\n{"step": 2, "kimg": 0.2, "loss": 1.0}\n'
# metrics.jsonl: (content, lines that are read, what a note says or None)
METRICS = {
    "whole": (GOOD, 2, None),
    "empty": (b"", 0, None),
    "blank lines": (b"\n\n" + GOOD + b"  \n", 2, None),
    "returns": (GOOD.replace(b"\n", b"\r\n"), 2, None),
    "torn last line": (GOOD + b'{"step": 3, "lo', 2, "1 of 3 lines"),
    "torn inside a letter": (GOOD + '{"step": 3, "ä'.encode()[:-1], 2, "1 of 3 lines"),
    "glued lines": (GOOD + b'{"step": 3, "lo{"step": 4, "loss": 1}\n', 2, "1 of 3 lines"),
    "NaN as JSON has none": (GOOD + b'{"step": 3, "loss": NaN, "x": -Infinity}', 3, "loss: 1 of 3"),
    "NaN as words": (GOOD + b'{"step": 3, "loss": "nan", "x": "inf"}', 3, "x: 1 of 1"),
    "other words": (GOOD + b'{"step": 3, "loss": "low"}', 3, "loss: 1 of 3"),
    "huge numbers": (GOOD + b'{"step": 3, "loss": 1e999, "x": 1e300}', 3, "loss: 1 of 3"),
    "a number of 400 digits": (GOOD + b'{"step": 3, "loss": 1' + b"0" * 400 + b"}", 3, "loss: 1"),
    "a number of 9000 digits": (GOOD + b'{"step": 3, "loss": 1' + b"0" * 9000 + b"}", 2, "1 of 3"),
    "no step": (GOOD + b'{"loss": 3}', 2, "1 of 3 lines"),
    "steps that are none": (
        GOOD + b'{"step": "x"}\n{"step": null}\n{"step": [1]}\n{"step": 1.5}\n{"step": -1}\n'
        b'{"step": true}\n{"step": NaN}\n{"step": 1e99}\n',
        2,
        "8 of 10 lines",
    ),
    "values that are none": (
        GOOD + b'{"step": 3, "loss": null, "a": [1], "b": {"c": 1}, "d": true}',
        3,
        "loss: 1 of 3 values are not finite or no numbers",
    ),
    "lines that are none": (GOOD + b'7\n"x"\n[1, 2]\nnull\ntrue\n', 2, "5 of 7 lines"),
    "deep nesting": (GOOD + b"[" * 100_000 + b"\n", 2, "1 of 3 lines"),
    "deep values": (
        GOOD + b'{"step": 3, "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        2,
        "1 of 3",
    ),
    "binary": (GOOD + bytes(range(256)) * 8, 2, "of "),
    "zeros of a file system": (GOOD + bytes(4096), 2, "1 of 3 lines"),
    "a byte order mark": (b"\xef\xbb\xbf" + GOOD, 2, None),
    "a page": (b"<!DOCTYPE html>\n<html></html>\n", 0, "2 of 2 lines"),
    "half a surrogate": (GOOD + b'{"step": 3, "lo\\ud800ss": 1}', 3, None),
    "names of a hostile": (
        GOOD + json.dumps({"step": 3, "<script>alert(1)</script>": 1, "$x^$": 2}).encode(),
        3,
        None,
    ),
    "control letters": (GOOD + b'{"step": 3, "a\\u0000\\u001b[31m": 1.0}', 3, None),
    "steps that repeat and fall": (GOOD + GOOD + b'{"step": 0, "loss": 5}', 5, None),
    "a thousand names": (
        json.dumps({"step": 1} | {f"n{i}": i for i in range(1000)}).encode(),
        1,
        "1,000 names",
    ),
    "a very long name": (GOOD + json.dumps({"step": 3, "x" * 100_000: 1}).encode(), 3, None),
    "opposite ends": (
        b'{"step": 1, "loss": -1e308}\n{"step": 2, "loss": 1e308}\n{"step": 3, "loss": 1e-320}\n',
        3,
        None,
    ),
}


@pytest.mark.slow_cases("a thousand names")
@pytest.mark.parametrize("name", METRICS)
@pytest.mark.default
def test_metrics_are_read_or_said(tmp_path, name):
    content, count, words = METRICS[name]
    (tmp_path / "metrics.jsonl").write_bytes(content)
    found = inputs.metrics(str(tmp_path))
    assert len(found.values) == count
    if words is None:
        assert not found.notes
    else:
        assert any(words in note for note in found.notes), found.notes
    for line in found.values:
        assert type(line["step"]) is int
        assert all(type(v) is float for n, v in line.items() if n != "step")
    page = html.page(Findings("run", metrics=found.values, notes=found.notes))
    page.encode()
    assert page.count("<script") == 1 and ("Left out or changed" in page) == bool(found.notes)
    if name == "whole":
        assert page.count("<svg") == 1


def test_what_is_no_file_is_said(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    assert inputs.metrics(str(tmp_path)) == ([], ["metrics.jsonl cannot be read (Is a directory)"])
    if os.getuid():
        (tmp_path / "metrics.jsonl").rmdir()
        (tmp_path / "metrics.jsonl").touch(0o000)
        assert "Permission denied" in inputs.metrics(str(tmp_path)).notes[0]
    assert inputs.metrics(str(tmp_path / "nowhere")) == ([], ())


REPORT = {"step": 10, "fd": 2.0, "features": "fd_x", "n": 5, "n_samples": 5}
REPORT |= {"solver": "heun", "steps": 3}
OTHER = REPORT | {"step": 20, "fd": 1.0}
# evaluations.json: (content, the best step of 10 and 20, whether a note says that it is not read)
EVALUATIONS = {
    "whole": (json.dumps([REPORT, OTHER]), 20, False),
    "nothing": ("[]", None, False),
    "a distance that is NaN": (json.dumps([REPORT, OTHER | {"fd": "nan"}]), 10, False),
    "NaN as JSON has none": (json.dumps([REPORT, OTHER | {"fd": float("nan")}]), 10, False),
    "infinity": (json.dumps([REPORT, OTHER | {"fd": "inf"}]), 10, False),
    "a huge number": (f'[{json.dumps(REPORT)}, {{"step": 20, "fd": 1e999}}]', None, False),
    "another protocol": (json.dumps([REPORT, OTHER | {"features": "fid"}]), 20, False),
    "a protocol of lists": (json.dumps([REPORT, OTHER | {"features": [[1]]}]), 20, False),
    "a step that is gone": (json.dumps([REPORT, OTHER | {"step": 15}]), 10, False),
    "a step of 400 digits": (f'[{{"step": 1{"0" * 400}, "fd": 1}}]', None, False),
    "empty": ("", None, True),
    "torn": (json.dumps([REPORT, OTHER])[:-9], None, True),
    "an object": (json.dumps(REPORT), None, True),
    "a number": ("7", None, True),
    "null": ("null", None, True),
    "no objects": ("[1, null]", None, True),
    "no distance": (json.dumps([{"step": 10}]), None, True),
    "no step": (json.dumps([{"fd": 1.0}]), None, True),
    "a step of words": (json.dumps([REPORT | {"step": "10"}]), None, True),
    "a step that is true": (json.dumps([REPORT | {"step": True}]), None, True),
    "a negative step": (json.dumps([REPORT | {"step": -1}]), None, True),
    "a distance of words": (json.dumps([REPORT | {"fd": "low"}]), None, True),
    "a distance of lists": (json.dumps([REPORT | {"fd": [1]}]), None, True),
    "a number of 9000 digits": (f'[{{"step": 1{"0" * 9000}}}]', None, True),
    "deep nesting": ("[" * 100_000, None, True),
    "a page": ("<!DOCTYPE html>", None, True),
    "binary": (bytes(range(256)), None, True),
    "zeros": (bytes(4096), None, True),
    "two lists": ("[][]", None, True),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_the_best_evaluation_is_found_or_said(tmp_path, name):
    content, best, said = EVALUATIONS[name]
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "evaluations.json").write_bytes(content)
    found = inputs.best(str(tmp_path), [10, 20, 30])
    assert found.values == best and bool(found.notes) == said
    if said:
        (note,) = found.notes
        assert "evaluations.json" in note and "\n" not in note and len(note) < 500


def test_pictures_of_training_are_shown_or_said(tmp_path):
    folder = tmp_path / "samples"
    folder.mkdir()
    good = encode(np.zeros((4, 4), np.uint8))
    (folder / "1.png").write_bytes(good)
    (folder / "2.png").write_bytes(b"<html>")
    (folder / "3.png").write_bytes(good[:30])
    (folder / "4.png").mkdir()
    for name in ("²", "x", "1" * 30, "-5", "5.5"):  # no steps
        (folder / f"{name}.png").write_bytes(good)
    found = inputs.progress(str(tmp_path))
    assert found.values == [(1, good)] and len(found.notes) == 3
    assert all(f"samples/{i}.png" in note for i, note in zip((2, 3, 4), found.notes))
    assert inputs.progress(str(tmp_path / "nowhere")) == ([], [])
    for i in range(5, 50):
        (folder / f"{i}.png").write_bytes(good)
    for i in range(2, 5):
        (folder / f"{i}.png").rmdir() if i == 4 else (folder / f"{i}.png").unlink()
    steps = [step for step, _ in inputs.progress(str(tmp_path)).values]
    assert len(steps) == 4 and steps[0] == 1 and steps[-1] == 49


DISTANCE = {"features": "fd_x", "solver": "heun", "steps": 3, "nfe": 5, "n": 50, "fd": 2.0}
DISTANCE |= {"floor": 1.0, "fd_over_floor": 2.0, "fd_all": 1.5, "n_samples": 50}
DISTANCE |= {"n_reference": 100, "kid": 0.1, "kid_floor": 0.0, "precision": 0.5}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"fd": "nan", "fd_over_floor": "nan"},
        {"fd": "inf", "fd_all": 1e300},
        {"floor": 0.0, "fd_over_floor": "inf"},
        {"features": "<b>\ud800", "solver": "$x^$"},
        {"kid": None, "precision": "x", "recall": [1], "density": 10**400},
        {"n": 50.0, "nfe": 10**15},
    ],
)
def test_distances_are_drawn_whatever_they_are(tmp_path, change):
    path = tmp_path / "distances.json"
    path.write_text(json.dumps([DISTANCE, DISTANCE | {"steps": 9, "nfe": 17} | change]))
    found = inputs.distances(str(path))
    page = html.page(Findings("run", distances=found))
    page.encode()
    assert "<b>\ud800" not in page and page.count("<svg") == 1
    assert ("nan" in page) == (change.get("fd") == "nan" or "precision" in change)
    assert "smallest fd_x" in page or "smallest &lt;b&gt;?" in page


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[1]", "[[]]", "[{}]", "null", "[" * 100_000, b"\xff\xfe", b"\0" * 99]
    + [
        json.dumps([DISTANCE | change])
        for change in (
            {"fd": "low"},
            {"fd": None},
            {"fd": True},
            {"steps": "nan"},
            {"steps": 0},
            {"n": -1},
            {"n": 1e300},
            {"solver": 1},
            {"features": None},
            {"nfe": [3]},
        )
    ],
)
def test_distances_that_are_none_are_refused(tmp_path, content):
    path = tmp_path / "distances.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="^--distances: .*; expected distances.json") as refused:
        inputs.distances(str(path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_words(value):
    assert nice(value) == str(value)
