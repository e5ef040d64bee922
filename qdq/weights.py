"""Weights that stay in their file: a reference in place of the data, read when it is asked for.

A reference is an initializer with name, type and shape whose data is external, as ONNX notes it
(location, offset, length), but with the absolute path of a file and a mark of the file's state. It
costs some hundred bytes to copy. Only this package can read it (``read``), so no model leaves the
package with one: ``copy_into`` puts the data inside.

The file is mapped, not read: the data takes memory while an array of it is in use, and the system
may drop it at any time. A protobuf message, in contrast, keeps what it has once held, and hands
out copies.
"""

import math
import mmap
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import onnx
from numpy.typing import NDArray

from qdq.errors import ModelError
from qdq.wire import without_data

__all__ = [
    "Weights",
    "copy_into",
    "is_reference",
    "is_turned",
    "load_light",
    "raw_bytes",
    "read",
    "refer",
    "turned",
]

_MARK = "qdq.state"  # size and time of the file when it was referred to
_TURNED = "qdq.turned"  # the data is that of the transposed matrix
_LARGE = 1 << 20  # bytes; smaller ones are not worth it
_KEPT = 1 << 29  # bytes of constants that ``Weights`` keeps at most
_TILE = 256  # rows and columns that are transposed at a time: they fit the cache

_maps: WeakValueDictionary[tuple[str, str], mmap.mmap] = WeakValueDictionary()


def refer(tensor: onnx.TensorProto, file: Path, offset: int, size: int) -> bool:
    """Turn a tensor whose data is in an external file into a reference, in place.

    Only large float32 tensors, and only where the data has the size of the shape.

    Args:
        tensor: an initializer as a model file has it.
        file: where its data is; if this is a link, the reference is to what it leads to.
        offset: of the data, in bytes.
        size: of the data, in bytes.

    Returns:
        Whether it is a reference now.
    """
    if tensor.data_type != onnx.TensorProto.FLOAT or sys.byteorder != "little":
        return False
    if size <= _LARGE or size != 4 * math.prod(tensor.dims):
        return False
    try:
        path = file.resolve()
        mark = _state(path.stat())
        _mapped(str(path), mark)
    except OSError:  # a file system that cannot map
        return False
    _refer(tensor, path, offset, mark)
    return True


def load_light(path: Path) -> onnx.ModelProto | None:
    """A model file with references to its own large float32 weights.

    None where it has none, is unusual or cannot be mapped: then it is to be read as a whole, and
    what is wrong is told by who does that.
    """
    path = path.resolve()
    try:
        found = path.stat()
        if sys.byteorder != "little" or found.st_size <= _LARGE:
            return None
        mark = _state(found)
        mapped = _mapped(str(path), mark)
    except OSError:
        return None
    with memoryview(mapped) as data:
        try:
            light, places = without_data(data, _LARGE)
            model = onnx.load_model_from_string(light)
        except Exception:
            return None
        for index, (offset, size) in places.items():
            tensor = model.graph.initializer[index]
            fits = size == 4 * math.prod(tensor.dims) and not tensor.HasField("data_location")
            if fits and tensor.data_type == onnx.TensorProto.FLOAT:
                _refer(tensor, path, offset, mark)
            else:
                tensor.raw_data = bytes(data[offset : offset + size])
    return model if places else None


def _refer(tensor: onnx.TensorProto, path: Path, offset: int, mark: str) -> None:
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    _note(tensor, location=str(path), offset=str(offset), **{_MARK: mark})


def is_reference(tensor: onnx.TensorProto) -> bool:
    """Whether the tensor's data is in a file that ``read`` knows."""
    return tensor.data_location == onnx.TensorProto.EXTERNAL and _MARK in _notes(tensor)


def is_turned(tensor: onnx.TensorProto, other: onnx.TensorProto) -> bool:
    """Whether both are references to one matrix, and just one of them to its transpose."""
    if not (is_reference(tensor) and is_reference(other)):
        return False
    notes, others = _notes(tensor), _notes(other)
    differ = notes.pop(_TURNED, None) != others.pop(_TURNED, None)
    return differ and notes == others


