"""Numbers of a few samples, which stand for all of them. Numpy only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["SAMPLES", "FewSamples"]

SAMPLES = 4  #: how many samples are enough


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FewSamples:
    """Numbers of tensors or nodes, sample by sample.

    Attributes:
        names: of the tensors or nodes.
        rows: digest of a sample, in hexadecimal → its numbers, (n,) in the order of the names.
    """

    names: tuple[str, ...] = ()
    rows: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)

    def beside(self, other: "FewSamples") -> "FewSamples":
        """All numbers of the samples that both have; where one has none, the other's."""
        if not (self.rows and other.rows):
            return self if self.rows else other
        joined = {
            digest: np.concatenate([row, other.rows[digest]])
            for digest, row in self.rows.items()
            if digest in other.rows
        }
        return FewSamples(names=(*self.names, *other.names), rows=joined)

    def merge(self, other: "FewSamples") -> "FewSamples":
        """Those of the samples with the smallest digests; exactly associative and commutative.

        Where only one of the two has numbers, or under other names, there are none in common.
        """
        if self.names != other.names:
            return FewSamples()
        both = {**self.rows, **other.rows}
        kept = {digest: both[digest] for digest in sorted(both)[:SAMPLES]}
        return FewSamples(names=self.names, rows=kept)

    def packed(self) -> tuple[dict[str, Sequence[str]], NDArray[np.floating]]:
        """For a file: names and digests, and the numbers as one array (samples, n)."""
        digests = sorted(self.rows)
        rows = [self.rows[digest] for digest in digests]
        numbers = np.stack(rows) if rows else np.zeros((0, len(self.names)), np.float32)
        return {"names": self.names, "samples": digests}, numbers

    @classmethod
    def unpacked(
        cls, header: Mapping[str, Sequence[str]], numbers: NDArray[np.floating]
    ) -> "FewSamples":
        """What ``packed`` made."""
        names, digests = tuple(header["names"]), header["samples"]
        rows = numbers.reshape(len(digests), len(names))
        return cls(names=names, rows=dict(zip(digests, rows, strict=True)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FewSamples):
            return NotImplemented
        return (
            self.names == other.names
            and self.rows.keys() == other.rows.keys()
            and all(np.array_equal(e, other.rows[d]) for d, e in self.rows.items())
        )

    __hash__: ClassVar[None] = None  # type: ignore[assignment]
