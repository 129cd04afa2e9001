"""Trains a discriminator with the loop, plans, checkpoints and logs of every other training."""

from collections.abc import Callable

import jax
from etils import epath

from ogdm_jax.discriminator.evaluation import GuidedEvaluation
from ogdm_jax.discriminator.loss import HeldOut
from ogdm_jax.discriminator.pairs import Pairs
from ogdm_jax.discriminator.run import DiscriminatorRun, build
from ogdm_jax.training import logs
from ogdm_jax.training.state import TrainState
from ogdm_jax.training.task import Task


def _batches(run: DiscriminatorRun) -> Pairs:
    return run.batches(jax.process_index(), jax.process_count())


def _watch(
    run: DiscriminatorRun, workdir: epath.Path, writer: logs.Writer
) -> Callable[[int, TrainState], None]:
    """Writes held-out loss and accuracy of the moving average."""
    held_out = None
    if all(map(len, run.held_out)):
        held_out = HeldOut(run.config, run.model, run.extractor, run.held_out)

    def write(step: int, state: TrainState) -> None:
        params = run.plan.local_copy(state.ema)
        if held_out is not None and jax.process_index() == 0:
            writer.write(step, held_out(params))

    return write


TASK = Task(
    build=lambda config, plan, workdir, log, _: build(config, plan, workdir, log),
    batches=_batches,
    watch=_watch,
    evaluation=GuidedEvaluation,
)
