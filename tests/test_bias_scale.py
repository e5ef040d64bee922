"""int32 accumulators: headroom, bias scales, and the kernels of onnxruntime themselves."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qdq.affine import fake_quantize, params_from_range, quantize
from qdq.bias_scale import (
    INT32_MAX,
    bias_scale,
    quantize_bias,
    round_up,
    with_scale,
)
from qdq.errors import SolveError
from qdq.kernel import Kernel, raise_scale
from qdq.problem import Linear
from qdq.ranges import TensorRange
from qdq.spec import INT8, INT16, INT32, UINT8, UINT16, QuantParams, QuantSpec
from qdq.steps.fit_weights import visible_error

INPUTS = (
    QuantSpec(dtype=UINT8),
    QuantSpec(dtype=INT8),
    QuantSpec(dtype=INT8, symmetric=True),
    QuantSpec(dtype=UINT8, symmetric=True),
)


def rows_of(weight: np.ndarray, kind: str, groups: int) -> list[list[np.ndarray]]:
    """Per output channel the rows of products, one by one and straight from the definition."""
    if kind == "conv":
        return [[w.reshape(-1)] for w in weight]
    if kind == "matmul":
        batches = weight.reshape(-1, *weight.shape[-2:])
        return [[b[:, i] for b in batches] for i in range(weight.shape[-1])]
    size = weight.shape[0] // groups
    return [
        [weight[g * size : (g + 1) * size, j].reshape(-1)]
        for g in range(groups)
        for j in range(weight.shape[1])
    ]


def worst_sums(weight_codes: np.ndarray, w_zero: np.ndarray, x: QuantParams, kind, groups):
    """Largest and smallest sum of products of each channel, over all input codes of the type."""
    centred = weight_codes.astype(np.int64) - w_zero
    low = x.spec.dtype.min - int(x.zero_point)
    high = x.spec.dtype.max - int(x.zero_point)
    rows = rows_of(centred, kind, groups)
    most = [max(int(np.where(r > 0, r * high, r * low).sum()) for r in c) for c in rows]
    least = [min(int(np.where(r > 0, r * low, r * high).sum()) for r in c) for c in rows]
    return np.array(most), np.array(least)


@st.composite
def kernels(draw):
    """A random linear node with the plain parameters of its weight."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["conv", "conv_transpose", "matmul"]))
    groups = draw(st.integers(1, 3)) if kind != "matmul" else 1
    if kind == "conv":
        shape, axis = (2 * groups, draw(st.integers(1, 40)), 3), 0
    elif kind == "conv_transpose":
        shape, axis = (2 * groups, draw(st.integers(1, 4)), 3), 1
    else:
        batch = draw(st.sampled_from([(), (2,)]))
        shape = (*batch, draw(st.integers(1, 60)), draw(st.integers(1, 4)))
        axis = len(shape) - 1
    magnitude = 10.0 ** draw(st.integers(-12, 3))
    weight = rng.normal(0, magnitude, shape).astype(np.float32)
    weight *= rng.random(shape) < 0.8
    if draw(st.booleans()):
        np.moveaxis(weight, axis, 0)[0] = 0
    channels = shape[1] * groups if kind == "conv_transpose" else shape[axis]
    bias = rng.normal(0, 10.0 ** draw(st.integers(-12, 3)), channels).astype(np.float32)
    bias *= rng.random(channels) < 0.8
    edge = 10.0 ** draw(st.integers(-12, 3))
    low, high = sorted(rng.uniform(-edge, edge, 2))
    x = params_from_range(TensorRange(low, high), draw(st.sampled_from(INPUTS)))
    spec = QuantSpec(
        dtype=draw(st.sampled_from([INT8, UINT8])),
        symmetric=draw(st.booleans()),
        axis=axis if draw(st.booleans()) else None,
    )
    rest = None if spec.axis is None else tuple(a for a in range(len(shape)) if a != axis)
    w = params_from_range(TensorRange(weight.min(rest), weight.max(rest)), spec)
    linear = Linear(node="n", input="x", weight="w", bias="b", kind=kind, groups=groups)
    return Kernel.of(linear, x, weight, bias), w, bias


