"""Settings are declared once: default, help, limits; every wrong value is one sentence."""

import dataclasses
import json
import shlex

import pytest

from ogdm_jax import config as configs
from ogdm_jax import models, parallel, startup
from ogdm_jax.cli import train
from ogdm_jax.config import ConfigError, check, parse, setting
from ogdm_jax.methods import discovery, ogdm
from ogdm_jax.training import resume

pytestmark = pytest.mark.fast


@dataclasses.dataclass(frozen=True)
class Settings:
    rate: float = setting(0.2, "guidance rate", least=0, most=1)
    every: int = setting(1, "steps between two", least=1)
    scale: float = setting(1.0, "scale", above=0)
    kind: str = setting("a", "kind", choices=("a", "b"))
    betas: tuple[float, float] = setting(
        (0.9, 0.999), "of Adam", least=0, below=1, expected="two numbers in [0, 1)"
    )
    peak: float | None = setting(None, "open", above=0)
    flag: bool = setting(False, "switch")

    def __post_init__(self) -> None:
        check(self, "dsg")


@pytest.mark.parametrize(
    "given,sentence",
    [
        ({"rate": 2.0}, "config.dsg.rate: 2.0 given; expected a number from 0 to 1"),
        ({"every": 0}, "config.dsg.every: 0 given; expected a whole number of at least 1"),
        ({"scale": 0.0}, "config.dsg.scale: 0.0 given; expected a positive number"),
        ({"scale": float("nan")}, "config.dsg.scale: nan given; expected a number"),
        ({"kind": "c"}, "config.dsg.kind: unknown 'c'; expected one of a, b"),
        ({"betas": (0.9, 1.0)}, "config.dsg.betas: (0.9, 1.0) given; expected two numbers in"),
        ({"betas": ("x", 0.1)}, "config.dsg.betas: ('x', 0.1) has entries of another type"),
        ({"every": 1.5}, "config.dsg.every: 1.5 is of another type; expected int such as 1"),
        ({"every": True}, "config.dsg.every: True is of another type"),
        ({"flag": 1}, "config.dsg.flag: 1 is of another type; expected bool such as False"),
        ({"peak": -1.0}, "config.dsg.peak: -1.0 given; expected a positive number"),
        ({"rate": None}, "config.dsg.rate: None given; expected a number from 0 to 1"),
    ],
)
def test_a_wrong_value_is_one_sentence(given, sentence):
    with pytest.raises(ConfigError) as error:
        Settings(**given)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_right_values_become_the_field_s_type():
    settings = Settings(rate=1, betas=[0.5, 0.9], peak=2)
    assert settings.rate == 1.0 and isinstance(settings.rate, float)
    assert settings.betas == (0.5, 0.9) and isinstance(settings.peak, float)
    assert Settings().peak is None


def test_text_is_read_as_the_type_of_the_default():
    assert parse("dsg.every", "3", 1) == 3 and parse("dsg.flag", "true", False) is True
    with pytest.raises(ConfigError, match="^--dsg.every: 'x' is of another type; expected int"):
        parse("dsg.every", "x", 1, prefix="--")


@pytest.mark.parametrize("name", ["cifar10_all", "digits_dg"])
def test_a_dry_run_prints_what_one_can_type(name, capsys):
    words = ["--config", f"configs/{name}.py", "--dry-run", "--config.parallel.devices=1"]
    train.main([*words, "--config.data.batch=64", "--config.sample.steps=7"])
    *typed, plan = capsys.readouterr().out.splitlines()
    assert "--config.sample.steps=7" in typed and "64 images a step" in plan
    again = startup.split_overrides([shlex.split(line)[0] for line in typed])
    base = configs.read(name)
    for text in again:
        configs.override(base, text)
    once = configs.load(name, ["parallel.devices=1", "data.batch=64", "sample.steps=7"])
    assert configs.resolve(base.to_dict()) == once
    assert ("noise.std" in configs.flatten(base.to_dict())) == (name == "cifar10_all")


def test_a_file_of_another_project_is_an_overlay_like_ours(tmp_path):
    file = tmp_path / "mine.py"
    start = "from ogdm_jax.configs import base\n\ndef get_config():\n    c = base.get_config()\n"
    file.write_text(start + "    c.sp.weight = 2.0\n    return c\n")
    assert configs.load(file).others["sp"]["weight"] == 2.0
    for wrong, words in (
        ("c.data.bach = 2", "bach.*batch"),
        ("c.optm.eps = 1.0", "optm.*optim"),
        ("c.data.batch = 'many'", "batch"),
        ("c.data.augment = 2.0", "config.data.augment: 2.0 given; expected a probability"),
    ):
        file.write_text(start + f"    {wrong}\n    return c\n")
        with pytest.raises(ConfigError, match=words) as error:
            configs.load(file)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="unknown method 'stff'.*did you mean stf"):
        discovery.check_settings(configs.load("digits", ["methods=stff"]))
    with pytest.raises(ConfigError, match="is no file; did you mean cifar10_edm"):
        configs.load("cifar10_emd")


def test_old_names_of_settings(tmp_path):
    saved = json.loads(configs.to_json(configs.load("celeba64_ogdm")))
    saved["noise"]["law"] = saved["noise"].pop("distribution")
    saved["ogdm"]["law"] = saved["ogdm"].pop("distribution")
    del saved["task"], saved["data"]["workers"]
    old = configs.from_json(json.dumps(saved))
    assert old.noise.distribution == "ddpm" and old.data.workers == -1
    assert old.settings("ogdm", ogdm.Settings).distribution == "adm"
    assert resume.differences(old, configs.load("celeba64_ogdm"), discovery.settings_types()) == (
        {},
        {},
    )
    with pytest.raises(ConfigError, match="unknown key 'law'; it is now distribution"):
        configs.load("digits", ["noise.law=ve"])


def test_choices_are_what_the_package_has():
    choices = lambda group, name: group.__dataclass_fields__[name].metadata["choices"]
    assert set(choices(configs.Network, "kind")) == set(models._NETWORKS)
    assert choices(configs.Parallel, "plan") == parallel.PLANS
