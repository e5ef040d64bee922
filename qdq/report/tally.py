"""From the sums of a comparison to the records of its report."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx

from qdq.ranges import Histogram
from qdq.report import Bars, KernelCount, NodeError, OutputError, ScaleChange, TensorError
from qdq.report.matched import Match, Site
from qdq.report.sqnr import TensorSums, representable
from qdq.report.sums import Sums
from qdq.session import optimized_op_counts
from qdq.sqnr import decibels
from qdq.targets import ORT_CPU

__all__ = [
    "history_of",
    "kernel_counts",
    "node_errors",
    "output_errors",
    "properties",
    "tensor_errors",
]

BARS = 64
KINDS = {"int32": "bias"}


def properties(model: onnx.ModelProto) -> dict[str, Any]:
    """What qdq wrote into a model's metadata, without "qdq."; empty for other tools' models."""
    found: dict[str, Any] = {}
    for p in model.metadata_props:
        if p.key.startswith("qdq."):
            try:
                found[p.key.removeprefix("qdq.")] = json.loads(p.value)
            except json.JSONDecodeError:
                found[p.key.removeprefix("qdq.")] = p.value
    return found


def node_errors(match: Match, sums: Sums, reasons: Mapping[str, str]) -> tuple[NodeError, ...]:
    """The nodes, the greatest noise of their own first."""
    rows: list[NodeError] = []
    made = {t for s in match.sites for _, t in s.outputs}
    for tensor in (t for t in match.coded if t not in made and t in sums.tensors):
        rows.append(_row(sums, tensor, [tensor], op_type="input", integer=False, position=-1))
    for position, site in enumerate(match.sites):
        tensors = [t for _, t in site.outputs if t in sums.tensors]
        if not tensors:
            continue
        stays = reasons.get(site.name)
        rows.append(
            _row(
                sums,
                site.name,
                tensors,
                op_type=site.op_type,
                integer=site.runs_on_integers and stays is None,
                position=position,
                reason=stays,
            )
        )
    noise = [0.0 if r.local_db is None else 10 ** (-max(r.local_db, -300.0) / 10) for r in rows]
    total = sum(noise) or 1.0
    rows = [replace(r, share=n / total) for r, n in zip(rows, noise, strict=True)]
    lowest = {id(r): r.accumulated_db if r.accumulated_db is not None else np.inf for r in rows}
    return tuple(sorted(rows, key=lambda r: (-r.share, lowest[id(r)], r.position)))


def _row(sums: Sums, name: str, tensors: list[str], **facts: Any) -> NodeError:
    entries = [sums.tensors[t] for t in tensors]
    signal = sum(e.signal for e in entries)
    local = [sums.local.get(t, 0.0) for t in tensors]
    known = [n for n in local if n is not None]
    return NodeError(
        name=name,
        tensor=tensors[0],
        local_db=decibels(signal, sum(known)) if len(known) == len(local) else None,
        accumulated_db=decibels(signal, sum(e.accumulated for e in entries)),
        **facts,
    )


def tensor_errors(match: Match, sums: Sums) -> tuple[TensorError, ...]:
    """Activations and constants, in graph order."""
    makers = {t: k for k, s in enumerate(match.sites) for _, t in s.outputs}
    places = {s.index: k for k, s in enumerate(match.sites)}
    rows = []
    for tensor, entry in sums.tensors.items():
        # a tensor inside a unit, such as the one before an absorbed clamp, belongs to its node
        inside = match.graph.producer.get(match.found[tensor], -1)
        position = makers.get(tensor, places.get(inside, -1))
        site = match.sites[position] if position >= 0 else None
        rows.append(_tensor_row(tensor, "activation", entry, site, position))
    rows += _constants(match)
    return tuple(sorted(rows, key=lambda r: r.position))


def _tensor_row(
    name: str, kind: str, entry: TensorSums, site: Site | None, position: int
) -> TensorError:
    params, drawn = entry.params, entry.histogram
    return TensorError(
        name=name,
        kind=kind,
        node=site.name if site is not None else name,
        op_type=site.op_type if site is not None else "input",
        position=position,
        dtype=None if params is None else params.spec.dtype.name,
        rounding_db=None if params is None else decibels(entry.signal, entry.rounding),
        accumulated_db=decibels(entry.signal, entry.accumulated),
        clipped=None if params is None else entry.clipped / max(entry.count, 1),
        used=None if drawn is None else (drawn.low, drawn.high),
        represented=None if params is None else representable(params),
        histogram=None if drawn is None else bars(drawn),
    )


def _constants(match: Match) -> list[TensorError]:
    rows = []
    done: set[str] = set()
    for position, site in enumerate(match.sites):
        read = [match.constants.get(name) for name in match.graph.nodes[site.index].input]
        for constant in (*read, *site.relaid):
            if constant is None or constant.source is None or constant.source in done:
                continue
            done.add(constant.source)
            exact = match.float_graph.floats(constant.source).astype(np.float32)
            if not exact.size or not np.isfinite(exact).all():
                continue
            value, sums = constant.value(match.graph), TensorSums(constant.params)
            sums.add(exact, value, value)
            kind = KINDS.get(constant.params.spec.dtype.name, "weight")
            rows.append(_tensor_row(constant.source, kind, sums, site, position))
    return rows


def bars(histogram: Histogram, most: int = BARS) -> Bars:
    """The histogram with at most ``most`` bars, whose width is a power of two."""
    exponent = histogram.exponent
    while True:
        start, counts = histogram.coarsened(exponent)
        if counts.size <= most:
            width = 2.0**exponent
            return Bars(start * width, width, tuple(int(c) for c in counts))
        exponent += 1


def output_errors(sums: Sums) -> tuple[OutputError, ...]:
    """Per output of the model."""
    rows = []
    for name, entry in sums.outputs.items():
        unfused = sums.tensors.get(name)
        rows.append(
            OutputError(
                name=name,
                sqnr_db=decibels(entry.signal, entry.noise),
                unfused_db=None
                if unfused is None
                else decibels(unfused.signal, unfused.accumulated),
                cosine=entry.cosine,
                largest=entry.largest,
                agreement=entry.agreement,
            )
        )
    return tuple(rows)


def kernel_counts(
    model: onnx.ModelProto, planned: Mapping[str, int] | None, seen: Iterable[str] = ()
) -> tuple[tuple[KernelCount, ...], int]:
    """Integer kernels in onnxruntime's optimized model against the plan, and lone Q and DQ.

    Operators whose integer kernel has the operator's own name (those that move values) cannot be
    told apart, and are left out. ``seen``: operators between Q and DQ as the model is written.
    """
    names, families = _kernel_names()
    counts = optimized_op_counts(model)
    integer: Counter[str] = Counter()
    for found, count in counts.items():
        if found in names or found.startswith("QLinear"):
            integer[names.get(found, found.removeprefix("QLinear"))] += count
    same = {op for op, kernel in (ORT_CPU.kernels or {}).items() if kernel.fused == op}
    wanted: Counter[str] = Counter()
    for op, count in (planned or {}).items():
        wanted[families.get(op, op)] += count
    float_ones: Counter[str] = Counter()
    for op, count in counts.items():
        own = op.removeprefix("Fused")
        float_ones[families.get(own, own)] += count
    between = {families.get(op, op) for op in seen}
    ops = [op for op in sorted({*integer, *wanted, *between}) if op not in same]
    rows = tuple(
        KernelCount(
            op_type=op,
            planned=None if planned is None else wanted[op],
            integer=integer[op],
            float=float_ones[op],
        )
        for op in ops
    )
    return rows, counts.get("QuantizeLinear", 0) + counts.get("DequantizeLinear", 0)


def _kernel_names() -> tuple[dict[str, str], dict[str, str]]:
    """Integer kernel → the operator that it belongs to; operator → the one that has its row.

    A ConvTranspose becomes a Conv, so the two share a row.
    """
    names: dict[str, str] = {}
    families: dict[str, str] = {}
    for op, kernel in (ORT_CPU.kernels or {}).items():
        for fused in (kernel.fused, kernel.fused_float):
            if fused and fused != op:
                families.setdefault(op, names.setdefault(fused, op))
    return names, families


def history_of(metadata: Mapping[str, Any]) -> tuple[ScaleChange, ...]:
    """The solver's changes of weight scales, from the metadata."""
    keys = ("tensor", "step", "scale", "ratio", "note")
    entries = metadata.get("changes") or ()
    return tuple(ScaleChange(**{k: e[k] for k in keys if k in e}) for e in entries)
