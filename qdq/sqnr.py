"""Signal to quantization noise in decibels. Numpy's scalars will do; no array work is here."""

import math

__all__ = ["decibels"]


def decibels(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)``, of energies: inf without noise, -inf without a signal only."""
    if noise <= 0:
        return math.inf
    return 10 * (math.log10(signal) - math.log10(noise)) if signal > 0 else -math.inf
