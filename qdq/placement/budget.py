"""The most accurate plan within a latency."""

from collections.abc import Callable, Mapping, Sequence

from qdq.plan import Plan

__all__ = ["PRICES", "most_accurate", "plans_by_worth"]

PRICES = (1e9, 1e3, 300.0, 100.0, 45.0, 20.0, 10.0, 6.0, 3.0, 1.5, 0.7, 0.0)
"""What accuracy may be worth, from all float to the fastest."""


def plans_by_worth(plan_for: Callable[[float], Plan]) -> list[tuple[float, Plan]]:
    """The different plans for ``PRICES``, the most accurate first; each with its greatest price.

    Args:
        plan_for: worth → plan; what it leaves float stays float for a greater worth.
    """
    found: dict[frozenset[str], tuple[float, Plan]] = {}
    for worth in PRICES:
        plan = plan_for(worth)
        found.setdefault(plan.placement.integer, (worth, plan))
    return list(found.values())


def most_accurate(
    plans: Sequence[Plan], latency: Callable[[Plan], float], target: float
) -> tuple[int, Mapping[int, float]]:
    """The first plan whose latency is at most the target, if they get ever faster.

    Halving the plans takes log2(n) measurements.

    Args:
        plans: from the most accurate to the fastest.
        latency: measures that of a plan.
        target: in the same unit.

    Returns:
        The index of the plan, that of the last one if none is fast enough; and what was measured,
        index → latency.
    """
    measured: dict[int, float] = {}
    low, high = 0, len(plans)
    while low < high:
        middle = (low + high) // 2
        measured[middle] = latency(plans[middle])
        if measured[middle] <= target:
            high = middle
        else:
            low = middle + 1
    return min(low, len(plans) - 1), measured
