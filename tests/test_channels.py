"""Which tensors can have factors for their channels, and that such factors change nothing."""

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import pytest
from chains import Net, between, samples
from harness import FORCED, run
from models import model, node, weights
from onnx import TensorProto, helper

import qdq
from qdq.balancing.channels import Group, channel_groups
from qdq.balancing.dividing import divided
from qdq.plan import make_plan
from qdq.prepare import prepare
from qdq.targets import PORTABLE, Target


def groups_of(
    exact: onnx.ModelProto, target: Target = PORTABLE, **scheme: object
) -> tuple[onnx.ModelProto, tuple[Group, ...]]:
    prepared = prepare(exact)
    return prepared, channel_groups(prepared, make_plan(prepared, qdq.Scheme(**scheme), target))


def gate(op: str = "Sigmoid") -> Net:
    net = Net().linear("x", "a").op("Relu", "a", "r").op("GlobalAveragePool", "r", "g")
    net.linear("g", "h", size=1).op("Relu", "h", "hr").linear("hr", "k", size=1)
    return net.op(op, "k", "s").op("Mul", "r s", "m").linear("m", "y")


def resize(**attributes: object) -> Net:
    net = between(("Resize", "a roi scales", "m"), **attributes)
    net.constants["scales"] = np.float32([1, 1, 2, 2])
    net.constants["roi"] = np.float32([0, 0, 0.1, 0.1, 1, 1, 1.2, 1.2])
    return net


def prelu() -> Net:
    net = between(("PRelu", "a slope", "m"))
    net.constants["slope"] = np.random.default_rng(0).uniform(-0.5, 0.5, (8, 1, 1)).astype("f4")
    return net


def scaled(inputs: str) -> Net:
    net = between(("Mul", inputs, "s"), ("Max", "a s", "m"))
    net.constants["slope"] = np.random.default_rng(0).uniform(-0.5, 0.5, (8, 1, 1)).astype("f4")
    return net


def gemms(turned: int) -> Net:
    net = Net().linear("x", "a", "Gemm", transB=turned).op("Relu", "a", "r")
    return net.linear("r", "y", "Gemm", transB=turned)


TOGETHER = "Add Max Min Sub Sum"
TIED: dict[str, tuple[Callable[[], Net], list[str]]] = {
    "depthwise": (
        lambda: (
            Net()
            .linear("x", "a")
            .op("Relu", "a", "r")
            .linear("r", "d", apart=True)
            .op("Relu", "d", "m")
            .linear("m", "y", size=1)
        ),
        ["a r", "d m"],
    ),
    "residual": (
        lambda: (
            Net()
            .linear("x", "a")
            .op("Relu", "a", "r")
            .linear("r", "b")
            .op("Add", "r b", "m")
            .linear("m", "y")
        ),
        ["a b m r"],
    ),
    "PRelu": (prelu, ["a m"]),
    "by a constant": (lambda: scaled("a slope"), ["a m s"]),
    "a constant by it": (lambda: scaled("slope a"), ["a m s"]),
    "LeakyRelu": (lambda: between(("LeakyRelu", "a", "m"), alpha=0.1), ["a m"]),
    "MaxPool": (lambda: between(("MaxPool", "a", "m"), kernel_shape=[2, 2]), ["a m"]),
    "AveragePool": (lambda: between(("AveragePool", "a", "m"), kernel_shape=[3, 3]), ["a m"]),
    "GlobalAveragePool": (lambda: between(("GlobalAveragePool", "a", "m")), ["a m"]),
    "GlobalMaxPool": (lambda: between(("GlobalMaxPool", "a", "m")), ["a m"]),
    "gate": (gate, ["a g m r", "h hr"]),
    "nearest": (lambda: resize(mode="nearest"), ["a m"]),
    "bilinear": (lambda: resize(mode="linear"), ["a m"]),
    "transposed": (
        lambda: (
            Net()
            .linear("x", "a")
            .linear("a", "t", "ConvTranspose")
            .op("Relu", "t", "r")
            .linear("r", "d", "ConvTranspose", apart=True, strides=[2, 2])
            .linear("d", "y")
        ),
        ["a", "r t", "d"],
    ),
    "transB=0": (lambda: gemms(0), ["a r"]),
    "transB=1": (lambda: gemms(1), ["a r"]),
    **{
        op: (lambda op=op: Net().linear("x", "a").linear("x", "b").op(op, "a b", "m")
             .linear("m", "y"), ["a b m"])
        for op in TOGETHER.split()
    },
}  # fmt: skip


