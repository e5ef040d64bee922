"""compare(): run a float and a quantized model side by side, and say where the error comes from."""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, tee
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from qdq.affine import fake_quantize
from qdq.checks import is_whole, want
from qdq.data import Feed, open_feeds
from qdq.errors import ModelError
from qdq.light import tensor_bytes, without_large
from qdq.modelio import load
from qdq.report import NodeError, Report, Timing
from qdq.report.advice import candidates, measure
from qdq.report.alone import Alone, build_alone, needed_by
from qdq.report.matched import Match, Site
from qdq.report.matching import match, plain
from qdq.report.sqnr import OutputSums, TensorSums, sum_of_squares
from qdq.report.tally import (
    Sums,
    history_of,
    kernel_counts,
    node_errors,
    output_errors,
    properties,
    tensor_errors,
)
from qdq.session import Session, input_specs, open_session, run
from qdq.statistics.observe import observe
from qdq.timing import paired_latency

__all__ = ["compare"]

log: logging.Logger = logging.getLogger(__name__)

KEPT = 4  # samples that advice is measured on; they stay in memory
GAP_DB = 3.0  # more error than that in the fused model than in the QDQ one is worth a note,
FLOAT_DB = 90.0  # but not where it is that of float kernels

Array = NDArray[Any]


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

    Both run over the samples once; one sample's tensors are in memory at a time. The QDQ model
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
    for option, value, least in (
        ("samples", 1 if samples is None else samples, 1),
        ("repeats", repeats, 0),
        ("threads", 1 if threads is None else threads, 1),
        ("advise", advise, 0),
    ):
        right = is_whole(value) and value >= least
        want(option, value, right, f"a whole number, {least} or more")
    source = plain(load(float_model))
    quantized = plain(load(quantized_model, quantized=True))
    _check_ends(source, quantized)
    metadata = properties(quantized)
    left_float = metadata.get("left_float") or {}
    found = match(source, quantized, left_float)
    log.info("matched %d tensors, %d with codes", len(found.found), len(found.coded))
    feeds = islice(open_feeds(data, input_specs(source)), samples)
    sums, kept, exact = _sum_up(source, found, feeds, KEPT if advise else 1)
    nodes = node_errors(found, sums, left_float)
    kernels, borders = kernel_counts(quantized, metadata.get("planned"))
    outputs = output_errors(sums)
    tried = candidates(found, _suspects(nodes, sums), advise)
    advice = measure(found, tried, kept, exact, repeats, threads)
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
        notes=(*found.notes, *_unknown(nodes), *_gaps(outputs)),
    )


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


def _unknown(nodes: Iterable[NodeError]) -> Iterator[str]:
    lost = [n.name for n in nodes if n.local_db is None]
    if lost:
        some = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
        yield f"what arises at {len(lost)} nodes is not known ({some}): an input has no namesake"


def _gaps(outputs: Iterable[Any]) -> Iterator[str]:
    for o in outputs:
        told = o.unfused_db is not None and o.sqnr_db <= FLOAT_DB
        if told and o.unfused_db - o.sqnr_db > GAP_DB:
            yield (
                f"output '{o.name}' has {o.unfused_db:.1f} dB as the QDQ model is written, but "
                f"{o.sqnr_db:.1f} dB as onnxruntime runs it: its kernels add error here, as some "
                "do on processors without 8-bit dot products (try 7-bit weights or int8)"
            )


# -- one pass over the samples --------------------------------------------------------------------


