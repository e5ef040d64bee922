"""Plans from the fastest to the most accurate, and the choice by time and amplitude."""

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import conv_chain, residual

from qdq.placement.budget import first_within, least_cost
from qdq.placement.frontier import (
    AMPLITUDE,
    WIDEST,
    Candidate,
    Frontier,
    Planner,
    moved,
    rounded_by,
)
from qdq.placement.weighing import Weighing
from qdq.plan import Plan, make_plan, planner
from qdq.prepare import prepare
from qdq.ranges import TensorRange
from qdq.scheme import Rule, Scheme

NET = prepare(residual(channels=64))


def plan_for(weighing: Weighing) -> Plan:
    return make_plan(NET, weighing=weighing)


def frontier(harm: float | Mapping[str, float], planner: Planner = plan_for) -> Frontier:
    widest = planner(WIDEST)
    if isinstance(harm, float):
        harm = {t: harm * (k + 1) for k, t in enumerate(sorted(rounded_by(widest)))}
    return Frontier(planner, widest, harm)


# -- the frontier -----------------------------------------------------------------------------


def test_a_price_without_harm_changes_nothing() -> None:
    assert make_plan(NET) == make_plan(NET, weighing=Weighing(price=1e9))


def test_what_outputs_count_more_is_added_to_what_is_measured() -> None:
    widest = plan_for(WIDEST)
    *others, output = sorted(rounded_by(widest))
    harm = {output: 0.08, **dict.fromkeys(others, 0.01)}
    found = Frontier(plan_for, widest, harm, {output})
    assert found.widest.harm == pytest.approx(0.08 + 0.01 * len(others))
    assert found.widest.felt(0.1) == pytest.approx(math.sqrt(0.1**2 + 0.08 * 7 / 8))
    assert found.at(1e6).felt(0.0) == 0
    assert frontier(harm).widest.felt(0.1) == pytest.approx(0.1)


def test_candidates_are_nested_slower_and_better() -> None:
    candidates = frontier(1e-3).all()
    assert len(candidates) > 2
    assert candidates[0].plan == plan_for(WIDEST)
    for a, b in pairwise(candidates):
        assert a.plan.placement.integer > b.plan.placement.integer
        assert a.worth < b.worth
        assert a.time < b.time
        assert a.harm > b.harm
    assert not candidates[-1].plan.quantized
    assert (candidates[-1].time, candidates[-1].harm) == (1, 0)


def test_each_candidate_needs_no_more_than_was_observed() -> None:
    front = frontier(1e-3)
    widest = front.widest.plan
    anything = TensorRange(np.asarray(0), np.asarray(1))
    seen = moved(widest, dict.fromkeys(widest.observed, anything))
    assert all(set(c.plan.observed) <= set(seen) for c in front.all())


@given(st.floats(-12, 0))
def test_the_best_is_the_best_of_all(exponent: float) -> None:
    front = frontier(10**exponent)
    best = front.best()
    tried = [c for c in front.all() if c.worth == 0 or math.log2(c.worth).is_integer()]
    assert best.cost <= min(c.cost for c in tried) * (1 + 1e-9)
    assert best.plan == front.at(best.worth).plan
    assert best.cost == pytest.approx(best.time + AMPLITUDE * math.sqrt(best.harm))


def test_a_greater_worth_is_never_faster() -> None:
    front = frontier(1e-3)
    found = [front.at(w) for w in (0, 1, 10, 100, 1e6, 1e12)]
    assert [c.time for c in found] == sorted(c.time for c in found)
    assert found[0] == front.widest
    assert not found[-1].plan.quantized


def test_a_plan_does_not_depend_on_those_made_before() -> None:
    worths = (64.0, 0.5, 8.0, 8.0, 1e3, 0.0, 8.0)
    planner_ = planner(NET)
    front = frontier(1e-3, planner_)
    found = [front.at(w) for w in worths]
    for worth, candidate in zip(worths, found, strict=True):
        fresh = Frontier(planner(NET), front.widest.plan, front._harm).at(worth)
        assert candidate == fresh


def test_no_harm_no_search() -> None:
    def never(_: Weighing) -> Plan:
        raise AssertionError

    widest = plan_for(WIDEST)
    assert Frontier(never, widest, {}).best().plan == widest


