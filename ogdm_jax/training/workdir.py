"""A trained model from its folder."""

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax import data, models
from ogdm_jax.brief import brief
from ogdm_jax.config import Config, ConfigError, Sample, require
from ogdm_jax.config.fields import shown
from ogdm_jax.config.groups import GRID_OPTIONS, SOLVER_OPTIONS
from ogdm_jax.data import Source
from ogdm_jax.data.tokens import Tokenizer
from ogdm_jax.latents import Latents
from ogdm_jax.sampling import adaptive, generate
from ogdm_jax.sampling.guidance import Guidance, listed
from ogdm_jax.training import checkpoint, decoding, snapshots, texts
from ogdm_jax.typing import Denoise, PyTree


def open_source(config: Config) -> Source:
    """The data source of a configuration. Raises ConfigError or SourceError for what cannot be."""
    settings = config.data
    resolution, channels = settings.resolution, settings.channels
    limit = int(settings.memory_limit * 2**30)
    source = data.open_source(
        settings.source, settings.data_dir or None, resolution or None, channels or None, limit
    )
    if source.latents is not None:
        _check_latents(config, source.latents)
    return source


def open_pixels(config: Config, vae: str = "", source: Source | None = None) -> Source:
    """The images that a run's samples are compared with: its data, or what its latents were made
    of (`decoding.pixels`); vae: as that of `open_workdir`; source: its data where they are open.
    """
    source = open_source(config) if source is None else source
    latents = source.latents or Latents(source.shape)
    return decoding.pixels(source, lambda: decoding.open_decoder(config, latents, vae))


def _check_latents(config: Config, latents: Latents) -> None:
    """Raises ConfigError for settings that only pixels have."""
    if config.task != "denoiser":  # the others do not augment: those settings are not theirs
        return
    settings = config.data
    stays = f"0 with {settings.source}: its images are augmented before they are encoded"
    require(settings.augment == 0, "data.augment", settings.augment, stays)
    views = "false, as the set has no latents of the mirrored images, which no flip makes"
    require(latents.views == 2 or not settings.xflip, "data.xflip", settings.xflip, views)


class SamplerWords(TypedDict, total=False):
    """Entries of config.sample that a caller replaces; "" and None leave them as trained."""

    solver: str
    steps: int | None
    num: int | None
    eta: float | None
    grid: str
    clip: bool | None
    rtol: float | None
    atol: float | None
    variance: str
    offset: int | None
    start: str
    end: str
    snr: float | None
    corrector_steps: int | None
    sde: str | None
    order: int | None
    bh: str | None


