"""Groups of tensors whose channels can be multiplied by factors without changing the model.

Tensors that are tied by positively homogeneous operators (Relu, pooling, sums, gates) need the same
factors. A group can have factors if all that makes its tensors are linear nodes with constants of
their own, which take the factors, and all that reads them are linear nodes too, which take the
inverse.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx

from qdq.balancing.dividing import Scaled
from qdq.facts import DEFAULT
from qdq.graph import Graph, attributes
from qdq.nested import captured_names
from qdq.plan import Plan
from qdq.problem import Observed

__all__ = ["AXIS", "Group", "Reader", "channel_groups"]

AXIS = 1  # the channel axis of all tensors of a group
_SAME = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity", "LeakyRelu",
                   "MaxPool", "PRelu", "Relu", "Resize"})  # fmt: skip
_TOGETHER = frozenset({"Add", "Max", "Min", "Sub", "Sum"})
_GATES = frozenset({"HardSigmoid", "Sigmoid"})


@dataclass(frozen=True, slots=True)
class Reader:
    """A linear node that reads a tensor of the group.

    Attributes:
        tensor: what it reads.
        node: its name.
        weight: its weight, and the axis of the channels that it reads.
        outputs: the axis of the weight that runs over the outputs; None if each channel has one
            output, its own.
    """

    tensor: str
    node: str
    weight: Scaled
    outputs: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Tensors with the same factors.

    Attributes:
        tensors: all of them, in graph order.
        makers: constants that are multiplied by the factors.
        readers: nodes whose weights are divided by them.
        rounded: those of the tensors that are rounded by themselves.
    """

    tensors: tuple[str, ...]
    makers: tuple[Scaled, ...]
    readers: tuple[Reader, ...]
    rounded: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Linear:
    """The constants of a linear node, with their axes."""

    weight: str
    reads: int
    makes: int
    bias: str | None


@dataclass
class _Ties:
    """Sets of tied tensors (union-find with path halving), and which of them can have no factor."""

    parent: dict[str, str] = field(default_factory=dict)
    fixed: set[str] = field(default_factory=set)

    def root(self, name: str) -> str:
        up = self.parent.setdefault(name, name)
        while up != self.parent[up]:
            self.parent[up] = self.parent[self.parent[up]]
            up = self.parent[up]
        return up

    def tie(self, names: list[str]) -> None:
        for name in names[1:]:
            self.parent[self.root(name)] = self.root(names[0])


def channel_groups(model: onnx.ModelProto, plan: Plan) -> tuple[Group, ...]:
    """The groups in which a tensor is rounded and a linear node reads it on integers.

    Args:
        model: the prepared model that the plan was made for.
        plan: the plan.

    Returns:
        The groups, in graph order. None of their tensors is an input or output of the graph, is
        captured by a subgraph or ruled by the user; none of their constants has another reader.
    """
    graph, ties = Graph(model), _Ties()
    linears = _linears(graph, plan)
    for index, node in enumerate(graph.nodes):
        if index in linears:
            ties.root(node.input[0])
            ties.root(node.output[0])
            continue
        tied = _tied(graph, index)
        ties.tie(tied)
        ties.fixed.update(n for n in (*node.input, *node.output) if n not in tied)
        ties.fixed.update(captured_names(node))
    ties.fixed.update((*graph.outputs, *plan.ruled))
    ties.fixed.update(name for name in ties.parent if name not in graph.producer)
    fixed = {ties.root(name) for name in ties.fixed if name in ties.parent}
    sets: dict[str, list[str]] = {}
    for name in list(ties.parent):
        root = ties.root(name)
        if root not in fixed:
            sets.setdefault(root, []).append(name)
    integer = {n.node for n in plan.linears}
    found = (_group(graph, tensors, linears, plan) for tensors in sets.values())
    return tuple(
        g for g in found if g.makers and g.rounded and any(r.node in integer for r in g.readers)
    )


