"""Problems of one linear layer with measured second moments, for the steps that use them."""

import numpy as np
from numpy.typing import NDArray

from qdq.calibrate.moments import Layout, MomentSum
from qdq.problem import Constant, Derived, Linear, Moments, Observed, Problem, TensorPlan
from qdq.ranges import TensorRange
from qdq.spec import INT8, INT32, UINT8, QuantSpec
from qdq.steps import (
    CorrectBias,
    DeriveBias,
    FitWeightsToBias,
    FromConstants,
    FromRanges,
    ShareParams,
)

WEIGHT = QuantSpec(dtype=INT8, symmetric=True)
HEAD = (FromRanges(), FromConstants(), ShareParams())
TAIL = (CorrectBias(), FitWeightsToBias(), DeriveBias())

KINDS = {
    "dense conv": ("conv", 1, (6, 4, 3, 3)),
    "grouped conv": ("conv", 2, (6, 4, 3, 3)),
    "depthwise conv": ("conv", 5, (5, 1, 3, 3)),
    "conv 1-D": ("conv", 1, (3, 2, 5)),
    "matmul": ("matmul", 1, (12, 7)),
}


def correlated(rows: int, terms: int, blocks: int, seed: int = 0) -> Moments:
    """Moments of terms that depend on each other, with means away from 0."""
    r = np.random.default_rng(seed)
    x = r.standard_normal((blocks, terms, max(terms // 3, 1))) @ r.standard_normal(
        (blocks, max(terms // 3, 1), rows)
    )
    x += 0.1 * r.standard_normal(x.shape) + r.uniform(0, 2, (blocks, terms, 1))
    return MomentSum.of(x.astype(np.float32)).moments


def layer(
    name: str = "matmul",
    *,
    axis: bool = True,
    spec: QuantSpec = WEIGHT,
    bias: bool = True,
    blocks: int = 1,
    seed: int = 0,
    weight: NDArray | None = None,
    moments: Moments | None = None,
) -> Problem:
    """A layer "n" of input x (range 0..3), weight w, bias b; see KINDS for the names."""
    kind, groups, shape = KINDS[name]
    r = np.random.default_rng(seed)
    if weight is None:
        weight = (r.standard_normal(shape) * r.uniform(0.1, 3, shape)).astype(np.float32)
    shape = weight.shape
    channels = shape[0] if kind == "matmul" else shape[1] * groups
    layout = Layout(tensor="x", channels=channels, groups=groups, blocks=blocks, kernel=shape[2:])
    if moments is None:
        moments = correlated(400, layout.order, groups * blocks, seed)
    outputs = shape[1] if kind == "matmul" else shape[0]
    where = (1 if kind == "matmul" else 0) if axis else None
    w_spec = QuantSpec(dtype=spec.dtype, symmetric=spec.symmetric, axis=where)
    tensors = {
        "x": TensorPlan(name="x", spec=QuantSpec(dtype=UINT8), source=Observed()),
        "w": TensorPlan(name="w", spec=w_spec, source=Constant()),
    }
    constants = {"w": weight}
    if bias:
        b_spec = QuantSpec(dtype=INT32, symmetric=True, axis=0 if axis else None)
        tensors["b"] = TensorPlan(name="b", spec=b_spec, source=Derived("n"))
        constants["b"] = r.standard_normal(outputs).astype(np.float32)
    node = Linear(
        node="n",
        input="x",
        weight="w",
        bias="b" if bias else None,
        kind=kind,
        groups=groups,
    )
    return Problem(
        tensors=tensors,
        linears=(node,),
        ranges={"x": TensorRange(0, 3)},
        constants=constants,
        means={"x": r.uniform(0, 2, channels)},
        moments={"n": moments},
    )


def measured(problem: Problem, values: NDArray, *, damping: float = 0.01) -> NDArray:
    """(M,): ``e' H e`` of values in place of the weight, written out by itself."""
    linear, moments = problem.linears[0], problem.moments["n"]
    weight = problem.constants["w"].astype(np.float64)
    error = weight - values.astype(np.float64)
    if linear.kind == "matmul":
        error = error.T
    groups = linear.groups
    rows = error.reshape(error.shape[0], -1)
    size = moments.second.shape[0] // groups
    step = 3.0 / 255
    total = np.zeros(rows.shape[0])
    for i, row in enumerate(rows):
        group = i // (rows.shape[0] // groups)
        for part in range(size):
            second = moments.second[group * size + part].copy()
            mean = moments.mean[group * size + part]
            if linear.bias is not None:
                second -= np.outer(mean, mean)
            second += np.eye(len(mean)) * step**2 / 12
            second += np.eye(len(mean)) * damping * np.trace(second) / len(mean)
            e = np.zeros(len(mean))
            here = row[part * len(mean) : (part + 1) * len(mean)]
            e[: here.size] = here
            total[i] += e @ second @ e
    return total
