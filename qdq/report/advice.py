"""Which rules would help: nodes are made float in the quantized model, and the result measured."""

import math
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from qdq.data import Feed
from qdq.nested import captured_names
from qdq.report import Advice
from qdq.report.matched import Match, Site
from qdq.report.sqnr import sum_of_squares
from qdq.report.text import plural
from qdq.session import run
from qdq.sqnr import decibels
from qdq.timing import paired_latency

__all__ = ["Candidate", "candidates", "measure", "without"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A rule to try.

    Attributes:
        what: in words.
        names: the node or the tensors that the rule names.
        about: "nodes" or "tensors".
        nodes: indices of the nodes that become float in the quantized model.
    """

    what: str
    names: tuple[str, ...]
    about: str
    nodes: frozenset[int]


def candidates(
    match: Match, suspects: Iterable[tuple[str, bool]], count: int
) -> tuple[Candidate, ...]:
    """The first ``count`` rules about the suspects that make at least one integer node float.

    Args:
        match: the two models.
        suspects: (float tensor, whether rounding it is most of the noise of its node), the
            greatest harm first. Where rounding is most, the rule is about the tensor, so that
            its readers become float too, and the readers of what only moves its values; else it
            is about the node that makes it.
        count: how many at most.
    """
    makers = {t: s for s in match.sites for _, t in s.outputs}
    found: dict[frozenset[int], Candidate] = {}
    for tensor, rounding in suspects:
        if len(found) == count:
            break
        maker = makers.get(tensor)
        own = {maker.index} if maker is not None and maker.runs_on_integers else set()
        if own and not rounding and maker is not None:
            c = Candidate(
                what=f"leave {maker.name} float",
                names=(maker.name,),
                about="nodes",
                nodes=frozenset(own),
            )
        else:
            c = _about_tensor(match, tensor, own)
        if c.nodes:
            found.setdefault(c.nodes, c)
    return tuple(found.values())


def _about_tensor(match: Match, tensor: str, makers: Collection[int]) -> Candidate:
    """A rule about a tensor and those that its values move on to with the same codes."""
    tensors, nodes = [tensor], set(makers)
    for name in tensors:  # grows on the way
        for reader in _integer_readers(match, name):
            nodes.add(reader.index)
            ends = [t for _, t in reader.outputs if t in match.coded and t not in tensors]
            same = match.coded[name].params
            tensors += [t for t in ends if match.coded[t].params == same]
    own = match.undivided.get(tensor, tensor)
    which = f"tensor {own}" + (f" and {len(tensors) - 1} more" if len(tensors) > 1 else "")
    return Candidate(
        what=f"leave {which} float ({plural(len(nodes), 'node')})",
        names=tuple(tensors),
        about="tensors",
        nodes=frozenset(nodes),
    )


def _integer_readers(match: Match, tensor: str) -> Iterator[Site]:
    pair = match.coded.get(tensor)
    if pair is not None:
        readers = sorted({use.node for real in pair.reals for use in match.graph.uses(real)})
        found = (match.site_of.get(index) for index in readers)
        yield from (s for s in found if s is not None and s.integer)


def without(match: Match, nodes: Collection[int]) -> onnx.ModelProto:
    """The quantized model with some integer nodes in float and everything else as it is.

    Their constants are the float model's. They read float tensors where there are such, and their
    results lose Q and DQ where no integer node reads them. Where Q and DQ stay, an identity hides
    the float node from a runtime that would fuse it.
    """
    model = onnx.ModelProto()
    model.CopyFrom(match.graph.model)
    sites = {s.index: s for s in match.sites if s.index in nodes}
    made_integer = {t for s in match.sites if s.integer and s.index not in nodes
                    for _, t in s.outputs}  # fmt: skip
    bypassed = _bypassed(match, sites)
    clamped = {o for s in sites.values() if s.limits is not None for o, _ in s.outputs}
    raw_of = {
        real: c.raw
        for t, c in match.coded.items()
        for real in c.reals
        if t not in made_integer and c.real not in bypassed and c.raw not in clamped
    }
    hidden: dict[int, onnx.NodeProto] = {}
    for index, site in sites.items():
        node = model.graph.node[index]
        _make_float(match, model, node, raw_of)
        if site.exact is not None:
            _make_exact(match, model, node, site, site.exact)
        if any(t in match.coded and match.coded[t].real not in bypassed for _, t in site.outputs):
            hidden[index] = _hide(match, node)
    _bypass(model, bypassed)
    dropped = {index for site in sites.values() for index in site.behind}
    if hidden or dropped:
        kept = list(model.graph.node)
        del model.graph.node[:]
        for index, node in enumerate(kept):
            if index not in dropped:
                model.graph.node.extend([node, hidden[index]] if index in hidden else [node])
    _prune(model.graph)
    return model


def _prune(graph: onnx.GraphProto) -> None:
    """Drop what nothing reads; the runtime would take its time."""
    read = {v.name for v in graph.output}
    for index in range(len(graph.node) - 1, -1, -1):
        node = graph.node[index]
        if read.isdisjoint(node.output):
            del graph.node[index]
        else:
            read.update(node.input, captured_names(node))


def _make_float(
    match: Match, model: onnx.ModelProto, node: onnx.NodeProto, raw_of: Mapping[str, str]
) -> None:
    """Let a node read float constants, and of ``raw_of`` what is before the Q."""
    for slot, name in enumerate(node.input):
        constant = match.constants.get(name)
        if constant is not None and constant.source is not None:
            node.input[slot] = _float_constant(match, model, constant.source)
        elif name in raw_of:
            node.input[slot] = raw_of[name]


def _make_exact(
    match: Match, model: onnx.ModelProto, node: onnx.NodeProto, site: Site, exact: onnx.NodeProto
) -> None:
    """Turn a node, and those behind it, into the float model's."""
    node.op_type, node.domain = exact.op_type, exact.domain
    del node.attribute[:]
    node.attribute.extend(exact.attribute)
    if site.behind:
        node.output[0] = site.outputs[0][0]
    del node.input[len(exact.input) :]
    for slot, name in enumerate(exact.input):
        if name in match.float_graph.constants:
            node.input[slot] = _float_constant(match, model, name)


def _bypassed(match: Match, sites: Mapping[int, Site]) -> dict[str, str]:
    """Outputs of DQs that no integer node reads any more → the float tensor in their place."""
    found: dict[str, str] = {}
    for site in sites.values():
        for own, tensor in site.outputs:
            pair = match.coded.get(tensor)
            if pair is None:
                continue
            needed = any(s.index not in sites for s in _integer_readers(match, tensor))
            clamps = site.limits is not None and own == pair.raw  # the codes do a clamp's work
            if not needed and not clamps:
                found |= dict.fromkeys(pair.reals, pair.raw)
    return found


def _bypass(model: onnx.ModelProto, bypassed: Mapping[str, str]) -> None:
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.output[0] in bypassed:
            raw = bypassed[node.output[0]]
            del node.attribute[:]
            del node.input[:]
            node.op_type, node.domain = "Identity", ""
            node.input.append(raw)


def _float_constant(match: Match, model: onnx.ModelProto, source: str) -> str:
    name = match.graph.fresh(f"{source}_in_float")
    tensor = model.graph.initializer.add()
    tensor.CopyFrom(match.float_graph.constants[source])
    tensor.name = name
    return name


def _hide(match: Match, node: onnx.NodeProto) -> onnx.NodeProto:
    inner, outer = match.graph.fresh(f"{node.output[0]}_inner"), node.output[0]
    node.output[0] = inner
    return onnx.helper.make_node("LeakyRelu", [inner], [outer], name=f"{inner}_same", alpha=1.0)


def _mean_sqnr(exact: Sequence[Feed], found: Iterable[Feed]) -> float:
    """Mean over the float outputs of their SQNR in dB; inf if none has an error.

    An output without error beside others counts as 120.
    """
    signal: dict[str, float] = {}
    noise: dict[str, float] = {}
    for a, b in zip(exact, found, strict=True):
        for name, x in a.items():
            y = b.get(name)
            if x.dtype.kind != "f" or y is None or y.shape != x.shape:
                continue
            wide = x.astype(np.float64)
            signal[name] = signal.get(name, 0.0) + sum_of_squares(wide)
            noise[name] = noise.get(name, 0.0) + sum_of_squares(wide, y.astype(np.float64))
    if not any(noise.values()):
        return math.inf
    levels = [float(np.clip(decibels(signal[n], noise[n]), -120, 120)) for n in signal]
    return sum(levels) / len(levels)


def measure(
    match: Match,
    tried: Iterable[Candidate],
    feeds: Sequence[Feed],
    exact: Sequence[Feed],
    repeats: int,
    threads: int | None,
) -> tuple[Advice, ...]:
    """Run the quantized model with each candidate's nodes in float, the greatest gain first.

    Args:
        match: the two models.
        tried: the candidates.
        feeds: samples to run.
        exact: the float model's outputs for them.
        repeats: how often to time; 0 for not at all.
        threads: of onnxruntime; None for its own choice.
    """
    model = match.graph.model
    found = []
    now = _mean_sqnr(exact, run(model, feeds, threads=threads))
    for candidate in tried:
        variant = without(match, candidate.nodes)
        then = _mean_sqnr(exact, run(variant, feeds, threads=threads))
        gain = 0.0 if then == now else then - now
        slower = None
        if repeats:
            timing = paired_latency(model, variant, feeds[0], repeats=repeats, threads=threads)
            slower = 1 / timing.ratio - 1
        names = (match.undivided.get(name, name) for name in candidate.names)
        pattern = "|".join(map(re.escape, names))
        literal = repr(pattern) if "'" in pattern else f"r'{pattern}'"
        option = "--skip" if candidate.about == "nodes" else "--skip-tensor"
        found.append(
            Advice(
                what=candidate.what,
                rule=f"Rule({candidate.about}={literal}, keep_float=True)",
                option=f"{option} {shlex.quote(pattern)}",
                gain_db=gain,
                slower=slower,
            )
        )
    return tuple(sorted(found, key=lambda a: -a.gain_db))
