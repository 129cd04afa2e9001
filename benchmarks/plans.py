"""Plans of configurations on TPU chips, compiled one by one and kept: what
benchmarks/plans/*.json and their table are.

    JAX_OPTIMIZATION_LEVEL=O1 python benchmarks/plans.py --configs digits,cifar10_edm --on
        v5e:2x4 --plans mesh,sharded
    python benchmarks/plans.py --table         memory and least time under each plan
    python benchmarks/plans.py --messages      arguments and messages
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
PLANS = ("mesh", "pmap", "sharded")
GIB = 2**30  # bytes


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


def groups(plans: list[dict]) -> list[tuple[list[str], dict[str, dict]]]:
    """What the plans of one configuration on the same chips share, and each plan by its name."""
    found: dict[tuple, dict[str, dict]] = {}
    for plan in plans:
        where = (plan["name"], plan["devices"], plan["chip"], plan["remat"], plan["accumulate"])
        found.setdefault(where, {})[plan["plan"]] = plan
    rows = []
    for (name, devices, chip, remat, rounds), each in sorted(found.items()):
        changed = ["remat"] * remat + [f"{rounds} rounds"] * (rounds > 1)
        rows.append(([name, f"{devices} x {chip}", ", ".join(changed)], each))
    return rows


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def table(plans: list[dict]) -> str:
    """Work of a step, and under each plan the memory that it holds and the least time it takes."""

    def peak(plan: dict) -> str:
        held = f"{plan['hbm_bytes']['peak'] / GIB:.2f}"
        return held if plan["fits"] else f"**{held}**"

    head = ["configuration", "chips", "with", "batch", "parameters", "TFLOP a chip", "bfloat16"]
    head += [f"{name} GiB" for name in PLANS] + [f"{name} ms" for name in PLANS]
    rows = []
    for where, each in groups(plans):
        one = next(iter(each.values()))
        work = [f"{one['batch']:,}", f"{one['parameters'] / 1e6:.1f} M"]
        work += [f"{one['tflop_per_device']:.3g}", f"{100 * one['bfloat16_share']:.1f} %"]
        times = {n: f"{1000 * p['seconds_lower_bound']:.3g}" for n, p in each.items() if p["fits"]}
        held = [peak(each[name]) if name in each else "" for name in PLANS]
        rows.append([*where, *work, *held, *(times.get(name, "") for name in PLANS)])
    return markdown(head, rows)


def messages(plans: list[dict]) -> str:
    """What a chip is given before a step, and what the chips send one another in it."""

    def sent(plan: dict) -> str:
        kinds = sorted(plan["collectives"].items())
        return ", ".join(f"{v['count']} {k} {v['bytes'] / 2**20:,.0f}" for k, v in kinds) or "none"

    head = ["configuration", "chips", "with"]
    head += [f"{name}: arguments GiB" for name in PLANS] + [f"{name}: MiB sent" for name in PLANS]
    rows = []
    for where, each in groups(plans):
        given = {n: f"{p['hbm_bytes']['arguments'] / GIB:.2f}" for n, p in each.items()}
        told = {name: sent(plan) for name, plan in each.items() if plan["fits"]}
        rows.append([*where, *(cells.get(n, "") for cells in (given, told) for n in PLANS)])
    return markdown(head, rows)


def costs(plans: list[dict], price: float) -> str:
    """Time and money of whole runs under the plan that costs least: bounds from below."""
    head = ["configuration", "chips", "with", "plan", "steps", "least time", "chip-hours"]
    rows = []
    for where, each in groups([plan for plan in plans if plan["fits"]]):
        plan = min(each.values(), key=lambda p: p["days"])
        hours = 24 * plan["days"]
        time = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
        spent = hours * plan["devices"]
        if spent > 0.1:
            amounts = [f"{plan['steps']:,}", time, f"{spent:,.1f}", f"{spent * price:,.1f}"]
            rows.append([*where, plan["plan"], *amounts])
    return markdown([*head, f"at {price:g} each"], rows)


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
    parser.add_argument(
        "--table", action="store_true", help="print memory and time of what is kept"
    )
    parser.add_argument(
        "--messages", action="store_true", help="print arguments and messages of it"
    )
    parser.add_argument("--price", type=float, help="of a chip-hour: print the costs of what fits")
    args = parser.parse_args()
    kept = [json.loads(path.read_text()) for path in sorted(KEPT.glob("*.json"))]
    if args.table:
        return print(table(kept))
    if args.messages:
        return print(messages(kept))
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
