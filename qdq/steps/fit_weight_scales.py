"""Weight scales by the error of the outputs in place of the largest weight."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from qdq.bias_scale import with_scale
from qdq.checks import want, want_above_0, want_whole
from qdq.problem import Constant, Fixed, Problem, Shared
from qdq.solve import Note, State
from qdq.spec import QuantParams
from qdq.steps.layer_error import Grid, LayerError, layer_errors

__all__ = ["FitWeightScales"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class FitWeightScales:
    """Choose each weight scale so that the rounded weights leave the least error in the outputs.

    The scale that FromConstants gives reaches the largest weight. A smaller one saturates some
    weights and resolves the others better, and any other one rounds differently, to the better
    or the worse; with few weights to a channel (depthwise convolutions) that is most of the gain.
    From ``candidates`` factors, evenly spaced over [least, most], each entry of the scale takes
    the one with the least ``e' H e`` (``qdq.steps.layer_error``), summed over all channels that
    it serves, with weights rounded to nearest. The present scale is always a candidate and wins
    ties, so the error never grows.

    Given and Shared weights keep their scales, as do transposed convolutions and nodes without
    moments. Put it after ShareParams, and before RoundWeights, CorrectBias and FitWeightsToBias.

    Attributes:
        least: the smallest factor.
        most: the largest factor.
        candidates: how many factors are tried.
        damping: share of the mean diagonal of H that is added to it.

    Raises:
        ConfigError: if not 0 < least <= most < inf, candidates is no whole number from 1 up, or
            damping is no finite number above 0.
    """

    least: float = 0.8
    most: float = 1.03
    candidates: int = 24
    damping: float = 0.01

    needs: ClassVar[frozenset[str]] = frozenset({"moments"})

    def __post_init__(self) -> None:
        for option in ("least", "most", "damping"):
            want_above_0(option, getattr(self, option))
        want("most", self.most, self.most >= self.least, f"at least least={self.least}")
        want_whole("candidates", self.candidates, 1)

    def __call__(self, problem: Problem, state: State) -> State:
        """Return the state with chosen weight scales."""
        owners = {t.source.owner for t in problem.tensors.values() if isinstance(t.source, Shared)}
        found: dict[str, QuantParams] = {}
        notes: dict[str, Note] = {}
        for name, layer in layer_errors(problem, state, self, self.damping):
            plan = problem.tensors.get(name)
            if plan is None or not isinstance(plan.source, Constant | Fixed) or name in owners:
                continue
            present = state.need(name, self)
            chosen, before, after = self._search(layer, present)
            if chosen != present:
                found[name] = chosen
                notes[name] = _note(present, chosen, before, after)
        return state.set(found, notes)

    def _search(self, layer: LayerError, present: QuantParams) -> tuple[QuantParams, float, float]:
        """The best scales, and the error before and after."""
        best = first = entry_errors(layer, present)
        scale = present.scale
        for factor in np.linspace(self.most, self.least, self.candidates):
            tried = (present.scale * factor).astype(scale.dtype)
            usable = np.isfinite(tried) & (tried >= np.finfo(np.float32).tiny)
            tried = np.where(usable, tried, present.scale).astype(scale.dtype)
            errors = entry_errors(layer, with_scale(present, tried))
            better = (errors < best).reshape(scale.shape)
            scale = np.where(better, tried, scale)
            best = np.minimum(best, errors)
        return with_scale(present, scale), float(first.sum()), float(best.sum())


def entry_errors(layer: LayerError, params: QuantParams) -> Floats:
    """(C,) or (1,): ``e' H e`` of weights rounded to nearest, summed per entry of the scale."""
    entries = layer.entries(params)
    total = np.zeros(params.scale.size)
    for part, rows in layer.chunks():
        grid = Grid.of(layer, params, part)
        errors = rows.of(rows.weight - grid.nearest(rows.weight) * grid.scale[:, :, None])
        total += np.bincount(entries[:, part].ravel(), errors.ravel(), total.size)
    return total


def _note(before: QuantParams, after: QuantParams, first: float, best: float) -> Note:
    ratio = after.scale.astype(np.float64) / before.scale
    gain = 10 * float(np.log10(first / best)) if best > 0 else 0.0
    text = (
        f"{np.mean(ratio != 1):.0%} of the scales changed, by {ratio.min():.3f} to "
        f"{ratio.max():.3f}: expected squared error of the outputs lowered by {gain:.1f} dB"
    )
    values = {"gain_db": gain, "error_before": first, "error_after": best}
    return Note(text, values | {"least": float(ratio.min()), "most": float(ratio.max())})
