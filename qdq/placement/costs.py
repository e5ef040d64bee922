"""What kernels cost in float and in int8 on the onnxruntime CPU provider, in nanoseconds.

A cost is linear in a few counts of the node: a fixed part, and ns per multiply-accumulate, per
element and so on (``qdq.placement.cost_table``).
"""

import math
from dataclasses import dataclass, replace

from qdq.facts import BLOCK
from qdq.placement.cost_table import (
    CACHED,
    DEQUANTIZE,
    FLOAT,
    FROM_CHANNELS_LAST,
    INT8,
    INT8_BESIDE_CONV,
    QUANTIZE,
    REORDER,
    TO_CHANNELS_LAST,
    UNKNOWN,
    UPSAMPLING,
    Coefficients,
)

__all__ = [
    "RAGGED",
    "RECURRENT",
    "SLOW_RUNS",
    "Features",
    "conv_kind",
    "dequantize_cost",
    "float_cost",
    "in_blocks",
    "int8_cost",
    "quantize_cost",
    "reorder_cost",
    "signed_pays",
]

RECURRENT = frozenset({"GRU", "LSTM", "RNN"})
SLOW_RUNS = frozenset({2, 4})  # codes that a Transpose keeps side by side, and moves slowly
RAGGED = 2.3  # integer depthwise kernels are this much slower where blocks are not full
_FEW = 2.5  # and others per multiplication where not one block of outputs is full
# The fast integer convolutions read windows where they lie. They want at least a block of outputs,
# and channels in fours; for others each window is copied, ns per value.
_LANES = 4
_COPIED = 0.055
_COLUMN = 0.5  # ns for what a float ConvTranspose makes of an input and a tap, and adds up
_RUN, _SLOW_RUN = 0.6, 7.0  # ns for each piece of rows that an integer one moves
_LONG = 640  # columns of a result of which rows that end within a block are slow
_UNBLOCKED = frozenset({"Conv.dense.plain", "Conv.gathered", "Conv.volume"})
_BLOCKED_DEPTHWISE = frozenset({"Conv.depthwise", "Conv.depthwise.tap"})
_UNPACKED = 4.5  # float pointwise ones with less than one block of inputs, per multiplication
_SHORT = 1.3  # and those with a window of three columns at most
# Dense ones sum up several positions of a row, and up to four blocks of outputs, at a time; over
# images of one column, with few blocks, there are too few sums to fill the processor.
_FLAT = {1: 2.9, 2: 1.9, 3: 1.6, 4: 1.3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """The counts of a node that its cost depends on; the batch is part of the element counts.

    Attributes:
        inputs: elements of the activation input (of the largest one, if several).
        outputs: elements of the output (of all of them together: Split).
        channels_in: channels of a convolution's input; K of a Gemm or MatMul.
        channels_out: channels of a convolution's output; N of a Gemm or MatMul; values of a row
            that a Gather picks.
        taps: elements of the kernel window of a convolution or pool (3x3: 9). Channels and taps
            of a ConvTranspose are those of the convolution that it is on integers.
        rows: rows of that window (3x3: 3; 1-D: 1), which are gathered as one piece each; values
            that an LSTM carries to the next step, which take some time whatever the batch; values
            that stay side by side behind a ConvTranspose (``qdq.subpixel``).
        groups: groups of a convolution.
        flat: its output has two spatial dimensions, the last of size 1.
        weights: elements of the constant weight, or of the right factor of a product of two
            activations; 0 if there is none.
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
    flat: bool = False
    weights: int = 0
    beside_conv: bool = False

    @property
    def macs(self) -> int:
        """Multiply-accumulates: output elements * channels_in / groups * taps."""
        return self.outputs * (self.channels_in // self.groups) * self.taps


def conv_kind(*, channels_in: int, channels_out: int, groups: int, taps: int, rank: int = 4) -> str:
    """The kind of a Conv: ``Conv.depthwise``, grouped, pointwise, narrow or dense.

    Pointwise ones with less than a block of outputs are ``.few``: integer kernels round their
    results one by one.

    One channel to one (filters of a waveform) is depthwise too: integer kernels take it so, one
    lane of their sixteen. Narrow (fewer than 16 channels): the integer kernel gathers windows row
    by row, so that a 3x3 stem is faster in float and a 7x7 one on integers; 4, 8 and 12 channels
    it reads in place, as more.

    The blocked float kernels want four dimensions, and a multiple of four channels (depthwise) or
    inputs (dense); else they are ``.plain``. Depthwise ones of one tap are ``.tap``: what is left
    of a BatchNormalization.
    Over volumes, integer kernels gather the window tap by tap, in one thread unless they have
    multiples of four channels (``.volume``, ``.gathered``).
    """
    if groups == channels_in == channels_out:
        if rank == 4 and (channels_out % 4 == 0 or channels_out == 1):
            return "Conv.depthwise" if taps > 1 else "Conv.depthwise.tap"
        return "Conv.depthwise.volume" if rank == 5 else "Conv.depthwise.plain"
    if rank == 5 and taps > 1:
        in_place = groups == 1 and _reads_in_place(channels_in, channels_out)
        return "Conv.volume" if in_place else "Conv.gathered"
    if groups > 1:
        return "Conv.grouped" if rank == 4 else "Conv.grouped.plain"
    if taps == 1:
        return "Conv.pointwise" if channels_out >= BLOCK else "Conv.pointwise.few"
    if channels_in < BLOCK:
        return "Conv.narrow"
    return "Conv.dense" if rank == 4 and channels_in % _LANES == 0 else "Conv.dense.plain"


def _copy_cost(f: Features) -> float:
    """What an integer convolution takes to copy its windows, in ns."""
    if _reads_in_place(f.channels_in, f.channels_out):
        return 0.0
    return _COPIED * (f.outputs // f.channels_out) * f.taps * f.channels_in


def _reads_in_place(channels_in: int, channels_out: int) -> bool:
    """Whether the fast integer kernels take a convolution of one group."""
    in_fours = channels_in % _LANES == 0 and channels_out % _LANES == 0
    return in_fours and channels_out >= BLOCK


def float_cost(kind: str, features: Features) -> float:
    """Cost of the float kernel, in ns.

    Args:
        kind: the operator type, with a suffix where the tables have one: see ``conv_kind``;
            ``MatMul.dynamic`` and ``MatMul.signed`` (see ``signed_pays``) have two activations;
            Add and Mul have ``.channel`` (one operand is (N, C, 1, 1)) and ``.scalar``;
            ``.fused`` follows a Conv.
        features: the node's counts.

    Returns:
        The cost; that of ``UNKNOWN`` for a kind that the table does not have.
    """
    base = kind.partition(".")[0]
    found = FLOAT.get(kind) or FLOAT.get(base, UNKNOWN)
    # Blocked float convolutions work on whole blocks of input channels, too, but where there is
    # less than one they read the plain layout.
    blocked = base == "Conv" and kind not in _UNBLOCKED and features.groups == 1
    few = blocked and features.channels_in < BLOCK
    padding = _padding(features.channels_in) if blocked and not few else 1.0
    if kind in _BLOCKED_DEPTHWISE and features.groups > 1:
        padding = _padding(features.groups)
    elif few and features.taps == 1:
        padding = _UNPACKED
    elif few and features.taps <= 3 * features.rows:
        padding = _SHORT
    elif features.flat and kind == "Conv.dense":
        padding *= _FLAT.get(-(-features.channels_out // BLOCK), 1.0)
    more = _COLUMN * _columns(features) if base == "ConvTranspose" else 0.0
    return _evaluate(found, features, macs=_macs(kind, features) * padding, more=more)


def int8_cost(kind: str, features: Features) -> float:
    """Cost of the integer kernel, in ns; infinity where there is none.

    Args:
        kind: as in ``float_cost``; ``Relu`` and ``Clip`` have none, but are free behind an integer
            kernel.
        features: the node's counts.
    """
    if kind.startswith("ConvTranspose."):
        convolution = int8_cost(kind.replace("Transpose", "", 1), replace(features, rows=1))
        return convolution + _upsampling_cost(features)
    if kind == "DepthToSpace.rows":
        return _upsampling_cost(features)
    if kind == "Conv.narrow" and _reads_in_place(features.channels_in, features.channels_out):
        kind = "Conv.dense"
    found = INT8_BESIDE_CONV.get(kind) if features.beside_conv else None
    found = found or INT8.get(kind)
    if found is None:
        return math.inf
    macs, more = _int8_work(kind, features)
    return _evaluate(found, features, macs=macs, more=more)


def signed_pays(features: Features) -> bool:
    """Whether a product of two activations is the faster one with its right factor in int8.

    There are far faster kernels for uint8 by int8, but to bring codes there takes a DQ and a Q,
    which pays where many rows are multiplied by them. Not where the rows of a large result end
    within a block: those of 1500 took twice as long as those of 1504.
    """
    if features.channels_out > _LONG and features.channels_out % BLOCK != 0:
        return False
    return int8_cost("MatMul.signed", features) < int8_cost("MatMul.dynamic", features)


def _int8_work(kind: str, f: Features) -> tuple[float, float]:
    """Multiply-accumulates of an integer kernel, slow ones counted more than once, and more ns."""
    macs = _macs(kind, f)
    if kind.startswith("Conv.depthwise"):
        return macs * (RAGGED if f.channels_in % BLOCK != 0 else 1.0), 0.0
    if kind in ("Conv.dense", "Conv.dense.plain"):
        return macs, _copy_cost(f)
    slow = kind.startswith("Conv.") and kind != "Conv.pointwise.few"  # that has a row of its own
    few = f.channels_out // f.groups < BLOCK
    return macs * (_FEW if slow and few else 1.0), 0.0


def quantize_cost(elements: int, *, blocked: int = 0, int8_conv: bool = False) -> float:
    """Cost of a QuantizeLinear and of the changes of layout at that border, in ns.

    Args:
        elements: elements of the tensor.
        blocked: its elements ``in_blocks`` if the float side has that layout, which has to be
            undone.
        int8_conv: the integer side has the channels last.
    """
    return (
        _per_element(QUANTIZE, elements)
        + (reorder_cost(blocked) if blocked else 0.0)
        + (_per_element(TO_CHANNELS_LAST, elements) if int8_conv else 0.0)
    )


def dequantize_cost(elements: int, *, blocked: int = 0, int8_conv: bool = False) -> float:
    """Cost of a DequantizeLinear, in ns: see quantize_cost."""
    return (
        _per_element(DEQUANTIZE, elements)
        + (reorder_cost(blocked) if blocked else 0.0)
        + (_per_element(FROM_CHANNELS_LAST, elements) if int8_conv else 0.0)
    )


def reorder_cost(blocked: int) -> float:
    """Cost in ns to bring a float tensor into the convolutions' blocked layout, or back.

    ``qdq.placement.layout`` finds where.

    Args:
        blocked: its elements ``in_blocks``.
    """
    return _per_element(REORDER, blocked)


def in_blocks(elements: int, channels: int) -> int:
    """Elements of a tensor whose channels are filled up to whole blocks, as float kernels do."""
    return round(elements * _padding(channels))


def _per_element(c: Coefficients, elements: int) -> float:
    return _evaluate(c, Features(inputs=elements, outputs=elements), macs=0.0)


def _evaluate(c: Coefficients, f: Features, *, macs: float, more: float = 0.0) -> float:
    work = (
        more
        + c.mac * macs
        + (c.window * f.taps + c.row * f.rows + c.gather * f.taps * f.groups)
        * (f.outputs / f.channels_out)
        + c.tap * f.outputs * f.taps
        + c.position * (f.outputs / f.channels_out)
        + c.input * f.inputs
        + c.output * f.outputs
        + c.weight * f.weights
    )
    moved = f.inputs + f.outputs
    least = c.far * moved if moved > CACHED else 0.0
    return max(c.fixed + work + min(work, c.serial), least)


def _macs(kind: str, f: Features) -> float:
    """Multiply-accumulates of kernels that work on whole blocks of a group's output channels."""
    if kind.startswith("Conv.depthwise") and (f.groups > 1 or kind not in _BLOCKED_DEPTHWISE):
        # blocks run over the groups, if at all
        return float(f.macs)
    if kind in RECURRENT:
        return float(f.macs)
    if kind.startswith("ConvTranspose"):
        return _columns(f) * f.channels_in
    return f.macs * _padding(f.channels_out // f.groups)


def _columns(f: Features) -> float:
    """Results of a float ConvTranspose before they are added up: one for each input and tap."""
    return f.inputs * f.weights / f.channels_in**2


def _upsampling_cost(f: Features) -> float:
    """What it takes to bring the results of an integer ConvTranspose to their places, in ns."""
    each = _SLOW_RUN if f.rows in SLOW_RUNS else _RUN
    return _evaluate(UPSAMPLING, f, macs=0.0, more=each * f.outputs / f.rows)


def _padding(channels: int) -> float:
    """Channels rounded up to whole blocks, over channels."""
    return -(-channels // BLOCK) * BLOCK / channels
