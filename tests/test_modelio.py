"""Models in and out: own copies, readable errors, files that are whole or absent."""

import pathlib
import sys
import types

import harness
import numpy as np
import onnx
import pytest
from harness import FORCED, fused_ops, sqnr
from models import conv_chain, feeds, model, node, weights
from onnx import TensorProto, helper, numpy_helper

from qdq import modelio
from qdq.api import run
from qdq.errors import ModelError
from qdq.modelio import load, save
from qdq.weights import read


@pytest.fixture
def net() -> onnx.ModelProto:
    return conv_chain(channels=4, size=8, depth=2)


def external(path: pathlib.Path, net: onnx.ModelProto) -> pathlib.Path:
    own = onnx.ModelProto()
    own.CopyFrom(net)  # onnx.save changes the model it is given
    onnx.save(own, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def normalized(op: str, opset: int) -> onnx.ModelProto:
    """Two products around a norm that onnxruntime has in the default domain at any opset."""
    constants = {"w": weights(64, 256), "s": np.ones(256, np.float32), "v": weights(256, 64)}
    nodes = [
        node("MatMul", ["x", "w"], "h"),
        node("LayerNormalization", ["h", "s"], "n"),
        node("MatMul", ["n", "v"], "y"),
    ]
    net = model(nodes, {"x": [64, 64]}, {"y": [64, 64]}, constants, opset=17)
    net.graph.node[1].op_type = op
    net.opset_import[0].version = opset
    return net


class TestRuntimesOwnOperators:
    """As ``onnxruntime.transformers`` and the model builder write them."""

    @pytest.mark.parametrize(
        ("op", "opset"),
        [
            ("LayerNormalization", 12),
            ("LayerNormalization", 16),
            ("SimplifiedLayerNormalization", 14),
            ("SimplifiedLayerNormalization", 21),
        ],
    )
    def test_a_norm_that_the_standard_does_not_know(self, op: str, opset: int) -> None:
        net, data = normalized(op, opset), feeds({"x": [64, 64]}, 4)
        with pytest.raises((onnx.checker.ValidationError, RuntimeError)):
            onnx.checker.check_model(net)
        result = run(net, data)
        (norm,) = [n for n in result.model.graph.node if n.op_type == op]
        assert norm.domain == ""
        assert result.model.opset_import[0].version == 21
        assert len(result.plan.quantized) == 2
        exact, rounded = (harness.run(m, data, fused=True) for m in (net, result.model))
        assert min(sqnr(a, b) for (a,), (b,) in zip(exact, rounded, strict=True)) > 30
        assert {v.name for v in result.model.graph.value_info} >= {"h", "n"}

    def test_their_domain_need_not_be_imported(self) -> None:
        net = normalized("LayerNormalization", 17)
        net.graph.node[1].CopyFrom(
            helper.make_node("FastGelu", ["h"], ["n"], "n", domain="com.microsoft")
        )
        del net.graph.initializer[1]
        made = run(net, feeds({"x": [64, 64]}, 2)).model
        assert {o.domain: o.version for o in made.opset_import}["com.microsoft"] == 1
        assert len(net.opset_import) == 1


class TestLoad:
    def test_every_kind_of_source_gives_the_same_model(self, net, tmp_path) -> None:
        path = tmp_path / "m.onnx"
        onnx.save(net, path)
        data = path.read_bytes()
        for source in (path, str(path), data, bytearray(data), net):
            assert load(source) == net

    def test_the_copy_is_owned(self, net) -> None:
        before = net.SerializeToString(deterministic=True)
        own = load(net)
        own.graph.node[0].name = "changed"
        own.graph.initializer[0].raw_data = b""
        assert net.SerializeToString(deterministic=True) == before

    def test_external_data_is_read_from_the_models_folder(self, net, tmp_path, monkeypatch) -> None:
        path = external(tmp_path / "m.onnx", net)
        monkeypatch.chdir("/")
        own = load(path)
        assert {t.name: numpy_helper.to_array(t).tobytes() for t in own.graph.initializer} == {
            t.name: numpy_helper.to_array(t).tobytes() for t in net.graph.initializer
        }
        assert all(t.data_location != TensorProto.EXTERNAL for t in own.graph.initializer)

    def test_missing_external_data_is_an_error(self, net, tmp_path) -> None:
        path = external(tmp_path / "m.onnx", net)
        (tmp_path / "weights.bin").unlink()
        with pytest.raises(ModelError, match=r"m\.onnx.*another file"):
            load(path)

    @pytest.mark.parametrize("lazy", [True, False])
    @pytest.mark.parametrize(
        ("key", "value", "reason"),
        [
            ("offset", "abc", "offset 'abc'.*number of bytes"),
            ("offset", "-5", "offset '-5'.*number of bytes"),
            ("length", "abc", "length 'abc'.*number of bytes"),
            ("length", "9" * 5000, "length '9+'.*number of bytes"),
            ("length", "99999", r"holds \d+ bytes; wanted bytes \d+ to \d+.*truncated"),
            ("offset", "99999", r"holds \d+ bytes; wanted bytes 99999 to \d+.*truncated"),
            ("location", "absent.bin", "'absent.bin', which is no file there"),
            ("location", ".", "'.', which is no file there"),
            ("location", "a\0b", "which is no file there"),
            ("location", "", "no path below the model's folder"),
            ("location", "../weights.bin", "no path below the model's folder"),
            ("location", "/weights.bin", "no path below the model's folder"),
        ],
    )
    def test_malformed_notes_name_tensor_and_file(
        self, net, tmp_path, key, value, reason, lazy
    ) -> None:
        path = external(tmp_path / "m.onnx", net)
        light = onnx.load(path, load_external_data=False)
        for entry in light.graph.initializer[1].external_data:
            entry.value = value if entry.key == key else entry.value
        onnx.save(light, path)
        with pytest.raises(ModelError, match=rf"m\.onnx'.*'b0' in another file, .*{reason}") as e:
            load(path, lazy=lazy)
        assert e.value.tensor == "b0"

    def test_data_without_offset_and_length(self, net, tmp_path) -> None:
        path = external(tmp_path / "m.onnx", net)
        light = onnx.load(path, load_external_data=False)
        first = light.graph.initializer[0]
        (tmp_path / "own.bin").write_bytes(net.graph.initializer[0].raw_data)
        del first.external_data[:]
        first.external_data.add(key="location", value="own.bin")
        onnx.save(light, path)
        assert load(path) == load(net)

    def test_external_data_of_a_constant_node(self, net, tmp_path) -> None:
        value = net.graph.initializer.pop(0)
        net.graph.node.insert(0, helper.make_node("Constant", [], [value.name], "k", value=value))
        path = tmp_path / "m.onnx"
        onnx.save(
            onnx.ModelProto.FromString(net.SerializeToString()),
            path,
            save_as_external_data=True,
            location="weights.bin",
            size_threshold=0,
            convert_attribute=True,
        )
        for lazy in (True, False):
            assert read(load(path, lazy=lazy).graph.node[0].attribute[0].t).any()
        light = onnx.load(path, load_external_data=False)
        del light.graph.initializer[:]
        with pytest.raises(ModelError, match=r"'w0' in an external file.*give the path"):
            load(light)

    def test_bytes_of_a_model_with_external_data_are_an_error(self, net, tmp_path) -> None:
        data = external(tmp_path / "m.onnx", net).read_bytes()
        with pytest.raises(ModelError, match=r"'w0'.*give the path"):
            load(data)

    def test_ir_model_is_converted_without_importing_onnx_ir(self, net, monkeypatch) -> None:
        ir = types.ModuleType("onnx_ir")

        class Model:
            proto = net

        ir.Model = Model  # type: ignore[attr-defined]
        ir.to_proto = lambda m: m.proto  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "onnx_ir", ir)
        assert load(Model()) == net

    def test_ir_model_with_external_data(self, net, tmp_path, monkeypatch) -> None:
        """As ``onnx_ir.load`` makes it: its tensors know their file, its proto has no folder."""
        path = external(tmp_path / "m.onnx", net)
        light = onnx.load(path, load_external_data=False)
        found = {}
        for t in net.graph.initializer:
            data = types.SimpleNamespace(tobytes=numpy_helper.to_array(t).tobytes)
            found[t.name] = types.SimpleNamespace(const_value=data)
        ir = types.ModuleType("onnx_ir")

        class Model:
            graph = types.SimpleNamespace(initializers=found)

        ir.Model = Model  # type: ignore[attr-defined]
        ir.to_proto = lambda _: light  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "onnx_ir", ir)
        before = light.SerializeToString(deterministic=True)
        assert load(Model()) == load(path)
        assert light.SerializeToString(deterministic=True) == before

        def gone() -> bytes:
            raise FileNotFoundError("weights.bin")

        found["b0"].const_value.tobytes = gone
        with pytest.raises(ModelError, match=r"'b0' in a file.*weights\.bin") as e:
            load(Model())
        assert e.value.tensor == "b0"

    def test_unknown_type(self) -> None:
        with pytest.raises(ModelError, match="type int cannot be read"):
            load(7)

    def test_missing_file(self, tmp_path) -> None:
        with pytest.raises(ModelError, match=r"absent\.onnx' does not exist"):
            load(tmp_path / "absent.onnx")

    def test_folder(self, tmp_path) -> None:
        with pytest.raises(ModelError, match="is a folder"):
            load(tmp_path)

    @pytest.mark.parametrize("cut", [0, 10, -10])
    def test_truncated_file(self, net, tmp_path, cut) -> None:
        path = tmp_path / "cut.onnx"
        path.write_bytes(net.SerializeToString()[:cut])
        with pytest.raises(ModelError, match=r"cut\.onnx"):
            load(path)

    def test_no_bytes(self) -> None:
        with pytest.raises(ModelError, match="empty"):
            load(b"")

    def test_not_onnx(self, tmp_path) -> None:
        path = tmp_path / "text.onnx"
        path.write_text("this is no model at all, only a text file")
        with pytest.raises(ModelError, match=r"text\.onnx"):
            load(path)

    def test_invalid_graph(self, net) -> None:
        net.graph.node[1].input[0] = "nowhere"
        with pytest.raises(ModelError, match=r"not a valid ONNX model.*nowhere"):
            load(net)

    def test_unsorted_graph_is_sorted(self, net) -> None:
        nodes = list(net.graph.node)
        del net.graph.node[:]
        net.graph.node.extend(nodes[::-1])
        assert [n.name for n in load(net).graph.node] == [n.name for n in nodes]

    def test_cycle_is_an_error(self) -> None:
        net = model([node("Relu", ["x"], "y")], {"x": [1]}, {"y": [1]})
        net.graph.node.append(node("Add", ["a", "x"], "b"))
        net.graph.node.append(node("Relu", ["b"], "a"))
        with pytest.raises(ModelError, match="not a valid"):
            load(net)

    def test_functions_are_inlined(self) -> None:
        net = model([node("Relu", ["x"], "y")], {"x": [1]}, {"y": [1]})
        relu = node("Relu", ["a"], "b")
        opsets = [helper.make_opsetid("", 21)]
        net.functions.append(helper.make_function("own", "Twice", ["a"], ["b"], [relu], opsets))
        net.opset_import.append(helper.make_opsetid("own", 1))
        net.graph.node[0].op_type, net.graph.node[0].domain = "Twice", "own"
        own = load(net)
        assert [n.op_type for n in own.graph.node] == ["Relu"]
        assert not own.functions


