"""Where layouts change, against what onnxruntime does, and what that does to a plan."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from harness import fused_ops, older
from models import feeds, model, node, weights

import qdq
from qdq.graph import Graph
from qdq.placement import units_of
from qdq.placement.costs import (
    Features,
    dequantize_cost,
    float_cost,
    int8_cost,
    quantize_cost,
    reorder_cost,
)
from qdq.placement.layout import Layouts, layouts_of
from qdq.placement.weighing import Weighing
from qdq.plan import make_plan
from qdq.prepare import prepare
from qdq.scheme import Scheme
from qdq.targets import ORT_CPU
from qdq.views import nominal_graph

SIDE = 12


def net(nodes: list[onnx.NodeProto], cin: int = 32, **constants: np.ndarray) -> onnx.ModelProto:
    """A model from ``x`` to ``y``."""
    return model(nodes, {"x": [1, cin, SIDE, SIDE]}, {"y": [1, None, None, None]}, constants)


def conv(x: str, y: str, w: str = "w", group: int = 1) -> onnx.NodeProto:
    return node("Conv", [x, w], y, group=group)


def layouts(made: onnx.ModelProto) -> tuple[Layouts, dict[str, int]]:
    prepared = prepare(made)
    graph = Graph(prepared)
    units = units_of(graph, ORT_CPU, {})
    found = layouts_of(units, nominal_graph(prepared).shape, graph.outputs)
    return found, {u.view.name: k for k, u in enumerate(units)}


W = weights(32, 32, 1, 1)
NETS = {
    "two in a row": net([conv("x", "a"), conv("a", "y")], w=W),
    "another operator between": net([conv("x", "a"), node("Erf", ["a"], "b"), conv("b", "y")],
                                    w=W),
    "relu, depthwise": net(
        [conv("x", "a"), node("Relu", ["a"], "b"), conv("b", "c", "d", 32), conv("c", "y")],
        w=W, d=weights(32, 1, 1, 1),
    ),
    "hard swish": net([conv("x", "a"), node("HardSigmoid", ["a"], "g"),
                       node("Mul", ["a", "g"], "b"), conv("b", "y")], w=W),
    "residual sum": net(
        [conv("x", "a"), conv("a", "b"), node("Add", ["a", "b"], "c"), conv("c", "y")], w=W
    ),
    "a reader of each kind": net(
        [conv("x", "a"), conv("a", "b"), node("Erf", ["a"], "e"), conv("e", "f"),
         node("Add", ["b", "f"], "y")], w=W,
    ),
    "three colours": net([conv("x", "a", "first"), conv("a", "y")], 3,
                         first=weights(32, 3, 1, 1), w=W),
    "few channels": net([conv("x", "a", "u"), conv("a", "y", "v")],
                        u=weights(12, 32, 1, 1), v=weights(32, 12, 1, 1)),
    "few channels, depthwise": net(
        [conv("x", "a", "u"), node("Erf", ["a"], "e"), conv("e", "b", "d", 8),
         node("Add", ["e", "b"], "y")], u=weights(8, 32, 1, 1), d=weights(8, 1, 1, 1),
    ),
    "ragged channels": net([conv("x", "a", "u"), conv("a", "y", "v")],
                           u=weights(18, 32, 1, 1), v=weights(32, 18, 1, 1)),
}  # fmt: skip


WITH_GATE = pytest.mark.skipif(older("1.25"), reason="products by a gate are not in blocks")


@pytest.mark.parametrize(
    "made",
    [pytest.param(n, marks=WITH_GATE if "swish" in k else (), id=k) for k, n in NETS.items()],
)
def test_onnxruntime_changes_the_layout_there(made: onnx.ModelProto) -> None:
    found, _ = layouts(made)
    ops = fused_ops(made)
    plain = {t for t in found.undone} | ({"y"} if "y" in found.blocked else set())
    assert ops["ReorderInput"] == len(found.wanted)
    assert ops["ReorderOutput"] == len(plain)


def test_a_float_model_costs_its_changes_of_layout() -> None:
    def float_time(made: onnx.ModelProto) -> int:
        prepared = prepare(made)
        weighing = Weighing(noise=0)
        return make_plan(
            prepared, Scheme(), target=ORT_CPU, source=made, weighing=weighing
        ).placement.float_time

    n = 32 * SIDE * SIDE
    apart = float_time(NETS["another operator between"]) - float_time(NETS["two in a row"])
    erf = float_cost("Erf", Features(inputs=n, outputs=n, beside_conv=True))
    assert apart == round(erf) + 2 * round(reorder_cost(n))


def resized(behind: str) -> onnx.ModelProto:
    nodes = [
        conv("x", "a"),
        node("Mul", ["a", "scale"], "s"),
        node("Resize", ["s", "", "twice"], "r", mode="nearest"),
        node("Concat", ["r", "r"], "m", axis=1),
        conv("m", "y", "v") if behind == "Conv" else node(behind, ["m"], "y"),
    ]
    scale = np.full((1, 32, 1, 1), 2, np.float32)
    twice = np.float32([1, 1, 2, 2])
    return net(nodes, w=W, v=weights(32, 64, 1, 1), scale=scale, twice=twice)


def test_a_float_resize_between_integer_convolutions_has_the_channels_last() -> None:
    found, index = layouts(resized("Conv"))
    assert found.pushed == ((index["Conv_a"], index["Resize_r"]),)
    assert layouts(resized("Erf"))[0].pushed == ()


VALUE_BY_VALUE = ("Abs", "Celu", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "Mish", "Neg", "Selu",
                  "Softplus", "Softsign", "Tanh")  # fmt: skip


@pytest.mark.parametrize("op", VALUE_BY_VALUE)
def test_what_works_value_by_value_keeps_the_layout_of_integer_convolutions(op: str) -> None:
    if op == "Elu" and older("1.30"):
        pytest.skip("transposes are not moved past it")
    made = net([conv("x", "a"), node(op, ["a"], "b"), conv("b", "y")], w=W)
    found, index = layouts(made)
    assert found.islands == {index[f"{op}_b"]: index[f"{op}_b"]}
    target = replace(ORT_CPU, weighs_costs=False)
    ops = fused_ops(qdq.quantize(made, feeds({"x": [1, 32, SIDE, SIDE]}, 2), target=target))
    assert (ops["QLinearConv"], ops["Transpose"]) == (2, 2)


def test_islands_end_where_values_mix_or_widen() -> None:
    nodes = [
        conv("x", "a"),
        node("HardSigmoid", ["a"], "g"),
        node("Mul", ["a", "g"], "s"),
        node("LpNormalization", ["s"], "m", axis=1),
        node("Tanh", ["m"], "t"),
        node("ReduceMax", ["t"], "r", axes=[2, 3]),
        node("Sub", ["t", "r"], "y"),
    ]
    made = model(nodes, {"x": [1, 32, SIDE, SIDE]}, {"y": [1, 32, SIDE, SIDE]}, {"w": W}, opset=17)
    found, index = layouts(made)
    assert found.islands.keys() == {index["HardSigmoid_g"], index["Mul_s"], index["Tanh_t"]}
    assert len(set(found.islands.values())) == 2


@pytest.mark.parametrize("inside", [True, False])
def test_an_island_costs_no_change_of_layout_between_integer_convolutions(inside: bool) -> None:
    """As the last node of the model its result is plain."""
    nodes = [conv("x", "a"), node("Tanh", ["a"], "b" if inside else "y")]
    shape = {name: [1, 128, 28, 28] for name in "xy"}
    more = [conv("b", "y")] if inside else []
    made = model([*nodes, *more], {"x": shape["x"]}, {"y": shape["y"]},
                 {"w": weights(128, 128, 1, 1)})  # fmt: skip
    weighing = Weighing(noise=0, least=0)
    plan = make_plan(prepare(made), Scheme(), target=ORT_CPU, source=made, weighing=weighing)
    assert set(plan.quantized) == ({"Conv_a", "Conv_y"} if inside else {"Conv_a"})
    n = 128 * 28 * 28
    features = Features(inputs=n, outputs=n, channels_in=128, channels_out=128, weights=128**2)
    kernel = int8_cost("Conv.pointwise", features)
    tanh = float_cost("Tanh", Features(inputs=n, outputs=n, beside_conv=True))
    into, out = quantize_cost(n, int8_conv=True), dequantize_cost(n, int8_conv=True)
    between = dequantize_cost(n) + tanh + quantize_cost(n) + kernel if inside else tanh
    assert plan.placement.time == pytest.approx(into + kernel + between + out, abs=8)


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("order", [[0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 1, 0], [2, 0, 1]])
def test_a_float_product_transposes_while_it_reads(order: list[int], clamp: bool) -> None:
    """onnxruntime makes one kernel of the two for some orders."""
    nodes = [
        node("Transpose", ["x"], "t", perm=order),
        node("MatMul", ["x", "t"], "p"),
        node("Relu" if clamp else "Erf", ["p"], "y"),
    ]
    made = model(nodes, {"x": [64, 64, 64]}, {"y": [64, 64, 64]})
    fused = order[0] != 2
    assert ("Transpose" in fused_ops(made)) != fused
    prepared = prepare(made)
    rest = model(nodes[1:], {"x": [64, 64, 64], "t": [64, 64, 64]}, {"y": [64, 64, 64]})
    time, alone = (make_plan(m, source=m).placement.float_time for m in (prepared, prepare(rest)))
    n = 64**3
    transpose = round(float_cost("Transpose", Features(inputs=n, outputs=n)))
    assert time - alone == (0 if fused else transpose)


def test_sizes_follow_arithmetic_on_shapes() -> None:
    """An exporter halves a length to reshape what a strided convolution makes (a conformer)."""
    constants = {
        "w": weights(16, 16, 3, 3),
        "one": np.array([1], np.int64),
        "two": np.array([2], np.int64),
        "three": np.array([3], np.int64),
        "zero": np.array([0], np.int64),
        "last": np.array([-1], np.int64),
    }
    nodes = [
        node("Conv", ["x", "w"], "c", strides=[2, 2]),
        node("Transpose", ["c"], "t", perm=[0, 2, 1, 3]),
        node("Shape", ["x"], "s"),
        node("Slice", ["s", "two", "three"], "length"),
        node("Sub", ["length", "three"], "less"),
        node("Div", ["less", "two"], "half"),
        node("Add", ["half", "one"], "steps"),
        node("Slice", ["s", "zero", "one"], "batch"),
        node("Concat", ["batch", "steps", "last"], "target", axis=0),
        node("Reshape", ["t", "target"], "r"),
        node("Erf", ["r"], "y"),
    ]
    made = model(nodes, {"x": [None, 16, None, 41]}, {"y": [None, None, None]}, constants)
    sizes = nominal_graph(prepare(made), {"x": (1, 16, 128, 41)})
    assert sizes.shape("y") == (1, 63, 320)
    assert sizes.shape("r") == (1, 63, 320)
