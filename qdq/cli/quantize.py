"""``qdq quantize``."""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import onnx

from qdq.api import Result, run
from qdq.calibrate import CALIBRATORS, Percentile
from qdq.cli.options import add_command, add_common, add_scheme, check_output, count, scheme_of
from qdq.data import Feed, npz_samples
from qdq.errors import ConfigError
from qdq.modelio import save
from qdq.session import optimized_op_counts
from qdq.targets import TARGETS

__all__ = ["add"]

REASONS_SHOWN = 5
KERNELS_SHOWN = 8


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(
        commands,
        "quantize",
        "quantize a float ONNX model",
        "Quantize a float ONNX model on calibration data. PATTERN is a regular expression that "
        "must match the whole name. The --skip options may be repeated.",
        (
            "qdq quantize model.onnx model.int8.onnx --calib calib.npz",
            "qdq quantize model.onnx out.onnx --calib calib.npz --skip '/head.*' --skip-op Mul",
        ),
    )
    option = command.add_argument
    option("model", type=Path, metavar="IN", help="the float model")
    option("output", type=Path, metavar="OUT", help="where to write the quantized model")
    option(
        "--calib",
        type=Path,
        required=True,
        metavar="FILE.npz",
        help="calibration data: one array per model input, samples along the first axis",
    )
    option("--samples", type=count, metavar="N", help="use the first N samples only")
    option("--calibrator", choices=sorted(CALIBRATORS), default="mse", help="default: mse")
    option("--percentile", type=_percentile, metavar="P", help="of --calibrator percentile")
    add_scheme(command)
    add_common(command)
    command.set_defaults(action=_quantize)


def _percentile(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 50 < value <= 100:
        raise argparse.ArgumentTypeError(f"wants a number above 50 up to 100; found '{text}'")
    return value


def _quantize(args: argparse.Namespace) -> None:
    check_output(args.output, ((args.model, "float model"), (args.calib, "calibration data")))
    scheme, calibrator, target = scheme_of(args), _calibrator(args), TARGETS[args.target]
    with _Progress() as progress:
        samples = progress.count(islice(npz_samples(args.calib), args.samples))
        result = run(args.model, samples, scheme=scheme, calibrator=calibrator, target=target)
    save(result.model, args.output)
    facts = _facts(result, args, progress.done)
    print(json.dumps(facts, indent=1) if args.json else _text(facts))


def _calibrator(args: argparse.Namespace) -> Any:
    if args.percentile is None:
        return CALIBRATORS[args.calibrator]()
    if args.calibrator != "percentile":
        raise ConfigError("--percentile is for --calibrator percentile; give both or neither")
    return Percentile(percentile=args.percentile)


class _Progress:
    """Counts samples as they pass; shows the count where stderr is a terminal."""

    def __init__(self) -> None:
        self.done = 0
        self._shown = sys.stderr.isatty()
        self._last = self._start = time.monotonic()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._shown and self.done:
            self._show()
            print(file=sys.stderr)

    def count(self, samples: Iterator[Feed]) -> Iterator[Feed]:
        """The samples, counted."""
        for sample in samples:
            yield sample
            self.done += 1
            if self._shown and time.monotonic() - self._last > 0.1:
                self._last = time.monotonic()
                self._show()

    def _show(self) -> None:
        rate = self.done / max(time.monotonic() - self._start, 1e-9)
        line = f"\rcalibrating: {self.done} samples, {rate:.1f}/s "
        print(line, end="", file=sys.stderr, flush=True)


def _facts(result: Result, args: argparse.Namespace, samples: int) -> dict[str, Any]:
    """What was made, as JSON values."""
    types = {n.name: n.op_type for n in result.model.graph.node}
    left = dict(result.left_float)
    integer = [n for n in result.plan.quantized if n not in left]
    kernels = Counter(optimized_op_counts(args.output))
    return {
        "model": str(args.model),
        "output": str(args.output),
        "samples": samples,
        "bytes": {"model": _bytes(args.model), "output": _bytes(args.output)},
        "integer": dict(Counter(types.get(n, "other") for n in integer).most_common()),
        "float": {
            "count": len(left),
            "reasons": dict(Counter(left.values()).most_common()),
            "nodes": left,
        },
        "kernels": dict(kernels.most_common()),
        "changes": len(result.solution.changes),
    }


def _bytes(path: Path) -> int:
    """Size of a model file with the files of its external data."""
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    entries = (e for t in tensors for e in t.external_data if e.key == "location")
    files = {path, *(path.parent / e.value for e in entries)}
    return sum(f.stat().st_size for f in files)


def _text(facts: dict[str, Any]) -> str:
    """The facts for people."""
    before, after = facts["bytes"]["model"], facts["bytes"]["output"]
    integer, left = facts["integer"], facts["float"]
    by_type = ", ".join(f"{count} {op}" for op, count in integer.items())
    lines = [
        f"{facts['output']}: {after / 1e6:.3g} MB, {after / before:.0%} of the float model's "
        f"{before / 1e6:.3g} MB",
        f"integer: {sum(integer.values())} nodes ({by_type or 'none'})",
        f"float:   {left['count']} nodes",
    ]
    reasons = list(left["reasons"].items())
    kernels = ", ".join(f"{n} {op}" for op, n in list(facts["kernels"].items())[:KERNELS_SHOWN])
    lines += [f"  {count:4d}  {reason}" for reason, count in reasons[:REASONS_SHOWN]]
    if len(reasons) > REASONS_SHOWN:
        rest = sum(count for _, count in reasons[REASONS_SHOWN:])
        lines.append(f"  {rest:4d}  for {len(reasons) - REASONS_SHOWN} other reasons (see --json)")
    lines.append(f"onnxruntime runs: {kernels}")
    return "\n".join(lines)
