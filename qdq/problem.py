"""The records between plan and solve: what has to be solved, without any graph. Numpy only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qdq.ranges import TensorRange
from qdq.spec import QuantParams, QuantSpec

__all__ = [
    "Constant",
    "Derived",
    "Fixed",
    "Given",
    "Linear",
    "Moments",
    "Observed",
    "Problem",
    "Shared",
    "Source",
    "TensorPlan",
]


@dataclass(frozen=True, slots=True)
class Observed:
    """The range comes from calibration."""


@dataclass(frozen=True, slots=True)
class Constant:
    """The range comes from the tensor's own values (a weight or another constant)."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """The range is known by mathematics (Sigmoid: 0..1) or was set by the user's rule."""

    low: float
    high: float

    @property
    def range(self) -> TensorRange:
        """The range, shape ()."""
        return TensorRange(np.asarray(self.low, np.float32), np.asarray(self.high, np.float32))


@dataclass(frozen=True, slots=True)
class Given:
    """Scale and zero point were set by the user; no step may change them."""

    params: QuantParams


@dataclass(frozen=True, slots=True)
class Shared:
    """The tensor has the parameters of its owner, whatever they become.

    The owner is never Shared itself. A Shared tensor that is also calibrated (it appears in
    ``Problem.ranges``) widens the owner's range: the owner's range is the union over the class.
    """

    owner: str


@dataclass(frozen=True, slots=True)
class Derived:
    """A bias: int32, scale = input scale * weight scale, zero point 0. ``linear``: node name."""

    linear: str


Source = Observed | Constant | Fixed | Given | Shared | Derived


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """One tensor that gets quantization parameters: its name, the wish, and where from."""

    name: str
    spec: QuantSpec
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One node that accumulates products of codes in int32, as the solver sees it.

    Attributes:
        node: the node's name.
        input: the activation tensor (its params may be Shared: look up the owner).
        weight: the weight constant. Several nodes may name the same one.
        bias: the bias constant, or None.
        kind: how the weight's axes map to output channels.

            * ``"conv"``: weight (M, C/groups, *kernel); channel i is row i of axis 0.
            * ``"conv_transpose"``: weight (C, M/groups, *kernel); group g owns rows
              g*C/groups..; output channel g*M/groups + j is column j of group g. A per-channel
              scale has M/groups entries (axis 1), shared by the groups.
            * ``"matmul"``: weight (..., K, N); channel i is column i of the last axis.
        groups: number of groups; 1 for matmul.
        output: the tensor that receives the quantized result (after a fused Relu or Clip), if it
            is planned; its scale tells how small an error can still be seen. None: not known.
    """

    node: str
    input: str
    weight: str
    bias: str | None
    kind: Literal["conv", "conv_transpose", "matmul"]
    groups: int = 1
    output: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """First and second moments of what a linear node multiplies with its weights.

    A term is an input channel (and, of a convolution, a tap of the kernel; taps of a channel are
    neighbours). Terms lie in blocks: each group is split into the same number of runs of B
    terms, the last one filled up with zeros. Products of terms in different blocks are not known.

    Attributes:
        second: float64 (blocks, B, B), ``E[x x']`` of each block, symmetric.
        mean: float64 (blocks, B), ``E[x]``.
        count: number of positions that were looked at.
    """

    second: NDArray[np.float64]
    mean: NDArray[np.float64]
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """All that the solver may know.

    Attributes:
        tensors: every tensor that must have parameters at the end, by name.
        linears: every linear node that will run on integers, in graph order.
        ranges: calibrated ranges by tensor name (Observed tensors and calibrated Shared ones).
        constants: values of the Constant and Derived tensors by name (float32 or float16). They
            may be read when they are asked for: do not hold on to many of a large model.
        means: calibrated mean per input channel, (K,), of the inputs of linear nodes, where a
            step asked for them.
        moments: second moments of the inputs of linear nodes by node name, where a step asked
            for them.
    """

    tensors: Mapping[str, TensorPlan]
    linears: tuple[Linear, ...] = ()
    ranges: Mapping[str, TensorRange]
    constants: Mapping[str, NDArray[np.floating]]
    means: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    moments: Mapping[str, Moments] = field(default_factory=dict)
