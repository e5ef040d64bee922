"""Weights that stay in their file: the same values, the same bytes of the result, no memory."""

import gc
import os
import pickle
import re
import tracemalloc
from pathlib import Path
from weakref import ref

import numpy as np
import onnx
import pytest
from harness import FORCED
from models import feeds, model, node, weights
from onnx import TensorProto, numpy_helper

import qdq.weights as file_weights
from qdq.api import run
from qdq.calibrate import MinMax
from qdq.errors import ModelError
from qdq.evidence import Evidence, solved
from qdq.graph import Graph
from qdq.modelio import load, save
from qdq.outputs import data_files
from qdq.prepare import prepare
from qdq.scheme import Rule, Scheme
from qdq.stages import begin, gather, learn
from qdq.statistics.shipment import Shipment, fingerprint
from qdq.steps import DEFAULT_STEPS
from qdq.weights import Weights, copy_into, is_reference, read, turned

WIDTH = 520  # a little above 1 MiB of weights, and no multiple of a tile


def chain(layers: int, width: int, *, turned: bool = False) -> onnx.ModelProto:
    """Gemm and MatMul in turns."""
    constants, nodes = {}, []
    for i in range(layers):
        constants |= {f"w{i}": weights(width, width, seed=i), f"b{i}": weights(width, seed=i + 50)}
        if i % 2:
            nodes.append(node("MatMul", [f"x{i}", f"w{i}"], f"x{i + 1}"))
        else:
            inputs = [f"x{i}", f"w{i}", f"b{i}"]
            nodes.append(node("Gemm", inputs, f"x{i + 1}", transB=int(turned)))
    shape = [4, width]
    return model(nodes, {"x0": shape}, {f"x{layers}": shape}, constants)


def in_files(net: onnx.ModelProto, path: Path) -> Path:
    save(net, path, external_data=True)
    return path


@pytest.fixture
def net() -> onnx.ModelProto:
    return chain(2, WIDTH, turned=True)


@pytest.fixture
def path(net: onnx.ModelProto, tmp_path: Path) -> Path:
    return in_files(net, tmp_path / "m.onnx")


