"""One device = 2, 4, 8 devices, pmap = mesh = sharded parameters, accumulation = the big batch."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax import parallel
from tests.support import tiny

STEPS = 10
# One level compiles quickly; every draw of an example that plans could divide wrongly is on.
SMALL = (
    tiny.ONE_LEVEL,
    "network.dropout=0.1",
    "data.xflip=true",
    "data.conditional=true",
    "data.label_dropout=0.2",
    "optim.clip=1",
    "ema.stds=0.05,0.2",
)


@functools.cache
def one_device():
    return tiny.train(tiny.build(*SMALL), STEPS)


@pytest.mark.parametrize(
    "plan,devices,more",
    [
        # without accumulation also in test_two_processes.py, on two processes of two devices
        pytest.param("pmap", 2, (), marks=pytest.mark.slow),
        pytest.param("pmap", 8, (), marks=pytest.mark.slow),
        pytest.param("mesh", 4, (), marks=pytest.mark.slow),
        ("sharded", 2, ()),
        pytest.param("sharded", 8, (), marks=pytest.mark.slow),
        pytest.param("pmap", 4, ("optim.accumulate=2",), marks=pytest.mark.slow),
        pytest.param("mesh", 2, ("optim.accumulate=4",), marks=pytest.mark.slow),
    ],
)
def test_every_plan_trains_as_one_device(plan, devices, more):
    expected, expected_metrics = one_device()
    state, metrics = tiny.train(tiny.build(*SMALL, *more, plan=plan, devices=devices), STEPS)
    # Adam divides by sqrt(v): where a gradient is float noise, its sign is too, so single weights
    # may move by a part of learning_rate * steps; typical agreement is 1e-6, and a wrong mean over
    # devices would move all weights.
    for name in ("params", "ema", "averages", "carry"):
        for a, b in zip(
            jax.tree.leaves(getattr(state, name)),
            jax.tree.leaves(getattr(expected, name)),
            strict=True,
        ):
            difference = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))
            if np.issubdtype(np.asarray(a).dtype, np.floating):
                assert difference.max() < 1e-3 and difference.mean() < 2e-5, (
                    name,
                    difference.max(),
                )
    assert metrics.keys() == expected_metrics.keys()
    # Adam hides a wrong scale of the gradient; its norm does not.
    for name in ("loss", "loss/denoise", "loss/ogdm", "loss/ogdm_discriminator", "grad_norm"):
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=2e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["pmap", "mesh"])
def test_replicated_state_is_equal_on_every_device(plan):
    # one of the programs above, compiled already
    run = tiny.build(*SMALL, "optim.accumulate=2", plan=plan, devices=4)
    state = run.init()
    step = run.compile(state)
    from ogdm_jax import data

    batches = data.batches(run.source, run.config.data.batch, 0)
    for _ in range(2):
        state, _ = step(state, run.constants(), run.plan.place_batch(next(batches)), run.key)
    for leaf in jax.tree.leaves((state.params, state.ema, state.carry)):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(copies) == 4 and all(np.array_equal(c, copies[0]) for c in copies[1:])


def test_sharded_plan_divides_the_state():
    run = tiny.build(*SMALL, plan="sharded", devices=8)
    state = run.init()
    for tree in (state.params, state.ema, state.opt_state, state.carry):
        for leaf in jax.tree.leaves(tree):
            if leaf.size >= 1024 and any(
                n % 8 == 0 for n in leaf.shape
            ):  # smaller ones are not worth a message
                assert leaf.addressable_data(0).size == leaf.size // 8


@pytest.mark.fast
@pytest.mark.parametrize(
    "devices,shape,local",
    [
        (8, (3, 3, 16, 32), (3, 3, 16, 4)),  # the longest side that all divide
        (8, (3, 3, 12, 36), (3, 3, 6, 9)),  # none: along two
        (8, (30, 35), (15, 35)),  # as far as it goes
        (6, (9, 1000), (3, 500)),
        (8, (1016,), (1016,)),  # smaller ones are not worth a message
        (1, (32, 64), (32, 64)),
    ],
)
def test_an_array_is_divided_along_the_sides_that_can(devices, shape, local):
    plan = parallel.make_plan("sharded", devices)
    whole = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    placed = plan.place_state(whole)
    assert placed.addressable_data(0).shape == local
    assert plan.state_bytes(whole) == 4 * np.prod(local)
    np.testing.assert_array_equal(placed, whole)


def test_params_and_ema_do_not_share_buffers_and_donation_frees_the_old_state():
    run = tiny.build(*SMALL)
    state = run.init()
    pointers = lambda tree: {
        leaf.addressable_data(0).unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)
    }
    assert not pointers(state.params) & pointers(state.ema)


def test_no_network_weight_is_a_constant_of_the_compiled_step():
    """Parameters, carries and constants travel as arguments: the lowered program stays small."""
    run = tiny.build(*SMALL, plan="mesh")
    shapes = run.shapes()
    text = run.compile(shapes[0]).lower(*shapes).as_text()
    biggest = max(leaf.size for leaf in jax.tree.leaves(shapes[0].params))
    constants = [line for line in text.splitlines() if "stablehlo.constant dense<" in line]
    assert max((len(line) for line in constants), default=0) < 8 * biggest


@pytest.mark.slow
def test_steady_state_traces_nothing(caplog):
    run = tiny.build(*SMALL)
    state = run.init()
    step, constants = run.compile(state), run.constants()
    from ogdm_jax import data

    batches = data.batches(run.source, 32, 0)
    with (
        jax.log_compiles(),
        caplog.at_level("WARNING"),
    ):  # says so of every trace, also where a cache spares the rest
        state, _ = step(state, constants, run.plan.place_batch(next(batches)), run.key)
        assert any("tracing" in record.message for record in caplog.records)
        caplog.clear()
        for _ in range(3):
            state, _ = step(state, constants, run.plan.place_batch(next(batches)), run.key)
    assert not caplog.records


@pytest.mark.fast
@pytest.mark.parametrize(
    "text,field", [("data.batch=30", "data.batch"), ("optim.accumulate=3", "data.batch")]
)
def test_uneven_batches_are_refused(text, field):
    with pytest.raises(ValueError, match=f"config.{field}"):
        tiny.build(text, devices=8)


@pytest.mark.slow_cases("sharded", "pmap")
@pytest.mark.parametrize("plan", ["mesh", "sharded", "pmap"])
def test_devices_share_every_round_of_accumulation(plan):
    """Under mesh and sharded every device computed every round whole: k rounds cost k times. The
    compiler counts a loop once: of two rounds that is half of the work.
    """
    small = tiny.ONE_LEVEL, "methods=", "data.batch=16", "data.augment=0"
    counted = []
    for rounds in (1, 2):
        run = tiny.build(*small, f"optim.accumulate={rounds}", plan=plan, devices=8)
        arguments = run.shapes()
        compiled = run.compile(arguments[0]).lower(*arguments).compile()
        found = compiled.cost_analysis() or {}
        found = found[0] if isinstance(found, list) else found
        counted.append(found["flops"])
    assert counted[1] < 0.65 * counted[0]


@pytest.mark.fast
def test_gathering_a_divided_tree_is_compiled_once(caplog):
    """It was compiled anew for every picture, measurement and average."""
    plan = parallel.plan_of("sharded", jax.devices()[:8])
    tree = {"a": jnp.arange(4096.0).reshape(64, 64), "b": jnp.arange(8.0)}
    placed = plan.place_state(tree)
    jax.tree.map(np.testing.assert_array_equal, plan.local_copy(placed), tree)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        plan.local_copy(jax.tree.map(lambda leaf: leaf + 1, placed))
        caplog.clear()
        found = plan.local_copy(placed)
    assert not caplog.records and found["a"].sharding.device_set == {jax.devices()[0]}
