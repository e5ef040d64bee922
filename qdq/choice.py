"""Which part of the widest plan to take: by noise, by measured harm, or by measured latency."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from qdq.data import Feed
from qdq.emit import emit
from qdq.errors import ConfigError
from qdq.evidence import Evidence, solved
from qdq.modelio import load
from qdq.placement.budget import most_accurate, plans_by_worth
from qdq.placement.frontier import WORTH, choose
from qdq.placement.rating import NOISE_WORTH, check_worth, explained, rated
from qdq.plan import Plan
from qdq.solve import Step
from qdq.stages import Start
from qdq.timing import paired_latency

__all__ = ["Wish", "chosen_plan"]

log: logging.Logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a plan is chosen by; the options of ``quantize``.

    Raises:
        ConfigError: options that exclude each other, or a number that makes no sense.
    """

    worth: float | None = None
    measured: bool = False
    target_sqnr: float | None = None
    target_latency: float | None = None

    def __post_init__(self) -> None:
        check_worth(self.worth)
        goals = ("worth", "target_sqnr", "target_latency")
        given = [name for name in goals if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(
                f"{' and '.join(given)} are {len(given)} ways to choose one plan: give one of them"
            )
        target = self.target_latency
        number = isinstance(target, int | float) and not isinstance(target, bool)
        if target is not None and not (number and math.isfinite(target) and target > 0):
            raise ConfigError(
                f"target_latency={target!r}: wants a number above 0, the latency over the float "
                "model's, as 0.5"
            )
        if target is not None and self.measured:
            raise ConfigError("target_latency chooses by noise: leave out measured=True")

    @property
    def harm(self) -> bool:
        """Whether the harm of roundings is to be measured."""
        return self.measured or self.target_sqnr is not None

    def check(self, start: Start) -> None:
        """Refuse a wish that nothing would heed.

        Raises:
            ConfigError: saying why, and what to do.
        """
        for name, instead in (("worth", " or measured=True"), ("target_latency", "")):
            value = getattr(self, name)
            if value is not None and not (self.harm or start.rated):
                raise ConfigError(
                    f"{name}={value!r} needs errors to weigh: a calibrator that keeps histograms "
                    f"(MSE, Entropy, Percentile){instead}, and a target that weighs costs"
                )


def chosen_plan(
    wish: Wish, model: Any, start: Start, evidence: Evidence, steps: Sequence[Step]
) -> tuple[Plan, Mapping[str, object]]:
    """The part of the evidence's plan that is wished for, and by what it was chosen.

    Args:
        wish: by what to choose.
        model: the float model, as the caller gave it.
        start: the model and the samples, before calibration.
        evidence: what calibration has shown.
        steps: of the solver.
    """
    widest = evidence.plan
    if wish.harm:
        worth = WORTH if wish.worth is None else wish.worth
        plan = _by_harm(wish.target_sqnr, worth, evidence, list(start.kept.values()), steps)
        goal = {"worth": worth} if wish.target_sqnr is None else {"target_sqnr": wish.target_sqnr}
        return plan, {"by": "harm", **goal}
    if not start.rated:
        return widest, {"by": "elements"}
    plan_for = partial(rated, evidence.plan_for, widest, evidence.noise)
    worth = NOISE_WORTH if wish.worth is None else wish.worth
    if wish.target_latency is None or start.first is None:
        plan = plan_for(worth)
    else:
        plans = plans_by_worth(plan_for)
        worth, plan = _by_latency(wish.target_latency, plans, model, start.first, evidence, steps)
    return plan, {"by": "noise", "worth": float(worth)}


def _by_harm(
    target: float | None,
    worth: float,
    evidence: Evidence,
    feeds: Sequence[Feed],
    steps: Sequence[Step],
) -> Plan:
    """The plan of the best value by measured harm, or the fastest that meets the target."""
    widest = evidence.plan
    if not widest.quantized:
        return widest
    choice = choose(
        evidence.model,
        evidence.plan_for,
        solved(evidence, widest, steps),
        feeds,
        target_sqnr=target,
        worth=worth,
    )
    plan = explained(widest, choice.chosen.plan)
    log.info("measured: %d of %d nodes integer", len(plan.quantized), len(widest.quantized))
    if not plan.quantized:
        log.warning("only the float model reaches target_sqnr=%s: no node is integer", target)
    return plan


def _by_latency(
    target: float,
    plans: Sequence[tuple[float, Plan]],
    model: Any,
    feed: Feed,
    evidence: Evidence,
    steps: Sequence[Step],
) -> tuple[float, Plan]:
    """Worth and plan of the most accurate one within a share of the float model's latency."""
    exact = load(model, lazy=True)

    def latency(plan: Plan) -> float:
        emitted = emit(evidence.model, plan, solved(evidence, plan, steps), {})
        return paired_latency(emitted, exact, feed, seconds=2).ratio

    best, measured = most_accurate([p for _, p in plans], latency, target)
    worth, plan = plans[best]
    reached = measured.get(best)
    if reached is None or reached > target:
        log.warning(
            "no plan reaches target_latency=%g on this machine: the fastest one, %.2f of the float "
            "model's latency, is taken",
            target,
            min(measured.values()),
        )
    else:
        log.info("target_latency=%g: worth=%g reaches %.2f", target, worth, reached)
    return worth, plan
