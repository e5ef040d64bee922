"""What a user can get wrong: one clear error, no file left, nothing of theirs changed."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from harness import FORCED
from models import conv_chain, feeds, model, node, weights
from onnx import numpy_helper

import qdq
from qdq import CalibrationError, ConfigError, ModelError, QdqError, Rule, Scheme, SolveError
from qdq.spec import INT16, QuantSpec

SHAPE = [1, 8, 6, 6]
Data = list[dict[str, np.ndarray]]


def net() -> onnx.ModelProto:
    return conv_chain(8, 6, depth=2)


def good() -> Data:
    return feeds({"x": SHAPE}, 3)


@dataclass(frozen=True)
class Bad:
    """One mistake: the model's bytes, the data, the settings; the error and words that it has."""

    name: str
    error: type[QdqError]
    words: tuple[str, ...]
    model: Callable[[], bytes] = lambda: net().SerializeToString()
    data: Callable[[], Any] = good
    settings: Callable[[], dict[str, Any]] = dict

    def __str__(self) -> str:
        return self.name


def changed(name: str, value: np.ndarray) -> Data:
    """Good data whose sample 1 is different in one input."""
    data = good()
    data[1] = {name: value}
    return data


def spoilt(value: float) -> np.ndarray:
    x = good()[0]["x"].copy()
    x[0, 1, 2, 3] = value
    return x


def edited(edit: Callable[[onnx.ModelProto], object]) -> Callable[[], bytes]:
    def made() -> bytes:
        made = net()
        edit(made)
        return made.SerializeToString()

    return made


def bad_weight(proto: onnx.ModelProto) -> None:
    w = weights(8, 8, 3, 3)
    w[0, 0, 0, 0] = np.nan
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(w, "w0"))


def rules(*found: Rule, **scheme: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"scheme": Scheme(rules=found, **scheme)}


def log_net() -> bytes:
    nodes = [node("Log", ["x"], "l"), node("Conv", ["l", "w"], "y")]
    constants = {"w": weights(8, 8, 1, 1)}
    return model(nodes, {"x": SHAPE}, {"y": SHAPE}, constants).SerializeToString()


def unequal() -> bytes:
    nodes = [node("Add", ["x", "k"], "y")]
    constants = {"k": np.zeros(5, np.float32)}
    return model(nodes, {"x": SHAPE}, {"y": SHAPE}, constants).SerializeToString()


def last_product(addend: int = 4) -> bytes:
    """A Gemm that reads the input, of any width, and that calibration does not run."""
    nodes = [node("Gemm", ["x", "w", "b"], "y")]
    constants = {"w": weights(16, 4), "b": np.ones(addend, np.float32)}
    return model(nodes, {"x": ["n", "k"]}, {"y": ["n", "m"]}, constants).SerializeToString()


