"""The Dockerfile: what it copies is there, what it installs exists. No image is built."""

import re
import shlex
import tomllib
from importlib import metadata

import pytest

from tests.support import tiny

pytestmark = pytest.mark.fast

TEXT = (tiny.ROOT / "Dockerfile").read_text()
LINES = [line.split(" ", 1) for line in TEXT.splitlines() if re.match("[A-Z]+ ", line)]


def test_what_it_copies_is_there_and_is_all_that_the_package_needs():
    copied = [word for name, words in LINES if name == "COPY" for word in words.split()[:-1]]
    assert all((tiny.ROOT / path).exists() for path in copied)
    # the package's configurations are a link to configs/, which goes along
    assert (tiny.ROOT / "ogdm_jax" / "configs").resolve() == tiny.ROOT / "configs"
    assert {"setup.py", "pyproject.toml", "ogdm_jax", "configs"} <= set(copied)
    assert tomllib.loads((tiny.ROOT / "pyproject.toml").read_text())["build-system"]["requires"]


def test_it_installs_extras_of_jax_and_starts_our_command():
    extras = metadata.metadata("jax").get_all("Provides-Extra")
    (default,) = [words.removeprefix("CUDA=") for name, words in LINES if name == "ARG"]
    named = set(re.findall(r"\bcuda\d\d\b", TEXT))
    assert default in named and named <= set(extras)
    assert f'"gpu": ["jax[{default}]"]' in (tiny.ROOT / "setup.py").read_text()
    (run,) = [shlex.split(words) for name, words in LINES if name == "RUN"]
    assert run == ["pip", "install", "--no-cache-dir", ".", "jax[${CUDA}]"]
    assert 'ogdm = ogdm_jax.cli:main"' in (tiny.ROOT / "setup.py").read_text()
    assert dict(LINES)["ENTRYPOINT"] == '["ogdm"]'
