"""Convolutions over one axis, as rows."""

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from harness import FORCED, compare, fused_ops
from hypothesis import given, settings
from hypothesis import strategies as st
from models import feeds, ints, model, node, vec, weights
from numpy.typing import NDArray
from prepared import check, only, ops

import qdq
from qdq import Rule, Scheme
from qdq.api import run
from qdq.graph import Graph
from qdq.modelio import load
from qdq.prepare import prepare
from qdq.prepare.rows import in_rows, rows_differ
from qdq.report.matching import match

LINE, COLUMN = "[N, C, L]", "[N, C, L, 1]"
FORMS = pytest.mark.parametrize("form", [LINE, COLUMN])


def spatial(form: str, values: Sequence[int], fill: int) -> list[int]:
    """One number for each spatial axis."""
    if form == LINE:
        return list(values)
    return [v for pair in zip(values, [fill] * len(values), strict=True) for v in pair]


def shape(form: str, *sizes: int | str | None) -> list[int | str | None]:
    return [*sizes, *([] if form == LINE else [1])]


def conv(
    form: str, x: str, w: str, y: str, pads: Sequence[int] = (2, 2), group: int = 8, **attrs
) -> onnx.NodeProto:
    given = {k: spatial(form, [v], 1) for k, v in attrs.items() if k in ("strides", "dilations")}
    given |= {k: v for k, v in attrs.items() if k not in given}
    return node("Conv", [x, w], y, pads=spatial(form, pads, 0), group=group, **given)


def net(
    form: str,
    middle: Sequence[onnx.NodeProto],
    constants: dict[str, NDArray] | None = None,
    length: int | None = 20,
    out: int | None = 20,
    last: str = "m",
) -> onnx.ModelProto:
    """A depthwise Conv from x to a, the middle, and one from ``last`` to y; 8 channels."""
    window = {"kernel_shape": spatial(form, [5], 1)}  # as exporters tell it
    nodes = [conv(form, "x", "w", "a", **window), *middle, conv(form, last, "v", "y", **window)]
    both = {"w": weights(8, 1, 5), "v": weights(8, 1, 5, seed=1)}
    both = {k: v if form == LINE else v[..., None] for k, v in both.items()}
    inputs = {"x": shape(form, 2, 8, "length" if length is None else length)}
    return model(nodes, inputs, {"y": shape(form, 2, 8, out)}, both | (constants or {}))


def rows_of(made: onnx.ModelProto) -> int:
    """How many convolutions are rows; the others have the form that they had."""
    constants = Graph(made).constants
    shapes = [constants[n.input[1]].dims for n in made.graph.node if n.op_type == "Conv"]
    return sum(len(s) == 4 and s[2] == 1 for s in shapes)


