"""Who reads what as codes, and which float nodes onnxruntime must be kept away from."""

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

from qdq.forms import IDENTITY, SUM, Follower, Forms, Rewrite, tuned
from qdq.graph import Graph
from qdq.nested import captured_names
from qdq.ops import demand_of
from qdq.ops.demand import Demand, SameAs
from qdq.placement import Unit
from qdq.placement.weighing import kind_of
from qdq.plan import Plan
from qdq.spec import INT8
from qdq.spelling import Step
from qdq.subpixel import Subpixel, form_of
from qdq.views import node_view

__all__ = ["Wiring", "wire"]

# onnxruntime quantizes these itself when a session loads, if they stand between a DQ and a Q:
# Conv, ConvTranspose and Gemm from float constants, without any guard of the bias; AveragePool
# with attributes that its integer kernel gets wrong.
SELF_QUANTIZED = frozenset({"Conv", "ConvTranspose", "Gemm", "AveragePool"})
# These too, which is right but slower than float where they were left float: their integer kernels
# go through the values one by one, in one thread.
SLOWED_BETWEEN = frozenset({"Softmax", "Where"})
# onnxruntime moves a Q backward over a float MaxPool; what it then runs, a MaxPool of uint8 in
# channels-first layout, was measured to take fifty times as long as the float one.
SLOWED_BY_Q = frozenset({"MaxPool"})
# It moves them over a Transpose as well, and one of this kind is slow with codes.
_SLOW_TRANSPOSE = "Transpose.runs"

