"""How long models take."""

import math
import time
from typing import NamedTuple

import numpy as np

from qdq.checks import want_whole
from qdq.data import Feed
from qdq.session import Model, open_session

__all__ = ["Latency", "paired_latency"]

_LEAST_REPEATS = 5


class Latency(NamedTuple):
    """Paired timing of two models: medians in milliseconds, and the median of a's time / b's.

    The spreads are the lower and upper quartile of the same times and ratios.
    """

    ms_a: float
    ms_b: float
    ratio: float
    spread_a: tuple[float, float]
    spread_b: tuple[float, float]
    spread_ratio: tuple[float, float]


def paired_latency(
    a: Model,
    b: Model,
    feed: Feed,
    *,
    repeats: int = 50,
    seconds: float = math.inf,
    threads: int | None = None,
) -> Latency:
    """Time two models on one feed, in turns, so that both meet the same state of the machine.

    ``ratio`` is the median over the pairs of a's time over b's: above 1, b is the faster one.
    Beyond so many ``seconds`` there are fewer repeats, but five at least.

    Raises:
        ConfigError: repeats is no whole number from 1 up.
        ModelError: if onnxruntime cannot load or run a model.
    """
    want_whole("repeats", repeats, 1)
    sessions = [open_session(m, threads=threads) for m in (a, b)]
    for session in sessions:  # the first runs allocate memory
        session.run(feed)
        session.run(feed)
    times, end = np.zeros((repeats, 2)), time.perf_counter() + seconds
    for k, row in enumerate(times):
        if k >= _LEAST_REPEATS and time.perf_counter() > end:
            times = times[:k]
            break
        for column, session in enumerate(sessions):
            start = time.perf_counter()
            session.run(feed)
            row[column] = time.perf_counter() - start
    rows = np.stack([times[:, 0] * 1e3, times[:, 1] * 1e3, times[:, 0] / times[:, 1]])
    low, middle, high = np.quantile(rows, [0.25, 0.5, 0.75], axis=1).tolist()
    return Latency(*middle, *zip(low, high, strict=True))
