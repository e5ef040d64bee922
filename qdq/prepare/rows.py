"""Convolutions over one axis, written as rows of images.

onnxruntime's kernels run along the last axis, and its blocked float ones want two spatial axes.
So [N, C, L, 1], as Keras models of sound have it, becomes [N, C, 1, L]: the same values in the same
places, of which each window is one row. Measured (1.32, two cores): float convolutions take 0.3
(depthwise), 0.5 (16 channels) and 0.75 (128) of their time then, integer ones 0.7 with 16 channels
and a sixth with 512 taps over one channel.

[N, C, L] becomes rows for depthwise convolutions only: they take a quarter of the time with five
taps. Others gain up to a sixth with one thread and lose with many, since the blocked kernels share
out rows and 64 channels at a time, and the plain ones any part of a product.
"""

from collections.abc import Mapping
from math import prod

import numpy as np
import onnx

from qdq.joined import Joined
from qdq.prepare.editing import Editor, Node
from qdq.prepare.row_forms import BROADCAST, FORMS, SPATIAL, TURNED, Form, row_shape

__all__ = ["in_rows", "rows_differ"]


def in_rows(ed: Editor) -> None:
    """[N, C, L, 1] is [N, C, 1, L] from a Conv on, as far as operators take that.

    Where none of the convolutions has more than one tap, which are as fast as they are, all stays.
    So is [N, C, L] from a depthwise Conv on, up to the next other one.
    """
    for form in FORMS:
        inside = _inside(ed, form)
        if inside:
            _Turning(ed, form, inside).turn()


def rows_differ(model: onnx.ModelProto, quantized: onnx.ModelProto) -> bool:
    """Whether a quantized model has convolutions that are no rows, and ``model`` has them as rows.

    Args:
        model: a prepared model.
        quantized: one that was quantized, by whatever tool.
    """
    mine, others = (
        {(n.name, a.name): list(a.ints) for n in m.graph.node if n.op_type == "Conv"
         for a in n.attribute if a.name in SPATIAL}
        for m in (model, quantized)
    )  # fmt: skip
    return any(
        len(rows) == 2 * len(other) or (key[1] != "pads" and rows != other == rows[::-1])
        for key, rows in mine.items()
        if (other := others.get(key))
    )


def _inside(ed: Editor, form: Form) -> dict[Node, None]:
    """Convolutions and what follows them, where one of those connected has several taps."""
    joined = Joined[Node]()
    for node in ed.nodes():
        if not _takes(ed, form, node):
            continue
        makers = [m for n in _data(ed, node) if (m := ed.maker(n)) is not None and m in joined]
        if node.op == "Conv" or makers:
            joined.add(node)
            for maker in makers:
                joined.join(maker, to=node)
    long = {joined.first(n) for n in joined if n.op == "Conv" and _has_taps(ed, n)}
    return {n: None for n in joined if joined.first(n) in long}


def _has_taps(ed: Editor, conv: Node) -> bool:
    """Whether a Conv has several, along an axis that is long."""
    shape = ed.shape(conv.input(0)) or ()
    return prod(ed.constants[conv.input(1)].dims[2:]) > 1 and shape[2] != 1


def _data(ed: Editor, node: Node) -> list[str]:
    """The inputs that have the form."""
    names = node.inputs if node.op in BROADCAST else node.inputs[:1]
    return [n for n in names if n not in ed.constants]


def _takes(ed: Editor, form: Form, node: Node) -> bool:
    """Whether an operator can work on rows."""
    if node.op not in TURNED or node.captures:
        return False
    data = _data(ed, node)
    others = {n for n in node.inputs if n} - set(data)
    if not data or "" in node.outputs or any(n not in ed.constants for n in others):
        return False
    if len(node.outputs) > 1 and node.op != "Split":
        return False
    formed = all(form.has(ed.shape(n)) for n in (*data, *node.outputs))
    return formed and TURNED[node.op].fits(ed, form, node)


class _Turning:
    """Turns some nodes into the form of rows.

    Args:
        ed: the graph.
        form: that they have.
        inside: the nodes, makers before readers.
    """

    def __init__(self, ed: Editor, form: Form, inside: Mapping[Node, None]) -> None:
        self.ed, self.form, self.inside = ed, form, inside
        self.rows: dict[str, str] = {}  # tensor → the same as rows

    def turn(self) -> None:
        for node in self.inside:
            TURNED[node.op].turn(self.ed, self.form, node)
            for slot, name in enumerate(node.inputs[: None if node.op in BROADCAST else 1]):
                if name not in self.ed.constants:
                    self.ed.set_input(node, slot, self._row(name, node))
            for name in node.outputs:
                self._make(name, node)

    def _row(self, name: str, reader: Node) -> str:
        """The tensor as rows; made before its reader, if it comes from outside."""
        if name not in self.rows:
            row = self._named(name, as_it_is=self._is_point(name))
            if row != name:
                self.ed.add_before(reader, self._moved(self.form.to, name, row))
            self._type(name)
        return self.rows[name]

    def _make(self, name: str, node: Node) -> None:
        """Note that a node makes rows; and bring them back for who reads them as they were."""
        inside = name not in self.ed.outputs and all(u in self.inside for u in self.ed.users(name))
        row = self._named(name, as_it_is=inside or self._is_point(name))
        if row != name:
            self.ed.set_output(node, name, row)
            self.ed.add_after(node, self._moved(self.form.back, row, name))
        self._type(name)

    def _is_point(self, name: str) -> bool:
        """Whether a tensor is in rows as it is: [N, C, 1, 1]."""
        return (self.ed.shape(name) or ())[2:] == (1, 1)

    def _named(self, name: str, *, as_it_is: bool) -> str:
        """The name that a tensor has as rows."""
        row = self.rows[name] = name if as_it_is else self.ed.fresh(f"{name}_row")
        return row

    def _type(self, name: str) -> None:
        """Note the type of a tensor as rows."""
        shape = row_shape(self.ed.shape(name) or ())
        self.ed.set_type(self.rows[name], self.ed.elem_type(name), shape)

    def _moved(self, how: tuple[str, tuple[int, ...]], x: str, y: str) -> onnx.NodeProto:
        op, values = how
        axes = self.ed.add_constant(f"{y}_{op}", np.array(values, np.int64))
        return self.ed.new_node(op, [x, axes], [y], self.ed.fresh(f"{y}_{op}"))
