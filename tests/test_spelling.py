"""Operators with slow kernels compute the same in the steps that they are spelled out in."""

from itertools import product
from typing import Any

import numpy as np
import onnx
import pytest
from harness import quantized
from hypothesis import given
from hypothesis import strategies as st
from models import feeds, model, node, retyped, weights
from onnx import numpy_helper

from qdq.forms import in_steps, tuned
from qdq.graph import Graph
from qdq.spelling import POWERS, neighbours
from qdq.statistics.observe import observe


def spelled(net: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its only node in steps."""
    (steps,) = tuned(Graph(net), set(), set(), {}).split.values()
    made = onnx.ModelProto.FromString(net.SerializeToString())
    nodes, constants = in_steps(made.graph.node[0], steps, Graph(made).fresh)
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    made.graph.initializer.extend(constants)
    onnx.checker.check_model(made, full_check=True)
    assert nodes[-1].name == net.graph.node[0].name
    return made


def single(
    op: str, shape: list[Any], out: list[Any], constants: dict[str, Any], **attrs: Any
) -> Any:
    return model([node(op, ["x", *constants], "y", **attrs)], {"x": shape}, {"y": out},
                 {k: v for k, v in constants.items() if k}, opset=21)  # fmt: skip


def both(net: onnx.ModelProto, x: np.ndarray, optimize: bool) -> tuple[np.ndarray, np.ndarray]:
    (exact,), (seen,) = (
        [o["y"] for o in observe(m, ["y"], [{"x": x}], optimize=optimize)]
        for m in (net, spelled(net))
    )
    return exact, seen


ANY = np.random.default_rng(1)


@pytest.mark.parametrize("exponent", sorted(POWERS))
@pytest.mark.parametrize("optimize", [False, True])
def test_powers(exponent: float, optimize: bool) -> None:
    x = np.concatenate([np.geomspace(1e-30, 1e30, 400), [0.0, np.inf]]).astype(np.float32)
    # the root of -inf is NaN where the power is inf; those of other negative numbers both are
    x = np.concatenate([x, -x if exponent == int(exponent) else -x[:-1]])
    net = single("Pow", [x.size], [x.size], {"p": np.float32(exponent)})
    exact, seen = both(net, x, optimize)
    np.testing.assert_allclose(seen, exact, rtol=1e-6, atol=1e-38)


@pytest.mark.parametrize(
    ("exponent", "shape"),
    [(np.float32(2), [4]), (np.float32(-0.5), [4]), (np.float32(3), [4]), (np.float32(0.3), [4]),
     (np.ones(4, np.float32), [4]), (np.full((1, 1), 0.5, np.float32), [1, 4])],
    ids=["square", "inverse root", "cube", "another", "several", "of more axes"],
)  # fmt: skip
def test_other_powers_stay(exponent: Any, shape: list[int]) -> None:
    graph = Graph(single("Pow", [4], shape, {"p": exponent}))
    assert not tuned(graph, set(), set(), {}).split


@pytest.mark.parametrize("p", [np.int64(4), np.float64([0.5])], ids=["integer", "another type"])
def test_an_exponent_may_have_another_type(p: Any) -> None:
    x = np.linspace(-3, 3, 13, dtype=np.float32)
    exact, seen = both(single("Pow", [13], [13], {"p": p}), x, False)
    np.testing.assert_allclose(seen, exact, rtol=1e-6)


def test_what_is_no_power_of_float32_stays() -> None:
    def found(inputs: list[str], *, base: type = np.float32, open_rank: str = "") -> bool:
        half = {"half": np.array([0.5], base)}
        net = retyped(model([node("Pow", inputs, "y")], {"x": [4]}, {"y": [4]}, half), base)
        for value in (net.graph.input[0], net.graph.output[0]):
            if value.name == open_rank:
                value.type.tensor_type.ClearField("shape")
        return bool(tuned(Graph(net), set(), set(), {}).split)

    assert found(["x", "half"])
    assert not found(["half", "x"])
    assert not found(["x", "half"], base=np.float64)
    assert not found(["x", "half"], open_rank="x")
    assert not found(["x", "half"], open_rank="y")


@pytest.mark.parametrize(
    ("shape", "axis"),
    [([2, 5, 32, 33], 1), ([2, 5, 1024], -2), ([3, 1, 1030], 1), ([2, 5, "n"], 1)],
)
def test_log_softmax_over_channels(shape: Any, axis: int) -> None:
    net = single("LogSoftmax", shape, shape, {}, axis=axis)
    x = ANY.normal(size=[33 if d == "n" else d for d in shape]).astype(np.float32) * 40
    for optimize in (False, True):
        exact, seen = both(net, x, optimize)
        np.testing.assert_allclose(seen, exact, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("shape", "axis"), [([2, 5, 1023], 1), ([2, 50], -1), ([2, 50], 1)])
def test_other_log_softmaxes_stay(shape: list[int], axis: int) -> None:
    net = single("LogSoftmax", shape, shape, {}, axis=axis)
    assert not tuned(Graph(net), set(), set(), {}).split


def test_old_reductions_are_not_written() -> None:
    shape = {"x": [2, 5, 99]}
    net = model([node("LogSoftmax", ["x"], "y", axis=1)], shape, {"y": [2, 5, 99]}, {}, opset=17)
    assert not tuned(Graph(net), set(), set(), {}).split


@pytest.mark.parametrize("size", [1, 3, 5, 21])  # the runtime has no others
@pytest.mark.parametrize("beta", [0.75, 0.5, 0.6, 1.5])
def test_local_response_normalization(size: int, beta: float) -> None:
    shape = [2, 7, 4, 3]
    net = single("LRN", shape, shape, {}, size=size, beta=beta, alpha=0.4, bias=1.3)
    x = ANY.normal(size=shape).astype(np.float32) * 3
    for optimize in (False, True):
        exact, seen = both(net, x, optimize)
        np.testing.assert_allclose(seen, exact, rtol=3e-6, atol=1e-6)


def test_it_has_defaults_and_wants_channels() -> None:
    net = single("LRN", [1, 4, 3, 3], [1, 4, 3, 3], {}, size=3)
    x = ANY.normal(size=(1, 4, 3, 3)).astype(np.float32) * 30
    exact, seen = both(net, x, True)
    np.testing.assert_allclose(seen, exact, rtol=3e-6)
    for shape in ([3, 4], [1, "c", 3, 3], [1, 513, 3, 3], [1, 4, 0, 3]):
        assert not tuned(Graph(single("LRN", shape, shape, {}, size=3)), set(), set(), {}).split


@given(st.integers(1, 9), st.integers(1, 9))
def test_neighbours_are_those_of_the_specification(channels: int, size: int) -> None:
    wanted = np.zeros((channels, channels))
    for c in range(channels):
        first, last = max(0, c - (size - 1) // 2), min(channels - 1, c + -(-(size - 1) // 2))
        wanted[c, first : last + 1] = 1
    assert np.array_equal(neighbours(channels, size), wanted)


MODES = ["half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners"]
SIZES = [
    ((5, 8), (10, 16)),
    ((5, 8), (15, 5)),
    ((9, 4), (4, 1)),
    ((6, 6), (7, 13)),
    ((1, 3), (2, 6)),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("size", "wanted"), SIZES)
@pytest.mark.parametrize("attrs", [{}, {"cubic_coeff_a": -0.5}, {"exclude_outside": 1}], ids=str)
def test_cubic(mode: str, size: tuple, wanted: tuple, attrs: dict[str, Any]) -> None:
    x = ANY.normal(size=(2, 3, *size)).astype(np.float32)
    net = cubic(size, wanted, None, mode, attrs)
    for optimize in (False, True):
        exact, seen = both(net, x, optimize)
        np.testing.assert_allclose(seen, exact, rtol=1e-4, atol=2e-5)


def cubic(size: Any, wanted: Any, scale: float | None, mode: str, attrs: Any) -> onnx.ModelProto:
    """By a scale, or by the wanted sizes."""
    inputs, constants = ["x", "", "f"], {"f": np.array([1, 1, scale, scale], np.float32)}
    if scale is None:
        inputs, constants = ["x", "", "", "n"], {"n": np.array([2, 3, *wanted], np.int64)}
    resize = node("Resize", inputs, "y", mode="cubic", coordinate_transformation_mode=mode, **attrs)
    return model([resize], {"x": [2, 3, *size]}, {"y": [2, 3, *wanted]}, constants)


def computed_scales() -> onnx.ModelProto:
    net = cubic((4, 4), (6, 6), 1.3, "half_pixel", {})
    net.graph.initializer[0].name = "known"
    net.graph.node.append(node("Identity", ["known"], "f"))
    return net


def resized(wanted: list[int], by: np.ndarray, **attrs: Any) -> onnx.ModelProto:
    """By scales, which are real, or by sizes."""
    inputs = ["x", "", "by"] if by.dtype == np.float32 else ["x", "", "", "by"]
    resize = node("Resize", inputs, "y", mode="cubic", **attrs)
    return model([resize], {"x": [2, 3, 4, 4]}, {"y": wanted}, {"by": by})


def test_an_empty_input_behind_the_scales_changes_nothing() -> None:
    net = cubic((7, 9), (9, 11), 1.3, "half_pixel", {})
    net.graph.node[0].input.append("")
    x = ANY.normal(size=(2, 3, 7, 9)).astype(np.float32)
    exact, seen = both(net, x, False)
    np.testing.assert_allclose(seen, exact, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize(("mode", "scale"), [*product(MODES[:3], [2.0, 1.3, 0.6, 0.45])])
def test_cubic_by_scales(mode: str, scale: float) -> None:
    """The scale counts, not the sizes that it leads to."""
    size = (7, 9)
    wanted = [int(np.floor(np.float32(scale) * n)) for n in size]
    net = cubic(size, wanted, scale, mode, {})
    x = ANY.normal(size=(2, 3, *size)).astype(np.float32)
    exact, seen = both(net, x, False)
    np.testing.assert_allclose(seen, exact, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize(
    "net",
    [cubic(("h", 4), (None, 8), 2, "asymmetric", {}),
     cubic((4, 4), (8, 8), 2, "half_pixel_symmetric", {}),
     cubic((4, 4), (2, 2), 0.5, "half_pixel", {"antialias": 1}),
     cubic((3000, 3000), (6000, 6000), 2, "half_pixel", {}),
     cubic((9, 9), (9, 9), 1.1, "half_pixel", {}),
     computed_scales(),
     resized([2, 3, 8, 6], np.float32([2, 1.5]), axes=[2, 3]),
     resized([2, 3, 8, 6], np.array([8, 6]), axes=[2, 3]),
     resized([2, 6, 8, 8], np.array([2, 6, 8, 8])),
     resized([4, 3, 8, 8], np.float32([2, 1, 2, 2]))],
    ids=["open", "symmetric", "antialias", "large", "a copy", "scales are computed",
         "scales of some axes", "sizes of some axes", "channels", "batch"],
)  # fmt: skip
def test_other_resizes_stay(net: onnx.ModelProto) -> None:
    assert not tuned(Graph(net), set(), set(), {}).split


def test_between_integer_kernels() -> None:
    shape = [1, 32, 12, 12]
    convs = {name: weights(32, 32, 3, 3, seed=k) for k, name in enumerate("vw")}
    parts = [
        node("Conv", ["x", "v"], "a", pads=[1] * 4),
        node("LRN", ["a"], "m", size=5),
        node("Conv", ["m", "w"], "y", pads=[1] * 4),
    ]
    net, data = model(parts, {"x": shape}, {"y": shape}, convs), feeds({"x": tuple(shape)}, 4)
    result, outcome = quantized(net, data)
    assert outcome.ops["QLinearConv"] == 2
    assert outcome.ops["LRN"] == outcome.ops["Pow"] == 0
    assert outcome.sqnr > 32
    names = {t.name for t in result.model.graph.initializer}
    (conv,) = [n for n in result.model.graph.node if n.name == "LRN_m_Conv"]
    assert set(conv.input[1:]) <= names
    weight = next(t for t in result.model.graph.initializer if t.name == conv.input[1])
    assert numpy_helper.to_array(weight).shape[2:] == (1, 1)
