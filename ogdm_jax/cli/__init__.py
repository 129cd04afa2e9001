"""Command lines: words to settings, nothing else. One module for each command of `ogdm`."""

import importlib
import sys
from collections.abc import Sequence

from ogdm_jax import __version__
from ogdm_jax.config import suggestion

# command -> (module of this folder, its function, what it does). Only the module that is asked for
# is imported, so that `ogdm --help` is quick.
COMMANDS = {
    "train": ("train", "main", "train or resume a model"),
    "sample": ("sample", "main", "draw images from a trained model, restore measured ones"),
    "data": ("data", "main", "look at image sets, prepare them, encode them as latents"),
    "new": ("new", "main", "write a configuration for an image set of yours"),
    "show": ("show", "main", "say what a checkpoint of another program holds"),
    "convert": ("convert", "main", "make a training folder of it"),
    "export": ("export", "main", "write weights that other programs can read"),
    "ema": ("ema", "main", "make a model of an average of any length, after the training"),
    "evaluate": ("evaluate", "main", "measure samples, also as the papers do"),
    "study": ("study", "main", "compare configurations over seeds, with a paired test"),
    "report": ("report", "main", "a training folder as one page"),
    "plan": ("train", "plan", "say what a run will need, from the compiler"),
    "doctor": ("doctor", "main", "say what a bug report needs: versions, devices, settings, log"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the first word names; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--version"]:
        print(f"ogdm_jax {__version__}")
        return 0
    if not words or words[0] in ("-h", "--help"):
        print("usage: ogdm COMMAND ...; `ogdm COMMAND --help` says what it takes\n")
        print("\n".join(f"  {name:10} {text}" for name, (*_, text) in COMMANDS.items()))
        return 0
    if words[0] not in COMMANDS:
        known, near = ", ".join(COMMANDS), suggestion(words[0], COMMANDS)
        print(f"error: {words[0]!r} is no command{near}; expected one of {known}", file=sys.stderr)
        return 1
    module, function, _ = COMMANDS[words[0]]
    try:
        run = getattr(importlib.import_module(f"{__name__}.{module}"), function)
        return run(words[1:]) or 0
    except KeyboardInterrupt:  # while modules are read; commands answer it themselves
        print("stopped", file=sys.stderr)
        return 130
