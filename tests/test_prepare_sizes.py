"""What the converter and shape inference get wrong, and prepare therefore spells out."""

from itertools import product

import numpy as np
import onnx
import pytest
from harness import quantized
from models import feeds, model, node, vec, weights
from onnx import helper, numpy_helper
from prepared import check, only, ops, random_feed, run

from qdq.errors import ModelError
from qdq.prepare import prepare
from qdq.statistics.observe import Readout


def sizes_of(net: onnx.ModelProto) -> list[int]:
    """Of the first output, as shape inference has them."""
    bare = onnx.ModelProto()
    bare.CopyFrom(net)
    del bare.graph.value_info[:]
    bare.graph.output[0].type.tensor_type.ClearField("shape")
    (found,) = onnx.shape_inference.infer_shapes(bare).graph.output
    return [d.dim_value for d in found.type.tensor_type.shape.dim]


class TestOldOperators:
    @pytest.mark.parametrize("mode", ["nearest", "linear"])
    @pytest.mark.parametrize("scales", [(1, 1, 1.5, 2), (1, 1, 1.3, 2.7)], ids=str)
    def test_resize_counted_from_the_corner(self, mode: str, scales: tuple[float, ...]) -> None:
        net = model([node("Resize", ["x", "s"], "y", mode=mode)], {"x": [1, 3, 8, 8]},
                    {"y": [None] * 4}, {"s": vec(*scales)}, 10)  # fmt: skip
        check(net, tol=0)

    @pytest.mark.parametrize("scale", [0.3, 0.6, 0.75])
    @pytest.mark.parametrize("constant", ["initializer", "node"])
    def test_nearest_values_of_axes_that_shrink(self, scale: float, constant: str) -> None:
        scales = vec(1, 1, scale, 1)
        value = numpy_helper.from_array(scales)
        nodes = [node("Constant", [], "s", value=value)] if constant == "node" else []
        nodes.append(node("Resize", ["x", "s"], "y", mode="nearest"))
        constants = {"s": scales} if constant == "initializer" else {}
        check(model(nodes, {"x": [1, 3, 11, 8]}, {"y": [None] * 4}, constants, 10), tol=0)

    @pytest.mark.parametrize("opset", [7, 9])
    def test_upsample_did_too(self, opset: int) -> None:
        scales = (1.0, 1.0, 1.5, 2.0)
        up = node("Upsample", ["x", "s"], "y", mode="linear")
        if opset == 7:
            up = node("Upsample", ["x"], "y", mode="linear", scales=scales)
        constants = {"s": vec(*scales)} if opset == 9 else {}
        check(model([up], {"x": [1, 3, 8, 8]}, {"y": [None] * 4}, constants, opset), tol=0)

    @pytest.mark.parametrize("shape", [[32], [3, 4, 4]], ids=str)
    def test_statistics_for_each_value(self, shape: list[int]) -> None:
        parts = dict(zip("sbmv", weights(4, *shape, seed=3), strict=True))
        constants = {**parts, "v": np.abs(parts["v"])}
        norm = node("BatchNormalization", ["x", *"sbmv"], "y", spatial=0, epsilon=1e-3)
        net = model([norm], {"x": [5, *shape]}, {"y": [5, *shape]}, constants, 7)
        assert ops(check(net, tol=1e-5)) == {"Mul": 1, "Add": 1}

    def test_statistics_for_each_value_behind_a_product(self) -> None:
        constants = {k: np.abs(weights(16, seed=i)) for i, k in enumerate("sbmv")}
        gemm = node("MatMul", ["x", "w"], "h")
        norm = node("BatchNormalization", ["h", *"sbmv"], "y", spatial=0)
        net = model([gemm, norm], {"x": [5, 8]}, {"y": [5, 16]},
                    {**constants, "w": weights(8, 16)}, 8)  # fmt: skip
        assert ops(check(net, tol=1e-5)) == {"Gemm": 1}

    @pytest.mark.parametrize("directions", [[0], [1]], ids=str)
    def test_scan_had_a_batch(self, directions: list[int]) -> None:
        info = helper.make_tensor_value_info
        body = helper.make_graph(
            [
                node("Add", ["before", "now"], "sum"),
                node("Tanh", ["sum"], "after"),
                node("Neg", ["after"], "each"),
            ],
            "body",
            [info("before", 1, [2, 4]), info("now", 1, [2, 4])],
            [info("after", 1, [2, 4]), info("each", 1, [2, 4])],
        )
        scan = node("Scan", ["", "z", "x"], ["last", "y"], body=body, num_scan_inputs=1,
                    directions=directions)  # fmt: skip
        net = model([scan], {"x": [1, 5, 2, 4], "z": [1, 2, 4]},
                    {"last": [1, 2, 4], "y": [1, 5, 2, 4]}, opset=8)  # fmt: skip
        check(net, tol=1e-6)

    @pytest.mark.parametrize("axis", [0, 1, 2, None])
    def test_hardmax_worked_on_a_matrix(self, axis: int | None) -> None:
        attributes = {} if axis is None else {"axis": axis}
        net = model([node("Hardmax", ["x"], "h", **attributes), node("Neg", ["h"], "y")],
                    {"x": [2, 3, 4]}, {"y": [2, 3, 4]}, opset=11)  # fmt: skip
        check(net, tol=0)

    def test_names_beside_a_hardmax_are_left_alone(self) -> None:
        nodes = [
            node("Hardmax", ["x"], "y"),
            node("Neg", ["x"], "y_flat"),
            node("Shape", ["x"], "y_shape"),
            node("Cast", ["y_shape"], "s", to=1),
            node("Add", ["y_flat", "y"], "z"),
        ]
        shape = [2, 3, 4]
        outputs = {"y": shape, "z": shape, "s": [3]}
        check(model(nodes, {"x": shape}, outputs, opset=11), tol=0)

    def test_hardmax_in_a_branch(self) -> None:
        shape = helper.make_tensor_value_info("h", 1, [2, 3, 4])
        branch = helper.make_graph([node("Hardmax", ["x"], "h")], "b", [], [shape])
        other = helper.make_graph([node("Neg", ["x"], "n")], "o", [],
                                  [helper.make_tensor_value_info("n", 1, [2, 3, 4])])  # fmt: skip
        nodes = [node("If", ["c"], "y", then_branch=branch, else_branch=other)]
        net = model(nodes, {"x": [2, 3, 4]}, {"y": [None] * 3}, {"c": np.array(True)}, 11)
        check(net, tol=0)

    def test_pad_had_a_value_that_only_one_mode_read(self) -> None:
        nodes = [node("Pad", ["x"], "y", mode="reflect", value=0.0, pads=[0, 0, 1, 1, 0, 0, 1, 1])]
        check(model(nodes, {"x": [1, 3, 8, 8]}, {"y": [None] * 4}, opset=10), tol=0)


