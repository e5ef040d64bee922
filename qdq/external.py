"""Data of tensors in files beside a model file: which file, which bytes, and reading them.

ONNX notes a location below the model's folder, an offset and a length. Files may be links, as in
the cache of the Hugging Face hub, where a model and its data are links to files of other names;
by its name, however, a location must stay below the folder.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import onnx

from qdq.errors import ModelError
from qdq.nested import all_nodes, graphs_within

__all__ = ["Part", "file_of", "fill", "fill_from_ir", "find", "outside"]


_DIGITS = 20  # of a number of bytes, at most


class Part(NamedTuple):
    """Bytes of a file that are the data of a tensor."""

    file: Path
    offset: int
    size: int


def outside(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """The tensors whose data is elsewhere: initializers and attributes, in subgraphs too."""
    for t in chain(model.graph.initializer, *map(_within, (model.graph, *model.functions))):
        if t.data_location == onnx.TensorProto.EXTERNAL:
            yield t


def _within(outer: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.TensorProto]:
    """What nested graphs and attributes hold."""
    yield from chain.from_iterable(g.initializer for g in graphs_within(outer.node))
    for a in chain.from_iterable(n.attribute for n in all_nodes(outer.node)):
        if a.HasField("t"):
            yield a.t
        yield from a.tensors


def file_of(location: str, model: Path) -> Path:
    """The file that a location of a model file means; it need not exist.

    It is looked for in the folder of the path as given, then in that of the file which this path
    is a link to.
    """
    file = model.parent / location
    return file if file.exists() or not model.is_symlink() else model.resolve().parent / location


def find(tensor: onnx.TensorProto, model: Path) -> Part:
    """The bytes that hold the data of a tensor of a model file.

    Raises:
        ModelError: the note about them is malformed, or the file lacks them.
    """
    notes = {entry.key: entry.value for entry in tensor.external_data if entry.value}
    location = notes.get("location", "")
    if not location or Path(location).is_absolute() or ".." in Path(location).parts:
        raise _fault(tensor, model, "which is no path below the model's folder; export it again")
    for key in ("offset", "length"):
        text = notes.get(key, "0")
        if not (text.isascii() and text.isdecimal() and len(text) < _DIGITS):
            reason = f"with the {key} {text!r}; wanted a number of bytes: export the model again"
            raise _fault(tensor, model, reason)
    try:
        file = file_of(location, model)
        if not file.is_file():
            reason = "which is no file there; keep the data files in the model's folder"
            raise _fault(tensor, model, reason)
        held = file.stat().st_size
    except OSError as e:
        raise _fault(tensor, model, f"which cannot be read: {e}") from e
    offset = int(notes.get("offset", "0"))
    size = int(notes.get("length", max(held - offset, 0)))
    if offset + size > held:
        reason = (
            f"which holds {held} bytes; wanted bytes {offset} to {offset + size}: it is truncated "
            "or of another model, copy it again"
        )
        raise _fault(tensor, model, reason)
    return Part(file, offset, size)


def fill(tensor: onnx.TensorProto, part: Part, model: Path) -> None:
    """Read the data of a tensor of a model file, which ``find`` has found, into it.

    Raises:
        ModelError: the file cannot be read.
    """
    try:
        with part.file.open("rb") as file:
            file.seek(part.offset)
            data = file.read(part.size)
    except OSError as e:
        raise _fault(tensor, model, f"which cannot be read: {e}") from e
    _put(tensor, data)


def fill_from_ir(proto: onnx.ModelProto, model: Any) -> None:
    """Put the data of initializers into what onnx_ir has made of its model without it.

    The model knows the folder of its data, the proto does not.

    Args:
        proto: of the model; filled.
        model: an ``onnx_ir.Model``; not changed.

    Raises:
        ModelError: a file of the model's cannot be read.
    """
    for t in proto.graph.initializer:
        if t.data_location != onnx.TensorProto.EXTERNAL:
            continue
        try:
            _put(t, model.graph.initializers[t.name].const_value.tobytes())
        except (OSError, ValueError) as e:
            raise ModelError(
                f"the onnx_ir.Model keeps the data of tensor {t.name!r} in a file that cannot be "
                f"read ({e}); keep that file while the model is in use",
                tensor=t.name,
            ) from e


def _put(tensor: onnx.TensorProto, data: bytes) -> None:
    tensor.raw_data = data
    tensor.ClearField("data_location")
    del tensor.external_data[:]


def _fault(tensor: onnx.TensorProto, model: Path, reason: str) -> ModelError:
    places = [entry.value for entry in tensor.external_data if entry.key == "location"]
    return ModelError(
        f"model file {str(model)!r} keeps the data of tensor {tensor.name!r} in another file, "
        f"{'of no name' if not places else repr(places[-1])}, {reason}",
        tensor=tensor.name,
    )
