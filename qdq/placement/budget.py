"""The choice among plans by measuring few of them."""

import math
from collections.abc import Callable, Mapping, Sequence

from qdq.placement.frontier import AMPLITUDE, Candidate

__all__ = ["first_within", "least_cost"]


def first_within(count: int, holds: Callable[[int], bool]) -> int:
    """The first of some candidates for which a condition holds, if it holds for all after it.

    Halving takes log2(count) trials.

    Args:
        count: how many candidates there are.
        holds: index → whether the condition holds.

    Returns:
        The index; that of the last one if it holds for none.
    """
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return min(low, count - 1)


def least_cost(
    candidates: Sequence[Candidate],
    amplitude: Callable[[Candidate], float],
    *,
    fastest: bool = False,
) -> tuple[int, Mapping[int, float]]:
    """The candidate with the least time + ``AMPLITUDE`` * measured amplitude, measuring few.

    What is foretold of a candidate is corrected by what was measured of the nearest one that was.
    The best one by that is measured in turn, until it has been.

    Args:
        candidates: from the fastest to the most accurate.
        amplitude: measures that of the outputs' error, over the signal.
        fastest: begin with the fastest one. Gradients foretell too much of large errors, so what
            they foretell of it may be wrong by more than that of others.

    Returns:
        The index of the candidate, and what was measured: index → amplitude. The float model's is
        known.
    """
    foretold = [math.sqrt(c.harm) for c in candidates]
    measured: dict[int, float] = {}

    def cost(k: int) -> tuple[float, int]:
        known = [m for m in measured if foretold[m] > 0]
        expected = measured.get(k, foretold[k])
        if k not in measured and known:
            nearest = min(known, key=lambda m: (abs(m - k), m))
            expected *= measured[nearest] / foretold[nearest]
        return candidates[k].time + AMPLITUDE * expected, k

    # the float model is never better than expected: the others get a chance first
    first = [0] if fastest else [k for k in range(len(candidates)) if foretold[k] > 0]
    best = min(first, key=cost, default=0)
    while best not in measured:
        quantized = candidates[best].plan.quantized
        measured[best] = amplitude(candidates[best]) if quantized else 0.0
        best = min(range(len(candidates)), key=cost)
    return best, measured
