"""How linear nodes read their inputs: for second moments, and for dividing them."""

import math
from collections.abc import Mapping

import onnx

from qdq.calibrate.moments import Layout
from qdq.errors import CalibrationError
from qdq.graph import Graph
from qdq.plan import Plan
from qdq.problem import Linear, Observed, Shared
from qdq.views import node_view

__all__ = ["divisible", "moment_layouts", "require_channels"]

_ORDER = 1024  # most terms of a block
_LEAST = 64
_MEMORY = 1 << 27  # moments kept in all: 1 GiB of float64


def moment_layouts(model: onnx.ModelProto, plan: Plan, memory: int = _MEMORY) -> dict[str, Layout]:
    """How each linear node of a plan reads its input.

    Args:
        model: the prepared model that the plan was made for.
        plan: the plan.
        memory: the most numbers to be kept in all; larger blocks are halved until that holds.

    Returns:
        Node name → layout. Left out are transposed convolutions, and kernels with more than 1024
        taps.
    """
    graph = Graph(model)
    places = {node.name: index for index, node in enumerate(graph.nodes)}
    order = _ORDER
    while True:
        found = {
            linear.node: layout
            for linear in plan.linears
            if (layout := _layout(graph, places[linear.node], linear, order)) is not None
        }
        if order <= _LEAST or sum(layout.size for layout in set(found.values())) <= memory:
            return found
        order //= 2


def _layout(graph: Graph, index: int, linear: Linear, order: int) -> Layout | None:
    shape = tuple(int(d or 0) for d in graph.shape(linear.weight) or ())
    if linear.kind == "conv_transpose" or 0 in shape:
        return None
    if linear.kind == "matmul":
        return Layout(tensor=linear.input, channels=shape[0], blocks=_blocks(shape[0], 1, order))
    kernel, view = shape[2:], node_view(graph, index)
    taps, rank = math.prod(kernel), len(kernel)
    if taps > _ORDER:
        return None

    def sizes(name: str, default: int, count: int) -> tuple[int, ...]:
        value = view.attributes.get(name)
        return tuple(value) if isinstance(value, list | tuple) else (default,) * count

    auto = view.text("auto_pad", "NOTSET")
    return Layout(
        tensor=linear.input,
        channels=shape[1] * linear.groups,
        groups=linear.groups,
        blocks=_blocks(shape[1], taps, order),
        kernel=kernel,
        strides=sizes("strides", 1, rank),
        dilations=sizes("dilations", 1, rank),
        pads=sizes("pads", 0, 2 * rank),
        auto_pad=auto if auto.startswith("SAME") else "",
    )


def _blocks(channels: int, taps: int, order: int) -> int:
    """The least number of blocks of whole channels with at most ``order`` terms, if possible."""
    per_block = max(order // taps, 1)
    return -(-channels // per_block)


def divisible(model: onnx.ModelProto, plan: Plan) -> dict[str, tuple[Linear, ...]]:
    """Float tensors that only matrix products read as codes → these products.

    Left out are tensors that an integer kernel hands out as codes, those whose parameters a rule
    sets or other tensors share, and those whose weights something else reads as well. So is all
    where the target has an integer kernel for Div: it would round before it divides.
    """
    if plan.target.kernel("Div") is not None:
        return {}
    graph = Graph(model)
    units = [u for u in plan.placement.units if u.view.name in plan.placement.integer]
    made = {name for u in units for name in u.outputs}
    shared = {t.source.owner for t in plan.tensors.values() if isinstance(t.source, Shared)}
    linears = {n.node: n for n in plan.linears}
    readers: dict[str, list[Linear | None]] = {}
    for unit in units:
        for name in unit.reads:
            readers.setdefault(name, []).append(linears.get(unit.view.name))
    found: dict[str, tuple[Linear, ...]] = {}
    for name, products in readers.items():
        if name in made or name in shared or name in plan.ruled:
            continue
        known = [n for n in products if n is not None and _divides(graph, n, plan)]
        if len(known) == len(products) and isinstance(plan.tensors[name].source, Observed):
            found[name] = tuple(known)
    return found


def _divides(graph: Graph, linear: Linear, plan: Plan) -> bool:
    """Whether a node is a product with a matrix that is its own."""
    matrix = linear.kind == "matmul" and len(graph.shape(linear.weight) or ()) == 2
    return matrix and linear.weight not in plan.ruled and len(graph.uses(linear.weight)) == 1


def require_channels(
    model: onnx.ModelProto, plan: Plan, axes: Mapping[str, int], seen: Mapping[str, int]
) -> None:
    """Refuse samples whose channels do not fit the weights of products.

    Calibration runs only what leads to the tensors that it observes. A product that hands out
    float is not run where nothing behind it is observed, so onnxruntime has not refused them.

    Args:
        model: the prepared model.
        plan: with its linear nodes.
        axes: tensor → the axis that its channels were taken to lie on.
        seen: tensor → how many it had there.

    Raises:
        CalibrationError: naming the node, what was found and what is wanted.
    """
    graph = Graph(model)
    for linear in plan.linears:
        if linear.kind != "matmul" or axes.get(linear.input) != -1 or linear.input not in seen:
            continue
        found, shape = seen[linear.input], graph.shape(linear.weight) or ()
        wanted = shape[-2] if len(shape) > 1 else found
        if found != wanted:
            raise CalibrationError(
                f"the samples give tensor {linear.input!r} {found} channels, and the weight "
                f"{linear.weight!r} of node {linear.node!r} has {wanted}. Give samples of the "
                f"shapes that the model is used with",
                tensor=linear.input,
                node=linear.node,
            )
