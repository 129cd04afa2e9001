"""Means, spreads and paired tests over seeds, and the tables that show them.

Seed k of every configuration shares its seed: the batches' order, the draws of the training and the
noise of the measured images. So differences are taken seed by seed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from ogdm_jax.report.numbers import nice

METRICS = ("fd", "fd_all", "kid", "precision", "recall", "density", "coverage")
_RISING = METRICS[3:]  # the larger, the better
_MOST_EXACT = 20  # seeds of which all 2^n signs are tried
CHOSEN = "chosen"  # as a length of the moving average: the best of all on the other seeds
Report = Mapping[str, Any]
Values = Sequence[float] | np.ndarray


def spread(values: Values) -> dict[str, Any]:
    """{"values", "n", "mean", "std", "low", "high"} of a figure over seeds.

    std has n - 1 in its denominator; low and high are the 95 % confidence interval of the mean by
    Student's t. They are NaN for a single value, and a NaN among the values stays one.
    """
    x = np.asarray(values, np.float64)
    n, mean = len(x), float(np.mean(x))
    std = float(np.std(x, ddof=1)) if n > 1 else float("nan")
    half = float(special.stdtrit(n - 1, 0.975)) * std / n**0.5 if n > 1 else float("nan")
    return {
        "values": x.tolist(),
        "n": n,
        "mean": mean,
        "std": std,
        "low": mean - half,
        "high": mean + half,
    }


def paired(first: Values, second: Values) -> dict[str, Any]:
    """`spread` of the differences second - first, with two two-sided tests of "no difference".

    "t" and "p_t" are Student's paired t-test; "p_signs" is the exact permutation test: the share of
    the 2^n choices of signs whose mean is at least as far from 0 as the one that was found, so
    never below 2 / 2^n (0.0625 for 5 seeds); NaN above 20 seeds, where t says as much.
    """
    x = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    found, n = spread(x.tolist()), len(x)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = float(np.float64(found["mean"]) / (np.float64(found["std"]) / n**0.5))
    p_t = 2 * float(special.stdtr(n - 1, -abs(t))) if n > 1 else float("nan")
    return found | {"t": t, "p_t": p_t, "p_signs": _sign_test(x)}


def _sign_test(x: np.ndarray) -> float:
    """The p of the exact permutation test of differences [n]."""
    if len(x) > _MOST_EXACT or not np.isfinite(x).all():
        return float("nan")
    sums = np.zeros(1)
    for value in x:
        sums = np.concatenate([sums + value, sums - value])
    slack = 1e-12 * np.abs(x).sum()  # rounding must not part equal sums
    return float(np.mean(np.abs(sums) >= abs(x.sum()) - slack))


def summary(reports: Sequence[Report], arms: Sequence[str], metric: str) -> list[dict[str, Any]]:
    """What the reports of a study say of one figure, for every way of sampling.

    Only seeds that every arm has are compared. Where there are several lengths of the moving
    average, an entry with "ema" CHOSEN follows: each arm at the length whose mean over the other
    seeds is the best, so that no value takes part in its own choice.

    Args:
      reports: distance reports with arm, seed, checkpoint, ema, solver, steps and nfe.
      arms: names; all others are compared with the first.
      metric: one of METRICS.

    Returns:
      Entries {"checkpoint", "ema", "solver", "steps", "nfe", "metric", "floor", "seeds",
      "arms": {arm: `spread`}, "differences": {arm: `paired`}}.
    """
    keys = ("checkpoint", "ema", "solver", "steps", "nfe")
    groups: dict[tuple[Any, ...], list[Report]] = {}
    for report in reports:
        groups.setdefault(tuple(report[key] for key in keys), []).append(report)
    found, tables = [], {}
    for group, members in groups.items():
        values = {arm: {r["seed"]: r[metric] for r in members if r["arm"] == arm} for arm in arms}
        floors = [
            r[f"{metric}_floor" if metric != "fd" else "floor"]
            for r in members
            if metric != "fd_all"
        ]
        seeds = sorted(set.intersection(*(set(of_arm) for of_arm in values.values())))
        if seeds:
            table = {arm: [float(values[arm][seed]) for seed in seeds] for arm in arms}
            about = dict(zip(keys, group, strict=True)) | {"metric": metric}
            about |= {"floor": float(np.mean(floors)) if floors else None, "seeds": seeds}
            found.append(about | _compared(table))
            tables[group] = (about, table)
    return found + _chosen(tables, metric)


def _plus_minus(of_arm: Mapping[str, Any]) -> str:
    mean = nice(of_arm["mean"])  # one seed has no spread
    return mean if of_arm["n"] == 1 else f"{mean} ± {nice(float(format(of_arm['std'], '.2g')))}"


def _tested(difference: Mapping[str, Any]) -> list[str]:
    mean = nice(difference["mean"])
    if difference["n"] == 1:
        return [mean, "", ""]
    interval = f"[{nice(difference['low'])}, {nice(difference['high'])}]"
    return [f"{mean} {interval}", *(f"{difference[name]:.2g}" for name in ("p_t", "p_signs"))]


def _compared(table: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    first, *others = table
    return {
        "arms": {arm: spread(values) for arm, values in table.items()},
        "differences": {arm: paired(table[first], table[arm]) for arm in others},
    }


def _chosen(tables: Mapping[tuple[Any, ...], Any], metric: str) -> list[dict[str, Any]]:
    """The entries of `summary` whose length of the moving average is chosen on other seeds."""
    ways: dict[tuple[Any, ...], list[Any]] = {}
    for (checkpoint, _, *sampler), entry in tables.items():
        ways.setdefault((checkpoint, *sampler), []).append(entry)
    sign, found = -1 if metric in _RISING else 1, []
    for entries in ways.values():
        about = entries[0][0]
        seeds = about["seeds"]
        if len(entries) < 2 or len(seeds) < 2 or any(e[0]["seeds"] != seeds for e in entries):
            continue
        table, lengths = {}, {}
        for arm in entries[0][1]:
            values = sign * np.array([table[arm] for _, table in entries])  # [lengths, seeds]
            others = [np.delete(values, k, 1).mean(1).argmin() for k in range(len(seeds))]
            table[arm] = [float(sign * values[at, k]) for k, at in enumerate(others)]
            lengths[arm] = [entries[at][0]["ema"] for at in others]
        found.append(about | {"ema": CHOSEN, "lengths": lengths} | _compared(table))
    return found


def markdown(entries: Sequence[Mapping[str, Any]]) -> str:
    """The table of a summary: mean ± standard deviation of every arm, and of each difference to
    the first arm its mean with the 95 % interval and both p values; means alone of one seed.
    """
    first, *others = entries[0]["arms"]
    several = len({entry["checkpoint"] for entry in entries}) > 1
    heads = [*(["checkpoint"] if several else []), "solver", "steps", "NFE", "EMA", "floor"]
    heads += [first, *others]
    for arm in others:
        heads += [f"{arm} - {first} [95 %]", "p (t)", "p (signs)"]
    rows = [heads, ["---"] * len(heads)]
    for entry in sorted(entries, key=lambda entry: (entry["solver"], entry["steps"])):
        row = [str(entry["checkpoint"])] if several else []
        row += [entry["solver"], str(entry["steps"]), str(entry["nfe"]), str(entry["ema"])]
        row += ["" if entry["floor"] is None else nice(entry["floor"])]
        row += [_plus_minus(s) for s in entry["arms"].values()]
        for difference in entry["differences"].values():
            row += _tested(difference)
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