POOLS = [("MaxPool", {}), ("AveragePool", {}), ("AveragePool", {"count_include_pad": 1}),
         ("LpPool", {})]  # fmt: skip


@pytest.mark.parametrize(("op", "attributes"), POOLS, ids=str)
def test_pools_have_the_size_that_is_inferred(op: str, attributes: dict) -> None:
    """A window that begins in the padding behind the data is left out, which inference forgets."""
    settled = 0
    for size, kernel, stride in product((5, 6, 9), (1, 2, 3), (2, 3)):
        for begin, end in product(range(kernel), repeat=2):
            pool = node(op, ["x"], "y", ceil_mode=1, kernel_shape=[kernel], strides=[stride],
                        pads=[begin, end], **attributes)  # fmt: skip
            net = model([pool], {"x": [1, 2, size]}, {"y": [1, 2, None]})
            made = check(net)
            (y,) = run(net, random_feed(net))
            assert sizes_of(made) == list(y.shape)
            settled += all(a.name != "ceil_mode" for a in only(made, op).attribute)
    assert settled


def test_pools_one_behind_the_other_and_side_by_side() -> None:
    pool = {"ceil_mode": 1, "kernel_shape": [1], "strides": [2]}
    nodes = [node("MaxPool", ["x"], "a", **pool), node("MaxPool", ["a"], "b", **pool),
             node("MaxPool", ["x"], "c", **pool), node("MaxPool", ["c"], "d", **pool),
             node("Add", ["b", "d"], "y")]  # fmt: skip
    net = model(nodes, {"x": [1, 2, 12]}, {"y": [1, 2, None]})
    assert sizes_of(check(net)) == [1, 2, 3]


