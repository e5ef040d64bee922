"""The built-in steps: ranges, sharing, and weight scales that fit their biases."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdq.affine import dequantize, fake_quantize, quantize
from qdq.bias_scale import INT32_MAX, quantize_bias
from qdq.errors import ConfigError, SolveError
from qdq.problem import (
    Constant,
    Derived,
    Fixed,
    Given,
    Linear,
    Observed,
    Problem,
    Shared,
    TensorPlan,
)
from qdq.ranges import TensorRange
from qdq.solve import Solution, State, kernel_of, solve
from qdq.spec import INT8, INT32, UINT8, QuantParams, QuantSpec
from qdq.steps import DEFAULT_STEPS, FitWeightsToBias, FromConstants, FromRanges, ShareParams
from qdq.steps.fit_weights import visible_error, weight_error

ACTIVATION = QuantSpec(dtype=UINT8)
WEIGHT = QuantSpec(dtype=INT8, symmetric=True)


def scalar(spec: QuantSpec, scale: float, zero: int = 0) -> QuantParams:
    return QuantParams(spec, np.float32(scale), np.array(zero))


def activations(ranges: dict[str, tuple[float, float]], **sources) -> Problem:
    tensors = {n: TensorPlan(name=n, spec=ACTIVATION, source=s) for n, s in sources.items()}
    return Problem(
        tensors=tensors,
        ranges={n: TensorRange(*r) for n, r in ranges.items()},
        constants={},
    )


def linear_problem(
    weight,
    bias,
    x: tuple[float, float] | QuantParams,
    *,
    kind: str = "conv",
    axis: int | None = None,
    groups: int = 1,
    spec: QuantSpec = WEIGHT,
    given_weight: QuantParams | None = None,
    output: tuple[float, float] | None = None,
    dtype: type = np.float32,
) -> Problem:
    """One linear node "n" of input x, weight w and bias b."""
    given_x = isinstance(x, QuantParams)
    w_source = Constant() if given_weight is None else Given(given_weight)
    tensors = {
        "x": TensorPlan(name="x", spec=ACTIVATION, source=Given(x) if given_x else Observed()),
        "w": TensorPlan(name="w", spec=replace(spec, axis=axis), source=w_source),
    }
    constants = {"w": np.asarray(weight, dtype)}
    if bias is not None:
        b_spec = QuantSpec(dtype=INT32, symmetric=True)
        tensors["b"] = TensorPlan(name="b", spec=b_spec, source=Derived("n"))
        constants["b"] = np.asarray(bias, dtype)
    if output is not None:
        tensors["y"] = TensorPlan(name="y", spec=ACTIVATION, source=Fixed(*output))
    node = Linear(
        node="n",
        input="x",
        weight="w",
        bias=None if bias is None else "b",
        kind=kind,
        groups=groups,
        output=None if output is None else "y",
    )
    ranges = {} if given_x else {"x": TensorRange(*x)}
    return Problem(tensors=tensors, linears=(node,), ranges=ranges, constants=constants)


def bias_out(problem: Problem, solution: Solution, name: str = "b") -> np.ndarray:
    """The bias as the quantized model holds it."""
    params = solution.params[name]
    bias = solution.constants.get(name, problem.constants[name])
    codes = quantize_bias(bias, params)
    return codes * params.scale.astype(np.float64)


# -- ranges and sharing ---------------------------------------------------------------------


def test_observed_fixed_and_given_tensors() -> None:
    mine = scalar(ACTIVATION, 0.125, 7)
    p = activations({"a": (-1, 3)}, a=Observed(), b=Fixed(0, 1), c=Given(mine))
    found = FromRanges()(p, State()).params
    assert found["a"].scale == np.float32(4 / 255)
    assert found["b"].scale == np.float32(1 / 255)
    assert found["c"] is mine


def test_a_missing_range_is_named() -> None:
    with pytest.raises(SolveError, match="calibration gave no range for 'a'"):
        FromRanges()(activations({}, a=Observed()), State())


def test_shared_tensors_take_the_union_of_their_ranges() -> None:
    p = activations(
        {"a": (0, 1), "b": (-3, 0.5)}, a=Observed(), b=Shared("a"), c=Shared("a"), d=Observed()
    )
    p = replace(p, ranges={**p.ranges, "d": TensorRange(0, 9)})
    found = solve(p, DEFAULT_STEPS).params
    assert found["a"].scale == np.float32(4 / 255)
    assert found["a"] == found["b"] == found["c"]
    assert found["d"].scale == np.float32(9 / 255)


def test_a_fixed_owner_widens_and_a_given_owner_wins() -> None:
    p = activations({"b": (-1, 5)}, a=Fixed(0, 1), b=Shared("a"))
    assert solve(p, DEFAULT_STEPS).params["a"].scale == np.float32(6 / 255)
    mine = scalar(ACTIVATION, 0.125, 7)
    p = activations({"b": (-1, 500)}, a=Given(mine), b=Shared("a"))
    assert solve(p, DEFAULT_STEPS).params["b"] == mine


def test_a_constant_that_shares_widens_the_class_by_its_values() -> None:
    p = activations({"a": (0, 1)}, a=Observed(), k=Shared("a"))
    p = replace(p, constants={"k": np.array([-1.0, 0.5], np.float32)})
    assert solve(p, DEFAULT_STEPS).params["k"].scale == np.float32(2 / 255)


def test_what_an_earlier_step_chose_stays_if_the_others_widen_nothing() -> None:
    chosen = scalar(ACTIVATION, 0.001, 5)
    p = activations({"a": (0, 1), "b": (0.2, 0.5)}, a=Observed(), b=Shared("a"))
    state = ShareParams()(p, State().set({"a": chosen}))
    assert state.params["b"] == state.params["a"] == chosen


@pytest.mark.parametrize(
    ("source", "message"),
    [(Shared("c"), "shares the params of 'b', which is Shared"), (None, "is not planned")],
)
def test_an_owner_must_have_params_of_its_own(source, message: str) -> None:
    more = {} if source is None else {"b": source, "c": Observed()}
    p = activations({"c": (0, 1)}, a=Shared("b"), **more)
    with pytest.raises(SolveError, match=message):
        solve(p, DEFAULT_STEPS)


def test_a_class_has_one_integer_type() -> None:
    p = activations({"a": (0, 1)}, a=Observed(), b=Shared("a"))
    other = TensorPlan(name="b", spec=QuantSpec(dtype=INT8), source=Shared("a"))
    p = replace(p, tensors={**p.tensors, "b": other})
    with pytest.raises(SolveError, match=re.escape("'b' (int8) shares the params of 'a' (uint8)")):
        solve(p, DEFAULT_STEPS)


def test_constants_per_tensor_and_per_axis() -> None:
    values = np.array([[1.0, -4.0], [0.5, 2.0]], np.float32)
    for axis, wanted in ((None, 4.0), (0, [4.0, 2.0]), (1, [1.0, 4.0]), (-1, [1.0, 4.0])):
        p = linear_problem(values, None, (0, 1), axis=axis)
        found = FromConstants()(p, State()).params["w"]
        assert np.array_equal(found.scale, np.float32(np.array(wanted) / 127))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_constant_with_nan_or_inf_is_named(value: float) -> None:
    p = linear_problem([[value, 1.0]], None, (0, 1))
    with pytest.raises(SolveError, match="constant 'w' has values that are not finite"):
        solve(p, DEFAULT_STEPS)


def test_float16_constants_give_float16_scales_rounded_up() -> None:
    values = np.array([[0.1, -0.3]], np.float16)
    p = linear_problem(values, [0.5], (0, 1), dtype=np.float16)
    found = solve(p, DEFAULT_STEPS).params
    assert {found[n].scale.dtype for n in "xwb"} == {np.dtype(np.float16)}
    assert float(found["w"].scale) >= float(np.float16(0.3)) / 127


@pytest.mark.parametrize(
    ("kinds", "wanted"),
    [
        ((np.float16, np.float16), np.float16),
        ((np.float16, np.float32), np.float32),
        ((np.float32, np.float16), np.float32),
    ],
)
def test_activations_have_float16_scales_only_where_all_constants_are_float16(
    kinds, wanted
) -> None:
    p = linear_problem([[0.1, -0.3]], [0.5], (0, 1))
    values = {n: p.constants[n].astype(kind) for n, kind in zip("wb", kinds, strict=True)}
    found = FromRanges()(replace(p, constants=values), State()).params
    assert found["x"].scale.dtype == wanted


# -- weight scales that fit their biases ----------------------------------------------------

SEED_WEIGHT = np.where(np.arange(16).reshape(2, 2, 2, 2) < 8, 1e-7, -1e-7)


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("x", [scalar(ACTIVATION, 0.5), (0, 12.75)])
def test_tiny_weights_beside_a_large_bias_keep_the_bias(axis, x) -> None:
    """Input scale 0.5 or 0.05 and weight scale 7.8e-10: the bias wants 1.28e10 counts."""
    p = linear_problem(SEED_WEIGHT, [5.0, -4.5], x, axis=axis)
    before = FromConstants()(p, State()).params["w"]
    assert np.allclose(before.scale, 7.874e-10)
    solution = solve(p, DEFAULT_STEPS)
    assert not solution.floats
    w = solution.params["w"]
    assert (w.scale > before.scale).all()
    quantum = solution.params["b"].scale.astype(np.float64)
    assert (np.abs(bias_out(p, solution) - [5.0, -4.5]) <= quantum / 2).all()
    assert quantum.max() < 2.4e-9
    # The scale is the smallest: the larger bias leaves only what the products can need.
    code = quantize_bias(np.array([5.0, -4.5]), solution.params["b"])[0]
    used = np.abs(quantize(p.constants["w"][0], _row(w, 0)).astype(np.int64)).sum() * 255
    assert 0.99999 * INT32_MAX < code + used <= INT32_MAX


def _row(w: QuantParams, i: int) -> QuantParams:
    return w if w.spec.axis is None else QuantParams(WEIGHT, w.scale[i], w.zero_point[i])


@pytest.mark.parametrize("axis", [None, 0])
def test_the_same_in_float16(axis) -> None:
    weight = np.where(SEED_WEIGHT > 0, 0.007782, -0.007782)
    p = linear_problem(weight, [1400.0, -1200.0], (0, 2.55), axis=axis, dtype=np.float16)
    solution = solve(p, DEFAULT_STEPS)
    assert not solution.floats
    assert solution.params["w"].scale.dtype == np.float16
    assert np.allclose(bias_out(p, solution), [1400, -1200], atol=0.05)


def test_gemm_weights_with_a_bias_of_shape_1_n() -> None:
    p = linear_problem(
        np.full((8, 4), 1e-7), [[5.0, -4.5, 0, 1.0]], (0, 12.75), kind="matmul", axis=1
    )
    solution = solve(p, DEFAULT_STEPS)
    assert solution.params["b"].spec.axis == 1
    assert solution.params["b"].scale.shape == (4,)
    assert np.allclose(bias_out(p, solution), p.constants["b"], rtol=1e-8, atol=0)


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("shape", [(), (1,), (4,), (1, 4), (3, 4), (3, 1)])
def test_biases_of_every_shape(shape: tuple[int, ...], axis) -> None:
    bias = np.linspace(-5, 4, int(np.prod(shape))).reshape(shape)
    p = linear_problem(np.full((8, 4), 1e-7), bias, (0, 12.75), kind="matmul", axis=axis)
    solution = solve(p, DEFAULT_STEPS)
    out = bias_out(p, solution)
    assert np.allclose(np.broadcast_to(out, (3, 4)), np.broadcast_to(bias, (3, 4)), rtol=1e-6)
    if axis is not None:
        assert out.shape == np.broadcast_shapes(shape, (4,))


@pytest.mark.parametrize("axis", [None, 1])
def test_grouped_conv_transpose_tiles_its_scales(axis) -> None:
    """2 groups of 3 channels: entry j serves channels j and 3 + j."""
    weight = np.full((4, 3, 2, 2), 1e-7)
    bias = np.array([0.0, 1.0, 2.0, 5.0, 0.5, -0.5])
    p = linear_problem(
        weight, bias, (0, 12.75), kind="conv_transpose", axis=axis, groups=2, output=(-1, 5)
    )
    solution = solve(p, DEFAULT_STEPS)
    assert not solution.floats
    assert np.allclose(bias_out(p, solution), bias, rtol=1e-6, atol=0)
    if axis == 1:
        assert solution.params["w"].scale.shape == (3,)
        scale = solution.params["b"].scale
        assert scale.shape == (6,)
        assert np.array_equal(scale[:3], scale[3:])
        needed = np.array([5.0, 1.0, 2.0]) / INT32_MAX
        assert np.allclose(scale[:3], needed, rtol=1e-3)


@pytest.mark.parametrize("zero", [0, 100, 128, 255])
@pytest.mark.parametrize("axis", [None, 0])
def test_uint8_weights_with_any_zero_point(zero: int, axis) -> None:
    low, high = -zero * 1e-9, (255 - zero) * 1e-9
    weight = np.linspace(low, high, 16).reshape(2, 8)
    p = linear_problem(weight, [5.0, -4.5], (0, 1), axis=axis, spec=QuantSpec(dtype=UINT8))
    before = FromConstants()(p, State()).params["w"]
    solution = solve(p, DEFAULT_STEPS)
    w = solution.params["w"]
    assert np.array_equal(w.zero_point, before.zero_point)
    assert (w.scale > before.scale).all()
    assert np.allclose(bias_out(p, solution), [5.0, -4.5], rtol=1e-8)
    step = w.scale[:, None] if axis == 0 else w.scale
    assert (np.abs(fake_quantize(p.constants["w"], w) - weight) <= step).all()


def test_the_final_scale_of_a_shared_input_counts() -> None:
    """conv1 -> MaxPool -> conv2: the pooled tensor has x in [0, 1] but the scale of [-1000, 1]."""
    p = linear_problem(np.full((1, 2, 3, 3), 1e-4), [0.3], (0, 1), axis=0)
    tensors = dict(p.tensors)
    tensors["a"] = TensorPlan(name="a", spec=ACTIVATION, source=Observed())
    tensors["x"] = TensorPlan(name="x", spec=ACTIVATION, source=Shared("a"))
    ranges = {**p.ranges, "a": TensorRange(-1000, 1)}
    solution = solve(replace(p, tensors=tensors, ranges=ranges), DEFAULT_STEPS)
    x, w = solution.params["x"], solution.params["w"]
    assert x.scale == np.float32(1001 / 255)
    # 0.3 / (1001 / 255 * 1e-4 / 127) is 97 thousand counts: nothing to raise, no weight is lost.
    assert w.scale == np.float32(np.float32(1e-4) / 127)
    assert (quantize(p.constants["w"], w) == 127).all()
    assert bias_out(p, solution) == pytest.approx(0.3, abs=float(solution.params["b"].scale[0]))


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("dtype", [INT8, UINT8])
def test_a_channel_of_zeros_takes_its_scale_from_its_bias(axis, dtype) -> None:
    weight = np.zeros((2, 4, 3, 3))
    if axis == 0:
        weight[0] = 0.5
    spec = QuantSpec(dtype=dtype, symmetric=dtype is INT8)
    p = linear_problem(weight, [0.337, 0.337], (0, 12.75), axis=axis, spec=spec)
    solution = solve(p, DEFAULT_STEPS)
    out = bias_out(p, solution)
    assert np.abs(out - np.float32(0.337)).max() < 1e-4
    assert abs(out[1] - np.float32(0.337)) < 1e-9
    assert not dequantize(quantize(p.constants["w"], solution.params["w"]), solution.params["w"])[
        1
    ].any()
    if axis == 0:
        assert solution.params["w"].scale[0] == FromConstants()(p, State()).params["w"].scale[0]
        (change,) = [c for c in solution.changes if c.step == "FitWeightsToBias"]
        assert change.note.values["from_bias"] == 1
        assert change.note.values["raised"] == 0


def test_a_channel_of_zeros_without_bias_keeps_its_scale() -> None:
    p = linear_problem(np.zeros((2, 4)), [0.0, 0.0], (0, 1), axis=0)
    assert solve(p, DEFAULT_STEPS).params["w"].scale.tolist() == [1.0, 1.0]


def test_given_scales_are_never_changed_but_refused_with_the_one_that_works() -> None:
    mine = scalar(WEIGHT, 7.874e-10)
    p = linear_problem(SEED_WEIGHT, [5.0, -4.5], (0, 127.5), given_weight=mine)
    with pytest.raises(SolveError, match=r"the smallest scale that works is ([0-9.e-]+)") as caught:
        solve(p, DEFAULT_STEPS)
    assert caught.value.tensor == "w"
    assert caught.value.step == "FitWeightsToBias"
    said = re.search(r"works is ([0-9.e-]+)[.;]", str(caught.value))
    assert said is not None
    works = scalar(WEIGHT, float(said[1]))
    p = linear_problem(SEED_WEIGHT, [5.0, -4.5], (0, 127.5), given_weight=works)
    assert solve(p, DEFAULT_STEPS).params["w"] == works
    less = scalar(WEIGHT, float(said[1]) * 0.9999)
    p = linear_problem(SEED_WEIGHT, [5.0, -4.5], (0, 127.5), given_weight=less)
    with pytest.raises(SolveError, match="cannot hold"):
        solve(p, DEFAULT_STEPS)


def two_nodes(bias: list[list[float]], scales: list[float], weight) -> Problem:
    """Nodes n0 and n1 of inputs x0 and x1 that share the per-tensor weight w."""
    tensors = {"w": TensorPlan(name="w", spec=WEIGHT, source=Constant())}
    constants = {"w": np.asarray(weight, np.float32)}
    linears = []
    for i, (b, s) in enumerate(zip(bias, scales, strict=True)):
        given_x = Given(scalar(ACTIVATION, s))
        tensors[f"x{i}"] = TensorPlan(name=f"x{i}", spec=ACTIVATION, source=given_x)
        spec = QuantSpec(dtype=INT32, symmetric=True)
        tensors[f"b{i}"] = TensorPlan(name=f"b{i}", spec=spec, source=Derived(f"n{i}"))
        constants[f"b{i}"] = np.asarray(b, np.float32)
        linears.append(Linear(node=f"n{i}", input=f"x{i}", weight="w", bias=f"b{i}", kind="matmul"))
    return Problem(tensors=tensors, linears=tuple(linears), ranges={}, constants=constants)


def test_a_shared_weight_satisfies_all_its_nodes() -> None:
    p = two_nodes([[5.0, 5.0], [9.0, 9.0]], [0.5, 0.01], np.full((3, 2), 1e-7))
    solution = solve(p, DEFAULT_STEPS)
    assert not solution.floats
    assert solution.params["w"].scale == pytest.approx(9 / (0.01 * INT32_MAX), rel=1e-4)
    assert np.allclose(bias_out(p, solution, "b0"), 5, rtol=1e-6)
    assert np.allclose(bias_out(p, solution, "b1"), 9, rtol=1e-6)


@pytest.mark.parametrize("greedy", [0, 1])
def test_a_node_that_would_ruin_the_weight_it_shares_stays_float(greedy: int) -> None:
    """Whichever of them comes first."""
    weight = np.linspace(-1, 1, 6).reshape(3, 2)
    modest, biases = 1 - greedy, [[0.1, 0.2], [0.1, 0.2]]
    biases[greedy] = [1e9, 1e9]
    p = two_nodes(biases, [0.01, 0.01], weight)
    solution = solve(p, DEFAULT_STEPS)
    assert list(solution.floats) == [f"n{greedy}"]
    assert f"'b{greedy}' asks for" in solution.floats[f"n{greedy}"]
    assert "would harm other nodes that use this weight" in solution.floats[f"n{greedy}"]
    assert solution.params["w"].scale == np.float32(1 / 127)
    assert f"b{greedy}" not in solution.params
    assert np.allclose(bias_out(p, solution, f"b{modest}"), [0.1, 0.2], atol=1e-4)


def test_per_tensor_a_dead_channel_does_not_cost_the_others_their_weights() -> None:
    """One bias of -1e7 (dead after a Relu) beside weights of 1: raising would erase them."""
    weight = np.random.default_rng(0).normal(size=(4, 16))
    bias = np.array([-1e7, 0.1, 0.2, 0.3])
    per_tensor = solve(linear_problem(weight, bias, (0, 1)), DEFAULT_STEPS)
    assert list(per_tensor.floats) == ["n"]
    assert re.search(r"error of up to \S+ to output channel [123]", per_tensor.floats["n"])
    # Per channel nothing is lost: the dead channel alone is coarser.
    p = linear_problem(weight, bias, (0, 1), axis=0)
    per_channel = solve(p, DEFAULT_STEPS)
    assert not per_channel.floats
    before = FromConstants()(p, State()).params["w"].scale
    assert (per_channel.params["w"].scale[1:] == before[1:]).all()
    assert per_channel.params["w"].scale[0] > before[0]


def test_an_output_too_coarse_to_show_the_error_keeps_the_node_on_integers() -> None:
    weight = np.random.default_rng(0).normal(size=(4, 16))
    bias = np.array([1e7, 0.1, 0.2, 0.3])
    wide = linear_problem(weight, bias, (0, 1), output=(0, 1e7))
    assert not solve(wide, DEFAULT_STEPS).floats
    narrow = linear_problem(weight, bias, (0, 1), output=(0, 6))
    assert list(solve(narrow, DEFAULT_STEPS).floats) == ["n"]


def test_a_demand_beyond_every_float32_leaves_the_node_float() -> None:
    p = linear_problem(np.full((1, 4), 6e4), [3e38], scalar(ACTIVATION, 1e-38))
    reason = solve(p, DEFAULT_STEPS).floats["n"]
    assert reason == "no float32 scale of weight 'w' can hold bias 'b'"


@pytest.mark.parametrize("margin", [-0.1, 1.0, float("nan")])
def test_an_impossible_margin_is_refused(margin: float) -> None:
    with pytest.raises(ConfigError, match="margin wants"):
        FitWeightsToBias(margin=margin)


def test_a_margin_is_added_to_what_is_needed() -> None:
    p = linear_problem(SEED_WEIGHT, [5.0, -4.5], (0, 12.75))
    plain, wide = (
        solve(p, (*DEFAULT_STEPS[:4], FitWeightsToBias(margin=m), DEFAULT_STEPS[5])).params["w"]
        for m in (0.0, 0.1)
    )
    assert wide.scale / plain.scale == pytest.approx(1.1, rel=1e-3)


@st.composite
def problems(draw) -> Problem:
    """A random linear node: kinds, groups, types, magnitudes, zeros."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["conv", "conv_transpose", "matmul"]))
    groups = 1 if kind == "matmul" else draw(st.integers(1, 3))
    shape, axis = {
        "conv": ((2 * groups, draw(st.integers(1, 30)), 3), 0),
        "conv_transpose": ((2 * groups, draw(st.integers(1, 4)), 3), 1),
        "matmul": ((draw(st.integers(1, 60)), draw(st.integers(1, 4))), 1),
    }[kind]
    channels = shape[axis] * (groups if kind == "conv_transpose" else 1)
    weight = rng.normal(0, 10.0 ** draw(st.integers(-12, 3)), shape) * (rng.random(shape) < 0.8)
    if draw(st.booleans()):
        np.moveaxis(weight, axis, 0)[0] = 0
    bias = rng.normal(0, 10.0 ** draw(st.integers(-12, 3)), channels)
    bias *= rng.random(channels) < 0.8
    low, high = sorted(rng.uniform(-1, 1, 2) * 10.0 ** draw(st.integers(-12, 3)))
    return linear_problem(
        weight,
        bias if draw(st.booleans()) else bias[None] if kind == "matmul" else bias,
        (low, high),
        kind=kind,
        axis=axis if draw(st.booleans()) else None,
        groups=groups,
        spec=QuantSpec(dtype=draw(st.sampled_from([INT8, UINT8])), symmetric=draw(st.booleans())),
    )


