"""Plans of configurations on TPU chips, compiled one by one and kept: what
benchmarks/plans/*.json and their table are.

    JAX_OPTIMIZATION_LEVEL=O1 python benchmarks/plans.py --configs digits,cifar10_edm --on
        v5e:2x4 --plans mesh,sharded
    python benchmarks/plans.py --table
    python benchmarks/plans.py --price 1.2      what runs would cost at least, so much a chip-hour

A plan that is kept already is not compiled again: delete its file for that. Each is a process of
its own, because libtpu keeps the memory of what it has compiled.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
KEPT = HERE / "plans"


def file_of(config: str, chips: str, plan: str, more: list[str]) -> Path:
    changed = "".join(f"-{text.partition('.')[2]}" for text in more)
    return KEPT / f"{config}-{chips.replace(':', '-')}-{plan}{changed.replace('=', '')}.json"


def compile_one(config: str, chips: str, plan: str, more: list[str], minutes: float) -> str:
    out = file_of(config, chips, plan, more)
    words = [
        sys.executable,
        str(HERE.parent / "train.py"),
        "--config",
        str(HERE.parent / "configs" / f"{config}.py"),
    ]
    words += ["--plan-for", chips, "--plan-out", str(out), f"--config.parallel.plan={plan}"]
    try:
        done = subprocess.run(
            [*words, *(f"--config.{text}" for text in more)],
            capture_output=True,
            text=True,
            timeout=60 * minutes,
        )
    except subprocess.TimeoutExpired:
        return f"not compiled within {minutes:g} minutes"
    return (
        done.stdout if done.returncode == 0 else (done.stderr.strip() or "failed").splitlines()[-1]
    )


def row(plan: dict) -> list[str]:
    gib, hbm = 2**30, plan["hbm_bytes"]
    sent = ", ".join(
        f"{v['count']} {k} {v['bytes'] / 2**20:,.0f} MiB"
        for k, v in sorted(plan["collectives"].items())
    )
    return [
        plan["name"],
        f"{plan['devices']} x {plan['chip']}",
        plan["plan"],
        f"{plan['batch']:,}",
        f"{plan['parameters'] / 1e6:.1f} M",
        f"{hbm['arguments'] / gib:.2f}",
        f"{hbm['peak'] / gib:.2f} of "
        f"{hbm['available'] / gib:.0f}{'' if plan['fits'] else ': does not fit'}",
        f"{plan['tflop_per_device']:.3g}",
        f"{100 * plan['bfloat16_share']:.1f} %",
        sent or "none",
        f"{1000 * plan['seconds_lower_bound']:.3g}",
        f"{plan['versions']['level']}, {plan['compile_seconds']:.0f} s",
    ]


def table(plans: list[dict]) -> str:
    head = [
        "configuration",
        "chips",
        "plan",
        "batch",
        "parameters",
        "arguments GiB",
        "peak GiB",
        "TFLOP a chip",
        "bfloat16",
    ]
    head += ["messages a step", "least ms a step", "level, compiled in"]
    rows = [head, ["---"] * len(head), *map(row, plans)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def costs(plans: list[dict], price: float) -> str:
    """Time and money of whole runs: bounds from below, as the time of a step is."""
    head = ["configuration", "chips", "plan", "steps", "least time", "chip-hours"]
    rows = [[*head, f"at {price:g} each"], ["---"] * 7]
    for plan in plans:
        hours = 24 * plan["days"]
        time = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
        spent = hours * plan["devices"]
        if plan["fits"] and spent > 0.1:
            where = [plan["name"], f"{plan['devices']} x {plan['chip']}", plan["plan"]]
            amounts = [f"{plan['steps']:,}", time, f"{spent:,.1f}", f"{spent * price:,.1f}"]
            rows += [[*where, *amounts]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", default="digits")
    parser.add_argument("--on", default="v5e:2x4", help="topologies with commas between them")
    parser.add_argument("--plans", default="mesh")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="GROUP.KEY=VALUE",
        help="setting of all of them",
    )
    parser.add_argument("--minutes", type=float, default=60, help="that one compilation may take")
    parser.add_argument("--table", action="store_true", help="print what is kept as a table")
    parser.add_argument("--price", type=float, help="of a chip-hour: print the costs of what fits")
    args = parser.parse_args()
    kept = [json.loads(path.read_text()) for path in sorted(KEPT.glob("*.json"))]
    kept.sort(key=lambda p: (p["name"], p["devices"], p["plan"]))
    if args.table:
        return print(table(kept))
    if args.price is not None:
        return print(costs(kept, args.price))
    KEPT.mkdir(exist_ok=True)
    for config in args.configs.split(","):
        for chips in args.on.split(","):
            for plan in args.plans.split(","):
                if not file_of(config, chips, plan, args.set).is_file():
                    print(compile_one(config, chips, plan, args.set, args.minutes), flush=True)


if __name__ == "__main__":
    main()
