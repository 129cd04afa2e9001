"""Malicious and damaged checkpoints: name -> (bytes, a fragment of the sentence that refuses them).

`python -m tests.support.hostile` prints a table: file, peak memory and time of reading it, exit code of the
command line, sentence.
"""

import io
import json
import pickle
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tests.support import torch_files as tf
from tests.support.hostile_costs import costly
from tests.support.torch_files import (
    Book,
    Call,
    Name,
    Raw,
    Reference,
    legacy_file,
    pickled,
    safetensors_file,
    view,
    zip_file,
)

ONES = np.ones(16, np.float32)


def _zip(root, **keywords) -> bytes:
    return zip_file(root, Book(), **keywords)


def _with_tensor(make, write=zip_file) -> bytes:
    """A file whose one tensor is make(storage of 16 floats)."""
    book = Book()
    return write({"w": make(book.storage(ONES))}, book)


def _good(write=zip_file) -> bytes:
    book = Book()
    return write({"w": book.tensor(ONES), "v": book.tensor(np.arange(6.0).reshape(2, 3))}, book)


def _rewritten(change) -> bytes:
    """A good archive whose members pass through change(name, data) -> (name, data)."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_good())) as source, zipfile.ZipFile(out, "w") as target:
        for info in source.infolist():
            name, data = change(info.filename, source.read(info))
            target.writestr(zipfile.ZipInfo(name), data)
    return out.getvalue()


def code() -> dict[str, tuple[bytes, str]]:
    """Files that ask for code."""
    calls = {
        "os.system": ("os", "system", ("touch executed",)),
        "posix.system": ("posix", "system", ("touch executed",)),
        "builtins.eval": ("builtins", "eval", ("open('executed','w')",)),
        "builtins.exec": ("__builtin__", "exec", ("open('executed','w')",)),
        "builtins.getattr": ("builtins", "getattr", ({}, "clear")),
        "io.open": ("io", "open", ("executed", "w")),
        "subprocess.Popen": ("subprocess", "Popen", (["touch", "executed"],)),
        "importlib.import_module": ("importlib", "import_module", ("this",)),
        "torch.load": ("torch", "load", ("x",)),
        "torch.hub.load": ("torch.hub", "load", ("x", "y")),
        "torch._utils._rebuild_device_tensor_from_numpy": (
            "torch._utils",
            "_rebuild_device_tensor_from_numpy",
            (),
        ),
        "torch.nn.modules.module._dunder.__init__.x": (
            "torch.nn.modules.module._dunder.__init__",
            "x",
            (),
        ),
        "numpy.load": ("numpy", "load", ("x",)),
        "numpy.core.multiarray.fromfile": ("numpy.core.multiarray", "fromfile", ("/etc/passwd",)),
        "copyreg._reconstructor": (
            "copy_reg",
            "_reconstructor",
            (Name("os", "system"), None, None),
        ),
        "torch_utils.persistence.import_hook": ("torch_utils.persistence", "import_hook", ()),
        "pickle.loads": ("pickle", "loads", (pickled(1),)),
    }
    cases = {}
    for full, (module, name, args) in calls.items():
        call = Call(Name(module, name), args)
        named = "os.system" if full == "copyreg._reconstructor" else full
        cases[f"{full}.pkl"] = (pickled({"w": call}), f"it names {named},")
    evil = Call(Name("os", "system"), ("touch executed",))
    book = Book()
    nested = Raw(legacy_file(evil, book))
    deeper = tf.legacy_storage(ONES)
    cases |= {
        "zip_os_system.pt": (_zip({"w": evil}), "it names os.system,"),
        "legacy_os_system.pth": (legacy_file({"w": evil}, book), "it names os.system,"),
        "legacy_system_info.pth": (
            pickled(tf.MAGIC) + pickled(tf.VERSION) + pickled(evil),
            "it names os.system,",
        ),
        "stack_global.pkl": (
            b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.",
            "it names os.system,",
        ),
        "standard_reduce.pkl": (pickle.dumps(_Evil()), "which is not among"),
        "inst.pkl": (b"\x80\x02(U\x02idios\nsystem\n.", "INST"),
        "obj.pkl": (b"\x80\x02(cos\nsystem\nU\x02ido.", "it names os.system,"),
        "obj_of_admitted.pkl": (b"\x80\x02(ccollections\nOrderedDict\no.", "OBJ"),
        "extension.pkl": (b"\x80\x02\x82\x01.", "EXT1"),
        "text_reference.pkl": (b"\x80\x02Pstorage\n.", "PERSID"),
        "out_of_band.pkl": (b"\x80\x05\x97.", "NEXT_BUFFER"),
        "protocol_9.pkl": (b"\x80\x09N.", "protocol 9"),
        "reduce_a_string.pkl": (pickled(Call("os.system", ("x",))), "not admitted as a function"),
        "new_of_a_function.pkl": (
            pickled(Call(Name("_codecs", "encode"), ("x", "latin1"), new=True)),
            "as a class",
        ),
        "codec.pkl": (
            pickled(Call(Name("_codecs", "encode"), ("x", "zlib"))),
            "encodes a text as zlib",
        ),
        "set_state_of_a_function.pkl": (
            pickled(Raw(tf.emit(Name("_codecs", "encode")) + b"}b")),
            "gives a state",
        ),
        "set_state_of_a_list.pkl": (b"\x80\x02]}b.", "gives a state"),
        "object_dtype.pkl": (
            pickled({"w": Call(Name("numpy", "dtype"), ("O8", False, True))}),
            "no dictionary of tensors",
        ),
        "numpy_pickle_inside.pkl": (
            pickle.dumps({"w": np.array([_Evil()], dtype=object)}),
            "cannot be read",
        ),
        "torchscript.pt": (
            _zip({"w": 1}, extra={"archive/constants.pkl": pickled(())}),
            "TorchScript",
        ),
        "torchscript_class.pt": (
            _zip({"w": Call(Name("__torch__.x", "Net"), (), new=True)}),
            "it names __torch__.x.Net,",
        ),
        "nested_os_system.pkl": (
            pickled(
                {
                    "w": view(
                        Call(Name("torch.storage", "_load_from_bytes"), (nested.code,)),
                        0,
                        (16,),
                        (1,),
                    )
                }
            ),
            "it names os.system,",
        ),
        "nested_in_nested.pkl": (
            pickled(
                {
                    "w": Call(
                        Name("torch.storage", "_load_from_bytes"), (legacy_file(deeper, Book()),)
                    )
                }
            ),
            "holds another nested storage",
        ),
        "nested_zip.pkl": (
            pickled({"w": Call(Name("torch.storage", "_load_from_bytes"), (_good(),))}),
            "cannot be read",
        ),
        "persistence_of_module.pkl": (
            pickled(
                Call(
                    Name("torch_utils.persistence", "_reconstruct_persistent_obj"),
                    ({"type": "module"},),
                )
            ),
            "does not describe a class",
        ),
    }
    return cases


class _Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch executed",)


def sizes() -> dict[str, tuple[bytes, str]]:
    """Files whose sizes contradict each other, or ask for far more memory than they have bytes."""
    huge = 2**40
    reference = ("storage", Name("torch", "FloatStorage"), "0", "cpu", huge)
    laughs = b"\x80\x04)\x94" + b"\x86\x94".join(b"" for _ in range(1))
    for i in range(200):  # tuple i holds tuple i - 1 twice: hashing the last would take 2^200 steps
        laughs += b"h" + bytes([i % 256]) + b"h" + bytes([i % 256]) + b"\x86\x94"
    modules = Raw(tf.emit(Name("torch.nn.modules.container", "Sequential")) + b")\x81")
    chain = tf.emit(modules) + b"\x94"
    for i in range(60):  # module i has module i - 1 twice: 2^60 tensors by name
        again = b"h" + bytes([i])
        children = (
            b"}("
            + tf.emit("_modules")
            + b"}("
            + tf.emit("a")
            + again
            + tf.emit("b")
            + again
            + b"uu"
        )
        chain += tf.emit(modules) + children + b"b\x94"
    circle = tf.emit(modules) + b"\x94}(" + tf.emit("_modules") + b"}(" + tf.emit("a") + b"h\x00uub"
    many = Book()
    big = many.storage(np.zeros(1 << 16, np.float32))
    return {
        "storage_missing.pt": (
            _zip({"w": view(Reference(reference), 0, (4,), (1,))}),
            "missing from the archive",
        ),
        "storage_key_outside.pt": (
            _zip(
                {
                    "w": view(
                        Reference((*reference[:2], "../../../etc/passwd", "cpu", 4)), 0, (4,), (1,)
                    )
                }
            ),
            "is missing from the archive",
        ),
        "storage_short.pt": (
            _rewritten(lambda n, d: (n, d[:-4] if n.endswith("/0") else d)),
            "of 16 float32 numbers has 60",
        ),
        "storage_huge.pth": (
            legacy_file({"w": view(Reference(reference), 0, (4,), (1,))}, Book()),
            "list of storages does not match",
        ),
        "storage_type.pt": (
            _zip({"w": view(Reference(("storage", "x", "0", "cpu", 4)), 0, (4,), (1,))}),
            "else than a storage",
        ),
        "storage_negative.pt": (
            _zip({"w": view(Reference((*reference[:4], -4)), 0, (4,), (1,))}),
            "no sensible size",
        ),
        "tensor_too_long.pt": (
            _with_tensor(lambda s: view(s, 0, (17,), (1,))),
            "reaches element 16 of a storage of 16",
        ),
        "tensor_offset.pt": (
            _with_tensor(lambda s: view(s, 9, (2, 4), (4, 1))),
            "reaches element 16",
        ),
        "tensor_strides.pth": (
            _with_tensor(lambda s: view(s, 0, (4, 4), (8, 1)), legacy_file),
            "reaches element 27",
        ),
        "tensor_negative_size.pt": (
            _with_tensor(lambda s: view(s, 0, (-4,), (1,))),
            "shape other than",
        ),
        "tensor_negative_stride.pt": (
            _with_tensor(lambda s: view(s, 15, (4,), (-1,))),
            "strides other than",
        ),
        "tensor_bool_size.pt": (
            _with_tensor(lambda s: view(s, 0, (True,), (1,))),
            "shape other than",
        ),
        "tensor_ranks.pt": (
            _with_tensor(lambda s: view(s, 0, (4, 4), (1,))),
            "2 sizes and 1 strides",
        ),
        "tensor_rank_500.pt": (
            _with_tensor(lambda s: view(s, 0, (1,) * 500, (1,) * 500)),
            "at most 32 whole numbers",
        ),
        "tensor_expanded.pt": (
            _with_tensor(lambda s: view(s, 0, (huge,), (0,))),
            "unfold to more than 4 times",
        ),
        "tensor_expanded_often.pt": (
            zip_file({str(i): view(big, i, (1 << 15,), (1,)) for i in range(400)}, many),
            "unfold to more than 4 times",
        ),
        "tensor_of_text.pt": (
            _with_tensor(lambda s: view("storage", 0, (4,), (1,))),
            "storage of a tensor has the type str",
        ),
        "bytes_huge.pkl": (
            b"\x80\x04\x8e" + struct.pack("<Q", huge) + b"x.",
            "lies about a length",
        ),
        "text_huge.pkl": (
            b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b"x.",
            "lies about a length",
        ),
        "bytearray_huge.pkl": (
            b"\x80\x05\x96" + struct.pack("<Q", huge) + b"x.",
            "lies about a length",
        ),
        "integer_huge.pkl": (
            b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x" * 4096 + b".",
            "an integer of",
        ),
        "integer_negative_length.pkl": (
            b"\x80\x02\x8b" + struct.pack("<i", -5) + b"xxxxx.",
            "an integer of -5 bytes",
        ),
        "integer_digits.pkl": (b"\x80\x02L" + b"9" * 4000 + b"L\n.", "an integer of 4001 digits"),
        "memo_huge.pkl": (
            b"\x80\x04Nr" + struct.pack("<I", 2**32 - 1) + b"j" + struct.pack("<I", 7) + b".",
            "no operand",
        ),
        "key_of_tuples.pkl": (laughs + b"}\x94h\xc8K\x01s.", "a key of type tuple"),
        "modules_doubling.pkl": (b"\x80\x04" + chain + b".", "nested too deeply or in a circle"),
        "modules_in_a_circle.pkl": (
            b"\x80\x04" + circle + b".",
            "nested too deeply or in a circle",
        ),
        "nesting.pkl": (b"\x80\x04N" + b"\x85" * 300_000 + b".", "no dictionary of tensors"),
        "instructions.pkl": (
            b"\x80\x04" + b"N0" * 600_000 + b".",
            "more than 1000000 instructions",
        ),
        "marks.pkl": (b"\x80\x04" + b"(" * 100_000 + b"1" * 100_001 + b".", "a mark is missing"),
        "empty_stack.pkl": (b"\x80\x04........", "no operand"),
        "odd_items.pkl": (b"\x80\x04}(K\x01K\x02K\x03u.", "a key has no value"),
        "items_of_a_number.pkl": (b"\x80\x04K\x01(K\x02K\x03u.", "adds named items"),
        "append_to_a_number.pkl": (b"\x80\x04K\x01K\x02a.....", "adds items"),
        "no_stop.pkl": (b"\x80\x04NNNNNNNN", "truncated"),
    }


def containers() -> dict[str, tuple[bytes, str]]:
    """Damaged or deceptive archives and headers."""
    zeros = b"\0" * 50_000_000
    twice = io.BytesIO()
    with zipfile.ZipFile(twice, "w") as archive:
        for _ in range(2):
            archive.filelist.append(
                zipfile.ZipInfo("x")
            )  # so that the second one raises no warning here
            archive.filelist.pop()
            archive.writestr(zipfile.ZipInfo("archive/data.pkl"), pickled({}))
            archive.NameToInfo.clear()
    flipped = bytearray(_good())
    flipped[flipped.index(ONES.tobytes())] ^= 1
    encrypted = bytearray(_good())
    encrypted[encrypted.rindex(b"PK\x01\x02") + 8] |= 1
    moved = bytearray(_good())
    at = moved.index(b"PK\x01\x02") + 42
    moved[at : at + 4] = struct.pack("<I", len(moved) - 10)

    def renamed(name):
        return _rewritten(lambda n, d: (name if n.endswith("/0") else n, d))

    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return {
        "zip_bomb.pt": (
            _zip({"w": 1}, extra={"archive/data/0": zeros}, compress=True),
            "is compressed",
        ),
        "deflated.pt": (zip_file({"w": 1}, Book(), compress=True), "is compressed"),
        "traversal.pt": (renamed("../../../tmp/0"), "points outside the archive"),
        "absolute.pt": (renamed("/tmp/0"), "points outside the archive"),
        "drive.pt": (renamed("C:/tmp/0"), "points outside the archive"),
        "backslash.pt": (renamed("archive\\..\\..\\0"), "points outside the archive"),
        "twice.pt": (twice.getvalue(), "occurs twice"),
        "checksum.pt": (bytes(flipped), "does not match its checksum"),
        "encrypted.pt": (bytes(encrypted), "encrypted"),
        "moved_header.pt": (bytes(moved), "cannot be read"),
        "no_pickle.pt": (
            _rewritten(lambda n, d: (n.replace("data.pkl", "other"), d)),
            "0 data.pkl members",
        ),
        "archive_in_archive.pt": (
            _rewritten(lambda n, d: (f"archive/{n}", d)),
            "0 data.pkl members",
        ),
        "two_pickles.pt": (_zip({"w": 1}, extra={"data.pkl": pickled({})}), "2 data.pkl members"),
        "byteorder.pt": (
            _rewritten(lambda n, d: (n, b"middle" if n.endswith("byteorder") else d)),
            "byteorder",
        ),
        "trailing.pkl": (
            pickled({}) + pickled(Call(Name("os", "system"), ("x",))),
            "bytes follow the end",
        ),
        "trailing.pth": (_good(legacy_file) + b"12345678", "bytes follow the end"),
        "empty.pt": (b"", "it is empty"),
        "text.pt": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        "html.pt": (b"<!DOCTYPE html><html>Sign in</html>", "a saved web page"),
        "gzip.pt": (b"\x1f\x8b" + b"\0" * 30, "gzip-compressed"),
        "lone_tensor.pkl": (pickled(tf.pickled_tensor(ONES)), "no dictionary of tensors"),
        "header_long.safetensors": (struct.pack("<Q", 2**62) + b"{}" + b" " * 20, "unknown kind"),
        "header_not_json.safetensors": (safetensors_file(b'{"a": nonsense}'), "not valid JSON"),
        "header_deep.safetensors": (
            safetensors_file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
            "not valid JSON",
        ),
        "header_twice.safetensors": (
            safetensors_file(b'{"a":%b,"a":%b}' % ((json.dumps(entry).encode(),) * 2)),
            "something twice",
        ),
        "header_type.safetensors": (
            safetensors_file({"a": entry | {"dtype": "OBJECT"}}),
            "lacks a known dtype",
        ),
        "header_shape.safetensors": (
            safetensors_file({"a": entry | {"shape": [2**20, 2**20]}}),
            "does not fit",
        ),
        "header_negative.safetensors": (
            safetensors_file({"a": entry | {"shape": [-1, -2]}}),
            "impossible sizes",
        ),
        "header_outside.safetensors": (
            safetensors_file({"a": entry | {"data_offsets": [2**33, 2**33 + 8]}}),
            "does not fit",
        ),
        "overlap.safetensors": (safetensors_file({"a": entry, "b": entry}), "overlap"),
        "gap.safetensors": (
            safetensors_file({"a": entry | {"data_offsets": [4, 12]}}, b"\0" * 12),
            "overlap or leave a gap",
        ),
        "left_over.safetensors": (
            safetensors_file({"a": entry}, b"\0" * 20),
            "bytes follow its last tensor",
        ),
    }


def table() -> dict[str, tuple[bytes, str]]:
    return code() | sizes() | containers() | costly()


def unrecognised() -> dict[str, dict[str, np.ndarray]]:
    """State dicts whose names look like a known network's and whose tensors are not its."""

    def zeros(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
        return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}

    conv, layer, block = "enc.8x8_conv.weight", "map_layer0.weight", "enc.8x8_block0.conv0.weight"
    edm = zeros(
        **{
            conv: (8, 1, 3, 3),
            layer: (32, 8),
            block: (8, 8, 3, 3),
            "enc.8x8_block0.conv1.weight": (8, 8, 3, 3),
        }
    )
    edm |= zeros(**{"dec.8x8_aux_conv.weight": (1, 8, 3, 3)})
    adm = {
        "time_embed.0.weight": (32, 8),
        "input_blocks.0.0.weight": (8, 1, 3, 3),
        "input_blocks.1.0.x": (1,),
    }
    adm = zeros(
        **adm, **{"output_blocks.0.0.in_layers.0.weight": (8,), "out.2.weight": (1, 8, 3, 3)}
    )
    first, mapping = "b8.fromrgb.weight", {"mapping.embed.weight": (8, 2), "b4.out.weight": (1, 8)}
    inception = {"Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3)}
    taps, row = "enc.8x8_block0.resample_filter", zeros(x=(1, 1, 1, 100_000))["x"] + 1
    return {
        "no_first_conv": edm
        | zeros(**{"enc.8x16_conv.weight": (8, 1, 3, 3), "enc.16x16_block0.norm0.weight": (8,)}),
        "conv_of_no_dimension": edm | zeros(**{conv: ()}),
        "conv_of_one_dimension": edm | zeros(**{conv: (8,)}),
        "layer_of_one_dimension": edm | zeros(**{layer: (8,)}),
        "layer_of_no_width": edm | zeros(**{layer: (32, 0), conv: (0, 1, 3, 3)}),
        "filter_of_one_dimension": edm | zeros(**{taps: (4,)}),
        "filter_of_one_row": edm | {taps: row},
        "label_of_one_dimension": edm | zeros(**{"map_label.weight": (8,)}),
        "side_of_many_digits": zeros(
            **{f"enc.{'9' * 100}x{'9' * 100}_conv.weight": (8, 1, 3, 3), layer: (32, 8)}
        ),
        "no_blocks": edm | {"enc.4x4_conv.weight": edm[conv]},
        "adm_embedding_of_no_dimension": adm | zeros(**{"time_embed.0.weight": ()}),
        "adm_embedding_of_no_width": adm | zeros(**{"time_embed.0.weight": (32, 0)}),
        "adm_out_of_no_dimension": adm | zeros(**{"out.2.weight": ()}),
        "encoder_of_positions": zeros(
            **{
                "time_embed.0.weight": (32, 8),
                "input_blocks.0.0.weight": (8, 1, 3, 3),
                "out.2.positional_embedding": (5,),
            }
        ),
        "discriminator_without_a_block": zeros(**mapping, **{first: (8, 1, 1, 1)}),
        "discriminator_of_no_dimension": zeros(**mapping, **{first: (), "b8.conv0.weight": ()}),
        "discriminator_without_a_side": zeros(**mapping, **{"bx.fromrgb.weight": (8, 1, 1, 1)}),
        "inception_bias_of_no_dimension": zeros(**inception, **{"fc.bias": ()}),
        "escape\x1b[2J": zeros(**{"\x1b[2J\nb": (2,), "a": (1,)}),
    }


_READER = """
import json, os, resource, sys
from ogdm_jax.interop import read_torch
for name in sys.argv[2:]:
    if os.fork():
        os.wait()
        continue
    for healthy in os.scandir(sys.argv[1]):
        read_torch(healthy.path)
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    before, said = resource.getrusage(resource.RUSAGE_SELF), None
    try:
        read_torch(name)
    except ValueError as error:
        said = str(error)
    after = resource.getrusage(resource.RUSAGE_SELF)
    peak = 1024 * (after.ru_maxrss - before.ru_maxrss)
    print(json.dumps([name, said, peak, after.ru_utime - before.ru_utime]), flush=True)
    os._exit(0)
"""


def read_apart(folder: Path, names: Iterable[str]) -> dict[str, tuple[str, int, float]]:
    """name -> (sentence, peak memory beyond the program's own in bytes, seconds): every file in a
    process of its own.

    A process's peak never falls, so one process cannot measure several files. Each reads healthy
    files first: what the reader's own code takes when it first runs (pages of the interpreter, some
      MB) is the program's. Linux only.
    """
    with tempfile.TemporaryDirectory() as healthy:
        for name, data in good().items():
            (Path(healthy) / name).write_bytes(data)
        done = subprocess.run(
            [sys.executable, "-c", _READER, healthy, *names],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=300,
        )
    rows = map(json.loads, done.stdout.splitlines())
    return {name: (said, peak, seconds) for name, said, peak, seconds in rows}


def good() -> dict[str, bytes]:
    """Small healthy files of every layout, for truncation and fuzzing."""
    snapshot = tf.network(
        {"model.a.weight": ONES.reshape(4, 4), "u": ONES}, tf.pickled_tensor, x=np.float64(2).item()
    )
    text = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    return {
        "good.pt": _good(),
        "good.pth": _good(legacy_file),
        "good.pkl": pickled({"ema": snapshot}),
        "numpy.pkl": pickle.dumps({"w": np.arange(4.0), "s": np.float32(1)}),
        "good.safetensors": struct.pack("<Q", len(text)) + text + b"\0" * 8,
    }


def main() -> None:
    import contextlib

    from safetensors.numpy import save_file

    from ogdm_jax.cli import convert

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for name, (data, _) in table().items():
            Path(name).write_bytes(data)
        odd = [f"unrecognised_{i}.safetensors" for i in range(len(unrecognised()))]
        for name, state in zip(odd, unrecognised().values(), strict=True):
            save_file(state, name)
        names = [*table(), *odd]
        measured = read_apart(Path(folder), names)
        print(
            "| file | bytes | peak kB | seconds | exit code | sentence |\n|---|---|---|---|---|---|"
        )
        for name in names:
            said = io.StringIO()
            try:
                with contextlib.redirect_stderr(said):
                    code = convert.main([name, "--out", "made"])
            except SystemExit as stop:
                code = stop.code
            assert not Path("executed").exists() and not Path("made").exists()
            _, peak, seconds = measured[name]
            figures = f"{Path(name).stat().st_size} | {peak / 1000:.0f} | {seconds:.2f} | {code}"
            print(f"| {name} | {figures} | {said.getvalue().strip()} |", flush=True)


if __name__ == "__main__":
    main()
