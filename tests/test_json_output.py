"""What commands print or write as JSON is valid JSON, also where a number went wrong."""

import ast
import json
import shlex

import numpy as np
import pytest

from ogdm_jax import cli
from ogdm_jax.cli import measuring
from ogdm_jax.cli import plan as planning
from tests.support import commands, tiny

pytestmark = pytest.mark.fast

# Modules that call json.dumps themselves: what they write is read back by their own program, or
# cannot be infinite; everything that a person or another program reads goes through records.py.
OWN_JSON = {
    "cluster.py",
    "config/files.py",  # {"float": "inf"}
    "data/prepare.py",
    "discriminator/generated.py",
    "interop/export.py",
    "records.py",
    "training/checkpoint.py",
    "training/evaluate.py",
    "training/logs.py",  # "inf"
}


def strict(text: str):
    """The value of JSON that has no NaN and no Infinity, as other programs read it."""
    return json.loads(text, parse_constant=pytest.fail)


def test_json_has_one_door():
    package = tiny.ROOT / "ogdm_jax"
    found = set()
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("dump", "dumps"):
                if isinstance(node.value, ast.Name) and node.value.id == "json":
                    found.add(str(file.relative_to(package)))
    assert found <= OWN_JSON


@pytest.mark.parametrize("line", ["data describe SOURCE --json", "data check SOURCE --json"])
@pytest.mark.parametrize("source", ["digits", "npz:flat.npz", "npz:vectors.npz"])
def test_data_prints_valid_json(line, source, tmp_path, capsys):
    flat = np.zeros((8, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "flat.npz", image=flat, label=np.zeros(8, np.int64))
    vectors = np.linspace(0, 1, 24, dtype=np.float32).reshape(8, 3)
    np.savez(tmp_path / "vectors.npz", image=flat, label=vectors)
    with commands.inside(tmp_path):
        cli.main(shlex.split(line.replace("SOURCE", source)))
    assert isinstance(strict(capsys.readouterr().out), dict)


def test_a_number_that_went_wrong_is_printed_and_written(tmp_path, capsys):
    result = {"fd": float("nan"), "psnr": float("inf"), "sets": [np.float32("-inf"), np.int64(3)]}
    measuring.print_json(result, str(tmp_path / "x.json"))
    for text in (capsys.readouterr().out, (tmp_path / "x.json").read_text()):
        assert strict(text) == {"fd": "nan", "psnr": "inf", "sets": ["-inf", 3]}


def test_a_plan_is_valid_json_whatever_the_compiler_says(tmp_path, monkeypatch):
    figures = {"fits": True, "flops": float("nan"), "hbm_bytes": {"peak": 1, "available": 2}}
    monkeypatch.setattr(planning, "_plan", lambda *_: dict(figures))
    monkeypatch.setattr(planning.report, "text", lambda found: "")
    monkeypatch.setattr(planning.program, "source_like", lambda *_: None)
    with commands.inside(tmp_path):
        cli.main(["plan", "--plan-out", "x.json"])
    assert strict((tmp_path / "x.json").read_text())["flops"] == "nan"
