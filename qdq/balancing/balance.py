"""Moving channels between activations and weights, by what calibration has shown.

Smoothing divides outlier channels in front of matrix products, at the cost of a division;
equalization lets quiet channels grow between two layers, for nothing. Both leave the float model
what it is, and its rounding smaller. One edit of the model serves both.
"""

import logging
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod

import numpy as np
import onnx
from numpy.typing import NDArray

from qdq.affine import params_from_range
from qdq.balancing.channels import Group
from qdq.balancing.dividing import Scaled, divided
from qdq.balancing.equalizing import Equalization, Reading, find_equalization
from qdq.balancing.smoothing import Smoothing, find_smoothing
from qdq.calibrate.noise import mean_square, relative_noise
from qdq.evidence import Evidence
from qdq.graph import Graph
from qdq.placement.frontier import Planner
from qdq.placement.weighing import Weighing
from qdq.problem import Linear, Moments, Shared
from qdq.ranges import Histogram, TensorRange
from qdq.spec import QuantSpec
from qdq.statistics import Statistics

__all__ = ["balanced", "divided_moments", "equalizations", "smoothings"]

log: logging.Logger = logging.getLogger(__name__)


def smoothings(
    evidence: Evidence, readers: Mapping[str, tuple[Linear, ...]], statistics: Statistics
) -> dict[str, Smoothing]:
    """The tensors that it pays to smooth.

    Args:
        evidence: as calibrated.
        readers: tensors that can be divided → the products that read them.
        statistics: with the range of each channel of these tensors.
    """
    graph = Graph(evidence.model)
    found: dict[str, Smoothing] = {}
    for name, products in readers.items():
        if name not in evidence.ranges or name not in statistics.sums:
            continue
        spec = evidence.plan.tensors[name].spec
        reach = statistics.sums[name].reach
        noise, energy = _noise(statistics.summaries[name], evidence.ranges[name], spec, reach)
        weights = [graph.floats(n.weight) for n in products]
        weight_spec = evidence.plan.tensors[products[0].weight].spec
        smoothing = find_smoothing(reach, weights, spec, weight_spec, noise, energy)
        if smoothing is not None:
            found[name] = smoothing
    return found


def _noise(
    summary: object, found: TensorRange, spec: QuantSpec, reach: TensorRange
) -> tuple[float, float]:
    """Variance of a tensor's rounding, and its mean square.

    Without a histogram: a twelfth of the squared step, and a third of each channel's peak.
    """
    params = params_from_range(found, spec)
    if isinstance(summary, Histogram):
        energy = mean_square(summary)
        return relative_noise(summary, params) * energy, energy
    peak = np.maximum(np.abs(reach.low), np.abs(reach.high)).astype(np.float64)
    return float(params.scale) ** 2 / 12, float(np.mean(peak**2)) / 9


def equalizations(
    evidence: Evidence,
    groups: Sequence[Group],
    statistics: Statistics,
    without: Container[str],
) -> list[tuple[Group, Equalization]]:
    """The groups of channels that it pays to equalize.

    Args:
        evidence: as calibrated.
        groups: from ``channel_groups``.
        statistics: with the range of each channel of the tensors that are rounded.
        without: tensors that are smoothed, which does more.
    """
    graph = Graph(evidence.model)
    found = []
    for group in groups:
        if any(name in without for name in group.tensors):
            continue
        known = [n for n in group.rounded if n in evidence.ranges and n in statistics.sums]
        if len(known) < len(group.rounded):
            continue  # a tensor that never had a value
        readings = [r for n in known for r in _readings(evidence, graph, group, n, statistics)]
        equalization = find_equalization(readings)
        if equalization is not None:
            found.append((group, equalization))
    return found


def _readings(
    evidence: Evidence, graph: Graph, group: Group, name: str, statistics: Statistics
) -> list[Reading]:
    """Where the rounding of a tensor is felt: at each linear node, or at least somewhere."""
    planned, reach = evidence.plan.tensors, statistics.sums[name].reach
    range_ = evidence.ranges[name]
    _, energy = _noise(statistics.summaries[name], range_, planned[name].spec, reach)
    scale = float(params_from_range(range_, planned[name].spec).scale)
    plain = Reading(tensor=name, reach=reach, scale=scale, range=range_, energy=energy)
    found = []
    for reader in group.readers:
        source = planned[reader.tensor].source if reader.tensor in planned else None
        owner = source.owner if isinstance(source, Shared) else reader.tensor
        if owner != name or reader.weight.name not in planned:
            continue
        weight = graph.floats(reader.weight.name)
        order = (reader.weight.axis, *(() if reader.outputs is None else (reader.outputs,)))
        turned = np.moveaxis(weight, order, range(len(order)))
        outputs = 1 if reader.outputs is None else turned.shape[1]
        found.append(
            replace(
                plain,
                weight=turned.reshape(turned.shape[0], outputs, -1),
                apart=reader.outputs is None,
                weight_spec=planned[reader.weight.name].spec,
            )
        )
    return found or [plain]


