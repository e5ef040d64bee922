"""The measurements behind ``table.py``, each meant for a process of its own.

    python measures.py TASK '{"argument": ...}'

runs one of ``TASKS`` and prints its result as JSON on the last line. A fresh process per
measurement makes the peak memory that of one call, and keeps caches and thread pools of one
quantizer away from the other.
"""

import functools
import importlib
import importlib.util
import itertools
import json
import operator
import os
import resource
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from qdq.api import run
from qdq.calibrate import CALIBRATORS
from qdq.graph import Graph
from qdq.modelio import load, save
from qdq.prepare import prepare
from qdq.views import nominal_graph

QUANTIZERS = {"qdq": "", "ort": "measures:ort_static"}
LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM")
CODES = frozenset({onnx.TensorProto.UINT8, onnx.TensorProto.INT8})
LEVELS = ort.GraphOptimizationLevel


# Data and sessions


def samples(folder, which, count=None):
    """``count`` samples (default: all there are), again from the first when they run out.

    Rows of the arrays, never copies: any count takes the memory of one pass.
    """
    with np.load(Path(folder) / f"{which}.npz") as z:
        arrays = {k: z[k] for k in z.files}
    there = len(next(iter(arrays.values())))
    rows = itertools.cycle(range(there))
    picked = itertools.islice(rows, there if count is None else count)
    return ({k: np.asarray(a[i]) for k, a in arrays.items()} for i in picked)


def session(path, level=LEVELS.ORT_ENABLE_ALL, optimized=None):
    options = ort.SessionOptions()  # all else as it is by default
    options.log_severity_level = 4
    options.graph_optimization_level = level
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def peak_mb():
    """Largest resident memory of this process so far, in MB (10**6 bytes)."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss starts at what the parent had before exec
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


# Quantizing


class Reader:
    """The samples as quantize_static reads them."""

    def __init__(self, feeds):
        self.feeds = iter(feeds)

    def get_next(self):
        return next(self.feeds, None)


def ort_static(model_path, feeds, out_path, method="MinMax"):
    """onnxruntime's static quantization at its best setting for x86: u8 · s8 per channel."""
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static

    quantize_static(
        str(model_path),
        str(out_path),
        Reader(feeds),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[method],
    )


def lifted(model_path, out):
    """The model's path, or that of a copy at opset 17 where its own is too old for QDQ."""
    model = onnx.load(model_path)
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
    if opset >= 13:
        return model_path
    path = Path(out).with_suffix(".lifted.onnx")
    onnx.save(onnx.version_converter.convert_version(model, 17), path)
    return path


def quantize(folder, out, quantizer="qdq", calibrator="minmax", count=32, look=True):
    """One default call: seconds after all imports, and the peak memory of the process.

    With ``look`` also what became of the plan (not counted in either).
    """
    model, feeds = Path(folder) / "model.onnx", samples(folder, "calib", count)
    if quantizer != "qdq":
        module, _, function = quantizer.partition(":")
        call = getattr(importlib.import_module(module), function)
        if call is ort_static:
            importlib.import_module("onnxruntime.quantization")
            model = lifted(model, out)
        before, start = peak_mb(), time.perf_counter()
        call(model, feeds, out)
        return {"s": time.perf_counter() - start, "mb": peak_mb(), "mb_before": before}
    settings = CALIBRATORS[calibrator]()
    before, start = peak_mb(), time.perf_counter()
    result = run(str(model), feeds, calibrator=settings)  # quantize() hands out result.model
    seconds, peak = time.perf_counter() - start, peak_mb()
    save(result.model, out)
    whole = time.perf_counter() - start
    found = {"s": seconds, "s_saved": whole, "mb": peak, "mb_before": before}
    found["mb_saved"] = peak_mb()
    return found | structure(model, result.plan, Path(out)) if look else found


def plain_memory(folder, count=32):
    """Peak memory of a process that runs the float model on the samples."""
    s = session(Path(folder) / "model.onnx")
    for feed in samples(folder, "calib", count):
        s.run(None, feed)
    return {"mb": peak_mb()}


