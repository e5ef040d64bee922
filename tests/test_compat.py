"""qdq.compat: every argument and option of onnxruntime.quantization is honoured or refused."""

import inspect
import json
import logging
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime.quantization as theirs
import pytest
from harness import ASYMMETRIC, older
from models import model, node, weights

import qdq
from qdq import Rule, Scheme, compat
from qdq.compat import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    StaticQuantConfig,
    quant_pre_process,
    quantize_static,
)
from qdq.compat.options import _REFUSED, KNOWN, Options, read_options
from qdq.demo import MODEL, digits
from qdq.session import run as infer
from qdq.steps import DEFAULT_STEPS, FitWeightsToBias
from qdq.targets import ORT_CPU_NO_VNNI, PORTABLE

DATA = digits().calibration[:6]
PAGE = (Path(__file__).parents[1] / "docs/how-to/from-onnxruntime.md").read_text(encoding="utf8")
INT8_SPEC = qdq.QuantSpec(dtype=qdq.INT8)


class Reader(CalibrationDataReader):
    """As scripts write it, with what strided calibration wants."""

    def __init__(self, samples=DATA) -> None:
        self.all, self.ranges = list(samples), []
        self.set_range(0, len(self.all))

    def get_next(self):
        return next(self.samples, None)

    def __len__(self) -> int:
        return len(self.all)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.samples = iter(self.all[start_index:end_index])
        self.ranges.append((start_index, end_index))


class Endless(CalibrationDataReader):
    """A reader with what it must have, and no more."""

    def __init__(self) -> None:
        self.samples = iter(DATA)

    def get_next(self):
        return next(self.samples, None)


def made(tmp_path: Path, source=MODEL, reader=None, **arguments) -> onnx.ModelProto:
    path = tmp_path / "out.onnx"
    samples = Reader() if reader is None else reader
    assert quantize_static(source, path, samples, **arguments) is None
    return onnx.load(path)


def left_float(found: onnx.ModelProto) -> dict[str, str]:
    return json.loads(next(p.value for p in found.metadata_props if p.key == "qdq.left_float"))


def outputs(source, samples) -> np.ndarray:
    return np.stack([next(iter(o.values())) for o in infer(source, samples)])


LATER = {"calibration_cache_path"} if older("1.27") else set()
"""Arguments that the installed onnxruntime does not have yet. It wants a reader where they lack."""


def option(**extra_options) -> dict:
    return {"extra_options": extra_options}


