"""Time of quantizing over the time of running the float model on the same samples.

    python tests/benchmarks/speed.py MODELS_DIR [--names a,b] [--calibrators minmax,mse]
        [--samples 32] [--rounds 5] [--cores 1] [--ort] [--out speed.md] [--json speed.json]

See README.md beside this file. Each measurement runs in a process of its own (measures.py).
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from table import FAILS, call, chosen, markdown, number

CALIBRATORS = "minmax,entropy,percentile,mse"


def cell(found, key):
    """Ratio of the medians, and in brackets the quartiles of the ratios of the rounds."""
    if "error" in found:
        return FAILS
    pairs = list(zip(found["quantize"], found["plain"], strict=True))
    ratios = [q[key] / p[key] for q, p in pairs]
    middle = statistics.median(ratios)
    if len(ratios) < 3:
        return f"{middle:.2f}"
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f}..{high:.2f})"


def table(name, rows, calibrators):
    """One row per calibrator of a model."""
    cells = []
    for calibrator in calibrators:
        found, other = rows[calibrator]["qdq"], rows[calibrator].get("ort")
        plain = None if "error" in found else statistics.median(p["s"] for p in found["plain"])
        cells.append(
            {
                "model": name,
                "calibrator": calibrator,
                "plain s": number(plain, ".2f"),
                "time ÷ plain": cell(found, "s"),
                "CPU ÷ plain": cell(found, "cpu"),
            }
        )
        if other is not None:
            cells[-1]["time ÷ plain ort"] = cell(other, "s")
            cells[-1]["CPU ÷ plain ort"] = cell(other, "cpu")
    return cells


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, help="folder of NAME/{model.onnx,calib.npz}")
    parser.add_argument("--names", help="only these models, separated by commas")
    parser.add_argument("--calibrators", default=CALIBRATORS, help="of qdq, separated by commas")
    parser.add_argument("--samples", type=int, default=32, help="calibration samples")
    parser.add_argument("--rounds", type=int, default=5, help="how often both are timed, in turns")
    parser.add_argument("--cores", type=int, help="processors to run on; default: all")
    parser.add_argument("--ort", action="store_true", help="time quantize_static too, once")
    parser.add_argument("--out", type=Path, help="write the table there too")
    parser.add_argument("--json", type=Path, help="write all measurements there")
    return parser.parse_args()


def main():
    options = arguments()
    calibrators = options.calibrators.split(",")
    how = {"count": options.samples, "cores": options.cores}
    rows = {}
    with tempfile.TemporaryDirectory(prefix="qdq-speed-") as scratch:
        for folder in chosen(options.models, options.names):
            print(f"{folder.name} …", file=sys.stderr, flush=True)
            row = rows[folder.name] = {}
            for calibrator in calibrators:
                row[calibrator] = {"qdq": call("speed", folder=folder, calibrator=calibrator,
                                               rounds=options.rounds, **how)}  # fmt: skip
                if options.ort and calibrator != "mse":  # which quantize_static does not have
                    other = {"quantizer": "ort", "out": f"{scratch}/ort.onnx", "rounds": 1}
                    row[calibrator]["ort"] = call("speed", folder=folder, calibrator=calibrator,
                                                  **other, **how)  # fmt: skip
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1))
    heads = {key: "-" for row in (c for n, r in rows.items() for c in table(n, r, calibrators))
             for key in row}  # fmt: skip
    cells = [heads | c for n, r in rows.items() for c in table(n, r, calibrators)]
    text = markdown(cells) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
