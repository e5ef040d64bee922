"""What a runtime turns into integer kernels. One table per target; data, not branches.

``ORT_CPU`` holds what the onnxruntime CPU provider fuses, measured with version 1.32 on x86-64.
``PORTABLE`` takes every operator that has a row in ``qdq.ops``, for runtimes that compile the
QDQ graph themselves and for looking at the numerics of an operator.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from qdq.ops.demand import Demand, NodeView
from qdq.spec import INT8, INT16, UINT8, UINT16, IntType
from qdq.subpixel import form_of

__all__ = ["ORT_CPU", "ORT_CPU_NO_VNNI", "PORTABLE", "TARGETS", "Kernel", "Target"]

Condition = Callable[[NodeView, Demand], str | None]


def _always(_node: NodeView, _demand: Demand) -> None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One row: how a target runs an operator on integers.

    Attributes:
        fused: the operator that the runtime's optimized graph then holds.
        float_output: the kernel can hand out float, so that no Q is needed behind it.
        fused_float: the operator's name in that case.
        dynamic: the kernel rounds its activations by itself, at run time, and is an operator of
            the runtime's own: the node is written as that one.
        tables: it picks rows of codes.
        subpixel: the node is written as movements, behind another one, if it has such a form
            (``qdq.subpixel``).
        condition: returns why this very node cannot run on integers, or None.
    """

    fused: str
    float_output: bool = False
    fused_float: str = ""
    dynamic: bool = False
    tables: bool = False
    subpixel: bool = False
    condition: Condition = _always


_ANY = Kernel(fused="")  # of a target that names no operators


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A runtime's integer abilities.

    Attributes:
        name: as shown to users.
        kernels: operator → row; an operator without a row stays float. None: all have the same.
        activations: integer types that activations may have.
        weights: integer types that weights may have.
        absorbs_clamps: a Relu or Clip behind an integer kernel costs nothing.
        weighs_costs: place integer kernels only where they pay (needs measured costs).
        saturates: sums of two products saturate at 16 bits, so weight scales have to avoid that.
        one_type: a kernel's activations must all have the same integer type.
        signed_right: but a product of two activations is fast with uint8 on the left and int8 on
            the right.
        tunes_float: float nodes are written in the form that the runtime runs fastest, with
            operators of its own among them (``qdq.forms``).
    """

    name: str
    kernels: Mapping[str, Kernel] | None
    activations: frozenset[IntType]
    weights: frozenset[IntType]
    absorbs_clamps: bool = True
    weighs_costs: bool = True
    one_type: bool = True
    signed_right: bool = False
    saturates: bool = False
    tunes_float: bool = False

    def kernel(self, op_type: str) -> Kernel | None:
        """The row of an operator."""
        return _ANY if self.kernels is None else self.kernels.get(op_type)

    def subpixel(self, op_type: str) -> bool:
        """Whether nodes of an operator are written as another one, and movements."""
        kernel = self.kernel(op_type)
        return kernel is not None and kernel.subpixel

    def refusal(self, node: NodeView, demand: Demand) -> str | None:
        """Why the target cannot run this node on integers; None if it can."""
        kernel = self.kernel(node.op_type)
        if kernel is None or (demand.dynamic and not kernel.dynamic):
            return f"{self.name} has no integer kernel for {node.op_type}"
        if demand.table is not None and not kernel.tables:
            return "all its data inputs are constants"
        return kernel.condition(node, demand)


def _nearest(node: NodeView, _demand: Demand) -> str | None:
    mode = node.text("mode", "nearest")
    if mode != "nearest":
        return f"only nearest Resize has an integer kernel, not {mode}"
    if node.text("coordinate_transformation_mode", "") == "tf_crop_and_resize":
        return "a cropping Resize reads float regions beside its data"
    return None


def _two_real_inputs(node: NodeView, _demand: Demand) -> str | None:
    if any(t.shape is not None and 0 in t.shape for t in node.inputs[:2]):
        return "an input is empty"
    return None


def _matrix(node: NodeView, demand: Demand) -> str | None:
    if demand.weight is None and any(t.constant for t in node.inputs[:2]):
        return "its constant side is not a matrix"
    return None


def _plain_convolution(node: NodeView, _demand: Demand) -> str | None:
    found = form_of(node)
    return found if isinstance(found, str) else None


_SAME = ("Expand", "Flatten", "GatherElements", "MaxPool", "ReduceMax",
         "ReduceMin", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose",
         "Unsqueeze")  # fmt: skip

ORT_CPU = Target(
    name="onnxruntime CPU",
    tunes_float=True,
    signed_right=True,
    activations=frozenset({UINT8, INT8}),
    weights=frozenset({INT8, UINT8}),
    kernels={
        "Conv": Kernel(fused="QLinearConv"),
        "ConvTranspose": Kernel(fused="QLinearConv", subpixel=True, condition=_plain_convolution),
        "Gemm": Kernel(fused="QGemm", float_output=True, fused_float="QGemm"),
        "MatMul": Kernel(
            fused="QLinearMatMul",
            float_output=True,
            fused_float="MatMulIntegerToFloat",
            condition=_matrix,
        ),
        "Add": Kernel(fused="QLinearAdd", condition=_two_real_inputs),
        "Mul": Kernel(fused="QLinearMul", condition=_two_real_inputs),
        "AveragePool": Kernel(fused="QLinearAveragePool"),
        "Concat": Kernel(fused="QLinearConcat"),
        "GlobalAveragePool": Kernel(fused="QLinearGlobalAveragePool"),
        "LeakyRelu": Kernel(fused="QLinearLeakyRelu"),
        "LSTM": Kernel(fused="DynamicQuantizeLSTM", dynamic=True),
        "Gather": Kernel(fused="Gather", tables=True),
        "Sigmoid": Kernel(fused="QLinearSigmoid"),
        "Softmax": Kernel(fused="QLinearSoftmax"),
        "Where": Kernel(fused="QLinearWhere"),
        "Resize": Kernel(fused="Resize", condition=_nearest),
        "DepthToSpace": Kernel(fused="DepthToSpace", subpixel=True),
        **{op: Kernel(fused=op) for op in _SAME},
    },
)

ORT_CPU_NO_VNNI = replace(
    ORT_CPU,
    name="onnxruntime CPU without VNNI",
    saturates=True,
    signed_right=False,
    kernels={op: k for op, k in (ORT_CPU.kernels or {}).items() if not k.dynamic},
)
"""x86 with AVX2 or AVX512 only: pairs of products are added in 16 bits.

Weights of kernels that are dynamic would saturate there: their scales are not solved for. So would
products of two activations with int8 on the right.
"""

PORTABLE = Target(
    name="portable",
    activations=frozenset({UINT8, INT8, UINT16, INT16}),
    weights=frozenset({INT8, UINT8, INT16, UINT16}),
    kernels=None,
    weighs_costs=False,
    one_type=False,
)

TARGETS: Mapping[str, Target] = {
    "ort-cpu": ORT_CPU,
    "ort-cpu-no-vnni": ORT_CPU_NO_VNNI,
    "portable": PORTABLE,
}
