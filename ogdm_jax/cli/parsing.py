"""Parsers of command lines: help that begins with examples, errors of one sentence, numbers."""

import argparse
from collections.abc import Callable
from typing import NoReturn

from ogdm_jax.config import require, suggestion
from ogdm_jax.config.fields import shown

_LARGEST = 2**31 - 1


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one sentence and end with 1, as all of ours do."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with the sentence."""
        unknown = message.partition("unrecognized arguments: ")[2].partition(" ")[0]
        near = suggestion(unknown.partition("=")[0], self._option_string_actions) if unknown else ""
        text = " ".join(message.removeprefix("argument ").split())[:500]
        self.exit(1, f"error: {text}{near}; `{self.prog} --help` lists what there is\n")


def whole(least: int = 0, most: int = _LARGEST) -> Callable[[str], int]:
    """The type of an option that takes a whole number within limits."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            range_ = f"of at least {least}" if most == _LARGEST else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(
                f"{shown(text)} given; expected a whole number {range_}"
            )
        return value

    return read


def listed(text: str) -> list[str]:
    """The words of a list with commas; [] of ""."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(option: str, text: str) -> list[int]:
    """The numbers of a list of steps with commas. Raises ConfigError for other words."""
    found = listed(text)
    good = all(word.isdecimal() and len(word) < 10 for word in found)
    require(good, option, text, "numbers such as 3,5,9,18")
    return [int(word) for word in found]


def step(text: str) -> int | str:
    """The type of an option that names a checkpoint: its step, or best."""
    if text == "best" or text.isdecimal() and len(text) < 16:
        return text if text == "best" else int(text)
    raise argparse.ArgumentTypeError(f"{shown(text)} given; expected a number or best")


def parser_of(command: str, doc: str | None) -> Parser:
    """A parser whose help is a module's docstring, the lines that show commands first."""
    lines = (doc or "").splitlines()
    shown = [line.startswith(("    ", "ogdm ")) for line in lines]
    examples = [line.removeprefix("    ") for line, is_example in zip(lines, shown) if is_example]
    about = "\n".join(line for line, is_example in zip(lines, shown) if not is_example)
    return Parser(
        prog=f"ogdm {command}",
        usage="\n" + "\n".join(f"  {line}" for line in examples),
        description=about.replace("\n\n\n", "\n\n"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
