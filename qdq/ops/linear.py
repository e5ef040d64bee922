"""Conv, ConvTranspose, Gemm, MatMul: int32 sums of products, weight and bias linked."""

from collections.abc import Mapping

from qdq.ops.demand import Demand, Handler, NodeView, Weight

__all__ = ["ROWS"]

_MOST_TERMS = (2**31 - 1) // 255**2
"""Products of two 8-bit codes that no int32 sum of them can overflow with. No scale is there to be
raised: the codes are what they are, and weights are not known."""


def _linear(node: NodeView, weight: Weight) -> Demand | str:
    if not node.inputs[weight.slot].constant:
        return f"its weight '{node.inputs[weight.slot].name}' is computed at run time"
    if node.inputs[0].constant:
        return "its data input is a constant"
    bias = 2 if node.has(2) else None
    if bias is not None and not node.inputs[bias].constant:
        return f"its bias '{node.inputs[bias].name}' is computed at run time"
    return Demand(activations=(0,), weight=weight, bias=bias)


def conv(node: NodeView) -> Demand | str:
    """Own range; the weight (M, C/groups, ...) has its output channels on axis 0."""
    return _linear(node, Weight(1, 0, "conv", node.integer("group", 1)))


def conv_transpose(node: NodeView) -> Demand | str:
    """Own range; the weight (C, M/groups, ...) has them on axis 1, shared by the groups."""
    return _linear(node, Weight(1, 1, "conv_transpose", node.integer("group", 1)))


def gemm(node: NodeView) -> Demand | str:
    """Own range; alpha, beta and transB of a constant B (K, N) are folded by prepare."""
    a, b = node.attributes.get("alpha", 1.0), node.attributes.get("beta", 1.0)
    if a != 1.0 or (b != 1.0 and node.has(2)):
        return f"alpha={a} and beta={b} could not be folded into constants"
    if node.integer("transA", 0):
        return "its left side is transposed at run time"
    if node.integer("transB", 0):
        return "its transposed weight is computed at run time"
    return _linear(node, Weight(1, 1, "matmul"))


def matmul(node: NodeView) -> Demand | str:
    """Own range; of two activations, or an activation and a constant right side (..., K, N)."""
    left, right = node.inputs
    if left.constant:
        return "its left side is a constant"
    if not right.constant or right.shape is None or len(right.shape) != 2:
        terms = {t.shape[k] for t, k in ((left, -1), (right, -2)) if t.shape and len(t.shape) > 1}
        if max((n for n in terms if n is not None), default=0) > _MOST_TERMS:
            return "its int32 sums of that many products of two activations can overflow"
        # a batched constant has no single axis of output channels: one scale, as an activation
        return Demand(activations=(0, 1))
    return Demand(activations=(0,), weight=Weight(1, 1, "matmul"))


ROWS: Mapping[str, Demand | Handler] = {
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Gemm": gemm,
    "MatMul": matmul,
}
