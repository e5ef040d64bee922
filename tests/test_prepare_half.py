"""float16 models: float32 inside, float16 at the borders, and quantized like any other."""

from collections.abc import Iterator, Sequence

import numpy as np
import onnx
import pytest
from harness import FORCED, compare, fused_ops, quantized
from harness import run as run_model
from models import conv_chain, mlp, node, residual, rng, weights
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from prepared import check, constant, only, ops, random_feed

import qdq
import qdq.prepare
from qdq import api
from qdq.errors import CalibrationError, ModelError
from qdq.nested import subgraphs
from qdq.plan import make_plan
from qdq.prepare import prepare
from qdq.prepare.half import widen_float16

H, F = TensorProto.FLOAT16, TensorProto.FLOAT
BF16, F64, I64 = TensorProto.BFLOAT16, TensorProto.DOUBLE, TensorProto.INT64
BITS = pytest.mark.skipif(onnx.defs.onnx_opset_version() < 26, reason="no BitCast")
ROUNDING = 2**-9  # of the largest output: two roundings to float16


def half(*value) -> NDArray[np.float16]:
    return np.array(value, np.float16)


def info(name: str, shape: Sequence[int | str | None], kind: int = H) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def net16(nodes, inputs, outputs, constants=None, opset=21) -> onnx.ModelProto:
    """A model whose inputs and outputs are float16, where a value info says nothing else."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [v if isinstance(v, onnx.ValueInfoProto) else info(n, v) for n, v in inputs.items()],
        [v if isinstance(v, onnx.ValueInfoProto) else info(n, v) for n, v in outputs.items()],
        [
            v if isinstance(v, TensorProto) else numpy_helper.from_array(np.asarray(v), n)
            for n, v in (constants or {}).items()
        ],
    )
    ir = 13 if opset > 23 else 10 if opset >= 21 else 7
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("their.own", 1)]
    made = helper.make_model(graph, opset_imports=imports, ir_version=ir)
    onnx.checker.check_model(made, full_check=True)
    return made


def to_half(net: onnx.ModelProto, *, keep_io_types: bool = False) -> onnx.ModelProto:
    """A float32 model without subgraphs as a float16 one."""
    made = onnx.ModelProto()
    made.CopyFrom(net)
    g = made.graph
    for t in g.initializer:
        if t.data_type == F:
            value = numpy_helper.to_array(t).astype(np.float16)
            t.CopyFrom(numpy_helper.from_array(value, t.name))
    if not keep_io_types:
        for v in (*g.input, *g.output):
            v.type.tensor_type.elem_type = H
        return made
    inside = {v.name: f"{v.name}_half" for v in (*g.input, *g.output)}
    for n in g.node:
        n.input[:] = [inside.get(i, i) for i in n.input]
        n.output[:] = [inside.get(o, o) for o in n.output]
    first = [node("Cast", [v.name], inside[v.name], to=H) for v in g.input]
    last = [node("Cast", [inside[v.name]], v.name, to=F) for v in g.output]
    nodes = [*first, *g.node, *last]
    del g.node[:]
    g.node.extend(nodes)
    return made


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for n in graph.node:
        for g in subgraphs(n):
            yield from all_graphs(g)


def halves_inside(net: onnx.ModelProto) -> list[str]:
    """All that is float16 but the inputs and outputs of the model."""
    inferred = onnx.shape_inference.infer_shapes(net, strict_mode=True, data_prop=True)
    borders = {v.name for v in (*net.graph.input, *net.graph.output)}
    found = []
    for g in all_graphs(inferred.graph):
        values = [v for v in (*g.input, *g.output, *g.value_info) if v.name not in borders]
        found += [v.name for v in values if "elem_type: 10" in str(v.type)]
        found += [t.name for t in g.initializer if t.data_type == H and t.name not in borders]
        found += [
            f"{n.name}.{a.name}"
            for n in g.node
            for a in n.attribute
            if H in (a.t.data_type, a.sparse_tensor.values.data_type)
            or "elem_type: 10" in str(a.tp)
            or (a.name in ("dtype", "to") and a.i == H)
            if n.output[0] not in borders
        ]
    return found


def types(net: onnx.ModelProto) -> dict[str, int]:
    values = (*net.graph.input, *net.graph.output)
    return {v.name: v.type.tensor_type.elem_type for v in values}


def widened(net: onnx.ModelProto, feed=None) -> onnx.ModelProto:
    """The prepared model: same results, same borders, nothing float16 between."""
    made = check(net, ROUNDING, feed)
    assert types(made) == types(net)
    assert halves_inside(made) == []
    return made


IMAGE = {"x": [1, 3, 8, 8]}


def conv_nodes() -> list[onnx.NodeProto]:
    return [node("Conv", ["x", "w", "b"], "c", pads=[1] * 4), node("Relu", ["c"], "y")]


W16, B16 = weights(4, 3, 3, 3).astype(np.float16), half(0.5, -1, 65504, 6e-8)


class TestInside:
    @pytest.mark.parametrize("opset", [9, 10, 11, 12, 13, 17, 21])
    def test_weights_are_the_same_numbers(self, opset: int) -> None:
        net = net16(conv_nodes(), IMAGE, {"y": [1, 4, 8, 8]}, {"w": W16, "b": B16}, opset)
        made = widened(net)
        assert ops(made) == {"Cast": 2, "Conv": 1, "Relu": 1}
        for name, value in (("w", W16), ("b", B16)):
            assert constant(made, name).dtype == np.float32
            np.testing.assert_array_equal(constant(made, name), value.astype(np.float32))

    def test_weights_in_the_field_for_integers(self) -> None:
        stored = helper.make_tensor("k", H, [3], [0.1, -2, 65504])
        assert not stored.raw_data
        net = net16([node("Add", ["x", "k"], "y")], {"x": [3]}, {"y": [3]}, {"k": stored})
        np.testing.assert_array_equal(constant(widened(net), "k"), half(0.1, -2, 65504))

    def test_close_to_the_reference_that_rounds_every_result(self) -> None:
        net = to_half(conv_chain(channels=8, size=6))
        feed = random_feed(net)
        (want,) = ReferenceEvaluator(net).run(None, feed)
        (got,) = run_model(prepare(net), [feed], fused=False)[0]
        assert got.dtype == want.dtype == np.float16
        np.testing.assert_allclose(got, want, rtol=0, atol=4 * ROUNDING * np.abs(want).max())

    @pytest.mark.parametrize("opset", [9, 10])
    def test_bounds_and_pads_that_were_attributes(self, opset: int) -> None:
        nodes = [
            node("Pad", ["x"], "p", pads=[0, 0, 1, 1, 0, 0, 1, 1], value=0.25),
            node("Clip", ["p"], "y", min=-1.0, max=1.0),
        ]
        widened(net16(nodes, IMAGE, {"y": [1, 3, 10, 10]}, opset=opset))

    def test_bounds_at_the_ends_of_float16_stay(self) -> None:
        bounds = {"lo": half(-65504)[0], "hi": half(65504)[0]}
        net = net16([node("Clip", ["x", "lo", "hi"], "y")], {"x": [4]}, {"y": [4]}, bounds)
        made = widened(net, {"x": half(-65504, -1, 1, 65504)})
        assert (float(constant(made, "lo")), float(constant(made, "hi"))) == (-65504, 65504)

    @pytest.mark.parametrize("opset", [9, 12, 21])
    def test_values_and_types_in_attributes(self, opset: int) -> None:
        two = numpy_helper.from_array(half(2))
        nodes = [
            helper.make_node("Constant", [], ["k"], value=two),
            node("Shape", ["x"], "s"),
            node("ConstantOfShape", ["s"], "f", value=two),
            node("EyeLike", ["x"], "e", dtype=H),
            node("Mul", ["x", "k"], "a"),
            node("Add", ["a", "f"], "b"),
            node("Cast", ["i"], "i16", to=H),
            node("Add", ["b", "e"], "c"),
            node("Add", ["c", "i16"], "y"),
        ]
        inputs = {"x": info("x", ["N", 3]), "i": info("i", ["N", 3], I64)}
        feed = {"x": rng().standard_normal((3, 3)).astype(np.float16), "i": np.eye(3, dtype=int)}
        widened(net16(nodes, inputs, {"y": ["N", 3]}, opset=opset), feed)

    @pytest.mark.parametrize(
        ("op", "read", "attribute"),
        [
            ("RandomNormalLike", "x", "dtype"),
            ("RandomUniformLike", "x", "dtype"),
            ("Bernoulli", "x", "dtype"),
            ("RandomNormal", "", "dtype"),
            ("RandomUniform", "", "dtype"),
            ("HannWindow", "n", "output_datatype"),
        ],
    )
    def test_types_of_what_is_made(self, op: str, read: str, attribute: str) -> None:
        shape = {} if read else {"shape": [3]}
        nodes = [
            node(op, [read] if read else [], "r", **{attribute: H}, **shape),
            node("Add", ["x", "r"], "y"),
        ]
        made = prepare(net16(nodes, {"x": [3]}, {"y": [3]}, {"n": np.int64(3)}))
        onnx.checker.check_model(made, full_check=True)
        assert halves_inside(made) == []
        assert {a.name: a.i for a in only(made, op).attribute}[attribute] == F

    @pytest.mark.parametrize("kept_as", ["node", "initializer"])
    def test_sparse_weights(self, kept_as: str) -> None:
        at = numpy_helper.from_array(np.array([1], np.int64))
        sparse = helper.make_sparse_tensor(numpy_helper.from_array(half(5), "p"), at, [3])
        constant_node = helper.make_node("Constant", [], ["p"], sparse_value=sparse)
        net = net16([constant_node, node("Add", ["x", "p"], "y")], {"x": [3]}, {"y": [3]})
        if kept_as == "initializer":
            del net.graph.node[0]
            net.graph.sparse_initializer.append(sparse)
        made = prepare(net)
        assert constant(made, "p").dtype == np.float32
        feed = random_feed(net)
        (got,) = run_model(made, [feed], fused=False)[0]
        np.testing.assert_array_equal(got, feed["x"] + half(0, 5, 0))

    def test_sequences_inside(self) -> None:
        nodes = [
            node("SequenceEmpty", [], "s0", dtype=H),
            node("SequenceInsert", ["s0", "x"], "s1"),
            node("SequenceInsert", ["s1", "k"], "s2"),
            node("ConcatFromSequence", ["s2"], "y", axis=0),
        ]
        made = widened(net16(nodes, {"x": [3]}, {"y": [5]}, {"k": half(1, 2)}))
        assert ops(made)["SequenceEmpty"] == 1

    def test_optionals_inside(self) -> None:
        kind = helper.make_tensor_type_proto(H, [3])
        nodes = [
            node("Optional", ["x"], "o", type=kind),
            node("OptionalGetElement", ["o"], "e"),
            node("Neg", ["e"], "y"),
        ]
        made = prepare(net16(nodes, {"x": [3]}, {"y": [3]}))
        onnx.checker.check_model(made, full_check=True)
        assert halves_inside(made) == []

    def test_layer_norm_between_casts(self) -> None:
        nodes = [
            node("ReduceMean", ["x"], "m", axes=[-1]),
            node("Sub", ["x", "m"], "d"),
            node("Cast", ["d"], "d32", to=F),
            node("Pow", ["d32", "two"], "p"),
            node("ReduceMean", ["p"], "v", axes=[-1]),
            node("Add", ["v", "eps"], "ve"),
            node("Sqrt", ["ve"], "s"),
            node("Cast", ["s"], "s16", to=H),
            node("Div", ["d", "s16"], "n"),
            node("Mul", ["n", "g"], "ng"),
            node("Add", ["ng", "b"], "y"),
        ]
        constants = {
            "two": np.float32(2),
            "eps": np.float32(1e-5),
            "g": np.linspace(1, 2, 8).astype(np.float16),
            "b": np.linspace(-1, 2, 8).astype(np.float16),
        }
        made = widened(net16(nodes, {"x": [2, 8]}, {"y": [2, 8]}, constants, opset=13))
        assert ops(made) == {"Cast": 2, "LayerNormalization": 1}

    def test_mixed_types(self) -> None:
        nodes = [
            node("Conv", ["x", "w"], "c", pads=[1] * 4),
            node("Cast", ["c"], "c32", to=F),
            node("Mul", ["c32", "k"], "m"),
            node("Cast", ["m"], "m16", to=H),
            node("Add", ["c", "m16"], "a"),
            node("CastLike", ["z", "a"], "z16"),
            node("Add", ["a", "z16"], "y"),
        ]
        inputs = {**IMAGE, "z": info("z", [1], F)}
        constants = {"w": W16, "k": np.array([[[[1.5]]]], np.float32)}
        made = widened(net16(nodes, inputs, {"y": [1, 4, 8, 8]}, constants))
        assert ops(made)["Cast"] == 2
        assert constant(made, "w").dtype == np.float32

    def test_operators_of_other_domains(self) -> None:
        """Their results' types come from value infos alone, their attributes mean anything."""
        nodes = [
            helper.make_node("Twist", ["x"], ["t"], name="twist", domain="their.own", to=H),
            node("Relu", ["t"], "r"),
            helper.make_node("Twist", ["r"], ["y"], name="twist2", domain="their.own"),
        ]
        net = net16(nodes, {"x": [2, 3]}, {"y": [2, 3]})
        net.graph.value_info.append(info("t", [2, 3]))
        made = prepare(net)
        assert prepare(made) == made
        noted = {v.name: v.type.tensor_type.elem_type for v in made.graph.value_info}
        assert noted == dict.fromkeys(["x_float32", "t", "r", "y_float32"], F)
        assert made.graph.node[1].attribute[0].i == H

    def test_no_work_leaves_float32_models_as_they_are(self, monkeypatch) -> None:
        nets = [conv_chain(channels=4, size=4), residual(4, 4), mlp(rows=2, width=8, opset=13)]
        own = [prepare(n).SerializeToString(deterministic=True) for n in nets]
        passes = tuple(p for p in qdq.prepare.PASSES if p is not widen_float16)
        assert len(passes) == len(qdq.prepare.PASSES) - 1
        monkeypatch.setattr(qdq.prepare, "PASSES", passes)
        assert own == [prepare(n).SerializeToString(deterministic=True) for n in nets]

    def test_bfloat16_and_float64_stay(self) -> None:
        for kind in (BF16, F64):
            value = helper.make_tensor("k", kind, [2], [1, 2])
            ends = [info(n, [2], kind) for n in "xy"]
            net = net16(
                [node("Add", ["x", "k"], "y")], {"x": ends[0]}, {"y": ends[1]}, {"k": value}
            )
            made = prepare(net)
            assert types(made) == {"x": kind, "y": kind}
            assert [t.data_type for t in made.graph.initializer] == [kind]
            assert ops(made) == {"Add": 1}


