"""``qdq quantize``."""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qdq.api import Result, run
from qdq.calibrate import Calibrator
from qdq.cli.calibrate import add_calibration, calibrator_of, samples_of
from qdq.cli.options import add_command, add_common, add_scheme, scheme_of
from qdq.cli.progress import Progress, pool
from qdq.errors import ConfigError, QdqError
from qdq.modelio import save
from qdq.outputs import check_output, data_files
from qdq.report.text import plural, size
from qdq.session import optimized_op_counts
from qdq.statistics import Statistics
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
        "must match the whole name. The --skip options, --only and --stats may be repeated. "
        "--worth, --measured, --target-sqnr and --target-latency exclude each other.",
        (
            "qdq quantize model.onnx model.int8.onnx --calib calib.npz",
            "qdq quantize model.onnx out.onnx --calib calib.npz --skip '/head.*' --skip-op Mul",
            "qdq quantize model.onnx out.onnx --calib calib.npz --worth 0",
            "qdq quantize model.onnx out.onnx --calib calib.npz --target-sqnr 30",
            "qdq quantize model.onnx out.onnx --calib calib.npz --target-latency 0.6",
            "qdq quantize model.onnx out.onnx --stats stats.npz",
            "qdq quantize model.onnx out.onnx --stats part1.npz --stats part2.npz",
        ),
    )
    option = command.add_argument
    option("model", type=Path, metavar="IN", help="the float model")
    option("output", type=Path, metavar="OUT", help="where to write the quantized model")
    data = command.add_mutually_exclusive_group(required=True)
    data.add_argument(
        "--stats",
        type=Path,
        action="append",
        metavar="STATS.npz",
        help="statistics from qdq calibrate, in place of --calib; of parts of the data, each part",
    )
    _add_choice(command)
    add_calibration(command, data)
    add_scheme(command)
    add_common(command)
    command.set_defaults(action=_quantize)


def _add_choice(command: argparse.ArgumentParser) -> None:
    """The options by which the plan is chosen."""
    option = command.add_argument
    option(
        "--worth",
        type=float,
        help="what accuracy is worth in latency: 0 is the fastest model, more leaves more float; "
        "default: chosen for the model",
    )
    option(
        "--measured",
        action="store_true",
        help="choose the plan by the error of a few plans that are run; takes longer",
    )
    option(
        "--target-sqnr",
        type=float,
        metavar="DB",
        help="the fastest plan whose worst output has this SQNR on up to four of the samples",
    )
    option(
        "--target-latency",
        type=float,
        metavar="RATIO",
        help="the most accurate plan that takes at most this share of the float model's time on "
        "this machine, as 0.6",
    )


def _quantize(args: argparse.Namespace) -> None:
    given = [(path, "statistics") for path in args.stats or ()]
    if args.calib is not None:
        given.append((args.calib, "calibration data"))
    check_output(args.output, args.model, given)
    for option, value in (("--jobs", args.jobs > 1), ("--samples", args.samples)):
        if args.stats is not None and value:
            raise ConfigError(f"{option} is for --calib; with --stats there is nothing to run")
    samples = None if args.calib is None else samples_of(args)
    calibrator = calibrator_of(args)
    statistics = _merged(args.stats or (), calibrator)
    with pool(args.jobs) as executor, Progress(len(samples or ())) as progress:
        result = run(
            args.model,
            samples,
            scheme=scheme_of(args),
            calibrator=calibrator,
            target=TARGETS[args.target],
            executor=executor,
            statistics=statistics,
            progress=progress,
            worth=args.worth,
            measured=args.measured,
            target_sqnr=args.target_sqnr,
            target_latency=args.target_latency,
        )
    save(result.model, args.output)
    facts = _facts(result, args, progress.done if statistics is None else statistics.samples)
    print(json.dumps(facts, indent=1) if args.json else _text(facts))


def _merged(paths: Sequence[Path], calibrator: Calibrator[Any]) -> Statistics | None:
    """The statistics of all parts; None without any.

    Raises:
        ConfigError: two parts do not belong together, or one is given twice.
    """
    if len(set(map(Path.resolve, paths))) < len(paths):
        raise ConfigError("the same file of --stats is given twice: its samples would count twice")
    merged: Statistics | None = None
    for path in paths:
        part = Statistics.load(path)
        try:
            merged = part if merged is None else merged.merge(part, calibrator)
        except QdqError as e:
            raise ConfigError(f"--stats {path} does not go with those before: {e}") from e
    return merged


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
    return sum(f.stat().st_size for f in {path, *data_files(path)})


def _text(facts: dict[str, Any]) -> str:
    """The facts for people."""
    before, after = facts["bytes"]["model"], facts["bytes"]["output"]
    integer, left = facts["integer"], facts["float"]
    by_type = ", ".join(f"{count} {op}" for op, count in integer.items())
    lines = [
        f"{facts['output']}: {size(after)}, {after / before:.0%} of the float model's "
        f"{size(before)}",
        f"integer: {plural(sum(integer.values()), 'node')} ({by_type or 'none'})",
        f"float:   {plural(left['count'], 'node')}",
    ]
    reasons = list(left["reasons"].items())
    kernels = ", ".join(f"{n} {op}" for op, n in list(facts["kernels"].items())[:KERNELS_SHOWN])
    lines += [f"  {count:4d}  {reason}" for reason, count in reasons[:REASONS_SHOWN]]
    if len(reasons) > REASONS_SHOWN:
        rest = sum(count for _, count in reasons[REASONS_SHOWN:])
        others = plural(len(reasons) - REASONS_SHOWN, "other reason")
        lines.append(f"  {rest:4d}  for {others} (see --json)")
    lines.append(f"onnxruntime runs: {kernels}")
    return "\n".join(lines)
