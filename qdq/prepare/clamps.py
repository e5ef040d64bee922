"""Clamps in one node, and right behind the node that they are for."""

import math

import numpy as np

from qdq.prepare.editing import Editor, Node
from qdq.prepare.scalars import with_scalar

__all__ = ["clamps_before_transposes", "whole_clamps"]


def whole_clamps(ed: Editor) -> None:
    """Max and Min with a scalar become Clip, and so do several clamps in a row.

    ``min(max(x, 0), 6)`` is how some exporters write a Relu6. Intervals that do not overlap stay
    as they are: their result is a constant.
    """
    for node in ed.nodes("Max", "Min", "Relu", "Clip"):
        outer = _interval(ed, node) if node in ed else None
        if outer is None:
            continue
        chain, x = [node], outer[0]
        low, high = outer[1:]
        while ed.only_user(x) is not None:
            maker = ed.maker(x, "Max", "Min", "Relu", "Clip")
            inner = _interval(ed, maker) if maker is not None else None
            if maker is None or inner is None or max(low, inner[1]) > min(high, inner[2]):
                break
            chain.append(maker)
            x, low, high = inner[0], max(low, inner[1]), min(high, inner[2])
        kinds = {n.op for n in chain}
        if not kinds.isdisjoint({"Max", "Min"}) or (len(chain) > 1 and kinds != {"Relu"}):
            _write(ed, chain, x, (low, high))


def _interval(ed: Editor, node: Node) -> tuple[str, float, float] | None:
    """What a clamp reads, and its bounds; None where they are not known, or it is none."""
    if ed.dtype(node.output) != np.float32:
        return None
    if node.op == "Relu":
        return node.input(0), 0.0, math.inf
    if node.op == "Clip":
        bounds = [ed.scalar(node.input(k)) for k in (1, 2)]
        if any(node.input(k) and bounds[k - 1] is None for k in (1, 2)):
            return None
        low, high = bounds
        low, high = -math.inf if low is None else low, math.inf if high is None else high
        passes = low <= high and low < math.inf and high > -math.inf
        return (node.input(0), low, high) if passes else None
    found = with_scalar(ed, node) if len(node.inputs) == 2 else None
    nothing = math.inf if node.op == "Max" else -math.inf  # passes that
    if found is None or math.isnan(found[1]) or found[1] == nothing:
        return None
    x, bound = found
    return (x, bound, math.inf) if node.op == "Max" else (x, -math.inf, bound)


def _write(ed: Editor, chain: list[Node], x: str, bounds: tuple[float, float]) -> None:
    """One node in place of a chain of clamps, the last one first."""
    last = chain[0]
    if bounds == (0.0, math.inf):
        new = ed.new_node("Relu", [x], [last.output], last.name)
    else:
        names = [
            ed.add_constant(f"{last.name}_{label}", np.asarray(value, np.float32))
            if math.isfinite(value)
            else ""
            for label, value in zip(("min", "max"), bounds, strict=True)
        ]
        inputs = [x, *names] if names[1] else [x, names[0]]
        new = ed.new_node("Clip", inputs, [last.output], last.name)
    ed.replace(chain[::-1], [new])


def clamps_before_transposes(ed: Editor) -> None:
    """A Relu or Clip behind the Transpose behind a Conv comes right behind the Conv.

    There the saturation of codes does its work. Elementwise, it does not mind the order of axes.
    """
    for node in ed.nodes("Relu", "Clip"):
        turned = node.input(0)
        turn = ed.maker(turned, "Transpose")
        if turn is None or ed.only_user(turned) is None or ed.only_user(turn.input(0)) is None:
            continue
        if ed.maker(turn.input(0), "Conv") is None:
            continue
        clamped = ed.fresh(f"{node.output}_clamped")
        ed.set_type_like(clamped, turn.input(0))
        first, second = node.copied(), turn.copied()
        first.input[0], first.output[0] = turn.input(0), clamped
        second.input[0], second.output[0] = clamped, node.output
        ed.replace([turn, node], [first, second])
