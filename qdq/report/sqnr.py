"""Sums over samples that error measures are made of. Numpy only.

Signal-to-quantization-noise ratio: ``SQNR = 10 log10(sum x^2 / sum (x - y)^2)`` in dB, where x is
the exact value and y what stands in for it.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdq.affine import fake_quantize
from qdq.ranges import Histogram
from qdq.spec import QuantParams

__all__ = ["OutputSums", "TensorSums", "representable", "sum_of_squares"]

Array = NDArray[np.floating]


def sum_of_squares(x: Array, y: Array | None = None) -> float:
    """``sum x^2``, or ``sum (x - y)^2``, in float64, of the elements where x is finite.

    Infinite if y is not finite somewhere there.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        wide = np.ravel(x).astype(np.float64)
        if y is not None:
            wide -= np.ravel(y)
        total = _dot(wide, wide)
    if math.isfinite(total):
        return total
    wide = wide[np.isfinite(np.ravel(x))]
    return _dot(wide, wide) if np.isfinite(wide).all() else math.inf


def _dot(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    # not np.dot: the threads of its library and those of onnxruntime would wait for each other
    return float(np.einsum("i,i->", x, y))


def representable(params: QuantParams) -> tuple[float, float]:
    """The smallest and largest value that codes stand for, over all channels."""
    zero = params.zero_point.astype(np.float64)
    scale = params.scale.astype(np.float64)
    return float(((params.spec.qmin - zero) * scale).min()), float(
        ((params.spec.qmax - zero) * scale).max()
    )


@dataclass(slots=True)
class TensorSums:
    """What is summed up for one tensor, sample by sample.

    Attributes:
        params: its codes' parameters; None for a tensor without codes.
        signal: sum of squares of the float model's values.
        rounding: noise of rounding these values to codes.
        accumulated: noise of the quantized model's values.
        clipped: how many float values are more than half a step outside what codes represent.
        count: number of values.
        histogram: of the float values that are finite; None without codes.
    """

    params: QuantParams | None
    signal: float = 0.0
    rounding: float = 0.0
    accumulated: float = 0.0
    clipped: int = 0
    count: int = 0
    histogram: Histogram | None = None

    def add(self, exact: Array, rounded: Array | None, found: Array) -> None:
        """Add a sample: the float model's values, these as codes hold them, and what came out."""
        self.signal += sum_of_squares(exact)
        self.count += exact.size
        self.accumulated += sum_of_squares(exact, found)
        if rounded is not None and self.params is not None:
            self.rounding += sum_of_squares(exact, rounded)
            self.clipped += _clipped(exact, self.params)
            self._draw(exact)

    def _draw(self, x: Array) -> None:
        finite = x if np.isfinite(x).all() else x[np.isfinite(x)]
        if finite.size:
            new = Histogram.of(finite)
            self.histogram = new if self.histogram is None else self.histogram.merge(new)


def _clipped(x: Array, params: QuantParams) -> int:
    if params.spec.axis is None:
        low, high = representable(params)
        half = float(params.scale) / 2
        return int(np.count_nonzero((x < low - half) | (x > high + half)))
    # where a channel clips, the error is more than half of its step
    shape = [1] * x.ndim
    shape[params.spec.axis] = -1
    half_step = params.scale.reshape(shape) * np.float32(0.5 + 1e-3)
    return int(np.count_nonzero(np.abs(x - fake_quantize(x, params)) > half_step))


@dataclass(slots=True)
class OutputSums:
    """What is summed up for one output of the model, between its float and quantized values."""

    signal: float = 0.0
    noise: float = 0.0
    product: float = 0.0
    other: float = 0.0
    largest: float = 0.0
    rows: int = 0
    same: int = 0

    def add(self, exact: Array, found: Array) -> None:
        """Add a sample: the output of the float and of the quantized model, of one shape."""
        self.signal += sum_of_squares(exact)
        self.noise += sum_of_squares(exact, found)
        self.other += sum_of_squares(found)
        x, y = np.ravel(exact).astype(np.float64), np.ravel(found).astype(np.float64)
        known = np.isfinite(x)
        both = known & np.isfinite(y)
        self.product += _dot(x[both], y[both])
        far = float(np.abs(x[both] - y[both]).max(initial=0)) if (both == known).all() else math.inf
        self.largest = max(self.largest, far)
        if exact.ndim and exact.shape[-1] > 1 and exact.size:
            equal = np.argmax(exact, -1) == np.argmax(found, -1)
            self.rows += equal.size
            self.same += int(equal.sum())

    @property
    def cosine(self) -> float | None:
        """Cosine between the two outputs, all samples as one vector; None if one is all 0."""
        scale = math.sqrt(self.signal * self.other)
        return self.product / scale if scale > 0 else None

    @property
    def agreement(self) -> float | None:
        """Share of rows (along the last axis) with their largest value at the same place."""
        return self.same / self.rows if self.rows else None