class TestContract:
    """With the installed onnxruntime."""

    @pytest.mark.parametrize(
        "name", ["quantize_static", "quantize", "get_qdq_config", "quant_pre_process"]
    )
    def test_arguments(self, name: str) -> None:
        found = list(inspect.signature(getattr(theirs, name)).parameters)
        own = [a for a in inspect.signature(getattr(compat, name)).parameters if a not in LATER]
        assert own == [{"deprecated_kwargs": "input_model_path"}.get(a, a) for a in found]

    def test_arguments_of_the_config(self) -> None:
        found = list(inspect.signature(theirs.StaticQuantConfig).parameters)
        assert list(inspect.signature(StaticQuantConfig).parameters) == found
        assert vars(StaticQuantConfig(None)).keys() >= set(found)

    def test_defaults_are_theirs_or_qdqs(self) -> None:
        found = inspect.signature(theirs.quantize_static).parameters
        own = inspect.signature(quantize_static).parameters
        better = {n for n, p in own.items() if p.default is compat.types.UNSET}
        assert better == {"per_channel", "activation_type", "weight_type", "calibrate_method"}
        other = {"quant_format", *LATER, *({"calibration_data_reader"} if LATER else ())}
        for name in own.keys() - better - other:
            assert own[name].default == found[name].default

    def test_extra_options(self) -> None:
        text = inspect.getdoc(theirs.quantize_static) or ""
        named = re.findall(r"^ +([A-Za-z][\w.]*) = ", text, re.M)
        package = Path(theirs.__file__).parent
        files = ["quantize.py", "base_quantizer.py", "qdq_quantizer.py", "onnx_quantizer.py"]
        paths = [*(package / f for f in files), *(package / "operators").glob("*.py")]
        read = r'extra_options(?:\.get\(|\[)\s*"([\w.]+)"|"([\w.]+)" (?:not )?in \S*extra_options'
        for path in paths:
            source = path.read_text(encoding="utf8")
            named += [a or b for a, b in re.findall(read, source)]
            named += re.findall(r'\("(Calib\w+)", "\w+"\)', source)
        assert len(set(named)) > 20
        assert set(named) <= KNOWN

    def test_public_names(self) -> None:
        names = {
            n for n, v in vars(theirs).items() if n[0] != "_" and not inspect.ismodule(v)
        }  # fmt: skip
        assert set(compat.__all__) <= names
        for name in names - set(compat.__all__):
            with pytest.raises(ImportError, match=f"qdq.compat has no {name}: "):
                getattr(compat, name)
        with pytest.raises(AttributeError, match="no attribute 'quantise'"):
            compat.quantise  # noqa: B018

    @pytest.mark.parametrize("name", ["QuantType", "QuantFormat", "CalibrationMethod"])
    def test_enumerations(self, name: str) -> None:
        own, other = getattr(compat, name), getattr(theirs, name)
        assert {m.name: m.value for m in own} == {m.name: m.value for m in other}
        assert [str(m) for m in own] == [str(m) for m in other]
        if name == "QuantType":
            assert [m.tensor_type for m in own] == [m.tensor_type for m in other]

    def test_from_string(self) -> None:
        assert QuantType.from_string("QUInt8") is QuantType.QUInt8
        with pytest.raises(qdq.ConfigError, match="no 'QUInt7'; nearest names: QUInt8"):
            QuantType.from_string("QUInt7")

    def test_the_page_has_all(self) -> None:
        wanted = KNOWN | set(inspect.signature(quantize_static).parameters)
        missing = {n for n in wanted if f"`{n}`" not in PAGE}
        assert not missing

    @pytest.mark.parametrize("kind", [CalibrationDataReader, theirs.CalibrationDataReader])
    def test_reader(self, kind: type) -> None:
        class Own(kind):
            def __init__(self) -> None:
                self.left = iter(DATA[:2])

            def get_next(self):
                return next(self.left, None)

        class Bare:
            def get_next(self):
                return None

        with pytest.raises(TypeError):
            kind()
        assert isinstance(Bare(), kind)
        assert not isinstance([], kind)
        assert [f is d for f, d in zip(iter(Own()), DATA, strict=False)] == [True, True]
        with pytest.raises(NotImplementedError):
            Own().set_range(0, 1)
        with pytest.raises(TypeError if kind is CalibrationDataReader else NotImplementedError):
            len(Own())


def wish(**arguments) -> dict:
    return {"scheme": Scheme(**arguments)}


