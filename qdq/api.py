"""quantize(): the stages in order."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from qdq.calibrate import MSE, Calibrator, ranges_from
from qdq.calibrate.moments import Layout
from qdq.data import Feed, open_feeds
from qdq.emit import emit
from qdq.errors import ConfigError
from qdq.graph import Graph, without_large
from qdq.history import planned_counts, scale_history
from qdq.layouts import moment_layouts
from qdq.modelio import load
from qdq.plan import Plan, make_plan
from qdq.prepare import prepare
from qdq.problem import Moments, Problem
from qdq.ranges import TensorRange
from qdq.scheme import Scheme
from qdq.session import input_specs
from qdq.sharding import collect
from qdq.shipment import fingerprint
from qdq.solve import Solution, Step, needs_of, solve
from qdq.statistics import Statistics
from qdq.steps import DEFAULT_STEPS, for_target
from qdq.targets import ORT_CPU, Target
from qdq.verify import verify
from qdq.version import __version__
from qdq.wiring import clamps_that_stay
from qdq.worker import Progress

__all__ = ["Result", "collect_statistics", "make_problem", "quantize", "run"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """All that a call made: the QDQ model, the plan, and the solution with its history."""

    model: onnx.ModelProto
    plan: Plan
    solution: Solution

    @property
    def left_float(self) -> Mapping[str, str]:
        """Node name → why it stays float: by the plan, or by the solver's last word."""
        late = clamps_that_stay(self.plan, self.solution.params)
        return {**self.plan.left_float, **late, **self.solution.floats}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Start:
    """What is there before calibration; no feeds where statistics are given."""

    prepared: onnx.ModelProto
    plan: Plan
    axes: Mapping[str, int]
    layouts: Mapping[str, Layout]
    shapes: Mapping[str, tuple[int, ...]]
    first: Feed | None
    feeds: Iterator[Feed]


