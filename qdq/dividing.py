"""The model that divides tensors channel by channel, and multiplies the weights behind them."""

import json
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from qdq.prepare.editing import Editor

__all__ = ["divided", "divided_like"]


def divided(
    model: onnx.ModelProto,
    products: Mapping[str, Sequence[str]],
    divisors: Mapping[str, NDArray[np.float32]],
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """A model that computes the same from divided tensors and multiplied weights.

    Args:
        model: the prepared model; it is not changed.
        products: tensor → names of the matrix products that read it (``divisible``); each has a
            weight of its own.
        divisors: tensor → divisors, (K,), powers of two; of some of the tensors in ``products``.

    Returns:
        The model, and tensor → name of the divided one.
    """
    own = onnx.ModelProto()
    own.CopyFrom(model)
    ed = Editor(own)
    nodes = {node.name: node for node in ed.nodes()}
    types = {v.name: v.type for v in (*model.graph.input, *model.graph.value_info)}
    factors: dict[str, NDArray[np.float32]] = {}
    names: dict[str, str] = {}
    for tensor, values in divisors.items():
        names[tensor] = name = ed.fresh(f"{tensor}_divided")
        inputs = [tensor, ed.add_constant(f"{tensor}_divisors", values)]
        label = ed.fresh(f"{tensor}_smoothing")
        ed.add_before(nodes[products[tensor][0]], helper.make_node("Div", inputs, [name], label))
        for product in products[tensor]:
            ed.set_input(nodes[product], 0, name)
            factors[nodes[product].inputs[1]] = values
        if tensor in types:
            own.graph.value_info.add(name=name).type.CopyFrom(types[tensor])
    ed.finish()
    for initializer in own.graph.initializer:
        if initializer.name in factors:
            weight = numpy_helper.to_array(initializer)
            scaled = (weight * factors[initializer.name][:, None]).astype(weight.dtype)
            initializer.CopyFrom(numpy_helper.from_array(scaled, initializer.name))
    return own, names


def divided_like(
    model: onnx.ModelProto, quantized: onnx.ModelProto
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The prepared model, divided as the metadata of its quantized one tell.

    Returns:
        As ``divided``; the model itself and nothing where the metadata do not fit it.
    """
    noted = {p.key: p.value for p in quantized.metadata_props}.get("qdq.smoothed", "[]")
    entries = json.loads(noted)
    nodes = {node.name for node in model.graph.node}
    if not entries or not all(n in nodes for e in entries for n in e["nodes"]):
        return model, {}
    products = {e["tensor"]: e["nodes"] for e in entries}
    divisors = {e["tensor"]: np.exp2(np.float32(e["exponents"])) for e in entries}
    return divided(model, products, divisors)
