"""What small errors in each tensor do to a model's outputs, for all tensors in one run.

To first order an error e of a tensor changes the outputs by J e. For signs z, drawn at random
and weighted so that z' z stands for the outputs' relative error, z' J is found for all tensors at
once by going back through the graph (reverse accumulation; Griewank and Walther, "Evaluating
Derivatives", 2008). For rounding, whose errors are independent with variance v, the expected
squared change is v times the energy of z' J: Hutchinson's estimator of the trace of J' J (1989).

That is exact for small noise. It knows what the noise in the tensor itself does not: a logarithm
that blows up what is near 0, an average that takes noise out, a gate that is closed.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import onnx
from onnx import TensorProto

import qdq.placement.choosing
import qdq.placement.normalizing
import qdq.placement.recurrence
import qdq.placement.transposes  # noqa: F401 -- these register their rules
from qdq.facts import DEFAULT
from qdq.graph import Graph
from qdq.nested import captured_names
from qdq.placement.gradients import RULES, Grads
from qdq.placement.harm import COMMON, LONE, POSITIONS
from qdq.placement.tape import Tape, UnknownWayError
from qdq.placement.wholes import judged, shown_by

__all__ = ["Adjoint", "adjoint"]

log: logging.Logger = logging.getLogger(__name__)

_OPSET = 18  # the first one whose reductions have all their axes as inputs
_OTHER_FLOATS = (TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_STEP = 1 / 255  # between codes, of the largest value
_PRIME = (1 << 31) - 1
_FACTOR = 48271  # a primitive root of the prime


@dataclass(frozen=True, slots=True)
class Adjoint:
    """Nodes that find the energies.

    Attributes:
        names: the tensors whose gradient is known everywhere, and tables.
        output: has the energy of each one's gradient, in their order: the squared relative error
            of the outputs for independent errors of variance 1 in each element. For a table, of
            the square of the largest value in its row.
        added: the nodes and constants, beside those of the model.
    """

    names: tuple[str, ...]
    output: str
    added: onnx.GraphProto


def adjoint(
    model: onnx.ModelProto,
    tensors: Iterable[str],
    tables: Mapping[str, Sequence[str]] | None = None,
) -> Adjoint | None:
    """The nodes for a prepared model.

    Args:
        model: it is not changed.
        tensors: activations that may be rounded.
        tables: constant whose rows are picked → the tensors that hold picked rows.

    Returns:
        None if nothing can be told: the model has no floating-point output, an old opset, or
        nodes without a rule behind each of the tensors.
    """
    graph = Graph(model)
    by = judged(graph)
    if graph.opset < _OPSET or not by.outputs:
        return None
    wanted = [n for n in tensors if n in graph.producer or n in graph.inputs]
    tables = tables or {}
    tape = Tape(graph, _live(graph, [*wanted, *(n for names in tables.values() for n in names)]))
    signals = {
        **{_before_cast(graph, n): _variation if n in by.varied else _signal for n in by.weighed},
        **{n: _variation if n in by.varied else _differences for n in by.logits},
        **dict.fromkeys(by.lone, _lone),
    }
    heads = [n for n in signals if n in tape.live and graph.elem_type(n) in (0, TensorProto.FLOAT)]
    grads: dict[str, list[str]] = {}
    for k, name in enumerate(heads):
        seed = _seed(tape, name, (k, len(heads)), signals[name])
        grads.setdefault(name, []).append(seed)
    dark = _walk(tape, grads)

    def is_known(name: str) -> bool:
        return name in grads and name not in dark and bool(graph.shape(name))

    known = [n for n in wanted if is_known(n)]
    picked = {t: names for t, names in tables.items() if all(map(is_known, names))}
    if not (known or picked):
        return None
    known.sort(key=tape.rank)  # those of one rank side by side; else in their order
    shown = shown_by(graph, heads)
    energies = [
        tape.flat(_energies(tape, [_felt(tape, grads, n, n in shown) for n in names]))
        for _, names in groupby(known, tape.rank)
    ]
    energies += [_rows(tape, grads, table, names) for table, names in picked.items()]
    found = tape.node("Concat", *energies, axis=0)
    return Adjoint((*known, *picked), found, tape.added)


def _before_cast(graph: Graph, output: str) -> str:
    """The tensor that an output of another floating-point type is cast from, where that is all."""
    maker = graph.maker(output)
    if maker is None or maker.op_type != "Cast" or output not in graph.outputs:
        return output
    other = graph.elem_type(output) in _OTHER_FLOATS and not graph.uses(output)
    return str(maker.input[0]) if other else output


def _is_other(graph: Graph, name: str) -> bool:
    """Whether a tensor is of another floating-point type, and more than the cast at the end."""
    return graph.elem_type(name) in _OTHER_FLOATS and _before_cast(graph, name) == name


def _live(graph: Graph, tensors: Sequence[str]) -> set[str]:
    """The tensors, and all floating-point ones that depend on them."""
    live = set(tensors)
    for node in graph.nodes:
        if any(n in live for n in node.input):
            live.update(
                o for o in node.output if o and graph.elem_type(o) in (0, TensorProto.FLOAT)
            )
    return live


def _walk(tape: Tape, grads: dict[str, list[str]]) -> set[str]:
    """Go back through all nodes; returns the tensors from which a way ends at an unknown node."""
    dark: set[str] = set()
    for index in range(len(tape.graph.nodes) - 1, -1, -1):
        node = tape.graph.nodes[index]
        live = [n for n in node.input if n in tape.live]
        dark.update(n for n in captured_names(node) if n in tape.live)
        if not live:
            continue
        if any(o in dark or _is_other(tape.graph, o) for o in node.output):
            dark.update(live)
        if not any(o in grads for o in node.output):
            continue
        given = [_total(tape, grads, o) if o in grads else None for o in node.output]
        try:
            found = _back(tape, node, given)
        except (UnknownWayError, LookupError, TypeError, ValueError) as e:
            # the latter: a node in a form that its rule does not expect. Noise alone can do without
            log.debug("no way back through %s '%s': %r", node.op_type, node.name, e)
            dark.update(live)
            continue
        # a rule may know the way of some inputs only: the scale of a norm, say, is a constant
        dark.update(n for k, n in enumerate(node.input) if n in tape.live and k not in found)
        for slot, grad in found.items():
            if node.input[slot] in tape.live:
                grads.setdefault(node.input[slot], []).append(grad)
    return dark


def _back(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    """The gradients of a node's inputs, by slot."""
    if node.domain not in DEFAULT or node.op_type not in RULES:
        raise UnknownWayError(node.op_type)
    return RULES[node.op_type](tape, node, grads)


