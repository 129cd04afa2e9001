"""Our own code may warn of nothing: pytest's filters, and those of the commands that tests
start.
"""

import re
import subprocess
import sys

import pytest

from tests.strict.sitecustomize import filters

OURS = (
    "ogdm_jax",
    "ogdm_jax.training.step",
    "train",
    "sample",
    "configs.digits",
    "tests.tiny",
    "test_cli",
    "__main__",
)

pytestmark = pytest.mark.fast


def test_only_modules_of_others_are_ignored_and_by_name():
    (first, *rest) = filters()
    assert first == ("error", "", "", "")
    for action, _, _, module in rest:
        assert action == "ignore" and module, "an ignore without the name of a module hides ours"
        assert not any(re.match(module, name) for name in OURS), module


@pytest.mark.parametrize(
    "category", ["DeprecationWarning", "PendingDeprecationWarning", "UserWarning"]
)
def test_a_command_that_warns_fails(category):
    code = f"import warnings; warnings.warn('this is old', {category})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and f"{category}: this is old" in done.stderr


def test_a_file_left_open_is_an_error(tmp_path):
    (tmp_path / "x").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", "open('x')"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (
        "ResourceWarning: unclosed file" in done.stderr
    )  # said, although Python cannot raise where a file is dropped
