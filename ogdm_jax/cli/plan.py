"""The options of a plan, and from them to a plan that is printed and written."""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import jax

from ogdm_jax import parallel, places, records
from ogdm_jax.cli.parsing import whole
from ogdm_jax.config import Config, ConfigError, replace
from ogdm_jax.planning import chips, program, report

HERE = "here"
_STEP = 1.5  # factor from one number of rounds that is tried to the next, at least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a plan."""
    group = parser.add_argument_group(
        "plan", "what a run will need, from the compiler; builds nothing, needs no data"
    )
    group.add_argument(
        "--plan-for",
        nargs="?",
        const=HERE,
        default="",
        metavar="v5e:4x4",
        help=(
            f"compile for these TPU chips ({', '.join(chips.TPUS)}; extra tpu), or without a value "
            "for the devices here; print memory, arithmetic, messages and a lower bound of the time"
        ),
    )
    group.add_argument(
        "--plan-out", default="", metavar="FILE", help="also write the figures there, as JSON"
    )
    group.add_argument(
        "--image-shape", default="", metavar="H,W,C", help="of images whose source is not at hand"
    )
    group.add_argument("--classes", type=whole(0), default=-1, help="of that source")
    group.add_argument("--images", type=whole(1), default=0, help="in that source")


def check(args: argparse.Namespace) -> None:
    """Checks the options before anything is compiled.

    Raises:
      ConfigError: options of a plan without --plan-for.
      PlaceError: a --plan-out that cannot be written.
    """
    for name, unset in (("plan_out", ""), ("image_shape", ""), ("classes", -1), ("images", 0)):
        if not args.plan_for and getattr(args, name) != unset:
            raise ConfigError(
                f"--{name.replace('_', '-')}: needs --plan-for, such as --plan-for v5e:4x4"
            )
    if args.plan_out:
        places.writable(places.place(args.plan_out, "--plan-out"), "--plan-out", file=True)


def run(args: argparse.Namespace, config: Config, name: str) -> dict[str, Any]:
    """The plan of a configuration's step, compiled; also printed, and written to --plan-out."""
    if args.plan_for != HERE:  # without devices, what the cache keeps cannot be read again
        jax.config.update("jax_enable_compilation_cache", False)
    chip, devices = chips.here() if args.plan_for == HERE else chips.topology(args.plan_for)
    source = program.source_like(config, args.image_shape, args.classes, args.images)
    found = _plan(config, source, chip, devices, name)
    if not found["fits"]:
        found["advice"] = _advice(config, source, chip, devices, name, found)
    print(report.text(found), flush=True)
    if args.plan_out:
        records.write(places.place(args.plan_out), found, indent=1)
    return found


def _plan(config: Config, source: Any, chip: str, devices: tuple, name: str) -> dict[str, Any]:
    run = program.build(config, source, parallel.plan_of(config.parallel.plan, devices))
    print(
        f"{name}: tracing and compiling for {len(devices)} x {chip or 'this machine'}",
        file=sys.stderr,
        flush=True,
    )
    compiled = program.compile_step(run)
    return report.figures(config, compiled, chip, len(devices), chips.memory(chip, devices), name)


def _advice(
    config: Config, source: Any, chip: str, devices: tuple, name: str, found: dict[str, Any]
) -> str:
    """The first change of settings that fits, tried on the compiler.

    First more rounds of accumulation, as few as possible; then remat as well.
    """
    need, have = found["hbm_bytes"]["peak"], found["hbm_bytes"]["available"]
    for changes, shrinks in _candidates(config, len(devices)):
        if need / shrinks > have:
            continue  # even if all of it shrank
        if _plan(replace(config, changes), source, chip, devices, name)["fits"]:
            return (
                " ".join(f"--config.{key}={value}" for key, value in changes.items())
                + " fits (compiled to see)"
            )
    return (
        "no number of accumulation rounds and no remat fits; more devices, plan sharded or a "
        "smaller network do"
    )


def _candidates(config: Config, devices: int) -> Iterator[tuple[dict[str, Any], float]]:
    """Changes, those that cost the least time first, each with a limit of how much it can save.

    The limit is a factor: the memory now over the least that it can be then.
    """
    rounds, each = config.optim.accumulate, config.data.batch // devices
    more: list[int] = []
    for k in range(rounds + 1, each + 1):
        if each % k == 0 and k >= _STEP * (more or [rounds])[-1]:
            more.append(k)
    for k in more:
        yield {"optim.accumulate": k}, k / rounds
    for k in [rounds, *more]:
        if not config.network.remat:
            also = {"optim.accumulate": k} if k != rounds else {}
            yield {"network.remat": True, **also}, float("inf")
