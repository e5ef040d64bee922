"""compare(): its errors against a calculation by hand, models of other tools, metadata, advice."""

import json
import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
from chains import Net, samples
from harness import FORCED
from models import conv_chain, feeds, mlp, model, node, residual, rng, weights
from onnx import numpy_helper

import qdq
from qdq.affine import fake_quantize
from qdq.api import run as quantize_run
from qdq.modelio import load
from qdq.report.advice import without
from qdq.report.matching import match, plain
from qdq.report.sqnr import representable, sum_of_squares
from qdq.report.tally import kernel_counts
from qdq.session import run
from qdq.sqnr import decibels
from qdq.statistics.observe import observe

SHAPES = {"x": [1, 32, 24, 24]}


def quick(float_model, quantized, data, **options) -> qdq.report.Report:
    return qdq.compare(float_model, quantized, data, **{"repeats": 0, "advise": 0, **options})


@pytest.fixture(scope="module")
def chain():
    """Three convolutions, their QDQ model, and samples."""
    exact = conv_chain()
    data = feeds(SHAPES, 4)
    return exact, qdq.quantize(exact, data), data


def by_name(rows):
    return {r.name: r for r in rows}


def with_constant(source: onnx.ModelProto, name: str, change) -> onnx.ModelProto:
    """A copy of a model with one initializer changed."""
    made = onnx.ModelProto()
    made.CopyFrom(source)
    for t in made.graph.initializer:
        if t.name == name:
            value = change(numpy_helper.to_array(t).copy())
            t.CopyFrom(numpy_helper.from_array(value, name))
            return made
    raise KeyError(name)


def test_inputs_with_defaults_that_nothing_reads(chain) -> None:
    """Old PyTorch exports list all of a batch normalization's buffers as inputs."""
    exact, quantized, data = chain
    old = onnx.ModelProto()
    old.CopyFrom(exact)
    old.graph.initializer.append(numpy_helper.from_array(np.int64([5]), "batches"))
    for t in old.graph.initializer:
        old.graph.input.append(onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims))
    (found,), (wanted,) = (quick(m, quantized, data).outputs for m in (old, exact))
    assert found.sqnr_db == pytest.approx(wanted.sqnr_db, abs=0.01)


def test_tensors_that_are_no_arrays() -> None:
    """Sequences come as lists, and numpy has no bfloat16: they are left out."""
    nodes = [
        node("Conv", ["x", "w"], "h", pads=[1] * 4),
        node("SplitToSequence", ["h", "size"], "parts", axis=1),
        node("ConcatFromSequence", ["parts"], "whole", axis=1),
        node("Conv", ["whole", "w"], "again", pads=[1] * 4),
        node("Cast", ["again"], "short", to=onnx.TensorProto.BFLOAT16),
        node("Cast", ["short"], "long", to=onnx.TensorProto.FLOAT),
        node("Conv", ["long", "v"], "y", pads=[1] * 4),
    ]
    constants = {"w": weights(32, 32, 3, 3), "v": weights(32, 32, 3, 3), "size": np.int64(16)}
    exact = model(nodes, SHAPES, {"y": SHAPES["x"]}, constants)
    part = onnx.helper.make_tensor_sequence_value_info("parts", onnx.TensorProto.FLOAT, None)
    exact.graph.output.append(part)
    data = feeds(SHAPES, 4)
    report = quick(exact, qdq.quantize(exact, data), data, advise=1)
    assert [o.name for o in report.outputs] == ["y"]
    names = by_name(report.tensors)
    assert names.keys() >= {"x", "whole", "again", "long"}
    assert not names.keys() & {"parts", "short"}
    assert report.advice
    assert report.text()
    assert report.html()


# -- the numbers ----------------------------------------------------------------------------------