def names_of(groups: Sequence[Group]) -> list[str]:
    return [" ".join(sorted(g.tensors)) for g in groups]


def grown(prepared: onnx.ModelProto, groups: Sequence[Group], width: int = 8) -> onnx.ModelProto:
    r = np.random.default_rng(11)
    scaled = []
    for group in groups:
        factors = np.exp2(r.integers(0, 3, width)).astype(np.float32)
        scaled += [(constant, factors) for constant in group.makers]
        scaled += [(reader.weight, 1 / factors) for reader in group.readers]
    return divided(prepared, {}, {}, scaled)[0]


@pytest.mark.parametrize("name", TIED)
def test_factors_change_no_bit(name: str) -> None:
    net, wanted = TIED[name]
    shape = (4, 8) if "transB" in name else None
    prepared, groups = groups_of(net().model(shape=shape))
    assert sorted(names_of(groups)) == sorted(wanted)
    data = samples(prepared, 2)
    before = prepared.SerializeToString(deterministic=True)
    found = grown(prepared, groups)
    assert prepared.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(found, full_check=True)
    assert [n.name for n in found.graph.node] == [n.name for n in prepared.graph.node]
    values = {t.name: onnx.numpy_helper.to_array(t) for t in found.graph.initializer}
    changed = [
        t.name
        for t in prepared.graph.initializer
        if not np.array_equal(onnx.numpy_helper.to_array(t), values[t.name])
    ]
    assert len(changed) >= 3
    a, b = (run(m, data, fused=False) for m in (prepared, found))
    assert np.abs(a[0][0]).max() > 0
    for x, y in zip(a, b, strict=True):
        assert all(np.array_equal(u, v) for u, v in zip(x, y, strict=True))


def test_gates_of_any_kind() -> None:
    prepared, groups = groups_of(gate("HardSigmoid").model())
    assert names_of(groups)[:1] == ["a g m r"]
    x, y = (run(m, samples(prepared, 1), fused=False) for m in (prepared, grown(prepared, groups)))
    assert np.array_equal(x[0][0], y[0][0])


def clip() -> Net:
    net = between(("Clip", "a lo hi", "m"))
    net.constants |= {"lo": np.float32(0), "hi": np.float32(6)}
    return net


def shared_weight() -> Net:
    net = between(("Relu", "a", "m"))
    net.nodes.append(node("Conv", ["m", "w_y", "b_y"], "z", pads=[0] * 4))
    return net


def captured() -> onnx.ModelProto:
    net = between(("Relu", "a", "m"))
    net.constants["yes"] = np.array(True)
    value = helper.make_tensor_value_info("i", TensorProto.FLOAT, None)
    inner = [helper.make_node("Neg", ["m"], ["i"])]
    branch = helper.make_graph(inner, "branch", [], [value])
    net.nodes.append(node("If", ["yes"], "z", then_branch=branch, else_branch=branch))
    return net.model("y", "z")


def spread(last: int) -> Net:
    """An Add in which the second input has ``last`` channels."""
    net = Net().linear("x", "a").linear("x", "b")
    net.constants["w_b"], net.constants["b_b"] = weights(last, 8, 3, 3), np.zeros(last, np.float32)
    return net.op("Add", "a b", "m").linear("m", "y")


def grouped(rows: int) -> Net:
    net = between(("Relu", "a", "m"))
    net.constants["w_y"] = weights(rows, 4 if rows == 8 else 1, 3, 3)
    net.constants["b_y"] = np.zeros(rows, np.float32)
    net.nodes[-1].attribute.append(helper.make_attribute("group", 2 if rows == 8 else 8))
    return net


def concat() -> Net:
    net = Net().linear("x", "a").linear("x", "b").op("Concat", "a b", "m", axis=1)
    net.linear("m", "y")
    net.constants["w_y"] = weights(8, 16, 3, 3)
    return net


