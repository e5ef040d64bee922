"""Which part of the widest plan to take: by what is foretold of it, or by what is measured."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import onnx

from qdq.balancing.dividing import undivide
from qdq.emit import emit
from qdq.errors import QdqError
from qdq.evidence import Evidence, solved, used_smoothings
from qdq.light import weight_bytes
from qdq.modelio import load
from qdq.placement.budget import first_within, least_cost
from qdq.placement.frontier import AMPLITUDE, Candidate, Frontier
from qdq.placement.trial import Trial
from qdq.plan import Plan
from qdq.solve import Solution, Step
from qdq.stages import Start
from qdq.statistics.few import SAMPLES
from qdq.timing import paired_latency
from qdq.wish import Wish

__all__ = ["Chosen", "choose"]

log: logging.Logger = logging.getLogger(__name__)

Emitted = Callable[[Candidate], onnx.ModelProto]

_SURPRISE = 2.0
"""How many times what was foretold an error may be."""
_DEARER = 0.1
"""And by how much of the float model's latency a plan may cost more because of it."""
_FEW = 2000
"""Integer nodes; of more, onnxruntime takes seconds to start each plan that is measured."""
_HARDLY = 0.05
"""Costs less than that apart, latency and error over the float model's latency, are the same."""
_LARGE = 1 << 30
"""Bytes of weights; two such models in memory are one too many."""
_LOST = 0.5
"""Energy of the error over that of the signal from which on outputs tell little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A plan, with the parameters of its tensors.

    Attributes:
        plan: the plan.
        solution: the parameters.
        model: what was emitted.
        by: by what it was chosen.
        ran: whether the runtime has run the model as it is, with all its outputs and no others.
    """

    plan: Plan
    solution: Solution
    model: onnx.ModelProto
    by: Mapping[str, object]
    ran: bool = False


def choose(
    wish: Wish, model: Any, start: Start, evidence: Evidence, steps: Sequence[Step]
) -> Chosen:
    """The part of the evidence's plan that is wished for.

    Args:
        wish: by what to choose.
        model: the float model, as the caller gave it.
        start: the model and the samples, before calibration.
        evidence: what calibration has shown.
        steps: of the solver.
    """
    solver = _Solver(evidence, steps)
    if not start.rated:
        return _looked_at(solver.chosen(evidence.plan, {"by": "elements"}), start, evidence)
    frontier = Frontier(evidence.plan_for, evidence.plan, evidence.noise, evidence.shown)
    found = frontier.widest
    if found.plan.quantized:
        found = _found(wish, frontier, model, start, evidence, solver)
    for name in sorted(evidence.plan.ruled - found.plan.tensors.keys()):
        log.warning("the rules for tensor '%s' do nothing: the nodes around it stay float", name)
    chosen = solver.chosen(found.plan, {"by": "noise", "worth": found.worth})
    tried = wish.worth is None and wish.target_latency is None
    return chosen if tried else _looked_at(chosen, start, evidence)


@dataclass(slots=True)
class _Solver:
    """Solves and emits plans, none of them twice in a row."""

    evidence: Evidence
    steps: Sequence[Step]
    last: Chosen | None = field(default=None, init=False)

    def chosen(self, plan: Plan, by: Mapping[str, object]) -> Chosen:
        if self.last is not None and self.last.plan is plan:
            return replace(self.last, by=by)
        self.last = None  # one model at a time
        solution = solved(self.evidence, plan, self.steps)
        floors = self.evidence.floors if plan.quantized else {}
        model = emit(self.evidence.model, plan, solution, floors=floors)
        kept = used_smoothings(self.evidence, plan)
        undivide(model, self.evidence.products, self.evidence.smoothings.keys() - kept)
        self.last = Chosen(plan=plan, solution=solution, model=model, by=by)
        return self.last

    def emitted(self, candidate: Candidate) -> onnx.ModelProto:
        return self.chosen(candidate.plan, {}).model

    def tried(self, candidate: Candidate, trial: Trial) -> float:
        """The amplitude of the error that it has in a trial; not a number if it does not run.

        Why it does not is told when it is verified.
        """
        chosen = self.chosen(candidate.plan, {})
        try:
            amplitude = trial.amplitude(chosen.model)
        except QdqError:
            return math.nan
        self.last = replace(chosen, ran=trial.whole)
        return candidate.felt(amplitude)


def _found(
    wish: Wish,
    frontier: Frontier,
    model: Any,
    start: Start,
    evidence: Evidence,
    solver: _Solver,
) -> Candidate:
    emitted = solver.emitted
    if wish.worth is not None:
        return frontier.at(float(wish.worth))
    if wish.measured:
        return _by_trial(frontier.all(), _trial(start, evidence), emitted)
    if wish.target_sqnr is not None:
        return _by_sqnr(wish.target_sqnr, frontier.all(), _trial(start, evidence), emitted)
    if wish.target_latency is not None:
        return _by_latency(wish.target_latency, frontier.all()[::-1], model, start, emitted)
    found = _checked(frontier, start, evidence, solver)
    if not found.plan.quantized:
        log.warning(
            "no node runs on integers: their roundings cost more accuracy than time is saved; "
            "worth=, target_sqnr= and target_latency= set another balance"
        )
    return found


