"""Files of features: npz, parquet and safetensors, written part by part.

Each has the names [N], the labels [N] (-1: none), one array [N, *shape] per kind of token, and
`metadata`, a JSON object. The bytes depend on the contents alone.

Shapes: N images, m images of a part.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fastdino.errors import CheckpointError, ConfigError
from fastdino.file_names import as_text
from fastdino.files import atomic_write, explain_write_errors

Array = NDArray[Any]
INSTALL = 'pip install "fastdino[parquet]"'
_CODEC = ("utf-8", "surrogateescape")
_SAFETENSORS_DTYPES = {"<f4": "F32", "<f2": "F16", "<i8": "I64", "|u1": "U8"}
_SAFETENSORS_HEADER = 100_000_000  # largest header that the library reads, in bytes
_EPOCH = (1980, 1, 1, 0, 0, 0)  # time of zip members, so that equal contents give equal files


@dataclass(frozen=True)
class FeatureTable:
    """Features of N images in parts.

    Attributes:
        names: [N], as text.
        labels: [N], -1 for none.
        shapes: shape per image of each array.
        dtype: of the arrays, little-endian.
        rows: how many images each part has.
        read: part, name -> array [m, *shape].
        metadata: values for JSON.
    """

    names: Sequence[str]
    labels: NDArray[np.int64]
    shapes: Mapping[str, tuple[int, ...]]
    dtype: np.dtype[np.floating]
    rows: Sequence[int]
    read: Callable[[int, str], NDArray[np.floating]]
    metadata: Mapping[str, Any]

    def chunks(self, name: str) -> Iterator[Array]:
        """Yield the parts of an array."""
        return (self.read(part, name) for part in range(len(self.rows)))


@dataclass(frozen=True)
class Column:
    """An array whose rows come in chunks."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    chunks: Iterable[Array]

    @classmethod
    def of(cls, array: Array) -> Column:
        """Return a whole array as a column."""
        return cls(array.dtype, array.shape, [array])

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * math.prod(self.shape)

    def write(self, file: IO[bytes]) -> None:
        """Write the values in C order."""
        for chunk in self.chunks:
            file.write(np.ascontiguousarray(chunk, self.dtype).reshape(-1).view(np.uint8).data)


def _columns(table: FeatureTable) -> dict[str, Column]:
    """Return the labels and the arrays of features."""
    number = len(table.labels)
    arrays = {
        name: Column(table.dtype, (number, *shape), table.chunks(name))
        for name, shape in table.shapes.items()
    }
    return {"labels": Column.of(table.labels), **arrays}


