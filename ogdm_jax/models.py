"""A configuration's network and preconditioning as one pure function of parameters."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax import pixels
from ogdm_jax.brief import brief
from ogdm_jax.config import Config, ConfigError, Precondition, require
from ogdm_jax.diffusion import precondition, process, score_sde
from ogdm_jax.diffusion.denoiser import Denoiser
from ogdm_jax.latents import Latents
from ogdm_jax.networks import (
    ADMUNet,
    AutoencoderKL,
    CLIPText,
    DhariwalUNet,
    DiT,
    SongUNet,
    UNet2DCondition,
)
from ogdm_jax.networks.tapped import Tapped, apply_compiled
from ogdm_jax.typing import Array, NetworkFn, PyTree

_NETWORKS = {
    "song": SongUNet,
    "dhariwal": DhariwalUNet,
    "openai": ADMUNet,
    "dit": DiT,
    "sd": UNet2DCondition,
}
VAE, TEXT = "vae", "text"  # entries of the buffers: variables of autoencoder and text encoder
ONLY = {  # settings that other kinds of network do not have
    "song": ("embedding_type", "encoder_type", "resample_filter"),
    "openai": ("num_heads", "head_channels", "scale_shift", "resblock_updown"),
}
# a U-Net has its settings under their own names, a DiT these: setting -> attribute
DIT = {"model_channels": "width", "num_blocks": "depth", "num_heads": "heads", "patch": "patch"}


@dataclasses.dataclass(frozen=True)
class Model:
    """A network and how it becomes a denoiser; no parameters inside.

    table: the steps of a discrete process. time_scale: what its network calls one of them.
    predicts: "v" where its network does not give eps, which `eps` needs.
    autoencoder: of a latent model, whose pictures are decoded where its weights are: in the buffers
      under VAE. image_shape is that of the latents.
    latents: what it is trained on, where that is no pixels.
    text: the encoder of a model whose condition is a text, its weights in the buffers under TEXT.
      Labels are {"prompt", "none"}: tokens [B,M], and those that guidance compares with; in
      training the first alone.
    """

    network: Tapped
    wrap: Callable[..., Denoiser]
    image_shape: tuple[int, int, int]
    label_dim: int
    table: process.Discrete | None = None
    time_scale: float = 1.0
    predicts: str = "eps"
    autoencoder: AutoencoderKL | None = None
    latents: Latents | None = None
    text: CLIPText | None = None
    __repr__ = brief

    @property
    def pixels(self) -> bool:
        """Whether its images are pixels in [-1, 1], and not latents, which have no bounds."""
        return self.latents is None and self.autoencoder is None

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """Of what sampling gives: image_shape, or that of decoded latents."""
        if self.autoencoder is None:
            return self.image_shape
        return self.autoencoder.picture_shape(self.image_shape)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """What the denoiser's `features(at=)` knows beside "mid" and "emb"."""
        return tuple(self.network.layer_names)

    def init(self, key: Array) -> tuple[PyTree, PyTree]:
        """Fresh (params, buffers): trained tensors, and others such as Fourier frequencies."""
        x = jnp.zeros((1, *self.image_shape))
        label = jnp.zeros((1,), jnp.int32) if self.label_dim else None
        if isinstance(self.network, UNet2DCondition):
            label = jnp.zeros((1, 1, self.network.context_dim))
        augment = jnp.zeros((1, self.network.augment_dim)) if self.network.augment_dim else None
        variables: Any = self.network.init({"params": key}, x, jnp.zeros((1,)), label, augment)
        buffers = dict(variables.get("buffers", {}))
        if self.text is not None:  # zeros: the weights of a folder come in their place
            tokens = jnp.zeros((1, self.text.positions), jnp.int32)
            shapes = jax.eval_shape(self.text.init, key, tokens)
            buffers[TEXT] = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return variables["params"], buffers

    def denoiser(
        self,
        params: PyTree,
        buffers: PyTree | None = None,
        augment: Array | None = None,
        dropout_keys: Array | None = None,
        compiled: bool = False,
    ) -> Denoiser:
        """The denoiser of these parameters.

        Its `features(..., at=)` are the network's (`networks.trunk.UNet.features`): at is "mid",
        "emb" or the name of a block, or several of these with commas between them, such as
        "enc_8x8_block0,dec_8x8_in1".

        Args:
          params: trained tensors.
          buffers: tensors that are not trained, if the network has any.
          augment: [B,9] augmentation labels of the batch that it will be asked about; None: not
            augmented.
          dropout_keys: [B] typed keys, one per image; None switches dropout off.
          compiled: the network is a program of its own, for calls outside of jit.
        """
        bound = {"augment": augment, "dropout_keys": dropout_keys}
        bound = {name: value for name, value in bound.items() if value is not None}
        apply = functools.partial(self._apply(params, buffers, compiled), **bound)

        def network_fn(x: Array, c_noise: Array, label: PyTree = None) -> Array:
            return apply(x, c_noise, self._seen(label))

        def taps(x: Array, c_noise: Array, label: PyTree, at: str) -> Any:
            return apply(x, c_noise, self._seen(label), at=at, method="features")

        made = self.wrap(network_fn, taps=taps)
        if self.text is None:
            return made
        none = lambda label: {**label, "prompt": label["none"]}
        return dataclasses.replace(made, unconditional=none)

    def condition(self, buffers: PyTree, label: PyTree) -> PyTree:
        """What the denoiser takes for labels: texts are encoded, once for all of its calls."""
        if self.text is None:
            return label
        encode = functools.partial(self.text.apply, buffers[TEXT])
        return jax.lax.stop_gradient(jax.tree.map(encode, label))

    def eps(self, params: PyTree, buffers: PyTree | None = None) -> NetworkFn:
        """(x_vp [B,H,W,C], t [B], label) -> eps of a discrete model (`table`), at any t, halves
        too: what the published samplers of such models ask for.
        """
        apply, channels = self._apply(params, buffers), self.image_shape[-1]

        def network_fn(x: Array, c_noise: Array, label: PyTree = None) -> Array:
            return apply(x, self.time_scale * c_noise, self._seen(label))[..., :channels]

        return network_fn

    def _seen(self, label: PyTree) -> PyTree:
        """What the network sees of a condition."""
        return label if self.text is None else label["prompt"]

    def _apply(
        self, params: PyTree, buffers: PyTree | None, compiled: bool = False
    ) -> Callable[..., Any]:
        variables = {"params": params, **({"buffers": buffers} if buffers else {})}
        if compiled:
            return functools.partial(apply_compiled, self.network, variables)
        return cast(Callable[..., Any], functools.partial(self.network.apply, variables))


