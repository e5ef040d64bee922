"""Rounding by error: never worse than to nearest, on the grid, and through the whole program."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import HEAD, KINDS, TAIL, WEIGHT, correlated, layer, measured

from qdq.affine import dequantize, fake_quantize, quantize
from qdq.bias_scale import INT32_MAX
from qdq.errors import ConfigError, SolveError
from qdq.problem import Given, Linear, Moments, Problem
from qdq.solve import Solution, State, kernel_of, needs_of, solve
from qdq.spec import INT8, UINT8, QuantParams, QuantSpec
from qdq.steps import DEFAULT_STEPS, CorrectBias, FitWeightScales, RoundWeights
from qdq.steps import round_weights as module

RECIPE = (*HEAD, RoundWeights(), *TAIL)
ASYMMETRIC = QuantSpec(dtype=UINT8, symmetric=False)


def rounded(problem: Problem, step: RoundWeights | None = None) -> tuple[np.ndarray, QuantParams]:
    state = solve(problem, (*HEAD, step or RoundWeights(), *TAIL))
    return state.constants["w"], state.params["w"]


@pytest.mark.parametrize("spec", [WEIGHT, ASYMMETRIC], ids=lambda s: s.dtype.name)
@pytest.mark.parametrize("axis", [True, False], ids=["per channel", "per tensor"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", KINDS)
def test_no_channel_is_worse_and_the_layer_is_better(
    name: str, bias: bool, axis: bool, spec: QuantSpec
) -> None:
    problem = layer(name, axis=axis, spec=spec, bias=bias)
    values, params = rounded(problem)
    nearest = fake_quantize(problem.constants["w"], params)
    before, after = measured(problem, nearest), measured(problem, values)
    assert np.all(after <= before * (1 + 1e-6))
    assert after.sum() < 0.7 * before.sum()
    # the codes are in use, and emit's rounding gives just them
    codes = quantize(values, params)
    assert np.array_equal(dequantize(codes, params), values)
    assert params.spec.qmin <= codes.min()
    assert codes.max() <= params.spec.qmax


@given(seed=st.integers(0, 10**6), sweeps=st.integers(0, 3), damping=st.sampled_from([1e-4, 1.0]))
@settings(max_examples=30)
def test_never_worse_for_any_layer(seed: int, sweeps: int, damping: float) -> None:
    problem = layer(list(KINDS)[seed % len(KINDS)], seed=seed)
    values, params = rounded(problem, RoundWeights(sweeps=sweeps, damping=damping))
    nearest = fake_quantize(problem.constants["w"], params)
    before = measured(problem, nearest, damping=damping)
    assert np.all(measured(problem, values, damping=damping) <= before * (1 + 1e-6))


@given(st.integers(0, 10**6), st.sampled_from(list(KINDS)))
@settings(max_examples=30)
def test_independent_terms_are_rounded_to_nearest(seed: int, name: str) -> None:
    shape = layer(name).moments["n"].mean.shape
    spread = np.random.default_rng(seed).uniform(0.5, 2, shape)
    diagonal = Moments(spread[:, :, None] * np.eye(shape[1]), np.zeros(shape), 1)
    problem = layer(name, seed=seed, moments=diagonal)
    values, params = rounded(problem)
    assert np.array_equal(values, fake_quantize(problem.constants["w"], params))


def test_it_is_the_best_of_all_codes_where_all_can_be_tried() -> None:
    """Three terms whose errors can cancel: nothing within two steps of the weight is better."""
    r = np.random.default_rng(5)
    found = 0
    for seed in range(40):
        x = r.standard_normal((1, 3, 1)) + 0.05 * r.standard_normal((1, 3, 500))
        m = Moments(x @ x.swapaxes(1, 2) / 500, x.mean(-1), 500)
        problem = layer("matmul", bias=False, weight=r.standard_normal((3, 1)).astype(np.float32),
                        moments=m, seed=seed)  # fmt: skip
        values, params = rounded(problem)
        codes = np.stack(np.meshgrid(*[np.arange(-2, 3)] * 3), -1).reshape(-1, 3, 1)
        start = quantize(problem.constants["w"], params).astype(int)
        tried = [dequantize(np.clip(start + c, -127, 127), params) for c in codes]
        best = min(measured(problem, t)[0] for t in tried)
        found += measured(problem, values)[0] <= best * (1 + 1e-6)
    assert found >= 24  # most; it is no exhaustive search


@pytest.mark.parametrize("size", [1.0, 1e-5], ids=["large inputs", "inputs as small as a step"])
def test_error_feedback_is_that_of_the_definition(size: float) -> None:
    """150 terms, more than are walked between two matrix products, written out one by one."""
    weight = np.random.default_rng(1).standard_normal((150, 9)).astype(np.float32)
    m = correlated(1000, 150, 1)
    m = Moments(m.second * size, m.mean * np.sqrt(size), m.count)
    problem = layer("matmul", weight=weight, moments=m)
    values, params = rounded(problem, RoundWeights(sweeps=0))
    h = m.second[0] - np.outer(m.mean[0], m.mean[0]) + np.eye(150) * (3 / 255) ** 2 / 12
    h += np.eye(150) * 0.01 * np.trace(h) / 150
    order = np.argsort(np.diag(h), kind="stable")
    upper = np.linalg.cholesky(h[order][:, order]).T
    scale, w = params.scale.astype(np.float64), weight[order].astype(np.float64)
    codes, error = np.zeros((150, 9)), np.zeros((150, 9))
    for k in reversed(range(150)):
        target = w[k] + upper[k, k + 1 :] @ error[k + 1 :] / upper[k, k]
        codes[k] = np.clip(np.rint(target / scale), -127, 127)
        error[k] = w[k] - codes[k] * scale
    nearest = weight - fake_quantize(weight, params).astype(np.float64)
    better = np.sum(error * (h[order][:, order] @ error), 0) < np.sum(nearest * (h @ nearest), 0)
    assert better.all()
    assert np.array_equal(quantize(values, params)[order], codes)


def test_more_sweeps_are_never_worse() -> None:
    problem = layer("dense conv", seed=3)
    errors = [measured(problem, rounded(problem, RoundWeights(sweeps=k))[0]) for k in range(4)]
    for a, b in pairwise(errors):
        assert np.all(b <= a * (1 + 1e-6))
    assert errors[1].sum() < 0.99 * errors[0].sum()  # and the first one, which is usual, pays


@pytest.mark.parametrize("name", ["dense conv", "matmul", "grouped conv"])
@pytest.mark.parametrize("blocks", [2, 3])
def test_blocks_of_terms_are_rounded_by_themselves(name: str, blocks: int) -> None:
    problem = layer(name, blocks=blocks)
    values, params = rounded(problem)
    before = measured(problem, fake_quantize(problem.constants["w"], params))
    assert np.all(measured(problem, values) <= before * (1 + 1e-6))
    assert measured(problem, values).sum() < 0.9 * before.sum()


def test_zero_channels_dead_inputs_and_runs_of_terms() -> None:
    """150 terms are more than one run; a channel of zeros stays 0; dead inputs do not blow up."""
    weight = np.random.default_rng(1).standard_normal((150, 9)).astype(np.float32)
    weight[:, 4] = 0
    m = correlated(1000, 150, 1)
    second, mean = m.second.copy(), m.mean.copy()
    second[:, 20:30], second[:, :, 20:30], mean[:, 20:30] = 0, 0, 0
    problem = layer("matmul", weight=weight, moments=Moments(second, mean, m.count))
    values, params = rounded(problem)
    assert not values[:, 4].any()
    steps = np.abs(values - weight) / params.scale
    assert steps[20:30].max() <= 1.01
    before = measured(problem, fake_quantize(weight, params))
    assert measured(problem, values).sum() < 0.5 * before.sum()


def test_chunks_of_rows_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = layer("dense conv", axis=False)
    whole, _ = rounded(problem)
    monkeypatch.setattr("qdq.steps.layer_error._CHUNK", 2 * 36)
    part, _ = rounded(problem)
    assert np.array_equal(whole, part)
    scales = solve(problem, (*HEAD, FitWeightScales(), *TAIL)).params["w"]
    monkeypatch.setattr("qdq.steps.layer_error._CHUNK", 1 << 22)
    assert scales == solve(problem, (*HEAD, FitWeightScales(), *TAIL)).params["w"]


def test_the_bias_takes_the_mean_error_of_the_rounded_weights() -> None:
    problem = layer("matmul")
    solution = solve(problem, RECIPE)
    error = problem.constants["w"].astype(np.float64) - solution.constants["w"]
    shift = problem.means["x"] @ error
    assert np.allclose(solution.constants["b"], problem.constants["b"] + shift, atol=1e-6)
    assert np.abs(shift).max() > 1e-3


def test_two_nodes_of_one_weight_share_its_rounding() -> None:
    problem = layer("matmul", bias=False)
    second = replace(problem.linears[0], node="n2")
    other = correlated(300, 12, 1, seed=9)
    both = replace(
        problem,
        linears=(*problem.linears, second),
        moments={"n": problem.moments["n"], "n2": other},
    )
    values = rounded(both)[0]
    assert not np.array_equal(values, rounded(problem)[0])
    total = problem.moments["n"].count + other.count
    mixed = Moments(
        (problem.moments["n"].second * problem.moments["n"].count + other.second * other.count)
        / total,
        other.mean,
        total,
    )
    assert np.array_equal(values, rounded(replace(problem, moments={"n": mixed}))[0])


def test_what_is_left_alone() -> None:
    problem = layer("matmul")
    for other in (
        replace(problem, moments={}),
        replace(problem, linears=(replace(problem.linears[0], kind="conv_transpose"),)),
    ):
        state = State()
        for step in HEAD:
            state = step(other, state)
        assert RoundWeights()(other, state).constants == {}
    state = replace(state, floats={"n": "why not"})
    assert RoundWeights()(problem, state).constants == {}
    two = (problem.linears[0], Linear(node="m", input="x", weight="w", bias=None, kind="matmul"))
    apart = {"n": problem.moments["n"], "m": correlated(50, 6, 2)}
    state = replace(state, floats={})
    assert RoundWeights()(replace(problem, linears=two, moments=apart), state).constants == {}


def test_given_scales_stay_and_their_weights_are_rounded() -> None:
    problem = layer("matmul")
    spec = problem.tensors["w"].spec
    mine = QuantParams(spec, np.full(7, 0.09, np.float32), np.zeros(7, np.int8))
    plan = replace(problem.tensors["w"], source=Given(mine))
    given_ = replace(problem, tensors={**problem.tensors, "w": plan})
    solution = solve(given_, RECIPE)
    assert solution.params["w"] == mine
    nearest = fake_quantize(problem.constants["w"], mine)
    assert measured(problem, solution.constants["w"]).sum() < measured(problem, nearest).sum()


def overloaded() -> tuple[Problem, Solution]:
    """A bias of 1e6 beside weights of 1: the scale must be raised after the rounding."""
    problem = layer("matmul")
    bias = problem.constants["b"].copy()
    bias[2] = 1e6
    problem = replace(problem, constants={**problem.constants, "b": bias})
    return problem, solve(problem, RECIPE)


def test_the_accumulator_law_holds_after_rounding() -> None:
    problem, solution = overloaded()
    plain = solve(problem, DEFAULT_STEPS)
    assert solution.floats == plain.floats == {}
    state = State(params=solution.params, constants=solution.constants)
    kernel = kernel_of(problem, state, problem.linears[0], "test")
    assert kernel.load(solution.params["w"]).max() <= INT32_MAX
    before = (*HEAD, RoundWeights())
    scale = solve(replace(problem, tensors={n: t for n, t in problem.tensors.items() if n != "b"},
                          linears=(replace(problem.linears[0], bias=None),)), before)  # fmt: skip
    assert solution.params["w"].scale[2] > scale.params["w"].scale[2]


def test_the_history_says_what_was_gained() -> None:
    solution = solve(layer("matmul"), RECIPE)
    (change,) = [c for c in solution.changes if c.step == "RoundWeights"]
    assert change.tensor == "w"
    assert change.note is not None
    assert change.note.values["gain_db"] > 1
    assert change.note.values["error_after"] < change.note.values["error_before"]


def test_settings_and_order_are_checked() -> None:
    for settings_ in (
        {"damping": 0.0}, {"damping": float("inf")}, {"damping": "a"},
        {"sweeps": -1}, {"sweeps": 1.5}, {"sweeps": "a"},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=next(iter(settings_))):
            RoundWeights(**settings_)
    with pytest.raises(SolveError, match="RoundWeights needs params of 'w'"):
        solve(layer("matmul"), (RoundWeights(),))


def test_steps_say_which_statistics_they_need() -> None:
    assert needs_of(()) == frozenset()
    assert needs_of(RECIPE) == {"means", "moments"}
    assert needs_of((CorrectBias(),)) == {"means"}


def test_only_symmetric_int8_leaves_out_its_lowest_code() -> None:
    weight = -np.abs(layer("matmul").constants["w"])
    values, params = rounded(layer("matmul", weight=weight))
    assert params.spec == replace(WEIGHT, axis=1)
    assert quantize(values, params).min() == -127
    assert module.RoundWeights().needs == {"moments"}
    assert params.spec.dtype == INT8
