"""Calibration summaries as plain arrays, one column a field, for a file. Numpy only."""

import pickle
import zipfile
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdq.calibrate.means import ChannelSum
from qdq.calibrate.moments import MomentSum
from qdq.errors import CalibrationError, ConfigError
from qdq.ranges import Histogram, TensorRange

__all__ = [
    "UNREADABLE",
    "Arrays",
    "pack_moments",
    "pack_summaries",
    "pack_sums",
    "unpack_moments",
    "unpack_summaries",
    "unpack_sums",
]

Arrays = dict[str, NDArray[Any]]

# what reading a damaged file may raise
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    OverflowError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    pickle.UnpicklingError,
    CalibrationError,  # a record that contradicts itself
)


def pack_summaries(summaries: Sequence[Any], calibrator: str) -> tuple[str, Arrays]:
    """The kind of the summaries, and their fields as columns; histograms one after the other."""
    kinds = {type(s) for s in summaries} or {TensorRange}
    if kinds == {TensorRange}:
        return "range", {
            "low": np.asarray([s.low for s in summaries], np.float32),
            "high": np.asarray([s.high for s in summaries], np.float32),
        }
    if kinds == {Histogram}:
        return "histogram", {
            "exponent": np.asarray([s.exponent for s in summaries], np.int64),
            "start": np.asarray([s.start for s in summaries], np.int64),
            "zeros": np.asarray([s.zeros for s in summaries], np.int64),
            "low": np.asarray([s.low for s in summaries], np.float64),
            "high": np.asarray([s.high for s in summaries], np.float64),
            "bins": np.asarray([s.counts.size for s in summaries], np.int64),
            "counts": np.concatenate([s.counts for s in summaries]),
        }
    found = ", ".join(sorted(k.__name__ for k in kinds))
    raise ConfigError(
        f"summaries of type {found}, made by {calibrator}, have no form in a statistics file; "
        "only TensorRange and Histogram have one"
    )


def unpack_summaries(kind: str, arrays: Arrays) -> list[Any]:
    """The summaries, from what ``pack_summaries`` gave.

    Raises:
        CalibrationError: if the columns contradict each other.
        KeyError: if one is missing.
    """
    if kind == "range":
        return [
            TensorRange(low, high) for low, high in zip(arrays["low"], arrays["high"], strict=True)
        ]
    if kind != "histogram":
        raise CalibrationError(f"its summaries are {kind!r}, wanted 'range' or 'histogram'")
    fields = ("exponent", "start", "low", "high", "zeros")
    exponent, start, low, high, zeros = (arrays[f].tolist() for f in fields)
    counts = _split(arrays["counts"], arrays["bins"])
    return [Histogram(*row) for row in zip(exponent, start, counts, low, high, zeros, strict=True)]


def pack_sums(sums: Sequence[ChannelSum]) -> Arrays:
    """Channel sums side by side."""
    if not sums:
        return {}
    return {
        "sum_bins": np.concatenate([s.bins for s in sums], axis=1),
        "sum_channels": np.asarray([s.bins.shape[1] for s in sums], np.int64),
        "sum_counts": np.asarray([s.count for s in sums], np.int64),
        "sum_low": np.concatenate([s.reach.low for s in sums]),
        "sum_high": np.concatenate([s.reach.high for s in sums]),
    }


def unpack_sums(arrays: Arrays) -> list[ChannelSum]:
    """The channel sums, from what ``pack_sums`` gave."""
    if "sum_bins" not in arrays:
        return []
    sizes = arrays["sum_channels"]
    bins, low, high = (_split(arrays[f"sum_{f}"], sizes) for f in ("bins", "low", "high"))
    counts = arrays["sum_counts"].tolist()
    return [
        ChannelSum(b, count, TensorRange(least, most))
        for b, count, least, most in zip(bins, counts, low, high, strict=True)
    ]


def pack_moments(moments: Sequence[MomentSum | None]) -> Arrays:
    """Moments by position in the sequence: exponents, products, sums and count; nothing for None.

    They can be large, so they are not copied into one array.
    """
    arrays: Arrays = {}
    for k, total in enumerate(moments):
        if total is None:
            continue
        exponents = sorted(total.bins)
        arrays[f"moment_{k}"] = np.asarray([total.count, *exponents], np.int64)
        for exponent in exponents:
            products, sums = total.bins[exponent]
            arrays[f"moment_{k}_{exponent}_products"] = products
            arrays[f"moment_{k}_{exponent}_sums"] = sums
    return arrays


def unpack_moments(arrays: Arrays, size: int) -> list[MomentSum | None]:
    """The sequence that ``pack_moments`` took, of this size."""
    found: list[MomentSum | None] = []
    for k in range(size):
        head = arrays.get(f"moment_{k}")
        if head is None:
            found.append(None)
            continue
        count, *exponents = head.tolist()
        bins = {
            e: (arrays[f"moment_{k}_{e}_products"], arrays[f"moment_{k}_{e}_sums"])
            for e in exponents
        }
        found.append(MomentSum(bins, count))
    return found


def _split(joined: NDArray[Any], sizes: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Cut an array along its last axis into consecutive parts of these sizes."""
    edges = np.concatenate(([0], np.cumsum(sizes)))
    if edges[-1] != joined.shape[-1] or (sizes < 0).any():
        raise CalibrationError(
            f"its parts add up to {edges[-1]} columns, but there are {joined.shape[-1]}"
        )
    return [joined[..., a:b].copy() for a, b in pairwise(edges.tolist())]
