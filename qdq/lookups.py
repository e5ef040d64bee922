"""Nodes that pick rows of a table, written so that the table is kept as int8 codes."""

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from qdq.graph import Graph
from qdq.tables import codes_of

__all__ = ["Lookups"]


class Lookups:
    """Writes them, each table once.

    A DequantizeLinear has one scale for all rows that were picked, or one for each column; a scale
    for each row is picked beside the row, and multiplied with what a DequantizeLinear makes of the
    codes. In front of the Gather, a DequantizeLinear would go through the whole table in each run.

    Args:
        graph: the float model's index, for values.
        fresh: a free name next to one.
    """

    def __init__(self, graph: Graph, fresh: Callable[[str], str]) -> None:
        self.graph: Graph = graph
        self.fresh: Callable[[str], str] = fresh
        self.constants: list[onnx.TensorProto] = []
        self._stored: dict[str, tuple[str, ...]] = {}

    def written(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """The nodes in place of a Gather, of which the first has its name and the last its output.

        Args:
            node: its table is a constant.
        """
        codes, scales, one, zero = self._table(node.input[0])
        result, name = node.output[0], node.name
        picked, real, factor = (
            self.fresh(f"{result}_picked{end}") for end in ("_quantized", "", "_scale")
        )
        first, second = onnx.NodeProto(), onnx.NodeProto()
        for made, source, output in ((first, codes, picked), (second, scales, factor)):
            made.CopyFrom(node)
            made.input[0], made.output[0] = source, output
        second.name = self.fresh(f"{name}_scale")
        return [
            first,
            second,
            helper.make_node(
                "DequantizeLinear", [picked, one, zero], [real],
                self.fresh(f"{name}_DequantizeLinear"),
            ),
            helper.make_node("Mul", [real, factor], [result], self.fresh(f"{name}_Mul")),
        ]  # fmt: skip

    def _table(self, name: str) -> Sequence[str]:
        if name not in self._stored:
            codes, scales = codes_of(self.graph.floats(name))
            self._stored[name] = (
                self._constant(f"{name}_quantized", codes),
                self._constant(f"{name}_scale", scales),
                self._constant(f"{name}_unit", np.array(1, np.float32)),
                self._constant(f"{name}_zero_point", np.array(0, np.int8)),
            )
        return self._stored[name]

    def _constant(self, label: str, value: NDArray[np.generic]) -> str:
        name = self.fresh(label)
        self.constants.append(numpy_helper.from_array(value, name))
        return name
