"""Plans from the fastest to the most accurate, and the choice among them.

A price on harm (see ``harm``) turns the minimum cut of placement into one on the lower convex hull
of time and harm (a Lagrange multiplier). A higher price only ever makes fewer units integer, so
all plans are parts of the one without a price, and one measurement serves for all.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx

from qdq.affine import dequantize
from qdq.errors import ConfigError
from qdq.placement.harm import Sensitivity
from qdq.placement.sensitivity import Feed, Meter, measure, rounded_by
from qdq.placement.weighing import Weighing
from qdq.plan import Plan
from qdq.problem import Fixed, Given, Shared
from qdq.ranges import TensorRange
from qdq.solve import Solution

__all__ = [
    "FASTEST",
    "WORTH",
    "Candidate",
    "Choice",
    "Planner",
    "best_value",
    "check_weighs",
    "choose",
    "fastest_plan",
    "frontier",
    "meets",
    "moved",
]

Planner = Callable[[Weighing], Plan]
WORTH = 6.0  #: latency, relative to the float model's, that a harm of 1 is worth
FASTEST = Weighing(noise=0.0, least=0.0)  #: prices without any on accuracy
_WORTHS = np.geomspace(0.1, 1e4, 31)
_BEYOND = 1e15  # ns; capacities stay well below INFINITE


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One plan of the frontier.

    Attributes:
        plan: the plan.
        price: ns per unit of harm that it is the best plan for.
        time: predicted time in ns of nodes and borders.
        harm: predicted harm, the sum over its roundings.
    """

    plan: Plan
    price: float
    time: int
    harm: float


def fastest_plan(plan_for: Planner) -> Plan:
    """The plan without any price on accuracy, of which all candidates are parts.

    Raises:
        ConfigError: the target does not weigh costs. And those of ``make_plan``.
    """
    plan = plan_for(FASTEST)
    check_weighs(plan)
    return plan


def check_weighs(plan: Plan) -> None:
    """Refuse a plan that was made without weighing costs.

    Raises:
        ConfigError: there would be nothing to choose.
    """
    if not plan.target.weighs_costs:
        raise ConfigError(
            f"target {plan.target.name!r} does not weigh costs, so there is nothing to choose "
            "between latency and accuracy; use a target that does, as qdq.targets.ORT_CPU"
        )


def moved(plan: Plan, ranges: Mapping[str, TensorRange]) -> dict[str, TensorRange]:
    """The ranges, with those of what movement nodes hand out: their input's.

    A part of the plan may leave a movement node float whose result it rounds; then that has a
    range of its own.
    """
    found = dict(ranges)
    for t in plan.tensors.values():
        if isinstance(t.source, Shared) and t.name not in found:
            owner = plan.tensors[t.source.owner]
            if owner.name in found:
                found[t.name] = found[owner.name]
            elif isinstance(owner.source, Fixed):
                found[t.name] = owner.source.range
            elif isinstance(owner.source, Given):
                params = owner.source.params
                low, high = dequantize(np.array([params.spec.qmin, params.spec.qmax]), params)
                found[t.name] = TensorRange(np.asarray(low), np.asarray(high))
    return found


def frontier(plan_for: Planner, sensitivity: Sensitivity) -> tuple[Candidate, ...]:
    """The plans that are best for some price of harm, from the fastest to the all-float one.

    Args:
        plan_for: makes the plan for a weighing: ``make_plan`` with all else filled in.
        sensitivity: as measured for the fastest plan.
    """
    fastest = fastest_plan(plan_for)
    last = plan_for(_priced(sensitivity, _BEYOND))  # all float, but for what does no harm at all
    plans = [(0.0, fastest)]
    for worth in _WORTHS:
        price = float(worth * last.placement.time)
        plans.append((price, plan_for(_priced(sensitivity, price))))
    found: dict[frozenset[str], Candidate] = {}
    for price, plan in (*plans, (_BEYOND, last)):
        candidate = Candidate(
            plan=plan,
            price=price,
            time=plan.placement.time,
            harm=sensitivity.of(*rounded_by(plan)),
        )
        found.setdefault(plan.placement.integer, candidate)
    return tuple(found.values())


