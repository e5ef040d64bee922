"""Biases and clamps that stand behind a Reshape of what they are for."""

import numpy as np
import onnx
import pytest
from models import model, node, weights
from prepared import check, only, ops

AXES = {"two": np.array([2]), "one": np.array([1])}


def matrix(
    *behind: onnx.NodeProto, shape: list[int | str], **constants: np.ndarray
) -> onnx.ModelProto:
    """A product of 8 by 24 with a Reshape, as TensorFlow has it, and what is behind that."""
    nodes = [node("MatMul", ["x", "w"], "p"), node("Reshape", ["p", "s"], "r"), *behind]
    sizes = [len(np.atleast_1d(constants["s"]))]
    constants = {"w": weights(8, 24), **constants}
    return model(nodes, {"x": shape}, {"y": [None] * sizes[0]}, constants)


class TestBehindAReshape:
    def test_bias_and_clamp(self) -> None:
        net = matrix(node("Add", ["r", "b"], "a"), node("Relu", ["a"], "y"), shape=[6, 8],
                     s=np.array([2, 3, 24]), b=weights(24, seed=1))  # fmt: skip
        made = check(net)
        assert ops(made) == {"Gemm": 1, "Relu": 1, "Reshape": 1}
        assert only(made, "Relu").input[0] == only(made, "Gemm").output[0]

    @pytest.mark.parametrize("bias", [(4, 6), (1, 4, 6), (6,), (4, 1)], ids=str)
    def test_bias_of_heads(self, bias: tuple[int, ...]) -> None:
        net = matrix(node("Add", ["b", "r"], "y"), shape=["n", 8],
                     s=np.array([-1, 3, 4, 6]), b=weights(*bias, seed=1))  # fmt: skip
        assert ops(check(net, feed={"x": weights(9, 8, seed=2)})) == {"Gemm": 1, "Reshape": 1}

    @pytest.mark.parametrize("bias", [(3, 1, 1), (3, 4, 6)], ids=str)
    def test_constant_of_rows_stays(self, bias: tuple[int, ...]) -> None:
        net = matrix(node("Add", ["r", "b"], "y"), shape=[6, 8],
                     s=np.array([2, 3, 4, 6]), b=weights(*bias, seed=1))  # fmt: skip
        assert ops(check(net)) == {"MatMul": 1, "Reshape": 1, "Add": 1}

    def test_bias_of_other_channels_stays(self) -> None:
        net = matrix(node("Add", ["r", "b"], "y"), shape=[6, 8],
                     s=np.array([3, 2, 12, 2]), b=weights(2, 12, 2, seed=1))  # fmt: skip
        assert ops(check(net))["Add"] == 1

    def test_one_value_behind_two_views(self) -> None:
        nodes = [
            node("MatMul", ["x", "w"], "p"),
            node("Unsqueeze", ["p", "one"], "u"),
            node("Reshape", ["u", "s"], "r"),
            node("Div", ["r", "c"], "d"),
            node("Clip", ["d", "", "c"], "y"),
        ]
        constants = {"w": weights(8, 4), "s": np.array([3, 2, 4]), "c": np.float32(0.5), **AXES}
        net = model(nodes, {"x": [6, 8]}, {"y": [3, 2, 4]}, constants)
        made = check(net)
        assert [n.op_type for n in made.graph.node][:2] == ["MatMul", "Clip"]

    def test_nothing_is_left_between_the_products_of_a_feed_forward_layer(self) -> None:
        """Which stands on 3 axes: the Relu goes before the Reshape back, which meets the next."""
        nodes = [
            node("MatMul", ["x", "w"], "p"),
            node("Add", ["p", "b"], "h"),
            node("Relu", ["h"], "r"),
            node("MatMul", ["r", "v"], "q"),
            node("Add", ["q", "c"], "y"),
        ]
        constants = {"w": weights(8, 24), "b": weights(24), "v": weights(24, 8), "c": weights(8)}
        made = check(model(nodes, {"x": [2, 3, 8]}, {"y": [2, 3, 8]}, constants))
        assert ops(made) == {"Gemm": 2, "Relu": 1, "Reshape": 2}

    def test_what_others_read_stays(self) -> None:
        net = matrix(node("Relu", ["r"], "q"), node("Mul", ["r", "q"], "y"), shape=[6, 8],
                     s=np.array([2, 3, 24]))  # fmt: skip
        made = check(net)
        assert only(made, "Relu").input[0] == only(made, "Reshape").output[0]

    def test_sub_from_a_constant(self) -> None:
        net = matrix(node("Sub", ["b", "r"], "y"), shape=[6, 8], s=np.array([2, 3, 24]),
                     b=weights(24, seed=1))  # fmt: skip
        check(net)


