"""Linear operators: factors, offsets, biases and padding folded where that is exact."""

import numpy as np
import onnx
import pytest
from harness import run
from hypothesis import given, settings
from hypothesis import strategies as st
from models import model, node, retyped, rng, weights
from prepared import check, constant, only, ops, random_feed

from qdq.prepare import prepare


def f32(*shape: int, seed: int = 7, low: float = 0.5, high: float = 2.0) -> np.ndarray:
    """Positive values, safe to divide by."""
    return rng(seed).uniform(low, high, shape).astype(np.float32)


def batchnorm(channels: int, prefix: str = "bn", seed: int = 3) -> dict[str, np.ndarray]:
    r = rng(seed)
    values = (
        r.uniform(-2, 2, channels),
        r.standard_normal(channels),
        r.standard_normal(channels),
        r.uniform(0.1, 3, channels),
    )
    names = ("scale", "bias", "mean", "var")
    return {f"{prefix}_{n}": v.astype(np.float32) for n, v in zip(names, values, strict=True)}


def bn_inputs(x: str, prefix: str = "bn") -> list[str]:
    return [x, *(f"{prefix}_{n}" for n in ("scale", "bias", "mean", "var"))]


class TestBatchNormBehind:
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize(
        ("op", "shape", "out", "attrs"),
        [
            ("Conv", (6, 4, 3, 3), 6, {"pads": [1, 1, 1, 1]}),
            ("Conv", (6, 2, 3, 3), 6, {"group": 2}),
            ("Conv", (4, 1, 3, 3), 4, {"group": 4, "auto_pad": "SAME_UPPER"}),
            ("ConvTranspose", (4, 3, 2, 2), 3, {"strides": [2, 2]}),
            ("ConvTranspose", (4, 3, 2, 2), 6, {"group": 2}),
        ],
    )
    def test_convolutions(self, op, shape, out, attrs, bias) -> None:
        constants = {"w": weights(*shape), "b": f32(out), **batchnorm(out)}
        inputs = ["x", "w", "b"] if bias else ["x", "w"]
        nodes = [node(op, inputs, "h", **attrs), node("BatchNormalization", bn_inputs("h"), "y")]
        net = model(nodes, {"x": [2, 4, 5, 5]}, {"y": [2, out, None, None]}, constants)
        made = check(net)
        assert ops(made) == {op: 1}
        assert constant(made, made.graph.node[0].input[2]).shape == (out,)

    def test_gemm(self) -> None:
        constants = {"w": weights(5, 7), "b": f32(5), **batchnorm(5)}
        nodes = [
            node("Gemm", ["x", "w", "b"], "h", transB=1),
            node("BatchNormalization", bn_inputs("h"), "y", epsilon=0.1),
        ]
        assert ops(check(model(nodes, {"x": [3, 7]}, {"y": [3, 5]}, constants))) == {"Gemm": 1}

    def test_training_stays(self) -> None:
        constants = {"w": weights(4, 4, 1, 1), **batchnorm(4)}
        outputs = ["y", "mean", "var"]
        bn = node("BatchNormalization", bn_inputs("h"), outputs, training_mode=1)
        shape = [2, 4, 3, 3]
        net = model([node("Conv", ["x", "w"], "h"), bn], {"x": shape}, {"y": shape}, constants)
        assert ops(prepare(net)) == {"Conv": 1, "BatchNormalization": 1}

    def test_statistics_that_are_read_keep_it(self) -> None:
        """Up to opset 13, outputs alone say that it trains: a Conv cannot make them."""
        constants = {"w": weights(4, 4, 1, 1), **batchnorm(4)}
        outputs = ["y", "mean", "var", "saved_mean", "saved_var"]
        nodes = [
            node("Conv", ["x", "w"], "h"),
            node("BatchNormalization", bn_inputs("h"), outputs),
        ]
        shape = [2, 4, 3, 3]
        for more, kept in (({"mean": [4]}, 1), ({}, 1)):
            made = prepare(model(nodes, {"x": shape}, {"y": shape, **more}, constants, opset=13))
            assert ops(made)["BatchNormalization"] == kept

    def test_two_readers_in_between_keep_it(self) -> None:
        constants = {"w": weights(4, 4, 1, 1), **batchnorm(4)}
        nodes = [
            node("Conv", ["x", "w"], "h"),
            node("BatchNormalization", bn_inputs("h"), "n"),
            node("Add", ["h", "n"], "y"),
        ]
        shape = [1, 4, 3, 3]
        made = check(model(nodes, {"x": shape}, {"y": shape}, constants))
        assert ops(made)["BatchNormalization"] == 1

    def test_an_output_in_between_keeps_it(self) -> None:
        constants = {"w": weights(4, 4, 1, 1), **batchnorm(4)}
        nodes = [
            node("Conv", ["x", "w"], "h"),
            node("BatchNormalization", bn_inputs("h"), "y"),
        ]
        shape = [1, 4, 3, 3]
        made = check(model(nodes, {"x": shape}, {"h": shape, "y": shape}, constants))
        assert ops(made)["BatchNormalization"] == 1

    def test_a_subgraph_that_reads_in_between_keeps_it(self) -> None:
        constants = {"w": weights(4, 4, 1, 1), "c": np.array(True), **batchnorm(4)}
        branches = [
            onnx.helper.make_graph(
                [onnx.helper.make_node(op, ["h"], [op])],
                op,
                [],
                [onnx.helper.make_tensor_value_info(op, 1, None)],
            )
            for op in ("Relu", "Exp")
        ]
        branch = node("If", ["c"], "z", then_branch=branches[0], else_branch=branches[1])
        nodes = [
            node("Conv", ["x", "w"], "h"),
            node("BatchNormalization", bn_inputs("h"), "y"),
            branch,
        ]
        shape = [1, 4, 3, 3]
        made = check(model(nodes, {"x": shape}, {"y": shape, "z": shape}, constants))
        assert ops(made)["BatchNormalization"] == 1

    def test_a_shared_weight_is_not_scaled_for_the_other_reader(self) -> None:
        constants = {"w": weights(4, 4, 1, 1), **batchnorm(4)}
        nodes = [
            node("Conv", ["x", "w"], "h"),
            node("BatchNormalization", bn_inputs("h"), "n"),
            node("Conv", ["n", "w"], "y"),
        ]
        shape = [1, 4, 3, 3]
        made = check(model(nodes, {"x": shape}, {"y": shape}, constants))
        assert ops(made) == {"Conv": 2}
        np.testing.assert_array_equal(constant(made, "w"), constants["w"])