def read(tensor: onnx.TensorProto) -> NDArray[Any]:
    """The value of an initializer, read-only where it is a view of a file.

    Raises:
        ModelError: the file of a reference has changed or gone since the model was loaded.
        ValueError: data that does not fit the shape.
    """
    if not is_reference(tensor):
        value: NDArray[Any] = onnx.numpy_helper.to_array(tensor)
        return value
    notes = _notes(tensor)
    path, mark = notes["location"], notes[_MARK]
    try:
        data = _mapped(path, mark)
    except OSError as e:
        raise ModelError(
            f"weight {tensor.name!r} is read from {path!r} when it is needed, but that file has "
            f"changed or gone since the model was loaded ({e}); leave it alone until the work is "
            "done",
            tensor=tensor.name,
        ) from e
    size = math.prod(tensor.dims)
    flat = np.frombuffer(data, np.float32, size, int(notes["offset"]))
    if _TURNED in notes:
        return _transposed(flat.reshape(tuple(tensor.dims)[::-1]))
    # some runtimes read an array in place and want its elements aligned
    return np.require(flat, requirements="A").reshape(tuple(tensor.dims))


def turned(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    """A reference to the transposed matrix of a reference."""
    result = onnx.TensorProto()
    result.CopyFrom(tensor)
    result.name = name
    del result.dims[:]
    result.dims.extend(reversed(tensor.dims))
    notes = _notes(tensor)
    del result.external_data[:]
    if notes.pop(_TURNED, None) is None:
        notes[_TURNED] = "1"
    _note(result, **notes)
    return result


def raw_bytes(tensor: onnx.TensorProto) -> bytes:
    """The data as ``raw_data`` holds it, however the tensor holds it; not for strings."""
    if tensor.HasField("raw_data"):
        return tensor.raw_data
    if is_reference(tensor):
        return read(tensor).tobytes()
    return onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor)).raw_data


def copy_into(target: onnx.TensorProto, source: onnx.TensorProto) -> None:
    """Make ``target`` a copy of ``source``; what a reference refers to is read into it."""
    target.CopyFrom(source)
    if is_reference(source):
        target.ClearField("data_location")
        del target.external_data[:]
        target.raw_data = raw_bytes(source)


class Weights(Mapping[str, NDArray[np.floating]]):
    """Values of constants by name, each read when it is asked for.

    Constants in memory are decoded anew each time, so the first of them are kept, up to 512 MiB:
    small models have all of theirs decoded once. Views of a file cost nothing and are not kept,
    since one view keeps all pages of the file that were ever looked at.
    """

    def __init__(self, tensors: Mapping[str, onnx.TensorProto]) -> None:
        self._tensors = tensors
        self._kept: dict[str, NDArray[np.floating]] = {}
        self._room = _KEPT

    def __getitem__(self, name: str) -> NDArray[np.floating]:
        """The value."""
        if name in self._kept:
            return self._kept[name]
        tensor = self._tensors[name]
        value = read(tensor)
        if not _is_view(tensor) and value.nbytes <= self._room:
            self._kept[name] = value
            self._room -= value.nbytes
        return value

    def __contains__(self, name: object) -> bool:
        """Whether there is such a constant; nothing is read."""
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """The number of constants."""
        return len(self._tensors)


def _is_view(tensor: onnx.TensorProto) -> bool:
    """Whether ``read`` gives the pages of a file, and no copy."""
    notes = _notes(tensor)
    return is_reference(tensor) and _TURNED not in notes and int(notes["offset"]) % 4 == 0


def _notes(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _note(tensor: onnx.TensorProto, **entries: str) -> None:
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


def _state(found: os.stat_result) -> str:
    return f"{found.st_size} {found.st_mtime_ns}"


def _mapped(path: str, mark: str) -> mmap.mmap:
    """The file, mapped once for all arrays of it, as long as there is one.

    Raises:
        OSError: it cannot be mapped, or is not in the state that ``mark`` tells.
    """
    found = _maps.get((path, mark))
    if found is not None:
        return found
    with Path(path).open("rb") as file:
        if _state(os.fstat(file.fileno())) != mark:
            raise OSError("another size or time")
        found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    _maps[path, mark] = found
    return found


def _transposed(matrix: NDArray[Any]) -> NDArray[Any]:
    """The transposed matrix, row by row in memory.

    Tile by tile, which takes a third of the time of a plain copy: that one jumps a whole row for
    each element.
    """
    rows, columns = matrix.shape
    result = np.empty((columns, rows), matrix.dtype)
    for i in range(0, rows, _TILE):
        for j in range(0, columns, _TILE):
            result[j : j + _TILE, i : i + _TILE] = matrix[i : i + _TILE, j : j + _TILE].T
    return result
