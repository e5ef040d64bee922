"""Which nodes run on integers: a minimum cut over the graph.

Each unit (a node, with the Relu or Clip behind it) is on the integer or the float side. A side
costs the unit its kernel time there; a float tensor that an integer unit reads costs one
QuantizeLinear, an integer tensor that anything float reads costs one DequantizeLinear. All costs
are non-negative, so the cheapest placement is a minimum cut (Greig, Porteous and Seheult 1989),
found exactly. A unit that cannot or may not run on integers is tied to the float side.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from qdq.graph import Graph, captured_names
from qdq.ops import MASK, demand_of
from qdq.ops.clamp import bounds
from qdq.ops.demand import Demand, NodeView, SameAs
from qdq.placement.mincut import INFINITE, Network
from qdq.placement.weighing import Weighing, features_of, kind_of
from qdq.placement.wholes import gate_of, inside_whole
from qdq.targets import Target
from qdq.views import node_view

__all__ = ["Placement", "Unit", "place", "units_of"]

FLOAT_PAYS = "float is faster here: its integer kernel saves less than the Q and DQ around it cost"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The result.

    Attributes:
        units: all units, in graph order.
        integer: node names of the integer ones.
        left_float: node name → why it stays float.
        time: what nodes and borders take, in ns, as far as the cost table knows; 0 for a target
            that does not weigh costs.
        float_time: the same with every unit float.
    """

    units: tuple[Unit, ...]
    integer: frozenset[str]
    left_float: Mapping[str, str] = field(default_factory=dict)
    time: int = 0
    float_time: int = 0


def units_of(graph: Graph, target: Target, pinned: Mapping[str, str]) -> tuple[Unit, ...]:
    """Every node of the graph as a unit; ``pinned``: node name → why it has to stay float."""
    found: list[Unit] = []
    absorbed: set[int] = set()
    masked: set[str] = set()
    for index, node in enumerate(graph.nodes):
        if index in absorbed:
            continue
        view = node_view(graph, index)
        demand = demand_of(view)
        reason = pinned.get(view.name) or (demand if isinstance(demand, str) else None)
        reason = _reads_mask(view, demand, masked) or reason
        reason = reason or inside_whole(graph, index)
        if reason is None and isinstance(demand, Demand):
            reason = target.refusal(view, demand)
        can = demand if reason is None and isinstance(demand, Demand) else None
        clamp = None
        if can is not None and target.absorbs_clamps and not isinstance(can.output, SameAs):
            clamp = _clamp_behind(graph, node.output[0], pinned)
        if clamp is not None:
            absorbed.add(clamp)
        outputs = tuple(graph.nodes[clamp].output if clamp is not None else node.output)
        slots = can.activations if can is not None else ()
        reads, others = _reads(view, slots)
        others = (*others, *sorted(captured_names(node)))
        found.append(
            Unit(
                view=view,
                demand=can,
                reason=reason or "",
                clamp=graph.nodes[clamp].name if clamp is not None else None,
                limits=bounds(node_view(graph, clamp)) if clamp is not None else None,
                outputs=tuple(o for o in outputs if o),
                reads=reads,
                others=others,
            )
        )
    return tuple(found)


# operators whose result holds a mask's values where an input does
_CARRY_MASKS = frozenset({"Add", "Cast", "Concat", "Div", "Max", "Min", "Mul", "Neg", "Sub",
                          "Sum", "Where"})  # fmt: skip


def _reads_mask(view: NodeView, demand: Demand | str, masked: set[str]) -> str | None:
    """Why a node that reads a masked tensor stays float; adds to ``masked`` what it passes on.

    A mask is a constant like -1e9 or -inf that is added to scores before a softmax. One scale for
    the mask and the scores would leave no code for the scores.
    """
    found = next((t for t in view.inputs if t.name in masked or not t.largest < MASK), None)
    if found is None:
        return None
    moves = isinstance(demand, Demand) and isinstance(demand.output, SameAs)
    if moves or view.op_type in _CARRY_MASKS:
        masked.update(o for o in view.outputs if o)
    if found.name not in masked:
        return None  # the mask itself, a constant: demand_of says so
    return f"it reads '{found.name}', which holds the huge values of a mask"


def _clamp_behind(graph: Graph, tensor: str, pinned: Mapping[str, str]) -> int | None:
    use = graph.only_use(tensor)
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


def place(
    graph: Graph, target: Target, units: tuple[Unit, ...], sizes: Graph, weighing: Weighing
) -> Placement:
    """Decide for every unit.

    Args:
        graph: the prepared model.
        target: what can run on integers.
        units: of the model, from ``units_of``.
        sizes: an index whose shapes are all numbers (nominal ones).
        weighing: prices of kernels and borders.
    """
    if not target.weighs_costs:
        chosen, times = frozenset(u.view.name for u in units if u.demand is not None), (0, 0)
    else:
        chosen, times = _cut(graph, target, units, sizes, weighing)
    reasons = {u.view.name: u.reason or FLOAT_PAYS for u in units if u.view.name not in chosen}
    time, float_time = times
    return Placement(
        units=units, integer=chosen, left_float=reasons, time=time, float_time=float_time
    )