def test_accumulated_and_rounding_errors_are_those_of_a_calculation_by_hand(chain) -> None:
    exact, quantized, data = chain
    report = quick(exact, quantized, data)
    real = {"x": "x_DequantizeLinear_Output", "r0": "r0_DequantizeLinear_Output"}
    found = by_name(report.tensors)
    params = match(load(exact), load(quantized, quantized=True)).coded
    for tensor, name in real.items():
        a = list(observe(exact, [tensor], data))
        b = list(observe(quantized, [name], data, optimize=False))
        x = np.stack([v[tensor] for v in a]).astype(np.float64)
        y = np.stack([v[name] for v in b])
        row = found[tensor]
        assert row.accumulated_db == pytest.approx(decibels((x**2).sum(), ((x - y) ** 2).sum()))
        rounded = fake_quantize(x.astype(np.float32), params[tensor].params)
        assert row.rounding_db == pytest.approx(
            decibels((x**2).sum(), ((x - rounded) ** 2).sum()), abs=1e-6
        )
        low, high = representable(params[tensor].params)
        half = float(params[tensor].params.scale) / 2
        assert row.clipped == pytest.approx(((x < low - half) | (x > high + half)).mean())
        assert row.used == (x.min(), x.max())
        assert row.represented == (low, high)


def test_weights_are_compared_with_what_their_codes_stand_for(chain) -> None:
    exact, quantized, data = chain
    row = by_name(quick(exact, quantized, data).tensors)["w1"]
    graph = qdq.graph.Graph(quantized)
    scale = graph.array("w1_scale").reshape(-1, 1, 1, 1)
    value = graph.array("w1_quantized").astype(np.float64) * scale
    w = numpy_helper.to_array(next(t for t in exact.graph.initializer if t.name == "w1"))
    assert (row.kind, row.dtype, row.node) == ("weight", "int8", "Conv_c1")
    assert row.rounding_db == pytest.approx(decibels((w**2).sum(), ((w - value) ** 2).sum()), 1e-5)


