"""An .npz written and read piece by piece, so that it need not fit into memory."""

import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

import numpy as np
from etils import epath

from ogdm_jax import places

Column = tuple[tuple[int, ...], np.dtype, Iterable[np.ndarray]]  # shape, type, pieces of rows


def column(array: Any) -> Column:
    """A whole array as a column."""
    array = np.asarray(array)
    return array.shape, array.dtype, [array]


def write(path: epath.Path, columns: Mapping[str, Column]) -> None:
    """Writes a compressed npz, piece by piece, that holds nothing of when it was written."""
    with places.written(path) as new, zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (shape, dtype, pieces) in columns.items():
            descr = np.lib.format.dtype_to_descr(dtype)
            header = {"descr": descr, "fortran_order": False, "shape": shape}
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for piece in pieces:
                    member.write(np.ascontiguousarray(piece).tobytes())


def read(path: epath.Path, name: str, batch: int = 1024) -> Iterator[np.ndarray]:
    """Rows of an array that `write` wrote, some at a time."""
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        with archive.open(f"{name}.npy") as member:
            shape, dtype = header(member)
            size = int(np.prod(shape[1:])) * dtype.itemsize
            for start in range(0, shape[0], batch):
                rows = min(batch, shape[0] - start)
                content = member.read(rows * size)
                yield np.frombuffer(content, dtype).reshape(rows, *shape[1:])


def header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array of an .npy file, which is read as far as the numbers."""
    version, _ = np.lib.format.read_magic(file)
    first, later = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
    shape, _, dtype = (first if version < 2 else later)(file)
    return shape, dtype
