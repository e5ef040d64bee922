"""Affine quantization: range to parameters, real values to codes and back. Numpy only.

``real = scale * (code - zero_point)``, as the ONNX operators QuantizeLinear and
DequantizeLinear define it. Where a formula could be rounded in two ways, the one of
onnxruntime's kernels is taken, so that codes and values agree bit for bit.
"""

from typing import TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from qdq.errors import ConfigError
from qdq.ranges import TensorRange
from qdq.spec import QuantParams, QuantSpec

__all__ = [
    "broadcast",
    "dequantize",
    "fake_quantize",
    "is_flat",
    "params_from_range",
    "quantize",
    "range_width",
]

T = TypeVar("T", bound=np.generic)


def range_width(
    low: NDArray[np.floating], high: NDArray[np.floating], spec: QuantSpec
) -> NDArray[np.float64]:
    """What the codes of ``spec`` have to cover of ranges, widened to hold 0; of the ends' shape."""
    below = np.asarray(np.minimum(low, 0), np.float64)
    above = np.asarray(np.maximum(high, 0), np.float64)
    return np.asarray(2 * np.maximum(-below, above) if spec.symmetric else above - below)


def is_flat(width: NDArray[np.float64], spec: QuantSpec) -> NDArray[np.bool_]:
    """Where ranges have no extent that a scale could tell: float32 has it as a subnormal at most.

    The scale is made up then, see ``params_from_range``.
    """
    return np.asarray(width / (spec.qmax - spec.qmin) < float(np.finfo(np.float32).tiny))


def params_from_range(
    range: TensorRange,  # noqa: A002 - the field's word for it
    spec: QuantSpec,
    *,
    scale_dtype: DTypeLike = np.float32,
) -> QuantParams:
    """Scale and zero point that make the codes of ``spec`` cover a range.

    The range is first widened to hold 0, so that 0 has a code of its own (padding and Relu
    need that). Then, with a = max(abs(low), abs(high)):

    * asymmetric: scale = (high - low) / (qmax - qmin), zero point = rint(qmin - low / scale)
    * symmetric signed: scale = a / qmax, zero point 0
    * symmetric unsigned: scale = 2a / (qmax - qmin), zero point = the middle code

    Computed in float64 and cast at the end; float16 scales are rounded up, because a scale
    that is rounded down saturates the ends of the range. A range without extent (all zeros, or
    a scale that float32 holds only as a subnormal) gets scale 1 and the zero point at 0's code.
    Ranges so wide that a dequantized code would overflow are narrowed by one code.

    Args:
        range: shape () or (C,), as ``spec.axis`` wants it.
        spec: the wish.
        scale_dtype: float32 or float16, the model's float type.

    Returns:
        Parameters of the range's shape.

    Raises:
        ConfigError: if the range's shape does not fit ``spec.axis``, or scale_dtype is neither
            float32 nor float16.
    """
    dtype = np.dtype(scale_dtype)
    if dtype not in (np.float32, np.float16):
        raise ConfigError(f"scale_dtype must be float32 or float16; found {dtype}")
    steps = spec.qmax - spec.qmin
    info = np.finfo(dtype)
    limit = float(info.max) * (1 - 1 / steps - float(info.eps))
    low = _clipped(range.low.astype(np.float64), -limit, 0.0)
    high = _clipped(range.high.astype(np.float64), 0.0, limit)
    width = range_width(low, high, spec)
    flat = is_flat(width, spec)
    scale = np.where(flat, 1.0, width / steps)
    cast = scale.astype(dtype)
    if dtype == np.float16:
        up = np.nextafter(cast, np.float16(np.inf))
        cast = np.where(cast < scale, up, cast)
    zero: NDArray[np.float64]
    if spec.symmetric:
        middle = 0 if spec.dtype.signed else (spec.qmax + 1) // 2
        zero = np.full(scale.shape, middle, np.float64)
    else:
        # From the cast scale: it is the one that codes will be made with.
        exact = np.rint(spec.qmin - low / cast.astype(np.float64))
        zero = np.where(flat, max(spec.qmin, 0), _clipped(exact, spec.qmin, spec.qmax))
    return QuantParams(spec, cast, zero.astype(np.int64))


