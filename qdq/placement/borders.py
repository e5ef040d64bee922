"""What the borders between integer and float nodes cost: Q, DQ and changes of layout."""

from collections.abc import Mapping

from qdq.graph import Graph
from qdq.placement.layout import NOBODY, Layouts
from qdq.placement.mincut import INFINITE, Network
from qdq.placement.units import Unit
from qdq.placement.weighing import Weighing, features_of
from qdq.targets import Target

__all__ = ["FIRST", "SINK", "SOURCE", "charge_borders", "charge_reorders"]

SOURCE, SINK, FIRST = 0, 1, 2  # vertices: integer, float, the first unit


def charge_borders(
    net: Network,
    target: Target,
    units: tuple[Unit, ...],
    producer: Mapping[str, int],
    readers: Mapping[str, list[int]],
    sizes: Graph,
    weighing: Weighing,
    layouts: Layouts,
) -> None:
    """Charge each tensor for the Q and DQs that a border between its maker and readers takes.

    A change of layout is part of the border only where there would be none without it.
    """
    convolved = {t.name for u in units if u.view.op_type == "Conv" for t in u.view.inputs[:1]}
    islands = {number: net.vertex() for number in dict.fromkeys(layouts.islands.values())}
    layout = {FIRST + k: islands[number] for k, number in layouts.islands.items()}
    for name, vertices in readers.items():
        maker = producer.get(name, SINK)
        unit = units[maker - FIRST] if maker >= FIRST else None
        kernel = target.kernel(unit.view.op_type) if unit is not None else None
        shape = sizes.shape(name)
        before = name in convolved and name not in layouts.wanted
        out, first = weighing.dequantize(shape, before_conv=before)
        if unit is not None and kernel is not None and kernel.float_output:
            # the clamp is a kernel of its own then
            features = features_of(unit.view, unit.outputs, sizes.shape)
            out, first = weighing.float("LeakyRelu", features) if unit.clamp else 0, 0
        behind = name in layouts.blocked and name not in layouts.undone
        into, last = weighing.quantize(shape, behind_conv=behind and maker not in layout)
        shared = _border(net, maker, vertices, (into, out), (last, first), layout)
        host = layouts.blocked.get(name, NOBODY)
        if maker in layout and host != NOBODY:  # in blocks only if that convolution is float
            reorder = weighing.reorder(shape)
            if behind:
                net.edge(shared, FIRST + host, reorder)
            for reader in vertices:
                if reader >= FIRST and _works_on_blocks(units[reader - FIRST], layouts):
                    net.edge(FIRST + host, reader, reorder)


def _works_on_blocks(unit: Unit, layouts: Layouts) -> bool:
    """Whether it is a convolution whose float kernel works on blocks of channels."""
    return unit.view.op_type == "Conv" and unit.outputs[0] in layouts.blocked


def charge_reorders(
    net: Network, units: tuple[Unit, ...], layouts: Layouts, sizes: Graph, weighing: Weighing
) -> None:
    """Charge float nodes for a layout that is not theirs, be it for a Q or another float node."""
    for name, conv in layouts.undone.items():
        net.edge(SOURCE, FIRST + conv, weighing.reorder(sizes.shape(name)))
    for name, convs in layouts.wanted.items():
        once = net.vertex()  # float as soon as one of them is
        net.edge(SOURCE, once, weighing.reorder(sizes.shape(name)))
        for conv in convs:
            net.edge(once, FIRST + conv, INFINITE)
    for conv, resize in layouts.pushed:
        features = features_of(units[resize].view, units[resize].outputs, sizes.shape)
        slower = weighing.float("Resize.last", features) - weighing.float("Resize", features)
        net.edge(FIRST + conv, FIRST + resize, max(0, slower))


def _border(
    net: Network,
    maker: int,
    readers: list[int],
    prices: tuple[int, int],
    changes: tuple[int, int],
    layout: Mapping[int, int],
) -> int:
    """Charge one tensor.

    Args:
        net: the network.
        maker: vertex of what makes it.
        readers: those of what reads it.
        prices: of a Q, and of a DQ.
        changes: of the layouts at a Q, to channels last, and at a DQ, from there.
        layout: float vertex of an island → the vertex of its layout, the source's side if that is
            channels last. The layout of others goes with their side.

    Returns:
        The vertex that is integer as soon as one of the readers is.
    """
    (quantize, dequantize), (to_last, from_last) = prices, changes
    made = layout.get(maker, maker)
    # one Q, however many integer readers
    shared = net.vertex()
    net.edge(shared, maker, quantize)
    net.edge(shared, made, to_last)
    for reader in readers:
        if reader in layout:
            net.edge(layout[reader], made, to_last)
        elif reader != SINK:
            net.edge(reader, shared, INFINITE)
        # a DQ for each float reader: onnxruntime gives each its own, with its own layout change
        if maker != SINK:
            net.edge(maker, reader, dequantize)
            net.edge(made, layout.get(reader, reader), from_last)
    return shared
