"""What rounding does to a model's outputs: the records, and how an error is weighed. Numpy only."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["Reading", "Sensitivity", "decibels", "read", "relative_error"]

Values = Mapping[str, NDArray[np.generic]]


def relative_error(reference: NDArray[np.generic], value: NDArray[np.generic]) -> float:
    """Energy of the error over the energy of the signal, mean over channels, at most 1 in each.

    Channels are the indices of axis 1 of tensors of rank 3 and more; other tensors are one
    channel. A detector's output holds boxes of some 100 pixels beside probabilities below 1: as
    one tensor, the loss of all probabilities would not be seen. A channel is lost when the error
    is as large as the signal, and cannot be lost twice.

    Args:
        reference: the float model's tensor; values that are not finite are left out.
        value: the same tensor of a model with rounding. If its shape differs (a number of
            detections, say), all is lost.

    Returns:
        0 (equal) to 1 (lost).
    """
    if reference.shape != value.shape:
        return 1.0
    error, signal = _energies(reference, value, channels=True)
    ratio = np.minimum(error, signal) / np.where(signal > 0, signal, 1.0)
    return float(np.mean(np.where(signal > 0, ratio, error > 0))) if error.size else 0.0


def _energies(
    reference: NDArray[np.generic], value: NDArray[np.generic], *, channels: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Energies of error and signal, () or (channels,)."""
    a, b = reference.astype(np.float64), value.astype(np.float64)
    known = np.isfinite(a)
    a = np.where(known, a, 0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.where(known, a - b, 0.0) ** 2
    error = np.where(np.isfinite(error), error, np.finfo(np.float64).max / max(error.size, 1))
    axes = tuple(i for i in range(a.ndim) if i != 1) if channels and a.ndim > 2 else None
    return np.asarray(error.sum(axes)), np.asarray((a**2).sum(axes))


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


def read(
    reference: Values, value: Values, outputs: Sequence[str], logits: Sequence[str]
) -> Reading:
    """Compare a run with the float model's run.

    Args:
        reference: the float model's tensors.
        value: those of the model with rounding.
        outputs: names of the model's floating-point outputs.
        logits: names of tensors whose Softmax or Sigmoid is an output. A probability near 0 or 1
            hides an error that the next sample will show; its logit does not. Only differences of
            logits count, so their signal is taken around its mean.
    """
    harm = [relative_error(reference[n], value[n]) for n in outputs]
    for name in logits:
        if reference[name].shape != value[name].shape:
            harm.append(1.0)
            continue
        middle = _centred(reference[name])
        shift = reference[name].reshape(-1).astype(np.float64) - middle
        harm.append(relative_error(middle, value[name].reshape(-1).astype(np.float64) - shift))
    noise, signal = {}, {}
    for name in outputs:
        same = reference[name].shape == value[name].shape
        other = value[name] if same else np.zeros_like(reference[name])
        error, energy = _energies(reference[name], other, channels=False)
        noise[name], signal[name] = float(error), float(energy)
    return Reading(float(np.mean(harm)), noise, signal)


def decibels(readings: Iterable[Reading]) -> float:
    """SQNR in dB over samples, 10 log10(signal / noise), of the worst output; inf without noise."""
    noise: dict[str, float] = {}
    signal: dict[str, float] = {}
    for reading in readings:
        for name in reading.noise:
            noise[name] = noise.get(name, 0.0) + reading.noise[name]
            signal[name] = signal.get(name, 0.0) + reading.signal[name]
    tiny = float(np.finfo(np.float64).tiny)
    worst = [10 * np.log10(max(signal[n], tiny) / e) for n, e in noise.items() if e > 0]
    return float(min(worst, default=np.inf))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """The harm that each rounding does alone: mean relative error of the outputs, 0 to 1.

    Small errors of independent roundings add up in energy, so the harm of several is about the
    sum of theirs.

    Attributes:
        tensors: activation → harm of rounding it.
        weights: linear node → harm of rounding its weight (with the corrected bias).
        together: harm of all of them at once, measured.
        samples: on how many samples it was measured.
    """

    tensors: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    together: float = 0.0
    samples: int = 1

    @property
    def total(self) -> float:
        """Sum of all harms; compare with ``together`` to see how well they add up."""
        return sum(self.tensors.values()) + sum(self.weights.values())

    def of(self, tensors: Iterable[str], nodes: Iterable[str]) -> float:
        """Predicted harm of rounding these activations and these nodes' weights."""
        return sum(self.tensors.get(t, 0.0) for t in tensors) + sum(
            self.weights.get(n, 0.0) for n in nodes
        )

    def ranked(self) -> tuple[tuple[str, str, float], ...]:
        """("tensor" or "weight of", name, harm), the most harmful first."""
        rows = [("tensor", n, h) for n, h in self.tensors.items()]
        rows += [("weight of", n, h) for n, h in self.weights.items()]
        return tuple(sorted(rows, key=lambda row: (-row[2], row[0], row[1])))

    def merge(self, other: "Sensitivity") -> "Sensitivity":
        """Both measurements together, weighted with their numbers of samples."""
        count = self.samples + other.samples

        def mean(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
            both = {n: (a[n] * self.samples + b[n] * other.samples) / count for n in a if n in b}
            return {**a, **b, **both}

        return Sensitivity(
            tensors=mean(self.tensors, other.tensors),
            weights=mean(self.weights, other.weights),
            together=(self.together * self.samples + other.together * other.samples) / count,
            samples=count,
        )

    def __str__(self) -> str:
        """A table, the most harmful first."""
        lines = [f"{h:10.3g}  {kind} {name}" for kind, name, h in self.ranked()]
        lines.append(f"{self.total:10.3g}  sum; {self.together:.3g} measured together")
        return "\n".join(lines)
