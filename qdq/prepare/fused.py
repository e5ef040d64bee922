"""What onnxruntime or its tools have fused in a model that they have optimized, taken apart.

The runtime fuses again what is to stay float. Where a product is inside of an operator of the
runtime's own (``com.microsoft``), it could not be an integer one.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto

from qdq.facts import RUNTIME
from qdq.prepare.constants import fold_constants
from qdq.prepare.editing import Editor, Node
from qdq.prepare.node import drop_absent

__all__ = ["take_apart"]

Made = list[onnx.NodeProto]
Rule = Callable[[Editor, Node], Made | None]

# activation within an operator → names of its attributes, in the order of the parameters
_ACTIVATIONS: Mapping[str, Sequence[str]] = {
    "Relu": (),
    "Sigmoid": (),
    "Tanh": (),
    "LeakyRelu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
    "HardSwish": (),
    "Clip": ("min", "max"),
}
_KEPT = ("num_heads", "unidirectional", "mask_filter_value", "scale")  # of attention


def take_apart(ed: Editor) -> None:
    """Fused operators become what they were made of, if that is in float32.

    FusedConv, FusedGemm and FusedMatMul; BiasGelu, FastGelu, QuickGelu and the runtime's own Gelu;
    SkipLayerNormalization, also without means; EmbedLayerNormalization; the products in front of an
    Attention, which becomes a MultiHeadAttention. Types behind them are known only then.
    """
    for rules in (_BY_THEMSELVES, {"FusedMatMul": _fused_matmul}):
        changed = False
        for op, rule in rules.items():
            for node in ed.nodes(f"{RUNTIME}::{op}"):
                new = rule(ed, node) if _is_float32(ed, node) else None
                if new is not None:
                    ed.replace([node], new)
                    changed = True
        if changed:
            fold_constants(ed)


def _is_float32(ed: Editor, node: Node) -> bool:
    """Whether no input is known to be of another floating-point type."""
    kinds = (ed.dtype(name) for name in node.inputs if name)
    return all(k is None or k.kind != "f" or k == np.float32 for k in kinds)


def _added(ed: Editor, node: Node, x: str, more: str, made: Made) -> str:
    """Write the sum of two tensors; of one, where there is no other."""
    if not more:
        return x
    total = ed.fresh(f"{x}_plus")
    made.append(ed.new_node("Add", [x, more], [total], ed.fresh(f"{node.name}_add")))
    return total


def _fused_linear(ed: Editor, node: Node) -> Made | None:
    op = node.proto.op_type.removeprefix("Fused")
    kind = node.attr("activation", "")
    if kind not in _ACTIVATIONS:
        return None
    given = node.attr("activation_params") or [
        v for k in ("alpha", "beta") if (v := node.attr(f"activation_{k}")) is not None
    ]
    x, y = node.inputs[:3], ed.fresh(f"{node.output}_linear")
    linear = ed.new_node(op, x, [y], node.name)
    linear.attribute.extend(a for a in node.proto.attribute if not a.name.startswith("activation"))
    made = [linear]
    total = _added(ed, node, y, node.input(3), made)
    kept = dict(zip(_ACTIVATIONS[kind], given, strict=False))
    bounds = []
    if kind == "Clip":
        bounds = [
            ed.add_constant(f"{node.name}_{k}", np.asarray(v, np.float32)) for k, v in kept.items()
        ]
        kept = {}
    name = ed.fresh(f"{node.name}_act")
    made.append(ed.new_node(kind, [total, *bounds], [node.output], name, **kept))
    return made


def _gelu(ed: Editor, node: Node) -> Made | None:
    if ed.opset < 20:  # which brought the operator
        return None
    made: Made = []
    x = _added(ed, node, node.input(0), node.input(1), made)
    approximate = "tanh" if node.proto.op_type == "FastGelu" else "none"
    made.append(ed.new_node("Gelu", [x], [node.output], node.name, approximate=approximate))
    return made


def _quick_gelu(ed: Editor, node: Node) -> Made:
    """``x sigmoid(alpha x)``."""
    made: Made = []
    x, alpha = node.input(0), np.asarray(node.attr("alpha", 1.702), np.float32)
    scaled, gate = x, ed.fresh(f"{node.output}_gate")
    if alpha != 1:
        scaled = ed.fresh(f"{node.output}_scaled")
        inputs = [x, ed.add_constant(f"{node.name}_alpha", alpha)]
        made.append(ed.new_node("Mul", inputs, [scaled], ed.fresh(f"{node.name}_scale")))
    made.append(ed.new_node("Sigmoid", [scaled], [gate], ed.fresh(f"{node.name}_gate")))
    made.append(ed.new_node("Mul", [x, gate], [node.output], node.name))
    return made


def _skip_norm(ed: Editor, node: Node) -> Made | None:
    """A bias is added to the first input, which a product makes, so that it goes into that."""
    op = node.proto.op_type.removeprefix("Skip")
    x, skip, scale, shift, bias = (node.input(k) for k in range(5))
    if op == "SimplifiedLayerNormalization":  # has no offset
        shift, bias = "", shift
    y, mean, inverse, total = [*node.outputs, "", "", ""][:4]
    if ed.opset < 17 or any(o and ed.read(o) for o in (mean, inverse)):
        return None
    made: Made = []
    x = _added(ed, node, x, bias, made)
    total = total or ed.fresh(f"{y}_sum")
    made.append(ed.new_node("Add", [x, skip], [total], ed.fresh(f"{node.name}_sum")))
    inputs = [total, scale, *([shift] if shift else [])]
    epsilon = node.attr("epsilon", 1e-12)
    made.append(ed.new_node(op, inputs, [y], node.name, epsilon=epsilon))
    return made


def _embedding(ed: Editor, node: Node) -> Made | None:
    """Rows of two or three tables, added and normalized; and how many keys a mask lets through."""
    ids, segments, words, places, kinds, scale, shift, mask, positions = map(node.input, range(9))
    y, count, total = [*node.outputs, "", ""][:3]
    counted = bool(count) and ed.read(count)
    if ed.opset < 17 or (counted and not mask):
        return None
    made: Made = []

    def write(op: str, inputs: Sequence[str], label: str, output: str = "", **kept: object) -> str:
        output = output or ed.fresh(f"{y}_{label}")
        made.append(ed.new_node(op, inputs, [output], ed.fresh(f"{node.name}_{label}"), **kept))
        return output

    last = write("Gather", [words, ids], "word")
    if positions:
        place = write("Gather", [places, positions], "position")
    else:
        first = ed.add_constant(f"{node.name}_first", np.array([0]))
        length = write("Shape", [ids], "length", start=1, end=2)
        place = write("Slice", [places, first, length], "position")
    if segments:
        last = write("Add", [last, place], "places")
        place = write("Gather", [kinds, segments], "segment")
    last = write("Add", [last, place], "sum", total)
    epsilon = node.attr("epsilon", 1e-12)
    made.append(
        ed.new_node("LayerNormalization", [last, scale, shift], [y], node.name, epsilon=epsilon)
    )
    if counted:
        one = ed.add_constant(f"{node.name}_one", np.array(1, np.int32))
        axis = ed.add_constant(f"{node.name}_axis", np.array([1]))
        seen = write("Cast", [write("Equal", [mask, one], "seen")], "numbers", to=TensorProto.INT32)
        write("ReduceSum", [seen, axis], "count", count, keepdims=0)
    return made


def _attention(ed: Editor, node: Node) -> Made | None:
    """One product for each of queries, keys and values, which read the same input."""
    x, weight, bias, mask, *others = (node.input(k) for k in range(7))
    matrix, shift = ed.array(weight), ed.array(bias)
    more = others[0] or others[2] or any(node.outputs[1:]) or node.attr("do_rotary", 0)
    if matrix is None or (bias and shift is None) or more or not _masks_keys(ed, mask):
        return None
    sizes = node.attr("qkv_hidden_sizes") or [matrix.shape[1] // 3] * 3
    ends = np.cumsum(sizes)[:2]
    shifts = [None] * 3 if shift is None else np.split(shift, ends)
    made: Made = []
    heads = []
    for kind, part, own in zip("qkv", np.split(matrix, ends, axis=1), shifts, strict=True):
        product = ed.fresh(f"{node.output}_{kind}")
        inputs = [x, ed.add_constant(f"{weight}_{kind}", part)]
        made.append(ed.new_node("MatMul", inputs, [product], ed.fresh(f"{node.name}_{kind}")))
        offset = "" if own is None else ed.add_constant(f"{bias}_{kind}", own)
        heads.append(_added(ed, node, product, offset, made))
    inputs = [*heads, "", mask, others[1]]
    kept = {k: v for k in _KEPT if (v := node.attr(k)) is not None}
    made.append(ed.new_node("MultiHeadAttention", inputs, [node.output], node.name, **kept))
    made[-1].domain = RUNTIME
    drop_absent(made[-1].input)
    return made


def _masks_keys(ed: Editor, mask: str) -> bool:
    """Whether a mask, if any, tells of each key, or counts them: both operators read it so."""
    counted = ed.maker(mask, f"{RUNTIME}::EmbedLayerNormalization") is not None
    return not mask or counted or ed.rank(mask) == 2


def _fused_matmul(ed: Editor, node: Node) -> Made | None:
    if node.attr("transBatchA", 0) or node.attr("transBatchB", 0):
        return None
    made: Made = []
    factors = []
    turns = node.attr("transA", 0), node.attr("transB", 0)
    ranks = [ed.rank(name) or 0 for name in node.inputs]
    if any(turns) and min(ranks) < 2:  # by a vector, the kernel multiplies what it has not turned
        return None
    for slot, (turned, rank) in enumerate(zip(turns, ranks, strict=True)):
        name = node.input(slot)
        if turned:
            perm = [*range(rank - 2), rank - 1, rank - 2]
            name = ed.fresh(f"{name}_turned")
            own = ed.fresh(f"{node.name}_turn")
            made.append(ed.new_node("Transpose", [node.input(slot)], [name], own, perm=perm))
        factors.append(name)
    alpha = np.asarray(node.attr("alpha", 1.0), np.float32)
    y = node.output if alpha == 1 else ed.fresh(f"{node.output}_unscaled")
    made.append(ed.new_node("MatMul", factors, [y], node.name))
    if alpha != 1:
        inputs = [y, ed.add_constant(f"{node.name}_alpha", alpha)]
        made.append(ed.new_node("Mul", inputs, [node.output], ed.fresh(f"{node.name}_scale")))
    return made


_BY_THEMSELVES: Mapping[str, Rule] = {
    "FusedConv": _fused_linear,
    "FusedGemm": _fused_linear,
    "BiasGelu": _gelu,
    "FastGelu": _gelu,
    "Gelu": _gelu,
    "QuickGelu": _quick_gelu,
    "SkipLayerNormalization": _skip_norm,
    "SkipSimplifiedLayerNormalization": _skip_norm,
    "Attention": _attention,
    "EmbedLayerNormalization": _embedding,  # behind Attention, which looks for it
}
