"""Resize over some axes, and with an aspect ratio kept, spelled out over all of them."""

import numpy as np
import onnx
import pytest
from harness import FORCED, compare, older
from models import feeds, ints, model, node, vec, weights
from onnx import TensorProto, helper
from prepared import check, constant, only, ops

from qdq.api import run
from qdq.calibrate import MinMax

X = [1, 4, 6, 10]
OPEN = ["n", 4, "h", "w"]


def net(inputs: str, shape=X, opset=21, constants=None, **attributes) -> onnx.ModelProto:
    """One Resize of x; "" is spelled "-"."""
    names = [i.replace("-", "") for i in inputs.split()]
    out = [None] * len(shape)
    return model([node("Resize", names, "y", **attributes)], {"x": shape}, {"y": out}, constants,
                 opset)  # fmt: skip


def feed(seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal(X).astype(np.float32)}


def plain(made: onnx.ModelProto) -> onnx.NodeProto:
    """The Resize, which must name all axes."""
    found = only(made, "Resize")
    assert not {"axes", "keep_aspect_ratio_policy"} & {a.name for a in found.attribute}
    return found


FROM_BEHIND = pytest.param(
    [-1, -2],
    marks=pytest.mark.skipif(older("1.27"), reason="the runtime takes them for places in memory"),
)
MODES = [{"mode": "nearest"}, {"mode": "linear"}, {"mode": "cubic"}]


@pytest.mark.parametrize("mode", MODES, ids=lambda m: m["mode"])
@pytest.mark.parametrize("shape", [X, OPEN], ids=["static", "open"])
@pytest.mark.parametrize("axes", [[2, 3], FROM_BEHIND, [3]], ids=str)
class TestAxes:
    def test_scales(self, axes, shape, mode) -> None:
        scales = vec(1.5, 2)[: len(axes)]
        made = check(net("x - s", shape, constants={"s": scales}, axes=axes, **mode), feed=feed())
        assert ops(made) == {"Resize": 1}
        wanted = np.ones(4, np.float32)
        wanted[axes] = scales
        np.testing.assert_array_equal(constant(made, plain(made).input[2]), wanted)

    def test_sizes(self, axes, shape, mode) -> None:
        sizes = ints(9, 7)[: len(axes)]
        made = check(net("x - - z", shape, constants={"z": sizes}, axes=axes, **mode), feed=feed())
        name = plain(made).input[3]
        if shape is OPEN:
            assert ops(made) == {"Resize": 1, "Shape": 1, "ScatterElements": 1}
        else:
            wanted = ints(*X)
            wanted[axes] = sizes
            np.testing.assert_array_equal(constant(made, name), wanted)


def test_sizes_fold_where_only_the_resized_axes_are_open() -> None:
    shape = [1, 4, "h", "w"]
    made = check(net("x - - z", shape, constants={"z": ints(9, 7)}, axes=[2, 3]), feed=feed())
    np.testing.assert_array_equal(constant(made, plain(made).input[3]), [1, 4, 9, 7])


