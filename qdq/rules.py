"""The user's rules, resolved against the names of a model."""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from qdq.errors import ConfigError
from qdq.graph import Graph
from qdq.problem import Constant, Derived, Fixed, Given, Shared, Source
from qdq.scheme import Rule
from qdq.spec import QuantParams, QuantSpec

__all__ = ["Overrides", "read_rules"]


@dataclass(frozen=True, slots=True)
class Overrides:
    """Rules by what they touch.

    Attributes:
        pinned: node name → the rule that leaves it float, as a sentence.
        tensors: tensor name → the rules that change it, in order.
    """

    pinned: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)

    def apply(self, name: str, spec: QuantSpec, source: Source) -> tuple[QuantSpec, Source]:
        """The spec and source of a tensor after its rules."""
        for rule in self.tensors.get(name, ()):
            spec, source = _apply(rule, name, spec, source)
        return spec, source

    def check_used(self, planned: Collection[str], left_float: Mapping[str, str]) -> None:
        """Every overridden tensor must be one that gets parameters.

        Raises:
            ConfigError: naming the tensor that stays float, so that its rule would do nothing.
        """
        for name, rules in self.tensors.items():
            if name not in planned and any(_changes(r) for r in rules):
                near = difflib.get_close_matches(name, planned, 3, 0.5)
                raise ConfigError(
                    f"a rule sets the quantization of tensor '{name}', but nothing reads or writes "
                    f"it as integers here ({len(left_float)} nodes stay float; the plan says why)"
                    f"{_nearest(near)}",
                    tensor=name,
                )


def read_rules(graph: Graph, rules: Iterable[Rule]) -> Overrides:
    """Resolve patterns to names.

    Raises:
        ConfigError: a pattern that is no regular expression, or that matches nothing (with the
            nearest names).
    """
    pinned: dict[str, str] = {}
    tensors: dict[str, tuple[Rule, ...]] = {}
    names = _tensor_names(graph)
    for rule in rules:
        if rule.tensors is not None:
            found = _matching(rule.tensors, names, "tensor")
            for name in found:
                tensors[name] = (*tensors.get(name, ()), rule)
                if rule.keep_float:
                    pinned |= _around(graph, name, rule.tensors)
        else:
            pinned |= _nodes(graph, rule)
    return Overrides(pinned, tensors)


def _changes(rule: Rule) -> bool:
    effects = (rule.dtype, rule.symmetric, rule.per_channel, rule.range, rule.scale)
    return any(e is not None for e in effects)


def _tensor_names(graph: Graph) -> list[str]:
    return list(dict.fromkeys([*graph.inputs, *graph.constants, *graph.producer]))


def _origins(node: object) -> Iterable[tuple[str, str]]:
    """(operator, name) of the nodes of the user's model that a prepared node stands for."""
    for prop in getattr(node, "metadata_props", ()):
        if prop.key == "qdq.origin":
            for part in prop.value.split("\n"):
                op_type, _, name = part.partition(":")
                yield op_type, name


def _nodes(graph: Graph, rule: Rule) -> dict[str, str]:
    """The nodes that match both the name pattern and the operator types, where given."""
    pattern = _compile(rule.nodes) if rule.nodes is not None else None
    found: dict[str, str] = {}
    names, types = [], []
    for node in graph.nodes:
        for op_type, name in [(node.op_type, node.name), *_origins(node)]:
            names.append(name)
            types.append(op_type)
            if (pattern is None or pattern.fullmatch(name)) and (
                not rule.op_types or op_type in rule.op_types
            ):
                what = f"'{rule.nodes}'" if rule.nodes is not None else "/".join(rule.op_types)
                found[node.name] = f"a rule keeps {what} float"
    if not found:
        wanted = rule.nodes if rule.nodes is not None else ", ".join(rule.op_types)
        pool = names if rule.nodes is not None else types
        near = difflib.get_close_matches(wanted, set(pool), 3, 0.5)
        raise ConfigError(
            f"the rule nodes={rule.nodes!r}, op_types={rule.op_types} matches no node of the "
            f"model{_nearest(near)} Patterns are regular expressions for the whole name."
        )
    return found


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
    if name in graph.producer:
        nodes.append(graph.nodes[graph.producer[name]].name)
    return dict.fromkeys(nodes, f"a rule keeps tensor '{pattern}' float")


def _apply(rule: Rule, name: str, spec: QuantSpec, source: Source) -> tuple[QuantSpec, Source]:
    if not _changes(rule):
        return spec, source
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
    dtype = rule.dtype or spec.dtype
    symmetric = spec.symmetric if rule.symmetric is None else rule.symmetric
    axis = None if rule.per_channel is False else spec.axis
    spec = replace(spec, dtype=dtype, symmetric=symmetric, axis=axis)
    if rule.range is not None:
        source = Fixed(float(rule.range[0]), float(rule.range[1]))
    if rule.scale is not None:
        spec, source = _given(rule, name, spec, constant=isinstance(source, Constant))
    return spec, source


def _given(rule: Rule, name: str, spec: QuantSpec, *, constant: bool) -> tuple[QuantSpec, Source]:
    scale, zero = np.asarray(rule.scale, np.float32), np.asarray(rule.zero_point)
    if scale.ndim == 0:
        spec = replace(spec, axis=None)
    elif not constant or spec.axis is None:
        raise ConfigError(
            f"tensor '{name}' was given {scale.shape} scales, but has one scale for all of it",
            tensor=name,
        )
    try:
        return spec, Given(QuantParams(spec, scale, zero))
    except ConfigError as e:
        raise ConfigError(f"tensor '{name}': {e}", tensor=name) from e
