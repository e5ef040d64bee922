"""Prices for placement: what a node costs on either side, and what a border costs.

Time comes from ``costs`` (measured). On top of it every integer kernel that is there only to
keep an island together (elementwise, pooling, merging) pays ``noise`` for each element that it
rounds to 8 bits once more: a Lagrange multiplier between time and accuracy, in ns per element.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite, prod

from qdq.ops.demand import Demand, NodeView, SameAs
from qdq.placement import costs
from qdq.placement.mincut import INFINITE
from qdq.subpixel import Subpixel, form_of

__all__ = ["Shape", "Shapes", "Weighing", "count", "features_of", "kind_of"]

Shape = tuple[int | None, ...] | None
Shapes = Callable[[str], Shape]
UNKNOWN_COUNT = 4096  # elements of a tensor whose size nobody knows before a run
_PRODUCTS = frozenset({"Gemm", "MatMul"})


def count(shape: Shape) -> int:
    """Number of elements; unknown dimensions count as 1, an unknown rank as a small tensor."""
    return UNKNOWN_COUNT if shape is None else prod(d or 1 for d in shape)


def _with_layout(cost: Callable[..., float], shape: Shape, conv: bool) -> tuple[int, int]:
    elements, blocked = count(shape), _in_blocks(shape) if conv else 0
    alone = round(cost(elements, blocked=blocked))
    image = shape is not None and len(shape) == 4
    return alone, round(cost(elements, blocked=blocked, int8_conv=image)) - alone


def _in_blocks(shape: Shape) -> int:
    """Number of elements in the blocked layout of float convolutions."""
    channels = (shape[1] or 1) if shape is not None and len(shape) > 1 else 1
    return costs.in_blocks(count(shape), channels)


def kind_of(
    view: NodeView, shapes: Shapes, *, silu: bool = False, signed_right: bool = False
) -> str:
    """The row of the cost table for a node.

    Args:
        view: the node.
        shapes: tensor → its shape.
        silu: it is a Mul that closes x * Sigmoid(x).
        signed_right: products of two activations may have their right factor in int8.
    """
    match view.op_type:
        case "Conv":
            return _conv_kind(view, shapes)
        case "ConvTranspose" | "DepthToSpace":
            return _subpixel_kind(view)
        case "MatMul":
            if view.inputs[1].constant:
                return "MatMul"
            return _product_kind(view, shapes) if signed_right else "MatMul.dynamic"
        case "Gather" if view.inputs[0].constant:
            return "Gather.table"
        case "Transpose":
            return "Transpose.runs" if _run(view, shapes) in costs.SLOW_RUNS else "Transpose"
        case "Add" | "Mul" if len(view.inputs) == 2:
            return "Mul.silu" if silu else _pair_kind(view, shapes)
    return view.op_type


def _product_kind(view: NodeView, shapes: Shapes) -> str:
    """Of a MatMul of two activations, by the type of its right factor."""
    pays = costs.signed_pays(features_of(view, view.outputs, shapes))
    return "MatMul.signed" if pays else "MatMul.dynamic"


def _conv_kind(view: NodeView, shapes: Shapes) -> str:
    weight = shapes(view.inputs[1].name) or ()
    groups = view.integer("group", 1)
    channels = (weight[1] or 1) * groups if len(weight) > 1 else groups
    made, taps = weight[0] if weight else 1, prod(_known(weight[2:]))
    return costs.conv_kind(
        channels_in=channels,
        channels_out=made or 1,
        groups=groups,
        taps=taps,
        rank=len(weight) or 4,
    )


def _subpixel_kind(view: NodeView) -> str:
    """With a suffix for how it runs on integers: the convolution's, or that it moves rows."""
    form = form_of(view)
    if isinstance(form, str):
        return view.op_type
    if view.op_type == "DepthToSpace":
        return "DepthToSpace.rows"
    weight = _known(view.inputs[1].shape or ())
    kind = costs.conv_kind(
        channels_in=weight[0],
        channels_out=form.phases * form.channels,
        groups=1,
        taps=prod(form.taps),
        rank=len(weight),
    )
    return kind.replace("Conv", view.op_type, 1)


