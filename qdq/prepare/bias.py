"""A bias for every linear node, so that a bias correction has a place to go."""

import numpy as np

from qdq.prepare.editing import Editor

__all__ = ["spell_out_bias"]


def spell_out_bias(ed: Editor) -> None:
    """Conv and Gemm with a constant weight and no bias get one of zeros: ``Wx = Wx + 0``.

    Kernels add the bias while they store the sum, so it costs nothing, in float or in int32.
    """
    for node in ed.nodes("Conv", "Gemm"):
        shape, dtype = ed.shape(node.input(1)), ed.dtype(node.input(1))
        if node.input(2) or node.input(1) not in ed.constants or not shape or dtype is None:
            continue
        plain = not node.attr("transB", 0) and node.attr("alpha", 1.0) == 1.0
        width = shape[0] if node.op == "Conv" else shape[-1]
        if dtype.kind != "f" or width is None or not plain:
            continue
        ed.set_input(node, 2, ed.add_constant(f"{node.name}_bias", np.zeros(width, dtype)))
