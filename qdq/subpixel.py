"""A transposed convolution as a plain one, whose channels are the pixels of blocks. Numpy only.

A ConvTranspose with stride s lays a window of k values on its output for each input value, s apart.
Seen from an output position, every s-th weight meets a run of ``t = ceil(k / s)`` neighbouring
inputs, and which weights these are depends on the position modulo s alone. So ``s`` plain
convolutions with windows of t values, one for each *phase*, make all of the output; their results
are s neighbours of it (Shi et al., "Is the deconvolution layer the same as a convolutional layer?",
arXiv:1609.07009). With more dimensions there is a phase for each pixel of a block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from qdq.ops.demand import NodeView

__all__ = ["LEAST_RUN", "Axis", "Subpixel", "form_of"]

Number = TypeVar("Number", bound=np.generic)

LEAST_RUN = 8
"""Values side by side; shorter rows are copied value by value."""


def form_of(view: NodeView) -> "Subpixel | str":
    """The form of a ConvTranspose, or what a DepthToSpace has of it; else why there is none.

    Movements behind a DepthToSpace keep rows of channels together where these are side by side
    in its input (mode ``DCR``), and not too few.
    """
    if view.op_type == "ConvTranspose":
        return Subpixel.of(view.inputs[1].shape or (), view.attributes)
    shape, side = view.inputs[0].shape or (), view.integer("blocksize", 1)
    channels = (shape[1] or 0) // side**2 if len(shape) == 4 else 0
    found = Subpixel(channels, (Axis(side, side),) * 2)
    if view.text("mode", "DCR") != "DCR" or side < 2 or found.run < LEAST_RUN:
        return "its rows of channels are not together, or short"
    return found


@dataclass(frozen=True, slots=True)
class Axis:
    """A ConvTranspose along one spatial dimension; G blocks of s outputs are computed.

    Attributes:
        window: values of the window, k.
        stride: s.
        begin, end: padding, which is what the output lacks at either side.
        added: ``output_padding``, what it has more at the end.
    """

    window: int
    stride: int
    begin: int = 0
    end: int = 0
    added: int = 0

    @property
    def taps(self) -> int:
        """Inputs that an output value is made of, t."""
        return -(-self.window // self.stride)

    @property
    def pads(self) -> tuple[int, int]:
        """Padding of the plain convolution, as many blocks as there are output values in."""
        last = (self.window - self.end + self.added - 1) // self.stride
        return self.taps - 1 - self.begin // self.stride, last

    @property
    def crop(self) -> tuple[int, int]:
        """Values of the first and the last block that the output does not have."""
        made = self.stride * (self.pads[1] + 1)
        return self.begin % self.stride, made - self.window + self.end - self.added

    def made(self, size: int) -> int:
        """Values that are computed of an input of some size, before the crop."""
        return self.stride * (size + sum(self.pads) - self.taps + 1)


@dataclass(frozen=True, slots=True)
class Subpixel:
    """A ConvTranspose of one group, from C to M channels.

    Attributes:
        channels: M.
        axes: one for each spatial dimension.
    """

    channels: int
    axes: tuple[Axis, ...]

    @classmethod
    def of(cls, weight: Sequence[int | None], attributes: Mapping[str, Any]) -> "Subpixel | str":
        """From the shape of a weight (C, M, ...) and a node's attributes; else why there is none.

        ``auto_pad`` and ``output_shape`` let the padding depend on the input's size.
        """
        sizes = [d for d in weight if d is not None]
        rank = len(sizes) - 2
        if rank < 1 or len(sizes) < len(weight):
            return "the shape of its weight is not known"
        if attributes.get("group", 1) != 1:
            return f"it has {attributes['group']} groups"
        if attributes.get("output_shape"):
            return "its padding follows from output_shape"
        if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", "NOTSET", b"VALID", "VALID"):
            return "its padding follows from auto_pad"
        if any(d != 1 for d in attributes.get("dilations") or ()):
            return "its window has gaps (dilations)"
        pads = list(attributes.get("pads") or [0] * (2 * rank))
        strides = list(attributes.get("strides") or [1] * rank)
        added = list(attributes.get("output_padding") or [0] * rank)
        axes = tuple(map(Axis, sizes[2:], strides, pads[:rank], pads[rank:], added))
        if any(min(a.begin, a.end) < 0 or max(a.begin, a.end) >= a.window for a in axes):
            return f"its padding {pads} is not smaller than its window"
        return cls(sizes[1], axes)

    @property
    def strides(self) -> tuple[int, ...]:
        """Sides of a block."""
        return tuple(a.stride for a in self.axes)

    @property
    def phases(self) -> int:
        """Pixels of a block."""
        return prod(self.strides)

    @property
    def run(self) -> int:
        """Values that stay side by side as the pixels of blocks are brought to their places."""
        return self.channels * (self.strides[-1] if self.strides else 1)

    @property
    def taps(self) -> tuple[int, ...]:
        """The plain convolution's window."""
        return tuple(a.taps for a in self.axes)

    @property
    def pads(self) -> tuple[int, ...]:
        """The plain convolution's padding, in the order of ONNX."""
        return tuple(a.pads[0] for a in self.axes) + tuple(a.pads[1] for a in self.axes)

    def weight(self, values: NDArray[Number], fill: NDArray[Number]) -> NDArray[Number]:
        """The plain convolution's weight: from (C, M, k...) to (phases * M, C, t...).

        Args:
            values: weights or codes.
            fill: what stands for 0, one value or one of each channel (M,).
        """
        rank, (inputs, made) = len(self.axes), values.shape[:2]
        wide = np.empty((inputs, made, *(a.taps * a.stride for a in self.axes)), dtype=values.dtype)
        wide[...] = np.reshape(fill, (1, -1) + (1,) * rank)
        wide[(slice(None), slice(None), *(slice(a.window) for a in self.axes))] = values
        split = wide.reshape(inputs, made, *(n for a in self.axes for n in (a.taps, a.stride)))
        # a later tap meets an earlier input
        taps, phases = range(2, 2 + 2 * rank, 2), range(3, 3 + 2 * rank, 2)
        turned = np.flip(split, tuple(taps)).transpose(*phases, 1, 0, *taps)
        return np.ascontiguousarray(turned.reshape(self.phases * made, inputs, *self.taps))

    def restored(self, values: NDArray[Number]) -> NDArray[Number]:
        """What ``weight`` or ``tiled`` made, as it was."""
        if values.ndim == 1:
            return values[: self.channels]
        rank, inputs = len(self.axes), values.shape[1]
        split = values.reshape(*self.strides, self.channels, inputs, *self.taps)
        order = [rank + 1, rank, *(k for d in range(rank) for k in (rank + 2 + d, d))]
        turned = np.flip(split.transpose(order), tuple(range(2, 2 + 2 * rank, 2)))
        sides = (a.taps * a.stride for a in self.axes)
        wide = turned.reshape(inputs, self.channels, *sides)
        return wide[(slice(None), slice(None), *(slice(a.window) for a in self.axes))]

    def tiled(self, values: NDArray[Number]) -> NDArray[Number]:
        """What each channel has, for the channels of all phases: (M,) to (phases * M,)."""
        return np.tile(values, self.phases)
