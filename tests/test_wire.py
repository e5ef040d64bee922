"""Where a model file keeps its data: the rest of the message is the same, whatever is in it."""

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import model, node, weights
from onnx import TensorProto, numpy_helper

import qdq.weights as file_weights
from qdq.errors import ModelError
from qdq.modelio import load
from qdq.weights import is_reference, load_light, read
from qdq.wire import without_data

sizes = st.lists(st.integers(0, 700), max_size=6)


def message(counts: list[int]) -> onnx.ModelProto:
    """A model with initializers of so many values, and fields before and behind them."""
    constants = {f"w{i}": weights(n, seed=i) for i, n in enumerate(counts)}
    net = model([node("Relu", ["x"], "y")], {"x": [4]}, {"y": [4]}, constants)
    net.metadata_props.add(key="trained", value="yes" * 100)
    net.graph.value_info.add(name="t")
    return net


@given(sizes, st.integers(0, 3000))
def test_nothing_but_the_data_is_left_out(counts: list[int], above: int) -> None:
    net = message(counts)
    whole = net.SerializeToString()
    light, places = without_data(memoryview(whole), above)
    found = onnx.load_model_from_string(light)
    large = {i for i, n in enumerate(counts) if 4 * n > above}
    assert places.keys() == large
    for i, (offset, size) in places.items():
        assert not found.graph.initializer[i].HasField("raw_data")
        found.graph.initializer[i].raw_data = whole[offset : offset + size]
    assert found == net


@given(st.data())
def test_a_file_that_was_cut_off_is_no_message(data: st.DataObject) -> None:
    whole = message([600, 3]).SerializeToString()
    end = data.draw(st.integers(0, len(whole) - 1))
    try:
        light, _ = without_data(memoryview(whole[:end]), 100)
    except ValueError:
        return
    onnx.load_model_from_string(whole[:end])  # it was cut between two fields
    onnx.load_model_from_string(light)


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (b"", "0 fields of number 7"),
        (message([1]).SerializeToString() * 2, "2 fields of number 7"),  # which protobuf merges
        (b"\x3b\x3c", "of kind 3"),  # a group
        (b"\xff" * 11, "without an end"),
        (b"\x3a\x05ab", "longer than what it is in"),
        (b"\x3d\0\0\0", "longer than what it is in"),
    ],
)
def test_what_is_unusual_is_refused(odd: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        without_data(memoryview(odd), 0)


def test_fixed_numbers_are_stepped_over() -> None:
    whole = message([2]).SerializeToString()
    more = b"\xf9\x07" + b"\0" * 8 + b"\xfd\x07" + b"\0" * 4  # fields of number 127
    light, places = without_data(memoryview(more + whole), 0)
    assert light.startswith(more)
    assert places[0].size == 8


class TestFiles:
    """1 MiB is where references begin."""

    def written(self, tmp_path, **constants: np.ndarray):
        large = {"w": weights(600, 600), **constants}
        net = model([node("MatMul", ["x", "w"], "y")], {"x": [1, 600]}, {"y": [1, 600]}, large)
        path = tmp_path / "m.onnx"
        path.write_bytes(net.SerializeToString())
        return net, path

    def test_other_types_stay_inside(self, tmp_path) -> None:
        net, path = self.written(tmp_path, i=np.arange(1 << 18), h=weights(1 << 20).astype("f2"))
        found = load_light(path)
        assert [t.name for t in found.graph.initializer if is_reference(t)] == ["w"]
        for a, b in zip(net.graph.initializer, found.graph.initializer, strict=True):
            np.testing.assert_array_equal(numpy_helper.to_array(a), read(b))

    def test_data_that_does_not_fit_is_told_as_ever(self, tmp_path) -> None:
        net, path = self.written(tmp_path)
        net.graph.initializer[0].dims[0] = 601
        path.write_bytes(net.SerializeToString())
        errors = []
        for lazy in (False, True):
            with pytest.raises(ModelError, match=r"'w'.*does not fit its shape") as e:
                load(path, lazy=lazy)
            errors.append(str(e.value))
        assert errors[0] == errors[1]

    def test_small_models_are_read_as_a_whole(self, tmp_path) -> None:
        path = tmp_path / "m.onnx"
        path.write_bytes(message([5]).SerializeToString())
        assert load_light(path) is None

    def test_a_file_that_cannot_be_mapped(self, tmp_path, monkeypatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise OSError("no such device")

        net, path = self.written(tmp_path)
        monkeypatch.setattr("qdq.weights.mmap.mmap", refuse)
        assert load_light(path) is None
        assert load(path, lazy=True) == net

    def test_a_damaged_file_is_told_as_ever(self, tmp_path) -> None:
        _, path = self.written(tmp_path)
        path.write_bytes(path.read_bytes()[:-100])
        errors = []
        for lazy in (False, True):
            with pytest.raises(ModelError, match="truncated") as e:
                load(path, lazy=lazy)
            errors.append(str(e.value))
        assert errors[0] == errors[1]

    def test_the_map_is_closed(self, tmp_path) -> None:
        """Windows does not let go of a file that is mapped."""
        _, path = self.written(tmp_path)
        found = load(path, lazy=True)
        assert not file_weights._maps
        assert found.graph.initializer[0].data_type == TensorProto.FLOAT
