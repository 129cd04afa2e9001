"""The contract of training methods: every file alone and in pairs, traced and trained; two owners of
one slot are named; a method of another package.
"""

import dataclasses
import functools
import itertools
import json
import operator
import re

import jax
import numpy as np
import pytest

from ogdm_jax import data, models, parallel
from ogdm_jax.cli import train
from ogdm_jax.config import replace
from ogdm_jax.methods import contract as slots
from ogdm_jax.methods import discovery, sp
from ogdm_jax.sampling import generate
from ogdm_jax.training import logs
from ogdm_jax.training import run as runs
from ogdm_jax.training.checkpoint import Checkpoints, describe, find
from tests.support import foreign, tiny

TRAINING = list(discovery.training())
PAIRS = list(itertools.combinations(TRAINING, 2))
RUNS = {"learning_rate", "ema_beta"}  # metrics of every run
# of a U-Net: test_all_methods_together_are_the_same_on_every_plan, test_plans.py
SMALL = (*tiny.SMALLEST, "data.batch=8", "stf.n=32")


def test_every_method_file_says_what_it_is():
    """A paper, and settings of which each has a help text and a default that passes its check."""
    for name, module in discovery.modules().items():
        assert re.search(r"\b\d{4}(\.\d{4,5})?\b", module.__doc__), name
    for name, module in discovery.training().items():
        assert dataclasses.is_dataclass(module.Settings()), name
        for field in dataclasses.fields(module.Settings):
            assert field.metadata["help"], (name, field.name)
        for preset in getattr(module, "PRESETS", {}).values():
            module.Settings(**preset)


@pytest.mark.slow_cases(*map("+".join, PAIRS))  # all three together hold them
@pytest.mark.parametrize(
    "on", [(), *((n,) for n in TRAINING), *PAIRS, tuple(TRAINING)], ids="+".join
)
def test_a_step_keeps_the_state_and_reports_numbers(on):
    """Traced, not compiled: every combination gives back the state that it was given, with one
    finite number per metric, and what a method says of itself is true.
    """
    zeros = lambda shapes: jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    source, plan = data.open_source("digits"), parallel.make_plan("mesh", 2)
    run = runs.build(tiny.config(*SMALL, f"methods={on!r}"), source, plan, zeros)
    state, constants, batch, key = run.shapes()
    after, metrics = jax.eval_shape(run.step, state, constants, batch, key)
    described = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert described(after) == described(state)
    assert all(value.shape == () for value in metrics.values())
    assert [m.name for m in run.methods.all] == list(on)
    assert set(state.carry) == {m.name for m in run.methods.all if m.carry is not None}
    own = functools.reduce(operator.or_, constants.values())
    assert set(own) == {m.name for m in run.methods.all if m.constants is not None}
    for method in run.methods.all:
        named = {method.name, "loss"}
        alone = set(metrics) - {"loss", "loss/denoise", "grad_norm", "grad_nonfinite"}
        alone = {n for n in alone if not n.startswith(logs.LEVELS)}
        assert on != (method.name,) or all(set(re.split("[/_]", n)) & named for n in alone - RUNS)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return begun(tmp_path_factory.mktemp("pretrained"), *tiny.SMALLEST)


def begun(folder, *network):
    """A training folder for methods that start from one: two steps with other weights, saved as
    train.py saves them.
    """
    run = tiny.build("methods=()", *network)
    state = tiny.fresh(run)
    with Checkpoints(folder) as checkpoints:
        about = describe(run.config, run.source.shape, run.source.num_classes)
        checkpoints.save(
            0, state.replace(ema=jax.tree.map(lambda p: p + 0.01, state.ema)), about, {"step": 0}
        )
        checkpoints.save(1, state, about, {"step": 1})
    return folder


def proceed(run, compiled, constants, state, steps, first=0):
    """(state, metrics of each step) after some more steps, from the loader's position `first`."""
    batches = data.batches(
        run.source, run.config.data.batch, run.config.seed, first, 0, 1, run.methods.references
    )
    metrics = []
    for _ in range(steps):
        state, values = compiled(state, constants, run.plan.place_batch(next(batches)), run.key)
        metrics.append({k: float(np.asarray(v)) for k, v in values.items()})
    return state, metrics


def trained(*flags, plan="pmap", devices=1):
    """(run, state, metrics of each step) of 3 steps from scratch, once for the same arguments."""
    return _trained(flags, plan, devices)


@functools.cache
def _trained(flags, plan, devices):
    run = tiny.build(*SMALL, *flags, plan=plan, devices=devices)
    state = run.init()
    state, metrics = proceed(run, run.compile(state), run.constants(), state, 3)
    return run, run.plan.local_copy(state), metrics