class TestBorders:
    def test_identity(self) -> None:
        made = widened(net16([node("Identity", ["x"], "y")], {"x": [2]}, {"y": [2]}))
        assert ops(made) == {"Cast": 2}

    def test_float32_borders_leave_no_cast(self) -> None:
        net = to_half(residual(8, 6), keep_io_types=True)
        assert ops(net)["Cast"] == 2
        made = check(net, ROUNDING)
        assert types(made) == {"x": F, "y": F}
        assert "Cast" not in ops(made)
        assert halves_inside(made) == []

    def test_casts_that_are_there_are_used(self) -> None:
        nodes = [
            node("Cast", ["x"], "a", to=F),
            node("Relu", ["a"], "b"),
            node("Cast", ["b"], "y", to=H),
        ]
        made = widened(net16(nodes, {"x": [4]}, {"y": [4]}))
        assert [n.name for n in made.graph.node] == [n.name for n in nodes]

    def test_outputs_that_are_read_and_inputs_that_are_handed_out(self) -> None:
        nodes = [
            node("Relu", ["x"], "y"),
            node("Cast", ["y"], "w", to=H),
            node("Neg", ["w"], "v"),
            node("Split", ["v"], ["p", "q"], axis=0, num_outputs=2),
            node("Add", ["p", "k"], "z"),
        ]
        outputs = {"y": [4], "w": [4], "p": [2], "q": [2], "z": [2], "k": [1], "x": [4]}
        made = widened(net16(nodes, {"x": [4]}, outputs, {"k": half(3)}))
        assert constant(made, "k").dtype == np.float16  # handed out
        assert constant(made, "k_float32").dtype == np.float32

    def test_names_in_use(self) -> None:
        nodes = [node("Relu", ["x"], "x_float32"), node("Neg", ["x_float32"], "y")]
        nodes[1].name = "x_to_float32"
        widened(net16(nodes, {"x": [4]}, {"y": [4]}))

    @pytest.mark.parametrize("end", ["input", "output"])
    def test_sequences(self, end: str) -> None:
        kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(H, [2]))
        value = helper.make_value_info("s", kind)
        if end == "input":
            nodes = [node("SequenceAt", ["s", "i"], "y")]
            net = net16(nodes, {"s": value}, {"y": [2]}, {"i": np.int64(0)})
        else:
            net = net16([node("SequenceConstruct", ["x"], "s")], {"x": [2]}, {"s": value})
        with pytest.raises(ModelError, match=r"'s' is an input or output .* float16 sequence") as e:
            prepare(net)
        assert e.value.tensor == "s"

    def test_optionals(self) -> None:
        kind = helper.make_optional_type_proto(helper.make_tensor_type_proto(H, [2]))
        value = helper.make_value_info("o", kind)
        net = net16([node("OptionalGetElement", ["o"], "y")], {"o": value}, {"y": [2]})
        with pytest.raises(ModelError, match="float16 optional"):
            prepare(net)

    @BITS
    def test_bits_that_become_float16(self) -> None:
        inputs = {"x": info("x", [2], TensorProto.INT16)}
        nodes = [node("BitCast", ["x"], "y", to=H)]
        with pytest.raises(ModelError, match="BitCast between 16-bit types"):
            prepare(net16(nodes, inputs, {"y": [2]}, opset=26))

    @BITS
    def test_bits_of_float16(self) -> None:
        nodes = [node("BitCast", ["x"], "y", to=TensorProto.UINT16)]
        outputs = {"y": info("y", [2], TensorProto.UINT16)}
        net = net16(nodes, {"x": [2]}, outputs, opset=26)
        with pytest.raises(ModelError, match="'BitCast_y' is a BitCast between 16-bit types"):
            prepare(net)
        # without float16 it is none of this pass's business
        inputs = {"x": info("x", [2], TensorProto.INT16)}
        assert ops(prepare(net16(nodes, inputs, outputs, opset=26))) == {"BitCast": 1}


