"""``qdq compare``."""

import argparse
import json
from pathlib import Path
from typing import Any

from qdq.cli.options import add_command, add_common, count, count_or_none
from qdq.compare import compare
from qdq.files import replacing
from qdq.outputs import check_output

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(
        commands,
        "compare",
        "say where the error of a quantized model comes from, and what it gained",
        "Run a float model and a QDQ model of it, by any tool, side by side on data: the error "
        "that arises at each node and that has accumulated, clipped values, latency, size, integer "
        "kernels, and rules that would help, measured.",
        (
            "qdq compare model.onnx model.int8.onnx --data eval.npz",
            "qdq compare model.onnx model.int8.onnx --data eval.npz --html report.html",
            "qdq compare model.onnx other.onnx --data eval.npz --samples 4 --advise 0 --json",
        ),
    )
    option = command.add_argument
    option("model", type=Path, metavar="FLOAT", help="the float model")
    option("quantized", type=Path, metavar="INT8", help="the QDQ model made of it")
    option(
        "--data",
        type=Path,
        required=True,
        metavar="FILE.npz",
        help="one array per model input, samples along the first axis",
    )
    option("--samples", type=count, metavar="N", help="use the first N samples only")
    option("--html", type=Path, metavar="FILE", help="write the report as one HTML page")
    option("--rows", type=count, default=20, metavar="N", help="nodes to print; default: 20")
    option(
        "--repeats",
        type=count_or_none,
        default=30,
        metavar="N",
        help="how often each model is timed; default: 30; 0: no timing",
    )
    option("--threads", type=count, metavar="N", help="onnxruntime's threads for timing")
    option(
        "--advise",
        type=count_or_none,
        default=5,
        metavar="N",
        help="how many rules to try; default: 5; 0: none",
    )
    add_common(command)
    command.set_defaults(action=_compare)


def _compare(args: argparse.Namespace) -> None:
    if args.html is not None:
        others = ((args.quantized, "quantized model"), (args.data, "data"))
        check_output(args.html, args.model, others)
    report = compare(
        args.model,
        args.quantized,
        args.data,
        samples=args.samples,
        repeats=args.repeats,
        threads=args.threads,
        advise=args.advise,
    )
    if args.html is not None:
        with replacing(args.html) as page:
            page.write_text(report.html(), encoding="utf8")
    print(json.dumps(report.json(), indent=1) if args.json else report.text(args.rows))
