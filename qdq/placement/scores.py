"""Where the scores of a masked Softmax may be cut off. Numpy only.

The weight of a score is exp(score - peak), with the largest score of its row as the peak. It is a
normal number of float32 down to exp(-87.3), and exactly 0 from exp(-104) on; but to make it the
runtime multiplies by a power of two in the end, and that product is denormal before it is 0.
Processors of Intel take over a hundred cycles for one. Measured (onnxruntime 1.32, 12 heads of 64
tokens): a Softmax of scores of which a quarter is masked takes 90 µs, without the mask 19.

So scores are clipped, if a mask is seen to be there, at a floor from which all weights are normal.
What is masked then has a weight of exp(-30) = 1e-13 at most instead of 0, where float32 rounds
sums of 1 at 6e-8.
"""

from collections.abc import Mapping

import numpy as np

from qdq.calibrate.peaks import Peaks

__all__ = ["floors_of"]

# The floor is so far below the highest peak that one which is 12 higher still has normal weights,
# and below the lowest peak by 30 at least: for one which is 10 lower, a masked weight is 2e-9.
_DEPTH, _SPREAD = 75.0, 45.0
_SHARE = 0.05  # of rows with such scores, from which a Clip takes less time than they do


def floors_of(peaks: Peaks, scores: Mapping[str, str]) -> dict[str, float]:
    """Softmax → the score that all lower ones can be raised to; without those that need none.

    Args:
        peaks: of the scores over all samples. With a row of no finite score there is no floor.
        scores: Softmax → its scores.
    """
    lowest, highest, share = peaks.numbers.astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf - inf: not a number, which compares as false
        chosen = (share >= _SHARE) & (highest - lowest <= _SPREAD)
    floors = dict(zip(peaks.names, np.where(chosen, highest - _DEPTH, np.nan), strict=True))
    found = {softmax: float(floors.get(name, np.nan)) for softmax, name in scores.items()}
    return {softmax: floor for softmax, floor in found.items() if not np.isnan(floor)}