@given(kernels())
def test_products_are_the_largest_sums_of_the_rounded_weights(case) -> None:
    kernel, w, _ = case
    aligned = w.zero_point if w.spec.axis is None else _along(w.zero_point, w, kernel.weight.ndim)
    most, least = worst_sums(
        quantize(kernel.weight, w), aligned, kernel.x, kernel.linear.kind, kernel.linear.groups
    )
    found = kernel.products(w)
    assert (found >= np.maximum(most, -least)).all()
    # The bound takes the longer side of the input's codes for every weight.
    span = kernel.x.spec.dtype.max - kernel.x.spec.dtype.min
    assert (found <= np.maximum(most, -least) * 2 * kernel.swing / span * 2 + 1e-9).all()


@given(kernels())
def test_no_sum_can_leave_int32_after_a_raise(case) -> None:
    kernel, w, bias = case
    raised = raise_scale(kernel, w)
    assert raised is not None
    assert (raised.scale >= w.scale).all()
    assert np.array_equal(raised.zero_point, w.zero_point)
    aligned = w.zero_point if w.spec.axis is None else _along(w.zero_point, w, kernel.weight.ndim)
    most, least = worst_sums(
        quantize(kernel.weight, raised), aligned, kernel.x, kernel.linear.kind, kernel.linear.groups
    )
    scale = np.ravel(bias_scale(kernel.x, raised)).astype(np.float64)
    scale = scale[np.arange(bias.size) % scale.size] if scale.size > 1 else scale[0]
    codes = np.rint(bias.astype(np.float64) / scale)
    assert (most + codes <= INT32_MAX).all()
    assert (least + codes >= -INT32_MAX).all()
    assert raise_scale(kernel, raised) is raised


@given(kernels())
def test_a_raise_is_as_small_as_the_weights_allow(case) -> None:
    """Without its last part in 500 the scale would not hold, or it was not raised at all."""
    kernel, w, _ = case
    raised = raise_scale(kernel, w)
    assert raised is not None
    grown = raised.scale > w.scale
    if not grown.any():
        return
    less = np.maximum(raised.scale * np.float32(1 - 2**-9), w.scale)
    over = kernel.load(with_scale(w, less)) > INT32_MAX
    entry = kernel.entries(w)
    tight = np.zeros(w.scale.size, bool)
    np.logical_or.at(tight, entry, over)
    assert tight.reshape(grown.shape)[grown].all()


@given(kernels())
def test_a_raised_scale_still_holds_the_weights(case) -> None:
    kernel, w, _ = case
    raised = raise_scale(kernel, w)
    assert raised is not None
    step = _along(raised.scale, raised, kernel.weight.ndim)
    error = np.abs(fake_quantize(kernel.weight, raised).astype(np.float64) - kernel.weight)
    # Half a step inside the range; half a step more where its ends are no codes.
    limit = 0.5 if w.spec.symmetric and w.spec.dtype.signed else 1.0
    assert (error <= step * limit * (1 + 1e-5)).all()


def _along(values: np.ndarray, w: QuantParams, ndim: int) -> np.ndarray:
    if w.spec.axis is None:
        return values
    shape = [1] * ndim
    shape[w.spec.axis] = -1
    return values.reshape(shape)


def scalar(scale: float, zero: int = 0, spec: QuantSpec | None = None) -> QuantParams:
    spec = spec or QuantSpec(dtype=UINT8)
    return QuantParams(spec, np.float32(scale), np.array(zero))


WEIGHT = QuantSpec(dtype=INT8, symmetric=True)
NODE = Linear(node="n", input="x", weight="w", bias="b", kind="conv")


@pytest.mark.parametrize("f", [0.5, 0.99, 0.9999, 1.01, 40.0])
def test_headroom_of_a_576_term_convolution(f: float) -> None:
    """Weights at full scale, x in [0.9, 1], a bias at f times the int32 range."""
    x, w = scalar(1 / 255), scalar(1e-9, spec=WEIGHT)
    weight = np.full((1, 64, 3, 3), 127e-9, np.float32)
    bias = np.array([f * INT32_MAX * float(x.scale) * float(w.scale)], np.float32)
    kernel = Kernel.of(NODE, x, weight, bias)
    raised = raise_scale(kernel, w)
    assert raised is not None
    assert (raised is w) == (f < 0.99132)  # 1 - 576 * 255 * 127 / 2**31 = 0.991314
    rng = np.random.default_rng(0)
    real = rng.uniform(0.9, 1, (32, 576)).astype(np.float32)
    scale = float(bias_scale(x, raised))
    wq = quantize(weight, raised).astype(np.int64).reshape(-1)
    acc = quantize(real, x).astype(np.int64) @ wq + np.rint(np.float64(bias[0]) / scale)
    assert np.abs(acc).max() <= INT32_MAX
    exact = real.astype(np.float64) @ weight.reshape(-1).astype(np.float64) + bias[0]
    # The part that any quantization of x and w costs, and half a quantum of the bias.
    step = 576 * (127e-9 / 510 + float(raised.scale) / 2 * (f > 0.99132)) + scale / 2
    assert np.abs(acc * scale - exact).max() <= step * 1.001
    if f < 2:
        assert np.abs(acc * scale - exact).max() <= 1e-6


