"""notebooks/: each .ipynb is what its .py says, with small outputs and no warnings; links resolve."""

import base64
import json
import re

import jupytext
import pytest

from tests.support import tiny

pytestmark = pytest.mark.fast

SOURCES = sorted((tiny.ROOT / "notebooks").glob("[0-9]*.py"))
LARGEST, LARGEST_PICTURE = 400_000, 60_000  # bytes


def text(cell) -> str:
    return "".join(cell["source"])


def outputs(notebook) -> list[dict]:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", ())]


@pytest.fixture(params=SOURCES, ids=lambda path: path.stem)
def pair(request):
    """(the cells of the .py, the .ipynb as JSON)."""
    made = json.loads(request.param.with_suffix(".ipynb").read_text())
    return jupytext.read(request.param).cells, made


@pytest.fixture
def made(pair):
    """The .ipynb as JSON."""
    return pair[1]


def test_there_are_six():
    assert [path.stem[0] for path in SOURCES] == list("123456")


def test_both_files_have_the_same_cells(pair):
    """After an edit: python notebooks/execute.py N"""
    cells, made = pair
    assert [(c.cell_type, c.source) for c in cells] == [
        (c["cell_type"], text(c)) for c in made["cells"]
    ]


def test_it_was_run_from_the_top_without_a_warning(made):
    counts = [c["execution_count"] for c in made["cells"] if c["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert not [
        o for o in outputs(made) if o["output_type"] == "error" or o.get("name") == "stderr"
    ]


def test_outputs_are_small_and_name_no_folder_of_a_machine(made):
    assert len(json.dumps(made)) < LARGEST
    pictures = [o["data"]["image/png"] for o in outputs(made) if "image/png" in o.get("data", {})]
    assert pictures and all(len(base64.b64decode(p)) < LARGEST_PICTURE for p in pictures)
    words = json.dumps(
        [{**o, "data": {**o.get("data", {}), "image/png": ""}} for o in outputs(made)]
    )
    assert not re.search(r"/tmp/|/home/|/root/| at 0x", words)


def test_text_stands_before_every_cell_but_those_that_show_one_thing_more(pair):
    """At most one cell in a row follows another without text between, and it has four lines."""
    cells, _ = pair
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    for before, cell in zip(cells, cells[1:]):
        alone = before.cell_type == cell.cell_type == "code"
        assert not alone or len(cell.source.splitlines()) <= 4, cell.source


def test_links_resolve(pair):
    cells, _ = pair
    links = [
        t
        for c in cells
        if c.cell_type == "markdown"
        for t in re.findall(r"\]\(([^)\s]+)\)", c.source)
    ]
    for target in links:
        assert "://" in target or (tiny.ROOT / "notebooks" / target.partition("#")[0]).exists(), (
            target
        )
