"""What becomes of each operator whose tensors have one long axis, as rows of images."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from qdq.prepare.editing import Array, Editor, Node

__all__ = ["BROADCAST", "FORMS", "SPATIAL", "TURNED", "Form", "row_shape"]

T = TypeVar("T")

_ALIKE = ("BatchNormalization", "Clip", "Elu", "Erf", "Gelu", "GlobalAveragePool", "GlobalMaxPool",
          "HardSigmoid", "HardSwish", "Identity", "InstanceNormalization", "LeakyRelu", "Mish",
          "Relu", "Sigmoid", "Softplus", "Sqrt", "Tanh")  # fmt: skip
BROADCAST = ("Add", "Concat", "Div", "Max", "Min", "Mul", "PRelu", "Pow", "Sub", "Sum")
_REDUCED = ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum")
SPATIAL = ("dilations", "kernel_shape", "pads", "strides")
_TAPS = 5  # of depthwise convolutions; with fewer the changes of layout cost what is gained
_FOUR = 4  # channels; blocked depthwise kernels want multiples of them


@dataclass(frozen=True)
class Form:
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
        """Whether a tensor of that shape is laid out so."""
        return shape is not None and len(shape) == self.rank and (self.rank == 3 or shape[3] == 1)

    def spatial(self, values: Iterable[int], fill: int) -> list[int]:
        """One number for each spatial axis: in the order of rows; ``fill`` for the new axis."""
        long, *other = values
        return [other[0] if other else fill, long]


FORMS = (
    Form(3, (0, 1, 3), ("Unsqueeze", (2,)), ("Squeeze", (2,))),
    Form(4, (0, 1, 3, 2), ("Reshape", (0, 0, 1, -1)), ("Reshape", (0, 0, -1, 1))),
)


def row_shape(shape: tuple[T, ...]) -> tuple[T | int, ...]:
    """That of [a, b, c] and [a, b, c, 1] as rows, tensors or weights: [a, b, 1, c]."""
    return (shape[0], shape[1], 1, shape[2])


@dataclass(frozen=True)
class _Turned:
    """Whether a node whose tensors have the form can work on rows, and what it changes for that."""

    fits: Callable[[Editor, Form, Node], bool]
    turn: Callable[[Editor, Form, Node], None]


def _always(ed: Editor, form: Form, node: Node) -> bool:
    return True


def _nothing(ed: Editor, form: Form, node: Node) -> None:
    pass


def _conv_fits(ed: Editor, form: Form, node: Node) -> bool:
    """As ``in_rows`` says."""
    if form.rank == 4:
        return _window_fits(ed, form, node)
    channels, each, taps = ed.constants[node.input(1)].dims
    depthwise = node.attr("group", 1) == channels and each == 1
    return bool(depthwise and channels % _FOUR == 0 and taps >= _TAPS)


def _window_fits(ed: Editor, form: Form, node: Node) -> bool:
    """A window of one column, without padding beside it."""
    if form.rank == 3:
        return True
    of_conv = node.op == "Conv"
    window = ed.constants[node.input(1)].dims[2:] if of_conv else node.attr("kernel_shape")
    pads = node.attr("pads", [0] * 4)
    return window[1] == 1 and not (pads[1] or pads[3])


def _turn_window(ed: Editor, form: Form, node: Node) -> None:
    for name in SPATIAL:
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
    """Make a constant rows; under its own name, where nothing else reads it."""
    name = node.input(slot)
    value = ed.array(name)
    assert value is not None  # noqa: S101 -- what is not constant does not come here
    value = value.reshape(row_shape(value.shape))
    if ed.only_user(name) is not None:
        ed.set_constant(name, value)
    else:
        ed.set_input(node, slot, ed.add_constant(f"{name}_row", value))


def _constants_fit(ed: Editor, form: Form, node: Node) -> bool:
    dims = [tuple(ed.constants[n].dims) for n in node.inputs if n in ed.constants]
    if node.op == "Concat":
        return all(form.has(d) for d in dims)
    return all(len(d) <= form.rank and (form.rank == 3 or d[-1:] in ((), (1,))) for d in dims)


def _turn_constants(ed: Editor, form: Form, node: Node) -> None:
    for slot, name in enumerate(node.inputs):
        value = ed.array(name)
        if value is None or (value.size == 1 and node.op != "Concat"):
            continue
        whole: Array = value.reshape((1,) * (form.rank - value.ndim) + value.shape)
        row = whole.reshape(row_shape(whole.shape))
        ed.set_input(node, slot, ed.add_constant(f"{name}_row", row))


def _turn_concat(ed: Editor, form: Form, node: Node) -> None:
    _turn_axis(ed, form, node)
    _turn_constants(ed, form, node)


def _turn_axis(ed: Editor, form: Form, node: Node) -> None:
    node.set_attr("axis", form.axes[node.attr("axis", 0) % form.rank])


def _axes_slot(node: Node) -> int:
    return 3 if node.op == "Slice" else 1


def _axes_fit(ed: Editor, form: Form, node: Node) -> bool:
    axes = ed.array(node.input(_axes_slot(node)))
    return axes is not None and axes.size > 0 and bool(node.attr("keepdims", 1))


def _turn_axes(ed: Editor, form: Form, node: Node) -> None:
    slot = _axes_slot(node)
    axes = ed.array(node.input(slot))
    assert axes is not None  # noqa: S101 -- they fit
    turned = np.array(form.axes, axes.dtype)[axes % form.rank]
    ed.set_input(node, slot, ed.add_constant(f"{node.name}_axes", turned))


def _pads_fit(ed: Editor, form: Form, node: Node) -> bool:
    return not node.input(3)


def _turn_pads(ed: Editor, form: Form, node: Node) -> None:
    pads = ed.array(node.input(1))
    assert pads is not None  # noqa: S101 -- all but the data is constant
    turned = np.zeros((2, 4), np.int64)
    turned[:, form.axes] = pads.reshape(2, form.rank)
    ed.set_input(node, 1, ed.add_constant(f"{node.name}_pads", turned.reshape(-1)))


TURNED: Mapping[str, _Turned] = {
    **dict.fromkeys(_ALIKE, _Turned(_always, _nothing)),
    **dict.fromkeys(BROADCAST, _Turned(_constants_fit, _turn_constants)),
    **dict.fromkeys(_REDUCED, _Turned(_axes_fit, _turn_axes)),
    **dict.fromkeys(("AveragePool", "MaxPool"), _Turned(_window_fits, _turn_window)),
    "Conv": _Turned(_conv_fits, _turn_window),
    "Concat": _Turned(_constants_fit, _turn_concat),
    "Pad": _Turned(_pads_fit, _turn_pads),
    "Slice": _Turned(_axes_fit, _turn_axes),
    "Split": _Turned(_always, _turn_axis),
}
