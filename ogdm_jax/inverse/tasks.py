"""Tasks by name: what turns clean images into measurements y = A(x0) + noise.

Settings that depend on the size follow the published ones for 256 pixels.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ogdm_jax import places
from ogdm_jax.config import ConfigError, Group, require, setting
from ogdm_jax.interop import perceptual
from ogdm_jax.inverse import degradations, given, networks, operators
from ogdm_jax.inverse.operators import Operator
from ogdm_jax.networks import vgg
from ogdm_jax.typing import PyTree

Shape = tuple[int, int, int]
DRAWN = ("random", "box")  # masks that are no files


@dataclasses.dataclass(frozen=True)
class Settings(Group):
    """What a task may be told.

    Attributes:
      noise: standard deviation of Gaussian noise on y, images in [-1, 1].
      poisson: counts per grey level of Poisson noise instead; 0: none.
      mask: "random", "box" or a picture or .npy of which black pixels are hidden.
      factor: of super-resolution.
      blur: standard deviation of the Gaussian, or side of the other blurs' kernel; None: by the
        size of the images.
      kernel: a picture or .npy of the other blurs' kernel; "": one drawn at random.
      network: "FILE.py:FUNCTION", images [B,H,W,C] in [-1, 1] -> features, for the tasks that
        follow an example; "" for the network of `weights`.
      weights: of style, face_id and segmentation: where a package or a file of weights is; "" for
        the package of docs/tasks.md where it is installed.
      layers: of style: comma-separated layers of the VGG.
      size: of style: pixels a side to which the VGG's images are resized.
    """

    GROUP, PREFIX = "task", "--"
    noise: float = setting(
        0.05, "standard deviation of Gaussian noise, images in [-1, 1]", least=0, below=np.inf
    )
    poisson: float = setting(
        0.0, "Poisson noise of so many counts per grey level instead", least=0, below=np.inf
    )
    mask: str = setting(
        "random", "random, box, or a picture or .npy of which black pixels are hidden"
    )
    factor: int = setting(4, "reduction of super_resolution", least=1)
    blur: float | None = setting(
        None,
        "deblur: standard deviation; other blurs: side of the kernel; default: by the size",
        above=0,
        below=np.inf,
        expected="a positive number of pixels",
    )
    kernel: str = setting("", "motion blur: picture or .npy of the kernel; default: a random one")
    network: str = setting("", "FILE.py:FUNCTION, images [n,h,w,c] in [-1, 1] to features")
    weights: str = setting(
        "", "style, face_id, segmentation: package or file (default: the installed package)"
    )
    layers: str = setting(",".join(vgg.STYLE), "style: layers of the VGG, separated by commas")
    size: int = setting(224, "style: pixels a side of what the VGG sees", least=16, most=4096)


@dataclasses.dataclass(frozen=True)
class Task:
    """One kind of measurement.

    Attributes:
      name: of TASKS.
      operator: drawn -> Operator, for what `draw` gave for a batch; of a task with weights:
        weights -> Operator.
      draw: seeds -> pytree of arrays, one row per image, that the operator needs ({}: none).
      restores: whether the result should equal the input; else the input is an example to follow.
      weights: of a frozen network, which reach a compiled sampler as an argument; None: none.
      about: what was loaded, for a report.
    """

    name: str
    operator: Callable[[PyTree], Operator]
    draw: Callable[[np.ndarray], PyTree] = lambda seeds: {}
    restores: bool = True
    weights: PyTree = None
    about: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def made(self, drawn: PyTree, weights: PyTree = None) -> Operator:
        """The operator of a batch; weights: as a compiled function received them."""
        if self.weights is None:
            return self.operator(drawn)
        return self.operator(self.weights if weights is None else weights)


class _Kind(NamedTuple):
    """How a task is made, the settings that it uses beside the noise, and what it measures.

    Attributes:
      restores: as in `Task`.
      picture: whether y is a picture, numbers from -1 to 1; else no photons can be counted.
    """

    make: Callable[[Settings, Shape], Operator | Task]
    uses: tuple[str, ...] = ()
    restores: bool = True
    picture: bool = True


def make_task(name: str, settings: Settings, shape: Shape) -> Task:
    """The task for images of this shape.

    Raises:
      ValueError: an unknown task, a setting out of range, Poisson noise of no picture, or a network
        that cannot be loaded.
    """
    require(name in _KINDS, "--task", name, f"one of {', '.join(TASKS)}")
    photons = settings.poisson == 0 or name in PICTURES
    expected = f"--task {' or '.join(PICTURES)} with it, or --task.noise"
    require(photons, "--task.poisson", settings.poisson, expected)
    made = _KINDS[name].make(settings, shape)
    if isinstance(made, Task):
        return made
    return Task(name, lambda drawn: made, restores=_KINDS[name].restores)


def measured_shape(task: Task, shape: Shape) -> tuple[int, ...]:
    """The shape of one measurement of images of this shape."""
    operator = task.made(task.draw(np.zeros(1, np.int64)))
    images = jax.ShapeDtypeStruct((1, *shape), np.float32)
    return jax.eval_shape(operator.forward, images).shape[1:]


def check_known(name: str, settings: Settings) -> None:
    """Raises ConfigError where measurements of elsewhere would meet an operator drawn here."""
    if name not in RESTORING:
        raise ConfigError(
            f"--measured: given for --task {name}, which follows an example; expected --input"
        )
    if name == "inpaint" and settings.mask in DRAWN:
        raise ConfigError(
            f"--task.mask: {settings.mask} given with --measured; expected the picture of which "
            "black pixels are hidden in it"
        )
    if name in ("motion_deblur", "nonlinear_deblur"):
        if not settings.kernel and not (settings.network and name == "nonlinear_deblur"):
            raise ConfigError(
                f"--task.kernel: not given for --task {name} with --measured; expected the kernel "
                "that blurred it, as a picture or .npy"
            )


def users(field: str) -> tuple[str, ...]:
    """The tasks that use a setting."""
    if field == "noise":
        return RESTORING
    if field == "poisson":
        return PICTURES
    return tuple(name for name, kind in _KINDS.items() if field in kind.uses)


def _deblur(settings: Settings, shape: Shape) -> Operator:
    std = max(3 * shape[0] / 256, 1.0) if settings.blur is None else settings.blur
    return operators.gaussian_blur(2 * round(10 * std) + 1, std)


def _motion(settings: Settings, shape: Shape) -> np.ndarray:
    """The one kernel of the blurs that are no Gaussian."""
    if settings.kernel:
        if settings.blur is not None:
            raise ConfigError(
                f"--task.blur: {settings.blur:g} given with --task.kernel; expected one of them"
            )
        return given.kernel(settings.kernel)
    wide = max(round(61 * shape[0] / 256), 7) if settings.blur is None else settings.blur
    # a kernel of 3 has no room for a path, see `degradations.motion_kernel`
    require(wide >= 4, "--task.blur", wide, "a kernel's side of at least 4 pixels, made odd")
    return degradations.motion_kernel(np.random.default_rng(0), int(wide) // 2 * 2 + 1)


def _blur(
    name: str, make: Callable[[Any], Operator], settings: Settings, shape: Shape
) -> Operator | Task:
    """A blur by `_motion`'s kernel. That of a file comes with the measurements, so that what was
    drawn with one kernel does not go on with another.
    """
    kernel = _motion(settings, shape)
    if not settings.kernel:
        return make(kernel)
    draw = lambda seeds: {"kernel": np.repeat(kernel[None], len(seeds), axis=0)}
    return Task(name, lambda drawn: make(drawn["kernel"][0]), draw)


def _nonlinear_deblur(settings: Settings, shape: Shape) -> Operator | Task:
    network = load_function(settings.network) if settings.network else None
    if network is not None and (settings.kernel or settings.blur is not None):
        option = "kernel" if settings.kernel else "blur"
        raise ConfigError(
            f"--task.{option}: given with --task.network, which blurs; expected one of them"
        )
    if network is not None:
        return operators.nonlinear_blur(_motion(settings, shape), network=network)
    return _blur("nonlinear_deblur", operators.nonlinear_blur, settings, shape)


def _inpaint(settings: Settings, shape: Shape) -> Task:
    side = shape[0]
    if settings.mask == "random":
        one = lambda seed: degradations.random_mask(_rng(seed), side)
    elif settings.mask == "box":
        one = lambda seed: degradations.box_mask(_rng(seed), side, side // 2, side // 16)
    else:
        need = "random, box or a picture (or .npy) of which black pixels are hidden"
        there = places.place(settings.mask, "--task.mask").is_file()
        require(there, "--task.mask", settings.mask, need)
        fixed = given.mask(settings.mask, side)
        one = lambda seed: fixed
    draw = lambda seeds: {"mask": np.stack([one(seed) for seed in seeds])}
    return Task("inpaint", lambda drawn: operators.inpaint(drawn["mask"]), draw)


def _rng(seed: int) -> np.random.Generator:
    return np.random.default_rng([int(seed), 0x6D61736B])


def load_function(where: str) -> Callable[..., Any]:
    """The function of "FILE.py:NAME". Raises ValueError where there is none."""
    path, _, name = where.rpartition(":")
    there = path.endswith(".py") and bool(name) and Path(path).is_file()
    need = "FILE.py:FUNCTION, images in [-1, 1] to features"
    require(there, "--task.network", where, need)
    spec = importlib.util.spec_from_file_location("ogdm_jax_user_network", path)
    assert spec is not None and spec.loader is not None  # of a file that ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise ValueError(f"--task.network: {path} has no function {name!r}")
    return getattr(module, name)


def _measured_by(
    name: str,
    make: Callable[[Callable[..., Any]], Operator],
    load: Callable[[Settings], perceptual.Frozen],
    uses: tuple[str, ...] = ("weights",),
) -> _Kind:
    """A task whose network comes with weights, unless people bring their own function."""

    def task(settings: Settings, shape: Shape) -> Operator | Task:
        if settings.network:
            for field in uses:
                if getattr(settings, field) != getattr(Settings, field):
                    raise ConfigError(
                        f"--task.{field}: {getattr(settings, field)!r} given with --task.network, "
                        "which has its own; expected one of them"
                    )
            return make(load_function(settings.network))
        if shape[-1] not in (1, 3):
            raise ConfigError(
                f"--task: {name!r} given for images of {shape[-1]} channels; expected 1 (grey is "
                "repeated) or 3, or --task.network"
            )
        forward, weights, about = load(settings)
        operator = lambda weights: make(functools.partial(forward, weights))
        return Task(name, operator, restores=False, weights=weights, about={"network": about})

    return _Kind(task, ("network", *uses), False)


def _layers(settings: Settings) -> list[str]:
    return [name.strip() for name in settings.layers.split(",") if name.strip()]


_KINDS: dict[str, _Kind] = {
    "inpaint": _Kind(_inpaint, ("mask",)),
    "super_resolution": _Kind(
        lambda settings, shape: operators.super_resolution(settings.factor, shape[0]), ("factor",)
    ),
    "deblur": _Kind(_deblur, ("blur",)),
    "motion_deblur": _Kind(
        lambda s, shape: _blur("motion_deblur", operators.motion_blur, s, shape), ("blur", "kernel")
    ),
    "nonlinear_deblur": _Kind(_nonlinear_deblur, ("blur", "kernel", "network")),
    "phase_retrieval": _Kind(lambda settings, shape: operators.phase_retrieval(), picture=False),
    "high_dynamic_range": _Kind(lambda settings, shape: operators.high_dynamic_range()),
    "denoise": _Kind(lambda settings, shape: operators.identity()),
    "style": _measured_by(
        "style",
        networks.style,
        lambda s: perceptual.style_network(s.weights, _layers(s), s.size),
        ("weights", "layers", "size"),
    ),
    "face_id": _measured_by(
        "face_id", networks.embedding, lambda s: perceptual.face_network(s.weights)
    ),
    "embedding": _Kind(
        lambda s, _: networks.embedding(load_function(s.network)), ("network",), restores=False
    ),
    "segmentation": _measured_by(
        "segmentation", networks.segmentation, lambda s: perceptual.segmentation_network(s.weights)
    ),
}
TASKS = tuple(_KINDS)
RESTORING = tuple(name for name, kind in _KINDS.items() if kind.restores)
PICTURES = tuple(name for name in RESTORING if _KINDS[name].picture)
