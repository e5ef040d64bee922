"""Who reads what as codes, and which float nodes onnxruntime must be kept away from."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qdq.graph import Graph
from qdq.ops import demand_of
from qdq.ops.demand import Demand, SameAs
from qdq.placement import Unit
from qdq.plan import Plan
from qdq.spec import QuantParams
from qdq.views import node_view

__all__ = ["Wiring", "clamps_that_stay", "wire"]

# onnxruntime quantizes these itself when a session loads, if they stand between a DQ and a Q:
# Conv, ConvTranspose and Gemm from float constants, without any guard of the bias; AveragePool
# with attributes that its integer kernel gets wrong.
SELF_QUANTIZED = frozenset({"Conv", "ConvTranspose", "Gemm", "AveragePool"})
# onnxruntime moves a Q backward over a float MaxPool; what it then runs, a MaxPool of uint8 in
# channels-first layout, was measured to take fifty times as long as the float one.
SLOWED_BY_Q = frozenset({"MaxPool"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """The wiring of a model, after the solver's last word on what stays float.

    Attributes:
        made: tensors that an integer kernel hands out as codes.
        read: tensor → names of the nodes that read it as codes.
        units: the integer units by node name.
        hidden: float nodes that need an identity behind them, which hides the Q from the runtime.
    """

    made: frozenset[str]
    read: Mapping[str, frozenset[str]]
    units: Mapping[str, Unit]
    hidden: frozenset[str]


def wire(graph: Graph, plan: Plan, floats: Mapping[str, str]) -> Wiring:
    """Derive the wiring from the placement, less the nodes in ``floats``."""
    placement = plan.placement
    units = {
        u.view.name: u
        for u in placement.units
        if u.view.name in placement.integer and u.view.name not in floats
    }
    read: dict[str, set[str]] = {}
    for name, unit in units.items():
        for tensor in unit.reads:
            read.setdefault(tensor, set()).add(name)
    made = set()
    for unit in units.values():
        kernel = plan.target.kernel(unit.view.op_type)
        floats_out = kernel is not None and kernel.float_output
        made |= {o for o in unit.outputs if o in plan.tensors and (not floats_out or o in read)}
    return Wiring(
        made=frozenset(made),
        read={k: frozenset(v) for k, v in read.items()},
        units=units,
        hidden=_hidden(graph, made, set(read), units),
    )


def _hidden(
    graph: Graph, made: set[str], read: set[str], units: Mapping[str, Unit]
) -> frozenset[str]:
    """Float nodes that onnxruntime would run on integers because of a Q behind them.

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
    return frozenset(
        graph.nodes[i].name
        for i in floats
        if graph.nodes[i].output[0] in before_q
        and (
            graph.nodes[i].op_type in SLOWED_BY_Q
            or (graph.nodes[i].op_type in SELF_QUANTIZED and graph.nodes[i].input[0] in behind_dq)
        )
    )


def _moves(graph: Graph, index: int) -> bool:
    demand = demand_of(node_view(graph, index))
    return isinstance(demand, Demand) and isinstance(demand.output, SameAs)


def clamps_that_stay(plan: Plan, params: Mapping[str, QuantParams]) -> dict[str, str]:
    """Absorbed clamps that cut inside the range of their codes, with what follows from that.

    A calibrated range ends at the clamp's bounds, so that saturation does the clamp's work. A
    range or scale that a rule set may go beyond; then the runtime keeps the clamp, and the kernel
    before it, in float. The results are right, but slow.
    """
    found = {}
    for unit in plan.placement.units:
        known = params.get(unit.outputs[0]) if unit.outputs else None
        if unit.clamp is None or unit.limits is None or known is None:
            continue
        if unit.view.name not in plan.placement.integer:
            continue
        low, high = (np.rint(np.float64(b) / known.scale) + known.zero_point for b in unit.limits)
        if low > known.spec.dtype.min or high < known.spec.dtype.max:
            found[unit.view.name] = (
                f"the range of '{unit.outputs[0]}' goes beyond the bounds of '{unit.clamp}', so "
                f"the runtime has to run both in float; set a range within {unit.limits}"
            )
    return found
