"""Which nodes run on integers: a minimum cut over the graph.

Each unit (a node, with the Relu or Clip behind it) is on the integer or the float side. A side
costs the unit its kernel time there; a float tensor that integer units read costs one
QuantizeLinear, an integer tensor costs a DequantizeLinear for each float unit that reads it, and
a change of layout is charged to the node that it is for (``layout``). All costs are non-negative,
so the cheapest placement is a minimum cut (Greig, Porteous and Seheult 1989), found exactly. A
unit that cannot or may not run on integers is tied to the float side.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from qdq.graph import Graph
from qdq.placement.mincut import Network
from qdq.placement.network import FIRST, SINK, SOURCE, harm_edges, plain_network
from qdq.placement.units import Unit
from qdq.placement.weighing import Weighing
from qdq.targets import Target

__all__ = ["Placement", "Placer"]

FLOAT_PAYS = "float is faster here: its integer kernel saves less than the Q and DQ around it cost"

TABLE_PAYS = "codes of its table cost more time than the bytes that they save are worth"

UNSEEN = (
    "its int8 kernel rounds by itself; what that does is measured where the calibrator keeps "
    "histograms (MSE, Entropy, Percentile), and without that it is not used"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The result.

    Attributes:
        units: all units, in graph order.
        integer: node names of the integer ones.
        left_float: node name → why it stays float.
        time: what nodes and borders take, in ns, as far as the cost table knows; 0 for a target
            that does not weigh costs. Float tables cost time for their bytes.
        float_time: the same with every unit float.
    """

    units: tuple[Unit, ...]
    integer: frozenset[str]
    left_float: Mapping[str, str] = field(default_factory=dict)
    time: int = 0
    float_time: int = 0


class Placer:
    """Placements of one model for any number of weighings.

    Weighings that differ in the price of harm alone differ in the capacities of few edges. Those
    of a greater price are greater, so the flow found for a smaller one is where its search starts.
    """

    def __init__(self, graph: Graph, target: Target, units: tuple[Unit, ...], sizes: Graph) -> None:
        """Without any work yet.

        Args:
            graph: the prepared model; neither it nor the others may change.
            target: what can run on integers.
            units: of the model, from ``units_of``.
            sizes: an index whose shapes are all numbers (nominal ones).
        """
        self._graph, self._target, self._units, self._sizes = graph, target, units, sizes
        self._plain: dict[tuple[object, ...], Network] = {}  # by ``Weighing.plain``
        self._last: _Priced | None = None

    def place(self, weighing: Weighing) -> Placement:
        """Decide for every unit.

        Args:
            weighing: prices of kernels and borders.
        """
        units = self._units
        if self._target.weighs_costs:
            chosen, times = self._cut(weighing)
        else:
            chosen, times = frozenset(u.view.name for u in units if u.demand is not None), (0, 0)
        reasons = {
            u.view.name: u.reason or _reason(u, weighing)
            for u in units
            if u.view.name not in chosen
        }
        time, float_time = times
        return Placement(
            units=units, integer=chosen, left_float=reasons, time=time, float_time=float_time
        )

    def _cut(self, weighing: Weighing) -> tuple[frozenset[str], tuple[int, int]]:
        """The integer side of the minimum cut (source = integer, sink = float).

        Returns:
            The names, and two times: that of this cut, and that of the float model.
        """
        net = self._network(weighing)
        side = net.source_side(SOURCE, SINK)
        chosen = frozenset(u.view.name for k, u in enumerate(self._units, FIRST) if k in side)
        return chosen, (net.capacity(side), net.capacity({SOURCE}))

    def _network(self, weighing: Weighing) -> Network:
        key = weighing.plain
        if key not in self._plain:
            parts = self._graph, self._target, self._units, self._sizes
            self._plain[key] = plain_network(*parts, replace(weighing, price=0.0, harm={}))
        if not weighing.harm:
            return self._plain[key]
        last = self._last
        if last is not None and last.precedes(weighing):
            last.widen(weighing)
        else:
            net = self._plain[key].copy()
            edges = harm_edges(net, self._target, self._units, weighing)
            self._last = last = _Priced(net, edges, weighing)
        return last.net


@dataclass
class _Priced:
    """A network with prices on harm, and the flow that was found for them."""

    net: Network
    edges: Mapping[str, int]
    weighing: Weighing

    def precedes(self, other: Weighing) -> bool:
        mine = self.weighing
        same = mine.plain == other.plain and mine.harm is other.harm
        return same and mine.price <= other.price

    def widen(self, to: Weighing) -> None:
        for name, edge in self.edges.items():
            self.net.widen(edge, to.harmful(name) - self.weighing.harmful(name))
        self.weighing = to


def _reason(unit: Unit, weighing: Weighing) -> str:
    """Why a unit that could be integer is not."""
    if unit.dynamic and not weighing.dynamic:
        return UNSEEN
    return TABLE_PAYS if unit.table else FLOAT_PAYS