@pytest.mark.parametrize("opset", [18, 21])
def test_region(opset: int) -> None:
    crop = {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize"}
    constants = {"r": vec(0.2, 0.1, 0.9, 1.3), "z": ints(5, 5)}
    made = check(net("x r - z", opset=opset, constants=constants, axes=[3, 2], **crop), feed=feed())
    region = constant(made, plain(made).input[1])
    np.testing.assert_array_equal(region, vec(0, 0, 0.1, 0.2, 1, 1, 1.3, 0.9))


def test_a_region_that_nothing_reads_goes() -> None:
    constants = {"r": vec(0.2, 0.1, 0.9, 1.3), "s": vec(2, 2)}
    made = check(net("x r s", constants=constants, axes=[2, 3]), feed=feed())
    assert list(plain(made).input)[1] == ""


def test_empty_inputs_are_absent_ones() -> None:
    constants = {"r": vec(), "s": vec(), "z": ints(9, 7)}
    made = check(net("x r s z", constants=constants, axes=[2, 3]), feed=feed())
    assert list(plain(made).input)[1:3] == ["", ""]


def test_computed_scales() -> None:
    shape = [1, 4, 6, 10]
    nodes = [
        node("ReduceMax", ["x"], "m", keepdims=0),
        node("Clip", ["m", "two", "two"], "c"),  # not constant, yet always 2
        node("Unsqueeze", ["c", "zero"], "s"),
        node("Resize", ["x", "", "s"], "y", axes=[2]),
    ]
    constants = {"two": np.float32(2), "zero": ints(0)}
    made = check(model(nodes, {"x": shape}, {"y": [None] * 4}, constants), feed=feed())
    assert ops(made)["ScatterElements"] == 1
    plain(made)


@pytest.mark.parametrize("policy", ["not_larger", "not_smaller"])
@pytest.mark.parametrize("mode", MODES, ids=lambda m: m["mode"])
@pytest.mark.parametrize(
    ("sizes", "axes"),
    [
        ((12, 30), [2, 3]),
        ((9, 7), [2, 3]),
        ((7, 9), [3, 2]),
        ((1, 9), [2, 3]),
        ((8,), [3]),
        ((9, 9), None),
    ],
    ids=str,
)
def test_policy(policy: str, mode: dict, sizes: tuple[int, ...], axes: list[int] | None) -> None:
    """Worked out where that is exact; else nothing changes; the values are those of before."""
    attributes = {**mode, "keep_aspect_ratio_policy": policy}
    if axes is not None:
        attributes["axes"] = axes
    image = axes is not None  # the runtime resizes four axes at once in nearest mode only
    shape, data = (X, feed()) if image else (X[2:], {"x": feed()["x"][0, 0]})
    made = check(net("x - - z", shape, constants={"z": ints(*sizes)}, **attributes), feed=data)
    dims = np.array([shape[a] for a in (axes or range(2))])
    ratios = np.array(sizes) / dims
    scale = ratios.min() if policy == "not_larger" else ratios.max()
    whole, rounded = np.floor(scale * dims + 0.5), np.float64(np.float32(scale)) * dims
    exact = (whole == np.floor(rounded)).all() or (whole / dims == scale).all()
    left = {a.name for a in only(made, "Resize").attribute}
    if exact:
        plain(made)
    else:
        assert "keep_aspect_ratio_policy" in left
        assert ("axes" in left) == (axes is not None)


def test_a_scale_that_shape_inference_would_round_down_is_not_made() -> None:
    """0.7 in float32 times 10 is 7 for the runtime and 6 for shape inference, in float64."""
    nodes = [
        node("Resize", ["x", "", "", "z"], "r", mode="nearest", axes=[2, 3],
             keep_aspect_ratio_policy="not_larger"),
        node("Mul", ["r", "k"], "y"),
    ]  # fmt: skip
    constants = {"z": ints(9, 7), "k": vec(*range(1, 8))}
    check(model(nodes, {"x": X}, {"y": [None] * 4}, constants, 21), feed=feed())


@pytest.mark.parametrize("mode", MODES, ids=lambda m: m["mode"])
def test_policy_whose_scale_would_round_down(mode: dict) -> None:
    """8 / 41 in float32 times 41 is below 8: only sizes say it."""
    attributes = {**mode, "keep_aspect_ratio_policy": "not_larger", "axes": [3]}
    shape = [1, 1, 2, 41]
    data = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    made = check(net("x - - z", shape, constants={"z": ints(8)}, **attributes), feed=data)
    np.testing.assert_array_equal(constant(made, plain(made).input[3]), [1, 1, 2, 8])


def test_policy_over_open_dimensions_stays() -> None:
    attributes = {"keep_aspect_ratio_policy": "not_larger", "axes": [2, 3]}
    made = check(net("x - - z", OPEN, constants={"z": ints(9, 7)}, **attributes), feed=feed())
    left = {a.name for a in only(made, "Resize").attribute}
    assert {"axes", "keep_aspect_ratio_policy"} <= left


def test_unknown_rank_stays() -> None:
    made = net("x - s", constants={"s": vec(2)}, axes=[2])
    made.graph.node.insert(0, node("Reshape", ["x", "t"], "r"))
    made.graph.node[1].input[0] = "r"
    made.graph.input.append(helper.make_tensor_value_info("t", TensorProto.INT64, ["k"]))
    left = check(made, feed={**feed(), "t": ints(*X)})
    assert "axes" in {a.name for a in only(left, "Resize").attribute}


@pytest.mark.parametrize("batch", [1, "n"])
@pytest.mark.parametrize(
    ("inputs", "value"),
    [("x - - z", ints(9, 9)), ("x - z", vec(1.5, 1.5))],
    ids=["sizes", "scales"],
)
def test_next_to_integer_convolutions(batch, inputs: str, value: np.ndarray) -> None:
    """onnxruntime moves the Resize to channels-last there, and must keep all axes in order."""
    names = ["r0", *(i.replace("-", "") for i in inputs.split()[1:])]
    nodes = [
        node("Conv", ["x", "w0"], "r0", pads=[1] * 4),
        node("Resize", names, "r1", axes=[2, 3]),
        node("Conv", ["r1", "w1"], "y", pads=[1] * 4),
    ]
    constants = {"w0": weights(8, 8, 3, 3), "w1": weights(8, 8, 3, 3, seed=1), "z": value}
    made = model(nodes, {"x": [batch, 8, 6, 6]}, {"y": [batch, 8, 9, 9]}, constants)
    data = feeds({"x": (1, 8, 6, 6)}, 4)
    outcome = compare(made, run(made, data, target=FORCED, calibrator=MinMax()).model, data)
    assert outcome.ops["QLinearConv"] == 2
    assert outcome.sqnr > 27
    assert outcome.steps_apart <= 1.01
