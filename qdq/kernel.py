"""The mathematics of int32 accumulators: what a bias asks of the weight scale. Numpy only.

An integer kernel computes, for each output channel i, in 32 bits::

    acc_i = sum_k (xq_k - x_zp) * (wq_ik - w_zp) + bq_i,      real = s_x * s_w,i * acc_i

The bias has no scale of its own: its code is ``bq_i = rint(b_i / (s_x * s_w,i))``. Small weights
or inputs beside a large bias push that code out of int32, and a code that just fits leaves no
room for the products: the sum wraps, silently. No input can make it wrap if::

    abs(bq_i) + A_i <= 2**31 - 1
    A_i = max(x_zp - qmin_x, qmax_x - x_zp) * sum_k abs(wq_ik - w_zp)

All channels are handled at once; derivation: docs/explanation/bias-aware-weight-scales.md.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdq.affine import broadcast, quantize
from qdq.bias_scale import INT32_MAX, bias_scale, bias_shape, round_up, with_scale
from qdq.errors import SolveError
from qdq.problem import Linear
from qdq.spec import QuantParams

__all__ = ["Kernel", "raise_scale"]

# Relative error of the runtime's float32 product s_x * s_w, with room to spare.
_PRODUCT = 2.0**-22

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """One linear node on integers: its input's final parameters, weight and bias.

    M is the number of output channels, K the number of products in one sum.

    Attributes:
        linear: the node.
        x: parameters of the input, one scale.
        weight: real weights, laid out as ``linear.kind`` says.
        bias: float64 (M,), largest magnitude of the bias in each channel; None without a bias.
    """

    linear: Linear
    x: QuantParams
    weight: NDArray[np.floating]
    bias: Floats | None

    @classmethod
    def of(
        cls,
        linear: Linear,
        x: QuantParams,
        weight: NDArray[np.floating],
        bias: NDArray[np.floating] | None,
    ) -> "Kernel":
        """A kernel of a bias of any shape that broadcasts against (..., M).

        Raises:
            SolveError: if the input has several scales, or the shapes do not fit.
        """
        if x.scale.ndim:
            raise SolveError(
                f"the input {linear.input!r} of {linear.node!r} has {x.scale.size} scales; an "
                "integer kernel wants one: plan it per tensor",
                tensor=linear.input,
                node=linear.node,
            )
        kernel = cls(linear, x, weight, None)
        if bias is None:
            return kernel
        try:
            full = np.broadcast_to(bias, bias_shape(bias.shape, kernel.channels))
        except SolveError as error:
            error.tensor, error.node = linear.bias, linear.node
            raise
        largest = np.abs(full.astype(np.float64)).reshape(-1, kernel.channels).max(0, initial=0)
        return cls(linear, x, weight, largest)

    @property
    def channels(self) -> int:
        """M, the number of output channels."""
        shape: tuple[int, ...] = self.weight.shape
        match self.linear.kind:
            case "conv":
                return shape[0]
            case "conv_transpose":
                return shape[1] * self.linear.groups
            case "matmul":
                return shape[-1]

    @property
    def terms(self) -> int:
        """K, the number of products in one sum (for conv_transpose the most there can be)."""
        if self.linear.kind == "matmul":
            return int(self.weight.shape[-2])
        return int(self.weight.size) // max(self.channels, 1)

    @property
    def swing(self) -> int:
        """Largest ``abs(xq - x_zp)`` over all codes of the input's type."""
        kind, zero = self.x.spec.dtype, int(self.x.zero_point)
        return max(zero - kind.min, kind.max - zero)

    @property
    def largest_input(self) -> float:
        """Largest ``abs(x)`` that the input's codes can express, in real units."""
        return float(self.x.scale) * self.swing

    def entries(self, w: QuantParams) -> NDArray[np.intp]:
        """(M,): which entry of the weight scale serves each output channel."""
        axis, kind = w.spec.axis, self.linear.kind
        if axis is None:
            return np.zeros(self.channels, np.intp)
        wanted = {"conv": 0, "conv_transpose": 1, "matmul": self.weight.ndim - 1}[kind]
        if axis % self.weight.ndim != wanted:
            raise SolveError(
                f"weight {self.linear.weight!r} of {self.linear.node!r} has its scales on axis "
                f"{axis}; a {kind} kernel has its output channels on axis {wanted}",
                tensor=self.linear.weight,
                node=self.linear.node,
            )
        found: NDArray[np.intp] = np.arange(self.channels) % self.weight.shape[wanted]
        return found

    def only(
        self, rows: NDArray[np.bool_], *params: QuantParams
    ) -> tuple["Kernel", tuple[QuantParams, ...]] | None:
        """Some of the output channels, with their parameters of the weight.

        None where channels do not have weights and scales of their own, one row each.
        """
        if self.linear.kind != "conv" or any(w.spec.axis != 0 for w in params):
            return None
        bias = None if self.bias is None else self.bias[rows]
        own = (QuantParams(w.spec, w.scale[rows], w.zero_point[rows]) for w in params)
        return Kernel(self.linear, self.x, self.weight[rows], bias), tuple(own)

    def per_entry(self, values: Floats, w: QuantParams) -> Floats:
        """Maximum of (M,) non-negative values over the channels of each weight scale entry."""
        found = np.zeros(w.scale.size)
        np.maximum.at(found, self.entries(w), values)
        return found.reshape(w.scale.shape)

    def sums(self, magnitudes: NDArray[Any]) -> Floats:
        """(M,): sums over the K products of values shaped like the weight, the worst batch.

        Summed in float64, which is exact for codes: a sum of 8-bit codes is far below 2**53.
        """
        m = magnitudes
        found: Floats
        match self.linear.kind:
            case "conv":
                found = m.reshape(m.shape[0], -1).sum(1, dtype=np.float64)
            case "conv_transpose":
                g = self.linear.groups
                rows = m.reshape(g, m.shape[0] // g, m.shape[1], -1)
                found = rows.sum((1, 3), dtype=np.float64).reshape(-1)
            case "matmul":
                found = m.sum(-2, dtype=np.float64).reshape(-1, m.shape[-1]).max(0, initial=0)
        return found

    def bias_codes(self, w: QuantParams) -> Floats:
        """(M,): ``abs(rint(b / (s_x * s_w)))``, not clipped; inf where the scale is no scale."""
        if self.bias is None:
            return np.zeros(self.channels)
        scale = bias_scale(self.x, w).astype(np.float64).reshape(-1)[self.entries(w)]
        # A subnormal float32 holds few bits or none, and some processors flush it to 0.
        normal = np.isfinite(scale) & (scale >= _smallest(self.x, w))
        return np.where(normal, np.rint(self.bias / np.where(normal, scale, 1.0)), np.inf)

    def products(self, w: QuantParams) -> Floats:
        """(M,): A_i, the largest magnitude of the sum of products over all input codes.

        Exact, from the rounded weights. 0 where a type is wider than 8 bits: runtimes sum those
        in float or in 64 bits.
        """
        if not _sums_in_int32(self.x, w):
            return np.zeros(self.channels)
        codes = quantize(self.weight, w).astype(np.int32)
        codes -= broadcast(w.zero_point.astype(np.int32), w.spec.axis, codes.ndim)
        np.abs(codes, out=codes)
        return self.sums(codes) * self.swing

    def load(self, w: QuantParams) -> Floats:
        """(M,): ``abs(bq_i) + A_i``, what the accumulator must hold; the law: <= 2**31 - 1.

        Where even weights that are all at the ends of their range would fit, A_i is that bound,
        because it needs no rounding of the weights.
        """
        codes = self.bias_codes(w)
        if not _sums_in_int32(self.x, w):
            return codes
        zero = w.zero_point.astype(np.int64)
        reach = int(np.maximum(zero - w.spec.qmin, w.spec.qmax - zero).max(initial=0))
        bound = codes + float(self.terms * self.swing * reach)
        over = ~(bound <= INT32_MAX)
        if not over.any():
            return bound
        few = self.only(over, w)  # mostly there are few, or none
        if few is None:
            return codes + self.products(w)
        kernel, (own,) = few
        bound[over] = codes[over] + kernel.products(own)
        return bound

    def floor(self, products: Floats, w: QuantParams) -> Floats:
        """(M,): a weight scale at which the accumulator holds, given an upper bound of A_i.

        ``s_w >= abs(b) / (s_x * (2**31 - 1 - A_i - 1))``: one count pays for the rounding of
        bq, and the factor 1 + 2**-22 for that of the product s_x * s_w. Where A_i alone fills
        the accumulator, A_i <= swing * (sum_k abs(w_ik) / s_w + K / 2) is solved for s_w.
        """
        scale = float(self.x.scale)
        bias = np.zeros(self.channels) if self.bias is None else self.bias
        room = INT32_MAX - 1 - products
        fine = bias / (scale * np.maximum(room, 1))
        if (room < 1).any():
            left = INT32_MAX - 1 - self.swing * self.terms / 2
            total = self.sums(np.abs(self.weight))
            coarse = (bias / scale + self.swing * total) / left if left > 0 else np.inf
            fine = np.where(room < 1, coarse, fine)
        if self.bias is not None:
            fine = np.maximum(fine, _smallest(self.x, w) / scale)
        return np.asarray(fine * (1 + _PRODUCT))


def raise_scale(kernel: Kernel, w: QuantParams, margin: float = 0.0) -> QuantParams | None:
    """The weight parameters with the smallest scales found at which a kernel's sums fit int32.

    A_i falls as the scale grows, so the scale that the present A_i asks for is safe; A_i at
    that scale then asks for a smaller one, which is taken where it fits too. Entries of which
    all channels fit already keep their scale, and no scale is ever lowered.

    Args:
        kernel: the linear node.
        w: the present parameters of its weight.
        margin: relative, added to what is needed.

    Returns:
        The parameters; ``w`` itself if it fits; None if no scale of its float type fits.
    """
    over = kernel.load(w) > INT32_MAX
    if not over.any():
        return w
    few = None if over.all() else kernel.only(over, w)
    if few is not None:
        raised = raise_scale(few[0], few[1][0], margin)
        return None if raised is None else with_scale(w, _replaced(w.scale, over, raised.scale))

    def candidate(products: Floats) -> QuantParams | None:
        floor = np.where(over, kernel.floor(products, w) * (1 + margin), 0.0)
        needed = np.maximum(kernel.per_entry(floor, w), w.scale.astype(np.float64))
        scale = round_up(needed, w.scale.dtype)
        return with_scale(w, scale) if np.isfinite(scale).all() else None

    safe = candidate(kernel.products(w))
    if safe is None or (kernel.load(safe) > INT32_MAX).any():
        return None
    finer = candidate(kernel.products(safe))
    if finer is None:
        return safe
    wrong = kernel.per_entry((kernel.load(finer) > INT32_MAX).astype(np.float64), w) > 0
    return with_scale(w, np.where(wrong, safe.scale, finer.scale))


def _replaced(
    values: NDArray[np.floating], rows: NDArray[np.bool_], new: NDArray[np.floating]
) -> NDArray[np.floating]:
    found = values.copy()
    found[rows] = new
    return found


def _sums_in_int32(x: QuantParams, w: QuantParams) -> bool:
    return x.spec.dtype.bits <= 8 and w.spec.dtype.bits <= 8


def _smallest(x: QuantParams, w: QuantParams) -> float:
    """The smallest scale that a bias may have: normal in float32; float16 is rounded up anyway."""
    if x.scale.dtype == np.float16 and w.scale.dtype == np.float16:
        return 0.0
    return float(np.finfo(np.float32).tiny)