class TestBatchNormBefore:
    def test_conv_without_padding(self) -> None:
        constants = {"w": weights(6, 2, 3, 3), "b": f32(6), **batchnorm(4)}
        nodes = [
            node("BatchNormalization", bn_inputs("x"), "n"),
            node("Conv", ["n", "w", "b"], "y", group=2),
        ]
        made = check(model(nodes, {"x": [1, 4, 5, 5]}, {"y": [1, 6, 3, 3]}, constants))
        assert ops(made) == {"Conv": 1}

    @pytest.mark.parametrize("attrs", [{"pads": [0, 1, 0, 0]}, {"auto_pad": "SAME_LOWER"}])
    def test_conv_with_padding_keeps_it(self, attrs) -> None:
        constants = {"w": weights(4, 4, 3, 3), **batchnorm(4)}
        nodes = [
            node("BatchNormalization", bn_inputs("x"), "n"),
            node("Conv", ["n", "w"], "y", **attrs),
        ]
        shape = [1, 4, None, None]
        made = check(model(nodes, {"x": [1, 4, 5, 5]}, {"y": shape}, constants))
        assert ops(made) == {"BatchNormalization": 1, "Conv": 1}

    def test_gemm(self) -> None:
        constants = {"w": weights(4, 6), **batchnorm(4)}
        nodes = [node("BatchNormalization", bn_inputs("x"), "n"), node("Gemm", ["n", "w"], "y")]
        assert ops(check(model(nodes, {"x": [2, 4]}, {"y": [2, 6]}, constants))) == {"Gemm": 1}

    @pytest.mark.parametrize("steps", [("Add", "Mul"), ("Mul", "Add"), ("Sub", "Div", "Add")])
    @pytest.mark.parametrize("op", ["Conv", "Gemm"])
    def test_maps_in_a_row_are_one_after_the_other(self, op: str, steps: tuple[str, ...]) -> None:
        shape = [2, 4, 3, 3] if op == "Conv" else [2, 4]
        constants = {"w": f32(4, 4, *shape[2:]), "b": f32(4)}
        nodes, last = [], "x"
        for i, step in enumerate(steps):
            constants[f"k{i}"] = f32(1, 4, *(1 for _ in shape[2:]), seed=i)
            nodes.append(node(step, [last, f"k{i}"], f"a{i}"))
            last = f"a{i}"
        nodes.append(node(op, [last, "w", "b"], "y"))
        made = check(model(nodes, {"x": shape}, {"y": [2, 4, 1, 1][: len(shape)]}, constants))
        assert ops(made) == {op: 1}

    @pytest.mark.parametrize(
        ("channels", "factors", "offsets", "left"),
        [
            (32, 1, 32, ["Add"]),  # one factor for all is folded
            (32, 32, 32, ["Add", "Mul"]),
            (3, 1, 3, ["BatchNormalization"]),  # few channels last are slow for Add and Mul
            (3, 3, 3, ["BatchNormalization"]),
            (3, 3, 1, ["BatchNormalization"]),
            (3, 1, 1, ["Add"]),
        ],
    )
    def test_what_padding_keeps_outside(
        self, channels: int, factors: int, offsets: int, left: list[str]
    ) -> None:
        constants = {
            "w": weights(4, channels, 3, 3),
            "s": f32(1, factors, 1, 1),
            "t": f32(offsets, 1, 1),
        }
        nodes = [
            node("Mul", ["x", "s"], "m"),
            node("Add", ["m", "t"], "a"),
            node("Conv", ["a", "w"], "y", pads=[1] * 4),
        ]
        net = model(nodes, {"x": [1, channels, 5, 5]}, {"y": [1, 4, 5, 5]}, constants)
        assert sorted(ops(check(net)).elements()) == sorted([*left, "Conv"])

    def test_a_zero_factor(self) -> None:
        constants = {"w": weights(4, 4, 3, 3), "s": np.float32(0), "t": np.float32(1)}
        nodes = [
            node("Mul", ["x", "s"], "m"),
            node("Add", ["m", "t"], "a"),
            node("Conv", ["a", "w"], "y", pads=[1] * 4),
        ]
        shape = [1, 4, 5, 5]
        check(model(nodes, {"x": shape}, {"y": shape}, constants))


class TestGemm:
    @pytest.mark.parametrize("trans_a", [0, 1])
    @pytest.mark.parametrize("trans_b", [0, 1])
    @pytest.mark.parametrize("c", [None, (), (1,), (5,), (1, 1), (1, 5), (3, 1), (3, 5)])
    def test_every_form(self, trans_a, trans_b, c) -> None:
        constants = {"w": weights(*((5, 7) if trans_b else (7, 5)))}
        inputs = ["x", "w"]
        if c is not None:
            constants["c"] = f32(*c)
            inputs.append("c")
        gemm = node("Gemm", inputs, "y", alpha=0.5, beta=3.0, transA=trans_a, transB=trans_b)
        shape = [7, 3] if trans_a else [3, 7]
        made = check(model([gemm], {"x": shape}, {"y": [3, 5]}, constants))
        n = only(made, "Gemm")
        assert not n.attribute
        assert constant(made, n.input[1]).shape == (7, 5)
        rows = c in ((3, 1), (3, 5))
        assert ops(made)["Add"] == rows
        assert constant(made, n.input[2]).shape == (5,)
        assert constant(made, n.input[2]).any() == (c is not None and not rows)

    def test_an_addend_that_counts_nothing_goes(self) -> None:
        gemm = node("Gemm", ["x", "w", "c"], "y", beta=0.0)
        constants = {"w": weights(7, 5), "c": f32(3, 5)}
        made = check(model([gemm], {"x": [3, 7]}, {"y": [3, 5]}, constants))
        assert ops(made) == {"Gemm": 1}

    def test_weight_shared_by_two_stays_shared(self) -> None:
        nodes = [node("Gemm", ["x", "w"], "h", transB=1), node("Gemm", ["h", "w"], "y", transB=1)]
        made = check(model(nodes, {"x": [2, 4]}, {"y": [2, 4]}, {"w": weights(4, 4)}))
        assert sum(len(t.dims) == 2 for t in made.graph.initializer) == 1

    def test_one_weight_in_two_forms(self) -> None:
        nodes = [
            node("Gemm", ["x", "w"], "h", alpha=0.5, transB=1),
            node("Gemm", ["h", "w"], "y", alpha=0.5),
        ]
        check(model(nodes, {"x": [2, 4]}, {"y": [2, 4]}, {"w": weights(4, 4)}))

    def test_activation_times_activation_stays(self) -> None:
        gemm = node("Gemm", ["x", "z", "v"], "y", alpha=2.0, beta=0.5, transB=1)
        made = check(model([gemm], {"x": [2, 4], "z": [3, 4], "v": [3]}, {"y": [2, 3]}))
        assert made.graph.node[0] == gemm