def _pair_kind(view: NodeView, shapes: Shapes) -> str:
    """Of an Add or Mul, by what is widened."""
    small = min(count(shapes(t.name)) for t in view.inputs)
    large = max(count(shapes(t.name)) for t in view.inputs)
    if small == 1 and large > 1:
        return f"{view.op_type}.scalar"
    return f"{view.op_type}.channel" if small < large else view.op_type


def _run(view: NodeView, shapes: Shapes) -> int:
    """How many values a Transpose keeps side by side: the product of the last axes that stay."""
    shape = _known(shapes(view.inputs[0].name) or ())
    order = view.attributes.get("perm")
    if not isinstance(order, list | tuple) or len(order) != len(shape):
        return 1
    moved = [axis for axis, source in enumerate(order) if axis != source]
    return prod(shape[moved[-1] + 1 :]) if moved else prod(shape)


def _known(dims: tuple[int | None, ...]) -> tuple[int, ...]:
    return tuple(d or 1 for d in dims)


def features_of(view: NodeView, outputs: tuple[str, ...], shapes: Shapes) -> costs.Features:
    """The counts that the cost of a node depends on."""
    made = sum(count(shapes(o)) for o in outputs)
    read = max((count(shapes(t.name)) for t in view.inputs if t.name and not t.constant), default=0)
    sizes = costs.Features(inputs=read, outputs=made)
    shape = (shapes(outputs[0]) or ()) if outputs else ()
    if view.op_type == "Conv":
        return _conv_features(view, sizes, shapes, flat=len(shape) == 4 and shape[-1] == 1)
    if view.op_type == "ConvTranspose":
        return _conv_transpose_features(view, sizes, shapes)
    if view.op_type in costs.RECURRENT:
        return _recurrent_features(view, sizes, shapes)
    if view.op_type == "Attention":
        return _attention_features(view, sizes, shapes)
    if view.op_type in _PRODUCTS:
        right = _known(shapes(view.inputs[1].name) or (1, 1))
        depth, width = right[-2:] if len(right) > 1 else (1, 1)
        return replace(sizes, channels_in=depth, channels_out=width, weights=prod(right))
    if view.op_type == "Gather":
        sizes = replace(sizes, channels_out=prod(_known(view.inputs[0].shape or ())[1:]))
    if view.op_type == "DepthToSpace":
        form = form_of(view)
        return replace(sizes, rows=1 if isinstance(form, str) else form.run)
    window = view.attributes.get("kernel_shape")
    taps = prod(window) if isinstance(window, list | tuple) else 1
    return replace(sizes, taps=taps, beside_conv=len(shape) == 4)


def _conv_features(
    view: NodeView, sizes: costs.Features, shapes: Shapes, *, flat: bool
) -> costs.Features:
    weight = _known(shapes(view.inputs[1].name) or (1, 1))
    groups = view.integer("group", 1)
    return replace(
        sizes,
        channels_in=weight[1] * groups,
        channels_out=weight[0],
        taps=prod(weight[2:]),
        rows=prod(weight[2:-1]),
        groups=groups,
        flat=flat,
        weights=prod(weight),
    )


def _conv_transpose_features(
    view: NodeView, sizes: costs.Features, shapes: Shapes
) -> costs.Features:
    weight = _known(shapes(view.inputs[1].name) or (1, 1))
    form = form_of(view)
    own = Subpixel(weight[1], ()) if isinstance(form, str) else form
    return replace(
        sizes,
        channels_in=weight[0],
        channels_out=own.phases * own.channels,
        taps=prod(own.taps),
        rows=own.run,
        weights=prod(weight),
    )


