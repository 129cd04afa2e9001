"""The report of a training folder as one HTML page: no script, nothing loaded from elsewhere, light
and dark.

`page(Findings(...))` is a pure function of plain data; evaluation.commands collects it. What is
None or empty is left out of the page.
"""

import base64
import dataclasses
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from ogdm_jax.data.pictures import grid
from ogdm_jax.pixels import to_uint8
from ogdm_jax.report.charts import SMALL, Line, line_chart, nice

STYLE = """
:root { color-scheme: light dark; --paper: #fbfbf9; --card: #fff; --ink: #1b1d21; --soft: #5a616b; --rule: #e3e4e0;
  --s0: #1f5fbf; --s1: #b9500b; --s2: #1a7a4a; --s3: #7a45b8; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --card: #1c1f24; --ink: #e9eaec; --soft: #a2a9b4;
  --rule: #33373e; --s0: #74aef8; --s1: #f2a265; --s2: #66cf97; --s3: #c0a0f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem clamp(1rem, 4vw, 2.5rem) 4rem; max-width: 68rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .3rem; }
p { margin: .3rem 0 1rem; max-width: 46rem; } p, figcaption, .tile small, .legend { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.2rem 0; }
.tile, .chart { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.45rem; line-height: 1.3; overflow-wrap: anywhere; }
.tile small { display: block; } .tile span { font-size: .85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: .75rem; }
.wide { max-width: 36rem; }
.chart > svg { display: block; width: 100%; height: auto; } .chart text { font-size: 11.5px; fill: var(--soft); }
@media (max-width: 32rem) { .wide .chart text { font-size: 15px; } }
.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .85rem; margin-bottom: .3rem; }
.legend b { color: var(--ink); margin-right: auto; } .legend svg { width: 18px; height: 10px; margin-right: .35rem; }
.rule { stroke: var(--rule); } .axis, .tick { stroke: var(--soft); } .line { fill: none; stroke-width: 2; }
.dashed { fill: none; stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 5 4; }
.line.c0 { stroke: var(--s0); } .line.c1 { stroke: var(--s1); } .line.c2 { stroke: var(--s2); }
.line.c3 { stroke: var(--s3); } .dot { stroke: var(--card); stroke-width: 1; } .dot.c0 { fill: var(--s0); }
.dot.c1 { fill: var(--s1); } .dot.c2 { fill: var(--s2); } .dot.c3 { fill: var(--s3); }
.pictures { display: flex; flex-wrap: wrap; gap: 1.2rem; } figure { margin: 0; max-width: 100%; }
figcaption { font-size: .85rem; margin-top: .35rem; max-width: 30rem; }
img { image-rendering: pixelated; max-width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; margin: .6rem 0; }
th { font-weight: 600; color: var(--soft); } th, td { padding: .28rem .5rem; text-align: right; white-space: nowrap; }
thead th { border-bottom: 1px solid var(--soft); vertical-align: bottom; }
tbody td { border-bottom: 1px solid var(--rule); }
td:first-child, th:first-child { text-align: left; padding-left: 0; }
.strip th, .strip td { border: 0; padding: 1px 2px; text-align: center; vertical-align: top; font-size: .74rem;
  font-weight: 400; }
.strip th:first-child { text-align: left; padding-right: .6rem; }
.strip td { min-width: 48px; } .strip td img { width: 44px; max-width: none; }
.strip tr.seed th, .strip tr.seed td { padding-top: .6rem; }
summary { cursor: pointer; margin-top: 2.6rem; font-weight: 600; } code { font-size: .85rem; overflow-wrap: anywhere; }
"""


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a report shows.

    Attributes:
      title: of the page.   facts: (name, value, note) of further tiles.
      distances: reports of evaluation.distance_report with solver, steps and nfe.
      metrics: the lines of metrics.jsonl.   best: the step whose evaluation in training found the
        smallest distance.
      samples, real: uint8 [n,h,w,c].   made: how the samples were made, in words.
      nearest: (samples [k,h,w,c], real [k,m,h,w,c], distances [k,m]): closest training images in
        the feature space.
      progress: (step, PNG bytes) of grids that training wrote.
      trajectory: (sigmas [N+1], states [N+1,b,h,w,c] scaled to [-1, 1], x0_hats [N,b,h,w,c]).
      config: {"group.key": value}.
    """

    title: str
    facts: Sequence[tuple[str, str, str]] = ()
    distances: Sequence[Mapping[str, Any]] = ()
    metrics: Sequence[Mapping[str, Any]] = ()
    best: int | None = None
    samples: np.ndarray | None = None
    real: np.ndarray | None = None
    made: str = ""
    nearest: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    progress: Sequence[tuple[int, bytes]] = ()
    trajectory: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def page(found: Findings) -> str:
    """The whole document."""
    sections = [
        _tiles(found),
        distances(found.distances),
        _samples(found),
        _nearest(found),
        _trajectory(found),
        curves(found.metrics, found.best),
        _progress(found),
        _config(found.config),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(found.title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{escape(found.title)}</h1>\n{''.join(sections)}</body></html>\n"
    )


def png(image: np.ndarray) -> bytes:
    """uint8 [h,w,c] as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(
        file, format="PNG", optimize=True
    )
    return file.getvalue()