def _group(graph: Graph, tensors: list[str], linears: Mapping[int, _Linear], plan: Plan) -> Group:
    makers: list[Scaled] = []
    readers: list[Reader] = []
    for name in tensors:
        made = linears.get(graph.producer[name])
        if made is not None:
            makers.append(Scaled(made.weight, made.makes))
            makers.extend(() if made.bias is None else (Scaled(made.bias, 0),))
        for use in graph.uses(name):
            read = linears.get(use.node)
            if read is not None:
                outputs = None if read.reads == read.makes else read.makes
                weight = Scaled(read.weight, read.reads)
                readers.append(Reader(name, graph.nodes[use.node].name, weight, outputs))
    planned = (plan.tensors[name] for name in tensors if name in plan.tensors)
    return Group(
        tensors=tuple(tensors),
        makers=tuple(makers),
        readers=tuple(readers),
        rounded=tuple(t.name for t in planned if isinstance(t.source, Observed)),
    )


def _linears(graph: Graph, plan: Plan) -> dict[int, _Linear]:
    """Index of a linear node with constants of its own → these."""
    found = {}
    for index, node in enumerate(graph.nodes):
        axes = _axes(graph, node)
        if axes is None or len(node.output) != 1:
            continue
        bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
        own = [node.input[1], *(() if bias is None else (bias,))]
        if any(c in plan.ruled or not _is_own(graph, c) for c in own):
            continue
        if bias is not None and len(graph.constants[bias].dims) != 1:
            continue
        found[index] = _Linear(weight=node.input[1], reads=axes[0], makes=axes[1], bias=bias)
    return found


def _is_own(graph: Graph, name: str) -> bool:
    """Whether a tensor is a float32 constant that one node alone reads."""
    known = name in graph.constants and graph.only_use(name) is not None
    return known and graph.elem_type(name) == onnx.TensorProto.FLOAT


def _axes(graph: Graph, node: onnx.NodeProto) -> tuple[int, int] | None:
    """Axes of a linear node's weight: input channels, output channels; None for other nodes.

    Both are the same where each channel has one output of its own.
    """
    if node.domain not in DEFAULT or len(node.input) < 2:
        return None
    shape, values = graph.shape(node.input[1]) or (), attributes(node)
    if node.op_type == "Gemm" and len(shape) == 2 and not values.get("transA", 0):
        return (1, 0) if values.get("transB", 0) else (0, 1)
    if node.op_type not in ("Conv", "ConvTranspose") or len(shape) < 3:
        return None
    groups = values.get("group", 1)
    if groups == 1:
        return (1, 0) if node.op_type == "Conv" else (0, 1)
    return (0, 0) if shape[1] == 1 and groups == shape[0] else None


def _tied(graph: Graph, index: int) -> list[str]:
    """Inputs and output of a node that want the same factors; empty if it allows none."""
    node = graph.nodes[index]
    if node.domain not in DEFAULT or len(node.output) != 1:
        return []
    tied: list[str] = []
    if node.op_type in _SAME and not _crops(node):
        tied = [node.input[0], node.output[0]]
    elif node.op_type in _TOGETHER:
        tied = [*node.input, node.output[0]]
    elif node.op_type == "Mul":
        gated = _gated(graph, node)
        tied = [gated, node.output[0]] if gated is not None else []
    shapes = [graph.shape(name) for name in tied]
    channels = {(len(s), s[AXIS]) if s is not None and len(s) > AXIS else None for s in shapes}
    if len(channels) != 1:
        return []
    alike = channels.pop()
    return tied if alike is not None and alike[1] is not None else []


def _crops(node: onnx.NodeProto) -> bool:
    """Whether a Resize takes a region, with a value of its own for what is outside of the data."""
    if node.op_type != "Resize":
        return False
    return attributes(node).get("coordinate_transformation_mode") == b"tf_crop_and_resize"


def _gated(graph: Graph, node: onnx.NodeProto) -> str | None:
    """The x of ``x * gate``, where the gate is a constant, or a Sigmoid of what has no factor."""
    for gate, x in (tuple(node.input), tuple(node.input)[::-1]):
        maker = graph.maker(gate)
        if gate in graph.constants or (maker is not None and maker.op_type in _GATES):
            return str(x)
    return None
