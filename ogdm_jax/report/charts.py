"""Line charts as SVG for the page, drawn by matplotlib; the colours come from the page's style.

matplotlib writes one fixed colour into a figure, a page is light or dark: each colour below stands
for a variable of the style sheet and is replaced by it. Text stays text, in the page's size.
"""

import dataclasses
import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from ogdm_jax import records
from ogdm_jax.report.numbers import nice
from ogdm_jax.training.logs import LEVELS, level_of

LARGEST = 1e30  # a number that is drawn
HOVERED = 200  # points of a curve that have words
LARGE, SMALL = (6.6, 4.0), (4.2, 2.7)  # inches of 72 units; a letter has 9 to 10 of them
COLOURS = {
    "#1f5fbf": "var(--s0)",
    "#b9500b": "var(--s1)",
    "#1a7a4a": "var(--s2)",
    "#7a45b8": "var(--s3)",
    "#5a616b": "var(--soft)",
    "#e3e4e0": "var(--rule)",
    "#1b1d21": "var(--ink)",
}
_LINES, (_SOFT, _RULE, _INK) = list(COLOURS)[:4], list(COLOURS)[4:]
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ogdm_jax",
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.size": 9,
    "axes.edgecolor": _SOFT,
    "axes.labelcolor": _SOFT,
    "axes.titlecolor": _INK,
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": _RULE,
    "grid.linewidth": 0.8,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": _SOFT,
}
_MARKERS = "os^D"


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve. `dashed` lines are references (a floor) in grey without markers."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """Curves over one axis; `title` says what y is."""

    title: str
    x_label: str
    lines: Sequence[Line]
    log_x: bool = False
    log_y: bool = False
    markers: bool = False
    size: tuple[float, float] = SMALL


def svg(chart: Chart) -> str:
    """The chart as an <svg> element, or "" where there is nothing to draw.

    Points that are not finite, beyond LARGEST, or not positive on a log axis, are left out.
    """
    drawn = [(line, points) for line in chart.lines if len(points := _points(line, chart))]
    if not drawn:
        return ""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=chart.size, layout="constrained", dpi=72)  # a unit of SVG is a dot
        figure.patch.set_visible(False)
        axes = figure.subplots()
        axes.patch.set_visible(False)
        scales = {True: "log", False: "linear"}
        axes.set(xlabel=chart.x_label, xscale=scales[chart.log_x], yscale=scales[chart.log_y])
        axes.set_title(chart.title, loc="left", fontweight="bold")
        number = 0
        for line, points in drawn:
            if line.dashed:
                _draw_reference(axes, line, points)
                continue
            axes.plot(
                *points.T,
                color=_LINES[number % len(_LINES)],
                label=line.name,
                marker=_MARKERS[number % len(_MARKERS)] if chart.markers else None,
                markersize=5,
                clip_on=False,
            )
            number += 1
        _set_ticks(axes.xaxis, chart.log_x)
        _set_ticks(axes.yaxis, chart.log_y)
        if len(drawn) > 1:
            figure.legend(loc="outside upper left", ncols=3, handlelength=1.8, columnspacing=1.2)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format")))
    told = [found for line, points in drawn for found in _told(axes, line, points, chart)]
    element = _for_the_page(file.getvalue(), f"{chart.title} against {chart.x_label}")
    return element.replace("<svg", f'<svg data-points="{escape(records.dumps(told))}"', 1)


def _told(
    axes: Any, line: Line, points: np.ndarray, chart: Chart
) -> list[tuple[float, float, str]]:
    """(x, y, words) of some points of a curve, in units of the drawing: what the page says of the
    one that a finger or mouse is next to.
    """
    some = points[:: math.ceil(len(points) / HOVERED)]
    places = axes.transData.transform(some).round(1)
    height = 72 * chart.size[1]
    words = [f"{line.name}: {nice(y)} ({chart.x_label}: {nice(x)})" for x, y in some]
    return [(float(x), round(height - float(y), 1), text) for (x, y), text in zip(places, words)]


def _points(line: Line, chart: Chart) -> np.ndarray:
    """The points that can be drawn [n, 2]."""
    points = np.array([line.x, line.y], np.float64).T
    low = [1 / LARGEST if log else -LARGEST for log in (chart.log_x, chart.log_y)]
    return points[((points > low) & (points < LARGEST)).all(1)]


def _draw_reference(axes: Any, line: Line, points: np.ndarray) -> None:
    """A dashed curve; of one value only, a line across the chart."""
    how = {"color": _SOFT, "linestyle": (0, (5, 4)), "linewidth": 1.2, "label": line.name}
    if len(np.unique(points[:, 0])) == 1:
        axes.axhline(points[0, 1], **how)
    else:
        axes.plot(*points.T, **how)


def _set_ticks(axis: Axis, log: bool) -> None:
    """Puts about five ticks at round numbers of an axis."""
    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(FixedLocator(ticks(low, high, log)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: nice(value)))
    axis.set_minor_formatter(NullFormatter())


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers between low and high, both included.

    On a log axis of about a decade and more they are 1, 2 or 3, and 5 times powers of ten; else
    they are equal steps of 1, 2 or 5.
    """
    if log and high > 8 * low:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits in ((1,), (1, 3), (1, 2, 5)):
            values = [d * 10.0**n for n in decades for d in digits]
            found = [v for v in values if low <= v <= high]
            if len(found) >= 3:
                break
        return found[:: max(1, math.ceil(len(found) / 6))]
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 5)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _for_the_page(text: str, label: str) -> str:
    """A file of matplotlib as an element of a page: no addresses, the page's colours."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' (xmlns(:\w+)?|version)="[^"]*"', "", text)
    for colour, variable in COLOURS.items():
        text = text.replace(colour, variable)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1).strip()


def distance_chart(reports: Sequence[Mapping[str, Any]]) -> Chart:
    """Distance against network evaluations: one curve a solver, the floor of each n dashed.

    Args:
      reports: one or more of metrics.distance_report, with solver, steps and nfe.
    """
    lines = []
    for solver in dict.fromkeys(report["solver"] for report in reports):
        of_solver = sorted((r for r in reports if r["solver"] == solver), key=lambda r: r["nfe"])
        lines.append(Line(solver, [r["nfe"] for r in of_solver], [r["fd"] for r in of_solver]))
    evaluations = [report["nfe"] for report in reports]
    for n in sorted({report["n"] for report in reports}):
        floor = float(np.mean([r["floor"] for r in reports if r["n"] == n]))
        ends = [min(evaluations), max(evaluations)]
        lines.append(Line(f"real against real, n = {n:,}", ends, [floor] * 2, dashed=True))
    label = "network evaluations an image"
    return Chart(reports[0]["features"], label, lines, True, True, markers=True, size=LARGE)


def level_chart(metrics: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """The loss against the noise level, early to late in training; [] where it was not logged."""
    found = [m for m in metrics if any(name.startswith(LEVELS) for name in m)]
    if not found:
        return []
    lines = []
    for at in dict.fromkeys(round(share * (len(found) - 1)) for share in (0, 1 / 9, 1 / 3, 1)):
        points = {_middle(n): v for n, v in found[at].items() if n.startswith(LEVELS)}
        x = sorted(points)
        lines.append(Line(f"step {found[at]['step']:,}", x, [points[level] for level in x]))
    return [
        Chart(
            "loss by noise level", "noise level sigma", lines, log_x=True, log_y=True, markers=True
        )
    ]


def _middle(name: str) -> float:
    """Where a bin "level/LOW-HIGH" is drawn: in its middle, the open ones beside their edge."""
    low, high = level_of(name)
    return high / 1.5 if low == 0 else low * 1.5 if high == math.inf else math.sqrt(low * high)


_NAMES = {
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "images_per_second": "images per second",
}
_NOT_SHOWN, _OTHERS = ("step", "kimg", "grad_nonfinite"), ("loss/", "evaluate/", "heldout/")
_OTHERS += (LEVELS,)


def _images_at(steps: Sequence[float], logged: Mapping[float, float]) -> list[float]:
    """Thousand images seen at steps; evaluations may be at others than the logged ones."""
    known, images = np.array(sorted({0: 0.0, **logged}.items()), float).T
    beyond = np.maximum(np.array(steps) / max(known[-1], 1), 1)  # the last line: in proportion
    return (np.interp(steps, known, images) * beyond).tolist()


def training_charts(metrics: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Small charts of what training logged, over thousands of images.

    Args:
      metrics: the lines of metrics.jsonl.

    Returns:
      Evaluations with their floor, then losses, those of held-out images beside them, that by noise
      level, then the rest.
    """
    numbers = [m for m in metrics if isinstance(m.get("kimg"), int | float)]
    images = {line["step"]: line["kimg"] for line in numbers}
    label = "thousand images seen" if images else "steps"

    def curve(name: str, title: str, dashed: bool = False) -> Line:
        points = {m["step"]: m[name] for m in metrics if name in m and not isinstance(m[name], str)}
        x = _images_at(list(points), images) if images else list(points)
        return Line(title, x, list(points.values()), dashed)

    names = [n for n in dict.fromkeys(n for m in metrics for n in m) if n not in _NOT_SHOWN]
    distances = [name for name in names if name.startswith(("evaluate/fd", "evaluate/fid"))]
    parts = [name for name in names if name.startswith("loss/")]
    losses = [name for name in names if name == "loss"]
    losses += parts if len(parts) > 1 else []  # a single part is the whole
    rest = [name for name in names if name != "loss" and not name.startswith(_OTHERS)]
    charts = []
    for name in distances:
        lines = [curve(name, "samples"), curve("evaluate/floor", "real against real", dashed=True)]
        charts.append(Chart(name.partition("/")[2], label, lines, log_y=True, markers=True))
    if "heldout/loss" in names:
        lines = [curve("heldout/loss", "held-out"), curve("heldout/train", "trained on")]
        lines += [curve("loss/denoise", "in training", dashed=True)]
        charts.append(Chart("loss of the moving average", label, lines, markers=True))
    charts += level_chart(metrics)
    for name in [*losses, *sorted(rest, key=lambda name: "/" in name)]:
        charts.append(Chart(_NAMES.get(name, name), label, [curve(name, name)]))
    return charts
