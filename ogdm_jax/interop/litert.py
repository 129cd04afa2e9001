"""Reads the network of a LiteRT (TensorFlow Lite) file: a FlatBuffer of tables, nothing in it runs.

The layout is that of tensorflow/lite's schema, version 3. A table is an offset to its own list of
offsets, one for each field that is set; every position is checked against the file.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from ogdm_jax.interop.inert import UnsafeFileError
from ogdm_jax.networks.lite_graph import Graph, Op, refusal

MAX_OPS = 10_000
_TYPES: Mapping[int, type] = {0: np.float32, 1: np.float16, 2: np.int32}
_NAMES = {
    0: "ADD",
    1: "AVERAGE_POOL_2D",
    3: "CONV_2D",
    4: "DEPTHWISE_CONV_2D",
    6: "DEQUANTIZE",
    14: "LOGISTIC",
    18: "MUL",
    19: "RELU",
    23: "RESIZE_BILINEAR",
    40: "MEAN",
    117: "HARD_SWISH",
}
_CUSTOM = 32
# fields of each operation's options: (name, number of the field, struct's letter, default)
_STRIDES = (("padding", 0, "b", 0), ("stride_w", 1, "i", 0), ("stride_h", 2, "i", 0))
_OPTIONS: Mapping[str, tuple[tuple[str, int, str, int], ...]] = {
    "ADD": (("activation", 0, "b", 0),),
    "MUL": (("activation", 0, "b", 0),),
    "MEAN": (("keep_dims", 0, "b", 0),),
    "RESIZE_BILINEAR": (("align_corners", 2, "b", 0), ("half_pixel", 3, "b", 0)),
    "CONV_2D": (
        *_STRIDES,
        ("activation", 3, "b", 0),
        ("dilation_w", 4, "i", 1),
        ("dilation_h", 5, "i", 1),
    ),
    "DEPTHWISE_CONV_2D": (
        *_STRIDES,
        ("depth_multiplier", 3, "i", 0),
        ("activation", 4, "b", 0),
        ("dilation_w", 5, "i", 1),
        ("dilation_h", 6, "i", 1),
    ),
    "AVERAGE_POOL_2D": (
        *_STRIDES,
        ("filter_w", 3, "i", 0),
        ("filter_h", 4, "i", 0),
        ("activation", 5, "b", 0),
    ),
}


class _Table(NamedTuple):
    """A table of a FlatBuffer, at a position of the file."""

    data: bytes
    at: int

    def _read(self, letter: str, at: int) -> int:
        if at < 0:
            raise UnsafeFileError("it points in front of its beginning")
        return struct.unpack_from("<" + letter, self.data, at)[0]

    def _field(self, number: int) -> int:
        """Where a field is; 0: not set."""
        table = self.at - self._read("i", self.at)
        if 4 + 2 * number >= self._read("H", table):
            return 0
        offset = self._read("H", table + 4 + 2 * number)
        return self.at + offset if offset else 0

    def scalar(self, number: int, letter: str, default: int = 0) -> int:
        at = self._field(number)
        return self._read(letter, at) if at else default

    def table(self, number: int) -> "_Table | None":
        at = self._field(number)
        return _Table(self.data, at + self._read("I", at)) if at else None

    def vector(self, number: int, letter: str) -> np.ndarray:
        """The numbers of a vector of scalars; none where it is not set."""
        at = self._field(number)
        if not at:
            return np.zeros(0, letter)
        start = at + self._read("I", at)
        return np.frombuffer(self.data, "<" + letter, self._read("I", start), start + 4)

    def tables(self, number: int) -> list["_Table"]:
        at = self._field(number)
        start = at + self._read("I", at) + 4 if at else 0
        offsets = self.vector(number, "u4").tolist()
        return [_Table(self.data, start + 4 * i + offset) for i, offset in enumerate(offsets)]


def read_litert(data: bytes) -> tuple[Graph, dict[str, np.ndarray]]:
    """The graph and the float32 constants of a network of one image, for `lite_graph.run`.

    Constants in half precision are widened. Only floating-point networks are read.

    Raises:
      UnsafeFileError: no LiteRT file, positions outside of it, several inputs or outputs, or an
        operation or a type that is not known here; the text completes a sentence about the file.
    """
    if data[4:8] != b"TFL3":
        raise UnsafeFileError("it is no LiteRT (.tflite) file")
    try:
        return _read(data)
    except (struct.error, ValueError, IndexError, KeyError, OverflowError) as error:
        if isinstance(error, UnsafeFileError):
            raise
        raise UnsafeFileError(f"its tables contradict each other ({str(error)[:80]})") from None


def _read(data: bytes) -> tuple[Graph, dict[str, np.ndarray]]:
    model = _Table(data, struct.unpack_from("<I", data, 0)[0])
    graphs = model.tables(2)
    inputs, outputs = (graphs[0].vector(i, "i4").tolist() for i in (1, 2))
    tensors, operators = graphs[0].tables(0), graphs[0].tables(3)
    if len(graphs) != 1 or len(inputs) != 1 or len(outputs) != 1 or len(operators) > MAX_OPS:
        raise UnsafeFileError("it is no network of one image and one result")
    constants = {str(i): value for i, value in _constants(model.tables(4), tensors)}
    codes = model.tables(1)
    ops = []
    for table in operators:
        code = codes[table.scalar(0, "I")]
        op = _operation(table, max(code.scalar(0, "b"), code.scalar(3, "i")), code)
        if op.kind == "DEQUANTIZE" and str(op.inputs[0]) in constants:
            constants[str(op.output)] = constants.pop(str(op.inputs[0])).astype(np.float32)
            continue
        sizes = [i for i in op.inputs if constants.get(str(i), np.zeros(0)).dtype == np.int32]
        if sizes:
            numbers = tuple(int(v) for i in sizes for v in constants[str(i)].ravel())
            op = op._replace(inputs=tuple(i for i in op.inputs if i not in sizes), sizes=numbers)
        if reason := refusal(op, constants):
            raise UnsafeFileError(f"its operation {len(ops)}, {op.kind}, {reason}")
        ops.append(op)
    shape = tuple(tensors[inputs[0]].vector(0, "i4").tolist())
    if len(shape) != 4 or shape[0] != 1 or shape[3] != 3 or min(shape) < 1:
        raise UnsafeFileError(f"its input has shape {shape} and is no colour image")
    used = {str(i) for op in ops for i in op.inputs}
    kept = {name: value for name, value in constants.items() if name in used}
    return Graph(tuple(ops), inputs[0], outputs[0], shape[1:]), kept


def _constants(buffers: list[_Table], tensors: list[_Table]) -> Iterator[tuple[int, np.ndarray]]:
    """(number, array) of each tensor whose numbers are in the file."""
    for i, tensor in enumerate(tensors):
        content = buffers[tensor.scalar(2, "I")].vector(0, "u1")
        if not content.size:
            continue
        kind = tensor.scalar(1, "b")
        if kind not in _TYPES:
            raise UnsafeFileError(f"its array {i} is of type {kind}; only float networks are read")
        shape = tensor.vector(0, "i4").tolist()
        if min(shape, default=1) < 0 or math.prod(shape) * np.dtype(_TYPES[kind]).itemsize != (
            content.size
        ):
            raise UnsafeFileError(f"its array {i} of shape {shape} has {content.size} bytes")
        yield i, content.view(np.dtype(_TYPES[kind]).newbyteorder("<")).reshape(shape)


def _operation(table: _Table, builtin: int, code: _Table) -> Op:
    """An operation without what its constants say."""
    options: dict[str, int] = {}
    if builtin == _CUSTOM:
        kind = bytes(code.vector(1, "u1")).decode("ascii", "replace")
        content = table.vector(5, "u1").tobytes()
        if kind == "Convolution2DTransposeBias":
            options = dict(
                zip(("padding", "stride_w", "stride_h"), struct.unpack_from("<3i", content))
            )
    else:
        kind, own = _NAMES.get(builtin, f"number {builtin}"), table.table(4)
        for name, number, letter, default in _OPTIONS.get(kind, ()):
            options[name] = default if own is None else own.scalar(number, letter, default)
    outputs = table.vector(2, "i4").tolist()
    if len(outputs) != 1:
        raise UnsafeFileError(f"its operation {kind} has {len(outputs)} results")
    return Op(kind, tuple(table.vector(1, "i4").tolist()), outputs[0], options)
