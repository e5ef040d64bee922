"""quantize(): the stages in order."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx

from qdq.calibrate import MinMax, calibrate
from qdq.data import open_feeds
from qdq.emit import emit
from qdq.graph import Graph
from qdq.modelio import load
from qdq.plan import Plan, make_plan
from qdq.prepare import prepare
from qdq.problem import Problem
from qdq.scheme import Scheme
from qdq.session import input_specs, observe
from qdq.solve import Solution, Step, solve
from qdq.steps import DEFAULT_STEPS
from qdq.targets import ORT_CPU, Target
from qdq.verify import verify
from qdq.version import __version__

__all__ = ["Result", "make_problem", "quantize", "run"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """All that a call made: the QDQ model, the plan, and the solution with its history."""

    model: onnx.ModelProto
    plan: Plan
    solution: Solution


def run(
    model: Any,
    calib_reader: Any,
    *,
    scheme: Scheme | None = None,
    calibrator: Any = None,
    steps: Sequence[Step] = DEFAULT_STEPS,
    target: Target = ORT_CPU,
) -> Result:
    """As ``quantize``, and hand out the plan and the solution too."""
    scheme, calibrator = scheme or Scheme(), calibrator or MinMax()
    source = load(model)
    feeds = open_feeds(calib_reader, input_specs(source))
    prepared = prepare(source)
    plan = make_plan(prepared, scheme, target)
    log.info("plan: %d integer nodes, %d float", len(plan.quantized), len(plan.left_float))
    batches = observe(prepared, list(plan.observed), feeds)
    ranges = calibrate(batches, plan.observed, calibrator)
    solution = solve(make_problem(prepared, plan, ranges), steps)
    log.info("solved: %d tensors, %d changes", len(solution.params), len(solution.changes))
    recipe = {
        "target": target.name,
        "scheme": repr(scheme),
        "calibrator": repr(calibrator),
        "steps": [repr(s) for s in steps],
    }
    metadata = {
        "version": __version__,
        "recipe": recipe,
        "left_float": {**plan.left_float, **solution.floats},
    }
    emitted = emit(prepared, plan, solution, metadata)
    return Result(model=verify(emitted), plan=plan, solution=solution)


def make_problem(model: onnx.ModelProto, plan: Plan, ranges: Any) -> Problem:
    """The numbers that the solver works on: the plan's tensors, their ranges and constants."""
    graph = Graph(model)
    values = {name: graph.array(name) for name in plan.tensors if name in graph.constants}
    return Problem(tensors=plan.tensors, linears=plan.linears, ranges=ranges, constants=values)


def quantize(
    model: Any,
    calib_reader: Any,
    *,
    scheme: Scheme | None = None,
    calibrator: Any = None,
    steps: Sequence[Step] = DEFAULT_STEPS,
    target: Target = ORT_CPU,
) -> onnx.ModelProto:
    """Quantize a float32 model."""
    return run(
        model, calib_reader, scheme=scheme, calibrator=calibrator, steps=steps, target=target
    ).model