def test_padding_that_would_count_or_be_too_wide_is_not_added() -> None:
    """Beside an axis that is inferred wrongly there is one that needs more padding."""
    for op, shape, attributes in (
        ("AveragePool", [1, 1, 6, 6], {"kernel_shape": [3, 1], "count_include_pad": 1}),
        ("MaxPool", [1, 1, 8, 9], {"kernel_shape": [2, 2], "dilations": [2, 2]}),
    ):
        strides = [2, 2] if op == "AveragePool" else [4, 4]
        pool = node(op, ["x"], "y", ceil_mode=1, strides=strides, **attributes)
        made = check(model([pool], {"x": shape}, {"y": [None] * 4}))
        assert "ceil_mode" in {a.name for a in only(made, op).attribute}


@pytest.mark.parametrize("op", ["AveragePool", "MaxPool"])
def test_valid_means_no_padding(op: str) -> None:
    pool = node(op, ["x"], "y", ceil_mode=1, kernel_shape=[1], strides=[2], auto_pad="VALID")
    net = model([pool], {"x": [1, 2, 6]}, {"y": [1, 2, None]})
    assert sizes_of(check(net)) == [1, 2, 3]


def test_only_one_axis_of_a_pool_is_inferred_wrongly() -> None:
    pool = node("MaxPool", ["x"], "y", ceil_mode=1, kernel_shape=[3, 1], strides=[2, 2])
    net = model([pool], {"x": [1, 2, 6, 6]}, {"y": [None] * 4})
    made = check(net)
    assert list(only(made, "MaxPool").attribute[-1].ints) == [0, 0, 1, 0]
    assert sizes_of(made) == [1, 2, 3, 3]


@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER"])
def test_transposed_convolutions_have_the_size_that_is_inferred(auto: str) -> None:
    for kernel, stride in product((1, 2, 3, 4), (2, 3)):
        up = node("ConvTranspose", ["x", "w"], "y", auto_pad=auto, strides=[stride] * 2,
                  output_padding=[1, 0])  # fmt: skip
        net = model([up], {"x": [1, 3, 7, 6]}, {"y": [None] * 4},
                    {"w": weights(3, 4, kernel, kernel)})  # fmt: skip
        made = check(net)
        (y,) = run(net, random_feed(net))
        assert sizes_of(made) == list(y.shape)
        assert list(y.shape[2:]) == [7 * stride, 6 * stride] or kernel < stride


@pytest.mark.parametrize("auto", ["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"])
def test_the_padding_of_a_transposed_convolution_is_spelled_out(auto: str) -> None:
    """What ``output_shape`` asks for; as TensorFlow's converters write it."""
    for kernel, stride, less in product((2, 3, 4), (1, 2, 3), (0, 1, 2, 3)):
        sizes = [stride * (n - 1) + kernel - less for n in (7, 6)]
        up = node("ConvTranspose", ["x", "w"], "y", auto_pad=auto, strides=[stride] * 2,
                  output_shape=sizes)  # fmt: skip
        net = model([up], {"x": [1, 3, 7, 6]}, {"y": [None] * 4},
                    {"w": weights(3, 4, kernel, kernel)})  # fmt: skip
        made = check(net)
        assert sizes_of(made) == [1, 4, *sizes]
        found = {a.name: list(a.ints) for a in only(made, "ConvTranspose").attribute}
        assert sum(found["pads"]) == 2 * less
        assert not {"output_shape", "auto_pad"} & found.keys()


@pytest.mark.parametrize("size", [7, "L"])
@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER"])
def test_the_padding_of_same_is_spelled_out(auto: str, size: int | str) -> None:
    """It does not depend on the input's size."""
    up = node("ConvTranspose", ["x", "w"], "y", auto_pad=auto, strides=[2])
    net = model([up], {"x": [1, 3, size]}, {"y": [None] * 3}, {"w": weights(3, 4, 3)})
    made = check(net, feed={"x": weights(1, 3, 7)})
    (pads,) = [a.ints for a in only(made, "ConvTranspose").attribute if a.name == "pads"]
    assert list(pads) == ([0, 1] if auto == "SAME_UPPER" else [1, 0])


