"""``qdq demo``: quantize a real classifier of handwritten digits and compare it with the float one.

The model and the images come with the package (``train_digits.py`` made them), so the demo works
offline. The calibration images and the test images were not trained on.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qdq.api import quantize
from qdq.data import Feed
from qdq.errors import ConfigError
from qdq.modelio import save
from qdq.report.sqnr import sum_of_squares
from qdq.session import run
from qdq.sqnr import decibels
from qdq.timing import Latency, paired_latency

__all__ = ["MODEL", "Digits", "digits", "main"]

FOLDER = Path(__file__).parent
MODEL = FOLDER / "digits.onnx"
GREY_MAX = 16  # the images hold grey values 0..16


class Digits(NamedTuple):
    """Feeds for the model (input ``image``, float32, (1, 1, 8, 8), 0..1), and labels (500,)."""

    calibration: list[Feed]
    test: list[Feed]
    labels: NDArray[np.uint8]


def digits() -> Digits:
    """The images that come with the package: 100 for calibration, 500 for the test."""
    with np.load(FOLDER / "digits.npz") as z:
        return Digits(_feeds(z["calib_images"]), _feeds(z["test_images"]), z["test_labels"])


def _feeds(images: NDArray[np.uint8]) -> list[Feed]:
    scaled = images.astype(np.float32) / GREY_MAX
    return [{"image": image[None, None]} for image in scaled]


def main(folder: Path = Path(), *, as_json: bool = False) -> Path:
    """Quantize, compare, print (a table, or one JSON object), and return the int8 model's path.

    Raises:
        ConfigError: if the folder does not exist.
    """
    if not folder.is_dir():
        raise ConfigError(f"the output folder '{folder}' does not exist; make it first")
    data = digits()
    path = folder / "digits.int8.onnx"
    save(quantize(MODEL, data.calibration), path)
    exact, quantized = _logits(MODEL, data.test), _logits(path, data.test)
    threads = min(2, os.cpu_count() or 1)
    timing = paired_latency(MODEL, path, data.test[0], repeats=200, threads=threads)
    facts = _facts(data.labels, exact, quantized, path, timing)
    print(json.dumps(facts, indent=1) if as_json else _report(facts, threads))
    return path


def _logits(model: Path, feeds: list[Feed]) -> NDArray[np.float32]:
    """The model's output for every feed, (samples, 10)."""
    return np.concatenate([out["digit"] for out in run(model, feeds)]).astype(np.float32)


def _facts(
    labels: NDArray[np.uint8],
    exact: NDArray[np.float32],
    quantized: NDArray[np.float32],
    path: Path,
    timing: Latency,
) -> dict[str, Any]:
    """What was measured, as JSON values."""
    return {
        "images": len(labels),
        "accuracy": [float((x.argmax(1) == labels).mean()) for x in (exact, quantized)],
        "bytes": [p.stat().st_size for p in (MODEL, path)],
        "ms": [timing.ms_a, timing.ms_b],
        "speed": timing.ratio,
        "same_decision": int((exact.argmax(1) == quantized.argmax(1)).sum()),
        "sqnr_db": decibels(sum_of_squares(exact), sum_of_squares(exact, quantized)),
        "output": str(path),
    }


def _report(facts: dict[str, Any], threads: int) -> str:
    columns = zip(("float32", "int8"), facts["accuracy"], facts["bytes"], facts["ms"], strict=True)
    rows = [f"{n:8s} {100 * r:7.1f} % {s / 1e3:9.1f} kB {t:9.3f} ms" for n, r, s, t in columns]
    size = facts["bytes"]
    return "\n".join(
        [
            f"Handwritten digits: {facts['images']} test images, one at a time, threads: {threads}",
            "",
            "model     accuracy         size      latency",
            *rows,
            "",
            f"int8 is {size[0] / size[1]:.2f}x smaller and {facts['speed']:.2f}x as fast; it makes "
            f"the same decision on {facts['same_decision']} of {facts['images']} images",
            f"signal to quantization noise of the outputs: {facts['sqnr_db']:.1f} dB",
            f"written: {facts['output']}",
        ]
    )
