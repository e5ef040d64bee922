"""``TensorQuantOverrides`` as rules about tensors."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qdq.checks import is_whole
from qdq.compat.types import flag, int_type, nearest, number
from qdq.errors import ConfigError
from qdq.graph import Graph, attributes
from qdq.scheme import Rule

__all__ = ["check_axes", "read_overrides"]

_KEYS = (
    "quant_type", "scale", "zero_point", "symmetric", "reduce_range", "rmin", "rmax", "axis",
    "convert",
)  # fmt: skip


def read_overrides(value: object) -> tuple[tuple[Rule, ...], dict[str, int]]:
    """The rules that the option asks for, and tensor → axis where it names one.

    One dict is one scale for the tensor; a dict with ``axis``, or one dict per channel the first
    of which has it, is one scale per channel.

    Raises:
        ConfigError: naming the tensor and the key: of the wrong kind, unknown, or without a
            counterpart.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"TensorQuantOverrides wants a dict of tensor name to list of dicts; found {value!r}"
        )
    rules: list[Rule] = []
    axes: dict[str, int] = {}
    for name, entries in value.items():
        where = f"TensorQuantOverrides of tensor '{name}'"
        if not isinstance(entries, list | tuple) or not all(
            isinstance(e, Mapping) for e in entries
        ):
            raise ConfigError(f"{where} wants a list of dicts; found {entries!r}")
        for entry in entries:
            _check_keys(entry, where)
        if not any(entries):
            continue
        if len(entries) > 1 or "axis" in entries[0]:
            axes[name] = _axis(entries, where)
        rules.append(_rule(name, entries, name in axes, where))
    return tuple(rules), axes


def check_axes(graph: Graph, axes: Mapping[str, int]) -> None:
    """Refuse an axis that is not that of the output channels, the only one that kernels take.

    Args:
        graph: the user's model.
        axes: tensor → the axis that was asked for.

    Raises:
        ConfigError: naming the tensor, its axis and the right one.
    """
    for name, axis in axes.items():
        if name not in graph.constants:
            raise ConfigError(
                f"TensorQuantOverrides of tensor '{name}': only a weight has one scale per "
                "channel; leave 'axis' out",
                tensor=name,
            )
        rank = len(graph.constants[name].dims)
        for use in graph.uses(name):
            wanted = _channel_axis(graph, use.node, rank)
            if wanted is not None and axis not in (wanted, wanted - rank):
                raise ConfigError(
                    f"TensorQuantOverrides of tensor '{name}': axis {axis} is not that of the "
                    f"output channels, which is {wanted}; kernels take no other",
                    tensor=name,
                )


def _channel_axis(graph: Graph, node: int, rank: int) -> int | None:
    proto = graph.nodes[node]
    transposed = bool(attributes(proto).get("transB", 0))
    axes = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0 if transposed else 1, "MatMul": rank - 1}
    return axes.get(proto.op_type)


def _check_keys(entry: Mapping[str, Any], where: str) -> None:
    for key in entry:
        if key not in _KEYS:
            raise ConfigError(f"{where}: unknown key {key!r}{nearest(str(key), _KEYS)}")
    if entry.get("convert"):
        raise ConfigError(
            f"{where}: 'convert' makes one tensor two types, which no integer kernel of the CPU "
            "reads; give the tensor one type, or leave the nodes behind it float with "
            "nodes_to_exclude"
        )
    if entry.get("reduce_range"):
        raise ConfigError(
            f"{where}: 'reduce_range' is for the whole model here; pass reduce_range=True to "
            "quantize_static, which touches only weights whose sums could saturate"
        )
    for a, b in (("scale", "zero_point"), ("rmin", "rmax")):
        if (a in entry) != (b in entry):
            raise ConfigError(f"{where}: {a!r} and {b!r} go together; give both or neither")


def _axis(entries: Sequence[Mapping[str, Any]], where: str) -> int:
    axis = entries[0].get("axis")
    if not is_whole(axis):
        raise ConfigError(
            f"{where}: one dict per channel wants a whole number as 'axis' in the first; found "
            f"{axis!r}"
        )
    for key in ("axis", "quant_type", "symmetric"):
        if any(key in e and e[key] != entries[0].get(key) for e in entries):
            raise ConfigError(f"{where}: the channels differ in {key!r}; give it in the first dict")
    if any("rmin" in e for e in entries):
        raise ConfigError(
            f"{where}: a range per channel cannot be given; give 'scale' and 'zero_point' of "
            "every channel"
        )
    given = [e for e in entries if "scale" in e]
    if given and (len(given) != len(entries) or len(entries) == 1):
        raise ConfigError(
            f"{where}: 'scale' and 'zero_point' are wanted for every channel, one dict each; "
            f"found {len(given)} in {len(entries)} dicts"
        )
    return axis


def _whole(value: Any, what: str) -> int:
    found = number(value, what)
    if found != int(found):
        raise ConfigError(f"{what} wants a whole number; found {value!r}")
    return int(found)


def _rule(name: str, entries: Sequence[Mapping[str, Any]], channels: bool, where: str) -> Rule:
    first = entries[0]
    more: dict[str, Any] = {}
    if first.get("quant_type") is not None:
        more["dtype"] = int_type(first["quant_type"], f"{where}: 'quant_type'")
    if first.get("symmetric") is not None:
        more["symmetric"] = flag(first["symmetric"], f"{where}: 'symmetric'")
    if "rmin" in first:
        low, high = (number(first[k], f"{where}: {k!r}") for k in ("rmin", "rmax"))
        more["range"] = low, high
    if "scale" in first:
        scales = tuple(number(e["scale"], f"{where}: 'scale'") for e in entries)
        zeros = tuple(_whole(e["zero_point"], f"{where}: 'zero_point'") for e in entries)
        more["scale"], more["zero_point"] = (scales, zeros) if channels else (scales[0], zeros[0])
        if any(zeros):
            more["symmetric"] = False
    return Rule(tensors=re.escape(name), per_channel=channels, **more)
