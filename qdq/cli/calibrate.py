"""``qdq calibrate``, and the options that calibrating commands share."""

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

from qdq.api import collect_statistics
from qdq.calibrate import CALIBRATORS, Percentile
from qdq.cli.options import add_command, add_common, add_scheme, count, scheme_of
from qdq.cli.progress import Progress, pool
from qdq.data import Feed, npz_samples
from qdq.errors import ConfigError
from qdq.outputs import check_output
from qdq.targets import TARGETS

__all__ = ["add", "add_calibration", "calibrator_of", "samples_of"]


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(
        commands,
        "calibrate",
        "gather the statistics of a model, to quantize from later",
        "Run a float ONNX model on calibration data and save what quantizing needs of it. Give the "
        "same options to qdq quantize --stats.",
        (
            "qdq calibrate model.onnx stats.npz --calib calib.npz",
            "qdq calibrate model.onnx stats.npz --calib calib.npz --jobs 8",
            "qdq quantize model.onnx model.int8.onnx --stats stats.npz",
        ),
    )
    command.add_argument("model", type=Path, metavar="IN", help="the float model")
    command.add_argument(
        "output", type=Path, metavar="STATS.npz", help="where to write the statistics"
    )
    add_calibration(command)
    add_scheme(command)
    add_common(command)
    command.set_defaults(action=_calibrate)


def add_calibration(command: argparse.ArgumentParser, data: Any = None) -> None:
    """The options about data and calibrator; ``data``: the group of which --calib is one choice."""
    option = command.add_argument
    (command if data is None else data).add_argument(
        "--calib",
        type=Path,
        required=data is None,
        metavar="FILE.npz",
        help="calibration data: one array per model input, samples along the first axis",
    )
    option("--samples", type=count, metavar="N", help="use the first N samples only")
    option(
        "--jobs",
        type=count,
        default=1,
        metavar="N",
        help="processes that run the samples; the result is the same; default: 1",
    )
    option("--calibrator", choices=sorted(CALIBRATORS), default="mse", help="default: mse")
    option(
        "--percentile",
        type=_percentile,
        metavar="P",
        help="share of the values to keep, with --calibrator percentile; default: 99.99 (percent)",
    )


def _calibrate(args: argparse.Namespace) -> None:
    check_output(args.output, args.model, ((args.calib, "calibration data"),))
    samples = samples_of(args)
    with pool(args.jobs) as executor, Progress(len(samples)) as progress:
        statistics = collect_statistics(
            args.model,
            samples,
            scheme=scheme_of(args),
            calibrator=calibrator_of(args),
            target=TARGETS[args.target],
            executor=executor,
            progress=progress,
        )
    statistics.save(args.output)
    facts = {
        "model": str(args.model),
        "output": str(args.output),
        "samples": statistics.samples,
        "tensors": len(statistics.summaries),
        "calibrator": statistics.calibrator,
    }
    text = "{output}: statistics of {tensors} tensors over {samples} samples, {calibrator}"
    print(json.dumps(facts, indent=1) if args.json else text.format(**facts))


def samples_of(args: argparse.Namespace) -> list[Feed]:
    """The samples that the options name: views of the arrays of the file."""
    return list(islice(npz_samples(args.calib), args.samples))


def _percentile(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 50 < value <= 100:
        raise argparse.ArgumentTypeError(f"wants a number above 50 up to 100; found '{text}'")
    return value


def calibrator_of(args: argparse.Namespace) -> Any:
    """The calibrator that the options ask for."""
    if args.percentile is None:
        return CALIBRATORS[args.calibrator]()
    if args.calibrator != "percentile":
        raise ConfigError(
            "--percentile is for --calibrator percentile; give that too, or leave --percentile out"
        )
    return Percentile(percentile=args.percentile)
