"""python -m ogdm_jax COMMAND: the same as the console command ogdm."""

import sys

COMMANDS = ("data", "interop", "evaluate", "report")


def main() -> int | None:
    """Runs the command that the first word names."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    command = sys.argv.pop(1)
    if command == "data":
        from ogdm_jax.cli.data import main as run
    elif command == "interop":
        from ogdm_jax.cli.interop import main as run
    elif command == "report":
        from ogdm_jax.cli.report import main as run
    else:
        from ogdm_jax.cli.evaluate import main as run
    return run()


if __name__ == "__main__":
    sys.exit(main())
