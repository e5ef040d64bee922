"""Few of the samples, kept in memory while all of them pass. Numpy only."""

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np

from qdq.data import Feed

__all__ = ["keep_few"]


def keep_few(feeds: Iterable[Feed], kept: dict[bytes, Feed], count: int) -> Iterator[Feed]:
    """Pass the feeds on, and keep a few of them: those with the smallest digests of their content.

    So the choice is like a random one, but it depends neither on the order of the samples nor on
    a seed. Equal samples are kept once.

    Args:
        feeds: the samples.
        kept: is filled with digest → feed, in the order of the digests at the end.
        count: how many to keep.
    """
    for feed in feeds:
        yield feed
        digest = _digest(feed)
        if digest in kept or (len(kept) >= count and digest > max(kept)):
            continue
        kept[digest] = {n: np.array(v) for n, v in feed.items()}  # a reader may reuse its arrays
        if len(kept) > count:
            del kept[max(kept)]
    ordered = sorted(kept.items(), key=lambda item: item[0])
    kept.clear()
    kept.update(ordered)


def _digest(feed: Feed) -> bytes:
    found = hashlib.sha256()
    for name in sorted(feed):
        value = np.ascontiguousarray(feed[name])
        found.update(f"{name} {value.dtype.str} {value.shape}".encode())
        strings = value.dtype.kind == "O"  # of objects, memory has only addresses
        found.update(repr(value.tolist()).encode() if strings else value.data)
    return found.digest()
