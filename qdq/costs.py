"""What kernels cost in float and in int8 on the onnxruntime CPU provider, in nanoseconds.

A cost is linear in a few counts of the node: a fixed part, and ns per multiply-accumulate, per
element and so on. The numbers are a table, fitted to micro-models that
``tests/benchmarks/costs.py`` builds and measures (run it to refit): onnxruntime 1.32.0, all
optimizations, default session options, on two cores of an AMD EPYC (Zen 4, AVX512 with VNNI).
Absolute times are those of that machine. What is compared, float against int8 on one machine,
changes less; without VNNI int8 gains less than the table says. Not measured but set by likeness:
ConvTranspose, Gelu, Gather, Expand, Tile, Pad, DepthToSpace, ReduceMax, ReduceMin; grouped
convolutions count as dense.

What the numbers say:

* A dense convolution or Gemm gains a factor of 3 to 4 of its own time, even a small one.
* A first convolution (3 or 1 input channels) loses with a 3x3 window and gains with a 7x7 one;
  a depthwise one loses: the blocked float kernel is faster.
* Add, Sigmoid and Concat cost about the same on both sides, so they follow their neighbours.
* Softmax, AveragePool, MaxPool away from convolutions, and next to them nearest Resize and the
  multiplication by one value per channel, lose.
* What follows a float convolution is nearly free: onnxruntime fuses the activation, and a
  residual Add, into it (kinds ``*.fused``). Integer kernels get only Relu and Clip for free.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "FLOAT",
    "INT8",
    "UNKNOWN",
    "Coefficients",
    "Features",
    "conv_kind",
    "dequantize_cost",
    "float_cost",
    "int8_cost",
    "quantize_cost",
    "reorder_cost",
]

_BLOCK = 16  # channels that the convolution kernels work on at once
_RAGGED = 2.0  # integer depthwise kernels are this much slower where blocks are not full
_PLAIN = 4  # input channels up to which a convolution is taken to be a model's first


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """The counts of a node that its cost depends on; the batch is part of the element counts.

    Attributes:
        inputs: elements of the activation input (of the largest one, if several).
        outputs: elements of the output (of all of them together: Split).
        channels_in: channels of a convolution's input; K of a Gemm or MatMul.
        channels_out: channels of a convolution's output; N of a Gemm or MatMul.
        taps: elements of the kernel window of a convolution or pool (3x3: 9).
        rows: rows of that window (3x3: 3; 1-D: 1), which are gathered as one piece each.
        groups: groups of a convolution.
        weights: elements of the constant weight; 0 if there is none.
        beside_conv: a neighbour is a convolution, so the data has the convolutions' layout
            (channels last in int8). Elementwise and movement kernels differ there.
    """

    inputs: int
    outputs: int
    channels_in: int = 1
    channels_out: int = 1
    taps: int = 1
    rows: int = 1
    groups: int = 1
    weights: int = 0
    beside_conv: bool = False

    @property
    def macs(self) -> int:
        """Multiply-accumulates: output elements * channels_in / groups * taps."""
        return self.outputs * (self.channels_in // self.groups) * self.taps


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """ns = fixed + work + min(work, serial), with work = mac * macs + window * windows + ...

    Attributes:
        fixed: ns per call.
        mac: ns per multiply-accumulate, channels rounded up to whole blocks.
        window, row: ns per output position and tap, or row, of the window that is gathered.
        tap: ns per output element and tap (pools).
        input: ns per input element.
        output: ns per output element.
        weight: ns per element of the weight, which is read once per call.
        serial: ns of work (at the speed of both threads) that are not shared out, so cost double.
    """

    fixed: float = 300.0
    mac: float = 0.0
    window: float = 0.0
    row: float = 0.0
    tap: float = 0.0
    input: float = 0.0
    output: float = 0.0
    weight: float = 0.0
    serial: float = 0.0


def _elementwise(output: float, *, fixed: float = 300.0) -> Coefficients:
    """Two threads from some 50,000 elements on."""
    return Coefficients(fixed=fixed, output=output, serial=7000.0)


def _serial(output: float) -> Coefficients:
    """One thread at any size."""
    return Coefficients(output=output)


def _each(coefficients: Coefficients, *kinds: str) -> dict[str, Coefficients]:
    return dict.fromkeys(kinds, coefficients)


_FREE = Coefficients(fixed=0.0)
UNKNOWN = _elementwise(0.1)  #: a kind that is not in FLOAT

_MOVEMENT = _each(
    Coefficients(), "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout"
)

#: Float kernels. ``.fused``: what a convolution gets slower by, with the operator fused into it.
FLOAT: Mapping[str, Coefficients] = {
    **_each(Coefficients(fixed=800, mac=0.0089, serial=1000), "Conv.dense", "Conv.narrow"),
    "Conv.pointwise": Coefficients(fixed=800, mac=0.0090, weight=0.017, serial=500),
    "Conv.depthwise": Coefficients(fixed=800, mac=0.0090, output=0.03, serial=4000),
    "ConvTranspose": Coefficients(fixed=2000, mac=0.012, output=0.2),
    **_each(Coefficients(fixed=300, mac=0.0092, weight=0.025, serial=2000), "Gemm", "MatMul"),
    "MatMul.dynamic": Coefficients(fixed=600, mac=0.0095, serial=2000),
    **_each(_elementwise(0.079), "Add", "Sub", "Mul"),
    **_each(_elementwise(0.055), "Add.channel", "Mul.channel"),
    **_each(_elementwise(0.045), "Add.scalar", "Mul.scalar"),
    **_each(_elementwise(0.11), "Div", "Div.scalar"),
    "Relu": _elementwise(0.045),
    "Clip": _elementwise(0.05),
    "LeakyRelu": _elementwise(0.08),
    "HardSigmoid": _elementwise(0.075),
    "HardSwish": _elementwise(0.15, fixed=600),
    **_each(_elementwise(0.14), "Sigmoid", "Silu", "Silu.fused", "Erf"),
    "Tanh": _elementwise(0.135),
    "Gelu": _elementwise(0.2),
    "Softmax": _elementwise(0.12, fixed=1000),
    "LayerNormalization": _elementwise(0.14, fixed=1000),
    **_each(Coefficients(input=0.045, serial=3000), "ReduceMean", "ReduceMax", "ReduceMin"),
    "Where": _serial(1.2),
    "Concat": _elementwise(0.054),
    "Split": _elementwise(0.055),
    **_each(_elementwise(0.05), "Slice", "Gather", "Expand", "Tile"),
    "Pad": _elementwise(0.06),
    "Transpose": _serial(0.15),
    "DepthToSpace": _serial(0.2),
    "Resize": _elementwise(0.09),
    **_each(Coefficients(tap=0.01, input=0.03), "MaxPool", "AveragePool"),
    "GlobalAveragePool": Coefficients(input=0.035),
    "Relu.fused": _FREE,
    "Clip.fused": Coefficients(fixed=0, output=0.05),
    "LeakyRelu.fused": Coefficients(fixed=0, output=0.075),
    "HardSigmoid.fused": Coefficients(fixed=0, output=0.07),
    "HardSwish.fused": Coefficients(fixed=0, output=0.08),
    "Sigmoid.fused": Coefficients(fixed=0, output=0.14),
    "Add.fused": Coefficients(fixed=0, output=0.09),
} | _MOVEMENT

#: Integer kernels; a kind that is not here has none. ``.float``: float output, no Q behind.
INT8: Mapping[str, Coefficients] = {
    "Conv.dense": Coefficients(
        fixed=800, mac=0.0022, window=0.49, output=0.012, weight=0.02, serial=2000
    ),
    "Conv.narrow": Coefficients(fixed=800, mac=0.0022, row=3.6, output=0.012, serial=2000),
    "Conv.pointwise": Coefficients(fixed=500, mac=0.0021, output=0.065, weight=0.025, serial=1000),
    "Conv.depthwise": Coefficients(fixed=1200, mac=0.0142, window=0.4, output=0.02, serial=8000),
    "Gemm": Coefficients(fixed=900, mac=0.0024, output=0.13, weight=0.01, serial=2000),
    "Gemm.float": Coefficients(fixed=900, mac=0.0024, output=0.09, weight=0.01, serial=2000),
    "MatMul": Coefficients(fixed=700, mac=0.0024, output=0.1, weight=0.01, serial=2000),
    "MatMul.float": Coefficients(fixed=700, mac=0.0024, output=0.07, weight=0.01, serial=2000),
    "MatMul.dynamic": Coefficients(fixed=1500, mac=0.0025, input=0.1, output=0.23, serial=2000),
    "MatMul.dynamic.float": Coefficients(
        fixed=1500, mac=0.0025, input=0.1, output=0.17, serial=2000
    ),
    "Add": _elementwise(0.075, fixed=350),
    "Mul": _elementwise(0.115, fixed=350),
    "Add.channel": _serial(0.1),
    "Mul.channel": _serial(0.19),
    "Add.scalar": _elementwise(0.047, fixed=350),
    "Mul.scalar": _elementwise(0.1, fixed=350),
    "LeakyRelu": _elementwise(0.12),
    "Sigmoid": _elementwise(0.12),
    "Silu": _elementwise(0.235, fixed=650),
    "Softmax": Coefficients(output=1.35, serial=70000),
    "Where": _serial(1.1),
    **_each(_serial(0.03), "Concat", "Split", "Gather", "Expand", "Tile"),
    "Slice": _serial(0.05),
    "Transpose": _serial(0.12),
    "DepthToSpace": _serial(0.15),
    "Resize": _serial(0.09),
    "MaxPool": Coefficients(tap=0.8),
    "AveragePool": Coefficients(tap=1.0),
    "GlobalAveragePool": Coefficients(input=0.04),
    **_each(_serial(0.1), "ReduceMax", "ReduceMin"),
    **_each(_FREE, "Relu.fused", "Clip.fused"),
} | _MOVEMENT

_INT8_BESIDE_CONV: Mapping[str, Coefficients] = {
    "Add.channel": _serial(0.33),
    "Mul.channel": _serial(0.37),
    "Slice": _serial(0.15),
    "Resize": _serial(0.85),
    "MaxPool": Coefficients(tap=0.025, input=0.03),
    "AveragePool": Coefficients(tap=0.57, serial=30000),
}

_QUANTIZE = _elementwise(0.063)
_DEQUANTIZE = _serial(0.105)
_TO_CHANNELS_LAST = _serial(0.15)
_FROM_CHANNELS_LAST = _serial(0.075)
_REORDER = _serial(0.09)


def conv_kind(*, channels_in: int, groups: int, taps: int) -> str:
    """The kind of a Conv: ``Conv.depthwise``, ``.pointwise``, ``.narrow`` or ``.dense``.

    Narrow (fewer than 16 channels): the integer kernel gathers windows row by row, so that a 3x3
    stem is faster in float and a 7x7 one on integers.
    """
    if groups > 1 and groups == channels_in:
        return "Conv.depthwise"
    if taps == 1 and groups == 1:
        return "Conv.pointwise"
    return "Conv.narrow" if channels_in // groups < _BLOCK else "Conv.dense"


def float_cost(kind: str, features: Features) -> float:
    """Cost of the float kernel, in ns.

    Args:
        kind: the operator type, with a suffix where the tables have one: see ``conv_kind``;
            ``MatMul.dynamic`` has two activations; Add and Mul have ``.channel`` (one operand is
            (N, C, 1, 1)) and ``.scalar``; ``Silu`` is x * Sigmoid(x); ``.fused`` follows a Conv.
        features: the node's counts.

    Returns:
        The cost; that of ``UNKNOWN`` for a kind that the table does not have.
    """
    base = kind.partition(".")[0]
    found = FLOAT.get(kind) or FLOAT.get(kind.removesuffix(".float")) or FLOAT.get(base, UNKNOWN)
    # Blocked float convolutions work on whole blocks of input channels, too, but the first
    # convolution of a model reads its few channels as they are.
    blocked = base == "Conv" and features.groups == 1 and features.channels_in > _PLAIN
    padding = _padding(features.channels_in) if blocked else 1.0
    return _evaluate(found, features, macs=_macs(features) * padding)


def int8_cost(kind: str, features: Features) -> float:
    """Cost of the integer kernel, in ns; infinity where there is none.

    Args:
        kind: as in ``float_cost``; the suffix ``.float`` on Gemm, MatMul and MatMul.dynamic is
            the kernel with float output. ``Relu`` and ``Clip`` have none but
            behind an integer kernel, where they are free (``.fused``).
        features: the node's counts.
    """
    found = _INT8_BESIDE_CONV.get(kind) if features.beside_conv else None
    found = found or INT8.get(kind) or INT8.get(kind.removesuffix(".fused"))
    if found is None:
        return math.inf
    ragged = kind == "Conv.depthwise" and features.channels_in % _BLOCK != 0
    return _evaluate(found, features, macs=_macs(features) * (_RAGGED if ragged else 1.0))


def quantize_cost(elements: int, *, float_conv: bool = False, int8_conv: bool = False) -> float:
    """Cost of a QuantizeLinear and of the changes of layout at that border, in ns.

    Args:
        elements: elements of the tensor.
        float_conv: the float side has the blocked layout of convolutions, which has to be undone.
        int8_conv: the integer side has the channels last.
    """
    return (
        _per_element(_QUANTIZE, elements)
        + (reorder_cost(elements) if float_conv else 0.0)
        + (_per_element(_TO_CHANNELS_LAST, elements) if int8_conv else 0.0)
    )


def dequantize_cost(elements: int, *, float_conv: bool = False, int8_conv: bool = False) -> float:
    """Cost of a DequantizeLinear, in ns: see quantize_cost."""
    return (
        _per_element(_DEQUANTIZE, elements)
        + (reorder_cost(elements) if float_conv else 0.0)
        + (_per_element(_FROM_CHANNELS_LAST, elements) if int8_conv else 0.0)
    )


def reorder_cost(elements: int) -> float:
    """Cost in ns to bring a float tensor into the convolutions' blocked layout, or back.

    Float kernels that need the plain layout (Split, Slice, …) pay it for each edge to a float Conv.
    """
    return _per_element(_REORDER, elements)


def _per_element(c: Coefficients, elements: int) -> float:
    return _evaluate(c, Features(inputs=elements, outputs=elements), macs=0.0)


def _evaluate(c: Coefficients, f: Features, *, macs: float) -> float:
    work = (
        c.mac * macs
        + (c.window * f.taps + c.row * f.rows) * f.outputs / f.channels_out
        + c.tap * f.outputs * f.taps
        + c.input * f.inputs
        + c.output * f.outputs
        + c.weight * f.weights
    )
    return c.fixed + work + min(work, c.serial)


def _macs(f: Features) -> float:
    """Multiply-accumulates of kernels that work on whole blocks of output channels."""
    return f.macs * (_padding(f.channels_out) if f.groups == 1 else 1.0)


def _padding(channels: int) -> float:
    """Channels rounded up to whole blocks, over channels."""
    return -(-channels // _BLOCK) * _BLOCK / channels