def without(net: onnx.ModelProto, *fields: str) -> onnx.ModelProto:
    """The model, less its outputs' ``shape`` or ``type``, or the shapes of its ``inputs``."""
    for v in net.graph.output if fields != ("inputs",) else net.graph.input:
        if "type" in fields:
            v.ClearField("type")
        else:
            v.type.tensor_type.ClearField("shape")
    return net


class TestShapes:
    """onnxruntime needs no shapes of inputs and outputs, nor types of outputs."""

    def test_outputs_get_what_inference_finds(self, net) -> None:
        for field in ("shape", "type"):
            before = net.SerializeToString()
            bare = without(onnx.ModelProto.FromString(before), field)
            with pytest.raises(onnx.checker.ValidationError):
                onnx.checker.check_model(bare)
            assert load(bare) == net
            assert load(bare) != bare

    @pytest.mark.parametrize("field", ["shape", "type"])
    def test_unknown_rank(self, field) -> None:
        """Nothing can tell the rank of y; the model quantizes all the same."""
        nodes = [node("Conv", ["x", "w"], "c", pads=[1] * 4), node("Reshape", ["c", "s"], "y")]
        inputs = {"x": [1, 8, 8, 8], "s": ["rank"]}
        net = model(nodes, inputs, {"y": [None]}, {"w": weights(8, 8, 3, 3)})
        net.graph.input[1].type.tensor_type.elem_type = TensorProto.INT64
        own = load(without(net, field))
        assert own.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
        assert not own.graph.output[0].type.tensor_type.HasField("shape")
        data = [{**f, "s": np.array([8, 64])} for f in feeds({"x": (1, 8, 8, 8)}, 4)]
        made = run(net, data, target=FORCED).model
        assert fused_ops(made)["QLinearConv"] == 1
        (expected,), (found,) = (harness.run(m, data[:1], fused=True)[0] for m in (net, made))
        assert found.shape == (8, 64)
        assert sqnr(expected, found) > 30

    def test_inputs(self, net) -> None:
        bare = without(net, "inputs")
        data = feeds({"x": (1, 4, 8, 8)}, 4)
        made = run(bare, data, target=FORCED).model
        assert fused_ops(made)["QLinearConv"] == 2
        (expected,), (found,) = (harness.run(m, data[:1], fused=True)[0] for m in (net, made))
        assert sqnr(expected, found) > 30

    def test_an_input_without_a_type_is_an_error(self, net) -> None:
        net.graph.input[0].ClearField("type")
        with pytest.raises(ModelError, match=r"not a valid ONNX model.*type"):
            load(net)

    def test_what_is_wrong_elsewhere_is_still_found(self, net) -> None:
        net.graph.node[1].op_type = "Relo"
        with pytest.raises(ModelError, match="Relo") as e:
            load(without(net, "shape"))
        assert "\n" not in str(e.value)


