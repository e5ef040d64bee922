"""Two models, matched: the records of ``qdq.report.matching``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from qdq.affine import dequantize, fake_quantize
from qdq.graph import Graph
from qdq.prepare.opset import infer_types
from qdq.spec import QuantParams
from qdq.subpixel import Subpixel

__all__ = ["Coded", "Constant", "Match", "Site", "without_arrays"]


@dataclass(frozen=True, slots=True)
class Coded:
    """A Q and DQ behind an activation of the quantized model.

    Attributes:
        raw: the tensor that the Q reads.
        real: the tensor that the DQ makes.
        params: scale and zero point.
        others: what further DQs make of the same values, for some of the readers.
    """

    raw: str
    real: str
    params: QuantParams
    others: tuple[str, ...] = ()

    @property
    def reals(self) -> tuple[str, ...]:
        """All tensors that have the rounded values."""
        return (self.real, *self.others)

    def means(self, other: "Coded") -> bool:
        """Whether both round to the same values; types of codes may differ."""
        a, b = self.params, other.params
        place, place2 = (p.zero_point.astype(np.int64) - p.spec.dtype.min for p in (a, b))
        return np.array_equal(a.scale, b.scale) and np.array_equal(place, place2)


@dataclass(frozen=True, slots=True)
class Constant:
    """A constant that the quantized model dequantizes.

    Attributes:
        real: the tensor that the DQ makes.
        stored: the initializer: codes, or floats that a Q reads.
        params: scale and zero point.
        source: the constant of the float model at the same place; None if it was not found.
        form: what has the codes in another layout than ``source``; None if they have the same.
    """

    real: str
    stored: str
    params: QuantParams
    source: str | None = None
    form: Subpixel | None = None

    def value(self, quantized: Graph) -> NDArray[np.float32]:
        """The dequantized values, in the layout of ``source``."""
        stored: NDArray[Any] = quantized.array(self.stored)
        if self.form is not None:
            stored = self.form.restored(stored)
        if stored.dtype.kind == "f":
            return fake_quantize(stored, self.params)
        return dequantize(stored, self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A node of the quantized model that makes tensors of the float model.

    Attributes:
        index: of the node in the quantized graph.
        name: the node's name, in the float model where it is known there.
        op_type: its operator.
        outputs: (its own output, what the float model calls the result) for each.
        limits: bounds of a clamp between the node and its codes; None without one.
        integer: there is an integer kernel for it, it reads codes, and its result becomes codes or
            the kernel may hand out float.
        reads_codes: it reads the output of a DQ.
        exact: the float model's node of which it is another form.
        behind: nodes that are part of that form and follow it, indices in graph order.
        relaid: its constants, where it has them in another layout than that node.
    """

    index: int
    name: str
    op_type: str
    outputs: tuple[tuple[str, str], ...]
    limits: tuple[float, float] | None
    integer: bool
    reads_codes: bool
    exact: onnx.NodeProto | None = None
    behind: tuple[int, ...] = ()
    relaid: tuple[Constant, ...] = ()

    @property
    def runs_on_integers(self) -> bool:
        """Whether it is integer, or another form that rounds by itself."""
        return self.integer or self.exact is not None

    @property
    def rounds(self) -> bool:
        """Whether noise may arise here."""
        return self.reads_codes or self.exact is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A float and a QDQ model, matched.

    Attributes:
        float_graph: the float model, in the form that the quantized one was made from.
        graph: the quantized model.
        meaning: tensor of the quantized model → tensor of the float model.
        coded: float tensor → its Q and DQ in the quantized model.
        found: float tensor → the tensor of the quantized model that stands for it.
        constants: output of a DQ → the constant.
        sites: nodes that make matched tensors, in graph order.
        site_of: the same by the index of the node.
        notes: what could not be matched.
        undivided: tensor that smoothing divided → its name in the user's model.
    """

    float_graph: Graph
    graph: Graph
    meaning: Mapping[str, str]
    coded: Mapping[str, Coded]
    found: Mapping[str, str]
    constants: Mapping[str, Constant]
    sites: tuple[Site, ...]
    site_of: Mapping[int, Site]
    notes: tuple[str, ...]
    undivided: Mapping[str, str]


def without_arrays(model: onnx.ModelProto) -> frozenset[str]:
    """Tensors that the runtime cannot hand out as arrays: sequences, optional ones, bfloat16."""
    return frozenset(
        name
        for name, kind in infer_types(model).items()
        if kind.WhichOneof("value") not in (None, "tensor_type")
        or kind.tensor_type.elem_type == onnx.TensorProto.BFLOAT16
    )
