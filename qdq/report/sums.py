"""One pass over the samples: both models run side by side, and what is summed up of that."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import tee
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from qdq.affine import fake_quantize
from qdq.data import Feed
from qdq.errors import ModelError
from qdq.report.alone import Alone, build_alone, needed_by
from qdq.report.matched import Match, Site
from qdq.report.sqnr import OutputSums, TensorSums, sum_of_squares
from qdq.session import Session, open_session, run
from qdq.statistics.observe import observe

__all__ = ["Sums", "sum_up"]

Array = NDArray[Any]


@dataclass(slots=True)
class Sums:
    """What is summed up over the samples.

    Attributes:
        tensors: by float tensor.
        local: noise that arises at the node that makes a float tensor; None if it is not known.
        outputs: by output of the model.
        samples: how many were run.
    """

    tensors: dict[str, TensorSums] = field(default_factory=dict)
    local: dict[str, float | None] = field(default_factory=dict)
    outputs: dict[str, OutputSums] = field(default_factory=dict)
    samples: int = 0


def sum_up(
    source: onnx.ModelProto, found: Match, feeds: Iterator[Feed], keep: int
) -> tuple[Sums, list[Feed], list[Feed]]:
    """One pass over the samples.

    Args:
        source: the float model.
        found: it and the quantized one, matched.
        feeds: the samples.
        keep: how many samples to keep.

    Returns:
        The sums over all samples; the first samples, and the float model's outputs for them.
    """
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
