"""Sensitivity: laws of the measurement, and what placement makes of it."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import conv_chain, model, node, residual, weights

from qdq.api import make_problem
from qdq.calibrate import MinMax, calibrate
from qdq.errors import CalibrationError, ConfigError
from qdq.graph import Graph
from qdq.placement.frontier import best_value, choose, fastest_plan, frontier, meets, moved
from qdq.placement.harm import Sensitivity, decibels, read, relative_error
from qdq.placement.probing import logits_of, probe_model
from qdq.placement.sensitivity import Meter, keep_few, measure, rounded_by
from qdq.placement.weighing import Weighing
from qdq.plan import Plan, make_plan
from qdq.prepare import prepare
from qdq.ranges import TensorRange
from qdq.scheme import Rule, Scheme
from qdq.session import open_session
from qdq.solve import Solution, solve
from qdq.spec import QuantParams
from qdq.statistics.observe import observe
from qdq.steps import DEFAULT_STEPS
from qdq.targets import ORT_CPU, PORTABLE

WIDE = replace(ORT_CPU, weighs_costs=False)
SIZE = 24


def samples(count: int, channels: int) -> list[dict[str, np.ndarray]]:
    r = np.random.default_rng(11)
    shape = (1, channels, SIZE, SIZE)
    return [{"x": r.standard_normal(shape).astype(np.float32)} for _ in range(count)]


def solved(net: onnx.ModelProto, plan: Plan, data: list[dict[str, np.ndarray]]) -> Solution:
    ranges = calibrate(observe(net, list(plan.observed), data), plan.observed, MinMax())
    return solve(make_problem(net, plan, ranges), DEFAULT_STEPS)


def with_two_ends() -> onnx.ModelProto:
    """A trunk that matters little next to its skip, and a branch that no output depends on."""
    nodes = [
        node("Conv", ["x", "w0"], "a", pads=[1] * 4),
        node("Relu", ["a"], "ar"),
        node("Conv", ["ar", "w1"], "b", pads=[1] * 4),
        node("Mul", ["b", "nothing"], "dead"),
        node("Conv", ["ar", "w2"], "c", pads=[1] * 4),
        node("Add", ["c", "dead"], "y"),
    ]
    constants = {f"w{k}": weights(32, 32, 3, 3, seed=k) for k in range(3)}
    constants["nothing"] = np.zeros((1, 32, SIZE, SIZE), np.float32)
    shape = [1, 32, SIZE, SIZE]
    return model(nodes, {"x": shape}, {"y": shape}, constants)


# -- how an error is weighed ------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
def test_relative_error_is_scale_free_and_bounded(seed: int, factor: float) -> None:
    r = np.random.default_rng(seed)
    x, e = r.standard_normal((2, 1, 3, 5))
    found = relative_error(x, x + 0.1 * e)
    assert 0 <= found <= 1
    assert relative_error(factor * x, factor * (x + 0.1 * e)) == pytest.approx(found)
    assert relative_error(x, x) == 0


def test_a_small_channel_counts_as_much_as_a_large_one() -> None:
    x = np.array([[[300.0, 200.0], [0.5, 0.1]]])
    lost = np.array([[[300.0, 200.0], [0.0, 0.0]]])
    assert relative_error(x, lost) == pytest.approx(0.5)
    # as one channel nobody would see it
    assert relative_error(x.reshape(1, 4), lost.reshape(1, 4)) < 1e-5


def test_what_cannot_be_compared_is_lost() -> None:
    x = np.ones((1, 4))
    assert relative_error(x, np.ones((1, 3))) == 1
    assert relative_error(x, np.array([[np.inf, 1, 1, 1]])) == 1
    assert relative_error(np.zeros((1, 4)), x) == 1
    assert relative_error(np.zeros((1, 4)), np.zeros((1, 4))) == 0
    # what the float model itself does not know is left out
    assert relative_error(np.array([[np.nan, 1.0]]), np.array([[3.0, 1.0]])) == 0


def test_logits_count_around_their_mean() -> None:
    z = np.array([[1.0, -1.0, 2.0]])
    for offset in (0.0, 1e4):
        a = read({"y": z, "z": z + offset}, {"y": z, "z": z + offset + 0.1}, ["y"], ["z"])
        middle = z - z.mean()
        assert a.harm == pytest.approx(0.5 * 0.03 / (middle**2).sum(), rel=1e-3)


def test_decibels_are_those_of_the_worst_output() -> None:
    x = {"a": np.ones(100), "b": np.ones(100)}
    y = {"a": np.full(100, 1.1), "b": np.full(100, 1.01)}
    assert decibels([read(x, y, ["a", "b"], [])]) == pytest.approx(20, abs=1e-6)
    assert decibels([read(x, x, ["a", "b"], [])]) == math.inf


# -- the record -------------------------------------------------------------------------------


def test_record_merges_ranks_and_prints() -> None:
    a = Sensitivity(tensors={"t": 0.2, "u": 0.1}, weights={"n": 0.4}, together=0.6, samples=1)
    b = Sensitivity(tensors={"t": 0.5}, weights={"n": 0.1}, together=0.3, samples=2)
    both = a.merge(b)
    assert both.tensors == pytest.approx({"t": 0.4, "u": 0.1})
    assert both.weights == pytest.approx({"n": 0.2})
    assert (both.together, both.samples) == (pytest.approx(0.4), 3)
    assert both.total == pytest.approx(0.7)
    assert both.of(["t", "unknown"], ["n"]) == pytest.approx(0.6)
    assert [row[1] for row in a.ranked()] == ["n", "t", "u"]
    assert str(a).splitlines()[0].split() == ["0.4", "weight", "of", "n"]


# -- the model with switches ------------------------------------------------------------------


def test_switched_off_it_is_the_float_model_exactly() -> None:
    net = prepare(with_two_ends())
    plan, data = make_plan(net, target=WIDE), samples(1, 32)
    params = solved(net, plan, data).params
    names = {t: params[t] for t in rounded_by(plan)[0]}
    assert {"x", "ar", "y"} <= set(names)  # an input, an inner tensor, an output
    probe = probe_model(net, names, ["w1"])
    off = dict.fromkeys(probe.switches.values(), np.array(False))
    feed = {**data[0], "w1": Graph(net).array("w1")}
    found = open_session(probe.model, optimize=False).run({**feed, **off})
    wanted = open_session(net, optimize=False).run(data[0])
    assert np.array_equal(found["y"], wanted["y"])
    on = dict.fromkeys(probe.switches.values(), np.array(True))
    assert not np.array_equal(open_session(probe.model).run({**feed, **on})["y"], wanted["y"])


def test_logits_of_a_softmax_in_parts() -> None:
    net = model([node("Softmax", ["x"], "y", axis=1)], {"x": [1, 4, 64]}, {"y": [1, 4, 64]})
    assert logits_of(Graph(net)) == ("x",)
    parts = prepare(net)
    assert "Softmax" not in {n.op_type for n in parts.graph.node}
    assert logits_of(Graph(parts)) == ("x",)


def test_logits_behind_movement_and_concat() -> None:
    nodes = [
        node("Conv", ["x", "w"], "c"),
        node("Split", ["c"], ["box", "cls"], axis=1, num_outputs=2),
        node("Sigmoid", ["cls"], "p"),
        node("Concat", ["box", "p"], "both", axis=1),
        node("Flatten", ["both"], "y"),
    ]
    net = prepare(model(nodes, {"x": [1, 4, 3, 3]}, {"y": [1, 36]}, {"w": weights(4, 4, 1, 1)}))
    assert logits_of(Graph(net)) == ("cls",)


# -- the measurement --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ends() -> tuple[onnx.ModelProto, Plan, Solution, list[dict[str, np.ndarray]]]:
    net = prepare(with_two_ends())
    plan, data = make_plan(net, target=WIDE), samples(2, 32)
    return net, plan, solved(net, plan, data), data


def test_what_no_output_depends_on_does_no_harm(ends) -> None:
    found = measure(*ends)
    assert found.tensors["b"] == 0
    assert found.weights["Conv_b"] == 0
    assert min(found.tensors["ar"], found.tensors["y"], found.weights["Conv_c"]) > 0


def test_same_data_same_numbers(ends) -> None:
    assert measure(*ends) == measure(*ends)


def test_harms_add_up() -> None:
    net = prepare(conv_chain())
    plan, data = make_plan(net, target=WIDE), samples(2, 32)
    found = measure(net, plan, solved(net, plan, data), data)
    assert len(found.tensors) + len(found.weights) == 7
    assert found.total == pytest.approx(found.together, rel=0.1)


def test_twice_the_scale_four_times_the_harm(ends) -> None:
    net, plan, solution, data = ends
    p = solution.params["ar"]
    assert p.zero_point == 0  # behind a Relu: a greater scale saturates nothing
    coarse = QuantParams(p.spec, np.float32(2) * p.scale, p.zero_point)
    wide = replace(solution, params={**solution.params, "ar": coarse})
    once, twice = (measure(net, plan, s, data).tensors["ar"] for s in (solution, wide))
    assert twice / once == pytest.approx(4, rel=0.1)


def test_the_kept_samples_do_not_depend_on_the_order() -> None:
    data = samples(6, 1)
    found = []
    for order in (data, data[::-1], [*data, *data]):
        kept: dict[bytes, dict[str, np.ndarray]] = {}
        assert [id(f) for f in keep_few(order, kept, 3)] == [id(f) for f in order]
        found.append([f["x"] for f in kept.values()])
        assert len(kept) == 3
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_no_samples_and_no_floats_are_errors(ends) -> None:
    net, plan, solution, _ = ends
    with pytest.raises(CalibrationError, match="no samples"):
        measure(net, plan, solution, [])
    nodes = [node("Conv", ["x", "w"], "c"), node("ArgMax", ["c"], "y", axis=1)]
    whole = onnx.TensorProto.INT64
    net = model(nodes, {"x": [1, 32, SIZE, SIZE]}, {"y": [1, 1, SIZE, SIZE]},
                {"w": weights(32, 32, 1, 1)})  # fmt: skip
    net.graph.output[0].type.tensor_type.elem_type = whole
    net = prepare(net)
    plan = make_plan(net, target=WIDE)
    with pytest.raises(ConfigError, match="no output of floating-point"):
        measure(net, plan, solved(net, plan, samples(1, 32)), samples(1, 32))


# -- placement --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def choice():
    net = prepare(residual(channels=64))
    data = samples(2, 64)

    def plan_for(weighing: Weighing) -> Plan:
        return make_plan(net, weighing=weighing)

    plan = fastest_plan(plan_for)
    solution = solved(net, plan, data)
    found = measure(net, plan, solution, data)
    return plan_for, frontier(plan_for, found), Meter(net, plan, solution), data


def test_a_price_without_harm_changes_nothing() -> None:
    net = prepare(residual(channels=64))
    assert make_plan(net) == make_plan(net, weighing=Weighing(price=1e9))


def test_candidates_are_nested_slower_and_better(choice) -> None:
    candidates = choice[1]
    assert len(candidates) > 2
    for a, b in pairwise(candidates):
        assert a.plan.placement.integer > b.plan.placement.integer
        assert a.time < b.time
        assert a.harm > b.harm
    assert not candidates[-1].plan.quantized


def test_each_candidate_needs_no_more_than_was_observed(choice) -> None:
    plan_for, candidates, _, _ = choice
    fastest = fastest_plan(plan_for)
    anything = TensorRange(np.asarray(0), np.asarray(1))
    seen = moved(fastest, dict.fromkeys(fastest.observed, anything))
    assert all(set(c.plan.observed) <= set(seen) for c in candidates)


def test_a_greater_worth_is_never_faster(choice) -> None:
    times = [best_value(choice[1], w).time for w in (0, 1, 10, 100, 1e6, 1e12)]
    assert times == sorted(times)
    assert times[0] == choice[1][0].time
    assert times[-1] == choice[1][-1].time


def test_a_greater_target_is_never_faster_and_is_met(choice) -> None:
    _, candidates, meter, data = choice
    last = 0
    for target in (0, 25, 35, 45, 60, 200):
        found, measured = meets(candidates, lambda p: meter.sqnr(data, p), target)
        assert found.time >= last
        last = found.time
        assert max(measured.values()) >= target
    assert last == candidates[-1].time  # nothing but float reaches 200 dB
    with pytest.raises(ConfigError, match="finite"):
        meets(candidates, lambda _: 0.0, math.nan)


def test_choose_does_all_of_it() -> None:
    net, data = prepare(residual(channels=64)), samples(4, 64)

    def plan_for(weighing: Weighing) -> Plan:
        return make_plan(net, weighing=weighing)

    solution = solved(net, fastest_plan(plan_for), data)
    fast = choose(net, plan_for, solution, data, worth=0)
    assert fast.chosen.plan == fastest_plan(plan_for)
    strict = choose(net, plan_for, solution, data, target_sqnr=60)
    assert strict.measured[strict.candidates.index(strict.chosen)] >= 60
    assert strict.chosen.time > fast.chosen.time
    assert strict.sensitivity == measure(net, fast.chosen.plan, solution, data[:2])
    # one sample has to do for both
    assert choose(net, plan_for, solution, data[:1], target_sqnr=20).measured


def test_harm_keeps_a_layer_float_and_readers_share_one_rounding() -> None:
    net = prepare(residual(channels=64))
    usual = make_plan(net, weighing=Weighing(noise=0, least=0))
    assert {"Conv_a", "Conv_b", "Conv_y"} <= set(usual.quantized)
    # 's' is read by the last convolution, and made by the Add
    plan = make_plan(net, weighing=Weighing(noise=0, least=0, price=1e9, harm={"s": 1.0}))
    assert "s" not in plan.tensors
    assert "Conv_y" in plan.left_float
    assert "Conv_a" in plan.quantized
    heavy = make_plan(net, weighing=Weighing(noise=0, least=0, price=1e9, weights={"Conv_b": 1.0}))
    assert "Conv_b" in heavy.left_float
    # two readers of 'ar' pay for its rounding once: just below their gain they stay integer
    gain = make_plan(net, weighing=Weighing(noise=0, least=0, price=1e15, harm={"ar": 1.0}))
    price = float(gain.placement.time - usual.placement.time)
    for factor, integer in ((0.99, True), (1.01, False)):
        weighing = Weighing(noise=0, least=0, price=factor * price, harm={"ar": 1.0})
        assert ("ar" in make_plan(net, weighing=weighing).tensors) is integer


def test_a_rule_for_a_tensor_that_a_price_leaves_float_is_no_error() -> None:
    net = prepare(conv_chain(channels=64))
    rules = Scheme(rules=(Rule(tensors="r0", range=(0, 4)),))
    harm = dict.fromkeys(make_plan(net, rules).tensors, 1.0)
    plan = make_plan(net, rules, weighing=Weighing(price=1e12, harm=harm))
    assert not plan.quantized


def test_the_portable_target_has_no_choice() -> None:
    net = prepare(conv_chain())
    with pytest.raises(ConfigError, match="does not weigh costs"):
        fastest_plan(lambda w: make_plan(net, target=PORTABLE, weighing=w))