def rows(values: np.ndarray, kind: str, groups: int) -> np.ndarray:
    """(M, K): the products of each output channel, written out."""
    if kind == "conv":
        return values.reshape(values.shape[0], -1)
    if kind == "matmul":
        return values.T
    return np.concatenate(
        [part.swapaxes(0, 1).reshape(part.shape[1], -1) for part in np.split(values, groups)]
    )


@given(problems(), st.integers(0, 2**32))
def test_the_integer_kernel_stays_in_int32_and_within_the_error_bound(p, seed: int) -> None:
    solution = solve(p, DEFAULT_STEPS)
    again = solve(p, DEFAULT_STEPS)
    assert solution.params == again.params
    assert solution.floats == again.floats
    (node,) = p.linears
    if solution.floats:
        # Never where each channel has a scale of its own: there the raise cannot be seen.
        assert p.tensors["w"].spec.axis is None or node.groups > 1
        return
    x, w, b = (solution.params[n] for n in "xwb")
    weight = p.constants["w"].astype(np.float64)
    zero = w.zero_point.astype(np.int64)
    if w.spec.axis is not None:
        zero = np.expand_dims(zero, [a for a in range(weight.ndim) if a != w.spec.axis])
    centred = rows(quantize(p.constants["w"], w).astype(np.int64) - zero, node.kind, node.groups)
    real = rows(weight, node.kind, node.groups)
    held = rows(
        dequantize(quantize(p.constants["w"], w), w).astype(np.float64), node.kind, node.groups
    )
    bias = p.constants["b"].reshape(-1).astype(np.float64)
    codes = quantize_bias(p.constants["b"], b).reshape(-1).astype(np.int64)
    quantum = np.broadcast_to(b.scale.astype(np.float64), bias.shape)
    low, high = (c - int(x.zero_point) for c in (x.spec.dtype.min, x.spec.dtype.max))
    # Every accumulator, for the worst codes of both signs.
    most = np.maximum(centred * low, centred * high).sum(1) + codes
    least = np.minimum(centred * low, centred * high).sum(1) + codes
    assert most.max() <= INT32_MAX
    assert least.min() >= -INT32_MAX
    # The error, at random inputs within what the input's codes express.
    edges = float(x.scale) * np.array([low, high])
    inputs = np.random.default_rng(seed).uniform(*edges, (8, real.shape[1]))
    acc = (quantize(inputs, x).astype(np.int64) - int(x.zero_point)) @ centred.T + codes
    error = np.abs(acc * quantum - (inputs @ real.T + bias))
    largest = np.abs(edges).max()
    bound = largest * np.abs(held - real).sum(1)
    bound += np.abs(held).sum(1) * float(x.scale) / 2 + quantum / 2
    floats = 2.0**-20 * (np.abs(bias) + largest * np.abs(held).sum(1))
    assert (error <= bound + floats).all()


