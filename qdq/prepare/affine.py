"""Nodes that scale and shift each channel by constants, read as ``y = scale x + shift``."""

from typing import NamedTuple

import numpy as np

from qdq.prepare.editing import Array, Editor, Node

__all__ = ["Affine", "affine_of", "is_moderate"]

_HUGE = 1e18  # weights of up to 1e20 times that are finite in float32


class Affine(NamedTuple):
    """``y = scale x + shift`` per channel; float64 arrays of shape (C,)."""

    scale: Array
    shift: Array


def affine_of(
    ed: Editor, node: Node, x: str, channels: int, *, axis: int, rank: int
) -> Affine | None:
    """What a node does to the channels of its input ``x``, if it is this simple.

    Args:
        ed: the graph.
        node: a reader of x.
        x: the tensor, of the given rank, with ``channels`` indices on ``axis``.
        channels: number of channels.
        axis: the channel axis.
        rank: rank of x.

    Returns:
        The map for BatchNormalization and for Add, Sub, Mul, Div with a constant that is one
        value or one per channel, as long as it is moderate; None for everything else.
    """
    found = _map(ed, node, x, channels, axis, rank)
    return found if found is not None and is_moderate(found) else None


def _map(ed: Editor, node: Node, x: str, channels: int, axis: int, rank: int) -> Affine | None:
    if node.op == "BatchNormalization":
        bn = _batchnorm_affine(ed, node) if axis == 1 and node.input(0) == x else None
        return bn if bn is not None and bn.scale.shape == (channels,) else None
    if node.op not in ("Add", "Sub", "Mul", "Div"):
        return None
    first = node.input(0) == x
    constant = _per_channel(ed, node.input(1 if first else 0), channels, axis, rank)
    if constant is None:
        return None
    return _arithmetic(node.op, first, constant)


def _arithmetic(op: str, first: bool, constant: Array) -> Affine | None:
    """``x op constant``, or ``constant op x`` if x does not come first."""
    one, zero = np.ones_like(constant), np.zeros_like(constant)
    if op == "Add":
        return Affine(one, constant)
    if op == "Sub":
        return Affine(one, -constant) if first else Affine(-one, constant)
    if op == "Mul":
        return Affine(constant, zero)
    return Affine(one / constant, zero) if first and (constant != 0).all() else None


def is_moderate(affine: Affine) -> bool:
    """Whether constants that take it in stay finite in float32; False for NaN."""
    return all(bool((np.abs(a) < _HUGE).all()) for a in affine)


def _batchnorm_affine(ed: Editor, node: Node) -> Affine | None:
    """BatchNormalization at inference, over constants.

    ``y = scale (x - mean) / sqrt(var + epsilon) + bias``, from the ONNX operator's definition.
    """
    constants = [ed.array(i) for i in node.inputs[1:5]]
    # below opset 14 further outputs, read or not, are what says that it is in training mode
    if node.attr("training_mode", 0) or any(node.outputs[1:]):
        return None
    if len(constants) != 4 or any(c is None for c in constants):
        return None
    scale, bias, mean, var = (np.asarray(c, np.float64) for c in constants)
    with np.errstate(invalid="ignore", divide="ignore"):  # for is_moderate to find
        factor = scale / np.sqrt(var + node.attr("epsilon", 1e-5))
        return Affine(factor, bias - mean * factor)


def _per_channel(ed: Editor, name: str, channels: int, axis: int, rank: int) -> Array | None:
    """A constant as one float64 value per channel, if it broadcasts so and does not widen x."""
    value = ed.array(name)
    if value is None or value.ndim > rank or value.dtype.kind != "f":
        return None
    shape = (1,) * (rank - value.ndim) + value.shape
    if any(d != 1 for i, d in enumerate(shape) if i != axis) or shape[axis] not in (1, channels):
        return None
    return np.broadcast_to(value.astype(np.float64).reshape(-1), (channels,))
