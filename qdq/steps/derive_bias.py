"""The solver step that gives biases their parameters. Numpy only."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qdq.bias_scale import bias_scale, bias_shape
from qdq.errors import ConfigError, SolveError
from qdq.problem import Derived, Linear, Problem
from qdq.solve import State, kernel_of
from qdq.spec import INT32, QuantParams, QuantSpec

__all__ = ["DeriveBias"]


@dataclass(frozen=True, slots=True)
class DeriveBias:
    """Biases: int32, scale = float32(s_x) * float32(s_w) per output channel, zero point 0.

    The entries of a grouped ConvTranspose are repeated for each group. A bias of one value
    beside several scales is spelled out, one value per channel (``State.constants``).

    Raises:
        SolveError: if the node is unknown, its input or weight has no parameters yet, or the
            product is not a scale.
    """

    def __call__(self, problem: Problem, state: State) -> State:
        """Return the state with the biases' parameters."""
        linears = {n.node: n for n in problem.linears}
        found: dict[str, QuantParams] = {}
        values: dict[str, NDArray[np.floating]] = {}
        for name, plan in problem.tensors.items():
            if not isinstance(plan.source, Derived):
                continue
            linear = linears.get(plan.source.linear)
            if linear is None or linear.bias != name:
                raise SolveError(
                    f"bias {name!r} is planned as derived from node {plan.source.linear!r}, "
                    "which is no linear node with that bias",
                    tensor=name,
                )
            if linear.node not in state.floats:
                found[name] = self._derive(problem, state, linear, values)
        return replace(state.set(found), constants={**state.constants, **values})

    def _derive(
        self,
        problem: Problem,
        state: State,
        linear: Linear,
        values: dict[str, NDArray[np.floating]],
    ) -> QuantParams:
        name = linear.bias or ""
        w, kernel = state.need(linear.weight, self), kernel_of(problem, state, linear, self)
        scale, axis = bias_scale(kernel.x, w), None
        if w.spec.axis is not None:
            scale = scale[kernel.entries(w)]
            bias = state.constant(problem, name)
            shape = bias_shape(bias.shape, kernel.channels)
            axis = len(shape) - 1
            if shape != bias.shape:
                values[name] = np.ascontiguousarray(np.broadcast_to(bias, shape))
        spec = QuantSpec(dtype=INT32, symmetric=True, axis=axis)
        try:
            return QuantParams(spec, scale, np.zeros(scale.shape, np.int32))
        except ConfigError as error:
            raise SolveError(
                f"bias {name!r} of {linear.node!r}: input scale times weight scale is no scale "
                f"({error}). Put FitWeightsToBias before DeriveBias, or keep the node float",
                tensor=name,
                node=linear.node,
            ) from error