def speed(folder, calibrator, quantizer="qdq", out=None, count=32, rounds=5, cores=None):
    """Seconds and CPU seconds of quantizing and of plain inference, in turns.

    Plain inference opens the model with default options and runs the same samples. The CPU
    seconds are those of all threads of the process.
    """
    if cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    path, feeds = Path(folder) / "model.onnx", list(samples(folder, "calib", count))

    def plain():
        s = session(path)
        for feed in feeds:
            s.run(None, feed)

    if quantizer == "qdq":
        settings = CALIBRATORS[calibrator]()
        call = functools.partial(run, str(path), feeds, calibrator=settings)
    else:
        importlib.import_module("onnxruntime.quantization")
        method = {"minmax": "MinMax"}.get(calibrator, calibrator.capitalize())
        call = functools.partial(ort_static, lifted(path, out), feeds, out, method)
    found = {"plain": [], "quantize": []}
    for timed in range(rounds + 1):
        for name, function in (("plain", plain), ("quantize", call)):
            start, cpu = time.perf_counter(), time.process_time()
            function()
            spent = {"s": time.perf_counter() - start, "cpu": time.process_time() - cpu}
            if timed:  # the first round warms up
                found[name].append(spent)
    return found


# What became of the plan


def structure(float_path, plan, path):
    """Integer kernels planned and found, what fell through, share of multiplications."""
    optimized = path.with_suffix(".optimized.onnx")
    session(path, optimized=optimized)
    graph = Graph(onnx.load(optimized))
    planned, found = planned_ops(plan), found_ops(graph)
    missing = {op: n - found.get(op, 0) for op, n in planned.items() if n > found.get(op, 0)}
    weights = sum(n.op_type == "DequantizeLinear" and n.input[0] in graph.constants
                  for n in graph.nodes)  # fmt: skip
    return {
        "planned": dict(planned),
        "found": {op: found[op] for op in sorted(found)},
        "missing": missing,
        "constants_dequantized_at_run_time": weights,
        "integer_mac_share": mac_share(float_path, plan),
        "size_ratio": path.stat().st_size / float_path.stat().st_size,
    }


def planned_ops(plan):
    """Kernel → number of planned nodes that should become it."""
    counts = Counter()
    for unit in plan.placement.units:
        if unit.view.name not in plan.placement.integer:
            continue
        kernel = plan.target.kernel(unit.view.op_type)
        codes_out = any(o in plan.tensors for o in unit.outputs)
        counts[kernel.fused if codes_out or not kernel.float_output else kernel.fused_float] += 1
    return counts


def found_ops(graph):
    """Kernel → number of nodes that run on codes. Channels-last twins count as the original.

    The optimized file has few types of inner tensors, so codes are followed from their makers.
    """
    counts, codes = Counter(), {c for c in graph.constants if graph.elem_type(c) in CODES}
    for node in graph.nodes:  # sorted
        name = node.op_type.removeprefix("Nhwc")
        if name == "QuantizeLinear":
            codes.update(node.output)
        elif name != "DequantizeLinear" and codes.intersection(node.input):
            counts[name] += 1
            if name != "MatMulIntegerToFloat" and (name != "QGemm" or len(node.input) > 7):
                codes.update(node.output)
    return counts


def mac_share(float_path, plan):
    """Share of the multiply-accumulates of the main graph that integer kernels do, or None."""
    sizes = nominal_graph(prepare(load(str(float_path))))
    counted = {n.name: macs(n, sizes) for n in sizes.nodes if n.op_type in LINEAR}
    whole = sum(counted.values())
    inside = sum(m for name, m in counted.items() if name in plan.placement.integer)
    return inside / whole if whole else None


def macs(node, sizes):
    """Multiply-accumulates of a linear node; 0 where a shape is unknown."""
    shapes = [sizes.shape(name) for name in (*node.input[:3], node.output[0])]
    if any(s is None or None in s for s in (*shapes[:2], shapes[-1])):
        return 0
    x, w, y = shapes[0], shapes[1], shapes[-1]
    product = functools.partial(functools.reduce, operator.mul)
    if node.op_type == "LSTM":
        return x[0] * x[1] * (product(w, 1) + product(shapes[2] or (), 1))
    if node.op_type == "ConvTranspose":
        return product(x, 1) * product(w[1:], 1)
    if node.op_type == "Conv":
        return product(y, 1) * product(w[1:], 1)
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return product(y, 1) * (x[0] if transposed else x[-1])


# Quality and speed of the result


def sqnr_db(reference, value):
    reference, value = reference.astype(np.float64), value.astype(np.float64)
    noise, signal = float(np.sum((reference - value) ** 2)), float(np.sum(reference**2))
    if not np.isfinite(noise):
        return -np.inf
    return 10 * float(np.log10(max(signal, 1e-300) / noise)) if noise else np.inf


