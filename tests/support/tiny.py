"""The shipped default configuration, shrunk until a step takes milliseconds: what the end-to-end
tests run.
"""

from pathlib import Path

import jax
import numpy as np

from ogdm_jax import config as configs
from ogdm_jax import data, parallel
from ogdm_jax.training import run as runs
from ogdm_jax.training.checkpoint import Checkpoints, describe
from tests.support import networks

ROOT = Path(__file__).parent.parent.parent
# Those that are shipped, by name; base.py is what they are made of.
CONFIGURATIONS = sorted(
    path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "base")
)

SHRINK = (
    "network.model_channels=8",
    "network.channel_mult=(1,2)",
    "network.num_blocks=1",
    "network.attn_resolutions=(4,)",
    "ogdm.channel_base=64",
    "ogdm.channel_max=8",
    "data.batch=32",
    "optim.ramp=0 steps",
    "optim.decay=0 steps",
    "train.duration=20 steps",
    "train.save_every=10 steps",
    "log.every=5 steps",
    "log.tensorboard=false",
    "sample.every=0 steps",
    "sample.num=4",
    "sample.steps=3",
    "evaluate.features=",
)
ONE_LEVEL = (
    "network.channel_mult=(1,)"  # half the blocks to compile, where many programs are compared
)

# What is tested around the network needs none of its parts: a third of ONE_LEVEL's tensors to compile,
# save and restore.
SMALLEST = ("network.kind=dit", "network.patch=4", "network.num_heads=1")
UNETS = ("network.channel_mult=", "network.attn_resolutions=")  # refused beside a DiT


def settings(*more: str) -> list[str]:
    """SHRINK, of a DiT without what only U-Nets have, and more."""
    others = UNETS if SMALLEST[0] in more else ()
    return [*(text for text in SHRINK if not text.startswith(others)), *more]


def flags(*more: str) -> list[str]:
    """The same as command-line arguments."""
    return [f"--config.{text}" for text in settings(*more)]


def config(*more: str, name: str = "digits"):
    return configs.load(ROOT / "configs" / f"{name}.py", settings(*more))


def build(*more: str, plan: str = "pmap", devices: int = 1) -> runs.Run:
    return runs.build(config(*more), data.open_source("digits"), parallel.make_plan(plan, devices))


def fresh(run: runs.Run):
    """The state of a run that has not begun, by `networks.born`: where only a folder is wanted."""
    state = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(run.create, run.key)
    )
    params, buffers = networks.born((state.params, state.buffers), run.config.seed)
    return run.plan.place(state.replace(params=params, ema=params, buffers=buffers))


def folder(place, run: runs.Run, data_set: dict | None = None):
    """Makes a training folder of a run's fresh weights, as train.py saves them, and returns it."""
    about = describe(run.config, run.source.shape, run.source.num_classes, data_set=data_set)
    with Checkpoints(place) as checkpoints:
        checkpoints.save(0, fresh(run), about, {"step": 0})
    return place


def train(run: runs.Run, steps: int):
    """(state, metrics of the last step) after some steps from scratch, without the loop around
    them.
    """
    state = run.init()
    step, constants = run.compile(state), run.constants()
    batches = data.batches(
        run.source,
        run.config.data.batch,
        run.config.seed,
        extra_references=run.methods.references,
        mates=run.methods.mates,
    )
    metrics = {}
    for _ in range(steps):
        state, metrics = step(state, constants, run.plan.place_batch(next(batches)), run.key)
    return run.plan.local_copy(state), {k: float(np.asarray(v)) for k, v in metrics.items()}


def assert_trees(actual, expected, atol: float = 0.0):
    """Equal structure and values to atol, naming the leaf; atol 0 means bit for bit."""
    left, right = (jax.tree_util.tree_leaves_with_path(t) for t in (actual, expected))
    assert [p for p, _ in left] == [p for p, _ in right]
    for (path, a), (_, b) in zip(left, right, strict=True):
        np.testing.assert_allclose(
            np.asarray(a), np.asarray(b), rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path)
        )
