"""Operators with slow kernels, spelled out in others that are fast. Numpy only.

Measured with onnxruntime 1.32 on two cores, ns a value: Exp 0.1 to 0.3, Mul 0.1, Softplus and Mish
5, Pow 2.4 (but for squares and cubes), LogSoftmax over channels 7, LRN 12, cubic Resize 60 to 130
for each of its results.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdq.ops.demand import NodeView

__all__ = ["MISH", "POWERS", "Step", "neighbours", "steps_of"]

_MOST = 1 << 22  # elements of a matrix
_AXES_AS_INPUT = 18  # the first opset whose ReduceMax has them so
_BEHIND = 1 << 10  # elements behind an axis, from which on a softmax over it is slow
_CHANNELS = 512  # above, the convolution takes longer than what it replaces


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One of several nodes that a node is written as.

    Attributes:
        op_type: the operator.
        reads: what it reads: 0 is the node's first input, k what the k-th step makes; or a
            constant.
        attributes: of the operator.
    """

    op_type: str
    reads: tuple[int | NDArray[Any], ...]
    attributes: Mapping[str, float] = field(default_factory=dict)


Steps = tuple[Step, ...]

MISH: Steps = (
    Step("Neg", (0,)),
    Step("Sigmoid", (1,)),
    Step("Mul", (2, 2)),
    Step("Softsign", (3,)),
    Step("HardSigmoid", (4,), {"alpha": -2.0, "beta": 1.0}),
    Step("Mul", (0, 5)),
)
"""``x * tanh(softplus(x)) = x * (1 - 2 * softsign(sigmoid(-x)**2))``: with ``r = sigmoid(-x)`` is
``softplus(x) = -log(r)``, and ``tanh(-log(r)) = (1 - r**2) / (1 + r**2)``. Nothing overflows. A
sixth of the time, at 141 dB."""

_ROOT = Step("Sqrt", (0,))
POWERS: Mapping[float, Steps] = {
    -2.0: (Step("Mul", (0, 0)), Step("Reciprocal", (1,))),
    -1.0: (Step("Reciprocal", (0,)),),
    0.25: (_ROOT, Step("Sqrt", (1,))),
    0.5: (_ROOT,),
    0.75: (_ROOT, Step("Sqrt", (1,)), Step("Mul", (1, 2))),
    1.5: (_ROOT, Step("Mul", (0, 1))),
    4.0: (Step("Mul", (0, 0)), Step("Mul", (1, 1))),
}
"""Exponent → the power in roots and products, of which each rounds its result. Of -0 and -inf some
are others: a root of -0 is -0. So there is none for -0.5, which would be -inf in place of inf."""


def steps_of(
    view: NodeView,
    made: tuple[int | None, ...] | None,
    value: Callable[[str], NDArray[Any] | None],
) -> Steps:
    """The steps that a float node is faster in; none if it is not.

    Args:
        view: the node.
        made: the shape of its result, as far as it is known.
        value: tensor → its values; None for what is computed.
    """
    if not view.inputs or not view.inputs[0].floating:
        return ()
    match view.op_type:
        case "Mish":
            return MISH
        case "Pow" if made is not None and view.inputs[0].shape is not None:
            widens = len(made) > len(view.inputs[0].shape)  # by the axes of the exponent
            return () if widens else POWERS.get(view.scalars.get(1, 1.0), ())
        case "LogSoftmax":
            return _log_softmax(view)
        case "LRN":
            return _local_response(view)
        case "Resize":
            return _cubic(view, made, value)
    return ()


def _log_softmax(view: NodeView) -> Steps:
    """``x - max x - log(sum exp(x - max x))``, where the axis has others behind it.

    The kernel brings the axis to the end and back, and works on one short row after the other.
    """
    shape = view.inputs[0].shape
    if shape is None or view.opset < _AXES_AS_INPUT:
        return ()
    axis = view.integer("axis", -1) % len(shape)
    behind = shape[axis + 1 :]
    if None not in behind and prod(d or 0 for d in behind) < _BEHIND:
        return ()
    axes = np.array([axis], np.int64)
    return (
        Step("ReduceMax", (0, axes)),
        Step("Sub", (0, 1)),
        Step("Exp", (2,)),
        Step("ReduceSum", (3, axes)),
        Step("Log", (4,)),
        Step("Sub", (2, 5)),
    )