def _total(tape: Tape, grads: dict[str, list[str]], name: str) -> str:
    """The sum of the gradients from all readers of a tensor."""
    parts = grads[name]
    if len(parts) > 1:
        grads[name] = parts = [tape.node("Sum", *parts)]
    return parts[0]


def _felt(tape: Tape, grads: dict[str, list[str]], name: str, shown: bool) -> str:
    """The gradient of a tensor; of what the outputs show, weighted by what rounding does there.

    Rounding never changes a value by more than itself, since 0 is a code: what is 0 stays so, and
    what is below a step has less than the mean error. A faint channel of an output, of which most
    is 0 behind a Relu, would else count as lost many times over.
    """
    total = _total(tape, grads, name)
    if not shown:
        return total
    value = tape.where(tape.finite(name), name)
    peak = tape.node("ReduceMax", tape.node("Abs", value), keepdims=1)
    square = tape.node("Pow", tape.times(value, tape.inverse(peak)), tape.real(2))
    error = tape.node("Min", square, tape.real(_STEP**2 / 12))
    mean = tape.node("ReduceMean", error, keepdims=1)
    return tape.times(total, tape.node("Sqrt", tape.times(error, tape.inverse(mean))))


def _rows(tape: Tape, grads: dict[str, list[str]], table: str, picked: Sequence[str]) -> str:
    """The energy of a table's gradient, by all that picks from it: one number."""
    inner = tape.whole(*range(1 - tape.rank(table), 0))  # from the end: the axes of a row
    weighted = [
        tape.times(
            _total(tape, grads, name),
            tape.node("ReduceMax", tape.node("Abs", name), inner, keepdims=1),
        )
        for name in picked
    ]
    parts = [tape.flat(_energies(tape, [value])) for value in weighted]
    return parts[0] if len(parts) == 1 else tape.node("Sum", *parts)


