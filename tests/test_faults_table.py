"""docs/faults.md names tests that exist."""

import ast
import re

import pytest

from tests.support.tiny import ROOT

pytestmark = pytest.mark.fast


def test_the_table_of_faults_names_tests_that_exist():
    text = (ROOT / "docs" / "faults.md").read_text()
    assert not re.findall(r"\S*(?<!\.py)::test_\w*", text)  # of no file
    files = re.findall(r"(?<![\w:/])test_\w+", text)
    assert not [name for name in files if not (ROOT / "tests" / f"{name}.py").is_file()]
    named = set(re.findall(r"(test_\w+\.py)(?:::(\w+))?", text))
    assert len(named) > 200
    defined = {}
    for file in {file for file, _ in named}:
        nodes = ast.walk(ast.parse((ROOT / "tests" / file).read_text()))
        defined[file] = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    missing = [f"{file}::{name}" for file, name in named if name and name not in defined[file]]
    assert not missing
