"""Readings of tensors taken inside of the runtime are those that numpy takes of the arrays."""

import json
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import conv_chain, feeds, model, node
from onnx import TensorProto, helper

from qdq import session
from qdq.calibrate import Summaries
from qdq.calibrate.mse import MSE
from qdq.calibrate.reading import SAMPLED, Channels, Reading
from qdq.errors import CalibrationError
from qdq.prepare import prepare
from qdq.statistics.gauges import gauges_of
from qdq.statistics.observe import Observer, Readout, Seen


def passing(shape: Any, opset: int = 21, kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """x → y = x, with a shape of that kind; None: not even the rank is known."""
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Neg", ["y"], ["z"])],
        "passing",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("z", kind, shape)],
        value_info=[helper.make_tensor_value_info("y", kind, shape)],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9 if opset < 21 else 10
    )


def seen(x: np.ndarray, shape: Any, axis: int | None = None, **options: Any) -> Seen:
    counted = frozenset(options.pop("counted", ["y"]))
    opset = options.pop("opset", 21)
    return Readout(passing(shape, opset), {"y": axis}, counted=counted, **options).run({"x": x})


def assert_same(seen: Seen, name: str, x: np.ndarray, axis: int | None) -> None:
    found, wanted = seen.readings[name], Reading.of(x, spread=True)
    assert (found.low, found.high, found.step) == (wanted.low, wanted.high, wanted.step)
    assert np.array_equal(np.ravel(found.values), np.ravel(wanted.values))
    if axis is None:
        assert name not in seen.channels.names
        return
    at = seen.channels.names.index(name)
    start, size = sum(seen.channels.sizes[:at]), seen.channels.sizes[at]
    own = slice(start, start + size)
    channels = Channels.of({name: x}, {name: axis})
    assert np.array_equal(seen.channels.low[own], channels.low)
    assert np.array_equal(seen.channels.high[own], channels.high)
    tolerance = 1e-4 * np.abs(x).max(initial=0.0)
    assert np.allclose(seen.channels.mean[own], channels.mean, rtol=1e-5, atol=tolerance)


CASES = [
    ((1, 3, 5, 7), 1),
    ((2, 6, 130, 130), 1),
    ((1, 16, 1024), 1),
    ((3, 40, 96), -1),
    ((1, 400, 96), -1),
    ((5, 33000), None),
    ((70000,), None),
    ((7,), 0),
    ((), None),
    ((2, 3), 1),
    ((2, 3, 4, 5, 6), 1),
]


@pytest.mark.parametrize("known", ["all", "channels", "rank", "nothing"])
@pytest.mark.parametrize(("shape", "axis"), CASES)
def test_the_runtime_reads_what_numpy_reads(
    shape: tuple[int, ...], axis: int | None, known: str
) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    open_sizes: list[Any] = [f"d{k}" for k in range(len(shape))]
    declared: Any = {"all": shape, "nothing": None}.get(known, open_sizes)
    if known == "channels" and axis is not None:
        open_sizes[axis] = shape[axis]
    model = passing(declared)
    gauged = known in ("all", "channels") or (known == "rank" and axis is None)
    if declared is not None and all(isinstance(d, int) for d in declared):
        gauged &= x.size > 512
    assert bool(gauges_of(model, {"y": axis}, frozenset()).names) == gauged
    assert_same(seen(x, declared, axis), "y", x, axis)


@settings(max_examples=40)
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 3000))
def test_a_step_found_in_the_runtime_is_that_of_the_law(batch: int, rows: int, width: int) -> None:
    x = np.arange(batch * rows * width, dtype=np.float32).reshape(batch, rows, width)
    seen_now = READOUT.run({"x": x})
    assert_same(seen_now, "y", x, None)
    found = seen_now.readings["y"]
    assert found.step == 1 or found.values.size <= batch * SAMPLED


READOUT = Readout(passing(["n", "h", "w"]), {"y": None}, counted=frozenset(["y"]))


def test_a_model_of_an_old_opset_and_of_other_types_is_read_from_outside() -> None:
    x = np.random.default_rng(1).standard_normal((2, 3, 300, 40)).astype(np.float32)
    assert not gauges_of(passing(x.shape, opset=17), {"y": 1}, frozenset()).names
    assert_same(seen(x, x.shape, 1, opset=17), "y", x, 1)
    double = passing(x.shape, kind=TensorProto.DOUBLE)
    found = Readout(double, {"y": 1}, counted=frozenset()).run({"x": x.astype(np.float64)})
    assert np.array_equal(found.channels.high, x.max((0, 2, 3)))
    assert found.readings["y"].extent() == (x.min(), x.max())


