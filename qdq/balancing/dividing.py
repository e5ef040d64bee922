"""The model that divides tensors channel by channel, and multiplies the weights behind them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from qdq.light import without_large
from qdq.prepare.editing import Editor
from qdq.weights import read

__all__ = ["Scaled", "divided", "divided_like", "undivide"]


@dataclass(frozen=True, slots=True)
class Scaled:
    """A constant, and the axis of it that runs over the channels."""

    name: str
    axis: int


def divided(
    model: onnx.ModelProto,
    products: Mapping[str, Sequence[str]],
    divisors: Mapping[str, NDArray[np.float32]],
    scaled: Iterable[tuple[Scaled, NDArray[np.float32]]] = (),
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """A model that computes the same from divided tensors and multiplied weights.

    Args:
        model: the prepared model; it is not changed.
        products: tensor → names of the matrix products that read it (``divisible``); each has a
            weight of its own.
        divisors: tensor → divisors, (K,), powers of two; of some of the tensors in ``products``.
        scaled: further constants, and factors for their channels, powers of two; such that the
            model computes the same. Tensors that these scale keep their names.

    Returns:
        The model, and tensor → name of the divided one.
    """
    own = without_large(model, -1, as_inputs=False)
    weights = {t.name: t for t in model.graph.initializer}
    for t in model.graph.initializer:
        own.graph.initializer.add(name=t.name, data_type=t.data_type, dims=t.dims)
    ed = Editor(own, weights)
    nodes = {node.name: node for node in ed.nodes()}
    types = {v.name: v.type for v in (*model.graph.input, *model.graph.value_info)}
    factors = _Factors()
    names: dict[str, str] = {}
    for tensor, values in divisors.items():
        names[tensor] = name = ed.fresh(f"{tensor}_divided")
        inputs = [tensor, ed.add_constant(f"{tensor}_divisors", values)]
        label = ed.fresh(f"{tensor}_smoothing")
        ed.add_before(nodes[products[tensor][0]], helper.make_node("Div", inputs, [name], label))
        for product in products[tensor]:
            ed.set_input(nodes[product], 0, name)
            factors.put(nodes[product].inputs[1], 0, values)
        if tensor in types:
            own.graph.value_info.add(name=name).type.CopyFrom(types[tensor])
    for constant, values in scaled:
        factors.put(constant.name, constant.axis, values)
    ed.finish()
    factors.fill(own, weights)
    return own, names


class _Factors:
    """What each constant is multiplied with, axis by axis."""

    def __init__(self) -> None:
        self.found: dict[str, list[tuple[int, NDArray[np.float32]]]] = {}

    def put(self, name: str, axis: int, values: NDArray[np.float32]) -> None:
        self.found.setdefault(name, []).append((axis, values))

    def fill(self, model: onnx.ModelProto, weights: Mapping[str, onnx.TensorProto]) -> None:
        """Give the model's constants their data, once each: a message keeps what it has held."""
        for t in model.graph.initializer:
            if t.name in self.found:
                value = self.times(t.name, read(weights[t.name]))
                t.CopyFrom(numpy_helper.from_array(value, t.name))
            elif t.name in weights:
                t.CopyFrom(weights[t.name])

    def times(self, name: str, value: NDArray[np.floating]) -> NDArray[np.floating]:
        for axis, values in self.found[name]:
            by = values.reshape(-1, *(1,) * (value.ndim - 1 - axis))
            value = (value * by).astype(value.dtype, copy=False)
        return value


def divided_like(
    model: onnx.ModelProto, quantized: onnx.ModelProto
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The prepared model, divided as the metadata of its quantized one tell.

    Returns:
        As ``divided``; the model itself and nothing where the metadata do not fit it.
    """
    noted = {p.key: p.value for p in quantized.metadata_props}
    smoothed = json.loads(noted.get("qdq.smoothed", "[]"))
    equalized = json.loads(noted.get("qdq.equalized", "[]"))
    known = {node.name for node in model.graph.node} | {t.name for t in model.graph.initializer}
    touched = [n for e in smoothed for n in e["nodes"]]
    touched += [name for e in equalized for name, _ in (*e["multiplied"], *e["divided"])]
    if not touched or not known.issuperset(touched):
        return model, {}
    products = {e["tensor"]: e["nodes"] for e in smoothed}
    divisors = {e["tensor"]: np.exp2(np.float32(e["exponents"])) for e in smoothed}
    scaled = [
        (Scaled(name, axis), np.exp2(sign * np.float32(e["exponents"])))
        for e in equalized
        for sign, constants in ((1, e["multiplied"]), (-1, e["divided"]))
        for name, axis in constants
    ]
    return divided(model, products, divisors, scaled)


def undivide(
    model: onnx.ModelProto, products: Mapping[str, Sequence[str]], tensors: Iterable[str]
) -> None:
    """Take the division of some tensors back, in place, where float products read them.

    Args:
        model: an emitted model.
        products: tensor → names of the products that read it divided.
        tensors: those that no integer product reads. Powers of two come back bit for bit.
    """
    idle = {product for name in tensors for product in products[name]}
    if not idle:
        return
    made = {o: node for node in model.graph.node for o in node.output}
    constants = {t.name: t for t in model.graph.initializer}
    gone: dict[str, str] = {}
    for node in model.graph.node:
        if node.name not in idle:
            continue
        division = made[node.input[0]]
        weight, by = constants[node.input[1]], read(constants[division.input[1]])
        value = (read(weight) / by.reshape(-1, 1)).astype(np.float32)
        weight.CopyFrom(numpy_helper.from_array(value, weight.name))
        node.input[0] = division.input[0]
        gone[division.name] = division.input[1]
    for kept, names in ((model.graph.node, gone.keys()), (model.graph.initializer, gone.values())):
        for index in reversed([k for k, item in enumerate(kept) if item.name in names]):
            del kept[index]
