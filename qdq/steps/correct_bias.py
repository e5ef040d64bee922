"""Bias correction: the mean error that rounding the weights leaves goes into the bias."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from qdq.affine import fake_quantize
from qdq.problem import Linear, Problem
from qdq.solve import State

__all__ = ["CorrectBias"]


@dataclass(frozen=True, slots=True)
class CorrectBias:
    """Add ``sum_k (w_ik - w_hat_ik) E[x_k]`` to the bias of output channel i.

    Rounded weights ``w_hat`` shift the mean of an output by exactly that, since the mean is
    linear; E[x_k] is the calibrated mean of input channel k (Nagel et al. 2019, "Data-Free
    Quantization Through Weight Equalization and Bias Correction", section 4.2, with the measured
    mean in place of one from batch normalization). At padded borders of a convolution the mean
    is that of the unpadded input. It costs nothing at run time.

    Linear nodes without a bias, transposed convolutions, and inputs without means are left as
    they are.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"means"})

    def __call__(self, problem: Problem, state: State) -> State:
        """Return the state with corrected biases."""
        corrected: dict[str, NDArray[np.floating]] = {}
        for linear in problem.linears:
            mean = problem.means.get(linear.input)
            if linear.bias is None or mean is None or linear.node in state.floats:
                continue
            if linear.kind == "conv_transpose":
                continue  # its stride decides how many taps an output sees; not known here
            # the float model's weights: an earlier step may have rounded those of the state
            exact = State().constant(problem, linear.weight).astype(np.float64)
            weight = state.constant(problem, linear.weight)
            rounded = fake_quantize(weight, state.need(linear.weight, self))
            shift = _shift(linear, exact - rounded, mean)
            bias = state.constant(problem, linear.bias)
            corrected[linear.bias] = (bias + shift).astype(bias.dtype)
        return replace(state, constants={**state.constants, **corrected})


def _shift(
    linear: Linear, error: NDArray[np.float64], mean: NDArray[np.float64]
) -> NDArray[np.float64]:
    """sum_k error_ik * mean_k for each output channel i, (M,)."""
    if linear.kind == "matmul":
        result: NDArray[np.float64] = mean @ error
        return result
    groups = linear.groups
    taps = error.reshape(*error.shape[:2], -1).sum(-1)
    per_group = mean.reshape(groups, -1)  # (groups, C / groups)
    rows = taps.reshape(groups, -1, taps.shape[1])  # (groups, M / groups, C / groups)
    shift: NDArray[np.float64] = np.einsum("gmc,gc->gm", rows, per_group).ravel()
    return shift
