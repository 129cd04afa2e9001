"""Programs get the rules of the platform they are compiled for, and compute in the type that the
configuration says.
"""

import re
import types
from pathlib import Path
from typing import Any

import jax
import pytest

from ogdm_jax import config as configs
from ogdm_jax import models, parallel, platforms
from ogdm_jax.networks import cpu
from ogdm_jax.planning import flops, program
from ogdm_jax.sampling import generate
from tests.support import tiny

# The published layers at a fraction of the depth and width: what a layer is does not depend on
# either.
SMALL = (
    "network.num_blocks=1",
    "network.channel_mult=(1,2)",
    "network.model_channels=32",
    "network.head_channels=32",
)
SMALL += (
    "network.attn_resolutions=(16,4)",
    "data.batch=32",
    "stf.n=32",
    "ogdm.channel_base=256",
    "ogdm.channel_max=16",
)
# Between them these have every network and every method; the others only repeat them.
CHOSEN = ("digits", "digits_dg", "cifar10_all", "celeba64_ogdm", "imagenet64_edm")
CHOSEN += ("imagenet256_dit",)
EACH = [
    name if name in CHOSEN else pytest.param(name, marks=pytest.mark.slow)
    for name in tiny.CONFIGURATIONS
]


def load(name: str, *more: str):
    """A configuration; changes of settings that it does not have are left out."""
    path = tiny.ROOT / "configs" / f"{name}.py"
    known = configs.flatten(configs.read(path, ()).to_dict())
    if known.get("stf.per_image"):  # decides n
        del known["stf.n"]
    return configs.load(path, [text for text in more if text.partition("=")[0] in known])


def build(name: str, *more: str):
    config = load(name, *more)
    return program.build(config, program.source_like(config), parallel.make_plan("mesh", 1))


def lower(function, arguments, *platforms: str) -> str:
    """The program's text for platforms that this machine does not have, with the names of what made
    each operation.
    """
    return function.trace(*arguments).lower(lowering_platforms=platforms).as_text(debug_info=True)


@pytest.fixture
def pretend(monkeypatch):
    """Makes plans and samplers trace for another platform than that of this machine's devices."""
    really = platforms.traced_for

    def do(platform: str) -> None:
        monkeypatch.setattr(platforms, "traced_for", lambda _, function: really(platform, function))

    return do


@pytest.mark.slow_cases("celeba64_ogdm", "cifar10_all", "imagenet64_edm")
@pytest.mark.parametrize("name", EACH)
def test_steps_for_tpus_and_gpus_have_no_rules_of_the_cpu(name, pretend):
    pretend("tpu")
    run = build(name, *SMALL)
    arguments = run.shapes()
    assert cpu.CPU_RULE not in lower(run.compile(arguments[0]), arguments, "tpu", "cuda")


@pytest.mark.slow_cases("cifar10_all", "celeba64_ogdm", "imagenet64_edm")
@pytest.mark.parametrize(
    "name", [n for n in EACH if not str(n).endswith("_dg") and "_dg'" not in str(n)]
)
def test_samplers_for_tpus_and_gpus_have_no_rules_of_the_cpu(name, pretend):
    if name.endswith("_vae"):
        pytest.skip("an autoencoder draws nothing")
    pretend("gpu")
    run = build(name, *SMALL)
    images = generate.sampler(run.model, run.config.sample, jax.devices()[:1])
    params, buffers = jax.eval_shape(run.model.init, jax.random.key(0))
    seeds = jax.ShapeDtypeStruct((4,), "uint32")
    labels: Any = jax.ShapeDtypeStruct((4,), "int32") if run.model.label_dim else None
    if run.model.text is not None:
        labels = dict.fromkeys(("prompt", "none"), jax.ShapeDtypeStruct((4, 77), "int32"))
    assert cpu.CPU_RULE not in lower(
        images, (params, buffers, seeds, labels, {}, {}), "tpu", "cuda"
    )


def test_the_cpus_own_program_has_them():
    """The test above can fail: convolution and the rule for the sum of residual blocks carry the
    name.
    """
    run = build("digits", *SMALL)
    arguments = run.shapes()
    text = lower(run.compile(arguments[0]), arguments, "cpu")
    assert text.count(cpu.CPU_RULE) > 100


@pytest.mark.fast
def test_the_devices_of_the_plan_decide_not_the_host():
    chip = types.SimpleNamespace(platform="tpu", process_index=0)
    assert jax.default_backend() == "cpu" and parallel.plan_of("mesh", [chip]).platform == "tpu"
    inner = jax.jit(cpu.choose(lambda x: x * 2, lambda x: x * 1))
    outer = {
        p: jax.jit(platforms.traced_for(p, lambda x: inner(x) + 0)) for p in ("cpu", "tpu", "gpu")
    }
    assert [int(outer[p](1)) for p in ("cpu", "tpu", "gpu", "cpu")] == [
        1,
        2,
        2,
        1,
    ]  # the inner jit is traced anew
    assert int(inner(1)) == 1 and platforms.current() == "cpu"


@pytest.mark.slow_cases("digits", "cifar10_all", "imagenet64_edm")
@pytest.mark.parametrize("name", EACH)
def test_bfloat16_reaches_every_network(name):
    """Under 1 % of the operations of convolutions and matrix products of a step are in float32."""
    depth = (
        () if name.startswith("digits") else ("network.num_blocks=1", "network.channel_mult=(1,2)")
    )
    changes = ("network.dtype=bfloat16", *depth)
    if name.startswith(
        "digits"
    ):  # embeddings stay float32, and would be much of a network of 16 channels
        changes += ("network.model_channels=64", "ogdm.channel_base=4096", "ogdm.channel_max=128")
    run = build(name, *changes)
    arguments = run.shapes()
    counts = flops.matmul_flops(flops.trace(run.compile(arguments[0]), *arguments))
    assert counts["bfloat16"] > 0 and flops.share(counts, "float32") < 0.01, counts


@pytest.mark.fast
def test_no_file_but_three_knows_of_rules_for_the_cpu():
    """They choose through one function; the networks call layers.py, the step calls optim.py."""
    package = Path(program.__file__).parent.parent
    knowing = [p for p in package.rglob("*.py") if re.search(r"\bcpu\.[a-zA-Z]", p.read_text())]
    assert sorted(p.name for p in knowing) == ["convolution.py", "layers.py", "optim.py"]
    used = re.findall(r"\bcpu\.\w+", "".join(p.read_text() for p in knowing))
    rules = (
        "choose",
        "compute_once",
        "convolve",
        "convolve_doubled",
        "depthwise",
        "total",
    )
    assert set(used) == {f"cpu.{name}" for name in rules}


@pytest.mark.fast
def test_no_file_but_the_platforms_asks_for_the_backend():
    package = Path(program.__file__).parent.parent
    asking = [p.name for p in package.rglob("*.py") if "default_backend()" in p.read_text()]
    assert sorted(asking) == ["platforms.py", "report.py"]  # the report names the devices here


def test_the_first_weights_are_traced_once(monkeypatch):
    """A run asks for their shapes, several times, and then makes them."""
    drawn, really = [], models.Model.init
    monkeypatch.setattr(models.Model, "init", lambda *args: drawn.append(1) or really(*args))
    run = tiny.build("methods=", tiny.ONE_LEVEL)
    for _ in range(2):
        jax.eval_shape(run.create, run.key)
    run.init()
    assert len(drawn) == 1