def _cut(
    graph: Graph, target: Target, units: tuple[Unit, ...], sizes: Graph, weighing: Weighing
) -> tuple[frozenset[str], tuple[int, int]]:
    """The integer side of the minimum cut (source = integer, sink = float).

    Returns:
        The names, and two times: that of this cut, and that of the float model.
    """
    source, sink, first = 0, 1, 2
    net = Network(first + len(units))
    producer = {o: first + k for k, u in enumerate(units) for o in u.outputs}
    gates = _swishes(graph, producer)
    readers: dict[str, list[int]] = {}
    for k, unit in enumerate(units):
        vertex = first + k
        for name in (*unit.reads, *unit.others):
            readers.setdefault(name, []).append(vertex if name in unit.reads else sink)
        if unit.demand is None:
            net.edge(vertex, sink, INFINITE)
            continue
        kind = kind_of(unit.view, sizes.shape, silu=vertex in gates)
        features = features_of(unit.view, unit.outputs, sizes.shape)
        time = weighing.time(kind, features)
        net.edge(vertex, sink, time)
        price = weighing.integer(unit.view.name, kind, features, unit.demand)
        net.edge(vertex, sink, price - time, due=True)
        net.edge(source, vertex, weighing.float(kind, features))
        if isinstance(unit.demand.output, SameAs) and unit.reads:
            maker = producer.get(unit.reads[0], sink)
            net.edge(vertex, maker, weighing.stranded(kind, features))
    for closing, gate in gates.items():
        net.edge(closing, gate, INFINITE, back=INFINITE)  # a swish is integer or float as a whole
    for name in graph.outputs:
        readers.setdefault(name, []).append(sink)
    convolved = {t.name for u in units if u.view.op_type == "Conv" for t in u.view.inputs[:1]}
    for name, vertices in readers.items():
        maker = producer.get(name, sink)
        made_by = units[maker - first].view.op_type if maker >= first else ""
        kernel = target.kernel(made_by)
        shape = sizes.shape(name)
        free = kernel is not None and kernel.float_output
        out = 0 if free else weighing.dequantize(shape, before_conv=name in convolved)
        into = weighing.quantize(shape, behind_conv=made_by == "Conv")
        _border(net, maker, vertices, (into, out), sink)
    _harm(net, target, units, first, weighing)
    side = net.source_side(source, sink)
    chosen = frozenset(u.view.name for k, u in enumerate(units) if first + k in side)
    return chosen, (net.capacity(side), net.capacity({source}))


def _harm(
    net: Network, target: Target, units: tuple[Unit, ...], first: int, weighing: Weighing
) -> None:
    """Charge each tensor for its rounding, once, if its maker or any of its readers is integer.

    A vertex for each tensor is on the integer side as soon as one of these is. What a movement
    node hands out is rounded already if its input is.
    """
    sink, rounded = 1, {name: net.vertex() for name in weighing.harm}
    moved: dict[str, int] = {}
    for k, unit in enumerate(units):
        if unit.demand is None:
            continue
        if isinstance(unit.demand.output, SameAs):
            source = unit.view.inputs[unit.demand.output.slot].name
            moved |= dict.fromkeys(unit.outputs, rounded.get(source, sink))
        kernel = target.kernel(unit.view.op_type)
        free = kernel is not None and kernel.float_output
        for name in (*unit.reads, *(() if free else unit.outputs)):
            if name in rounded:
                net.edge(first + k, rounded[name], INFINITE)
    for name, vertex in rounded.items():
        net.edge(vertex, moved.get(name, sink), weighing.harmful(name), due=True)


def _swishes(graph: Graph, producer: Mapping[str, int]) -> dict[int, int]:
    """Vertex of the Mul → vertex of the Sigmoid, for each x * Sigmoid(x)."""
    found = {}
    for index, node in enumerate(graph.nodes):
        gate = gate_of(graph, index, "Sigmoid")
        pair = [producer.get(graph.nodes[i].output[0]) for i in (index, gate) if i is not None]
        if len(pair) == 2 and pair[0] is not None and pair[1] is not None and node.output:
            found[pair[0]] = pair[1]
    return found


def _border(
    net: Network, maker: int, readers: list[int], prices: tuple[int, int], sink: int
) -> None:
    quantize, dequantize = prices
    # one Q, however many integer readers: an extra vertex that is integer as soon as one is
    shared = net.vertex()
    net.edge(shared, maker, quantize)
    for reader in readers:
        if reader != sink:
            net.edge(reader, shared, INFINITE)
    if maker == sink:
        return
    # one DQ, however many float readers: an extra vertex that is float as soon as one is
    shared = net.vertex()
    net.edge(maker, shared, dequantize)
    for reader in readers:
        net.edge(shared, reader, INFINITE)
