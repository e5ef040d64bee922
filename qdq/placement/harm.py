"""What rounding does to a model's outputs: the records, and how an error is weighed. Numpy only."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qdq.placement.ranking import in_order
from qdq.sqnr import decibels

__all__ = [
    "COMMON",
    "LONE",
    "POSITIONS",
    "Judged",
    "Reading",
    "read",
    "relative_error",
    "worst_decibels",
]

Values = Mapping[str, NDArray[np.generic]]

LONE = 4.0
"""Least signal of a logit that stands alone.

sigmoid' is at most 1/4, so over a signal of 4 an error is at least what the probability moves.
"""

COMMON, POSITIONS = 0.1, 8
"""What so many positions or more have in common is a tenth of their signal at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """The tensors that a model is judged by.

    A probability near 0 or 1 hides an error that the next sample will show; its logit does not. So
    logits count beside the outputs that are made of them, and in place of those that are one
    probability for each entry of the batch: the relative error of 0.001 says nothing of a decision.

    Attributes:
        outputs: the model's floating-point outputs.
        weighed: those whose relative error counts.
        logits: other tensors whose Softmax or Sigmoid is an output. Only differences count.
        lone: logits of a Sigmoid, one for each entry of the batch, which have nothing to differ
            from.
        ranked: those whose entries along an axis are in the order of a TopK → the axis. What is
            nearly equal changes places in it, and no reader of the entries minds.
        varied: those whose last axis are features, or classes, of positions (the tokens of a
            text): what all positions have in common tells nothing. A language model's logits
            have 3 to 15 dB more energy than what differs, since rare words are rare everywhere.
    """

    outputs: tuple[str, ...]
    weighed: tuple[str, ...]
    logits: tuple[str, ...] = ()
    lone: tuple[str, ...] = ()
    ranked: Mapping[str, int] = field(default_factory=dict)
    varied: frozenset[str] = frozenset()

    @property
    def names(self) -> tuple[str, ...]:
        """All that has to be seen of a run."""
        return tuple(dict.fromkeys((*self.outputs, *self.logits, *self.lone)))


def relative_error(
    reference: NDArray[np.generic], value: NDArray[np.generic], least: float = 0.0
) -> float:
    """Energy of the error over the energy of the signal, mean over channels, at most 1 in each.

    Channels are the indices of axis 1 of tensors of rank 3 and more; other tensors are one
    channel. A detector's output holds boxes of some 100 pixels beside probabilities below 1: as
    one tensor, the loss of all probabilities would not be seen. A channel is lost when the error
    is as large as the signal, and cannot be lost twice.

    Args:
        reference: the float model's tensor; values that are not finite are left out.
        value: the same tensor of a model with rounding. If its shape differs (a number of
            detections, say), all is lost.
        least: what each element of the signal is taken for at least.

    Returns:
        0 (equal) to 1 (lost).
    """
    if reference.shape != value.shape:
        return 1.0
    error, signal = _energies(reference, value, channels=True, least=least)
    ratio = np.minimum(error, signal) / np.where(signal > 0, signal, 1.0)
    return float(np.mean(np.where(signal > 0, ratio, error > 0))) if error.size else 0.0


def _energies(
    reference: NDArray[np.generic],
    value: NDArray[np.generic],
    *,
    channels: bool,
    least: float = 0.0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Energies of error and signal, () or (channels,)."""
    a, b = reference.astype(np.float64), value.astype(np.float64)
    known = np.isfinite(a)
    a = np.where(known, a, 0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.where(known, a - b, 0.0) ** 2
    error = np.where(np.isfinite(error), error, 1e300 / max(error.size, 1))
    axes = tuple(i for i in range(a.ndim) if i != 1) if channels and a.ndim > 2 else None
    signal = np.where(known, np.maximum(np.abs(a), least), 0.0) ** 2
    return np.asarray(error.sum(axes)), np.asarray(signal.sum(axes))


def _centred(x: NDArray[np.generic]) -> NDArray[np.float64]:
    wide = x.astype(np.float64).reshape(-1)
    known = np.isfinite(wide)
    return wide - (wide[known].mean() if known.any() else 0.0)


@dataclass(frozen=True, slots=True)
class Reading:
    """How far one run is from the float model, on one sample.

    Attributes:
        harm: mean relative error over all measured tensors, 0 to 1.
        noise: energy of the error, per model output.
        signal: energy of the float model's output, per model output.
    """

    harm: float
    noise: Mapping[str, float]
    signal: Mapping[str, float]


def read(reference: Values, value: Values, judged: Judged) -> Reading:
    """Compare a run with the float model's run.

    Args:
        reference: the float model's tensors.
        value: those of the model with rounding.
        judged: which tensors count, and how.
    """
    value = in_order(reference, value, judged.ranked)
    errors = {
        **dict.fromkeys(judged.weighed, relative_error),
        **dict.fromkeys(judged.logits, _difference_error),
    }
    errors |= {n: _variation_error for n in errors if n in judged.varied}
    harm = [error(reference[n], value[n]) for n, error in errors.items()]
    harm += [relative_error(reference[n], value[n], LONE) for n in judged.lone]
    noise, signal = {}, {}
    for name in judged.outputs:
        same = reference[name].shape == value[name].shape
        other = value[name] if same else np.zeros_like(reference[name])
        error, energy = _energies(reference[name], other, channels=False)
        noise[name], signal[name] = float(error), float(energy)
    return Reading(float(np.mean(harm)), noise, signal)


def _variation_error(reference: NDArray[np.generic], value: NDArray[np.generic]) -> float:
    """The relative error where only what differs between positions is signal."""
    if reference.shape != value.shape:
        return 1.0
    if reference.size < POSITIONS * reference.shape[-1]:
        return relative_error(reference.reshape(-1), value.reshape(-1))
    error, energy = _energies(reference, value, channels=False)
    a = np.where(np.isfinite(reference), reference, 0).astype(np.float64)
    varied = np.square(a - a.mean(tuple(range(a.ndim - 1)))).sum()
    signal = max(float(varied), COMMON * float(energy))
    return min(float(error) / signal, 1.0) if signal > 0 else float(error > 0)


def _difference_error(reference: NDArray[np.generic], value: NDArray[np.generic]) -> float:
    """The relative error of logits of which only differences count: around their mean."""
    if reference.shape != value.shape:
        return 1.0
    middle = _centred(reference)
    shift = reference.reshape(-1).astype(np.float64) - middle
    return relative_error(middle, value.reshape(-1).astype(np.float64) - shift)


def worst_decibels(readings: Iterable[Reading]) -> float:
    """SQNR in dB over samples, 10 log10(signal / noise), of the worst output; inf without noise."""
    noise: dict[str, float] = {}
    signal: dict[str, float] = {}
    for reading in readings:
        for name in reading.noise:
            noise[name] = noise.get(name, 0.0) + reading.noise[name]
            signal[name] = signal.get(name, 0.0) + reading.signal[name]
    return min((decibels(signal[n], e) for n, e in noise.items()), default=math.inf)
