"""The mean squared error of a layer's outputs as a function of its weights. Numpy only.

With weight errors e = w - w_hat of output channel i, and x what they are multiplied with::

    E[(e' x)^2] = e' E[x x'] e          E[(e' x)^2] - E[e' x]^2 = e' (E[x x'] - E[x] E[x]') e

The second form, the variance, is what remains once CorrectBias has put the mean error into the
bias; it is used where there is a bias. To the matrix H of either form is added

* ``s_x^2 / 12`` on the diagonal: the kernel multiplies with rounded inputs, whose errors are
  taken as uniform and independent;
* a share of the mean diagonal (``damping``), as H is an estimate from few samples.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qdq.kernel import Kernel
from qdq.problem import Linear, Moments, Problem
from qdq.solve import State, Step, kernel_of
from qdq.spec import QuantParams

__all__ = ["Grid", "LayerError", "layer_errors"]

_CHUNK = 1 << 22  # weights at a time, so that temporaries stay small

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class LayerError:
    """The objective of one weight: its rows in the blocks of the moments, and H of each block.

    Attributes:
        kernels: the integer nodes that use the weight.
        weight: float64 (blocks, R, B): row r of block j holds the part of an output channel that
            lies in block j; terms that fill up a block are 0.
        hessian: float64 (blocks, B, B), symmetric and positive definite.
        width: terms of a group without those that fill up.
    """

    kernels: Sequence[Kernel]
    weight: Floats
    hessian: Floats
    width: int

    @property
    def linear(self) -> Linear:
        """A node that uses the weight; all read it alike."""
        return self.kernels[0].linear

    def of(self, error: Floats) -> Floats:
        """(blocks, R): ``e' H e`` of errors (blocks, R, B)."""
        return np.asarray(((error @ self.hessian) * error).sum(-1))

    def entries(self, params: QuantParams) -> NDArray[np.intp]:
        """(blocks, R): which entry of the weight's scale serves each row."""
        groups = self.linear.groups
        per_group = self.kernels[0].entries(params).reshape(groups, -1)
        return np.repeat(per_group, self.weight.shape[0] // groups, axis=0)

    def chunks(self) -> Iterator[tuple[slice, "LayerError"]]:
        """The rows in runs that bound memory; rows do not depend on each other."""
        blocks, rows, order = self.weight.shape
        step = max(_CHUNK // max(blocks * order, 1), 1)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            yield part, replace(self, weight=self.weight[:, part])

    def tensor(self, blocks: Floats) -> Floats:
        """Values (blocks, R, B) in the layout of the weight."""
        groups, shape = self.linear.groups, self.kernels[0].weight.shape
        split = blocks.reshape(groups, -1, *blocks.shape[1:]).swapaxes(1, 2)
        rows = split.reshape(groups, blocks.shape[1], -1)[:, :, : self.width]
        if self.linear.kind == "matmul":
            return np.ascontiguousarray(rows[0].T)
        return rows.reshape(shape)


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """The codes that the rows may take, without zero point: whole numbers in [low, high].

    All (blocks, R), float64.
    """

    scale: Floats
    zero: Floats
    low: Floats
    high: Floats

    @classmethod
    def of(cls, layer: LayerError, params: QuantParams, part: slice) -> "Grid":
        """The grid of some rows of a layer."""
        entries = layer.entries(params)[:, part]
        scale = params.scale.astype(np.float64).reshape(-1)[entries]
        zero = params.zero_point.astype(np.float64).reshape(-1)[entries]
        return cls(scale, zero, params.spec.qmin - zero, params.spec.qmax - zero)

    def codes(self, values: Floats) -> Floats:
        """The nearest codes of one term of each row, (blocks, R)."""
        found: Floats = np.rint(values / self.scale)
        return np.clip(found, self.low, self.high, out=found)

    def nearest(self, values: Floats) -> Floats:
        """The nearest codes of all terms, (blocks, R, B); those of ``qdq.affine.quantize``."""
        quotient = values.astype(np.float32) / self.scale.astype(np.float32)[:, :, None]
        found: Floats = np.rint(quotient).astype(np.float64)
        return np.clip(found, self.low[:, :, None], self.high[:, :, None], out=found)


def layer_errors(
    problem: Problem, state: State, step: Step, damping: float
) -> Iterator[tuple[str, LayerError]]:
    """The objective of each weight whose moments are known, in graph order.

    Left out are weights of transposed convolutions, weights whose nodes are float or have no
    moments, and those whose nodes read them in different ways.

    Raises:
        SolveError: if an input or a weight has no parameters yet.
    """
    users: dict[str, list[Linear]] = {}
    for linear in problem.linears:
        known = linear.node in problem.moments and linear.kind != "conv_transpose"
        if known and linear.node not in state.floats:
            users.setdefault(linear.weight, []).append(linear)
    for name, linears in users.items():
        state.need(name, step)
        moments = [problem.moments[linear.node] for linear in linears]
        ways = {(n.kind, n.groups, m.mean.shape) for n, m in zip(linears, moments, strict=True)}
        if len(ways) == 1:
            kernels = [kernel_of(problem, state, linear, step) for linear in linears]
            yield name, _layer_error(kernels, problem.moments, damping)


def _layer_error(
    kernels: Sequence[Kernel], moments: Mapping[str, Moments], damping: float
) -> LayerError:
    known = [moments[k.linear.node] for k in kernels]
    total = sum(m.count for m in known)
    hessian = np.zeros_like(known[0].second)
    for kernel, m in zip(kernels, known, strict=True):
        own = m.second
        if kernel.linear.bias is not None:
            own = own - m.mean[:, :, None] * m.mean[:, None, :]
        hessian += own * (m.count / total)
        diagonal = np.einsum("bii->bi", hessian)  # a view
        diagonal += float(kernel.x.scale) ** 2 / 12 * (m.count / total)
    diagonal = np.einsum("bii->bi", hessian)
    diagonal += damping * diagonal.mean(-1, keepdims=True)
    weight, linear = kernels[0].weight.astype(np.float64), kernels[0].linear
    rows = weight.T if linear.kind == "matmul" else weight
    rows = rows.reshape(linear.groups, rows.shape[0] // linear.groups, -1)
    width = rows.shape[2]
    return LayerError(kernels, _blocked(rows, *known[0].mean.shape), hessian, width)


def _blocked(rows: Floats, blocks: int, order: int) -> Floats:
    """(groups, R, terms) to (blocks, R, B), filled up with zeros."""
    groups, count, width = rows.shape
    per_group = blocks // groups
    if per_group * order > width:
        rows = np.pad(rows, ((0, 0), (0, 0), (0, per_group * order - width)))
    split = rows.reshape(groups, count, per_group, order).swapaxes(1, 2)
    return np.ascontiguousarray(split.reshape(blocks, count, order))
