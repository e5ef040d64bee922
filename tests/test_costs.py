"""The table's laws, and that it answers the questions it was measured for."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdq.ops.demand import NodeView, TensorView
from qdq.placement.costs import (
    FLOAT,
    INT8,
    Features,
    conv_kind,
    dequantize_cost,
    float_cost,
    in_blocks,
    int8_cost,
    quantize_cost,
    reorder_cost,
)
from qdq.placement.weighing import features_of, kind_of

sizes = st.integers(1, 1 << 20)


def conv(cin, cout, side, k=1, groups=1):
    kind = conv_kind(channels_in=cin, channels_out=cout, groups=groups, taps=k * k)
    features = Features(
        inputs=cin * side * side,
        outputs=cout * side * side,
        channels_in=cin,
        channels_out=cout,
        taps=k * k,
        rows=k,
        groups=groups,
        weights=cin * cout // groups * k * k,
    )
    return kind, features


def saves(cin, cout, side, k=1, groups=1):
    """What one convolution on integers saves, between float convolutions."""
    kind, f = conv(cin, cout, side, k, groups)
    borders = quantize_cost(f.inputs, blocked=in_blocks(f.inputs, cin), int8_conv=True)
    borders += dequantize_cost(f.outputs, blocked=in_blocks(f.outputs, cout), int8_conv=True)
    return float_cost(kind, f) - int8_cost(kind, f) - borders


@given(st.sampled_from(sorted(FLOAT)), sizes, st.booleans())
def test_a_float_cost_is_finite_and_grows_with_the_tensor(kind, n, beside):
    small = float_cost(kind, Features(inputs=n, outputs=n, beside_conv=beside))
    large = float_cost(kind, Features(inputs=2 * n, outputs=2 * n, beside_conv=beside))
    assert 0 <= small <= large < math.inf


@given(st.sampled_from(sorted(INT8)), sizes, st.booleans())
def test_an_int8_cost_is_finite_and_grows_with_the_tensor(kind, n, beside):
    small = int8_cost(kind, Features(inputs=n, outputs=n, beside_conv=beside))
    large = int8_cost(kind, Features(inputs=2 * n, outputs=2 * n, beside_conv=beside))
    assert 0 <= small <= large < math.inf


@pytest.mark.parametrize(("cost"), [quantize_cost, dequantize_cost])
@given(n=sizes)
def test_a_border_costs_more_where_the_layout_changes(cost, n):
    plain = cost(n)
    assert 0 < plain < cost(n, int8_conv=True) < cost(n, int8_conv=True, blocked=n)
    assert cost(n, blocked=n) == plain + reorder_cost(n)


@pytest.mark.parametrize(("channels", "filled"), [(1, 16), (8, 16), (16, 16), (24, 32), (72, 80)])
def test_blocks_are_filled_up(channels, filled):
    assert in_blocks(100 * channels, channels) == 100 * filled


def test_no_integer_kernel_costs_infinity_and_no_float_kernel_the_default():
    f = Features(inputs=1000, outputs=1000)
    assert int8_cost("Tanh", f) == math.inf
    assert int8_cost("Relu", f) == math.inf
    assert int8_cost("NoSuchOperator", f) == math.inf
    assert 0 < float_cost("NoSuchOperator", f) < math.inf


def test_every_integer_kernel_has_a_float_twin():
    assert set(INT8) <= set(FLOAT)


@pytest.mark.parametrize(
    ("cin", "cout", "groups", "taps", "kind"),
    [
        (64, 32, 1, 9, "Conv.dense"),
        (64, 32, 2, 9, "Conv.grouped"),
        (64, 32, 1, 1, "Conv.pointwise"),
        (64, 12, 1, 1, "Conv.pointwise.few"),
        (64, 64, 64, 9, "Conv.depthwise"),
        (64, 64, 64, 1, "Conv.depthwise.tap"),
        (64, 128, 64, 9, "Conv.grouped"),
        (3, 16, 1, 9, "Conv.narrow"),
        (1, 16, 1, 9, "Conv.narrow"),
        (4, 4, 4, 9, "Conv.depthwise"),
        (58, 58, 58, 9, "Conv.depthwise.plain"),
        (1, 1, 1, 9, "Conv.depthwise"),
        (64, 64, 8, 1, "Conv.grouped"),
    ],
)
def test_conv_kinds(cin, cout, groups, taps, kind):
    assert conv_kind(channels_in=cin, channels_out=cout, groups=groups, taps=taps) == kind


# each gave files slower than float when it was taken for dense
@pytest.mark.parametrize(
    ("cin", "cout", "side", "k", "groups"),
    [(128, 128, 56, 3, 32), (64, 64, 56, 3, 16), (32, 64, 56, 3, 32), (1, 1, 100, 16, 1)],
    ids=["ResNeXt", "four channels a group", "depthwise with two outputs", "one to one"],
)
def test_where_integer_convolutions_lose(cin, cout, side, k, groups):
    kind, f = conv(cin, cout, side, k, groups)
    assert int8_cost(kind, f) > 1.5 * float_cost(kind, f)


def test_a_depthwise_convolution_over_one_dimension_wins():
    f = conv(256, 256, 22, 3, groups=256)[1]
    shape = {"channels_in": 256, "channels_out": 256, "groups": 256, "taps": 9}
    plane, line = conv_kind(**shape), conv_kind(**shape, rank=3)
    assert int8_cost(plane, f) > float_cost(plane, f)
    assert int8_cost(line, f) < 0.5 * float_cost(line, f)


def volume(cin, cout, taps, groups=1, side=10):
    kind = conv_kind(channels_in=cin, channels_out=cout, groups=groups, taps=taps, rank=5)
    size = side**3
    weights = cin * cout // groups * taps
    return kind, Features(
        inputs=cin * size, outputs=cout * size, channels_in=cin, channels_out=cout, taps=taps,
        groups=groups, weights=weights,
    )  # fmt: skip


def test_volumes():
    stem, odd, inner = volume(3, 32, 27), volume(6, 32, 27), volume(64, 64, 27)
    point, depthwise = volume(64, 64, 1), volume(64, 64, 27, groups=64)
    kinds = [kind for kind, _ in (stem, odd, inner, point, depthwise)]
    wanted = ["gathered", "gathered", "volume", "pointwise", "depthwise.volume"]
    assert kinds == [f"Conv.{kind}" for kind in wanted]
    # a stem over a volume was six times as slow on integers, and taken for faster
    assert int8_cost(*stem) > 2 * float_cost(*stem)
    assert int8_cost(*inner) < 0.5 * float_cost(*inner)


def test_ragged_depthwise_convolutions_are_slow_in_float():
    whole, ragged = conv(164, 164, 56, 3, groups=164), conv(162, 162, 56, 3, groups=162)
    assert int8_cost(*whole) > float_cost(*whole)
    assert int8_cost(*ragged) < 0.7 * float_cost(*ragged)


def test_wide_groups_win():
    kind, f = conv(64, 64, 56, 3, 2)
    assert int8_cost(kind, f) < 0.7 * float_cost(kind, f)


def test_one_column_is_slow_in_float():
    shapes = {"x": (1, 16, 127, 1), "w": (16, 16, 64, 1), "y": (1, 16, 64, 1)}
    view = NodeView(
        name="c",
        op_type="Conv",
        inputs=(TensorView(name="x"), TensorView(name="w", constant=True)),
        outputs=("y",),
    )
    kind, flat = "Conv.dense", features_of(view, ("y",), shapes.get)
    assert flat.flat
    # measured 32 and 8 µs
    assert 2.5 < float_cost(kind, flat) / int8_cost(kind, flat) < 5
    assert float_cost(kind, flat) > 1.8 * float_cost(kind, replace(flat, flat=False))


def test_few_outputs_gain_less():
    ratio = {n: int8_cost(*conv(64, n, 56, 3)) / float_cost(*conv(64, n, 56, 3)) for n in (8, 64)}
    assert ratio[64] < 0.6 * ratio[8]


@pytest.mark.parametrize(
    ("cin", "cout", "side", "measured"),
    [
        (32, 3, 128, 1.0),
        (64, 18, 64, 0.6),
        (64, 20, 64, 0.32),
        (34, 32, 64, 0.36),
        (36, 32, 64, 0.3),
    ],
)
def test_integer_convolutions_want_channels_in_fours(cin, cout, side, measured):
    """Else they copy each window; measured on an Intel Xeon, int8 over float."""
    expected = int8_cost(*conv(cin, cout, side, 3)) / float_cost(*conv(cin, cout, side, 3))
    assert 0.7 < expected / measured < 1.3
    # over volumes they gather it tap by tap
    slow, fast = volume(32, cout - cout % 4 + 17, 27), volume(32, cout - cout % 4 + 16, 27)
    assert int8_cost(*slow) > 1.5 * int8_cost(*fast)


@pytest.mark.parametrize(
    ("cin", "cout", "side", "measured"),
    [(8, 8, 128, 72), (8, 1, 128, 66), (24, 4, 128, 61), (16, 16, 128, 41), (64, 1, 128, 63)],
)
def test_few_results_are_rounded_one_by_one(cin, cout, side, measured):
    """Integer pointwise convolutions, µs on an Intel Xeon."""
    assert 0.7 < int8_cost(*conv(cin, cout, side)) / 1e3 / measured < 1.5


@pytest.mark.parametrize(
    ("channels", "side", "k", "in_float", "on_integers"),
    [
        (8, 128, 3, 36, 163),
        (24, 128, 3, 98, 276),
        (72, 56, 3, 46, 126),
        (80, 56, 3, 46, 61),
        (16, 128, 1, 27, 69),  # what is left of a BatchNormalization
        (32, 128, 5, 138, 398),
    ],
)
def test_depthwise_convolutions_fill_blocks(channels, side, k, in_float, on_integers):
    """µs on an Intel Xeon; the integer kernels have no blocks to fill, but want whole ones."""
    kind, f = conv(channels, channels, side, k, channels)
    assert 0.7 < float_cost(kind, f) / 1e3 / in_float < 1.3
    assert 0.7 < int8_cost(kind, f) / 1e3 / on_integers < 1.3


@pytest.mark.parametrize(("kind", "measured"), [("Add", 374), ("Concat", 676), ("Transpose", 472)])
def test_beyond_the_caches_memory_sets_the_pace(kind, measured):
    """1.6 million elements, µs on an Intel Xeon."""
    n = 1_638_400
    f = Features(inputs=n, outputs=2 * n if kind == "Concat" else n)
    assert 0.6 < float_cost(kind, f) / 1e3 / measured < 1.2
    assert float_cost(kind, f) > 1.4 * FLOAT[kind].output * f.outputs


def test_macs():
    assert conv(64, 128, 10, 3)[1].macs == 100 * 128 * 64 * 9
    assert conv(64, 64, 10, 3, groups=64)[1].macs == 100 * 64 * 9


@pytest.mark.parametrize(
    ("cin", "cout", "side", "k"), [(64, 64, 56, 3), (256, 256, 14, 3), (256, 256, 40, 1)]
)
def test_a_convolution_of_a_large_network_pays_even_alone(cin, cout, side, k):
    assert saves(cin, cout, side, k) > 0


@pytest.mark.parametrize(
    ("cin", "cout", "side", "k", "groups"),
    [
        (16, 16, 10, 1, 1),  # tiny
        (8, 8, 10, 3, 1),
        (16, 96, 112, 1, 1),  # few operations per element
        (64, 64, 56, 3, 64),  # depthwise
        (200, 200, 14, 5, 200),
        (3, 32, 112, 3, 1),  # the first one
    ],
)
def test_a_convolution_that_does_not_pay_alone(cin, cout, side, k, groups):
    assert saves(cin, cout, side, k, groups) < 0


@pytest.mark.parametrize("kind", ["Add", "Sigmoid", "Mul", "Concat", "Softmax"])
@pytest.mark.parametrize("n", [1000, 50_000, 1_000_000])
def test_an_elementwise_island_never_pays(kind, n):
    f = Features(inputs=n, outputs=n)
    assert int8_cost(kind, f) + quantize_cost(n) + dequantize_cost(n) > float_cost(kind, f)


@pytest.mark.parametrize("kind", ["Add", "Concat", "MaxPool"])
def test_between_integer_convolutions_it_stays_on_integers(kind):
    n = 400_000
    f = Features(inputs=n, outputs=n, taps=25 if kind == "MaxPool" else 1, beside_conv=True)
    borders = dequantize_cost(n, int8_conv=True) + quantize_cost(n, int8_conv=True)
    assert int8_cost(kind, f) < float_cost(kind, f) + borders


def test_pools_and_resize_depend_on_the_layout():
    f = {b: Features(inputs=4000, outputs=1000, taps=4, beside_conv=b) for b in (False, True)}
    assert int8_cost("MaxPool", f[True]) < int8_cost("MaxPool", f[False])
    assert int8_cost("Resize", f[True]) > int8_cost("Resize", f[False])


def test_ragged_channels_cost_an_integer_depthwise_kernel_twice():
    full, ragged = conv(208, 208, 14, 3, groups=208), conv(200, 200, 14, 3, groups=200)
    assert int8_cost(*ragged) > 1.3 * int8_cost(*full)
    assert float_cost(*ragged) < float_cost(*full)


def test_few_input_channels_are_dear_in_a_float_pointwise_convolution():
    """Measured: 310 µs with 12 channels, 110 with 16, at 96 outputs of 80 x 80."""
    few, full = (float_cost(*conv(cin, 96, 80)) for cin in (12, 16))
    assert 2.2 < few / full < 3.2


@pytest.mark.parametrize(
    ("cin", "cout", "side", "measured"), [(98, 64, 24, 1.8), (66, 64, 48, 1.7), (35, 16, 48, 2.5)]
)
def test_inputs_that_are_no_multiple_of_four_are_not_in_blocks(cin, cout, side, measured):
    """Measured against the next smaller multiple of 16, one thread: an image beside features."""
    whole = cin // 16 * 16
    times = [float_cost(*conv(n, cout, side, 3)) for n in (whole, cin)]
    assert 0.65 * measured < times[1] / times[0] < 1.2 * measured
    assert int8_cost(*conv(cin, cout, side, 3)) < 0.65 * times[1]


def test_dense_convolutions_over_one_dimension_are_not_in_blocks():
    """Measured with 64 channels and 320 steps, 3 taps: 75 and 22 µs, one thread."""
    shape = {"channels_in": 64, "channels_out": 64, "groups": 1, "taps": 3}
    kind = conv_kind(**shape, rank=3)
    n = 64 * 320
    f = Features(inputs=n, outputs=n, channels_in=64, channels_out=64, taps=3, weights=64 * 64 * 3)
    assert kind == "Conv.dense.plain"
    assert 2.5 < float_cost(kind, f) / int8_cost(kind, f) < 5
    assert float_cost(kind, f) > 1.5 * float_cost("Conv.dense", f)


def test_few_input_channels_are_not_padded():
    """Measured at 64 outputs of 40 x 40, 3 x 3: 44 µs with 3 channels, 96 with 8, 164 with 14."""
    for cin, micros in ((3, 44), (8, 96), (14, 164)):
        assert float_cost(*conv(cin, 64, 40, 3)) == pytest.approx(1e3 * micros, rel=0.25)


def test_a_transposed_convolution_has_a_product_for_each_input_and_tap():
    """Measured: 56.6 and 45.7 ms for 256 to 256 channels, 4 x 4 taps, from 64 x 64 to 128 x 128."""
    view = NodeView(
        name="up",
        op_type="ConvTranspose",
        inputs=(TensorView(name="x"), TensorView(name="w", constant=True)),
        outputs=("y",),
        attributes={"strides": [2, 2]},
    )
    shapes = {"x": (1, 256, 64, 64), "w": (256, 256, 4, 4), "y": (1, 256, 128, 128)}
    cost = float_cost("ConvTranspose", features_of(view, ("y",), shapes.get))
    assert cost == pytest.approx(50.9e6, rel=0.1)


def computed(op, letters, **attributes):
    """A node that makes y of inputs, one for each letter."""
    inputs = tuple(TensorView(name=n) for n in letters)
    return NodeView(name="n", op_type=op, inputs=inputs, outputs=("y",), attributes=attributes)


@pytest.mark.parametrize(
    ("op", "x", "hidden", "micros"),
    [
        ("LSTM", (160, 1, 256), 256, 1723),
        ("LSTM", (100, 8, 128), 128, 2255),
        ("GRU", (160, 1, 256), 256, 2346),
        ("RNN", (160, 1, 256), 256, 1183),
    ],
)
def test_recurrent_kernels_read_all_weights_at_each_step(op, x, hidden, micros):
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    view = computed(op, "xwr", hidden_size=hidden)
    shapes = {
        "x": x,
        "w": (1, gates * hidden, x[2]),
        "r": (1, gates * hidden, hidden),
        "y": (x[0], 1, x[1], hidden),
    }
    cost = float_cost(op, features_of(view, ("y",), shapes.get))
    assert cost == pytest.approx(1e3 * micros, rel=0.25)


@pytest.mark.parametrize(
    ("x", "hidden", "directions", "micros"),
    [
        ((100, 1, 32), 32, 1, 71),  # 39 in float
        ((100, 1, 64), 64, 1, 127),  # 102
        ((100, 1, 128), 128, 1, 289),  # 348
        ((160, 1, 256), 256, 1, 1132),  # 1947
        ((40, 1, 512), 512, 2, 2125),  # 15026
        ((239, 1, 200), 100, 2, 1171),  # 1311
        ((100, 8, 128), 128, 1, 953),  # 1641
    ],
)
def test_integer_lstms_have_work_for_each_value_that_they_carry(x, hidden, directions, micros):
    view = computed("LSTM", "xwr", hidden_size=hidden)
    shapes = {
        "x": x,
        "w": (directions, 4 * hidden, x[2]),
        "r": (directions, 4 * hidden, hidden),
        "y": (x[0], directions, x[1], hidden),
    }
    cost = int8_cost("LSTM", features_of(view, ("y",), shapes.get))
    assert cost == pytest.approx(1e3 * micros, rel=0.3)


@pytest.mark.parametrize(
    ("x", "hidden", "ratio"),
    [
        ((128, 1, 64), 64, 0.72),
        ((128, 1, 48), 128, 0.53),
        ((128, 1, 40), 256, 0.47),
        ((128, 1, 512), 256, 0.6),
        ((128, 1, 80), 512, 0.29),
    ],
)
def test_integer_lstms_gain_from_64_values_on(x, hidden, ratio):
    view = computed("LSTM", "xwr", hidden_size=hidden)
    shapes = {
        "x": x,
        "w": (1, 4 * hidden, x[2]),
        "r": (1, 4 * hidden, hidden),
        "y": (x[0], 1, x[1], hidden),
    }
    features = features_of(view, ("y",), shapes.get)
    found = int8_cost("LSTM", features) / float_cost("LSTM", features)
    assert found == pytest.approx(ratio, abs=0.25)


@pytest.mark.parametrize(
    ("query", "key", "heads", "micros"),
    [
        ((1, 4, 64, 64), (1, 4, 64, 64), 0, 38),
        ((1, 8, 64, 32), (1, 4, 64, 32), 0, 44),  # heads that share keys
        ((1, 3, 197, 64), (1, 3, 197, 64), 0, 254),
        ((1, 1, 1024, 64), (1, 1, 1024, 64), 0, 2145),
        ((1, 64, 256), (1, 64, 256), 4, 38),  # heads side by side
    ],
)
def test_attention_is_two_products_and_what_each_score_takes(query, key, heads, micros):
    view = computed("Attention", "qkv", **({"q_num_heads": heads} if heads else {}))
    shapes = {"q": query, "k": key, "v": key, "y": query}
    cost = float_cost("Attention", features_of(view, ("y",), shapes.get))
    assert cost == pytest.approx(1e3 * micros, rel=0.25)


@pytest.mark.parametrize(
    ("shape", "order", "kind"),
    [
        ((64, 2, 16, 2), (0, 2, 1, 3), "Transpose.runs"),
        ((64, 8, 2, 2), (1, 0, 2, 3), "Transpose.runs"),
        ((64, 2, 16, 3), (0, 2, 1, 3), "Transpose"),
        ((1, 64, 4, 32), (0, 2, 1, 3), "Transpose"),
        ((1, 64, 2, 2), (0, 1, 3, 2), "Transpose"),
        ((2, 2), None, "Transpose"),
    ],
)
def test_transposes_of_short_runs(shape, order, kind):
    attributes = {} if order is None else {"perm": list(order)}
    view = NodeView(
        name="t",
        op_type="Transpose",
        inputs=(TensorView(name="x", shape=shape),),
        outputs=("y",),
        attributes=attributes,
    )
    assert kind_of(view, {"x": shape, "y": shape}.get) == kind
    features = Features(inputs=1 << 16, outputs=1 << 16)
    assert (int8_cost(kind, features) > 5 * float_cost(kind, features)) == (kind != "Transpose")


@pytest.mark.parametrize(
    ("cin", "cout", "size", "micros"),
    [(4, 32, 112, 133), (8, 32, 112, 152), (12, 32, 320, 1274), (12, 48, 320, 1615)],
)
def test_few_channels_in_fours_are_not_gathered(cin: int, cout: int, size: int, micros: int):
    """Measured, 3 x 3: as fast for each multiplication as with more channels."""
    kind, f = conv(cin, cout, size, 3)
    assert int8_cost(kind, f) == pytest.approx(1e3 * micros, rel=0.3)
    ragged = int8_cost(*conv(cin + 2, cout, size, 3))
    assert ragged > 1.5 * int8_cost(kind, f)
