"""README.md and docs/: links resolve, the front page stays one, every page is found.

Commands and snippets: test_documented_commands.py.
"""

import re

import pytest

from tests.support import tiny
from tests.support.documents import FENCED, PAGES

pytestmark = pytest.mark.fast


def _anchors(page: str) -> set[str]:
    """What a code host makes of the headings."""
    titles = re.findall(r"^#+ (.+)$", FENCED.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_links_resolve(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", PAGES[name])):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = ((tiny.ROOT / name).parent / file if file else tiny.ROOT / name).resolve()
        assert path.exists(), target
        assert not anchor or anchor in _anchors(path.read_text()), target


def test_the_front_page_is_short_and_says_how_to_run_and_test():
    page = PAGES["README.md"]
    assert len(page.splitlines()) <= 120
    for title in ("Run it", "Test it"):
        _, rest = page.split(f"\n## {title}\n")
        (_, line), *more = FENCED.findall(rest.split("\n## ")[0])
        assert not more and len(line.splitlines()) == 1 and line.startswith("python3 -m venv")


def test_every_document_is_in_the_index():
    index = PAGES["docs/index.md"]
    documents = [name.removeprefix("docs/") for name in PAGES if name.startswith("docs/")]
    assert all(f"({name})" in index for name in documents if name != "index.md")


def test_every_document_is_in_the_navigation_of_the_site():
    """mkdocs itself, in .ci/run, looks after links, anchors, equations and the API's names."""
    navigation = (tiny.ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    named = set(re.findall(r"[\w/]+\.md", navigation))
    assert {name.removeprefix("docs/") for name in PAGES if name.startswith("docs/")} <= named


@pytest.mark.parametrize("name", PAGES)
def test_named_files_exist(name):
    for path in re.findall(r"\b((?:configs|benchmarks|recipes|tests)/[\w/.]+\.\w+)", PAGES[name]):
        if name != "CHANGELOG.md" and not path.startswith(("configs/NAME", "configs/mine")):
            assert (tiny.ROOT / path).exists(), path