LAST = {LINE: (), COLUMN: (1,)}
OPEN = {LINE: ["n", "c", "l"], COLUMN: ["n", "c", "l", "one"]}
SAME = {  # operator → what is between two convolutions, with L at axis 2
    "BatchNormalization": lambda f: (
        [node("Relu", ["a"], "r"), node("BatchNormalization", ["r", "s", "o", "mu", "va"], "m")],
        {"s": vec(*range(1, 9)), "o": vec(*range(8)), "mu": np.ones(8, "f"), "va": np.ones(8, "f")},
    ),
    "LeakyRelu": lambda f: ([node("LeakyRelu", ["a"], "m", alpha=0.2)], {}),
    "Clip": lambda f: (
        [node("Clip", ["a", "lo", "hi"], "m")], {"lo": np.float32(-1), "hi": np.float32(1)},
    ),
    "residual": lambda f: ([node("Tanh", ["a"], "t"), node("Add", ["a", "t"], "m")], {}),
    "one value": lambda f: (
        [node("Tanh", ["a"], "t"), node("Mul", ["t", "k"], "m")], {"k": vec(3)},
    ),
    "positions": lambda f: (
        [node("Tanh", ["a"], "t"), node("Add", ["t", "k"], "m")],
        {"k": weights(8, 20).reshape(8, 20, *LAST[f])},
    ),
    "short constant": lambda f: (
        [node("Tanh", ["a"], "t"), node("Sub", ["k", "t"], "m")],
        {"k": weights(20).reshape(20, *LAST[f])},
    ),
    "slope": lambda f: (
        [node("PRelu", ["a", "k"], "m")], {"k": weights(8, 1).reshape(8, 1, *LAST[f])},
    ),
    "Concat": lambda f: (
        [node("Split", ["a"], ["p", "q"], axis=1, num_outputs=2), node("Tanh", ["p"], "t"),
         node("Concat", ["q", "t"], "m", axis=-2 - len(LAST[f]))], {},
    ),
    "Concat along": lambda f: (
        [node("Slice", ["a", "zero", "ten", "two"], "p"), node("Tanh", ["p"], "t"),
         node("Concat", ["t", "k"], "m", axis=2)],
        {"zero": ints(0), "ten": ints(10), "two": ints(-1 - len(LAST[f])),
         "k": weights(2, 8, 10).reshape(2, 8, 10, *LAST[f])},
    ),
    "Split along": lambda f: (
        [node("Split", ["a"], ["p", "q"], axis=2, num_outputs=2), node("Tanh", ["p"], "t"),
         node("Concat", ["q", "t"], "m", axis=2)], {},
    ),
    "MaxPool": lambda f: (
        [node("MaxPool", ["a"], "m", kernel_shape=spatial(f, [3], 1),
              pads=spatial(f, [1, 1], 0))], {},
    ),
    "AveragePool": lambda f: (
        [node("AveragePool", ["a"], "m", kernel_shape=spatial(f, [5], 1),
              pads=spatial(f, [3, 1], 0))], {},
    ),
    "Pad": lambda f: (
        [node("Slice", ["a", "five", "many", "two"], "p"),
         node("Pad", ["p", "pads"], "m", mode="reflect")],
        {"five": ints(5), "many": ints(99), "two": ints(2),
         "pads": ints(*(0, 0, 4, *([0] * len(LAST[f]))), *(0, 0, 1, *([0] * len(LAST[f]))))},
    ),
    "gate": lambda f: (
        [node("GlobalAveragePool", ["a"], "g"), node("Conv", ["g", "e"], "h"),
         node("Sigmoid", ["h"], "i"), node("Mul", ["a", "i"], "m")],
        {"e": weights(8, 8, 1).reshape(8, 8, 1, *LAST[f])},
    ),
    "mean": lambda f: (
        [node("ReduceMean", ["a", "two"], "g"), node("Tanh", ["g"], "t"),
         node("Mul", ["t", "a"], "m")],
        {"two": ints(-1 - len(LAST[f]))},
    ),
    "InstanceNormalization": lambda f: (
        [node("InstanceNormalization", ["a", "s", "o"], "m")],
        {"s": np.ones(8, "f"), "o": np.zeros(8, "f")},
    ),
}  # fmt: skip


@FORMS
@pytest.mark.parametrize("known", [True, False], ids=["sizes known", "sizes open"])
@pytest.mark.parametrize("kind", SAME)
def test_all_between_two_convolutions_are_rows(kind: str, known: bool, form: str) -> None:
    middle, constants = SAME[kind](form)
    exact = net(form, middle, constants, length=20 if known else None, out=20 if known else None)
    data = {"x": np.random.default_rng(0).normal(size=shape(form, 2, 8, 20)).astype(np.float32)}
    made = check(exact, feed=data)
    if kind == "gate" and form == LINE:  # of one tap
        assert rows_of(made) == ops(made)["Conv"] - 1
        return
    assert rows_of(made) == ops(made)["Conv"]
    there, back = ("Unsqueeze", "Squeeze") if form == LINE else ("Reshape", "Reshape")
    kinds = [n.op_type for n in made.graph.node]
    assert (kinds[0], kinds[-1]) == (there, back)
    assert sum(k in (there, back) for k in kinds) == 2
    assert {n.name for n in exact.graph.node if n.op_type == "Conv"} <= {
        n.name for n in made.graph.node
    }


@FORMS
@pytest.mark.parametrize(
    "attrs",
    [
        {"strides": 2},
        {"dilations": 3},
        {"strides": 3, "dilations": 2},
    ],
    ids=str,
)
def test_attributes_have_their_axis(form: str, attrs: dict[str, int]) -> None:
    w = weights(8, 1, 6).reshape(8, 1, 6, *LAST[form])
    exact = model([conv(form, "x", "w", "y", pads=(2, 3), **attrs)], {"x": shape(form, 2, 8, 40)},
                  {"y": OPEN[form]}, {"w": w})  # fmt: skip
    assert rows_of(check(exact)) == 1