def test_the_worst_matrix_of_a_batch_counts() -> None:
    node = Linear(node="n", input="x", weight="w", bias=None, kind="matmul")
    weight = np.stack([np.ones((4, 3)), np.zeros((4, 3)), np.eye(4, 3)]).astype(np.float32)
    kernel = Kernel.of(node, scalar(1.0), weight, None)
    assert kernel.products(scalar(1.0, spec=WEIGHT)).tolist() == [4 * 255] * 3


def test_a_kernel_without_bias_and_70000_terms_gets_room_too() -> None:
    node = Linear(node="n", input="x", weight="w", bias=None, kind="matmul")
    weight = np.full((70_000, 1), 127, np.float32)
    kernel = Kernel.of(node, scalar(1.0), weight, None)
    w = scalar(1.0, spec=WEIGHT)
    assert kernel.load(w)[0] == 70_000 * 127 * 255 > INT32_MAX
    raised = raise_scale(kernel, w)
    assert raised is not None
    assert kernel.load(raised)[0] <= INT32_MAX
    assert 1 < raised.scale < 1.2


@pytest.mark.parametrize(
    ("dtype", "zero", "farthest"),
    [(UINT8, 0, 255), (UINT8, 100, 155), (UINT8, 128, 128), (UINT8, 255, 255), (INT8, 0, 128),
     (INT8, -128, 255), (INT8, 127, 255)],
)  # fmt: skip
def test_products_count_the_code_farthest_from_the_zero_point(dtype, zero, farthest) -> None:
    x = scalar(1.0, zero, QuantSpec(dtype=dtype))
    kernel = Kernel.of(NODE, x, np.array([[[2.0, -3.0]]], np.float32), None)
    assert kernel.swing == farthest
    assert kernel.products(scalar(1.0, spec=WEIGHT)).tolist() == [5 * farthest]


def test_a_raise_beside_signed_inputs_is_the_least_that_holds() -> None:
    """576 weights of code 127 leave a bias 0.436 % less than int32, at codes up to 128 away."""
    x, w = scalar(1.0, spec=QuantSpec(dtype=INT8, symmetric=True)), scalar(1.0, spec=WEIGHT)
    weight = np.full((1, 64, 3, 3), 127, np.float32)
    room = INT32_MAX - 576 * 127 * 128

    def raised(bias: float) -> QuantParams | None:
        return raise_scale(Kernel.of(NODE, x, weight, np.array([bias])), w)

    assert raised(room) is w
    found = raised(1.002 * 2**31)
    assert found is not None
    # 127 / 1.0063 is rounded to 126
    assert found.scale == pytest.approx(1.002 * 2**31 / (2**31 - 576 * 126 * 128), rel=1e-6)


def test_asymmetric_signed_weights_count_from_their_zero_point() -> None:
    """Codes of 127 with the zero point -128: each product reaches 255 * 255, not 127 * 255."""
    node = Linear(node="n", input="x", weight="w", bias=None, kind="matmul")
    w = scalar(1.0, -128, QuantSpec(dtype=INT8))
    kernel = Kernel.of(node, scalar(1.0), np.full((40_000, 1), 255, np.float32), None)
    assert kernel.load(w).tolist() == [40_000 * 255 * 255]  # twice as much as there is room
    raised = raise_scale(kernel, w)
    assert raised is not None
    assert 40_000 * round(255 / float(raised.scale)) * 255 <= INT32_MAX


def test_where_products_alone_fill_int32_weights_that_round_up_fit_too() -> None:
    """At the scale that leaves just their real sum, 70413 weights of 119.6 steps become 120."""
    node = Linear(node="n", input="x", weight="w", bias=None, kind="matmul")
    kernel = Kernel.of(node, scalar(1.0), np.full((70_413, 1), 127, np.float32), None)
    assert 70_413 * 119.6 * 255 < INT32_MAX + 1 < 70_413 * 120 * 255
    raised = raise_scale(kernel, scalar(1.0, spec=WEIGHT))
    assert raised is not None
    half_a_step_each = 70_413 * 255 / 2
    wanted = 70_413 * 127 * 255 / (INT32_MAX - half_a_step_each)
    assert raised.scale == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(("x_type", "w_type"), [(UINT16, INT8), (UINT8, INT16)])
