"""The network whose minimum cut is the placement: what each side and each border costs.

The source is the integer side, the sink the float side, units are vertices (see ``place``).
"""

from collections.abc import Container, Mapping

from qdq.graph import Graph
from qdq.light import tensor_bytes, weight_bytes
from qdq.ops.demand import SameAs
from qdq.placement.borders import FIRST, SINK, SOURCE, charge_borders, charge_reorders
from qdq.placement.layout import layouts_of
from qdq.placement.mincut import INFINITE, Network
from qdq.placement.units import Unit
from qdq.placement.weighing import Weighing, features_of, kind_of
from qdq.placement.wholes import gate_of
from qdq.tables import bytes_saved
from qdq.targets import Target
from qdq.twins import turned_twins

__all__ = ["FIRST", "SINK", "SOURCE", "harm_edges", "plain_network"]

_SMALLER = 0.05  # of the float model's time: what it would be worth if its file took no bytes
_FUSED = frozenset({"HardSigmoid", "LeakyRelu", "Sigmoid"})


def plain_network(
    graph: Graph, target: Target, units: tuple[Unit, ...], sizes: Graph, weighing: Weighing
) -> Network:
    """The network without prices on harm."""
    net = Network(FIRST + len(units))
    producer = _makers(units)
    gates = _swishes(graph, producer)
    fused = _fused(graph, units, producer, sizes, weighing)
    fused |= _turned(graph, units, sizes, weighing)
    _never_integer(net, units, fused, sizes, weighing)
    for vertex, unit in enumerate(units, FIRST):
        if unit.demand is None:
            net.edge(vertex, SINK, INFINITE)
            continue
        kind = kind_of(
            unit.view, sizes.shape, silu=vertex in gates, signed_right=target.signed_right
        )
        features = features_of(unit.view, unit.outputs, sizes.shape)
        time = weighing.time(kind, features)
        net.edge(vertex, SINK, time)
        price = weighing.integer(kind, features, unit.demand)
        net.edge(vertex, SINK, price - time, due=True)
        _, saved = fused.get(vertex, (SINK, 0))
        net.edge(SOURCE, vertex, max(0, weighing.float(kind, features) - saved))
        if isinstance(unit.demand.output, SameAs) and unit.reads:
            maker = producer.get(unit.reads[0], SINK)
            net.edge(vertex, maker, weighing.stranded(kind, features))
    for closing, gate in gates.items():
        net.edge(closing, gate, INFINITE, back=INFINITE)  # a swish is integer or float as a whole
    for vertex, (host, saved) in fused.items():
        net.edge(host, vertex, saved)
    # of the two that read the x of a swish, one stands for both where they are one operator
    merged = frozenset(
        closing
        for closing, gate in gates.items()
        if target.tunes_float and graph.only_use(units[gate - FIRST].outputs[0])
    )
    layouts = layouts_of(units, sizes.shape, graph.outputs)
    readers = _readers(graph, units, merged, layouts.islands)
    charge_borders(net, target, units, producer, readers, sizes, weighing, layouts)
    charge_reorders(net, units, layouts, sizes, weighing)
    _smaller(net, graph, units)
    return net


def _makers(units: tuple[Unit, ...]) -> dict[str, int]:
    """Tensor → vertex of the unit that hands it out; of those apart, always in float, none."""
    return {o: k for k, u in enumerate(units, FIRST) if not u.apart for o in u.outputs}


def _readers(
    graph: Graph, units: tuple[Unit, ...], merged: Container[int], islands: Container[int]
) -> dict[str, list[int]]:
    """Tensor → vertices of what reads it, but those ``merged``; SINK where it is read as float.

    Units of ``islands`` have their own vertex, though they are float.
    """
    found: dict[str, list[int]] = {}
    for vertex, unit in enumerate(units, FIRST):
        for name in (*unit.reads, *unit.others) if vertex not in merged else ():
            own = name in unit.reads or vertex - FIRST in islands
            found.setdefault(name, []).append(vertex if own else SINK)
    for name in graph.outputs:
        found.setdefault(name, []).append(SINK)
    return found


def _never_integer(
    net: Network,
    units: tuple[Unit, ...],
    fused: Mapping[int, tuple[int, int]],
    sizes: Graph,
    weighing: Weighing,
) -> None:
    """Charge every cut for the units that have no choice, so that times are those of the model."""
    total = 0
    for vertex, unit in enumerate(units, FIRST):
        if unit.demand is None:
            kind = kind_of(unit.view, sizes.shape)
            total += weighing.float(kind, features_of(unit.view, unit.outputs, sizes.shape))
            total -= fused.get(vertex, (SINK, 0))[1]
    net.edge(SOURCE, SINK, max(0, total))


