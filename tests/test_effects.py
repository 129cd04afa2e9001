"""Settings that act only with others: declared, refused where a command line types them in vain."""

import dataclasses

import jax
import numpy as np
import pytest

from ogdm_jax import config as configs
from ogdm_jax import data, parallel
from ogdm_jax.config import effects, whole
from ogdm_jax.methods import discovery
from ogdm_jax.training import opening
from ogdm_jax.training import run as runs
from tests.support import tiny

pytestmark = pytest.mark.fast
KINDS = discovery.settings_types()


def test_what_is_declared_exists():
    groups = {**whole.GROUPS, **KINDS}
    for group, kind in groups.items():
        for field in dataclasses.fields(kind):
            for condition in field.metadata.get("only", ()):
                key, _, wanted = effects._full(group, condition).partition("=")
                owner, _, name = key.partition(".")
                named = groups[owner].__dataclass_fields__[name]
                choices = named.metadata["choices"]
                assert choices is None or not wanted or set(wanted.split("|")) <= set(choices)


@pytest.mark.parametrize("name", [name for name in tiny.CONFIGURATIONS if "_dg" not in name])
def test_nothing_of_a_shipped_file_is_in_vain_but_for_methods_that_are_off(name):
    config, base = (configs.flatten(configs.load(n)) for n in (name, "base"))
    loaded = configs.load(name)
    without = effects.idle(loaded, KINDS)
    own = {f"{group}." for group in KINDS}
    changed = [
        key for key in without if config[key] != base[key] and not key.startswith(tuple(own))
    ]
    assert not changed


def typed(*texts: str, base: str = "digits") -> str:
    before = configs.flatten(configs.load(base))
    return configs.check_typed(configs.load(base, texts), before, texts, KINDS)


@pytest.mark.parametrize(
    "texts,words",
    [
        (("network.num_heads=4",), "network.num_heads: 4 .* only with config.network.kind=openai"),
        (("sample.grid=vp", "sample.rho=3"), "sample.rho: 3.0 .* config.sample.grid=edm"),
        (("noise.distribution=ve", "noise.mean=0"), "config.noise.distribution=edm"),
        (
            ("precondition.diffusion_steps=100",),
            "kind=adm or v or config.noise.distribution=ddpm or v",
        ),
        (("ogdm.r1=0", "ogdm.r1_interval=16"), "config.ogdm.r1 set"),
        (("methods=stf", "stf.source=full", "stf.n=64"), "stf.source=stream or cache"),
        (("evaluate.features=", "evaluate.num=5"), "config.evaluate.features set"),
        (("init.weights=params",), "config.init.workdir set"),
    ],
)
def test_a_setting_in_vain_is_refused_with_what_it_needs(texts, words):
    with pytest.raises(configs.ConfigError, match=words):
        typed(*texts)


def test_settings_that_act_or_say_what_holds_anyway_pass():
    assert not typed("network.kind=openai", "data.augment=0", "network.num_heads=4")
    assert not typed("network.num_heads=1", "precondition.schedule=linear")  # as they are
    assert not typed("noise.distribution=ddpm", "precondition.diffusion_steps=100")
    assert not typed("ogdm.k=0.1", "stf.n=1024")
    assert typed("stf.n=64", "sp.weight=2.0") == (
        "without effect, as config.methods has no stf, sp: stf.n, sp.weight"
    )


@pytest.mark.parametrize(
    "texts,words",
    [
        (("data.label_dropout=0.1",), "data.label_dropout: 0.1 .* there are no labels to hide"),
        (("ogdm.k=7",), "ogdm.k: 7.0 given; expected at most 1"),
        (
            ("methods=stf,sp", "sp.auto=false", "sp.mse_weight=0", "init.workdir=somewhere"),
            "stf makes a target .* sp has switched off .config.sp.mse_weight is 0",
        ),
        (("network.model_channels=6",), "network.model_channels: 6 .* 2 groups|4 groups"),
        (
            ("network.kind=openai", "network.model_channels=32", "network.num_heads=3"),
            "64 channels do not divide into heads .num_heads 3",
        ),
        (("network.kind=dhariwal", "network.model_channels=200"), "do not divide into"),
    ],
)
def test_settings_that_contradict_are_refused_where_a_run_is_built(texts, words):
    zeros = lambda shapes: jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    source, plan = data.open_source("digits"), parallel.make_plan("mesh", 1)
    with pytest.raises(configs.ConfigError, match=words):
        runs.build(tiny.config(*texts), source, plan, zeros)


@pytest.mark.parametrize("workers,noted", [(4, True), (0, False), (-1, False)])
def test_workers_for_a_set_in_memory_are_noted_at_the_start(workers, noted, tmp_path):
    run = tiny.build("methods=", *tiny.SMALLEST, f"data.workers={workers}")
    said = opening.lines(run, jax.eval_shape(run.create, run.key), tmp_path, "begins")
    assert ("note      data.workers: 4 has no effect, the set is held in memory" in said) == noted


def test_a_file_with_settings_in_vain_is_harmless(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from ogdm_jax.configs import digits\n\ndef get_config():\n    c = digits.get_config()\n"
        "    c.network.num_heads = 4\n    c.stf.n = 64\n    return c\n"
    )
    config = configs.load(file)
    discovery.check_settings(config)
    assert not configs.check_typed(config, configs.flatten(config), ["seed=1"], KINDS)