def test_16_bit_types_need_no_room_for_products_but_their_bias_must_fit(x_type, w_type) -> None:
    x = scalar(1e-4, spec=QuantSpec(dtype=x_type))
    w = scalar(1e-4, spec=QuantSpec(dtype=w_type, symmetric=True))
    weight = np.full((1, 5000, 1, 1), 1e-4 * w_type.max, np.float32)
    small = Kernel.of(NODE, x, weight, np.array([1.0], np.float32))
    assert raise_scale(small, w) is w
    large = Kernel.of(NODE, x, weight, np.array([100.0], np.float32))
    raised = raise_scale(large, w)
    assert raised is not None
    assert raised.scale == pytest.approx(100 / (1e-4 * INT32_MAX), rel=1e-5)


@pytest.mark.parametrize("size", [1e-25, 1e-20], ids=["their product is 0", "it is subnormal"])
def test_a_bias_scale_below_the_normal_numbers_is_raised(size: float) -> None:
    x, w = scalar(size), scalar(size, spec=WEIGHT)
    weight = np.full((1, 1, 1), 100 * size, np.float32)
    kernel = Kernel.of(NODE, x, weight, np.zeros(1, np.float32))
    raised = raise_scale(kernel, w)
    assert raised is not None
    assert bias_scale(x, raised) >= np.finfo(np.float32).tiny
    assert bias_scale(x, raised) < 1.001 * np.finfo(np.float32).tiny


def test_none_where_no_scale_of_the_type_holds() -> None:
    half = np.float16(6e-8)
    x = QuantParams(QuantSpec(dtype=UINT8), half, np.array(0))
    w = QuantParams(WEIGHT, half, np.array(0))
    kernel = Kernel.of(NODE, x, np.zeros((1, 1, 1), np.float16), np.array([6e4], np.float16))
    assert raise_scale(kernel, w) is not None
    wide = Kernel.of(NODE, scalar(1e-38), np.zeros((1, 1, 1)), np.array([3e38]))
    assert raise_scale(wide, scalar(1.0, spec=WEIGHT)) is None


def test_an_error_is_seen_from_half_a_step_of_the_output_or_of_the_channels_own_size() -> None:
    """Inputs up to 2.55 make the two channels up to 5.1 and 3 * 2.55 + 2.55 large."""
    weight = np.array([[[1.0, -1.0]], [[3.0, 0.0]]], np.float32)
    kernel = Kernel.of(NODE, scalar(0.01), weight, np.array([0.0, -2.55]))
    assert visible_error(kernel, None) == pytest.approx([5.1 / 510, 10.2 / 510])
    for step, wanted in ((0.001, [0.01, 0.02]), (0.03, [0.015, 0.02]), (0.1, [0.05, 0.05])):
        assert visible_error(kernel, scalar(step)) == pytest.approx(wanted)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 3), (2, 3), (2, 1)])
def test_a_bias_of_any_shape_counts_with_its_largest_value_per_channel(shape) -> None:
    node = Linear(node="n", input="x", weight="w", bias="b", kind="matmul")
    bias = np.arange(-1, int(np.prod(shape)) - 1).reshape(shape).astype(np.float32)
    kernel = Kernel.of(node, scalar(1.0), np.ones((4, 3), np.float32), bias)
    wanted = [max(abs(v) for v in np.broadcast_to(bias, (2, 3))[:, i]) for i in range(3)]
    assert kernel.bias.tolist() == wanted


def test_shapes_that_do_not_fit_are_refused_with_their_names() -> None:
    node = Linear(node="fc", input="x", weight="w", bias="fc.bias", kind="matmul")
    with pytest.raises(SolveError, match=r"shape \(4,\) does not broadcast to 3") as caught:
        Kernel.of(node, scalar(1.0), np.ones((5, 3), np.float32), np.ones(4, np.float32))
    assert caught.value.tensor == "fc.bias"
    assert caught.value.node == "fc"
    many = QuantParams(QuantSpec(axis=0), np.ones(2, np.float32), np.zeros(2, np.uint8))
    with pytest.raises(SolveError, match="2 scales; an integer kernel wants one"):
        Kernel.of(node, many, np.ones((5, 3), np.float32), None)
    wrong = QuantParams(QuantSpec(dtype=INT8, symmetric=True, axis=0), np.ones(5), np.zeros(5))
    with pytest.raises(SolveError, match=r"scales on axis 0; a matmul kernel has .* on axis 1"):
        Kernel.of(node, scalar(1.0), np.ones((5, 3)), np.ones(3)).entries(wrong)


