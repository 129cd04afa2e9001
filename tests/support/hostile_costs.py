"""Small checkpoints that would take far more memory or time than their size, as hostile.table has
them.
"""

import io
import struct
import zipfile

import numpy as np

from tests.support import torch_files as tf
from tests.support.torch_files import (
    Book,
    Call,
    Name,
    legacy_file,
    safetensors_file,
    view,
    zip_file,
)

LINEAR = tf.emit(Name("torch.nn.modules.linear", "Linear"))


def _again(function: Name, args: tuple, count: int) -> bytes:
    """A pickle that writes a call's arguments once and makes the call count times."""
    return (
        b"\x80\x04"
        + tf.emit(function)
        + b"\x94"
        + tf.emit(args)
        + b"\x94("
        + b"h\x00h\x01R" * count
        + b"l."
    )


def _sharing(modules: int, tensors: int) -> bytes:
    """A module of modules that all have one dictionary of parameters."""
    parameters = b"}(" + b"".join(tf.emit(str(i)) + b"h\x00" for i in range(tensors)) + b"u"
    shared = (
        tf.emit(tf.pickled_tensor(np.ones(16, np.float32))),
        parameters,
        tf.emit("_parameters"),
        LINEAR,
    )
    memo = b"".join(value + b"\x940" for value in shared)
    parts = (tf.emit(str(i)) + b"h\x03)\x81}h\x02h\x01sb" for i in range(modules))
    return (
        b"\x80\x04"
        + memo
        + b"h\x03)\x81}"
        + tf.emit("_modules")
        + b"}("
        + b"".join(parts)
        + b"usb."
    )


def costly() -> dict[str, tuple[bytes, str]]:
    """Small files that would take far more memory or time than their size."""
    book, ones = Book(), np.ones(16, np.float32)
    lists = b"".join(
        b"](h%ch%ce\x94" % (i, i) for i in range(40)
    )  # each has the one before it twice
    device = b"\x80\x04K\x01\x94" + lists + tf.emit(Name("torch", "device")) + b"h\x28\x85R."
    pairs = [(str(i), i) for i in range(5000)]
    buffer = (b"\0" * 100_000, Call(Name("numpy", "dtype"), ("f4", False, True)), (25_000,), "C")
    module = LINEAR + b")\x81\x94}" + tf.emit("_modules") + b"}("
    itself = module + b"".join(tf.emit(str(i)) + b"h\x00" for i in range(40_000)) + b"usb"
    deep = b"\x80\x04" + tf.emit("n" * 200_000) + b"\x940" + LINEAR + b"\x940"
    deep += (b"h\x01)\x81}" + tf.emit("_modules") + b"}h\x00") * 60 + b"N" + b"ssb" * 60 + b"."
    nested = legacy_file(book.storage(ones), book)
    nested = nested[:2] + b"N0" * 60_000 + nested[2:]
    prime = 2**61 - 1
    keys = b"\x80\x04}(" + b"".join(tf.emit(prime * i) + b"N" for i in range(1, 20_000)) + b"u."
    memo = b"\x80\x04N" + b"".join(b"p%d\n" % (prime * i) for i in range(1, 20_000)) + b"."
    part = b"}(" + b"".join(tf.emit(i) + b"N" for i in range(20_000)) + b"u\x940"
    parts = (
        b"\x80\x04" + part + b"}(" + b"".join(tf.emit(i) + b"h\x00" for i in range(20_000)) + b"u."
    )
    calls = (
        b"\x80\x04"
        + tf.emit("torch.nn.modules." + "a" * 100_000)
        + b"\x940"
        + tf.emit("Linear")
        + b"\x940("
    )
    wide = b"\x80\x04}\x940" + tf.emit("k" * 500) + b"\x940" + b"}h\x01" * 9
    wide += b"(" + b"h\x00" * 50_000 + b"l" + b"s" * 9 + b"."
    flood = {f"{i}.enc.4x4_conv.weight": book.tensor(ones) for i in range(200)}
    return {
        "paths_of_children.pkl": (wide, "contents unfold"),
        "prefixes.pt": (zip_file(flood, book), "known networks lie under 200 prefixes"),
        "device_of_lists.pkl": (device, "a torch.device is something else"),
        "latin1_again.pkl": (
            _again(Name("_codecs", "encode"), ("x" * 100_000, "latin1"), 2000),
            "contents unfold",
        ),
        "frombuffer_again.pkl": (
            _again(Name("numpy.core.numeric", "_frombuffer"), buffer, 2000),
            "contents unfold",
        ),
        "ordered_dict_again.pkl": (
            _again(Name("collections", "OrderedDict"), (pairs,), 1000),
            "contents unfold",
        ),
        "set_again.pkl": (
            _again(Name("builtins", "set"), ([*range(5000)],), 1000),
            "contents unfold",
        ),
        "children_of_itself.pkl": (b"\x80\x04" + itself + b".", "nested too deeply or in a circle"),
        "long_module_names.pkl": (deep, "by name of at most 512 letters"),
        "modules_share_parameters.pkl": (_sharing(10_000, 10_000), "or more than 50000"),
        "long_global.pkl": (calls + b"h\x00h\x01\x93" * 2000 + b"l.", "contents unfold"),
        "nested_instructions.pkl": (
            _again(Name("torch.storage", "_load_from_bytes"), (nested,), 40),
            "more than 1000000 instructions",
        ),
        "colliding_keys.pkl": (keys, "more than 64 bits as a key"),
        "colliding_memo.pkl": (memo, "a wrong memo entry"),
        "one_part_often.pkl": (parts, "no dictionary of tensors"),
        "tensor_of_nothing.pt": (
            zip_file({"w": view(book.storage(ones), 0, (0, 2**47, 2**47), (0, 0, 0))}, book),
            "impossible shape",
        ),
        "overlapping_members.pt": (_overlapping(3000, b"\0" * 1_000_000), "its members overlap"),
        "members_of_nothing.pt": (_overlapping(40_000, b""), "contents unfold"),
        "header_of_pairs.safetensors": (
            safetensors_file(b'{%b"":0}' % (b'"":0,' * 1_200_000)),
            "contents unfold",
        ),
        "header_of_nothing.safetensors": (
            safetensors_file(
                {"a": {"dtype": "F32", "shape": [0, 2**47, 2**47], "data_offsets": [0, 0]}}, b""
            ),
            "impossible shape",
        ),
    }


def _overlapping(count: int, content: bytes) -> bytes:
    """An archive whose directory names one stored member count times."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(zipfile.ZipInfo("00000"), content)
    whole = out.getvalue()
    at, end = whole.index(b"PK\x01\x02"), whole.index(b"PK\x05\x06")
    head = whole[at : at + 46]
    directory = b"".join(head + b"%05d" % i for i in range(count))
    return (
        whole[:at]
        + directory
        + whole[end : end + 8]
        + struct.pack("<HHIIH", count, count, len(directory), at, 0)
    )
