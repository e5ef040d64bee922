"""Masked scores: where a Softmax may cut them off, and that it does."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from harness import Outcome, compare
from hypothesis import given
from hypothesis import strategies as st
from models import feeds, model, node, weights
from numpy.typing import NDArray
from onnx import numpy_helper

import qdq
from qdq import MinMax
from qdq.api import Result, collect_statistics, run
from qdq.forms import tuned
from qdq.graph import Graph
from qdq.placement import gains
from qdq.placement.masked import watch
from qdq.placement.scores import DENORMAL, floors_of
from qdq.prepare import prepare
from qdq.statistics import Statistics
from qdq.statistics.few import FewSamples
from qdq.statistics.observe import observe
from qdq.targets import ORT_CPU, PORTABLE

HEADS, TOKENS, WIDTH = 2, 48, 64
SHAPES = {"x": (1, HEADS, TOKENS, WIDTH), "m": (1, 1, 1, TOKENS)}


def attention(
    mask: float = -1e4, axis: int = -1, *, fixed: bool = False, guarded: bool = False
) -> onnx.ModelProto:
    """Scores of queries and keys, a mask, weights, values.

    ``fixed``: what is masked is a constant; ``guarded``: rows of NaN become rows of 0.
    """
    constants = {
        "wq": weights(WIDTH, WIDTH, seed=1),
        "wk": weights(WIDTH, WIDTH, seed=2),
        "wv": weights(WIDTH, 4 * WIDTH, seed=3),
        "eighth": np.float32(0.125),
        "zero": np.float32(0),
        "masked": np.float32(mask),
        "wo": weights(4 * WIDTH, 4 * WIDTH, seed=4),
    }
    nodes = [
        node("MatMul", ["x", "wq"], "q"),
        node("MatMul", ["x", "wk"], "k"),
        node("MatMul", ["x", "wv"], "v"),
        node("Transpose", ["k"], "turned", perm=[0, 1, 3, 2]),
        node("MatMul", ["q", "turned"], "raw"),
        node("Mul", ["raw", "eighth"], "scores"),
        node("Where", ["m", "masked", "zero"], "mask"),
        node("Add", ["scores", "mask"], "s"),
        node("Softmax", ["s"], "p", axis=axis),
        node("MatMul", ["p", "v"], "seen"),
        node("MatMul", ["seen", "wo"], "y"),
    ]
    shapes = {name: list(shape) for name, shape in SHAPES.items()}
    if guarded:
        at = [n.output[0] for n in nodes].index("p")
        nodes[at].output[0] = "raw_p"
        nodes[at + 1 : at + 1] = [
            node("IsNaN", ["raw_p"], "lost"),
            node("Where", ["lost", "zero", "raw_p"], "p"),
        ]
    if fixed:
        del shapes["m"]
        constants["m"] = data()[0]["m"]
    net = model(nodes, shapes, {"y": [1, HEADS, TOKENS, 4 * WIDTH]}, constants)
    if not fixed:
        net.graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.BOOL
    return net


def data(hidden: int = 6, seed: int = 3) -> list[dict[str, Any]]:
    """Samples whose last tokens are masked."""
    found = feeds({"x": SHAPES["x"]}, 4, seed=seed)
    for feed in found:
        feed["m"] = np.broadcast_to(np.arange(TOKENS) >= TOKENS - hidden, SHAPES["m"]).copy()
    return found


def default(net: onnx.ModelProto, samples: list[dict[str, Any]]) -> tuple[Result, Outcome]:
    """As users do, by errors and times."""
    result = run(net, samples)
    assert result.plan.quantized
    return result, compare(net, result.model, samples)


def clips(result: Result) -> list[onnx.NodeProto]:
    return [n for n in result.model.graph.node if n.op_type == "Clip"]


def floor_in(result: Result) -> float:
    (clip,) = clips(result)
    assert clip.name == "Softmax_p_Clip"
    assert (clip.input[0], clip.output[0]) == ("s", "s_clipped")
    (value,) = [t for t in result.model.graph.initializer if t.name == clip.input[1]]
    return float(numpy_helper.to_array(value))


@pytest.mark.parametrize("mask", [-100.0, -1e4, np.finfo(np.float32).min, -np.inf])
def test_masked_scores_have_a_floor(mask: float) -> None:
    net = attention(mask)
    result, outcome = default(net, data())
    peaks = np.concatenate([o["s"].max(axis=-1) for o in observe(prepare(net), ["s"], data())])
    assert floor_in(result) == pytest.approx(peaks.max() - 75, abs=1e-3)
    assert outcome.sqnr > 30
    assert outcome.steps_apart <= 1
    # nothing else has changed: neither on the samples nor on others
    bare = onnx.ModelProto.FromString(result.model.SerializeToString())
    for n in bare.graph.node:
        n.input[:] = ["s" if name == "s_clipped" else name for name in n.input]
    for held_out in (data(), data(seed=9)):
        for optimize in (True, False):
            pairs = zip(
                observe(result.model, ["y"], held_out, optimize=optimize),
                observe(bare, ["y"], held_out, optimize=optimize),
                strict=True,
            )
            for a, b in pairs:
                np.testing.assert_allclose(a["y"], b["y"], rtol=1e-5, atol=1e-6)


def test_no_weight_is_denormal_behind_it() -> None:
    """So nothing behind the Softmax has to be cleaned, as it is where it is not measured."""
    net = attention(-100.0, fixed=True)
    samples = [{"x": feed["x"]} for feed in data()]
    result = run(net, samples)
    tiny = np.finfo(np.float32).tiny
    for seen in observe(result.model, ["p"], samples):
        assert seen["p"].min() > tiny
    exact = observe(net, ["p"], samples)
    assert any(((seen["p"] > 0) & (seen["p"] < tiny)).any() for seen in exact)

    def operators(made: onnx.ModelProto) -> set[str]:
        return {n.op_type for n in made.graph.node}

    assert "ThresholdedRelu" not in operators(result.model)
    assert "ThresholdedRelu" in operators(run(net, samples, calibrator=MinMax()).model)


def test_rows_of_nan_that_are_looked_for_stay() -> None:
    net = attention(-np.inf, guarded=True)
    result = run(net, data())
    assert result.plan.quantized
    assert not clips(result)
    lost = data()[:1]
    lost[0]["m"][:] = True
    for optimize in (True, False):
        (seen,) = observe(result.model, ["p"], lost, optimize=optimize)
        assert not seen["p"].any()


@pytest.mark.parametrize(
    "reader", [node("Log", ["y"], "z"), node("Sign", ["y"], "z"), node("ReduceSum", ["t"], "z")]
)
def test_who_can_tell_zero_from_next_to_it_has_none(reader: onnx.NodeProto) -> None:
    """A router counts the experts of weights above 0."""
    shape = [3, 4]
    nodes = [node("Softmax", ["x"], "y", axis=-1), node("Transpose", ["y"], "t", perm=[1, 0])]
    product = node("MatMul", ["t", "x"], "w")
    assert watch(model([*nodes, product], {"x": shape}, {"w": [4, 4]}, {})) is not None
    net = model([*nodes, product, reader], {"x": shape}, {"w": [4, 4], "z": [None, None]}, {})
    assert watch(net) is None


def test_a_plan_without_integer_nodes_has_none() -> None:
    result = run(attention(), data(), worth=1e9)
    assert not result.plan.quantized
    assert not clips(result)


@pytest.mark.parametrize("product", ["Gemm", "MatMul"])
def test_the_product_that_makes_the_scores_stays_integer(product: str) -> None:
    """A Clip right behind its float output would keep it in float."""
    low = weights(512, 512, seed=2)
    low[:, ::5] = -1.0  # these scores are far below the others
    constants = {"w1": weights(512, 512, seed=1), "w2": low}
    nodes = [
        node("MatMul", ["x", "w1"], "a"),
        node("Relu", ["a"], "h"),
        node(product, ["h", "w2"], "s"),
        node("Softmax", ["s"], "y", axis=-1),
    ]
    net = model(nodes, {"x": [64, 512]}, {"y": [64, 512]}, constants)
    result, outcome = default(net, feeds({"x": (64, 512)}, 4))
    assert len(clips(result)) == 1
    assert len(result.plan.linears) == 2
    assert outcome.ops["Gemm"] == outcome.ops["MatMul"] == outcome.ops["FusedGemm"] == 0


def uneven(scale: float) -> list[dict[str, Any]]:
    """Some rows have far larger scores than others."""
    found = data()
    for feed in found:
        feed["x"][:, :, ::3] *= scale
    return found


def empty_rows() -> list[dict[str, Any]]:
    found = data()
    found[0]["m"][:] = True
    return found


@pytest.mark.parametrize(
    ("mask", "samples"),
    [(-1e4, data(hidden=0)), (-20.0, data()), (-1e4, uneven(30.0)), (-1e4, empty_rows())],
    ids=["no mask", "a shallow one", "peaks far apart", "a row without a score"],
)
def test_others_have_none(mask: float, samples: list[dict[str, Any]]) -> None:
    result, outcome = default(attention(mask), samples)
    assert not clips(result)
    assert outcome.sqnr > 25


def test_only_the_last_axis_has_rows() -> None:
    def watched(shape: list[int], axis: int) -> bool:
        nodes = [node("Softmax", ["x"], "y", axis=axis)]
        return watch(model(nodes, {"x": shape}, {"y": shape}, {})) is not None

    assert [axis for axis in (-2, -1, 0, 1, 2) if watched([2, 3, 4], axis)] == [-1, 2]
    assert not watched([5], 0)

    plain = model([node("Softmax", ["x"], "y")], {"x": [2, 3, 4]}, {"y": [2, 3, 4]}, {})
    assert watch(plain) is not None
    plain.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    assert watch(plain) is None
    nodes = [node("Softmax", ["x"], "y"), node("Softmax", ["z"], "w")]
    shape = [2, 3]
    both = watch(model(nodes, {"x": shape, "z": shape}, {"y": shape, "w": shape}, {}))
    assert both is not None
    assert both.names == ("Softmax_y",) * 3 + ("Softmax_w",) * 3


def test_measured_as_numpy_does() -> None:
    net, samples = prepare(attention()), data()
    found = collect_statistics(attention(), samples).peaks
    assert found.names == ("Softmax_p",) * 3
    scores = [o["s"] for o in observe(net, ["s"], samples)]
    wanted = [
        (
            peaks.min(),
            peaks.max(),
            np.mean(s < s.max(axis=-1, keepdims=True) - np.float32(DENORMAL)),
        )
        for s, peaks in ((s, s.max(axis=-1)) for s in scores)
    ]
    np.testing.assert_allclose(sorted(found.rows.values(), key=tuple), sorted(wanted), rtol=1e-5)


def test_nothing_has_no_peak() -> None:
    """A batch of none runs, and counts for nothing."""
    nodes = [node("MatMul", ["x", "w"], "s"), node("Softmax", ["s"], "y", axis=-1)]
    net = model(nodes, {"x": ["n", 8]}, {"y": ["n", 8]}, {"w": weights(8, 8)})
    found = watch(prepare(net))
    assert found is not None
    extended = onnx.ModelProto.FromString(prepare(net).SerializeToString())
    extended.graph.node.extend(found.added.node)
    extended.graph.initializer.extend(found.added.initializer)
    (seen,) = observe(extended, [found.output], [{"x": np.zeros((0, 8), np.float32)}])
    assert seen[found.output].tolist() == [np.inf, -np.inf, 0.0]
    row = {"00": seen[found.output], "01": np.array([1.0, 2.0, 0.5], np.float32)}
    assert floors_of(FewSamples(names=found.names, rows=row)) == {"Softmax_y": 2.0 - 75.0}


def test_statistics_carry_it(tmp_path: Path) -> None:
    samples = data()
    made = qdq.quantize(attention(), samples)
    collect_statistics(attention(), samples).save(tmp_path / "found.npz")
    loaded = Statistics.load(tmp_path / "found.npz")
    assert loaded.peaks.names
    later = qdq.quantize(attention(), statistics=loaded)
    assert later.SerializeToString(deterministic=True) == made.SerializeToString(deterministic=True)


def test_who_does_not_measure_or_tune_has_none() -> None:
    assert not clips(run(attention(), data(), calibrator=MinMax()))
    assert not clips(run(attention(), data(), target=PORTABLE))
    untuned = replace(ORT_CPU, tunes_float=False)
    assert not clips(run(attention(), data(), target=untuned))


ROWS = st.lists(
    st.tuples(st.floats(-60, 60, width=32), st.integers(0, 2**31)), min_size=1, max_size=6
)


@given(ROWS, st.sampled_from([-1e4, -100.0, -np.inf]))
def test_a_floor_changes_no_softmax(rows: list[tuple[float, int]], mask: float) -> None:
    """Of rows with these peaks; the weights of what is masked are below any rounding."""

    def scores(peak: float, seed: int) -> NDArray[np.float64]:
        row = peak - np.abs(np.random.default_rng(seed).normal(size=16)) * 10
        row[0], row[8:] = peak, row[8:] + mask
        return row

    s = np.array([scores(*row) for row in rows])
    peaks = s.max(axis=1, keepdims=True)
    three = np.array([peaks.min(), peaks.max(), np.mean(s < peaks - DENORMAL)], np.float32)
    floors = floors_of(FewSamples(names=("n",) * 3, rows={"00": three}))
    if np.ptp(peaks) > 45.01:
        assert not floors
    elif np.ptp(peaks) < 44.99 and three[2] > 0.02:
        raised = np.maximum(s, floors["n"])
        assert np.ptp(raised, axis=1).max() < DENORMAL
        np.testing.assert_allclose(softmax(raised), softmax(s), rtol=1e-11, atol=1e-11)


def softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def test_parts_merge_to_the_whole() -> None:
    """The mask is in the second half only."""
    samples = [*data(hidden=0)[:2], *data(seed=5)[:2]]
    parts = [collect_statistics(attention(), samples[k : k + 2]) for k in (0, 2)]
    whole = collect_statistics(attention(), samples)
    assert whole.peaks.rows
    for a, b in (parts, parts[::-1]):
        assert a.merge(b, qdq.MSE()).peaks == whole.peaks
    assert list(floors_of(whole.peaks)) == ["Softmax_p"]
    assert not floors_of(parts[0].peaks)
    assert whole != replace(whole, peaks=FewSamples())


@pytest.mark.parametrize("broken", ["watch", "adjoint"])
def test_one_measurement_does_without_the_other(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(gains, broken)

    def breaks(*given: Any) -> Any:
        found = real(*given)
        found.added.node[-1].input[0] = "nothing"
        return found

    monkeypatch.setattr(gains, broken, breaks)
    found = collect_statistics(attention(), data())
    assert bool(found.peaks.rows) == (broken == "adjoint")
    assert bool(found.gradients.rows) == (broken == "watch")


def test_a_float_softmax_has_it_and_an_integer_one_not() -> None:
    graph = Graph(prepare(attention(-100.0, fixed=True)))
    floors = {"Softmax_p": -60.0}
    assert tuned(graph, set(), set(), floors).floors == floors
    assert not tuned(graph, set(), {"Softmax_p"}, floors).floors
    assert list(tuned(graph, set(), set(), {}).followed) == ["Softmax_p"]


@pytest.mark.parametrize("share", [0.0, 0.019, 0.021, 0.5])
def test_few_masked_scores_are_left(share: float) -> None:
    """The most that one sample has counts."""
    rows = {"00": np.zeros(3, np.float32), "01": np.array([0, 1, share], np.float32)}
    assert bool(floors_of(FewSamples(names=("n",) * 3, rows=rows))) == (share > 0.02)


def test_the_outcome_is_that_of_the_samples_together() -> None:
    """Each sample may have other peaks; a share of masked scores in one of them is enough."""
    three = {"00": [0.0, 5.0, 0.0], "01": [-3.0, 12.0, 0.2], "02": [1.0, 2.0, 0.0]}
    rows = {digest: np.array(row, np.float32) for digest, row in three.items()}
    assert floors_of(FewSamples(names=("n",) * 3, rows=rows)) == {"n": 12.0 - 75.0}
    rows["03"] = np.array([-40.0, 1.0, 0.2], np.float32)
    assert floors_of(FewSamples(names=("n",) * 3, rows=rows)) == {}
    assert floors_of(FewSamples()) == {}
