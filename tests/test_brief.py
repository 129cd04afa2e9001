"""What a notebook shows of an object left at the end of a cell: one line of at most 200 characters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax import data, interop, sampling
from ogdm_jax.brief import LONGEST, brief
from ogdm_jax.diffusion import grids, precondition, process
from ogdm_jax.inverse import operators
from ogdm_jax.methods import cfg, discovery, dsg
from ogdm_jax.training.workdir import TrainedModel
from tests.support import tiny

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def things() -> dict:
    """Whatever a person may leave at the end of a cell, by name."""
    run = tiny.build("methods=ogdm", *tiny.SMALLEST)
    shapes = jax.eval_shape(run.create, run.key)
    state = jax.device_put(jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes))
    trained = TrainedModel(run.config, run.model, state.params, state.buffers, 3)
    loss = operators.measurement_loss(
        operators.inpaint(np.ones((8, 8, 1))), jnp.zeros((1, 8, 8, 1))
    )
    pretrained = interop.Pretrained("edm", run.model.network, {"params": state.params})
    path = sampling.sample(
        lambda x, sigma, label: 0 * x, jnp.zeros((2, 8, 8, 1)), grids.edm(2), trajectory=True
    )[1]
    groups = {
        f"config.{f.name}": getattr(run.config, f.name) for f in dataclasses.fields(run.config)
    }
    return {
        "a trained model": trained,
        "its denoiser": trained.denoiser,
        "its settings": trained.settings(steps=3),
        "a run": run,
        "a state": state,
        "a model": run.model,
        "a source": data.open_source("digits"),
        "a source of folders": dataclasses.replace(run.source, class_names=("a name",) * 1000),
        "methods": run.methods,
        "slots": run.methods.all[0],
        "a plan": run.plan,
        "a noise distribution": run.noise,
        "a table of noise": process.Discrete.make("linear", 1000),
        "a preconditioned function": precondition.edm(lambda x, c_noise, label: x),
        "an operator": operators.inpaint(np.ones((8, 8, 1))),
        "guidance": dsg.guidance(loss),
        "guidance with constants": cfg.guidance(2.0),
        "a trajectory": path,
        "a pretrained network": pretrained,
        "its denoiser too": pretrained.denoiser(),
        "the configuration": run.config,
        **{name: group for name, group in groups.items() if name != "config.others"},
        **{f"{name}.Settings": module.Settings() for name, module in discovery.modules().items()},
    }  # fmt: skip


def test_each_is_one_short_line(things):
    long = {name: repr(thing) for name, thing in things.items() if len(repr(thing)) > LONGEST}
    assert not long
    assert not [name for name, thing in things.items() if "\n" in repr(thing)]
    assert not [name for name, thing in things.items() if " at 0x" in repr(thing)]


def test_it_says_sizes_names_and_what_is_not_the_default(things):
    state = things["a state"]
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert f"step=0, params=<{count:,} numbers in " in repr(state)
    assert repr(things["a trajectory"]) == (
        "Trajectory(states=float32[3,2,8,8,1], x0_hats=float32[2,2,8,8,1])"
    )
    assert repr(things["guidance"]).startswith("Guidance(name='dsg', transition=Scheduled(")
    assert repr(things["the configuration"]).startswith("Config(methods=('ogdm',), data=Data(")


def test_a_cut_line_says_so_and_other_values_are_told():
    @dataclasses.dataclass
    class Thing:
        name: str
        act: object = None
        count: int = 3
        many: tuple = ()
        __repr__ = brief

    assert repr(Thing("a")) == "Thing(name='a')"
    assert (
        repr(Thing("a", functools.partial(max, 1), True)) == "Thing(name='a', act=max, count=True)"
    )
    assert (
        repr(Thing("a", np.float32(2), 4, (1,))) == "Thing(name='a', act=2.0, count=4, many=(1,))"
    )
    cut = repr(Thing("a" * 300))
    assert len(cut) == LONGEST and cut.endswith("a…)")


def test_traced_and_deleted_arrays_are_told_by_shape(things):
    state = things["a state"]
    seen = []
    jax.eval_shape(lambda s: seen.append(repr(s)) or s.step, state)
    assert "TrainState(step=int32[], params=<" in seen[0]
    gone = dataclasses.replace(state, step=jnp.array(3))
    gone.step.delete()
    assert "TrainState(step=int32[]" in repr(gone)
