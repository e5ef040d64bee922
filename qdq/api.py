"""quantize(): the stages in order."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from qdq.calibrate import MSE, Calibrator, calibrate
from qdq.calibrate.means import ChannelSum, watch_means
from qdq.data import open_feeds
from qdq.emit import emit
from qdq.errors import ConfigError
from qdq.graph import Graph, without_large
from qdq.history import planned_counts, scale_history
from qdq.modelio import load
from qdq.plan import Plan, make_plan
from qdq.prepare import prepare
from qdq.problem import Problem
from qdq.ranges import TensorRange
from qdq.scheme import Scheme
from qdq.session import input_specs, observe
from qdq.solve import Solution, Step, needs_of, solve
from qdq.steps import DEFAULT_STEPS, for_target
from qdq.targets import ORT_CPU, Target
from qdq.verify import verify
from qdq.version import __version__
from qdq.wiring import clamps_that_stay

__all__ = ["Result", "make_problem", "quantize", "run"]

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


def run(
    model: Any,
    calib_reader: Any,
    *,
    scheme: Scheme | None = None,
    calibrator: Calibrator[Any] | None = None,
    steps: Sequence[Step] = DEFAULT_STEPS,
    target: Target = ORT_CPU,
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
    steps = for_target(steps, target)
    source = load(model)
    feeds = open_feeds(calib_reader, input_specs(source))
    first = next(feeds)  # open_feeds has made sure that there is one
    feeds = chain([first], feeds)
    prepared = prepare(source)
    source = without_large(source, 1024)  # rules read its names; its weights are done with
    seen = {name: array.shape for name, array in first.items()}
    plan = make_plan(prepared, scheme, target, source=source, seen=seen)
    log.info("plan: %d integer nodes, %d float", len(plan.quantized), len(plan.left_float))
    if not plan.quantized:
        log.warning(
            "no node of this model runs on integers: the result computes what the float model "
            "does; Result.left_float and the metadata say why, node by node"
        )
    axes = _mean_axes(plan, steps)
    names = list(dict.fromkeys([*plan.observed, *axes]))
    sums: dict[str, ChannelSum] = {}
    batches = watch_means(observe(prepared, names, feeds), axes, sums)
    ranges = calibrate(batches, plan.observed, calibrator)
    means = {name: total.mean for name, total in sums.items()}
    solution = solve(make_problem(prepared, plan, ranges, means), steps)
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
    return Result(model=verify(emitted, first, prepared), plan=plan, solution=solution)


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
    )


def quantize(
    model: Any,
    calib_reader: Any,
    *,
    scheme: Scheme | None = None,
    calibrator: Calibrator[Any] | None = None,
    steps: Sequence[Step] = DEFAULT_STEPS,
    target: Target = ORT_CPU,
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
        model, calib_reader, scheme=scheme, calibrator=calibrator, steps=steps, target=target
    ).model
