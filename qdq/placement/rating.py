"""Placement by the noise that each rounding makes, read from the histograms of calibration.

What rounding a tensor to 8 bits does to the model could be measured at the outputs, at a run of
the model for each tensor. The histogram knows without a run how loud the error is over the values,
and the gradients of few samples (see ``gains``) how much of that the outputs feel: the two together
stand in for the harm. Tensors behind which the way back is not known count with their own noise.
Noise of independent roundings adds up in energy.
"""

from collections.abc import Container, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdq.affine import params_from_range
from qdq.calibrate import Calibrator
from qdq.calibrate.noise import relative_noise
from qdq.plan import Plan
from qdq.problem import Fixed, Shared, Source
from qdq.ranges import Histogram, TensorRange
from qdq.spec import QuantParams, QuantSpec
from qdq.tables import RELATIVE_ERROR

__all__ = [
    "SHOWN",
    "dynamic_noise",
    "inferred",
    "keeps_histograms",
    "noise_of",
    "observed_to_rate",
    "table_noise",
]

SHOWN = 8.0
"""What the rounding of an output itself counts more than noise that arrives there.

Noise from within is small where the signal is: at the border of a mask, where classes are nearly
equal. That of the output's own steps is as large there as anywhere, and makes ties of what is
nearer than a step. Measured on trained networks (docs/explanation/placement.md)."""

_FELT, _UNFELT = 8 / 3, 0.125
"""What the outputs feel counts more than noise in a tensor, of which averages take most out. But
an eighth of that always counts: gradients know small errors only, not the decision that flips.
Fitted with ``frontier.AMPLITUDE``, on halves of calibration data."""


def keeps_histograms(calibrator: Calibrator[Any]) -> bool:
    """Whether the calibrator's summaries tell what rounding does to a tensor."""
    return isinstance(calibrator.summarize(np.zeros(1, np.float32)), Histogram)


def observed_to_rate(plan: Plan, constants: frozenset[str]) -> dict[str, QuantSpec]:
    """Tensors to observe so that all that ``plan`` rounds can be rated → their spec.

    A tensor whose histogram follows from another's (``inferred``) is left out.
    """
    gates = _gates(plan)
    known = {
        t.name: t.spec
        for t in plan.tensors.values()
        if isinstance(t.source, Fixed)
        and t.name not in constants
        and t.name not in plan.ruled
        and gates.get(t.name) not in plan.observed
    }
    return {**plan.observed, **known}


def inferred(plan: Plan, summaries: Mapping[str, Any]) -> dict[str, Any]:
    """The summaries, with those that follow from others.

    A movement node hands out (a part of) the values that it reads. A Sigmoid's values are those
    of its input, each taken at the centre of its bin; that is for rating only, since the range of
    a Sigmoid is known.
    """
    found = dict(summaries)
    for result, source in _gates(plan).items():
        if result not in found and isinstance(found.get(source), Histogram):
            found[result] = found[source].mapped(_sigmoid)
    for t in plan.tensors.values():
        if isinstance(t.source, Shared) and t.source.owner in found:
            found.setdefault(t.name, found[t.source.owner])
    return found


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 + 0.5 * np.tanh(x / 2)  # exp would overflow


def _gates(plan: Plan) -> dict[str, str]:
    """Result of a Sigmoid → its input."""
    units = plan.placement.units
    return {u.outputs[0]: u.view.inputs[0].name for u in units if u.view.op_type == "Sigmoid"}


def noise_of(
    plan: Plan,
    ranges: Mapping[str, TensorRange],
    summaries: Mapping[str, Any],
    gains: Mapping[str, float] | None = None,
    shown: Container[str] = (),
) -> dict[str, float]:
    """Tensor → energy of its rounding over the energy of its values, or what outputs feel of it.

    Above 1 the outputs are lost. How far above tells whether balancing channels can save them.

    Args:
        plan: the widest plan.
        ranges: tensor → calibrated range.
        summaries: tensor → histogram of all its values.
        gains: tensor → relative error of the outputs over its own relative noise, where known.
        shown: the tensors whose values are outputs, or logits of which outputs are made.
    """
    parts, gains = _parts(plan), gains or {}
    noise = {}
    for t in plan.tensors.values():
        if t.name not in summaries or t.name in plan.ruled:
            continue  # a constant; or what the user has set, which is wanted so and has no price
        params = _params(t.source, t.spec, ranges.get(t.name))
        seen = [summaries[n] for n in (t.name, *parts.get(t.name, ())) if n in summaries]
        noise[t.name] = max(relative_noise(histogram, params) for histogram in seen)
        if t.name in gains:
            felt = gains[t.name] * relative_noise(summaries[t.name], params)
            noise[t.name] = max(_FELT * felt, _UNFELT * noise[t.name])
        if t.name in shown:
            noise[t.name] *= SHOWN
    return noise


def dynamic_noise(plan: Plan, errors: Mapping[str, float]) -> dict[str, float]:
    """First weight of a dynamic kernel → the harm that it does; all, where it was not measured.

    Args:
        plan: the widest plan.
        errors: first weight → relative error of the outputs.
    """
    weights = [unit.dynamic[0] for unit in plan.dynamic]
    return {name: min(_FELT * errors.get(name, 1.0), 1.0) for name in weights}


def table_noise(
    plan: Plan, squares: Mapping[str, tuple[float, float]], energies: Mapping[str, float]
) -> dict[str, float]:
    """Table → the harm that its codes do.

    Args:
        plan: the widest plan.
        squares: table → mean squares of its error and of its values.
        energies: table → energy of its gradient (see ``adjoint``), where known.
    """
    found: dict[str, float] = {}
    for name in (unit.table for unit in plan.lookups):
        error, energy = squares[name]
        own = error / energy if energy else 0.0
        felt = energies.get(name)
        harm = own if felt is None else max(_FELT * felt * RELATIVE_ERROR, _UNFELT * own)
        found[name] = min(harm, 1.0)
    return found


def _parts(plan: Plan) -> dict[str, tuple[str, ...]]:
    """What a Concat puts together: result → inputs.

    Each part counts by itself: pixel coordinates beside probabilities have nearly all of the
    energy, and the loss of all probabilities would not be seen.
    """
    units = plan.placement.units
    return {u.outputs[0]: u.reads for u in units if u.view.op_type == "Concat" and u.demand}


def _params(source: Source, spec: QuantSpec, found: TensorRange | None) -> QuantParams:
    """The parameters that the solver will give, but for what sharing them changes."""
    if isinstance(source, Fixed):
        found = source.range
    assert found is not None  # noqa: S101 -- all that is rated without a rule is observed
    return params_from_range(found, spec)
