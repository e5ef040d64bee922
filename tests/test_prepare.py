"""The frame of prepare: opset, constants, names, roles, order, idle nodes, speed."""

import time

import numpy as np
import onnx
import pytest
from models import conv_chain, ints, mlp, model, node, retyped, rng, vec, weights
from onnx import TensorProto, helper, numpy_helper
from prepared import check, constant, only, ops, run

from qdq.errors import ModelError
from qdq.modelio import load
from qdq.plan import make_plan
from qdq.prepare import PASSES, prepare
from qdq.prepare.opset import OPSET, infer_types


def opset_of(net: onnx.ModelProto) -> int:
    (entry,) = [o.version for o in net.opset_import if o.domain == ""]
    return entry


def if_node(then: list, other: list, out: str, name: str = "branch") -> onnx.NodeProto:
    """An If whose branches are given as nodes; the last node's output is the branch's."""

    def graph(nodes: list, title: str) -> onnx.GraphProto:
        last = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
        return helper.make_graph(nodes, title, [], [last])

    return helper.make_node(
        "If", ["c"], [out], name=name, then_branch=graph(then, "t"), else_branch=graph(other, "e")
    )


class TestOpset:
    @pytest.mark.parametrize("opset", [9, 10, 11, 12, 13, 17, 20, 21, 22])
    def test_raised_to_21_and_never_lowered(self, opset) -> None:
        net = conv_chain(channels=4, size=6, opset=opset, depth=2)
        made = check(net)
        assert opset_of(made) == max(opset, OPSET)
        assert made.ir_version >= 10

    def test_old_spellings(self) -> None:
        # Upsample, Clip with attributes, Dropout, Softmax over the rest, Squeeze by attribute
        nodes = [
            node("Upsample", ["x", "s"], "u", mode="nearest"),
            node("Clip", ["u"], "c", min=-1.0, max=1.0),
            node("Dropout", ["c"], "d"),
            node("Squeeze", ["d"], "q", axes=[0]),
            node("Softmax", ["q"], "y", axis=2),
        ]
        made = check(
            model(nodes, {"x": [1, 3, 4, 4]}, {"y": [3, 8, 8]}, {"s": vec(1, 1, 2, 2)}, opset=9)
        )
        assert ops(made) == {"Resize": 1, "Clip": 1, "Squeeze": 1, "Softmax": 1}

    def test_weights_are_kept_bit_for_bit(self) -> None:
        net = mlp(rows=2, width=64, opset=11)
        made = check(net)
        for t in net.graph.initializer:
            np.testing.assert_array_equal(constant(made, t.name), numpy_helper.to_array(t))

    def test_other_domains_stay(self) -> None:
        net = model([node("Relu", ["x"], "h")], {"x": [2, 3]}, {"h": [2, 3]}, opset=14)
        own = helper.make_node("Trilu", ["h"], ["y"], name="own", domain="com.microsoft")
        net.graph.node.append(own)
        net.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        net.graph.output[0].name = "y"
        made = check(net)
        assert opset_of(made) == OPSET
        assert made.graph.node[1].domain == "com.microsoft"

    def test_overridable_weights_become_constants(self) -> None:
        net = mlp(rows=2, width=8, opset=9)
        net.ir_version = 3
        for t in net.graph.initializer:
            net.graph.input.append(helper.make_tensor_value_info(t.name, t.data_type, t.dims))
        made = check(net)
        assert [v.name for v in made.graph.input] == ["x"]

    def test_opset_that_cannot_be_raised(self, monkeypatch) -> None:
        def refuse(net, version):
            raise RuntimeError(f"no adapter to {version}")

        monkeypatch.setattr(onnx.version_converter, "convert_version", refuse)
        with pytest.raises(ModelError, match=r"opset 11 cannot be raised to 13.*no adapter to 21"):
            prepare(mlp(rows=2, width=8, opset=11))

    def test_the_next_best_opset(self, monkeypatch, caplog) -> None:
        convert = onnx.version_converter.convert_version

        def partly(net, version):
            if version > 18:
                raise RuntimeError("no adapter")
            return convert(net, version)

        monkeypatch.setattr(onnx.version_converter, "convert_version", partly)
        assert opset_of(prepare(mlp(rows=2, width=8, opset=11))) == 18
        assert "opset 18 reached in place of 21: no adapter" in caplog.text