def image_tag(data: bytes, alt: str, width: int | None = None) -> str:
    """PNG bytes inside the page. width: pixels on the screen where there is room, otherwise the
    image's own.
    """
    size = f' width="{width}"' if width else ""
    return (
        f'<img alt="{escape(alt)}"{size} '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}">'
    )


def _section(title: str, about: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p>{about}</p>{body}</section>\n" if body else ""


def table(rows: Sequence[Sequence[Any]], headings: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>" for row in rows
    )
    return (
        "<div "
        f'class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return nice(float(f"{value:.3g}")) if abs(value) < 1000 else nice(value)
    return escape(
        f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    )


def _share(value: float | None) -> str:
    return "–" if value is None else nice(round(value, 3) if abs(value) < 10 else round(value, 1))


def _tiles(found: Findings) -> str:
    tiles = list(found.facts)
    if found.distances:
        best = min(found.distances, key=lambda report: report["fd"])
        where = f"{best['solver']}, {best['nfe']} evaluations, n = {best['n']:,}"
        tiles.insert(0, (f"smallest {best['features']}", nice(best["fd"]), where))
        floor = f"the floor of {best['features']} at n = {best['n']:,}"
        tiles.insert(1, ("real against real", nice(best["floor"]), floor))
    cells = "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>'
        for name, value, note in tiles
    )
    return f'<div class="tiles">{cells}</div>\n' if cells else ""


def distances(reports: Sequence[Mapping[str, Any]]) -> str:
    """Distance against network evaluations: one curve a solver, the floor of each n dashed; below
    it all figures.
    """
    if not reports:
        return ""
    space = reports[0]["features"]
    curves = []
    for solver in dict.fromkeys(report["solver"] for report in reports):
        mine = sorted((r for r in reports if r["solver"] == solver), key=lambda r: r["nfe"])
        curves.append(Line(solver, [r["nfe"] for r in mine], [r["fd"] for r in mine]))
    evaluations = [report["nfe"] for report in reports]
    for n in sorted({report["n"] for report in reports}):
        floor = float(np.mean([r["floor"] for r in reports if r["n"] == n]))
        curves.append(
            Line(
                f"real against real, n = {n:,}",
                [min(evaluations), max(evaluations)],
                [floor] * 2,
                True,
            )
        )
    chart = line_chart(curves, "network evaluations an image", space, log_x=True, log_y=True)
    plain = (
        "solver",
        "steps",
        "nfe",
        "n",
        "fd",
        "floor",
        "fd_over_floor",
        "fd_all",
        "n_samples",
        "n_reference",
    )
    floored = ("kid", "precision", "recall", "density", "coverage")
    rows = [
        [r[name] for name in plain]
        + [f"{_share(r.get(name))} ({_share(r.get(name + '_floor'))})" for name in floored]
        for r in sorted(reports, key=lambda r: (r["solver"], r["nfe"]))
    ]
    headings = (
        "solver",
        "steps",
        "NFE",
        "n",
        space,
        "floor",
        "ratio",
        "all",
        "samples",
        "reference",
        *floored,
    )
    about = (
        f"<b>{escape(space)}</b> is the Fréchet distance of n samples to n real images; "
        "<b>floor</b> is what n other "
        "real images score against the same ones, so a ratio of 1 is as good as real. <b>all</b> "
        "compares every sample "
        "with the whole reference, as papers do: smaller through the larger numbers, not "
        "comparable with the floor. In "
        "brackets: what real images score."
    )
    body = f'<div class="wide">{chart}</div>{table(rows, headings)}'
    return _section("Distance against network evaluations", about, body)


def _pictures(items: Sequence[tuple[str, str]]) -> str:
    figures = [
        f"<figure>{image}<figcaption>{caption}</figcaption></figure>" for image, caption in items
    ]
    return f'<div class="pictures">{"".join(figures)}</div>'


def _strip(headings: Sequence[str], rows: Sequence[str]) -> str:
    """A table of small images: a row's header, then one cell an image; it scrolls where the page is
    narrow.
    """
    head = "".join(f"<th>{escape(text)}</th>" for text in headings)
    inside = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table class="strip">{inside}</table></div>'


def _grid(images: np.ndarray, alt: str, columns: int = 8, most: int = 64) -> str:
    """A grid about 450 pixels wide on the screen, by whole pixels where that can be."""
    images = to_uint8(images)[:most]
    picture = grid(images, columns=min(columns, len(images)), padding=1)
    whole = picture.shape[1] * (480 // picture.shape[1])
    return image_tag(png(picture), alt, whole if whole >= 400 else 480)


def _samples(found: Findings) -> str:
    items = []
    if found.samples is not None:
        items.append((_grid(found.samples, "generated images"), f"generated: {escape(found.made)}"))
    if found.real is not None:
        items.append(
            (_grid(found.real, "real images"), "real: drawn at random from the training data")
        )
    about = "The first seeds, not chosen: each image depends on its seed alone."
    return _section("Samples", about, _pictures(items) if items else "")


def _nearest(found: Findings) -> str:
    if found.nearest is None:
        return ""
    samples, real, far = found.nearest
    rows = []
    for i, sample in enumerate(samples):
        cells = [f"<td>{image_tag(png(sample), f'sample {i}')}</td>"]
        cells += [
            f"<td>{image_tag(png(image), f'neighbour {j + 1} of sample {i}')}{far[i, j]:.3g}</td>"
            for j, image in enumerate(real[i])
        ]
        rows.append(f"<tr><th>seed {i}</th>{''.join(cells)}</tr>")
    about = (
        "The closest training images in the feature space, with their distances: copies would be "
        "at 0."
    )
    headings = ["", "sample", *(f"{i + 1}." for i in range(real.shape[1]))]
    return _section("Nearest training images", about, _strip(headings, rows))


def _trajectory(found: Findings) -> str:
    if found.trajectory is None:
        return ""
    sigmas, states, x0_hats = found.trajectory
    last = len(sigmas) - 1
    shown = np.unique(np.linspace(0, last, min(last + 1, 12)).round().astype(int))
    rows = []
    for seed in range(states.shape[1]):
        for kind, name, values in (
            ("seed", f"seed {seed}: state", states),
            ("", "denoised", x0_hats),
        ):
            images = [
                to_uint8(values[i, seed]) if i < len(values) else None for i in shown
            ]  # nothing denoised at 0
            cells = "".join(
                f"<td>{'' if image is None else image_tag(png(image), f'{name}, step {i}')}</td>"
                for i, image in zip(shown, images, strict=True)
            )
            rows.append(f'<tr class="{kind}"><th>{escape(name)}</th>{cells}</tr>')
    about = (
        f"From noise to image in {last} steps ({escape(found.made)}): the sampler's state, divided "
        "by its spread so "
        "that noise stays visible, and what the network takes the finished image to be at that "
        "level."
    )
    return _section(
        "Trajectories", about, _strip(["noise level", *(f"{sigmas[i]:.2g}" for i in shown)], rows)
    )


_NAMES = {
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "images_per_second": "images per second",
}


def curves(metrics: Sequence[Mapping[str, Any]], best: int | None = None) -> str:
    """Small charts of metrics.jsonl over thousands of images: losses apart, evaluations with their
    floor.
    """
    where = {line["step"]: line["kimg"] for line in metrics if "kimg" in line}
    names = list(dict.fromkeys(name for line in metrics for name in line))

    def line(name: str, title: str = "", dashed: bool = False) -> Line:
        points = {m["step"]: m[name] for m in metrics if name in m and not isinstance(m[name], str)}
        x = [where.get(step, step) for step in points]
        return Line(title or name, x, list(points.values()), dashed)

    axis = "thousand images seen" if where else "steps"
    charts = []
    for name in names:
        if name.startswith(("evaluate/fd", "evaluate/fid")):
            lines = [line(name, "samples"), line("evaluate/floor", "real against real", True)]
            charts.append(line_chart(lines, axis, name.partition("/")[2], log_y=True, size=SMALL))
    losses = [name for name in names if name == "loss" or name.startswith("loss/")]
    several = len([name for name in losses if name != "loss"]) > 1
    charts += [
        line_chart([line(name)], axis, name, markers=False, size=SMALL)
        for name in losses
        if several or name == "loss"
    ]
    rest = [name for name in names if name not in ("step", "kimg", "grad_nonfinite", *losses)]
    plain = [name for name in rest if not name.startswith("evaluate/") and "/" not in name]
    charts += [
        line_chart([line(name)], axis, _NAMES.get(name, name), markers=False, size=SMALL)
        for name in plain
    ]
    grouped: dict[str, list[str]] = {}
    for name in rest:
        if "/" in name and not name.startswith("evaluate/"):
            grouped.setdefault(name.split("/")[0], []).append(name)
    charts += [
        line_chart([line(name, name.partition("/")[2])], axis, name, markers=False, size=SMALL)
        for members in grouped.values()
        for name in members
    ]
    charts = [chart for chart in charts if chart]
    about = "Means over each log interval."
    about += f" The best evaluated checkpoint is step {best:,}." if best is not None else ""
    return _section(
        "Training", about, f'<div class="charts">{"".join(charts)}</div>' if charts else ""
    )


def _progress(found: Findings) -> str:
    items = [
        (image_tag(data, f"samples at step {step}", 230), f"step {step:,}")
        for step, data in found.progress
    ]
    about = "The moving average's samples of the same seeds while it trained."
    return _section("Samples during training", about, _pictures(items) if items else "")


def _config(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    rows = [[key, repr(value)] for key, value in sorted(config.items())]
    body = table(rows, ("setting", "value"))
    return f"<details><summary>Configuration ({len(rows)} settings)</summary>{body}</details>\n"