def score(folder, path, metrics=None):
    """The task's score and SQNR from the metrics module, or SQNR of the first output."""
    if metrics is not None:
        spec = importlib.util.spec_from_file_location("metrics", metrics)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if Path(folder).name in getattr(module, "TASK", (Path(folder).name,)):
            return {k: plain(v) for k, v in module.evaluate(Path(folder), Path(path)).items()}
    both = []
    for p in (Path(folder) / "model.onnx", path):
        s = session(p)
        outs = [s.run(None, feed)[0].ravel() for feed in samples(folder, "eval")]
        both.append(np.concatenate(outs))
    return {"sqnr_db": plain(sqnr_db(*both))}


def plain(value):
    """JSON has no infinities: an SQNR without noise is "exact", one of NaN or Inf "broken"."""
    if isinstance(value, float) and not np.isfinite(value):
        return "exact" if value > 0 else "broken"
    return value


def latency(folder, paths, rounds=61):
    """Times of each path's model over the float one's, in turns: quartiles of the ratios.

    One session lives at a time: the threads of an idle one spin for a while and take cores from
    the one that is measured. Each turn opens every model, warms it up and takes the median of
    some 10 ms blocks; the order turns, so that none always comes after the same other.
    """
    models = {"float": Path(folder) / "model.onnx", **paths}
    feed = next(samples(folder, "eval"))
    turns = max(5, rounds // 5)
    times = {name: np.zeros(turns) for name in models}
    names = list(models)
    for i in range(turns):
        for name in (*names[i % len(names) :], *names[: i % len(names)]):
            times[name][i] = one_latency(models[name], feed)
    result = {"float": {"ms": float(np.median(times["float"]) * 1e3)}}
    for name in paths:
        low, middle, high = np.percentile(times[name] / times["float"], (25, 50, 75))
        ms = float(np.median(times[name]) * 1e3)
        result[name] = {"ms": ms, "ratio": middle, "q1": low, "q3": high}
    return result


def one_latency(path, feed, blocks=9):
    """Seconds of one run in a session of its own."""
    s = session(path)
    once = []
    for _ in range(4):
        start = time.perf_counter()
        s.run(None, feed)
        once.append(time.perf_counter() - start)
    count = int(np.clip(0.01 / min(once), 1, 200))
    found = np.zeros(blocks)
    for k in range(blocks):
        start = time.perf_counter()
        for _ in range(count):
            s.run(None, feed)
        found[k] = (time.perf_counter() - start) / count
    return float(np.median(found))


def agreement(folder, path):
    """How far optimized and unoptimized runs are apart, per output.

    ``steps``: the largest distance in steps of 8 bits (the scale of an output that a
    DequantizeLinear makes, else its range / 255). ``db``: the SQNR of one against the other.
    """
    runs = [session(path, level) for level in (LEVELS.ORT_ENABLE_ALL, LEVELS.ORT_DISABLE_ALL)]
    graph = Graph(onnx.load(path))
    pairs = [[s.run(None, feed) for s in runs] for feed in samples(folder, "eval")]
    found = {}
    for k, output in enumerate(runs[0].get_outputs()):
        a, b = (np.concatenate([np.ravel(p[side][k]) for p in pairs]) for side in (0, 1))
        step = output_step(graph, output.name) or max(float(np.ptp(b)), 1e-30) / 255
        apart = float(np.abs(a.astype(np.float64) - b).max())
        found[output.name] = {"steps": apart / step, "db": plain(sqnr_db(b, a))}
    return found


def output_step(graph, name):
    """The scale of an output that is dequantized codes; None for any other."""
    index = graph.producer.get(name)
    if index is None or graph.nodes[index].op_type != "DequantizeLinear":
        return None
    return float(np.max(graph.array(graph.nodes[index].input[1])))


TASKS = {f.__name__: f for f in (quantize, plain_memory, speed, score, latency, agreement)}

if __name__ == "__main__":
    os.environ.setdefault("PYTHONHASHSEED", "0")
    sys.modules["measures"] = sys.modules["__main__"]  # for "measures:ort_static"
    ort.set_default_logger_severity(4)
    answer = TASKS[sys.argv[1]](**json.loads(sys.argv[2]))
    print("\n" + json.dumps(answer, default=float))
