"""Operators that onnxruntime has fused, taken apart: the same floats, products to quantize."""

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from harness import FORCED, older
from models import model, node, rng, weights
from onnx import TensorProto, helper, numpy_helper
from prepared import ops

from qdq import Rule, Scheme
from qdq.api import run as quantize
from qdq.prepare import prepare
from qdq.prepare.editing import Editor
from qdq.prepare.fused import take_apart
from qdq.session import run
from qdq.views import nominal_graph

ROWS = [2, 5, 16]
IMAGE = [1, 8, 6, 6]


def vec(size: int, seed: int = 0) -> np.ndarray:
    return rng(seed).standard_normal(size).astype(np.float32)


def fused(op: str, inputs: Sequence[str], outputs: Sequence[str] = ("y",), **attributes):
    return helper.make_node(op, inputs, outputs, f"{op}_y", domain="com.microsoft", **attributes)


def net(own: onnx.NodeProto, shape: Sequence[int], constants, **more: Sequence[int]):
    """A model of one node of the runtime's own, at an opset that has to be raised."""
    known = {k: v for k, v in constants.items() if k in own.input}
    out = {o: None for o in own.output if o}
    inputs = {"x": shape, **more}
    made = model([node("Identity", ["x"], "y")], inputs, {"y": shape}, known, opset=17)
    made.graph.node[0].CopyFrom(own)
    del made.graph.output[:]
    made.graph.output.extend(helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in out)
    made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return made


def same(before: onnx.ModelProto, data=None) -> onnx.ModelProto:
    """Prepare, and compare what the runtime makes of it with the operators as they are.

    Of those it makes others, which it could not run before 1.27: sums behind convolutions in
    blocks of channels.
    """
    made = prepare(before)
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in before.graph.input
    }
    data = data or {n: rng(3).standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    (exact,), (found,) = run(before, [data], optimize=False), run(made, [data])
    assert exact.keys() == found.keys()
    for name, value in exact.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)
    assert prepare(made) == made
    return made


CONSTANTS = {
    "b": vec(16),
    "s": 1 + 0.1 * vec(16, 1),
    "o": vec(16, 2),
    "w": weights(16, 16),
    "f": weights(8, 8, 3, 3),
    "c": vec(8),
}


@pytest.mark.parametrize(
    ("op", "inputs", "left"),
    [
        ("BiasGelu", "xb", {"Add": 1, "Gelu": 1}),
        ("FastGelu", "xb", {"Add": 1, "Gelu": 1}),
        ("FastGelu", "x", {"Gelu": 1}),
        ("Gelu", "x", {"Gelu": 1}),
        ("QuickGelu", "x", {"Mul": 2, "Sigmoid": 1}),
        ("SkipLayerNormalization", "xzs", {"Add": 1, "LayerNormalization": 1}),
        ("SkipLayerNormalization", "xzso", {"Add": 1, "LayerNormalization": 1}),
        ("SkipLayerNormalization", "xzsob", {"Add": 2, "LayerNormalization": 1}),
        ("SkipSimplifiedLayerNormalization", "xzs", {"Add": 1, "SimplifiedLayerNormalization": 1}),
        ("SkipSimplifiedLayerNormalization", "xzsb", {"Add": 2, "SimplifiedLayerNormalization": 1}),
    ],
)
def test_elementwise_operators_and_norms(op: str, inputs: str, left: dict[str, int]) -> None:
    norm = op.startswith("Skip")
    own = fused(op, list(inputs), ["y", "", "", "t"] if norm else ["y"])
    if norm:
        own.attribute.append(helper.make_attribute("epsilon", 0.01))
    made = same(net(own, ROWS, CONSTANTS, **({"z": ROWS} if norm else {})))
    assert ops(made) == left


def test_a_norm_whose_mean_is_read_stays() -> None:
    own = fused("SkipLayerNormalization", list("xzs"), ["y", "m"])
    assert ops(prepare(net(own, ROWS, CONSTANTS, z=ROWS))) == {"SkipLayerNormalization": 1}


