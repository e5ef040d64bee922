"""Which nodes run on integers: costs, the minimum cut, and the price of accuracy."""

from qdq.placement.place import Placement, Placer
from qdq.placement.units import Unit, units_of

__all__ = ["Placement", "Placer", "Unit", "units_of"]
