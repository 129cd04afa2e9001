"""Plans: operations counted against formulas, messages read from text, sizes without data, refusals
in one sentence.
"""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from ogdm_jax import config as configs
from ogdm_jax import data, parallel
from ogdm_jax.cli import plan as command
from ogdm_jax.config import ConfigError
from ogdm_jax.planning import chips, collectives, flops, program, report
from tests.support import tiny


def convolve(x, kernel, stride):
    pads = ((1, 1), (1, 1))
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.fast
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_convolution_and_its_two_gradients_cost_the_same(stride, dtype):
    x, kernel = jnp.ones((2, 8, 8, 4), dtype), jnp.ones((3, 3, 4, 6), dtype)
    once = 2 * 2 * (8 // stride) ** 2 * 6 * 9 * 4
    value = lambda x, k: jnp.sum(jnp.square(convolve(x, k, stride)))
    assert flops.matmul_flops(jax.make_jaxpr(value)(x, kernel)) == {dtype: once}
    assert flops.matmul_flops(jax.make_jaxpr(jax.grad(value, (0, 1)))(x, kernel)) == {
        dtype: 3 * once
    }


@pytest.mark.fast
def test_loops_branches_and_dead_results():
    x = jnp.ones((4, 4))
    once = 2 * 4**3

    def f(x):
        looped, _ = lax.scan(lambda c, _: (c @ c, None), x, None, length=5)
        unused = x @ x @ x
        half = x.astype(jnp.bfloat16)
        either = lax.cond(looped[0, 0] > 0, lambda y: y @ y @ y, lambda y: y @ y, x)
        del unused
        return either, half @ half, jax.jit(jax.checkpoint(lambda y: (y @ y, y @ y)))(x)[0]

    assert flops.matmul_flops(flops.trace(jax.jit(f), x)) == {
        "float32": (5 + 2 + 1) * once,
        "bfloat16": once,
    }
    assert flops.share({"float32": 1.0, "bfloat16": 3.0}, "bfloat16") == 0.75


@pytest.mark.fast
def test_a_product_that_rounds_its_operands_counts_as_what_it_computes():
    x = jnp.ones((1, 8, 2, 4), jnp.bfloat16)
    f = jax.grad(lambda x: jax.nn.dot_product_attention(x, x, x).sum().astype(jnp.float32))
    assert set(flops.matmul_flops(flops.trace(jax.jit(f), x))) == {"bfloat16"}


@pytest.mark.fast
def test_a_mapped_program_counts_all_devices():
    mesh = jax.sharding.Mesh(jax.devices()[:4], ("d",))
    spec = jax.sharding.PartitionSpec("d")
    f = jax.jit(jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=spec, out_specs=spec))
    assert flops.matmul_flops(flops.trace(f, jnp.ones((8, 16)))) == {"float32": 4 * 2 * 2 * 2 * 16}


@pytest.mark.fast
def test_messages_of_every_spelling_are_read():
    hlo = """
  %all-reduce.1 = (f32[3,3,4]{2,1,0:T(8,128)}, bf16[8]{0}, pred[]{:T(512)}) all-reduce(%a, %b, %c), to_apply=%add
  %ars = f32[10]{0} all-reduce-start(%x), channel_id=1
  %ard = f32[10]{0} all-reduce-done(%ars)
  %ags = (f32[4]{0}, f32[32]{0}) all-gather-start(%x), dimensions={0}
  %agd = f32[32]{0} all-gather-done(%ags)
  %agt = ((f32[4]{0}, bf16[2]{0}), (f32[32]{0}, bf16[16]{0})) all-gather-start(%x, %y), dimensions={0}
  %rs = f32[4]{0} reduce-scatter(%x), dimensions={0}
  %cps = (s32[6]{0}, s32[6]{0}, u32[], u32[]) collective-permute-start(%x)
  %f = f32[9]{0} fusion(%all-reduce.1), kind=kLoop
"""
    assert collectives.collectives(hlo) == {
        "all-reduce": {"count": 2, "bytes": 144 + 16 + 1 + 40},
        "all-gather": {"count": 2, "bytes": 128 + 128 + 32},
        "reduce-scatter": {"count": 1, "bytes": 16},
        "collective-permute": {"count": 1, "bytes": 24},
    }
    ring = {"all-reduce": {"count": 1, "bytes": 800}, "reduce-scatter": {"count": 1, "bytes": 100}}
    assert collectives.seconds(ring, 8, 100.0) == pytest.approx((2 * 7 / 8 * 800 + 7 * 100) / 100)


@pytest.mark.fast
def test_messages_in_a_loop_count_as_often_as_it_runs():
    mesh, spec = jax.sharding.Mesh(jax.devices()[:4], ("d",)), jax.sharding.PartitionSpec("d")
    summed = lambda x: lax.psum(x, "d")
    inner = lambda x, _: (summed(x) / 4, None)
    outer = lambda x, _: (summed(lax.scan(inner, x, None, length=3)[0]) / 4, None)
    f = lambda x: summed(lax.scan(outer, x, None, length=5)[0])
    mapped = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    sharded = jax.jit(mapped)
    text = sharded.lower(jnp.ones((8, 4))).compile().as_text()
    count = 5 * 3 + 5 + 1
    assert collectives.collectives(text) == {"all-reduce": {"count": count, "bytes": count * 32}}