def test_inputs_outputs_and_what_is_between() -> None:
    x = np.random.default_rng(1).standard_normal((2, 3, 4000)).astype(np.float32)
    axes = {"x": 1, "y": None, "z": -1}
    found = Readout(passing(x.shape), axes, counted=frozenset(["x", "z"])).run({"x": x})
    assert set(found.readings) == {"x", "y", "z"}
    assert_same(found, "x", x, 1)
    assert_same(found, "z", -x, -1)
    assert found.readings["y"].values.size == 0
    assert found.readings["y"].extent() == (x.min(), x.max())


def test_only_whole_inputs_need_no_run() -> None:
    x = np.ones((2, 3), np.float32)
    readout = Readout(passing(None), {"x": 1}, counted=frozenset(), whole=frozenset(["x"]))
    found = readout.run({"x": x})
    assert found.whole["x"] is x
    assert found.channels.low.tolist() == [1, 1, 1]


def test_what_is_wanted_whole_comes_as_it_is() -> None:
    x = np.random.default_rng(1).standard_normal((1, 30000)).astype(np.float32)
    found = seen(x, x.shape, None, whole=frozenset(["y", "z"]), spread=False)
    assert np.array_equal(found.whole["y"], x)
    assert np.array_equal(found.whole["z"], -x)
    assert found.readings["y"].values.shape == x.shape


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (2, 0, 4)])
@pytest.mark.parametrize("axis", [1, None])
def test_a_sample_may_be_empty(shape: tuple[int, ...], axis: int | None) -> None:
    declared = [d if k == axis else f"d{k}" for k, d in enumerate(shape)]
    reading = seen(np.zeros(shape, np.float32), declared, axis).readings["y"]
    assert reading.empty
    assert Reading.of(np.zeros(shape, np.float32)).empty
    with pytest.raises(CalibrationError, match="empty"):
        reading.extent()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("axis", [1, None])
@pytest.mark.parametrize("size", [3, 20000])
def test_nan_and_inf_do_not_hide(bad: float, axis: int | None, size: int) -> None:
    x = np.random.default_rng(1).standard_normal((1, 4, size)).astype(np.float32)
    x[0, 2, 1] = bad  # between the values that a step meets
    reading = seen(x, x.shape, axis).readings["y"]
    assert not reading.empty
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        reading.extent()
    summaries = Summaries(["y"], MSE())
    with pytest.raises(CalibrationError, match=r"tensor 'y', calibration sample 7") as caught:
        summaries.add({"y": reading}, 7)
    assert caught.value.sample == 7


@pytest.mark.parametrize("sign", [1, -1, 0])
def test_a_sum_that_overflows_is_no_nan(sign: int) -> None:
    """Attention masks are -3.4e38 each."""
    x = np.full((1, 2, 400), float(np.finfo(np.float32).max) * (sign or 1), np.float32)
    if not sign:
        x[..., ::2] *= -1
    for axis in (1, None):
        reading = seen(x, x.shape, axis).readings["y"]
        assert reading.extent() == (x.min(), x.max())


def test_small_tensors_come_as_they_are() -> None:
    for size, gauged in ((256, False), (257, True)):
        assert bool(gauges_of(passing([1, 2, size]), {"y": 1}, frozenset("y")).names) == gauged


def test_many_tensors_have_few_gauges_and_no_wide_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the runtime does with a node's inputs takes the square of their number."""
    names = [f"t{k}" for k in range(9)]
    nodes = [node("Neg", [last], made) for last, made in pairwise(["x", *names])]
    large, small = (
        onnx.shape_inference.infer_shapes(model(nodes, {"x": shape}, {names[-1]: shape}))
        for shape in ([1, 2, 5000], [1, 2, 4096])
    )
    x = np.random.default_rng(0).standard_normal((1, 2, 5000)).astype(np.float32)
    axes, counted = dict.fromkeys(names, 1), frozenset(names)
    flat = Readout(large, axes, counted=counted).run({"x": x})
    monkeypatch.setattr("qdq.statistics.gauges._WIDEST", 4)
    found = gauges_of(large, axes, counted)
    assert max(len(n.input) for n in found.added.node) == 4
    deep = Readout(large, axes, counted=counted).run({"x": x})
    assert np.array_equal(deep.channels.mean, flat.channels.mean)
    for name in names:
        assert deep.readings[name].extent() == flat.readings[name].extent()
        assert np.array_equal(deep.readings[name].values, flat.readings[name].values)
    assert gauges_of(small, axes, counted).names
    monkeypatch.setattr("qdq.statistics.gauges._MANY", 8)
    assert gauges_of(large, axes, counted).names == tuple(names)
    assert not gauges_of(small, axes, counted).names


def test_names_of_gauges_are_new_and_the_model_stays() -> None:
    model = passing([1, 3, 9000])
    model.graph.node[1].output[0] = "y_ReduceMin"
    model.graph.output[0].name = "y_ReduceMin"
    before = model.SerializeToString()
    readout = Readout(model, {"y": 1}, counted=frozenset(["y"]))
    x = np.random.default_rng(1).standard_normal((1, 3, 9000)).astype(np.float32)
    assert_same(readout.run({"x": x}), "y", x, 1)
    assert model.SerializeToString() == before


