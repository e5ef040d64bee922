"""The table of what kernels cost on the onnxruntime CPU provider, in nanoseconds.

The numbers are fitted to micro-models that ``tests/benchmarks/costs.py`` builds and measures (run
it to refit): onnxruntime 1.32.0, all optimizations, default session options, two cores. What is
frequent was measured on two processors, an AMD EPYC (Zen 4, AVX512 with VNNI) and an Intel Xeon
(with AMX), and the geometric mean is here: the latter multiplies 1.4 times as fast, and takes 1.5
times as long at the borders (Q, DQ, changes of layout). The rest is the former's, with products
brought to the mean: float grouped convolutions over images, recurrent layers. What blocks that are
not full and tensors beyond the caches cost (``far``, ``position``) is the latter's.
Inside of models, where what they read has left the cache, borders, elementwise kernels and small
convolutions take 1.3 to 2 times as long as in micro-models; the table has what lies between.
What is compared, float against int8 on one machine, changes less than times do; without VNNI int8
gains less than the table says. ConvTranspose, DepthToSpace, Attention and RMSNormalization are the
Xeon's. Not measured but set by likeness: Gelu, Gather, Expand, Tile, Pad, ReduceMax, ReduceMin.

What the numbers say:

* A dense convolution or Gemm gains a factor of 3 to 4 of its own time, even a small one.
* A first convolution (3 or 1 input channels) loses with a 3x3 window and gains with a 7x7 one;
  a depthwise one loses: the blocked float kernel is faster.
* Grouped convolutions lose where groups have fewer than some 16 channels: integer kernels gather
  the window of each group by itself. Few output channels gain less, since they fill no block;
  so do channels that are no multiple of four, since windows are copied then.
* A ConvTranspose, which on integers is a convolution with channels for the pixels of blocks, gains
  a factor of 3 to 6, but loses where it makes fewer than some eight channels.
* Depthwise convolutions over one dimension, or with channels that are no multiple of four, gain:
  the float kernel has no blocks there. Over volumes only wide convolutions gain.
* A product of two activations gains little if both are uint8, and a factor of 3 to 10 with the
  right one as int8 (``MatMul.signed``), which it is brought to by a DQ and a Q.
* Add and Sigmoid cost about the same on both sides, so they follow their neighbours; Concat is
  dearer on integers, since each input is looked up for its new scale.
* Softmax, AveragePool, MaxPool away from convolutions, and next to them nearest Resize and the
  multiplication by one value per channel, lose.
* What follows a float convolution is nearly free: onnxruntime fuses the activation, and a
  residual Add, into it (kinds ``*.fused``). Integer kernels get only Relu and Clip for free.
"""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "CACHED",
    "DEQUANTIZE",
    "FLOAT",
    "FROM_CHANNELS_LAST",
    "INT8",
    "INT8_BESIDE_CONV",
    "QUANTIZE",
    "REORDER",
    "TO_CHANNELS_LAST",
    "UNKNOWN",
    "UPSAMPLING",
    "Coefficients",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """ns = fixed + work + min(work, serial), with work = mac * macs + window * windows + ...

    Attributes:
        fixed: ns per call.
        mac: ns per multiply-accumulate, channels rounded up to whole blocks.
        window, row: ns per output position and tap, or row, of the window that is gathered.
        gather: ns per output position, tap and group, where groups are gathered by themselves.
        tap: ns per output element and tap (pools).
        position: ns per output position of a convolution, or row that is picked, whatever its size.
        input: ns per input element.
        output: ns per output element.
        weight: ns per element of the weight, which is read once per call, or of the right factor of
            a product, which is converted.
        serial: ns of work (at the speed of both threads) that are not shared out, so cost double.
        far: ns per element read or written that a float kernel takes at least, once these are more
            than the caches hold (``CACHED``).
    """

    fixed: float = 300.0
    mac: float = 0.0
    window: float = 0.0
    row: float = 0.0
    gather: float = 0.0
    tap: float = 0.0
    position: float = 0.0
    input: float = 0.0
    output: float = 0.0
    weight: float = 0.0
    serial: float = 0.0
    far: float = 0.0


CACHED = 1 << 19  #: elements, of 4 bytes
_FAR = 0.064  # of float convolutions


def _elementwise(output: float, *, fixed: float = 300.0, far: float = 0.0) -> Coefficients:
    """Two threads from some 50,000 elements on."""
    return Coefficients(fixed=fixed, output=output, serial=7000.0, far=far)


def _serial(output: float) -> Coefficients:
    """One thread at any size."""
    return Coefficients(output=output)


def _each(coefficients: Coefficients, *kinds: str) -> dict[str, Coefficients]:
    return dict.fromkeys(kinds, coefficients)


UNKNOWN = _elementwise(0.1)  #: a kind that is not in FLOAT