@pytest.mark.slow_cases("mesh", "sharded")
@pytest.mark.parametrize("plan", ["mesh", "sharded", "pmap"])
def test_the_plan_of_eight_devices(plan):
    """Under sharded a device holds about an eighth of the state; mesh and pmap send the gradient
    once.
    """
    config = tiny.config(
        "methods=()", "network.model_channels=32", tiny.ONE_LEVEL, f"parallel.plan={plan}"
    )
    source = program.source_like(config)
    eight = program.build(config, source, parallel.plan_of(plan, jax.devices()[:8]))
    compiled = program.compile_step(eight)
    run = program.build(config, source, parallel.plan_of("mesh", jax.devices()[:1]))
    arguments = run.shapes()
    alone = sum(flops.matmul_flops(flops.trace(run.compile(arguments[0]), *arguments)).values())
    assert compiled.peak > compiled.arguments > 0
    assert sum(compiled.operations.values()) == pytest.approx(alone, rel=0.01)
    state = 16 * compiled.parameters  # parameters, average, two moments, in float32
    share = state / 8 if plan == "sharded" else state
    held = program.argument_bytes(eight.plan, eight.shapes())
    assert held == pytest.approx(compiled.arguments, rel=0.02)
    assert share < compiled.arguments < 1.2 * share + 50_000
    if plan != "sharded":
        gradient = 4 * compiled.parameters
        assert 0.99 * gradient < compiled.sent["all-reduce"]["bytes"] < 1.02 * gradient + 10_000
    figures = report.figures(config, compiled, "v5e", 8, 16 * 2**30, "digits")
    assert figures["tflop_per_device"] == pytest.approx(alone / 8e12, rel=0.01)
    assert figures["seconds_lower_bound"] == max(figures["seconds_bounds"].values()) > 0
    assert figures["images_per_second"] == pytest.approx(32 / figures["seconds_lower_bound"])
    json.loads(json.dumps(figures, allow_nan=False))
    assert f"{compiled.parameters:,} parameters" in report.text(figures)


@pytest.mark.fast
def test_sizes_come_from_the_table_or_the_command_line():
    named = lambda name, **more: program.source_like(
        configs.load(tiny.ROOT / "configs" / f"{name}.py", ()), **more
    )
    real = data.open_source("digits")
    assert (named("digits").shape, named("digits").num_classes, len(named("digits"))) == (
        real.shape,
        10,
        len(real),
    )
    assert named("cifar10_edm").shape == (32, 32, 3) and len(named("cifar10_edm")) == 50_000
    big = named("imagenet64_edm")
    assert (big.shape, big.num_classes, big.in_memory, len(big)) == (
        (64, 64, 3),
        1000,
        False,
        1_281_167,
    )
    for name in tiny.CONFIGURATIONS:  # a part of a file (npz:F?a=1) has its sizes
        assert all(named(name).shape)
    other = named("imagenet64_edm", image_shape="32, 32,1", classes=0, images=100)
    assert (other.shape, other.num_classes, len(other)) == ((32, 32, 1), 0, 100)
    config = configs.load(tiny.ROOT / "configs" / "digits.py", ["data.source=folder:nowhere"])
    with pytest.raises(ConfigError, match="--image-shape H,W,C"):
        program.source_like(config)
    with pytest.raises(ConfigError, match="--image-shape: '32x32' given"):
        program.source_like(config, "32x32")


@pytest.mark.fast
def test_a_device_is_known_by_the_name_that_jax_gives_it():
    """TPU kinds are those that libtpu reports for v5e:2x2, v5p:2x2x1 and v6e:2x2."""
    known = {
        "TPU v5 lite": "v5e",
        "TPU v5": "v5p",
        "TPU v6 lite": "v6e",
        "NVIDIA H100 80GB HBM3": "H100",
        "cpu": "",
    }
    assert {kind: chips.chip_of(kind) for kind in known} == known


@pytest.mark.fast
@pytest.mark.parametrize("words", ["v5e", "v9:2x2", "v5e:", "v5e:2y2", "v5e:0x4", "cpu"])
def test_unknown_chips_are_refused(words):
    with pytest.raises(ConfigError, match="--plan-for"):
        chips.topology(words)


@pytest.mark.fast
def test_what_the_compiler_refuses_is_read_in_both_of_its_sentences():
    """Both are libtpu's own: the first of 0.0.50, the second of 0.0.52, without the arguments."""
    used = "Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity"
    beside = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (39.09G) exceeds available HBM (15.75G). HLO module: jit_step."
    )
    assert program.needed(used, 2**30) == int(20.5 * 2**30)
    assert program.needed(beside, 2**30) == 2**30 + int(39.09 * 2**30)
    assert program.needed("INTERNAL: something else", 2**30) is None


