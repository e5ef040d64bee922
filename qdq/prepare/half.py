"""float16 models become float32 models whose inputs and outputs stay float16.

onnxruntime's CPU provider has no integer kernels behind float16 scales, and it runs float16
operators in float32 between casts of its own. Every float16 value is a float32 value, so the
weights do not change; what changes is that results between nodes are no longer rounded to float16.
"""

from collections.abc import Sequence

import onnx
from onnx import numpy_helper

from qdq.errors import ModelError
from qdq.facts import DEFAULT
from qdq.nested import all_nodes, subgraphs
from qdq.prepare.editing import Editor, Node

__all__ = ["widen_float16"]

_HALF, _FLOAT = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
# what holds an element type in attributes of the default domain: Cast; RandomNormal, EyeLike,
# Bernoulli, SequenceEmpty, …; HannWindow, MelWeightMatrix, …; LayerNormalization; Attention
_TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_datatype", "stash_type", "softmax_precision"})
_16_BIT = frozenset(
    {_HALF, onnx.TensorProto.BFLOAT16, onnx.TensorProto.INT16, onnx.TensorProto.UINT16}
)


def widen_float16(ed: Editor) -> None:
    """Turn every float16 tensor but the graph's inputs and outputs into float32.

    float16 enters a graph through inputs, constants and attributes only; all other types follow.
    So initializers, tensors in attributes and element types in attributes are widened, in
    subgraphs too. A float16 input gets a Cast to float32 behind it, which all nodes but Casts
    read; a float16 output gets a Cast to float16 before it. Inputs that only Casts read and
    outputs that a Cast hands out are so already and stay. bfloat16 is left alone, and a graph
    without float16 does not change.

    Raises:
        ModelError: an input or output that is a float16 sequence, optional or sparse tensor, which
            no Cast converts; a BitCast that may read or make float16.
    """
    graph = ed.model.graph
    for value in (*graph.input, *graph.output):
        _want_tensor(value)
    outputs = [v.name for v in graph.output if _is_half(v)]
    borders = {m for o in outputs if (m := _border(ed, o)) is not None}
    # not any(...) of a generator: every one of them has to be widened
    widened = [_widen_node(n.proto) for n in ed.nodes() if n not in borders]
    widened += [_widen_tensor(t) for n, t in ed.constants.items() if n not in ed.outputs]
    widened += [_widen_type(v.type) for v in graph.value_info]
    inputs = [v.name for v in graph.input if _is_half(v)]
    if any(widened) or inputs or outputs:
        _refuse_bit_casts([node.proto for node in ed.nodes()])
    for name in inputs:
        _cast_input(ed, name)
    for name in outputs:
        _cast_output(ed, name)


# Borders


def _is_half(value: onnx.ValueInfoProto) -> bool:
    return bool(value.type.tensor_type.elem_type == _HALF)


def _want_tensor(value: onnx.ValueInfoProto) -> None:
    kind = value.type.WhichOneof("value")
    own = onnx.TypeProto()
    own.CopyFrom(value.type)
    if kind != "tensor_type" and _widen_type(own):
        raise ModelError(
            f"'{value.name}' is an input or output of the model and a float16 "
            f"{str(kind).removesuffix('_type')}; of float16 only tensors are supported there. "
            "Export the model in float32, or with tensors as its inputs and outputs",
            tensor=value.name,
        )


def _border(ed: Editor, output: str) -> Node | None:
    """The Cast to float16 that makes a graph output which nothing else reads."""
    maker = ed.maker(output, "Cast")
    done = maker is not None and maker.attr("to") == _HALF and not ed.users(output)
    return maker if done else None


def _cast_input(ed: Editor, name: str) -> None:
    """Let every node but Casts read the input through a Cast to float32."""
    users = [n for n in ed.users(name) if n.op != "Cast"]
    if not users:
        return
    wide = ed.fresh(f"{name}_float32")
    for user in users:
        _read_instead(ed, user, name, wide)
    cast = ed.new_node("Cast", [name], [wide], ed.fresh(f"{name}_to_float32"), to=_FLOAT)
    ed.add_before(ed.users(wide)[0], cast)


