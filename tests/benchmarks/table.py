"""Quantizes a folder of real models and prints what came of it as Markdown tables.

    python tests/benchmarks/table.py MODELS_DIR [--metrics metrics.py] [--names a,b]
        [--calibrator mse] [--other name=module:function] [--out table.md] [--json table.json]

See README.md beside this file. Each measurement runs in a process of its own (measures.py).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measures import QUANTIZERS

HERE = Path(__file__).parent
FAILS = "fails"
NONE = "-"


def call(task, **arguments):
    """The result of a task of measures.py in a fresh process, or {"error": its last words}."""
    command = [sys.executable, str(HERE / "measures.py"), task, json.dumps(arguments, default=str)]
    paths = os.pathsep.join(p for p in (str(HERE.parents[1]), *sys.path) if p)
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=1800,
            env={**os.environ, "PYTHONPATH": paths},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": "more than 1800 s"}
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"error": words[-1][:500]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(folder, work, options, quantizers):
    """All measurements of one model."""
    paths = {name: work / f"{folder.name}.{name}.onnx" for name in quantizers}
    row = {"quantize": {name: [] for name in quantizers}}
    for _ in range(options.pairs):  # in turns: a busy machine meets all of them alike
        for name, function in quantizers.items():
            how = {"quantizer": function or "qdq", "calibrator": options.calibrator}
            found = call("quantize", folder=folder, out=paths[name], count=options.samples, **how)
            row["quantize"][name].append(found)
    many = work / f"{folder.name}.many.onnx"
    row["quantize_many"] = call(
        "quantize", folder=folder, out=many, calibrator=options.calibrator, count=options.many
    )
    paths = {n: p for n, p in paths.items() if p.exists() and "error" not in row["quantize"][n][-1]}
    metrics = options.metrics and options.metrics.resolve()
    row["score"] = {n: call("score", folder=folder, path=p, metrics=metrics)
                    for n, p in paths.items()}  # fmt: skip
    loads = {n: p for n, p in paths.items() if "error" not in row["score"][n]}
    row["latency"] = call("latency", folder=folder, paths=loads, rounds=options.rounds)
    if "qdq" in loads:
        row["agreement"] = call("agreement", folder=folder, path=loads["qdq"])
    return row


# From measurements to cells


def seconds(row, name):
    """Median seconds of a quantizer, or None."""
    found = [r["s"] for r in row["quantize"][name] if "s" in r]
    return statistics.median(found) if found else None


def seconds_ratio(row):
    """Median over the pairs of qdq's seconds by quantize_static's, or None."""
    pairs = zip(row["quantize"]["qdq"], row["quantize"]["ort"], strict=True)
    found = [a["s"] / b["s"] for a, b in pairs if "s" in a and "s" in b]
    return statistics.median(found) if found else None


def megabytes(row, name):
    found = [r["mb"] for r in row["quantize"][name] if "mb" in r]
    return statistics.median(found) if found else None


def number(value, form):
    """A cell, whatever is in it."""
    if isinstance(value, str):
        return value
    return NONE if value is None else format(value, form)


def ratio_cell(row, name):
    found = row["latency"].get(name)
    if not isinstance(found, dict):
        return FAILS
    return f"{found['ratio']:.2f} ({found['q1']:.2f}..{found['q3']:.2f})"


def score_cell(row, name, key, form):
    found = row["score"].get(name, {"error": ""})
    return FAILS if "error" in found else number(found.get(key), form)


def fused_cell(first):
    if "planned" not in first:
        return FAILS
    planned = sum(first["planned"].values())
    missing = first["missing"]
    text = f"{planned - sum(missing.values())}/{planned}"
    lost = ", ".join(f"{op} -{n}" for op, n in sorted(missing.items()))
    return f"{text} ({lost})" if lost else text


def quality_row(name, row, quantizers):
    """Cells of the first table."""
    cells = {"model": name, "float ms": number(row["latency"].get("float", {}).get("ms"), ".2f")}
    for q in quantizers:
        cells[f"score {q}"] = score_cell(row, q, "score", ".3f")
    for q in quantizers:
        cells[f"dB {q}"] = score_cell(row, q, "sqnr_db", ".1f")
    for q in quantizers:
        cells[f"time ÷ float {q}"] = ratio_cell(row, q)
    found = row.get("agreement", {"error": ""})
    for key, form in (("steps", ".2f"), ("db", ".0f")):
        every = [] if "error" in found else [number(o[key], form) for o in found.values()]
        cells[f"{key.replace('db', 'dB')} apart"] = ", ".join(every) or FAILS
    return cells


def cost_row(name, row, quantizers):
    """Cells of the second table."""
    first, many = row["quantize"]["qdq"][0], row["quantize_many"]
    cells = {"model": name}
    for q in quantizers:
        cells[f"s {q}"] = number(seconds(row, q) or FAILS, ".2f")
    cells["s qdq ÷ ort"] = number(seconds_ratio(row), ".2f")
    for q in quantizers:
        cells[f"MB {q}"] = number(megabytes(row, q) or FAILS, ".0f")
    peak = megabytes(row, "qdq")
    grown = many["mb"] - peak if peak is not None and "mb" in many else FAILS
    return cells | {
        "MB more for many": number(grown, "+.0f"),
        "fused/planned": fused_cell(first),
        "constants DQ'd each run": number(first.get("constants_dequantized_at_run_time"), "d"),
        "integer MACs": number(first.get("integer_mac_share"), ".0%"),
        "size": number(first.get("size_ratio"), ".2f"),
    }


def markdown(rows):
    """Rows of cells with the same keys as a Markdown table."""
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(r.values()) + " |" for r in rows)])


def chosen(models, names=None):
    """The folders of the models to measure; exits where there is none."""
    found = sorted(d for d in models.resolve().iterdir() if (d / "model.onnx").exists())
    if names:
        wanted = names.split(",")
        unknown = set(wanted) - {d.name for d in found}
        if unknown:
            sys.exit(f"no such model in {models}: {', '.join(sorted(unknown))}")
        found = [d for d in found if d.name in wanted]
    if not found:
        sys.exit(f"{models} has no NAME/model.onnx")
    return found


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, help="folder of NAME/{model.onnx,calib.npz,eval.npz}")
    parser.add_argument("--metrics", type=Path, help="module with evaluate(folder, path) -> dict")
    parser.add_argument("--names", help="only these models, separated by commas")
    parser.add_argument("--calibrator", default="mse", help="of qdq; quantize_static has MinMax")
    parser.add_argument(
        "--other",
        action="append",
        default=[],
        metavar="NAME=MODULE:FUNCTION",
        help="a further column: function(model_path, feeds, out_path); may be repeated",
    )
    parser.add_argument("--samples", type=int, default=32, help="calibration samples")
    parser.add_argument("--many", type=int, default=256, help="samples of the second memory run")
    parser.add_argument("--pairs", type=int, default=3, help="how often quantizing is timed")
    parser.add_argument("--rounds", type=int, default=61, help="of the latency measurement")
    parser.add_argument("--out", type=Path, help="write the tables there too")
    parser.add_argument("--json", type=Path, help="write all measurements there")
    return parser.parse_args()


def main():
    options = arguments()
    found = chosen(options.models, options.names)
    quantizers = QUANTIZERS | dict(other.split("=", 1) for other in options.other)
    rows = {}
    with tempfile.TemporaryDirectory(prefix="qdq-table-") as folder:
        for directory in found:
            print(f"{directory.name} …", file=sys.stderr, flush=True)
            rows[directory.name] = measure(directory, Path(folder), options, quantizers)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1))
    tables = [markdown([make(n, r, quantizers) for n, r in rows.items()])
              for make in (quality_row, cost_row)]  # fmt: skip
    text = "\n\n".join(tables) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
