"""compare(): run a float and a quantized model side by side, and say where the error comes from."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import onnx

from qdq.checks import want_whole
from qdq.data import Feed, open_feeds
from qdq.errors import ModelError
from qdq.light import tensor_bytes, without_large
from qdq.modelio import load
from qdq.report import NodeError, Report, Timing
from qdq.report.advice import candidates, measure
from qdq.report.matching import match, plain
from qdq.report.sums import Sums, sum_up
from qdq.report.tally import (
    history_of,
    kernel_counts,
    node_errors,
    output_errors,
    properties,
    tensor_errors,
)
from qdq.session import input_specs
from qdq.timing import paired_latency

__all__ = ["compare"]

log: logging.Logger = logging.getLogger(__name__)

KEPT = 4  # samples that advice is measured on; they stay in memory
GAP_DB = 3.0  # more error than that in the fused model than in the QDQ one is worth a note,
FLOAT_DB = 90.0  # but not where it is that of float kernels


def compare(
    float_model: Any,
    quantized_model: Any,
    data: Any,
    *,
    samples: int | None = None,
    repeats: int = 30,
    threads: int | None = None,
    advise: int = 5,
) -> Report:
    """Compare a quantized model with its float model on data, tensor by tensor.

    Both run over the samples once; one sample's tensors are in memory at a time,
    and for trials of rules the first samples and their outputs. The QDQ model
    is run as it is written, with floats between its Q and DQ, for the errors of tensors, and as
    onnxruntime optimizes it for those of the outputs. Two kinds of error are told apart: what
    *arises* at a node and what has *accumulated* before it (``qdq.report.NodeError``).

    Args:
        float_model: as for ``qdq.quantize``.
        quantized_model: a QDQ model of it, by qdq or another tool, in the same forms.
        data: samples, in the same forms as calibration data; best some that were not used to
            calibrate.
        samples: use the first so many only.
        repeats: how often each model is timed; 0 for not at all.
        threads: onnxruntime's threads for timing; None for its own choice.
        advise: how many rules to try; each takes a session and ``repeats`` timed runs.

    Returns:
        The report: ``print(report)``, ``report.json()``, ``report.html()``.

    Raises:
        ModelError: a model cannot be read, or the two do not belong together.
        CalibrationError: the data does not fit the model.
        ConfigError: samples, repeats, threads or advise is no whole number, or too small.
    """
    _check_options(samples, repeats, threads, advise)
    source = plain(load(float_model))
    quantized = plain(load(quantized_model, quantized=True))
    _check_ends(source, quantized)
    metadata = properties(quantized)
    left_float = metadata.get("left_float") or {}
    found = match(source, quantized, left_float)
    log.info("matched %d tensors, %d with codes", len(found.found), len(found.coded))
    feeds = islice(open_feeds(data, input_specs(source)), samples)
    sums, kept, exact = sum_up(source, found, feeds, KEPT if advise else 1)
    nodes = node_errors(found, sums, left_float)
    between = (s.op_type for s in found.sites if s.integer)
    kernels, borders = kernel_counts(quantized, metadata.get("planned"), between)
    outputs = output_errors(sums)
    tried = candidates(found, _suspects(nodes, sums), advise)
    advice = measure(found, tried, kept, exact, repeats, threads) if outputs else ()
    return Report(
        float_model=_label(float_model, "float model"),
        quantized_model=_label(quantized_model, "quantized model"),
        samples=sums.samples,
        outputs=outputs,
        nodes=nodes,
        tensors=tensor_errors(found, sums),
        timing=_timing(source, quantized, kept[0], repeats, threads),
        bytes=(_size(source), _size(quantized)),
        kernels=kernels,
        borders=borders,
        history=history_of(metadata),
        advice=advice,
        notes=(*found.notes, *_unjudged(source, sums), *_unknown(nodes), *_gaps(outputs)),
    )


def _check_options(samples: object, repeats: object, threads: object, advise: object) -> None:
    want_whole("samples", 1 if samples is None else samples, 1)
    want_whole("repeats", repeats, 0)
    want_whole("threads", 1 if threads is None else threads, 1)
    want_whole("advise", advise, 0)


def _check_ends(source: onnx.ModelProto, quantized: onnx.ModelProto) -> None:
    """Both want the same inputs; the quantized model may have outputs besides the float model's."""
    inputs = [sorted(input_specs(m)) for m in (source, quantized)]
    outputs = [sorted(v.name for v in m.graph.output) for m in (source, quantized)]
    for what, (own, other), fits in (
        ("inputs", inputs, inputs[0] == inputs[1]),
        ("outputs", outputs, set(outputs[0]) <= set(outputs[1])),
    ):
        if not fits:
            raise ModelError(
                f"the quantized model has the {what} {other}, the float model {own}; "
                "compare wants two forms of one model"
            )


def _label(model: Any, otherwise: str) -> str:
    return os.fspath(model) if isinstance(model, str | os.PathLike) else otherwise


def _size(model: onnx.ModelProto) -> int:
    light = without_large(model, 1024, as_inputs=False)
    inside = {t.name for t in light.graph.initializer}
    large = sum(tensor_bytes(t) for t in model.graph.initializer if t.name not in inside)
    return int(light.ByteSize() + large)


def _timing(
    source: onnx.ModelProto,
    quantized: onnx.ModelProto,
    feed: Feed,
    repeats: int,
    threads: int | None,
) -> Timing | None:
    if not repeats:
        return None
    t = paired_latency(source, quantized, feed, repeats=repeats, threads=threads)
    return Timing(
        float_ms=t.ms_a,
        quantized_ms=t.ms_b,
        ratio=t.ratio,
        float_spread=t.spread_a,
        quantized_spread=t.spread_b,
        ratio_spread=t.spread_ratio,
    )


def _suspects(nodes: Iterable[NodeError], sums: Sums) -> Iterator[tuple[str, bool]]:
    """Tensors by harm, and whether most of the noise is their rounding (not their weights')."""
    for node in nodes:
        if node.share > 0:
            entry, local = sums.tensors[node.tensor], sums.local.get(node.tensor) or 0.0
            yield node.tensor, entry.rounding > local / 2


def _unjudged(source: onnx.ModelProto, sums: Sums) -> Iterator[str]:
    """Outputs that have no error, and where there are no others."""
    lost = [v.name for v in source.graph.output if v.name not in sums.outputs]
    if lost:
        some = _first_of([f"'{n}'" for n in lost])
        what = "no floating-point numbers, or another shape in the quantized model"
        rest = "" if sums.outputs else "; so no rule is tried either"
        yield f"{len(lost)} outputs are not compared ({some}): {what}{rest}"


def _unknown(nodes: Iterable[NodeError]) -> Iterator[str]:
    lost = [n.name for n in nodes if n.local_db is None]
    if lost:
        some = _first_of(lost)
        yield f"what arises at {len(lost)} nodes is not known ({some}): an input has no namesake"


def _first_of(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _gaps(outputs: Iterable[Any]) -> Iterator[str]:
    for o in outputs:
        told = o.unfused_db is not None and o.sqnr_db <= FLOAT_DB
        if told and o.unfused_db - o.sqnr_db > GAP_DB:
            yield (
                f"output '{o.name}' has {o.unfused_db:.1f} dB as the QDQ model is written, but "
                f"{o.sqnr_db:.1f} dB as onnxruntime runs it: its kernels add error here, as some "
                "do on processors without 8-bit dot products (--target ort-cpu-no-vnni avoids that)"
            )