def _cast_output(ed: Editor, name: str) -> None:
    """Let a Cast to float16 make the output, and every node read what comes before that."""
    if _border(ed, name) is not None:
        return
    maker, users = ed.maker(name), ed.users(name)
    if maker is None:
        # a constant that is handed out keeps its type; an input is handed out as it came
        value = ed.array(name)
        if value is not None and users:
            wide = ed.add_constant(f"{name}_float32", value.astype("float32"))
            for user in users:
                _read_instead(ed, user, name, wide)
        return
    wide = ed.fresh(f"{name}_float32")
    for user in users:
        _read_instead(ed, user, name, wide)
    made = maker.copied()
    made.output[list(made.output).index(name)] = wide
    cast = ed.new_node("Cast", [wide], [name], ed.fresh(f"{name}_to_float16"), to=_HALF)
    ed.replace([maker], [made, cast])
    _note_type(ed, name, wide)


def _note_type(ed: Editor, output: str, wide: str) -> None:
    """Shape inference knows the results of operators of other domains from here only."""
    (value,) = [v for v in ed.model.graph.output if v.name == output]
    note = ed.model.graph.value_info.add(name=wide)
    note.type.CopyFrom(value.type)
    _widen_type(note.type)


def _read_instead(ed: Editor, user: Node, old: str, new: str) -> None:
    """Let a node read ``new`` for ``old``, in its subgraphs too."""
    for slot, name in enumerate(user.inputs):
        if name == old:
            ed.set_input(user, slot, new)
    if old in user.captures:
        proto = user.copied()
        _capture_instead(proto, old, new)
        ed.replace([user], [proto])


def _capture_instead(node: onnx.NodeProto, old: str, new: str) -> None:
    for g in subgraphs(node):
        own = {v.name for v in g.input} | {t.name for t in g.initializer}
        own |= {o for n in g.node for o in n.output}
        if old in own:
            continue
        for n in g.node:
            for slot, name in enumerate(n.input):
                n.input[slot] = new if name == old else name
            _capture_instead(n, old, new)


# Types; each of these says whether there was any float16


def _widen_tensor(tensor: onnx.TensorProto) -> bool:
    if tensor.data_type != _HALF:
        return False
    value = numpy_helper.to_array(tensor).astype("float32")
    tensor.ClearField("int32_data")
    tensor.data_type = _FLOAT
    tensor.raw_data = numpy_helper.from_array(value).raw_data
    return True


def _widen_type(kind: onnx.TypeProto) -> bool:
    """Widen the element type of a tensor, sequence, optional, map or sparse tensor."""
    which = kind.WhichOneof("value")
    if which in ("tensor_type", "sparse_tensor_type"):
        tensor = getattr(kind, which)
        if tensor.elem_type != _HALF:
            return False
        tensor.elem_type = _FLOAT
        return True
    if which in ("sequence_type", "optional_type"):
        return _widen_type(getattr(kind, which).elem_type)
    return which == "map_type" and _widen_type(kind.map_type.value_type)


def _widen_node(node: onnx.NodeProto) -> bool:
    default = node.domain in DEFAULT and node.op_type != "BitCast"
    widened = []
    for a in node.attribute:
        widened += [_widen_tensor(t) for t in (a.t, *a.tensors)]
        widened += [_widen_type(t) for t in (a.tp, *a.type_protos)]
        if default and a.name in _TYPE_ATTRIBUTES and a.i == _HALF:
            a.i = _FLOAT
            widened.append(True)
    return any([*widened, *[_widen_graph(g) for g in subgraphs(node)]])


def _widen_graph(graph: onnx.GraphProto) -> bool:
    """Widen all of a subgraph."""
    widened = [_widen_tensor(t) for t in graph.initializer]
    widened += [_widen_type(v.type) for v in (*graph.input, *graph.output, *graph.value_info)]
    return any([*widened, *[_widen_node(n) for n in graph.node]])


def _refuse_bit_casts(nodes: Sequence[onnx.NodeProto]) -> None:
    for node in all_nodes(nodes):
        if node.op_type == "BitCast" and any(
            a.name == "to" and a.i in _16_BIT for a in node.attribute
        ):
            raise ModelError(
                f"node '{node.name}' is a BitCast between 16-bit types in a model with float16; "
                "the bits of a float16 number are lost where the model becomes float32. Export the "
                "model in float32",
                node=node.name,
            )
