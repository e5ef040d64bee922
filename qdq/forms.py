"""Float nodes in the form that onnxruntime runs fastest; what they compute is the same."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qdq.facts import RUNTIME
from qdq.graph import Graph
from qdq.placement.wholes import PASSED, gate_of
from qdq.spelling import Step, steps_of
from qdq.views import node_view

__all__ = ["IDENTITY", "SUM", "Follower", "Forms", "Rewrite", "in_steps", "tuned"]

_UNMASKING = PASSED | {"Add"}  # on the way back from a Softmax to what masks its scores
_SOFT, _DEEP = -80.0, -130.0  # a mask between these leaves denormal probabilities


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrite:
    """What a float node is written as, which computes the same.

    Attributes:
        op_type, domain: the operator.
        slots: the inputs that it has, as slots of the node; None for all.
        attributes: those that it has besides the node's own.
    """

    op_type: str
    domain: str = ""
    slots: tuple[int, ...] | None = None
    attributes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Follower:
    """A node that is written behind another one.

    Attributes:
        op_type, alpha: the operator, and its attribute.
        before: what is appended to the name of the tensor between the two.
        label: what is appended to the name of the node in front.
    """

    op_type: str
    alpha: float
    before: str
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Forms:
    """How float nodes are written.

    Attributes:
        rewritten: node → the operator that it becomes.
        split: node → the steps that it becomes, of which the last one makes its result.
        merged: nodes that are part of one of those, and not written.
        followed: node → what is written behind it.
        floors: Softmax → the score that all lower ones are raised to.
    """

    rewritten: Mapping[str, Rewrite] = field(default_factory=dict)
    split: Mapping[str, tuple[Step, ...]] = field(default_factory=dict)
    merged: frozenset[str] = frozenset()
    followed: Mapping[str, Follower] = field(default_factory=dict)
    floors: Mapping[str, float] = field(default_factory=dict)


SUM = Rewrite(op_type="Sum")

IDENTITY = Follower(op_type="LeakyRelu", alpha=1.0, before="float", label="stays_float")
"""It changes nothing, is fused into a float kernel at no cost, and survives the runtime's
optimizer; so it hides from that what comes next."""

ZEROS = Follower(op_type="ThresholdedRelu", alpha=1e-20, before="all", label="cleaned")
"""Makes 0 of what is next to 0. Processors take a hundred times as long for denormal numbers, and
what is masked by -100 has a probability of some 1e-44. Beside others, which are 1 together,
anything below 1e-20 is less than a rounding."""


def in_steps(
    node: onnx.NodeProto, steps: Sequence[Step], fresh: Callable[[str], str]
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """A node as several, and the constants that these read; itself where there are no steps.

    Args:
        node: what the last step has the name and the output of.
        steps: in their order.
        fresh: makes a name that is free.
    """
    if not steps:
        return [node], []
    made, nodes, constants = [node.input[0]], list[onnx.NodeProto](), list[onnx.TensorProto]()

    def name_of(read: int | NDArray[Any]) -> str:
        if isinstance(read, int):
            return str(made[read])
        name = fresh(f"{label}_constant")
        constants.append(numpy_helper.from_array(read, name))
        return name

    for step in steps:
        label = fresh(f"{node.name}_{step.op_type}")
        inputs = [name_of(read) for read in step.reads]
        made.append(fresh(f"{label}_Output"))
        nodes.append(helper.make_node(step.op_type, inputs, made[-1:], label))
        attrs = step.attributes.items()
        nodes[-1].attribute.extend(helper.make_attribute(k, v) for k, v in attrs)
    nodes[-1].name, nodes[-1].output[0] = node.name, node.output[0]
    return nodes, constants


def tuned(
    graph: Graph, made: Container[str], integer: Container[str], floors: Mapping[str, float]
) -> Forms:
    """The forms of the float nodes of a model.

    Args:
        graph: the prepared model.
        made: tensors that an integer kernel hands out as codes.
        integer: names of the integer nodes.
        floors: Softmax → the score that all lower ones can be raised to; then no weight is next to
            0, and none has to be cleaned.
    """
    swishes = _swishes(graph, made, integer)
    return Forms(
        rewritten={
            **_residuals(graph, integer),
            **{closing: rewrite for closing, rewrite in swishes.values()},
        },
        split=_spelled_out(graph, integer),
        merged=frozenset(swishes),
        followed={
            node.name: ZEROS
            for index, node in enumerate(graph.nodes)
            if node.name not in integer
            and node.name not in floors
            and _denormal_softmax(graph, index)
        },
        floors={name: floor for name, floor in floors.items() if name not in integer},
    )


def _spelled_out(graph: Graph, integer: Container[str]) -> dict[str, tuple[Step, ...]]:
    """Float nodes → the steps that are faster."""

    def value(name: str) -> NDArray[Any] | None:
        return graph.array(name) if name in graph.constants else None

    found = {}
    for index, node in enumerate(graph.nodes):
        if node.name in integer or len(node.output) != 1:
            continue
        steps = steps_of(node_view(graph, index), graph.shape(node.output[0]), value)
        if steps:
            found[node.name] = steps
    return found


def _swishes(
    graph: Graph, made: Container[str], integer: Container[str]
) -> dict[str, tuple[str, Rewrite]]:
    """Float ``x * Sigmoid(x)`` behind an integer kernel: Sigmoid → the Mul, and what that becomes.

    The runtime makes one operator of the two by itself, but gives each reader of a DQ one of its
    own before; then they do not read the same tensor any more. As one node they are one reader.
    """
    found = {}
    for index, node in enumerate(graph.nodes):
        gate = gate_of(graph, index, "Sigmoid")
        if gate is None or node.name in integer:
            continue
        sigmoid = graph.nodes[gate]
        x = sigmoid.input[0]
        if x in made and sigmoid.name not in integer and graph.only_use(sigmoid.output[0]):
            found[sigmoid.name] = (node.name, _swish(list(node.input).index(x)))
    return found


def _swish(slot: int) -> Rewrite:
    """QuickGelu: ``x * Sigmoid(alpha * x)``."""
    return Rewrite(op_type="QuickGelu", domain=RUNTIME, slots=(slot,), attributes={"alpha": 1.0})


def _residuals(graph: Graph, integer: Container[str]) -> dict[str, Rewrite]:
    """Float sums in front of a LayerNormalization.

    onnxruntime fuses the two into SkipLayerNormalization, whose kernel adds one value after the
    other: it was measured to take three times as long as the two kernels. A Sum is not fused.
    """
    found = {}
    for node in graph.nodes:
        before = graph.maker(node.input[0]) if node.op_type == "LayerNormalization" else None
        if before is None or node.name in integer:
            continue
        if before.op_type == "Add" and before.name not in integer:
            found[before.name] = SUM
    return found


def _denormal_softmax(graph: Graph, index: int) -> bool:
    """Whether a node is a Softmax in front of a MatMul whose probabilities may be denormal.

    That is where a constant mask of some -100 is added to the scores: exp(-88) is the smallest
    normal number. What is masked by far more is 0 in onnxruntime.
    """
    node = graph.nodes[index]
    if node.op_type != "Softmax":
        return False
    if not any(graph.nodes[use.node].op_type == "MatMul" for use in graph.uses(node.output[0])):
        return False
    name = node.input[0]
    while (before := graph.maker(name)) is not None:
        constants = [n for n in before.input if n in graph.constants]
        open_ends = [n for n in before.input if n not in graph.constants]
        if before.op_type not in _UNMASKING or len(open_ends) != 1:
            return False
        if before.op_type == "Add" and _masks_softly(graph, constants[0]):
            return True
        name = open_ends[0]
    return False


def _masks_softly(graph: Graph, name: str) -> bool:
    if graph.elem_type(name) != TensorProto.FLOAT:
        return False
    values = graph.floats(name)
    return bool(((values > _DEEP) & (values < _SOFT)).any())
