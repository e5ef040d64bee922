"""The built-in solver steps and the default recipe. Numpy only."""

from collections.abc import Sequence

from qdq.solve import Step
from qdq.steps.avoid_saturation import AvoidSaturation
from qdq.steps.correct_bias import CorrectBias
from qdq.steps.derive_bias import DeriveBias
from qdq.steps.fit_weight_scales import FitWeightScales
from qdq.steps.fit_weights import FitWeightsToBias
from qdq.steps.from_ranges import FromConstants, FromRanges, ShareParams
from qdq.steps.round_weights import RoundWeights
from qdq.targets import Target

__all__ = [
    "DEFAULT_STEPS",
    "AvoidSaturation",
    "CorrectBias",
    "DeriveBias",
    "FitWeightScales",
    "FitWeightsToBias",
    "FromConstants",
    "FromRanges",
    "RoundWeights",
    "ShareParams",
    "for_target",
]

DEFAULT_STEPS: tuple[Step, ...] = (
    FromRanges(),
    FromConstants(),
    ShareParams(),
    CorrectBias(),
    FitWeightsToBias(),
    DeriveBias(),
)
"""Ranges, constants, sharing, the mean error into the bias, the bias's own scale."""


def for_target(steps: Sequence[Step], target: Target) -> tuple[Step, ...]:
    """The recipe with what the target needs: AvoidSaturation where its sums saturate.

    It goes in front of the first step that needs final weight scales; a recipe that has it
    already stays as it is.
    """
    if not target.saturates or any(isinstance(s, AvoidSaturation) for s in steps):
        return tuple(steps)
    late = (CorrectBias, FitWeightsToBias, DeriveBias)
    at = next((k for k, s in enumerate(steps) if isinstance(s, late)), len(steps))
    return (*steps[:at], AvoidSaturation(), *steps[at:])
