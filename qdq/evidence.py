"""What calibration has shown, in the form that the choice of a plan and the solver need."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from numpy.typing import NDArray

from qdq.affine import params_from_range
from qdq.calibrate import require_values
from qdq.calibrate.noise import mean_square, relative_noise
from qdq.dividing import divided
from qdq.frontier import Planner
from qdq.graph import Graph
from qdq.plan import Plan
from qdq.problem import Linear, Moments, Problem
from qdq.ranges import Histogram, TensorRange
from qdq.smoothing import Smoothing, find_smoothing
from qdq.solve import Solution, Step, solve
from qdq.spec import QuantSpec
from qdq.statistics import Statistics
from qdq.weighing import Weighing

__all__ = ["Evidence", "divided_moments", "make_problem", "smoothed", "solved"]

log: logging.Logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """A model, its widest plan, and what calibration has shown of their tensors.

    Attributes:
        model: the prepared float model; after smoothing the one that divides tensors.
        plan_for: makes plans of it.
        plan: the widest one that is of interest.
        ranges: range of every observed tensor that had values.
        noise: tensor → energy of its rounding over that of its values (``qdq.rating``), where
            the plan is to be chosen by that.
        means: mean of each channel.
        moments: linear node → second moments of its input.
        smoothings: tensor → how it was smoothed.
        products: smoothed tensor → names of the nodes that read it divided.
    """

    model: onnx.ModelProto
    plan_for: Planner
    plan: Plan
    ranges: Mapping[str, TensorRange]
    noise: Mapping[str, float] = field(default_factory=dict)
    means: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    moments: Mapping[str, Moments] = field(default_factory=dict)
    smoothings: Mapping[str, Smoothing] = field(default_factory=dict)
    products: Mapping[str, Sequence[str]] = field(default_factory=dict)


def _smoothings(
    evidence: Evidence, readers: Mapping[str, tuple[Linear, ...]], statistics: Statistics
) -> dict[str, Smoothing]:
    """The tensors that it pays to smooth.

    Args:
        evidence: without smoothing.
        readers: tensors that can be divided → the products that read them.
        statistics: with the range of each channel of these tensors.
    """
    graph = Graph(evidence.model)
    found: dict[str, Smoothing] = {}
    for name, products in readers.items():
        if name not in evidence.ranges or name not in statistics.sums:
            continue
        spec = evidence.plan.tensors[name].spec
        reach = statistics.sums[name].reach
        noise, energy = _noise(statistics.summaries[name], evidence.ranges[name], spec, reach)
        weights = [graph.floats(n.weight) for n in products]
        weight_spec = evidence.plan.tensors[products[0].weight].spec
        smoothing = find_smoothing(reach, weights, spec, weight_spec, noise, energy)
        if smoothing is not None:
            found[name] = smoothing
    return found


def _noise(
    summary: object, found: TensorRange, spec: QuantSpec, reach: TensorRange
) -> tuple[float, float]:
    """Variance of a tensor's rounding, and its mean square.

    Without a histogram: a twelfth of the squared step, and a third of each channel's peak.
    """
    params = params_from_range(found, spec)
    if isinstance(summary, Histogram):
        energy = mean_square(summary)
        return relative_noise(summary, params) * energy, energy
    peak = np.maximum(np.abs(reach.low), np.abs(reach.high)).astype(np.float64)
    return float(params.scale) ** 2 / 12, float(np.mean(peak**2)) / 9


def smoothed(
    evidence: Evidence,
    readers: Mapping[str, tuple[Linear, ...]],
    statistics: Statistics,
    planner: Callable[[onnx.ModelProto], Planner],
    widest: Weighing,
) -> Evidence:
    """The evidence for the model in which outlier channels have moved into the weights.

    Args:
        evidence: without smoothing.
        readers: from ``divisible``.
        statistics: with the range of each channel of these tensors.
        planner: model → what makes plans of it.
        widest: the prices that ``evidence.plan`` was made with.
    """
    found = _smoothings(evidence, readers, statistics)
    if not found:
        return evidence
    products = {name: [n.node for n in readers[name]] for name in found}
    model, names = divided(evidence.model, products, {n: s.divisors for n, s in found.items()})
    plan_for = planner(model)
    plan = plan_for(widest)
    ranges = {**evidence.ranges, **{names[n]: s.range for n, s in found.items()}}
    if not plan.observed.keys() <= ranges.keys():
        log.info("no smoothing: it would make tensors integer that were not observed")
        return evidence
    noise, means, moments = dict(evidence.noise), dict(evidence.means), dict(evidence.moments)
    for name, smoothing in found.items():
        if name in noise:
            noise[names[name]] = noise[name] * smoothing.error
        if name in means:
            means[names[name]] = means[name] / smoothing.divisors
        for linear in readers[name]:
            if linear.node in moments:
                moments[linear.node] = divided_moments(moments[linear.node], smoothing.divisors)
    log.info("smoothing: %d tensors", len(found))
    return Evidence(
        model=model,
        plan_for=plan_for,
        plan=plan,
        ranges=ranges,
        noise=noise,
        means=means,
        moments=moments,
        smoothings=found,
        products=products,
    )


def divided_moments(moments: Moments, divisors: NDArray[np.float32]) -> Moments:
    """Second moments of the divided terms; the last block is filled up."""
    blocks, size = moments.mean.shape
    filled = np.ones(blocks * size)
    filled[: divisors.size] = divisors
    by = filled.reshape(blocks, size)
    return replace(
        moments, second=moments.second / (by[:, :, None] * by[:, None, :]), mean=moments.mean / by
    )


def solved(evidence: Evidence, plan: Plan, steps: Sequence[Step]) -> Solution:
    """Solve a plan from the evidence; ``plan`` is that of the evidence or a part of it.

    Raises:
        CalibrationError: a tensor that the plan observes never had a value. And those of solve.
    """
    require_values(plan.observed, evidence.ranges)
    ranges = {n: evidence.ranges[n] for n in plan.observed}
    problem = make_problem(evidence.model, plan, ranges, evidence.means, evidence.moments)
    return solve(problem, steps)


def make_problem(
    model: onnx.ModelProto,
    plan: Plan,
    ranges: Mapping[str, TensorRange],
    means: Mapping[str, NDArray[np.float64]] | None = None,
    moments: Mapping[str, Moments] | None = None,
) -> Problem:
    """The numbers that the solver works on: the plan's tensors, their ranges and constants."""
    graph = Graph(model)
    values = {name: graph.floats(name) for name in plan.tensors if name in graph.constants}
    return Problem(
        tensors=plan.tensors,
        linears=plan.linears,
        ranges=ranges,
        constants=values,
        means=means or {},
        moments=moments or {},
    )
