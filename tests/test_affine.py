"""Affine quantization: laws, golden numbers, and bit-equality with the ONNX operators."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from qdq.affine import broadcast, dequantize, fake_quantize, params_from_range, quantize
from qdq.errors import ConfigError
from qdq.ranges import TensorRange
from qdq.spec import INT8, INT16, INT32, UINT8, UINT16, IntType, QuantParams, QuantSpec

TYPES = [INT8, UINT8, INT16, UINT16]
SPECS = [QuantSpec(dtype=t, symmetric=s) for t in TYPES for s in (False, True)]
BIG = float(np.finfo(np.float32).max)

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
specs = st.sampled_from(SPECS)


def span(low: object, high: object) -> TensorRange:
    return TensorRange(np.asarray(low, np.float32), np.asarray(high, np.float32))


@st.composite
def ranges(draw: st.DrawFn) -> TensorRange:
    a, b = draw(floats), draw(floats)
    return span(min(a, b), max(a, b))


# ---- parameters ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "symmetric", "scale", "zero"),
    [
        (UINT8, False, 3 / 255, 85),
        (INT8, False, 3 / 255, -43),
        (INT8, True, 2 / 127, 0),
        (UINT8, True, 4 / 255, 128),
        (UINT16, False, 3 / 65535, 21845),
        (INT16, True, 2 / 32767, 0),
    ],
)
def test_golden_parameters(dtype: IntType, symmetric: bool, scale: float, zero: int) -> None:
    p = params_from_range(span(-1, 2), QuantSpec(dtype=dtype, symmetric=symmetric))
    assert p.scale == np.float32(scale)
    assert p.zero_point == zero
    assert p.scale.dtype == np.float32
    assert p.zero_point.dtype == dtype.dtype


@pytest.mark.parametrize("high", [0.0, 1e-45, 1e-37])
@pytest.mark.parametrize(
    ("dtype", "symmetric", "zero"),
    [(UINT8, False, 0), (INT8, False, 0), (INT8, True, 0), (UINT8, True, 128)],
)
def test_range_without_extent(high: float, dtype: IntType, symmetric: bool, zero: int) -> None:
    p = params_from_range(span(0, high), QuantSpec(dtype=dtype, symmetric=symmetric))
    assert (p.scale, p.zero_point) == (1, zero)


def test_range_is_widened_to_hold_zero() -> None:
    spec = QuantSpec()
    assert params_from_range(span(3, 5), spec) == params_from_range(span(0, 5), spec)
    assert params_from_range(span(-5, -3), spec) == params_from_range(span(-5, 0), spec)


@given(ranges(), ranges(), specs)
def test_per_channel_is_each_channel_alone(a: TensorRange, b: TensorRange, spec: QuantSpec) -> None:
    per_channel = QuantSpec(dtype=spec.dtype, symmetric=spec.symmetric, axis=0)
    both = params_from_range(span([a.low, b.low], [a.high, b.high]), per_channel)
    for i, r in enumerate((a, b)):
        one = params_from_range(r, spec)
        assert both.scale[i] == one.scale
        assert both.zero_point[i] == one.zero_point


@given(st.floats(-60000, 60000, width=32), st.floats(-60000, 60000, width=32), specs)
def test_float16_scale_is_rounded_up(a: float, b: float, spec: QuantSpec) -> None:
    r = span(min(a, b), max(a, b))
    half = params_from_range(r, spec, scale_dtype=np.float16).scale
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    exact = (2 * max(-low, high) if spec.symmetric else high - low) / (spec.qmax - spec.qmin)
    assert half.dtype == np.float16
    if exact >= np.finfo(np.float32).tiny:
        assert float(half) >= exact > float(np.nextafter(half, np.float16(0)))


def test_the_zero_point_goes_with_the_scale_that_was_rounded_up() -> None:
    """3 / 65535 is 768.01 of float16's least steps, 2**-24: 769, and 1 is 2**24 / 769 of these."""
    p = params_from_range(span(-1, 2), QuantSpec(dtype=UINT16), scale_dtype=np.float16)
    assert p.scale == 769 * 2.0**-24
    assert p.zero_point == round(2**24 / 769) == 21817


small = st.floats(-60000, 60000, width=32)