def _priced(sensitivity: Sensitivity, price: float) -> Weighing:
    return Weighing(
        noise=0.0,
        least=0.0,
        price=price,
        harm=sensitivity.tensors,
        weights=sensitivity.weights,
    )


def best_value(candidates: Sequence[Candidate], worth: float = WORTH) -> Candidate:
    """The candidate with the least time / time of the float model + worth * harm.

    Both terms are relative, so one number serves for all models.

    Args:
        candidates: from ``frontier``.
        worth: the relative latency that the loss of the whole output would be worth; 0 takes the
            fastest, and the greater it is the more stays float.
    """
    whole = max(candidates[-1].time, 1)
    return min(candidates, key=lambda c: c.time / whole + worth * c.harm)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What ``choose`` found.

    Attributes:
        chosen: the candidate; its plan is to be solved and emitted.
        candidates: all of them, the fastest first.
        sensitivity: the harm of each rounding.
        measured: index of candidate → SQNR in dB on held-out samples, of those that were tried.
    """

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    sensitivity: Sensitivity
    measured: Mapping[int, float] = field(default_factory=dict)


def choose(
    model: onnx.ModelProto,
    plan_for: Planner,
    solution: Solution,
    feeds: Sequence[Feed],
    *,
    target_sqnr: float | None = None,
    worth: float = WORTH,
) -> Choice:
    """Measure, and choose a plan: the step between a first solution and the final plan.

    Half of the samples tell the sensitivity, the other half whether a plan meets the target.

    Args:
        model: the prepared model.
        plan_for: makes the plan for a weighing: ``make_plan`` with all else filled in.
        solution: of the plan ``fastest_plan(plan_for)``.
        feeds: some 2 * ``SAMPLES`` samples, as ``keep_few`` keeps them.
        target_sqnr: SQNR in dB that the worst output shall have; the fastest plan that has it is
            chosen. None: the plan of the best value.
        worth: see ``best_value``.

    Raises:
        CalibrationError: no samples.
        ConfigError: the target does not weigh costs, or the model has no floating-point output,
            or target_sqnr is not a number.
    """
    fastest = fastest_plan(plan_for)
    meter = Meter(model, fastest, solution)
    found = measure(model, fastest, solution, feeds[: -(-len(feeds) // 2)], meter)
    candidates = frontier(plan_for, found)
    if target_sqnr is None:
        best = best_value(candidates, worth)
        return Choice(chosen=best, candidates=candidates, sensitivity=found)
    held_out = feeds[-(-len(feeds) // 2) :] or feeds
    best, measured = meets(candidates, lambda p: meter.sqnr(held_out, p), target_sqnr)
    return Choice(chosen=best, candidates=candidates, sensitivity=found, measured=measured)


def meets(
    candidates: Sequence[Candidate], sqnr: Callable[[Plan], float], target_sqnr: float
) -> tuple[Candidate, Mapping[int, float]]:
    """The first candidate, from the fastest on, whose measured SQNR reaches the target.

    Args:
        candidates: from ``frontier``; the last one is (nearly) all float.
        sqnr: measures the SQNR of a plan in dB, as ``Meter.sqnr`` does.
        target_sqnr: the wish, in dB.

    Returns:
        The candidate, and what was measured: index of candidate → dB. If none reaches the
        target, the one with the highest SQNR.

    Raises:
        ConfigError: the target is not a number.
    """
    if not math.isfinite(target_sqnr):
        raise ConfigError(f"target_sqnr={target_sqnr!r}: wants a finite number of dB")
    found: dict[int, float] = {}
    for k, candidate in enumerate(candidates):
        found[k] = sqnr(candidate.plan)
        if found[k] >= target_sqnr:
            return candidate, found
    return candidates[max(found, key=lambda k: (found[k], k))], found