class TestConstants:
    def test_constant_nodes_of_every_kind(self) -> None:
        def const(name: str, **value) -> onnx.NodeProto:
            return helper.make_node("Constant", [], [name], **value)

        nodes = [
            const("t", value=numpy_helper.from_array(vec(1, 2, 3))),
            const("f", value_float=2.0),
            const("fs", value_floats=[1.0, 2.0, 3.0]),
            const("i", value_int=1),
            const("is", value_ints=[3, 1]),
            node("Mul", ["x", "t"], "a"),
            node("Pow", ["a", "f"], "b"),
            node("Add", ["b", "fs"], "d"),
            node("Unsqueeze", ["d", "i"], "e"),
            node("Reshape", ["d", "is"], "g"),
            node("Concat", ["e", "e"], "h", axis=0),
        ]
        net = model(nodes, {"x": [3]}, {"g": [3, 1], "h": [6, 1]})
        made = check(net)
        assert "Constant" not in ops(made)
        np.testing.assert_array_equal(constant(made, "is"), [3, 1])
        assert constant(made, "i").shape == ()

    def test_shape_arithmetic_folds(self) -> None:
        nodes = [
            node("Shape", ["x"], "s"),
            node("Gather", ["s", "zero"], "n"),
            node("Slice", ["s", "one", "four"], "rest"),
            node("ReduceProd", ["rest"], "p", keepdims=1),
            node("Unsqueeze", ["n", "axis"], "nu"),
            node("Concat", ["nu", "p"], "target", axis=0),
            node("Reshape", ["x", "target"], "y"),
        ]
        constants = {"zero": np.int64(0), "one": ints(1), "four": ints(4), "axis": ints(0)}
        made = check(model(nodes, {"x": [2, 3, 4, 5]}, {"y": [2, 60]}, constants))
        assert ops(made) == {"Reshape": 1}
        assert [t.name for t in made.graph.initializer] == ["target"]

    def test_a_bias_of_the_type_that_the_image_has(self) -> None:
        nodes = [
            node("CastLike", ["zero", "x"], "like"),
            node("Expand", ["like", "width"], "bias"),
            node("Conv", ["x", "w", "bias"], "h"),
            node("CastLike", ["h", "one"], "y"),
        ]
        constants = {"zero": np.float64(0), "width": ints(4), "one": np.float32(1)}
        constants["w"] = weights(4, 3, 1, 1)
        made = check(model(nodes, {"x": ["n", 3, 4, 4]}, {"y": ["n", 4, 4, 4]}, constants, 18))
        assert ops(made) == {"Conv": 1}

    def test_a_cast_like_saturates_as_before(self) -> None:
        nodes = [
            node("Cast", ["x"], "eight", to=TensorProto.FLOAT8E4M3FN),
            node("CastLike", ["x", "eight"], "h", saturate=0),
            node("Cast", ["h"], "y", to=TensorProto.FLOAT),
        ]
        made = check(model(nodes, {"x": [4]}, {"y": [4]}, opset=19))
        (cast,) = [n for n in made.graph.node if "h" in n.output]
        assert {a.name: a.i for a in cast.attribute} == {
            "to": TensorProto.FLOAT8E4M3FN,
            "saturate": 0,
        }

    def test_a_slice_of_a_shape_with_steps_and_no_axes(self) -> None:
        nodes = [
            node("Shape", ["x"], "s"),
            node("Slice", ["s", "one", "four", "", "two"], "odd"),
            node("ConstantOfShape", ["odd"], "zeros"),
            node("Add", ["zeros", "k"], "y"),
        ]
        constants = {"one": ints(1), "two": ints(2), "four": ints(4), "k": np.float32(1)}
        check(model(nodes, {"x": ["N", 3, 8, 5]}, {"y": [None, None]}, constants))

    def test_known_dimensions_of_a_dynamic_shape_fold(self) -> None:
        nodes = [
            node("Shape", ["x"], "s"),
            node("Gather", ["s", "two"], "h"),
            node("Slice", ["s", "two", "four"], "hw"),
            node("Gather", ["s", "zero"], "n"),
            node("Cast", ["h"], "hf", to=TensorProto.FLOAT),
            node("Cast", ["hw"], "hwf", to=TensorProto.FLOAT),
            node("Cast", ["n"], "nf", to=TensorProto.FLOAT),
            node("Add", ["x", "hf"], "a"),
            node("Add", ["a", "hwf"], "b"),
            node("Slice", ["s", "one", "four", "zero", "two"], "odd"),
            node("Cast", ["odd"], "oddf", to=TensorProto.FLOAT),
            node("Add", ["b", "oddf"], "c"),
            node("Add", ["c", "nf"], "y"),
        ]
        constants = {"zero": ints(0), "one": ints(1), "two": ints(2), "four": ints(4)}
        made = check(model(nodes, {"x": ["N", 1, 7, 2]}, {"y": ["N", 1, 7, 2]}, constants))
        assert ops(made) == {"Shape": 1, "Gather": 1, "Cast": 1, "Add": 4}
        np.testing.assert_array_equal(constant(made, "oddf"), [1, 2])

    @pytest.mark.parametrize("index", [2, -3])
    def test_indices_out_of_range_are_left_to_the_runtime(self, index: int, caplog) -> None:
        nodes = [
            node("Gather", ["k", "i"], "g"),
            node("Shape", ["x"], "s"),
            node("Gather", ["s", "i"], "d"),
            node("Cast", ["d"], "f", to=TensorProto.FLOAT),
            node("Add", ["x", "g"], "a"),
            node("Add", ["a", "f"], "y"),
        ]
        constants = {"k": vec(1, 2), "i": ints(index)}
        made = prepare(model(nodes, {"x": ["N", 1]}, {"y": ["N", 1]}, constants))
        assert ops(made)["Gather"] == 2
        assert "'Gather_g' has constant inputs but stays" in caplog.text

    def test_strings_and_sparse_values(self) -> None:
        dense = numpy_helper.from_array(vec(5), "values")
        sparse = helper.make_sparse_tensor(dense, numpy_helper.from_array(ints(1), "at"), [3])
        nodes = [
            helper.make_node("Constant", [], ["s"], value_strings=["a", "b"]),
            helper.make_node("Constant", [], ["p"], sparse_value=sparse),
            node("StringConcat", ["s", "s"], "t"),
            node("Equal", ["t", "s"], "e"),
            node("Cast", ["e"], "f", to=TensorProto.FLOAT),
            node("Add", ["x", "p"], "a"),
            node("Concat", ["a", "f"], "y", axis=0),
        ]
        made = prepare(model(nodes, {"x": [3]}, {"y": [5]}))
        assert list(constant(made, "s")) == ["a", "b"]
        assert list(constant(made, "p")) == [0, 5, 0]
        assert ops(made)["Constant"] == 0

    def test_a_sparse_constant_of_an_old_opset_does_not_hinder_raising_it(self, caplog) -> None:
        values = numpy_helper.from_array(vec(5), "values")
        sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(ints(1), "at"), [3])
        nodes = [helper.make_node("Constant", [], ["p"], sparse_value=sparse)]
        nodes.append(node("Add", ["x", "p"], "y"))
        made = check(model(nodes, {"x": [3]}, {"y": [3]}, opset=17))
        assert opset_of(made) == OPSET
        assert not caplog.records

    @pytest.mark.parametrize("places", [[[1, 2], [3, 0]], [6, 12]], ids=["per axis", "flat"])
    def test_sparse_weights_are_dense(self, places) -> None:
        values = numpy_helper.from_array(vec(5, -3), "w")
        at = numpy_helper.from_array(np.array(places, np.int64))
        wanted = np.zeros((4, 4), np.float32)
        wanted[1, 2], wanted[3, 0] = 5, -3
        net = model([node("MatMul", ["x", "w"], "y")], {"x": [2, 4]}, {"y": [2, 4]}, {"w": wanted})
        del net.graph.initializer[:]
        net.graph.sparse_initializer.append(helper.make_sparse_tensor(values, at, [4, 4]))
        made = check(net)
        np.testing.assert_array_equal(constant(made, "w"), wanted)
        assert not made.graph.sparse_initializer

    def test_large_results_stay_computed(self) -> None:
        nodes = [node("Expand", ["k", "big"], "e"), node("Add", ["x", "e"], "y")]
        constants = {"k": vec(3), "big": ints(1024, 1024)}
        made = check(model(nodes, {"x": [1]}, {"y": [1024, 1024]}, constants))
        assert ops(made) == {"Expand": 1, "Add": 1}

    def test_half_precision_weights_fold(self) -> None:
        w = weights(800, 800).astype(np.float16)  # above 1 MB as float32
        nodes = [
            node("Cast", ["h"], "w", to=TensorProto.FLOAT),
            node("Transpose", ["w"], "t", perm=[1, 0]),
            node("MatMul", ["x", "t"], "y"),
        ]
        made = check(model(nodes, {"x": [1, 800]}, {"y": [1, 800]}, {"h": w}))
        assert ops(made) == {"MatMul": 1}

    def test_what_networks_compute_of_constants_folds(self) -> None:
        # relative positions (DeBERTa), queries of a decoder (DETR), weight normalization
        nodes = [
            node("LayerNormalization", ["k", "g"], "n"),
            node("MatMul", ["n", "w"], "m"),
            node("Relu", ["m"], "r"),
            node("Gemm", ["r", "w"], "p"),
            node("Softmax", ["p"], "s"),
            node("ReduceL2", ["s", "one"], "l"),
            node("Sin", ["l"], "y1"),
            node("Mul", ["x", "y1"], "y"),
        ]
        constants = {"k": weights(6, 8), "w": weights(8, 8), "g": weights(8), "one": ints(1)}
        made = check(model(nodes, {"x": [6, 1]}, {"y": [6, 1]}, constants))
        assert ops(made) == {"Mul": 1}

    @pytest.mark.parametrize(
        ("rows", "seen", "folds"), [(1, False, True), (2, False, False), (1, True, False)]
    )
    def test_standardized_weights_fold(self, rows: int, seen: bool, folds: bool) -> None:
        # as in BiT: torch exports batch_norm(weight, training=True)
        one, none = np.ones(8, np.float32), np.zeros(8, np.float32)
        # (the runtime writes its statistics over m0 and v0, so they are no one else's)
        nodes = [
            node(
                "BatchNormalization",
                ["k", *"sb", "m0", "v0"],
                ["n", *"mv"],
                training_mode=1,
                epsilon=0.3,
            ),
            node("Reshape", ["n", "shape"], "w"),
            node("Conv", ["x", "w"], "y"),
        ]
        stats = {"s": one, "b": none, "m0": none, "v0": one}
        constants = {"k": weights(rows, 8, 36 // rows), **stats, "shape": ints(8, 4, 3, 3)}
        outputs = {"y": [1, 8, 3, 3]} | ({"m": [8]} if seen else {})
        made = check(model(nodes, {"x": [1, 4, 5, 5]}, outputs, constants))
        assert ops(made)["BatchNormalization"] == (0 if folds else 1)

    def test_a_gelu_of_constants_stays(self) -> None:
        # onnx.reference has none and refuses the node, not its run
        nodes = [node("Gelu", ["k"], "g"), node("Add", ["x", "g"], "y")]
        made = check(model(nodes, {"x": [2]}, {"y": [2]}, {"k": vec(1, 2)}))
        assert ops(made)["Add"] == 1

    def test_random_stays(self) -> None:
        nodes = [
            node("RandomNormalLike", ["k"], "r", seed=1.0),
            node("Mul", ["r", "zero"], "m"),
            node("Add", ["x", "m"], "y"),
        ]
        constants = {"k": vec(1, 2), "zero": vec(0)}
        made = check(model(nodes, {"x": [2]}, {"y": [2]}, constants))
        assert ops(made)["RandomNormalLike"] == 1

    def test_a_constant_output_stays_an_output(self) -> None:
        value = numpy_helper.from_array(vec(1, 2))
        nodes = [
            helper.make_node("Constant", [], ["k"], name="k", value=value),
            node("Add", ["x", "k"], "y"),
        ]
        check(model(nodes, {"x": [2]}, {"y": [2], "k": [2]}))

    def test_dead_nodes_and_constants_go(self) -> None:
        net = mlp(rows=2, width=8)
        net.graph.node.append(node("Exp", ["h"], "unread"))
        net.graph.node.append(node("Mul", ["unread", "alone"], "unread2"))
        net.graph.initializer.append(numpy_helper.from_array(vec(1), "alone"))
        made = check(net)
        assert ops(made) == {"Gemm": 2, "Relu": 1}
        assert "alone" not in {t.name for t in made.graph.initializer}


class TestIdle:
    def test_everything_idle_goes(self) -> None:
        nodes = [
            node("Identity", ["x"], "a"),
            node("Dropout", ["a"], "b"),
            node("Cast", ["b"], "c", to=TensorProto.FLOAT),
            node("Reshape", ["c", "same"], "d"),
            node("Transpose", ["d"], "e", perm=[0, 1, 2]),
            node("Mul", ["one", "e"], "f"),
            node("Sub", ["f", "zero"], "g"),
            node("Concat", ["g"], "h", axis=0),
            node("Expand", ["h", "grow"], "i"),
            node("Pad", ["i", "nothing"], "j"),
            node("Relu", ["j"], "k"),
            node("Identity", ["k"], "y"),
        ]
        constants = {
            "same": ints(0, -1, 3),
            "one": np.ones((1, 3), np.float32),
            "zero": np.float32(0),
            "grow": ints(2, 1),
            "nothing": np.zeros(6, np.int64),
        }
        made = check(model(nodes, {"x": [1, 2, 3]}, {"y": [1, 2, 3]}, constants))
        assert [(n.op_type, n.input[0], n.output[0]) for n in made.graph.node] == [
            ("Relu", "x", "y")
        ]

    def test_a_loop_without_a_condition_keeps_the_place_of_it(self) -> None:
        """As bags of embeddings are exported: so many rounds, and no state."""
        inner = [node("Identity", ["go"], "on"), node("Add", ["x", "x"], "s")]
        of = helper.make_tensor_value_info
        flags = [of(n, TensorProto.BOOL, []) for n in ("go", "on")]
        body = helper.make_graph(
            inner,
            "body",
            [of("i", TensorProto.INT64, []), flags[0]],
            [flags[1], of("s", TensorProto.FLOAT, [3])],
        )
        nodes = [node("Loop", ["rounds", ""], "y", body=body)]
        made = check(model(nodes, {"x": [3]}, {"y": [2, 3]}, {"rounds": np.int64(2)}))
        assert list(only(made, "Loop").input) == ["rounds", ""]

    def test_near_misses_stay(self) -> None:
        nodes = [
            node("Mul", ["x", "wide"], "a"),  # by one, but broadcasts
            node("Div", ["one", "a"], "b"),  # one divided by
            node("Reshape", ["b", "other"], "c"),
            node("Add", ["c", "x"], "d"),
            node("Sub", ["zero", "d"], "y"),  # negation
        ]
        constants = {
            "wide": np.ones((2, 3), np.float32),
            "one": np.float32(1),
            "zero": np.float32(0),
            "other": ints(3, 2, 1),
        }
        made = check(model(nodes, {"x": [3]}, {"y": [3, 2, 3]}, constants))
        assert len(made.graph.node) == len(nodes)

    def test_outputs_and_inputs_keep_their_names(self) -> None:
        nodes = [
            node("Relu", ["x"], "r"),
            node("Identity", ["r"], "y"),
            node("Identity", ["r"], "z"),
            node("Identity", ["x"], "same"),
            node("Exp", ["r"], "e"),
        ]
        made = check(model(nodes, {"x": [3]}, {n: [3] for n in ("y", "z", "same", "e")}))
        assert ops(made) == {"Relu": 1, "Identity": 2, "Exp": 1}

    def test_dropout_whose_mask_is_read_stays(self) -> None:
        drop = helper.make_node("Dropout", ["x"], ["d", "mask"], name="drop")
        nodes = [drop, node("Where", ["mask", "d", "x"], "y")]
        assert ops(check(model(nodes, {"x": [3]}, {"y": [3]}))) == {"Dropout": 1, "Where": 1}


class TestNames:
    def test_unnamed_and_twice_named(self) -> None:
        net = model(
            [
                helper.make_node("Relu", ["x"], ["Relu_1"]),  # a tensor has the next node's name
                helper.make_node("Relu", ["Relu_1"], ["b"]),
                helper.make_node("Exp", ["b"], ["d"], name="same"),
                helper.make_node("Exp", ["d"], ["y"], name="same"),
            ],
            {"x": [2]},
            {"y": [2]},
        )
        made = prepare(net)
        assert [n.name for n in made.graph.node] == ["Relu_0", "Relu_1_2", "same", "same_2"]
        assert prepare(made) == made

    def test_shapes_are_noted(self) -> None:
        made = check(conv_chain(channels=4, size=6, depth=2))
        noted = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
                 for v in made.graph.value_info}  # fmt: skip
        assert noted == {name: [1, 4, 6, 6] for name in ("c0", "r0", "c1")}


class TestRoles:
    def test_a_weight_read_by_gather_and_gemm_is_copied(self) -> None:
        w = weights(6, 6)
        nodes = [
            node("ArgMax", ["x"], "i", axis=1, keepdims=0),
            node("Gather", ["w", "i"], "g"),
            node("Gemm", ["x", "w"], "h"),
            node("MatMul", ["h", "w"], "m"),  # the same role as in Gemm
            node("Add", ["g", "m"], "y"),
        ]
        constants = {"w": w}
        made = check(model(nodes, {"x": [2, 6]}, {"y": [2, 6]}, constants))
        assert only(made, "Gather").input[0] == "w"
        copy = only(made, "Gemm").input[1]
        assert copy == only(made, "MatMul").input[1] != "w"
        np.testing.assert_array_equal(constant(made, copy), w)

    def test_convs_share_a_weight_but_not_a_bias(self) -> None:
        constants = {"w": weights(3, 3, 3, 3), "b": vec(1, 2, 3)}
        nodes = [
            node("Conv", ["x", "w", "b"], "h", pads=[1] * 4),
            node("Conv", ["h", "w", "b"], "y", pads=[1] * 4),
        ]
        shape = [1, 3, 5, 5]
        first, second = check(model(nodes, {"x": shape}, {"y": shape}, constants)).graph.node
        assert first.input[1] == second.input[1] == "w"
        assert first.input[2] == "b" != second.input[2]

    def test_what_a_subgraph_captures_keeps_its_name(self) -> None:
        inner = helper.make_node("Mul", ["h", "w"], ["t"])
        inner2 = helper.make_node("Add", ["h", "w"], ["e"])
        nodes = [node("MatMul", ["x", "w"], "h"), if_node([inner], [inner2], "y")]
        net = model(nodes, {"x": [2, 2]}, {"y": [2, 2]}, {"w": weights(2, 2), "c": np.array(True)})
        made = check(net)
        assert "w" in {t.name for t in made.graph.initializer}
        assert only(made, "MatMul").input[1] != "w"

    def test_the_copy_of_a_scalar_is_a_scalar(self) -> None:
        # a Loop whose condition got an axis would not load
        body = helper.make_graph(
            [
                helper.make_node("Relu", ["before"], ["after"]),
                helper.make_node("Not", ["go"], ["go_on"]),
            ],
            "body",
            [
                helper.make_tensor_value_info("k", TensorProto.INT64, []),
                helper.make_tensor_value_info("go", TensorProto.BOOL, []),
                helper.make_tensor_value_info("before", TensorProto.FLOAT, [2, 2]),
            ],
            [
                helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
                helper.make_tensor_value_info("after", TensorProto.FLOAT, [2, 2]),
            ],
        )
        nodes = [
            node("Mul", ["x", "s"], "h"),
            node("ReduceMax", ["h"], "top", keepdims=0),
            node("Less", ["s", "top"], "c"),
            node("Loop", ["", "c", "h"], "y", body=body),
        ]
        constants = {"s": np.array(0.5, np.float32)}
        net = model(nodes, {"x": [2, 2]}, {"y": [2, 2]}, constants)
        made = check(net, feed={"x": vec(1, -2, 3, -4).reshape(2, 2)})
        copy = only(made, "Less").input[0]
        assert copy != only(made, "Mul").input[1] == "s"
        assert constant(made, copy).shape == ()

    def test_integers_are_shared(self) -> None:
        nodes = [node("Reshape", ["x", "s"], "a"), node("Tile", ["a", "s"], "y")]
        made = check(model(nodes, {"x": [4]}, {"y": [4, 4]}, {"s": ints(2, 2)}))
        assert len(made.graph.initializer) == 1


class TestOrder:
    def test_any_order_gives_the_same(self) -> None:
        net = conv_chain(channels=4, size=6, depth=3)
        wanted = prepare(net)
        nodes = list(net.graph.node)
        for seed in range(5):
            order = np.random.default_rng(seed).permutation(len(nodes))
            del net.graph.node[:]
            net.graph.node.extend(nodes[i] for i in order)
            assert prepare(net).graph == wanted.graph

    def test_captures_count(self) -> None:
        inner = helper.make_node("Relu", ["h"], ["t"])
        inner2 = helper.make_node("Exp", ["late"], ["e"])
        nodes = [
            if_node([inner], [inner2], "y"),
            node("Identity", ["h"], "late"),
            node("Add", ["x", "x"], "h"),
        ]
        net = helper.make_model(
            helper.make_graph(
                nodes,
                "g",
                [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
                [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
                [numpy_helper.from_array(np.array(True), "c")],
            ),
            opset_imports=[helper.make_opsetid("", 21)],
            ir_version=10,
        )
        made = prepare(net)
        onnx.checker.check_model(made, full_check=True)
        assert [n.op_type for n in made.graph.node] == ["Add", "Identity", "If"]
        np.testing.assert_array_equal(run(made, {"x": vec(1, -2)})[0], vec(2, 0))


def test_a_wrongly_declared_output_shape_is_let_pass() -> None:
    net = conv_chain(channels=4, size=6, depth=2)
    net.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 5
    assert ops(prepare(net)) == {"Conv": 2, "Relu": 2}


def test_an_output_without_a_shape_gets_it() -> None:
    """The last of the shape is known only when the constants are folded."""
    nodes = [node("Concat", ["two", "m"], "s", axis=0), node("Reshape", ["x", "s"], "y")]
    constants = {"two": np.array([2]), "m": np.array([-1])}
    net = model(nodes, {"x": [4, 6]}, {"y": [None, None]}, constants)
    net.graph.output[0].type.tensor_type.ClearField("shape")
    made = prepare(net)
    assert [d.dim_value for d in made.graph.output[0].type.tensor_type.shape.dim] == [2, 12]


def test_every_pass_says_what_it_does() -> None:
    assert all(p.__doc__ for p in PASSES)


def test_time_is_linear_in_the_nodes() -> None:
    """10,000 nodes, with what could be quadratic: one much-read tensor, one much-reading node."""
    count = 2000
    nodes = [node("Relu", ["x"], "h")]
    for i in range(count):
        nodes += [
            helper.make_node("Constant", [], [f"k{i}"], value_float=float(i % 7) + 2),
            helper.make_node("Mul", ["h", f"k{i}"], [f"m{i}"], name="same"),
            helper.make_node("Identity", [f"m{i}"], [f"i{i}"]),
            helper.make_node("Relu", [f"i{i}"], [f"r{i}"]),
            helper.make_node("Identity", [f"r{i}"], [f"o{i}"]),
        ]
    nodes.append(node("Concat", [f"o{i}" for i in range(count)], "y", axis=0))
    net = model(nodes, {"x": [1, 2]}, {"y": [count, 2]})
    start = time.process_time()
    made = prepare(net)
    assert time.process_time() - start < 10
    assert ops(made) == {"Relu": count + 1, "Mul": count, "Concat": 1}


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_large_weights_are_copied_last_and_only_if_they_are_still_read(
    kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [
        node("Gemm", ["x", "turned", "c"], "a", transB=1),
        node("MatMul", ["a", "plain"], "b"),
        node("Gemm", ["b", "turned"], "y", transB=1),
    ]
    big = {name: weights(64, 64, seed=i) for i, name in enumerate(("turned", "unread", "plain"))}
    net = model(nodes, {"x": [8, 64]}, {"y": [8, 64]}, {**big, "c": vec(*[1.0] * 64)})
    if kind is np.float16:
        net = retyped(net, np.float16)
    before = net.SerializeToString()
    made = []
    for limit in (1024, 1 << 40):
        monkeypatch.setattr("qdq.prepare._LARGE", limit)
        made.append(prepare(net).SerializeToString(deterministic=True))
    assert made[0] == made[1]
    assert net.SerializeToString() == before
    assert b"unread" not in made[0]


def test_dimensions_of_minus_one_are_unknown_ones() -> None:
    """Old exporters write -1 for an open size; taken as a number, costs would be below 0."""
    net = conv_chain()
    net.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    net.graph.output[0].type.tensor_type.shape.dim[0].dim_value = -1
    kept = net.SerializeToString()
    done = prepare(net)
    assert net.SerializeToString() == kept
    for value in (done.graph.input[0], done.graph.output[0], done.graph.value_info[0]):
        assert not value.type.tensor_type.shape.dim[0].HasField("dim_value")
    placement = make_plan(done, seen={"x": (1, 32, 24, 24)}).placement
    assert 0 < placement.time < placement.float_time


class TestTinyWeights:
    """Numbers next to 0 that cost a hundred times as long as others."""

    @staticmethod
    def net(w: np.ndarray, b: np.ndarray) -> onnx.ModelProto:
        nodes = [node("Conv", ["x", "w", "b"], "c"), node("Conv", ["c", "v", "b"], "y")]
        shape = [1, 4, 3, 3]
        constants = {"w": w, "b": b, "v": weights(4, 4, 1, 1, seed=1)}
        return model(nodes, {"x": shape}, {"y": shape}, constants)

    def test_a_dead_channel_becomes_zero_and_no_bit_of_the_output_changes(self) -> None:
        w, b = weights(4, 4, 1, 1), vec(1, -1, 1e-42, 2)
        w[2], w[0, 1], w[1, 3] = 1e-41, -1e-25, 1e-19
        net = self.net(w, b)
        made = check(net, tol=0)
        found = constant(made, "w")
        assert (found[2] == 0).all()
        assert found[0, 1] == 0
        assert found[1, 3] == np.float32(1e-19)
        np.testing.assert_array_equal(found[found != 0], w[found != 0])
        biases = [n.input[2] for n in made.graph.node]
        assert [constant(made, name)[2] for name in biases] == [0, 0]

    @pytest.mark.parametrize("factor", [1e-30, 1e30])
    def test_weights_that_are_all_tiny_or_huge_stay(self, factor: float) -> None:
        """Another scale is none of our business: it is large beside its like."""
        w = (weights(4, 4, 1, 1) * np.float32(factor)).astype(np.float32)
        w[0, 0] = w.max() * 1e-10
        made = check(self.net(w, vec(0, 0, 0, 0)), tol=1)
        np.testing.assert_array_equal(constant(made, "w"), w)

    @pytest.mark.parametrize("size", [4, 160])
    def test_the_name_stays_so_rules_find_it(self, size: int) -> None:
        """Large weights are copied late."""
        w = weights(size, size, 1, 1)
        w[0] = 1e-39
        shape = [1, size, 3, 3]
        net = model([node("Conv", ["x", "w"], "y")], {"x": shape}, {"y": shape}, {"w": w})
        made = check(net, tol=1e-30)
        assert only(made, "Conv").input[1] == "w"
        np.testing.assert_array_equal(constant(made, "w"), np.where(np.abs(w) < 1e-20, 0, w))

    def test_a_constant_that_is_an_output_too_stays(self) -> None:
        w = weights(4, 4)
        w[0] = 1e-39
        net = model([node("MatMul", ["x", "w"], "y")], {"x": [2, 4]}, {"y": [2, 4], "w": [4, 4]},
                    {"w": w})  # fmt: skip
        np.testing.assert_array_equal(run(prepare(net), {"x": np.ones((2, 4), np.float32)})[1], w)

    def test_what_is_no_weight_stays(self) -> None:
        """An offset that keeps a logarithm finite, say."""
        net = model([node("Add", ["x", "tiny"], "a"), node("Log", ["a"], "y")],
                    {"x": [2]}, {"y": [2]}, {"tiny": vec(1e-40)})  # fmt: skip
        assert constant(prepare(net), "tiny") == np.float32(1e-40)

    def test_a_matrix_that_others_read_too_is_copied(self) -> None:
        m = weights(4, 4)
        m[1, 2] = 1e-40
        nodes = [node("MatMul", ["x", "m"], "a"), node("Add", ["a", "m"], "y")]
        made = check(model(nodes, {"x": [4, 4]}, {"y": [4, 4]}, {"m": m}), tol=0)
        assert constant(made, only(made, "MatMul").input[1])[1, 2] == 0
        assert constant(made, only(made, "Add").input[1])[1, 2] == np.float32(1e-40)


class TestFoundByRandomModels:
    """Each once crashed, or made a model that does not run or computes something else."""

    @pytest.mark.parametrize("view", ["Unsqueeze", "Reshape"])
    def test_a_constant_that_widens_a_view(self, view: str) -> None:
        """Distances to prototypes: one row for each of them, of what had one."""
        shape = ints(1) if view == "Unsqueeze" else ints(-1, 1, 4)
        nodes = [
            node("Gemm", ["x", "w"], "m"),
            node(view, ["m", "s"], "u"),
            node("Sub", ["u", "c"], "y"),
        ]
        constants = {"w": weights(8, 4), "s": shape, "c": weights(1, 10, 4)}
        assert ops(check(model(nodes, {"x": [2, 8]}, {"y": [2, 10, 4]}, constants)))["Sub"] == 1

    def test_outputs_declared_for_one_sample(self) -> None:
        nodes = [node("MatMul", ["x", "w"], "a"), node("MatMul", ["a", "w"], "y")]
        shapes = {"x": ["n", 5, 8]}
        net = model(nodes, shapes, {"y": ["n", 5, 8], "a": [1, 5, 8]}, {"w": weights(8, 8)})
        made = prepare(net)
        for batch in (1, 3):
            feed = {"x": rng(batch).normal(size=(batch, 5, 8)).astype(np.float32)}
            for exact, found in zip(run(net, feed), run(made, feed), strict=True):
                np.testing.assert_allclose(exact, found, rtol=1e-5, atol=1e-5)

    def test_outputs_declared_with_a_wrong_size(self) -> None:
        """onnx counts a last window that starts in the padding, onnxruntime does not."""
        nodes = [
            node("MaxPool", ["x"], "p", kernel_shape=[2], strides=[3], ceil_mode=1),
            node("Sigmoid", ["p"], "a"),
            node("Tanh", ["a"], "t"),
            node("Mul", ["p", "t"], "q"),
            node("Conv", ["q", "w"], "y"),
        ]
        for declared in ([1, 4, 3], [1, 4, 2]):
            outputs = {"a": declared, "y": declared}
            net = model(nodes, {"x": [1, 4, 6]}, outputs, {"w": weights(4, 4, 1)})
            made = prepare(load(net))
            feed = {"x": rng().normal(size=(1, 4, 6)).astype(np.float32)}
            for exact, found in zip(run(net, feed), run(made, feed), strict=True):
                np.testing.assert_array_equal(exact, found)

    def test_a_loop_keeps_its_absent_condition(self) -> None:
        """Where what tells its trips is read past an Identity."""
        number, flag = onnx.TensorProto.INT64, onnx.TensorProto.BOOL
        info = onnx.helper.make_tensor_value_info
        body = onnx.helper.make_graph(
            [node("Identity", ["ci"], "co"), node("Cast", ["i"], "s", to=1)], "body",
            [info("i", number, []), info("ci", flag, [])],
            [info("co", flag, []), info("s", 1, [])],
        )  # fmt: skip
        nodes = [node("Identity", ["n"], "m"), node("Loop", ["m", ""], "y", body=body)]
        net = model(nodes, {"n": []}, {"y": [None]})
        net.graph.input[0].type.tensor_type.elem_type = number
        made = check(net, feed={"n": np.array(3)})
        assert list(only(made, "Loop").input) == ["n", ""]

    @pytest.mark.parametrize(("op", "bound"), [("Min", -np.inf), ("Max", np.inf)])
    def test_bounds_that_nothing_passes(self, op: str, bound: float) -> None:
        net = model([node(op, ["x", "c"], "y")], {"x": [3]}, {"y": [3]}, {"c": np.float32(bound)})
        feed = {"x": np.float32([-1, 0, 2])}
        for found in (net, prepare(net)):
            assert (run(found, feed)[0] == bound).all()

    def test_shapes_that_are_outputs_are_looked_at_once(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[int] = []

        def counted(net: onnx.ModelProto) -> dict[str, onnx.TypeProto]:
            calls.append(1)
            return infer_types(net)

        monkeypatch.setattr("qdq.prepare.constants.infer_types", counted)
        nodes = [node("Shape", ["x"], "s"), node("Relu", ["x"], "y")]
        net = model(nodes, {"x": [1, 3]}, {"y": [1, 3], "s": [2]})
        net.graph.output[1].type.tensor_type.elem_type = onnx.TensorProto.INT64
        prepare(net)
        assert len(calls) == 1
