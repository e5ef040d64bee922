"""How much noise quantizing a tensor makes, from its histogram. Numpy only."""

import numpy as np

from qdq.calibrate.mse import expected_error
from qdq.ranges import Histogram
from qdq.spec import QuantParams

__all__ = ["relative_noise"]


def relative_noise(histogram: Histogram, params: QuantParams) -> float:
    """Energy of the quantization error over the energy of the values, at most 1.

    The inverse of the tensor's SQNR as a ratio; rounding and saturation both count, exact zeros
    cost nothing. Values are taken as uniform within their bin, so that a bin [a, b] has the mean
    square (a² + ab + b²) / 3.

    Args:
        histogram: of the values.
        params: one scale for the tensor.

    Returns:
        0 (exact, or all values are 0) to 1 (nothing is left).
    """
    edges, counts = histogram.edges, histogram.nonzero_counts
    low, high = edges[:-1], edges[1:]
    energy = float(counts @ (low * low + low * high + high * high)) / 3
    if energy == 0:
        return 0.0
    noise = expected_error(histogram, params) * float(histogram.counts.sum())
    return float(np.minimum(noise / energy, 1.0))