def test_a_louder_model_pays_more_for_each_decibel() -> None:
    """The price is on the amplitude: its slope falls where there is more of it."""
    quiet = frontier({t: 1e-6 for t in rounded_by(plan_for(WIDEST))}).best()
    assert quiet.plan == plan_for(WIDEST)
    assert frontier({t: 1.0 for t in rounded_by(plan_for(WIDEST))}).best().harm == 0


def test_harm_keeps_a_layer_float_and_readers_share_one_rounding() -> None:
    net = prepare(residual(channels=64))
    usual = make_plan(net, weighing=Weighing(noise=0, least=0))
    assert {"Conv_a", "Conv_b", "Conv_y"} <= set(usual.quantized)
    # 's' is read by the last convolution, and made by the Add
    plan = make_plan(net, weighing=Weighing(noise=0, least=0, price=1e9, harm={"s": 1.0}))
    assert "s" not in plan.tensors
    assert "Conv_y" in plan.left_float
    assert "Conv_a" in plan.quantized
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


# -- few measurements -------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_the_first_that_holds_is_found_with_few_trials(order: list[bool]) -> None:
    holds, calls = sorted(order), []

    def tried(k: int) -> bool:
        calls.append(k)
        return holds[k]

    best = first_within(len(holds), tried)
    assert best == (holds.index(True) if True in holds else len(holds) - 1)
    assert best in calls
    assert len(calls) <= len(holds).bit_length()


def ladder(count: int) -> list[Candidate]:
    plan: Any = SimpleNamespace(quantized=("node",))
    times, harms = np.linspace(0.4, 1, count), np.geomspace(1e-2, 1e-6, count)
    harms[-1] = 0
    return [
        Candidate(plan=plan, worth=2.0**k, time=float(t), harm=float(h))
        for k, (t, h) in enumerate(zip(times, harms, strict=True))
    ]


@given(st.integers(2, 20), st.floats(0.01, 30))
def test_a_common_factor_is_found_out_by_few_measurements(count: int, factor: float) -> None:
    candidates = ladder(count)
    real = [min(factor * math.sqrt(c.harm), 1e3) for c in candidates]
    best, measured = least_cost(candidates, lambda c: real[candidates.index(c)])
    costs = [c.time + AMPLITUDE * a for c, a in zip(candidates, real, strict=True)]
    assert costs[best] == pytest.approx(min(costs))
    assert best in measured
    assert len(measured) <= 3
    assert all(measured[k] == real[k] for k in measured)


@given(st.lists(st.floats(0, 2), min_size=2, max_size=12))
def test_what_was_measured_is_what_counts(real: list[float]) -> None:
    candidates = ladder(len(real))
    best, measured = least_cost(candidates, lambda c: real[candidates.index(c)])
    costs = {k: candidates[k].time + AMPLITUDE * a for k, a in measured.items()}
    assert costs[best] == min(costs.values())


def test_a_plan_of_which_too_much_is_feared_gets_a_chance() -> None:
    candidates = [replace(c, harm=1e4 * c.harm) for c in ladder(6)]
    assert min(candidates, key=lambda c: c.cost).harm == 0  # float, by what is foretold
    best, measured = least_cost(candidates, lambda c: math.sqrt(c.harm) / 1000)
    assert best < 5
    assert len(measured) <= 2


def test_the_fastest_is_measured_where_all_is_given_up() -> None:
    """Of the others too much is foretold as well, but less."""
    candidates = [replace(c, harm=1e3 * c.harm) for c in ladder(6)]
    real = [min(0.1, math.sqrt(c.harm)) for c in candidates]
    found = {}
    for fastest in (False, True):
        best, _ = least_cost(candidates, lambda c: real[candidates.index(c)], fastest=fastest)
        found[fastest] = best
    assert found == {False: 5, True: 0}


def test_the_float_model_need_not_be_measured() -> None:
    candidates = ladder(2)
    floats: Any = SimpleNamespace(quantized=())
    candidates[1] = replace(candidates[1], plan=floats)
    best, measured = least_cost(candidates, lambda c: 1.0 if c.plan.quantized else math.nan)
    assert best == 1
    assert measured == {0: 1.0, 1: 0.0}


def test_what_is_ruined_without_a_sign_of_it_is_noticed() -> None:
    """A value that leaves its clamp is no small error: gradients do not foretell it."""
    candidates = ladder(6)
    best, measured = least_cost(candidates, lambda c: 1.0 if c.harm else 0.0)
    assert best == 5
    assert len(measured) < 6
