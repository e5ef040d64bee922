"""A ConvTranspose is a convolution, and runs on integers as one."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from harness import ASYMMETRIC, compare, quantized, session
from hypothesis import given, settings
from hypothesis import strategies as st
from models import feeds, model, node
from onnx.reference import ReferenceEvaluator
from upsamplers import SHAPES, Array, decoder, values, view

import qdq
from qdq.api import run
from qdq.modelio import load
from qdq.ops.demand import TensorView
from qdq.placement.costs import Features, float_cost, int8_cost
from qdq.placement.weighing import features_of, kind_of
from qdq.report.advice import without
from qdq.report.matching import match, plain
from qdq.subpixel import Axis, Subpixel, form_of
from qdq.targets import PORTABLE

# -- the mathematics ------------------------------------------------------------------------------


@st.composite
def axes(draw: st.DrawFn) -> tuple[int, Axis]:
    """The size of an input along a dimension, and how it is convolved there."""
    window, stride = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    begin, end = (draw(st.integers(0, window - 1)) for _ in range(2))
    added = draw(st.integers(0, max(0, stride - 1)))
    size = draw(st.integers(1, 4))
    made = stride * (size - 1) + window - begin - end + added
    if made < 1:
        begin = end = 0
    return size, Axis(window, stride, begin, end, added)


def transposed(x: Array, w: Array, form: Subpixel) -> Array:
    """What onnx says that a ConvTranspose is."""
    attributes = {
        "strides": list(form.strides),
        "pads": [a.begin for a in form.axes] + [a.end for a in form.axes],
        "output_padding": [a.added for a in form.axes],
    }
    made = node("ConvTranspose", ["x", "w"], "y", **attributes)
    open_ = [None] * x.ndim
    net = model([made], {"x": list(x.shape)}, {"y": open_}, {"w": w})
    (found,) = ReferenceEvaluator(net).run(None, {"x": x})
    return np.asarray(found)


def convolved(x: Array, w: Array, form: Subpixel) -> Array:
    """The same by a plain convolution and movements, in numpy."""
    rank = len(form.axes)
    pads = zip(form.pads[:rank], form.pads[rank:], strict=True)
    wide = np.pad(x, [(0, 0), (0, 0), *pads])
    spatial = tuple(range(2, 2 + rank))
    windows = np.lib.stride_tricks.sliding_window_view(wide, form.taps, spatial)
    plain = form.weight(w, np.float32(0))
    summed = ([1, *range(2 + rank, 2 + 2 * rank)], [1, *range(2, 2 + rank)])
    y = np.moveaxis(np.tensordot(windows, plain, summed), -1, 1)
    blocks = y.reshape(len(x), *form.strides, form.channels, *y.shape[2:])
    order = [0, rank + 1, *(k for d in range(rank) for k in (rank + 2 + d, 1 + d))]
    sides = [n * s for n, s in zip(y.shape[2:], form.strides, strict=True)]
    full = blocks.transpose(order).reshape(len(x), form.channels, *sides)
    kept = (slice(a.crop[0], n - a.crop[1]) for a, n in zip(form.axes, sides, strict=True))
    return full[(slice(None), slice(None), *kept)]


@given(st.lists(axes(), min_size=1, max_size=2), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_it_is_the_same(found: list[tuple[int, Axis]], inputs: int, made: int) -> None:
    """For any window, stride, padding and output padding."""
    form = Subpixel(made, tuple(a for _, a in found))
    x = values(2, inputs, *(size for size, _ in found))
    w = values(inputs, made, *(a.window for a in form.axes), seed=1)
    exact = transposed(x, w, form)
    np.testing.assert_allclose(convolved(x, w, form), exact, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(form.restored(form.weight(w, np.float32(0))), w)


def test_what_stands_for_nothing_is_the_zero_point() -> None:
    """A window of 3 at stride 2 leaves a tap of the second phase empty."""
    form = Subpixel(2, (Axis(3, 2),))
    codes = np.full((4, 2, 3), 9, np.uint8)
    laid = form.weight(codes, np.array([5, 7], np.uint8))
    assert laid.shape == (4, 4, 2)
    assert (laid[:2] == 9).all()  # the first phase, both channels
    np.testing.assert_array_equal(laid[2:, :, 0], [[5] * 4, [7] * 4])
    assert (laid[2:, :, 1] == 9).all()
    np.testing.assert_array_equal(form.tiled(np.array([1, 2])), [1, 2, 1, 2])
    np.testing.assert_array_equal(form.restored(np.array([1, 2, 1, 2])), [1, 2])


@pytest.mark.parametrize(
    ("weight", "attributes", "reason"),
    [
        ((8, None, 2, 2), {}, "not known"),
        ((8, 4), {}, "not known"),
        ((8, 1, 2, 2), {"group": 8}, "8 groups"),
        ((8, 4, 2), {"output_shape": [4]}, "output_shape"),
        ((8, 4, 2), {"auto_pad": b"SAME_UPPER"}, "auto_pad"),
        ((8, 4, 2), {"dilations": [2]}, "dilations"),
        ((8, 4, 2), {"pads": [2, 0]}, "not smaller than its window"),
        ((8, 4, 2), {"pads": [0, -1]}, "not smaller than its window"),
    ],
)
def test_what_has_no_such_form(weight: Any, attributes: Any, reason: str) -> None:
    found = Subpixel.of(weight, attributes)
    assert isinstance(found, str)
    assert reason in found


def test_defaults_of_a_transposed_convolution() -> None:
    """Without strides there are no movements; VALID pads nothing."""
    found = form_of(view("ConvTranspose", None, (8, 4, 3, 3), auto_pad=b"VALID"))
    assert isinstance(found, Subpixel)
    assert found.phases == 1
    assert found.pads == (2, 2, 2, 2)


# -- the kernels ----------------------------------------------------------------------------------


FORMS = [
    (1, 8, {"strides": [4], "pads": [2, 2]}),
    (1, 4, {"strides": [2]}),
    (1, 3, {"strides": [1], "pads": [1, 1]}),
    (2, 2, {"strides": [2, 2]}),
    (2, 4, {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    (2, 3, {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}),
    (2, 3, {"strides": [1, 2], "pads": [0, 1, 2, 0]}),
    (2, 3, {"strides": [1, 1], "pads": [1, 1, 1, 1]}),
    (3, 2, {"strides": [2, 2, 2]}),
    (3, 3, {"strides": [2, 1, 2], "pads": [1, 1, 0, 1, 0, 1]}),
]


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "any size"])
@pytest.mark.parametrize("behind", ["Relu", "LeakyRelu"])
@pytest.mark.parametrize(("rank", "window", "attributes"), FORMS)
def test_between_convolutions(
    rank: int, window: int, attributes: Any, behind: str, fixed: bool
) -> None:
    """All on integers, fused as unfused, and near float."""
    net = decoder(rank, window=window, behind=behind, fixed=fixed, **attributes)
    data = feeds({"x": SHAPES[rank]}, 4)
    found, _ = quantized(net, data)
    assert found.plan.left_float == {}
    outcome = compare(net, found.model, data)
    assert outcome.sqnr > 27
    assert outcome.unfused_sqnr > 27
    assert outcome.steps_apart <= 1.01
    assert outcome.ops["QLinearConv"] == 3
    assert not {"Conv", "ConvTranspose", "Relu", "FusedConv"} & set(outcome.ops)
    measured = not fixed and rank > 1 and any(s > 1 for s in attributes["strides"])
    # sizes that are not fixed are those of one channel, dequantized
    assert outcome.ops["DequantizeLinear"] == (2 if measured else 1)
    assert outcome.ops["QuantizeLinear"] == 1


@pytest.mark.parametrize(
    ("per_channel", "symmetric"),
    [
        (True, True),
        (False, True),
        pytest.param(True, False, marks=ASYMMETRIC),
        (False, False),
    ],
)
def test_weights_of_each_kind(per_channel: bool, symmetric: bool) -> None:
    """Zero points fill the taps that a phase does not have."""
    net, data = decoder(2, window=3, strides=[2, 2]), feeds({"x": SHAPES[2]}, 4)
    weight = qdq.QuantSpec(dtype=qdq.INT8 if symmetric else qdq.UINT8, symmetric=symmetric)
    scheme = qdq.Scheme(weight=weight, per_channel=per_channel)
    _, outcome = quantized(net, data, scheme=scheme)
    assert outcome.sqnr > 25
    assert outcome.steps_apart <= 1.01
    assert outcome.ops["QLinearConv"] == 3


def twins(first: int, second: int) -> onnx.ModelProto:
    """Two ConvTransposes of one weight, with strides of their own, between convolutions."""
    w = {"w": values(8, 8, 2, 2) / 4, "v": values(8, 8, 1, 1, seed=1) / 2}
    nodes = [
        node("Conv", ["x", "v"], "c"),
        node("ConvTranspose", ["c", "w"], "a", strides=[first] * 2),
        node("ConvTranspose", ["c", "w"], "b", strides=[second] * 2),
        node("Conv", ["a", "v"], "y"),
        node("Conv", ["b", "v"], "z"),
    ]
    made = {name: [1, 8, *[5 * s + 2] * 2] for name, s in (("y", first), ("z", second))}
    return model(nodes, {"x": [1, 8, 6, 6]}, made, w)


def test_two_share_a_weight_in_two_forms() -> None:
    """Strides differ, so the codes are laid out twice."""
    data = feeds({"x": [1, 8, 6, 6]}, 4)
    _, outcome = quantized(twins(2, 1), data)
    assert outcome.sqnr > 27
    assert outcome.steps_apart <= 1.01
    assert outcome.ops["QLinearConv"] == 5


def test_a_range_beyond_the_clamp_keeps_it() -> None:
    """Codes that go below 0 cannot do the work of the Relu behind, so that is written."""
    net, data = decoder(2, window=2, strides=[2, 2]), feeds({"x": SHAPES[2]}, 4)
    wide = qdq.Rule(tensors="q", range=(-3.0, 6.0))
    found, outcome = quantized(net, data, scheme=qdq.Scheme(rules=(wide,)))
    assert outcome.sqnr > 25
    assert any(n.op_type == "Relu" for n in found.model.graph.node)


def test_the_default_takes_it_where_it_pays() -> None:
    """With channels enough; the scores of a detector, one channel, are faster in float."""
    wide = {"w0": values(64, 16, 3, 3) / 12, "up": values(64, 32, 2, 2, seed=1) / 8,
            "one": values(32, 1, 2, 2, seed=2) / 6}  # fmt: skip
    nodes = [
        node("Conv", ["x", "w0"], "c", pads=[1] * 4),
        node("ConvTranspose", ["c", "up"], "t", strides=[2, 2]),
        node("Relu", ["t"], "q"),
        node("ConvTranspose", ["q", "one"], "y", strides=[2, 2]),
    ]
    net = model(nodes, {"x": [1, 16, 32, 32]}, {"y": [1, 1, 128, 128]}, wide)
    data = feeds({"x": [1, 16, 32, 32]}, 4)
    result = run(net, data)
    outcome = compare(net, result.model, data)
    assert outcome.ops["QLinearConv"] == 2
    assert outcome.ops["ConvTranspose"] == 1
    assert result.plan.left_float.keys() == {"ConvTranspose_y"}
    assert outcome.sqnr > 27


def test_a_clamp_that_is_written_is_told() -> None:
    net, data = decoder(2, window=2, strides=[2, 2]), feeds({"x": SHAPES[2]}, 2)
    wide = qdq.Rule(tensors="q", range=(-3.0, 6.0))
    result, outcome = quantized(net, data, scheme=qdq.Scheme(rules=(wide,)))
    assert outcome.ops["QLinearConv"] == 3
    assert result.left_float.keys() == {"Relu_q"}
    assert "run that in float" in result.left_float["Relu_q"]


@pytest.mark.parametrize("rank", [1, 2])
def test_a_batch_may_be_empty(rank: int) -> None:
    net = decoder(rank, window=4, strides=[2] * rank)
    net.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    result, _ = quantized(net, feeds({"x": SHAPES[rank]}, 2))
    empty = {"x": np.zeros((0, *SHAPES[rank][1:]), np.float32)}
    (exact,) = session(net, fused=True).run(None, empty)
    (found,) = session(result.model, fused=True).run(None, empty)
    assert found.shape == exact.shape


def test_what_is_written() -> None:
    """No node that does nothing, all movements on codes, one scale for all of them."""
    net = decoder(2, window=2, strides=[2, 2])
    found, _ = quantized(net, feeds({"x": SHAPES[2]}, 2))
    graph = found.model.graph
    assert not {"Slice", "Shape"} & {n.op_type for n in graph.node}
    assert "ConvTranspose_t" in {n.name for n in graph.node}
    maker = {o: n.op_type for n in graph.node for o in n.output}
    moved = [n for n in graph.node if n.op_type in ("Transpose", "Reshape")]
    assert len(moved) == 5
    assert {maker[n.input[0]] for n in moved} == {"DequantizeLinear"}
    scales = {n.input[1] for n in graph.node if n.op_type == "QuantizeLinear"}
    assert len(scales) == 4  # of x, r, q and y


def test_a_constant_is_stored_once_in_each_form() -> None:
    found, _ = quantized(twins(2, 2), feeds({"x": [1, 8, 6, 6]}, 2))
    names = [t.name for t in found.model.graph.initializer]
    stored = sorted(n for n in names if n[:2] in ("v_", "w_") and "quantized" in n)
    assert stored == ["v_quantized", "w_quantized"]


def test_other_targets_keep_the_operators() -> None:
    net = decoder(2, window=2, strides=[2, 2])
    net.graph.node[3].CopyFrom(node("DepthToSpace", ["t"], "q", blocksize=1))
    found = run(net, feeds({"x": SHAPES[2]}, 2), target=PORTABLE)
    ops = {n.op_type for n in found.model.graph.node}
    assert "ConvTranspose" in ops
    assert not {"Transpose", "Reshape"} & ops


def test_groups_are_left_float() -> None:
    w = {"up": values(8, 2, 2, 2) / 2, "v": values(8, 8, 1, 1, seed=1) / 2}
    nodes = [
        node("Conv", ["x", "v"], "c"),
        node("ConvTranspose", ["c", "up"], "t", strides=[2, 2], group=4),
        node("Conv", ["t", "v"], "y"),
    ]
    net = model(nodes, {"x": [1, 8, 6, 6]}, {"y": [None] * 4}, w)
    found, outcome = quantized(net, feeds({"x": [1, 8, 6, 6]}, 2))
    assert "4 groups" in found.plan.left_float["ConvTranspose_t"]
    assert outcome.sqnr > 27


def test_the_clamp_is_not_written_where_codes_do_its_work() -> None:
    """With one between the movements and two readers onnxruntime leaves a Q and DQ there."""
    net = decoder(2, window=4, strides=[2, 2], pads=[1] * 4)
    net.graph.node.append(node("Conv", ["q", "w1"], "z"))
    net.graph.output.append(onnx.helper.make_tensor_value_info("z", 1, None))
    result, outcome = quantized(net, feeds({"x": SHAPES[2]}, 2))
    assert sum(n.op_type == "Relu" for n in result.model.graph.node) == 1  # behind the first Conv
    assert outcome.ops["QuantizeLinear"] == 1
    assert outcome.ops["DequantizeLinear"] == 2


# -- costs ----------------------------------------------------------------------------------------


def test_costs_see_the_convolution_and_the_rows() -> None:
    """Rows are as wide as the last stride makes them; a volume has a volume's kernel."""
    shapes = {"x": (1, 8, 5, 5), "w": (8, 6, 3, 5), "y": (1, 6, 7, 13)}
    f = features_of(view("ConvTranspose", *list(shapes.values())[:2], strides=[1, 2]),
                    ("y",), shapes.get)  # fmt: skip
    assert (f.channels_in, f.channels_out, f.taps, f.rows) == (8, 12, 9, 12)
    volume = view("ConvTranspose", (1, 16, 4, 4, 4), (16, 16, 3, 3, 3), strides=[2, 2, 2])
    assert kind_of(volume, {}.get) == "ConvTranspose.volume"
    # 8 channels in blocks of 2 by 2 are no few channels
    wide = view("ConvTranspose", (1, 16, 5, 5), (16, 8, 2, 2), strides=[2, 2])
    assert kind_of(wide, {}.get) == "ConvTranspose.pointwise"
    product = replace(view("MatMul", (4, 8)), inputs=(TensorView(name="x"), TensorView(name="z")))
    assert kind_of(product, {}.get) == "MatMul.dynamic"