WEIGHT = {"dtype": qdq.INT8, "symmetric": True}
STEPS = tuple(s for s in DEFAULT_STEPS if not isinstance(s, FitWeightsToBias))
CASES = {
    "nothing": ({}, {}),
    "types": (
        {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QUInt8},
        wish(weight=qdq.QuantSpec(dtype=qdq.UINT8)),
    ),
    "int8": ({"activation_type": QuantType.QInt8}, wish(activation=INT8_SPEC)),
    "their types": (
        {"activation_type": theirs.QuantType.QInt8, "quant_format": theirs.QuantFormat.QDQ},
        wish(activation=INT8_SPEC),
    ),
    "16 bits": (
        {"activation_type": QuantType.QUInt16},
        {**wish(activation=qdq.QuantSpec(dtype=qdq.UINT16)), "target": PORTABLE},
    ),
    "per tensor": ({"per_channel": False}, wish(per_channel=False)),
    "reduce_range": ({"reduce_range": True}, {"target": ORT_CPU_NO_VNNI}),
    "op types": (
        {"op_types_to_quantize": ["Conv", "Gemm", "LSTM", "EmbedLayerNormalization"]},
        wish(
            rules=(Rule(op_types=("Conv", "Gemm", "LSTM", "EmbedLayerNormalization"), only=True),)
        ),
    ),
    "nodes": (
        {"nodes_to_quantize": ["conv2", "conv3"], "nodes_to_exclude": ["conv3"]},
        wish(
            rules=(
                Rule(nodes="conv2", only=True),
                Rule(nodes="conv3", only=True),
                Rule(nodes="conv3", keep_float=True),
            )
        ),
    ),
    "nodes of types": (
        {"nodes_to_quantize": ["conv2"], "op_types_to_quantize": ["Conv"]},
        wish(rules=(Rule(nodes="conv2", op_types=("Conv",), only=True),)),
    ),
    "empty lists": ({"nodes_to_quantize": [], "op_types_to_quantize": []}, {}),
    "min max": ({"calibrate_method": CalibrationMethod.MinMax}, {"calibrator": qdq.MinMax()}),
    "entropy": ({"calibrate_method": CalibrationMethod.Entropy}, {"calibrator": qdq.Entropy()}),
    "percentile": (
        {"calibrate_method": CalibrationMethod.Percentile},
        {"calibrator": qdq.Percentile()},
    ),
    "which percentile": (
        {"calibrate_method": CalibrationMethod.Percentile, **option(CalibPercentile=99.0)},
        {"calibrator": qdq.Percentile(percentile=99.0)},
    ),
    "ActivationSymmetric": (
        option(ActivationSymmetric=True, CalibTensorRangeSymmetric=False),
        wish(activation=qdq.QuantSpec(symmetric=True)),
    ),
    "CalibTensorRangeSymmetric": (
        option(CalibTensorRangeSymmetric=True),
        wish(activation=qdq.QuantSpec(symmetric=True)),
    ),
    "WeightSymmetric": (
        option(WeightSymmetric=False),
        wish(weight=qdq.QuantSpec(dtype=qdq.INT8)),
    ),
    "WeightSymmetric=None": (option(WeightSymmetric=None), {}),
    "SmoothQuant": (option(SmoothQuant=True, SmoothQuantAlpha=0.5), {}),
    "no SmoothQuant": (option(SmoothQuantAlpha=0.8, SmoothQuant=False), wish(smooth=False)),
    "ForceQuantizeNoInputCheck": (option(ForceQuantizeNoInputCheck=True), {"target": PORTABLE}),
    "QDQDisableWeightAdjustForInt32Bias": (
        option(QDQDisableWeightAdjustForInt32Bias=True),
        {"steps": STEPS},
    ),
    "TensorQuantOverrides": (
        option(
            TensorQuantOverrides={
                "relu1": [{"rmin": np.array(0.0), "rmax": 8.0}],
                "pool2": [{}],
                "conv3.weight_folded": [{"quant_type": QuantType.QInt8, "symmetric": True}],
            }
        ),
        wish(
            rules=(
                Rule(tensors="relu1", range=(0.0, 8.0), per_channel=False),
                Rule(
                    tensors=r"conv3\.weight_folded",
                    dtype=qdq.INT8,
                    symmetric=True,
                    per_channel=False,
                ),
            )
        ),
    ),
    "a scale": (
        option(TensorQuantOverrides={"relu1": [{"scale": 0.05, "zero_point": 3}]}),
        wish(
            rules=(
                Rule(tensors="relu1", scale=0.05, zero_point=3, symmetric=False, per_channel=False),
            )
        ),
    ),
}


