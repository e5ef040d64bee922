"""One black-box contract for a quantized model: float, unfused and fused must tell one story."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from qdq.api import Result
from qdq.api import run as quantize_run
from qdq.calibrate import MinMax
from qdq.graph import Graph
from qdq.targets import ORT_CPU

FORCED = replace(ORT_CPU, weighs_costs=False)
"""Every node that can fuse on the CPU is integer, paying or not: small models stay so."""

Feed = Mapping[str, NDArray]


def older(version: str) -> bool:
    """Whether the installed onnxruntime comes before a version, as "1.27", that mends something."""
    first, second = (tuple(map(int, v.split(".")[:2])) for v in (ort.__version__, version))
    return first < second


ASYMMETRIC = pytest.mark.skipif(older("1.27"), reason="no asymmetric weights per channel in Conv")


def session(model: onnx.ModelProto, *, fused: bool, save: Path | None = None):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if fused else level.ORT_DISABLE_ALL
    if save is not None:
        options.optimized_model_filepath = str(save)
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(model: onnx.ModelProto, feeds: Sequence[Feed], *, fused: bool) -> list[list[NDArray]]:
    s = session(model, fused=fused)
    return [s.run(None, dict(f)) for f in feeds]


def fused_ops(model: onnx.ModelProto) -> Counter[str]:
    """Operators of the graph that the runtime makes of the model."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        session(model, fused=True, save=path)
        return Counter(n.op_type for n in onnx.load(path).graph.node)


def sqnr(reference: NDArray, value: NDArray) -> float:
    noise = float(np.sum((reference.astype(np.float64) - value) ** 2))
    signal = float(np.sum(reference.astype(np.float64) ** 2))
    return float("inf") if noise == 0 else 10 * np.log10(max(signal, 1e-300) / noise)


@dataclass
class Outcome:
    """What ``compare`` found; arrays are the first output over all feeds."""

    sqnr: float
    unfused_sqnr: float
    steps_apart: float
    ops: Counter[str]
    exact: NDArray
    fused: NDArray
    unfused: NDArray


def compare(float_model: onnx.ModelProto, model: onnx.ModelProto, feeds: Sequence[Feed]) -> Outcome:
    """Run all three and measure."""
    onnx.checker.check_model(model, full_check=True)
    exact, fused, unfused = (
        np.concatenate([r[0].ravel() for r in results])
        for results in (
            run(float_model, feeds, fused=True),
            run(model, feeds, fused=True),
            run(model, feeds, fused=False),
        )
    )
    spread = float(np.ptp(exact)) or 1.0
    return Outcome(
        sqnr=sqnr(exact, fused),
        unfused_sqnr=sqnr(exact, unfused),
        # one step of an 8-bit output over the range that was seen
        steps_apart=float(np.max(np.abs(fused.astype(np.float64) - unfused))) / (spread / 255),
        ops=fused_ops(model),
        exact=exact,
        fused=fused,
        unfused=unfused,
    )


def quantized(
    net: onnx.ModelProto, feeds: Sequence[Feed], **settings: Any
) -> tuple[Result, Outcome]:
    """Quantize with every node integer that can be, and measure on the calibration data.

    With min-max ranges nothing is clipped, so that what is left are roundings.
    """
    settings = {"target": FORCED, "calibrator": MinMax(), **settings}
    result = quantize_run(net, feeds, **settings)
    return result, compare(net, result.model, feeds)


def optimized(net: onnx.ModelProto) -> Graph:
    """What the runtime makes of it."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        session(net, fused=True, save=path)
        return Graph(onnx.load(path))


def dequantized(model: onnx.ModelProto, name: str) -> NDArray:
    """Real values of a constant's codes in an emitted model."""
    values = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    (node,) = [
        n
        for n in model.graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] == f"{name}_quantized"
    ]
    codes, scale, zero = (values[i] for i in node.input)
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    shape = [-1 if scale.ndim and k == axis else 1 for k in range(codes.ndim)]
    return (codes.astype(np.float64) - zero.reshape(shape)) * scale.reshape(shape)