class TestQuantized:
    @pytest.mark.parametrize("op", ["QuantizeLinear", "DynamicQuantizeLinear"])
    def test_in_the_graph(self, op) -> None:
        outputs = ["q", "s", "z"] if op.startswith("Dyn") else ["q"]
        inputs = ["x"] if op.startswith("Dyn") else ["x", "scale"]
        n = helper.make_node(op, inputs, outputs, name="here")
        net = model([node("Relu", ["x"], "y"), n], {"x": [1]}, {"y": [1]}, {"scale": np.float32(1)})
        with pytest.raises(ModelError, match=f"'here' is a {op}.*float model") as e:
            load(net)
        assert e.value.node == "here"

    def test_in_a_subgraph(self) -> None:
        q = helper.make_node("QuantizeLinear", ["x", "s"], ["q"], name="inner")
        dq = helper.make_node("DequantizeLinear", ["q", "s"], ["r"])
        out = helper.make_tensor_value_info("r", 1, [1])
        branch = helper.make_graph([q, dq], "branch", [], [out])
        n = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
        constants = {"c": np.array(True), "s": np.float32(1)}
        net = helper.make_model(
            helper.make_graph(
                [n],
                "g",
                [helper.make_tensor_value_info("x", 1, [1])],
                [helper.make_tensor_value_info("y", 1, [1])],
                [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
            ),
            opset_imports=[helper.make_opsetid("", 21)],
            ir_version=10,
        )
        with pytest.raises(ModelError, match="'inner' is a QuantizeLinear"):
            load(net)


class TestFinite:
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_weight(self, net, value) -> None:
        w = weights(4, 4, 3, 3)
        w[1, 2, 0, 0] = value
        net.graph.initializer[0].CopyFrom(numpy_helper.from_array(w, "w0"))
        with pytest.raises(ModelError, match=r"'w0'.*1 NaN or Inf.*\(1, 2, 0, 0\)") as e:
            load(net)
        assert e.value.tensor == "w0"

    def test_mask_of_minus_inf_is_fine(self) -> None:
        mask = np.triu(np.full((4, 4), -np.inf, np.float32), 1)
        net = model([node("Add", ["x", "m"], "y")], {"x": [4, 4]}, {"y": [4, 4]}, {"m": mask})
        assert load(net) == net

    def test_open_clip_is_fine(self) -> None:
        constants = {"lo": np.float32(0), "hi": np.float32(np.inf)}
        net = model([node("Clip", ["x", "lo", "hi"], "y")], {"x": [4]}, {"y": [4]}, constants)
        assert load(net) == net

    def test_constant_node(self) -> None:
        value = numpy_helper.from_array(np.array([1, np.nan, 2, 3], np.float32))
        nodes = [helper.make_node("Constant", [], ["k"], value=value), node("Add", ["x", "k"], "y")]
        with pytest.raises(ModelError, match="'k'"):
            load(model(nodes, {"x": [4]}, {"y": [4]}))

    @pytest.mark.parametrize("kept_as", ["node", "initializer"])
    def test_sparse_values(self, kept_as: str) -> None:
        value = numpy_helper.from_array(np.array([np.nan], np.float32), "k")
        at = numpy_helper.from_array(np.array([2]))
        sparse = helper.make_sparse_tensor(value, at, [4])
        nodes = [helper.make_node("Constant", [], ["k"], sparse_value=sparse)]
        net = model([*nodes, node("Add", ["x", "k"], "y")], {"x": [4]}, {"y": [4]})
        if kept_as == "initializer":
            del net.graph.node[0]
            net.graph.sparse_initializer.append(sparse)
        with pytest.raises(ModelError, match="'k'"):
            load(net)


@pytest.mark.parametrize("kind", [np.float32, np.int64])
def test_data_that_does_not_fit_its_shape(net, kind) -> None:
    net.graph.initializer.append(numpy_helper.from_array(np.zeros((40, 50), kind), "k"))
    net.graph.initializer[-1].raw_data = net.graph.initializer[-1].raw_data[:-8]
    with pytest.raises(ModelError, match=r"'k'.*\(40, 50\)") as e:
        load(net)
    assert e.value.tensor == "k"


class TestSave:
    def test_round_trip(self, net, tmp_path) -> None:
        save(net, tmp_path / "m.onnx")
        assert load(tmp_path / "m.onnx") == net
        assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]

    def test_large_model_gets_a_data_file(self, net, tmp_path, monkeypatch) -> None:
        net.graph.initializer.append(numpy_helper.from_array(np.arange(5000.0), "big"))
        doubles = helper.make_tensor("typed", TensorProto.DOUBLE, [500], list(range(500)))
        net.graph.initializer.append(doubles)
        before = net.SerializeToString(deterministic=True)
        monkeypatch.setattr(modelio, "_PROTO_LIMIT", 2000)
        save(net, str(tmp_path / "m.onnx"))
        assert net.SerializeToString(deterministic=True) == before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
        assert (tmp_path / "m.onnx").stat().st_size < 5000
        onnx.checker.check_model(str(tmp_path / "m.onnx"))
        own = load(tmp_path / "m.onnx")
        for a in net.graph.initializer:
            (b,) = [t for t in own.graph.initializer if t.name == a.name]
            np.testing.assert_array_equal(numpy_helper.to_array(a), numpy_helper.to_array(b))

    @pytest.mark.parametrize("limit", [2**31, 100])
    def test_failure_leaves_nothing_and_keeps_the_old_file(
        self, net, tmp_path, monkeypatch, limit
    ) -> None:
        target = tmp_path / "m.onnx"
        target.write_bytes(b"old")
        monkeypatch.setattr(modelio, "_PROTO_LIMIT", limit)

        def full(self, data):
            with self.open("wb") as f:
                f.write(data[:3])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(pathlib.Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            save(net, target)
        monkeypatch.undo()
        assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
        assert target.read_bytes() == b"old"

    def test_permissions_are_those_of_a_plain_file(self, net, tmp_path) -> None:
        (tmp_path / "plain").write_bytes(b"")
        save(net, tmp_path / "m.onnx")
        assert (tmp_path / "m.onnx").stat().st_mode == (tmp_path / "plain").stat().st_mode
