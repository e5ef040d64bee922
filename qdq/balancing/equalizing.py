"""Equalization across layers: quiet channels of an activation grow, at no cost. Numpy only.

What hands out the channels of a tensor (weights, Relu, pooling, sums) and all that reads them are
positively homogeneous: with a factor f > 0 for each channel, ::

    relu(f (w x + b)) = f relu(w x + b)

so the rows of the weights before it are multiplied, and the columns of those behind it divided, by
f, and the model computes what it did (Nagel et al. 2019, "Data-free quantization through weight
equalization and bias correction"). There f is chosen for the weights, which here have a scale
per output channel and do not need it. Here f is chosen for the activation, which has one scale
for all of its channels: those that use few of its codes grow until they use more.

A rounding with a step s then makes the error ::

    s**2 / 12 * sum(|w_k|**2 / f_k**2)  +  sum(s_n**2) / 12 * sum(f_k**2 E[x_k**2])

behind the weights w that read it, where s_n is the step of output channel n, from the largest of
``|w_kn| / f_k``. As in smoothing, ``E[x_k**2]`` is taken as proportional to the squared peak, and
factors are powers of two, so that the float model stays exactly what it was. No channel
is charged more than its ``E[x_k**2]``: what is smaller than a step becomes 0, and zeros are exact.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdq.ranges import TensorRange
from qdq.spec import QuantSpec

__all__ = ["Equalization", "Reading", "find_equalization"]

PAYS = 0.5
"""The expected error must fall below this share of what it is: the peak of a channel is known
less well than that of the tensor, and what exceeds it is cut off."""
_MARGIN = 2.0  # what grows stays below this part of the largest channel's reach
_MOST = (2.0, 4.0)  # the largest factor; what more would bring is lost to channels that wake up


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reading:
    """A tensor of the group that is rounded, and weights that its error passes through.

    Attributes:
        tensor: its name.
        reach: range of each channel, shape (C,).
        scale: its step, from the calibrated range.
        range: that range, shape ().
        energy: mean square of its values.
        weight: (C, N, taps), what channel k gives to output n; for one weight per channel
            (depthwise) (C, 1, taps) and ``apart``. None: the error goes on as it is (a sum).
        apart: each channel has an output, and so a scale, of its own.
        weight_spec: of the weights; without an axis one scale serves all outputs.
    """

    tensor: str
    reach: TensorRange
    scale: float
    range: TensorRange
    energy: float
    weight: NDArray[np.floating] | None = None
    apart: bool = False
    weight_spec: QuantSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Equalization:
    """How the channels of a group grow.

    Attributes:
        factors: float32 (C,), powers of two from 1 up.
        error: expected error over that without, of the whole group.
        errors: the same for each of its tensors.
    """

    factors: NDArray[np.float32]
    error: float
    errors: Mapping[str, float]

    @property
    def inverse(self) -> NDArray[np.float32]:
        """What the weights that read the tensors are multiplied with, (C,)."""
        return np.reciprocal(self.factors)


def find_equalization(readings: Sequence[Reading]) -> Equalization | None:
    """The best factors for the channels of a group, or None where it does not pay.

    Args:
        readings: all roundings of the group's tensors; at least one.
    """
    costs = [_Cost(r) for r in readings if r.energy > 0]
    if not costs:
        return None
    room = np.min([_room(r) for r in readings], axis=0)
    before = [cost.of(np.ones_like(room)) for cost in costs]
    if not sum(before) > 0:
        return None  # weights of zeros: nothing is felt
    best: Equalization | None = None
    for most in _MOST:
        factors = np.exp2(np.floor(np.log2(np.clip(room, 1.0, most))))
        after = [cost.of(factors) for cost in costs]
        error = sum(after) / sum(before)
        if error < (PAYS if best is None else best.error):
            names = [cost.tensor for cost in costs]
            best = Equalization(
                factors=factors.astype(np.float32),
                error=error,
                errors={name: _ratio(names, after, before, name) for name in names},
            )
    return best


def _ratio(
    names: Sequence[str], after: Sequence[float], before: Sequence[float], name: str
) -> float:
    new, old = (
        sum(e for n, e in zip(names, errors, strict=True) if n == name)
        for errors in (after, before)
    )
    return new / old if old > 0 else 1.0


def _room(reading: Reading) -> NDArray[np.float64]:
    """How much each channel may grow; inf for a silent one.

    To a part of the reach of the largest channel, and not beyond the calibrated range, which may
    cut off the few largest values of the large channels: it cuts off nothing of those that grow.
    """
    reach, found = reading.reach, reading.range
    high, low = (np.asarray(v, np.float64) for v in (reach.high, reach.low))
    with np.errstate(divide="ignore", invalid="ignore"):
        up = np.where(high > 0, min(high.max() / _MARGIN, float(found.high)) / high, np.inf)
        down = np.where(low < 0, max(low.min() / _MARGIN, float(found.low)) / low, np.inf)
    room: NDArray[np.float64] = np.minimum(up, down)
    return room


class _Cost:
    """The error of one reading over its signal, as a function of the factors."""

    def __init__(self, reading: Reading) -> None:
        reach = reading.reach
        peak = np.maximum(np.abs(reach.low), np.abs(reach.high)).astype(np.float64)
        self.tensor = reading.tensor
        self._squares = reading.energy * peak.size * peak**2 / max(float(peak @ peak), 1e-300)
        self._noise = reading.scale**2 / 12
        self._power = np.ones(peak.size)
        self._peaks: NDArray[np.float64] | None = None
        self._steps, self._taps, self._whole = 1.0, 1, False
        self._constant = 0.0
        if reading.weight is not None and reading.weight_spec is not None:
            spec = reading.weight_spec
            self._power = np.square(reading.weight, dtype=np.float64).sum(axis=(1, 2))
            self._taps, self._whole = reading.weight.shape[2], spec.axis is None
            self._steps = (spec.qmax - spec.qmin) / 2
            peaks = np.abs(reading.weight).max(axis=2).astype(np.float64)
            if reading.apart and not self._whole:  # scales and values change by the same factors
                variance = (peaks[:, 0] / self._steps) ** 2 / 12
                self._constant = self._taps * float(variance @ self._squares)
            else:
                self._peaks = peaks
        self._signal = max(float(self._squares @ self._power), 1e-300)

    def of(self, factors: NDArray[np.float64]) -> float:
        """Expected squared error over that of the signal."""
        error = float(self._power @ np.minimum(self._noise / factors**2, self._squares))
        if self._peaks is not None:
            top = np.max(self._peaks / factors[:, None], axis=0)
            if self._whole:
                top[:] = top.max()
            variance = float(np.sum((top / self._steps) ** 2)) / 12
            error += variance * self._taps * float(self._squares @ factors**2)
        return (error + self._constant) / self._signal
