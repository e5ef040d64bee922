"""What happens before the solver: read, prepare, plan, gather statistics, learn from them."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import onnx

from qdq.balancing.balance import balanced, equalizations, smoothings
from qdq.balancing.channels import AXIS, Group, channel_groups
from qdq.balancing.layouts import divisible, moment_layouts, require_channels
from qdq.calibrate import Calibrator, ranges_from
from qdq.calibrate.moments import Layout
from qdq.data import Feed, InputSpec, open_feeds
from qdq.evidence import Evidence
from qdq.graph import Graph
from qdq.light import without_large
from qdq.modelio import load
from qdq.placement.frontier import WIDEST, Planner, moved
from qdq.placement.gains import dynamic_errors, gains_of, gradients, typical
from qdq.placement.masked import weighing_scores
from qdq.placement.rating import (
    dynamic_noise,
    inferred,
    keeps_histograms,
    noise_of,
    observed_to_rate,
    table_noise,
)
from qdq.placement.scores import floors_of
from qdq.placement.weighing import Weighing
from qdq.placement.wholes import judged, shown_by
from qdq.plan import Plan, planner
from qdq.prepare import prepare
from qdq.problem import Linear
from qdq.ranges import TensorRange
from qdq.scheme import Scheme
from qdq.session import input_specs
from qdq.solve import Step, needs_of
from qdq.spec import QuantSpec
from qdq.statistics import Statistics
from qdq.statistics.few import SAMPLES
from qdq.statistics.keeping import keep_few
from qdq.statistics.observe import Observation
from qdq.statistics.shapes import larger
from qdq.statistics.sharding import collect
from qdq.statistics.shipment import fingerprint
from qdq.statistics.worker import Progress
from qdq.tables import mean_squares
from qdq.targets import Target
from qdq.views import nominal_graph

__all__ = ["Start", "begin", "gather", "learn"]

log: logging.Logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What is there before calibration.

    Attributes:
        prepared: the canonical float model.
        planner: model → what makes its plan for a weighing.
        plan_for: that of the prepared model.
        widest: prices of the plan; where it is to be rated, those of the widest one.
        plan: the plan, or the widest one, of which that to be chosen is a part.
        rated: whether the part is to be chosen by the noise in the calibrator's histograms.
        observed: tensors that calibration must observe → the spec that they will have.
        readers: tensors that may be smoothed → the products that read them.
        groups: tensors whose channels may be equalized.
        axes: inputs of linear nodes whose channel means a step asks for, or whose channel ranges
            smoothing or equalization needs → the channel axis.
        layouts: linear nodes whose second moments a step asks for.
        scores: Softmax → its scores, which may be masked.
        shapes: shapes of the inputs that the plan is made for: those of the largest sample where
            the data is a list or tuple, else of the first.
        first: the first sample; None where statistics are given.
        feeds: all samples, the first one too.
        kept: the few that are kept to measure with, or to run back through the model; filled while
            the feeds are read.
        exact: what the float model makes of those that were run back; filled then.
    """

    prepared: onnx.ModelProto
    planner: Callable[[onnx.ModelProto], Planner]
    plan_for: Planner
    widest: Weighing
    plan: Plan
    rated: bool
    observed: Mapping[str, QuantSpec]
    readers: Mapping[str, tuple[Linear, ...]]
    groups: tuple[Group, ...]
    axes: Mapping[str, int]
    layouts: Mapping[str, Layout]
    scores: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    first: Feed | None
    feeds: Iterator[Feed]
    kept: Mapping[bytes, Feed] = field(default_factory=dict)
    exact: list[Observation] = field(default_factory=list)

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
    held_out: bool = False,
) -> Start:
    """Read, prepare and plan; the data is opened and its first sample checked before that.

    ``held_out``: keep samples to measure plans on, besides those for gradients.
    """
    source = load(model, lazy=True)
    data = _open(source, calib_reader, statistics)
    prepared = prepare(source)
    source = without_large(source, 1024)  # rules read its names; its weights are done with
    plans_of = partial(planner, scheme=scheme, target=target, source=source, seen=data.shapes)
    rated = target.weighs_costs and keeps_histograms(calibrator)
    widest = WIDEST if rated else Weighing()
    plan_for = plans_of(prepared)
    plan = plan_for(widest)
    observed: Mapping[str, QuantSpec] = plan.observed
    if rated:
        observed = observed_to_rate(plan, frozenset(Graph(prepared).constants))
    kept: dict[bytes, Feed] = {}
    feeds = data.feeds
    if plan.quantized:
        feeds = keep_few(feeds, kept, 2 * SAMPLES if held_out else SAMPLES)
    readers = divisible(prepared, plan) if scheme.smooth else {}
    groups = channel_groups(prepared, plan) if scheme.equalize else ()
    _tell(plan, signed=scheme.activation.dtype.signed and target.weighs_costs)
    return Start(
        prepared=prepared,
        planner=plans_of,
        plan_for=plan_for,
        widest=widest,
        plan=plan,
        rated=rated,
        observed=observed,
        readers=readers,
        groups=groups,
        axes=_axes(plan, steps, readers, groups),
        layouts=moment_layouts(prepared, plan) if "moments" in needs_of(steps) else {},
        scores=weighing_scores(prepared) if plan.quantized else {},
        shapes=data.shapes,
        first=data.first,
        feeds=feeds,
        kept=kept,
    )


