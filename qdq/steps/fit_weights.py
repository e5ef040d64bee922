"""The bias-aware solver step. Numpy only; the mathematics is in ``qdq.kernel``."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from qdq.affine import fake_quantize, is_flat, quantize, range_width
from qdq.bias_scale import INT32_MAX, largest_ratio, with_scale
from qdq.errors import ConfigError, SolveError
from qdq.kernel import Kernel, raise_scale
from qdq.problem import Constant, Fixed, Linear, Problem, Shared
from qdq.solve import Note, State, kernel_of
from qdq.spec import QuantParams
from qdq.sqnr import decibels

__all__ = ["FitWeightsToBias", "visible_error", "weight_error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FitWeightsToBias:
    """The bias-aware step: weight scales at which every bias fits beside the sums of products.

    For each output channel i of each linear node, with or without a bias::

        abs(rint(b_i / (s_x s_w,i))) + A_i <= 2**31 - 1
        A_i = max(x_zp - qmin_x, qmax_x - x_zp) * sum_k abs(wq_ik - w_zp)

    Where that fails, s_w,i is raised, as little as needed, to at least
    ``abs(b_i) / (s_x (2**31 - 1 - A_i))``; one entry of a per-tensor scale, of a grouped
    ConvTranspose or of a shared weight satisfies all that it serves. A channel of zeros takes
    its scale from its bias alone. It works from final scales, so it comes after ShareParams.

    The cost, with K products and the input's largest code distance Q = max(x_zp - qmin_x, ...)::

        abs(y - y_hat) <= max abs(x) * sum_k abs(w_ik - w_hat_ik) + sum_k abs(w_hat_ik) * s_x / 2
                          + s_x * s_w,i / 2

    of which the raise can add at most K * Q * abs(b_i) / (2 (2**31 - 1 - A_i)), about
    K * abs(b_i) * 6e-8 for 8 bits, in the channel whose bias asked for it, whatever the ratio.
    Only another channel that shares the scale can be harmed. So a node stays on integers if no
    channel's error bound grows by more than the output can show (``visible_error``), else the
    node with the greatest demand is left float and the reason put in ``State.floats``. So is a node
    with a bias whose input was 0 in every sample: nothing tells a scale for it, nor then a bias's.

    Attributes:
        margin: relative reserve on raised scales.

    Raises:
        SolveError: if a Given or Shared weight scale cannot hold a bias; it is never changed.
        ConfigError: if margin is negative or not below 1.
    """

    margin: float = 2.0**-20

    def __post_init__(self) -> None:
        if not 0 <= self.margin < 1:
            raise ConfigError(f"margin wants 0 <= margin < 1; found {self.margin}")

    def __call__(self, problem: Problem, state: State) -> State:
        """Return the state with fitted weight scales and the nodes that stay float."""
        groups: dict[str, list[Linear]] = {}
        floats = {
            linear.node: f"its input '{linear.input}' was 0 in every sample, so no scale is known"
            for linear in problem.linears
            if _is_blank(problem, state, linear.input) and _has_bias(problem, state, linear)
        }
        for linear in problem.linears:
            if linear.node not in state.floats and linear.node not in floats:
                groups.setdefault(linear.weight, []).append(linear)
        found: dict[str, QuantParams] = {}
        notes: dict[str, Note] = {}
        for name, linears in groups.items():  # kernels hold weights: those of one at a time
            present = state.need(name, self)
            kernels = [kernel_of(problem, state, linear, self) for linear in linears]
            plan = problem.tensors.get(name)
            if plan is None or not isinstance(plan.source, Constant | Fixed):
                self._check_fixed(name, kernels, present)
                continue
            start = _freed(kernels, present)
            fitted, kept = self._fit(kernels, start, state)
            stay = {k.linear.node for k in kept}
            for kernel in kernels:
                if kernel.linear.node not in stay:
                    floats[kernel.linear.node] = self._why_float(kernel, start, state)
            if kept and fitted != present:
                found[name] = fitted
                notes[name] = _note(kept, present, fitted)
        return replace(state.set(found, notes), floats={**state.floats, **floats})

    def _fit(
        self, kernels: Sequence[Kernel], start: QuantParams, state: State
    ) -> tuple[QuantParams, Sequence[Kernel]]:
        """The fitted parameters, and the kernels that run on integers with them."""
        demands = [(k, raise_scale(k, start, self.margin)) for k in kernels]
        if all(p is start for _, p in demands):
            return start, kernels
        possible = [(k, p) for k, p in demands if p is not None]
        possible.sort(key=lambda d: largest_ratio(start, d[1]))
        # The longest run of least demands that harms none of its nodes. Harm grows with the
        # run, so halving finds it: log(n) looks at n nodes that share one weight.
        low, high = 0, len(possible)
        while low < high:
            middle = (low + high + 1) // 2
            if _harmless(possible[:middle], start, state):
                low = middle
            else:
                high = middle - 1
        return _largest(start, [p for _, p in possible[:low]]), [k for k, _ in possible[:low]]

    def _why_float(self, kernel: Kernel, start: QuantParams, state: State) -> str:
        needed = raise_scale(kernel, start, self.margin)
        bias, weight = kernel.linear.bias, kernel.linear.weight
        if needed is None:
            return f"no {start.scale.dtype} scale of weight {weight!r} can hold bias {bias!r}"
        ratio = largest_ratio(start, needed)
        added = _added_error(kernel, start, needed)
        visible = visible_error(kernel, _output(kernel, state))
        worst = int(np.argmax(added / np.maximum(visible, np.finfo(np.float64).tiny)))
        text = f"bias {bias!r} asks for {ratio:.3g} times the scale of weight {weight!r}"
        if added[worst] > visible[worst]:
            return (
                f"{text}, which adds an error of up to {added[worst]:.3g} to output channel "
                f"{worst}, where {visible[worst]:.3g} can be seen"
            )
        return f"{text}, which would harm other nodes that use this weight"

    def _check_fixed(self, name: str, kernels: Sequence[Kernel], present: QuantParams) -> None:
        for kernel in kernels:
            needed = raise_scale(kernel, present, self.margin)
            if needed is present:
                continue
            hint = "no scale of its float type holds it"
            if needed is not None:
                worst = int(np.argmax(needed.scale.astype(np.float64) / present.scale))
                hint = f"the smallest scale that works is {needed.scale.reshape(-1)[worst]:.9g}"
                hint += "" if needed.scale.ndim == 0 else f" for entry {worst}"
            load = kernel.load(present)
            raise SolveError(
                f"the given scale of weight {name!r} cannot hold bias {kernel.linear.bias!r} of "
                f"{kernel.linear.node!r}: the int32 sum reaches {load.max():.6g}, wanted at most "
                f"{INT32_MAX}; {hint}. Give a larger scale, or keep the node float",
                tensor=name,
                node=kernel.linear.node,
            )


def _is_blank(problem: Problem, state: State, tensor: str) -> bool:
    """Whether a tensor's scale is made up: nothing was seen of it but 0, nor of what shares it."""
    plan = problem.tensors.get(tensor)
    if plan is not None and isinstance(plan.source, Shared):
        tensor = plan.source.owner  # of whose values it consists
    seen, params = problem.ranges.get(tensor), state.params.get(tensor)
    if seen is None or params is None:
        return False
    width = range_width(seen.low, seen.high, params.spec)
    return bool(is_flat(width, params.spec).all()) and bool((params.scale == 1).all())