def write_npz(file: IO[bytes], columns: Mapping[str, Column]) -> None:
    """Write arrays as np.savez does, chunk by chunk, without the time of writing."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, column in columns.items():
            member = zipfile.ZipInfo(f"{name}.npy", _EPOCH)
            with archive.open(member, "w", force_zip64=True) as part:
                header = {
                    "descr": np.lib.format.dtype_to_descr(column.dtype),
                    "fortran_order": False,
                    "shape": column.shape,
                }
                np.lib.format.write_array_header_1_0(part, header)
                column.write(part)


def _write_npz(file: IO[bytes], table: FeatureTable) -> None:
    names, step = table.names, 4096
    width = max(1, *map(len, names))  # numpy stores 4 bytes per character of the longest name
    dtype = np.dtype(f"<U{width}")
    chunks = (np.array(names[i : i + step], dtype) for i in range(0, len(names), step))
    metadata = Column.of(np.array(json.dumps(table.metadata)))
    named = Column(dtype, (len(names),), chunks)
    write_npz(file, {"names": named, **_columns(table), "metadata": metadata})


def _write_safetensors(file: IO[bytes], table: FeatureTable) -> None:
    """Write the names as uint8, UTF-8 with a zero byte after each name.

    The library writes whole tensors only; the format is described at
    https://huggingface.co/docs/safetensors.
    """
    blob = b"".join(name.encode(*_CODEC) + b"\0" for name in table.names)
    columns = _columns(table) | {"names": Column.of(np.frombuffer(blob, np.uint8))}
    header: dict[str, Any] = {"__metadata__": {"metadata": json.dumps(table.metadata)}}
    start = 0
    for name, column in columns.items():
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[column.dtype.str],
            "shape": column.shape,
            "data_offsets": [start, start + column.size],
        }
        start += column.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _SAFETENSORS_HEADER:
        raise ConfigError(
            f"the metadata has {len(text)} bytes, and safetensors reads at most "
            f"{_SAFETENSORS_HEADER}: write .npz or .parquet"
        )
    file.write(len(text).to_bytes(8, "little") + text)
    for column in columns.values():
        column.write(file)


def _write_parquet(file: IO[bytes], table: FeatureTable) -> None:
    """Write one row group per part; arrays are lists of fixed size, flattened."""
    arrow = importlib.import_module("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    # Arrow's text is UTF-8: other bytes of a name become escapes.
    names = [name.encode("utf-8", "backslashreplace").decode() for name in table.names]
    value = arrow.from_numpy_dtype(table.dtype)
    sizes = {name: math.prod(shape) for name, shape in table.shapes.items()}
    fields = [("name", arrow.string()), ("label", arrow.int64())]
    fields += [(name, arrow.list_(value, size)) for name, size in sizes.items()]
    schema = arrow.schema(fields, metadata={"metadata": json.dumps(table.metadata)})
    options = {"compression": "NONE", "use_dictionary": False, "write_statistics": False}
    with parquet.ParquetWriter(file, schema, **options) as writer:
        start = 0
        for part, rows in enumerate(table.rows):
            lists = [
                arrow.FixedSizeListArray.from_arrays(arrow.array(table.read(part, name).ravel()), n)
                for name, n in sizes.items()
            ]
            texts = arrow.array(names[start : start + rows], arrow.string())
            labels = arrow.array(table.labels[start : start + rows])
            start += rows
            if rows:
                writer.write_table(arrow.table([texts, labels, *lists], schema=schema))


_WRITERS = {".npz": _write_npz, ".parquet": _write_parquet, ".safetensors": _write_safetensors}
SUFFIXES = tuple(_WRITERS)


def check_path(path: Path) -> None:
    """Raise ConfigError unless a file of features can have this path."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--output {path}: expected a file that ends in {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(f"--output {path} needs pyarrow: {INSTALL}")
    if path.exists() and not path.is_file():
        raise ConfigError(f"--output {path} is not a file: use another path")


def write_features(path: Path, table: FeatureTable) -> None:
    """Write a file of features atomically, holding one part in memory.

    Raises: CheckpointError: it cannot be written.
    """
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            _WRITERS[path.suffix](file, table)


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a file of features.

    Raises: CheckpointError: it is no such file, or damaged.
    """
    try:
        return dict(json.loads(_METADATA[path.suffix](path)))
    except MemoryError:
        raise
    except Exception as error:  # the three libraries raise many types on other bytes
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} is no file of features: {reason}") from error


def _npz_metadata(path: Path) -> str:
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
        return str(arrays["metadata"])


def _safetensors_metadata(path: Path) -> str:
    with importlib.import_module("safetensors").safe_open(path, "numpy") as file:
        return str(file.metadata()["metadata"])


def _parquet_metadata(path: Path) -> str:
    schema = importlib.import_module("pyarrow.parquet").read_schema(path)
    return str(schema.metadata[b"metadata"].decode())


_METADATA = {
    ".npz": _npz_metadata,
    ".parquet": _parquet_metadata,
    ".safetensors": _safetensors_metadata,
}


def name_texts(names: Iterable[str]) -> list[str]:
    """Return names of files as the text that files of features have."""
    return [as_text(name) for name in names]
