"""Mish spelled out in small nodes, put back into one operator."""

import onnx

from qdq.prepare.editing import Editor

__all__ = ["mishes"]


def mishes(ed: Editor) -> None:
    """``x * tanh(softplus(x))`` becomes one Mish (Misra, arXiv:1908.08681).

    The operator came with opset 18; float16 and float64 are left, for which runtimes lack it.
    """
    if ed.opset < 18:
        return
    for softplus in ed.nodes("Softplus"):
        x = softplus.input(0)
        tanh = ed.only_user(softplus.output, "Tanh")
        mul = None if tanh is None else ed.only_user(tanh.output, "Mul")
        if tanh is None or mul is None or ed.elem_type(x) != onnx.TensorProto.FLOAT:
            continue
        if sorted(mul.inputs) == sorted([x, tanh.output]):
            name = ed.fresh(f"{mul.name}_mish")
            ed.replace([softplus, tanh, mul], [ed.new_node("Mish", [x], [mul.output], name)])