def run(
    model: Any,
    calib_reader: Any = None,
    *,
    scheme: Scheme | None = None,
    calibrator: Calibrator[Any] | None = None,
    steps: Sequence[Step] = DEFAULT_STEPS,
    target: Target = ORT_CPU,
    executor: Executor | None = None,
    statistics: Statistics | str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Result:
    """As ``quantize``, and hand out the plan and the solution too.

    Args and Raises: those of ``quantize``.

    Returns:
        The model, with ``plan.left_float`` (node → why it stays float), ``plan.quantized`` and
        ``solution.changes`` (what each solver step did to each scale).
    """
    scheme = Scheme() if scheme is None else scheme
    calibrator = MSE() if calibrator is None else calibrator
    _check_options(scheme, calibrator, steps, target)
    if (calib_reader is None) == (statistics is None):
        raise ConfigError("give either calibration data or statistics of an earlier calibration")
    given = Statistics.load(statistics) if isinstance(statistics, str | os.PathLike) else statistics
    steps = for_target(steps, target)
    start = _begin(model, calib_reader, given, scheme, steps, target)
    plan, prepared = start.plan, start.prepared
    found = given or _collect(start, calibrator, executor, progress)
    if given is not None:
        given.require(
            calibrator=calibrator,
            fingerprint=fingerprint(prepared),
            tensors=tuple(plan.observed),
            axes=start.axes,
            layouts=start.layouts.values(),
        )
    ranges = ranges_from(found.summaries, plan.observed, calibrator)
    moments = {
        node: found.moments[layout].moments
        for node, layout in start.layouts.items()
        if layout in found.moments
    }
    solution = solve(make_problem(prepared, plan, ranges, found.means, moments), steps)
    log.info("solved: %d tensors, %d changes", len(solution.params), len(solution.changes))
    recipe = {
        "target": target.name,
        "scheme": repr(scheme),
        "calibrator": repr(calibrator),
        "steps": [repr(s) for s in steps],
    }
    late = clamps_that_stay(plan, solution.params)
    metadata = {
        "version": __version__,
        "recipe": recipe,
        "left_float": {**plan.left_float, **late, **solution.floats},
        "planned": planned_counts(plan, {**late, **solution.floats}),
        "changes": scale_history(solution.changes, {n.weight for n in plan.linears}),
    }
    emitted = emit(prepared, plan, solution, metadata)
    return Result(model=verify(emitted, start.first, prepared), plan=plan, solution=solution)


def collect_statistics(
    model: Any,
    calib_reader: Any,
    *,
    scheme: Scheme | None = None,
    calibrator: Calibrator[Any] | None = None,
    steps: Sequence[Step] = DEFAULT_STEPS,
    target: Target = ORT_CPU,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Calibrate only: what ``quantize(..., statistics=...)`` needs in place of the data.

    Args and Raises: those of ``quantize``. The other options must be those of the later call.
    """
    scheme = Scheme() if scheme is None else scheme
    calibrator = MSE() if calibrator is None else calibrator
    _check_options(scheme, calibrator, steps, target)
    start = _begin(model, calib_reader, None, scheme, for_target(steps, target), target)
    return _collect(start, calibrator, executor, progress, fingerprint(start.prepared))


def _begin(
    model: Any,
    calib_reader: Any,
    statistics: Statistics | None,
    scheme: Scheme,
    steps: Sequence[Step],
    target: Target,
) -> _Start:
    """Read, prepare and plan."""
    source = load(model)
    first: Feed | None = None
    feeds: Iterator[Feed] = iter(())
    if statistics is None:
        feeds = open_feeds(calib_reader, input_specs(source))
        first = next(feeds)  # open_feeds has made sure that there is one
        feeds = chain([first], feeds)
        shapes: Mapping[str, tuple[int, ...]] = {n: a.shape for n, a in first.items()}
    else:
        shapes = statistics.shapes
    prepared = prepare(source)
    source = without_large(source, 1024)  # rules read its names; its weights are done with
    plan = make_plan(prepared, scheme, target, source=source, seen=shapes)
    log.info("plan: %d integer nodes, %d float", len(plan.quantized), len(plan.left_float))
    if not plan.quantized:
        log.warning(
            "no node of this model runs on integers: the result computes what the float model "
            "does; Result.left_float and the metadata say why, node by node"
        )
    return _Start(
        prepared=prepared,
        plan=plan,
        axes=_mean_axes(plan, steps),
        layouts=moment_layouts(prepared, plan) if "moments" in needs_of(steps) else {},
        shapes=shapes,
        first=first,
        feeds=feeds,
    )


def _collect(
    start: _Start,
    calibrator: Calibrator[Any],
    executor: Executor | None,
    progress: Progress | None,
    mark: str | None = None,
) -> Statistics:
    return collect(
        start.prepared,
        tuple(start.plan.observed),
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


def _check_options(scheme: object, calibrator: object, steps: object, target: object) -> None:
    """Refuse an option of the wrong kind before any work.

    Raises:
        ConfigError: naming the option, what was found and what is wanted.
    """
    methods = ("summarize", "merge", "range")
    listed = isinstance(steps, Sequence) and all(callable(s) for s in steps)
    for option, value, right, wanted in (
        ("scheme", scheme, isinstance(scheme, Scheme), "a qdq.Scheme"),
        ("target", target, isinstance(target, Target), "a qdq.targets.Target"),
        ("steps", steps, listed, "a sequence of solver steps, as qdq.steps.DEFAULT_STEPS"),
        (
            "calibrator",
            calibrator,
            not isinstance(calibrator, type) and all(hasattr(calibrator, m) for m in methods),
            "a calibrator, as qdq.MSE() or qdq.MinMax()",
        ),
    ):
        if not right:
            raise ConfigError(f"{option}={value!r} ({type(value).__name__}): wants {wanted}")


def _mean_axes(plan: Plan, steps: Sequence[Step]) -> dict[str, int]:
    """Inputs of linear nodes whose channel means a step asks for → the channel axis."""
    if "means" not in needs_of(steps):
        return {}
    with_bias = [n for n in plan.linears if n.bias is not None]
    return {n.input: -1 if n.kind == "matmul" else 1 for n in with_bias}


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


def quantize(
    model: Any,
    calib_reader: Any = None,
    *,
    scheme: Scheme | None = None,
    calibrator: Calibrator[Any] | None = None,
    steps: Sequence[Step] = DEFAULT_STEPS,
    target: Target = ORT_CPU,
    executor: Executor | None = None,
    statistics: Statistics | str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> onnx.ModelProto:
    """Quantize a float model to QDQ form, in one pass over the calibration data.

    Args:
        model: a path, the bytes of a model, an ``onnx.ModelProto`` or an ``onnx_ir.Model``;
            float32, or float16 (which becomes float32 inside, its inputs and outputs stay). It is
            never changed, and nothing is written beside it.
        calib_reader: the calibration samples: an object with ``get_next()`` that returns a dict
            of arrays or None at the end; any iterable of dicts, of tuples in the order of the
            inputs, or of arrays for a model with one input; a mapping (one sample); or the path
            of an ``.npz`` file with one array per input whose first axis is the sample. It is
            read once; some 30 samples are enough for most models.
        scheme: types, granularity, what stays float, overrides; default: uint8 activations,
            int8 weights with a scale per output channel.
        calibrator: how activation ranges are found: ``MSE`` (default), ``MinMax``,
            ``Percentile`` or ``Entropy``.
        steps: the solver's recipe.
        target: the runtime that the plan is made for; default: onnxruntime's CPU provider.
        executor: a ``concurrent.futures.Executor`` that runs the calibration: processes, or a
            cluster. The result is the same, byte for byte. It stays open.
        statistics: of an earlier calibration of this model with these options, or the path of
            their file, in place of calib_reader.
        progress: called with the number of samples done so far.

    Returns:
        A new model that onnxruntime loads. What stays float is listed with its reason in its
        metadata (``qdq.left_float``). Same model and data give the same bytes, whatever the
        order of the samples.

    Raises:
        ModelError: the model cannot be read, is invalid, has NaN weights, is quantized already.
        CalibrationError: no samples; names, types or shapes that do not fit; NaN or Inf.
        ConfigError: an option, rule or pattern that is impossible or matches nothing.
        SolveError: parameters that were given cannot hold their tensor or its bias.
        VerifyError: the result is not valid; a fault of qdq.
    """
    return run(
        model,
        calib_reader,
        scheme=scheme,
        calibrator=calibrator,
        steps=steps,
        target=target,
        executor=executor,
        statistics=statistics,
        progress=progress,
    ).model
