"""What calibration has shown, in the form that the choice of a plan and the solver need."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray

from qdq.balancing.channels import Group
from qdq.balancing.equalizing import Equalization
from qdq.balancing.smoothing import Smoothing
from qdq.calibrate import require_values
from qdq.graph import Graph
from qdq.placement.frontier import Planner
from qdq.plan import Plan
from qdq.problem import Moments, Problem
from qdq.ranges import TensorRange
from qdq.solve import Solution, Step, solve
from qdq.weights import Weights

__all__ = ["Evidence", "make_problem", "solved", "used_smoothings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """A model, its widest plan, and what calibration has shown of their tensors.

    Attributes:
        model: the prepared float model; after smoothing the one that divides tensors.
        plan_for: makes plans of it.
        plan: the widest one that is of interest.
        ranges: range of every observed tensor that had values.
        noise: tensor → energy of its rounding over that of its values, where the plan is to
            be chosen by that (``qdq.placement.rating``).
        shown: the tensors whose values are outputs, or logits of which outputs are made.
        means: mean of each channel.
        moments: linear node → second moments of its input.
        floors: Softmax → the score that all lower ones can be raised to (``qdq.placement.scores``).
        smoothings: tensor → how it was smoothed.
        products: smoothed tensor → names of the nodes that read it divided.
        equalizations: groups of tensors whose channels have factors, which the model has already.
    """

    model: onnx.ModelProto
    plan_for: Planner
    plan: Plan
    ranges: Mapping[str, TensorRange]
    noise: Mapping[str, float] = field(default_factory=dict)
    shown: frozenset[str] = frozenset()
    means: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    moments: Mapping[str, Moments] = field(default_factory=dict)
    floors: Mapping[str, float] = field(default_factory=dict)
    smoothings: Mapping[str, Smoothing] = field(default_factory=dict)
    products: Mapping[str, Sequence[str]] = field(default_factory=dict)
    equalizations: tuple[tuple[Group, Equalization], ...] = ()


def solved(evidence: Evidence, plan: Plan, steps: Sequence[Step]) -> Solution:
    """Solve a plan from the evidence; ``plan`` is that of the evidence or a part of it.

    Raises:
        CalibrationError: a tensor that the plan observes never had a value. And those of solve.
    """
    require_values(plan.observed, evidence.ranges)
    ranges = {n: evidence.ranges[n] for n in plan.observed}
    problem = make_problem(evidence.model, plan, ranges, evidence.means, evidence.moments)
    return solve(problem, steps)


def used_smoothings(evidence: Evidence, plan: Plan) -> dict[str, Smoothing]:
    """Smoothed tensors that a product of the plan reads on integers; the others gain nothing."""
    integer, products = plan.placement.integer, evidence.products
    return {n: s for n, s in evidence.smoothings.items() if not integer.isdisjoint(products[n])}


def make_problem(
    model: onnx.ModelProto,
    plan: Plan,
    ranges: Mapping[str, TensorRange],
    means: Mapping[str, NDArray[np.float64]] | None = None,
    moments: Mapping[str, Moments] | None = None,
) -> Problem:
    """The numbers that the solver works on: the plan's tensors, their ranges and constants."""
    graph = Graph(model)
    constants = {n: graph.constants[n] for n in plan.tensors if n in graph.constants}
    return Problem(
        tensors=plan.tensors,
        linears=plan.linears,
        ranges=ranges,
        constants=Weights(constants),
        means=means or {},
        moments=moments or {},
    )