def _local_response(view: NodeView) -> Steps:
    """``x / (bias + alpha / size * sum of squares of channels nearby) ** beta``.

    Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural Networks", 2012. The
    sum is a convolution of one tap.
    """
    shape, kept = view.inputs[0].shape or (), view.attributes
    channels = shape[1] if len(shape) > 2 else None
    if channels is None or channels > _CHANNELS or 0 in shape:
        return ()
    size, beta = view.integer("size", 1), float(kept.get("beta", 0.75))  # type: ignore[arg-type]
    alpha, bias = (float(kept.get(k, v)) for k, v in (("alpha", 1e-4), ("bias", 1.0)))  # type: ignore[arg-type]
    near = neighbours(channels, size) * (alpha / size)
    weight = near.astype(np.float32).reshape(channels, channels, *[1] * (len(shape) - 2))
    squares = Step("Mul", (0, 0))
    sums = Step("Conv", (1, weight, np.full(channels, bias, np.float32)))
    power = POWERS.get(beta, (Step("Pow", (0, np.array(beta, np.float32))),))
    shifted = [_behind(step, 2) for step in power]
    return (squares, sums, *shifted, Step("Div", (0, 2 + len(power))))


def _behind(step: Step, count: int) -> Step:
    """A step whose input is what the step of that number makes."""
    reads = tuple(k + count if isinstance(k, int) else k for k in step.reads)
    return Step(step.op_type, reads, step.attributes)


def neighbours(channels: int, size: int) -> NDArray[np.float64]:
    """(C, C): 1 where the LRN of a channel (row) reads another one (column)."""
    away = np.arange(channels) - np.arange(channels)[:, None]
    return ((away >= -((size - 1) // 2)) & (away <= size // 2)).astype(np.float64)


def _cubic(
    view: NodeView,
    made: tuple[int | None, ...] | None,
    value: Callable[[str], NDArray[Any] | None],
) -> Steps:
    """A product with a matrix for each of two axes.

    By scales that leave all sizes as they are, the runtime copies.
    """
    shape, kept = view.inputs[0].shape, view.attributes
    if kept.get("mode") != b"cubic" or kept.get("antialias") or "axes" in kept:
        return ()
    if shape is None or made is None or len(shape) != 4 or shape[:2] != made[:2]:
        return ()
    by_sizes = view.has(3)
    scales = None if by_sizes else value(view.inputs[2].name)
    if shape == made or (scales is None and not by_sizes):
        return ()
    matrices = []
    for axis in (2, 3):
        size, wanted = shape[axis], made[axis]
        if size is None or wanted is None or not 0 < size * wanted <= _MOST:
            return ()
        scale = float(scales[axis]) if scales is not None else wanted / size
        places = _places(kept.get("coordinate_transformation_mode"), size, wanted, scale)
        if places is None:
            return ()
        a = float(kept.get("cubic_coeff_a", -0.75))  # type: ignore[arg-type]
        outside = not kept.get("exclude_outside")
        matrices.append(_cubic_matrix(places, size, a, outside=outside))
    rows, columns = matrices
    return Step("MatMul", (0, np.ascontiguousarray(columns.T))), Step("MatMul", (rows, 1))


def _places(mode: object, size: int, wanted: int, scale: float) -> NDArray[np.float64] | None:
    """Where each result lies among the values; None for a mode that is not known."""
    index = np.arange(wanted, dtype=np.float64)
    match mode or b"half_pixel":
        case b"half_pixel":
            return (index + 0.5) / scale - 0.5
        case b"pytorch_half_pixel":
            return (index + 0.5) / scale - 0.5 if wanted > 1 else index * 0
        case b"asymmetric":
            return index / scale
        case b"align_corners":
            return index * ((size - 1) / max(wanted - 1, 1))
    return None


def _cubic_matrix(
    places: NDArray[np.float64], size: int, a: float, *, outside: bool
) -> NDArray[np.float32]:
    """Weights of cubic convolution (Keys, 1981): (results, size).

    Args:
        places: of the results among the values, (results,).
        size: number of values.
        a: slope of the kernel at 1.
        outside: values beyond an end are that of the end; False: they do not count.
    """
    taps = np.floor(places)[:, None] + np.arange(-1, 3)
    away = np.abs(places[:, None] - taps)
    near = ((a + 2) * away - (a + 3)) * away * away + 1
    far = ((a * away - 5 * a) * away + 8 * a) * away - 4 * a
    weights = np.where(away <= 1, near, far)
    if not outside:
        weights = np.where((taps < 0) | (taps >= size), 0.0, weights)
        weights /= weights.sum(axis=1, keepdims=True)
    columns = np.clip(taps, 0, size - 1).astype(np.int64)
    matrix = np.zeros((len(places), size))
    np.add.at(matrix, (np.arange(len(places))[:, None], columns), weights)
    return matrix.astype(np.float32)
