"""quantize(): the stages in order."""

import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

import onnx

from qdq.absorbed import clamps_that_stay
from qdq.calibrate import MSE, Calibrator
from qdq.checks import want
from qdq.choice import choose
from qdq.errors import ConfigError
from qdq.evidence import Evidence, make_problem, used_smoothings
from qdq.history import (
    equalization_history,
    planned_counts,
    scale_history,
    smoothing_history,
)
from qdq.plan import Plan
from qdq.scheme import Scheme
from qdq.shell import stamp
from qdq.solve import Solution, Step
from qdq.stages import begin, gather, learn
from qdq.statistics import Statistics
from qdq.statistics.shipment import fingerprint
from qdq.statistics.worker import Progress
from qdq.steps import DEFAULT_STEPS, for_target
from qdq.targets import ORT_CPU, Target
from qdq.verify import verify
from qdq.version import __version__
from qdq.wish import Wish

__all__ = ["Result", "collect_statistics", "make_problem", "quantize", "run"]

log: logging.Logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """All that a call made. Equal only to itself; compare its models.

    Attributes:
        model: the QDQ model.
        plan: what is integer, and why the rest is not.
        solution: the parameters, with the history of each.
        harm: tensor → what its rounding is foretold to do to the outputs, energy of the error
            over that of the signal as the choice of the plan weighs it, 0 to 1, whether the plan
            rounds it or not. Empty for calibrators without a histogram, and for targets that do
            not weigh costs.
    """

    model: onnx.ModelProto
    plan: Plan
    solution: Solution
    harm: Mapping[str, float] = field(default_factory=dict)

    @property
    def left_float(self) -> Mapping[str, str]:
        """Node name → why it stays float: by the plan, or by the solver's last word."""
        return {**self.plan.left_float, **_late(self.plan, self.solution)}


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
    worth: float | None = None,
    measured: bool = False,
    target_sqnr: float | None = None,
    target_latency: float | None = None,
) -> Result:
    """As ``quantize``, and hand out the plan and the solution too.

    Args and Raises: those of ``quantize``.

    Returns:
        The model, with ``plan.left_float`` (node → why it stays float), ``plan.quantized``,
        ``solution.changes`` (what each solver step did to each scale) and ``harm`` (what each
        rounding does to the outputs).
    """
    scheme = Scheme() if scheme is None else scheme
    calibrator = MSE() if calibrator is None else calibrator
    _check_options(scheme, calibrator, steps, target, progress, statistics)
    if (calib_reader is None) == (statistics is None):
        raise ConfigError("give either calibration data or statistics of an earlier calibration")
    wish = Wish(
        worth=worth,
        measured=measured,
        target_sqnr=target_sqnr,
        target_latency=target_latency,
    )
    if statistics is not None and wish.runs:
        raise ConfigError("measuring runs samples: give calibration data, not statistics")
    given = Statistics.load(statistics) if isinstance(statistics, str | os.PathLike) else statistics
    steps = for_target(steps, target)
    start = begin(model, calib_reader, given, scheme, calibrator, steps, target, held_out=wish.runs)
    wish.check(rated=start.rated)
    if given is not None:
        start.require(given, calibrator)
    found = given or gather(start, calibrator, executor, progress)
    evidence = learn(start, found, calibrator)
    chosen = choose(wish, model, start, evidence, steps)
    plan, solution = chosen.plan, chosen.solution
    log.info("solved: %d tensors, %d changes", len(solution.params), len(solution.changes))
    recipe = _recipe(scheme, calibrator, steps, target, chosen.by)
    metadata = {"version": __version__, "recipe": recipe, **_told(evidence, plan, solution)}
    stamp(chosen.model, evidence.model, metadata)
    model = verify(chosen.model, start.first, start.prepared, ran=chosen.ran)
    return Result(model=model, plan=plan, solution=solution, harm=evidence.noise)


def _recipe(
    scheme: Scheme,
    calibrator: Calibrator[Any],
    steps: Sequence[Step],
    target: Target,
    placement: Mapping[str, object],
) -> dict[str, object]:
    """The options that make the model again, for its metadata."""
    return {
        "target": target.name,
        "scheme": repr(scheme),
        "calibrator": repr(calibrator),
        "steps": [repr(s) for s in steps],
        "placement": placement,
    }