@pytest.mark.parametrize("alpha", [1.0, 0.25])
@pytest.mark.parametrize(("turn", "turn2"), [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("right", ["w", "z"])
def test_products(turn: int, turn2: int, alpha: float, right: str) -> None:
    shape = [2, 16, 5] if turn else ROWS
    own = fused("FusedMatMul", ["x", right], transA=turn, transB=turn2, alpha=alpha)
    made = same(net(own, shape, CONSTANTS, **({"z": [16, 16]} if right == "z" else {})))
    assert ops(made)["MatMul"] == 1
    assert ops(made)["Transpose"] == turn + (turn2 if right == "z" else 0)


def test_a_turned_product_by_a_vector_stays() -> None:
    """onnxruntime makes something else of it, which is what the float model hands out."""
    own = fused("FusedMatMul", ["x", "b"], transA=1)
    assert ops(same(net(own, [2, 16, 5], CONSTANTS))) == {"FusedMatMul": 1}


@pytest.mark.parametrize(
    ("activation", "params"),
    [
        ("Relu", []),
        ("Tanh", []),
        ("Sigmoid", []),
        ("LeakyRelu", [0.2]),
        ("HardSigmoid", [0.3, 0.4]),
    ],
)
@pytest.mark.parametrize("more", [[], ["z"]])
def test_convolutions(activation: str, params: list[float], more: list[str]) -> None:
    kept = {"activation_params": params} if params else {}
    inputs = ["x", "f", "c", *more]
    own = fused("FusedConv", inputs, activation=activation, pads=[1] * 4, **kept)
    made = same(net(own, IMAGE, CONSTANTS, **({"z": IMAGE} if more else {})))
    assert ops(made) == {"Conv": 1, activation: 1, **({"Add": 1} if more else {})}


HARD_SWISH = pytest.param(
    "HardSwish", [], marks=pytest.mark.skipif(older("1.30"), reason="no FusedConv with it")
)


@pytest.mark.parametrize(("activation", "params"), [("HardSigmoid", [0.3, 0.4]), HARD_SWISH])
def test_hard_activations(activation: str, params: list[float]) -> None:
    kept = {"activation_params": params} if params else {}
    own = fused("FusedConv", ["x", "f", "c"], activation=activation, pads=[1] * 4, **kept)
    assert ops(same(net(own, IMAGE, CONSTANTS)))["Conv"] == 1


def test_a_gemm() -> None:
    own = fused(
        "FusedGemm", ["x", "w", "b"], activation="LeakyRelu", activation_alpha=0.2, transB=1
    )
    assert ops(same(net(own, [4, 16], CONSTANTS))) == {"Gemm": 1, "LeakyRelu": 1}


@pytest.mark.parametrize("unidirectional", [0, 1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", [[16, 16, 16], [16, 16, 8]])
def test_attention(sizes: list[int], masked: bool, unidirectional: int) -> None:
    constants = {"k": weights(16, sum(sizes)), "b": vec(sum(sizes))}
    inputs = ["x", "k", "b", *(["mask"] if masked else [])]
    kept = {"num_heads": 4, "unidirectional": unidirectional}
    before = net(fused("Attention", inputs, qkv_hidden_sizes=sizes, **kept), ROWS, constants)
    data = {"x": rng(3).standard_normal(ROWS).astype(np.float32)}
    if masked:
        mask = helper.make_tensor_value_info("mask", TensorProto.INT32, ROWS[:2])
        before.graph.input.append(mask)
        data["mask"] = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)
    made = same(before, data)
    assert ops(made) == {"Gemm": 3, "Reshape": 4, "MultiHeadAttention": 1}
    assert nominal_graph(made).shape("y") == (2, 5, sizes[2])


def embedded(
    slots: str, outputs: Sequence[str], sizes: Sequence[int | str] = (3, 5)
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Words, segments, mask and positions as far as named; ids of 3 rows of 5."""
    given = [c if c in slots else "" for c in "isWPSgomp"]
    own = fused("EmbedLayerNormalization", given, outputs, epsilon=0.01)
    constants = {"W": weights(16, 9), "P": weights(16, 7, seed=1), "S": weights(16, 2, seed=2)}
    constants = {k: v.T.copy() for k, v in constants.items()}
    before = net(own, ROWS, constants | {"g": 1 + 0.1 * vec(16, 1), "o": vec(16, 2)})
    del before.graph.input[:]
    ends = {"i": 9, "s": 2, "m": 2, "p": 7}
    data = {n: rng(k).integers(0, end, (3, 5)).astype(np.int32)
            for k, (n, end) in enumerate(ends.items()) if n in slots}  # fmt: skip
    for name in data:
        before.graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT32, sizes))
    for v in before.graph.output:
        v.type.tensor_type.elem_type = TensorProto.INT32 if v.name == "c" else TensorProto.FLOAT
    return before, data


@pytest.mark.parametrize(
    ("slots", "outputs"),
    [
        ("isWPSgom", ["y", "c"]),
        ("isWPSgo", ["y", ""]),
        ("isWPSgomp", ["y", "c", "t"]),
        ("iWPgop", ["y", "", "t"]),
        ("iWPgom", ["y", "c"]),
    ],
)
def test_embeddings(slots: str, outputs: list[str]) -> None:
    before, data = embedded(slots, outputs)
    made = same(before, data)
    found = ops(made)
    assert found["Gather"] == 1 + ("s" in slots) + ("p" in slots)
    assert found["LayerNormalization"] == 1
    assert found["ReduceSum"] == ("c" in outputs)
    assert found["EmbedLayerNormalization"] == 0


def test_embeddings_of_open_sizes() -> None:
    before, data = embedded("isWPSgom", ["y", "c"], ["b", "n"])
    made = prepare(before)
    assert ops(made)["Slice"] == 1
    (exact,), (found,) = (list(run(m, [data])) for m in (before, made))
    np.testing.assert_allclose(found["y"], exact["y"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found["c"], exact["c"])


def test_embeddings_without_an_epsilon() -> None:
    """The operator's own is not that of LayerNormalization."""
    before, data = embedded("iWPgo", ["y", ""])
    del before.graph.node[0].attribute[:]
    for t in before.graph.initializer:
        if t.name in "WP":
            t.CopyFrom(numpy_helper.from_array(1e-3 * numpy_helper.to_array(t), t.name))
    assert ops(same(before, data))["LayerNormalization"] == 1


def test_embeddings_of_an_opset_without_their_norm_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Editor, "opset", 16)
    before, _ = embedded("iWPgo", ["y"])
    ed = Editor(before)
    take_apart(ed)
    assert [n.op for n in ed.nodes()] == ["com.microsoft::EmbedLayerNormalization"]


def test_lengths_that_nobody_reads() -> None:
    before, data = embedded("isWPSgo", ["y", "c"])
    del before.graph.output[1]
    assert ops(same(before, data))["Gather"] == 2


def test_attention_to_as_many_keys_as_embeddings_count() -> None:
    before, data = embedded("iWPgom", ["e", "c"])
    before.graph.node.append(fused("Attention", ["e", "k", "b", "c"], num_heads=4))
    before.graph.initializer.extend(
        numpy_helper.from_array(v, k) for k, v in {"k": weights(16, 48), "b": vec(48)}.items()
    )
    before.graph.output[0].name = "y"
    found = ops(same(before, data))
    assert found["Gemm"] == 3
    assert found["LayerNormalization"] == 1


def test_lengths_of_no_mask_stay() -> None:
    before, data = embedded("isWPSgo", ["y", "c"])
    assert ops(same(before, data)) == {"EmbedLayerNormalization": 1}


def test_attention_with_a_past_stays() -> None:
    constants = {"k": weights(16, 48), "b": vec(48)}
    own = fused("Attention", ["x", "k", "b", "", "past"], num_heads=4)
    made = prepare(net(own, ROWS, constants, past=[2, 2, 4, 3, 4]))
    assert ops(made) == {"Attention": 1}


def test_the_products_become_integers() -> None:
    shape, width = [1, 64, 128], 128
    constants = {"k": weights(width, 3 * width), "b": vec(3 * width)}
    before = net(fused("Attention", ["x", "k", "b"], num_heads=4), shape, constants)
    data = [{"x": rng(k).standard_normal(shape).astype(np.float32)} for k in range(4)]
    assert len(quantize(before, data).plan.quantized) == 3


def test_other_types_stay() -> None:
    before = net(fused("FusedMatMul", ["x", "w"]), ROWS, {"w": weights(16, 16).astype(np.float64)})
    for v in (*before.graph.input, *before.graph.output):
        v.type.tensor_type.elem_type = TensorProto.DOUBLE
    assert ops(prepare(before)) == {"FusedMatMul": 1}


@pytest.mark.parametrize("pattern", [{"nodes": "{}_y"}, {"op_types": ("{}",)}])
@pytest.mark.parametrize(
    ("op", "inputs", "shape"),
    [("FusedConv", "xfcz", IMAGE), ("FusedGemm", "xwb", [5, 16]), ("FusedMatMul", "xw", ROWS),
     ("Attention", "xkq", ROWS), ("BiasGelu", "xb", ROWS), ("SkipLayerNormalization", "xzs", ROWS)],
)  # fmt: skip
def test_a_rule_for_the_operator_is_for_all_its_parts(op: str, inputs: str, shape, pattern) -> None:
    kept = {"FusedMatMul": {"alpha": 0.5}, "Attention": {"num_heads": 4}, "BiasGelu": {},
            "SkipLayerNormalization": {}}  # fmt: skip
    conv = {"pads": [1] * 4} if op == "FusedConv" else {}
    own = fused(op, list(inputs), **kept.get(op, {"activation": "Sigmoid", **conv}))
    constants = {**CONSTANTS, "k": weights(16, 48), "q": vec(48)}
    before = net(own, shape, constants, **({"z": shape} if "z" in inputs else {}))
    data = [{n: vec(int(np.prod(shape)), k).reshape(shape) for n in "xz" if n in inputs}
            for k in range(2)]  # fmt: skip
    ((key, value),) = pattern.items()
    name = value.format(op) if isinstance(value, str) else tuple(v.format(op) for v in value)
    rules = (Rule(**{key: name}, keep_float=True),)
    assert quantize(before, data, target=FORCED).plan.quantized
    assert not quantize(before, data, target=FORCED, scheme=Scheme(rules=rules)).plan.quantized


@pytest.mark.parametrize("op", ["BiasGelu", "SkipLayerNormalization"])
def test_a_rule_for_the_operator_is_not_for_the_product_that_takes_in_its_bias(op: str) -> None:
    more = ["x", "s", "o"] if op == "SkipLayerNormalization" else []
    before = net(fused(op, ["m", *more, "b"]), ROWS, {k: vec(16) for k in "sob"})
    before.graph.node.insert(0, node("MatMul", ["x", "w"], "m"))
    before.graph.initializer.append(numpy_helper.from_array(weights(16, 16), "w"))
    data = [{"x": rng(k).standard_normal(ROWS).astype(np.float32)} for k in range(3)]
    rule = Rule(op_types=(op,), keep_float=True)
    result = quantize(before, data, target=FORCED, scheme=Scheme(rules=[rule]))
    assert "MatMul_m" in result.plan.quantized
    assert "rule" in result.left_float[f"{op}_y"]


def test_a_rule_for_one_of_two_is_not_for_what_the_other_hands_out_too() -> None:
    own = fused("SkipLayerNormalization", ["m", "t", "s", "o"], ["z"])
    before = net(own, ROWS, {k: vec(16) for k in "so"})
    first = fused("SkipLayerNormalization", ["x", "x", "s", "o"], ["y", "", "", "t"])
    before.graph.node.insert(0, first)
    before.graph.node.insert(1, node("Sigmoid", ["y"], "m"))
    own.name = before.graph.node[2].name = "second"
    data = [{"x": rng(k).standard_normal(ROWS).astype(np.float32)} for k in range(3)]
    scheme = Scheme(rules=[Rule(nodes="second", keep_float=True)])
    result = quantize(before, data, target=FORCED, scheme=scheme)
    kept = {n for n, why in result.left_float.items() if "rule" in why}
    assert kept == {"second", "second_sum"}