BAD = (
    # no samples
    Bad("empty list", CalibrationError, ("no sample", "list"), data=list),
    Bad("spent generator", CalibrationError, ("no sample", "generator"), data=lambda: iter(())),
    # samples that do not fit
    Bad("missing input", CalibrationError, ("sample 1", "lacks 'x'"),
        data=lambda: changed("y", spoilt(0))),
    Bad("unknown input", CalibrationError, ("sample 0", "'z'", "does not know"),
        data=lambda: [{**f, "z": f["x"]} for f in good()]),
    Bad("shape", CalibrationError, ("'x' of sample 1", "(8, 6, 6)", "(1, 8, 6, 6)", "x[None]"),
        data=lambda: changed("x", good()[0]["x"][0])),
    Bad("channels last", CalibrationError, ("(1, 6, 6, 8)", "channels first"),
        data=lambda: [{"x": f["x"].transpose(0, 2, 3, 1)} for f in good()]),
    Bad("dtype", CalibrationError, ("'x' of sample 1", "float64", "float32", "astype"),
        data=lambda: changed("x", good()[0]["x"].astype(np.float64))),
    Bad("no array", CalibrationError, ("'x' of sample 1", "list"),
        data=lambda: changed("x", good()[0]["x"].tolist())),
    Bad("labels beside", CalibrationError, ("2 arrays", "1 input", "labels"),
        data=lambda: [(f["x"], np.zeros(1)) for f in good()]),
    Bad("no data at all", CalibrationError, ("int", "not understood"), data=lambda: 3),
    Bad("no npz", CalibrationError, ("nowhere.npz",), data=lambda: "nowhere.npz"),
    # NaN and Inf
    Bad("nan in data", CalibrationError, ("'x' of sample 1", "NaN"),
        data=lambda: changed("x", spoilt(np.nan))),
    Bad("inf in data", CalibrationError, ("'x' of sample 1", "Inf"),
        data=lambda: changed("x", spoilt(np.inf))),
    Bad("nan in a weight", ModelError, ("'w0'", "NaN"), model=edited(bad_weight)),
    Bad("nan in an activation", CalibrationError, ("'l'", "sample 0", "NaN"), model=log_net),
    # models
    Bad("quantized already", ModelError, ("already quantized", "QuantizeLinear"),
        model=lambda: qdq.quantize(net(), good(), target=FORCED).SerializeToString()),
    Bad("truncated", ModelError, ("truncated",), model=lambda: net().SerializeToString()[:-500]),
    Bad("empty", ModelError, ("empty",), model=lambda: b""),
    Bad("no model", ModelError, ("not an ONNX model",), model=lambda: b"\x89PNG\r\n\x1a\n" * 40),
    Bad("unknown operator", ModelError, ("not a valid ONNX model", "Relo"),
        model=edited(lambda m: setattr(m.graph.node[1], "op_type", "Relo"))),
    Bad("dangling input", ModelError, ("not a valid ONNX model", "nowhere"),
        model=edited(lambda m: m.graph.node[1].input.__setitem__(0, "nowhere"))),
    Bad("cycle", ModelError, ("not a valid ONNX model",),
        model=edited(lambda m: m.graph.node[0].input.__setitem__(0, "r1"))),
    Bad("shapes that contradict", ModelError, ("Add_y",), model=unequal),
    Bad("channels that contradict", CalibrationError, ("Sample 0", "kernel channels: 5"),
        model=edited(lambda m: m.graph.initializer[0].CopyFrom(
            numpy_helper.from_array(weights(8, 5, 3, 3), "w0")))),
    Bad("channels that the last product cannot read", CalibrationError,
        ("'x' 12 channels", "'w'", "'Gemm_y'", "16"), model=last_product,
        data=lambda: feeds({"x": [2, 12]})),
    Bad("addend that does not fit", ModelError, ("'Gemm_y'", "'b'", "(3,)", "4 columns"),
        model=lambda: last_product(3), data=lambda: feeds({"x": [2, 16]})),
    # options
    Bad("type without kernel", ConfigError, ("onnxruntime CPU", "int16", "activations"),
        settings=rules(activation=QuantSpec(dtype=INT16))),
    Bad("unknown node", ConfigError, ("'Conv_cO'", "Conv_c0"),
        settings=rules(Rule(nodes="Conv_cO", keep_float=True))),
    Bad("unknown operator type", ConfigError, ("Conw", "Conv"),
        settings=rules(Rule(op_types=("Conw",), keep_float=True))),
    Bad("unknown tensor", ConfigError, ("'w7'", "w0"),
        settings=rules(Rule(tensors="w7", symmetric=True))),
    Bad("no pattern", ConfigError, ("'('", "regular expression"),
        settings=rules(Rule(tensors="(", symmetric=True))),
    Bad("rule on a bias", ConfigError, ("'b0'", "bias"),
        settings=rules(Rule(tensors="b0", symmetric=True))),
    Bad("rule on a float tensor", ConfigError, ("'c0'", "nothing reads or writes"),
        settings=rules(Rule(tensors="c0", symmetric=True))),
    Bad("too many scales", ConfigError, ("'w0'", "3", "8"),
        settings=rules(Rule(tensors="w0", scale=[1, 1, 1], zero_point=[0, 0, 0]))),
    Bad("scale list for an activation", ConfigError, ("'x'", "one scale"),
        settings=rules(Rule(tensors="x", scale=[1, 1], zero_point=[0, 0]))),
    Bad("negative scale", ConfigError, ("'x'", "above 0"),
        settings=rules(Rule(tensors="x", scale=-1.0, zero_point=0))),
    Bad("nan as scale", ConfigError, ("'x'", "finite"),
        settings=rules(Rule(tensors="x", scale=np.nan, zero_point=0))),
    Bad("zero point outside", ConfigError, ("'x'", "300", "[0, 255]"),
        settings=rules(Rule(tensors="x", scale=1.0, zero_point=300))),
    Bad("zero point of a symmetric weight", ConfigError, ("'w0'", "zero point 0"),
        settings=rules(Rule(tensors="w0", scale=1.0, zero_point=3))),
    Bad("inf in a range", ConfigError, ("'x'", "finite", "inf"),
        settings=rules(Rule(tensors="x", range=(0, np.inf)))),
    Bad("given scale that the bias overflows", SolveError, ("'w0'", "'b0'", "larger scale"),
        settings=rules(Rule(tensors="w0", scale=1e-12, zero_point=0))),
)  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("as_file", [True, False], ids=["file", "bytes"])
def test_one_clear_error(bad: Bad, as_file: bool, tmp_path: Path, monkeypatch, capfd) -> None:
    data = bad.model()
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    stamp = path.stat().st_mtime_ns
    monkeypatch.chdir(tmp_path)
    settings = {"target": FORCED, **bad.settings()}
    with pytest.raises(QdqError) as e:
        qdq.quantize(path if as_file else data, bad.data(), **settings)
    assert type(e.value) is bad.error, "".join(traceback.format_exception(e.value))
    message = str(e.value)
    assert "\n" not in message
    for word in bad.words:
        assert word in message
    assert len(message) < 1000
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == data
    assert path.stat().st_mtime_ns == stamp
    assert capfd.readouterr() == ("", "")  # the runtime's own log is silent as well


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Rule(nodes="a", tensors="b", keep_float=True), ("nodes", "tensors")),
        (lambda: Rule(keep_float=True), ("neither",)),
        (lambda: Rule(nodes="a", symmetric=True), ("keep_float",)),
        (lambda: Rule(tensors="a"), ("changes nothing",)),
        (lambda: Rule(tensors="a", scale=1.0), ("zero_point", "go together")),
        (lambda: Rule(tensors="a", zero_point=1), ("changes nothing",)),
        (lambda: Rule(tensors="a", scale=1.0, zero_point=0, range=(0, 1)), ("not both",)),
        (lambda: Rule(tensors="a", range=(1.0, 1.0)), ("low < high",)),
        (lambda: Rule(tensors="a", range=(2.0, 1.0)), ("low < high",)),
        (lambda: Rule(tensors="a", range=(np.nan, 1.0)), ("low < high",)),
        (lambda: Rule(nodes=3, keep_float=True), ("nodes=3 (int)", "regular expression")),
        (lambda: Rule(tensors=b"x", symmetric=True), ("tensors=b'x'", "regular expression")),
        (lambda: Rule(op_types="Conv", keep_float=True), ("op_types='Conv'", '("Conv",)')),
        (lambda: Rule(op_types=("Conv", 1), keep_float=True), ("op_types", "sequence")),
        (lambda: Rule(op_types=None, keep_float=True), ("op_types=None", "sequence")),
        (lambda: Rule(nodes="a", keep_float="no"), ("keep_float='no'", "True or False")),
        (lambda: Rule(nodes="a", only=1), ("only=1", "True or False")),
        (lambda: Rule(tensors="a", symmetric="no"), ("symmetric='no'", "True or False")),
        (lambda: Rule(tensors="a", per_channel=0), ("per_channel=0", "True or False")),
        (lambda: Rule(tensors="a", dtype="int8"), ("dtype='int8'", "qdq.INT8")),
        (lambda: Rule(tensors="a", range=(0, 1, 2)), ("range=(0, 1, 2)", "two numbers")),
        (lambda: Rule(tensors="a", range="ab"), ("range='ab'", "two numbers")),
        (lambda: Rule(tensors="a", range=3), ("range=3", "two numbers")),
        (lambda: Rule(tensors="a", range=(0, 1e39)), ("range=(0, 1e+39)", "float32")),
        (lambda: Rule(tensors="a", scale=1e40, zero_point=0), ("scale=1e+40", "float32")),
        (lambda: Rule(tensors="a", scale="1", zero_point=0), ("scale='1'", "one number")),
        (lambda: Rule(tensors="a", scale=[[1], [1, 2]], zero_point=0), ("scale", "one number")),
        (lambda: Rule(tensors="a", scale=1, zero_point=1.5), ("zero_point=1.5", "whole")),
        (lambda: Scheme(weight=QuantSpec(axis=1)), ("axis=None",)),
        (lambda: QuantSpec(dtype="int8"), ("dtype='int8' (str)", "qdq.INT8")),
        (lambda: QuantSpec(symmetric="no"), ("symmetric='no'", "True or False")),
        (lambda: QuantSpec(axis=1.5), ("axis=1.5", "whole number")),
        (lambda: Scheme(weight=INT16), ("weight=", "qdq.QuantSpec")),
        (lambda: Scheme(per_channel="no"), ("per_channel='no'", "True or False")),
        (lambda: Scheme(rules=Rule(nodes="a", keep_float=True)), ("rules=Rule(", "sequence")),
        (lambda: Scheme(rules=("a",)), ("rules=('a',)", "sequence of qdq.Rule")),
    ],
)
def test_impossible_settings_are_refused_when_they_are_made(make, words) -> None:
    with pytest.raises(ConfigError) as e:
        make()
    assert all(word in str(e.value) for word in words)


