"""Masked scores: where a Softmax may cut them off, and that it does."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from harness import FORCED, Outcome, compare
from hypothesis import given
from hypothesis import strategies as st
from models import feeds, model, node, weights
from numpy.typing import NDArray
from onnx import numpy_helper

import qdq
from qdq import Entropy, MinMax, Percentile
from qdq.api import Result, collect_statistics, run
from qdq.calibrate.peaks import DENORMAL, Peaks
from qdq.forms import tuned
from qdq.graph import Graph
from qdq.placement.masked import weighing_scores
from qdq.placement.scores import floors_of
from qdq.prepare import prepare
from qdq.statistics import Statistics
from qdq.statistics.observe import Readout, observe
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
    apart = [{"x": feed["x"]} for feed in uneven(30.0)]
    assert "ThresholdedRelu" in operators(run(net, apart).model)


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
    bare = model([*nodes, product], {"x": shape}, {"w": [4, 4]}, {})
    assert weighing_scores(bare) == {"Softmax_y": "x"}
    net = model([*nodes, product, reader], {"x": shape}, {"w": [4, 4], "z": [None, None]}, {})
    assert not weighing_scores(net)


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


def test_it_stays_so_where_transposes_between_are_moved_away() -> None:
    low = weights(128, 512, seed=2)
    low[:, ::5] = -2.0
    constants = {
        "w1": weights(512, 512, seed=1),
        "heads": np.array([1, 256, 4, 128]),
        "w2": low,
        "flat": np.array([1, 256, 2048]),
    }
    nodes = [
        node("MatMul", ["x", "w1"], "a"),
        node("Relu", ["a"], "h"),
        node("Reshape", ["h", "heads"], "h4"),
        node("MatMul", ["h4", "w2"], "s0"),
        node("Transpose", ["s0"], "s", perm=[0, 2, 1, 3]),
        node("Softmax", ["s"], "p", axis=-1),
        node("Transpose", ["p"], "p1", perm=[0, 2, 1, 3]),
        node("Reshape", ["p1", "flat"], "y"),
    ]
    net = model(nodes, {"x": [1, 256, 512]}, {"y": [1, 256, 2048]}, constants)
    result, outcome = default(net, feeds({"x": (1, 256, 512)}, 4))
    assert len(clips(result)) == 1
    assert outcome.ops["MatMul"] == outcome.ops["FusedMatMul"] == outcome.ops["Transpose"] == 0


@pytest.mark.parametrize("also_float", [(), ("Transpose_t",)])
def test_codes_in_front_of_it_are_left_alone(also_float: tuple[str, ...]) -> None:
    """Where what is between moves codes, there is a DQ in front of the Clip."""
    low = weights(64, 64, seed=2)
    low[:, ::5] = -8.0
    nodes = [
        node("MatMul", ["x", "w1"], "a"),
        node("Relu", ["a"], "h"),
        node("MatMul", ["h", "w2"], "s0"),
        node("Transpose", ["s0"], "t", perm=[0, 2, 1, 3]),
        node("Transpose", ["t"], "s", perm=[1, 0, 2, 3]),
        node("Softmax", ["s"], "y", axis=-1),
    ]
    constants = {"w1": weights(64, 64, seed=1), "w2": low}
    net = model(nodes, {"x": [1, 16, 4, 64]}, {"y": [4, 1, 16, 64]}, constants)
    samples = feeds({"x": (1, 16, 4, 64)}, 4)
    rules = [qdq.Rule(nodes=name, keep_float=True) for name in ("Softmax_y", *also_float)]
    scheme = qdq.Scheme(rules=tuple(rules))
    result = run(net, samples, target=FORCED, scheme=scheme)
    assert "Transpose_s" in result.plan.quantized
    assert len(clips(result)) == 1
    assert "LeakyRelu" not in {n.op_type for n in result.model.graph.node}
    ops = compare(net, result.model, samples).ops
    assert (ops["QLinearMatMul"], ops["MatMulIntegerToFloat"], ops["MatMul"]) == (2, 0, 0)


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
    def found(shape: list[int], axis: int) -> bool:
        nodes = [node("Softmax", ["x"], "y", axis=axis)]
        return bool(weighing_scores(model(nodes, {"x": shape}, {"y": shape}, {})))

    assert [axis for axis in (-2, -1, 0, 1, 2) if found([2, 3, 4], axis)] == [-1, 2]
    assert not found([5], 0)

    plain = model([node("Softmax", ["x"], "y")], {"x": [2, 3, 4]}, {"y": [2, 3, 4]}, {})
    assert weighing_scores(plain)
    plain.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    assert not weighing_scores(plain)
    nodes = [node("Softmax", ["x"], "y"), node("Softmax", ["z"], "w")]
    shape = [2, 3]
    both = model(nodes, {"x": shape, "z": shape}, {"y": shape, "w": shape}, {})
    assert weighing_scores(both) == {"Softmax_y": "x", "Softmax_w": "z"}


def peaks_of(*scores: NDArray[np.floating]) -> Peaks:
    """What numpy finds in arrays of some samples."""
    tops = [s.max(axis=-1) for s in scores]
    deep = [np.mean(s.min(axis=-1) < s.max(axis=-1) - np.float32(DENORMAL)) for s in scores]
    ends = min(t.min() for t in tops), max(t.max() for t in tops), max(deep)
    return Peaks(names=("s",), numbers=np.array(ends, np.float32)[:, None])


@pytest.mark.parametrize("calibrator", [qdq.MSE(), MinMax()], ids=["mse", "minmax"])
def test_measured_as_numpy_does(calibrator: Any) -> None:
    """Over all samples, of which only one has a mask, and another one a mask everywhere."""
    samples = [*data(hidden=0), *data(hidden=0, seed=8), *data()[:1], *empty_rows()[:1]]
    found = collect_statistics(attention(), samples, calibrator=calibrator).peaks
    wanted = peaks_of(*(o["s"] for o in observe(prepare(attention()), ["s"], samples)))
    assert wanted.numbers[0, 0] < -9000
    assert found.names == ("s",)
    np.testing.assert_allclose(found.numbers, wanted.numbers, rtol=1e-5)


def test_nothing_has_no_peak() -> None:
    """A batch of none runs, and counts for nothing."""
    nodes = [node("MatMul", ["x", "w"], "s"), node("Softmax", ["s"], "y", axis=-1)]
    net = model(nodes, {"x": ["n", 8]}, {"y": ["n", 8]}, {"w": weights(8, 8)})
    readout = Readout(prepare(net), {}, counted=frozenset(), peaked=["s"])
    none = readout.run({"x": np.zeros((0, 8), np.float32)}).peaks
    assert none.numbers[:, 0].tolist() == [np.inf, -np.inf, 0.0]
    some = Peaks(names=("s",), numbers=np.array([[1.0], [2.0], [0.5]], np.float32))
    assert none.merge(some) == some
    assert not floors_of(none, {"n": "s"})


def test_below_the_opset_of_gauges_there_are_none() -> None:
    net = model([node("Softmax", ["x"], "y")], {"x": [4, 8]}, {"y": [4, 8]}, {}, opset=17)
    readout = Readout(net, {"y": None}, counted=frozenset(), peaked=["x"])
    seen = readout.run({"x": np.ones((4, 8), np.float32)})
    assert seen.peaks == Peaks()
    assert seen.readings["y"].low == 0.125


def test_statistics_carry_it(tmp_path: Path) -> None:
    samples = data()
    made = qdq.quantize(attention(), samples)
    collect_statistics(attention(), samples).save(tmp_path / "found.npz")
    loaded = Statistics.load(tmp_path / "found.npz")
    assert loaded.peaks.names == ("s",)
    later = qdq.quantize(attention(), statistics=loaded)
    assert later.SerializeToString(deterministic=True) == made.SerializeToString(deterministic=True)


@pytest.mark.parametrize("calibrator", [MinMax(), Entropy(), Percentile()], ids=repr)
def test_all_calibrators_look_for_masks(calibrator: Any) -> None:
    result = run(attention(), data(), calibrator=calibrator)
    assert len(clips(result)) == 1
    assert compare(attention(), result.model, data()).sqnr > 25


def test_who_does_not_tune_has_none() -> None:
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
    peaks = s.max(axis=1)
    floors = floors_of(peaks_of(s), {"n": "s"})
    if np.ptp(peaks) > 45.01:
        assert not floors
    elif np.ptp(peaks) < 44.99:
        assert s.min() < peaks.min() - DENORMAL
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
    for a, b in (parts, parts[::-1]):
        assert a.merge(b, qdq.MSE()).peaks == whole.peaks
    of = {"Softmax_p": "s"}
    assert list(floors_of(whole.peaks, of)) == ["Softmax_p"]
    assert not floors_of(parts[0].peaks, of)
    assert whole != replace(whole, peaks=Peaks())
    with pytest.raises(qdq.ConfigError, match=r"their scores differs: \('s',\) and \(\)"):
        whole.merge(replace(whole, peaks=Peaks()), qdq.MSE())


def test_a_sample_that_alone_has_rows_without_a_score_counts() -> None:
    """Such rows have other weights behind a floor: it may be any sample that has them."""
    for at in range(12):
        samples = [*data(), *data(seed=5), *data(seed=6)]
        samples[at]["m"][:] = True
        assert not clips(run(attention(), samples))


def test_a_float_softmax_has_it_and_an_integer_one_not() -> None:
    graph = Graph(prepare(attention(-100.0, fixed=True)))
    floors = {"Softmax_p": -60.0}
    assert tuned(graph, set(), set(), floors).floors == floors
    assert not tuned(graph, set(), {"Softmax_p"}, floors).floors
    assert list(tuned(graph, set(), set(), {}).followed) == ["Softmax_p"]


def seen(*numbers: tuple[float, float, float]) -> Peaks:
    """Peaks of one tensor each: those of the samples of one that merge."""
    first, *others = (Peaks(names=("s",), numbers=np.array([n], np.float32).T) for n in numbers)
    for other in others:
        first = first.merge(other)
    return first


def test_peaks_are_equal_where_their_names_and_numbers_are() -> None:
    """NaN, of scores that have one, is itself."""
    numbers = np.array([[np.nan, 1.0], [2.0, np.inf], [0.0, 0.5]], np.float32)
    peaks = Peaks(names=("s", "t"), numbers=numbers)
    assert peaks == Peaks(names=("s", "t"), numbers=numbers.copy())
    assert peaks != Peaks(names=("s", "u"), numbers=numbers)
    assert peaks != Peaks(names=("s", "t"), numbers=np.nan_to_num(numbers))
    assert peaks != Peaks(names=("s",), numbers=numbers[:, :1])
    assert peaks != "peaks"


@pytest.mark.parametrize("share", [0.0, 0.049, 0.051, 0.5])
def test_few_masked_scores_are_left(share: float) -> None:
    """The most that one sample has counts."""
    found = floors_of(seen((0, 0, 0), (0, 1, share)), {"n": "s", "other": "t"})
    assert found == ({"n": 1.0 - 75.0} if share > 0.05 else {})


def test_the_outcome_is_that_of_the_samples_together() -> None:
    """Each sample may have other peaks; a share of masked scores in one of them is enough."""
    three = [(0.0, 5.0, 0.0), (-3.0, 12.0, 0.2), (1.0, 2.0, 0.0)]
    assert floors_of(seen(*three), {"n": "s"}) == {"n": 12.0 - 75.0}
    for other in [(-40.0, 1.0, 0.2), (-np.inf, 0.0, 0.2), (np.nan, np.nan, 0.0)]:
        assert not floors_of(seen(*three, other), {"n": "s"})
        assert not floors_of(seen(other, *three), {"n": "s"})
    assert floors_of(Peaks(), {"n": "s"}) == {}