def _tell(plan: Plan, *, signed: bool) -> None:
    """Log what the plan comes to; ``signed``: int8 activations for a runtime on x86."""
    log.info("plan: %d integer nodes, %d float", len(plan.quantized), len(plan.left_float))
    if signed:
        log.warning(
            "int8 activations: onnxruntime has kernels for them on Arm; on x86 many of the nodes "
            "that are planned as integer will run in float, which uint8, the default, avoids"
        )
    if not plan.quantized:
        log.warning(
            "no node of this model runs on integers: the result computes what the float model "
            "does; Result.left_float and the metadata say why, node by node"
        )


class _Data(NamedTuple):
    """Calibration data that was opened; the fields are those of ``Start``."""

    first: Feed | None
    feeds: Iterator[Feed]
    shapes: Mapping[str, tuple[int, ...]]


def _open(source: onnx.ModelProto, calib_reader: Any, statistics: Statistics | None) -> _Data:
    """The data, of which there is none where statistics stand in for it."""
    if statistics is not None:
        return _Data(first=None, feeds=iter(()), shapes=statistics.shapes)
    specs = input_specs(source)
    feeds = open_feeds(calib_reader, specs)  # which makes sure that there is a sample
    # a copy: readers may fill the same arrays again
    first = {name: np.array(value) for name, value in next(feeds).items()}
    return _Data(first, chain([first], feeds), _sizes(calib_reader, first, specs))