def own_buffers(buffers: PyTree) -> dict[str, PyTree]:
    """Those of the denoiser's network, without what decodes its samples and encodes its texts."""
    return {name: value for name, value in (buffers or {}).items() if name not in (VAE, TEXT)}


def build(
    config: Config,
    image_shape: tuple[int, int, int],
    num_classes: int,
    latents: Latents | None = None,
) -> Model:
    """The model of a configuration for images of this shape.

    Args:
      config: base.py's groups network, precondition and data.
      image_shape: (h, w, c), square with a side that the levels of the network divide.
      num_classes: classes of the data source, 0 if it has none.
      latents: what the data source's numbers are, where they are no pixels.

    Raises:
      ConfigError: unknown kind, labels wanted from a source without any, or a size the network
        cannot halve.
    """
    height, _, channels = image_shape
    net: Any = config.network
    _check_size(config, image_shape)
    conditional = config.data.conditional
    require(
        not conditional or num_classes > 0,
        "data.conditional",
        conditional,
        "a source with class labels",
    )
    of_text = "false with network.kind 'sd', whose condition is a text"
    require(not (conditional and net.kind == "sd"), "data.conditional", conditional, of_text)
    kind = config.precondition.kind
    augmented = config.data.augment > 0
    require(
        not (augmented and net.kind in ("openai", "dit", "sd")),
        "data.augment",
        config.data.augment,
        f"0 with network.kind {net.kind!r}, which has no place for augmentation labels",
    )
    further = kind == "iddpm" or (kind == "adm" and config.precondition.learned_variance)
    network = _NETWORKS[net.kind](
        img_resolution=height,
        img_channels=channels,
        out_channels=channels * (2 if further else 1),
        **({} if net.kind == "sd" else {"label_dim": num_classes if conditional else 0}),
        dtype=getattr(jnp, net.dtype),
        remat=net.remat,
        **_settings(net, augmented),
    )
    check_widths(network, net)
    told = config.precondition
    table = discrete_table(told) if kind in ("adm", "v") else None
    scale = precondition.time_scale(told.diffusion_steps, told.rescale_timesteps)
    predicts = "v" if kind == "v" else "eps"
    shape = network.label_dim, table, scale, predicts
    text = _text(net) if net.kind == "sd" else None
    return Model(network, wrap(told), image_shape, *shape, latents=latents, text=text)


def check_widths(network: Any, net: Any) -> None:
    """Raises ConfigError where a network's widths do not fit together; net: its settings."""
    try:
        network.check_widths()
    except ValueError as error:
        levels = "" if net.kind == "dit" else f" with channel_mult {tuple(net.channel_mult)}"
        raise ConfigError(
            f"config.network.model_channels: {net.model_channels} given{levels}; {error}; "
            "expected other widths"
        ) from None