@pytest.mark.parametrize("group", [1, 2])
def test_columns_of_any_convolution_are_rows(group: int) -> None:
    w = weights(8, 8 // group, 3)[..., None]
    one = conv(COLUMN, "x", "w", "y", group=group)
    assert rows_of(check(model([one], {"x": [1, 8, 12, 1]}, {"y": OPEN[COLUMN]}, {"w": w}))) == 1


def test_mono_signals_are_padded_as_rows() -> None:
    """A constant of one value has to have the axes of what it is put beside."""
    nodes = [
        conv(COLUMN, "x", "w", "a", group=1),
        node("Concat", ["zero", "a"], "b", axis=2),
        conv(COLUMN, "b", "w", "y", group=1),
    ]
    constants = {"w": weights(1, 1, 5, 1), "zero": np.zeros((1, 1, 1, 1), np.float32)}
    check(model(nodes, {"x": [1, 1, 12, 1]}, {"y": OPEN[COLUMN]}, constants))


@FORMS
def test_auto_pad_stays(form: str) -> None:
    w = weights(8, 1, 6).reshape(8, 1, 6, *LAST[form])
    strides = spatial(form, [2], 1)
    one = node("Conv", ["x", "w"], "y", auto_pad="SAME_LOWER", strides=strides, group=8)
    assert (
        rows_of(check(model([one], {"x": shape(form, 1, 8, 21)}, {"y": OPEN[form]}, {"w": w}))) == 1
    )


@FORMS
def test_what_others_read_is_as_it_was(form: str) -> None:
    """Tensors with readers that do not take rows keep their names, and so do outputs."""
    nodes = [
        conv(form, "x", "w", "a"),
        node("Relu", ["a"], "b"),
        node("Transpose", ["b"], "t", perm=[0, 2, 1, *([3] if form == COLUMN else [])]),
        conv(form, "b", "w", "y"),
    ]
    shapes = shape(form, 1, 8, 12)
    exact = model(nodes, {"x": shapes}, {"y": shapes, "t": OPEN[form], "b": shapes},
                  {"w": weights(8, 1, 5).reshape(8, 1, 5, *LAST[form])})  # fmt: skip
    made = check(exact)
    graph = Graph(made)
    assert graph.shape("b") == tuple(shapes)
    assert graph.shape(only(made, "Relu").output[0]) == (1, 8, 1, 12)
    assert rows_of(made) == 2


@FORMS
def test_what_comes_before_stays(form: str) -> None:
    """Only from a convolution on: what feeds it is as fast as it is."""
    nodes = [node("Tanh", ["x"], "t"), conv(form, "t", "w", "y")]
    exact = model(nodes, {"x": shape(form, 1, 8, 12)}, {"y": OPEN[form]},
                  {"w": weights(8, 1, 5).reshape(8, 1, 5, *LAST[form])})  # fmt: skip
    made = check(exact)
    assert Graph(made).shape(only(made, "Tanh").output[0]) == tuple(shape(form, 1, 8, 12))


@pytest.mark.parametrize(
    ("case", "x", "w", "attrs"),
    [
        ("dense", [1, 8, 12], (8, 8, 5), {}),
        ("in groups", [1, 8, 12], (8, 2, 5), {"group": 4}),
        ("two outputs of each channel", [1, 8, 12], (16, 1, 5), {"group": 8}),
        ("few taps", [1, 8, 12], (8, 1, 3), {"group": 8}),
        ("six channels", [1, 6, 12], (6, 1, 5), {"group": 6}),
        ("a column of one tap", [1, 8, 12, 1], (8, 8, 1, 1), {}),
        ("an image", [1, 8, 12, 12], (8, 8, 3, 1), {}),
        ("a column padded beside it", [1, 8, 12, 1], (8, 8, 3, 3), {"pads": [1] * 4}),
        ("a row", [1, 8, 1, 12], (8, 8, 1, 3), {}),
        ("a row of one value", [1, 8, 1, 1], (8, 8, 3, 1), {"pads": [1, 0, 1, 0]}),
        ("a volume", [1, 8, 12, 1, 1], (8, 8, 3, 1, 1), {}),
    ],
)  # fmt: skip
def test_what_stays(
    case: str, x: list[int], w: tuple[int, ...], attrs: dict[str, list[int]]
) -> None:
    opened = [f"d{k}" for k in range(len(x))]
    one = node("Conv", ["x", "w"], "y", **attrs)
    exact = model([one], {"x": x}, {"y": opened}, {"w": weights(*w)})
    made = check(exact)
    assert ops(made) == {"Conv": 1}
    assert Graph(made).shape("x") == tuple(x)


def test_a_weight_that_is_computed_stays() -> None:
    nodes = [node("Relu", ["w"], "r"), node("Conv", ["x", "r"], "y")]
    exact = model(nodes, {"x": [1, 8, 12, 1], "w": [8, 8, 3, 1]}, {"y": OPEN[COLUMN]})
    assert ops(check(exact)) == {"Relu": 1, "Conv": 1}


def test_one_weight_of_two_convolutions() -> None:
    nodes = [conv(LINE, "x", "w", "a"), node("Tanh", ["a"], "t"), conv(LINE, "t", "w", "y")]
    shapes = [1, 8, 12]
    made = check(model(nodes, {"x": shapes}, {"y": shapes}, {"w": weights(8, 1, 5)}))
    assert rows_of(made) == 2


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_chain_computes_the_same(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from([LINE, COLUMN]))
    kinds = data.draw(st.lists(st.sampled_from(sorted(SAME)), min_size=1, max_size=4))
    nodes, constants, last = [], {}, "x"
    for k, kind in enumerate(kinds):
        middle, more = SAME[kind](form)
        w = weights(8, 1, 5, seed=k).reshape(8, 1, 5, *LAST[form])
        for n in (conv(form, "x", "w", "a"), *middle):
            n.name = f"{n.name}.{k}"
            names = {"x": last} if n.op_type == "Conv" and n.output[0] == "a" else {}
            n.input[:] = [names.get(i, f"{i}.{k}") for i in n.input]
            n.output[:] = [f"{o}.{k}" for o in n.output]
            nodes.append(n)
        constants |= {f"{name}.{k}": v for name, v in ({"w": w} | more).items()}
        last = f"m.{k}"
    read = data.draw(st.lists(st.sampled_from([o for n in nodes for o in n.output]), max_size=2))
    outputs = dict.fromkeys([last, *read], OPEN[form])
    made = check(model(nodes, {"x": shape(form, 2, 8, 20)}, outputs, constants), tol=1e-4)
    gates = kinds.count("gate") if form == LINE else 0
    assert rows_of(made) == ops(made)["Conv"] - gates


@FORMS
def test_integer_kernels_read_rows(form: str) -> None:
    exact = net(form, [node("Relu", ["a"], "m")], length=64, out=64)
    data = feeds({"x": shape(form, 2, 8, 64)}, 6)
    made = qdq.quantize(exact, data, target=FORCED)
    outcome = compare(exact, made, data)
    assert fused_ops(made)["QLinearConv"] == 2
    assert outcome.sqnr > 30
    assert outcome.steps_apart <= 1


@FORMS
def test_rules_find_their_tensors(form: str) -> None:
    """Within, at the end, and weights."""
    exact = net(form, [node("Relu", ["a"], "m")], length=64, out=64)
    data = feeds({"x": shape(form, 2, 8, 64)}, 2)
    for tensor in ("x", "a", "m", "y", "w", "v"):
        result = run(
            exact,
            data,
            scheme=Scheme(rules=(Rule(tensors=tensor, keep_float=True),)),
            target=FORCED,
        )
        assert tensor not in result.solution.params


@FORMS
def test_models_of_other_tools_are_matched_as_they_are(form: str) -> None:
    exact = net(form, [node("Relu", ["a"], "m")], length=64, out=64)
    data = feeds({"x": shape(form, 2, 8, 64)}, 2)
    made = qdq.quantize(exact, data, target=FORCED)
    prepared = prepare(load(exact))
    assert not rows_differ(prepared, made)
    assert Graph(prepared).shape("m") == (2, 8, 1, 64)
    assert match(load(exact), made).float_graph.shape("m") == (2, 8, 1, 64)
    other = prepare(load(exact), without=(in_rows,))
    assert rows_differ(prepared, other)
    q = [
        node("QuantizeLinear", ["m", "s", "z"], "q"),
        node("DequantizeLinear", ["q", "s", "z"], "d"),
    ]
    other.graph.node.extend(q)
    for n in other.graph.node:
        if n.output[0] == "y":
            n.input[0] = "d"
    other.graph.initializer.extend(
        [onnx.numpy_helper.from_array(np.float32(0.1), "s"),
         onnx.numpy_helper.from_array(np.uint8(0), "z")]
    )  # fmt: skip
    found = match(load(exact), other)
    assert found.float_graph.shape("m") == tuple(shape(form, 2, 8, 64))
    assert "m" in found.coded
