"""Constant factors and offsets in front of a Conv, in a form that keeps out of its layout."""

import numpy as np
import onnx

from qdq.facts import BLOCK
from qdq.prepare.affine import Affine, affine_of
from qdq.prepare.editing import Editor, Node
from qdq.prepare.linear_input import precede

__all__ = ["affine_behind_transposes", "affine_in_blocks", "affine_in_one"]


def affine_behind_transposes(ed: Editor) -> None:
    """Factors and offsets in front of the Transpose in front of a Conv come behind the Transpose.

    There they are folded into the Conv, or become one node (``affine_in_one``). TensorFlow
    normalizes images with their channels last, where onnxruntime takes a Mul by three values three
    by three: 0.5 ms for an image of 224 x 224, and 0.02 ms behind the Transpose.
    """
    for turn in ed.nodes("Transpose"):
        perm = turn.attr("perm")
        if perm is None or not any(n.op in ("Conv", "Pad") for n in ed.users(turn.output)):
            continue
        chain, x = _chain_before(ed, turn)
        if not chain:
            continue
        first = turn.copied()
        first.input[0], first.output[0] = x, ed.fresh(f"{x}_turned")
        ed.set_type(first.output[0], ed.elem_type(x), [(ed.shape(x) or ())[k] for k in perm])
        made = [first]
        for node in chain:
            made.append(_turned(ed, node, made[-1].output[0], list(perm)))
        made[-1].output[0] = turn.output
        ed.replace([*chain, turn], made)


def _chain_before(ed: Editor, turn: Node) -> tuple[list[Node], str]:
    """The nodes in front of one that scale and shift by constants, in order; what they read."""
    chain: list[Node] = []
    x, reader = turn.input(0), turn
    while ed.only_user(x) is reader:
        maker = ed.maker(x, "Add", "Div", "Mul", "Sub")
        slot = None if maker is None else _data_slot(ed, maker)
        if maker is None or slot is None or ed.shape(maker.input(slot)) != ed.shape(x):
            break
        chain.insert(0, maker)
        x, reader = maker.input(slot), maker
    return chain, x


def _data_slot(ed: Editor, node: Node) -> int | None:
    """The input that is not constant, where the other one is."""
    known = [name in ed.constants for name in node.inputs]
    return known.index(False) if known.count(True) == 1 and ed.rank(node.output) else None


def _turned(ed: Editor, node: Node, x: str, perm: list[int]) -> onnx.NodeProto:
    """The node, reading a tensor whose axes are in another order."""
    made = node.copied()
    slot = _data_slot(ed, node) or 0
    value = ed.array(node.input(1 - slot))
    if value is not None and value.size > 1:
        whole = value.reshape((1,) * (len(perm) - value.ndim) + value.shape)
        made.input[1 - slot] = ed.add_constant(
            f"{node.input(1 - slot)}_turned", whole.transpose(perm)
        )
    made.input[slot], made.output[0] = x, ed.fresh(f"{node.output}_turned")
    ed.set_type_like(made.output[0], x)
    return made


def affine_in_blocks(ed: Editor) -> None:
    """A Mul and an Add of constants in front of a Relu or a Conv become BatchNormalization.

    What could not be folded into a Conv (see ``fold_affine_before``) is a kernel of its own, in
    float. onnxruntime runs BatchNormalization on blocks of channels; for Mul and Add it brings the
    tensor into the plain layout and back. In front of a Conv that is for what comes from a
    hard-swish, which is float too: text detectors and recognizers of the PP-LCNetV3 kind were
    measured to take 5 to 8 % less time. In front of a Relu, where networks with pre-activation
    have it, TensorFlow writes Mul and Add: a ResNet-50 v2 and a DenseNet-121 take 12 % less.
    """
    for node in ed.nodes("Mul", "Add"):
        if node not in ed:
            continue
        x = next((i for i in node.inputs if i not in ed.constants), "")
        shape = ed.shape(x)
        channels = shape[1] if shape is not None and len(shape) == 4 else None
        if not channels or channels % BLOCK or ed.elem_type(x) != onnx.TensorProto.FLOAT:
            continue
        chain, affine = _chain(ed, node, x, channels)
        readers = {u.op for u in ed.users(chain[-1].output)}
        swish = "Conv" in readers and _is_hard_swish(ed, x)
        if affine is not None and (swish or (len(chain) == 2 and readers & {"Clip", "Relu"})):
            _replace(ed, chain, x, affine)


def affine_in_one(ed: Editor) -> None:
    """What scales and shifts a few channels, one by one, in front of a Conv becomes one node.

    That is how images are normalized. Where it could not be folded into the Conv (padding), and
    this one runs on integers, onnxruntime moves the change to channels-last to before the Sub and
    Div; with three channels last and a constant of three values each of these takes nine times as
    long. It moves nothing over a BatchNormalization, which takes as long as one of them in float.
    """
    for node in ed.nodes("Conv"):
        found = precede(ed, node)
        if found is None:
            continue
        chain, x, affine = found
        single = all(len(set(v.tolist())) == 1 for v in (affine.scale, affine.shift))
        image = ed.rank(x) == 4 and ed.elem_type(x) == onnx.TensorProto.FLOAT
        done = [n.op for n in chain] == ["BatchNormalization"]
        if image and not single and not done and affine.scale.size < BLOCK:
            _replace(ed, chain[::-1], x, affine)


def _is_hard_swish(ed: Editor, x: str) -> bool:
    product = ed.maker(x, "Mul")
    return product is not None and any(
        ed.maker(i, "HardSigmoid") is not None for i in product.inputs
    )


def _chain(ed: Editor, node: Node, x: str, channels: int) -> tuple[list[Node], Affine | None]:
    """The node, with an Add behind it that is its only reader; and what they do together."""
    first = affine_of(ed, node, x, channels, axis=1, rank=4)
    add = ed.only_user(node.output, "Add") if first is not None and node.op == "Mul" else None
    then = None if add is None else affine_of(ed, add, node.output, channels, axis=1, rank=4)
    if first is None or add is None or then is None:
        return [node], first
    return [node, add], Affine(first.scale, first.shift + then.shift)


def _replace(ed: Editor, chain: list[Node], x: str, affine: Affine) -> None:
    last = chain[-1]
    parts = {
        "scale": affine.scale,
        "shift": affine.shift,
        "mean": np.zeros_like(affine.scale),
        "variance": np.ones_like(affine.scale),
    }
    names = [ed.add_constant(f"{last.name}_{k}", v.astype(np.float32)) for k, v in parts.items()]
    new = ed.new_node("BatchNormalization", [x, *names], [last.output], last.name, epsilon=0.0)
    ed.replace(chain, [new])
