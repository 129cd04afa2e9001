"""Image sets that somebody broke, at random or on purpose: read or refused, quickly, in little
memory, and never anything else. Arrays of hostile inputs for each reader are in test_data_check.py
(pictures), test_layouts.py (zip), test_arrays.py (npz) and test_labels.py (labels, dataset.json).
"""

import sys

import pytest

from tests.support import mutants

COUNTS = {"folder": 1200, "zip": 600, "npz": 300, "compressed": 300, "json": 300, "records": 300}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read as Linux gives it")


@pytest.mark.slow
@pytest.mark.parametrize("kind", COUNTS)
def test_fuzz_open_source(kind):
    """3,000 mutants: none crashes, lasts 5 seconds or takes 300 MB."""
    assert sum(COUNTS.values()) == 3000
    done = mutants.apart(kind, COUNTS[kind], seed=0)
    print(kind, done)
    assert not done["failed"], done["failed"][:5]
    assert done["read"] + done["refused"] == COUNTS[kind] and done["refused"] > COUNTS[kind] // 10
    assert done["seconds"] < 5 and done["megabytes"] < 300


@pytest.mark.parametrize("kind", ["folder", "zip", "npz", "json"])
def test_some_mutants(kind):
    """The same on a few, wherever the tests run."""
    done = mutants.run(kind, 40, seed=1)
    assert not done["failed"], done["failed"][:5]
