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

import numpy as np

from qdq.statistics.few import FewSamples

__all__ = ["DENORMAL", "floors_of"]

DENORMAL = 87.0  #: exp(-DENORMAL) is next to the smallest normal number
# The floor is so far below the highest peak that one which is 12 higher still has normal weights,
# and below the lowest peak by 30 at least: for one which is 10 lower, a masked weight is 2e-9.
_DEPTH, _SPREAD = 75.0, 45.0
_SHARE = 0.02  # of scores so far below their peak from which a Clip takes less time than they do


def floors_of(peaks: FewSamples) -> dict[str, float]:
    """Softmax → the score that all lower ones can be raised to; without those that need none.

    Args:
        peaks: of each Softmax the lowest peak, the highest, and the share of scores that are more
            than ``DENORMAL`` below theirs (``qdq.placement.masked``). With a row of no finite score
            there is no floor.
    """
    if not peaks.rows:
        return {}
    rows = np.stack([peaks.rows[d] for d in sorted(peaks.rows)]).astype(np.float64)
    low, high, share = rows.reshape(len(rows), -1, 3).transpose(2, 0, 1)
    lowest, highest, most = low.min(axis=0), high.max(axis=0), share.max(axis=0)
    with np.errstate(invalid="ignore"):  # inf - inf: not a number, which compares as false
        chosen = (most >= _SHARE) & (highest - lowest <= _SPREAD)
    triples = zip(peaks.names[::3], chosen, highest, strict=True)
    return {name: float(top - _DEPTH) for name, is_chosen, top in triples if is_chosen}
