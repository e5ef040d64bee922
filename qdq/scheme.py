"""What the user wishes: types, granularity, what stays float, per-tensor overrides."""

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from qdq.checks import is_flag, want
from qdq.errors import ConfigError
from qdq.spec import INT8, UINT8, IntType, QuantSpec

__all__ = ["Rule", "Scheme", "changes"]

_FLAG = "True or False"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One exception to the scheme: which nodes or tensors, and what is different there.

    Name patterns are regular expressions that must match the whole name. Give either
    ``nodes`` and/or ``op_types`` (a rule about nodes), or ``tensors`` (a rule about tensors).
    A rule that matches nothing in the model is an error. Later rules win over earlier ones.

    Attributes:
        nodes: pattern on node names.
        op_types: operator types, as ("Conv", "Gemm") or a list of them; kept as a tuple.
        tensors: pattern on tensor names (activations, weights).
        keep_float: leave the matched nodes float, or every node that would read or write the
            matched tensors as integers.
        only: leave float every node that no rule with ``only`` matches. A Relu or Clip goes with
            the node before it.
        dtype: integer type of the matched tensors.
        symmetric: symmetric range for the matched tensors.
        per_channel: one scale per output channel (True) or per tensor (False), for weights.
        range: (low, high) in real units, in place of the calibrated or own range; kept as a tuple.
        scale: fixed scale, one value or one per channel; wants ``zero_point`` too.
        zero_point: fixed zero point, same shape as scale; whole numbers.

    Raises:
        ConfigError: a value of the wrong kind, one that float32 cannot hold, or values that
            contradict each other.
    """

    nodes: str | None = None
    op_types: Sequence[str] = ()
    tensors: str | None = None
    keep_float: bool = False
    only: bool = False
    dtype: IntType | None = None
    symmetric: bool | None = None
    per_channel: bool | None = None
    range: Sequence[float] | None = None
    scale: float | Sequence[float] | None = None
    zero_point: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        own = self.op_types
        types = sorted(own) if isinstance(own, Set) else own  # sets have no order of their own
        object.__setattr__(self, "op_types", _listed(types))
        _check_kinds(self)
        if self.range is not None:
            object.__setattr__(self, "range", tuple(self.range))
        self._check_sense()

    def _check_sense(self) -> None:
        about_nodes = self.nodes is not None or bool(self.op_types)
        if about_nodes == (self.tensors is not None):
            raise ConfigError(
                f"a Rule wants either nodes/op_types or tensors, not both and not neither: {self}"
            )
        if about_nodes and changes(self):
            raise ConfigError(
                "a Rule about nodes can only leave nodes float (keep_float, only); to set a type, "
                f"range or scale name the tensor with Rule(tensors=...): {self}"
            )
        if self.only and (self.keep_float or not about_nodes):
            raise ConfigError(f"only=True is about nodes, and without keep_float: {self}")
        if not (self.keep_float or self.only or changes(self)):
            raise ConfigError(
                f"this Rule changes nothing; set keep_float, only, dtype, ...: {self}"
            )
        if (self.scale is None) != (self.zero_point is None):
            raise ConfigError(f"scale and zero_point go together; give both or neither: {self}")
        if self.scale is not None and self.range is not None:
            raise ConfigError(f"give scale or range, not both: {self}")
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ConfigError(f"range wants low < high; found {self.range}")


def changes(rule: Rule) -> bool:
    """Whether a rule sets or changes the parameters of tensors."""
    effects = (rule.dtype, rule.symmetric, rule.per_channel, rule.range, rule.scale)
    return any(e is not None for e in effects)


def _check_kinds(rule: Rule) -> None:
    """Refuse values of the wrong kind, and numbers that float32 cannot hold."""
    for option, kind, wanted in (
        ("nodes", str, "a regular expression, as text"),
        ("tensors", str, "a regular expression, as text"),
        ("dtype", IntType, "an integer type, as qdq.INT8"),
    ):
        value = getattr(rule, option)
        want(option, value, value is None or isinstance(value, kind), wanted)
    for option in ("keep_float", "only", "symmetric", "per_channel"):
        flag = getattr(rule, option)
        open_ = flag is None and option in ("symmetric", "per_channel")
        want(option, flag, open_ or is_flag(flag), _FLAG)
    types = rule.op_types
    want("op_types", types, _is_sequence(types, str), 'a sequence of operator types, as ("Conv",)')
    if rule.range is not None:
        pair = _holds(rule.range) and np.shape(rule.range) == (2,)
        want("range", rule.range, pair, "two numbers, (low, high), that float32 can hold")
    if rule.scale is not None:
        scale = _holds(rule.scale) and np.ndim(rule.scale) < 2
        want("scale", rule.scale, scale, "one number or one per channel, that float32 can hold")
    if rule.zero_point is not None:
        zero = _kind(rule.zero_point) in "iu" and np.ndim(rule.zero_point) < 2
        want("zero_point", rule.zero_point, zero, "one whole number or one per channel")


def _listed(values: Any) -> Any:
    """A tuple of what can be gone through in an order; all else as it is."""
    if isinstance(values, str | bytes | Set) or not isinstance(values, Iterable):
        return values
    return tuple(values)


def _is_sequence(value: object, kind: type) -> bool:
    listed = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return listed and all(isinstance(v, kind) for v in value)  # type: ignore[attr-defined]


def _kind(value: object) -> str:
    """Numpy's letter for the kind of numbers; "O" for what is no array of numbers."""
    try:
        return np.asarray(value).dtype.kind
    except ValueError:  # lists of unequal lengths
        return "O"


def _holds(value: object) -> bool:
    """Whether these are numbers within float32's range; what is not finite is for later."""
    if _kind(value) not in "iuf":
        return False
    numbers = np.asarray(value, np.float64)
    return not (np.isfinite(numbers) & (np.abs(numbers) > np.finfo(np.float32).max)).any()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """The user's wish for the whole model.

    Attributes:
        activation: spec of activations. Default: uint8, asymmetric, per tensor.
        weight: spec of weights; its axis is set by each operator. Default: int8, symmetric.
        per_channel: one weight scale per output channel where the target fuses that.
        smooth: move outlier channels of a matrix product's input into its weights
            where that lessens the expected error (``qdq.balancing.smoothing``).
        equalize: let quiet channels between two layers grow where that lessens the expected
            error (``qdq.balancing.equalizing``).
        rules: exceptions, in a tuple or list; later rules win. Kept as a tuple.

    Raises:
        ConfigError: a value of the wrong kind.
    """

    activation: QuantSpec = QuantSpec(dtype=UINT8)
    weight: QuantSpec = QuantSpec(dtype=INT8, symmetric=True)
    per_channel: bool = True
    smooth: bool = True
    equalize: bool = True
    rules: Sequence[Rule] = ()

    def __post_init__(self) -> None:
        for option in ("per_channel", "smooth", "equalize"):
            want(option, getattr(self, option), is_flag(getattr(self, option)), _FLAG)
        for option in ("activation", "weight"):
            spec = getattr(self, option)
            want(option, spec, isinstance(spec, QuantSpec), "a qdq.QuantSpec")
        object.__setattr__(self, "rules", _listed(self.rules))
        want("rules", self.rules, _is_sequence(self.rules, Rule), "a sequence of qdq.Rule")
        if self.activation.axis is not None or self.weight.axis is not None:
            raise ConfigError("a scheme's specs have axis=None: per_channel decides the weights'")