def test_longer_rows_do_not_cost_more() -> None:
    """Very short ones are moved slowly; DepthToSpace in rows is faster than its kernel.

    But windows of 3 channels are gathered, so a 3 by 3 stem is faster in float.
    """
    stem = Features(inputs=3 * 112**2, outputs=32 * 112**2, channels_in=3, channels_out=32,
                    taps=9, rows=3, weights=864)  # fmt: skip
    assert int8_cost("Conv.narrow", stem) > 1.2 * float_cost("Conv.narrow", stem)
    shapes = {"x": (1, 6, 32, 32), "w": (6, 4, 4, 4), "y": (1, 4, 64, 64)}
    up = view("ConvTranspose", *list(shapes.values())[:2], strides=[2, 2], pads=[1] * 4)
    f, kind = features_of(up, ("y",), shapes.get), kind_of(up, shapes.get)
    assert kind == "ConvTranspose.narrow"
    cost = {rows: int8_cost(kind, replace(f, rows=rows)) for rows in (1, 4, 8, 64)}
    assert cost[4] > cost[1] > cost[8] > cost[64]
    sizes = {"x": (1, 64, 32, 32), "y": (1, 16, 64, 64)}
    moved = view("DepthToSpace", sizes["x"], blocksize=2)
    f = features_of(moved, ("y",), sizes.get)
    assert kind_of(moved, sizes.get) == "DepthToSpace.rows"
    assert f.rows == 32
    assert int8_cost("DepthToSpace.rows", f) < int8_cost("DepthToSpace", f) / 2


