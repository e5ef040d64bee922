"""Where tensors change their layout: between blocks of channels, channels first and channels last.

Float convolutions of onnxruntime work on blocks of 16 channels. Pools, activations and sums behind
them keep that layout; everything else wants the plain one, so the runtime puts a reorder between.
Integer convolutions want the channels last. What is decided here is only where such a change has
to be paid if a node is on one side; ``place`` puts that into the cut.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qdq.facts import BLOCK
from qdq.joined import Joined
from qdq.placement.units import Unit

__all__ = ["NOBODY", "Layouts", "layouts_of"]

_ALIGNED = 4  # channels that a blocked kernel wants a multiple of
_ACTIVATIONS = frozenset({"Clip", "HardSigmoid", "LeakyRelu", "Relu", "Sigmoid", "Tanh"})
_APART = frozenset({"AveragePool", "BatchNormalization", "GlobalAveragePool", "MaxPool"})
_SUMS = frozenset({"Add", "Mul"})
_PIXELWISE = _ACTIVATIONS | _SUMS | {"Concat", "Resize"}
# value by value: whatever the layout is, they keep it
_STEADY = _ACTIVATIONS | _SUMS | {
    "Abs", "Celu", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSwish", "Identity", "Mish", "Neg",
    "Pow", "Selu", "Softplus", "Softsign", "Sqrt", "Sub",
}  # fmt: skip
NOBODY = -1  # in place of a convolution

Shape = tuple[int | None, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layouts:
    """Changes of layout; units are indices into the tuple that was given.

    Attributes:
        blocked: tensors that a float run has in blocks → the convolution whose kernel, with what
            is fused into it, hands them out; ``NOBODY`` for kernels of their own.
        undone: blocked tensor → the float convolution that pays for the plain copy which readers
            on either side need: a reader that does not know blocks wants it itself, or its Q does.
        wanted: plain tensor → the convolutions that read it in blocks, if they are float.
        pushed: (convolution, Resize) with the integer convolution's channels-last layout in front
            of the float Resize, and a convolution behind it that wants it again. onnxruntime then
            leaves out the two transposes, and its Resize is several times slower.
        islands: units that are float in any case and work value by value → the number of their
            island. All of it has one layout: that of the integer convolutions around it, where
            no transposes are needed, or the plain one.
    """

    blocked: dict[str, int]
    undone: dict[str, int]
    wanted: dict[str, tuple[int, ...]]
    pushed: tuple[tuple[int, int], ...]
    islands: dict[int, int]


def layouts_of(
    units: tuple[Unit, ...], shape: Callable[[str], Shape], outputs: Iterable[str]
) -> Layouts:
    """Find the changes of layout, in one pass over the units for each kind.

    Args:
        units: of the model, in graph order.
        shape: tensor → shape, all numbers.
        outputs: of the model, which are plain.
    """
    blocked = _blocked(units, shape)
    plain = set(outputs)
    wanted: dict[str, list[int]] = {}
    for k, unit in enumerate(units):
        read = [t.name for t in unit.view.inputs if t.name]
        if unit.outputs[0] not in blocked:
            plain.update((*read, *unit.others))
        elif unit.view.op_type == "Conv":
            if _reads_plain(unit, shape):
                plain.add(read[0])
            elif read[0] not in blocked:
                wanted.setdefault(read[0], []).append(k)
    return Layouts(
        blocked=blocked,
        undone={t: k for t, k in blocked.items() if t in plain and k != NOBODY},
        wanted={tensor: tuple(found) for tensor, found in wanted.items()},
        pushed=tuple(_pushed(units, shape)),
        islands=_islands(units, shape),
    )


def _blocked(units: tuple[Unit, ...], shape: Callable[[str], Shape]) -> dict[str, int]:
    """Tensor → the convolution whose kernel, with what is fused into it, hands it out in blocks.

    ``NOBODY`` for the results of pools, normalizations and residual sums, which have a kernel of
    their own.
    """
    found: dict[str, int] = {}
    for k, unit in enumerate(units):
        op, out = unit.view.op_type, unit.outputs[0]
        read = [t.name for t in unit.view.inputs if t.name]
        if op == "Conv":
            if _has_blocks(unit, shape):
                found[out] = k
        elif op in _ACTIVATIONS and read[0] in found:
            found[out] = found[read[0]]
        elif op in _APART and read[0] in found:
            found[out] = NOBODY
        elif op in _SUMS and all(t in found and shape(t) == shape(out) for t in read):
            makers = {found[t] for t in read}
            found[out] = makers.pop() if len(makers) == 1 else NOBODY
    return found


def _has_blocks(unit: Unit, shape: Callable[[str], Shape]) -> bool:
    """Whether the float kernel of a Conv is the blocked one: images, channels that are aligned."""
    weight = shape(unit.view.inputs[1].name)
    if weight is None or len(weight) != 4:
        return False
    channels = _channels(unit, shape)
    aligned = channels % _ALIGNED == 0
    if unit.view.integer("group", 1) > 1:
        return aligned and (weight[0] or 1) % _ALIGNED == 0
    return aligned or channels < _ALIGNED


def _reads_plain(unit: Unit, shape: Callable[[str], Shape]) -> bool:
    """Whether it has less than one block of input channels, in one group."""
    return unit.view.integer("group", 1) == 1 and _channels(unit, shape) < BLOCK


def _channels(unit: Unit, shape: Callable[[str], Shape]) -> int:
    """Input channels of a Conv."""
    weight = shape(unit.view.inputs[1].name) or (1, 1)
    return (weight[1] or 1) * unit.view.integer("group", 1)


def _pushed(units: tuple[Unit, ...], shape: Callable[[str], Shape]) -> Iterable[tuple[int, int]]:
    """Pairs for ``Layouts.pushed``."""
    leads = _lead_to_convolutions(units)
    root: dict[str, int] = {}
    for k, unit in enumerate(units):
        op, out = unit.view.op_type, unit.outputs[0]
        if op == "Conv" and unit.demand is not None and len(shape(out) or ()) == 4:
            root[out] = k
        elif op in _PIXELWISE:
            made = next((root[t.name] for t in unit.view.inputs if t.name in root), None)
            if made is None:
                continue
            root[out] = made
            if op == "Resize" and unit.view.text("mode", "nearest") == "nearest" and out in leads:
                yield made, k


def _islands(units: tuple[Unit, ...], shape: Callable[[str], Shape]) -> dict[int, int]:
    """Units for ``Layouts.islands``: those that hand values to each other are one island."""
    joined = Joined[int]()
    made: dict[str, int] = {}
    for k, unit in enumerate(units):
        sizes = {shape(t.name) for t in unit.view.inputs if t.name and not t.constant}
        image = len(shape(unit.outputs[0]) or ()) == 4 and sizes == {shape(unit.outputs[0])}
        if unit.demand is None and unit.view.op_type in _STEADY and image:
            joined.add(k)
            for t in unit.view.inputs:
                if t.name in made:
                    joined.join(made[t.name], to=k)
            made[unit.outputs[0]] = k
    return {k: joined.first(k) for k in joined}


def _lead_to_convolutions(units: tuple[Unit, ...]) -> set[str]:
    """Tensors that reach a convolution that may be integer, through nodes that keep the layout."""
    leads: set[str] = set()
    for unit in reversed(units):
        if unit.view.op_type == "Conv" and unit.demand is not None:
            leads.add(unit.view.inputs[0].name)
        elif unit.view.op_type in _PIXELWISE and not leads.isdisjoint(unit.outputs):
            leads.update(t.name for t in unit.view.inputs if t.name)
    return leads