def _sum_up(
    source: onnx.ModelProto, found: Match, feeds: Iterator[Feed], keep: int
) -> tuple[Sums, list[Feed], list[Feed]]:
    """The sums over all samples; the first samples, and the float model's outputs for them."""
    own, other = found.float_graph.model, found.graph.model
    sites = [s for s in found.sites if s.rounds]
    needs = [n for s in sites for n in (needed_by(found, s) or {}).values()]
    names = [t for t in found.found if t not in found.float_graph.inputs or t in found.coded]
    wanted = list(dict.fromkeys([*names, *(t for t, _ in needs)]))
    sums = Sums()
    kept: list[Feed] = []
    outputs: list[Feed] = []
    alone: _Alone | None = None
    copies = tee(feeds, 5)  # advanced in step: one sample is held
    runs = zip(
        copies[0],
        observe(own, wanted, copies[1]),
        observe(other, [found.found[t] for t in names], copies[2], optimize=False),
        run(source, copies[3]),
        run(other, copies[4]),
        strict=True,
    )
    for feed, exact, written, outs, fused in runs:
        sums.samples += 1
        if alone is None:
            alone = _Alone(found, {n: exact[n].dtype for n in wanted})
        rounded = {t: _rounded(exact[t], found, t) for t in wanted if t in found.coded}
        for tensor in names:
            _add_tensor(sums, found, tensor, exact[tensor], rounded.get(tensor), written)
        alone.add(sums, exact, rounded)
        outs = {name: value for name, value in outs.items() if isinstance(value, np.ndarray)}
        for name, value in outs.items():
            _add_output(sums, name, value, fused[name])
        if len(kept) < keep:
            kept.append({n: np.array(v) for n, v in feed.items()})  # readers may reuse arrays
            outputs.append(outs)
    return sums, kept, outputs


def _add_output(sums: Sums, name: str, exact: Array, found: Array) -> None:
    if exact.dtype.kind == "f" and exact.shape == found.shape:
        sums.outputs.setdefault(name, OutputSums()).add(exact, found)


def _rounded(x: Array, found: Match, tensor: str) -> Array:
    return fake_quantize(x, found.coded[tensor].params).astype(x.dtype)


def _add_tensor(
    sums: Sums, found: Match, tensor: str, exact: Array, rounded: Array | None, written: Feed
) -> None:
    if exact.dtype.kind != "f":
        return
    pair = found.coded.get(tensor)
    entry = sums.tensors.setdefault(tensor, TensorSums(pair.params if pair else None))
    value: Array = written[found.found[tensor]]
    if value.shape != exact.shape:
        raise ModelError(
            f"tensor '{tensor}' has shape {exact.shape} in the float model and {value.shape} in "
            "the quantized one; compare wants two forms of one model",
            tensor=tensor,
        )
    entry.add(exact, rounded, value)


class _Alone:
    """Runs the integer nodes on their own and sums up what arises in each."""

    def __init__(self, found: Match, types: Mapping[str, np.dtype[Any]]) -> None:
        self.found = found
        self.alone: Alone = build_alone(found, types)
        model = self.alone.model
        self.session: Session | None = None
        if model.graph.node:
            self.session = open_session(model, optimize=False)

    def add(self, sums: Sums, exact: Mapping[str, Array], rounded: Mapping[str, Array]) -> None:
        """Add a sample, given the float model's tensors."""
        results: Feed = {}
        if self.session is not None:
            feed = {n: (rounded if r else exact)[t] for n, (t, r) in self.alone.inputs.items()}
            results = self.session.run(feed)
        coded_inputs = [t for t in self.found.coded if t in self.found.float_graph.inputs]
        for tensor in coded_inputs:
            self._note(sums, tensor, exact[tensor], rounded[tensor])
        for site in self.found.sites:
            for own, tensor in site.outputs:
                if tensor in sums.tensors:
                    self._site(sums, site, own, tensor, results, exact, rounded)

    def _site(
        self,
        sums: Sums,
        site: Site,
        own: str,
        tensor: str,
        results: Feed,
        exact: Mapping[str, Array],
        rounded: Mapping[str, Array],
    ) -> None:
        names = self.alone.pairs.get(own)
        if names is None:
            if site.rounds:
                sums.local[tensor] = None
            else:
                self._note(sums, tensor, exact[tensor], rounded.get(tensor, exact[tensor]))
            return
        quantized, ideal = (_clamped(results[n], site) for n in names)
        if tensor in self.found.coded:
            quantized = _rounded(quantized, self.found, tensor)
        self._note(sums, tensor, ideal, quantized)

    @staticmethod
    def _note(sums: Sums, tensor: str, ideal: Array, found: Array) -> None:
        sums.local[tensor] = (sums.local.get(tensor) or 0.0) + sum_of_squares(ideal, found)


def _clamped(x: Array, site: Site) -> Array:
    return x if site.limits is None else np.clip(x, *site.limits)