class TestMatMul:
    @pytest.mark.parametrize(
        ("x", "y"),
        [
            ([3, 8], [3, 6]),
            (["N", 8], ["N", 6]),
            ([2, 3, 8], [2, 3, 6]),
            (["N", 3, 8], ["N", 3, 6]),
            (["N", "T", 8], ["N", "T", 6]),
            ([2, 2, 2, 8], [2, 2, 2, 6]),
        ],
    )
    @pytest.mark.parametrize("bias", [(6,), (1, 6), (1,), ()])
    def test_bias(self, x, y, bias) -> None:
        nodes = [node("MatMul", ["x", "w"], "h"), node("Add", ["b", "h"], "y")]
        made = check(model(nodes, {"x": x}, {"y": y}, {"w": weights(8, 6), "b": f32(*bias)}))
        gemm = only(made, "Gemm")
        assert gemm.name == "MatMul_h"
        assert constant(made, gemm.input[2]).shape == (6,)
        assert ops(made)["MatMul"] == ops(made)["Add"] == 0
        assert ops(made)["Reshape"] == (0 if len(x) == 2 else 2)

    def test_bias_that_is_none(self) -> None:
        # varies along the rows; widens; comes from an activation
        nodes = [
            node("MatMul", ["x", "w"], "a"),
            node("Add", ["a", "rows"], "b"),
            node("MatMul", ["b", "w"], "c"),
            node("Add", ["c", "wide"], "d"),
            node("MatMul", ["d", "w"], "e"),
            node("Add", ["e", "x"], "y"),
        ]
        constants = {"w": weights(4, 4), "rows": f32(3, 1), "wide": f32(2, 1, 1, 4)}
        made = check(model(nodes, {"x": [1, 3, 4]}, {"y": [2, 1, 3, 4]}, constants))
        assert ops(made) == {"MatMul": 3, "Add": 3}

    def test_a_matrix_with_axes_of_length_1(self) -> None:
        nodes = [
            node("MatMul", ["x", "w"], "a"),
            node("Add", ["a", "b"], "y"),
            node("MatMul", ["x", "w"], "z"),
        ]
        constants = {"w": weights(1, 1, 6, 5), "b": f32(5)}
        net = model(nodes, {"x": [2, 3, 4, 6]}, {"y": [2, 3, 4, 5], "z": [2, 3, 4, 5]}, constants)
        made = check(net)
        assert ops(made) == {"Reshape": 2, "Gemm": 1, "MatMul": 1}
        assert only(made, "Gemm").input[1] == only(made, "MatMul").input[1]

    @pytest.mark.parametrize(("x", "w"), [([4, 6], [1, 6, 5]), ([2, 4, 6], [2, 6, 5])])
    def test_other_stacks_of_matrices_stay(self, x: list[int], w: list[int]) -> None:
        y = {"y": [w[0], 4, 5]}
        net = model([node("MatMul", ["x", "w"], "y")], {"x": x}, y, {"w": weights(*w)})
        assert [t.dims for t in check(net).graph.initializer] == [w]

    def test_three_of_one_x_share_its_reshape(self) -> None:
        nodes, constants = [], {}
        for k in "qkv":
            constants |= {f"w{k}": weights(8, 8), f"b{k}": f32(8)}
            nodes += [node("MatMul", ["x", f"w{k}"], f"m{k}"), node("Add", [f"m{k}", f"b{k}"], k)]
        shape = [2, 3, 8]
        made = check(model(nodes, {"x": shape}, {k: shape for k in "qkv"}, constants))
        assert ops(made) == {"Reshape": 4, "Gemm": 3}

    def test_a_factor_alone_leaves_a_matmul(self) -> None:
        nodes = [node("MatMul", ["x", "w"], "h"), node("Div", ["h", "s"], "y")]
        constants = {"w": weights(8, 8), "s": np.float32(8)}
        made = check(model(nodes, {"x": [2, 3, 8]}, {"y": [2, 3, 8]}, constants))
        assert ops(made) == {"MatMul": 1}

    def test_batchnorm_on_another_axis_stays(self) -> None:
        constants = {"w": weights(8, 3), **batchnorm(3)}
        nodes = [
            node("MatMul", ["x", "w"], "h"),
            node("BatchNormalization", bn_inputs("h"), "y"),
        ]
        made = check(model(nodes, {"x": [2, 3, 8]}, {"y": [2, 3, 3]}, constants))
        assert ops(made) == {"MatMul": 1, "BatchNormalization": 1}

    def test_reshapes_in_a_row_become_one(self) -> None:
        nodes = [
            node("MatMul", ["x", "w"], "h"),
            node("Add", ["h", "b"], "a"),
            node("Reshape", ["a", "heads"], "y"),
        ]
        constants = {"w": weights(8, 6), "b": f32(6), "heads": np.array([0, 0, 2, -1])}
        made = check(model(nodes, {"x": [2, 3, 8]}, {"y": [2, 3, 2, 3]}, constants))
        assert ops(made) == {"Reshape": 2, "Gemm": 1}


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["Add", "Sub", "Mul", "Div"]),
        st.booleans(),  # constant first
        st.sampled_from(["scalar", "one", "channel", "full", "wide"]),
    ),
    max_size=4,
)


@settings(deadline=None, max_examples=60)
@given(kind=st.sampled_from(["Conv", "ConvTranspose", "Gemm", "MatMul"]), steps=STEPS,
       bias=st.booleans())  # fmt: skip
def test_any_chain_of_constants_keeps_the_output(kind, steps, bias) -> None:
    """Whatever is folded or not, forwards or backwards, the floats stay."""
    spatial = kind in ("Conv", "ConvTranspose")
    shape = [2, 4, 3, 3] if spatial else [2, 4] if kind == "Gemm" else [2, 3, 4]
    forms = {
        "scalar": (),
        "one": (1,),
        "channel": (1, 4, 1, 1) if spatial else (4,),
        "full": (4, 3, 3) if spatial else (2, 4) if kind == "Gemm" else (3, 4),
        "wide": (1, *shape),
    }
    constants = {"w": weights(4, 4, 1, 1) if spatial else weights(4, 4), "b": f32(4)}
    nodes = []

    def affine(last: str, tag: str) -> str:
        for i, (op, first, form) in enumerate(steps):
            name = f"k{tag}{i}"
            constants[name] = f32(*forms[form], seed=i)
            nodes.append(node(op, [name, last] if first else [last, name], f"{tag}{i}"))
            last = f"{tag}{i}"
        return last

    plain = not any(form == "wide" for *_, form in steps)
    if not plain and spatial:
        steps = [s for s in steps if s[2] != "wide"]
    before = affine("x", "f") if plain or spatial else "x"
    inputs = [before, "w", "b"] if bias and kind != "MatMul" else [before, "w"]
    nodes.append(node(kind, inputs, "h"))
    nodes.append(node("Relu", [affine("h", "g")], "y"))
    net = model(nodes, {"x": shape}, {"y": [None] * (len(shape) + (not plain and not spatial))},
                constants)  # fmt: skip
    feed = {k: np.abs(v) + 0.5 for k, v in random_feed(net).items()}  # no poles of k / x
    check(net, 1e-4, feed)