def balanced(
    evidence: Evidence,
    found: Mapping[str, Smoothing],
    readers: Mapping[str, tuple[Linear, ...]],
    equal: Sequence[tuple[Group, Equalization]],
    planner: Callable[[onnx.ModelProto], Planner],
    widest: Weighing,
) -> Evidence:
    """The evidence for the model in which channels have moved between activations and weights.

    Args:
        evidence: as calibrated.
        found: the tensors to smooth.
        readers: from ``divisible``.
        equal: the groups to equalize.
        planner: model → what makes plans of it.
        widest: the prices that ``evidence.plan`` was made with.
    """
    if not (found or equal):
        return evidence
    products = {name: [n.node for n in readers[name]] for name in found}
    divisors = {name: s.divisors for name, s in found.items()}
    model, names = divided(evidence.model, products, divisors, _scaled(equal))
    plan_for = planner(model)
    plan = plan_for(widest) if found else evidence.plan  # factors alone change no plan
    ranges = {**evidence.ranges, **{names[n]: s.range for n, s in found.items()}}
    if not plan.observed.keys() <= ranges.keys():
        log.info("no smoothing: it would make tensors integer that were not observed")
        return balanced(evidence, {}, readers, equal, planner, widest)
    log.info("smoothing: %d tensors; equalization: %d groups", len(found), len(equal))
    factors = {name: e.factors for g, e in equal for name in g.tensors}
    means = {n: m * factors[n] if n in factors else m for n, m in evidence.means.items()}
    means |= {names[n]: means[n] / s.divisors for n, s in found.items() if n in means}
    return replace(
        evidence,
        model=model,
        plan_for=plan_for,
        plan=plan,
        ranges=ranges,
        noise=_noises(evidence.noise, found, names, equal),
        means=means,
        moments=_moments(evidence, found, readers, equal),
        smoothings=found,
        products=products,
        equalizations=tuple(equal),
    )


def _scaled(
    equal: Sequence[tuple[Group, Equalization]],
) -> Iterator[tuple[Scaled, NDArray[np.float32]]]:
    for group, equalization in equal:
        yield from ((constant, equalization.factors) for constant in group.makers)
        yield from ((reader.weight, equalization.inverse) for reader in group.readers)


def _noises(
    noise: Mapping[str, float],
    found: Mapping[str, Smoothing],
    names: Mapping[str, str],
    equal: Sequence[tuple[Group, Equalization]],
) -> dict[str, float]:
    """Relative noise after it; an error that falls by some factor makes less noise by that."""
    errors = {name: error for _, e in equal for name, error in e.errors.items()}
    changed = {name: value * errors.get(name, 1.0) for name, value in noise.items()}
    changed |= {names[n]: noise[n] * s.error for n, s in found.items() if n in noise}
    return changed


def _moments(
    evidence: Evidence,
    found: Mapping[str, Smoothing],
    readers: Mapping[str, tuple[Linear, ...]],
    equal: Sequence[tuple[Group, Equalization]],
) -> dict[str, Moments]:
    """Second moments of what the nodes read now."""
    moments = dict(evidence.moments)
    graph, linears = Graph(evidence.model), {n.node: n for n in evidence.plan.linears}
    divisors = {n.node: s.divisors for name, s in found.items() for n in readers[name]}
    divisors |= {r.node: e.inverse for g, e in equal for r in g.readers}
    for node in moments.keys() & divisors.keys():
        linear, shape = linears[node], graph.shape(linears[node].weight) or ()
        taps = 1 if linear.kind == "matmul" else prod(d or 1 for d in shape[2:])
        moments[node] = divided_moments(moments[node], divisors[node], linear.groups, taps)
    return moments


def divided_moments(
    moments: Moments, divisors: NDArray[np.float32], groups: int = 1, taps: int = 1
) -> Moments:
    """Second moments of the divided terms.

    Args:
        moments: as measured; each group's last block is filled up.
        divisors: of the input channels, (C,).
        groups: groups of the channels.
        taps: terms of a channel.
    """
    blocks, size = moments.mean.shape
    terms = np.repeat(divisors.reshape(groups, -1), taps, axis=1)
    filled = np.ones((groups, blocks * size // groups))
    filled[:, : terms.shape[1]] = terms
    by = filled.reshape(blocks, size)
    return replace(
        moments, second=moments.second / (by[:, :, None] * by[:, None, :]), mean=moments.mean / by
    )
