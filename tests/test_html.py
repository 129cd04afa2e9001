"""The report page: well-formed, self-contained, with number and floor beside every distance; its
charts show what they are told.
"""

import io
import json
import re
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ogdm_jax.data.pictures import encode
from ogdm_jax.report import charts, html
from ogdm_jax.report.findings import Findings, Nearest, Path
from ogdm_jax.report.numbers import nice

pytestmark = pytest.mark.fast


def findings(channels: int = 1, side: int = 8) -> Findings:
    """A page's worth of made-up figures."""
    rng = np.random.default_rng(0)

    def images(*shape):
        return rng.integers(0, 256, (*shape, side, side, channels), np.uint8)

    distances = [
        {
            "solver": solver,
            "steps": n,
            "nfe": n if solver == "euler" else 2 * n - 1,
            "fd": 900 / n**2,
            "floor": 2.9,
        }
        | {
            "features": "fd_x",
            "n": 898,
            "fd_over_floor": 900 / n**2 / 2.9,
            "fd_all": 1.5,
            "n_samples": 1797,
        }
        | {
            "n_reference": 1797,
            "kid": 0.1,
            "kid_floor": 0.0,
            "precision": 0.8,
            "precision_floor": 0.9,
        }
        | {
            "recall": 0.7,
            "recall_floor": 0.9,
            "density": 0.8,
            "density_floor": 1.0,
            "coverage": 0.6,
        }
        for solver in ("euler", "heun")
        for n in (3, 5, 9, 18)
    ]
    metrics = []
    for step in range(10, 210, 10):
        line = {
            "step": step,
            "kimg": step * 0.064,
            "loss": 70 / step + 1,
            "loss/denoise": 69 / step + 1,
        }
        line |= {
            "loss/ogdm": 0.02,
            "grad_norm": 170 / step,
            "learning_rate": 1e-3,
            "grad_nonfinite": 0.0,
        }
        metrics.append(line | {"images_per_second": 900.0, "ogdm/r1": 1e-4, "ogdm/accuracy": 0.5})
    metrics[3]["loss/ogdm"] = "nan"
    metrics += [
        {"step": n, "evaluate/fd_x": 1000 / n, "evaluate/floor": 2.9, "evaluate/n": 898}
        for n in (100, 200)
    ]
    path = rng.normal(size=(19, 2, side, side, channels)).clip(-1, 1)
    return Findings(
        title="run <1>: ogdm on digits",
        facts=[("network", "12,345", "parameters")],
        distances=distances,
        metrics=metrics,
        best=100,
        samples=images(64),
        real=images(64),
        sampler="heun, 18 steps, 35 network evaluations",
        nearest=Nearest(images(8), images(8, 5), rng.uniform(1, 9, (8, 5))),
        progress=[(n, encode(images(1)[0])) for n in (50, 100)],
        path=Path(np.append(np.geomspace(80, 0.002, 18), 0), path, path[:-1], path[-1]),
        config={"data.source": "digits", "methods": ("ogdm",), "ema.rampup": 0.05},
    )


VOID = {"meta", "img", "input"}


