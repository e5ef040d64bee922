"""The canonical float graph: special cases die here, so that later stages know one shape."""

from collections.abc import Callable, Container

import onnx

from qdq.light import tensor_bytes, without_large
from qdq.nested import sort_nodes
from qdq.prepare.before_views import arithmetic_before_views
from qdq.prepare.bias import spell_out_bias
from qdq.prepare.clamps import clamps_before_transposes, whole_clamps
from qdq.prepare.cleanup import drop_absent_slots, drop_idle_nodes
from qdq.prepare.constants import constant_nodes, fold_constants
from qdq.prepare.editing import Editor
from qdq.prepare.einsum import einsum_batches, einsum_products
from qdq.prepare.fused import take_apart
from qdq.prepare.gelu import gelus
from qdq.prepare.gemm import plain_gemms
from qdq.prepare.groupnorm import group_norms
from qdq.prepare.half import widen_float16
from qdq.prepare.hard import hard_activations, split_swishes
from qdq.prepare.layernorm import layer_norms
from qdq.prepare.linear import fold_affine
from qdq.prepare.linear_input import fold_affine_before
from qdq.prepare.matmul import matmul_units
from qdq.prepare.mish import mishes
from qdq.prepare.naming import name_nodes, split_roles
from qdq.prepare.opset import infer_types, open_dimensions, plain_constants, raise_opset
from qdq.prepare.padding import fold_pads, whole_pads
from qdq.prepare.pixels import pixels_first
from qdq.prepare.prelu import spell_out_prelu
from qdq.prepare.reshapes import cancel_squeezes, merge_reshapes, whole_softmax
from qdq.prepare.resize import whole_resize
from qdq.prepare.rows import in_rows
from qdq.prepare.scores import scale_queries
from qdq.prepare.shifts import affine_behind_transposes, affine_in_blocks, affine_in_one
from qdq.prepare.shuffle import channel_shuffles
from qdq.prepare.softmax import split_softmax
from qdq.prepare.sparse import dense_constants
from qdq.prepare.sums import plain_sums
from qdq.prepare.tiny import drop_tiny_weights

__all__ = ["PASSES", "prepare"]

Pass = Callable[[Editor], None]

_LARGE = 1 << 16  # bytes

PASSES: tuple[Pass, ...] = (
    name_nodes,
    drop_absent_slots,
    widen_float16,
    constant_nodes,
    drop_idle_nodes,
    fold_constants,
    take_apart,
    drop_idle_nodes,
    plain_sums,
    whole_softmax,
    split_softmax,
    channel_shuffles,
    whole_resize,
    whole_pads,
    split_swishes,
    whole_clamps,
    hard_activations,
    gelus,
    mishes,
    spell_out_prelu,
    layer_norms,
    group_norms,
    einsum_products,
    einsum_batches,
    arithmetic_before_views,
    plain_gemms,
    scale_queries,
    matmul_units,
    arithmetic_before_views,
    fold_affine,
    clamps_before_transposes,
    affine_behind_transposes,
    fold_pads,
    fold_affine_before,
    affine_in_blocks,
    affine_in_one,
    in_rows,
    pixels_first,
    merge_reshapes,
    cancel_squeezes,
    spell_out_bias,
    split_roles,
    drop_tiny_weights,
)


def prepare(model: onnx.ModelProto, *, without: Container[Pass] = ()) -> onnx.ModelProto:
    """The model in canonical form, for planning, calibration and quantization.

    The float output does not change beyond rounding, and preparing twice is preparing once.
    Initializers that are also graph inputs are constants from here on. The result has opset 21
    or above where the converter can, every node has a name, tensors have their inferred shapes
    in ``value_info``.

    Args:
        model: a float model as from ``load``; not changed.
        without: passes to leave out.

    Returns:
        A new model.

    Raises:
        ModelError: if no opset from 13 up can be reached, or shapes contradict each other.
    """
    own, large = _without_data(model)
    sort_nodes(own.graph)
    dense_constants(own)
    open_dimensions(own)
    plain_constants(own)
    raise_opset(own)
    ed = Editor(own, large)
    for step in PASSES:
        if step not in without:
            step(ed)
    ed.finish()
    ed.fill()
    _note_types(own)
    return own


def _without_data(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, onnx.TensorProto]]:
    """A copy whose large weights lack their data, and these weights as the model has them.

    Only float32: others may be widened in place.
    """
    own = without_large(model, -1, as_inputs=False)
    large: dict[str, onnx.TensorProto] = {}
    for t in model.graph.initializer:
        mine = own.graph.initializer.add()
        if t.data_type == onnx.TensorProto.FLOAT and tensor_bytes(t) > _LARGE:
            mine.name, mine.data_type = t.name, t.data_type
            mine.dims.extend(t.dims)
            large[t.name] = t
        else:
            mine.CopyFrom(t)
    return own, large


def _note_types(model: onnx.ModelProto) -> None:
    """Write the inferred types to value_info, in node order, and to outputs that have none."""
    types = infer_types(model)
    graph = model.graph
    for v in graph.output:
        untyped = v.type.WhichOneof("value") in (None, "tensor_type")
        if untyped and v.name in types and not v.type.tensor_type.HasField("shape"):
            v.type.CopyFrom(types[v.name])
    done = {v.name for v in graph.output}
    del graph.value_info[:]
    for n in graph.node:
        for o in n.output:
            if o in types and o not in done:
                graph.value_info.add(name=o).type.CopyFrom(types[o])
