"""The types that scripts for onnxruntime.quantization name, and how single values are read."""

import abc
from collections.abc import Iterator
from difflib import get_close_matches
from enum import Enum
from typing import Any, Self, TypeVar

import numpy as np
import onnx

from qdq.errors import ConfigError
from qdq.spec import INT8, INT16, UINT8, UINT16, IntType

__all__ = [
    "UNSET",
    "CalibrationDataReader",
    "CalibrationMethod",
    "QuantFormat",
    "QuantType",
    "Unset",
    "flag",
    "int_type",
    "member",
    "nearest",
    "number",
]

E = TypeVar("E", bound=Enum)


class Unset(Enum):
    """The default of arguments for which qdq has a better one than onnxruntime."""

    UNSET = 0

    def __repr__(self) -> str:
        return "UNSET"


UNSET = Unset.UNSET


class _Named(Enum):
    """An enumeration whose members print as their names, for argparse."""

    def __str__(self) -> str:
        return self.name

    @classmethod
    def from_string(cls, name: str) -> Self:
        """The member of this name.

        Raises:
            ConfigError: there is none; with the nearest name.
        """
        if name not in cls.__members__:
            raise ConfigError(f"{cls.__name__} has no {name!r}{nearest(name, cls.__members__)}")
        return cls[name]


class QuantType(_Named):
    """Integer types. The 4-bit types and the 8-bit float type are named to be refused."""

    QInt8 = 0
    QUInt8 = 1
    QFLOAT8E4M3FN = 2
    QInt16 = 3
    QUInt16 = 4
    QInt4 = 5
    QUInt4 = 6

    @property
    def tensor_type(self) -> int:
        """The number of the type in ``onnx.TensorProto``."""
        return int(onnx.TensorProto.DataType.Value(self.name[1:].upper()))


class QuantFormat(_Named):
    """QDQ; QOperator is named to be refused."""

    QOperator = 0
    QDQ = 1


class CalibrationMethod(Enum):
    """How activation ranges are found: ``qdq.MinMax``, ``qdq.Entropy``, ``qdq.Percentile``."""

    MinMax = 0
    Entropy = 1
    Percentile = 2
    Distribution = 3


class CalibrationDataReader(abc.ABC):
    """A source of calibration samples; whatever has ``get_next`` counts as one."""

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        return callable(getattr(other, "get_next", None)) or NotImplemented

    @abc.abstractmethod
    def get_next(self) -> dict[str, Any] | None:
        """The next sample, input name → array; None at the end."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        sample = self.get_next()
        if sample is None:
            raise StopIteration
        return sample

    def __len__(self) -> int:
        """The number of samples; only ``CalibStridedMinMax`` asks for it.

        ``list`` and progress bars, which only try, go on after a TypeError.
        """
        raise TypeError(f"{type(self).__name__} has no length: define __len__")

    def set_range(self, start_index: int, end_index: int) -> None:
        """Go to the samples from start_index up to end_index; for ``CalibStridedMinMax``."""
        raise NotImplementedError


_INT_TYPES = {
    QuantType.QInt8: INT8,
    QuantType.QUInt8: UINT8,
    QuantType.QInt16: INT16,
    QuantType.QUInt16: UINT16,
}


def member(kind: type[E], value: object, argument: str) -> E:
    """The member of ``kind`` that an argument means; onnxruntime's own member will do.

    Raises:
        ConfigError: the value is something else.
    """
    if isinstance(value, kind):
        return value
    if isinstance(value, Enum) and type(value).__name__ == kind.__name__:
        found = kind.__members__.get(value.name)
        if found is not None:
            return found
    if isinstance(value, str) and value in kind.__members__:
        raise ConfigError(f"{argument}={value!r}: wants {kind.__name__}.{value}, not its name")
    near = nearest(value, kind.__members__) if isinstance(value, str) else "."
    raise ConfigError(f"{argument}={value!r} is no {kind.__name__}{near}")


def int_type(value: object, argument: str) -> IntType:
    """The integer type of a QuantType.

    Raises:
        ConfigError: no QuantType, or a type that qdq has not.
    """
    kind = member(QuantType, value, argument)
    if kind not in _INT_TYPES:
        raise ConfigError(
            f"{argument}={kind.name}: there are no 4-bit and no float types here; use "
            "QuantType.QInt8 or QUInt8, or leave the argument out"
        )
    return _INT_TYPES[kind]


def flag(value: object, argument: str) -> bool:
    """True or False; the text "False", as from a command line, is neither.

    Raises:
        ConfigError: the value is something else.
    """
    if isinstance(value, bool | np.bool_) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise ConfigError(f"{argument} wants True or False; found {value!r}")


def number(value: object, argument: str) -> float:
    """One real number, also as an array of one element.

    Raises:
        ConfigError: the value is something else.
    """
    array = np.asarray(value)
    if array.dtype.kind not in "fiu" or array.size != 1:
        raise ConfigError(f"{argument} wants a number; found {value!r}")
    return float(array.reshape(()))


def nearest(name: str, known: Any) -> str:
    """The end of a message about an unknown name."""
    near = get_close_matches(name, list(known), 3, 0.5)
    return f"; nearest names: {', '.join(near)}." if near else f"; known are {', '.join(known)}."
