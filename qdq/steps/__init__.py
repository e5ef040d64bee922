"""The built-in solver steps and the default recipe. Numpy only."""

from qdq.solve import Step
from qdq.steps.correct_bias import CorrectBias
from qdq.steps.derive_bias import DeriveBias
from qdq.steps.fit_weights import FitWeightsToBias
from qdq.steps.from_ranges import FromConstants, FromRanges, ShareParams

__all__ = [
    "DEFAULT_STEPS",
    "CorrectBias",
    "DeriveBias",
    "FitWeightsToBias",
    "FromConstants",
    "FromRanges",
    "ShareParams",
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
