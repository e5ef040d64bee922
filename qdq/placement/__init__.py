"""Which nodes run on integers: costs, the minimum cut, and the price of accuracy."""

from qdq.placement.place import Placement, place
from qdq.placement.units import Unit, units_of

__all__ = ["Placement", "Unit", "place", "units_of"]
