"""The reports of the evaluations of a run, by step: which checkpoints are the best.

workdir/evaluations.json    a list of reports: {"step", "fd", "features", "n", ...}
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from orbax.checkpoint import checkpoint_managers as policies

from ogdm_jax import places, records

NAME = "evaluations.json"
MEASURED = "distances.json"  # those that `ogdm report` measured, of one checkpoint
SAMPLER = "sampler"  # what else of config.sample is not as by default
# distances can be compared where these are equal
_PROTOCOL = ("features", "n", "n_samples", "solver", "steps", "reference", "conditions")
_NUMBERS = ("fd", "floor", "weight", "unguided")


def read(workdir: str | os.PathLike, field: str = "--workdir") -> dict[int, dict[str, Any]]:
    """{step: report} of a training folder; {} where nothing was evaluated.

    A distance that was not a number is a NaN again.

    Raises:
      RecordError: the file cannot be read, or an entry is no report.
    """
    path = places.place(workdir, field) / NAME
    if not path.exists():
        return {}
    remedy = (
        "; expected the reports of this folder's evaluations: bring the file back, or take it away "
        "to go on without them"
    )
    try:
        found = [_report(entry) for entry in records.read(path, list, field)]
    except records.RecordError as error:
        raise records.RecordError(f"{error}{remedy}") from None
    for number, report in enumerate(found):
        if not report:
            raise records.RecordError(
                f"{field}: entry {number} of {str(path)!r} has no step or no distance{remedy}"
            )
    return {report["step"]: report for report in found}


def write(workdir: str | os.PathLike, reports: Mapping[int, Mapping[str, Any]]) -> None:
    """Writes the file: whole, or not at all where the run is stopped here."""
    in_order = [reports[step] for step in sorted(reports)]
    records.write(places.place(workdir) / NAME, in_order, indent=1)


def _report(entry: Any) -> dict[str, Any]:
    """A report as it was measured; {} for what is none."""
    if not isinstance(entry, dict) or type(entry.get("step")) is not int or entry["step"] < 0:
        return {}
    try:
        return entry | {
            name: float(entry[name]) for name in _NUMBERS if name == "fd" or name in entry
        }
    except (KeyError, TypeError, ValueError, OverflowError):
        return {}


def ranked(reports: Mapping[int, Mapping[str, Any]], steps: Sequence[int]) -> list[int]:
    """The evaluated ones of some steps, smallest distance first.

    Those that were evaluated in another way than the last report (features, number of images,
    sampler) are left out, and those whose distance is not a number.
    """
    if not reports:
        return []
    last = reports[max(reports)]
    alike = [
        step
        for step in set(steps) & set(reports)
        if _comparable(reports[step], last) and math.isfinite(reports[step]["fd"])
    ]
    return sorted(alike, key=lambda step: (reports[step]["fd"], step))


def _comparable(report: Mapping[str, Any], last: Mapping[str, Any]) -> bool:
    """Whether two distances were measured alike; reports of before do not say SAMPLER."""
    sampler = report.get(SAMPLER, last.get(SAMPLER)) == last.get(SAMPLER, report.get(SAMPLER))
    return sampler and all(report.get(key) == last.get(key) for key in _PROTOCOL)


class Best(policies.PreservationPolicy):
    """Preserves the checkpoints whose evaluation found the smallest distances."""

    def __init__(self, reports: Mapping[int, Mapping[str, Any]], count: int) -> None:
        self._reports, self._count = reports, count

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """For each checkpoint, whether it is one of the best."""
        best = ranked(self._reports, [info.step for info in checkpoints])[: self._count]
        return [info.step in best for info in checkpoints]
