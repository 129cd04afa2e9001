"""README.md and docs/: links resolve, the front page stays one, and commands name what exists."""

import re
import shlex

import pytest

from ogdm_jax.cli import COMMANDS, sample
from ogdm_jax.configs import base, digits_dg, digits_vae
from tests.support import tiny

pytestmark = pytest.mark.fast

PAGES = {
    str(path.relative_to(tiny.ROOT)): path.read_text()
    for path in [*tiny.ROOT.glob("*.md"), *tiny.ROOT.glob("docs/**/*.md")]
}
FENCED = re.compile(r"^```(\w*).*?\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _anchors(page: str) -> set[str]:
    """What a code host makes of the headings."""
    titles = re.findall(r"^#+ (.+)$", FENCED.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _commands() -> list[tuple[str, list[str]]]:
    """Every line of a shell block of the front page and the documents, as (page, words)."""
    found = []
    for name, page in PAGES.items():
        for language, block in FENCED.findall(page):
            lines = block.replace("\\\n", " ").splitlines() if language == "sh" else []
            found += [(name, shlex.split(line, comments=True)) for line in lines]
    return [(name, words) for name, words in found if words]


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


def test_commands_name_settings_and_options_that_exist():
    options = {word for action in sample.parser()._actions for word in action.option_strings}
    settings = [base.get_config(), digits_dg.get_config(), digits_vae.get_config()]
    for name, words in _commands():
        if words[0] == "ogdm":
            assert words[1] in COMMANDS, (name, words)
        for setting in re.findall(r"--config\.([\w.]+)=", " ".join(words)):
            group, *field = setting.split(".")
            known = [c[group] for c in settings if group in c]
            assert known and (not field or any(field[0] in group for group in known)), setting
        if words[:2] in (["ogdm", "sample"], ["python", "sample.py"]):
            used = {word.split("=")[0] for word in words if word.startswith("--")}
            assert used <= options, (name, used - options)
