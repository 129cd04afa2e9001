"""The contract of methods/: every file alone and in pairs, in one train step; two owners of one slot are named."""

import itertools

import numpy as np
import pytest
import tiny

from ogdm_jax.methods import slots
from ogdm_jax.training.checkpoint import Checkpoints, describe

TRAINING = slots.training_names()
PAIRS = list(itertools.combinations(TRAINING, 2))


def test_every_method_file_says_what_it_is():
    for name in slots.names():
        module = slots.module(name)
        assert module.__doc__ and "arXiv" in module.__doc__ or any(c.isdigit() for c in module.__doc__), name
        if name in TRAINING:
            assert isinstance(module.DEFAULTS, dict) and callable(module.training)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A training folder for methods that start from one: fresh weights, saved as train.py saves them."""
    folder = tmp_path_factory.mktemp("pretrained")
    run = tiny.build("methods=()", tiny.ONE_LEVEL)
    with Checkpoints(folder) as checkpoints:
        about = describe(run.config, run.source.shape, run.source.num_classes)
        checkpoints.save(0, run.init(), about, {"step": 0})
    return folder


@pytest.mark.parametrize(
    "on", [(), *[(n,) for n in TRAINING], *PAIRS, tuple(TRAINING)], ids=lambda on: "+".join(on) or "none"
)
def test_methods_train_in_every_combination(on, pretrained):
    run = tiny.build(f"methods={on!r}", tiny.ONE_LEVEL, "data.batch=8", f"init.workdir={pretrained}", "stf.n=32")
    state, metrics = tiny.train(run, 2)
    assert np.isfinite([v for k, v in metrics.items() if k.startswith(("loss", "grad"))]).all(), metrics
    assert metrics["grad_nonfinite"] == 0
    assert set(state.companions) == {m.name for m in run.filled.companions}


@pytest.mark.slow  # three programs of all methods; tests/test_stf_training.py divides the set in little
def test_all_methods_together_are_the_same_on_every_plan(pretrained):
    """STF's whole set is divided over the devices here, 1,797 images on 2: filled up, and gathered by nobody."""
    flags = (
        f"methods={tuple(TRAINING)!r}",
        tiny.ONE_LEVEL,
        "data.batch=8",
        f"init.workdir={pretrained}",
        "stf.source=full",
    )
    losses = [
        tiny.train(tiny.build(*flags, plan=plan, devices=devices), 2)[1]
        for plan, devices in (("pmap", 1), ("pmap", 2), ("mesh", 2))
    ]
    for name in losses[0]:
        if name.startswith("loss"):
            np.testing.assert_allclose([m[name] for m in losses[1:]], losses[0][name], rtol=2e-4, err_msg=name)


def test_draws_of_one_method_do_not_change_when_another_is_switched_on():
    """The denoising loss of the first step depends on noise levels and noise alone: it must be the same number."""
    runs = [tiny.build(f"methods={m!r}", tiny.ONE_LEVEL) for m in ((), ("ogdm",))]
    plain, ogdm = (tiny.train(run, 1)[1]["loss/denoise"] for run in runs)
    np.testing.assert_allclose(ogdm, plain, rtol=1e-6)


def test_gamma_zero_is_plain_training_bit_for_bit():
    plain, _ = tiny.train(tiny.build("methods=()", tiny.ONE_LEVEL), 5)
    zero, _ = tiny.train(tiny.build("methods=('ogdm',)", tiny.ONE_LEVEL, "ogdm.gamma=0.0"), 5)
    tiny.assert_trees(zero.params, plain.params)
    tiny.assert_trees(zero.ema, plain.ema)


def test_two_owners_of_one_slot_are_named():
    fill = lambda *a: None  # noqa: E731
    with pytest.raises(ValueError, match="first and second both fill the target slot"):
        slots.combine([slots.Slots("first", target=fill), slots.Slots("second", target=fill)])


def test_unknown_methods_list_the_known_ones():
    with pytest.raises(ValueError, match="unknown method 'gan'; expected some of .*ogdm"):
        slots.module("gan")
