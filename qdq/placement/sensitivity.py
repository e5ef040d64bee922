"""Measure what each rounding does to the outputs of a model, on a few samples.

One rounding at a time is switched on in a float model with switches (see ``probing``), and the
outputs are compared with those of the float model. All roundings are measured on the first two
samples; on the others only those which together did nearly all of the harm there.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from qdq.affine import fake_quantize
from qdq.data import Feed
from qdq.errors import CalibrationError, ConfigError
from qdq.graph import Graph
from qdq.placement.harm import Reading, Sensitivity, decibels, read
from qdq.placement.probing import probe_model
from qdq.plan import Plan
from qdq.problem import Constant, Derived, Shared
from qdq.session import open_session
from qdq.solve import Solution
from qdq.statistics.gradients import SAMPLES

__all__ = ["SAMPLES", "Feed", "Meter", "keep_few", "measure", "rounded_by"]

log: logging.Logger = logging.getLogger(__name__)

_ALL = 2  # samples on which everything is measured
_MOST = 0.995  # share of the harm that is measured on every sample
_ON, _OFF = np.array(True), np.array(False)


def rounded_by(plan: Plan) -> tuple[frozenset[str], frozenset[str]]:
    """The activations that a plan rounds, and the linear nodes whose weights it rounds.

    What a movement node hands out is rounded with its input, so it does not count again.
    """
    tensors = frozenset(
        t.name
        for t in plan.tensors.values()
        if not isinstance(t.source, Constant | Derived | Shared)
    )
    return tensors, frozenset(n.node for n in plan.linears)


def keep_few(
    feeds: Iterable[Feed], kept: dict[bytes, Feed], count: int = SAMPLES
) -> Iterator[Feed]:
    """Pass the feeds on, and keep a few of them: those with the smallest digests of their content.

    So the choice is like a random one, but it depends neither on the order of the samples nor on
    a seed. Equal samples are kept once.

    Args:
        feeds: the samples.
        kept: is filled with digest → feed, in the order of the digests at the end.
        count: how many to keep.
    """
    for feed in feeds:
        yield feed
        digest = _digest(feed)
        if digest in kept or (len(kept) >= count and digest > max(kept)):
            continue
        kept[digest] = {n: np.array(v) for n, v in feed.items()}  # a reader may reuse its arrays
        if len(kept) > count:
            del kept[max(kept)]
    ordered = sorted(kept.items(), key=lambda item: item[0])
    kept.clear()
    kept.update(ordered)


def _digest(feed: Feed) -> bytes:
    found = hashlib.sha256()
    for name in sorted(feed):
        value = np.ascontiguousarray(feed[name])
        found.update(f"{name} {value.dtype.str} {value.shape}".encode())
        found.update(value.tobytes())
    return found.digest()


def measure(
    model: onnx.ModelProto,
    plan: Plan,
    solution: Solution,
    feeds: Iterable[Feed],
    meter: "Meter | None" = None,
) -> Sensitivity:
    """Measure the harm of every rounding of a plan.

    Args:
        model: the prepared float model.
        plan: the widest plan; each narrower one (a higher price of harm) rounds a part of it.
        solution: its parameters.
        feeds: the samples, some ``SAMPLES``, in memory; see ``keep_few``.
        meter: for this model, plan and solution, if there is one already.

    Returns:
        Harm of each activation, also of those that share parameters (theirs is the owner's),
        and of each linear node's weight.

    Raises:
        CalibrationError: no samples.
        ConfigError: the model has no output of floating-point numbers.
        ModelError: onnxruntime cannot run the model.
    """
    meter = meter or Meter(model, plan, solution)
    feeds = list(feeds)
    if not feeds:
        raise CalibrationError("no samples to measure sensitivity on; give at least one")
    rows = [*(("tensor", n) for n in meter.tensors), *(("weight", n) for n in meter.nodes)]
    harm: dict[tuple[str, str], float] = {}
    together = 0.0
    for k, feed in enumerate(feeds):
        if k == _ALL:
            rows = _most(harm)
        found = meter.alone(feed, rows)
        harm |= {row: (harm[row] * k + h) / (k + 1) if k else h for row, h in found.items()}
        together += meter.read([feed], meter.tensors, meter.nodes)[0].harm / len(feeds)
    tensors = {n: h for (kind, n), h in harm.items() if kind == "tensor"}
    for t in plan.tensors.values():
        if isinstance(t.source, Shared) and t.source.owner in tensors:
            tensors[t.name] = tensors[t.source.owner]
    result = Sensitivity(
        tensors=tensors,
        weights={n: h for (kind, n), h in harm.items() if kind == "weight"},
        together=together,
        samples=len(feeds),
    )
    log.info("sensitivity: %d tensors, %d weights", len(meter.tensors), len(meter.nodes))
    return result


def _most(harm: Mapping[tuple[str, str], float]) -> list[tuple[str, str]]:
    """The worst rows, which together have nearly all of the harm."""
    ranked = sorted(harm, key=lambda row: (-harm[row], row))
    below = np.cumsum([harm[row] for row in ranked])
    count = int(np.searchsorted(below, _MOST * below[-1])) + 1 if len(ranked) else 0
    return ranked[:count]


class Meter:
    """Two sessions with switches, and the float model's outputs for the feeds seen so far.

    Attributes:
        tensors: the activations that can be rounded.
        nodes: the linear nodes whose weights can be.
    """

    def __init__(self, model: onnx.ModelProto, plan: Plan, solution: Solution) -> None:
        graph = Graph(model)
        tensors, _ = rounded_by(plan)
        order = [t for t in plan.tensors if t in tensors and t in solution.params]
        params = {t: solution.params[t] for t in order}
        self._rounded: dict[str, dict[str, NDArray[np.generic]]] = {}
        for linear in plan.linears:
            if linear.node not in solution.floats:
                self._rounded[linear.node] = _codes(graph, solution, linear.weight, linear.bias)
        names = list(dict.fromkeys(n for values in self._rounded.values() for n in values))
        self._weights = {n: graph.array(n) for n in names}
        self.tensors: tuple[str, ...] = tuple(order)
        self.nodes: tuple[str, ...] = tuple(self._rounded)
        self._outputs = [
            v.name
            for v in model.graph.output
            if graph.elem_type(v.name) in (0, onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
        ]
        if not self._outputs:
            raise ConfigError(
                "the model has no output of floating-point numbers, so no error can be measured; "
                "quantize without a target for accuracy"
            )
        probe = probe_model(model, params)
        self._switches, self._logits = probe.switches, probe.logits
        wanted = list(dict.fromkeys([*self._outputs, *self._logits.values()]))
        self._fast = open_session(probe.model, outputs=wanted)
        fed = probe_model(model, params, names).model if names else probe.model
        self._any = open_session(fed, outputs=wanted)
        self._known: dict[int, tuple[Feed, dict[bool, Mapping[str, NDArray[np.generic]]]]] = {}

    def alone(self, feed: Feed, rows: Sequence[tuple[str, str]]) -> dict[tuple[str, str], float]:
        """Harm of each row, ("tensor", name) or ("weight", node), switched on alone."""
        found = {}
        for row in rows:
            kind, name = row
            reading = self._read(feed, *(([name], []) if kind == "tensor" else ([], [name])))
            found[row] = reading.harm
        return found

    def read(
        self, feeds: Iterable[Feed], tensors: Iterable[str], nodes: Iterable[str]
    ) -> list[Reading]:
        """One reading per feed, with all of these rounded at once."""
        tensors, nodes = list(tensors), list(nodes)
        return [self._read(feed, tensors, nodes) for feed in feeds]

    def sqnr(self, feeds: Iterable[Feed], plan: Plan) -> float:
        """SQNR in dB of the outputs with everything rounded that ``plan`` rounds."""
        tensors, nodes = rounded_by(plan)
        return decibels(self.read(feeds, sorted(tensors), sorted(nodes)))

    def _read(self, feed: Feed, tensors: Sequence[str], nodes: Sequence[str]) -> Reading:
        weighted = bool(nodes)
        known = self._known.setdefault(id(feed), (feed, {}))[1]
        if weighted not in known:
            known[weighted] = self._run(feed, [], [], weighted)
        value = self._run(feed, tensors, nodes, weighted)
        return read(known[weighted], value, self._outputs, list(self._logits.values()))

    def _run(
        self, feed: Feed, tensors: Sequence[str], nodes: Sequence[str], weighted: bool
    ) -> Mapping[str, NDArray[np.generic]]:
        # a run without rounded weights goes to the session that has them as constants: faster
        values = {**feed, **dict.fromkeys(self._switches.values(), _OFF)}
        values |= {self._switches[t]: _ON for t in tensors if t in self._switches}
        if not weighted:
            return self._fast.run(values)
        values |= self._weights
        for node in nodes:
            values |= self._rounded.get(node, {})
        return self._any.run(values)


def _codes(
    graph: Graph, solution: Solution, weight: str, bias: str | None
) -> dict[str, NDArray[np.generic]]:
    """The weight as integer kernels see it, and the bias if a step has corrected it."""
    real = solution.constants.get(weight)
    rounded = fake_quantize(graph.floats(weight) if real is None else real, solution.params[weight])
    found: dict[str, NDArray[np.generic]] = {weight: rounded}
    if bias is not None and bias in solution.constants:
        found[bias] = np.asarray(solution.constants[bias], np.float32)
    return found