def _has_bias(problem: Problem, state: State, linear: Linear) -> bool:
    return linear.bias is not None and bool(state.constant(problem, linear.bias).any())


def _output(kernel: Kernel, state: State) -> QuantParams | None:
    return state.params.get(kernel.linear.output or "")


def _largest(start: QuantParams, found: Sequence[QuantParams]) -> QuantParams:
    """The largest scale of each entry: it satisfies every kernel."""
    return with_scale(start, reduce(np.maximum, [p.scale for p in found], start.scale))


def weight_error(kernel: Kernel, w: QuantParams) -> NDArray[np.float64]:
    """(M,): ``max abs(x) * sum_k abs(w_hat_ik - w_ik)``, the error of y by rounded weights."""
    rounded = fake_quantize(kernel.weight, w).astype(np.float64)
    rounded -= kernel.weight
    np.abs(rounded, out=rounded)
    return kernel.sums(rounded) * kernel.largest_input


def visible_error(kernel: Kernel, output: QuantParams | None) -> NDArray[np.float64]:
    """(M,): the error of y from which on it can be seen in the quantized output.

    Half a step of the output, or half of the step that the channel's own largest magnitude
    ``Y_i = abs(b_i) + max abs(x) * sum_k abs(w_ik)`` would get in the input's type (Y_i / 510
    for 8 bits), whichever is larger: the second holds also where the output is not known, and
    covers channels that are a constant far outside of what the output shows.
    """
    size = kernel.sums(np.abs(kernel.weight)) * kernel.largest_input
    if kernel.bias is not None:
        size += kernel.bias
    own = size / (2.0 * (2**kernel.x.spec.dtype.bits - 1))
    step = 0.0 if output is None else float(output.scale.max()) / 2
    return np.asarray(np.maximum(own, step))