@given(small, small, specs, st.sampled_from([np.float16, np.float32]))
def test_the_low_end_is_half_a_step_from_the_lowest_code(
    a: float, b: float, spec: QuantSpec, dtype: type
) -> None:
    p = params_from_range(span(min(a, b), max(a, b)), spec, scale_dtype=dtype)
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    if spec.symmetric or (high - low) / (spec.qmax - spec.qmin) < np.finfo(np.float32).tiny:
        return
    below = int(p.zero_point) - spec.qmin
    # a float32 scale may be rounded down: 65535 codes then reach 2**-24 * 65535 of a step less far
    assert abs(below + low / float(p.scale)) <= 0.5 + 2**-8 * (dtype == np.float32)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("low", "high"), [(-BIG, BIG), (0, BIG), (-BIG, 0), (-1, BIG)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_widest_ranges_stay_finite(
    spec: QuantSpec, low: float, high: float, dtype: np.dtype[np.floating]
) -> None:
    p = params_from_range(span(low, high), spec, scale_dtype=dtype)
    ends = dequantize(np.array([spec.qmin, spec.qmax], spec.dtype.dtype), p)
    assert np.isfinite(ends.astype(dtype)).all()


def test_scale_dtype_is_checked() -> None:
    with pytest.raises(ConfigError, match="float32 or float16"):
        params_from_range(span(0, 1), QuantSpec(), scale_dtype=np.float64)


# ---- laws ----------------------------------------------------------------------------------


@given(ranges(), specs, st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_error_is_half_a_step_inside_the_range(
    r: TensorRange, spec: QuantSpec, at: list[float]
) -> None:
    p = params_from_range(r, spec)
    low, high = min(float(r.low), 0.0), max(float(r.high), 0.0)
    x = np.clip(
        np.float32(low) * np.float32(at) + np.float32(high) * (1 - np.float32(at)), low, high
    )
    error = np.abs(fake_quantize(x, p).astype(np.float64) - x)
    scale = float(p.scale)
    # float rounding of the quotient and of the product, 2**-24 of the largest code each; the
    # widest ranges of all are narrowed by a code at either end
    slack = 2.0**-22 * (spec.qmax - spec.qmin) + (max(-low, high) > BIG / 2)
    assert (error <= scale * (0.5 + slack)).all()


@given(ranges(), specs)
def test_zero_is_exact(r: TensorRange, spec: QuantSpec) -> None:
    p = params_from_range(r, spec)
    zero = np.zeros(1, np.float32)
    assert quantize(zero, p) == p.zero_point
    assert fake_quantize(zero, p) == 0


@given(ranges(), specs, st.lists(floats, min_size=2, max_size=20))
def test_monotone(r: TensorRange, spec: QuantSpec, values: list[float]) -> None:
    codes = quantize(np.sort(np.float32(values)), params_from_range(r, spec))
    assert (np.diff(codes.astype(np.int64)) >= 0).all()
    assert codes.min() >= spec.qmin


@given(ranges(), specs)
def test_every_code_survives_the_round_trip(r: TensorRange, spec: QuantSpec) -> None:
    p = params_from_range(r, spec)
    codes = np.arange(spec.qmin, spec.qmax + 1).astype(spec.dtype.dtype)
    assert np.array_equal(quantize(dequantize(codes, p), p), codes)


def test_symmetric_int8_never_gives_minus_128() -> None:
    p = params_from_range(span(-1, 1), QuantSpec(dtype=INT8, symmetric=True))
    assert quantize(np.float32([-1e9, -BIG, 1e9]), p).tolist() == [-127, -127, 127]


def test_int32_codes_are_exact() -> None:
    p = QuantParams(QuantSpec(dtype=INT32, symmetric=True), np.float32(2.0**-20), np.int32(0))
    x = np.float64([1.0, -1.0, (2**31 - 1) * 2.0**-20, 1e9, -1e9, 3 * 2.0**-20])
    limit = 2**31 - 1
    assert quantize(x, p).tolist() == [2**20, -(2**20), limit, limit, -limit, 3]
    assert dequantize(np.int32([limit, 5]), p).tolist() == [2048.0, 5 * 2.0**-20]


def test_scalar_and_float16_and_float64_input() -> None:
    p = params_from_range(span(-1, 2), QuantSpec())
    assert quantize(np.float32(2), p).shape == ()
    assert fake_quantize(np.float32(0), p).shape == ()
    for dtype in (np.float16, np.float64):
        assert quantize(np.array([-1, 0, 2], dtype), p).tolist() == [0, 85, 255]
    assert quantize(np.array([1e300, -1e300]), p).tolist() == [255, 0]


def test_input_is_not_changed() -> None:
    p = params_from_range(span(-1, 2), QuantSpec(dtype=INT32, symmetric=True))
    x = np.array([0.3, -0.7])
    quantize(x, p)
    assert x.tolist() == [0.3, -0.7]


# ---- broadcasting --------------------------------------------------------------------------


def test_broadcast() -> None:
    v = np.arange(3)
    assert broadcast(v, 1, 4).shape == (1, 3, 1, 1)
    assert broadcast(v, -1, 2).shape == (1, 3)
    assert broadcast(np.float32(1), None, 4).shape == ()
    with pytest.raises(ConfigError, match="axis 2"):
        broadcast(v, 2, 2)


@pytest.mark.parametrize("shape", [(1, 4), (2, 4), (4, 3)])
def test_misfitting_axis_is_an_error(shape: tuple[int, ...]) -> None:
    p = params_from_range(span([0, 0, 0], [1, 2, 3]), QuantSpec(axis=0))
    with pytest.raises(ConfigError, match="3 scales for axis 0"):
        quantize(np.zeros(shape, np.float32), p)
    with pytest.raises(ConfigError, match="3 scales for axis 0"):
        dequantize(np.zeros(shape, np.uint8), p)


# ---- references ----------------------------------------------------------------------------


def one_node(op: str, x: np.ndarray, p: QuantParams) -> onnx.ModelProto:
    """A model of one QuantizeLinear or DequantizeLinear with constant parameters."""
    code = helper.np_dtype_to_tensor_dtype(p.spec.dtype.dtype)
    types = (TensorProto.FLOAT, code) if op == "QuantizeLinear" else (code, TensorProto.FLOAT)
    axis = {} if p.spec.axis is None else {"axis": p.spec.axis}
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "s", "z"], ["y"], **axis)],
        "g",
        [helper.make_tensor_value_info("x", types[0], x.shape)],
        [helper.make_tensor_value_info("y", types[1], x.shape)],
        [
            onnx.numpy_helper.from_array(np.array(a), n)
            for a, n in ((p.scale, "s"), (p.zero_point, "z"))
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def by_runtime(op: str, x: np.ndarray, p: QuantParams) -> np.ndarray:
    session = ort.InferenceSession(
        one_node(op, x, p).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


def by_reference(op: str, x: np.ndarray, p: QuantParams) -> np.ndarray:
    return ReferenceEvaluator(one_node(op, x, p)).run(None, {"x": x})[0]


def hard_values(p: QuantParams) -> np.ndarray:
    """Ties, their neighbours, random values, and values far outside, for scalar parameters."""
    ties = (np.arange(-300, 300) + 0.5).astype(np.float32) * p.scale
    far = np.float32([0, -0.0, 1e-45, 1, -1, 1e9, -1e9, 1e30, -1e30, BIG, -BIG])
    noise = np.random.default_rng(0).normal(0, 80, 2000).astype(np.float32) * p.scale
    near = [np.nextafter(ties, np.float32(s)) for s in (-BIG, BIG)]
    return np.concatenate([ties, *near, far, noise])


PARAMS = [
    params_from_range(span(low, high), QuantSpec(dtype=t))
    for t in TYPES
    for low, high in (
        (-1, 2),
        (-127.5, 127.5),
        (0, 0.001),
        (-7e8, 1),
        (-2.55, 0),
        (0, 255),
        (0, 1e-30),
    )
]


@pytest.mark.parametrize("p", PARAMS, ids=lambda p: f"{p.spec.dtype}-{p.scale:.3g}-{p.zero_point}")
def test_equal_to_the_operators_per_tensor(p: QuantParams) -> None:
    x = hard_values(p)
    codes = quantize(x, p)
    assert np.array_equal(codes, by_runtime("QuantizeLinear", x, p))
    if p.scale > 1e-20:  # the reference evaluator overflows int on enormous quotients
        inside = x[np.abs(x.astype(np.float64) / p.scale) < 2**30]
        assert np.array_equal(quantize(inside, p), by_reference("QuantizeLinear", inside, p))
    every = np.arange(p.spec.qmin, p.spec.qmax + 1).astype(p.spec.dtype.dtype)
    real = dequantize(every, p)
    assert np.array_equal(real, by_runtime("DequantizeLinear", every, p))
    assert np.array_equal(real, by_reference("DequantizeLinear", every, p))


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1])
@pytest.mark.parametrize("dtype", [INT8, UINT8])
def test_equal_to_the_operators_per_axis(axis: int, dtype: IntType) -> None:
    rng = np.random.default_rng(axis + 1)
    x = rng.normal(0, 3, (2, 3, 4, 5)).astype(np.float32)
    n = x.shape[axis]
    p = params_from_range(
        span(-rng.uniform(0, 3, n), rng.uniform(0, 3, n)), QuantSpec(dtype=dtype, axis=axis)
    )
    codes = quantize(x, p)
    assert np.array_equal(codes, by_runtime("QuantizeLinear", x, p))
    assert np.array_equal(dequantize(codes, p), by_runtime("DequantizeLinear", codes, p))
    assert np.array_equal(dequantize(codes, p), by_reference("DequantizeLinear", codes, p))
