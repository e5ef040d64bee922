"""Entries in the order of a TopK, compared whatever their order. Numpy only.

Scores that are nearly equal change places with the smallest rounding, and what reads the entries of
a detector does not mind. Compared place by place, all of them would count as lost.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

__all__ = ["in_order"]

Values = Mapping[str, NDArray[np.generic]]

_MOST = 1000  # entries; all pairs are compared
_ROUNDS = 32  # enough unless many entries are equal, and then their order does not matter


def in_order(reference: Values, value: Values, ranked: Mapping[str, int]) -> Values:
    """The values with their ranked entries in the order of the reference.

    Each entry goes to the one of the reference that it is nearest to, the nearest pair first.

    Args:
        reference: the float model's tensors.
        value: the same tensors of a model with rounding.
        ranked: tensors of one entry for each that was chosen → the axis of the entries. All of them
            have the same order.

    Returns:
        ``value`` itself where the numbers of entries differ, or are too many, or where there is a
        batch, whose entries have an order for each sample.
    """
    names = [n for n in ranked if n in reference and reference[n].shape == value[n].shape]
    names = [n for n in names if reference[n].shape[0] == 1 or ranked[n] == 0]
    sizes = {reference[n].shape[ranked[n]] for n in names}
    if len(sizes) != 1 or not 1 < (size := sizes.pop()) <= _MOST:
        return value
    distance = np.zeros((size, size))
    for name in names:
        a, b = (_rows(v[name], ranked[name]) for v in (reference, value))
        squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
        distance += squares / max(float((a**2).sum()), 1e-300)
    order = _pairs(distance)
    return {**value, **{n: np.take(value[n], order, ranked[n]) for n in names}}


def _rows(x: NDArray[np.generic], axis: int) -> NDArray[np.float64]:
    """Entries as rows of finite numbers."""
    found = np.moveaxis(x.astype(np.float64), axis, 0)
    return np.nan_to_num(found.reshape(found.shape[0], -1), posinf=1e30, neginf=-1e30)


def _pairs(distance: NDArray[np.float64]) -> NDArray[np.intp]:
    """Row → its column. Pairs that are each other's nearest, again and again among the rest."""
    rows = columns = np.arange(len(distance))
    order = rows.copy()
    for _ in range(_ROUNDS):
        if not rows.size:
            break
        left = distance[np.ix_(rows, columns)]
        nearest = left.argmin(1)
        mutual = left.argmin(0)[nearest] == np.arange(rows.size)
        order[rows[mutual]] = columns[nearest[mutual]]
        rows, columns = rows[~mutual], np.delete(columns, nearest[mutual])
    order[rows] = columns
    return order