def test_a_window_of_unknown_size_is_left_alone() -> None:
    up = node("ConvTranspose", ["x", "w"], "y", strides=[2], auto_pad="SAME_UPPER")
    net = model([up], {"x": [1, 3, 7], "w": [3, 4, "k"]}, {"y": [None] * 3})
    assert "auto_pad" in {a.name for a in only(prepare(net), "ConvTranspose").attribute}


def test_an_output_larger_than_what_is_computed_is_left_alone() -> None:
    up = node("ConvTranspose", ["x", "w"], "y", strides=[2], output_shape=[16])
    net = model([up], {"x": [1, 3, 7]}, {"y": [None] * 3}, {"w": weights(3, 4, 2)})
    assert "output_shape" in {a.name for a in only(prepare(net), "ConvTranspose").attribute}


def test_a_softmax_behind_such_a_pool() -> None:
    """Its old form is spelled out with shapes, which were those that inference found."""
    pool = node("MaxPool", ["x"], "p", ceil_mode=1, kernel_shape=[1], strides=[2])
    nodes = [pool, node("Softmax", ["p"], "y", axis=1)]
    check(model(nodes, {"x": [1, 3, 6]}, {"y": [None] * 3}, opset=12))


def test_values_that_cannot_be_told_apart_are_refused() -> None:
    pool = node("MaxPool", ["x"], "p", ceil_mode=1, kernel_shape=[1, 1], strides=[2, 2])
    nodes = [pool, node("Relu", ["p"], "r"), node("Neg", ["r"], "y")]
    shapes = {"x": [1, 16, 64, 64]}
    net = model(nodes, shapes, {"y": [None] * 4})
    (feed,) = feeds(shapes, count=1)
    names = dict.fromkeys(("p", "r"))
    made = Readout(prepare(net), names, counted=frozenset(names)).run(feed)
    assert made.readings["p"].values.size == made.readings["r"].values.size
    wrong = onnx.shape_inference.infer_shapes(net)
    with pytest.raises(ModelError, match=r"\d+ values for tensors of which it then makes \d+"):
        Readout(wrong, names, counted=frozenset(names)).run(feed)


class TestPads:
    @pytest.mark.parametrize("axes", [[-1], [3, 2], [0, -2]], ids=str)
    @pytest.mark.parametrize("mode", ["constant", "reflect"])
    def test_axes_are_spelled_out(self, axes: list[int], mode: str) -> None:
        constants = {"p": np.arange(1, 2 * len(axes) + 1), "a": np.array(axes)}
        pad = node("Pad", ["x", "p", "", "a"], "y", mode=mode)
        made = check(model([pad], {"x": [9, 3, 9, 9]}, {"y": [None] * 4}, constants))
        assert len(only(made, "Pad").input) == 2

    def test_of_a_pad_that_is_not_constant_too(self) -> None:
        nodes = [node("Cast", ["q"], "p", to=7), node("Pad", ["x", "p", "", "a"], "y")]
        net = model(nodes, {"x": [1, 3, 8, 8], "q": [2]}, {"y": [None] * 4}, {"a": np.array([-1])})
        feed = {"x": random_feed(net)["x"], "q": vec(2, 1)}
        assert ops(check(net, feed=feed)) == {"Cast": 1, "ScatterElements": 1, "Pad": 1}

    def test_between_integer_convolutions(self) -> None:
        """onnxruntime moves a Pad to channels-last, and takes its pads to be those of all axes."""
        nodes = [
            node("Conv", ["x", "v"], "a"),
            node("Pad", ["a", "p", "", "axes"], "b"),
            node("Conv", ["b", "w"], "y"),
        ]
        shapes = {"x": [1, 16, 12, 12]}
        constants = {"v": weights(32, 16, 3, 3), "w": weights(16, 32, 3, 3),
                     "p": np.array([4, 4]), "axes": np.array([-1])}  # fmt: skip
        net = model(nodes, shapes, {"y": [None] * 4}, constants)
        _, outcome = quantized(net, feeds(shapes))
        assert outcome.sqnr > 30