class Path(NamedTuple):
    """A sampler's way.

    Attributes:
      sigmas: [N+1] noise levels.
      states: [N+1,b,h,w,c], divided by their spread so that noise stays visible: about [-1, 1].
      x0_hats: [N,b,H,W,C], what the network takes the finished image to be.
      images: [b,H,W,C], the end.
    """

    sigmas: np.ndarray
    states: np.ndarray
    x0_hats: np.ndarray
    images: np.ndarray
    __repr__ = brief


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TrainedModel:
    """A trained model: all that sampling needs.

    Attributes:
      config: the run's configuration.
      model: its network and preconditioning, without parameters.
      params: the weights, of the moving average unless others were asked for.
      buffers: tensors of the network that are not trained.
      step: of the checkpoint.
      class_names: in order; () where they are not known.
      samplers: those that were compiled, for this model and for copies of it with other weights;
        of those with guidance or churn the last one of `sample` and of `path`.
      tokenizer: of a model whose condition is a text.
    """

    config: Config
    model: models.Model
    params: PyTree
    buffers: PyTree
    step: int
    class_names: tuple[str, ...] = ()
    samplers: dict[Any, tuple[Any, generate.Images]] = dataclasses.field(default_factory=dict)
    tokenizer: Tokenizer | None = None

    def __repr__(self) -> str:
        size = "x".join(map(str, self.model.image_shape))
        classes = f", {self.model.label_dim} classes" if self.model.label_dim else ""
        count = models.parameter_count(self.params)
        data = f"{self.config.data.source}, {size}{classes}"
        return f"TrainedModel({data}, {count:,} parameters, step {self.step:,})"

    @functools.cached_property
    def denoiser(self) -> Denoise:
        """denoise(x [b,h,w,c], sigma [b], label=None) -> x0_hat, with these parameters; compiled at
        its first call with each shape.
        """
        return self.model.denoiser(self.params, self.buffers, compiled=True)

    def settings(self, **words: Unpack[SamplerWords]) -> Sample:
        """config.sample with some entries replaced.

        Raises:
          ConfigError: an entry is unknown or out of range.
        """
        changes: dict[str, Any] = {}
        for name, value in words.items():
            if name not in SamplerWords.__annotations__:
                known = ", ".join(SamplerWords.__annotations__)
                raise ConfigError(f"sample: no setting {name!r}; expected some of {known}")
            if value not in ("", None):
                changes[name] = value
        settings = generate.replaced(self.config.sample, changes)
        for solver, names in SOLVER_OPTIONS.items():
            for name in changes.keys() & set(names):
                only = f"it only with sample.solver={solver}"
                require(settings.solver == solver, f"sample.{name}", changes[name], only)
        for name, grids in GRID_OPTIONS.items():
            only = f"it only with sample.grid={'|'.join(grids)}"
            unused = name in changes and settings.grid not in grids
            require(not unused, f"sample.{name}", changes.get(name), only)
        chooses = settings.solver == adaptive.NAME
        need = f"sample.rtol and sample.atol: the solver {adaptive.NAME} chooses its steps"
        unused = chooses and "steps" in changes
        require(not unused, "sample.steps", changes.get("steps"), need)
        generate.check_settings(settings, self.model)
        return settings

    def sample(
        self,
        n: int = 64,
        *,
        seeds: Sequence[int] | np.ndarray | None = None,
        label: int | Sequence[int] | np.ndarray | None = None,
        guidance: Guidance | Sequence[Guidance] | None = (),
        batch: int | None = None,
        devices: Sequence[Any] | None = None,
        counts: list[np.ndarray] | None = None,
        prompt: str | Sequence[str] | None = None,
        negative: str = "",
        **words: Unpack[SamplerWords],
    ) -> np.ndarray:
        """Draws images; each depends on its seed alone.

        Args:
          n: how many, from the seeds 0 to n - 1.
          seeds: one for each image, in place of n.
          label: the class of all of them, or of each; None draws one from each seed.
          guidance: one sampling method or several. Given again, it compiles nothing.
          batch: images per device at a time; None: 64, fewer of large pictures.
          devices: None takes all of this process.
          counts: a list that receives the network evaluations of each image, batch by batch, where
            the solver is dopri5, which chooses them.
          prompt: of a model whose condition is a text: one, or several in turn.
          negative: what guidance compares with.
          words: entries of config.sample to replace: solver, steps, eta, grid, clip, variance, and
            what one solver alone has (`config.groups.SOLVER_OPTIONS`).

        Returns:
          float32 [n,h,w,c], about [-1, 1]; of a run on latents decoded images, but where it was
          opened with vae=None.

        Raises:
          ConfigError: a setting, the number or the label cannot be.
        """
        batch = generate.most_at_a_time(self.model, 64) if batch is None else batch
        for name, value in (("n", n), ("batch", batch)):
            if value < 1:
                raise ConfigError(f"{name}: {value} given; expected at least 1 image")
        seeds = np.arange(n) if seeds is None else np.asarray(seeds)
        whole = seeds.ndim == 1 and seeds.size > 0 and seeds.dtype.kind in "iu"
        if not whole or (seeds < 0).any() or (seeds >= 2**32).any():
            need = "whole numbers from 0 to 4294967295, one for each image"
            raise ConfigError(f"seeds: {shown(seeds.tolist())} given; expected {need}")
        settings = self.settings(**words)
        labels = generate.labels_for(seeds, self.model.label_dim, label)
        if prompt is not None:
            labels = self.texts(
                [prompt] if isinstance(prompt, str) else prompt, negative, len(seeds)
            )
        how = {"labels": labels, "guidance": guidance, "batch": batch, "devices": devices}
        return np.concatenate(list(self.batches(settings, seeds, counts=counts, **how)))

    def texts(self, prompts: Sequence[str], negative: str, n: int) -> dict[str, np.ndarray]:
        """Labels of n images whose conditions are texts, taken in turn (`models.Model.text`).

        Raises:
          ConfigError: a model without text encoder, or no text.
        """
        takes = "another model: this one takes no text"
        require(self.tokenizer is not None, "prompt", prompts, takes)
        require(len(prompts) > 0, "prompt", prompts, "at least one text")
        assert self.tokenizer is not None  # as above
        rows = self.tokenizer(prompts)[np.arange(n) % len(prompts)]
        return {"prompt": rows, "none": np.repeat(self.tokenizer([negative]), n, axis=0)}

    def batches(
        self,
        settings: Sample,
        seeds: Sequence[int] | np.ndarray,
        *,
        labels: PyTree = None,
        guidance: Guidance | Sequence[Guidance] | None = (),
        churn: Any = None,
        batch: int | None = None,
        devices: Sequence[Any] | None = None,
        done: np.ndarray | None = None,
        counts: list[np.ndarray] | None = None,
    ) -> Iterator[np.ndarray]:
        """Yields the images of `sample` batch by batch.

        Args:
          settings: what `settings` returned.
          seeds: one for each image.
          labels: the class of each image [len(seeds)], or what `texts` gives; None draws classes
            from the seeds.
          guidance: one sampling method or several.
          churn: EDM's stochasticity, see `sampling.sample`.
          batch: images per device at a time; None: 256, fewer of large pictures.
          devices: None takes all of this process.
          done: [len(seeds)] images that need not be drawn, see `generate.pending`.
          counts: receives the network evaluations of dopri5's images, see `generate.generate`.
        """
        seeds, devices = np.asarray(seeds), jax.local_devices() if devices is None else devices
        labels = self._labels(seeds, labels)
        guidance = listed(guidance)
        images = self._sampler(settings, devices, churn, guidance)
        size = generate.batch_size(self.model, len(seeds), len(devices), batch)
        weights = self.params, self.buffers
        return generate.generate(images, *weights, seeds, labels, size, guidance, done, counts)

    def path(
        self,
        seeds: Sequence[int] | np.ndarray,
        settings: Sample | None = None,
        *,
        labels: PyTree = None,
        guidance: Guidance | Sequence[Guidance] | None = (),
        churn: Any = None,
    ) -> Path:
        """How the images of some seeds come to be, as one batch on one device.

        Args:
          seeds: [b].
          settings: what `settings` returned; None: as trained.
          labels: of `batches`.
          guidance: sampling methods, whose rows are of these seeds.
          churn: of `batches`.

        Raises:
          ConfigError: a sampler that does not keep its steps.
        """
        settings, seeds = settings or self.settings(), np.asarray(seeds, np.uint32)
        labels, devices = self._labels(seeds, labels), jax.local_devices()[:1]
        guidance = listed(guidance)
        draw = self._sampler(settings, devices, churn, guidance, trajectory=True)
        drawn = draw(self.params, self.buffers, seeds, labels, *generate.arrays(guidance))
        images, (states, x0_hats) = jax.device_get(drawn[:2])
        sigmas = generate.noise_levels(self.model, settings)
        clean = self.config.precondition.sigma_data
        scale = (clean / np.sqrt(sigmas**2 + clean**2)).astype(np.float32)
        return Path(sigmas, states * scale[:, None, None, None, None], x0_hats, images)

    def _labels(self, seeds: np.ndarray, labels: PyTree) -> PyTree:
        """The labels given, else classes drawn from the seeds."""
        if labels is None:
            if self.tokenizer is not None:
                raise ConfigError(
                    "prompt: not given, and the model makes pictures of texts; expected one"
                )
            labels = generate.labels_for(seeds, self.model.label_dim, None)
        return labels

    def _sampler(
        self,
        settings: Sample,
        devices: Sequence[Any],
        churn: Any,
        guidance: Sequence[Guidance],
        trajectory: bool = False,
    ) -> generate.Images:
        """`generate.sampler`, compiled once where nothing but arrays can change: weights, and what
        guidance holds as constants and rows.
        """
        names = (field.name for field in dataclasses.fields(Guidance))
        parts = [name for name in names if name not in ("constants", "rows")]
        rules = [churn, *(getattr(one, name) for one in guidance for name in parts)]
        how = (trajectory, dataclasses.replace(settings, num=1, every="0 steps"), *devices)
        # Guidance is mostly made anew, and its programs would stay for ever: the last one does.
        key = trajectory if guidance or churn is not None else how
        found = self.samplers.get(key)
        if found is None or not _same(found[0], (how, rules)):
            draw = generate.sampler(self.model, settings, devices, churn, guidance, trajectory)
            found = self.samplers[key] = (how, rules), draw
        return found[1]


