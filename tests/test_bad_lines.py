"""Every command line that makes no sense is answered by one sentence before anything is built, or
does no harm.
"""

import functools
import shlex
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from ogdm_jax import cli, models, parallel
from ogdm_jax.sampling import generate
from ogdm_jax.training import arrays, checkpoint
from tests.support import bad_lines, commands

INIT = models.Model.init


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the lines name."""
    made = bad_lines.place(tmp_path_factory.mktemp("lines"))
    with commands.inside(made):
        bad_lines.convert(made)
    return made


@functools.cache
def shapes(network, text, image_shape, label_dim):
    model = models.Model(network, None, image_shape, label_dim, text=text)
    return jax.eval_shape(functools.partial(INIT, model), jax.random.key(0))


READ: dict = {}


@pytest.fixture
def nothing_built(monkeypatch):
    """Whoever initialises, compiles or trains fails. The shapes of a network are found once, and the
    weights of a folder are read once.
    """
    load = checkpoint.load_weights

    def load_weights(snapshot, params, buffers, which="ema"):
        asked = arrays.tensors({"params": params, "buffers": buffers})
        key = (str(snapshot.path), which, tuple(asked.items()))
        if key not in READ:
            READ[key] = load(snapshot, params, buffers, which)
        return READ[key]

    monkeypatch.setattr(checkpoint, "load_weights", load_weights)

    def init(model, key):
        known = shapes(model.network, model.text, model.image_shape, model.label_dim)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), known)

    monkeypatch.setattr(models.Model, "init", init)

    def built(*_, **__):
        pytest.fail("something was built before the sentence")

    for owner, name in (
        (parallel.Plan, "compile"),
        (parallel.Plan, "init"),
        (generate, "sampler"),
    ):
        monkeypatch.setattr(owner, name, built)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """{path: (size, time)} of all files, but for what Python itself caches."""
    files = [f for f in sorted(folder.rglob("*")) if "__pycache__" not in f.parts]
    return {str(f): (f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()} | {
        str(f): (0, 0) for f in files if f.is_dir()
    }


def run(folder: Path, line: str, capsys) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a line, in this process."""
    capsys.readouterr()
    with commands.inside(folder):
        try:
            code = cli.main(shlex.split(line))
        except SystemExit as stop:
            code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_there_are_enough_lines_of_every_command():
    lines = [*bad_lines.all_lines(), *bad_lines.HARMLESS]
    assert len(lines) >= 250
    for command in (
        "train",
        "sample",
        "data",
        "new",
        "show",
        "convert",
        "export",
        "report",
        "plan",
        "study",
    ):
        assert sum(line.startswith(command) for line in lines) >= 7, command
    assert sum(line.startswith("evaluate protocol") for line in lines) >= 10


@pytest.mark.parametrize("line", bad_lines.all_lines())
def test_it_is_refused_in_one_sentence(line, folder, nothing_built, capsys):
    before, start = listing(folder), time.process_time()
    code, out, said = run(folder, line, capsys)
    took = time.process_time() - start
    assert code == 1, (code, out[-300:], said)
    assert said.startswith("error: ") and said.count("\n") == 1 and len(said) < 1500, said
    assert bad_lines.all_lines()[line] in said, said
    if line.startswith("train") and "unknown key" not in said and "no value" not in said:
        assert bad_lines.key(line) in said, said
    assert listing(folder) == before
    assert took < 5


@pytest.mark.parametrize("line", bad_lines.HARMLESS)
def test_it_does_no_harm(line, folder, nothing_built, capsys):
    before = listing(folder)
    code, _, said = run(folder, line, capsys)
    assert code == 0 and not said
    assert listing(folder) == before
