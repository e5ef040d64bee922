"""How much noise quantizing a tensor makes, from its histogram. Numpy only."""

import numpy as np

from qdq.calibrate.mse import expected_error
from qdq.ranges import Histogram
from qdq.spec import QuantParams

__all__ = ["mean_square", "relative_noise"]


def mean_square(histogram: Histogram) -> float:
    """Mean of the squares; values are taken as uniform within their bin.

    A bin [a, b] has the mean square (a² + ab + b²) / 3.
    """
    edges, counts = histogram.edges, histogram.nonzero_counts
    low, high = edges[:-1], edges[1:]
    energy = float(counts @ (low * low + low * high + high * high)) / 3
    return energy / float(histogram.counts.sum())


def relative_noise(histogram: Histogram, params: QuantParams) -> float:
    """Energy of the quantization error over the energy of the values, at most 1.

    The inverse of the tensor's SQNR as a ratio; rounding and saturation both count, exact zeros
    cost nothing.

    Args:
        histogram: of the values.
        params: one scale for the tensor.

    Returns:
        0 (exact, or all values are 0) to 1 (nothing is left).
    """
    energy = mean_square(histogram)
    if energy == 0:
        return 0.0
    return float(np.minimum(expected_error(histogram, params) / energy, 1.0))
