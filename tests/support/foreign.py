"""Packages of somebody else with one method, for sampling or for training, as pip would have
installed them.
"""

import importlib
import re
from pathlib import Path

import pytest

from ogdm_jax.methods import discovery
from tests.support import tiny

# The examples that CONTRIBUTING.md shows, so that they keep working: for sampling, for training.
_PAGE = (tiny.ROOT / "CONTRIBUTING.md").read_text()
METHOD, TRAINING = re.findall(r"```python\n(.*?)```", _PAGE, re.DOTALL)


def install(
    folder: Path, patch: pytest.MonkeyPatch, name: str = "brighter", method: str = METHOD
) -> None:
    """Until the patch is undone; the caller clears discovery.modules then."""
    (folder / f"{name}.py").write_text(method)
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{discovery.GROUP}]\n{name} = {name}\n")
    patch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    discovery.modules.cache_clear()
