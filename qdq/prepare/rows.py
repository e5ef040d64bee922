"""Convolutions over one axis, written as rows of images.

onnxruntime's kernels run along the last axis, and its blocked float ones want two spatial axes.
So [N, C, L], and [N, C, L, 1] as Keras models of sound have it, become [N, C, 1, L]: the same
values in the same places, of which each window is one row. Measured (1.32, one thread): float
convolutions of [N, C, L] take 0.2 (depthwise), 0.6 (16 channels) and 0.9 (128) of their time then,
those of [N, C, L, 1] 0.3, 0.4 and 0.7; an integer one of 512 taps over one channel takes a sixth.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx

from qdq.prepare.editing import Array, Editor, Node

__all__ = ["in_rows", "rows_differ"]

_ALIKE = ("BatchNormalization", "Clip", "Elu", "Erf", "Gelu", "GlobalAveragePool", "GlobalMaxPool",
          "HardSigmoid", "HardSwish", "Identity", "InstanceNormalization", "LeakyRelu", "Mish",
          "Relu", "Sigmoid", "Softplus", "Sqrt", "Tanh")  # fmt: skip
_BROADCAST = ("Add", "Concat", "Div", "Max", "Min", "Mul", "PRelu", "Pow", "Sub", "Sum")
_REDUCED = ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum")
_SPATIAL = ("dilations", "kernel_shape", "pads", "strides")


@dataclass(frozen=True)
class _Form:
    """How a tensor with one long axis is laid out: [N, C, L] or [N, C, L, 1].

    Attributes:
        rank: its rank.
        axes: where each axis is in [N, C, 1, L].
        to, back: operators and their constants that bring it there and back.
    """

    rank: int
    axes: tuple[int, ...]
    to: tuple[str, tuple[int, ...]]
    back: tuple[str, tuple[int, ...]]

    def has(self, shape: tuple[int | None, ...] | None) -> bool:
        return shape is not None and len(shape) == self.rank and (self.rank == 3 or shape[3] == 1)

    def spatial(self, values: Iterable[int], fill: int) -> list[int]:
        """One number for each spatial axis: in the order of rows; ``fill`` for the new axis."""
        long, *other = values
        return [other[0] if other else fill, long]


_FORMS = (
    _Form(3, (0, 1, 3), ("Unsqueeze", (2,)), ("Squeeze", (2,))),
    _Form(4, (0, 1, 3, 2), ("Reshape", (0, 0, 1, -1)), ("Reshape", (0, 0, -1, 1))),
)


def in_rows(ed: Editor) -> None:
    """[N, C, L] and [N, C, L, 1] are [N, C, 1, L] from a Conv on, as far as operators take that.

    Where none of the convolutions has more than one tap, which are as fast as they are, all stays.
    """
    for form in _FORMS:
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
         for a in n.attribute if a.name in _SPATIAL}
        for m in (model, quantized)
    )  # fmt: skip
    return any(
        len(rows) == 2 * len(other) or (key[1] != "pads" and rows != other == rows[::-1])
        for key, rows in mine.items()
        if (other := others.get(key))
    )


def _inside(ed: Editor, form: _Form) -> dict[Node, None]:
    """Convolutions and what follows them, where one of those connected has several taps."""
    part: dict[Node, Node] = {}  # → another one of the same part, or itself

    def first(node: Node) -> Node:
        while part[node] is not node:
            part[node] = node = part[part[node]]
        return node

    for node in ed.nodes():
        if not _takes(ed, form, node):
            continue
        makers = [m for n in _data(ed, node) if (m := ed.maker(n)) in part and m is not None]
        if node.op == "Conv" or makers:
            part[node] = node
            for maker in makers:
                part[first(maker)] = node
    long = {first(n) for n in part if n.op == "Conv" and _has_taps(ed, n)}
    return {n: None for n in part if first(n) in long}


def _has_taps(ed: Editor, conv: Node) -> bool:
    """Whether a Conv has several, along an axis that is long."""
    shape = ed.shape(conv.input(0)) or ()
    return prod(ed.constants[conv.input(1)].dims[2:]) > 1 and shape[2] != 1


def _data(ed: Editor, node: Node) -> list[str]:
    """The inputs that have the form."""
    names = node.inputs if node.op in _BROADCAST else node.inputs[:1]
    return [n for n in names if n not in ed.constants]


def _takes(ed: Editor, form: _Form, node: Node) -> bool:
    """Whether an operator can work on rows."""
    if node.op not in _TURNED or node.captures:
        return False
    data = _data(ed, node)
    others = {n for n in node.inputs if n} - set(data)
    if not data or "" in node.outputs or any(n not in ed.constants for n in others):
        return False
    if len(node.outputs) > 1 and node.op != "Split":
        return False
    formed = all(form.has(ed.shape(n)) for n in (*data, *node.outputs))
    return formed and _TURNED[node.op].fits(ed, form, node)


class _Turning:
    """Turns some nodes into the form of rows.

    Args:
        ed: the graph.
        form: that they have.
        inside: the nodes, makers before readers.
    """

    def __init__(self, ed: Editor, form: _Form, inside: Mapping[Node, None]) -> None:
        self.ed, self.form, self.inside = ed, form, inside
        self.rows: dict[str, str] = {}  # tensor → the same as rows

    def turn(self) -> None:
        for node in self.inside:
            _TURNED[node.op].turn(self.ed, self.form, node)
            for slot, name in enumerate(node.inputs[: None if node.op in _BROADCAST else 1]):
                if name not in self.ed.constants:
                    self.ed.set_input(node, slot, self._row(name, node))
            for name in node.outputs:
                self._make(name, node)

    def _row(self, name: str, reader: Node) -> str:
        """The tensor as rows; made before its reader, if it comes from outside."""
        if self._is_point(name):
            self.rows[name] = name
        if name not in self.rows:
            row = self._new(name)
            self.ed.add_before(reader, self._moved(self.form.to, name, row))
        return self.rows[name]

    def _make(self, name: str, node: Node) -> None:
        """Note that a node makes rows; and bring them back for who reads them as they were."""
        ed, users = self.ed, self.ed.users(name)
        inside = name not in ed.outputs and all(u in self.inside for u in users)
        if inside or self._is_point(name):
            shape = ed.shape(name)
            ed.set_type(name, ed.elem_type(name), self._shape(shape or ()))
            self.rows[name] = name
            return
        row = self._new(name)
        ed.set_output(node, name, row)
        ed.set_type(row, ed.elem_type(name), self._shape(ed.shape(name) or ()))
        ed.add_after(node, self._moved(self.form.back, row, name))

    def _is_point(self, name: str) -> bool:
        """Whether a tensor is in rows as it is: [N, C, 1, 1]."""
        return (self.ed.shape(name) or ())[2:] == (1, 1)

    def _new(self, name: str) -> str:
        row = self.rows[name] = self.ed.fresh(f"{name}_row")
        self.ed.set_type(row, self.ed.elem_type(name), self._shape(self.ed.shape(name) or ()))
        return row

    def _shape(self, shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return (shape[0], shape[1], 1, shape[2])

    def _moved(self, how: tuple[str, tuple[int, ...]], x: str, y: str) -> onnx.NodeProto:
        op, values = how
        axes = self.ed.add_constant(f"{y}_{op}", np.array(values, np.int64))
        return self.ed.new_node(op, [x, axes], [y], self.ed.fresh(f"{y}_{op}"))


# What becomes of each operator


@dataclass(frozen=True)
class _Turned:
    """Whether a node whose tensors have the form can work on rows, and what it changes for that."""

    fits: Callable[[Editor, _Form, Node], bool]
    turn: Callable[[Editor, _Form, Node], None]


def _always(ed: Editor, form: _Form, node: Node) -> bool:
    return True


def _nothing(ed: Editor, form: _Form, node: Node) -> None:
    pass


def _window_fits(ed: Editor, form: _Form, node: Node) -> bool:
    """A window of one column, without padding beside it."""
    if form.rank == 3:
        return True
    kernel = (
        ed.constants[node.input(1)].dims[2:] if node.op == "Conv" else node.attr("kernel_shape")
    )
    pads = node.attr("pads", [0] * 4)
    return kernel[1] == 1 and not (pads[1] or pads[3])


def _turn_window(ed: Editor, form: _Form, node: Node) -> None:
    for name in _SPATIAL:
        values = node.attr(name)
        if values is None:
            continue
        if name == "pads":
            half = len(values) // 2
            made = [*form.spatial(values[:half], 0), *form.spatial(values[half:], 0)]
        else:
            made = form.spatial(values, 1)
        node.set_attr(name, made)
    if node.op == "Conv":
        _turn_constant(ed, node, 1)


def _turn_constant(ed: Editor, node: Node, slot: int) -> None:
    """[a, b, c] and [a, b, c, 1] become [a, b, 1, c]."""
    name = node.input(slot)
    value = ed.array(name)
    assert value is not None  # noqa: S101 -- what is not constant does not come here
    shape = (value.shape[0], value.shape[1], 1, value.shape[2])
    if ed.only_user(name) is not None:
        ed.set_constant(name, value.reshape(shape))
    else:
        ed.set_input(node, slot, ed.add_constant(f"{name}_row", value.reshape(shape)))


def _constants_fit(ed: Editor, form: _Form, node: Node) -> bool:
    dims = [tuple(ed.constants[n].dims) for n in node.inputs if n in ed.constants]
    if node.op == "Concat":
        return all(form.has(d) for d in dims)
    return all(len(d) <= form.rank and (form.rank == 3 or d[-1:] in ((), (1,))) for d in dims)


def _turn_constants(ed: Editor, form: _Form, node: Node) -> None:
    for slot, name in enumerate(node.inputs):
        value = ed.array(name)
        if value is None or value.size == 1:
            continue
        whole: Array = value.reshape((1,) * (form.rank - value.ndim) + value.shape)
        shape = (whole.shape[0], whole.shape[1], 1, whole.shape[2])
        ed.set_input(node, slot, ed.add_constant(f"{name}_row", whole.reshape(shape)))


def _turn_concat(ed: Editor, form: _Form, node: Node) -> None:
    _turn_axis(ed, form, node)
    _turn_constants(ed, form, node)


def _turn_axis(ed: Editor, form: _Form, node: Node) -> None:
    node.set_attr("axis", form.axes[node.attr("axis", 0) % form.rank])


def _axes_fit(ed: Editor, form: _Form, node: Node) -> bool:
    slot = 3 if node.op == "Slice" else 1
    axes = ed.array(node.input(slot)) if node.input(slot) else None
    return axes is not None and axes.size > 0 and bool(node.attr("keepdims", 1))


def _turn_axes(ed: Editor, form: _Form, node: Node) -> None:
    slot = 3 if node.op == "Slice" else 1
    axes = ed.array(node.input(slot))
    assert axes is not None  # noqa: S101 -- they fit
    turned = np.array(form.axes, axes.dtype)[axes % form.rank]
    ed.set_input(node, slot, ed.add_constant(f"{node.name}_axes", turned))


def _pads_fit(ed: Editor, form: _Form, node: Node) -> bool:
    return not node.input(3)


def _turn_pads(ed: Editor, form: _Form, node: Node) -> None:
    pads = ed.array(node.input(1))
    assert pads is not None  # noqa: S101 -- all but the data is constant
    turned = np.zeros((2, 4), np.int64)
    turned[:, form.axes] = pads.reshape(2, form.rank)
    ed.set_input(node, 1, ed.add_constant(f"{node.name}_pads", turned.reshape(-1)))


_TURNED: Mapping[str, _Turned] = {
    **dict.fromkeys(_ALIKE, _Turned(_always, _nothing)),
    **dict.fromkeys(_BROADCAST, _Turned(_constants_fit, _turn_constants)),
    **dict.fromkeys(_REDUCED, _Turned(_axes_fit, _turn_axes)),
    **dict.fromkeys(("AveragePool", "Conv", "MaxPool"), _Turned(_window_fits, _turn_window)),
    "Concat": _Turned(_constants_fit, _turn_concat),
    "Pad": _Turned(_pads_fit, _turn_pads),
    "Slice": _Turned(_axes_fit, _turn_axes),
    "Split": _Turned(_always, _turn_axis),
}
