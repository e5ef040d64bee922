"""Channel means: exact in any order; bias correction from them."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any
from weakref import ref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qdq.affine import fake_quantize
from qdq.calibrate.means import _LOWEST, _SPAN, ChannelSum, Means
from qdq.calibrate.reading import Channels
from qdq.errors import CalibrationError
from qdq.problem import Constant, Derived, Linear, Observed, Problem, TensorPlan
from qdq.ranges import TensorRange
from qdq.solve import solve
from qdq.spec import INT8, INT32, UINT8, QuantSpec
from qdq.steps import DEFAULT_STEPS, CorrectBias


def sum_of(x: np.ndarray, axis: int = 1) -> ChannelSum:
    return sums_of([x], axis)


def sums_of(data: Sequence[np.ndarray], axis: int = 1) -> ChannelSum:
    means = Means()
    for x in data:
        means.add(Channels.of({"x": x}, {"x": axis}))
    return means.sums()["x"]


vectors = hnp.arrays(np.float32, (3, 5), elements=st.floats(-(2.0**120), 2.0**120, width=32))


@given(vectors, st.permutations(range(3)))
def test_any_order_gives_the_same_sum(x: np.ndarray, order: list[int]) -> None:
    parts = [sum_of(row[None, :]) for row in x]
    there = parts[0].merge(parts[1]).merge(parts[2])
    a, b, c = (parts[i] for i in order)
    back = a.merge(b.merge(c))
    assert np.array_equal(there.bins, back.bins)
    assert there.mean.tobytes() == back.mean.tobytes()


@given(vectors)
def test_the_mean_is_the_mean(x: np.ndarray) -> None:
    total = sum_of(x[:1]).merge(sum_of(x[1:2])).merge(sum_of(x[2:]))
    exact = x.astype(np.float64).mean(0)
    biggest = np.abs(x.astype(np.float64)).max(0)
    assert np.all(np.abs(total.mean - exact) <= 1e-12 * biggest + 1e-60)


@st.composite
def magnitudes(draw) -> list[float]:
    """Numbers of 24 digits, up to 2**60 apart; more of them than wait to be added up at a time."""
    lowest = draw(st.integers(-149, 36))
    digits = st.integers(-(2**24) + 1, 2**24 - 1)
    pairs = draw(st.lists(st.tuples(digits, st.integers(0, 60)), min_size=1, max_size=40))
    return [float(np.ldexp(n, lowest + more)) for n, more in pairs]


def exact_sum(found: ChannelSum) -> Fraction:
    """What the bins of a single channel hold, in whole numbers."""
    return sum(
        (int(n) * Fraction(2) ** (_LOWEST + _SPAN * k) for k, (n,) in enumerate(found.bins)),
        Fraction(0),
    )


@given(magnitudes(), st.randoms(use_true_random=False))
def test_no_digit_of_a_sum_is_lost_whatever_the_sizes_and_the_order(values, random) -> None:
    wanted = sum(map(Fraction, values), Fraction(0))
    found = sums_of([np.array([[v]], np.float32) for v in values])
    assert exact_sum(found) == wanted
    random.shuffle(values)
    other = sums_of([np.array([[v]], np.float32) for v in values])
    assert np.array_equal(other.bins, found.bins)
    assert exact_sum(found.merge(other)) == 2 * wanted


def test_what_shares_an_integer_is_close_enough_for_all_digits() -> None:
    """Float64 has 53 digits; numbers of 24 digits that are 2**31 apart would ask for 55."""
    large, small = 2.0**31 * (1 - 2.0**-24), 0.5 * (1 + 2.0**-23)
    for exponent in range(-60, 60):  # wherever the integers begin
        values = [float(np.ldexp(v, exponent)) for v in (large, small)]
        found = sums_of([np.array([[v]], np.float32) for v in values])
        assert exact_sum(found) == sum(map(Fraction, values), Fraction(0))


def test_axes_and_weights_of_samples() -> None:
    x = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    assert np.allclose(sum_of(x, 1).mean, x.mean((0, 2, 3)))
    assert np.allclose(sum_of(x, -1).mean, x.mean((0, 1, 2)))


def test_many_samples_are_the_sum_of_each() -> None:
    rng = np.random.default_rng(0)
    data = [(rng.standard_normal((1, 3, 2)) * 10.0 ** (k % 30)).astype(np.float32)
            for k in range(75)]  # fmt: skip
    found, whole = sums_of(data), sum_of(data[0])
    for x in data[1:]:
        whole = whole.merge(sum_of(x))
    assert found.count == whole.count == 75
    assert np.array_equal(found.bins, whole.bins)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 4, 1), (6, 3), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("order", ["C", "F"])
def test_each_channel_has_its_own_range(shape: tuple[int, ...], axis: int, order: Any) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32, order=order)
    found = sums_of([x, x / 2], axis)
    rows = np.moveaxis(np.stack([x, x / 2], -1), axis if axis >= 0 else axis - 1, 0)
    rows = rows.reshape(x.shape[axis], -1)
    assert np.array_equal(found.reach.low, rows.min(1))
    assert np.array_equal(found.reach.high, rows.max(1))
    assert np.allclose(found.mean, rows.mean(1))


def test_a_sample_without_finite_values_is_left_out() -> None:
    found = sums_of([np.array([[v, 1]], np.float32) for v in (0, np.nan, np.inf)])
    assert found.count == 1
    assert found.mean.tolist() == [0, 1]


def test_means_that_wait_do_not_keep_what_they_are_a_part_of() -> None:
    """All that was read of a sample comes in one array."""

    class Array(np.ndarray):
        """One that can be referred to weakly."""

    means, alive = Means(), []
    for k in range(40):
        read = np.full(10_000, k, np.float32).view(Array)
        alive.append(ref(read))
        low, high, mean = read[:3], read[3:6], read[6:9]
        means.add(Channels(("x",), (3,), low, high, mean), k)
        del read, low, high, mean
    assert not any(r() is not None for r in alive)
    assert means.sums()["x"].mean.tolist() == [19.5] * 3


def test_channels_must_not_change() -> None:
    means, axes = Means(), {"w": 1, "x": 1}
    first, other = (
        {"w": np.zeros((1, 2), np.float32), "x": np.zeros((1, size), np.float32)} for size in (3, 4)
    )
    means.add(Channels.of(first, axes), 0)
    with pytest.raises(CalibrationError, match=r"'x' has 4 channels in calibration sample 1"):
        means.add(Channels.of(other, axes), 1)


def test_a_tensor_that_is_left_out_leaves_the_others() -> None:
    """One sample is empty in one tensor and not finite in another."""
    rng = np.random.default_rng(0)
    data = [{n: rng.standard_normal((2, size)).astype(np.float32) for n, size in
             (("a", 3), ("b", 1), ("c", 4))} for _ in range(3)]  # fmt: skip
    data[1]["a"] = np.zeros((0, 3), np.float32)
    data[2]["b"] = np.float32([[np.nan], [0]])
    means, axes = Means(), dict.fromkeys("abc", 1)
    for k, arrays in enumerate(data):
        means.add(Channels.of(arrays, axes), k)
    found = means.sums()
    for name, kept in (("a", (0, 2)), ("b", (0, 1)), ("c", (0, 1, 2))):
        own = sums_of([data[k][name] for k in kept])
        assert found[name].count == own.count == len(kept)
        assert np.array_equal(found[name].bins, own.bins)
        assert found[name].reach == own.reach


def test_a_tensor_that_is_always_left_out_has_no_sum() -> None:
    means = Means()
    arrays = {"a": np.zeros((0, 3), np.float32), "b": np.ones((1, 2), np.float32)}
    means.add(Channels.of(arrays, {"a": 1, "b": 1}))
    assert list(means.sums()) == ["b"]
    assert Means().sums() == {}


@pytest.mark.parametrize(("kind", "groups"), [("conv", 1), ("conv", 2), ("matmul", 1)])
def test_the_mean_error_is_gone(kind: str, groups: int) -> None:
    r = np.random.default_rng(3)
    mean = r.uniform(0.5, 2.0, 6)
    if kind == "conv":
        weight = r.standard_normal((4, 6 // groups, 3, 3)).astype(np.float32)
        per_group = np.repeat(mean.reshape(groups, -1), 4 // groups, axis=0)  # row i's channels
        expected = lambda w: np.einsum("mckl,mc->m", w.astype(np.float64), per_group)  # noqa: E731
    else:
        weight = r.standard_normal((6, 4)).astype(np.float32)
        expected = lambda w: mean @ w.astype(np.float64)  # noqa: E731
    w_spec = QuantSpec(dtype=INT8, symmetric=True, axis=0 if kind == "conv" else 1)
    b_spec = QuantSpec(dtype=INT32, symmetric=True, axis=0)
    problem = Problem(
        tensors={
            "x": TensorPlan(name="x", spec=QuantSpec(dtype=UINT8), source=Observed()),
            "w": TensorPlan(name="w", spec=w_spec, source=Constant()),
            "b": TensorPlan(name="b", spec=b_spec, source=Derived("n")),
        },
        linears=(
            Linear(node="n", input="x", weight="w", bias="b", kind=kind, groups=groups),  # type: ignore[arg-type]
        ),
        ranges={"x": TensorRange(0, 3)},
        constants={"w": weight, "b": np.zeros(4, np.float32)},
        means={"x": mean},
    )
    solution = solve(problem, DEFAULT_STEPS)
    rounded = fake_quantize(weight, solution.params["w"])
    before = expected(weight) - expected(rounded)
    after = before - solution.constants["b"]
    assert np.abs(before).max() > 1e-3
    assert np.abs(after).max() < 1e-6
    without = solve(problem, tuple(s for s in DEFAULT_STEPS if not isinstance(s, CorrectBias)))
    assert "b" not in without.constants


def test_the_bias_of_a_transposed_convolution_is_left_alone() -> None:
    """How many taps an output sees depends on its stride, so a sum over all of them is wrong."""
    weight = np.random.default_rng(3).standard_normal((4, 4, 3, 3)).astype(np.float32)
    tensors = {
        "x": TensorPlan(name="x", spec=QuantSpec(dtype=UINT8), source=Observed()),
        "w": TensorPlan(name="w", spec=QuantSpec(dtype=INT8, symmetric=True), source=Constant()),
        "b": TensorPlan(name="b", spec=QuantSpec(dtype=INT32, symmetric=True), source=Derived("n")),
    }

    def corrected(kind: str) -> bool:
        linear = Linear(node="n", input="x", weight="w", bias="b", kind=kind)  # type: ignore[arg-type]
        problem = Problem(
            tensors=tensors,
            linears=(linear,),
            ranges={"x": TensorRange(0, 3)},
            constants={"w": weight, "b": np.zeros(4, np.float32)},
            means={"x": np.ones(4)},
        )
        return "b" in solve(problem, DEFAULT_STEPS).constants

    assert corrected("conv")
    assert not corrected("conv_transpose")
