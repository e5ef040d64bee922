"""Resize over some axes made a Resize over all of them."""

import numpy as np

from qdq.prepare.editing import Editor, Node
from qdq.prepare.scatter import scattered

__all__ = ["whole_resize"]

ROI, SCALES, SIZES = 1, 2, 3


def whole_resize(ed: Editor) -> None:
    """Resize names every axis in its scales or sizes, and no policy is left to work out.

    Since opset 18 the attribute ``axes`` restricts a Resize to some axes. Spelled out, the others
    have scale 1, their own size, and the region (0, 1). onnxruntime loses count of the axes where
    it moves such a Resize to channels-last, so it may not stay. What is not constant is put
    together by ScatterElements when the model runs.

    ``keep_aspect_ratio_policy`` is worked out where sizes and dimensions are constant and the
    result can be said exactly with scales or sizes; else it stays, with its axes. So does a
    Resize of a tensor of unknown rank.
    """
    for node in ed.nodes("Resize"):
        rank = ed.rank(node.input(0))
        if rank is None:
            continue
        for slot in (ROI, SCALES, SIZES):
            if node.input(slot) and ed.shape(node.input(slot)) == (0,):
                ed.set_input(node, slot, "")  # how exporters spell an absent one
        axes = [int(a) % rank for a in node.attr("axes") or range(rank)]
        if _settle_policy(ed, node, axes) and node.attr("axes"):
            _name_all_axes(ed, node, axes, rank)


def _settle_policy(ed: Editor, node: Node, axes: list[int]) -> bool:
    """Put plain scales or sizes in the place of a policy; False if one has to stay."""
    policy = node.attr("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch" or not node.input(SIZES):
        node.set_attr("keep_aspect_ratio_policy", None)  # without sizes it has no meaning
        return True
    wanted = ed.array(node.input(SIZES))
    known = [(ed.shape(node.input(0)) or ())[a] for a in axes]
    if wanted is None or not all(known):
        return False
    dims = np.array(known, np.float32)
    ratios = wanted.astype(np.float32) / dims
    scale = ratios.min() if policy == "not_larger" else ratios.max()
    sizes = np.floor(scale * dims + np.float32(0.5))
    # Sizes make scales of their own, and scales round the sizes down: either may be the same.
    if (sizes / dims == scale).all():
        value = sizes.astype(np.int64)
        ed.set_input(node, SIZES, ed.add_constant(f"{node.name}_sizes", value))
    elif all((np.floor(s * dims) == sizes).all() for s in (scale, np.float64(scale))):
        scales = np.full(len(axes), scale, np.float32)  # shape inference may count in float64
        ed.set_input(node, SCALES, ed.add_constant(f"{node.name}_scales", scales))
        ed.set_input(node, SIZES, "")
    else:
        return False
    node.set_attr("keep_aspect_ratio_policy", None)
    return True


def _name_all_axes(ed: Editor, node: Node, axes: list[int], rank: int) -> None:
    node.set_attr("axes", None)
    index = np.array(axes, np.int64)
    if node.input(ROI):
        crops = node.attr("coordinate_transformation_mode") == "tf_crop_and_resize"
        dtype = ed.dtype(node.input(ROI))
        whole = np.repeat(np.array([0, 1], dtype or np.float32), rank)
        both = np.concatenate([index, index + rank])
        # other modes do not read the regions
        ed.set_input(
            node, ROI, scattered(ed, node, ROI, whole, both, f"{node.name}_roi") if crops else ""
        )
    if node.input(SCALES):
        ones = np.ones(rank, np.float32)
        ed.set_input(node, SCALES, scattered(ed, node, SCALES, ones, index, f"{node.name}_scales"))
    if node.input(SIZES):
        shape = ed.shape(node.input(0)) or ()
        own = [1 if axis in axes else dim for axis, dim in enumerate(shape)]
        dims = None if None in own else np.array(own, np.int64)
        ed.set_input(node, SIZES, scattered(ed, node, SIZES, dims, index, f"{node.name}_sizes"))
