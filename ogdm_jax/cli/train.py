"""Trains a diffusion model.

    ogdm train                                            the shipped digits, minutes on two cores
    ogdm train --config configs/NAME.py --workdir DIR --config.KEY=VALUE ...
    ogdm train --config configs/NAME.py --dry-run               all settings and the plan
    ogdm train --config configs/NAME.py --plan-for v5e:2x4      what it will need, from the compiler

`python train.py` is the same. Run the same command again to resume. Ctrl-C and SIGTERM save and
end with exit code 0 (--stopped-code); a second one ends at once, without saving, with 128 + its
number. Errors end with 1.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ogdm_jax import cluster, parallel, startup
from ogdm_jax import config as configs
from ogdm_jax.cli import plan as planning
from ogdm_jax.cli.parsing import parser_of, whole
from ogdm_jax.methods import discovery
from ogdm_jax.training import profile


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The options, and what they leave over: --config.KEY=VALUE."""
    parser = parser_of("train", __doc__)
    parser.add_argument(
        "--config",
        default=str(Path(configs.SHIPPED) / "digits.py"),
        help="a Python file with get_config()",
    )
    parser.add_argument(
        "--workdir", default="", help="where all of it goes, gs://... too (default: runs/NAME)"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print all settings as one types them, devices, batch and steps; build nothing",
    )
    parser.add_argument(
        "--profile", default="", metavar="FIRST,LAST", help="trace these steps into WORKDIR/profile"
    )
    parser.add_argument(
        "--override",
        action="store_true",
        help="resume with settings, or data, that a person may decide to change "
        "(WORKDIR/history.jsonl keeps which)",
    )
    parser.add_argument(
        "--stopped-code",
        type=whole(0, 255),
        default=0,
        metavar="CODE",
        help="exit code after a signal (default: 0)",
    )
    several = parser.add_argument_group(
        "several processes", "all three, only where JAX cannot find the cluster itself"
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    several.add_argument("--processes", metavar="N", type=whole(1), help="their number")
    several.add_argument(
        "--process", metavar="I", type=whole(0), help="which one this is, 0 to N - 1"
    )
    planning.add_arguments(parser)
    return parser.parse_known_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, resumes or plans; exits with 1 after one sentence on bad input."""
    args, rest = parse(argv)
    try:
        run(args, rest)
    except cluster.Stopped:
        startup.end_on_interrupt()
        raise SystemExit(args.stopped_code) from None


def plan(argv: Sequence[str] | None = None) -> None:
    """`ogdm plan`: `ogdm train --plan-for`, for the devices here unless the words name others."""
    words = list(sys.argv[1:] if argv is None else argv)
    named = any(word.partition("=")[0] == "--plan-for" for word in words)
    main(words if named else [*words, "--plan-for"])


def run(args: argparse.Namespace, rest: list[str]) -> None:
    """What `main` does after parsing."""
    with cluster.ending_together(), startup.command():
        planning.check(args)
        spelled, config, vain = read_settings(args.config, startup.split_overrides(rest))
        workdir = args.workdir or str(Path("runs") / Path(args.config).stem)
        steps = profile.parse(args.profile)

        if args.plan_for:
            planning.run(args, config, Path(args.config).stem)
            return
        if args.dry_run:
            print("\n".join(spelled))
            print(_summary(config, workdir) + (vain and f"; {vain}"))
            return
        cluster.join(args.coordinator, args.processes, args.process)
        from ogdm_jax.discriminator import train as discriminator
        from ogdm_jax.training import autoencoder, loop  # JAX may start only now

        if vain and not args.process:
            print(vain, flush=True)
        tasks = {"discriminator": discriminator.TASK, "autoencoder": autoencoder.TASK}
        loop.train(
            config,
            workdir,
            task=tasks.get(config.task),
            profile=steps,
            override=args.override,
            stopped_code=args.stopped_code,
        )


def read_settings(file: str, typed: Sequence[str]) -> tuple[list[str], configs.Config, str]:
    """A configuration file with "key=value" of a command line, checked.

    Returns:
      All settings as one types them, the settings, and a sentence about what has no effect, or "".

    Raises:
      ConfigError: any setting that cannot be, or that a person typed in vain.
    """
    values = configs.read(file)
    before = configs.flatten(values.to_dict())
    for text in typed:
        configs.override(values, text)
    config = configs.resolve(values.to_dict())
    discovery.check_settings(config)
    vain = configs.check_typed(config, before, typed, discovery.settings_types())
    return configs.spelled(values), config, vain


def _summary(config: configs.Config, workdir: str) -> str:
    """What a run would do: devices, images per step and device, steps."""
    plan = parallel.make_plan(config.parallel.plan, config.parallel.devices)
    each = parallel.check_batch(config.data.batch, config.optim.accumulate, len(plan.devices))
    kind = plan.devices[0].device_kind
    return (
        f"# {config.task} with {', '.join(config.methods) or 'no method'}, into {workdir}: plan "
        f"{plan.kind}, {len(plan.devices)} x {kind}, {config.data.batch} images a step "
        f"({each} a device and round, {config.optim.accumulate} rounds), "
        f"{config.steps(config.train.duration):,} steps"
    )