def test_lists_will_do() -> None:
    rule = Rule(op_types=["Conv"], keep_float=True)
    assert rule == Rule(op_types=("Conv",), keep_float=True)
    assert Scheme(rules=[rule]) == Scheme(rules=(rule,))
    assert hash(Scheme(rules=[rule]))
    assert Scheme(rules=(r for r in [rule])) == Scheme(rules=(rule,))
    assert Rule(op_types={"Gemm", "Conv"}, keep_float=np.True_).op_types == ("Conv", "Gemm")
    wide = np.array([0, 2], np.float32)
    assert Rule(tensors="a", range=[0, 2]) == Rule(tensors="a", range=wide)


@pytest.mark.parametrize("word", ["calibrater", "per_channel"])
def test_an_unknown_option_is_an_error(word: str) -> None:
    with pytest.raises(TypeError, match=word):
        qdq.quantize(net(), good(), **{word: True})


@pytest.mark.parametrize("option", ["scheme", "calibrator", "steps", "target", "progress"])
def test_an_option_of_a_wrong_kind_is_named(option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        qdq.quantize(net(), good(), **{"target": FORCED, option: "minmax"})


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_data_of_zeros_is_told(value: float, caplog: pytest.LogCaptureFixture) -> None:
    data = [{k: np.full_like(v, value) for k, v in feed.items()} for feed in good()]
    qdq.quantize(net(), data, target=FORCED)
    assert ("all inputs are 0 in every sample" in caplog.text) == (value == 0)


def test_a_class_is_no_step() -> None:
    with pytest.raises(ConfigError, match="steps"):
        qdq.quantize("absent.onnx", good(), steps=(qdq.steps.FromRanges, qdq.steps.DeriveBias()))


def test_statistics_and_progress_are_checked_before_any_work() -> None:
    with pytest.raises(ConfigError, match=r"statistics=5 \(int\): wants what collect_statistics"):
        qdq.quantize("absent.onnx", statistics=5)
    with pytest.raises(ConfigError, match=r"progress=5 \(int\): wants a function"):
        qdq.api.collect_statistics("absent.onnx", good(), progress=5)
