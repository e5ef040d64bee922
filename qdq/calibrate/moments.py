"""Second moments of what linear nodes multiply with their weights. Numpy only.

The error of an output channel with weight errors e is ``e' H e`` with ``H = E[x x']``, the mean
over samples and positions of the products of two terms of the sum. A term is an input channel
(and, of a convolution, a tap of its kernel).

A float sum depends on the order of what is summed, so the same data in another order would give
other bytes. Here each sample is rounded to integers of at most 14 bits times a power of two, which
depends on that sample alone; products of such integers and sums of 2**25 of them are exact in
float64, so no order and no split can change them. 14 bits are fine beside the 8 that the kernels
will see.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from qdq.errors import CalibrationError
from qdq.problem import Moments

__all__ = ["Layout", "MomentSum", "MomentSums"]

_BITS = 14  # of a code; a product has 28
_SPAN = 4  # exponents per bin: the largest value of a sample has at least 2**10 codes
_ROWS = 1 << 25  # 2**28 * 2**25 = 2**53: up to here float64 sums of products are exact
_LEAST = 32
_MOST = 256  # positions per sample
_WORK = 1 << 26  # multiplications per sample and node
_TERMS = 1 << 18  # values per sample and node

Floats = NDArray[np.float64]
Batch = Mapping[str, NDArray[np.floating]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a linear node reads its input: the terms of its sums, and in which blocks.

    Attributes:
        tensor: the input: (N, C, spatial...) of a convolution, else (..., C).
        channels: C.
        groups: number of groups.
        blocks: into how many runs of whole channels the terms of a group are split. Moments of
            terms in different blocks are not kept, which bounds memory.
        kernel: size of the kernel per spatial axis; () if there is none (a MatMul).
        strides: per spatial axis.
        dilations: per spatial axis.
        pads: all begins, then all ends.
        auto_pad: ``SAME_UPPER`` or ``SAME_LOWER`` in place of pads.
    """

    tensor: str
    channels: int
    groups: int = 1
    blocks: int = 1
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    auto_pad: str = ""

    @property
    def order(self) -> int:
        """B, the number of terms in a block."""
        return -(-(self.channels // self.groups) // self.blocks) * math.prod(self.kernel)

    @property
    def size(self) -> int:
        """Number of moments that are kept."""
        return self.groups * self.blocks * self.order**2

    def terms(self, x: NDArray[np.floating]) -> NDArray[np.floating]:
        """(groups * blocks, B, P): the terms of P sums of one sample.

        The positions are a fixed pattern, at most 256 and so few that the products cost no more
        than the node itself. What lies in the padding is 0, as are terms that fill up the last
        block.

        Args:
            x: the input of one sample.

        Raises:
            CalibrationError: if its channels or its rank are not those of the layout.
        """
        rank, axis = len(self.kernel), 1 if self.kernel else -1
        if x.ndim < max(rank + 2, 1) - (rank == 0) or x.shape[axis] != self.channels:
            raise CalibrationError(
                f"tensor {self.tensor!r} has shape {x.shape}; found by its reader's weight: "
                f"{self.channels} channels on axis {axis}",
                tensor=self.tensor,
            )
        found = self._windows(x) if self.kernel else self._rows(x)
        per_group = self.channels // self.groups
        full = -(-per_group // self.blocks) * self.blocks
        found = found.reshape(self.groups, per_group, -1, found.shape[-1])
        if full > per_group:
            found = np.pad(found, ((0, 0), (0, full - per_group), (0, 0), (0, 0)))
        return found.reshape(self.groups * self.blocks, self.order, -1)

    def _limit(self) -> int:
        most = min(_WORK // self.size, _TERMS // (self.channels * math.prod(self.kernel)))
        return max(_LEAST, min(_MOST, most))

    def _rows(self, x: NDArray[np.floating]) -> NDArray[np.floating]:
        """(C, 1, P) of (..., C)."""
        rows = x.reshape(-1, self.channels)
        return rows[_pattern(len(rows), 1, self._limit())].T[:, None, :]

    def _windows(self, x: NDArray[np.floating]) -> NDArray[np.floating]:
        """(C, taps, P) of (N, C, spatial...)."""
        spatial = x.shape[2:]
        begins, outs = self._geometry(spatial)
        total = x.shape[0] * math.prod(outs)
        at = _pattern(total, outs[-1], self._limit())
        sample, *place = np.unravel_index(at, (x.shape[0], *outs))
        taps = np.indices(self.kernel).reshape(len(self.kernel), 1, -1)
        index, inside = np.zeros((at.size, taps.shape[-1]), np.intp), np.True_
        for k, size in enumerate(spatial):
            start = place[k] * self.strides[k] - begins[k]
            line = start[:, None] + taps[k] * self.dilations[k]
            inside = inside & (line >= 0) & (line < size)
            index = index * size + np.clip(line, 0, size - 1)
        flat = x.reshape(x.shape[0], x.shape[1], -1)
        if x.shape[0] == 1:
            values = flat[0][:, index]  # (C, P, taps)
        else:
            values = flat[sample[:, None], :, index].transpose(2, 0, 1)
        values = np.where(inside, values, values.dtype.type(0))
        return np.asarray(values.transpose(0, 2, 1))

    def _geometry(self, spatial: tuple[int, ...]) -> tuple[list[int], list[int]]:
        """Padding before each axis, and the sizes of the output (at least one position)."""
        begins, outs = [], []
        for k, size in enumerate(spatial):
            reach = (self.kernel[k] - 1) * self.dilations[k] + 1
            if self.auto_pad.startswith("SAME"):
                out = -(-size // self.strides[k])
                total = max((out - 1) * self.strides[k] + reach - size, 0)
                begin = total // 2 if self.auto_pad == "SAME_UPPER" else total - total // 2
            else:
                begin, end = self.pads[k], self.pads[k + len(spatial)]
                out = (size + begin + end - reach) // self.strides[k] + 1
            begins.append(begin)
            outs.append(max(out, 1))
        return begins, outs


def _pattern(total: int, width: int, limit: int) -> NDArray[np.intp]:
    """At most ``limit`` of ``total`` positions, evenly spread, not all in the same columns."""
    step = max(-(-total // limit), 1)
    while step > 1 and math.gcd(step, width) > 1:
        step += 1
    return np.arange(step // 2, total, step) if total else np.zeros(0, np.intp)


@dataclass(frozen=True, slots=True, eq=False)
class MomentSum:
    """Exact sums of the terms and of their products.

    Attributes:
        bins: exponent → (sums of products (blocks, B, B), sums (blocks, B)) of codes, integers
            in float64; a code counts 2**(exponent - 14).
        count: number of positions.
    """

    bins: Mapping[int, tuple[Floats, Floats]]
    count: int

    @staticmethod
    def of(terms: NDArray[np.floating]) -> "MomentSum":
        """The sums over one sample.

        Args:
            terms: (blocks, B, P), finite.
        """
        largest = float(max(terms.max(initial=0), -terms.min(initial=0)))
        exponent = -(-math.frexp(largest)[1] // _SPAN) * _SPAN
        codes = terms * np.float64(math.ldexp(1.0, _BITS - exponent))
        np.rint(codes, out=codes)
        return MomentSum(
            {exponent: (codes @ codes.transpose(0, 2, 1), codes.sum(-1))}, terms.shape[-1]
        )

    def merge(self, other: "MomentSum") -> "MomentSum":
        """Both together; exactly associative and commutative.

        Raises:
            CalibrationError: beyond 2**25 positions, where the sums would no longer be exact.
        """
        count = self.count + other.count
        if count > _ROWS:
            raise CalibrationError(
                f"{count} positions, more than the {_ROWS} that can be summed exactly; use fewer "
                "samples, or leave out the steps that want second moments"
            )
        bins = dict(self.bins)
        for exponent, (products, sums) in other.bins.items():
            if exponent in bins:
                mine = bins[exponent]
                bins[exponent] = (mine[0] + products, mine[1] + sums)
            else:
                bins[exponent] = (products, sums)
        return MomentSum(bins, count)

    @property
    def moments(self) -> Moments:
        """The means of products and terms."""
        first = next(iter(self.bins.values()))
        second, mean = np.zeros_like(first[0]), np.zeros_like(first[1])
        for exponent in sorted(self.bins):
            products, sums = self.bins[exponent]
            unit = math.ldexp(1.0, exponent - _BITS)
            second += products * unit**2
            mean += sums * unit
        return Moments(second / self.count, mean / self.count, self.count)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MomentSum):
            return NotImplemented
        same = self.count == other.count and self.bins.keys() == other.bins.keys()
        return same and all(
            np.array_equal(mine, theirs)
            for exponent, sums in self.bins.items()
            for mine, theirs in zip(sums, other.bins[exponent], strict=True)
        )

    __hash__: ClassVar[None] = None  # type: ignore[assignment]


class MomentSums:
    """Adds up the second moments of the inputs of linear nodes.

    Args:
        layouts: how the nodes read their inputs; equal ones are summed once.
    """

    def __init__(self, layouts: Iterable[Layout]) -> None:
        self._layouts = tuple(dict.fromkeys(layouts))
        self.sums: dict[Layout, MomentSum] = {}

    def add(self, batch: Batch, sample: int = 0) -> None:
        """Add one sample.

        Args:
            batch: tensor → its values; empty ones are left out.
            sample: index of the sample, for errors.

        Raises:
            CalibrationError: if a tensor does not have the shape that its reader wants, or there
                is more data than can be summed exactly; ``tensor`` and ``sample`` say where.
        """
        for layout in self._layouts:
            x = batch[layout.tensor]
            if x.size == 0:
                continue
            try:
                terms = layout.terms(x)
                if not (np.isfinite(terms.min()) and np.isfinite(terms.max())):
                    continue  # NaN and Inf are refused where ranges are taken
                found = MomentSum.of(terms)
                sums = self.sums
                sums[layout] = sums[layout].merge(found) if layout in sums else found
            except CalibrationError as error:
                error.tensor, error.sample = layout.tensor, sample
                raise
