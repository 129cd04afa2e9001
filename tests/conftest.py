"""JAX made strict before anything uses it: 8 host devices, rank promotion raises, legacy keys are
errors.
"""

import contextlib
import ctypes
import gc
import os
import resource
from fnmatch import fnmatchcase
from pathlib import Path

from tests.support import compiling

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Both workers and all commands that the tests start share compiled programs; a second run of the
# suite compiles little. Single operations, too: reading one takes an eighth of compiling it.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Commands that the tests start turn warnings into errors as pytest does here.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent / "strict"), *filter(None, [os.environ.get("PYTHONPATH")])]
)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {compiling.FLAGS}".strip()

import jax
import jaxtyping
import pytest

_ROOT = Path(__file__).parent.parent

# Shapes in the types of functions are checked wherever the tests call them: beartype and jaxtyping
# wrap the modules that have such types as they are imported. (An int is a float, as in PEP 484.)
jaxtyping.install_import_hook(
    [
        ".".join(file.relative_to(_ROOT).with_suffix("").parts)
        for file in sorted((_ROOT / "ogdm_jax").rglob("*.py"))
        if "jaxtyping" in file.read_text()
    ],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_legacy_prng_key", "error")
jax.config.update("jax_default_matmul_precision", "highest")


# Tracing makes millions of small objects that live long; looking through them each time that 700
# more are there takes a fifth of its time.
gc.set_threshold(100_000, 50, 100)


@pytest.fixture
def without_shape_checks(monkeypatch):
    """For tests of the sentence that a user reads, who has no beartype between."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def _memory() -> int:
    """Bytes that this process holds; where no file tells (not Linux), the most that it ever held."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return pages * resource.getpagesize()


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Compiled programs pile up to gigabytes over the suite. Modules share those of single
    operations, so all are kept until the process holds two and a half gigabytes.
    """
    yield
    if _memory() > 2_500_000_000:
        jax.clear_caches()
        gc.collect()
        # What glibc keeps for later would count as held: caches were dropped after every module.
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config, items):
    """Marks the slow cases of tests; `-m fast` leaves out what is slow or default. Golden files last, the largest
    first: they are many and need nothing of each other, so both workers end together.
    """
    if config.option.markexpr == "fast":
        config.option.markexpr = "fast and not slow and not default"
    for item in items:
        cases = item.get_closest_marker("slow_cases")
        if cases is not None and any(fnmatchcase(item.callspec.id, case) for case in cases.args):
            item.add_marker(pytest.mark.slow)
    items.sort(key=_late)


def _late(item) -> tuple[bool, int]:
    golden = item.path.name == "test_golden.py"
    return golden, -item.callspec.params["path"].stat().st_size if golden else 0


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests stay on one worker, which trains and compiles what they share once."""
    from xdist.scheduler import LoadFileScheduling

    if config.option.dist != "load":  # somebody asked for another distribution
        return None

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if "test_golden.py" in nodeid else super()._split_scope(nodeid)

    config.option.loadscopereorder = False
    return ByFile(config, log)