_MOVEMENT = _each(
    Coefficients(), "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout"
)

#: Float kernels. ``.fused``: what a convolution gets slower by, with the operator fused into it.
#: ``.last``: on data with the channels last, between integer convolutions.
FLOAT: Mapping[str, Coefficients] = {
    "Conv.dense": Coefficients(fixed=3500, mac=0.0075, serial=1000, far=_FAR),
    "Conv.dense.plain": Coefficients(fixed=3500, mac=0.013, serial=1000, far=_FAR),
    "Conv.narrow": Coefficients(fixed=800, mac=0.0082, output=0.06, serial=10000),
    **_each(
        Coefficients(fixed=2500, mac=0.0076, output=0.043, weight=0.015, serial=500, far=_FAR),
        "Conv.pointwise",
        "Conv.pointwise.few",
    ),
    **_each(
        Coefficients(fixed=1500, mac=0.0115, output=0.04, serial=4000, far=_FAR),
        "Conv.depthwise",
        "Conv.depthwise.tap",
    ),
    "Conv.depthwise.plain": Coefficients(fixed=800, mac=0.07, output=0.3),
    "Conv.depthwise.volume": Coefficients(fixed=800, mac=0.105, output=0.3),
    "Conv.grouped": Coefficients(fixed=800, mac=0.008, serial=1000),
    "Conv.grouped.plain": Coefficients(fixed=800, mac=0.0125, serial=1000),
    **_each(Coefficients(fixed=800, mac=0.0118, serial=1000), "Conv.volume", "Conv.gathered"),
    "ConvTranspose": Coefficients(fixed=2000, mac=0.009),
    "LSTM": Coefficients(fixed=4000, mac=0.0165, row=12, output=1.9),
    "GRU": Coefficients(fixed=4000, mac=0.03),
    "RNN": Coefficients(fixed=4000, mac=0.047),
    **_each(Coefficients(fixed=300, mac=0.008, weight=0.022, serial=2000), "Gemm", "MatMul"),
    **_each(Coefficients(fixed=600, mac=0.0085, serial=2000), "MatMul.dynamic", "MatMul.signed"),
    **_each(_elementwise(0.1, fixed=800, far=0.096), "Add", "Sub", "Mul", "Sum"),
    **_each(_elementwise(0.08, fixed=800), "Add.channel", "Mul.channel"),
    **_each(_elementwise(0.058, fixed=800), "Add.scalar", "Mul.scalar"),
    **_each(_elementwise(0.14, fixed=800), "Div", "Div.scalar"),
    "Relu": _elementwise(0.058, fixed=800, far=0.032),
    "Clip": _elementwise(0.065, fixed=800, far=0.032),
    "LeakyRelu": _elementwise(0.1, fixed=800),
    "PRelu": _serial(2.0),
    "HardSigmoid": _elementwise(0.09, fixed=800),
    "HardSwish": _elementwise(0.19, fixed=1600),
    **_each(_elementwise(0.18, fixed=800), "Sigmoid", "Erf"),
    "Tanh": _elementwise(0.17, fixed=800),
    "Gelu": _elementwise(0.35, fixed=800),
    # as ``qdq.spelling`` writes them
    **_each(_elementwise(0.9, fixed=4000), "LRN", "Mish"),
    "Softmax": _elementwise(0.25, fixed=1000),
    "LayerNormalization": _elementwise(0.45, fixed=1000),
    "RMSNormalization": _elementwise(0.3, fixed=1000),
    "Attention": Coefficients(fixed=6000, mac=0.0065, output=0.8),
    **_each(Coefficients(input=0.045, serial=3000), "ReduceMean", "ReduceMax", "ReduceMin"),
    "Where": _serial(2.0),  # of masks in stripes; of random ones three times as much
    "Concat": _elementwise(0.08, fixed=800, far=0.096),
    "ReduceSum": Coefficients(input=0.6),
    "InstanceNormalization": _elementwise(0.4),
    "Split": _elementwise(0.075, fixed=800),
    **_each(_elementwise(0.05), "Slice", "Gather", "Gather.table", "Expand", "Tile"),
    "Pad": _elementwise(0.06),
    **_each(Coefficients(output=0.15, far=0.12), "Transpose", "Transpose.runs"),
    "DepthToSpace": _serial(1.25),
    "Resize": _elementwise(0.09),
    "Resize.last": _serial(0.6),
    **_each(Coefficients(tap=0.013, input=0.037), "MaxPool", "AveragePool"),
    "GlobalAveragePool": Coefficients(input=0.049),
    "LeakyRelu.fused": Coefficients(fixed=0, output=0.075),
    "HardSigmoid.fused": Coefficients(fixed=0, output=0.07),
    "HardSwish.fused": Coefficients(fixed=0, output=0.08),
    "Sigmoid.fused": Coefficients(fixed=0, output=0.14),
} | _MOVEMENT