def test_where_the_samples_lie_does_not_change_a_bit() -> None:
    x = np.random.default_rng(1).standard_normal((1, 8, 37, 41)).astype(np.float32)
    readout = Readout(passing(x.shape), {"x": 1, "y": -1}, counted=frozenset())
    found = set()
    for offset in range(0, 64, 4):
        room = np.empty(x.nbytes + 128, np.uint8)
        start = -room.ctypes.data % 64 + offset
        there = room[start : start + x.nbytes].view(np.float32).reshape(x.shape)
        there[:] = x
        found.add(readout.run({"x": there}).channels.mean.tobytes())
    assert len(found) == 1


@pytest.mark.parametrize("axis", [1, -1])
def test_threads_do_not_change_a_bit(axis: int) -> None:
    x = np.random.default_rng(1).standard_normal((4, 24, 64, 64)).astype(np.float32)
    found = set()
    for threads in (1, 2, 4):
        shape = ["n", 24, "h", 64]
        readout = Readout(passing(shape), {"y": axis}, counted=frozenset(["y"]), threads=threads)
        found.add(readout.run({"x": x}).channels.mean.tobytes())
    assert len(found) == 1


def test_some_tensors_from_inside_and_some_from_outside() -> None:
    x = np.random.default_rng(1).standard_normal((2, 3, 4000)).astype(np.float32)
    readout = Readout(
        passing(x.shape), {"x": 1, "y": -1, "z": 1}, counted=frozenset("xyz"), whole=frozenset("y")
    )
    found = readout.run({"x": x})
    assert found.channels.names == ("x", "z", "y")
    for name, values, axis in (("x", x, 1), ("y", x, -1), ("z", -x, 1)):
        assert_same(found, name, values, axis)


def test_a_tensor_is_read_as_soon_as_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when the model has run: until then all would have to be kept, in and out of caches."""

    def profiled(*args: Any, **kwargs: Any) -> Any:
        options = ort_options(*args, **kwargs)
        options.enable_profiling = True
        return options

    ort_options = session._options
    net = prepare(conv_chain(channels=32, size=40, depth=4))
    convolutions = [n for n in net.graph.node if n.op_type == "Conv"]
    names = [n.input[0] for n in convolutions[1:]] + [v.name for v in net.graph.output]
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(session, "_options", profiled)
        monkeypatch.chdir(folder)
        readout = Readout(net, dict.fromkeys(names, 1), counted=frozenset(names))
        readout.run(feeds({"x": [1, 32, 40, 40]}, 1)[0])
        opened: Any = readout._observer._session
        events = json.loads(Path(opened._session.end_profiling()).read_text())
    run = sorted((e["ts"], e["args"]["op_name"]) for e in events if "op_name" in e.get("args", {}))
    order = [op for _, op in run if "Conv" in op or op in ("ReduceMin", "ReduceMean", "Slice")]
    assert len([op for op in order if "Conv" in op]) == 4
    assert len([op for op in order if op == "Slice"]) == 4
    # behind each of the first two convolutions come its readings
    assert all("Conv" not in op for op in order[1:4])
    assert all("Conv" not in op for op in order[5:8])


def test_what_is_made_last_is_read_first_and_else_names_decide() -> None:
    """Whatever order a set of names has: that is another one in each process."""
    inputs, parts = (list(f"{c}{k}" for k in "31405926") for c in "xp")
    nodes = [node("Split", inputs[:1], parts, axis=0, num_outputs=8), node("Neg", ["p0"], "y")]
    shapes = {name: [8, 2, 1000] for name in inputs}
    net = model(nodes, shapes, {"y": [1, 2, 1000]})
    names = [*inputs, *parts, "y"]
    found = gauges_of(onnx.shape_inference.infer_shapes(net), dict.fromkeys(names, 1), frozenset())
    read = [n.input[0] for n in found.added.node if n.op_type == "ReduceMin"]
    assert read == ["y", *sorted(parts, reverse=True), *sorted(inputs, reverse=True)]


def test_what_a_reading_does_not_need_is_not_run() -> None:
    constants = {"to": np.int64([3]), "w": np.ones((2, 2), np.float32)}
    nodes = [node("Relu", ["x"], "a"), node("MatMul", ["a", "w"], "b"),
             node("Reshape", ["b", "to"], "y")]  # fmt: skip
    net = model(nodes, {"x": [1, 2]}, {"y": [3]}, constants)
    x = np.float32([[-1, 2]])
    found = Observer(net, ["a"]).run({"x": x})["a"]  # the Reshape is impossible
    np.testing.assert_array_equal(found, [[0, 2]])
    with pytest.raises(CalibrationError):
        Observer(net, ["y"]).run({"x": x})
