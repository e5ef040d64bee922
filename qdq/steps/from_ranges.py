"""The solver steps that turn ranges into parameters. Numpy only."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import DTypeLike, NDArray

from qdq.affine import params_from_range
from qdq.errors import CalibrationError, ConfigError, SolveError
from qdq.problem import Constant, Derived, Fixed, Given, Observed, Problem, Shared
from qdq.ranges import TensorRange
from qdq.solve import State
from qdq.spec import QuantParams, QuantSpec

__all__ = ["FromConstants", "FromRanges", "ShareParams"]


@dataclass(frozen=True, slots=True)
class FromRanges:
    """Parameters of Observed, Fixed and Given tensors: from calibration, mathematics, the user.

    Activations get float16 scales if every constant of the problem is float16.

    Raises:
        SolveError: if calibration gave no range for an Observed tensor, or one of a wrong shape.
    """

    def __call__(self, problem: Problem, state: State) -> State:
        """Return the state with these tensors' parameters."""
        found: dict[str, QuantParams] = {}
        dtype = _activation_dtype(problem)
        for name, plan in problem.tensors.items():
            match plan.source:
                case Given(params):
                    found[name] = params
                case Observed() | Fixed():
                    range_ = _range(problem, state, name)
                    if range_ is None:
                        raise SolveError(
                            f"calibration gave no range for {name!r}; calibrate it, or set one "
                            "with Rule(tensors=..., range=...)",
                            tensor=name,
                        )
                    own = _dtype(problem, name) if name in problem.constants else dtype
                    found[name] = _params(name, range_, plan.spec, own)
        return state.set(found)


@dataclass(frozen=True, slots=True)
class FromConstants:
    """Parameters of Constant tensors from their own values, per index if their spec has an axis.

    A channel of zeros gets scale 1 for the time being: nothing in it asks for a scale but its
    bias, from which FitWeightsToBias then takes it.

    Raises:
        SolveError: if a constant holds NaN or Inf.
    """

    def __call__(self, problem: Problem, state: State) -> State:
        """Return the state with the constants' parameters."""
        found: dict[str, QuantParams] = {}
        for name, plan in problem.tensors.items():
            if isinstance(plan.source, Constant):
                range_ = _range(problem, state, name)
                if range_ is not None:
                    found[name] = _params(name, range_, plan.spec, _dtype(problem, name))
        return state.set(found)


@dataclass(frozen=True, slots=True)
class ShareParams:
    """One set of parameters for each class of tensors that must have the same ones.

    A class is an owner and the tensors that are Shared with it. Its range is the union of what
    is known of its members: calibrated, fixed, or a constant's own values. A Given owner keeps
    its parameters and the others take them.

    Raises:
        SolveError: if an owner is not planned or Shared itself, has no parameters yet, or the
            integer types within a class differ.
    """

    def __call__(self, problem: Problem, state: State) -> State:
        """Return the state with the classes' parameters."""
        classes: dict[str, list[str]] = {}
        for name, plan in problem.tensors.items():
            if isinstance(plan.source, Shared):
                _check_owner(problem, name, plan.source.owner)
                classes.setdefault(plan.source.owner, []).append(name)
        found: dict[str, QuantParams] = {}
        for owner, members in classes.items():
            params = self._class_params(problem, state, owner, members)
            found |= dict.fromkeys([owner, *members], params)
        return state.set(found)

    def _class_params(
        self, problem: Problem, state: State, owner: str, members: Sequence[str]
    ) -> QuantParams:
        params, plan = state.need(owner, self), problem.tensors[owner]
        own = _range(problem, state, owner)
        known = [r for m in members if (r := _range(problem, state, m)) is not None]
        if isinstance(plan.source, Given) or own is None or not known:
            return params
        union = reduce(TensorRange.union, known, own)
        # Where the others widen nothing, what an earlier step chose for the owner stays.
        if union == own:
            return params
        return _params(owner, union, plan.spec, params.scale.dtype)


def _check_owner(problem: Problem, name: str, owner: str) -> None:
    """A class has one planned owner, which is not Shared itself, and one integer type."""
    plan = problem.tensors.get(owner)
    if plan is None or isinstance(plan.source, Shared | Derived):
        what = "not planned" if plan is None else type(plan.source).__name__
        raise SolveError(
            f"{name!r} shares the params of {owner!r}, which is {what}; an owner must have params "
            "of its own",
            tensor=name,
        )
    source = plan.source
    dtype = source.params.spec.dtype if isinstance(source, Given) else plan.spec.dtype
    if problem.tensors[name].spec.dtype != dtype:
        raise SolveError(
            f"{name!r} ({problem.tensors[name].spec.dtype}) shares the params of {owner!r} "
            f"({dtype}); the two must have one type",
            tensor=name,
        )


def _range(problem: Problem, state: State, name: str) -> TensorRange | None:
    """What is known of a tensor's range by itself: None for Given, Derived and unknown ones."""
    plan = problem.tensors[name]
    match plan.source:
        case Given() | Derived():
            return None
        case Fixed(low, high):
            shape: tuple[int, ...] = ()
            if plan.spec.axis is not None:
                shape = (state.constant(problem, name).shape[plan.spec.axis],)
            return TensorRange(np.full(shape, low, np.float32), np.full(shape, high, np.float32))
        case Observed():
            return problem.ranges.get(name)
        case Constant():
            return _own_range(name, state.constant(problem, name), plan.spec)
        case Shared():
            if name in problem.ranges:
                return problem.ranges[name]
            known = name in problem.constants or name in state.constants
            return _own_range(name, state.constant(problem, name), plan.spec) if known else None


def _own_range(name: str, values: NDArray[np.floating], spec: QuantSpec) -> TensorRange:
    """Range of a constant's values, per index of the spec's axis; always holds 0."""
    rest = None
    if spec.axis is not None:
        rest = tuple(a for a in range(values.ndim) if a != spec.axis % values.ndim)
    low, high = values.min(rest, initial=0), values.max(rest, initial=0)
    try:
        return TensorRange(low.astype(np.float32), high.astype(np.float32))
    except CalibrationError as error:
        raise SolveError(
            f"constant {name!r} has values that are not finite ({error}); correct the model or "
            "keep the node float",
            tensor=name,
        ) from error


def _params(name: str, range_: TensorRange, spec: QuantSpec, dtype: DTypeLike) -> QuantParams:
    try:
        return params_from_range(range_, spec, scale_dtype=dtype)
    except ConfigError as error:
        raise SolveError(f"no params for {name!r}: {error}", tensor=name) from error


def _dtype(problem: Problem, name: str) -> DTypeLike:
    """The float type of a constant's scale: the constant's own."""
    return np.float16 if problem.constants[name].dtype == np.float16 else np.float32


def _activation_dtype(problem: Problem) -> DTypeLike:
    """The float type of activations' scales: float16 if all constants are."""
    if not problem.constants:
        return np.float32
    half = all(c.dtype == np.float16 for c in problem.constants.values())
    return np.float16 if half else np.float32