#: Integer kernels; a kind that is not here has none.
INT8: Mapping[str, Coefficients] = {
    **_each(
        Coefficients(fixed=2200, mac=0.0019, window=0.43, output=0.045, weight=0.019, serial=2000),
        "Conv.dense",
        "Conv.dense.plain",
    ),
    "Conv.narrow": Coefficients(fixed=800, mac=0.0022, row=4.0, output=0.09, serial=2000),
    "Conv.pointwise": Coefficients(fixed=2200, mac=0.0019, output=0.07, weight=0.025, serial=1000),
    "Conv.pointwise.few": Coefficients(
        fixed=2200, mac=0.0019, output=0.27, weight=0.025, position=3.0, serial=1000
    ),
    **_each(
        Coefficients(fixed=1500, mac=0.0165, window=0.46, output=0.024, serial=8000),
        "Conv.depthwise",
        "Conv.depthwise.plain",
    ),
    "Conv.depthwise.tap": Coefficients(
        fixed=1500, mac=0.0165, output=0.024, position=3.3, serial=8000
    ),
    "Conv.depthwise.volume": Coefficients(
        fixed=1200, mac=0.0142, window=3.4, output=0.02, serial=8000
    ),
    **_each(
        Coefficients(fixed=800, mac=0.0019, gather=1.8, output=0.1, weight=0.02, serial=2000),
        "Conv.grouped",
        "Conv.grouped.plain",
    ),
    "Conv.volume": Coefficients(
        fixed=800, mac=0.0019, window=3.0, output=0.012, weight=0.02, serial=2000
    ),
    "Conv.gathered": Coefficients(
        fixed=800, mac=0.0019, gather=7.1, output=0.012, weight=0.02, serial=2000
    ),
    "Gemm": Coefficients(fixed=1100, mac=0.0019, output=0.125, weight=0.01, serial=2000),
    "MatMul": Coefficients(fixed=900, mac=0.0018, output=0.09, weight=0.01, serial=2000),
    "MatMul.dynamic": Coefficients(fixed=1700, mac=0.0042, input=0.08, output=0.26, serial=2000),
    "MatMul.signed": Coefficients(
        fixed=4500, mac=0.0016, input=0.05, output=0.18, weight=0.25, serial=2000
    ),
    "Add": _elementwise(0.1, fixed=1000),
    "Mul": _elementwise(0.155, fixed=1000),
    "Add.channel": _serial(0.15),
    "Mul.channel": _serial(0.29),
    "Add.scalar": _elementwise(0.065, fixed=1000),
    "Mul.scalar": _elementwise(0.135, fixed=1000),
    "LeakyRelu": _elementwise(0.16, fixed=1000),
    "Sigmoid": _elementwise(0.16, fixed=1000),
    "Softmax": Coefficients(output=1.35, serial=70000),
    "Where": _serial(4.0),
    "Split": _serial(0.045),
    **_each(_serial(0.03), "Gather", "Expand", "Tile"),
    # the float one, three nodes more, and for each row its scale, where no cache expects it
    "Gather.table": Coefficients(fixed=1100, position=50, output=0.05, serial=7000),
    "Concat": _serial(0.25),  # inputs with scales of their own, as nearly all, are looked up
    "Slice": _serial(0.05),
    "Transpose": _serial(0.12),
    "Transpose.runs": _serial(4.0),  # 5 to 35 ns for each 2 or 4 codes that stay together
    "DepthToSpace": _serial(0.9),
    "Resize": _serial(0.09),
    "MaxPool": Coefficients(tap=0.8),
    "AveragePool": Coefficients(tap=1.0),
    "GlobalAveragePool": Coefficients(input=0.047),
    "LSTM": Coefficients(fixed=8000, mac=0.0055, row=10.5, output=3.6),
    **_each(_serial(0.1), "ReduceMax", "ReduceMin"),
} | _MOVEMENT

INT8_BESIDE_CONV: Mapping[str, Coefficients] = {
    "Add.channel": _serial(0.33),
    "Mul.channel": _serial(0.37),
    "Slice": _serial(0.15),
    "Resize": _serial(0.85),
    "MaxPool": Coefficients(tap=0.025, input=0.03),
    "AveragePool": Coefficients(tap=0.57, serial=30000),
}

UPSAMPLING = Coefficients(fixed=3000, output=0.11)  #: movements behind an integer ConvTranspose
QUANTIZE = Coefficients(fixed=900, output=0.11, serial=4500)
DEQUANTIZE = Coefficients(fixed=700, output=0.2)
TO_CHANNELS_LAST = Coefficients(fixed=1000, output=0.13)
FROM_CHANNELS_LAST = Coefficients(fixed=1000, output=0.09)
REORDER = Coefficients(fixed=1000, output=0.14, far=0.11)