def test_what_arises_at_a_node_does_not_depend_on_other_nodes(chain) -> None:
    exact, quantized, data = chain
    before = by_name(quick(exact, quantized, data).nodes)
    # codes of the first weight are spoiled: only its node's own error changes
    spoiled = with_constant(quantized, "w0_quantized", lambda w: (w // 16) * 16)
    after = by_name(quick(exact, spoiled, data).nodes)
    assert after["Conv_c0"].local_db < before["Conv_c0"].local_db - 6
    for name in ("Conv_c1", "Conv_c2", "x"):
        assert after[name].local_db == before[name].local_db
    for name in ("Conv_c0", "Conv_c1", "Conv_c2"):
        assert after[name].accumulated_db < before[name].accumulated_db - 1
    assert after["Conv_c0"].share > 0.5
    assert quick(exact, spoiled, data).nodes[0].name == "Conv_c0"


def test_what_arises_is_weights_and_result_together(chain) -> None:
    exact, quantized, data = chain
    found = match(load(exact), load(quantized, quantized=True))
    x, y = found.coded["x"], found.coded["r0"]
    weight = found.constants["w0_DequantizeLinear_Output"].value(found.graph)
    bias = found.constants["b0_DequantizeLinear_Output"].value(found.graph)
    other = with_constant(with_constant(exact, "w0", lambda _: weight), "b0", lambda _: bias)
    inputs = [{"x": fake_quantize(d["x"], x.params)} for d in data]
    ideal = [v["r0"] for v in observe(exact, ["r0"], inputs, optimize=False)]
    made = [v["r0"] for v in observe(other, ["r0"], inputs, optimize=False)]
    noise = sum(
        sum_of_squares(a, fake_quantize(b, y.params)) for a, b in zip(ideal, made, strict=True)
    )
    signal = sum(sum_of_squares(v["r0"]) for v in observe(exact, ["r0"], data))
    row = by_name(quick(exact, quantized, data).nodes)["Conv_c0"]
    assert row.local_db == pytest.approx(decibels(signal, noise), abs=1e-3)


def test_a_node_that_moves_values_adds_no_error() -> None:
    exact = model(
        [
            node("Conv", ["x", "w"], "a", pads=[1] * 4),
            node("MaxPool", ["a"], "p", kernel_shape=[2, 2], strides=[2, 2]),
            node("Conv", ["p", "v"], "y", pads=[1] * 4),
        ],
        SHAPES,
        {"y": [1, 32, 12, 12]},
        {"w": weights(32, 32, 3, 3), "v": weights(32, 32, 3, 3, seed=1)},
    )
    data = feeds(SHAPES, 3)
    pool = by_name(quick(exact, qdq.quantize(exact, data), data).nodes)["MaxPool_p"]
    assert pool.integer
    assert pool.local_db == math.inf
    assert pool.share == 0
    assert pool.accumulated_db < 60


def test_tensors_belong_to_the_nodes_that_make_them(chain) -> None:
    rows = by_name(quick(*chain).tensors)
    found = {n: (rows[n].node, rows[n].op_type) for n in ("x", "c0", "r0", "r2", "w2", "b2")}
    assert found == {
        "x": ("x", "input"), "c0": ("Conv_c0", "Conv"), "r0": ("Conv_c0", "Conv"),
        "r2": ("Conv_c2", "Conv"), "w2": ("Conv_c2", "Conv"), "b2": ("Conv_c2", "Conv"),
    }  # fmt: skip
    positions = [t.position for t in quick(*chain).tensors]
    assert positions == sorted(positions)


def test_shares_add_up_and_sort_the_nodes(chain) -> None:
    nodes = quick(*chain).nodes
    assert sum(n.share for n in nodes) == pytest.approx(1)
    assert [n.share for n in nodes] == sorted((n.share for n in nodes), reverse=True)


def test_outputs_are_those_of_the_optimized_model(chain) -> None:
    exact, quantized, data = chain
    (row,) = quick(exact, quantized, data).outputs
    a, b = (np.stack([v["r2"] for v in run(m, data)]) for m in (exact, quantized))
    wide = a.astype(np.float64)
    assert row.sqnr_db == pytest.approx(decibels((wide**2).sum(), ((wide - b) ** 2).sum()))
    assert row.largest == np.abs(a - b).max()
    assert row.agreement == (a.argmax(-1) == b.argmax(-1)).mean()
    assert row.cosine == pytest.approx(
        (wide * b).sum() / np.sqrt((wide**2).sum() * (b.astype(float) ** 2).sum())
    )


def test_the_same_data_in_another_order_gives_the_same_numbers(chain) -> None:
    exact, quantized, data = chain
    a, b = quick(exact, quantized, data), quick(exact, quantized, data[::-1])
    for x, y in zip(a.tensors, b.tensors, strict=True):
        assert x.accumulated_db == pytest.approx(y.accumulated_db, abs=1e-9)
        assert x.histogram == y.histogram
    assert a.samples == 4
    assert quick(exact, quantized, iter(data), samples=2).samples == 2


def test_a_clipped_range_shows() -> None:
    exact = conv_chain()
    data = feeds(SHAPES, 3)
    rule = qdq.Rule(tensors="r1", range=(0.0, 0.5))
    quantized = qdq.quantize(exact, data, scheme=qdq.Scheme(rules=(rule,)))
    report = quick(exact, quantized, data)
    assert by_name(report.tensors)["r1"].clipped > 0.05
    assert report.nodes[0].tensor == "r1"


def test_float_nodes_have_their_reason_and_no_error_of_their_own() -> None:
    exact = residual()
    data = feeds(SHAPES, 3)
    scheme = qdq.Scheme(rules=(qdq.Rule(nodes="Conv_b", keep_float=True),))
    rows = by_name(quick(exact, qdq.quantize(exact, data, scheme=scheme), data).nodes)
    assert not rows["Conv_b"].integer
    assert "keep_float" in rows["Conv_b"].reason or "rule" in rows["Conv_b"].reason
    assert rows["Conv_a"].integer


def slow_operators() -> onnx.ModelProto:
    """Convolutions with float nodes between them that have slow kernels."""
    names = ["c0", "c1", "c2", "y"]
    convs = [node("Conv", [x, f"{out}_w", f"{out}_b"], out, kernel_shape=[3, 3], pads=[1] * 4)
             for x, out in zip(["x", "m", "l", "p"], names, strict=True)]  # fmt: skip
    between = [
        node("Mish", ["c0"], "m"),
        node("LRN", ["c1"], "l", size=5),
        node("Relu", ["c2"], "r"),
        node("Pow", ["r", "half"], "p"),
    ]
    nodes = [convs[0], between[0], convs[1], between[1], convs[2], *between[2:], convs[3]]
    constants = {f"{n}_w": weights(32, 32, 3, 3, seed=k) for k, n in enumerate(names)}
    constants |= {f"{n}_b": weights(32, 1, seed=k)[:, 0] for k, n in enumerate(names)}
    return model(nodes, SHAPES, {"y": [1, 32, 24, 24]}, constants | {"half": np.float32(0.5)}, 18)


def test_float_nodes_written_as_others_are_reported_as_what_they_are() -> None:
    """One operator or several: what arises there is known, and rules about tensors are tried."""
    exact, data = slow_operators(), feeds(SHAPES, 2)
    found = []
    for tunes in (True, False):
        target = replace(qdq.targets.ORT_CPU, tunes_float=tunes)
        made = qdq.quantize(exact, data, target=target)
        assert any(n.op_type == "Mish" for n in made.graph.node) != tunes
        found.append(quick(exact, made, data, advise=1))
    tuned, plain = found
    assert {n.op_type for n in tuned.nodes} >= {"Mish", "LRN", "Pow"}
    assert not tuned.notes
    rows = by_name(plain.nodes)
    assert len(rows) == len(tuned.nodes)
    for row in tuned.nodes:
        other = rows[row.name]
        assert (row.op_type, row.integer) == (other.op_type, other.integer)
        assert row.local_db == pytest.approx(other.local_db, abs=0.05)
        assert row.accumulated_db == pytest.approx(other.accumulated_db, abs=0.05)
    assert (
        [(a.what, a.rule) for a in tuned.advice] == [(a.what, a.rule) for a in plain.advice] != []
    )


def test_a_model_that_qdq_left_float_as_a_whole() -> None:
    exact, data = conv_chain(), feeds(SHAPES, 2)
    scheme = qdq.Scheme(rules=(qdq.Rule(nodes=".*", keep_float=True),))
    report = qdq.compare(exact, qdq.quantize(exact, data, scheme=scheme), data, repeats=2)
    assert not any(n.integer or n.share for n in report.nodes)
    assert report.nodes
    assert report.advice == ()
    assert report.outputs[0].sqnr_db > 100
    assert "exact" in report.text()
    assert report.html()


# -- what ran -------------------------------------------------------------------------------------


def test_planned_kernels_are_found_in_the_optimized_model(chain) -> None:
    (row,) = quick(*chain).kernels
    assert (row.op_type, row.planned, row.integer, row.float) == ("Conv", 3, 3, 0)


def test_a_gemm_that_hands_out_float() -> None:
    exact, data = mlp(), feeds({"x": [64, 256]}, 3)
    report = quick(exact, qdq.quantize(exact, data), data)
    assert [(k.op_type, k.planned, k.integer) for k in report.kernels] == [("Gemm", 2, 2)]
    assert all(n.integer for n in report.nodes if n.op_type == "Gemm")
    assert all(0 < n.local_db < 80 for n in report.nodes if n.op_type == "Gemm")


def test_sizes_and_times(chain) -> None:
    exact, quantized, data = chain
    report = qdq.compare(exact, quantized, data, repeats=5, advise=0, threads=1)
    assert report.bytes == pytest.approx((exact.ByteSize(), quantized.ByteSize()), rel=0.01)
    t = report.timing
    assert t.float_spread[0] <= t.float_ms <= t.float_spread[1]
    assert t.quantized_spread[0] <= t.quantized_ms <= t.quantized_spread[1]
    assert t.ratio_spread[0] <= t.ratio <= t.ratio_spread[1]
    assert quick(exact, quantized, data).timing is None


# -- metadata -------------------------------------------------------------------------------------


def test_the_raises_of_the_bias_aware_step_are_in_the_model() -> None:
    exact = conv_chain()

    def large(b):
        b[3] = -4e4
        return b

    def small(w):
        w[3] *= 1e-5
        return w

    exact = with_constant(with_constant(exact, "b1", large), "w1", small)
    data = feeds(SHAPES, 3)
    quantized = qdq.quantize(exact, data)
    history = quick(exact, quantized, data).history
    raised = [c for c in history if c.ratio is not None and c.ratio > 1]
    assert [(c.tensor, c.step) for c in raised] == [("w1", "FitWeightsToBias")]
    assert raised[0].ratio > 100
    assert "1 of 32 scales raised" in raised[0].note
    first = [c.tensor for c in history if c.step == "FromConstants"]
    assert first == ["w0", "w1", "w2"]
    stored = json.loads({p.key: p.value for p in quantized.metadata_props}["qdq.changes"])
    assert len(stored) == len(history)


# -- models of other tools ------------------------------------------------------------------------


def by_onnxruntime(exact: onnx.ModelProto, data, folder, **options) -> onnx.ModelProto:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(data)

        def get_next(self):
            return next(self.left, None)

    onnx.save(exact, folder / "float.onnx")
    quantize_static(
        folder / "float.onnx",
        folder / "int8.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        **options,
    )
    return onnx.load(folder / "int8.onnx")


@pytest.mark.parametrize("clamp", ["Relu", "Clip"])
def test_a_model_by_onnxruntimes_quantizer(clamp: str, tmp_path) -> None:
    """It removes the clamps and renames the constants."""
    exact, data = conv_chain(clamp=clamp), feeds(SHAPES, 4)
    other = by_onnxruntime(exact, data, tmp_path)
    assert clamp not in {n.op_type for n in other.graph.node}
    report = quick(exact, other, data)
    rows = by_name(report.nodes)
    assert {"Conv_c0", "Conv_c1", "Conv_c2", "x"} <= set(rows)
    assert all(rows[n].local_db > 25 and rows[n].accumulated_db > 25 for n in rows)
    kinds = [t.kind for t in report.tensors]
    assert (kinds.count("weight"), kinds.count("bias")) == (3, 3)
    assert all(k.planned is None for k in report.kernels)
    assert report.history == ()
    assert "unknown" in report.text()


def test_constants_in_nodes_and_weights_behind_a_q() -> None:
    """As exporters of fake-quantized models write them."""
    w = weights(8, 4)
    nodes = [
        onnx.helper.make_node("Constant", [], ["s"], value_float=0.05),
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        onnx.helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        onnx.helper.make_node("QuantizeLinear", ["w", "t", "zw"], ["wq"]),
        onnx.helper.make_node("DequantizeLinear", ["wq", "t", "zw"], ["wd"]),
        onnx.helper.make_node("MatMul", ["xd", "wd"], ["y"], name="dense"),
    ]
    constants = {
        "w": w,
        "z": np.uint8(128),
        "t": np.float32(np.abs(w).max() / 127),
        "zw": np.int8(0),
    }
    other = model(nodes, {"x": [2, 8]}, {"y": [2, 4]}, constants)
    exact = model([node("MatMul", ["x", "w"], "y")], {"x": [2, 8]}, {"y": [2, 4]}, {"w": w})
    data = [{"x": rng(4).uniform(-5, 5, (2, 8)).astype(np.float32)}]
    report = quick(exact, other, data)
    rows = by_name(report.tensors)
    assert rows["w"].kind == "weight"
    assert 30 < rows["w"].rounding_db < 60
    assert 30 < rows["x"].rounding_db < 60
    (dense,) = (n for n in report.nodes if n.op_type == "MatMul")
    assert dense.integer
    assert 30 < dense.local_db < 60


def test_what_cannot_be_compared_is_noted(chain) -> None:
    exact, quantized, data = chain
    made = onnx.ModelProto()
    made.CopyFrom(quantized)
    for n in made.graph.node:  # nothing in the float model has the name any more
        for names in (n.input, n.output):
            names[:] = ["lost" if t == "r1" else t for t in names]
        if n.op_type == "DequantizeLinear" and n.output[0].startswith("r1"):
            n.output[0] = "lost_too"
        n.input[:] = ["lost_too" if t == "r1_DequantizeLinear_Output" else t for t in n.input]
    report = quick(exact, made, data)
    assert any("no namesake" in n for n in report.notes)
    assert "r1" not in by_name(report.tensors)
    assert by_name(report.nodes)["Conv_c2"].local_db is None


# -- advice ---------------------------------------------------------------------------------------


def test_advice_finds_the_spoiled_weight(chain) -> None:
    exact, quantized, data = chain
    spoiled = with_constant(quantized, "w1_quantized", lambda w: (w // 32) * 32)
    report = qdq.compare(exact, spoiled, data, repeats=0, advise=3)
    best = report.advice[0]
    assert best.rule == "Rule(nodes=r'Conv_c1', keep_float=True)"
    assert best.option == "--skip Conv_c1"
    assert best.gain_db > 3
    assert best.slower is None
    assert [a.gain_db for a in report.advice] == sorted(
        (a.gain_db for a in report.advice), reverse=True
    )


def test_trials_have_no_nodes_that_nothing_reads(chain) -> None:
    """The runtime would take its time with them."""
    exact, quantized, _ = chain
    matched = match(plain(load(exact)), plain(load(quantized, quantized=True)))
    for site in matched.sites:
        if site.integer:
            nodes = without(matched, [site.index]).graph.node
            read = {name for n in nodes for name in n.input} | {"r2"}
            assert not [n.name for n in nodes if read.isdisjoint(n.output)]


def test_advice_on_models_with_operators_of_the_runtime(chain) -> None:
    exact, quantized, data = chain
    contrib = onnx.ModelProto()
    contrib.CopyFrom(quantized)
    for n in contrib.graph.node:
        if n.op_type in ("QuantizeLinear", "DequantizeLinear"):
            n.domain = "com.microsoft"
    contrib.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    found, same = (qdq.compare(exact, m, data, repeats=0) for m in (contrib, quantized))
    assert [a.rule for a in found.advice] == [a.rule for a in same.advice] != []


def test_what_leaves_no_error_is_exact() -> None:
    net = model([node("Gemm", ["x", "w"], "y")], {"x": [8, 64]}, {"y": [8, 64]},
                {"w": weights(64, 64)})  # fmt: skip
    data = feeds({"x": [8, 64]}, 2)
    report = qdq.compare(net, qdq.quantize(net, data, target=FORCED), data, repeats=0)
    assert "exact" in {a.gain for a in report.advice}
    assert all(a.gain_db == math.inf for a in report.advice if a.gain == "exact")


def test_integer_nodes_without_integer_kernels_have_a_row(chain) -> None:
    rows = kernel_counts(chain[1], None, ["LSTM"])[0]
    assert [(r.op_type, r.planned, r.integer) for r in rows if r.op_type == "LSTM"] == [
        ("LSTM", None, 0)
    ]


def test_the_measured_gain_is_what_the_rule_gives() -> None:
    """Where the rule moves no other node, quantizing with it gives the gain that was measured."""
    exact, data = conv_chain(), feeds(SHAPES, 4)
    scheme = qdq.Scheme(rules=(qdq.Rule(tensors="r1", range=(0.0, 0.5)),))
    before = qdq.quantize(exact, data, scheme=scheme)
    report = qdq.compare(exact, before, data, repeats=2, advise=3)
    best = report.advice[0]
    assert "tensors=r'r1'" in best.rule
    assert best.slower is not None
    rule = eval(best.rule, {"Rule": qdq.Rule})
    after = qdq.quantize(exact, data, scheme=qdq.Scheme(rules=(rule,)))
    gain = (
        quick(exact, after, data).outputs[0].sqnr_db - quick(exact, before, data).outputs[0].sqnr_db
    )
    assert best.gain_db == pytest.approx(gain, abs=1.5)
    assert gain > 3


@pytest.mark.parametrize("dtype", [qdq.INT8, qdq.UINT8], ids=str)
def test_advice_counts_no_node_that_is_float_anyway(dtype) -> None:
    """Tanh and Add read codes, and the result of the Add becomes codes."""
    net = Net().linear("x", "a").op("Tanh", "a", "t").linear("a", "b").op("Add", "t b", "m")
    exact = net.linear("m", "y").model()
    data = samples(exact, 4)
    rules = (qdq.Rule(op_types=("Tanh", "Add"), keep_float=True),)
    scheme = qdq.Scheme(activation=qdq.QuantSpec(dtype=dtype), rules=rules)
    made = quantize_run(exact, data, target=FORCED, scheme=scheme).model
    told = {a.what for a in qdq.compare(exact, made, data, repeats=0, advise=8).advice}
    wanted = {"x": "1 node", "a": "2 nodes", "b": "1 node", "y": "1 node"}  # m: as y
    assert told == {f"leave tensor {t} float ({n})" for t, n in wanted.items()}


def test_initializers_that_nothing_reads_do_no_harm(chain) -> None:
    exact, quantized, data = chain
    made = onnx.ModelProto()
    made.CopyFrom(exact)
    made.graph.initializer.append(numpy_helper.from_array(np.zeros(4096, np.float32), "idle"))
    assert quick(made, quantized, data).outputs == quick(exact, quantized, data).outputs


def test_a_reader_may_use_its_buffer_again(chain) -> None:
    """Advice is measured on samples that are kept, after all of them have been read."""
    exact, quantized, data = chain

    def one_array():
        buffer = np.empty_like(data[0]["x"])
        for feed in data:
            buffer[:] = feed["x"]
            yield {"x": buffer}

    own, other = (
        qdq.compare(exact, quantized, d, repeats=0, advise=2).advice for d in (data, one_array())
    )
    assert own == other
    assert own


# -- faults ---------------------------------------------------------------------------------------


def test_models_that_do_not_belong_together(chain) -> None:
    exact, quantized, data = chain
    with pytest.raises(qdq.ModelError, match="no QuantizeLinear"):
        quick(exact, exact, data)
    with pytest.raises(qdq.ModelError, match="already quantized"):
        quick(quantized, exact, data)
    with pytest.raises(qdq.ModelError, match="two forms of one model"):
        quick(model([node("Relu", ["q"], "y")], {"q": [4]}, {"y": [4]}), quantized, data)
    other = onnx.ModelProto.FromString(quantized.SerializeToString())
    name = other.graph.output[0].name
    other.graph.node.append(node("Identity", [name], "other"))
    other.graph.output[0].name = "other"
    with pytest.raises(qdq.ModelError, match=rf"has the outputs \['other'\], .* \['{name}'\]"):
        quick(exact, other, data)


def test_the_quantized_model_may_have_more_outputs(chain) -> None:
    exact, quantized, data = chain
    other = onnx.ModelProto.FromString(quantized.SerializeToString())
    more = other.graph.output.add()
    more.CopyFrom(other.graph.output[0])
    other.graph.node.append(node("Identity", [more.name], "more"))
    more.name = "more"
    assert quick(exact, other, data).outputs == quick(exact, quantized, data).outputs


def test_options_and_data(chain) -> None:
    exact, quantized, data = chain
    with pytest.raises(qdq.ConfigError, match="samples=0"):
        quick(exact, quantized, data, samples=0)
    for options in (
        {"samples": 2.5},
        {"samples": "2"},
        {"samples": True},
        {"repeats": -1},
        {"threads": 0},
        {"threads": "2"},
        {"advise": None},
    ):
        ((option, value),) = options.items()
        with pytest.raises(qdq.ConfigError, match=rf"{option}={value!r} \(.*whole number, \d or"):
            quick(exact, quantized, data, **options)
    assert quick(exact, quantized, data, samples=np.int64(2)).samples == 2
    with pytest.raises(qdq.CalibrationError, match="no sample"):
        quick(exact, quantized, [])


def test_neither_model_is_changed(chain) -> None:
    exact, quantized, data = chain
    before = exact.SerializeToString(), quantized.SerializeToString()
    qdq.compare(exact, quantized, data, repeats=0, advise=2)
    assert (exact.SerializeToString(), quantized.SerializeToString()) == before


def test_decibels() -> None:
    assert decibels(100, 1) == pytest.approx(20)
    assert decibels(0, 0) == math.inf
    assert decibels(0, 1) == -math.inf


def test_masks_do_not_spoil_the_sums() -> None:
    x = np.array([1, -np.inf, np.nan, 2], np.float32)
    assert sum_of_squares(x) == 5
    assert sum_of_squares(x, np.zeros(4, np.float32)) == 5
    assert sum_of_squares(x, np.float32([1, -np.inf, np.nan, 1])) == 1
    assert sum_of_squares(x, np.float32([1, 0, 0, np.nan])) == math.inf
    assert sum_of_squares(x, np.float32([np.inf, 0, 0, 2])) == math.inf


def test_outputs_that_are_no_numbers_any_more(chain) -> None:
    exact, quantized, data = chain
    broken = onnx.ModelProto()
    broken.CopyFrom(quantized)
    (last,) = [n for n in broken.graph.node if "r2" in n.output]
    last.output[:] = ["before"]
    broken.graph.node.append(node("Div", ["before", "nothing"], "r2"))
    broken.graph.initializer.append(numpy_helper.from_array(np.float32(0), "nothing"))
    report = quick(exact, broken, data)
    (output,) = report.outputs
    assert (output.sqnr_db, output.largest) == (-math.inf, math.inf)
    assert "output   r2: -inf" in str(report)
    assert "-inf" in report.html()


def test_outputs_that_are_no_floats_are_noted() -> None:
    nodes = [node("Conv", ["x", "w"], "c", pads=[1] * 4), node("ArgMax", ["c"], "y", axis=1)]
    net = model(nodes, SHAPES, {"y": [1, 1, 24, 24]}, {"w": weights(8, 32, 3, 3)})
    net.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    data = feeds(SHAPES, 2)
    report = qdq.compare(net, qdq.quantize(net, data, target=FORCED), data, repeats=0)
    assert report.outputs == report.advice == ()
    assert any("1 outputs are not compared ('y')" in note for note in report.notes)