class TestPad:
    def conv(self, pads: list[int], attrs: dict, value: float | None = 0.0) -> onnx.ModelProto:
        constants = {"p": np.array(pads), "w": weights(4, 4, 3, 3)}
        if value is not None:
            constants["v"] = np.float32(value)
        inputs = ["x", "p"] if value is None else ["x", "p", "v"]
        nodes = [node("Pad", inputs, "h"), node("Conv", ["h", "w"], "y", **attrs)]
        return model(nodes, {"x": [1, 4, 6, 6]}, {"y": [1, 4, None, None]}, constants)

    @pytest.mark.parametrize("value", [None, 0.0])
    @pytest.mark.parametrize("attrs", [{}, {"pads": [1, 0, 0, 1]}, {"auto_pad": "VALID"}])
    def test_folds_into_conv(self, attrs, value) -> None:
        made = check(self.conv([0, 0, 1, 2, 0, 0, 0, 1], attrs, value))
        assert ops(made) == {"Conv": 1}

    @pytest.mark.parametrize(
        ("before", "attrs", "folds"),
        [
            ("Relu", {}, True),
            ("Sigmoid", {"strides": [2, 2]}, True),
            ("Relu", {"pads": [1, 1, 0, 0]}, True),
            ("Tanh", {}, False),
            ("Relu", {"dilations": [2, 2]}, False),
            ("Relu", {"ceil_mode": 1}, False),
            ("Relu", {"kernel_shape": [2, 2]}, False),
        ],
        ids=str,
    )
    def test_max_pool_of_what_is_above_zero(self, before: str, attrs: dict, folds: bool) -> None:
        nodes = [
            node(before, ["x"], "r"),
            node("Pad", ["r", "p"], "h"),
            node("MaxPool", ["h"], "y", **{"kernel_shape": [3, 3], **attrs}),
        ]
        constants = {"p": np.array([0, 0, 1, 1, 0, 0, 2, 1])}
        made = check(model(nodes, {"x": [1, 4, 6, 6]}, {"y": [1, 4, None, None]}, constants))
        assert ops(made)["Pad"] == (not folds)

    @pytest.mark.parametrize(
        ("low", "folds"), [(0.0, True), (0.5, True), (-1.0, False), (None, False)]
    )
    def test_max_pool_of_what_is_clipped(self, low: float | None, folds: bool) -> None:
        nodes = [
            node("Clip", ["x", "l" if low is not None else "", "u"], "r"),
            node("Pad", ["r", "p"], "h"),
            node("MaxPool", ["h"], "y", kernel_shape=[3, 3]),
        ]
        constants = {"p": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "u": np.float32(1)}
        if low is not None:
            constants["l"] = np.float32(low)
        feed = {"x": -np.abs(f32(1, 4, 6, 6))}
        made = check(model(nodes, {"x": [1, 4, 6, 6]}, {"y": [1, 4, 6, 6]}, constants), feed=feed)
        assert ops(made)["Pad"] == (not folds)

    @pytest.mark.parametrize("seen", [False, True])
    def test_each_reader_takes_what_it_can(self, seen: bool) -> None:
        nodes = [
            node("Pad", ["x", "p"], "h"),
            node("Conv", ["h", "w"], "a"),
            node("Conv", ["h", "w"], "b", strides=[2, 2]),
            *([node("MaxPool", ["h"], "m", kernel_shape=[2, 2])] if seen else []),
        ]
        constants = {"p": np.array([0, 0, 1, 2, 0, 0, 1, 0]), "w": weights(4, 4, 3, 3)}
        outputs = {name: [1, 4, None, None] for name in ("a", "b", "m")[: 2 + seen]}
        made = check(model(nodes, {"x": [1, 4, 6, 6]}, outputs, constants))
        assert ops(made) == {"Conv": 2, **({"Pad": 1, "MaxPool": 1} if seen else {})}
        assert all(n.input[0] == "x" for n in made.graph.node if n.op_type == "Conv")

    @pytest.mark.parametrize(
        ("pads", "attrs", "value"),
        [
            ([0, 0, 1, 1, 0, 0, 1, 1], {}, 1.0),
            ([0, 0, 1, 1, 0, 0, 1, 1], {"auto_pad": "SAME_UPPER"}, 0.0),
            ([0, 0, -1, 1, 0, 0, 1, 1], {}, 0.0),
            ([1, 0, 0, 1, 0, 0, 1, 1], {}, 0.0),
            ([0, 0, 4, 1, 0, 0, 1, 1], {}, 0.0),
        ],
    )
    def test_stays(self, pads, attrs, value) -> None:
        net = self.conv(pads, attrs, value)
        net.graph.output[0].type.tensor_type.shape.dim[0].ClearField("dim_value")
        assert ops(check(net)) == {"Pad": 1, "Conv": 1}

    def test_axes(self) -> None:
        constants = {"p": np.array([1, 2]), "a": np.array([-1]), "w": weights(4, 4, 3, 3)}
        nodes = [node("Pad", ["x", "p", "", "a"], "h"), node("Conv", ["h", "w"], "y")]
        made = check(model(nodes, {"x": [1, 4, 6, 6]}, {"y": [1, 4, 4, 7]}, constants))
        assert ops(made) == {"Conv": 1}

    def pool(self, op: str, **attrs: object) -> onnx.ModelProto:
        nodes = [node("Pad", ["x", "p"], "h"), node(op, ["h"], "y", kernel_shape=[3, 3], **attrs)]
        constants = {"p": np.array([0, 0, 1, 1, 0, 0, 1, 1])}
        return model(nodes, {"x": [1, 2, 6, 6]}, {"y": [1, 2, None, None]}, constants)

    def test_average_pool(self) -> None:
        assert ops(check(self.pool("AveragePool"))) == {"AveragePool": 1}
        both = self.pool("AveragePool", pads=[1, 0, 0, 1], count_include_pad=1)
        assert ops(check(both)) == {"AveragePool": 1}

    @pytest.mark.parametrize(
        ("op", "attrs"),
        [
            ("MaxPool", {}),
            ("AveragePool", {"pads": [1, 1, 1, 1]}),
            ("AveragePool", {"pads": [2, 2, 2, 2], "count_include_pad": 1}),
            ("AveragePool", {"ceil_mode": 1, "strides": [2, 2]}),
        ],
    )
    def test_other_pools_stay(self, op, attrs) -> None:
        assert ops(check(self.pool(op, **attrs)))["Pad"] == 1

    def test_reflection_stays(self) -> None:
        net = self.conv([0, 0, 1, 1, 0, 0, 1, 1], {})
        net.graph.node[0].attribute.append(onnx.helper.make_attribute("mode", "reflect"))
        assert ops(check(net))["Pad"] == 1


class TestBias:
    def test_every_linear_node_has_one(self) -> None:
        nodes = [
            node("Conv", ["x", "w"], "c", group=2),
            node("Flatten", ["c"], "f"),
            node("Gemm", ["f", "v"], "y"),
        ]
        held = {"w": weights(6, 2, 1, 1), "v": weights(6, 5)}
        made = check(model(nodes, {"x": [3, 4, 1, 1]}, {"y": [3, 5]}, held))
        for op, width in (("Conv", 6), ("Gemm", 5)):
            bias = constant(made, only(made, op).input[2])
            assert bias.shape == (width,)
            assert not bias.any()


