"""The user's rules, resolved against the names of a model."""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from qdq.errors import ConfigError
from qdq.graph import Graph
from qdq.problem import Derived, Fixed, Given, Shared, Source
from qdq.scheme import Rule, changes
from qdq.spec import QuantParams, QuantSpec
from qdq.successors import Successors

__all__ = ["Overrides", "read_rules"]


@dataclass(frozen=True, slots=True)
class Overrides:
    """Rules by what they touch.

    Attributes:
        pinned: node name → the rule that leaves it float, as a sentence.
        tensors: tensor name → the rules that change it, in order.
        shapes: shape of each constant among ``tensors``.
    """

    pinned: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def apply(self, name: str, spec: QuantSpec, source: Source) -> tuple[QuantSpec, Source]:
        """The spec and source of a tensor after its rules."""
        for rule in self.tensors.get(name, ()):
            spec, source = _apply(rule, name, spec, source, self.shapes.get(name))
        return spec, source

    def per_channel(self, name: str, default: bool) -> bool:
        """Whether a weight gets one scale per output channel; the last rule that says wins."""
        said = [r.per_channel for r in self.tensors.get(name, ()) if r.per_channel is not None]
        return said[-1] if said else default

    @property
    def changed(self) -> frozenset[str]:
        """Tensors whose parameters a rule sets or changes, planned or not."""
        return frozenset(n for n, rules in self.tensors.items() if any(map(changes, rules)))

    def check_used(self, planned: Collection[str], left_float: Mapping[str, str]) -> None:
        """Every overridden tensor must be one that gets parameters.

        Raises:
            ConfigError: naming the tensor that stays float, so that its rule would do nothing.
        """
        changed = self.changed
        for name in self.tensors:
            if name not in planned and name in changed:
                near = difflib.get_close_matches(name, planned, 3, 0.5)
                raise ConfigError(
                    f"a rule sets the quantization of tensor '{name}', but nothing reads or writes "
                    f"it as integers here{_why(left_float)}{_nearest(near)}",
                    tensor=name,
                )


def read_rules(graph: Graph, rules: Iterable[Rule], source: Graph) -> Overrides:
    """Resolve patterns to names.

    Args:
        graph: the prepared model.
        rules: the user's rules, which name nodes of the user's model.
        source: the user's model, or the prepared one.

    Raises:
        ConfigError: a pattern that is no regular expression, or that matches nothing (with the
            nearest names).
    """
    pinned: dict[str, str] = {}
    chosen: set[str] | None = None
    tensors: dict[str, tuple[Rule, ...]] = {}
    names = _tensor_names(graph)
    follow = Successors(graph, source)
    for rule in rules:
        if rule.tensors is not None:
            found = _matching(rule.tensors, names, "tensor")
            for name in found:
                tensors[name] = (*tensors.get(name, ()), rule)
                if rule.keep_float:
                    pinned |= _around(graph, name, rule.tensors)
        elif rule.only:
            chosen = (chosen or set()) | _nodes(follow, rule)
        else:
            what = f"'{rule.nodes}'" if rule.nodes is not None else "/".join(rule.op_types)
            pinned |= dict.fromkeys(sorted(_nodes(follow, rule)), f"a rule keeps {what} float")
    if chosen is not None:
        pinned = _others(graph, chosen) | pinned
    shapes = {n: tuple(graph.constants[n].dims) for n in tensors if n in graph.constants}
    return Overrides(pinned, tensors, shapes)


def _tensor_names(graph: Graph) -> list[str]:
    return list(dict.fromkeys([*graph.inputs, *graph.constants, *graph.producer]))


def _nodes(follow: Successors, rule: Rule) -> set[str]:
    """What became of the nodes that match both the name pattern and the operator types."""
    graph, source = follow.graph, follow.source
    pattern = _compile(rule.nodes) if rule.nodes is not None else None
    matched = [
        (g, i)
        for g in (source, graph)
        for i, node in enumerate(g.nodes)
        if (pattern is None or pattern.fullmatch(node.name))
        and (not rule.op_types or node.op_type in rule.op_types)
    ]
    if not matched:
        wanted = rule.nodes if rule.nodes is not None else ", ".join(rule.op_types)
        nodes = [*source.nodes, *graph.nodes]
        pool = {n.name if rule.nodes is not None else n.op_type for n in nodes}
        near = difflib.get_close_matches(wanted, sorted(pool), 3, 0.5)
        given = {"nodes": rule.nodes, "op_types": rule.op_types or None}
        said = ", ".join(f"{k}={v!r}" for k, v in given.items() if v is not None)
        hint = " Patterns are regular expressions for the whole name." if rule.nodes else ""
        raise ConfigError(f"the rule {said} matches no node of the model{_nearest(near)}{hint}")
    names = {graph.nodes[i].name for g, i in matched if g is graph}
    for g, i in matched:
        if g is source:
            names |= follow.of(i)
    return names


