"""What the plan and the solver did, as plain values for the model's metadata."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from qdq.balancing.channels import Group
from qdq.balancing.equalizing import Equalization
from qdq.balancing.smoothing import Smoothing
from qdq.plan import Plan
from qdq.solve import Change

__all__ = ["equalization_history", "planned_counts", "scale_history", "smoothing_history"]


def smoothing_history(
    smoothings: Mapping[str, Smoothing], products: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """Which tensors were divided, and how.

    Returns:
        For each: ``tensor``, ``alpha``, ``error`` (expected, after over before), ``exponents`` (of
        two: the divisor of each channel) and ``nodes``, the products that read it.
    """
    return [
        {
            "tensor": name,
            "alpha": round(s.alpha, 3),
            "error": float(f"{s.error:.3g}"),
            "exponents": np.log2(s.divisors).astype(int).tolist(),
            "nodes": list(products[name]),
        }
        for name, s in smoothings.items()
    ]


def equalization_history(found: Sequence[tuple[Group, Equalization]]) -> list[dict[str, Any]]:
    """Which groups of tensors have channels with factors.

    Returns:
        For each: ``tensors``, ``error`` (expected, after over before), ``exponents`` (of two: the
        factor of each channel), and the constants that are ``multiplied`` and ``divided`` by them:
        name and axis.
    """
    return [
        {
            "tensors": list(group.tensors),
            "error": float(f"{e.error:.3g}"),
            "exponents": np.log2(e.factors).astype(int).tolist(),
            "multiplied": [[c.name, c.axis] for c in group.makers],
            "divided": [[r.weight.name, r.weight.axis] for r in group.readers],
        }
        for group, e in found
    ]


def planned_counts(plan: Plan, floats: Collection[str]) -> dict[str, int]:
    """Operator → number of nodes that the plan has on integers, less those in ``floats``."""
    integer = plan.placement.integer.difference(floats)
    types = (u.view.op_type for u in plan.placement.units if u.view.name in integer)
    return dict(sorted(Counter(types).items()))


def scale_history(changes: Iterable[Change], weights: Collection[str]) -> list[dict[str, Any]]:
    """What the steps did to the scales of weights, and every change that has a note.

    Activations get their scale once and biases derive theirs, so they appear only with a note.

    Args:
        changes: ``Solution.changes``.
        weights: names of the weights.

    Returns:
        In the order of the changes: ``tensor``, ``step``, ``scale`` (the largest after the step),
        and where there is one ``ratio`` (largest new scale over old) and ``note``.
    """
    found = []
    for change in changes:
        if change.after is None or not (change.tensor in weights or change.note is not None):
            continue
        entry: dict[str, Any] = {
            "tensor": change.tensor,
            "step": change.step,
            "scale": float(change.after.scale.max(initial=0.0)),
        }
        if change.ratio is not None:
            entry["ratio"] = change.ratio
        if change.note is not None:
            entry["note"] = change.note.text
        found.append(entry)
    return found