def _same(known: tuple[Any, list[Any]], wanted: tuple[Any, list[Any]]) -> bool:
    """Whether settings are equal, and rules the same objects."""
    (how, rules), (how_now, rules_now) = known, wanted
    alike = how == how_now and len(rules) == len(rules_now)
    return alike and all(a is b for a, b in zip(rules, rules_now))


def open_workdir(
    workdir: str | os.PathLike,
    step: int | str | None = None,
    weights: str = "ema",
    field: str = "--workdir",
    ema_std: float | None = None,
    vae: str | None = "",
) -> TrainedModel:
    """Reads a training folder: configuration and weights, never the optimiser.

    Args:
      workdir: the folder, local or gs://.
      step: of the checkpoint; None takes the newest, "best" that of the smallest distance.
      weights: "ema" or "params".
      field: the setting that named the folder, for messages.
      ema_std: takes in place of `weights` the average of this relative width, put together from the
        run's snapshots up to `step` (None: the last one); see `snapshots.reconstruct`.
      vae: the autoencoder that decodes samples of a run on latents; "" takes that of the run, None
        decodes nothing: samples are latents.

    Raises:
      CheckpointError: no such checkpoint or snapshot, or a damaged one.
      ConfigError: an ema_std that the snapshots do not determine.
    """
    # Snapshots stay longer than checkpoints, whose other tensors are the same at every step.
    number = None if ema_std is not None and isinstance(step, int) else step
    snapshot = checkpoint.find(workdir, number, field)
    if (task := snapshot.config.task) != "denoiser":
        held = f"an {task}" if task == "autoencoder" else f"a {task}"
        raise checkpoint.CheckpointError(
            f"{field}: {str(workdir)!r} holds {held}; expected the folder of a denoiser"
        )
    latents = snapshot.latents
    decoder = None
    if vae and latents is None:
        raise ConfigError(f"--vae: {vae} given, but {str(workdir)!r} is no run on latents")
    if latents is not None and vae is not None:
        decoder = decoding.open_decoder(snapshot.config, latents, vae, "--vae")
    shape = snapshot.image_shape, snapshot.num_classes
    model = models.build(snapshot.config, *shape, latents)
    params, buffers = jax.eval_shape(model.init, jax.random.key(0))
    params, buffers = checkpoint.load_weights(snapshot, params, buffers, weights)
    at = snapshot.step
    if ema_std is not None:
        last = at if isinstance(step, str) else step
        tracked = snapshot.config.ema.stds
        found, at, _ = snapshots.reconstruct(workdir, tracked, [ema_std], params, last, field)
        params = jax.tree.map(jnp.asarray, found[0])
    model, buffers = decoding.attach(model, buffers, decoder)
    words = texts.open_words(snapshot.config, workdir) if model.text is not None else None
    names = snapshot.class_names
    return TrainedModel(snapshot.config, model, params, buffers, at, names, tokenizer=words)