def _recurrent_features(view: NodeView, sizes: costs.Features, shapes: Shapes) -> costs.Features:
    weights = sum(count(shapes(t.name)) for t in view.inputs[1:3])
    steps = _known((shapes(view.inputs[0].name) or (1, 1))[:2])
    hidden = prod(_known((shapes(view.inputs[2].name) or (1,))[::2]))  # of all directions
    return replace(
        sizes,
        outputs=prod(steps) * hidden,
        channels_in=max(1, weights // hidden),
        channels_out=prod(steps[1:]) * hidden,  # so a position is a step
        rows=hidden,
    )


def _attention_features(view: NodeView, sizes: costs.Features, shapes: Shapes) -> costs.Features:
    """Those of its scores: each is a product, and a factor of another."""
    query, key = (_known(shapes(t.name) or (1, 1, 1)) for t in view.inputs[:2])
    apart = len(query) == 4
    rows, columns = query[-2], key[-2]
    heads = query[1] if apart else view.integer("q_num_heads", 1)
    width = query[-1] if apart else max(1, query[-1] // heads)
    return replace(
        sizes,
        outputs=query[0] * heads * rows * columns,
        channels_in=2 * width,
        channels_out=columns,
    )


def _int8_ns(kind: str, features: costs.Features) -> float:
    return costs.int8_cost("Mul" if kind == "Mul.silu" else kind, features)


@dataclass(frozen=True, slots=True)
class Weighing:
    """Prices in ns, as whole numbers, so that a placement is the same everywhere.

    Attributes:
        noise: price of one more rounding to 8 bits, in ns per element.
        least: price in ns that every such rounding has at least, so that tiny tensors (the
            softmax over two classes at the end of a model) are not rounded for a microsecond.
        dynamic: whether kernels may round their activations by themselves: what that does to the
            outputs has to be measured.
        price: ns per unit of ``harm``.
        harm: tensor → what its rounding does to the outputs (``qdq.placement.rating``); the first
            weight of a dynamic kernel stands for all that this one rounds.
    """

    noise: float = 0.08
    least: float = 2000.0
    dynamic: bool = False
    price: float = 0.0
    harm: Mapping[str, float] = field(default_factory=dict)

    @property
    def plain(self) -> tuple[object, ...]:
        """All but the prices on harm."""
        return self.noise, self.least, self.dynamic

    def float(self, kind: str, features: costs.Features) -> int:
        """A node on the float side."""
        if kind == "Mul.silu":  # onnxruntime makes x * Sigmoid(x) one kernel, already paid
            return 0
        return round(costs.float_cost(kind, features))

    def stranded(self, kind: str, features: costs.Features) -> int:
        """What an integer kernel takes longer right behind a Q, where data is channels-first."""
        if not features.beside_conv:
            return 0
        alone = _int8_ns(kind, replace(features, beside_conv=False))
        return max(0, round(alone - _int8_ns(kind, features))) if isfinite(alone) else 0

    def time(self, kind: str, features: costs.Features) -> int:
        """The time of a node on the integer side; INFINITE where there is no kernel."""
        price = _int8_ns(kind, features)
        return round(price) if isfinite(price) else INFINITE

    def integer(self, kind: str, features: costs.Features, demand: Demand) -> int:
        """A node on the integer side, time and accuracy; INFINITE where there is no kernel."""
        price = _int8_ns(kind, features)
        if not isfinite(price) or (demand.dynamic and not self.dynamic):
            return INFINITE
        if demand.apart:
            return self.time(kind, features)
        if demand.weight is None and not isinstance(demand.output, SameAs):
            price += self.least + self.noise * features.outputs
        return round(price)

    def harmful(self, tensor: str) -> int:
        """What the rounding of a tensor costs, whoever does it."""
        return round(self.price * self.harm.get(tensor, 0.0))

    def quantize(self, shape: Shape, *, behind_conv: bool) -> tuple[int, int]:
        """A QuantizeLinear, and the change to channels last that an image needs besides.

        ``behind_conv``: its float input comes from a blocked Conv.
        """
        return _with_layout(costs.quantize_cost, shape, behind_conv)

    def dequantize(self, shape: Shape, *, before_conv: bool) -> tuple[int, int]:
        """A DequantizeLinear, and the change of layout; ``before_conv``: a float Conv reads it."""
        return _with_layout(costs.dequantize_cost, shape, before_conv)

    def reorder(self, shape: Shape) -> int:
        """A change between the plain layout and that of the float convolutions."""
        return round(costs.reorder_cost(_in_blocks(shape)))
