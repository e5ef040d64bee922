"""How much of a tensor's noise arrives at the outputs, measured on few samples.

The energies of the gradients (see ``adjoint``) come from one more run of each of a few samples,
which takes about three times a plain one. They are kept by the digest of the sample, so that
those of parts of the data merge to those of the whole.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from qdq.calibrate.noise import mean_square
from qdq.data import Feed
from qdq.dynamic import with_dynamic
from qdq.errors import QdqError
from qdq.graph import Graph
from qdq.light import tensor_bytes
from qdq.placement.adjoint import Adjoint, adjoint
from qdq.placement.harm import read
from qdq.placement.wholes import judged
from qdq.plan import Plan
from qdq.problem import Constant, Derived
from qdq.ranges import Histogram
from qdq.session import is_large_matrix
from qdq.statistics.few import FewSamples
from qdq.statistics.observe import Observation, Observer

__all__ = ["Back", "dynamic_errors", "gains_of", "gradients", "typical"]

log: logging.Logger = logging.getLogger(__name__)

_MOST = 1e30  # of an energy; infinity times no noise is not a number
_MANY = 600  # nodes, of both ways; to optimize more takes longer than few samples can win
_MOST_BYTES = 1 << 30  # of activations, which wait for the way back, and weights that are copied
_MOST_RUNS = 16  # of each sample for dynamic kernels: each is one of the whole model
_MOST_SHOWN = 1 << 26  # of what a sample's outputs take; those of all samples are kept


class Back(NamedTuple):
    """What the samples show that are run there and back.

    Attributes:
        energies: tensor → energy of its gradient; empty where the way back is not known.
        exact: what the model is ``judged`` by, of each sample.
    """

    energies: FewSamples = FewSamples()
    exact: Sequence[Observation] = ()


def gradients(model: onnx.ModelProto, sizes: Graph, plan: Plan, kept: Mapping[bytes, Feed]) -> Back:
    """Run the samples there and back.

    Args:
        model: the prepared model; not changed.
        sizes: an index of it whose shapes are all numbers.
        plan: the widest plan: what it rounds, at least one tensor, is of interest.
        kept: digest → sample, see ``keep_few``.

    Returns:
        Nothing where that would take too much memory.
    """
    if _bytes(sizes) > _MOST_BYTES:
        return Back()
    wanted = (t for t in plan.tensors.values() if not isinstance(t.source, Constant | Derived))
    by = judged(sizes)
    heads = by.names if by.outputs else ()
    if _size(sizes, heads) > _MOST_SHOWN:
        heads = ()
    tables: dict[str, list[str]] = {}
    for unit in plan.lookups:
        tables.setdefault(unit.table, []).extend(unit.outputs)
    way = adjoint(model, (t.name for t in wanted), tables)
    # where a rule does not fit this model, there is still what the model makes
    for chosen in (way, None) if way is not None else (None,):
        try:
            return _run(model, chosen, heads, kept, len(sizes.nodes))
        except QdqError as e:
            log.info("no %s: %s", "outputs" if chosen is None else "gradients", e)
    return Back()  # what the float model cannot do is told when the result is verified


def _run(
    model: onnx.ModelProto,
    way: Adjoint | None,
    heads: Sequence[str],
    kept: Mapping[bytes, Feed],
    nodes: int,
) -> Back:
    """Run the samples; ``nodes``: of the model."""
    energies, back = FewSamples(), [] if way is None else [way.output]
    if not (back or heads):
        return Back()
    optimize = way is None or nodes + len(way.added.node) <= _MANY
    added = None if way is None else way.added
    observer = Observer(model, [*back, *heads], optimize=optimize, added=added, few=True)
    seen = [observer.run(feed) for feed in kept.values()]
    if way is not None:
        rows = {d.hex(): row.pop(way.output) for d, row in zip(kept, seen, strict=True)}
        energies = FewSamples(names=way.names, rows=rows)
    log.info("ran %d samples there and back: %d tensors", len(seen), len(energies.names))
    return Back(energies=energies, exact=seen if heads else ())


def _bytes(sizes: Graph) -> int:
    made = (o for node in sizes.nodes for o in node.output if o)
    weights = ((t.dims, tensor_bytes(t)) for t in sizes.constants.values())
    return _size(sizes, made) + sum(b for dims, b in weights if not is_large_matrix(dims, b))


def _size(sizes: Graph, names: Iterable[str]) -> int:
    """Bytes of some tensors of float32."""
    return sum(4 * prod(d or 1 for d in sizes.shape(name) or ()) for name in names)


def dynamic_errors(
    model: onnx.ModelProto,
    plan: Plan,
    kept: Mapping[bytes, Feed],
    exact: Sequence[Observation],
) -> FewSamples:
    """Run the samples with one dynamic kernel at a time: the errors of the outputs.

    Of more than a few, several at a time; then each counts with the error of all of them.

    What such a kernel rounds depends on the values of a run, and there is no way back through it.

    Args:
        model: the prepared model; not changed.
        plan: the widest plan.
        kept: digest → sample.
        exact: what the model is ``judged`` by, of each sample; where that is not known, nothing is.

    Returns:
        First weight → relative error of the outputs, 0 to 1 (lost), of each sample.
    """
    nodes: dict[str, set[str]] = {}
    for unit in plan.dynamic:  # those of the same weights go together
        nodes.setdefault(unit.dynamic[0], set()).add(unit.view.name)
    if not exact or not nodes:
        return FewSamples()
    by = judged(Graph(model))

    def errors(weights: Sequence[str]) -> list[list[float]]:
        names = set().union(*(nodes[weight] for weight in weights))
        rounded = Observer(with_dynamic(model, names), by.names, few=True)
        pairs = zip(exact, kept.values(), strict=True)
        return [[read(seen, rounded.run(feed), by).harm for seen, feed in pairs]] * len(weights)

    order = list(nodes)
    size = -(-len(order) // _MOST_RUNS)
    groups = [order[k : k + size] for k in range(0, len(order), size)]
    columns = np.array([row for group in groups for row in errors(group)], np.float32)
    rows = {digest.hex(): columns[:, k] for k, digest in enumerate(kept)}
    return FewSamples(names=tuple(order), rows=rows)


def typical(found: FewSamples) -> dict[str, float]:
    """Tensor → the median of its numbers over the samples; without those that are no numbers.

    A sample whose output is nearly nothing (a page without text, silence) has relative errors
    beyond all measure.
    """
    if not found.rows:
        return {}
    rows: NDArray[np.float64] = np.stack([found.rows[d] for d in sorted(found.rows)])
    with np.errstate(over="ignore", invalid="ignore"):
        median = np.median(rows.astype(np.float64), axis=0)
    pairs = zip(found.names, median, strict=True)
    return {name: float(value) for name, value in pairs if not np.isnan(value)}


def gains_of(energies: Mapping[str, float], summaries: Mapping[str, Any]) -> dict[str, float]:
    """Tensor → relative error of the outputs over the relative noise of the tensor.

    With noise of variance v in each element and mean square m of its values, v / m is the
    relative noise, and v times the energy of the gradient what the outputs feel of it.

    Args:
        energies: tensor → that of its gradient, from ``typical``.
        summaries: tensor → histogram of its values.
    """
    return {
        name: min(energy, _MOST) * mean_square(summaries[name])
        for name, energy in energies.items()
        if isinstance(summaries.get(name), Histogram)
    }
