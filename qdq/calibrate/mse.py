"""The range with the least expected squared error of quantization."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qdq.affine import params_from_range
from qdq.calibrate.search import (
    Counted,
    FloatArray,
    Objective,
    full_range,
    histogram_of,
    inner_ranges,
    search,
)
from qdq.ranges import Histogram, TensorRange
from qdq.spec import QuantParams, QuantSpec

__all__ = ["MSE", "expected_error"]

_OCTAVES = 12
_FINALISTS = 4
_NARROW = 1e-4  # steps
_WORTH = 0.98
"""A narrower range must win by 2 %: below that it is only the half step at either end, which
even uniform data gains, and the histogram cannot tell values on a grid (as image bytes, which
the full range represents exactly) from spread ones."""


@dataclass(frozen=True, slots=True)
class MSE:
    """The range for which rounding and saturation together cost the least squared error.

    A grid of both ends is rated by a model (a step s costs s**2 / 12 for values that spread
    over many steps, the values below s / 2 cost their own square, saturated values their
    distance squared); the finalists are then rated by ``expected_error``, against the full
    range too. Exact zeros cost nothing.
    """

    name: ClassVar[str] = "mse"
    counts: ClassVar[bool] = True

    def summarize(self, x: NDArray[np.floating]) -> Histogram:
        """Return the histogram of x; of a large x, of evenly spaced values."""
        return histogram_of(x)

    def gatherer(self) -> Counted:
        """Return what counts sample after sample."""
        return Counted()

    def merge(self, a: Histogram, b: Histogram) -> Histogram:
        """Return the histogram of both."""
        return a.merge(b)

    def range(self, summary: Histogram, spec: QuantSpec) -> TensorRange:
        """Return the range with the least expected squared error for the codes of spec."""
        full = full_range(summary)
        if summary.low == summary.high:
            return full
        found = search(
            _model(summary, spec),
            summary,
            symmetric=spec.symmetric,
            octaves=_OCTAVES,
            keep=_FINALISTS,
        )
        # The search meets its best candidate again with each refinement.
        ranges = inner_ranges(summary, [*dict.fromkeys(found), (summary.low, summary.high)])
        each = QuantSpec(dtype=spec.dtype, symmetric=spec.symmetric, axis=0)
        *errors, whole = _errors(summary, params_from_range(ranges, each))
        best = int(np.argmin(errors))
        if errors[best] >= _WORTH * whole:
            return full
        return TensorRange(ranges.low[best], ranges.high[best])


def expected_error(histogram: Histogram, params: QuantParams) -> float:
    """Mean of ``(x - fake_quantize(x))**2``, values taken as uniform within their bin.

    With u = x / scale and r = clip(rint(u), qmin - zp, qmax - zp), the error in steps is u - r
    and its square has the antiderivative ``r / 12 + (u - r)**3 / 3`` (each whole step adds
    1/12; beyond the last code the cube goes on), so a bin's mean is exact, however wide.
    """
    return _errors(histogram, params)[0]


def _errors(histogram: Histogram, params: QuantParams) -> list[float]:
    """``expected_error`` for each scale and zero point."""
    edges, counts = histogram.edges, histogram.nonzero_counts.astype(np.float64)
    total = float(histogram.counts.sum())
    width = edges[1:] - edges[:-1]
    least_width = float(width.min())
    per_width = np.divide(counts, width, out=np.zeros_like(counts), where=width > 0)
    spec, found = params.spec, []
    scales, zeros = (v.ravel().tolist() for v in (params.scale, params.zero_point))
    for scale, zero in zip(scales, zeros, strict=True):
        least, most = spec.qmin - zero, spec.qmax - zero
        r, off = _steps(edges / scale, least, most)
        r /= 12
        cube = off * off
        cube *= off
        cube /= 3
        r += cube
        rise = r[1:] - r[:-1]
        if least_width >= _NARROW * scale:
            found.append(float(per_width @ rise) * scale**3 / total)
            continue
        # The quotient loses its digits in very narrow bins; their centre says as much.
        size = width / scale
        narrow = size < _NARROW
        centre = _steps((edges[:-1] + edges[1:]) / 2 / scale, least, most)[1]
        mean = np.where(narrow, centre * centre, rise / np.where(narrow, 1.0, size))
        found.append(float(counts @ mean) * scale * scale / total)
    return found


def _steps(u: FloatArray, least: float, most: float) -> tuple[FloatArray, FloatArray]:
    """The nearest whole step from least to most, and how far u, which is overwritten, is off."""
    r = np.rint(u)
    np.maximum(r, least, out=r)
    np.minimum(r, most, out=r)
    u -= r
    return r, u


def _model(histogram: Histogram, spec: QuantSpec) -> Objective:
    """Sum of the squared errors of any range, modelled with a few look-ups per candidate.

    The model of ``MSE``: s**2 / 12 for values that spread over steps s, their own square for
    the values below s / 2, the distance squared for saturated ones; by prefix sums.
    """
    edges, nonzero = histogram.edges, histogram.nonzero_counts
    counts = nonzero.astype(np.float64)
    centre = (edges[:-1] + edges[1:]) / 2
    moment = counts * centre
    # Two sums for the time of one, whose additions wait for each other; integers do not.
    both = _before(moment + 1j * (moment * centre))
    count, squares = _before(nonzero).astype(np.float64), both.imag.copy()
    before = (count, both.real.copy(), squares)
    steps = spec.qmax - spec.qmin
    start, width = histogram.start, histogram.width

    def place(x: FloatArray) -> NDArray[np.intp]:
        edge = np.rint(x / width)
        edge -= start
        np.maximum(edge, 0, out=edge)
        np.minimum(edge, counts.size, out=edge)
        return edge.astype(np.intp)

    def objective(low: FloatArray, high: FloatArray) -> FloatArray:
        step = (high - low) / steps
        left, right = place(low), place(high)
        half = step / 2
        least, most = place(np.maximum(-half, low)), place(np.minimum(half, high))
        (n_left, x_left, xx_left), (n_right, x_right, xx_right) = (
            (sums[left] for sums in before),
            (sums[-1] - sums[right] for sums in before),
        )
        saturated = (xx_left - 2 * low * x_left + low * low * n_left) + (
            xx_right - 2 * high * x_right + high * high * n_right
        )
        spread = (count[right] - n_left) - (count[most] - count[least])
        rounded = spread * step * step / 12 + (squares[most] - squares[least])
        return np.asarray(np.maximum(saturated, 0.0) + np.maximum(rounded, 0.0))

    return objective


def _before(terms: NDArray[Any]) -> NDArray[Any]:
    """Sum of the terms of the bins before each edge."""
    sums = np.zeros(terms.size + 1, terms.dtype)
    np.cumsum(terms, out=sums[1:])
    return sums