def _checked(frontier: Frontier, start: Start, evidence: Evidence, solver: _Solver) -> Candidate:
    """The best by what is foretold, unless a trial shows something else."""
    found = frontier.best()
    # what a rule gives a range or scale may err as it likes
    if not start.exact or found.plan.ruled:
        return found
    trial = Trial(evidence.model, list(start.kept.values())[: len(start.exact)], start.exact)
    most = _kernels(frontier.widest.plan)
    if most and not _kernels(found.plan):  # before all are given up
        if most <= _FEW:
            return _by_trial(frontier.all(), trial, solver.emitted, otherwise=found)
        if not found.plan.quantized:
            return found
    if _surprises(found, solver.tried(found, trial)):
        return _by_trial(frontier.all(), trial, solver.emitted)
    return found


def _kernels(plan: Plan) -> int:
    """The integer nodes but those that pick codes, which save no time."""
    return len(plan.quantized) - len(plan.lookups)


def _surprises(candidate: Candidate, amplitude: float) -> bool:
    """Whether an error that was measured is far above what was foretold.

    Gradients know neither decisions that flip nor what bends: where a sum of squares is nearly 0,
    say, errors of either sign make it larger.
    """
    foretold = math.sqrt(candidate.harm)
    log.info("the error is %.2g of the signal, foretold %.2g", amplitude, foretold)
    dearer = AMPLITUDE * (amplitude - foretold) > _DEARER
    return dearer and amplitude > _SURPRISE * foretold


def _looked_at(chosen: Chosen, start: Start, evidence: Evidence) -> Chosen:
    """Warn where the outputs are lost, of a plan that is not chosen by its error."""
    feeds = list(start.kept.values())[:SAMPLES]
    if not (feeds and _kernels(chosen.plan)) or weight_bytes(evidence.model) > _LARGE:
        return chosen
    try:
        trial = Trial(evidence.model, feeds, start.exact)
        lost = trial.amplitude(chosen.model) ** 2
    except QdqError as e:  # of what does not run, the reason is told when it is verified
        log.info("the error is not known: %s", e)
        return chosen
    log.info("the error has %.2g of the energy of the signal", lost)
    if lost <= _LOST:
        return replace(chosen, ran=trial.whole)
    log.warning(
        "the outputs are lost: in the median of %d samples the error has %.0f %% of their energy. "
        "The default options (MSE, no worth=, target ORT_CPU) keep float what does that; or look "
        "for the nodes with qdq.compare, and keep them float with Rule(nodes=..., keep_float=True)",
        len(feeds),
        100 * lost,
    )
    return chosen


def _trial(start: Start, evidence: Evidence) -> Trial:
    """On samples that the gradients have not seen, if there are enough."""
    kept = list(start.kept.values())
    return Trial(evidence.model, kept[SAMPLES:] or kept)


def _by_trial(
    candidates: Sequence[Candidate],
    trial: Trial,
    emitted: Emitted,
    *,
    otherwise: Candidate | None = None,
) -> Candidate:
    """The candidate of the least cost, by the amplitude of the error that is measured.

    Args:
        candidates: from the fastest to the float model.
        trial: measures the amplitude.
        emitted: makes the model of a candidate.
        otherwise: the best one by what is foretold, where that has no integer kernel; another one
            has to be better by more than chance.
    """

    def amplitude(candidate: Candidate) -> float:
        return candidate.felt(trial.amplitude(emitted(candidate)))

    best, measured = least_cost(candidates, amplitude, fastest=otherwise is not None)
    found = candidates[best]
    cost = found.time + AMPLITUDE * measured[best]
    log.info(
        "measured %d of %d plans: worth=%g has an error of %.3g at %.2f of the float model's time",
        len(measured),
        len(candidates),
        found.worth,
        measured[best],
        found.time,
    )
    if otherwise is not None:
        # its tables, if any, may err more than foretold, too
        error = amplitude(otherwise) if otherwise.plan.quantized else 0.0
        if cost > otherwise.time + AMPLITUDE * error - _HARDLY:
            log.info("that is hardly better than the float kernels, which are kept")
            return otherwise
    return found


def _by_sqnr(
    target: float, candidates: Sequence[Candidate], trial: Trial, emitted: Emitted
) -> Candidate:
    """The fastest candidate that reaches an SQNR."""
    measured: dict[int, float] = {}

    def reached(k: int) -> bool:
        measured[k] = trial.sqnr(emitted(candidates[k]))
        return measured[k] >= target

    best = first_within(len(candidates), reached)
    if measured[best] < target:
        log.warning(
            "no plan reaches target_sqnr=%g: the most accurate one is taken, with %.1f dB",
            target,
            measured[best],
        )
    elif not candidates[best].plan.quantized:
        log.warning("only the float model reaches target_sqnr=%s: no node is integer", target)
    return candidates[best]


def _by_latency(
    target: float, candidates: Sequence[Candidate], model: Any, start: Start, emitted: Emitted
) -> Candidate:
    """The most accurate candidate within a share of the float latency."""
    exact, feed = load(model, lazy=True), start.first
    assert feed is not None  # noqa: S101 -- statistics have been refused
    measured: dict[int, float] = {}

    def fast(k: int) -> bool:
        measured[k] = paired_latency(emitted(candidates[k]), exact, feed, seconds=2).ratio
        return measured[k] <= target

    best = first_within(len(candidates), fast)
    if measured[best] > target:
        log.warning(
            "no plan reaches target_latency=%g on this machine: the fastest one, %.2f of the float "
            "model's latency, is taken",
            target,
            measured[best],
        )
    return candidates[best]
