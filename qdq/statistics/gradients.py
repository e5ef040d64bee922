"""Energies of gradients, sample by sample: a few samples stand for all of them. Numpy only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["SAMPLES", "Gradients"]

SAMPLES = 4  #: how many samples are enough


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gradients:
    """What errors in each tensor do to the outputs; see ``qdq.placement.adjoint``.

    Attributes:
        tensors: names; last those of weights of dynamic kernels (``qdq.dynamic``).
        energies: digest of a sample, in hexadecimal → energy of each tensor's gradient, and what
            the dynamic kernels do to the outputs, (n,).
    """

    tensors: tuple[str, ...] = ()
    energies: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)

    def beside(self, other: "Gradients") -> "Gradients":
        """Both tensors' numbers, of the samples that both have; where one has none, the other's."""
        if not (self.energies and other.energies):
            return self if self.energies else other
        joined = {
            digest: np.concatenate([row, other.energies[digest]])
            for digest, row in self.energies.items()
            if digest in other.energies
        }
        return Gradients(tensors=(*self.tensors, *other.tensors), energies=joined)

    def merge(self, other: "Gradients") -> "Gradients":
        """Those of the samples with the smallest digests; exactly associative and commutative.

        Where only one of the two has gradients, or of other tensors, there are none in common.
        """
        if self.tensors != other.tensors:
            return Gradients()
        both = {**self.energies, **other.energies}
        kept = {digest: both[digest] for digest in sorted(both)[:SAMPLES]}
        return Gradients(tensors=self.tensors, energies=kept)

    def packed(self) -> dict[str, NDArray[Any]]:
        """The energies as one array, (samples, n), for a file; rows in the order of digests."""
        rows = [self.energies[digest] for digest in sorted(self.energies)]
        return {"gradients": np.stack(rows)} if rows else {}

    @classmethod
    def unpacked(
        cls, tensors: Sequence[str], digests: Sequence[str], arrays: Mapping[str, NDArray[Any]]
    ) -> "Gradients":
        """What ``packed`` made, with the names that go with it."""
        rows = arrays["gradients"].reshape(len(digests), len(tensors)) if digests else ()
        return cls(tensors=tuple(tensors), energies=dict(zip(digests, rows, strict=True)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Gradients):
            return NotImplemented
        return (
            self.tensors == other.tensors
            and self.energies.keys() == other.energies.keys()
            and all(np.array_equal(e, other.energies[d]) for d, e in self.energies.items())
        )

    __hash__: ClassVar[None] = None  # type: ignore[assignment]
