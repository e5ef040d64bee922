"""Micro-models, as float models and as their QDQ twins, and two ways of timing them."""

import collections
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

SCALE = 0.05  # one scale everywhere: movement operators need equal parameters
BUDGET = 0.06  # seconds per session and round
ROUNDS = 3
THREADS = int(os.environ.get("THREADS", "0"))  # 0: the default
FLOOR = 4300.0  # ns the profiler adds to each node: what it reports for nodes of no work


class Net:
    """Builds a float model, or its QDQ twin with u8 activations and s8 per-channel weights."""

    def __init__(self, int8, seed=0):
        self.int8, self.rng = int8, np.random.default_rng(seed)
        self.nodes, self.inits, self.inputs, self.feeds = [], [], [], {}
        self.count, self.others = 0, {}
        self.scale = self.const(np.float32(SCALE))
        self.zero = self.const(np.uint8(128))

    def name(self):
        self.count += 1
        return f"t{self.count}"

    def const(self, value):
        name = self.name()
        self.inits.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def raw(self, op, inputs, outputs=1, **attrs):
        names = [self.name() for _ in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, name=f"n{self.count}", **attrs))
        return names[0] if outputs == 1 else names

    def qdq(self, x, zero=None):
        if not self.int8:
            return x
        zero = zero or self.zero
        q = self.raw("QuantizeLinear", [x, self.scale, zero])
        return self.raw("DequantizeLinear", [q, self.scale, zero])

    def input(self, *shape):
        name = self.name()
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        self.feeds[name] = self.rng.standard_normal(shape).astype(np.float32)
        return self.qdq(name)

    def signed(self, x):
        """As int8, which a Reshape between Q and DQ keeps."""
        if not self.int8:
            return x
        zero, same = self.const(np.int8(0)), self.const(np.zeros(3, np.int64))
        q = self.raw("Reshape", [self.raw("QuantizeLinear", [x, self.scale, zero]), same])
        return self.raw("DequantizeLinear", [q, self.scale, zero])

    def other(self, *shape):
        """A second input, the same one however often it is asked for."""
        if shape not in self.others:
            self.others[shape] = self.input(*shape)
        return self.others[shape]

    def tensor(self, *shape):
        """A constant of the activations' type."""
        value = self.rng.uniform(0.1, 1, shape).astype(np.float32)
        if not self.int8:
            return self.const(value)
        q = np.clip(np.rint(value / SCALE) + 128, 0, 255).astype(np.uint8)
        return self.raw("DequantizeLinear", [self.const(q), self.scale, self.zero])

    def weight(self, *shape, axis):
        fan = np.prod(shape) / shape[axis]
        value = (self.rng.standard_normal(shape) / np.sqrt(fan)).astype(np.float32)
        if not self.int8:
            return self.const(value), None
        other = tuple(i for i in range(len(shape)) if i != axis)
        s = (np.abs(value).max(axis=other) / 127).astype(np.float32)
        spread = s.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        q = np.rint(value / spread).astype(np.int8)
        zero = self.const(np.zeros(len(s), np.int8))
        return self.raw("DequantizeLinear", [self.const(q), self.const(s), zero], axis=axis), s

    def bias(self, s, n):
        if not self.int8:
            return self.const(np.full(n, 0.1, np.float32))
        scale = np.float32(SCALE) * s
        q = np.rint(0.1 / scale).astype(np.int32)
        parts = [self.const(q), self.const(scale), self.const(np.zeros(n, np.int32))]
        return self.raw("DequantizeLinear", parts, axis=0)

    def op(self, op, inputs, *, quantize=True, **attrs):
        out = self.raw(op, inputs, **attrs)
        return self.qdq(out) if quantize else out

    def conv(self, x, cin, cout, k, *, stride=1, group=1, quantize=True):
        kh, kw = (k, k) if isinstance(k, int) else k
        w, s = self.weight(cout, cin // group, kh, kw, axis=0)
        pads = [(kh - 1) // 2, (kw - 1) // 2, kh // 2, kw // 2]
        st = stride if isinstance(stride, (list, tuple)) else [stride, stride]
        ins = [x, w, self.bias(s, cout)]
        return self.op("Conv", ins, quantize=quantize, pads=pads, strides=list(st), group=group)

    def gemm(self, x, k, n, *, quantize=True, op="Gemm"):
        w, s = self.weight(k, n, axis=1)
        ins = [x, w] + ([self.bias(s, n)] if op == "Gemm" else [])
        return self.op(op, ins, quantize=quantize)

    def model(self, *outputs):
        outs = [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs]
        graph = helper.make_graph(self.nodes, "g", self.inputs, outs, self.inits)
        opset = [helper.make_opsetid("", 17)]
        return helper.make_model(graph, opset_imports=opset, ir_version=8)


def session(model, **settings):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = THREADS
    for key, value in settings.items():
        setattr(options, key, value)
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def fused(model):
    """Operator counts of the optimized model."""
    with tempfile.TemporaryDirectory() as tmp:
        path = str(Path(tmp) / "m.onnx")
        session(model, optimized_model_filepath=path)
        return dict(collections.Counter(n.op_type for n in onnx.load(path).graph.node))


def best(models, feeds):
    """Minimum seconds of each model's run, over rounds in which the models take turns.

    One session at a time: the threads of an idle session keep spinning and would take a core.
    """
    low = [1e9] * len(models)
    for _ in range(ROUNDS):
        for i, (m, f) in enumerate(zip(models, feeds, strict=True)):
            s = session(m)
            end = time.perf_counter() + BUDGET
            runs = 0
            while runs < 6 or time.perf_counter() < end:
                t = time.perf_counter()
                s.run(None, f)
                low[i] = min(low[i], time.perf_counter() - t)
                runs += 1
    return low


def chain(unit, shape, k=(2, 6), head=None):
    """(float ns, int8 ns, operators of the int8 model) of one unit, by slope over k copies."""
    nets = []
    for int8 in (False, True):
        for copies in k:
            net = Net(int8)
            x = net.input(*shape)
            x = head(net, x) if head else x
            for _ in range(copies):
                x = unit(net, x)
            nets.append((net, net.model(x)))
    t = best([m for _, m in nets], [n.feeds for n, _ in nets])
    step = 1e9 / (k[1] - k[0])
    return (t[1] - t[0]) * step, (t[3] - t[2]) * step, fused(nets[-1][1])


def profile(build, int8, runs=50, repeats=2):
    """[(operator, elements of the largest input, ns)] of each node.

    The mean of the fastest third of the runs, the better of the repeats; onnxruntime's own
    bookkeeping per profiled node, FLOOR, is taken off.
    """
    net = Net(int8)
    model = net.model(*build(net))
    low = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as tmp:
            prefix = str(Path(tmp) / "p")
            s = session(model, enable_profiling=True, profile_file_prefix=prefix)
            for _ in range(runs):
                s.run(None, net.feeds)
            events = json.loads(Path(s.end_profiling()).read_text())
        times = collections.defaultdict(list)
        kinds = {}
        for e in events:
            if e.get("cat") == "Node" and e["name"].endswith("_kernel_time"):
                times[e["name"]].append(e["dur"])
                shapes = [next(iter(d.values())) for d in e["args"].get("input_type_shape", [])]
                size = max((int(np.prod(x)) for x in shapes), default=0)
                kinds[e["name"]] = (e["args"]["op_name"], size)
        third = {k: float(np.mean(sorted(v)[: len(v) // 3])) + 0.5 for k, v in times.items()}
        low.append([(*kinds[k], max(v * 1e3 - FLOOR, 0.0)) for k, v in third.items()])
    return [(o, n, min(r[i][2] for r in low)) for i, (o, n, _) in enumerate(low[0])]