# Every combination once, and each plan, source of references and kind of noise with some of them: a
# program takes seconds to compile, longest under pmap on several devices (test_plans.py,
# test_resume.py). All three methods together: test_all_methods_on_a_mesh_resume_bit_for_bit.
CASES = {
    (): ("pmap", 1),
    ("ogdm",): ("pmap", 1),
    ("sp",): ("mesh", 2),
    ("stf",): ("mesh", 2, "stf.source=stream"),
    ("ogdm", "sp"): ("mesh", 2, "noise.stratified=true"),
    ("ogdm", "stf"): ("mesh", 2, "stf.source=gather"),
    ("sp", "stf"): ("pmap", 1),
}


def _combinations():
    """Those of one method that no test below needs are slow: the pairs hold them."""
    for on in [(), *[(n,) for n in TRAINING], *PAIRS]:
        marks = [pytest.mark.slow] if on in (("sp",), ("stf",)) else []
        yield pytest.param(on, id="+".join(on) or "none", marks=marks)


@pytest.mark.slow_cases("ogdm+sp", "ogdm+stf", "ogdm", "sp+stf")
@pytest.mark.parametrize("on", list(_combinations()))
def test_methods_train_in_every_combination(on, pretrained):
    plan, devices, *flags = CASES.get(on, ("mesh", 2))
    teacher = [f"init.workdir={pretrained}"] if "sp" in on else []
    run, state, metrics = trained(f"methods={on!r}", *flags, *teacher, plan=plan, devices=devices)
    assert np.isfinite(
        [v for k, v in metrics[-1].items() if k.startswith(("loss", "grad"))]
    ).all(), metrics
    assert metrics[-1]["grad_nonfinite"] == 0


def test_all_methods_on_a_mesh_resume_bit_for_bit(pretrained, tmp_path):
    """3 steps = 1 step, saved and restored, and 2 more; the teacher stays what it was (spec/sp.md
    9.5, 9.11).
    """
    flags = (f"methods={tuple(TRAINING)!r}", f"init.workdir={pretrained}", "stf.source=stream")
    flags += ("ogdm.warmup=1 steps", "ogdm.adaptive=0.01")
    run = tiny.build(*SMALL, *flags, plan="mesh", devices=2)
    state = run.init()
    compiled, constants = run.compile(state), run.constants()
    state, _ = proceed(run, compiled, constants, state, 1)
    with Checkpoints(tmp_path) as saved:
        saved.save(
            1, state, describe(run.config, run.source.shape, run.source.num_classes), {"step": 1}
        )
    straight, metrics = proceed(run, compiled, constants, state, 2, first=1)
    assert np.isfinite(
        [v for k, v in metrics[-1].items() if k.startswith(("loss", "grad"))]
    ).all(), metrics
    assert set(straight.carry) == {"ogdm", "sp"}
    assert straight.carry["ogdm"]["lead"] != 0

    with Checkpoints(tmp_path) as saved:
        restored, position = saved.restore(1, jax.eval_shape(run.create, run.key), run.plan)
    run.methods.check(restored.carry, constants)
    resumed, _ = proceed(run, compiled, constants, restored, 2, first=position["step"])
    tiny.assert_trees(resumed, straight)
    teacher = jax.tree.map(np.asarray, constants["weights"]["sp"])
    now = models.fingerprint({name: teacher[name] for name in ("params", "buffers")})
    np.testing.assert_array_equal(now, resumed.carry["sp"]["teacher"])


