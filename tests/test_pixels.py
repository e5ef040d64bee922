"""DepthToSpace on integers, and the order of channels in front of it."""

from pathlib import Path
from typing import Any

import onnx
import pytest
from harness import quantized
from models import feeds, node
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from prepared import check
from upsamplers import ENLARGED, enlarger, values, view

import qdq
from qdq.subpixel import Subpixel, form_of


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "any size"])
@pytest.mark.parametrize("side", [2, 3])
@pytest.mark.parametrize("mode", ["CRD", "DCR"])
def test_blocks_of_channels_are_moved_in_rows(mode: str, side: int, fixed: bool) -> None:
    net, data = enlarger(mode, side, fixed=fixed), feeds(ENLARGED, 4)
    found, outcome = quantized(net, data)
    assert found.plan.left_float == {}
    assert outcome.sqnr > 27
    assert outcome.steps_apart <= 1.01
    assert outcome.ops["QLinearConv"] == 2
    assert outcome.ops["DepthToSpace"] == 0
    assert outcome.ops["DequantizeLinear"] == (1 if fixed else 2)
    report = qdq.compare(net, found.model, data, repeats=0)
    (row,) = [n for n in report.nodes if n.op_type == "DepthToSpace"]
    assert row.integer
    assert row.share == 0  # it moves codes, no more
    assert report.notes == ()


def test_short_rows_are_left_to_the_kernel() -> None:
    """A single channel in pixels of 2 by 2."""
    _, outcome = quantized(enlarger("CRD", channels=1), feeds(ENLARGED, 4))
    assert outcome.ops["DepthToSpace"] == 1
    assert outcome.sqnr > 27


def test_the_convolution_takes_in_the_order_of_channels() -> None:
    net = enlarger("CRD")
    made = check(net, feed=feeds(ENLARGED, 1)[0])
    modes = [
        onnx.helper.get_node_attr_value(n, "mode") for n in made.graph.node if n.name[0] == "D"
    ]
    assert modes == [b"DCR"]


@pytest.mark.parametrize("why", ["two readers", "groups", "computed weight"])
def test_where_it_cannot_the_order_stays(why: str) -> None:
    net = enlarger("CRD")
    conv = net.graph.node[0]
    if why == "two readers":
        net.graph.output.append(onnx.helper.make_tensor_value_info("c", 1, None))
    elif why == "groups":
        conv.attribute.append(onnx.helper.make_attribute("group", 2))
        (weight,) = [t for t in net.graph.initializer if t.name == "w0"]
        weight.CopyFrom(onnx.numpy_helper.from_array(values(16, 4, 3, 3), "w0"))
    else:
        net.graph.node.insert(0, node("Mul", ["w0", "s"], "scaled"))
        net.graph.input.append(onnx.helper.make_tensor_value_info("s", 1, [1]))
        net.graph.node[1].input[1] = "scaled"
    given = {**feeds(ENLARGED, 1)[0], **({"s": values(1)} if why == "computed weight" else {})}
    made = check(net, feed=given)
    (found,) = [n for n in made.graph.node if n.op_type == "DepthToSpace"]
    assert onnx.helper.get_node_attr_value(found, "mode") == b"CRD"


@pytest.mark.parametrize("last", [False, True], ids=["inside", "an output"])
def test_compare_takes_what_was_made_without_turning_channels(last: bool, tmp_path: Path) -> None:
    """onnxruntime's quantizer keeps the order of channels."""
    net, data = enlarger("CRD"), feeds(ENLARGED, 3)
    if last:
        del net.graph.node[2], net.graph.output[:]
        net.graph.output.append(onnx.helper.make_tensor_value_info("d", 1, [2, 4, 14, 12]))
    source, target = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(net, source)

    class Reader(CalibrationDataReader):
        rest = iter(data)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.rest, None)

    quantize_static(source, target, Reader(), per_channel=True)
    rows = {n.name: n for n in qdq.compare(net, target, data, repeats=0).nodes}
    assert 30 < rows["Conv_c"].local_db < 60
    assert rows["Conv_c"].accumulated_db > 30


def test_turned_constants_keep_their_names_where_nothing_else_reads_them() -> None:
    rule = qdq.Rule(tensors="w0", range=(-0.5, 0.5))
    result, _ = quantized(enlarger("CRD"), feeds(ENLARGED, 2), scheme=qdq.Scheme(rules=(rule,)))
    assert "w0_quantized" in {t.name for t in result.model.graph.initializer}
    shared = enlarger("CRD")
    shared.graph.node.append(node("Conv", ["x", "w0"], "z"))
    shared.graph.output.append(onnx.helper.make_tensor_value_info("z", 1, None))
    names = {t.name for t in check(shared, feed=feeds(ENLARGED, 1)[0]).graph.initializer}
    assert {"w0", "w0_turned"} <= names


@pytest.mark.parametrize(
    ("shape", "attributes", "rows"),
    [
        ((1, 16, 5, 5), {"blocksize": 2}, True),
        ((1, 16, 5, 5), {"blocksize": 2, "mode": b"CRD"}, False),
        ((1, 49, 5, 5), {"blocksize": 7}, False),
        ((1, 16, 5, 5), {"blocksize": 1}, False),
        ((1, None, 5, 5), {"blocksize": 2}, False),
        (None, {"blocksize": 2}, False),
    ],
)
def test_which_depth_to_space_moves_rows(shape: Any, attributes: Any, rows: bool) -> None:
    found = form_of(view("DepthToSpace", shape, **attributes))
    assert isinstance(found, Subpixel) == rows


def test_channels_that_cannot_be_turned_are_left_to_the_kernel() -> None:
    """The convolution's result is read twice, so its channels stay in the order of CRD."""
    net, data = enlarger("CRD"), feeds(ENLARGED, 4)
    net.graph.node.append(node("Relu", ["c"], "r"))
    net.graph.output.append(onnx.helper.make_tensor_value_info("r", 1, None))
    _, outcome = quantized(net, data)
    assert outcome.ops["DepthToSpace"] == 1
    assert outcome.sqnr > 27


@pytest.mark.parametrize("why", ["computed bias", "no convolution", "DCR by default", "empty bias"])
def test_which_order_is_left(why: str) -> None:
    net, given = enlarger("CRD"), feeds(ENLARGED, 1)[0]
    mover = net.graph.node[1]
    if why == "computed bias":
        net.graph.node[0].input[2] = "s"
        net.graph.input.append(onnx.helper.make_tensor_value_info("s", 1, [16]))
        given["s"] = values(16)
    elif why == "no convolution":
        net.graph.node[0].CopyFrom(node("Concat", ["x", "x"], "c", axis=1))
    elif why == "empty bias":
        net.graph.node[0].input[2] = ""
    else:
        del mover.attribute[1]
    made = check(net, feed=given)
    (found,) = [n for n in made.graph.node if n.op_type == "DepthToSpace"]
    expected = b"DCR" if why in ("DCR by default", "empty bias") else b"CRD"
    modes = [a.s for a in found.attribute if a.name == "mode"] or [b"DCR"]
    assert modes == [expected]
