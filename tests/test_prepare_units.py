"""Activations and normalizations in their usual spellings become one operator."""

import math

import numpy as np
import onnx
import pytest
from harness import older
from models import model, node, retyped, rng
from onnx import helper, shape_inference
from prepared import check, only, ops, run

from qdq.prepare import prepare

K = {
    "half": np.float32(0.5),
    "one": np.float32(1),
    "two": np.float32(2),
    "three": np.float32(3),
    "six": np.float32(6),
    "sixth": np.float32(1 / 6),
    "zero": np.float32(0),
    "root2": np.float32(math.sqrt(2)),
    "iroot2": np.float32(1 / math.sqrt(2)),
    "cubic": np.float32(0.044715),
    "tanh": np.float32(math.sqrt(2 / math.pi)),
    "five": np.float32(5),
}


@pytest.fixture
def unraised(monkeypatch) -> None:
    """The converter knows no other opset than that of the model."""

    def refuse(net, version):
        raise RuntimeError(f"no adapter to {version}")

    monkeypatch.setattr(onnx.version_converter, "convert_version", refuse)


def unit(*steps: tuple[str, str, str], shape=(2, 3, 8), constants=None, opset=21):
    """A model from rows (op, inputs, output), which reads x and hands out y."""
    nodes = [node(op, inputs.split(), out) for op, inputs, out in steps]
    read = {i for n in nodes for i in n.input}
    values = {k: v for k, v in {**K, **(constants or {})}.items() if k in read}
    feeds = {i: shape for i in ("x", "z") if i in read}
    return model(nodes, feeds, {"y": list(shape)}, values, opset)