def _sizes(
    calib_reader: Any, first: Feed, specs: Mapping[str, InputSpec]
) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs, whose sizes decide what pays.

    Where the model leaves sizes open, a list or tuple is looked through for the largest, so that
    its order does not matter. What can be read only once has a first sample, and no other yet.
    """
    found = {name: value.shape for name, value in first.items()}
    fixed = all(s.shape is not None and None not in s.shape for s in specs.values())
    if isinstance(calib_reader, list | tuple) and not fixed:
        for feed in open_feeds(calib_reader, specs):
            found = larger(found, {name: value.shape for name, value in feed.items()})
    return found


def _axes(
    plan: Plan, steps: Sequence[Step], readers: Iterable[str], groups: Iterable[Group]
) -> dict[str, int]:
    """The ``axes`` of a start."""
    found: dict[str, int] = {}
    if "means" in needs_of(steps):
        with_bias = (n for n in plan.linears if n.bias is not None)
        found = {n.input: -1 if n.kind == "matmul" else 1 for n in with_bias}
    found |= dict.fromkeys(readers, -1)
    return found | {name: AXIS for group in groups for name in group.rounded}


def gather(
    start: Start,
    calibrator: Calibrator[Any],
    executor: Executor | None,
    progress: Progress | None,
    mark: str | None = None,
) -> Statistics:
    """Run the samples and gather what the plan and the steps ask for."""
    found = collect(
        start.prepared,
        tuple(start.observed),
        start.axes,
        start.feeds,
        calibrator,
        executor=executor,
        progress=progress,
        layouts=start.layouts.values(),
        scores=start.scores.values(),
        shapes=start.shapes,
        # workers know a model by its mark; without any, and nothing to save, it is not needed
        mark="" if mark is None and executor is None else mark,
    )
    if not (start.rated and start.plan.quantized):
        return found
    sizes = nominal_graph(start.prepared, start.shapes)
    few = dict(islice(start.kept.items(), SAMPLES))
    back = gradients(start.prepared, sizes, start.plan, few)
    start.exact.extend(back.exact)
    errors = dynamic_errors(start.prepared, start.plan, few, back.exact)
    return replace(found, gradients=back.energies.beside(errors))


def _tell_blank(model: onnx.ModelProto, ranges: Mapping[str, TensorRange]) -> None:
    """Warn of data that is 0 throughout."""
    seen = [ranges[v.name] for v in model.graph.input if v.name in ranges]
    if seen and not any(r.low.any() or r.high.any() for r in seen):
        log.warning(
            "all inputs are 0 in every sample, which tells no scale; give data as the model is "
            "used with"
        )


def _squares(start: Start) -> dict[str, tuple[float, float]]:
    tables = dict.fromkeys(unit.table for unit in start.plan.lookups)
    if not tables:
        return {}
    graph = Graph(start.prepared)
    return {name: mean_squares(graph.floats(name)) for name in tables}


def learn(start: Start, statistics: Statistics, calibrator: Calibrator[Any]) -> Evidence:
    """What calibration has shown, with channels smoothed and equalized where that pays.

    Raises:
        CalibrationError: the samples do not fit the weights, or a tensor never had a value.
    """
    channels = {name: len(found.reach.low) for name, found in statistics.sums.items()}
    require_channels(start.prepared, start.plan, start.axes, channels)
    known = {n: spec for n, spec in start.observed.items() if n in statistics.summaries}
    ranges = moved(start.plan, ranges_from(statistics.summaries, known, calibrator))
    _tell_blank(start.prepared, ranges)
    moments = {
        node: statistics.moments[layout].moments
        for node, layout in start.layouts.items()
        if layout in statistics.moments
    }
    noise: dict[str, float] = {}
    shown: frozenset[str] = frozenset()
    if start.rated:
        seen = inferred(start.plan, statistics.summaries)
        felt = typical(statistics.gradients)
        graph = Graph(start.prepared)
        shown = shown_by(graph, judged(graph).names)
        noise = noise_of(start.plan, ranges, seen, gains_of(felt, seen), shown)
        noise |= dynamic_noise(start.plan, felt)
        noise |= table_noise(start.plan, _squares(start), felt)
    evidence = Evidence(
        model=start.prepared,
        plan_for=start.plan_for,
        plan=start.plan,
        ranges=ranges,
        noise=noise,
        shown=shown,
        means=statistics.means,
        moments=moments,
        floors=floors_of(statistics.peaks, start.scores),
    )
    found = smoothings(evidence, start.readers, statistics)
    equal = equalizations(evidence, start.groups, statistics, without=found)
    made = balanced(evidence, found, start.readers, equal, start.planner, start.widest)
    # an energy can be lost but once
    return replace(made, noise={name: min(noise, 1.0) for name, noise in made.noise.items()})