def test_a_teacher_is_divided_as_the_state_is(pretrained):
    """By the plan sharded; losses and gradients are those of a mesh, where every device has it."""
    found = {}
    for plan in ("mesh", "sharded"):
        flags = "methods=('sp',)", *SMALL, f"sp.teacher={pretrained}"
        run = tiny.build(*flags, plan=plan, devices=2)
        state, constants = run.init(), run.constants()
        large = [leaf for leaf in jax.tree.leaves(constants["weights"]) if leaf.size >= 1024]
        parts = 2 if plan == "sharded" else 1
        assert large and all(a.addressable_data(0).size == a.size // parts for a in large)
        _, metrics = proceed(run, run.compile(state), constants, state, 2)
        found[plan] = metrics[1]
    for name in ("loss", "loss/sp", "grad_norm"):
        np.testing.assert_allclose(found["sharded"][name], found["mesh"][name], rtol=1e-4)


def test_a_run_whose_teacher_trained_on_names_its_step(pretrained):
    first, newest = (
        tiny.build("methods=('sp',)", *SMALL, f"sp.teacher={pretrained}", *more)
        for more in (["sp.teacher_step=0"], [])
    )
    began, now = (run.methods.init(run.key) for run in (first, newest))
    assert began["sp"]["teacher_step"] == 0 and now["sp"]["teacher_step"] == 1
    constants = newest.methods.constants()
    with pytest.raises(ValueError, match="other weights at step 1 .* config.sp.teacher_step=0"):
        newest.methods.check(began, constants)
    newest.methods.check(now, constants)


def test_the_teacher_is_the_model_that_the_run_began_with(pretrained, tmp_path):
    """Also when it goes on, whatever init.step says then; a run of before has the newest."""
    config = tiny.config("methods=('sp',)", *SMALL, f"init.workdir={pretrained}", "init.step=0")
    source, plan = data.open_source("digits"), parallel.make_plan("pmap", 1)
    build = lambda step, began: runs.build(
        replace(config, {"init.step": step}), source, plan, began=began
    )
    step = lambda run: int(run.methods.constants()["weights"]["sp"]["step"])
    fresh = build(0, None)
    assert step(fresh) == 0 and step(build(-1, None)) == 1
    assert fresh.weights_read == {"config.sp.teacher": 0}
    about = describe(config, source.shape, 10, None, fresh.weights_read)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, tiny.fresh(fresh), about, {"step": 2})
    began = find(tmp_path).weights_read
    assert step(build(2, began)) == 0 and step(build(-1, began)) == 0
    assert step(build(0, find(pretrained).weights_read)) == 1


@pytest.mark.slow
def test_sp_overfits_eight_images(tmp_path):
    """spec/sp.md 9.12: phase 1, then features alone: their loss goes down, nothing overflows, the
    colour is logged.
    """
    digits = data.open_source("digits")
    np.savez(tmp_path / "eight.npz", image=digits.images[:8])
    source = data.open_source(f"npz:{tmp_path}/eight.npz")
    plain = (tiny.ONE_LEVEL, "data.batch=8", "data.source=digits", "optim.learning_rate=2e-3")

    def phase(steps, *flags):
        run = runs.build(tiny.config(*plain, *flags), source, parallel.make_plan("mesh", 1))
        state = run.init()
        return run, *proceed(run, run.compile(state), run.constants(), state, steps)

    run, state, _ = phase(100, "methods=()")
    with Checkpoints(tmp_path / "base") as saved:
        saved.save(
            100, state, describe(run.config, source.shape, source.num_classes), {"step": 100}
        )
    paper = [f"sp.{key}={value}" for key, value in sp.PRESETS["paper"].items()]
    _, state, metrics = phase(150, "methods=('sp',)", f"init.workdir={tmp_path}/base", *paper)
    loss = np.asarray([m["loss/sp"] for m in metrics])
    assert loss[-50:].mean() < 0.8 * loss[:50].mean()
    for key in ("loss", "loss/sp", "grad_norm", "sp/colour"):
        assert np.isfinite([m[key] for m in metrics]).all(), key
    images = generate.sampler(run.model, run.config.sample, jax.devices()[:1])
    drawn = np.concatenate(
        [*generate.generate(images, state.ema, state.buffers, np.arange(4), None, 4)]
    )
    assert np.isfinite(drawn).all() and np.abs(drawn).max() < 5


# three programs of all methods; tests/test_stf_training.py divides the set in little
@pytest.mark.slow
def test_all_methods_together_are_the_same_on_every_plan(tmp_path):
    """STF's whole set is divided over the devices here, 1,797 images on 2: filled up, and gathered
    by nobody.
    """
    flags = (
        f"methods={tuple(TRAINING)!r}",
        tiny.ONE_LEVEL,
        "data.batch=8",
        f"init.workdir={begun(tmp_path, tiny.ONE_LEVEL)}",
        "stf.source=full",
    )
    losses = [
        tiny.train(tiny.build(*flags, plan=plan, devices=devices), 2)[1]
        for plan, devices in (("pmap", 1), ("pmap", 2), ("mesh", 2), ("sharded", 2))
    ]
    for name in losses[0]:
        if name.startswith("loss"):
            np.testing.assert_allclose(
                [m[name] for m in losses[1:]], losses[0][name], rtol=2e-4, err_msg=name
            )


def test_draws_of_one_method_do_not_change_when_another_is_switched_on():
    """The denoising loss of the first step depends on noise levels and noise alone: it must be the
    same number.
    """
    plain, ogdm = (trained(f"methods={on!r}")[2][0]["loss/denoise"] for on in ((), ("ogdm",)))
    np.testing.assert_allclose(ogdm, plain, rtol=1e-6)