def branch(nodes, outputs, inputs=(), constants=None) -> onnx.GraphProto:
    values = [numpy_helper.from_array(np.asarray(v), n) for n, v in (constants or {}).items()]
    return helper.make_graph(list(nodes), "body", list(inputs), list(outputs), values)


class TestSubgraphs:
    @pytest.mark.parametrize("opset", [11, 13, 21])
    def test_branches_that_capture_inputs_and_outputs(self, opset: int) -> None:
        inner = branch([node("Mul", ["x", "r"], "m")], [info("m", [3])])
        deep = helper.make_node("If", ["c"], ["d"], name="deep", then_branch=inner,
                                else_branch=branch([node("Cast", ["i"], "f", to=H)],
                                                   [info("f", [3])]))  # fmt: skip
        then = branch([deep, node("Add", ["d", "k"], "t")], [info("t", [3])], (), {"k": half(7)})
        other = branch([node("Neg", ["x"], "e")], [info("e", [3])])
        nodes = [
            node("Relu", ["x"], "r"),
            helper.make_node("If", ["c"], ["y"], name="if", then_branch=then, else_branch=other),
        ]
        inputs = {"x": [3], "c": info("c", [], TensorProto.BOOL), "i": info("i", [3], I64)}
        net = net16(nodes, inputs, {"y": [3], "r": [3]}, opset=opset)
        for choice in (True, False):
            feed = {"x": half(1, -2, 3), "c": np.array(choice), "i": np.arange(3)}
            widened(net, feed)

    def test_loop(self) -> None:
        body = branch(
            [
                node("Mul", ["a", "x"], "p"),
                node("Add", ["p", "k"], "a_next"),
                node("Identity", ["a_next"], "each"),
                node("Identity", ["cond"], "cond_next"),
            ],
            [info("cond_next", [], TensorProto.BOOL), info("a_next", [2]), info("each", [2])],
            [info("n", [], I64), info("cond", [], TensorProto.BOOL), info("a", [2])],
            {"k": half(0.5)},
        )
        nodes = [
            node("Abs", ["x"], "start"),
            helper.make_node("Loop", ["trips", "", "start"], ["y", "z"], name="loop", body=body),
        ]
        net = net16(nodes, {"x": [2]}, {"y": [2], "z": [3, 2]}, {"trips": np.int64(3)})
        widened(net)

    def test_scan(self) -> None:
        body = branch(
            [node("Add", ["s", "row"], "s_next"), node("Mul", ["s_next", "w"], "out")],
            [info("s_next", [2]), info("out", [2])],
            [info("s", [2]), info("row", [2])],
        )
        scan = helper.make_node(
            "Scan", ["zero", "x"], ["last", "y"], name="scan", body=body, num_scan_inputs=1
        )
        constants = {"zero": half(0, 0), "w": half(2, 3)}
        widened(net16([scan], {"x": [4, 2]}, {"last": [2], "y": [4, 2]}, constants))

    def test_a_name_of_the_body_that_hides_an_outer_one(self) -> None:
        then = branch([node("Neg", ["x"], "t")], [info("t", [2])], (), {"x": half(1, 2)})
        other = branch([node("Abs", ["x"], "t2")], [info("t2", [2])])
        choose = helper.make_node(
            "If", ["c"], ["y"], name="if", then_branch=then, else_branch=other
        )
        made = prepare(
            net16([choose], {"x": [2], "c": info("c", [], TensorProto.BOOL)}, {"y": [2]})
        )
        read = {a.name: a.g.node[0].input[0] for a in only(made, "If").attribute}
        assert read == {"then_branch": "x", "else_branch": "x_float32"}


