"""Weight scales by the error of the outputs: never worse than by the largest weight."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import HEAD, KINDS, TAIL, WEIGHT, correlated, layer, measured

from qdq.affine import fake_quantize
from qdq.bias_scale import INT32_MAX, with_scale
from qdq.errors import ConfigError, SolveError
from qdq.problem import Given, Moments, Problem, Shared, TensorPlan
from qdq.solve import State, kernel_of, solve
from qdq.spec import UINT8, QuantParams, QuantSpec
from qdq.steps import DEFAULT_STEPS, FitWeightScales, RoundWeights

STEP = FitWeightScales()
RECIPE = (*HEAD, STEP, *TAIL)


def fitted(problem: Problem, step: FitWeightScales = STEP) -> tuple[QuantParams, QuantParams]:
    """Parameters of the weight before and after."""
    state = State()
    for other in HEAD:
        state = other(problem, state)
    return state.params["w"], step(problem, state).params["w"]


@pytest.mark.parametrize("spec", [WEIGHT, QuantSpec(dtype=UINT8)], ids=lambda s: s.dtype.name)
@pytest.mark.parametrize("axis", [True, False], ids=["per channel", "per tensor"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", KINDS)
def test_no_scale_is_worse(name: str, bias: bool, axis: bool, spec: QuantSpec) -> None:
    problem = layer(name, axis=axis, spec=spec, bias=bias)
    before, after = fitted(problem)
    weight = problem.constants["w"]
    old = measured(problem, fake_quantize(weight, before))
    new = measured(problem, fake_quantize(weight, after))
    assert new.sum() <= old.sum() * (1 + 1e-6)
    assert np.array_equal(before.zero_point, after.zero_point)
    if axis:
        assert new.sum() < 0.9 * old.sum()
        assert np.all(new <= old * (1 + 1e-6))
        assert np.all(after.scale[new < old * (1 - 1e-6)] != before.scale[new < old * (1 - 1e-6)])


@given(seed=st.integers(0, 10**6), least=st.sampled_from([0.3, 0.9]), count=st.integers(1, 8))
@settings(max_examples=30)
def test_never_worse_for_any_layer(seed: int, least: float, count: int) -> None:
    problem = layer(list(KINDS)[seed % len(KINDS)], seed=seed)
    step = FitWeightScales(least=least, candidates=count)
    old, new = (
        measured(problem, fake_quantize(problem.constants["w"], p)) for p in fitted(problem, step)
    )
    assert np.all(new <= old * (1 + 1e-6))


def test_it_is_the_best_of_the_grid() -> None:
    problem = layer("grouped conv")
    before, after = fitted(problem)
    weight = problem.constants["w"]
    tried = np.stack(
        [
            measured(problem, fake_quantize(weight, with_scale(before, before.scale * f)))
            for f in (1, *np.linspace(1.03, 0.8, 24))
        ]
    )
    found = measured(problem, fake_quantize(weight, after))
    assert np.allclose(found, tried.min(0), rtol=1e-6)


def test_a_lone_large_weight_of_no_effect_is_cut_off() -> None:
    """Its input is nearly always 0: saturating it costs nothing, the others get finer steps."""
    weight = np.random.default_rng(0).uniform(-1, 1, (12, 7)).astype(np.float32)
    weight[3] = 2
    second = np.eye(12)
    second[3, 3] = 1e-9
    moments = Moments(second[None], np.zeros((1, 12)), 100)
    problem = layer("matmul", weight=weight, moments=moments)
    before, after = fitted(problem, FitWeightScales(least=0.4, candidates=61, damping=1e-6))
    assert np.all(after.scale < 0.85 * before.scale)
    # an input that counts like the others is not cut off
    even = replace(problem, moments={"n": Moments(np.eye(12)[None], np.zeros((1, 12)), 100)})
    assert np.all(fitted(even)[1].scale > 0.97 * before.scale)


def test_zero_channels_and_exact_weights_keep_their_scales() -> None:
    weight = layer("matmul").constants["w"].copy()
    weight[:, 1] = 0
    weight[:, 2] = np.linspace(-127, 127, 12).round() / 64
    before, after = fitted(layer("matmul", weight=weight))
    assert after.scale[1] == before.scale[1]
    assert after.scale[2] == before.scale[2]
    assert np.any(after.scale != before.scale)


def test_scales_next_to_the_smallest_float_stay_usable() -> None:
    tiny = np.finfo(np.float32).tiny
    weight = layer("matmul").constants["w"]
    weight = weight / np.abs(weight).max(0) * np.float32(127 * 1.1 * tiny)
    before, after = fitted(layer("matmul", weight=weight))
    assert np.all(before.scale < 1.2 * tiny)
    assert np.all(after.scale >= tiny)
    assert np.any(after.scale != before.scale)


def test_what_is_left_alone() -> None:
    problem = layer("matmul")
    mine = QuantParams(
        problem.tensors["w"].spec, np.full(7, 0.09, np.float32), np.zeros(7, np.int8)
    )
    given_ = replace(problem.tensors["w"], source=Given(mine))
    owned = TensorPlan(name="v", spec=problem.tensors["w"].spec, source=Shared("w"))
    for other in (
        replace(problem, moments={}),
        replace(problem, tensors={**problem.tensors, "w": given_}),
        replace(problem, tensors={**problem.tensors, "v": owned}),
        replace(problem, linears=(replace(problem.linears[0], kind="conv_transpose"),)),
    ):
        before, after = fitted(other)
        assert before == after
    assert (
        solve(replace(problem, tensors={**problem.tensors, "w": given_}), RECIPE).params["w"]
        == mine
    )


def test_a_shared_scale_serves_all_of_its_nodes() -> None:
    problem = layer("matmul", axis=False, bias=False)
    other = correlated(300, 12, 1, seed=9)
    both = replace(
        problem,
        linears=(problem.linears[0], replace(problem.linears[0], node="n2")),
        moments={"n": problem.moments["n"], "n2": other},
    )
    total = sum(m.count for m in both.moments.values())
    second = sum(m.second * m.count for m in both.moments.values()) / total
    mixed = replace(problem, moments={"n": Moments(np.asarray(second), other.mean, total)})
    assert fitted(both)[1] == fitted(mixed)[1]


@pytest.mark.parametrize("name", ["dense conv", "matmul"])
def test_blocks_add_up(name: str) -> None:
    problem = layer(name, blocks=3)
    old, new = (
        measured(problem, fake_quantize(problem.constants["w"], p)) for p in fitted(problem)
    )
    assert np.all(new <= old * (1 + 1e-6))
    assert new.sum() < 0.9 * old.sum()


@pytest.mark.parametrize("rounding", [(), (RoundWeights(),)], ids=["nearest", "by error"])
def test_the_accumulator_law_holds_afterwards(rounding: tuple) -> None:
    problem = layer("matmul")
    bias = problem.constants["b"].copy()
    bias[2] = 1e6
    problem = replace(problem, constants={**problem.constants, "b": bias})
    solution = solve(problem, (*HEAD, STEP, *rounding, *TAIL))
    plain = solve(problem, DEFAULT_STEPS)
    state = State(params=solution.params, constants=solution.constants)
    kernel = kernel_of(problem, state, problem.linears[0], "test")
    assert kernel.load(solution.params["w"]).max() <= INT32_MAX
    ratio = solution.params["w"].scale / plain.params["w"].scale
    assert abs(ratio[2] - 1) < 1e-3  # what the bias asks for
    assert solution.floats == {}


def test_the_history_says_what_was_gained() -> None:
    solution = solve(layer("depthwise conv"), RECIPE)
    (change,) = [c for c in solution.changes if c.step == "FitWeightScales"]
    assert change.tensor == "w"
    assert change.note is not None
    assert change.note.values["gain_db"] > 0.5
    assert 0.8 <= change.note.values["least"] <= change.note.values["most"] <= 1.0301


def test_settings_and_order_are_checked() -> None:
    for wrong in ({"least": 0.0}, {"most": 0.5}, {"candidates": 0}, {"damping": -1.0},
                  {"candidates": 2.5}, {"least": "a"}):  # fmt: skip
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            FitWeightScales(**wrong)
    with pytest.raises(SolveError, match="FitWeightScales needs params of 'w'"):
        solve(layer("matmul"), (STEP,))
    assert STEP.needs == {"moments"}
