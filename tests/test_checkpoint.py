"""Which checkpoints stay, and which weights come out of one."""

import jax
import numpy as np
import pytest

from ogdm_jax.training import state as states
from ogdm_jax.training.checkpoint import CheckpointError, Checkpoints, describe, find, load_weights
from ogdm_jax.training.workdir import open_workdir
from tests.support import tiny

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with saves at steps 2 to 10 of a state whose weights are 1 and whose moving average
    is 2.
    """
    folder, run = tmp_path_factory.mktemp("saved"), tiny.build("methods=", *tiny.SMALLEST)
    shapes = jax.eval_shape(run.create, run.key)
    filled = lambda tree, value: jax.tree.map(
        lambda leaf: np.full(leaf.shape, value, leaf.dtype), tree
    )
    state = states.TrainState(
        step=np.int32(0),
        params=filled(shapes.params, 1),
        ema=filled(shapes.ema, 2),
        buffers=filled(shapes.buffers, 0),
        opt_state=filled(shapes.opt_state, 0),
        carry={},
    )
    about = describe(run.config, run.source.shape, 0)
    named = describe(run.config, run.source.shape, 0, {"images": 2, "class_names": ["cat", "dog"]})
    with Checkpoints(folder, keep=1, keep_every=4) as checkpoints:
        for step in range(2, 11, 2):
            checkpoints.save(step, state, named if step == 10 else about, {"step": step})
    return folder, shapes


def test_the_newest_and_every_fourth_stay(saved):
    folder, _ = saved
    assert {int(path.name) for path in (folder / "checkpoints").iterdir()} == {4, 8, 10}
    assert find(folder).step == 10 and find(folder, 4).step == 4


def test_what_the_data_were_is_kept_and_may_be_missing(saved):
    folder, _ = saved
    assert find(folder).data_set == {"images": 2, "class_names": ["cat", "dog"]}
    assert find(folder).class_names == open_workdir(folder).class_names == ("cat", "dog")
    assert find(folder, 8).data_set == {} and find(folder, 8).class_names == ()


@pytest.mark.parametrize("which,value", [("ema", 2), ("params", 1)])
def test_weights_come_as_trained_or_as_their_average(saved, which, value):
    folder, shapes = saved
    params, _ = load_weights(find(folder), shapes.params, shapes.buffers, which)
    assert jax.tree.structure(params) == jax.tree.structure(shapes.params)
    assert all((np.asarray(leaf) == value).all() for leaf in jax.tree.leaves(params))


def test_other_weights_are_refused(saved):
    folder, shapes = saved
    with pytest.raises(CheckpointError, match="--weights: 'best' given; expected ema or params"):
        load_weights(find(folder), shapes.params, shapes.buffers, "best")