class TestBehindHardSwish:
    """What padding keeps from being folded stays in blocks of channels."""

    @staticmethod
    def net(*steps: tuple[str, str, str], channels: int = 16, act: str = "HardSwish", more=()):
        """x, a convolution, an activation h, the steps, and a padded convolution of the last."""
        nodes = [node("Conv", ["x", "w0"], "c"), node(act, ["c"], "h")]
        nodes += [node(op, inputs.split(), out) for op, inputs, out in steps]
        last = steps[-1][-1]
        nodes.append(node("Conv", [last, "w1"], "y", pads=[1, 1, 1, 1], group=channels))
        nodes += more
        outputs = ["y", *(n.output[0] for n in more)]
        constants = {
            "w0": weights(channels, 4, 1, 1),
            "w1": weights(channels, 1, 3, 3),
            "two": np.float32([2.5]),
            "off": np.float32([0.75]),
            "each": f32(1, channels, 1, 1),
        }
        made = {name: [1, channels, 6, 6] for name in outputs}
        return model(nodes, {"x": [1, 4, 6, 6]}, made, constants)

    @pytest.mark.parametrize(
        "steps",
        [
            [("Add", "h off", "s")],
            [("Add", "off h", "s")],
            [("Add", "h each", "s")],
            [("Mul", "two h", "m"), ("Add", "m off", "s")],
            [("Mul", "h two", "m"), ("Add", "off m", "s")],
        ],
    )
    def test_an_offset_in_front_of_padding(self, steps) -> None:
        wanted = {"Conv": 2, "HardSigmoid": 1, "Mul": 1, "BatchNormalization": 1}
        assert ops(check(self.net(*steps))) == wanted

    def test_a_factor_and_an_offset_with_two_readers(self) -> None:
        steps = [("Mul", "h each", "m"), ("Add", "m each", "s")]
        made = check(self.net(*steps, more=[node("Relu", ["s"], "z")]))
        assert ops(made) == {"Conv": 2, "HardSigmoid": 1, "Mul": 1, "BatchNormalization": 1,
                             "Relu": 1}  # fmt: skip

    def test_a_product_that_others_read_is_kept_apart(self) -> None:
        steps = [("Mul", "h each", "m"), ("Add", "m each", "s")]
        made = check(self.net(*steps, more=[node("Relu", ["m"], "z")]))
        assert ops(made)["BatchNormalization"] == 0
        assert ops(made)["Add"] == 1

    @pytest.mark.parametrize("other", [{"channels": 12}, {"act": "Relu"}, {"act": "Sigmoid"}])
    def test_others_stay(self, other) -> None:
        made = check(self.net(("Add", "h off", "s"), **other))
        assert ops(made)["Add"] == 1
        assert ops(made)["BatchNormalization"] == 0


def test_a_grey_image_that_constants_widen_to_three_channels() -> None:
    """What makes more channels of one cannot go into a Conv that then would read one."""
    constants = {"s": f32(1, 3, 1, 1), "t": f32(1, 3, 1, 1), "w": weights(4, 3, 3, 3)}
    nodes = [node("Mul", ["x", "s"], "a"), node("Sub", ["a", "t"], "b"),
             node("Conv", ["b", "w"], "y")]  # fmt: skip
    check(model(nodes, {"x": [1, 1, 8, 8]}, {"y": [1, 4, 6, 6]}, constants))


def test_what_would_overflow_float32_stays_outside() -> None:
    """And nothing warns: a variance below 0 gives NaN, in the model as it is too."""
    bad = {**batchnorm(4), "bn_var": np.full(4, -1, np.float32)}
    tails = {
        "Mul": (node("Mul", ["h", "k"], "y"), {"k": np.float32(1e30)}),
        "BatchNormalization": (node("BatchNormalization", bn_inputs("h"), "y"), bad),
    }
    for op, (tail, constants) in tails.items():
        net = model([node("Conv", ["x", "w"], "h"), tail], {"x": [1, 3, 8, 8]}, {"y": [1, 4, 6, 6]},
                    {"w": weights(4, 3, 3, 3) * np.float32(1e10), **constants})  # fmt: skip
        made = prepare(net)
        assert ops(made) == {"Conv": 1, op: 1}
        assert all(np.isfinite(constant(made, t.name)).all() for t in made.graph.initializer)


def test_shapes_are_known_behind_the_scaler_of_a_pipeline() -> None:
    scaler = onnx.helper.make_node(
        "Scaler", ["x"], ["s"], "s", domain="ai.onnx.ml", offset=[0.5] * 8, scale=[2.0] * 8
    )
    nodes = [node("MatMul", ["s", "w"], "m"), node("Add", ["m", "b"], "y")]
    net = model(nodes, {"s": ["n", 8]}, {"y": ["n", 4]}, {"w": weights(8, 4), "b": weights(4)})
    net.graph.input[0].name = "x"
    net.graph.node.insert(0, scaler)
    net.opset_import.add(domain="ai.onnx.ml", version=3)
    assert [n.op_type for n in prepare(net).graph.node] == ["Scaler", "Gemm"]


@pytest.mark.parametrize("opset", [9, 13])
def test_batch_normalization_in_training_mode_is_not_folded(opset: int) -> None:
    nodes = [
        node("Conv", ["x", "w"], "c"),
        onnx.helper.make_node(
            "BatchNormalization", ["c", "s", "b", "m", "v"], ["y", "m2", "v2", "m3", "v3"], "bn"
        ),
    ]
    constants = {k: weights(4) for k in ("s", "b", "m")}
    constants |= {"w": weights(4, 3, 3, 3), "v": np.ones(4, np.float32)}
    net = model(nodes, {"x": [2, 3, 8, 8]}, {"y": [2, 4, 6, 6]}, constants, opset=opset)
    data = {"x": np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)}
    (exact,), (found,) = (run(m, [data], fused=False) for m in (net, prepare(net)))
    assert np.allclose(exact[0], found[0], atol=1e-5)


