"""Time of quantizing a chain of Conv, Relu and Add over its number of nodes.

    python tests/benchmarks/scaling.py [--nodes 1000,10000] [--profile 25] [--out scaling.md]

One tiny sample, so that what is timed is all but calibration: each stage alone, and the whole.
"""

import argparse
import cProfile
import functools
import pstats
import time
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from table import markdown

import qdq.api
import qdq.choice
import qdq.plan
import qdq.stages

STAGES = {
    qdq.stages: ("load", "prepare", "collect", "gradients", "ranges_from"),
    qdq.plan: ("nominal_graph",),
    qdq.plan.Placer: ("place",),
    qdq.choice: ("solved", "emit"),
    qdq.api: ("verify",),
}


def chain(nodes, channels=32, size=12):
    """``nodes`` nodes: blocks of two Convs, a Relu and an Add around them."""
    rng = np.random.default_rng(0)
    made, weights, x = [], [], "x"
    for i in range(nodes // 4):
        for k, read in enumerate((x, f"r{i}")):
            w = rng.normal(0, 0.02, (channels, channels, 3, 3)).astype(np.float32)
            b = rng.normal(0, 0.1, channels).astype(np.float32)
            weights += [numpy_helper.from_array(w, f"w{i}.{k}"),
                        numpy_helper.from_array(b, f"b{i}.{k}")]  # fmt: skip
            made.append(helper.make_node("Conv", [read, f"w{i}.{k}", f"b{i}.{k}"], [f"c{i}.{k}"],
                                         f"conv{i}.{k}", pads=[1, 1, 1, 1]))  # fmt: skip
            if k == 0:
                made.append(helper.make_node("Relu", [f"c{i}.0"], [f"r{i}"], f"relu{i}"))
        made.append(helper.make_node("Add", [f"c{i}.1", x], [f"a{i}"], f"add{i}"))
        x = f"a{i}"
    shape = [1, channels, size, size]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("x", x)]
    graph = helper.make_graph(made, "chain", ends[:1], ends[1:], weights)
    opset = [helper.make_opsetid("", 21)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10), shape


def timed(spent, module, name):
    """Let a function of a module add its seconds to ``spent``."""
    real = getattr(module, name)

    @functools.wraps(real)
    def call(*args, **kwargs):
        start = time.perf_counter()
        try:
            return real(*args, **kwargs)
        finally:
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - start

    setattr(module, name, call)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", default="1000,10000", help="numbers, separated by commas")
    parser.add_argument("--profile", type=int, help="print so many functions of the last")
    parser.add_argument("--out", type=Path, help="write the table there too")
    return parser.parse_args()


def main():
    options = arguments()
    spent, rows = {}, []
    for module, names in STAGES.items():
        for name in names:
            timed(spent, module, name)
    for count in map(int, options.nodes.split(",")):
        model, shape = chain(count)
        feed = {"x": np.random.default_rng(1).normal(size=shape).astype(np.float32)}
        spent.clear()
        profile = cProfile.Profile()
        start, cpu = time.perf_counter(), time.process_time()
        if options.profile:
            profile.enable()
        qdq.quantize(model, [feed])
        profile.disable()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        cells = {"nodes": str(len(model.graph.node)), "s": f"{seconds:.2f}", "CPU s": f"{cpu:.2f}"}
        cells["s / 1000 nodes"] = f"{seconds * 1000 / count:.2f}"
        rows.append(cells | {name: f"{value:.2f}" for name, value in spent.items()})
    if options.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(options.profile)
    text = markdown(rows) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
