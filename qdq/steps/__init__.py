"""The built-in solver steps and the default recipe. Numpy only."""

from qdq.solve import Step
from qdq.steps.derive_bias import DeriveBias
from qdq.steps.fit_weights import FitWeightsToBias
from qdq.steps.from_ranges import FromConstants, FromRanges, ShareParams

__all__ = [
    "DEFAULT_STEPS",
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
    FitWeightsToBias(),
    DeriveBias(),
)
"""The default recipe: ranges, constants, sharing, then the two steps of the bias."""
