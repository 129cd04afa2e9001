"""Files and folders that are no checkpoint of ours to read: what they are, and what to do."""

import os
import re
from pathlib import Path

from ogdm_jax import records
from ogdm_jax.interop.inert import UnsafeFileError, quote

INDEX = re.compile(r"\.index(\.\w+)?\.json$")  # ends the name of the list of shards
_MOST_SHARDS = 1000
_UNPACK = "unpack it and give the checkpoint that is inside"
# how the bytes begin -> what it is, and what to do
_MAGIC = (
    (rb"version https://git-lfs", "a Git LFS pointer, not the file; get it with `git lfs pull`"),
    (
        rb"\s*(<!doctype html|<html|<head)",
        "a saved web page (of a login or an error, perhaps); download the file itself",
    ),
    (rb"\s*<", "a text of XML or HTML; download the file itself"),
    (rb"\x1f\x8b", f"gzip-compressed; {_UNPACK}"),
    (rb"BZ", f"bzip2-compressed; {_UNPACK}"),
    (rb"\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!", f"a compressed archive; {_UNPACK}"),
    (
        rb"(?s).{257}ustar",
        f"a tar archive (torch's own before 0.1.10, or a packed folder); {_UNPACK}, "
        "or save it again with a newer torch",
    ),
    (rb"\x89HDF", "an HDF5 file (Keras or MATLAB); expected PyTorch's or safetensors"),
    (rb"GGUF", "a GGUF file, whose weights are quantised; expected the original checkpoint"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|BM..\0\0\0\0|RIFF", "a picture; expected a checkpoint"),
    (rb"%PDF", "a PDF; expected a checkpoint"),
    (rb"PK", "an empty or broken zip archive"),
    (rb"\s*[\[{]", "JSON text, not weights; give the file of weights beside it"),
    (
        rb"model_checkpoint_path",
        "TensorFlow's note beside a checkpoint; expected PyTorch's weights",
    ),
)
_TENSORFLOW = bytes.fromhex("57fb808b247547db")  # ends an index of TensorFlow's tables
# files that tell what a folder is -> what it is, and what to do
_FOLDERS = (
    (
        "checkpoints",
        "a training folder of ours; use it with --workdir (an autoencoder's has vae/, which --vae "
        "takes, when its training has ended)",
    ),
    (
        "model_index.json",
        "a pipeline of diffusers; give the folder of a network in it (transformer, unet, vae, ...)",
    ),
    (
        ".metadata",
        "a distributed checkpoint of torch; join it with "
        "torch.distributed.checkpoint.format_utils.dcp_to_torch_save",
    ),
    (
        "zero_to_fp32.py",
        "a checkpoint of DeepSpeed; run the zero_to_fp32.py in it and give what that writes",
    ),
    ("_CHECKPOINT_METADATA", "a checkpoint of orbax; expected PyTorch's or safetensors"),
    ("_METADATA", "a checkpoint of orbax; expected PyTorch's or safetensors"),
    ("manifest.ocdbt", "a checkpoint of orbax; expected PyTorch's or safetensors"),
    ("saved_model.pb", "a SavedModel of TensorFlow; expected PyTorch's or safetensors"),
    ("checkpoint", "a folder of TensorFlow checkpoints; expected PyTorch's or safetensors"),
    ("data.pkl", "an unpacked torch file; pack its folder again (zip -0 -r model.pt FOLDER)"),
)
_WEIGHTS = (".safetensors", ".pt", ".pth", ".pkl", ".ckpt", ".bin", ".npz")


def file_kind(data: memoryview, name: str) -> str:
    """What a file is that is no checkpoint, and what to do, from its bytes and its name."""
    head = bytes(data[:512])
    for pattern, what in _MAGIC:
        if re.match(pattern, head, re.IGNORECASE):
            return what
    if bytes(data[-8:]) == _TENSORFLOW or re.search(r"\.data-\d{5}-of-\d{5}$", name):
        return "a part of a TensorFlow checkpoint; expected PyTorch's or safetensors"
    for suffix, what in ((".msgpack", "flax's msgpack"), (".onnx", "an ONNX program")):
        if name.endswith(suffix):
            return f"{what}; expected PyTorch's or safetensors"
    text = not re.search(rb"[^\t\n\r\x20-\x7e\x80-\xff]", head)
    return "a text, not a checkpoint" if text else "of an unknown kind"


def archive_kind(names: list[str]) -> str:
    """What a zip archive without torch's data.pkl is, by the names in it."""
    pictures = sum(name.lower().endswith((".png", ".jpg", ".jpeg", ".webp")) for name in names)
    if pictures * 2 > len(names):
        return f"a zip archive of {pictures} pictures; it may be a data set, zip:FILE"
    weights = [name for name in names if name.endswith(_WEIGHTS)]
    if weights:
        return f"a zip archive with {quote(weights[0])} in it; unpack it and give that"
    return f"a zip archive of other files ({', '.join(map(quote, names[:3]))})"


def shards(path: Path) -> dict[str, list[str]]:
    """Shard file -> its tensors, as the index in a folder (or an index file itself) lists them.

    Raises:
      UnsafeFileError: no index, or one that points outside the folder; the text says what the
        folder is.
    """
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [file for file in found if INDEX.search(file.name)]
    if not found:
        raise UnsafeFileError(_folder_kind(path))
    if len(found) > 1:
        listed = ", ".join(quote(file.name) for file in found[:8])
        raise UnsafeFileError(f"it is a folder with several indexes of shards; give one: {listed}")
    try:
        listed = records.read(found[0], dict).get("weight_map")
    except records.RecordError as error:
        raise UnsafeFileError(f"its index {str(error).removeprefix('file: ')}") from error
    if not isinstance(listed, dict) or not listed:
        raise UnsafeFileError(f"its index {quote(found[0].name)} has no weight_map")
    result: dict[str, list[str]] = {}
    for name, shard in listed.items():
        plain = isinstance(shard, str) and shard == os.path.basename(shard)
        if not plain or shard in ("", ".", "..") or INDEX.search(shard) or "\0" in shard:
            raise UnsafeFileError(f"its index points outside the folder ({quote(shard)})")
        result.setdefault(shard, []).append(name)
    if len(result) > _MOST_SHARDS:
        raise UnsafeFileError(f"its index lists {len(result)} shards")
    missing = [name for name in result if not (found[0].parent / name).is_file()]
    if missing:
        raise UnsafeFileError(
            f"{len(missing)} of its {len(result)} shards are missing ({quote(missing[0])})"
        )
    return result


def _folder_kind(path: Path) -> str:
    names = sorted(os.listdir(path))
    for name, what in _FOLDERS:
        if name in names:
            return f"it is {what}"
    weights = [name for name in names if name.endswith(_WEIGHTS)]
    give = f"; give a file in it, such as {quote(weights[0])}" if weights else ""
    if "config.json" in names:
        try:
            about = records.read(path / "config.json", dict)
        except records.RecordError:
            about = {}
        kind = about.get("_class_name") or about.get("model_type") or about.get("architectures")
        kind = kind[0] if isinstance(kind, list) and kind else kind
        if kind == "UNet2DModel":
            return "it is the folder of a U-Net of diffusers without texts, which is not offered"
        said = f" {quote(kind)}" if isinstance(kind, str) else ""
        return f"it is the folder of a model{said} of diffusers or transformers{give}"
    return f"it is a folder{give or ' without a checkpoint'}"
