"""The public names: exactly these, documented, typed, and ready to use with defaults."""

import inspect
import subprocess
import sys

import pytest

import qdq

NAMES = {
    "INT16", "INT8", "MSE", "UINT16", "UINT8", "CalibrationError", "ConfigError", "Entropy",
    "MinMax", "ModelError", "Percentile", "QdqError", "QuantSpec", "Rule", "Scheme", "SolveError",
    "VerifyError", "__version__", "compare", "quantize", "solve", "steps",
}  # fmt: skip


def test_names() -> None:
    assert set(qdq.__all__) == NAMES
    assert len(qdq.__all__) == len(NAMES)
    assert all(hasattr(qdq, name) for name in NAMES)


@pytest.mark.parametrize(
    "name", sorted(NAMES - {"__version__", "INT8", "INT16", "UINT8", "UINT16"})
)
def test_documented(name: str) -> None:
    text = inspect.getdoc(getattr(qdq, name))
    assert text
    assert len(text) > 40


@pytest.mark.parametrize("name", ["MinMax", "Entropy", "Percentile", "MSE", "Scheme", "QuantSpec"])
def test_defaults_work_and_compare(name: str) -> None:
    kind = getattr(qdq, name)
    assert kind() == kind()
    assert name in repr(kind())


def test_steps() -> None:
    assert all(hasattr(qdq.steps, name) for name in qdq.steps.__all__)
    assert [type(s).__name__ for s in qdq.steps.DEFAULT_STEPS] == [
        "FromRanges", "FromConstants", "ShareParams", "CorrectBias", "FitWeightsToBias",
        "DeriveBias",
    ]  # fmt: skip


def test_quantize_is_annotated() -> None:
    signature = inspect.signature(qdq.quantize)
    assert list(signature.parameters) == [
        "model", "calib_reader", "scheme", "calibrator", "steps", "target", "executor",
        "statistics", "progress", "worth", "measured", "target_sqnr", "target_latency",
    ]  # fmt: skip
    assert all(p.annotation is not p.empty for p in signature.parameters.values())
    assert signature.return_annotation.__name__ == "ModelProto"


def test_errors_are_one_tree() -> None:
    for name in ("ModelError", "ConfigError", "CalibrationError", "SolveError", "VerifyError"):
        assert issubclass(getattr(qdq, name), qdq.QdqError)
    assert issubclass(qdq.ConfigError, ValueError)


def test_import_needs_only_the_three_dependencies() -> None:
    code = (
        "import sys, qdq; bad = [m for m in ('scipy', 'torch', 'onnxruntime.quantization', 'sympy',"
        " 'matplotlib', 'pytest') if m in sys.modules]; sys.exit(repr(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