def constant_add(shape: tuple[int, ...]) -> Net:
    net = between(("Relu", "a", "r"), ("Add", "r c", "m"))
    net.constants["c"] = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return net


CROP = "tf_crop_and_resize"
LEFT_OUT: dict[str, Callable[[], onnx.ModelProto]] = {
    "output": lambda: between(("Relu", "a", "m")).model("y", "m"),
    "captured": captured,
    "shared weight": lambda: shared_weight().model("y", "z"),
    "upper limit": lambda: clip().model(),
    "Sigmoid": lambda: between(("Sigmoid", "a", "m")).model(),
    "SiLU": lambda: between(("Sigmoid", "a", "s"), ("Mul", "a s", "m")).model(),
    "SiLU turned": lambda: between(("Sigmoid", "a", "s"), ("Mul", "s a", "m")).model(),
    "gate of what is gated": lambda: (
        between(("Relu", "a", "r"), ("Sigmoid", "r", "s"), ("Mul", "a s", "m")).model()
    ),
    "Gelu": lambda: between(("Gelu", "a", "m")).model(),
    "square": lambda: between(("Mul", "a a", "m")).model(),
    "grouped": lambda: grouped(8).model(),
    "two outputs per channel": lambda: grouped(16).model(),
    "broadcast over channels": lambda: spread(1).model(),
    "Concat": lambda: concat().model(),
    "cropping Resize": lambda: resize(mode="nearest", coordinate_transformation_mode=CROP,
                                      extrapolation_value=1.0).model(),
    "another rank": lambda: constant_add((8, 8)).model(),
    "constant": lambda: constant_add((1, 8, 1, 1)).model(),
    "input": lambda: Net().linear("x", "y").model(),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_left_out(name: str) -> None:
    exact = LEFT_OUT[name]()
    _, groups = groups_of(exact)
    assert groups == ()


def test_broadcasting_over_places_is_no_obstacle() -> None:
    net = Net().linear("x", "a").op("GlobalMaxPool", "a", "g").linear("g", "b", size=1)
    prepared, groups = groups_of(net.op("Add", "a b", "m").linear("m", "y").model())
    assert names_of(groups) == ["a b g m"]
    x, y = (run(m, samples(prepared, 1), fused=False) for m in (prepared, grown(prepared, groups)))
    assert np.array_equal(x[0][0], y[0][0])


def test_products_of_three_axes_are_left_out() -> None:
    nodes = [
        node("MatMul", ["x", "w0"], "a"),
        node("Relu", ["a"], "r"),
        node("MatMul", ["r", "w1"], "y"),
    ]
    constants = {f"w{k}": weights(8, 8, seed=k) for k in range(2)}
    shape = [2, 5, 8]
    assert groups_of(model(nodes, {"x": shape}, {"y": shape}, constants))[1] == ()


def test_what_a_rule_sets_has_no_factors() -> None:
    exact = between(("Relu", "a", "m")).model()
    assert names_of(groups_of(exact)[1]) == ["a m"]
    for rule in (
        qdq.Rule(tensors="m", range=(0.0, 4.0)),
        qdq.Rule(tensors="m", dtype=qdq.INT8),
        qdq.Rule(tensors="w_y", per_channel=False),
        qdq.Rule(tensors="w_a", symmetric=True),
    ):
        assert groups_of(exact, rules=(rule,))[1] == ()


def test_only_where_something_is_rounded() -> None:
    exact = between(("Relu", "a", "m")).model()
    (group,) = groups_of(exact, FORCED)[1]
    assert group.rounded == ("m",)
    assert [(s.name, s.axis) for s in group.makers] == [("w_a", 0), ("b_a", 0)]
    ((read),) = group.readers
    assert (read.tensor, read.weight.name, read.weight.axis, read.outputs) == ("m", "w_y", 1, 0)
    for float_nodes in ("Conv_y", "Conv_.*"):
        rule = qdq.Rule(nodes=float_nodes, keep_float=True)
        assert groups_of(exact, FORCED, rules=(rule,))[1] == ()
