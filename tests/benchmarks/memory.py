"""Peak memory of quantizing: over the number of samples, and over the size of the weights.

    python tests/benchmarks/memory.py MODELS_DIR [--names a,b] [--calibrators minmax,mse]
        [--samples 32,1024] [--out memory.md] [--json memory.json]
    python tests/benchmarks/memory.py --weights 3.0 [--turned] [--scratch DIR]

See README.md beside this file. Each measurement runs in a process of its own (measures.py).
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from table import FAILS, call, chosen, markdown

CALIBRATORS = "minmax,entropy,percentile,mse"
WIDTH = 4096  # of the large model's layers: 64 MiB of weights each


def megabytes(found, less=0.0):
    return FAILS if "error" in found else f"{found['mb'] - less:.0f}"


def by_samples(folder, calibrators, counts, scratch):
    """Peak memory of plain inference, and of quantizing from few and from many samples."""
    row = {"plain": call("plain_memory", folder=folder, count=counts[0])}
    for calibrator in calibrators:
        row[calibrator] = [
            call("quantize", folder=folder, out=scratch / "o.onnx", calibrator=calibrator, count=n)
            for n in counts
        ]
    return row


def cells(name, row, counts):
    """One row of the table per calibrator."""
    plain = row["plain"].get("mb", float("nan"))
    return [
        {"model": name, "calibrator": calibrator, "plain MB": megabytes(row["plain"])}
        | {f"+MB for {n}": megabytes(f, plain) for n, f in zip(counts, found, strict=True)}
        for calibrator, found in row.items()
        if calibrator != "plain"
    ]


def write_large(folder, gigabytes, turned=False):
    """A chain of MatMuls with random weights in an external file, written block by block.

    ``turned``: of Gemms that read their weights transposed, as PyTorch's exporter writes them.
    """
    op, attributes = ("Gemm", {"transB": 1}) if turned else ("MatMul", {})
    layers = max(1, round(gigabytes * 1e9 / (4 * WIDTH * WIDTH)))
    rng = np.random.default_rng(0)
    nodes, weights, size = [], [], 4 * WIDTH * WIDTH
    with (folder / "weights.data").open("wb") as file:
        for i in range(layers):
            w = rng.standard_normal((WIDTH, WIDTH), np.float32) / np.float32(WIDTH**0.5)
            file.write(w.tobytes())
            t = TensorProto(name=f"w{i}", dims=w.shape, data_type=1)
            t.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "weights.data"), ("offset", i * size),
                               ("length", size)):  # fmt: skip
                t.external_data.add(key=key, value=str(value))
            weights.append(t)
            inputs, name = [f"x{i}", f"w{i}"], f"m{i}"
            nodes.append(helper.make_node(op, inputs, [f"x{i + 1}"], name, **attributes))
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [8, WIDTH])
            for n in ("x0", f"x{layers}")]  # fmt: skip
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], weights)
    opset = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), folder / "model.onnx")
    np.savez(folder / "calib.npz", x0=rng.standard_normal((2, 8, WIDTH)).astype(np.float32))
    return layers * size / 1e6


def large(options):
    """Peak memory over the size of the weights, of one generated model."""
    free = shutil.disk_usage(options.scratch or tempfile.gettempdir()).free / 1e9
    if free < 2 * options.weights:
        sys.exit(f"{free:.1f} GB free, {2 * options.weights:.1f} GB wanted; give --scratch")
    with tempfile.TemporaryDirectory(prefix="qdq-memory-", dir=options.scratch) as name:
        folder = Path(name)
        weights = write_large(folder, options.weights, options.turned)
        plain = call("plain_memory", folder=folder, count=2)
        found = call("quantize", folder=folder, out=folder / "out.onnx", count=2, look=False)
    row = {
        "weights MB": f"{weights:.0f}",
        "plain MB": megabytes(plain),
        "qdq MB": megabytes(found),
        "imports MB": FAILS if "error" in found else f"{found['mb_before']:.0f}",
        "peak ÷ weights": FAILS if "error" in found else f"{found['mb'] / weights:.2f}",
        "saved ÷ weights": FAILS if "error" in found else f"{found['mb_saved'] / weights:.2f}",
        "s": FAILS if "error" in found else f"{found['s']:.1f}",
    }
    return {"plain": plain, "qdq": found}, markdown([row])


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="?", help="folder of NAME/{model.onnx,…}")
    parser.add_argument("--names", help="only these models, separated by commas")
    parser.add_argument("--calibrators", default=CALIBRATORS, help="of qdq, separated by commas")
    parser.add_argument("--samples", default="32,1024", help="numbers, separated by commas")
    parser.add_argument("--weights", type=float, help="GB of weights of a model that is generated")
    parser.add_argument("--turned", action="store_true", help="of Gemms with transB")
    parser.add_argument("--scratch", type=Path, help="folder for that; default: the system's")
    parser.add_argument("--out", type=Path, help="write the table there too")
    parser.add_argument("--json", type=Path, help="write all measurements there")
    options = parser.parse_args()
    if (options.models is None) == (options.weights is None):
        parser.error("give a folder of models, or --weights")
    return options


def main():
    options = arguments()
    if options.weights is not None:
        rows, text = large(options)
    else:
        rows, counts = {}, [int(n) for n in options.samples.split(",")]
        with tempfile.TemporaryDirectory(prefix="qdq-memory-") as scratch:
            for folder in chosen(options.models, options.names):
                print(f"{folder.name} …", file=sys.stderr, flush=True)
                rows[folder.name] = by_samples(
                    folder, options.calibrators.split(","), counts, Path(scratch)
                )
        text = markdown([c for name, row in rows.items() for c in cells(name, row, counts)])
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
