"""The nodes of a graph as what placement decides about: units, and what each can do."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx

from qdq.graph import SIZES, Graph, attributes
from qdq.nested import captured_names
from qdq.ops import MASK, demand_of
from qdq.ops.clamp import bounds
from qdq.ops.demand import Demand, NodeView, SameAs
from qdq.placement.wholes import inside_whole
from qdq.targets import Target
from qdq.views import node_view

__all__ = ["Unit", "units_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A node and, where there is one, the clamp that it absorbs.

    Attributes:
        view: the node.
        demand: what it asks for on integers; None if it cannot.
        reason: why it cannot (empty if it can).
        clamp: name of the absorbed Relu or Clip, or None.
        limits: its bounds.
        outputs: the tensors that leave the unit.
        reads: non-constant float tensors that the demand wants as codes.
        others: further float tensors that it reads as float on either side.
    """

    view: NodeView
    demand: Demand | None
    reason: str
    clamp: str | None
    limits: tuple[float, float] | None
    outputs: tuple[str, ...]
    reads: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def table(self) -> str:
        """The constant whose rows it picks as codes; empty for all other nodes."""
        slot = self.demand.table if self.demand is not None else None
        return "" if slot is None else self.view.inputs[slot].name

    @property
    def apart(self) -> bool:
        """Whether it is integer between float tensors, and rounds by itself."""
        return self.demand is not None and self.demand.apart

    @property
    def rounds(self) -> tuple[str, ...]:
        """The constant that stands for what a unit apart rounds: a first weight, or a table."""
        return (self.table,) if self.table else self.dynamic[:1]

    @property
    def dynamic(self) -> tuple[str, ...]:
        """The weights, where its kernel rounds its activations by itself; else none."""
        slots = self.demand.dynamic if self.demand is not None else ()
        return tuple(self.view.inputs[slot].name for slot in slots)


def units_of(graph: Graph, target: Target, pinned: Mapping[str, str]) -> tuple[Unit, ...]:
    """Every node of the graph as a unit; ``pinned``: node name → why it has to stay float."""
    found: list[Unit] = []
    absorbed: set[int] = set()
    masked: set[str] = set()
    settled = set(graph.constants)
    sizes = _makes_sizes(graph)
    for index, node in enumerate(graph.nodes):
        if index in absorbed:
            continue
        view = node_view(graph, index)
        demand = demand_of(view)
        fixed = _is_settled(node, settled)  # of every node: it notes which are
        reason = (
            _reads_mask(view, demand, masked)
            or pinned.get(view.name)
            or (demand if isinstance(demand, str) else None)
            or fixed
            or inside_whole(graph, index)
            or sizes.get(index)
        )
        if reason is None and isinstance(demand, Demand):
            reason = target.refusal(view, demand)
        can = demand if reason is None and isinstance(demand, Demand) else None
        clamp = _clamp_behind(graph, node, can, pinned) if target.absorbs_clamps else None
        last = node if clamp is None else graph.nodes[clamp]
        if clamp is not None:
            absorbed.add(clamp)
        reads, others = _reads(view, can.activations if can is not None else ())
        found.append(
            Unit(
                view=view,
                demand=can,
                reason=reason or "",
                clamp=last.name if clamp is not None else None,
                limits=bounds(node_view(graph, clamp)) if clamp is not None else None,
                outputs=tuple(o for o in last.output if o),
                reads=reads,
                others=(*others, *sorted(captured_names(node))),
            )
        )
    return _with_whole_tables(graph, found)


def _is_settled(node: onnx.NodeProto, settled: set[str]) -> str | None:
    """Why a node that depends on no input of the graph stays float; adds to ``settled``.

    The runtime computes float nodes on constants once, when it loads the model, but integer
    kernels each time: a Q and a DQ stop its constant folding.
    """
    names = [i for i in node.input if i] + sorted(captured_names(node))
    if node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial"):
        return None
    if not settled.issuperset(names):
        return None
    settled.update(o for o in node.output if o)
    return "it depends on no input, so the runtime computes it once, when it loads the model"


