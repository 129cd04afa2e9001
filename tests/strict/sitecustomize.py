"""Python imports this file as it starts, in the commands that tests run (conftest.py names the
folder in PYTHONPATH).

It makes the warnings that are errors inside pytest errors there, too: the filters of
pyproject.toml, read again.
"""

import gc
import tomllib
import warnings
from importlib import import_module
from pathlib import Path

_PROJECT = Path(__file__).parent.parent.parent / "pyproject.toml"


def filters() -> list[tuple[str, str, str, str]]:
    """(action, message, category, module) of every line of pytest's filterwarnings; the later ones
    come first.
    """
    lines = tomllib.loads(_PROJECT.read_text())["tool"]["pytest"]["ini_options"]["filterwarnings"]
    return [tuple((line.split(":") + [""] * 3)[:4]) for line in lines]


def install() -> None:
    """Each line becomes a filter of the warnings module, with the meaning that pytest gives it."""
    for action, message, category, module in filters():
        package, _, name = category.rpartition(".")
        warnings.filterwarnings(
            action,
            message,
            getattr(import_module(package or "builtins"), name or "Warning"),
            module,
        )


if __name__ == "sitecustomize":
    install()
    gc.set_threshold(100_000, 50, 100)  # as in conftest.py