class TestEinsum:
    @pytest.mark.parametrize(
        ("equation", "x", "w", "y"),
        [
            ("ibh,hnd->ibnd", ["N", "S", 6], (6, 2, 3), ["N", "S", 2, 3]),  # XLNet's q, k, v
            ("ibnd,hnd->ibh", ["N", "S", 2, 3], (6, 2, 3), ["N", "S", 6]),  # and its output
            ("td, dnh -> tnh", [5, 6], (6, 2, 3), [5, 2, 3]),
            ("bd,od->bo", ["N", 6], (4, 6), ["N", 4]),
            ("bd,do", ["N", 6], (6, 4), ["N", 4]),
            ("...d,od->...o", ["N", 3, 6], (4, 6), ["N", 3, 4]),
            ("...d,de", [2, 3, 6], (6, 4), [2, 3, 4]),
            ("...bd,...od->...bo", [3, 6], (4, 6), [3, 4]),
        ],
    )
    def test_by_a_constant_becomes_a_product(self, equation, x, w, y) -> None:
        nodes = [node("Einsum", ["x", "w"], "y", equation=equation)]
        made = check(model(nodes, {"x": x}, {"y": y}, {"w": weights(*w)}))
        assert ops(made)["MatMul"] == 1
        assert ops(made)["Einsum"] == 0

    def test_on_the_left_side(self) -> None:
        nodes = [node("Einsum", ["w", "x"], "y", equation="od,bd->bo")]
        made = check(model(nodes, {"x": [3, 6]}, {"y": [3, 4]}, {"w": weights(4, 6)}))
        assert ops(made) == {"MatMul": 1}

    @pytest.mark.parametrize(
        ("equation", "turns"),
        [
            ("bhlk,bhtk->bhlt", 1),  # CvT
            ("ibnd,jbnd->bnij", 2),  # XLNet
            ("bqc,bck->bqk", 0),
            ("aecd,abcd->acbe", 2),  # Keras, scores: the second one has the rows
            ("acbe,aecd->abcd", 2),  # and what comes of them
            ("ij,jk->ki", 2),
            ("ij,kj->ik", 1),
            ("ij,ja", 2),  # the result is "ai"
        ],
    )
    @pytest.mark.parametrize("constant", [False, True])
    def test_a_batch_of_products(self, equation: str, turns: int, constant: bool) -> None:
        left, _, result = (equation if "->" in equation else f"{equation}->ai").partition("->")
        sizes = dict(zip("abcdehijklnqst", range(2, 16), strict=False))
        x, w, y = ([sizes[i] for i in term] for term in (*left.split(","), result))
        nodes = [node("Einsum", ["x", "w"], "y", equation=equation)]
        inputs = {"x": x} if constant else {"x": x, "w": w}
        constants = {"w": f32(*w)} if constant else {}
        made = check(model(nodes, inputs, {"y": y}, constants))
        assert ops(made)["Einsum"] == 0
        assert ops(made)["MatMul"] == 1
        assert ops(made)["Transpose"] <= turns

    def test_of_any_size(self) -> None:
        nodes = [node("Einsum", ["x", "w"], "y", equation="ibnd,jbnd->bnij")]
        inputs = {"x": ["i", "b", 2, 3], "w": ["j", "b", 2, 3]}
        made = prepare(model(nodes, inputs, {"y": ["b", 2, "i", "j"]}))
        assert ops(made) == {"Transpose": 2, "MatMul": 1}
        data = [{"x": f32(4, 5, 2, 3), "w": f32(6, 5, 2, 3, seed=1)}]
        ((found,),) = run(made, data, fused=False)
        exact = np.einsum("ibnd,jbnd->bnij", data[0]["x"], data[0]["w"])
        assert np.allclose(found, exact, atol=1e-5)

    @pytest.mark.parametrize(
        ("equation", "x", "w", "y"),
        [
            ("bdd,od->bo", [3, 6, 6], (4, 6), [3, 4]),  # a diagonal
            ("d,od->o", [6], (4, 6), [4]),
            ("b,o->bo", [3], (4,), [3, 4]),
            ("hib,hd->ibd", [6, 2, 3], (6, 4), [2, 3, 4]),  # sums over x's first axis
            ("bd,od->o", [3, 6], (4, 6), [4]),
            ("bd,ode->bo", [3, 6], (4, 6, 2), [3, 4]),  # sums over an axis of the constant alone
            ("...d,od->o...", [2, 3, 6], (6, 6), [6, 2, 3]),
            ("bd,do->", [3, 6], (6, 4), []),
            ("bij,bij->b", [2, 3, 4], (2, 3, 4), [2]),
            ("bi,bj->bij", [2, 3], (2, 4), [2, 3, 4]),
            ("bij,bjk->bik", [2, 3, 1], (2, 4, 5), [2, 3, 5]),  # widens
            ("bd,od->bo", [3, 1], (4, 6), [3, 4]),
            ("bd,od->bo", [3, 6], (4, 1), [3, 4]),
            ("bd,od->bo", [3, "D"], (4, 1), [3, 4]),
        ],
    )
    def test_others_stay(self, equation, x, w, y) -> None:
        nodes = [node("Einsum", ["x", "w"], "y", equation=equation)]
        made = check(model(nodes, {"x": x}, {"y": y}, {"w": weights(*w)}))
        assert ops(made) == {"Einsum": 1}


def attention(op: str, where: str, bias: bool = True, **more) -> onnx.ModelProto:
    """Scores of two heads; the factor on the queries, the keys or the scores."""
    constants = {"wq": weights(8, 8), "wk": weights(8, 8, seed=1), "c": np.float32(0.35)}
    constants |= {"heads": np.array([1, 6, 2, 4]), "bq": f32(8), "bk": f32(8, seed=1)}

    def projected(name: str, order: list[int]) -> list[onnx.NodeProto]:
        scaled = where == name
        return [
            node("MatMul", ["x", f"w{name}"], f"{name}0"),
            *([node("Add", [f"{name}0", f"b{name}"], f"{name}1")] if bias else []),
            node("Reshape", [f"{name}1" if bias else f"{name}0", "heads"], f"{name}2"),
            node("Transpose", [f"{name}2"], f"{name}3" if scaled else name, perm=order),
            *([node(op, [f"{name}3", "c"], name)] if scaled else []),
        ]

    late = where == "scores"
    nodes = [
        *projected("q", [0, 2, 1, 3]),
        *projected("k", [0, 2, 3, 1]),
        node("MatMul", ["q", "k"], "s0" if late else "s"),
        *([node(op, ["s0", "c"], "s")] if late else []),
        node("Softmax", ["s"], "y", axis=-1),
    ]
    return model(nodes, {"x": [1, 6, 8]}, {"y": [1, 2, 6, 6], **more}, constants)


def normalized(shape: list[int], dtype: type = np.float32) -> onnx.ModelProto:
    """Three channels, shifted and scaled in front of a padded Conv."""
    channels = [3, *[1] * (len(shape) - 2)]
    constants = {
        "m": rng(1).uniform(0.2, 0.6, channels).astype(dtype),
        "s": rng(2).uniform(0.1, 0.4, channels).astype(dtype),
        "w": rng(3).standard_normal((4, 3, *[3] * (len(shape) - 2))).astype(dtype),
    }
    pads = [1] * 2 * (len(shape) - 2)
    nodes = [
        node("Sub", ["x", "m"], "a"),
        node("Div", ["a", "s"], "b"),
        node("Conv", ["b", "w"], "y", pads=pads),
    ]
    net = model(nodes, {"x": shape}, {"y": [shape[0], 4, *shape[2:]]}, constants)
    for value in (*net.graph.input, *net.graph.output):
        value.type.tensor_type.elem_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return net


def test_images_of_float32_are_normalized_by_one_node() -> None:
    for net, kinds in (
        (normalized([1, 3, 8, 8]), {"BatchNormalization", "Conv"}),
        (normalized([1, 3, 8]), {"Sub", "Div", "Conv"}),
        (normalized([1, 3, 8, 8], np.float64), {"Sub", "Div", "Conv"}),
    ):
        assert set(ops(prepare(net))) == kinds