# -- compare --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "any size"])
def test_compare_takes_the_pieces_for_the_node(fixed: bool) -> None:
    net = decoder(2, window=4, strides=[2, 2], pads=[1, 1, 1, 1], fixed=fixed)
    data = feeds({"x": SHAPES[2]}, 3)
    found, _ = quantized(net, data)
    report = qdq.compare(net, found.model, data, repeats=0)
    (row,) = [n for n in report.nodes if n.op_type == "ConvTranspose"]
    assert row.integer
    assert row.name == "ConvTranspose_t"
    assert row.local_db is not None
    assert 25 < row.local_db < 60
    assert [(k.op_type, k.planned, k.integer, k.float) for k in report.kernels] == [
        ("Conv", 3, 3, 0)
    ]
    constants = {t.name: t for t in report.tensors if t.kind != "activation"}
    assert constants["up"].rounding_db > 30
    assert constants["b"].rounding_db > 60
    assert report.notes == ()
    tried = [a for a in report.advice if "ConvTranspose_t" in a.rule]
    assert tried
    assert all(a.gain_db > -3 for a in tried)


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "any size"])
def test_compare_knows_one_without_strides(fixed: bool) -> None:
    """That is written as a single Conv."""
    net = decoder(2, window=3, strides=[1, 1], pads=[1] * 4, fixed=fixed)
    data = feeds({"x": SHAPES[2]}, 3)
    scheme = qdq.Scheme(per_channel=False)
    report = qdq.compare(net, quantized(net, data, scheme=scheme)[0].model, data, repeats=0)
    (row,) = [n for n in report.nodes if n.op_type == "ConvTranspose"]
    assert row.name == "ConvTranspose_t"
    assert {"up", "b"} <= {t.name for t in report.tensors}