def harm_edges(
    net: Network, target: Target, units: tuple[Unit, ...], weighing: Weighing
) -> dict[str, int]:
    """Charge each tensor for its rounding, once, if its maker or any of its readers is integer.

    A vertex for each tensor is on the integer side as soon as one of these is. What a movement
    node hands out is rounded already if its input is.

    Returns:
        Tensor → the edge that has its price.
    """
    rounded = {name: net.vertex() for name in weighing.harm}
    moved: dict[str, int] = {}
    for vertex, unit in enumerate(units, FIRST):
        if unit.demand is None:
            continue
        if isinstance(unit.demand.output, SameAs):
            source = unit.view.inputs[unit.demand.output.slot].name
            moved |= dict.fromkeys(unit.outputs, rounded.get(source, SINK))
        kernel = target.kernel(unit.view.op_type)
        free = kernel is not None and kernel.float_output
        made = () if free or unit.apart else unit.outputs
        for name in (*unit.reads, *made, *unit.rounds):
            if name in rounded:
                net.edge(vertex, rounded[name], INFINITE)
    return {
        name: net.edge(vertex, moved.get(name, SINK), weighing.harmful(name), due=True)
        for name, vertex in rounded.items()
    }


def _fused(
    graph: Graph,
    units: tuple[Unit, ...],
    producer: Mapping[str, int],
    sizes: Graph,
    weighing: Weighing,
) -> dict[int, tuple[int, int]]:
    """Activations that a float convolution takes in: vertex → the convolution's, ns that it saves.

    An integer one takes in Relu and Clip only, which are part of its unit already.
    """
    kinds = {u.view.name: u for u in units if u.view.op_type in _FUSED}
    found: dict[int, tuple[int, int]] = {}
    for index, node in enumerate(graph.nodes):
        unit = kinds.get(node.name)
        conv = producer.get(node.input[0]) if unit is not None else None
        if unit is None or conv is None or units[conv - FIRST].view.op_type != "Conv":
            continue
        features = features_of(unit.view, unit.outputs, sizes.shape)
        apart, kind = weighing.float(node.op_type, features), node.op_type
        uses = graph.uses(node.input[0])
        if len(uses) == 2 and any(gate_of(graph, u.node, node.op_type) == index for u in uses):
            if node.op_type != "HardSigmoid":
                continue  # x * Sigmoid(x) is a kernel of its own
            apart, kind = apart + weighing.float("Mul", features), "HardSwish"
        elif len(uses) != 1:
            continue
        saved = apart - weighing.float(f"{kind}.fused", features)
        found[producer[unit.outputs[0]]] = (conv, max(0, saved))
    return found


def _turned(
    graph: Graph, units: tuple[Unit, ...], sizes: Graph, weighing: Weighing
) -> dict[int, tuple[int, int]]:
    """Transposes that a float MatMul does while it reads; as ``_fused``. An integer one does not.

    Those that swap the last two dimensions, or bring the first one next to the last, or both.
    """
    vertices = {u.view.name: k for k, u in enumerate(units, FIRST)}
    found = {}
    for unit in units:
        order = unit.view.attributes.get("perm")
        if unit.view.op_type != "Transpose" or not isinstance(order, list | tuple):
            continue
        if len(order) < 2:
            continue
        *lead, row, column = range(len(order))
        behind = [*range(1, row + 1)]
        known = ([*lead, column, row], [*behind, 0, column], [*behind, column, 0])
        name = unit.view.outputs[0]
        uses = [graph.nodes[use.node] for use in graph.uses(name)]
        if list(order) not in known or name in graph.outputs or not uses:
            continue
        if all(node.op_type == "MatMul" for node in uses):
            features = features_of(unit.view, unit.outputs, sizes.shape)
            time = weighing.float("Transpose", features)
            found[vertices[unit.view.name]] = (vertices[uses[0].name], time)
    return found


def _smaller(net: Network, graph: Graph, units: tuple[Unit, ...]) -> None:
    """Charge float tables for their bytes, by their share of a file in which all else is codes.

    A table is codes for all that read it, or for none: else both would be in the file. Its codes
    save nothing where a float product wants it transposed (see ``twins``).
    """
    readers: dict[str, list[int]] = {}
    for vertex, unit in enumerate(units, FIRST):
        if unit.table:
            readers.setdefault(unit.table, []).append(vertex)
    if not readers:
        return
    tables = sum(tensor_bytes(graph.constants[table]) for table in readers)
    rest = weight_bytes(graph.model) - tables
    price = _SMALLER * net.capacity({SOURCE}) / (tables + rest / 4)
    twins = turned_twins(graph, readers, graph.constants)
    vertices = {u.view.name: k for k, u in enumerate(units, FIRST)}
    for table, (first, *others) in readers.items():
        saved = bytes_saved(graph.constants[table].dims)
        gone = net.vertex()  # integer if all are that read the table, or its transpose
        net.edge(SOURCE, gone, max(1, round(price * saved)))
        net.edge(gone, first, INFINITE)
        for twin in twins.get(table, ()):
            for use in graph.uses(twin):
                net.edge(gone, vertices.get(graph.nodes[use.node].name, SINK), INFINITE)
        for other in others:
            net.edge(first, other, INFINITE, back=INFINITE)


def _swishes(graph: Graph, producer: Mapping[str, int]) -> dict[int, int]:
    """Vertex of the Mul → vertex of the Sigmoid, for each x * Sigmoid(x)."""
    found = {}
    for index in range(len(graph.nodes)):
        gate = gate_of(graph, index, "Sigmoid")
        if gate is None:
            continue
        closing, opening = (producer.get(graph.nodes[i].output[0]) for i in (index, gate))
        if closing is not None and opening is not None:
            found[closing] = opening
    return found