def _check_size(config: Config, image_shape: tuple[int, int, int]) -> None:
    """Raises ConfigError for images that the network cannot cut or halve."""
    height, width, _ = image_shape
    net: Any = config.network
    levels = len(net.channel_mult)
    unit, why = 2 ** (levels - 1), f"({levels} levels)"
    fewer = f", or give fewer levels than network.channel_mult={tuple(net.channel_mult)}"
    if net.kind == "dit":
        unit, why = net.patch, "(network.patch)"
        fewer = f", or give a patch smaller than network.patch={net.patch}"
    side = max(min(height, width) // unit, 1) * unit
    require(
        height == width and height % unit == 0,
        "data.resolution",
        config.data.resolution,
        f"square images with a side that {unit} divides {why}, and these are {width} x {height}: "
        f"{pixels.crop_all(side)}{fewer * (height == width)}",
    )


def _settings(net: Any, augmented: bool) -> dict[str, Any]:
    """The constructor's arguments that config.network gives one by one."""
    if net.kind == "dit":
        return {attribute: getattr(net, name) for name, attribute in DIT.items()}
    if net.kind == "sd":
        return sd_settings(net)
    foreign = [name for owner, names in ONLY.items() if owner != net.kind for name in names]
    others = ("kind", "dtype", "remat", "patch", "context", "groups", *foreign)
    own = lambda name: name not in others and not name.startswith("text_")
    settings = {name: value for name, value in vars(net).items() if own(name)}
    if net.kind == "song":
        settings["channel_mult_noise"] = 2 if net.embedding_type == "fourier" else 1
    if net.kind != "openai":
        settings["augment_dim"] = 9 if augmented else 0
    return settings


def _text(net: Any) -> CLIPText:
    """The text encoder of config.network."""
    return CLIPText(
        vocabulary=net.text_vocabulary,
        width=net.context,
        depth=net.text_layers,
        heads=net.text_heads,
        hidden=net.text_hidden,
        quick=net.text_quick,
        dtype=getattr(jnp, net.dtype),
    )


def sd_settings(net: Any) -> dict[str, Any]:
    """UNet2DCondition's attributes: the last level has no attention; heads of one width come with
    projections that are matrices (2.x), heads of one number with convolutions (1.x).
    """
    widths = tuple(round(net.model_channels * mult) for mult in net.channel_mult)
    wide = net.head_channels
    return {
        "widths": widths,
        "attends": (True,) * (len(widths) - 1) + (False,),
        "heads": tuple(max(width // wide, 1) if wide else net.num_heads for width in widths),
        "context_dim": net.context,
        "num_blocks": net.num_blocks,
        "groups": net.groups,
        "linear_projection": wide > 0,
    }


_CONTINUOUS = {
    "vp": precondition.vp,
    "ve": precondition.ve,
    "iddpm": precondition.iddpm,
    "subvp": score_sde.subvp,
    "smld": score_sde.smld,
}


def wrap(settings: Precondition) -> Callable[..., Denoiser]:
    """config.precondition as (network_fn, taps=) -> Denoiser."""
    kind = settings.kind
    if kind == "edm":
        return functools.partial(precondition.edm, sigma_data=settings.sigma_data)
    if kind == "flow":
        return functools.partial(precondition.flow, time_scale=settings.time_scale)
    if kind not in ("adm", "v"):
        more = {"sigma_max": settings.sigma_max} if kind in ("ve", "smld") else {}
        return functools.partial(_CONTINUOUS[kind], **more)
    return functools.partial(
        precondition.adm,
        betas=discrete_table(settings),
        steps=settings.diffusion_steps,
        predict="v" if kind == "v" else "eps",
        learned_variance=settings.learned_variance and kind == "adm",
        rescale_timesteps=settings.rescale_timesteps,
        interpolate=settings.interpolate,
    )


def discrete_table(settings: Precondition) -> process.Discrete:
    """The discrete process of config.precondition."""
    pure = settings.zero_terminal and settings.kind == "v"
    return process.Discrete.make(settings.schedule, settings.diffusion_steps, zero_terminal=pure)


def parameter_count(params: PyTree) -> int:
    """How many numbers the tree holds."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(params))


def fingerprint(variables: PyTree) -> np.ndarray:
    """SHA-256 of names, shapes and values of a tree of weights, as uint32 [8]."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        value = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {value.shape} {value.dtype}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return np.frombuffer(digest.digest(), np.uint32).copy()
