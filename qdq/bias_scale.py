"""The scale of a bias, and its codes. Numpy only.

A bias has no scale of its own: its code is ``bq_i = rint(b_i / (s_x * s_w,i))``.
"""

import numpy as np
from numpy.typing import NDArray

from qdq.affine import broadcast
from qdq.errors import SolveError
from qdq.spec import QuantParams

__all__ = [
    "INT32_MAX",
    "bias_scale",
    "bias_shape",
    "largest_ratio",
    "quantize_bias",
    "round_up",
    "with_scale",
]

INT32_MAX = 2**31 - 1

Floats = NDArray[np.float64]


def round_up(x: Floats, dtype: np.dtype[np.floating]) -> NDArray[np.floating]:
    """The smallest numbers of a float type that are >= x (inf above its largest one)."""
    with np.errstate(over="ignore"):
        exact = np.asarray(x, np.float64)
        cast = exact.astype(dtype)
        return np.where(
            cast.astype(np.float64) < exact, np.nextafter(cast, dtype.type(np.inf)), cast
        ).astype(dtype)


def bias_scale(x: QuantParams, w: QuantParams) -> NDArray[np.floating]:
    """Scale of the bias for each entry of the weight scale: ``float32(s_x) * float32(s_w)``.

    The product is rounded to float32, as the runtime does it. Where both scales are float16 it
    is rounded up to float16, so that it is never 0.
    """
    with np.errstate(over="ignore", under="ignore"):
        product = np.asarray(x.scale.astype(np.float32) * w.scale.astype(np.float32))
    if x.scale.dtype == np.float16 and w.scale.dtype == np.float16:
        return round_up(product.astype(np.float64), np.dtype(np.float16))
    return product


def bias_shape(shape: tuple[int, ...], channels: int) -> tuple[int, ...]:
    """Shape of a bias with its channels spelled out on the last axis: () and (1,) become (M,)."""
    try:
        return np.broadcast_shapes(shape, (channels,))
    except ValueError:
        raise SolveError(
            f"a bias of shape {shape} does not broadcast to {channels} output channels"
        ) from None


def quantize_bias(bias: NDArray[np.floating], params: QuantParams) -> NDArray[np.int32]:
    """Codes of a bias: ``clip(rint(float64(b) / float64(s)), -(2**31 - 1), 2**31 - 1)``.

    Divided in float64, because float32 cannot hold 31 bits.

    Args:
        bias: (M,), (1, M), (N, M), or any shape if the scale is one value.
        params: int32 parameters of the bias, shape () or (M,) on the last axis.

    Returns:
        int32 codes of bias's shape.
    """
    scale = broadcast(params.scale.astype(np.float64), params.spec.axis, np.ndim(bias))
    codes = np.rint(np.asarray(bias, np.float64) / scale)
    return np.clip(codes, -INT32_MAX, INT32_MAX).astype(np.int32)


def with_scale(w: QuantParams, scale: NDArray[np.floating]) -> QuantParams:
    """The same parameters with another scale.

    The zero point stays: as qmin <= z <= qmax, raising s widens [s (qmin - z), s (qmax - z)] at
    both ends, so what was inside stays inside.
    """
    return QuantParams(w.spec, np.asarray(scale, w.scale.dtype), w.zero_point)


def largest_ratio(before: QuantParams, after: QuantParams) -> float:
    """The largest factor by which a scale grows."""
    return float(np.max(after.scale.astype(np.float64) / before.scale, initial=0))
