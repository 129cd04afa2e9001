"""A run that trains a discriminator, built from a configuration."""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax.numpy as jnp
import optax
from etils import epath

from ogdm_jax import config as configs
from ogdm_jax import parallel
from ogdm_jax.data import Source
from ogdm_jax.discriminator import generated
from ogdm_jax.discriminator.loss import training_loss
from ogdm_jax.discriminator.network import keep_extractor, open_network
from ogdm_jax.discriminator.pairs import Pairs, split
from ogdm_jax.discriminator.settings import check_run
from ogdm_jax.discriminator.settings import of as settings_of
from ogdm_jax.latents import difference
from ogdm_jax.methods.contract import Constants, Slots, combine
from ogdm_jax.networks.feature_discriminator import FeatureDiscriminator
from ogdm_jax.sampling import generate
from ogdm_jax.training import decoding, evaluate, optim
from ogdm_jax.training import run as runs
from ogdm_jax.training.objective import Objective
from ogdm_jax.training.workdir import TrainedModel, open_source, open_workdir
from ogdm_jax.typing import PyTree


def optimiser(config: configs.Config) -> optax.GradientTransformation:
    """Adam with L2 coupled to the gradient, as in PyTorch's Adam(weight_decay=...), not AdamW."""
    settings = config.optim
    adam = optax.adam(optim.rate_of(config), *settings.betas, eps=settings.eps)
    return optax.chain(optax.add_decayed_weights(settings.weight_decay), adam)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedRun(runs.Run[FeatureDiscriminator]):
    """A run whose network is the discriminator, as far as compiling needs it.

    Attributes:
      extractor: params of the network that makes the features, or None.
    """

    extractor: PyTree

    @classmethod
    def of_network(
        cls,
        network: FeatureDiscriminator,
        extractor: PyTree,
        config: configs.Config,
        source: Source,
        plan: parallel.Plan,
        xflip: bool,
        **more: Any,
    ) -> Self:
        """The run of a network; its loss has noise levels of its own."""
        frozen = Constants(lambda: {"extractor": extractor}, weights=True)
        methods = combine([Slots("dg", constants=frozen)])
        goal = Objective(training_loss(config, network, xflip, source.latents))
        tx = optimiser(config)
        return cls.of(config, source, network, methods, goal, plan, tx, extractor=extractor, **more)

    def example_batch(self) -> dict[str, PyTree]:
        """As `pairs.paired` makes it."""
        batch = super().example_batch()
        batch.pop("row", None)
        if self.source.latents is not None:
            batch["image"] = batch["image"].astype(jnp.float32)
        return batch | {"real": jnp.zeros_like(batch["index"])}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscriminatorRun(PlannedRun):
    """A run with its prior and images; `source` has all real images.

    Attributes:
      prior: the model to guide.
      kept: (real, generated) images that are trained on.
      held_out: (real, generated) images that are not.
    """

    prior: TrainedModel
    kept: tuple[Source, Source]
    held_out: tuple[Source, Source]

    def batches(self, process_index: int, process_count: int) -> Pairs:
        """Batches of one process."""
        data = self.config.data
        return Pairs(
            *self.kept, data.batch, self.config.seed, process_index, process_count, data.workers
        )


def build(
    config: configs.Config,
    plan: parallel.Plan,
    workdir: epath.Path,
    log: Callable[[str], None] = print,
) -> DiscriminatorRun:
    """Opens the prior, draws or reads its samples, and builds the run.

    Raises:
      ConfigError, CheckpointError, SourceError: bad settings, prior, samples or data.
    """
    settings, batch = check_run(config), config.data.batch
    parallel.check_batch(batch // 2, config.optim.accumulate, len(plan.devices))
    prior = open_prior(config)
    generate.check_settings(config.sample, prior.model)
    source = open_source(config if config.data.source else prior.config)
    _check_source(source, prior)
    network, extractor = open_network(config, source.shape, source.num_classes, workdir)
    known = bool(prior.model.label_dim) or not network.label_dim
    configs.require(known, "data.conditional", True, "a prior with classes for it")
    keep_extractor(network, extractor, workdir)
    more: dict[str, Any] = {"prior": prior, "kept": (), "held_out": ()}
    xflip = prior.config.data.xflip
    run = DiscriminatorRun.of_network(network, extractor, config, source, plan, xflip, **more)
    run = decoding.with_decoder(run, prior.config.data.vae)
    evaluate.check_images(run, evaluate.check_evaluation(config))  # before samples are drawn
    num, path = settings.num or len(source), settings.samples_path(workdir)
    drawn = generated.draw_or_read(config, prior, source, num, path, plan.local_devices, log)
    sides = {"real": source, "generated": drawn}
    kept, held_out = zip(*(split(side, settings.held_out) for side in sides.values()))
    for side, images in zip(sides, kept):
        enough = f"a share that leaves {side} images"
        configs.require(len(images) > 0, "dg.held_out", settings.held_out, enough)
    return dataclasses.replace(run, kept=kept, held_out=held_out)


def _check_source(source: Source, prior: TrainedModel) -> None:
    """Raises ConfigError for real images that are not of the prior's kind."""
    told, field = source.latents, f"config.data.source: {source.name}"
    if source.shape != prior.model.image_shape:
        raise configs.ConfigError(
            f"config.data.source: images of {source.shape}; expected the prior's "
            f"{prior.model.image_shape}"
        )
    if differs := difference(told, prior.model.latents):
        raise configs.ConfigError(
            f"{field} holds other numbers than the prior was trained on ({differs}); expected "
            "both alike"
        )
    if told is not None and told.views < 2 and prior.config.data.xflip:
        raise configs.ConfigError(
            f"{field} has no latents of the mirrored images, which the prior was trained on, too "
            "(its data.xflip); expected what ogdm data encode writes"
        )


def planned(config: configs.Config, source: Source, plan: parallel.Plan) -> PlannedRun:
    """The run without prior, samples and data, for whoever only compiles.

    Nothing is read but an extractor.
    """
    network, extractor = open_network(config, source.shape, source.num_classes, "")
    return PlannedRun.of_network(network, extractor, config, source, plan, xflip=False)


def open_prior(config: configs.Config) -> TrainedModel:
    """The model to guide. Raises CheckpointError where the folder holds none."""
    settings = settings_of(config)
    step = settings.prior_step
    number = int(step) if step.isdecimal() else step or None
    field = "config.dg.prior"
    prior = open_workdir(settings.prior, number, settings.prior_weights, field, vae=None)
    if prior.model.text is not None:
        raise configs.ConfigError(
            f"{field}: {settings.prior!r} holds a model of texts, and DG's discriminator does not "
            "see any; expected a model of classes, or of no condition"
        )
    return prior
