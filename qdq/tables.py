"""Tables as int8 codes with a scale for each row, from which rows are picked. Numpy only.

The rows of an embedding have little in common: the frequent words of a vocabulary are large in it,
the rare ones small. With ``max(abs(row)) / 127`` as the scale of each row, the error is 43 dB below
the values; with one scale for each column it is 39 dB, with one for the whole table 27 (the 30,522
words of MiniLM).
"""

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from qdq.affine import params_from_range, quantize
from qdq.ranges import TensorRange
from qdq.spec import INT8, QuantParams, QuantSpec

__all__ = ["RELATIVE_ERROR", "bytes_saved", "codes_of", "mean_squares"]

Floats = NDArray[np.floating]

_ROWS = QuantSpec(dtype=INT8, symmetric=True, axis=0)
RELATIVE_ERROR = 1 / (12 * _ROWS.qmax**2)
"""Mean square of the error over the square of the largest value in a row.

It is uniform within a code: scale² / 12 (Bennett, "Spectra of quantized signals", 1948).
"""
_BLOCK = 1 << 22  # values at a time: a table can be the most of a model


def bytes_saved(shape: Sequence[int]) -> int:
    """How many bytes less than in float32 a table takes: below 0 where a row is one value."""
    codes, scales = prod(shape), 4 * shape[0]
    return 4 * prod(shape) - codes - scales


def codes_of(table: Floats) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The codes, and the scales, in a shape that is multiplied with them.

    Args:
        table: finite values, (rows, ...).
    """
    rows = table.reshape(len(table), -1)
    codes, params = np.empty(rows.shape, np.int8), _params(rows)
    for part in _parts(rows):
        own = QuantParams(_ROWS, params.scale[part], params.zero_point[part])
        codes[part] = quantize(rows[part], own)
    return codes.reshape(table.shape), params.scale.reshape(-1, *[1] * (table.ndim - 1))


def mean_squares(table: Floats) -> tuple[float, float]:
    """Of the error of rounding, and of the values."""
    rows = table.reshape(len(table), -1)
    largest = _largest(rows).astype(np.float64)
    # of rows too small for a scale nothing is left
    relative = np.where(largest < _ROWS.qmax * np.finfo(np.float32).tiny, 1.0, RELATIVE_ERROR)
    error = float(np.mean(relative * largest**2))
    energy = sum(float(np.square(rows[part], dtype=np.float64).sum()) for part in _parts(rows))
    return error, energy / rows.size


def _largest(rows: Floats) -> Floats:
    largest: Floats = np.maximum(rows.max(1), -rows.min(1))  # abs(rows) would be a copy
    return largest


def _params(rows: Floats) -> QuantParams:
    largest = _largest(rows)
    return params_from_range(TensorRange(-largest, largest), _ROWS)


def _parts(rows: Floats) -> Iterator[slice]:
    step = max(1, _BLOCK // rows.shape[1])
    return (slice(first, first + step) for first in range(0, len(rows), step))
