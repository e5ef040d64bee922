"""Smoothing: outlier channels of a matrix product's input move into its weights. Numpy only.

For positive divisors d of the K input channels, ``x @ w = (x / d) @ (d[:, None] * w)``. If few
channels of x are much larger than the others, one scale for all of x leaves the others few codes;
weights, with a scale per output channel, have room to spare. Dividing by ::

    d_k = peak_k ** alpha / reach_k ** (1 - alpha)

with peak_k the largest ``|x_k|`` and reach_k the largest ``|w_k|`` of a row shares the load (Xiao
et al. 2023, "SmoothQuant"). alpha is chosen for each tensor, by the least expected error of the
products: with a step s of the input and s_n of the output channels' weights, ::

    s**2 / 12 * sum(d_k**2 w_kn**2)  +  sum(s_n**2) / 12 * sum(E[x_k**2] / d_k**2)

where ``E[x_k**2]`` is taken as proportional to ``peak_k**2``. d is rounded to powers of two, so
that neither division nor multiplication rounds: the float model stays exactly what it was. Factors
of 1/2 and 2 are taken as 1: like channels differ by as much by chance.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdq.affine import params_from_range
from qdq.ranges import TensorRange
from qdq.spec import QuantSpec

__all__ = ["Smoothing", "find_smoothing"]

PAYS = 0.7
"""The expected error must fall below this share of what it is: the division takes some time."""
_ALPHAS = np.linspace(0.5, 1.0, 11)
_CHANCE = 1
"""Exponents that the peaks of like channels differ by in a small sample. Following them would fit
the range to the calibration data, channel by channel, and saturate what comes later."""
_MOST = 2.0**12  # a channel is divided by at most this much more, or less, than the median one


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Smoothing:
    """How one tensor is smoothed.

    Attributes:
        divisors: float32 (K,), powers of two; the tensor is divided by them, the rows of the
            weights that read it are multiplied.
        range: of the divided tensor, shape ().
        alpha: share of the load that goes to the weights.
        error: expected error of the products over that without smoothing.
    """

    divisors: NDArray[np.float32]
    range: TensorRange
    alpha: float
    error: float


def find_smoothing(
    reach: TensorRange,
    weights: Sequence[NDArray[np.floating]],
    spec: QuantSpec,
    weight_spec: QuantSpec,
    noise: float,
    energy: float,
) -> Smoothing | None:
    """The best smoothing of a tensor, or None where it does not pay.

    Args:
        reach: range of each channel, shape (K,).
        weights: all that the tensor is multiplied with, (K, N) each.
        spec: of the tensor.
        weight_spec: of the weights; without an axis one scale serves all output channels.
        noise: variance of its rounding without smoothing.
        energy: mean square of its values.
    """
    peak = np.maximum(np.abs(reach.low), np.abs(reach.high)).astype(np.float64)
    # Powers of two change no digits, so products with float32 weights stay exact in float32.
    rows = np.abs(np.concatenate(weights, axis=1))
    largest = rows.max(axis=1, initial=0.0).astype(np.float64)
    if not energy > 0 or not peak.max() > 0 or not largest.max() > 0:
        return None
    squares = energy * peak.size * peak**2 / (peak @ peak)
    power = np.einsum("kn,kn->k", rows, rows, dtype=np.float64)
    before = noise * power.sum() + _weight_noise(rows, weight_spec) * squares.sum()
    best: Smoothing | None = None
    candidates = _divisors(peak, largest)
    other = np.append(True, (candidates[1:] != candidates[:-1]).any(axis=1))
    for alpha, divisors in zip(_ALPHAS[other], candidates[other], strict=True):
        found = TensorRange(
            np.asarray((reach.low / divisors).min()), np.asarray((reach.high / divisors).max())
        )
        step = float(params_from_range(found, spec).scale)
        after = step**2 / 12 * (divisors**2 @ power)
        wanted = PAYS if best is None else best.error
        if after / before >= wanted:
            continue  # and what the weights add takes longer to find
        scaled = rows * divisors.astype(rows.dtype)[:, None]
        after += _weight_noise(scaled, weight_spec) * (squares @ divisors**-2.0)
        error = float(after / before)
        if error < wanted:
            best = Smoothing(
                divisors=divisors.astype(np.float32), range=found, alpha=float(alpha), error=error
            )
    return best


def _weight_noise(rows: NDArray[np.floating], spec: QuantSpec) -> float:
    """Sum over the output channels of the variance of the rounding of weights, given as ``|w|``."""
    top = rows.max(axis=0).astype(np.float64)
    if spec.axis is None:
        top[:] = top.max()
    return float(((2 * top / (spec.qmax - spec.qmin)) ** 2).sum() / 12)


def _divisors(peak: NDArray[np.float64], largest: NDArray[np.float64]) -> NDArray[np.float64]:
    """The formula, as powers of two, around 1: (alphas, K)."""
    tiny = np.finfo(np.float32).tiny
    outer, inner = (np.log2(np.maximum(v, tiny)) for v in (peak, largest))
    alpha = _ALPHAS[:, None]
    logs = alpha * outer - (1 - alpha) * inner
    logs -= np.median(logs, axis=1, keepdims=True)
    logs = np.clip(logs, -np.log2(_MOST), np.log2(_MOST))
    exponents = np.rint(logs)
    exponents[np.abs(exponents) <= _CHANCE] = 0
    return np.asarray(np.exp2(exponents))
