"""What the user wishes: types, granularity, what stays float, per-tensor overrides."""

from collections.abc import Sequence
from dataclasses import dataclass

from qdq.errors import ConfigError
from qdq.spec import INT8, UINT8, IntType, QuantSpec

__all__ = ["Rule", "Scheme"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One exception to the scheme: which nodes or tensors, and what is different there.

    Name patterns are regular expressions that must match the whole name. Give either
    ``nodes`` and/or ``op_types`` (a rule about nodes), or ``tensors`` (a rule about tensors).
    A rule that matches nothing in the model is an error. Later rules win over earlier ones.

    Attributes:
        nodes: pattern on node names.
        op_types: operator types, as ("Conv", "Gemm").
        tensors: pattern on tensor names (activations, weights).
        keep_float: leave the matched nodes float, or every node that would read or write the
            matched tensors as integers.
        only: leave float every node that no rule with ``only`` matches. A Relu or Clip goes with
            the node before it.
        dtype: integer type of the matched tensors.
        symmetric: symmetric range for the matched tensors.
        per_channel: one scale per output channel (True) or per tensor (False), for weights.
        range: (low, high) in real units, in place of the calibrated or own range.
        scale: fixed scale, one value or one per channel; wants ``zero_point`` too.
        zero_point: fixed zero point, same shape as scale.
    """

    nodes: str | None = None
    op_types: tuple[str, ...] = ()
    tensors: str | None = None
    keep_float: bool = False
    only: bool = False
    dtype: IntType | None = None
    symmetric: bool | None = None
    per_channel: bool | None = None
    range: tuple[float, float] | None = None
    scale: float | Sequence[float] | None = None
    zero_point: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        about_nodes = self.nodes is not None or bool(self.op_types)
        if about_nodes == (self.tensors is not None):
            raise ConfigError(
                f"a Rule wants either nodes/op_types or tensors, not both and not neither: {self}"
            )
        effects = (self.dtype, self.symmetric, self.per_channel, self.range, self.scale)
        if about_nodes and any(e is not None for e in effects):
            raise ConfigError(
                "a Rule about nodes can only keep_float; to set a type, range or scale name the "
                f"tensor with Rule(tensors=...): {self}"
            )
        if self.only and (self.keep_float or not about_nodes):
            raise ConfigError(f"only=True is about nodes, and without keep_float: {self}")
        if not (self.keep_float or self.only) and all(e is None for e in effects):
            raise ConfigError(
                f"this Rule changes nothing; set keep_float, only, dtype, ...: {self}"
            )
        if (self.scale is None) != (self.zero_point is None):
            raise ConfigError(f"scale and zero_point go together; give both or neither: {self}")
        if self.scale is not None and self.range is not None:
            raise ConfigError(f"give scale or range, not both: {self}")
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ConfigError(f"range wants low < high; found {self.range}")


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
        rules: exceptions; later rules win.
    """

    activation: QuantSpec = QuantSpec(dtype=UINT8)
    weight: QuantSpec = QuantSpec(dtype=INT8, symmetric=True)
    per_channel: bool = True
    smooth: bool = True
    equalize: bool = True
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        for option, value in (("smooth", self.smooth), ("equalize", self.equalize)):
            if not isinstance(value, bool):
                raise ConfigError(f"{option}={value!r}: wants True or False")
        if self.activation.axis is not None or self.weight.axis is not None:
            raise ConfigError("a scheme's specs have axis=None: per_channel decides the weights'")