@given(problems())
def test_scales_only_grow_and_the_raise_costs_at_most_its_bound(p) -> None:
    state = State()
    for step in DEFAULT_STEPS[:4]:
        state = step(p, state)
    fitted = FitWeightsToBias()(p, state)
    if fitted.floats:
        assert fitted.params["w"] == state.params["w"]
        return
    before, after = state.params["w"], fitted.params["w"]
    kernel = kernel_of(p, state, p.linears[0], "test")
    empty = kernel.per_entry(kernel.sums(np.abs(kernel.weight)), before) == 0
    assert (after.scale >= before.scale)[~empty].all()
    assert FitWeightsToBias()(p, fitted).params == fitted.params
    added = weight_error(kernel, after) - weight_error(kernel, before)
    assert (added <= visible_error(kernel, None) * (1 + 1e-9)).all()
    if after.spec.axis is None or p.linears[0].groups > 1:
        return
    # Per channel: at most K Q abs(b_i) / (2 (2**31 - 1 - A_i)), whatever the ratio was.
    k, q = kernel.terms, kernel.swing
    room = INT32_MAX - 1 - kernel.products(before)
    limit = k * q * np.abs(kernel.bias) / (2 * room) * 1.001
    inside = after.spec.symmetric and after.spec.dtype.signed
    assert (weight_error(kernel, after) <= (limit if inside else 2 * limit))[
        (after.scale > before.scale) & ~empty
    ].all()


@pytest.mark.parametrize("other", [0.0, 4.0])
@pytest.mark.parametrize("bias", [0.0, 3.0])
def test_a_node_stays_float_if_nothing_tells_a_scale_for_its_bias(
    other: float, bias: float
) -> None:
    """x was always 0, and so was y, with which it shares its scale; or not."""
    p = linear_problem(np.ones((2, 3, 1, 1)), [bias, 0.0], (0, 0))
    tensors = {
        "y": TensorPlan(name="y", spec=ACTIVATION, source=Observed()),
        "x": TensorPlan(name="x", spec=ACTIVATION, source=Shared("y")),
    }
    ranges = {**p.ranges, "y": TensorRange(0, other)}
    solution = solve(replace(p, tensors={**p.tensors, **tensors}, ranges=ranges), DEFAULT_STEPS)
    assert set(solution.floats) == ({"n"} if bias and not other else set())
