"""Normalizations: data in and out as codes; scale, bias, mean and variance stay float."""

from collections.abc import Mapping

from qdq.ops.demand import Demand, Handler

__all__ = ["ROWS"]

ROWS: Mapping[str, Demand | Handler] = {
    "BatchNormalization": Demand(),
    "GroupNormalization": Demand(),
    "InstanceNormalization": Demand(),
    "LayerNormalization": Demand(),
    "RMSNormalization": Demand(),
}