# It moves a DQ forward over these too, and writes the type of the codes into the Q that it puts
# behind them. Of int8 it makes uint8 afterwards, and then refuses that Q.
_PASSED_BY_DQ = frozenset({"MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})

_SLOPED = Rewrite(op_type="LeakyRelu", attributes={"alpha": 0.0})


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """The wiring of a model, after the solver's last word on what stays float.

    Attributes:
        made: tensors that an integer kernel hands out as codes.
        read: tensor → names of the nodes that read it as codes.
        units: the integer units by node name, less those apart, which are between float tensors
            as any float node.
        dynamic: names of those whose kernels round their activations by themselves.
        lookups: names of those that pick rows of codes.
        subpixel: units that are written as movements, behind another operator: name → form.
        followed: node → what is written behind it. An identity hides a Q from the runtime, which
            would run a float node on integers, or a Clip, which would keep an integer one in float.
        rewritten: float nodes that are written as another operator.
        split: float nodes that are written as several.
        merged: float nodes that are part of one of those, and not written.
        floors: float Softmax → the score that all lower ones are raised to.
        shielded: float nodes in front of which an identity keeps a DQ from being moved.
    """

    made: frozenset[str]
    read: Mapping[str, frozenset[str]]
    units: Mapping[str, Unit]
    dynamic: frozenset[str]
    lookups: frozenset[str]
    subpixel: Mapping[str, Subpixel]
    followed: Mapping[str, Follower]
    rewritten: Mapping[str, Rewrite]
    split: Mapping[str, tuple[Step, ...]]
    merged: frozenset[str]
    floors: Mapping[str, float]
    shielded: frozenset[str]


def wire(
    graph: Graph, plan: Plan, floats: Mapping[str, str], floors: Mapping[str, float]
) -> Wiring:
    """Derive the wiring from the placement, less the nodes in ``floats``; ``floors`` as in emit."""
    placement = plan.placement
    integer = {
        u.view.name: u
        for u in placement.units
        if u.view.name in placement.integer and u.view.name not in floats
    }
    units = {name: u for name, u in integer.items() if not u.apart}
    read = _readers(units)
    made = _codes(plan, units, read)
    hidden = _hidden(graph, made, set(read), units)
    rewritten = _rewritten(graph, made, units)
    clips = {
        name
        for name, unit in units.items()
        if unit.clamp and unit.clamp not in rewritten and made.isdisjoint(unit.outputs)
    }
    forms = tuned(graph, made, units, floors) if plan.target.tunes_float else Forms()
    clips |= _clipped_products(graph, made, units, forms.floors)
    return Wiring(
        made=frozenset(made),
        read=read,
        units=units,
        dynamic=frozenset(name for name, u in integer.items() if u.dynamic),
        lookups=frozenset(name for name, u in integer.items() if u.table),
        subpixel=_subpixel(plan, units),
        followed={**forms.followed, **dict.fromkeys(sorted(hidden | clips), IDENTITY)},
        rewritten={**forms.rewritten, **rewritten},
        split={name: steps for name, steps in forms.split.items() if name not in hidden | clips},
        merged=forms.merged,
        floors=forms.floors,
        shielded=frozenset(_shielded(graph, plan, made, units)),
    )


def _readers(units: Mapping[str, Unit]) -> dict[str, frozenset[str]]:
    """Tensor → names of the units that read it as codes."""
    found: dict[str, set[str]] = {}
    for name, unit in units.items():
        for tensor in unit.reads:
            found.setdefault(tensor, set()).add(name)
    return {tensor: frozenset(names) for tensor, names in found.items()}


def _codes(plan: Plan, units: Mapping[str, Unit], read: Container[str]) -> set[str]:
    """Tensors that kernels hand out as codes; those that nobody reads so only if they have to."""
    made = set()
    for unit in units.values():
        kernel = plan.target.kernel(unit.view.op_type)
        floats_out = kernel is not None and kernel.float_output
        made |= {o for o in unit.outputs if o in plan.tensors and (not floats_out or o in read)}
    return made


def _subpixel(plan: Plan, units: Mapping[str, Unit]) -> dict[str, Subpixel]:
    """The units that are written as movements behind another operator."""
    return {
        name: form
        for name, unit in units.items()
        if plan.target.subpixel(unit.view.op_type)
        and not isinstance(form := form_of(unit.view), str)
    }


def _clipped_products(
    graph: Graph, made: set[str], units: Mapping[str, Unit], floors: Mapping[str, float]
) -> set[str]:
    """Integer nodes with float output right in front of the Clip of a Softmax with a floor.

    A float Transpose between may be moved away by the runtime.
    """
    waiting = [n.input[0] for n in graph.nodes if n.name in floors]
    found = set()
    for tensor in waiting:
        node = graph.maker(tensor)
        if node is None:
            continue
        if node.name in units and made.isdisjoint(units[node.name].outputs):
            found.add(node.name)
        elif node.op_type == "Transpose" and node.name not in units:
            waiting.append(node.input[0])
    return found


def _rewritten(graph: Graph, made: set[str], units: Mapping[str, Unit]) -> dict[str, Rewrite]:
    """Float nodes that onnxruntime would fuse with the Gemm or MatMul before them.

    It does that before it looks for integer kernels: with a Relu behind either, and an Add behind
    a MatMul of matrices. Then the product runs in float, and its weights are dequantized in each
    run. What computes the same under another name is left alone.
    """
    found = {}
    for unit in units.values():
        if not made.isdisjoint(unit.outputs):
            continue
        for name in unit.view.outputs:
            use = graph.only_use(name)
            node = graph.nodes[use.node] if use is not None else None
            if node is None or node.name in units:
                continue
            flat = len(graph.shape(name) or (0, 0)) == 2
            if node.op_type == "Relu" and node.name == unit.clamp:
                found[node.name] = _SLOPED
            elif node.op_type == "Add" and unit.view.op_type == "MatMul" and flat:
                found[node.name] = SUM
    return found


def _hidden(graph: Graph, made: set[str], read: set[str], units: Mapping[str, Unit]) -> set[str]:
    """Nodes that a Q behind them would harm.

    Float ones that onnxruntime would run on integers because of it, and products with float
    output that it would leave in float, as one reader would be a Q and another not.

    It moves a DQ forward and a Q backward through float nodes that only move values, and looks
    for the Q behind a Relu or Clip; so one pass in each direction follows it.
    """
    floats = [i for i, n in enumerate(graph.nodes) if n.name not in units and n.output]
    moving = {i for i in floats if graph.nodes[i].input and _moves(graph, i)}
    behind_dq, before_q = set(made), set(read)
    for i in floats:
        if i in moving and graph.nodes[i].input[0] in behind_dq:
            behind_dq.update(graph.nodes[i].output)
    for i in reversed(floats):
        node = graph.nodes[i]
        if (i in moving or node.op_type in ("Relu", "Clip")) and node.output[0] in before_q:
            before_q.add(node.input[0])
    mixed = {t for t in before_q - made if graph.only_use(t) is None}
    products = {name for name, u in units.items() if not mixed.isdisjoint(u.view.outputs)}
    slow = {i for i in moving if kind_of(node_view(graph, i), graph.shape) == _SLOW_TRANSPOSE}
    makers = {
        graph.producer[graph.nodes[i].input[0]]
        for i in slow
        if graph.nodes[i].input[0] in behind_dq
    }

    def harmed(i: int) -> bool:
        """Whether a Q that follows would harm this float node."""
        node = graph.nodes[i]
        if i in slow or node.op_type in SLOWED_BY_Q:
            return True
        if node.op_type in SLOWED_BETWEEN:
            return not behind_dq.isdisjoint(node.input)
        return node.op_type in SELF_QUANTIZED and node.input[0] in behind_dq

    behind = {i for i in floats if graph.nodes[i].output[0] in before_q and harmed(i)}
    return products | {graph.nodes[i].name for i in behind | (makers & moving)}


def _shielded(graph: Graph, plan: Plan, made: set[str], units: Mapping[str, Unit]) -> Iterator[str]:
    """Float nodes over which no DQ may be moved.

    One of int8 may not, and none towards a subgraph that captures what has been moved:
    onnxruntime looks for it among the node's inputs, and aborts the process.
    """
    int8 = {name for name in made if plan.tensors[name].spec.dtype == INT8}
    moving = [n for n in graph.nodes if n.op_type in _PASSED_BY_DQ and n.name not in units]
    captured = {name for node in graph.nodes for name in captured_names(node)}
    for node in reversed(moving):
        if not captured.isdisjoint(node.output):
            captured.add(node.input[0])
    for node in moving:
        x = node.input[0]
        if x in int8 or (x in made and not captured.isdisjoint(node.output)):
            yield node.name


def _moves(graph: Graph, index: int) -> bool:
    demand = demand_of(node_view(graph, index))
    return isinstance(demand, Demand) and isinstance(demand.output, SameAs)
