"""Where in a model file the data of its initializers lies, found without reading it.

A protobuf message is a row of fields, each with its number, its kind and, where it holds bytes or
another message, its length (https://protobuf.dev/programming-guides/encoding/). That is all that
has to be known to step over the data; the numbers are those of onnx.proto.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

__all__ = ["Place", "without_data"]

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9  # of ModelProto, GraphProto, TensorProto
_VARINT, _BITS64, _BYTES, _BITS32 = 0, 1, 2, 5  # kinds of fields


class Place(NamedTuple):
    """Where some data lies in a file, in bytes."""

    offset: int
    size: int


class _Field(NamedTuple):
    number: int
    head: int  # where its key begins
    begin: int  # where its value begins
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin


def without_data(model: memoryview, above: int) -> tuple[bytes, Mapping[int, Place]]:
    """A model file without the raw data of large initializers.

    Args:
        model: the bytes of a ModelProto.
        above: data of more bytes than this is left out.

    Returns:
        The bytes of the same message without that data; and index of an initializer → where in
        ``model`` its data lies.

    Raises:
        ValueError: this is not a message, or one that is written in an unusual way.
    """
    graph = _only(model, _Field(0, 0, 0, len(model)), _GRAPH)
    removed: list[tuple[_Field, _Field]] = []  # an initializer and its data
    places, index = {}, -1
    for field in _fields(model, graph):
        index += field.number == _INITIALIZER
        if field.number == _INITIALIZER and field.size > above:
            data = _only(model, field, _RAW_DATA)
            if data.size > above:
                removed.append((field, data))
                places[index] = Place(data.begin, data.size)
    inner = []
    starts = [graph.begin, *(tensor.end for tensor, _ in removed)]
    for start, (tensor, data) in zip(starts, removed, strict=False):
        rest = (model[tensor.begin : data.head], model[data.end : tensor.end])
        inner += [model[start : tensor.head], *_message(_INITIALIZER, *rest)]
    inner.append(model[starts[-1] : graph.end])
    outer = [model[: graph.head], *_message(_GRAPH, *inner), model[graph.end :]]
    return b"".join(outer), places


def _only(model: memoryview, around: _Field, number: int) -> _Field:
    """The one field of this number in a message."""
    found = [f for f in _fields(model, around) if f.number == number]
    if len(found) != 1:
        raise ValueError(f"{len(found)} fields of number {number}")
    return found[0]


def _fields(model: memoryview, around: _Field) -> Iterator[_Field]:
    """The fields of a message, in order."""
    at = around.begin
    while at < around.end:
        head = at
        key, at = _varint(model, at)
        if key & 7 == _VARINT:
            end = _varint(model, at)[1]
        elif key & 7 == _BYTES:
            size, at = _varint(model, at)
            end = at + size
        elif key & 7 in (_BITS32, _BITS64):
            end = at + (4 if key & 7 == _BITS32 else 8)
        else:
            raise ValueError(f"a field of kind {key & 7}")
        if end > around.end:
            raise ValueError("a field that is longer than what it is in")
        yield _Field(key >> 3, head, at, end)
        at = end


def _varint(model: memoryview, at: int) -> tuple[int, int]:
    """A number, 7 bits a byte, the lowest first; and where it ends."""
    value = shift = 0
    for place in range(at, min(at + 10, len(model))):
        byte = model[place]
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, place + 1
    raise ValueError("a number without an end")


def _message(number: int, *parts: memoryview | bytes) -> list[memoryview | bytes]:
    """A field that holds the parts as one message."""
    size = sum(len(p) for p in parts)
    return [_as_varint(number << 3 | _BYTES), _as_varint(size), *parts]


def _as_varint(value: int) -> bytes:
    digits = []
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])