def _added_error(kernel: Kernel, before: QuantParams, after: QuantParams) -> NDArray[np.float64]:
    """(M,): by how much coarser weights raise the bound on abs(y - y_hat); never negative."""
    changed = before.scale != after.scale
    few = kernel.only(changed, before, after) if changed.ndim else None
    if few is None:
        return np.maximum(weight_error(kernel, after) - weight_error(kernel, before), 0)
    found = np.zeros(kernel.channels)
    own, (old, new) = few
    found[changed] = np.maximum(weight_error(own, new) - weight_error(own, old), 0)
    return found


def _harmless(run: Sequence[tuple[Kernel, QuantParams]], start: QuantParams, state: State) -> bool:
    """Whether no kernel of the run gets an error that can be seen, at the scale all need."""
    fitted = _largest(start, [p for _, p in run])
    return all(
        bool((_added_error(k, start, fitted) <= visible_error(k, _output(k, state))).all())
        for k, _ in run
    )


def _freed(kernels: Sequence[Kernel], present: QuantParams) -> QuantParams:
    """Parameters with the smallest normal scale where weights are 0 and only biases count.

    The scale of such an entry is provisional (see FromConstants); nothing is lost by lowering it.
    """
    weight, tiny = kernels[0].weight, np.finfo(present.scale.dtype).tiny
    rest = None
    if present.spec.axis is not None:
        rest = tuple(a for a in range(weight.ndim) if a != present.spec.axis % weight.ndim)
    width = range_width(weight.min(rest, initial=0.0), weight.max(rest, initial=0.0), present.spec)
    empty = is_flat(width, present.spec)
    if not empty.any():
        return present
    biased = np.zeros(present.scale.shape)
    for kernel in kernels:
        if kernel.bias is not None:
            biased = np.maximum(biased, kernel.per_entry(kernel.bias, present))
    return with_scale(present, np.where(empty & (biased > 0), tiny, present.scale))


def _note(kernels: Sequence[Kernel], before: QuantParams, after: QuantParams) -> Note:
    """What changed and what it cost: ratio, SQNR of the weights, levels that they still use."""
    ratio = after.scale.astype(np.float64) / before.scale
    raised, lowered = int((ratio > 1).sum()), int((ratio < 1).sum())
    weight = kernels[0].weight
    sqnr = [_sqnr_db(weight, p) for p in (before, after)]
    codes = np.unique(quantize(weight, after)).size
    parts = []
    if raised:
        parts.append(f"{raised} of {ratio.size} scales raised, up to {ratio.max():.6g} times")
    if lowered:
        parts.append(f"{lowered} scales of zero channels taken from the bias")
    text = (
        f"{' and '.join(parts)}, for the biases of {', '.join(k.linear.node for k in kernels)}: "
        f"weight SQNR {sqnr[0]:.1f} -> {sqnr[1]:.1f} dB, {codes} different codes left"
    )
    values = {
        "ratio": float(ratio.max(initial=0)),
        "raised": float(raised),
        "from_bias": float(lowered),
        "sqnr_before_db": sqnr[0],
        "sqnr_after_db": sqnr[1],
        "codes": float(codes),
    }
    return Note(text, values)


def _sqnr_db(weight: NDArray[np.floating], params: QuantParams) -> float:
    """Signal to quantization noise of the weights; inf without noise."""
    signal = float(np.square(weight, dtype=np.float64).sum())
    noise = float(np.square(fake_quantize(weight, params) - weight, dtype=np.float64).sum())
    return decibels(signal, noise)
