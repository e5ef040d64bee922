"""What happens around the solver: read, prepare, plan, gather statistics, solve."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from qdq.calibrate import Calibrator, ranges_from, require_values
from qdq.calibrate.moments import Layout
from qdq.data import Feed, open_feeds
from qdq.frontier import Planner, fastest_plan, observed_by_any
from qdq.graph import Graph, without_large
from qdq.layouts import moment_layouts
from qdq.modelio import load
from qdq.plan import Plan, make_plan
from qdq.prepare import prepare
from qdq.problem import Moments, Problem
from qdq.ranges import TensorRange
from qdq.rating import WIDEST, keeps_histograms, observed_to_rate
from qdq.scheme import Scheme
from qdq.sensitivity import SAMPLES, keep_few
from qdq.session import input_specs
from qdq.sharding import collect
from qdq.shipment import fingerprint
from qdq.solve import Solution, Step, needs_of, solve
from qdq.spec import QuantSpec
from qdq.statistics import Statistics
from qdq.targets import Target
from qdq.weighing import Weighing
from qdq.worker import Progress

__all__ = ["Start", "begin", "gather", "make_problem", "ranges_of", "solved"]

log: logging.Logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What is there before calibration.

    Attributes:
        prepared: the canonical float model.
        plan_for: makes the plan for a weighing.
        plan: the plan; where harm is to be measured, or noise to be rated, the widest one, of
            which the plan to be chosen is a part.
        rated: whether the part is to be chosen by the noise in the calibrator's histograms.
        observed: tensors that calibration must observe → the spec that they will have.
        axes: inputs of linear nodes whose channel means a step asks for → the channel axis.
        layouts: linear nodes whose second moments a step asks for.
        shapes: shapes of the inputs in the first sample.
        first: the first sample; None where statistics are given.
        feeds: all samples, the first one too.
        kept: the few that are kept to measure with; filled while the feeds are read.
    """

    prepared: onnx.ModelProto
    plan_for: Planner
    plan: Plan
    rated: bool
    observed: Mapping[str, QuantSpec]
    axes: Mapping[str, int]
    layouts: Mapping[str, Layout]
    shapes: Mapping[str, tuple[int, ...]]
    first: Feed | None
    feeds: Iterator[Feed]
    kept: Mapping[bytes, Feed] = field(default_factory=dict)

    def require(self, statistics: Statistics, calibrator: Calibrator[Any]) -> None:
        """Refuse statistics of another model, calibrator or plan.

        Raises:
            CalibrationError, ConfigError: naming what differs.
        """
        statistics.require(
            calibrator=calibrator,
            fingerprint=fingerprint(self.prepared),
            tensors=tuple(self.observed),
            axes=self.axes,
            layouts=self.layouts.values(),
        )


def begin(
    model: Any,
    calib_reader: Any,
    statistics: Statistics | None,
    scheme: Scheme,
    calibrator: Calibrator[Any],
    steps: Sequence[Step],
    target: Target,
    *,
    measured: bool = False,
) -> Start:
    """Read, prepare and plan; the data is opened and its first sample checked before that."""
    source = load(model)
    first: Feed | None = None
    feeds: Iterator[Feed] = iter(())
    kept: dict[bytes, Feed] = {}
    if statistics is None:
        feeds = open_feeds(calib_reader, input_specs(source))
        first = next(feeds)  # open_feeds has made sure that there is one
        feeds = chain([first], feeds)
        shapes: Mapping[str, tuple[int, ...]] = {n: a.shape for n, a in first.items()}
    else:
        shapes = statistics.shapes
    prepared = prepare(source)
    source = without_large(source, 1024)  # rules read its names; its weights are done with
    plan_for = partial(_plan_for, prepared, scheme, target, source, shapes)
    rated = not measured and target.weighs_costs and keeps_histograms(calibrator)
    if measured:
        plan = fastest_plan(plan_for)
        observed = observed_by_any(plan, frozenset(Graph(prepared).constants))
        feeds = keep_few(feeds, kept, 2 * SAMPLES)
    elif rated:
        plan = plan_for(WIDEST)
        observed = observed_to_rate(plan, frozenset(Graph(prepared).constants))
    else:
        plan = plan_for(Weighing())
        observed = dict(plan.observed)
    log.info("plan: %d integer nodes, %d float", len(plan.quantized), len(plan.left_float))
    if not plan.quantized:
        log.warning(
            "no node of this model runs on integers: the result computes what the float model "
            "does; Result.left_float and the metadata say why, node by node"
        )
    return Start(
        prepared=prepared,
        plan_for=plan_for,
        plan=plan,
        rated=rated,
        observed=observed,
        axes=_mean_axes(plan, steps),
        layouts=moment_layouts(prepared, plan) if "moments" in needs_of(steps) else {},
        shapes=shapes,
        first=first,
        feeds=feeds,
        kept=kept,
    )


def _plan_for(
    prepared: onnx.ModelProto,
    scheme: Scheme,
    target: Target,
    source: onnx.ModelProto,
    seen: Mapping[str, tuple[int, ...]],
    weighing: Weighing,
) -> Plan:
    return make_plan(prepared, scheme, target, weighing, source=source, seen=seen)


def _mean_axes(plan: Plan, steps: Sequence[Step]) -> dict[str, int]:
    if "means" not in needs_of(steps):
        return {}
    with_bias = [n for n in plan.linears if n.bias is not None]
    return {n.input: -1 if n.kind == "matmul" else 1 for n in with_bias}


def gather(
    start: Start,
    calibrator: Calibrator[Any],
    executor: Executor | None,
    progress: Progress | None,
    mark: str | None = None,
) -> Statistics:
    """Run the samples and gather what the plan and the steps ask for."""
    return collect(
        start.prepared,
        tuple(start.observed),
        start.axes,
        start.feeds,
        calibrator,
        executor=executor,
        progress=progress,
        layouts=start.layouts.values(),
        shapes=start.shapes,
        # workers know a model by its mark; without any, and nothing to save, it is not needed
        mark="" if mark is None and executor is None else mark,
    )


def ranges_of(
    start: Start, statistics: Statistics, calibrator: Calibrator[Any]
) -> dict[str, TensorRange]:
    """Range of every observed tensor that had values."""
    known = {n: spec for n, spec in start.observed.items() if n in statistics.summaries}
    return ranges_from(statistics.summaries, known, calibrator)


def solved(
    start: Start,
    plan: Plan,
    statistics: Statistics,
    ranges: Mapping[str, TensorRange],
    steps: Sequence[Step],
) -> Solution:
    """Solve a plan from the statistics; ``plan`` is that of the start or a part of it.

    Raises:
        CalibrationError: a tensor that the plan observes never had a value. And those of solve.
    """
    require_values(plan.observed, ranges)
    ranges = {n: ranges[n] for n in plan.observed}
    moments = {
        node: statistics.moments[layout].moments
        for node, layout in start.layouts.items()
        if layout in statistics.moments
    }
    return solve(make_problem(start.prepared, plan, ranges, statistics.means, moments), steps)


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
