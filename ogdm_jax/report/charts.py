"""Line charts as inline SVG: colours from the page's style sheet, light and dark; a title on every
point; no script.
"""

import dataclasses
import math
from collections.abc import Sequence
from html import escape

LARGE, SMALL = (480, 290), (310, 200)
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 40
_MARKERS = (
    '<circle class="{c}" cx="{x}" cy="{y}" r="{r}">',
    '<rect class="{c}" x="{a}" y="{b}" width="{d}" height="{d}">',
    '<path class="{c}" d="M{x} {t}L{u} {v}L{a} {v}Z">',
    '<path class="{c}" d="M{x} {t}L{u} {y}L{x} {v}L{a} {y}Z">',
)
COLOURS = len(_MARKERS)


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve. `dashed` lines are references (a floor) in grey without markers."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


def nice(value: float) -> str:
    """A number for people: 4 significant digits, no 1e+00 forms between 0.001 and a million."""
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers between low and high: 1-2-5 steps, or on a log axis 1-2-5 (or powers of ten)
    themselves.
    """
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = []
        for digits in ((1,), (1, 3), (1, 2, 5)):
            found = [
                v
                for d in decades
                for m in digits
                if low * 0.999 <= (v := m * 10.0**d) <= high * 1.001
            ]
            if len(found) >= 3:
                break
        return found[:: max(1, math.ceil(len(found) / 6))]
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 5)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


class _Axis:
    """Numbers to pixels, with a little room at the ends."""

    def __init__(
        self, values: Sequence[float], start: float, end: float, log: bool, room: float = 0.05
    ):
        self.log = log
        low, high = min(values), max(values)
        if low == high:
            low, high = (
                (low / 2, high * 2)
                if log
                else (low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1))
            )
        a, b = (math.log10(low), math.log10(high)) if log else (low, high)
        a, b = a - room * (b - a), b + room * (b - a)
        if not log and low >= 0 > a:
            a = 0.0
        self._map = lambda t: start + (t - a) / (b - a) * (end - start)
        self.ticks = ticks(10**a, 10**b, True) if log else ticks(a, b, False)

    def __call__(self, value: float) -> float:
        return round(self._map(math.log10(value) if self.log else value), 1)


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    markers: bool = True,
    size: tuple[int, int] = LARGE,
) -> str:
    """An <svg> with a legend above it where there are several lines; "" where there is nothing to
    draw.

    Points that are not finite, or not positive on a log axis, are left out. size: in units of which
    a letter has 11.5.
    """
    width, height = size
    drawn = []
    for line in lines:
        points = [
            (float(x), float(y))
            for x, y in zip(line.x, line.y, strict=True)
            if math.isfinite(x)
            and math.isfinite(y)
            and (x > 0 or not log_x)
            and (y > 0 or not log_y)
        ]
        if points:
            drawn.append((line, points))
    if not drawn:
        return ""
    horizontal = _Axis(
        [x for _, points in drawn for x, _ in points], _LEFT, width - _RIGHT, log_x, 0.03
    )
    vertical = _Axis([y for _, points in drawn for _, y in points], height - _BOTTOM, _TOP, log_y)
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(f"{y_label} against {x_label}")}">'
    ]
    for value in vertical.ticks:
        y = vertical(value)
        parts.append(f'<path class="rule" d="M{_LEFT} {y}H{width - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 3.5}" text-anchor="end">{nice(value)}</text>')
    for value in horizontal.ticks:
        x = horizontal(value)
        parts.append(f'<path class="tick" d="M{x} {height - _BOTTOM}v4"/>')
        parts.append(
            f'<text x="{x}" y="{height - _BOTTOM + 16}" text-anchor="middle">{nice(value)}</text>'
        )
    parts.append(f'<path class="axis" d="M{_LEFT} {height - _BOTTOM}H{width - _RIGHT}"/>')
    middle = (_LEFT + width - _RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    colour, legend = 0, []
    for line, points in drawn:
        path = "M" + "L".join(f"{horizontal(x)} {vertical(y)}" for x, y in points)
        if (
            line.dashed and len({x for x, _ in points}) == 1
        ):  # a reference known once: a line to compare with
            path = f"M{_LEFT} {vertical(points[0][1])}H{width - _RIGHT}"
        if line.dashed:
            kind, key = (
                "dashed",
                '<svg viewBox="0 0 18 10"><path class="dashed" d="M0 5H18"/></svg>',
            )
        else:
            kind = f"c{colour % COLOURS}"
            key = f'<svg viewBox="0 0 18 10"><path class="line {kind}" d="M0 5H18"/>'
            key += (_marker(colour, 9, 5, kind) + "</svg>") if markers else "</svg>"
        title = escape(line.name)
        style = kind if line.dashed else f"line {kind}"
        parts.append(f'<path class="{style}" d="{path}"><title>{title}</title></path>')
        if not line.dashed:
            for x, y in points if markers else ():
                told = f"{title}: {nice(y)} at {nice(x)}"
                parts.append(_marker(colour, horizontal(x), vertical(y), kind, told))
            colour += 1
        legend.append(f"<span>{key}{title}</span>")
    parts.append("</svg>")
    heading = (
        "<div "
        f'class="legend"><b>{escape(y_label)}</b>{"".join(legend) if len(drawn) > 1 else ""}</div>'
    )
    return f'<div class="chart">{heading}{"".join(parts)}</div>'


def _marker(index: int, x: float, y: float, kind: str, title: str = "") -> str:
    r = 3.5
    places = {
        "x": x,
        "y": y,
        "r": r,
        "d": 2 * r,
        "a": x - r,
        "b": y - r,
        "t": y - r,
        "u": x + r,
        "v": y + r,
    }
    shape = _MARKERS[index % len(_MARKERS)].format(
        c=f"dot {kind}", **{k: round(v, 1) for k, v in places.items()}
    )
    tag = shape[1 : shape.index(" ")]
    return f"{shape}<title>{title}</title></{tag}>" if title else f"{shape}</{tag}>"
