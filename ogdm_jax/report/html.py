"""Findings as one HTML page: nothing loaded from elsewhere, light and dark. Its few lines of script
say the values of curves and let one walk along a trajectory; without them all else is there.

The template page.html.j2 holds layout, style and explanations; here numbers, charts and images are
made ready for it.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from ogdm_jax.data.pictures import encode, grid
from ogdm_jax.pixels import to_uint8
from ogdm_jax.report import charts
from ogdm_jax.report.findings import Findings, Path
from ogdm_jax.report.inputs import NUMBERS, SHARES
from ogdm_jax.report.numbers import nice
from ogdm_jax.report.templates import environment

_STEPS = 12  # of a trajectory, at most


def page(found: Findings) -> str:
    """The whole document."""
    templates = environment(autoescape=True)
    templates.filters |= {"cell": _cell, "nice": nice, "png": _png, "grid": _grid}
    return templates.get_template("page.html.j2").render(
        found=found,
        tiles=_tiles(found),
        distances=_distances(found.distances) if found.distances else None,
        steps=None if found.path is None else _shown(found.path),
        settings=[(key, repr(value)) for key, value in sorted(found.config.items())],
        curves=_svgs(charts.training_charts(found.metrics)),
    )


def _tiles(found: Findings) -> list[tuple[str, str, str]]:
    """(name, value, note): the smallest distance and its floor, then the facts."""
    if not found.distances:
        return list(found.facts)
    best = min(found.distances, key=lambda r: (math.isnan(r["fd"]), r["fd"]))
    n, name = f"n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{best['n']:,}", best["features"]
    where = f"{best['solver']}, {best['nfe']} evaluations, {n}"
    return [
        (f"smallest {name}", nice(best["fd"]), where),
        ("real against real", nice(best["floor"]), f"the floor of {name} at {n}"),
        *found.facts,
    ]


def _distances(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Chart and table of the distances."""
    space = reports[0]["features"]
    headings = ["solver", "steps", "NFE", "n", space, "floor", "ratio", "all"]
    headings += ["samples", "reference", *SHARES]
    rows = [
        [r[name] for name in ("solver", *NUMBERS)]
        + [f"{_share(r.get(name))} ({_share(r.get(name + '_floor'))})" for name in SHARES]
        for r in sorted(reports, key=lambda r: (r["solver"], r["nfe"]))
    ]
    chart = _svgs([charts.distance_chart(reports)])
    return {"space": space, "headings": headings, "rows": rows, "chart": chart}


def _svgs(drawn: Sequence[charts.Chart]) -> list[Markup]:
    return [Markup(svg) for svg in map(charts.svg, drawn) if svg]


def _shown(path: Path) -> list[int]:
    """The steps of a trajectory that are shown, evenly chosen."""
    last = len(path.sigmas) - 1
    chosen = np.linspace(0, last, min(last + 1, _STEPS)).round().astype(int)
    return [int(i) for i in np.unique(chosen)]


def _cell(value: Any) -> str:
    """A number or word of a table."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return nice(float(f"{value:.3g}")) if abs(value) < 1000 else nice(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _share(value: float | None) -> str:
    """A share or a kernel distance: two digits behind the point, below 0.1 one digit."""
    if value is None:
        return "–"
    return nice(float(f"{value:.1g}")) if abs(value) < 0.1 else f"{value:.2f}"


def _png(image: np.ndarray | bytes, alt: str, width: int | None = None) -> Markup:
    """An image inside the page.

    Args:
      image: [h,w,c], or a PNG file.
      alt: what it shows.
      width: pixels on the screen where there is room; None takes the image's own.
    """
    data = base64.b64encode(
        image if isinstance(image, bytes) else encode(image, compress_level=9)
    ).decode()
    size = Markup(' width="{}"').format(width) if width else ""
    return Markup('<img alt="{}"{} src="data:image/png;base64,{}">').format(alt, size, data)


def _grid(images: np.ndarray, alt: str) -> Markup:
    """A grid about 450 pixels wide on the screen, by whole pixels where that can be."""
    images = to_uint8(images)[:64]
    picture = grid(images, columns=min(8, len(images)), padding=1)
    whole = picture.shape[1] * (480 // picture.shape[1])
    return _png(picture, alt, whole if whole >= 400 else 480)