@given(st.floats(1e-12, 6e4), st.sampled_from([np.float16, np.float32]))
def test_round_up_is_the_next_number_of_the_type(x: float, kind: type) -> None:
    found = round_up(np.array(x), np.dtype(kind))
    assert found.dtype == kind
    assert float(found) >= x
    assert float(np.nextafter(found, kind(-np.inf))) < x


@given(st.lists(st.floats(-2e9, 2e9), min_size=1, max_size=5), st.floats(0.6, 50))
def test_bias_codes_are_rounded_in_float64_and_clipped(values, scale: float) -> None:
    spec = QuantSpec(dtype=INT32, symmetric=True)
    params = QuantParams(spec, np.float32(scale), np.array(0))
    codes = quantize_bias(np.array(values), params)
    exact = [round(v / float(params.scale)) for v in values]
    assert codes.dtype == np.int32
    assert codes.tolist() == [min(max(e, -INT32_MAX), INT32_MAX) for e in exact]


def test_bias_codes_take_the_scale_of_their_channel() -> None:
    spec = QuantSpec(dtype=INT32, symmetric=True, axis=1)
    params = QuantParams(spec, np.array([1.0, 0.5], np.float32), np.zeros(2))
    bias = np.array([[4.0, 4.0], [-1.0, 2.5]], np.float32)
    assert quantize_bias(bias, params).tolist() == [[4, 8], [-1, 5]]


def conv_model(x: QuantParams, w: QuantParams, weight, bias, y: QuantParams) -> onnx.ModelProto:
    """Q -> DQ -> Conv(DQ weight, DQ int32 bias) -> Q -> DQ, by hand."""
    b = QuantParams(QuantSpec(dtype=INT32, symmetric=True), bias_scale(x, w), np.array(0))
    arrays = {
        "xs": x.scale, "xz": x.zero_point, "ws": w.scale, "wz": w.zero_point,
        "wq": quantize(weight, w), "bs": b.scale, "bq": quantize_bias(bias, b),
        "ys": y.scale, "yz": y.zero_point,
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"]),
        helper.make_node("DequantizeLinear", ["bq", "bs"], ["bd"]),
        helper.make_node("Conv", ["xd", "wd", "bd"], ["c"]),
        helper.make_node("QuantizeLinear", ["c", "ys", "yz"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "ys", "yz"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "conv",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, *weight.shape[1:]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 21)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def run_conv(model: onnx.ModelProto, real: np.ndarray, level: str) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": real})[0]


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
@pytest.mark.parametrize("f", [0.5, 0.9999, 1.01])
def test_onnxruntime_gives_the_float_result_fused_or_not(level: str, f: float) -> None:
    x, w = scalar(1 / 255), scalar(1e-9, spec=WEIGHT)
    weight = np.full((1, 64, 3, 3), 127e-9, np.float32)
    bias = np.array([f * INT32_MAX * float(x.scale) * float(w.scale)], np.float32)
    raised = raise_scale(Kernel.of(NODE, x, weight, bias), w)
    assert raised is not None
    real = np.random.default_rng(1).uniform(0.9, 1, (1, 64, 3, 3)).astype(np.float32)
    exact = float(bias[0]) + float(np.sum(real.astype(np.float64) * weight))
    y = scalar(exact / 250)
    found = run_conv(conv_model(x, raised, weight, bias, y), real, level)
    assert found.reshape(()) == pytest.approx(exact, abs=float(y.scale) / 2 + 1e-6)


def test_onnxruntime_wraps_without_the_raise() -> None:
    """What the headroom is for: a bias that fits int32 by itself, and no room beside it."""
    x, w = scalar(1 / 255), scalar(1e-9, spec=WEIGHT)
    weight = np.full((1, 64, 3, 3), 127e-9, np.float32)
    bias = np.array([0.9999 * INT32_MAX * float(x.scale) * float(w.scale)], np.float32)
    real = np.ones((1, 64, 3, 3), np.float32)
    y = scalar(float(bias[0]) / 250)
    model = conv_model(x, w, weight, bias, y)
    plain = run_conv(model, real, "ORT_DISABLE_ALL").reshape(())
    fused = run_conv(model, real, "ORT_ENABLE_ALL").reshape(())
    assert plain == pytest.approx(float(bias[0]), rel=0.01)
    assert fused < 0.1 * plain
