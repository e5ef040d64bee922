"""Sum of several tensors as Adds."""

import onnx

from qdq.prepare.editing import Editor

__all__ = ["plain_sums"]


def plain_sums(ed: Editor) -> None:
    """Sum becomes Add, of more than two tensors one behind the other.

    Caffe2 and MXNet write residual sums so. Add has an integer kernel, is fused into convolutions,
    and is what other passes look for. onnxruntime adds in the same order.
    """
    for node in ed.nodes("Sum"):
        if len(node.inputs) < 2:
            continue
        made: list[onnx.NodeProto] = []
        total, *others = node.inputs
        for k, other in enumerate(others, 1):
            last = k == len(others)
            name = node.name if last else ed.fresh(f"{node.name}_{k}")
            y = node.output if last else ed.fresh(f"{node.output}_{k}")
            if not last and ed.shape(total) == ed.shape(other):
                ed.set_type_like(y, total)
            made.append(ed.new_node("Add", [total, other], [y], name))
            total = y
        ed.replace([node], made)
