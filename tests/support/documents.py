"""README.md and docs/: the pages, their fences, and the commands in them."""

import re
import shlex

from tests.support import tiny

PAGES = {
    str(path.relative_to(tiny.ROOT)): path.read_text()
    for path in [*tiny.ROOT.glob("*.md"), *tiny.ROOT.glob("docs/**/*.md")]
}
FENCED = re.compile(r"^```(\w*).*?\n(.*?)^```", re.MULTILINE | re.DOTALL)
_MARKED = re.compile(r"^```(\w*) *(.*?)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:python (?:train|sample)\.py|ogdm \w+) [^`]*--[^`]*)`")


def fences(language: str) -> list[tuple[str, str, str]]:
    """(page, what stands behind the language, the text) of every fence of a language."""
    return [
        (name, mark, text)
        for name, page in PAGES.items()
        for found, mark, text in _MARKED.findall(page)
        if found == language
    ]


def words(line: str) -> list[str]:
    """A line of a shell block as words, without its comment."""
    return shlex.split(line, comments=True)


def commands() -> list[tuple[str, str, str]]:
    """(page, mark, line) of every command of a shell block; those joined by && one by one."""
    return [
        (name, mark, part.strip())
        for name, mark, text in fences("sh")
        for line in text.replace("\\\n", " ").splitlines()
        if words(line)
        for part in line.split(" && ")
    ]


def papers() -> list[tuple[str, str, str]]:
    """The same of the commands inside docs/papers.md's tables."""
    return [("docs/papers.md", "", line) for line in _INLINE.findall(PAGES["docs/papers.md"])]