def quantize(x: NDArray[np.floating], params: QuantParams) -> NDArray[np.integer]:
    """Codes of real values: ``saturate(rint(x / scale) + zero_point)``.

    Bit-equal to onnxruntime's QuantizeLinear for float32: the quotient is a float32, ties go
    to the even code, and what is out of range saturates. Codes stay within
    [spec.qmin, spec.qmax]: symmetric int8 never gives -128. 32-bit codes (biases), which
    QuantizeLinear does not have, are divided in float64, since float32 cannot hold them.

    Args:
        x: any shape; for ``spec.axis`` not None the axis has C entries. No NaN.
        params: the parameters.

    Returns:
        Array of x's shape and ``params.spec.dtype``.

    Raises:
        ConfigError: if x does not fit a per-axis scale.
    """
    spec = params.spec
    work = np.float64 if spec.dtype.bits > 16 else np.float32
    scale, zero = _aligned(params, np.shape(x))
    zero = _one(zero.astype(work))
    with np.errstate(over="ignore"):  # a quotient of inf saturates like any other
        codes = np.asarray(x, work) / scale.astype(work)
    codes = np.asarray(codes)
    # Clipping before rounding keeps every intermediate exact; the bounds are integers.
    np.clip(codes, spec.qmin - zero, spec.qmax - zero, out=codes)
    np.rint(codes, out=codes)
    codes += zero
    return codes.astype(spec.dtype.dtype)


def dequantize(codes: NDArray[np.integer], params: QuantParams) -> NDArray[np.float32]:
    """Real values of codes: ``float32(code - zero_point) * scale``.

    Bit-equal to onnxruntime's DequantizeLinear for a float32 scale.

    Args:
        codes: any shape, of ``params.spec.dtype``.
        params: the parameters.

    Returns:
        float32 array of the shape of codes.

    Raises:
        ConfigError: if codes do not fit a per-axis scale.
    """
    scale, zero = _aligned(params, np.shape(codes))
    if params.spec.dtype.bits > 16:
        real = np.asarray(np.asarray(codes, np.int64) - zero.astype(np.int64)).astype(np.float32)
    else:  # whole numbers below 2**24, which float32 subtracts exactly
        real = np.array(codes, np.float32)
        real -= _one(zero.astype(np.float32))
    with np.errstate(over="ignore"):  # as the kernel: parameters made elsewhere may overflow
        real *= scale.astype(np.float32)
    return real


def fake_quantize(x: NDArray[np.floating], params: QuantParams) -> NDArray[np.float32]:
    """``dequantize(quantize(x))``: x as the integer kernels will see it, in float32."""
    return dequantize(quantize(x, params), params)


def broadcast(values: NDArray[T], axis: int | None, ndim: int) -> NDArray[T]:
    """View of per-axis values that broadcasts against a tensor.

    Args:
        values: shape () or (C,).
        axis: the axis that the values belong to, negative from the end; None for one value.
        ndim: rank of the tensor.

    Returns:
        Shape (1, .., C, .., 1) of rank ndim with C at axis; for axis None, values as it is.

    Raises:
        ConfigError: if the tensor has no such axis.
    """
    if axis is None:
        return values
    if not -ndim <= axis < ndim:
        raise ConfigError(f"axis {axis} does not exist in a tensor of rank {ndim}")
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


def _clipped(x: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    """np.clip of small arrays in a fraction of its time."""
    return np.asarray(np.minimum(np.maximum(x, low), high))


def _one(values: NDArray[T]) -> NDArray[T]:
    """Shape () where all values are the same: numpy clips and adds that many times as fast."""
    same = values.size > 0 and bool((values == values.flat[0]).all())
    return np.asarray(values.flat[0]) if same else values


def _aligned(
    params: QuantParams, shape: tuple[int, ...]
) -> tuple[NDArray[np.floating], NDArray[np.integer]]:
    """Scale and zero point, ready to broadcast against a tensor of that shape."""
    axis = params.spec.axis
    scale = broadcast(params.scale, axis, len(shape))
    # Without this check a dimension of 1 would silently broadcast to the scale's length.
    if axis is not None and shape[axis] != params.scale.size:
        raise ConfigError(
            f"{params.scale.size} scales for axis {axis} of a tensor of shape {shape}; that axis "
            f"wants {shape[axis]}"
        )
    return scale, broadcast(params.zero_point, axis, len(shape))