class TestOneDimension:
    """TensorFlow convolves in one dimension between Unsqueeze and Squeeze."""

    @pytest.mark.parametrize("length", [20, "length"])
    def test_convolutions_meet(self, length: int | str) -> None:
        nodes = [node("Unsqueeze", ["x", "two"], "u")]
        constants = {**AXES}
        for i, last in enumerate(["u", "v"]):
            nodes += [
                node("Conv", [last, f"w{i}"], f"c{i}", pads=[0, 1, 0, 1]),
                node("Squeeze", [f"c{i}", "two"], f"s{i}"),
                node("Add", [f"s{i}", f"b{i}"], f"a{i}"),
                node("Relu", [f"a{i}"], "y" if i else "r"),
            ]
            if not i:
                nodes.append(node("Unsqueeze", ["r", "two"], "v"))
            constants[f"w{i}"] = weights(8, 8, 1, 3, seed=i)
            constants[f"b{i}"] = weights(1, 8, 1, seed=i)
        net = model(nodes, {"x": [2, 8, length]}, {"y": [2, 8, length]}, constants)
        made = check(net, feed={"x": weights(2, 8, 20)})
        assert ops(made) == {"Unsqueeze": 1, "Conv": 2, "Relu": 2, "Squeeze": 1}

    def test_other_axes_stay(self) -> None:
        nodes = [node("Squeeze", ["x", "two"], "s"), node("Unsqueeze", ["s", "one"], "y")]
        net = model(nodes, {"x": [2, 3, 1, 5]}, {"y": [2, 1, 3, 5]}, AXES)
        assert ops(check(net)) == {"Squeeze": 1, "Unsqueeze": 1}

    def test_the_other_way(self) -> None:
        nodes = [node("Unsqueeze", ["x", "last"], "u"), node("Squeeze", ["u", "two"], "s")]
        nodes.append(node("Relu", ["s"], "y"))
        constants = {"last": np.array([-1]), "two": np.array([2])}
        assert ops(check(model(nodes, {"x": [2, 3]}, {"y": [2, 3]}, constants))) == {"Relu": 1}


def reshaped(rank: int, *steps: onnx.NodeProto, **constants: np.ndarray) -> onnx.ModelProto:
    """A Reshape of x, for an unknown number of images, to what is made of its shape."""
    nodes = [node("Shape", ["x"], "s"), *steps, node("Reshape", ["x", "t"], "r")]
    given = {"first": np.array([0]), "two": np.array([0, 1]), "end": np.array([1]), **constants}
    used = {name for n in nodes for name in n.input}
    given = {k: v for k, v in given.items() if k in used}
    nodes.append(node("Relu", ["r"], "y"))
    return model(nodes, {"x": ["n", 3, 4, 5]}, {"y": [None] * rank}, given)


class TestOneUnknownDimension:
    @pytest.mark.parametrize(
        "net",
        [
            reshaped(
                2,
                node("Cast", ["s"], "i", to=onnx.TensorProto.INT32),
                node("Slice", ["i", "first", "end"], "b"),
                node("Concat", ["b", "rest"], "c", axis=0),
                node("Cast", ["c"], "t", to=onnx.TensorProto.INT64),
                rest=np.array([60], np.int32),
            ),
            reshaped(
                3,
                node("Gather", ["s", "two"], "g"),
                node("ReduceProd", ["g", "first"], "p"),
                node("Concat", ["p", "rest"], "t", axis=0),
                rest=np.array([4, 5]),
            ),
            reshaped(
                4,
                node("Gather", ["s", "two"], "g"),
                node("Max", ["g", "g", "ones"], "m"),
                node("Concat", ["m", "rest"], "t", axis=0),
                rest=np.array([5, 4]),
                ones=np.array([1, 1]),
            ),
        ],
        ids=["flattened", "product", "largest"],
    )
    def test_is_left_to_the_reshape(self, net: onnx.ModelProto) -> None:
        assert ops(check(net)) == {"Reshape": 1, "Relu": 1}

    @pytest.mark.parametrize("rest", [[-1, 5], [0, 20]], ids=str)
    def test_beside_another(self, rest: list[int]) -> None:
        first = node("Slice", ["s", "first", "end"], "b")
        concat = node("Concat", ["b", "rest"], "t", axis=0)
        made = check(reshaped(3, first, concat, rest=np.array(rest)))
        assert ops(made)["Concat"] == 1

    def test_a_slice_of_numbers_that_are_known(self) -> None:
        made = check(
            reshaped(
                4,
                node("Cast", ["s"], "i", to=onnx.TensorProto.INT32),
                node("Slice", ["i", "end", "four"], "k"),
                node("Concat", ["minus", "k"], "c", axis=0),
                node("Cast", ["c"], "t", to=onnx.TensorProto.INT64),
                four=np.array([4]),
                minus=np.array([-1], np.int32),
            )
        )
        assert ops(made) == {"Relu": 1}