def test_compare_knows_a_weight_with_one_scale() -> None:
    net, data = decoder(2, window=4, strides=[2, 2]), feeds({"x": SHAPES[2]}, 2)
    found, _ = quantized(net, data, scheme=qdq.Scheme(per_channel=False))
    report = qdq.compare(net, found.model, data, repeats=0)
    rounding = {t.name: t.rounding_db for t in report.tensors}
    assert rounding["up"] > 30
    assert rounding["b"] > 60


def test_compare_counts_what_stays_float_with_the_convolutions() -> None:
    """Also one that the runtime fuses with its Relu."""
    net, data = decoder(3, window=2, strides=[2] * 3), feeds({"x": SHAPES[3]}, 2)
    kept = qdq.Rule(nodes="Conv_c|ConvTranspose_t", keep_float=True)
    found, outcome = quantized(net, data, scheme=qdq.Scheme(rules=(kept,)))
    assert outcome.ops["FusedConv"] == 1
    report = qdq.compare(net, found.model, data, repeats=0)
    (row,) = report.kernels
    assert (row.op_type, row.planned, row.integer, row.float) == ("Conv", 1, 1, 2)
    (up,) = [n for n in report.nodes if n.name == "ConvTranspose_t"]
    assert not up.integer


def test_advice_keeps_the_clamp_that_codes_do() -> None:
    """Nothing else clamps a float tensor whose Relu was left out."""
    net = decoder(2, window=4, strides=[2, 2], pads=[1] * 4)
    data = feeds({"x": SHAPES[2]}, 3)
    result, outcome = quantized(net, data)
    matched = match(plain(load(net)), plain(result.model))
    both = {s.index for s in matched.sites if s.name in ("ConvTranspose_t", "Conv_y")}
    assert len(both) == 2
    assert compare(net, without(matched, both), data).sqnr > outcome.sqnr