def _energies(tape: Tape, values: Sequence[str]) -> str:
    """Of values of one rank, above 0: one number each."""
    found = [tape.node("ReduceSumSquare", value, keepdims=1) for value in values]
    return tape.node("Concat", *found, axis=0)


def _seed(
    tape: Tape, name: str, head: tuple[int, int], signal_of: Callable[[Tape, str, str], str]
) -> str:
    """Signs over the root of the signal's energy: the mean relative error of ``harm``.

    Args:
        tape: to write on.
        name: the output, or logit.
        head: which one of how many; each counts the same.
        signal_of: writes the energies of its signal, from its name and its finite values.
    """
    finite = tape.finite(name)
    signal = signal_of(tape, name, tape.where(finite, name))
    count = tape.node("Cast", tape.node("Size", signal), to=1)
    whole = tape.times(tape.times(signal, count), tape.real(head[1]))
    weight = tape.where(finite, tape.node("Sqrt", tape.inverse(whole)))
    return tape.times(_signs(tape, name, head[0]), weight)


def _signal(tape: Tape, name: str, value: str) -> str:
    """The energy of each channel."""
    rank = len(tape.graph.shape(name) or ())
    axes = [tape.whole(*(k for k in range(rank) if k != 1))] if rank > 2 else []
    return tape.node("ReduceSumSquare", value, *axes, keepdims=1)


def _differences(tape: Tape, _: str, value: str) -> str:
    """That of logits around their mean."""
    middle = tape.node("ReduceMean", value, keepdims=1)
    return tape.node("ReduceSumSquare", tape.node("Sub", value, middle), keepdims=1)


def _variation(tape: Tape, name: str, value: str) -> str:
    """That of what differs between positions; of few positions, that of all."""
    positions = tape.whole(*range(tape.rank(name) - 1))
    common = tape.node("ReduceMean", value, positions, keepdims=1)
    varied = tape.node("ReduceSumSquare", tape.node("Sub", value, common), keepdims=1)
    energy = tape.node("ReduceSumSquare", value, keepdims=1)
    least = tape.times(tape.node("Size", common), tape.constant(np.int64(POSITIONS)))
    few = tape.node("Less", tape.node("Size", value), least)
    several = tape.node("Max", varied, tape.times(energy, tape.real(COMMON)))
    return tape.node("Where", few, energy, several)


def _lone(tape: Tape, _: str, value: str) -> str:
    """That of logits that stand alone."""
    least = tape.node("Max", tape.node("Abs", value), tape.real(LONE))
    return tape.node("ReduceSumSquare", least, keepdims=1)


def _signs(tape: Tape, name: str, head: int) -> str:
    """1 and -1 as if at random, the same in every run: by squares modulo a prime."""
    prime = tape.constant(np.int64(_PRIME))
    number = tape.node("Add", tape.numbered(name), tape.constant(np.int64(1)))
    # each head has its own: where two are alike, or opposite, their errors must not add up
    factor = tape.constant(np.int64(pow(_FACTOR, head + 1, _PRIME)))
    spread = tape.node("Mod", tape.times(number, factor), prime)
    square = tape.node("Mod", tape.times(spread, spread), prime)
    high = tape.node("Less", square, tape.constant(np.int64(_PRIME // 2)))
    return tape.node("Where", high, tape.real(1), tape.real(-1))