@pytest.mark.parametrize(
    ("channels", "steps", "reader", "norms"),
    [
        (16, ["Mul", "Add"], "Relu", 1),
        (16, ["Mul", "Add"], "Clip", 1),
        (16, ["Mul", "Add"], "Sigmoid", 0),
        (16, ["Mul"], "Relu", 0),
        (16, ["Add"], "Relu", 0),
        (10, ["Mul", "Add"], "Relu", 0),
    ],
    ids=str,
)
def test_normalization_before_activation_stays_in_blocks(
    channels: int, steps: list[str], reader: str, norms: int
) -> None:
    constants = {f"c{k}": weights(channels, 1, 1, seed=k) for k in range(len(steps))}
    nodes = [node("Add", ["x", "z"], "h0")]
    nodes += [node(op, [f"h{k}", f"c{k}"], f"h{k + 1}") for k, op in enumerate(steps)]
    nodes += [
        node(reader, [f"h{len(steps)}"], "r"),
        node("Conv", ["r", "w"], "y", pads=[1, 1, 1, 1]),
    ]
    shape = [2, channels, 5, 5]
    constants["w"] = weights(4, channels, 3, 3)
    made = check(model(nodes, {"x": shape, "z": shape}, {"y": [2, 4, 5, 5]}, constants))
    assert ops(made)["BatchNormalization"] == norms
    assert ops(made)["Add"] == 1 + (not norms and "Add" in steps)


@pytest.mark.parametrize("terms", [["x", "z"], ["x", "z", "x"], ["c", "x", "z", "z"]], ids=str)
def test_sums_are_adds(terms: list[str]) -> None:
    constants = {"c": weights(4, seed=1)} if "c" in terms else {}
    shape = [2, 3, 4]
    net = model([node("Sum", terms, "y")], {"x": shape, "z": shape}, {"y": shape}, constants)
    assert ops(check(net, tol=1e-6)) == {"Add": len(terms) - 1}


def test_a_bias_in_a_sum() -> None:
    nodes = [node("MatMul", ["x", "w"], "h"), node("Sum", ["h", "b"], "y")]
    constants = {"w": weights(8, 6), "b": f32(6)}
    assert ops(check(model(nodes, {"x": [3, 8]}, {"y": [3, 6]}, constants))) == {"Gemm": 1}


def channels_last(*steps: tuple[str, str, str], pads: int = 1) -> onnx.ModelProto:
    """An image with its channels last, as TensorFlow normalizes it, in front of a Conv."""
    constants = {
        "one": np.float32(0.01),
        "three": rng(1).uniform(0.2, 0.6, 3).astype(np.float32),
        "four": rng(2).uniform(0.2, 0.6, (1, 1, 1, 3)).astype(np.float32),
        "rows": rng(2).uniform(0.2, 0.6, (8, 1, 1)).astype(np.float32),
        "w": weights(4, 3, 3, 3),
    }
    nodes = [node(op, [a, b], f"h{k}") for k, (op, a, b) in enumerate(steps)]
    nodes += [
        node("Transpose", [f"h{len(steps) - 1}"], "t", perm=[0, 3, 1, 2]),
        node("Conv", ["t", "w"], "y", pads=[pads] * 4),
    ]
    used = {name for n in nodes for name in n.input}
    given = {k: v for k, v in constants.items() if k in used}
    return model(nodes, {"x": ["n", 8, 8, 3]}, {"y": ["n", 4, None, None]}, given)


@pytest.mark.parametrize(
    ("steps", "pads", "kinds"),
    [
        ([("Mul", "x", "one")], 1, {}),
        ([("Mul", "three", "x"), ("Add", "h0", "four")], 0, {}),
        ([("Mul", "x", "three"), ("Add", "four", "h0")], 1, {"BatchNormalization": 1}),
        ([("Sub", "x", "four"), ("Div", "h0", "three")], 1, {"BatchNormalization": 1}),
        ([("Mul", "x", "one"), ("Sub", "h0", "one")], 1, {"Add": 1}),
        ([("Sub", "one", "x")], 0, {}),
        ([("Mul", "x", "rows")], 1, {"Mul": 1}),
        ([("Mul", "x", "x"), ("Mul", "h0", "one")], 1, {"Mul": 1}),
    ],
    ids=str,
)
def test_an_image_with_channels_last_is_normalized_behind_the_transpose(
    steps: list[tuple[str, str, str]], pads: int, kinds: dict[str, int]
) -> None:
    made = check(channels_last(*steps, pads=pads))
    assert ops(made) == {"Transpose": 1, "Conv": 1, **kinds}
    order = [n.op_type for n in made.graph.node]
    assert order[0] == ("Mul" if "x" == steps[0][1] == steps[0][2] else "Transpose")


def test_what_else_reads_an_image_that_is_normalized() -> None:
    net = channels_last(("Mul", "x", "three"), ("Add", "h0", "four"))
    net.graph.output.append(onnx.helper.make_tensor_value_info("h0", 1, ["n", 8, 8, 3]))
    made = check(net)
    assert [n.op_type for n in made.graph.node][:2] == ["Mul", "Transpose"]


def test_an_einsum_of_two_constants_stays() -> None:
    nodes = [node("Einsum", ["v", "w"], "e", equation="bd,od->bo"), node("Add", ["x", "e"], "y")]
    constants = {"v": f32(3, 6), "w": f32(4, 6)}
    made = check(model(nodes, {"x": [3, 4]}, {"y": [3, 4]}, constants))
    assert ops(made) == {"Einsum": 1, "Add": 1}


class TestScaleQueries:
    def test_factors_of_all_three_at_once(self) -> None:
        net = attention("Mul", "scores")
        graph = net.graph
        at = next(k for k, n in enumerate(graph.node) if n.output[0] == "s0")
        for name in ("q", "k"):
            graph.node[at].input[{"q": 0, "k": 1}[name]] = f"{name}c"
            graph.node.insert(at, node("Mul", [name, "c"], f"{name}c"))
            at += 1
        made = check(net)
        assert ops(made)["Mul"] == 0

    @pytest.mark.parametrize("where", ["q", "k", "scores"])
    @pytest.mark.parametrize("op", ["Mul", "Div"])
    @pytest.mark.parametrize("bias", [True, False])
    def test_the_factor_goes_into_weights(self, op: str, where: str, bias: bool) -> None:
        made = check(attention(op, where, bias))
        assert ops(made)[op] == 0
        assert ops(made)["Mul"] == 0

    @pytest.mark.parametrize("seen", ["s0", "q", "q2", "q1", "q0", "s"])
    def test_what_is_seen_keeps_its_values(self, seen: str) -> None:
        rank = 3 if seen in ("q0", "q1") else 4
        made = check(attention("Mul", "scores", **{seen: [None] * rank}))
        assert ops(made)["Mul"] == 1

    def test_what_a_branch_reads_keeps_its_name(self) -> None:
        net = attention("Mul", "scores")
        net.graph.output.add(name="z").type.CopyFrom(net.graph.output[0].type)
        inner = onnx.helper.make_tensor_value_info("n", onnx.TensorProto.FLOAT, None)
        then, other = (
            onnx.helper.make_graph([node(op, ["s"], "n")], op, [], [inner]) for op in ("Neg", "Abs")
        )
        net.graph.node.extend(
            [
                node("ReduceMax", ["x"], "m", keepdims=0),
                node("Greater", ["m", "c"], "large"),
                node("If", ["large"], "z", then_branch=then, else_branch=other),
            ]
        )
        assert ops(check(net))["Mul"] == 1

    def test_in_double_precision(self) -> None:
        net = retyped(attention("Mul", "scores"), np.float64)
        assert ops(check(net))["Mul"] == 0

    def test_a_divisor_of_zero_stays(self) -> None:
        net = attention("Div", "scores")
        (zero,) = [t for t in net.graph.initializer if t.name == "c"]
        zero.CopyFrom(onnx.numpy_helper.from_array(np.float32(0), "c"))
        assert ops(prepare(net))["Div"] == 1

    def test_a_product_that_is_read_before_its_bias_keeps_its_values(self) -> None:
        made = check(attention("Mul", "scores", q0=[None] * 3))
        assert ops(made)["Mul"] == 1

    def test_a_factor_of_an_embedding_stays(self) -> None:
        nodes = [
            node("Add", ["x", "p"], "a"),
            node("Reshape", ["a", "heads"], "r"),
            node("Mul", ["r", "c"], "y"),
        ]
        constants = {"p": f32(6, 8), "heads": np.array([1, 6, 2, 4]), "c": np.float32(0.35)}
        made = check(model(nodes, {"x": [1, 6, 8]}, {"y": [1, 6, 2, 4]}, constants))
        assert ops(made) == {"Add": 1, "Reshape": 1, "Mul": 1}


