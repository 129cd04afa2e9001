"""Trains a diffusion model: python train.py [--config configs/NAME.py] [--workdir DIR]
[--config.KEY=VALUE ...]

Run the same command again to resume. Ctrl-C and SIGTERM save and exit 0.
"""

import argparse
from pathlib import Path

from ogdm_jax import cluster, startup
from ogdm_jax import config as configs
from ogdm_jax.cli import plan as planning
from ogdm_jax.training import profile


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        default=str(Path(__file__).parent / "configs" / "digits.py"),
        help="a Python file with get_config()",
    )
    parser.add_argument(
        "--workdir", default="", help="where all of it goes, gs://... too (default: runs/NAME)"
    )
    parser.add_argument(
        "--profile", default="", metavar="FIRST,LAST", help="trace these steps into WORKDIR/profile"
    )
    parser.add_argument(
        "--stopped-code",
        type=int,
        default=0,
        metavar="CODE",
        help="exit code after a signal (default: 0)",
    )
    several = parser.add_argument_group(
        "several processes", "all three, only where JAX cannot find the cluster itself"
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    several.add_argument("--processes", metavar="N", type=int, help="their number")
    several.add_argument("--process", metavar="I", type=int, help="which one this is, 0 to N - 1")
    planning.add_arguments(parser)
    return parser.parse_known_args()


def main() -> None:
    args, rest = parse()
    try:
        run(args, rest)
    except cluster.Stopped:
        raise SystemExit(args.stopped_code) from None


def run(args: argparse.Namespace, rest: list[str]) -> None:
    with cluster.ending_together(), startup.one_sentence():
        startup.prepare()
        planning.check(args)
        config = configs.load(args.config, startup.split_overrides(rest))
        workdir = args.workdir or str(Path("runs") / Path(args.config).stem)
        steps = profile.parse(args.profile)

        if args.plan_for:
            planning.run(args, config, Path(args.config).stem)
            return
        cluster.join(args.coordinator, args.processes, args.process)
        from ogdm_jax.discriminator import training as discriminator
        from ogdm_jax.training import loop  # JAX may start only now

        (discriminator if "dg" in config else loop).train(config, workdir, profile=steps)


if __name__ == "__main__":
    main()
