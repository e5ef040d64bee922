"""The way back through LSTM and GRU: step by step, the last one first.

All that a step multiplies gradients by is known before (its gates follow from the values that the
node hands out), so it is found for all steps at once. What is left is a Scan of few nodes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from qdq.graph import attributes
from qdq.placement.gradients import Grads, rule, sigmoid_slope, tanh_slope
from qdq.placement.tape import Tape, UnknownWayError

__all__: list[str] = []  # the rules register themselves

Floats = NDArray[np.float32]
_DIRECTIONS = {b"forward": [False], b"reverse": [True], b"bidirectional": [False, True]}
_OTHERWISE = (
    "activation_alpha",
    "activation_beta",
    "clip",
    "input_forget",
    "layout",
)
_USUAL = {"LSTM": [b"Sigmoid", b"Tanh", b"Tanh"], "GRU": [b"Sigmoid", b"Tanh"]}
_LENGTHS, _STATES, _PEEPHOLES = 4, (5, 6), 7  # slots


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """One direction of a node; sequences are in the order of its steps.

    Attributes:
        x: (T, N, I).
        before: what the step before hands out, (T, N, H).
        grad: of what it hands out, (T, N, H).
        states: at the start, (N, H) each.
        ends: gradients of those at the end.
        w: (gates * H, I).
        r: (gates * H, H).
        b: (2, gates * H); for the input, and for the state.
    """

    x: str
    before: str
    grad: str
    states: Sequence[str]
    ends: Sequence[str]
    w: Floats
    r: Floats
    b: Floats


_Back = Callable[[Tape, _Run], tuple[str, list[str]]]
"""Gradients of what all gates get of the input, (T, N, gates * H), and of the states."""


@rule("LSTM")
def _lstm(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    return _through(tape, node, grads, 2, _lstm_back)


@rule("GRU")
def _gru(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    if not attributes(node).get("linear_before_reset"):
        raise UnknownWayError("a state that is reset before its product")
    return _through(tape, node, grads, 1, _gru_back)


def _through(
    tape: Tape, node: onnx.NodeProto, grads: Grads, states: int, back: _Back
) -> Mapping[int, str]:
    kept: dict[str, Any] = attributes(node)
    given = [*node.input, *[""] * 8]
    directions = _DIRECTIONS[kept.get("direction", b"forward")]
    usual = _USUAL[node.op_type] * len(directions)
    other = any(kept.get(k) for k in _OTHERWISE) or kept.get("activations", usual) != usual
    if other or given[_LENGTHS] or given[_PEEPHOLES]:
        raise UnknownWayError("a cell of another kind, or sequences of several lengths")
    if any(n and n not in tape.graph.constants for n in given[1:4]):
        raise UnknownWayError("weights that are computed")
    made = node.output[0] or tape.nodes(node.op_type, node.input, 1, **kept)[0]
    found: dict[int, list[str]] = {}
    for d, turned in enumerate(directions):
        run = _run(tape, given, made, [*grads, None, None][: 1 + states], d, turned)
        gates, starts = back(tape, run)
        felt = tape.node("MatMul", gates, tape.constant(run.w))
        found.setdefault(0, []).append(_flipped(tape, felt) if turned else felt)
        for slot, start in zip(_STATES, starts, strict=False):
            found.setdefault(slot, []).append(tape.node("Unsqueeze", start, tape.whole(0)))
    return {
        slot: tape.node("Concat", *parts, axis=0) if slot else tape.node("Sum", *parts)
        for slot, parts in found.items()
        if given[slot]
    }


def _run(tape: Tape, given: Sequence[str], made: str, grads: Grads, d: int, turned: bool) -> _Run:
    """One direction: number ``d``, from the last step on if ``turned``."""
    index = tape.constant(np.int64(d))

    def ordered(sequence: str) -> str:
        return _flipped(tape, sequence) if turned else sequence

    w, r = (tape.graph.floats(given[k])[d] for k in (1, 2))
    b = tape.graph.floats(given[3])[d].reshape(2, -1) if given[3] else np.zeros((2, len(w)))
    h = ordered(tape.node("Gather", made, index, axis=1))
    last = tape.node("Slice", h, tape.whole(-1), tape.whole(np.iinfo(np.int64).max), tape.whole(0))
    nothing = tape.times(tape.node("Squeeze", last, tape.whole(0)), tape.real(0))
    states = [
        tape.node("Gather", name, index, axis=0) if name else nothing
        for name in (given[slot] for slot in _STATES[: len(grads) - 1])
    ]
    first, *ends = (
        None if g is None else tape.node("Gather", g, index, axis=1 - min(k, 1))
        for k, g in enumerate(grads)
    )
    return _Run(
        x=ordered(given[0]),
        before=_delayed(tape, states[0], h),
        grad=tape.times(h, tape.real(0)) if first is None else ordered(first),
        states=states,
        ends=[end or nothing for end in ends],
        w=w,
        r=r,
        b=b.astype(np.float32),
    )


def _flipped(tape: Tape, sequence: str) -> str:
    ends = tape.whole(-1), tape.whole(np.iinfo(np.int64).min + 1)
    return tape.node("Slice", sequence, *ends, tape.whole(0), tape.whole(-1))


def _delayed(tape: Tape, start: str, sequence: str) -> str:
    """That of the step before each."""
    before = tape.node("Slice", sequence, tape.whole(0), tape.whole(-1), tape.whole(0))
    return tape.node("Concat", tape.node("Unsqueeze", start, tape.whole(0)), before, axis=0)


def _gates(tape: Tape, run: _Run, count: int) -> list[str]:
    """What each gate gets, (T, N, H), without the products of the state."""
    of_input = tape.node("MatMul", run.x, tape.constant(run.w.T))
    return _split(tape, tape.node("Add", of_input, tape.constant(run.b[0])), count)


def _split(tape: Tape, value: str, count: int) -> list[str]:
    return tape.nodes("Split", [value], count, axis=-1, num_outputs=count)


def _of_state(tape: Tape, run: _Run, count: int) -> list[str]:
    product = tape.node("MatMul", run.before, tape.constant(run.r.T))
    return _split(tape, tape.node("Add", product, tape.constant(run.b[1])), count)


def _lstm_back(tape: Tape, run: _Run) -> tuple[str, list[str]]:
    """The gates are i, o, f and c: C' = f C + i c, H' = o tanh(C')."""
    parts = zip(_gates(tape, run, 4), _of_state(tape, run, 4), strict=True)
    sums = [tape.node("Add", a, b) for a, b in parts]
    i, o, f = (tape.node("Sigmoid", s) for s in sums[:3])
    c = tape.node("Tanh", sums[3])
    _, cells = _scan(tape, _cell, [run.states[1]], [f, tape.times(i, c)])
    shown = tape.node("Tanh", cells)
    before = _delayed(tape, run.states[1], cells)
    slopes = [
        tape.times(c, sigmoid_slope(tape, i)),
        tape.times(shown, sigmoid_slope(tape, o)),
        tape.times(before, sigmoid_slope(tape, f)),
        tape.times(i, tanh_slope(tape, c)),
    ]
    of_cell = tape.times(o, tanh_slope(tape, shown))
    given = [run.grad, of_cell, f, tape.node("Concat", *slopes, axis=-1)]
    starts, gates = _scan(tape, _lstm_step, run.ends, given, tape.constant(run.r), back=True)
    return gates, starts


def _cell(write: "_Body", states: list[str], given: list[str], _: str) -> tuple[list[str], str]:
    cell = write("Add", write("Mul", given[0], states[0]), given[1])
    return [cell], cell


def _lstm_step(
    write: "_Body", states: list[str], given: list[str], r: str
) -> tuple[list[str], str]:
    grad, of_cell, f, slopes = given
    shown = write("Add", grad, states[0])
    cell = write("Add", states[1], write("Mul", shown, of_cell))
    gates = write("Mul", write("Concat", cell, shown, cell, cell, axis=-1), slopes)
    return [write("MatMul", gates, r), write("Mul", cell, f)], gates


def _gru_back(tape: Tape, run: _Run) -> tuple[str, list[str]]:
    """The gates are z, r and h = tanh(input + r * of state): H' = (1 - z) h + z H."""
    (z, r, h), (of_z, of_r, of_h) = _gates(tape, run, 3), _of_state(tape, run, 3)
    z = tape.node("Sigmoid", tape.node("Add", z, of_z))
    r = tape.node("Sigmoid", tape.node("Add", r, of_r))
    h = tape.node("Tanh", tape.node("Add", h, tape.times(r, of_h)))
    slope = tape.times(tape.node("Sub", tape.real(1), z), tanh_slope(tape, h))
    of_old = tape.times(tape.node("Sub", run.before, h), sigmoid_slope(tape, z))
    reset = tape.times(tape.times(slope, of_h), sigmoid_slope(tape, r))
    slopes = tape.node("Concat", of_old, reset, slope, axis=-1)
    behind = tape.node("Concat", of_old, reset, tape.times(slope, r), axis=-1)
    given = [run.grad, z, slopes, behind]
    starts, gates = _scan(tape, _gru_step, run.ends, given, tape.constant(run.r), back=True)
    return gates, starts


def _gru_step(write: "_Body", states: list[str], given: list[str], r: str) -> tuple[list[str], str]:
    grad, z, slopes, behind = given
    shown = write("Add", grad, states[0])
    all_gates = write("Concat", shown, shown, shown, axis=-1)
    of_state = write("MatMul", write("Mul", all_gates, behind), r)
    return [write("Add", write("Mul", shown, z), of_state)], write("Mul", all_gates, slopes)


class _Body:
    """Writes the nodes of one step."""

    def __init__(self, fresh: Callable[[str], str]) -> None:
        self._fresh = fresh
        self.nodes: list[onnx.NodeProto] = []

    def __call__(self, op: str, *inputs: str, **attributes: Any) -> str:
        made = self._fresh("step")
        self.nodes.append(helper.make_node(op, inputs, [made], **attributes))
        return made


_Step = Callable[[_Body, list[str], list[str], str], tuple[list[str], str]]


def _scan(
    tape: Tape,
    step: _Step,
    states: Sequence[str],
    sequences: Sequence[str],
    fixed: str = "",
    *,
    back: bool = False,
) -> tuple[list[str], str]:
    """All steps, one after the other: the states in the end, and what each step hands out.

    Args:
        tape: to write on.
        step: writes one step, from states, the entries of the sequences, and ``fixed``.
        states: at the start.
        sequences: read from the first entry on.
        fixed: what all steps read.
        back: begin with the last entry.
    """
    write = _Body(tape.graph.fresh)
    names = [tape.graph.fresh("step") for _ in (*states, *sequences)]
    ends, made = step(write, names[: len(states)], names[len(states) :], fixed)
    outputs = [write("Identity", name) for name in (*ends, made)]
    read, handed = (
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in group]
        for group in (names, outputs)
    )
    directions = {"scan_input_directions": [1] * len(sequences), "scan_output_directions": [1]}
    *finals, whole = tape.nodes(
        "Scan",
        [*states, *sequences],
        len(outputs),
        body=helper.make_graph(write.nodes, "step", read, handed),
        num_scan_inputs=len(sequences),
        **(directions if back else {}),
    )
    return finals, whole
