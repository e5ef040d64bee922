"""Clamps that are part of an integer unit: whether the saturation of its codes does their work."""

from collections.abc import Container, Iterator, Mapping

import numpy as np

from qdq.placement import Unit
from qdq.plan import Plan
from qdq.spec import QuantParams

__all__ = ["clamps_that_stay", "clamps_to_drop"]

_HALF = 0.501  # of a code; a bound in the middle between two is not cut, however it is rounded


def clamps_that_stay(plan: Plan, params: Mapping[str, QuantParams]) -> dict[str, str]:
    """Absorbed clamps that cut inside the range of their codes, with what follows from that.

    A calibrated range ends at the clamp's bounds, so that saturation does the clamp's work. A
    range or scale that a rule set may go beyond; then the runtime keeps the clamp, and the kernel
    before it, in float. The results are right, but slow. Before that of a subpixel unit stands the
    last of its movements, so its kernel runs on integers; the clamp does not.
    """
    found: dict[str, str] = {}
    for unit, known, limits in _clamped(plan, params):
        if not _cuts(known, limits):
            continue
        apart = plan.target.subpixel(unit.view.op_type)
        found[unit.clamp if apart and unit.clamp else unit.view.name] = (
            f"the range of '{unit.outputs[0]}' goes beyond the bounds of '{unit.clamp}', so "
            f"the runtime has to run {'that' if apart else 'both'} in float; "
            f"set a range within {unit.limits}"
        )
    return found


def clamps_to_drop(
    plan: Plan, params: Mapping[str, QuantParams], made: Container[str]
) -> dict[str, str]:
    """Absorbed clamps that the runtime would keep for less than half a code.

    0 has a code of its own, so codes for [-1, 1] begin at -1.004 or end at 1.004. Saturation is as
    good a clamp as that, but the runtime compares exactly, and would run the kernel in float. Nor
    does it always take in a clamp behind the movements of a subpixel unit. What is handed out as
    float in the end, since the solver left the node or its readers float, has nothing else that
    clamps it.

    Args:
        plan: what is integer.
        params: parameters of the tensors.
        made: the tensors that are handed out as codes.

    Returns:
        Tensor before the clamp → tensor behind it.
    """
    return {
        unit.view.outputs[0]: unit.outputs[0]
        for unit, found, limits in _clamped(plan, params)
        if unit.outputs[0] in made
        and not _cuts(found, limits)
        and (_reaches_beyond(found, limits) or plan.target.subpixel(unit.view.op_type))
    }


def _clamped(
    plan: Plan, params: Mapping[str, QuantParams]
) -> Iterator[tuple[Unit, QuantParams, tuple[float, float]]]:
    """Integer units that absorb a clamp and hand out codes: parameters of the codes, bounds."""
    for unit in plan.placement.units:
        known = params.get(unit.outputs[0]) if unit.outputs else None
        integer = unit.view.name in plan.placement.integer
        if integer and unit.limits is not None and known is not None:
            yield unit, known, unit.limits


def _cuts(params: QuantParams, limits: tuple[float, float]) -> bool:
    """Whether a bound is more than half a code inside of the range of the codes."""
    dtype = params.spec.dtype
    low, high = (np.float64(b) / params.scale + params.zero_point for b in limits)
    return bool(low > dtype.min + _HALF or high < dtype.max - _HALF)


def _reaches_beyond(params: QuantParams, limits: tuple[float, float]) -> bool:
    """Whether the first or last code stands for a value out of bounds."""
    dtype = params.spec.dtype
    first, last = (np.float32(q - params.zero_point) * params.scale for q in (dtype.min, dtype.max))
    return bool(first < limits[0] or last > limits[1])