@pytest.fixture(params=["external", "inside"])
def either(net: onnx.ModelProto, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A model whose weights are in another file, or in its own."""
    save(net, tmp_path / "m.onnx", external_data=request.param == "external")
    return tmp_path / "m.onnx"


def file_of(model: Path) -> Path:
    """The file that holds the weights."""
    data = model.with_name(model.name + ".data")
    return data if data.exists() else model


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 weights of 4 MiB."""
    return in_files(chain(12, 1024), tmp_path_factory.mktemp("large") / "m.onnx")


def weight(net: onnx.ModelProto, name: str = "w0") -> TensorProto:
    (found,) = [t for t in net.graph.initializer if t.name == name]
    return found


def values(net: onnx.ModelProto) -> dict[str, bytes]:
    return {t.name: numpy_helper.to_array(t).tobytes() for t in net.graph.initializer}


class TestReferences:
    def test_only_large_weights_and_only_if_asked_for(self, net, either) -> None:
        lazy = load(either, lazy=True)
        stays = {t.name for t in lazy.graph.initializer if is_reference(t)}
        assert stays == {"w0", "w1"}
        assert lazy.ByteSize() < 20_000
        assert values(load(either)) == values(net)
        assert load(net, lazy=True) == net

    def test_values(self, net, either) -> None:
        lazy = load(either, lazy=True)
        for t in net.graph.initializer:
            np.testing.assert_array_equal(read(weight(lazy, t.name)), numpy_helper.to_array(t))

    def test_turned(self, net, path) -> None:
        expected = weights(WIDTH, WIDTH - 1)
        net = model([node("MatMul", ["x", "w"], "y")], {"x": [1, WIDTH]}, {"y": [1, WIDTH - 1]},
                    {"w": expected})  # fmt: skip
        w = weight(load(in_files(net, path.with_name("n.onnx")), lazy=True), "w")
        once = turned(w, "once")
        assert (once.name, list(once.dims)) == ("once", [WIDTH - 1, WIDTH])
        assert read(once).flags.c_contiguous
        np.testing.assert_array_equal(read(once), expected.T)
        np.testing.assert_array_equal(read(turned(once, "twice")), expected)

    def test_a_view_that_is_not_aligned_is_copied(self, path) -> None:
        data = path.with_name("odd.data")
        value = weights(WIDTH, WIDTH)
        data.write_bytes(b"\1\2\3" + value.tobytes())
        net = load(path, lazy=True)
        t = weight(net)
        del t.external_data[:]
        for key, entry in (("location", data.name), ("offset", "3"), ("length", value.nbytes)):
            t.external_data.add(key=key, value=str(entry))
        assert file_weights.refer(t, data, 3, value.nbytes)
        assert read(t).flags.aligned
        np.testing.assert_array_equal(read(t), value)

    def test_copy_into_puts_the_data_inside(self, net, either) -> None:
        own = TensorProto()
        copy_into(own, weight(load(either, lazy=True)))
        assert own == weight(net)

    def test_save_puts_the_data_inside(self, net, either) -> None:
        lazy = load(either, lazy=True)
        for k, external in enumerate((False, True)):
            save(lazy, either.with_name(f"{k}.onnx"), external_data=external)
        file_of(either).unlink()
        for k in range(2):
            assert values(load(either.with_name(f"{k}.onnx"))) == values(net)

    def test_travels_with_its_data(self, either) -> None:
        parcel = pickle.dumps(Shipment(prepare(load(either, lazy=True))))
        mark = fingerprint(prepare(load(either, lazy=True)))
        expected = prepare(load(either))
        file_of(either).unlink()
        found = pickle.loads(parcel).model
        assert not any(is_reference(t) for t in found.graph.initializer)
        assert fingerprint(found) == fingerprint(expected) == mark

    def test_the_map_is_closed_with_its_last_array(self, path) -> None:
        lazy = load(path, lazy=True)
        first, second = read(weight(lazy)), read(weight(lazy, "w1"))
        assert len(file_weights._maps) == 1
        del first, second
        assert not file_weights._maps


class TestFiles:
    @pytest.mark.parametrize("what", ["changed", "gone"])
    def test_a_file_that_changes_is_an_error(self, either, what) -> None:
        lazy, data = load(either, lazy=True), file_of(either)
        if what == "gone":
            data.unlink()
        else:
            os.utime(data, ns=(0, 0))
        told = rf"'w0'.*{re.escape(data.name)}'.*changed or gone"
        with pytest.raises(ModelError, match=told) as e:
            read(weight(lazy))
        assert e.value.tensor == "w0"

    def test_a_short_file_is_an_error_at_once(self, path) -> None:
        data = path.parent / "m.onnx.data"
        data.write_bytes(data.read_bytes()[: 1 << 20])
        with pytest.raises(ModelError, match=r"m\.onnx.*another file"):
            load(path, lazy=True)

    def test_a_file_in_another_folder_is_refused(self, net, path) -> None:
        inner = path.parent / "inner"
        inner.mkdir()
        light = onnx.load(path, load_external_data=False)
        for t in light.graph.initializer:
            for entry in t.external_data:
                if entry.key == "location":
                    entry.value = f"../{entry.value}"
        onnx.save(light, inner / "m.onnx")
        with pytest.raises(ModelError, match="another file"):
            load(inner / "m.onnx", lazy=True)

    @pytest.mark.parametrize("lazy", [True, False])
    def test_links_are_followed(self, net, path, lazy) -> None:
        """As in the cache of a hub: the model and its data are links to files of other names."""
        blobs, snapshot = path.parent / "blobs", path.parent / "snapshots" / "1"
        blobs.mkdir()
        snapshot.mkdir(parents=True)
        for name in ("m.onnx", "m.onnx.data"):
            path.with_name(name).rename(blobs / f"{name[-4:]}")
            (snapshot / name).symlink_to(Path("..", "..", "blobs", name[-4:]))
        found = load(snapshot / "m.onnx", lazy=lazy)
        assert any(is_reference(t) for t in found.graph.initializer) == lazy
        assert data_files(snapshot / "m.onnx") == [snapshot / "m.onnx.data"]
        (snapshot / "m.onnx.data").unlink()  # a reference is to what was there
        assert {t.name: read(t).tobytes() for t in found.graph.initializer} == values(net)

    @pytest.mark.parametrize("lazy", [True, False])
    def test_a_link_to_a_model_beside_its_data(self, net, path, lazy) -> None:
        other = path.parent / "other"
        other.mkdir()
        (other / "link.onnx").symlink_to(path)
        found = load(other / "link.onnx", lazy=lazy)
        assert {t.name: read(t).tobytes() for t in found.graph.initializer} == values(net)
        (found,) = data_files(other / "link.onnx")
        assert found.samefile(file_of(path))


@pytest.mark.parametrize("smooth_channel", [None, 7])
def test_same_bytes_as_from_memory(net, either, smooth_channel) -> None:
    data = feeds({"x0": (4, WIDTH)}, 4)
    if smooth_channel is not None:
        for feed in data:
            feed["x0"][:, smooth_channel] *= 100
    made = [run(source, data, target=FORCED).model for source in (net, either)]
    assert made[0].SerializeToString() == made[1].SerializeToString()
    assert not any(t.data_location for t in made[1].graph.initializer)


def test_kept_float_weights_are_inside(net, either) -> None:
    data = feeds({"x0": (4, WIDTH)}, 4)
    for name, expected in (("Gemm.*", weights(WIDTH, WIDTH, seed=0).T), ("MatMul.*", None)):
        scheme = Scheme(rules=(Rule(nodes=name, keep_float=True),))
        made = [run(source, data, scheme=scheme, target=FORCED).model for source in (net, either)]
        assert made[0].SerializeToString() == made[1].SerializeToString()
        (kept,) = [v for n, v in values(made[1]).items() if n in ("w1", "w0_folded")]
        wanted = weights(WIDTH, WIDTH, seed=1) if expected is None else expected
        assert kept == wanted.tobytes()


class Counted(Weights):
    """Counts the arrays that were read and live."""

    alive: list[ref]
    most: int

    def __getitem__(self, name: str) -> np.ndarray:
        value = super().__getitem__(name).view()  # a view of its own: the base may be shared
        self.alive = [r for r in getattr(self, "alive", []) if r() is not None] + [ref(value)]
        large = sum(r().nbytes > 1 << 20 for r in self.alive)  # type: ignore[union-attr]
        self.most = max(getattr(self, "most", 0), large)
        return value


def evidence_of(source: object, data: list) -> Evidence:
    start = begin(source, data, None, *_settings())
    return learn(start, gather(start, MinMax(), None, None), MinMax())


def _settings():
    return Scheme(), MinMax(), DEFAULT_STEPS, FORCED


class TestMemory:
    def test_the_solver_holds_few_weights(self, large, monkeypatch) -> None:
        made: list[Counted] = []

        def counted(tensors):
            made.append(Counted(tensors))
            return made[-1]

        monkeypatch.setattr("qdq.evidence.Weights", counted)
        evidence = evidence_of(large, feeds({"x0": (4, 1024)}, 2))
        solved(evidence, evidence.plan, DEFAULT_STEPS)
        assert made[0].most <= 3
        assert sum(n.startswith("w") for n in made[0]) == 12

    def test_python_holds_a_part_of_the_weights(self, large) -> None:
        """Of 48 MiB, the codes are 12; one weight at a time is widened to find its codes."""
        data = feeds({"x0": (4, 1024)}, 2)
        gc.collect()
        tracemalloc.start()
        try:
            result = run(large, data, calibrator=MinMax(), target=FORCED)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert len(result.plan.quantized) == 12
        assert peak < 36 << 20

    def test_the_prepared_model_has_no_data(self, tmp_path) -> None:
        lazy = load(in_files(chain(3, 600, turned=True), tmp_path / "m.onnx"), lazy=True)
        assert prepare(lazy).ByteSize() < 40_000

    def test_constants_in_memory_are_decoded_once_up_to_a_limit(self, net, monkeypatch) -> None:
        tensors = Graph(net).constants
        kept = Weights(tensors)
        assert all(kept[n] is kept[n] for n in tensors)
        monkeypatch.setattr(file_weights, "_KEPT", 1 << 20)
        tight = Weights(tensors)
        assert tight["w0"] is not tight["w0"]
        assert tight["b0"] is tight["b0"]
        assert "w0" in tight
        assert "nothing" not in tight
        assert list(tight) == list(tensors)