def _with_whole_tables(graph: Graph, units: list[Unit]) -> tuple[Unit, ...]:
    """The units, of which those stay float whose table cannot be codes for all that read it.

    Codes beside a float table would make the file larger.
    """
    picking = {u.view.name for u in units if u.table}
    refused: dict[str, str] = {}
    for name in dict.fromkeys(u.table for u in units if u.table):
        picked = all(graph.nodes[use.node].name in picking for use in graph.uses(name))
        if name in graph.outputs or not picked:
            refused[name] = f"its table '{name}' is read as float elsewhere"
        elif np.isneginf(graph.floats(name).min()):  # the only one that ``load`` lets through
            refused[name] = f"its table '{name}' holds -inf, as masks do"
    return tuple(
        replace(u, demand=None, reason=refused[u.table]) if u.table in refused else u for u in units
    )


def _makes_sizes(graph: Graph) -> dict[int, str]:
    """Nodes of whose result only sizes are made → why they stay float: 2 must not become 1.99.

    Sizes are scales of a Resize, a Range's numbers, and integers that are made of floats. All are
    one number, or a few in a row; what has more axes is data.
    """
    found: dict[int, str] = {}
    for index in reversed(range(len(graph.nodes))):
        outputs = [o for o in graph.nodes[index].output if o]
        uses = [use for o in outputs for use in graph.uses(o)]
        ranks = [len(shape) if (shape := graph.shape(o)) is not None else 2 for o in outputs]
        if not uses or max(ranks) > 1 or not graph.outputs.isdisjoint(outputs):
            continue
        if all(u.node in found or _is_size(graph, u.node, u.slot) for u in uses):
            found[index] = "sizes of tensors are made of its result"
    return found


def _is_size(graph: Graph, index: int, slot: int) -> bool:
    node = graph.nodes[index]
    if node.op_type == "Cast":
        return attributes(node)["to"] in SIZES
    return node.op_type == "Range" or (node.op_type == "Resize" and slot > 0)


# operators whose result holds a mask's values where an input does
_CARRY_MASKS = frozenset({"Add", "Cast", "Clip", "Concat", "Div", "Expand", "Max", "Min", "Mul",
                          "Neg", "Sub", "Sum", "Tile", "Trilu", "Where"})  # fmt: skip


def _reads_mask(view: NodeView, demand: Demand | str, masked: set[str]) -> str | None:
    """Why a node that reads a masked tensor stays float; adds to ``masked`` what it passes on.

    A mask is a constant like -1e9 or -inf that is added to scores before a softmax. One scale for
    the mask and the scores would leave no code for the scores.
    """
    found = next((t for t in view.inputs if t.name in masked or not t.largest < MASK), None)
    if found is None:
        masked.update(view.outputs if _fills_with_mask(view) else ())
        return None
    moves = isinstance(demand, Demand) and isinstance(demand.output, SameAs)
    low, high = bounds(view) or (-np.inf, np.inf)
    if (moves or view.op_type in _CARRY_MASKS) and max(-low, high) >= MASK:
        masked.update(o for o in view.outputs if o)
    if found.name not in masked:
        return None  # the mask itself, a constant: demand_of says so
    return f"it reads '{found.name}', which holds the huge values of a mask"


def _fills_with_mask(view: NodeView) -> bool:
    """Whether a tensor is made of a mask's value, as a causal mask of any size begins."""
    value = view.attributes.get("value") if view.op_type == "ConstantOfShape" else None
    if not isinstance(value, onnx.TensorProto) or value.data_type != onnx.TensorProto.FLOAT:
        return False
    return bool(np.abs(onnx.numpy_helper.to_array(value)).max(initial=0) >= MASK)


def _clamp_behind(
    graph: Graph, node: onnx.NodeProto, demand: Demand | None, pinned: Mapping[str, str]
) -> int | None:
    """The Relu or Clip that does its work in the codes of a node with a range of its own."""
    if demand is None or demand.apart or isinstance(demand.output, SameAs):
        return None
    use = graph.only_use(node.output[0])
    if use is None or use.slot != 0:
        return None
    view = node_view(graph, use.node)
    limits = bounds(view)
    if limits is None or view.name in pinned or not limits[0] <= 0 <= limits[1]:
        return None
    return use.node


def _reads(view: NodeView, slots: tuple[int, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    reads: list[str] = []
    others: list[str] = []
    for slot, tensor in enumerate(view.inputs):
        if tensor.name and tensor.floating and not tensor.constant:
            (reads if slot in slots else others).append(tensor.name)
    return tuple(dict.fromkeys(reads)), tuple(dict.fromkeys(others))
