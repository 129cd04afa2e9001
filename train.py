"""Trains a diffusion model: python train.py [--config configs/NAME.py] [--workdir DIR] [--config.KEY=VALUE ...]

Run the same command again to resume. Ctrl-C and SIGTERM save and exit 0.
"""

import argparse
from pathlib import Path

from ogdm_jax import config as configs
from ogdm_jax import startup
from ogdm_jax.planning import command as planning


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", default=str(Path(__file__).parent / "configs" / "digits.py"), help="a Python file with get_config()"
    )
    parser.add_argument("--workdir", default="", help="checkpoints, logs and samples go here (default: runs/NAME)")
    parser.add_argument(
        "--coordinator", default="", help="HOST:PORT of process 0; only where JAX cannot find the pod itself"
    )
    parser.add_argument("--processes", type=int, default=0)
    parser.add_argument("--process", type=int, default=-1)
    planning.add_arguments(parser)
    return parser.parse_known_args()


def main() -> None:
    args, rest = parse()
    with startup.one_sentence():
        startup.prepare()
        planning.check(args)
        config = configs.load(args.config, startup.split_overrides(rest))
        workdir = Path(args.workdir or Path("runs") / Path(args.config).stem)

        if args.plan_for:
            planning.run(args, config, Path(args.config).stem)
            return
        from ogdm_jax import parallel  # JAX may only start after startup.prepare() and initialise()
        from ogdm_jax.training import discriminator, loop

        parallel.initialise(args.coordinator, args.processes, args.process)
        (discriminator if "dg" in config else loop).train(config, workdir)


if __name__ == "__main__":
    main()
