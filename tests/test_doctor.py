"""`ogdm doctor`, and the files of a public host that ask for it."""

import json
import re

import pytest
import yaml

from ogdm_jax import __version__, cli
from ogdm_jax import config as configs
from ogdm_jax.cli import doctor
from tests.support import tiny

pytestmark = pytest.mark.fast

HOST = tiny.ROOT / ".github"


def test_it_says_versions_devices_and_no_secret(monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "hush")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for part in (
        f"ogdm_jax: {__version__}",
        "jax ",
        "orbax-checkpoint ",
        "cpu",
        "OMP_NUM_THREADS=2",
    ):
        assert part in text
    assert "hush" not in text and "workdir" not in text
    assert not [name for name in doctor.VARIABLES if re.search("KEY|TOKEN|SECRET|PASS", name)]


def test_it_says_what_a_folder_holds_even_a_damaged_one(tmp_path, capsys):
    (tmp_path / "config.json").write_text(configs.to_json(tiny.config("seed=3")))
    lines = [json.dumps({"step": n, "loss": 1.0 / n}) for n in (*range(1, 6), 123_456, 7, 8)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 9, "lo']))
    cli.main(["doctor", "--workdir", str(tmp_path)])
    text = capsys.readouterr().out
    assert "  seed=3\n" in text and "data.batch=32" in text and "stf.n" not in text
    assert "  step 123456  loss" in text  # whole, whatever its size
    assert (
        "  step 8  loss 0.125" in text and "step 3 " not in text and "1 of 9 lines are cut" in text
    )
    (tmp_path / "config.json").write_text("{")
    cli.main(["doctor", "--workdir", str(tmp_path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["workdir"]["notes"] and "settings" not in found["workdir"]
    assert found["workdir"]["log"][-1] == {"step": 8, "loss": 0.125}


def test_a_missing_folder_has_a_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor", "--workdir", str(tmp_path / "no")])
    assert end.value.code == 1 and "--workdir" in capsys.readouterr().err


def test_a_device_that_does_not_start_is_said(monkeypatch):
    def fails():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(doctor.jax, "devices", fails)
    assert "Unable to initialize backend" in doctor.machine()["devices"][0]


def test_the_workflow_runs_the_script_on_two_pythons():
    job = yaml.safe_load((HOST / "workflows" / "ci.yml").read_text())["jobs"]["run"]
    assert job["steps"][-1] == {"run": ".ci/run"} and (tiny.ROOT / ".ci" / "run").is_file()
    assert len(job["strategy"]["matrix"]["python"]) == 2


@pytest.mark.parametrize("name", ["bug", "question"])
def test_issue_templates_ask_for_the_doctor(name):
    form = yaml.safe_load((HOST / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert form["name"] and form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids) and "doctor" in ids
    known = {"label", "description", "render", "options", "placeholder", "value"}
    for field in form["body"]:
        assert field["type"] in ("textarea", "checkboxes") and set(field["attributes"]) <= known
        assert field["attributes"]["label"]


def test_one_version_everywhere():
    citation = yaml.safe_load((tiny.ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == __version__
    assert f"version = {{{__version__}}}" in (tiny.ROOT / "README.md").read_text()
    released = re.findall(r"^## ([\d.]+)", (tiny.ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == __version__