def half_feeds(shape: Sequence[int], count: int = 8) -> list[dict[str, NDArray]]:
    r = rng(1)
    return [{"x": r.standard_normal(tuple(shape)).astype(np.float16)} for _ in range(count)]


class TestQuantize:
    @pytest.mark.parametrize("opset", [9, 12, 13, 21])
    def test_conv_model(self, opset: int) -> None:
        net, feeds = to_half(conv_chain(opset=opset)), half_feeds([1, 32, 24, 24])
        result, found = quantized(net, feeds)
        assert types(result.model) == {"x": H, "r2": H}
        assert found.fused.dtype == found.unfused.dtype == np.float16
        assert found.ops["QLinearConv"] == 3
        assert found.ops["Conv"] == 0
        assert found.sqnr > 30
        assert found.steps_apart < 2

    def test_as_good_as_the_float32_model(self) -> None:
        net = residual()
        plain = [{"x": f["x"].astype(np.float32)} for f in half_feeds([1, 32, 24, 24])]
        _, whole = quantized(net, plain)
        _, found = quantized(to_half(net), half_feeds([1, 32, 24, 24]))
        assert found.sqnr > whole.sqnr - 0.5
        assert found.ops - whole.ops == {"Cast": 2}

    def test_float32_borders(self) -> None:
        net = to_half(conv_chain(), keep_io_types=True)
        feeds = [{"x": f["x"].astype(np.float32)} for f in half_feeds([1, 32, 24, 24])]
        result, found = quantized(net, feeds)
        assert found.ops["QLinearConv"] == 3
        assert found.ops["Cast"] == 0
        assert types(result.model) == {"x": F, "r2": F}

    def test_feeds_are_float16(self) -> None:
        feeds = [{"x": np.zeros((1, 32, 24, 24), np.float32)}]
        with pytest.raises(CalibrationError, match="is float32; the model wants float16"):
            qdq.quantize(to_half(conv_chain()), feeds)

    def test_rules_know_the_user_s_nodes(self) -> None:
        rule = qdq.Rule(nodes="Conv_c2", keep_float=True)
        net, feeds = to_half(conv_chain()), half_feeds([1, 32, 24, 24])
        result, found = quantized(net, feeds, scheme=qdq.Scheme(rules=(rule,)))
        assert "Conv_c2" in result.plan.left_float
        assert found.ops["QLinearConv"] == 2

    @pytest.mark.parametrize("per_channel", [True, False])
    def test_bias_far_above_its_weights(self, per_channel: bool) -> None:
        """Input scale 0.01, weight scale 6.1e-5: as int32 the bias would be 2.3e9."""
        w = np.full((2, 2, 2, 2), 0.007782, np.float16)
        w[1] *= -1
        constants = {"w": w, "b": half(1400, -1200)}
        shape = [1, 2, 4, 4]
        net = net16(
            [node("Conv", ["x", "w", "b"], "y")], {"x": shape}, {"y": [1, 2, 3, 3]}, constants
        )
        ends = [{"x": np.full(shape, v, np.float16)} for v in (0, 2.55)]
        feeds = [*ends, {"x": rng().uniform(0, 2.55, shape).astype(np.float16)}]
        scheme = qdq.Scheme(per_channel=per_channel)
        model8 = api.run(net, feeds, target=FORCED, scheme=scheme).model
        found = compare(net, model8, feeds)
        assert fused_ops(model8)["QLinearConv"] == 1
        step = (1401 + 1201) / 255  # of the 8-bit output
        for got in (found.fused, found.unfused):
            assert got.dtype == np.float16
            error = np.abs(got.astype(np.float64) - found.exact.astype(np.float64))
            assert error.max() <= 0.5 * step + 1


def test_float64_stays_float_for_a_true_reason() -> None:
    nodes = [node("MatMul", ["x", "w"], "m"), node("Relu", ["m"], "y")]
    ends = {"x": info("x", [2, 8], F64)}, {"y": info("y", [2, 8], F64)}
    net = net16(nodes, *ends, {"w": weights(8, 8).astype(np.float64)})
    plan = make_plan(prepare(net), target=FORCED)
    assert plan.left_float == dict.fromkeys(["MatMul_m", "Relu_y"], "its data is not float32")
