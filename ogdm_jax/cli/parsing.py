"""Parsers of command lines whose help begins with examples."""

import argparse


def new_parser(command: str, about: str, examples: str) -> argparse.ArgumentParser:
    """A parser whose help begins with the examples, one a line: the words after the command."""
    lines = [f"ogdm {command} {words}" for words in examples.splitlines()]
    return _parser(command, about, lines)


def parser_of(command: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a module's docstring, the lines that show commands first."""
    lines = (doc or "").splitlines()
    shown = [line.startswith(("    ", "ogdm ")) for line in lines]
    examples = [line.removeprefix("    ") for line, is_example in zip(lines, shown) if is_example]
    about = "\n".join(line for line, is_example in zip(lines, shown) if not is_example)
    return _parser(command, about.replace("\n\n\n", "\n\n"), examples)


def _parser(command: str, about: str, lines: list[str]) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"ogdm {command}",
        usage="\n" + "\n".join(f"  {line}" for line in lines),
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