HARD_SWISH = {
    "op": [("HardSwish", "x", "y")],
    "mul then div": [
        ("Add", "x three", "a"), ("Clip", "a zero six", "b"), ("Mul", "x b", "c"),
        ("Div", "c six", "y"),
    ],
    "mul then mul": [
        ("Add", "three x", "a"), ("Clip", "a zero six", "b"), ("Mul", "b x", "c"),
        ("Mul", "sixth c", "y"),
    ],
    "div then mul": [
        ("Add", "x three", "a"), ("Clip", "a zero six", "b"), ("Div", "b six", "c"),
        ("Mul", "x c", "y"),
    ],
    "scaled first": [
        ("Div", "x six", "a"), ("Add", "a half", "b"), ("Clip", "b zero one", "c"),
        ("Mul", "x c", "y"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("steps", HARD_SWISH.values(), ids=HARD_SWISH)
def test_hard_swish(steps) -> None:
    made = check(unit(*steps))
    assert ops(made) == {"HardSigmoid": 1, "Mul": 1}
    gate = {a.name: a.f for a in only(made, "HardSigmoid").attribute}
    assert gate == pytest.approx({"alpha": 1 / 6, "beta": 0.5})


SWISH = pytest.mark.skipif(older("1.24"), reason="no opset that has Swish")


@SWISH
@pytest.mark.parametrize("alpha", [1.0, 1.702, None])
def test_swish(alpha) -> None:
    swish = {} if alpha is None else {"alpha": alpha}
    net = model([node("Swish", ["x"], "y", **swish)], {"x": [2, 3, 8]}, {"y": [2, 3, 8]}, {}, 24)
    made = check(net)
    assert ops(made) == {"Sigmoid": 1, "Mul": 2 if alpha == 1.702 else 1}


@SWISH
def test_swish_of_float64() -> None:
    """Its alpha has 24 bits, as the attribute."""
    swish = node("Swish", ["x"], "y", alpha=1.702)
    net = model([swish], {"x": [2, 3, 8]}, {"y": [2, 3, 8]}, {}, 24)
    made = check(retyped(net, np.float64), tol=1e-12)
    assert ops(made) == {"Sigmoid": 1, "Mul": 2}


MISH = [("Softplus", "x", "s"), ("Tanh", "s", "t"), ("Mul", "x t", "y")]


@pytest.mark.parametrize("product", ["x t", "t x"])
@pytest.mark.parametrize("opset", [11, 17, 18, 21])
def test_mish(product, opset) -> None:
    made = check(unit(*MISH[:2], ("Mul", product, "y"), opset=opset))
    assert ops(made) == {"Mish": 1}


@pytest.mark.parametrize(
    "steps",
    [[*MISH[:2], ("Mul", "s t", "y")], [*MISH[:2], ("Mul", "z t", "y")],
     [*MISH[:2], ("Add", "x t", "y")], [MISH[0], ("Sigmoid", "s", "t"), MISH[2]],
     [*MISH[:2], ("Mul", "x t", "m"), ("Add", "m s", "y")]],
    ids=["another factor", "another input", "a sum", "another gate", "read inside"],
)  # fmt: skip
def test_what_is_not_mish_stays(steps) -> None:
    assert ops(check(unit(*steps)))["Mish"] == 0


SPELLED = {"Softplus": 1, "Tanh": 1, "Mul": 1}


def test_mish_of_float64_stays() -> None:
    assert ops(prepare(retyped(unit(*MISH), np.float64))) == SPELLED  # the runtime has no kernel


def test_hard_swish_of_opset_11() -> None:
    nodes = [
        node("Add", ["x", "three"], "a"),
        node("Clip", ["a", "zero", "six"], "b"),
        node("Mul", ["x", "b"], "c"),
        node("Div", ["c", "six"], "y"),
    ]
    constants = {k: K[k] for k in ("three", "zero", "six")}
    made = check(model(nodes, {"x": [4]}, {"y": [4]}, constants, opset=11))
    assert ops(made) == {"HardSigmoid": 1, "Mul": 1}


def test_the_gate_of_another_tensor() -> None:
    made = check(unit(
        ("Add", "x three", "a"), ("Clip", "a zero six", "b"), ("Mul", "z b", "c"),
        ("Div", "c six", "y"),
    ))  # fmt: skip
    assert ops(made) == {"HardSigmoid": 1, "Mul": 1}


NOT_HARD = {
    "other divisor": [
        ("Add", "x three", "a"), ("Clip", "a zero six", "b"), ("Div", "b five", "y"),
    ],
    "dividend": [("Add", "x three", "a"), ("Clip", "a one six", "b"), ("Div", "six b", "y")],
    "not from zero": [
        ("Add", "x three", "a"), ("Clip", "a one six", "b"), ("Div", "b six", "y"),
    ],
    "clip read twice": [
        ("Add", "x three", "a"), ("Clip", "a zero six", "b"), ("Div", "b six", "c"),
        ("Add", "b c", "y"),
    ],
    "an offset alone": [("Add", "x half", "a"), ("Clip", "a zero one", "y")],
}  # fmt: skip


@pytest.mark.parametrize("steps", NOT_HARD.values(), ids=NOT_HARD)
def test_what_is_not_a_hard_sigmoid_stays(steps) -> None:
    made = check(unit(*steps))
    assert len(made.graph.node) == len(steps)


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
@pytest.mark.parametrize(
    ("shape", "axis"), [((2, 5, 4, 9), 1), ((3, 40, 7, 6), -3), ((6, 8, 32), 1), ((2, 3, 40), 0)]
)
def test_softmax_over_an_axis_that_is_not_the_last(shape, axis, opset) -> None:
    made = check(
        model([node("Softmax", ["x"], "y", axis=axis)], {"x": shape}, {"y": shape}, opset=opset)
    )
    assert ops(made) == {"ReduceMax": 1, "Sub": 1, "Exp": 1, "ReduceSum": 1, "Div": 1}


@pytest.mark.parametrize("opset", [17, 18, 21])
@pytest.mark.usefixtures("unraised")
def test_a_softmax_in_parts_survives_large_values(opset) -> None:
    net = model([node("Softmax", ["x"], "y", axis=1)], {"x": [1, 4, 40]}, {"y": [1, 4, 40]}, {},
                opset)  # fmt: skip
    x = np.full((1, 4, 40), -np.inf, np.float32)
    x[:, 2], x[:, 3, ::2] = 3e38, -3e38
    x[:, 2, 5] = -7.0  # far below what is beside it
    made = check(net, feed={"x": x})
    assert "Softmax" not in ops(made)
    assert np.isfinite(run(made, {"x": x})[0]).all()


@pytest.mark.parametrize(
    ("shape", "axis"), [((2, 8, 40), -1), ((2, 8, 40), 2), ((2, 40, 5, 6), 1), ((2, 40, 1, 1), 1)]
)
def test_softmax_over_the_last_axis_or_with_little_behind_stays(shape, axis) -> None:
    net = model([node("Softmax", ["x"], "y", axis=axis)], {"x": shape}, {"y": shape})
    assert ops(check(net)) == {"Softmax": 1}


def test_softmax_with_sizes_that_are_not_known() -> None:
    shape = ["n", 16, 4, "boxes"]
    made = check(model([node("Softmax", ["x"], "y", axis=1)], {"x": shape}, {"y": shape}))
    assert "Softmax" not in ops(made)


def shuffle(
    x=(1, 12, 4, 5), split=(1, 3, 4, 4, 5), perm=(0, 2, 1, 3, 4), y=(1, 12, 4, 5), declared=None
):
    nodes = [
        node("Reshape", ["x", "split"], "a"),
        node("Transpose", ["a"], "b", perm=list(perm)),
        node("Reshape", ["b", "back"], "y"),
    ]
    constants = {"split": np.array(split, np.int64), "back": np.array(y, np.int64)}
    return model(nodes, {"x": declared or list(x)}, {"y": declared or list(y)}, constants)


SHUFFLES = {
    "plain": shuffle(),
    "open batch": shuffle(split=(-1, 3, 4, 4, 5), y=(-1, 12, 4, 5), declared=["n", 12, 4, 5]),
    "of a sequence": shuffle((2, 6, 7), (2, 2, 3, 7), (0, 2, 1, 3), (2, 6, 7)),
}
NOT_SHUFFLED = {
    "another order": shuffle(perm=(0, 2, 1, 4, 3)),
    "another shape": shuffle(y=(1, 12, 5, 4)),
    "other parts": shuffle(split=(1, 3, 4, 2, 10), y=(1, 12, 2, 10)),
    "open image": shuffle(
        split=(1, 3, 4, -1, 5), y=(1, 12, -1, 5), declared=[1, 12, "h", 5]
    ),
}  # fmt: skip


@pytest.mark.parametrize("net", SHUFFLES.values(), ids=SHUFFLES)
def test_a_channel_shuffle_is_a_gather(net) -> None:
    made = check(net, tol=0)
    assert ops(made) == {"Gather": 1}


@pytest.mark.parametrize("net", NOT_SHUFFLED.values(), ids=NOT_SHUFFLED)
def test_what_is_not_a_channel_shuffle_stays(net) -> None:
    assert "Transpose" in ops(check(net))


def test_a_shuffle_whose_middle_is_read_stays() -> None:
    net = shuffle()
    net.graph.output.append(helper.make_tensor_value_info("b", 1, [1, 4, 3, 4, 5]))
    assert "Transpose" in ops(check(net))


GELU = {
    "x first": [("Mul", "x e1", "m"), ("Mul", "m half", "y")],
    "half last, divided": [("Mul", "e1 x", "m"), ("Div", "m two", "y")],
    "half first": [("Mul", "x half", "m"), ("Mul", "m e1", "y")],
    "half with the sum": [("Mul", "half e1", "m"), ("Mul", "x m", "y")],
}
ARGUMENT = {
    "div": [("Div", "x root2", "a"), ("Erf", "a", "e")],
    "mul": [("Mul", "iroot2 x", "a"), ("Erf", "a", "e")],
    "tanh, pow": [
        ("Pow", "x three", "p"), ("Mul", "p cubic", "q"), ("Add", "x q", "r"),
        ("Mul", "r tanh", "a"), ("Tanh", "a", "e"),
    ],
    "tanh, mul": [
        ("Mul", "x x", "p2"), ("Mul", "x p2", "p"), ("Mul", "cubic p", "q"), ("Add", "q x", "r"),
        ("Mul", "tanh r", "a"), ("Tanh", "a", "e"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("tail", GELU.values(), ids=GELU)
@pytest.mark.parametrize("argument", ARGUMENT.values(), ids=ARGUMENT)
@pytest.mark.parametrize("opset", [17, 21])
def test_gelu(argument, tail, opset) -> None:
    made = check(unit(*argument, ("Add", "one e", "e1"), *tail, opset=opset))
    assert ops(made) == {"Gelu": 1}
    tanh = any(op == "Tanh" for op, *_ in argument)
    assert only(made, "Gelu").attribute[0].s == (b"tanh" if tanh else b"none")


NOT_GELU = {
    "other root": [("Div", "x two", "a"), ("Erf", "a", "e"), ("Add", "e one", "e1")],
    "other sum": [("Div", "x root2", "a"), ("Erf", "a", "e"), ("Add", "e two", "e1")],
    "other factor": [("Div", "z root2", "a"), ("Erf", "a", "e"), ("Add", "e one", "e1")],
}


@pytest.mark.parametrize("steps", NOT_GELU.values(), ids=NOT_GELU)
def test_what_is_not_a_gelu_stays(steps) -> None:
    made = check(unit(*steps, *GELU["x first"]))
    assert ops(made)["Gelu"] == 0


def test_gelu_with_another_reader_inside_stays() -> None:
    steps = [*ARGUMENT["div"], ("Add", "e one", "e1"), ("Mul", "x e1", "m"), ("Mul", "m half", "n")]
    made = check(unit(*steps, ("Add", "n m", "y")))
    assert ops(made)["Gelu"] == 0


def layer_norm(opset=21, power="Pow", axes=-1, width=8, epsilon=1e-5, scale=None):
    r = rng(4)
    constants = {
        "two": np.float32(2),
        "eps": np.float32(epsilon),
        "g": r.standard_normal(width).astype(np.float32) if scale is None else scale,
        "b": r.standard_normal(width).astype(np.float32),
    }

    def mean(x: str, y: str):
        if opset >= 18:
            constants["axes"] = np.array([axes])
            return node("ReduceMean", [x, "axes"], y)
        return node("ReduceMean", [x], y, axes=[axes])

    nodes = [
        mean("x", "m"),
        node("Sub", ["x", "m"], "d"),
        node("Pow", ["d", "two"], "p") if power == "Pow" else node("Mul", ["d", "d"], "p"),
        mean("p", "v"),
        node("Add", ["v", "eps"], "ve"),
        node("Sqrt", ["ve"], "sd"),
        node("Div", ["d", "sd"], "q"),
        node("Mul", ["g", "q"], "h"),
        node("Add", ["h", "b"], "y"),
    ]
    if power != "Pow":
        del constants["two"]
    return model(nodes, {"x": [2, 3, width]}, {"y": [2, 3, width]}, constants, opset)


@pytest.mark.parametrize("opset", [11, 17, 21])
@pytest.mark.parametrize("power", ["Pow", "Mul"])
@pytest.mark.parametrize("axes", [-1, 2])
def test_layer_norm(opset, power, axes) -> None:
    made = check(layer_norm(opset, power, axes, epsilon=0.03))
    assert ops(made) == {"LayerNormalization": 1}
    values = {a.name: helper.get_attribute_value(a) for a in made.graph.node[0].attribute}
    assert values == pytest.approx({"axis": -1, "epsilon": 0.03})


def test_a_layer_norm_read_inside_stays() -> None:
    net = layer_norm()
    net.graph.output.append(helper.make_tensor_value_info("ve", 1, [2, 3, 1]))
    assert ops(check(net))["LayerNormalization"] == 0


def layer_norm_by_factor(mean="ReduceMean", scale=(1, 1, 8), bias=(8,), negated=True, of="m"):
    """As TensorFlow has it: ``x r + (b - mean(x) r)``, with ``r = g / sqrt(…)``."""
    r = rng(4)
    constants = {"eps": np.float32(0.03), "axes": np.array([-1])}
    axes = ["axes"] if mean == "ReduceMean" else []
    nodes = [
        node(mean, ["x", *axes], "m"),
        node("Sub", ["x", "m"], "d"),
        node("Mul", ["d", "d"], "p"),
        node(mean, ["p", *axes], "v"),
        node("Add", ["v", "eps"], "ve"),
        node("Sqrt", ["ve"], "sd"),
        node("Reciprocal", ["sd"], "i"),
        node("Mul", ["i", "g"], "r"),
        node("Mul", ["x", "r"], "h"),
        node("Neg", [of], "n"),
        node("Mul", ["n" if negated else of, "r"], "k"),
    ]
    if bias is not None:
        nodes.append(node("Add", ["k", "b"], "s") if negated else node("Sub", ["b", "k"], "s"))
        constants["b"] = r.standard_normal(bias).astype(np.float32)
    last = "k" if bias is None else "s"
    nodes.append(node("Add" if negated or bias else "Sub", ["h", last], "y"))
    if scale is None:
        nodes = [n for n in nodes if n.output[0] != "r"]
        for n in nodes:
            n.input[:] = ["i" if name == "r" else name for name in n.input]
    else:
        constants["g"] = r.standard_normal(scale).astype(np.float32)
    used = {name for n in nodes for name in n.input}
    made = [n for n in nodes if n.output[0] in used | {"y"}]
    constants = {k: v for k, v in constants.items() if k in used}
    return model(made, {"x": [2, 3, 8]}, {"y": [2, 3, 8]}, constants)


@pytest.mark.parametrize("negated", [True, False])
@pytest.mark.parametrize("mean", ["ReduceMean", "GlobalAveragePool"])
@pytest.mark.parametrize("scale", [None, (8,), (1, 1, 8)], ids=str)
@pytest.mark.parametrize("bias", [None, (8,), (1, 8)], ids=str)
def test_layer_norm_by_a_factor(mean, scale, bias, negated) -> None:
    made = check(layer_norm_by_factor(mean, scale, bias, negated), tol=1e-5)
    assert ops(made) == {"LayerNormalization": 1}
    assert len(made.graph.node[0].input) == 2 + (bias is not None)


def test_a_layer_norm_of_doubles_without_a_scale() -> None:
    """The scale of ones that it gets is of doubles, too."""
    made = check(retyped(layer_norm_by_factor(scale=None), np.float64), tol=1e-5)
    assert ops(made) == {"LayerNormalization": 1}


@pytest.mark.parametrize(
    "net",
    [
        lambda: layer_norm(axes=1),
        lambda: layer_norm(scale=np.float32(2)),
        lambda: layer_norm(scale=rng(1).standard_normal((3, 8)).astype(np.float32)),
        lambda: layer_norm_by_factor(scale=(3, 8)),
        lambda: layer_norm_by_factor(scale=(1,)),
        lambda: layer_norm_by_factor(bias=(3, 1)),
        lambda: layer_norm_by_factor(of="v"),
    ],
    ids=["other axis", "one scale", "scale per row", "factor per row", "one factor",
         "bias per row", "another mean"],
)  # fmt: skip
def test_what_is_not_a_layer_norm_stays(net) -> None:
    assert ops(check(net()))["LayerNormalization"] == 0


@pytest.mark.parametrize("inside", ["d", "sd", "i", "r", "h", "k", "s"])
def test_a_layer_norm_by_a_factor_read_inside_stays(inside: str) -> None:
    net = layer_norm_by_factor()
    net.graph.output.append(helper.make_tensor_value_info(inside, 1, None))
    assert ops(prepare(net))["LayerNormalization"] == 0


def softmax_over_rows(opset: int) -> onnx.ModelProto:
    shape = [2, 5, 40]
    return model([node("Softmax", ["x"], "y", axis=1)], {"x": shape}, {"y": shape}, {}, opset)


def gelu_in_steps(opset: int) -> onnx.ModelProto:
    return unit(*ARGUMENT["div"], ("Add", "one e", "e1"), *GELU["x first"], opset=opset)


@pytest.mark.parametrize(
    ("net", "op", "since"),
    [(lambda opset: unit(*MISH, opset=opset), "Mish", 18), (gelu_in_steps, "Gelu", 20),
     (layer_norm, "LayerNormalization", 17), (softmax_over_rows, "ReduceMax", 13)],
    ids=["mish", "gelu", "layer norm", "softmax"],
)  # fmt: skip
@pytest.mark.parametrize("opset", [16, 17, 18, 19, 20])
@pytest.mark.usefixtures("unraised")
def test_a_model_that_cannot_be_raised_has_what_its_opset_has(net, op, since, opset) -> None:
    assert ops(check(net(opset)))[op] == (opset >= since)


GROUPED = {name: rng(k).normal(size=6).astype(np.float32) for k, name in enumerate("sb")}


def grouped(shape, groups, opset=21, **constants):
    norm = node("GroupNormalization", ["x", "s", "b"], "g", num_groups=groups, epsilon=0.1)
    nodes = [norm, node("Relu", ["g"], "y")]
    inputs = {"x": shape, **{k: [6] for k in ("s", "b") if constants.get(k, 0) is None}}
    values = {**GROUPED, **constants}
    return model(nodes, inputs, {"y": [None] * len(shape)},
                 {k: v for k, v in values.items() if v is not None}, opset)  # fmt: skip


@pytest.mark.parametrize("shape", [[2, 6, 5], [2, 6, 4, 3], ["n", 6, 4, "w"], [1, 6, 2, 3, 2]])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm_is_instance_norm(shape, groups) -> None:
    made = check(grouped(shape, groups), tol=1e-4)
    (found,) = [a.f for a in only(made, "InstanceNormalization").attribute]
    assert found == np.float32(0.1)
    measured = groups < 6 and None in [None if isinstance(d, str) else d for d in shape]
    whole = {"InstanceNormalization": 1, "Relu": 1}
    apart = {"Reshape": 2, "Mul": 1, "Add": 1} if groups < 6 else {}
    assert ops(made) == whole | apart | ({"Shape": 1} if measured else {})
    shapes = {v.name: v.type.tensor_type.shape.dim for v in made.graph.value_info}
    assert [d.dim_value or d.dim_param for d in shapes["g"]][1:] == shape[1:]


@pytest.mark.parametrize(
    "net",
    [grouped([2, 6], 2), grouped([2, 6, 4], 2, s=None), grouped([2, 6, 4], 2, b=None),
     grouped([2, "c", 4], 2)],
    ids=["no space", "scale is computed", "bias is computed", "channels are not known"],
)  # fmt: skip
def test_another_group_norm_stays(net) -> None:
    feed = {v.name: rng(3).normal(size=[d.dim_value or 6 for d in v.type.tensor_type.shape.dim])
            .astype(np.float32) for v in net.graph.input}  # fmt: skip
    assert ops(check(net, tol=1e-4, feed=feed)) == {"GroupNormalization": 1, "Relu": 1}


def test_a_group_norm_has_a_default_epsilon() -> None:
    """Of a variance of 1e-6 it is most."""
    for groups in (2, 6):
        net = grouped([2, 6, 4], groups)
        del net.graph.node[0].attribute[:]
        net.graph.node[0].attribute.append(helper.make_attribute("num_groups", groups))
        x = 1e-3 * rng(3).normal(size=(2, 6, 4)).astype(np.float32)
        assert ops(check(net, tol=1e-4, feed={"x": x}))["InstanceNormalization"] == 1


def test_a_group_norm_of_float64_stays() -> None:
    """onnxruntime has no InstanceNormalization for it."""
    made = check(retyped(grouped([2, 6, 4], 2), np.float64), tol=1e-12)
    assert ops(made) == {"GroupNormalization": 1, "Relu": 1}


def test_shapes_behind_group_norms_are_known_at_once(monkeypatch) -> None:
    """onnx does not infer them, and models have many in a row."""
    real, calls = shape_inference.infer_shapes, []
    monkeypatch.setattr(
        shape_inference, "infer_shapes", lambda *a, **k: calls.append(1) or real(*a, **k)
    )

    def inferences(count: int) -> int:
        calls.clear()
        norms = [
            node("GroupNormalization", [f"x{k}", "s", "b"], f"x{k + 1}", num_groups=2)
            for k in range(count)
        ]
        shape = [2, 6, 4]
        parts = [*norms, node("Relu", [f"x{count}"], "y")]
        net = model(parts, {"x0": shape, "s": [6]}, {"y": [None] * 3}, {"b": GROUPED["b"]})
        types = {v.name: v.type.tensor_type for v in prepare(net).graph.value_info}
        assert [d.dim_value for d in types[f"x{count}"].shape.dim] == shape
        return len(calls)

    assert inferences(40) == inferences(1)


@pytest.mark.parametrize("last", [False, True], ids=["by number", "by -1"])
@pytest.mark.parametrize("shape", [[2, 3, 8], ["N", "T", 8], [4, 8]])
def test_softmax_of_old_opsets_stays_one_node(shape, last) -> None:
    axis = -1 if last else len(shape) - 1
    net = model([node("Softmax", ["x"], "y", axis=axis)], {"x": shape}, {"y": shape}, opset=11)
    assert ops(check(net)) == {"Softmax": 1}


def wrapped_softmax(axis: int, op: str = "Softmax"):
    """As above, but the opset converter does not know the rank and wraps the node."""
    nodes = [
        node("Concat", ["front", "back"], "target", axis=0),
        node("Reshape", ["x", "target"], "h"),
        node(op, ["h"], "s", axis=axis),
        node("Relu", ["s"], "y"),
    ]
    constants = {"front": np.array([2]), "back": np.array([3, 8])}
    return model(nodes, {"x": [6, 8]}, {"y": [2, 3, 8]}, constants, opset=11)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("axis", [-1, 2])
def test_a_wrapped_softmax_is_unwrapped(axis, op) -> None:
    assert ops(check(wrapped_softmax(axis, op))) == {"Reshape": 1, op: 1, "Relu": 1}


def test_a_wrapped_softmax_over_several_axes_stays_wrapped() -> None:
    assert len(check(wrapped_softmax(1)).graph.node) > 3


def test_softmax_over_several_axes_keeps_its_reshapes() -> None:
    net = model([node("Softmax", ["x"], "y", axis=1)], {"x": [2, 3, 4]}, {"y": [2, 3, 4]}, opset=11)
    assert ops(check(net))["Softmax"] == 1


def prelu(slopes, shape=(2, 16, 3, 3)):
    return unit(("PRelu", "x slope", "y"), shape=shape, constants={"slope": np.float32(slopes)})


def slopes(low: float, high: float, channels: int = 16):
    return np.linspace(low, high, channels, dtype=np.float32)[:, None, None]


@pytest.mark.parametrize(("low", "high"), [(0.1, 0.3), (-0.5, 1), (-9, 3)])
def test_prelu_is_written_out(low: float, high: float) -> None:
    net = prelu(slopes(low, high))
    made = check(net)
    assert ops(made) == {"Relu": 1, "Mul": 2, "Add": 1}
    feed = {"x": np.float32(rng(0).normal(size=(2, 16, 3, 3)) * 1e3)}
    assert np.allclose(run(net, feed)[0], run(made, feed)[0], rtol=1e-5, atol=0)


def test_two_prelus_share_a_slope() -> None:
    steps = [("PRelu", "x slope", "a"), ("PRelu", "a slope", "y")]
    made = check(unit(*steps, shape=(2, 16, 3, 3), constants={"slope": slopes(0.1, 0.2)}))
    assert ops(made) == {"Relu": 2, "Mul": 4, "Add": 2}


@pytest.mark.parametrize("one", [[0.25], np.full((3, 1), 0.25), np.full((3, 1), 3.0)])
def test_prelu_with_one_slope_is_leaky(one) -> None:
    made = check(prelu(one, shape=(2, 3, 8)), tol=0)
    assert ops(made) == {"LeakyRelu": 1}
    assert only(made, "LeakyRelu").attribute[0].f == np.float32(one).flat[0]


def test_prelu_stays_with_unknown_slopes_or_where_it_fills_no_blocks() -> None:
    assert ops(check(unit(("PRelu", "x z", "y"), shape=(2, 16, 3, 3)))) == {"PRelu": 1}
    assert ops(check(prelu(slopes(0.1, 0.2, 10), shape=(2, 10, 3, 3)))) == {"PRelu": 1}
    assert ops(check(prelu(slopes(0.1, 0.2)[:, 0], shape=(2, 16, 3)))) == {"PRelu": 1}


def test_a_gelu_whose_constants_add_an_axis_keeps_it() -> None:
    steps = [("Div", "x root2", "d"), ("Erf", "d", "e"), ("Add", "e ones", "f"),
             ("Mul", "x f", "g"), ("Mul", "g half", "y")]  # fmt: skip
    net = unit(*steps, shape=(2, 3), constants={"ones": np.ones((1, 1, 1), np.float32)})
    del net.graph.output[0].type.tensor_type.shape.dim[:]
    net.graph.output[0].type.tensor_type.ClearField("shape")
    assert run(check(net), {"x": np.ones((2, 3), np.float32)})[0].shape == (1, 2, 3)
