"""Checks that every prepared model must pass, whatever the pass."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper

from qdq.prepare import prepare


def run(net: onnx.ModelProto, feed: Mapping[str, NDArray]) -> list[NDArray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = net.SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feed))


def ops(net: onnx.ModelProto) -> Counter[str]:
    return Counter(n.op_type for n in net.graph.node)


def constant(net: onnx.ModelProto, name: str) -> NDArray:
    (tensor,) = [t for t in net.graph.initializer if t.name == name]
    return numpy_helper.to_array(tensor)


def only(net: onnx.ModelProto, op: str) -> onnx.NodeProto:
    (found,) = [n for n in net.graph.node if n.op_type == op]
    return found


def random_feed(net: onnx.ModelProto, seed: int = 3, unknown: int = 2) -> dict[str, NDArray]:
    r = np.random.default_rng(seed)
    own = {t.name for t in net.graph.initializer}
    feed = {}
    for v in net.graph.input:
        if v.name in own:
            continue
        shape = [d.dim_value or unknown for d in v.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type)
        feed[v.name] = (r.standard_normal(shape) * 2).astype(dtype)
    return feed


def check(
    net: onnx.ModelProto, tol: float = 1e-5, feed: Mapping[str, NDArray] | None = None
) -> onnx.ModelProto:
    """Prepare: argument untouched, valid, named, same names in and out, same floats, idempotent."""
    before = net.SerializeToString(deterministic=True)
    made = prepare(net)
    assert net.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(made, full_check=True)
    names = [n.name for n in made.graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    assert [v.name for v in made.graph.output] == [v.name for v in net.graph.output]
    own = {t.name for t in net.graph.initializer}
    assert [v.name for v in made.graph.input] == [
        v.name for v in net.graph.input if v.name not in own
    ]
    again = prepare(made)
    assert again.SerializeToString(deterministic=True) == made.SerializeToString(deterministic=True)
    feed = random_feed(net) if feed is None else feed
    for a, b in zip(run(net, feed), run(made, feed), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        scale = np.abs(a.astype(np.float64)).max(initial=1e-6)
        assert np.abs(a.astype(np.float64) - b).max(initial=0) <= tol * scale
    return made