class TestHonoured:
    @pytest.mark.parametrize(
        "case",
        [
            pytest.param(c, marks=ASYMMETRIC if c in ("types", "WeightSymmetric") else ())
            for c in CASES
        ],
    )
    def test_is_the_model_of_qdq(self, case: str, tmp_path: Path) -> None:
        arguments, same = CASES[case]
        # equal in all bytes, and those hold the scheme, calibrator, steps and target
        assert made(tmp_path, **arguments) == qdq.quantize(MODEL, DATA, **same)

    @pytest.mark.parametrize(
        "extra",
        [
            {n: not unwanted for n, (unwanted, _) in _REFUSED.items()},
            {
                "CalibMaxIntermediateOutputs": 10,
                "CalibMovingAverageConstant": 0.1,
                "DefaultTensorType": onnx.TensorProto.FLOAT,
                "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
                "QDQKeepRemovableActivations": True,
                "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1, "Conv": 0},
                "SmoothQuantAlpha": 0.5,
                "SmoothQuantFolding": True,
            },
            {"MinimumRealRange": None, "TensorQuantOverrides": {"relu1": [{}]}, "BlockSize": 0},
            {"CalibMaxIntermediateOutputs": None, "CalibStridedMinMax": None},
        ],
    )
    def test_what_is_so_already(self, extra: dict) -> None:
        assert read_options(extra) == read_options(None) == Options()

    def test_every_option_is_tested_here(self) -> None:
        text = Path(__file__).read_text(encoding="utf8")
        plain = KNOWN - _REFUSED.keys()
        assert not {n for n in plain if n not in text}

    def test_stride(self, tmp_path: Path) -> None:
        reader = Reader()
        found = made(tmp_path, reader=reader, **option(CalibStridedMinMax=np.int64(4)))
        assert reader.ranges == [(0, 6), (0, 4), (4, 6)]
        assert found == qdq.quantize(MODEL, DATA)

    def test_each_range_may_end_with_an_empty_sample(self, tmp_path: Path) -> None:
        class Empty(Reader):
            def get_next(self):
                return next(self.samples, {})

        found = made(tmp_path, reader=Empty(), **option(CalibStridedMinMax=4))
        assert found == qdq.quantize(MODEL, DATA)

    def test_names_are_no_patterns(self, tmp_path: Path) -> None:
        net = model(
            [
                node("Conv", ["x", "w"], "[a]"),
                node("Conv", ["[a]", "w"], "a.b(c)"),
                node("Conv", ["a.b(c)", "w"], "a"),
            ],
            {"x": [1, 32, 24, 24]},
            {"a": [1, 32, 24, 24]},
            {"w": weights(32, 32, 1, 1)},
        )
        data = [{"x": np.random.default_rng(i).random((1, 32, 24, 24), "f4")} for i in range(2)]
        names = ["Conv_[a]", "Conv_a.b(c)"]
        for arguments in ({"nodes_to_exclude": names}, {"nodes_to_quantize": ["Conv_a"]}):
            found = made(tmp_path, net, Reader(data), **arguments)
            rules = [name for name, reason in left_float(found).items() if " rule " in reason]
            assert rules == names

    def test_matmul_of_two_activations(self, tmp_path: Path) -> None:
        net = model(
            [
                node("MatMul", ["x", "w"], "a"),
                node("MatMul", ["x", "v"], "b"),
                node("Transpose", ["b"], "t", perm=[1, 0]),
                node("MatMul", ["a", "t"], "y"),
            ],
            {"x": [64, 256]},
            {"y": [64, 64]},
            {"w": weights(256, 256), "v": weights(256, 256, seed=3)},
        )
        data = [{"x": np.random.default_rng(i).random((64, 256), "f4")} for i in range(2)]
        for only, count in ((False, 0), (True, 1)):
            found = made(tmp_path, net, Reader(data), **option(MatMulConstBOnly=only))
            reasons = list(left_float(found).values())
            assert reasons.count("a rule keeps 'MatMul_y' float") == count

    def test_scales_per_channel(self, tmp_path: Path) -> None:
        net = model(
            [node("Gemm", ["x", "w"], "y")],
            {"x": [64, 64]},
            {"y": [64, 2]},
            {"w": weights(64, 2)},
        )
        data = [{"x": np.random.default_rng(0).random((64, 64), "f4")}]
        channels = [{"axis": 1, "scale": 0.5, "zero_point": 0}, {"scale": 0.25, "zero_point": 0}]
        overrides = option(TensorQuantOverrides={"w": channels}, ForceQuantizeNoInputCheck=True)
        found = made(tmp_path, net, Reader(data), **overrides)
        scales = [onnx.numpy_helper.to_array(t) for t in found.graph.initializer]
        assert any(np.array_equal(s, [0.5, 0.25]) for s in scales)
        channels[0]["axis"] = 0
        with pytest.raises(qdq.ConfigError, match=r"axis 0 is not .* channels, which is 1"):
            made(tmp_path, net, Reader(data), **overrides)

    def test_warnings_are_logged(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.WARNING)
        made(tmp_path, activation_type=QuantType.QInt8)
        made(tmp_path, calibration_providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
        assert [r.message.partition(":")[0].partition("=")[0] for r in caplog.records] == [
            "int8 activations",
            "calibration_providers",
        ]


class TestFiles:
    def test_a_proto_and_external_data(self, tmp_path: Path) -> None:
        proto = onnx.load(MODEL)
        before = proto.SerializeToString()
        found = made(tmp_path, proto, use_external_data_format=True)
        assert proto.SerializeToString() == before
        assert np.array_equal(outputs(found, DATA), outputs(qdq.quantize(MODEL, DATA), DATA))
        assert (tmp_path / "out.onnx.data").stat().st_size > 1024
        assert {p.name for p in tmp_path.iterdir()} == {"out.onnx", "out.onnx.data"}

    def test_the_input_is_never_the_output(self, tmp_path: Path) -> None:
        path = tmp_path / "m.onnx"
        path.write_bytes(MODEL.read_bytes())
        for call in (lambda: quantize_static(path, path, Reader()),
                     lambda: quant_pre_process(path, path)):  # fmt: skip
            with pytest.raises(qdq.ConfigError, match="is the float model itself"):
                call()
        assert path.read_bytes() == MODEL.read_bytes()

    def test_nothing_is_written_on_failure(self, tmp_path: Path) -> None:
        with pytest.raises(qdq.QdqError):
            made(tmp_path, reader=Reader([]))
        assert list(tmp_path.iterdir()) == []

    def test_cache(self, tmp_path: Path) -> None:
        cache = tmp_path / "new folder" / "ranges.json"
        first = made(tmp_path, calibration_cache_path=cache)
        quantize_static(MODEL, tmp_path / "out.onnx", None, calibration_cache_path=str(cache))
        assert onnx.load(tmp_path / "out.onnx") == first == qdq.quantize(MODEL, DATA)
        with pytest.raises(qdq.ConfigError, match="made by MSE"):
            made(tmp_path, calibration_cache_path=cache, calibrate_method=CalibrationMethod.MinMax)
        with pytest.raises(qdq.ConfigError, match="is no file"):
            made(tmp_path, calibration_cache_path=tmp_path)
        for path in (None, tmp_path / "none"):
            with pytest.raises(qdq.ConfigError, match="give calibration_data_reader"):
                quantize_static(MODEL, tmp_path / "o.onnx", calibration_cache_path=path)

    def test_pre_process(self, tmp_path: Path) -> None:
        path = tmp_path / "pre.onnx"
        quant_pre_process(MODEL, path, skip_symbolic_shape=True, save_as_external_data=True)
        source, found = onnx.load(MODEL), onnx.load(path)
        assert list(found.graph.node) == list(source.graph.node)
        assert {"relu1", "pool2"} <= {v.name for v in found.graph.value_info}
        onnx.checker.check_model(found, full_check=True)
        assert outputs(path, DATA) == pytest.approx(outputs(MODEL, DATA))
        arguments = {"nodes_to_exclude": ["norm1"]}
        assert made(tmp_path, path, **arguments) == made(tmp_path, **arguments)
        plain = tmp_path / "plain.onnx"
        quant_pre_process(input_model_path=MODEL, output_model_path=plain, skip_onnx_shape=True)
        assert not {v.name for v in onnx.load(plain).graph.value_info} & {"relu1"}
        for wrong, message in (
            ({"input_model": None}, "wants input_model"),
            ({"external_data_location": "x"}, "external_data_location='x'"),
            ({"external_data_size_threshold": 1}, "external_data_size_threshold=1"),
        ):
            given = {"input_model": MODEL, "save_as_external_data": True, **wrong}
            with pytest.raises(qdq.ConfigError, match=message):
                quant_pre_process(output_model_path=tmp_path / "o.onnx", **given)


class TestConfigs:
    def test_config(self, tmp_path: Path) -> None:
        config = StaticQuantConfig(Reader(), nodes_to_exclude=["conv1"])
        config.extra_options["ActivationSymmetric"] = True
        compat.quantize(MODEL, tmp_path / "out.onnx", config)
        same = {"nodes_to_exclude": ["conv1"], **option(ActivationSymmetric=True)}
        assert onnx.load(tmp_path / "out.onnx") == made(tmp_path, **same)
        other = theirs.StaticQuantConfig(Reader())
        with pytest.raises(qdq.ConfigError, match="a StaticQuantConfig of onnxruntime"):
            compat.quantize(MODEL, tmp_path / "out.onnx", other)

    def test_of_get_qdq_config(self, tmp_path: Path) -> None:
        config = compat.get_qdq_config(
            MODEL,
            Reader(),
            calibrate_args={"symmetric": True},
            nodes_to_exclude=lambda m, n: n.op_type == "MaxPool" and n in m.graph.node,
        )
        compat.quantize(MODEL, tmp_path / "out.onnx", config)
        rules = [Rule(nodes=f"pool{k}", keep_float=True) for k in (1, 2, 3)]
        scheme = Scheme(activation=qdq.QuantSpec(symmetric=True), rules=tuple(rules))
        expected = qdq.quantize(MODEL, DATA, scheme=scheme, target=PORTABLE)
        assert onnx.load(tmp_path / "out.onnx") == expected
        nameless = onnx.load(MODEL)
        for pool in nameless.graph.node:
            pool.ClearField("name")
        with pytest.raises(qdq.ConfigError, match="chose the MaxPool that makes"):
            compat.get_qdq_config(
                nameless, Reader(), nodes_to_exclude=lambda m, n: n.op_type == "MaxPool"
            )
        for pool in nameless.graph.node:
            pool.name = "n"
        with pytest.raises(qdq.ConfigError, match="has the name 'n' of others, too"):
            compat.get_qdq_config(
                nameless, Reader(), nodes_to_exclude=lambda m, n: n.op_type == "MaxPool"
            )
        with pytest.raises(qdq.ConfigError, match="unknown 'num_bin'"):
            compat.get_qdq_config(MODEL, Reader(), calibrate_args={"num_bin": 128})
        listed = compat.get_qdq_config(MODEL, Reader(), nodes_to_exclude=["a"])
        assert listed.nodes_to_exclude == ["a"]


def override(tensor: str, *entries: object) -> dict:
    return option(TensorQuantOverrides={tensor: list(entries)})


SCALE = {"scale": 1.0, "zero_point": 0}


class TestRefused:
    @pytest.mark.parametrize("name", _REFUSED)
    def test_option_that_qdq_has_not(self, name: str, tmp_path: Path) -> None:
        unwanted, instead = _REFUSED[name]
        with pytest.raises(qdq.ConfigError, match=re.escape(f"{name!r}]={unwanted}: {instead}")):
            made(tmp_path, **option(**{name: unwanted}))
        assert "leave" in instead or "TensorQuantOverrides" in instead

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (option(ActivationSymetric=True), "unknown.*'ActivationSymetric'; nearest.*Symmetric"),
            (option(ActivationSymmetric="False"), "wants True or False; found 'False'"),
            ({"extra_options": ["ActivationSymmetric"]}, "extra_options wants a dict"),
            ({"per_channel": "no"}, "per_channel wants True or False"),
            ({"per_channel": None}, "per_channel wants True or False"),
            ({"reduce_range": 2}, "reduce_range wants True or False"),
            ({"quant_format": QuantFormat.QOperator}, "only QDQ"),
            ({"quant_format": "QDQ"}, "'QDQ': wants QuantFormat.QDQ, not its name"),
            ({"activation_type": "QUInt8"}, "wants QuantType.QUInt8, not its name"),
            ({"activation_type": "QUInt9"}, "is no QuantType; nearest names: QUInt8"),
            ({"activation_type": qdq.UINT8}, "is no QuantType"),
            ({"weight_type": QuantType.QInt4}, "weight_type=QInt4: there are no 4-bit"),
            ({"activation_type": QuantType.QFLOAT8E4M3FN}, "no float types"),
            (
                {"activation_type": QuantType.QInt8, "weight_type": QuantType.QUInt8},
                "no kernel multiplies these",
            ),
            ({"calibrate_method": CalibrationMethod.Distribution}, "8-bit floats"),
            ({"calibrate_method": "MinMax"}, "wants CalibrationMethod.MinMax, not its name"),
            (option(CalibPercentile=99.9), "wants calibrate_method=CalibrationMethod.Percentile"),
            (option(CalibPercentile="high"), "wants a number"),
            (option(CalibMaxIntermediateOutputs="many"), "wants a number"),
            (option(CalibStridedMinMax=-1), "wants a number of samples"),
            (option(CalibStridedMinMax=True), "wants a number of samples"),
            ({"reduce_range": True, "activation_type": QuantType.QInt8}, "reduce_range with int8"),
            ({"reduce_range": True, **option(WeightSymmetric=False)}, "reduce_range with"),
            ({"calibration_providers": ["CUDAExecutionProvider"]}, "runs on the CPU"),
            ({"op_types_to_quantize": ["Conv2d"]}, "no operator 'Conv2d'; nearest.*Conv"),
            ({"op_types_to_quantize": "Conv"}, "wants a list of names"),
            ({"op_types_to_quantize": ["LSTM"]}, "matches no node"),
            ({"nodes_to_quantize": ["conv1", "conv99"]}, "conv99.* matches no node.*Nearest"),
            ({"nodes_to_exclude": ["conv99"]}, "conv99.* matches no node.*Nearest"),
            ({"nodes_to_exclude": [""]}, "none empty"),
            (option(OpTypesToExcludeOutputQuantization=["Conv"]), "of Conv cannot hand out float"),
            (option(QDQOpTypePerChannelSupportToAxis={"MatMul": 0}), "'MatMul' with axis 0"),
            (option(QDQOpTypePerChannelSupportToAxis={"Add": 0}), "'Add' with axis 0"),
            (option(QDQOpTypePerChannelSupportToAxis=[]), "wants a dict of operator type"),
            (option(SmoothQuant="off"), "wants True or False"),
            (option(SmoothQuantAlpha="high"), "wants a number"),
            (option(SmoothQuantAlpha=0.8), "0.8: alpha is chosen for each tensor"),
            (option(SmoothQuant=True, SmoothQuantAlpha=0.8), "alpha is chosen for each tensor"),
            (option(SmoothQuantFolding="yes"), "wants True or False"),
            (
                {"activation_type": QuantType.QUInt16, **option(SmoothQuant=True)},
                "nothing is smoothed",
            ),
            (
                option(SmoothQuant=True, ForceQuantizeNoInputCheck=True),
                "nothing is smoothed",
            ),
            (option(DefaultTensorType=onnx.TensorProto.FLOAT16), "counts as float32"),
            (option(TensorQuantOverrides=[]), "wants a dict of tensor name"),
            (option(TensorQuantOverrides={"relu1": {"rmin": 0}}), "wants a list of dicts"),
            (override("relu1", {"range": 1}), "'relu1': unknown key 'range'"),
            (override("relu1", {"convert": {"quant_type": 1}}), "no integer kernel of the CPU"),
            (override("relu1", {"reduce_range": True}), "for the whole model"),
            (override("relu1", {"rmin": 0.0}), "'rmin' and 'rmax' go together"),
            (override("relu1", {"scale": 1.0}), "'scale' and 'zero_point' go together"),
            (override("relu1", {"rmin": "a", "rmax": 1}), "'rmin' wants a number"),
            (override("relu1", {"scale": 1.0, "zero_point": 1.7}), "'zero_point' wants a whole"),
            (override("relu1", {"symmetric": "no"}), "'symmetric' wants True or False"),
            (override("relu1", {"quant_type": "QInt8"}), "wants QuantType.QInt8, not its name"),
            (override("relu1", {"axis": 0}), "only a weight has one scale per channel"),
            (override("relu9", {"rmin": 0, "rmax": 1}), "matches no tensor.*Nearest names: relu"),
            (override("conv1.weight", {}, {}, {"symmetric": True}), "as 'axis' in the first"),
            (override("w", {"axis": 0}, {"axis": 1}), "differ in 'axis'"),
            (override("w", {"axis": 0}, {"rmin": 0, "rmax": 1}), "range per channel"),
            (override("w", {"axis": 0, **SCALE}), "for every channel"),
            (override("w", {"axis": 0, **SCALE}, {}), "for every channel"),
        ],
    )
    def test_what_cannot_be(self, arguments: dict, message: str, tmp_path: Path) -> None:
        with pytest.raises(qdq.ConfigError, match=message):
            made(tmp_path, **arguments)
        assert list(tmp_path.iterdir()) == []

    def test_stride_without_a_length(self, tmp_path: Path) -> None:
        with pytest.raises(qdq.ConfigError, match="wants a reader with __len__"):
            made(tmp_path, reader=iter(DATA), **option(CalibStridedMinMax=2))
        with pytest.raises(qdq.ConfigError, match="wants a reader with __len__"):
            made(tmp_path, reader=Endless(), **option(CalibStridedMinMax=2))
        with pytest.raises(qdq.ConfigError, match="wants a reader with __len__ and set_range"):
            made(tmp_path, reader=DATA, **option(CalibStridedMinMax=2))

    def test_the_cache_is_not_the_model(self, tmp_path: Path) -> None:
        with pytest.raises(qdq.ConfigError, match="is the cache itself"):
            made(tmp_path, calibration_cache_path=tmp_path / "out.onnx")

    def test_what_only_tries_to_find_a_length_goes_on(self) -> None:
        assert list(Endless()) == list(DATA)
        with pytest.raises(TypeError, match="Endless has no length"):
            len(Endless())


def sqnr(path: Path) -> float:
    samples = digits().test[:100]
    exact, other = outputs(MODEL, samples), outputs(path, samples)
    return float(10 * np.log10((exact**2).sum() / ((exact - other) ** 2).sum()))


@pytest.mark.parametrize("arguments", [{}, {"per_channel": True, "calibrate_method": "MinMax"}])
def test_the_same_script_gives_a_better_model(tmp_path: Path, arguments: dict) -> None:
    found = {}
    for module in (theirs, compat):
        given = dict(arguments)
        if "calibrate_method" in given:
            given["calibrate_method"] = module.CalibrationMethod[given["calibrate_method"]]
        path = tmp_path / f"{module.__name__}.onnx"
        module.quantize_static(str(MODEL), str(path), Reader(), **given)
        found[module] = sqnr(path)
    assert found[compat] > found[theirs] + 1