def parsed(text: str) -> tuple[list[tuple[str, dict]], str]:
    """(all elements with attributes, all text); fails where tags are not balanced."""

    class Parser(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.elements, self.words = [], [], []

        def handle_starttag(self, tag, attrs):
            self.elements.append((tag, dict(attrs)))
            if tag not in VOID:
                self.open.append(tag)

        def handle_startendtag(self, tag, attrs):
            self.elements.append((tag, dict(attrs)))

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

        def handle_data(self, data):
            self.words.append(data)

    parser = Parser()
    parser.feed(text)
    parser.close()
    assert not parser.open
    return parser.elements, " ".join(parser.words)


@pytest.mark.parametrize("channels,side", [(1, 8), (3, 32)])
def test_the_page_is_whole_and_loads_nothing(channels, side):
    page = html.page(findings(channels, side))
    elements, words = parsed(page)
    tags = [tag for tag, _ in elements]
    assert [a for tag, a in elements if tag == "script"] == [{}]  # one, of this file's own
    assert "link" not in tags and "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []
    for tag, attributes in elements:
        assert "href" not in attributes and not any(name.startswith("on") for name in attributes)
        if tag == "img":
            assert attributes["src"].startswith("data:image/png;base64,") and attributes["alt"]
    assert re.findall("https?:", page) == []
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings == [
        "Distance against network evaluations",
        "Samples",
        "Nearest training images",
        "Trajectories",
        "Training",
        "Samples during training",
    ]
    assert (
        "run <1>: ogdm on digits" in words
        and "prefers-color-scheme: dark" in page
        and "viewport" in page
    )
    assert "best evaluated checkpoint is step 100" in words and "0.05" in words
    assert (
        page.count("<img") == 2 + 8 * 6 + 2 * (12 + 12) + 2
    )  # grids, neighbours, states and denoised, progress


def rows(page: str) -> list[list[str]]:
    """The cells of every row of the first table."""
    table = page[page.index("<table>") : page.index("</table>")]
    return [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", table)][1:]


def test_every_distance_has_its_number_and_floor():
    page = html.page(findings())
    cells = rows(page)
    assert [c[0] for c in cells] == ["euler"] * 4 + ["heun"] * 4
    assert [c[2] for c in cells[4:]] == ["5", "9", "17", "35"]
    assert all(c[3] == "898" and c[5] == "2.9" and c[8] == c[9] == "1,797" for c in cells)
    assert all(
        c[10] == "0.10 (0)" and c[11] == "0.80 (0.90)" and c[14] == "0.60 (–)" for c in cells
    )
    chart = charts.svg(charts.distance_chart(findings().distances))
    for text in ("fd_x", "euler", "heun", "real against real, n = 898", "stroke-dasharray"):
        assert text in chart


def test_what_is_not_there_is_left_out():
    page = html.page(Findings("empty"))
    assert "<section" not in page and "<details" not in page and parsed(page)
    assert charts.training_charts([]) == [] and drawn([]) == ""
    assert drawn([charts.Line("a", [1.0, 2.0], [float("nan"), -1.0])], log_y=True) == ""


def test_training_charts_name_what_they_show():
    shown = charts.training_charts(findings().metrics)
    assert [chart.title for chart in shown] == [
        "fd_x",
        "loss",
        "loss/denoise",
        "loss/ogdm",
        "gradient norm",
        "learning rate",
        "images per second",
        "ogdm/r1",
        "ogdm/accuracy",
    ]
    assert [line.name for line in shown[0].lines] == ["samples", "real against real"]
    assert shown[0].lines[0].x == [6.4, 12.8] and shown[0].x_label == "thousand images seen"
    assert len(shown[3].lines[0].y) == 19  # one of the 20 was no number


def test_evaluations_between_logged_steps_lie_at_the_images_seen_by_then():
    """Batches of 64: 0.064 thousand images a step, also before the first log line and behind the
    last.
    """
    lines = [{"step": step, "kimg": 0.064 * step, "loss": 1.0} for step in (300, 100, 200)]
    lines += [{"step": step, "evaluate/fd_x": 9.0} for step in (50, 100, 250, 400)]
    lines += [{"step": 260, "kimg": "nan", "heldout/loss": 1.0}]
    shown = {line.name: line.x for chart in charts.training_charts(lines) for line in chart.lines}
    np.testing.assert_allclose(shown["samples"], [3.2, 6.4, 16, 25.6])
    np.testing.assert_allclose(shown["held-out"], [16.64])
    assert charts.training_charts(lines[3:6])[0].lines[0].x == [50, 100, 250]  # nothing logged


def test_pictures_come_back_from_the_page():
    image = np.random.default_rng(1).integers(0, 256, (5, 7, 3), np.uint8)
    for picture in (image, image[..., :1]):
        with Image.open(io.BytesIO(encode(picture))) as file:
            np.testing.assert_array_equal(np.asarray(file).reshape(picture.shape), picture)


def drawn(lines: list[charts.Line], **more) -> str:
    return charts.svg(charts.Chart("d", "n & m", lines, **more))


def test_a_chart_takes_its_colours_from_the_page_and_loads_nothing():
    lines = [charts.Line(name, [1, 10, 100], [1000, 10, 0.1]) for name in "abcde"]
    picture = drawn(lines, log_x=True, log_y=True, markers=True)
    elements, words = parsed(picture)
    assert all(f"var(--s{i})" in picture for i in range(4)) and "http" not in picture
    assert not re.findall("#[0-9a-f]{6};", picture)
    assert {"a", "e", "d", "n & m", "0.1", "1,000", "100"} <= set(words.split("  ")) | set(
        re.findall(">([^<>]+)</text>", picture.replace("&amp;", "&"))
    )
    assert elements[0][1]["aria-label"] == "d against n & m"


@pytest.mark.parametrize(
    "low,high,log,expected",
    [
        (0, 10, False, [0, 2, 4, 6, 8, 10]),
        (0.3, 0.72, False, [0.3, 0.4, 0.5, 0.6, 0.7]),
        (1, 1000, True, [1, 10, 100, 1000]),
        (3, 40, True, [3, 10, 30]),
        (3, 5, True, [3, 3.5, 4, 4.5, 5]),
        (-1, 1, False, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_numbers(low, high, log, expected):
    np.testing.assert_allclose(charts.ticks(low, high, log), expected, atol=1e-12)


@pytest.mark.parametrize(
    "value,text",
    [
        (0, "0"),
        (0.0025, "0.0025"),
        (0.00025, "2.5e-4"),
        (1797, "1,797"),
        (2e6, "2e6"),
        (4.90123, "4.901"),
        (-3, "-3"),
    ],
)
def test_numbers_for_people(value, text):
    assert nice(value) == text


def test_one_point_and_constant_curves_are_drawn():
    for line in (charts.Line("a", [5], [3.0]), charts.Line("a", [1, 2], [0.0, 0.0])):
        assert "var(--s0)" in drawn([line], markers=True)
    flat = drawn([charts.Line("a", [1, 2], [7.0, 7.0])], log_y=True)
    assert "nan" not in flat.lower() and "var(--s0)" in flat


def test_a_floor_known_once_is_a_line_across_the_chart():
    both = [charts.Line("samples", [5], [9.0]), charts.Line("floor", [5], [3.0], dashed=True)]
    dashed = re.findall(r'd="M ([\d.]+) ([\d.]+) \s*L ([\d.]+) ([\d.]+)[^>]*dasharray', drawn(both))
    left, height, right, same = map(float, dashed[0])
    width, tall = (72 * side for side in charts.SMALL)
    assert right - left > width / 2 and height == same and 0 < height < tall


def test_a_curve_tells_the_value_of_each_point_where_it_is_drawn():
    chart = charts.Chart("loss", "steps", [charts.Line("a", [0, 10, 20], [1.0, 3.0, 2.0])])
    element = charts.svg(chart)
    told = json.loads(unescape(re.search('data-points="(.*?)"', element)[1]))
    assert [words for *_, words in told] == [
        "a: 1 (steps: 0)",
        "a: 3 (steps: 10)",
        "a: 2 (steps: 20)",
    ]
    (curve,) = re.findall(r'd="M ([^"]*?)"[^>]*?stroke: var\(--s0\)', element)
    drawn = np.array(re.findall(r"[\d.]+", curve), float).reshape(-1, 2)
    np.testing.assert_allclose([point[:2] for point in told], drawn, atol=0.1)
