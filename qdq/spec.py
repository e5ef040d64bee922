"""What a quantized tensor is: integer types, the wished spec, the found parameters. Numpy only."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from qdq.checks import is_flag, is_whole, want
from qdq.errors import ConfigError

__all__ = ["INT8", "INT16", "INT32", "UINT8", "UINT16", "IntType", "QuantParams", "QuantSpec"]

FloatArray = NDArray[np.floating]
IntArray = NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class IntType:
    """An integer storage type.

    Attributes:
        name: numpy's name of it, also onnx's TensorProto name in lower case.
        bits: width in bits.
        signed: whether it holds negative codes.
    """

    name: str
    bits: int
    signed: bool

    @property
    def dtype(self) -> np.dtype[np.integer]:
        """The numpy dtype that stores the codes."""
        return np.dtype(self.name)

    @property
    def min(self) -> int:
        """The smallest code of the type."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def max(self) -> int:
        """The largest code of the type."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    def __str__(self) -> str:
        return self.name


UINT8 = IntType("uint8", 8, False)
INT8 = IntType("int8", 8, True)
UINT16 = IntType("uint16", 16, False)
INT16 = IntType("int16", 16, True)
INT32 = IntType("int32", 32, True)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSpec:
    """How a tensor is wished to be quantized.

    Attributes:
        dtype: the integer type of the codes.
        symmetric: the range is [-a, a]. Signed types then use [-max, max] with zero point 0
            (the code -max - 1 stays unused, so that negation is exact); unsigned types use
            their full range with the zero point at the middle code.
        axis: None for one scale for the whole tensor, else the axis that has one scale per index.

    Raises:
        ConfigError: a value of the wrong kind.
    """

    dtype: IntType = UINT8
    symmetric: bool = False
    axis: int | None = None

    def __post_init__(self) -> None:
        types = isinstance(self.dtype, IntType)
        want("dtype", self.dtype, types, "an integer type, as qdq.INT8 or qdq.UINT8")
        want("symmetric", self.symmetric, is_flag(self.symmetric), "True or False")
        want("axis", self.axis, self.axis is None or is_whole(self.axis), "a whole number or None")

    @property
    def qmin(self) -> int:
        """The smallest code in use."""
        return -self.dtype.max if self.symmetric and self.dtype.signed else self.dtype.min

    @property
    def qmax(self) -> int:
        """The largest code in use."""
        return self.dtype.max


@dataclass(frozen=True, slots=True, eq=False)
class QuantParams:
    """How a tensor is quantized: ``real = scale * (code - zero_point)``.

    Attributes:
        spec: the spec that these parameters fulfil.
        scale: float32 (or float16), shape () for one scale or (C,) for one per index of the axis.
        zero_point: codes of ``spec.dtype``, same shape as scale.

    Laws, checked on construction: scale is finite and > 0; the zero point is within
    [qmin, qmax], that of symmetric types 0 (signed) or the middle code (unsigned). The arrays are
    read-only copies.

    Raises:
        ConfigError: if a law is broken.
    """

    spec: QuantSpec
    scale: FloatArray
    zero_point: IntArray = field(default_factory=lambda: np.zeros((), np.uint8))

    def __post_init__(self) -> None:
        scale = np.array(self.scale)
        if scale.dtype not in (np.float32, np.float16):
            scale = scale.astype(np.float32)
        zero = np.asarray(self.zero_point)
        if scale.ndim != (self.spec.axis is not None) or zero.shape != scale.shape:
            raise ConfigError(
                f"scale has shape {scale.shape} and zero point {zero.shape}; axis "
                f"{self.spec.axis} wants {'one value each' if self.spec.axis is None else '(C,)'}"
            )
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise ConfigError(f"a scale must be finite and above 0; found {scale.min()}")
        if zero.size and not (self.spec.qmin <= zero.min() and zero.max() <= self.spec.qmax):
            raise ConfigError(
                f"zero point {zero.min()}..{zero.max()} is outside "
                f"[{self.spec.qmin}, {self.spec.qmax}] of {self.spec.dtype}"
            )
        if self.spec.symmetric and self.spec.dtype.signed and zero.any():
            raise ConfigError("a symmetric signed type wants zero point 0")
        middle = (self.spec.qmax + 1) // 2
        if self.spec.symmetric and not self.spec.dtype.signed and (zero != middle).any():
            raise ConfigError(f"a symmetric unsigned type wants zero point {middle}")
        zero = zero.astype(self.spec.dtype.dtype)
        scale.setflags(write=False)
        zero.setflags(write=False)
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "zero_point", zero)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantParams):
            return NotImplemented
        return (
            self.spec == other.spec
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point, other.zero_point)
        )

    __hash__: ClassVar[None] = None  # type: ignore[assignment]