def _told(evidence: Evidence, plan: Plan, solution: Solution) -> dict[str, object]:
    """What the model's metadata tell of how it came about."""
    late = _late(plan, solution)
    return {
        "left_float": {**plan.left_float, **late},
        "planned": planned_counts(plan, late),
        "smoothed": smoothing_history(used_smoothings(evidence, plan), evidence.products),
        "equalized": equalization_history(evidence.equalizations),
        "changes": scale_history(solution.changes, {n.weight for n in plan.linears}),
    }


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
    _check_options(scheme, calibrator, steps, target, progress)
    steps = for_target(steps, target)
    start = begin(model, calib_reader, None, scheme, calibrator, steps, target)
    return gather(start, calibrator, executor, progress, fingerprint(start.prepared))


def _late(plan: Plan, solution: Solution) -> Mapping[str, str]:
    """Planned nodes that stay float after all → why."""
    return {**clamps_that_stay(plan, solution.params), **solution.floats}


def _check_options(
    scheme: object,
    calibrator: object,
    steps: object,
    target: object,
    progress: object,
    statistics: object = None,
) -> None:
    """Refuse an option of the wrong kind before any work.

    Raises:
        ConfigError: naming the option, what was found and what is wanted.
    """
    methods = ("summarize", "merge", "range")
    made = not isinstance(calibrator, type) and all(hasattr(calibrator, m) for m in methods)
    listed = isinstance(steps, Sequence) and all(
        callable(s) and not isinstance(s, type) for s in steps
    )
    called = progress is None or callable(progress)
    stored = statistics is None or isinstance(statistics, Statistics | str | os.PathLike)
    for option, value, right, wanted in (
        ("scheme", scheme, isinstance(scheme, Scheme), "a qdq.Scheme"),
        ("target", target, isinstance(target, Target), "a qdq.targets.Target"),
        ("steps", steps, listed, "a sequence of solver steps, as qdq.steps.DEFAULT_STEPS"),
        ("calibrator", calibrator, made, "a calibrator, as qdq.MSE() or qdq.MinMax()"),
        ("progress", progress, called, "a function of the number of samples done"),
        ("statistics", statistics, stored, "what collect_statistics gave, or the path of its file"),
    ):
        want(option, value, right, wanted)


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
    worth: float | None = None,
    measured: bool = False,
    target_sqnr: float | None = None,
    target_latency: float | None = None,
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
            read once; some 30 samples are enough for most models. Where the model leaves sizes
            open, the plan is made for the largest sample of a list or tuple, but for the first
            sample of what can be read only once.
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
        worth: what accuracy is worth in latency: 0 makes the fastest model, and the greater it
            is the more stays float. The plan is the one with the least latency / float latency +
            worth * energy of the error / energy of the outputs, as gradients of four samples
            foretell it. By default the worth is chosen: that of the plan with the least latency /
            float latency + 2 * error / signal, where 1 % of error counts as 2 % of latency.
            Calibrators without a histogram (MinMax) have a fixed price per rounded element in
            place of all this.
        measured: as the default, but the error is measured, of few plans, with all their
            roundings, on up to four samples. Takes some tenths of a second longer.
        target_sqnr: in dB; the fastest of some twenty plans whose worst output has it on up to
            four samples. If none has, the model stays float, with a warning.
        target_latency: over the given model's latency, as 0.5: the most accurate of these plans
            that is as fast on this machine, timed in turns with the given model on the first
            sample. If none is, the fastest one is taken, with a warning. As times vary, so may
            the plan. The metadata ``qdq.recipe`` tell the worth that gives the same plan again.
            Of ``worth``, ``measured``, ``target_sqnr`` and ``target_latency`` give one at most;
            all but the first need calib_reader, not statistics.

    Returns:
        A new model that onnxruntime loads. What stays float is listed with its reason in its
        metadata (``qdq.left_float``). Same model and data give the same bytes, whatever the
        order of the samples (of data that can be read only once: as long as the first one has
        about the same size).

    Raises:
        ModelError: the model cannot be read, is invalid, has NaN weights, is quantized already.
        CalibrationError: no samples; names, types or shapes that do not fit; NaN or Inf.
        ConfigError: an option, rule or pattern that is impossible or matches nothing.
        SolveError: parameters that were given cannot hold their tensor or its bias.
        VerifyError: the result is not valid; a fault of qdq or of an old onnxruntime.
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
        worth=worth,
        measured=measured,
        target_sqnr=target_sqnr,
        target_latency=target_latency,
    ).model
