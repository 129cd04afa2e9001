"""What a report reads of a training folder. What cannot be read is left out, and said."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from ogdm_jax import places, records
from ogdm_jax.data import pictures
from ogdm_jax.training import evaluations, logs

CURVES = 100  # names of numbers whose curves a page shows
_TEXTS = ("features", "solver")
NUMBERS = ("steps", "nfe", "n", "fd", "floor", "fd_over_floor", "fd_all")
NUMBERS += ("n_samples", "n_reference")
_WHOLE = ("steps", "nfe", "n", "n_samples", "n_reference")
SHARES = ("kid", "precision", "recall", "density", "coverage")


class Found(NamedTuple):
    """What was read, and sentences about what was left out."""

    values: Any
    notes: Sequence[str] = ()


def metrics(workdir: str) -> Found:
    """The lines of metrics.jsonl, each {"step": int, name: float}; [] without the file.

    A line that is cut, or is no object with a step, is left out, and so is a value that is no
    number. The words nan, inf and -inf are numbers.
    """
    path = places.place(workdir) / logs.METRICS
    if not path.exists():
        return Found([])
    try:
        raw = path.read_bytes()
    except OSError as error:
        return Found([], [f"metrics.jsonl cannot be read ({error.strerror or error})"])
    lines, torn, names, odd = [], 0, Counter(), Counter()
    for text in filter(bytes.strip, raw.split(b"\n")):
        line = _object(text)
        step = number(line.pop("step", None))
        if not (step == step // 1 and 0 <= step < 2**53):
            torn += 1
            continue
        kept = {printable(name, 60): number(value) for name, value in line.items()}
        names.update(kept.keys())
        odd.update(name for name, value in kept.items() if not math.isfinite(value))
        lines.append({"step": int(step), **kept})
    notes, whole = [], torn + len(lines)
    if torn:
        notes.append(f"metrics.jsonl: {torn} of {whole} lines are cut or no objects")
    few = [name for name, _ in names.most_common(CURVES)]
    if len(names) > len(few):
        many = f"{len(names):,} names of numbers, of which the {CURVES} commonest are shown"
        notes.append(f"metrics.jsonl: {many}")
        lines = [{n: v for n, v in line.items() if n == "step" or n in few} for line in lines]
    notes += [
        f"{name}: {odd[name]} of {names[name]} values are not finite or no numbers"
        for name in few
        if odd[name]
    ]
    return Found(lines, notes)


def _object(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def number(value: Any) -> float:
    """A JSON value as a number: NaN for what is none, infinity for what is too large."""
    if value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def printable(text: str, most: int = 200) -> str:
    """A name for a page: at most so many characters, and none that no page can hold."""
    return "".join(c if c.isprintable() else "?" for c in text[:most]) or "?"


def best(workdir: str, steps: Sequence[int]) -> Found:
    """The step, of these, whose evaluation found the smallest distance; None without any."""
    try:
        ranked = evaluations.ranked(evaluations.read(workdir), steps)
    except (ValueError, OSError) as error:
        return Found(None, [" ".join(str(error).split())])
    return Found(ranked[0] if ranked else None)


def progress(workdir: str, most: int = 4) -> Found:
    """(step, PNG bytes) of at most so many grids that training wrote, even over the steps."""
    folder, found, notes = places.place(workdir) / "samples", [], []
    try:
        paths = sorted((_step_of(path), path) for path in folder.glob("*.png"))
    except OSError as error:
        return Found([], [f"samples/ cannot be read ({error.strerror or error})"])
    paths = [(step, path) for step, path in paths if step >= 0]
    chosen = np.linspace(0, len(paths) - 1, min(len(paths), most)).round().astype(int)
    for step, path in (paths[i] for i in np.unique(chosen)):
        try:
            content = path.read_bytes()
            pictures.decode(content)
            found.append((step, content))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            notes.append(f"samples/{path.name} {reason}")
    return Found(found, notes)


def _step_of(path: epath.Path) -> int:
    """The step of a file that training wrote; -1 for another file."""
    return int(path.stem) if path.stem.isdecimal() and len(path.stem) < 16 else -1


def distances(path: str) -> list[dict[str, Any]]:
    """A file of distances as `ogdm report` writes it.

    Raises:
      ValueError: it is missing, or another file.
    """
    known = "expected distances.json, which report writes into the training folder"
    try:
        reports = records.read(path, list, "--distances")
    except records.RecordError as error:
        raise ValueError(f"{error}; {known}") from None
    return [_distance(report, path, known) for report in reports]


def _distance(report: Any, path: str, known: str) -> dict[str, Any]:
    """One report with texts, whole numbers and floats where they belong."""
    if not isinstance(report, dict):
        raise ValueError(f"--distances: {path} is no list of distances; {known}")
    for name in _TEXTS:
        if not isinstance(report.get(name), str):
            raise ValueError(f"--distances: {path} has no {name} of the right type; {known}")
        report[name] = printable(report[name])
    for name in NUMBERS:
        value = number(report.get(name))
        word = report.get(name) == "nan"
        if not word and math.isnan(value) or name in _WHOLE and not 0 < value < 2**53:
            raise ValueError(f"--distances: {path} has no {name} of the right type; {known}")
        report[name] = int(value) if name in _WHOLE else value
    for name in (*SHARES, *(f"{share}_floor" for share in SHARES)):
        if name in report:
            report[name] = number(report[name])
    if "reference" in report:
        report["reference"] = printable(str(report["reference"]))
    return report
