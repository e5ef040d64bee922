"""A ConvTranspose on integers, as a convolution and movements: onnxruntime has kernels for those.

And a DepthToSpace, as the movements alone.

What is written, for an image (``qdq.subpixel`` has the mathematics)::

    x ─DQ─┐
    w ─DQ─Conv ─ Transpose ─ Reshape ─ Transpose ─ Reshape ─ Slice ─ Transpose ─ y
    b ─DQ─┘      channels    blocks    blocks to   without   crop    channels
                 last        apart     places      blocks            first

with a Q and DQ of y's parameters between any two. The channels come last since then a movement
copies whole rows of channels; the runtime's integer convolutions have them there anyway, and it
leaves out the first and the last Transpose. The kernel of DepthToSpace has the channels first and
goes value by value: it was measured to take four times as long.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from qdq.subpixel import Subpixel

__all__ = ["Writer"]

_TO_THE_END = np.iinfo(np.int64).max


class Writer:
    """Lives for one node: writes what replaces it, in order."""

    def __init__(self, node: onnx.NodeProto, codes: tuple[str, str], fresh: Callable[[str], str]):
        """Begin.

        Args:
            node: the float ConvTranspose or DepthToSpace; its inputs and its output are named as
                they are to be.
            codes: names of the output's scale and zero point.
            fresh: makes a name that is free.
        """
        self.node: onnx.NodeProto = node
        self.codes: tuple[str, str] = codes
        self.fresh: Callable[[str], str] = fresh
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def write(self, form: Subpixel, shape: Sequence[int | None] | None) -> None:
        """Write it all; ``shape``: of the input, as far as it is known."""
        inputs = list(self.node.input)
        conv = {"kernel_shape": list(form.taps), "pads": list(form.pads)}
        if form.phases == 1:
            self._add("Conv", inputs, conv, self.node.output[0])
            return
        rank, x = len(form.axes), inputs[0]
        if self.node.op_type == "ConvTranspose":
            x = self._coded(self._add("Conv", inputs, conv))
        x = self._moved("Transpose", [x], [0, *range(2, rank + 2), 1])
        x = self._moved("Reshape", self._without_blocks(x, form, shape))
        crop = [a.crop for a in form.axes]
        axes = [k for k, cut in enumerate(crop, 1) if any(cut)]
        if axes:
            starts = [crop[k - 1][0] for k in axes]
            ends = [-crop[k - 1][1] or _TO_THE_END for k in axes]
            x = self._moved("Slice", [x, *map(self._constant, (starts, ends, axes))])
        order = [0, rank + 1, *range(1, rank + 1)]
        self._add("Transpose", [x], {"perm": order}, self.node.output[0])

    def _without_blocks(
        self, x: str, form: Subpixel, shape: Sequence[int | None] | None
    ) -> list[str]:
        """Bring the pixels of blocks to their places; the inputs of the Reshape that is left."""
        rank, made = len(form.axes), form.channels
        if rank == 1:
            length = self._sides(form, shape) or [-1]
            return [x, self._constant([0, *length, made])]
        *outer, inner = form.strides
        apart = self._constant([0] * (rank + 1) + [*outer, inner * made])
        # (N, D, H, W, sd, sh, sw * M) -> (N, D, sd, H, sh, W, sw * M)
        order = [0, *(k for d in range(1, rank) for k in (d, rank + d)), rank, 2 * rank]
        blocks = self._moved("Reshape", [x, apart])
        blocks = self._moved("Transpose", [blocks], order)
        sides = self._sides(form, shape)
        if sides is None:
            return [blocks, self._measured(x, form)]
        return [blocks, self._constant([0, *sides, made])]

    @staticmethod
    def _sides(form: Subpixel, shape: Sequence[int | None] | None) -> list[int] | None:
        """Sizes without blocks, before the crop, if those of the input are known."""
        known = [d for d in (shape or ())[2:] if d is not None]
        if len(known) < len(form.axes):
            return None
        return [a.made(size) for a, size in zip(form.axes, known, strict=True)]

    def _measured(self, x: str, form: Subpixel) -> str:
        """The shape without blocks, found at run time from one channel of x."""
        rank = len(form.axes)
        cut = [x, *map(self._constant, ([0], [1], [rank + 1]))]
        sizes = self._add("Shape", [self._moved("Slice", cut)])
        return self._add("Mul", [sizes, self._constant([1, *form.strides, form.channels])])

    def _moved(self, op: str, inputs: list[str], perm: list[int] | None = None) -> str:
        return self._coded(self._add(op, inputs, {"perm": perm} if perm else None))

    def _coded(self, tensor: str) -> str:
        """Q and DQ behind a tensor."""
        codes = self._add("QuantizeLinear", [tensor, *self.codes])
        return self._add("DequantizeLinear", [codes, *self.codes])

    def _add(
        self,
        op: str,
        inputs: list[str],
        attributes: Mapping[str, list[int]] | None = None,
        output: str = "",
    ) -> str:
        output = output or self.fresh(f"{self.node.output[0]}_{op}_Output")
        name = self.fresh(f"{self.node.name}_{op}") if self.nodes else self.node.name
        made = helper.make_node(op, inputs, [output], name)
        made.attribute.extend(helper.make_attribute(k, v) for k, v in (attributes or {}).items())
        self.nodes.append(made)
        return output

    def _constant(self, value: list[int]) -> str:
        name = self.fresh(f"{self.node.name}_sizes")
        array: NDArray[np.int64] = np.array(value, np.int64)
        self.constants.append(numpy_helper.from_array(array, name))
        return name
