"""Weight scales at which the 16-bit sums of x86 CPUs without VNNI cannot saturate."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdq.bias_scale import with_scale
from qdq.errors import ConfigError
from qdq.problem import Constant, Fixed, Linear, Problem
from qdq.solve import Note, State
from qdq.spec import INT8, UINT8, QuantParams

__all__ = ["AvoidSaturation"]

LARGEST = 127  # 255 * (127 + 1 for rounding both weights) = 32640 is the last that fits int16


@dataclass(frozen=True, slots=True)
class AvoidSaturation:
    """Raise weight scales until no pair of products leaves int16.

    Without VNNI, the kernels multiply uint8 codes by int8 codes with one instruction (vpmaddubsw)
    that adds two neighbouring products in 16 bits and saturates. The sum is safe for every input
    if ``abs(wq_k + wq_k+1) <= 128`` for neighbours of the same sign. The usual cure is 7-bit
    weights throughout; here the scale of output channel i becomes ::

        max(s_i, max_k (w_k + w_k+1) / 127, max_k -(w_k + w_k+1) / 127)   over one sign each

    so a channel in which large weights never meet keeps all 8 bits, and no channel loses more
    than one. Neighbours are taken in the order in which kernels walk: taps first, then channels
    fastest; both ways to pair them up are covered. Of a ConvTranspose any two weights may be
    neighbours. Depthwise convolutions with one output of each channel do not pair up products.
    int8 activations count as well: onnxruntime makes them uint8 on x86. Given scales stay as they
    are.

    Raises:
        ConfigError: asymmetric int8 weights, whose sums no scale keeps in 16 bits.
    """

    def __call__(self, problem: Problem, state: State) -> State:
        """Return the state with raised weight scales."""
        found: dict[str, QuantParams] = {}
        notes: dict[str, Note] = {}
        for linear in problem.linears:
            x, w = state.need(linear.input, self), state.need(linear.weight, self)
            weight = state.constant(problem, linear.weight)
            plan = problem.tensors[linear.weight]
            pairs = x.spec.dtype in (UINT8, INT8) and w.spec.dtype == INT8
            own = isinstance(plan.source, Constant | Fixed)
            if not (pairs and own) or _depthwise(linear, weight):
                continue
            if not w.spec.symmetric:
                raise ConfigError(
                    f"weight {linear.weight!r} is asymmetric int8: with a zero point, products "
                    "leave the 16 bits of a processor without VNNI whatever the scale; take "
                    "symmetric weights, or uint8 ones",
                    tensor=linear.weight,
                )
            w = found.get(linear.weight, w)
            needed = _largest_pair(linear, weight) / LARGEST
            if w.spec.axis is None:
                needed = needed.max(initial=0.0)
            scale = np.maximum(w.scale, needed.astype(w.scale.dtype))
            if (scale > w.scale).any():
                found[linear.weight] = with_scale(w, scale)
                share = float(np.mean(scale > w.scale))
                text = f"{share:.0%} of the scales raised: pairs of products would leave int16"
                notes[linear.weight] = Note(text, {"share": share})
        return state.set(found, notes)


def _depthwise(linear: Linear, weight: NDArray[np.floating]) -> bool:
    one_each = weight.shape[1] == 1 and weight.shape[0] == linear.groups
    return linear.kind == "conv" and linear.groups > 1 and one_each


def _largest_pair(linear: Linear, weight: NDArray[np.floating]) -> NDArray[np.float64]:
    """Per output channel: the largest sum of two neighbours, or one weight, of one sign; (M,)."""
    if linear.kind == "conv":
        rows = np.moveaxis(weight, 1, -1).reshape(weight.shape[0], -1)
    elif linear.kind == "conv_transpose":
        rows = np.moveaxis(weight, 1, 0).reshape(weight.shape[1], -1)
    else:
        rows = weight.reshape(-1, weight.shape[-1]).T
    padded = np.zeros((rows.shape[0], rows.shape[1] + 1))
    padded[:, :-1] = rows
    signs = [np.maximum(sign * padded, 0.0) for sign in (1.0, -1.0)]
    if linear.kind == "conv_transpose":
        # which weights meet depends on the stride, so any two may
        pairs = [np.partition(part, -2, axis=1)[:, -2:].sum(axis=1) for part in signs]
    else:
        pairs = [(part[:, :-1] + part[:, 1:]).max(axis=1, initial=0.0) for part in signs]
    largest: NDArray[np.float64] = np.maximum(*pairs)
    return largest