def test_what_is_behind_a_transpose_folds_after_what_is_in_front_of_it() -> None:
    constants = {"w": weights(6, 4, 1, 1), "k": np.float32(3), "b": weights(6)}
    nodes = [
        node("Conv", ["x", "w"], "c"),
        node("Mul", ["c", "k"], "m"),
        node("Transpose", ["m"], "t", perm=[0, 2, 3, 1]),
        node("Add", ["t", "b"], "y"),
    ]
    made = check(model(nodes, {"x": [2, 4, 5, 5]}, {"y": [2, 5, 5, 6]}, constants))
    assert ops(made) == {"Conv": 1, "Transpose": 1}


@pytest.mark.parametrize("perm", [[0, 2, 3, 1], [0, 2, 1, 3], [1, 0, 2, 3]])
def test_batch_normalization_with_the_channels_last(perm: list[int]) -> None:
    """As exporters from channels last write it: a Transpose on both sides of each Conv."""
    shape = [1] * 4
    shape[perm.index(1)] = 6
    constants = {
        "w": weights(6, 4, 3, 3),
        "a": rng(4).uniform(0.5, 2, shape).astype(np.float32),
        "b": rng(5).standard_normal(shape).astype(np.float32),
    }
    nodes = [
        node("Conv", ["x", "w"], "c", pads=[1, 1, 1, 1]),
        node("Transpose", ["c"], "t", perm=perm),
        node("Mul", ["t", "a"], "m"),
        node("Add", ["m", "b"], "s"),
        node("Relu", ["s"], "y"),
    ]
    net = model(nodes, {"x": [2, 4, 5, 5]}, {"y": [None] * 4}, constants)
    made = check(net)
    assert [n.op_type for n in made.graph.node] == ["Conv", "Relu", "Transpose"]


def test_channels_that_a_transpose_gives_to_two_readers_are_not_scaled_for_one() -> None:
    constants = {"w": weights(6, 4, 1, 1), "a": rng(4).uniform(0.5, 2, 6).astype(np.float32)}
    nodes = [
        node("Conv", ["x", "w"], "c"),
        node("Transpose", ["c"], "t", perm=[0, 2, 3, 1]),
        node("Mul", ["t", "a"], "y"),
        node("Relu", ["t"], "z"),
    ]
    outputs = {"y": [None] * 4, "z": [None] * 4}
    made = check(model(nodes, {"x": [2, 4, 5, 5]}, outputs, constants))
    assert ops(made)["Mul"] == 1


@pytest.mark.parametrize("seen", ["c", "t", ""])
def test_a_clamp_comes_before_the_transpose(seen: str) -> None:
    constants = {"w": weights(6, 4, 1, 1), "lo": np.float32(0), "hi": np.float32(0.5)}
    nodes = [
        node("Conv", ["x", "w"], "c"),
        node("Transpose", ["c"], "t", perm=[0, 2, 3, 1]),
        node("Clip", ["t", "lo", "hi"], "y"),
    ]
    outputs = {"y": [None] * 4} | ({seen: [None] * 4} if seen else {})
    made = check(model(nodes, {"x": [2, 4, 5, 5]}, outputs, constants))
    order = ["Conv", "Transpose", "Clip"] if seen else ["Conv", "Clip", "Transpose"]
    assert [n.op_type for n in made.graph.node] == order


def clamps(*steps: tuple[str, float], **more) -> onnx.ModelProto:
    nodes, constants, last = [], {}, "x"
    for k, (op, bound) in enumerate(steps):
        constants[f"k{k}"] = np.float32(bound)
        inputs = {"Relu": [last], "Clip": [last, "", f"k{k}"], "Left": [f"k{k}", last]}
        kind = "Min" if op == "Left" else op
        nodes.append(node(kind, inputs.get(op, [last, f"k{k}"]), f"c{k}"))
        last = f"c{k}"
    return model(nodes, {"x": [4, 50]}, {last: [4, 50], **more}, constants)


@pytest.mark.parametrize(
    ("steps", "left"),
    [
        ([("Max", 0.0), ("Min", 0.6)], ["Clip"]),  # a Relu6 of channels-last frameworks
        ([("Relu", 0.0), ("Min", 0.6)], ["Clip"]),
        ([("Min", 0.6), ("Relu", 0.0)], ["Clip"]),
        ([("Relu", 0.0), ("Clip", 0.6)], ["Clip"]),
        ([("Left", 0.6), ("Max", -0.2)], ["Clip"]),
        ([("Max", 0.0)], ["Relu"]),
        ([("Min", 0.4)], ["Clip"]),
        ([("Relu", 0.0), ("Relu", 0.0)], ["Relu", "Relu"]),
        ([("Max", 0.8), ("Min", 0.2)], ["Clip", "Clip"]),  # a constant, which nothing needs
    ],
)
def test_clamps_in_a_row_are_one(steps: list[tuple[str, float]], left: list[str]) -> None:
    assert [n.op_type for n in check(clamps(*steps)).graph.node] == left


def test_what_is_seen_between_clamps_stays() -> None:
    made = check(clamps(("Max", 0.0), ("Min", 0.6), c0=[4, 50]))
    assert ops(made) == {"Relu": 1, "Clip": 1}


def test_a_largest_value_of_two_tensors_is_no_clamp() -> None:
    net = model([node("Max", ["x", "z"], "y")], {"x": [3], "z": [3]}, {"y": [3]})
    assert ops(check(net)) == {"Max": 1}
    net = model([node("Max", ["x", "k"], "y")], {"x": [3]}, {"y": [3]}, {"k": f32(3)})
    assert ops(check(net)) == {"Max": 1}