@pytest.mark.slow_cases("ogdm")
@pytest.mark.parametrize(
    "on,flags",
    [(("ogdm",), ["ogdm.gamma=0.0"]), (("stf", "sp"), ["sp.weight=0.0", "stf.n=1"])],
    ids=["ogdm", "sp+stf"],
)
def test_weight_zero_is_plain_training_bit_for_bit(on, flags, pretrained):
    """OGDM's gamma, SP's weight (spec/sp.md 9.10); and STF with the source alone as reference
    (spec/stf.md 10.1). So noise levels and noise are the same draws, whatever else is drawn.
    """
    _, plain, metrics = trained("methods=()")
    teacher = [f"sp.teacher={pretrained}"] if "sp" in on else []
    _, zero, others = trained(f"methods={on!r}", *flags, *teacher)
    np.testing.assert_allclose(others[0]["loss/denoise"], metrics[0]["loss/denoise"], rtol=1e-6)
    tiny.assert_trees(zero.params, plain.params)
    tiny.assert_trees(zero.ema, plain.ema)


@pytest.mark.fast
@pytest.mark.parametrize("slot", ["target", "distance"])
def test_two_owners_of_one_slot_are_named(slot):
    fill = lambda *a: None
    both = [slots.Slots(name, **{slot: fill}) for name in ("first", "second")]
    with pytest.raises(ValueError, match=f"first and second both fill the {slot} slot"):
        slots.combine(both)


def test_unknown_methods_list_the_known_ones():
    with pytest.raises(ValueError, match="unknown method 'gan'; expected some of .*ogdm"):
        discovery.training_method("gan")


@pytest.fixture
def quiet(tmp_path):
    """A package of somebody else with the training method `quiet`, for one test."""
    with pytest.MonkeyPatch.context() as patch:
        foreign.install(tmp_path, patch, "quiet", foreign.TRAINING)
        yield
    discovery.modules.cache_clear()


def test_a_method_of_another_package_is_trained_by_the_command(quiet, tmp_path):
    flags = tiny.flags(
        *tiny.SMALLEST, "data.batch=8", "train.duration=2 steps", "log.every=1 steps"
    )
    more = ["--config.methods=quiet,stf", "--config.quiet.weight=0.5"]
    train.main(["--workdir", str(tmp_path / "w"), *flags, *more])
    logged = [json.loads(t) for t in (tmp_path / "w/metrics.jsonl").read_text().splitlines()]
    assert [line["quiet/steps"] for line in logged] == [1, 2]
    for line in logged:
        np.testing.assert_allclose(
            line["loss"], line["loss/denoise"] + line["loss/quiet"], rtol=1e-5
        )


@pytest.mark.fast
def test_settings_of_another_package_are_settings_like_any_other(quiet, capsys):
    train.main(["--dry-run", *tiny.flags("methods=quiet"), "--config.quiet.weight=0.5"])
    assert "--config.quiet.weight=0.5" in capsys.readouterr().out
    for flag, message in (
        ("quiet.wieght=1", "unknown key 'wieght'; did you mean weight"),
        ("quiet.weight=-1", "config.quiet.weight: -1.0 given; expected a number of at least 0"),
        ("methods=quite", "unknown method 'quite'; did you mean quiet"),
    ):
        with pytest.raises(SystemExit):
            train.main(["--dry-run", f"--config.{flag}"])
        assert message in capsys.readouterr().err


@dataclasses.dataclass(frozen=True)
class Own:
    """Settings of a method that a notebook registers."""

    weight: float = 2.0


def test_a_registered_method_is_known_like_any_other(monkeypatch):
    monkeypatch.setattr(discovery, "_REGISTERED", {})
    fills = lambda settings, context: slots.Slots("own", penalty=lambda *at: (settings.weight, {}))
    try:
        discovery.register("own", Own, training=fills)
        run = tiny.build("methods=ogdm,own", "own.weight=0.5")
        assert [m.name for m in run.methods.all] == ["ogdm", "own"]
        assert run.methods.all[1].penalty()[0] == 0.5 and "own" not in discovery.sampling()
        discovery.register("own", Own, build=lambda settings, session: None)  # the cell once more
        assert "own" in discovery.sampling() and "own" not in discovery.training()
        with pytest.raises(
            ValueError, match="name: 'ogdm' is taken; expected the name of no known"
        ):
            discovery.register("ogdm", Own, training=fills)
        with pytest.raises(ValueError, match="training, build: neither given for 'new'"):
            discovery.register("new", Own)
    finally:
        monkeypatch.undo()
        discovery.modules.cache_clear()
