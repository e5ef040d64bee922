"""Rounding by error: weights go to the codes that keep the outputs, not to the nearest ones."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from qdq.affine import dequantize
from qdq.checks import want_above_0, want_whole
from qdq.problem import Problem
from qdq.solve import Note, State
from qdq.steps.layer_error import Grid, LayerError, layer_errors

__all__ = ["RoundWeights"]

_RUN = 64  # terms between two matrix products

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundWeights:
    """Round weights so that the errors of one output channel cancel, by second moments.

    For each output channel the squared error ``e' H e`` of its sum is to be small
    (``qdq.steps.layer_error``), where ``e = w - w_hat`` and w_hat is on the grid of the codes.
    With ``H = R' R`` (Cholesky, R upper triangular) the terms are rounded from the last to the
    first, each to the code nearest to ::

        w_k + sum_(j > k) R_kj / R_kk e_j

    which makes up for the errors made so far (Babai's nearest plane; the same result as GPTQ,
    Frantar et al. 2022, without the inverse of H; Chen et al. 2025, "The Geometry of LLM
    Quantization"). Terms of large variance come first. Then, ``sweeps`` times, each code in turn
    is replaced by the best one, given the others (coordinate descent). Where the nearest codes
    are still better, they stay: no channel's error grows.

    The result goes to ``State.constants`` as real values on the grid, which ``emit`` rounds to
    just these codes. Scales do not change. Put it after the steps that choose weight scales and
    before CorrectBias, which moves the mean error into the bias. Where FitWeightsToBias or
    AvoidSaturation have to raise a scale afterwards, the weights are rounded again.

    Left as they are: transposed convolutions, nodes without moments.

    Attributes:
        damping: share of the mean diagonal of H that is added to it.
        sweeps: rounds of coordinate descent.

    Raises:
        ConfigError: if damping is no finite number above 0, or sweeps no whole number from 0 up.
    """

    damping: float = 0.01
    sweeps: int = 1

    needs: ClassVar[frozenset[str]] = frozenset({"moments"})

    def __post_init__(self) -> None:
        want_above_0("damping", self.damping)
        want_whole("sweeps", self.sweeps, 0)

    def __call__(self, problem: Problem, state: State) -> State:
        """Return the state with rounded weights."""
        found: dict[str, NDArray[np.floating]] = {}
        notes: dict[str, Note] = {}
        for name, layer in layer_errors(problem, state, self, self.damping):
            params = state.need(name, self)
            codes = np.empty(layer.weight.shape)
            errors = np.zeros(2)
            for part, rows in layer.chunks():
                codes[:, part], by_kind = self._round(rows, Grid.of(layer, params, part))
                errors += by_kind
            zero = Grid.of(layer, params, slice(None)).zero
            whole = layer.tensor(codes + zero[:, :, None]).astype(params.spec.dtype.dtype)
            found[name] = dequantize(whole, params)
            notes[name] = _note(errors)
        state = replace(state, constants={**state.constants, **found})
        return state.set({}, notes)

    def _round(self, layer: LayerError, grid: Grid) -> tuple[Floats, Floats]:
        """Codes without zero point (blocks, R, B); errors of the nearest and of the chosen."""
        nearest = grid.nearest(layer.weight)
        # Terms before rows: what belongs to one term lies together.
        columns = np.ascontiguousarray(layer.weight.swapaxes(1, 2))
        found = _nearest_plane(layer.hessian, columns, grid)
        for _ in range(self.sweeps):
            _descend(layer.hessian, columns, grid, found)
        scale, best = grid.scale[:, :, None], found.swapaxes(1, 2)
        before = layer.of(layer.weight - nearest * scale)
        after = layer.of(layer.weight - best * scale)
        keep = ~(after < before)  # ties: the nearest
        best = np.where(keep[:, :, None], nearest, best)
        errors = [before.sum(), np.where(keep, before, after).sum()]
        return best, np.array(errors)


def _nearest_plane(hessian: Floats, columns: Floats, grid: Grid) -> Floats:
    """Codes by error feedback, from the term of the largest variance to that of the smallest.

    Each term's code depends on the errors of those before it, so the terms are walked one by
    one; all blocks and rows go along at once, and what lies more than 64 terms back comes in by
    a matrix product.

    Args:
        hessian: (blocks, B, B).
        columns: the weights, (blocks, B, R).
        grid: the codes that they may take.

    Returns:
        Codes without zero point, (blocks, B, R).
    """
    order = np.argsort(np.einsum("bii->bi", hessian), axis=-1, kind="stable")
    matrix = np.take_along_axis(hessian, order[:, :, None], 1)
    matrix = np.take_along_axis(matrix, order[:, None, :], 2)
    upper = np.linalg.cholesky(matrix).swapaxes(1, 2)
    upper = upper / np.einsum("bii->bi", upper)[:, :, None]
    weight = np.take_along_axis(columns, order[:, :, None], 1)
    codes, error = np.empty_like(weight), np.zeros_like(weight)
    for end in range(weight.shape[1], 0, -_RUN):
        start = max(end - _RUN, 0)
        target = weight[:, start:end] + upper[:, start:end, end:] @ error[:, end:]
        for k in range(end - 1, start - 1, -1):
            codes[:, k] = grid.codes(target[:, k - start])
            error[:, k] = weight[:, k] - codes[:, k] * grid.scale
            target[:, : k - start] += upper[:, start:k, k, None] * error[:, k, None]
    back = np.argsort(order, axis=-1)
    return np.take_along_axis(codes, back[:, :, None], 1)


def _descend(hessian: Floats, columns: Floats, grid: Grid, codes: Floats) -> None:
    """One sweep of coordinate descent, in place: each code the best one, given the others."""
    scale = grid.scale[:, None]
    error = columns - codes * scale
    for start in range(0, codes.shape[1], _RUN):
        part = slice(start, start + _RUN)
        block = hessian[:, part, part]
        slope = hessian[:, part] @ error
        for k in range(block.shape[1]):
            now = codes[:, start + k].copy()
            wish = now * grid.scale + slope[:, k] / block[:, k, k, None]
            codes[:, start + k] = grid.codes(wish)
            change = (now - codes[:, start + k]) * grid.scale
            error[:, start + k] += change
            slope += block[:, :, k, None] * change[:, None]


def _note(errors: Floats) -> Note:
    """By how much the layer's expected squared error shrank."""
    before, after = (float(e) for e in errors)
    gain = 10 * float(np.log10(before / after)) if after > 0 else 0.0
    text = f"expected squared error of the outputs lowered by {gain:.1f} dB"
    return Note(text, {"gain_db": gain, "error_before": before, "error_after": after})