@pytest.mark.fast
@pytest.mark.parametrize("words", [["--table"], ["--messages"], ["--price", "1.2"]])
def test_the_documents_tables_are_those_of_the_kept_plans(words):
    """And no shipped configuration is left out of docs/plans.md."""
    script = str(tiny.ROOT / "benchmarks" / "plans.py")
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    document = (tiny.ROOT / "docs" / "plans.md").read_text()
    assert done.stdout and done.stdout in document
    told = [name for name in tiny.CONFIGURATIONS if f"| {name} |" in document]
    others = [name for name in tiny.CONFIGURATIONS if f"`{name}`" in document]
    assert set(told) | set(others) == set(tiny.CONFIGURATIONS)


@pytest.mark.fast
@pytest.mark.parametrize(
    "batch, devices, rounds, expected",
    [(896, 8, 1, [2, 4, 7, 14, 28, 56, 112]), (896, 8, 16, [28, 56, 112]), (64, 8, 8, [])],
)
def test_rounds_that_are_tried_divide_the_images_of_a_device(batch, devices, rounds, expected):
    """Of 896 images on eight chips 32 rounds, twice 16, do not; 28 do, and were not tried."""
    config = tiny.config(f"data.batch={batch}", f"optim.accumulate={rounds}")
    found = list(command._candidates(config, devices))
    assert [changes["optim.accumulate"] for changes, _ in found[: len(expected)]] == expected
    assert found[len(expected)][0] == {"network.remat": True}


@pytest.mark.slow
def test_too_little_memory_names_a_setting_that_fits(monkeypatch):
    """The advice is compiled, too: what it says is what fits."""
    config = tiny.config("methods=()", "data.batch=64", tiny.ONE_LEVEL)
    source = program.source_like(config)
    found = program.compile_step(
        program.build(config, source, parallel.plan_of("mesh", jax.devices()[:1]))
    )
    small = chips.Chip(1e12, found.arguments + 0.7 * found.temporaries, 1e9, 1e9, "made up")
    monkeypatch.setitem(chips.CHIPS, "cpu8", small)
    monkeypatch.setattr(chips, "memory", lambda *_: int(small.hbm))
    monkeypatch.setattr(chips, "here", lambda: ("cpu8", tuple(jax.devices()[:1])))
    args = command.argparse.Namespace(
        plan_for="here", plan_out="", image_shape="", classes=-1, images=0
    )
    plan = command.run(args, config, "digits")
    assert not plan["fits"] and plan["advice"].startswith("--config.optim.accumulate=")
    again = command.run(
        args,
        tiny.config("methods=()", "data.batch=64", tiny.ONE_LEVEL, plan["advice"].split()[0][9:]),
        "digits",
    )
    assert again["fits"]


@pytest.mark.slow
def test_the_command_prints_and_writes_a_plan_and_leaves_no_folder(tmp_path):
    out = tmp_path / "plan.json"
    words = [
        sys.executable,
        str(tiny.ROOT / "train.py"),
        "--plan-for",
        "--plan-out",
        str(out),
        *tiny.flags("methods=()", tiny.ONE_LEVEL),
    ]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    plan = json.loads(out.read_text())
    assert (
        plan["parameters"] > 0 and plan["chip"] == "cpu" and plan["fits"] and plan["days"] is None
    )
    assert f"{plan['parameters']:,} parameters" in done.stdout and [
        p.name for p in tmp_path.iterdir()
    ] == ["plan.json"]
    lost = subprocess.run(
        [*words[:2], "--plan-out", "x.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (
        lost.returncode == 1
        and lost.stderr == "error: --plan-out: needs --plan-for, such as --plan-for v5e:4x4\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("shape,chips_", [("v5e:2x4", 8), ("v5e:16x16", 256)])
def test_digits_on_tpus(shape, chips_, tmp_path):
    """The whole command, compiled by libtpu; skipped where it is not installed."""
    pytest.importorskip("libtpu", reason="libtpu (extra tpu) is not installed")
    out = tmp_path / "plan.json"
    words = [
        sys.executable,
        str(tiny.ROOT / "train.py"),
        "--plan-for",
        shape,
        "--plan-out",
        str(out),
    ]
    words += ["--config.data.batch=256", "--config.network.dtype=bfloat16"]
    for _ in range(2):  # the second finds what the first may have left in the compilation cache
        done = subprocess.run(words, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr
    plan = json.loads(out.read_text())
    assert plan["devices"] == chips_ and plan["fits"] and plan["hbm_bytes"]["peak"] < 2**30
    # Gradients of bfloat16 kernels are summed in bfloat16 (docs/plans.md), the others in float32.
    summed = plan["collectives"]["all-reduce"]["bytes"] / plan["parameters"]
    assert 2 <= summed < 4 and plan["bfloat16_share"] > 0.9
