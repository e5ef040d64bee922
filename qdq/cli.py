"""The command line: ``qdq quantize`` and ``qdq demo``. With the demo the only code that prints.

Exit status: 0 done, 1 failed (one line on stderr), 2 wrong usage, 130 interrupted.
"""

import argparse
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import onnx

from qdq.api import Result, run
from qdq.calibrate import CALIBRATORS, Percentile
from qdq.data import Feed, npz_samples
from qdq.demo import main as demo
from qdq.errors import ConfigError, QdqError
from qdq.modelio import save
from qdq.scheme import Rule, Scheme
from qdq.session import optimized_op_counts
from qdq.spec import INT8, INT16, UINT8, UINT16, QuantSpec
from qdq.targets import TARGETS
from qdq.version import __version__

__all__ = ["main"]

ACTIVATION_TYPES = {t.name: t for t in (UINT8, INT8, UINT16, INT16)}
WEIGHT_TYPES = {t.name: t for t in (INT8, UINT8)}
REASONS_SHOWN = 5
KERNELS_SHOWN = 8
# A list after one option would swallow the positional arguments: the option is repeated instead.
_MANY: dict[str, Any] = {"action": "append", "default": [], "metavar": "PATTERN"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status; wrong usage raises SystemExit(2)."""
    args = _parser().parse_args(argv)
    try:
        args.action(args)
        sys.stdout.flush()  # a closed pipe shows here, not at exit
    except KeyboardInterrupt:
        print("\nqdq: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of the pipe is gone. Python flushes stdout once more at exit: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as e:
        if args.debug:
            raise
        print(f"qdq: error: {_reason(e)}", file=sys.stderr)
        return 1
    return 0


def _reason(error: Exception) -> str:
    """The error as one line; what qdq did not foresee is said to be its fault."""
    text = " ".join(str(error).split())
    if isinstance(error, QdqError | OSError):
        return text
    return (
        f"unforeseen {type(error).__name__}: {text}. This is a fault in qdq; please report it "
        "with the output of --debug"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qdq", description="Post-training QDQ quantizer for ONNX models."
    )
    parser.add_argument("--version", action="version", version=f"qdq {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_quantize(commands)
    command = commands.add_parser(
        "demo",
        help="quantize a small digit classifier and compare it with its float model",
        description="Quantize the digit classifier that comes with qdq, on its own data, and "
        "compare accuracy, size and speed with the float model. Works offline, in seconds.",
    )
    command.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help="where to write digits.int8.onnx"
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(action=lambda args: demo(args.out))
    return parser


def _add_quantize(commands: Any) -> None:
    command = commands.add_parser(
        "quantize",
        help="quantize a float ONNX model",
        description="Quantize a float ONNX model on calibration data. PATTERN is a regular "
        "expression that must match the whole name. The --skip options may be repeated.",
    )
    add = command.add_argument
    add("model", type=Path, metavar="IN", help="the float model")
    add("output", type=Path, metavar="OUT", help="where to write the quantized model")
    add(
        "--calib",
        type=Path,
        required=True,
        metavar="FILE.npz",
        help="calibration data: one array per model input, samples along the first axis",
    )
    add("--samples", type=_count, metavar="N", help="use the first N samples only")
    add("--calibrator", choices=sorted(CALIBRATORS), default="mse", help="default: mse")
    add("--percentile", type=_percentile, metavar="P", help="of --calibrator percentile")
    add("--target", choices=TARGETS, default="ort-cpu", help="the runtime; default: ort-cpu")
    add("--activation-type", choices=ACTIVATION_TYPES, default="uint8", help="default: uint8")
    add("--weight-type", choices=WEIGHT_TYPES, default="int8", help="default: int8")
    add("--per-tensor", action="store_true", help="one scale per weight, not one per channel")
    add("--skip", type=_pattern, help="leave nodes of this name float", **_MANY)
    add("--skip-op", help="leave nodes of this operator type float", **{**_MANY, "metavar": "OP"})
    add("--skip-tensor", type=_pattern, help="leave tensors of this name float", **_MANY)
    add("--json", action="store_true", help="print the summary as one JSON object")
    add("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(action=_quantize)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wants a whole number from 1 up; found '{text}'")
    return int(text)


def _percentile(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 50 < value <= 100:
        raise argparse.ArgumentTypeError(f"wants a number above 50 up to 100; found '{text}'")
    return value


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as e:
        raise argparse.ArgumentTypeError(f"'{text}' is no regular expression: {e}") from e
    return text


def _quantize(args: argparse.Namespace) -> None:
    _check_output(args.output, args.model, args.calib)
    scheme, calibrator, target = _scheme(args), _calibrator(args), TARGETS[args.target]
    with _Progress() as progress:
        samples = progress.count(islice(npz_samples(args.calib), args.samples))
        result = run(args.model, samples, scheme=scheme, calibrator=calibrator, target=target)
    save(result.model, args.output)
    facts = _facts(result, args, progress.done)
    print(json.dumps(facts, indent=1) if args.json else _text(facts))


def _check_output(output: Path, model: Path, calibration: Path) -> None:
    """Refuse what can be known before the work is done."""
    for path, what in ((model, "float model"), (calibration, "calibration data")):
        same = output.samefile(path) if output.exists() and path.exists() else False
        if same or output.resolve() == path.resolve():
            raise ConfigError(f"the output '{output}' is the {what} itself; give another path")
    if output.is_dir():
        raise ConfigError(f"the output '{output}' is a folder; give the path of a file")
    if not output.resolve().parent.is_dir():
        raise ConfigError(f"the folder of the output '{output}' does not exist; make it first")


def _scheme(args: argparse.Namespace) -> Scheme:
    weight = WEIGHT_TYPES[args.weight_type]
    rules = [Rule(nodes=p, keep_float=True) for p in args.skip]
    rules += [Rule(op_types=(op,), keep_float=True) for op in args.skip_op]
    rules += [Rule(tensors=p, keep_float=True) for p in args.skip_tensor]
    return Scheme(
        activation=QuantSpec(dtype=ACTIVATION_TYPES[args.activation_type]),
        weight=QuantSpec(dtype=weight, symmetric=weight.signed),
        per_channel=not args.per_tensor,
        rules=tuple(rules),
    )


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