def _others(graph: Graph, chosen: set[str]) -> dict[str, str]:
    """All nodes but the chosen ones, and but the Relu or Clip behind one of those."""
    behind = {
        node.name
        for node in graph.nodes
        if node.op_type in ("Relu", "Clip")
        and (maker := graph.maker(node.input[0])) is not None
        and maker.name in chosen
    }
    names = [n.name for n in graph.nodes if n.name not in chosen and n.name not in behind]
    return dict.fromkeys(names, "no rule with only=True names it")


def _why(left_float: Mapping[str, str]) -> str:
    return f" ({len(left_float)} nodes stay float; the plan says why)" if left_float else ""


def _nearest(near: list[str]) -> str:
    return f". Nearest names: {', '.join(sorted(near))}." if near else "."


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as e:
        raise ConfigError(f"the pattern '{pattern}' is not a regular expression: {e}") from e


def _matching(pattern: str, names: list[str], what: str) -> list[str]:
    compiled = _compile(pattern)
    found = [n for n in names if compiled.fullmatch(n)]
    if not found:
        near = difflib.get_close_matches(pattern, names, 3, 0.5)
        raise ConfigError(
            f"the pattern '{pattern}' matches no {what} of the model{_nearest(near)} "
            f"Patterns are regular expressions for the whole name."
        )
    return found


def _around(graph: Graph, name: str, pattern: str) -> dict[str, str]:
    nodes = [graph.nodes[use.node].name for use in graph.uses(name)]
    while name in graph.producer:
        maker = graph.nodes[graph.producer[name]]
        nodes.append(maker.name)
        if maker.op_type not in ("Relu", "Clip") or graph.only_use(maker.input[0]) is None:
            break
        name = maker.input[0]  # a clamp belongs to what is before it
    return dict.fromkeys(nodes, f"a rule keeps tensor '{pattern}' float")


def _apply(
    rule: Rule, name: str, spec: QuantSpec, source: Source, shape: tuple[int, ...] | None
) -> tuple[QuantSpec, Source]:
    if not changes(rule):
        return spec, source
    _want_own(name, source)
    dtype = rule.dtype or spec.dtype
    symmetric = spec.symmetric if rule.symmetric is None else rule.symmetric
    if rule.per_channel and spec.axis is None:
        raise ConfigError(
            f"tensor '{name}' has no output channels to give a scale each; per_channel=True is for "
            f"the weights of linear nodes",
            tensor=name,
        )
    spec = replace(spec, dtype=dtype, symmetric=symmetric)
    if isinstance(source, Given) and (rule.range, rule.scale) == (None, None):
        _want_kind(name, spec, source.params.spec)
    if rule.range is not None:
        if not np.isfinite(rule.range).all():
            raise ConfigError(f"tensor '{name}': a range must be finite; found {rule.range}")
        source = Fixed(float(rule.range[0]), float(rule.range[1]))
    if rule.scale is not None:
        spec, source = _given(rule, name, spec, shape)
    return spec, source


def _want_own(name: str, source: Source) -> None:
    """Refuse to set what follows from other tensors."""
    if isinstance(source, Derived):
        raise ConfigError(
            f"tensor '{name}' is a bias: its scale is input scale * weight scale and cannot be "
            f"set. Set the scale of the input or the weight.",
            tensor=name,
        )
    if isinstance(source, Shared):
        raise ConfigError(
            f"tensor '{name}' has the parameters of '{source.owner}', of whose values it consists."
            f" Set those of '{source.owner}'.",
            tensor=name,
        )


def _want_kind(name: str, spec: QuantSpec, given: QuantSpec) -> None:
    """Refuse another type for codes whose scale and zero point are given."""
    if (spec.dtype, spec.symmetric) != (given.dtype, given.symmetric):
        raise ConfigError(
            f"tensor '{name}' was given scale and zero point as {_kind(given)} by an earlier rule, "
            f"and is {_kind(spec)} by a later one; put all of it into one rule",
            tensor=name,
        )


def _kind(spec: QuantSpec) -> str:
    return f"{'symmetric' if spec.symmetric else 'asymmetric'} {spec.dtype}"


def _given(
    rule: Rule, name: str, spec: QuantSpec, shape: tuple[int, ...] | None
) -> tuple[QuantSpec, Source]:
    scale, zero = np.asarray(rule.scale, np.float32), np.asarray(rule.zero_point)
    if scale.ndim == 0 and rule.per_channel:
        raise ConfigError(
            f"tensor '{name}' was given one scale and per_channel=True; give one for each output "
            "channel, or leave per_channel out",
            tensor=name,
        )
    if scale.ndim == 0:
        spec = replace(spec, axis=None)
    elif shape is None or spec.axis is None:
        raise ConfigError(
            f"tensor '{name}' was given {scale.size} scales, but has one scale for all of it",
            tensor=name,
        )
    elif scale.shape != (shape[spec.axis],):
        raise ConfigError(
            f"tensor '{name}' was given {scale.size} scales; axis {spec.axis} of its shape "
            f"{shape} wants {shape[spec.axis]}",
            tensor=name,
        )
    try:
        return spec, Given(QuantParams(spec, scale, zero))
    except ConfigError as e:
        raise ConfigError(f"tensor '{name}': {e}", tensor=name) from e
