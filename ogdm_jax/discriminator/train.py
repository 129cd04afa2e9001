"""Trains a discriminator with the loop, plans, checkpoints and logs of every other training."""

import os
from collections.abc import Callable
from typing import cast

import jax
from etils import epath

from ogdm_jax.config import Config
from ogdm_jax.discriminator.evaluation import GuidedEvaluation
from ogdm_jax.discriminator.loss import HeldOut
from ogdm_jax.discriminator.pairs import Pairs
from ogdm_jax.discriminator.run import DiscriminatorRun, build
from ogdm_jax.training import logs, loop, profile
from ogdm_jax.training.state import TrainState
from ogdm_jax.training.task import Task


def train(
    config: Config,
    workdir: str | os.PathLike,
    log: Callable[[str], None] = print,
    profile: profile.Steps | None = None,
    override: bool = False,
    stopped_code: int | None = None,
) -> tuple[DiscriminatorRun, TrainState]:
    """Trains the discriminator of a configuration with a group dg.

    Arguments, what is returned and what is raised are those of `loop.train`.
    """
    run, state = loop.train(config, workdir, log, TASK, profile, override, stopped_code)
    return cast(DiscriminatorRun, run), state


def _batches(run: DiscriminatorRun) -> Pairs:
    return run.batches(jax.process_index(), jax.process_count())


def _watch(
    run: DiscriminatorRun, workdir: epath.Path, writer: logs.Writer
) -> Callable[[int, TrainState], None]:
    """Writes held-out loss and accuracy of the moving average."""
    held_out = None
    if all(map(len, run.held_out)):
        held_out = HeldOut(run.config, run.network, run.extractor, run.held_out)

    def write(step: int, state: TrainState) -> None:
        params = run.plan.local_copy(state.ema)
        if held_out is not None and jax.process_index() == 0:
            writer.write(step, held_out(params))

    return write


TASK = Task(build=build, batches=_batches, watch=_watch, evaluation=GuidedEvaluation)
