"""Plans from the fastest to the most accurate, and the choice among them.

A price on harm, the energy of the outputs' error, turns the minimum cut of placement into one on
the lower convex hull of time and harm (a Lagrange multiplier). A higher price only ever makes
fewer units integer, so all plans are parts of the one without a price.

What an error costs the one who uses the model, though, is not its energy but its amplitude:
decisions flip in proportion to it. So among the plans of the hull the one is taken whose time plus
``AMPLITUDE`` times the square root of the harm is least. Both terms are relative, to the float
model's time and to the signal, so one number serves for all models.
"""

import logging
import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace

import numpy as np

from qdq.affine import dequantize
from qdq.placement.rating import SHOWN
from qdq.placement.weighing import Weighing
from qdq.plan import Plan
from qdq.problem import Constant, Derived, Fixed, Given, Shared
from qdq.ranges import TensorRange

__all__ = [
    "AMPLITUDE",
    "COARSE",
    "HARMS",
    "WIDEST",
    "Candidate",
    "Frontier",
    "Planner",
    "moved",
    "rounded_by",
]

Planner = Callable[[Weighing], Plan]

AMPLITUDE = 2.0
"""Latency, relative to the float model's, that an error as large as the signal is worth."""

WIDEST = Weighing(noise=0.0, dynamic=True)
"""Prices without any on accuracy (but ``least``): every rated plan is a part of that plan."""

HARMS = "rounding it costs more accuracy than its integer kernel saves time"
COARSE = "codes of its table cost more accuracy than the bytes that they save are worth"

_LOST = 0.5
"""Of the signal's energy; the error of a dynamic kernel is measured, and it is one choice."""

_FIRST, _LAST = -3, 20  # worths, as powers of two; from the last on all that does harm is float

log: logging.Logger = logging.getLogger(__name__)


def rounded_by(plan: Plan) -> frozenset[str]:
    """The activations that a plan rounds, its tables, and the first weight of each dynamic kernel.

    What a movement node hands out is rounded with its input, so it does not count again.
    """
    return frozenset(
        t.name
        for t in plan.tensors.values()
        if not isinstance(t.source, Constant | Derived | Shared)
    ).union(*(u.rounds for u in plan.apart))


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One plan of the frontier.

    Attributes:
        plan: the plan.
        worth: latency, relative to the float model's, that harm of 1 is worth in this plan.
        time: predicted time of nodes and borders over the float model's.
        harm: predicted energy of the outputs' error over theirs, the sum over its roundings.
        unseen: the part of it that no measured error shows: what roundings of outputs count more
            than their energy (``rating.SHOWN``).
    """

    plan: Plan
    worth: float
    time: float
    harm: float
    unseen: float = 0.0

    def felt(self, amplitude: float) -> float:
        """The amplitude of an error that was measured, with what the measurement does not show."""
        return math.hypot(amplitude, math.sqrt(self.unseen))

    @property
    def cost(self) -> float:
        """What is to be least: time and the amplitude of the error."""
        return self.time + AMPLITUDE * math.sqrt(self.harm)


class Frontier:
    """The parts of a plan that are the best for some price of harm, each made when asked for."""

    def __init__(
        self,
        plan_for: Planner,
        widest: Plan,
        harm: Mapping[str, float],
        shown: Container[str] = (),
    ) -> None:
        """Without any work yet.

        Args:
            plan_for: makes the plan for a weighing: ``make_plan`` with all else filled in.
            widest: ``plan_for(WIDEST)``.
            harm: tensor → what its rounding does, from ``qdq.placement.rating.noise_of``.
            shown: the tensors whose values are outputs, as there.
        """
        self._plan_for, self._given, self._harm, self._shown = plan_for, widest, harm, shown
        self._whole = max(widest.placement.float_time, 1)
        self.widest: Candidate = self._candidate(self._working(widest), 0.0)

    def _working(self, widest: Plan) -> Plan:
        """Without dynamic kernels and tables that destroy the outputs, whatever they save."""
        weights = [name for unit in widest.apart for name in unit.rounds]
        lost = {name: 1.0 for name in weights if self._harm.get(name, 0.0) > _LOST}
        if not lost:
            return widest
        return _explained(widest, self._priced(1.0, lost))

    def _candidate(self, plan: Plan, worth: float) -> Candidate:
        harms = {t: self._harm.get(t, 0.0) for t in rounded_by(plan)}
        shown = math.fsum(harm for t, harm in harms.items() if t in self._shown)
        return Candidate(
            plan=plan,
            worth=worth,
            time=plan.placement.time / self._whole,
            harm=math.fsum(harms.values()),
            unseen=(1 - 1 / SHOWN) * shown,
        )

    def at(self, worth: float) -> Candidate:
        """The plan with the least time + worth * harm, both relative.

        Args:
            worth: 0 is the fastest, and the greater it is the more stays float.
        """
        if not worth:
            return self.widest
        plan = self._priced(min(worth, 2.0**_LAST), self._harm)  # capacities stay below INFINITE
        return self._candidate(_explained(self._given, plan), worth)

    def _priced(self, worth: float, harm: Mapping[str, float]) -> Plan:
        return self._plan_for(replace(WIDEST, price=worth * self._whole, harm=harm))

    def best(self) -> Candidate:
        """The candidate of the least cost.

        At a minimum worth is the slope of the amplitude's price, AMPLITUDE / (2 amplitude), so
        none below that of the widest plan need be tried. At a worth no plan has less of time +
        worth * harm than the one that was made for it, so once that is above the least cost, all
        plans with less harm cost more.
        """
        best = self.widest
        if not best.harm:
            return best
        slope = AMPLITUDE / (2 * math.sqrt(best.harm))
        for power in range(math.floor(math.log2(slope)), _LAST + 1):
            found = self.at(2.0**power)
            best = min(best, found, key=lambda c: c.cost)
            if found.time + found.worth * found.harm >= best.cost:
                break
        return best

    def all(self) -> tuple[Candidate, ...]:
        """All different ones, from the fastest to the float model.

        Two for each doubling of the worth, as long as there is harm; and the last one rounds
        nothing at all, for weights have errors that are not foretold.
        """
        found = {self.widest.plan.placement.integer: self.widest}
        for power in range(2 * _FIRST, 2 * _LAST + 1):
            candidate = self.at(float(2 ** (power / 2)))
            found.setdefault(candidate.plan.placement.integer, candidate)
            if not candidate.harm:
                break
        if frozenset() not in found:
            plan = self._priced(2.0, dict.fromkeys(rounded_by(self.widest.plan), 1.0))
            last = self._candidate(_explained(self._given, plan), worth=2.0**_LAST)
            found.setdefault(last.plan.placement.integer, last)
        return tuple(found.values())


def _explained(widest: Plan, chosen: Plan) -> Plan:
    """The chosen plan, whose reasons tell what is float for accuracy's sake and not for speed."""
    given_up = dict.fromkeys(widest.placement.integer - chosen.placement.integer, HARMS)
    given_up |= {u.view.name: COARSE for u in widest.lookups}
    reasons = {node: given_up.get(node, why) for node, why in chosen.placement.left_float.items()}
    return replace(chosen, placement=replace(chosen.placement, left_float=reasons))


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
