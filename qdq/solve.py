"""The solver's engine: runs steps over a state, records every change, checks the laws. Numpy only.

A problem says what must have parameters; a step sees the problem and the state so far and
returns the next state; the engine writes down what each step changed. Methods are steps, so a
recipe is a tuple of them (``qdq.steps.DEFAULT_STEPS``) and a new method is one more entry.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qdq.bias_scale import INT32_MAX, bias_scale, largest_ratio
from qdq.errors import QdqError, SolveError
from qdq.kernel import Kernel
from qdq.problem import Derived, Given, Linear, Problem, Shared, TensorPlan
from qdq.spec import QuantParams

__all__ = ["Change", "Note", "Solution", "State", "Step", "Table", "kernel_of", "needs_of", "solve"]

logger: logging.Logger = logging.getLogger(__name__)

Table = Mapping[str, QuantParams]
Constants = Mapping[str, NDArray[np.floating]]


@dataclass(frozen=True, slots=True)
class Note:
    """What a step says about one of its changes: a sentence, and numbers by name."""

    text: str
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What the steps pass on. A step returns a new one (``dataclasses.replace`` or ``set``).

    Attributes:
        params: parameters found so far, by tensor.
        constants: real values that replace those of ``Problem.constants``, by tensor (a
            corrected bias; weights rounded by error, as real values on the grid of their codes).
        floats: linear nodes that stay float, with the reason.
        notes: remarks of the present step on its changes, by tensor; the engine collects them.
    """

    params: Table = field(default_factory=dict)
    constants: Constants = field(default_factory=dict)
    floats: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Note] = field(default_factory=dict)

    def set(self, params: Table, notes: Mapping[str, Note] | None = None) -> "State":
        """This state with some parameters (and notes) added or replaced."""
        return replace(
            self, params={**self.params, **params}, notes={**self.notes, **(notes or {})}
        )

    def need(self, tensor: str, step: "Step | str") -> QuantParams:
        """The parameters of a tensor that a step depends on.

        Raises:
            SolveError: if no earlier step gave them: the steps are in a wrong order.
        """
        if tensor not in self.params:
            raise SolveError(
                f"{_name(step)} needs params of {tensor!r}; no earlier step gave them. Put the "
                "step that gives them before it (see DEFAULT_STEPS), or plan the tensor",
                tensor=tensor,
                step=_name(step),
            )
        return self.params[tensor]

    def constant(self, problem: Problem, tensor: str) -> NDArray[np.floating]:
        """The present value of a constant.

        Raises:
            SolveError: if the problem has no such constant.
        """
        value = self.constants.get(tensor)
        if value is None:
            value = problem.constants.get(tensor)  # may have to be read
        if value is None:
            raise SolveError(
                f"{tensor!r} is planned as a constant but Problem.constants has no value for it",
                tensor=tensor,
            )
        return value


class Step(Protocol):
    """One ordered stage of the solver; a frozen dataclass whose fields are its settings.

    A class attribute ``needs``, a frozenset of ``"means"`` and ``"moments"``, asks for statistics
    of the inputs of linear nodes: ``Problem.means`` and ``Problem.moments``.
    """

    def __call__(self, problem: Problem, state: State) -> State:
        """Return the next state; change neither argument."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One change of one tensor by one step.

    Attributes:
        step: class name of the step.
        tensor: the tensor.
        before: its parameters before; None if it had none.
        after: its parameters after; same as before if only its values were replaced.
        ratio: largest new scale / old scale, None without an old one.
        note: the step's remark, if it made one.
    """

    step: str
    tensor: str
    before: QuantParams | None
    after: QuantParams | None
    ratio: float | None = None
    note: Note | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """The solved problem.

    Attributes:
        params: parameters of every planned tensor, except of those that only nodes in
            ``floats`` would use.
        constants: values that replace the problem's, by tensor.
        floats: linear nodes that must stay float (no DQ on their inputs, no Q on their
            outputs), with the reason.
        changes: every change of parameters or values, and every note, in order.
    """

    params: Table
    constants: Constants
    floats: Mapping[str, str]
    changes: tuple[Change, ...]


def solve(problem: Problem, steps: Sequence[Step]) -> Solution:
    """Run the steps in order, record their changes, and check the laws at the end.

    Args:
        problem: what has to be solved.
        steps: the recipe, e.g. ``qdq.steps.DEFAULT_STEPS``.

    Returns:
        A solution that obeys every law: each planned tensor has parameters of its planned type,
        Given ones are as given, Shared ones equal their owner's, each bias has the scale of its
        input times its weight, and no integer sum of a linear node with a constant weight can
        leave int32 for any input.

    Raises:
        SolveError: if a step cannot do its work, steps are out of order, or a law is broken;
            names the tensor and, where there is one, the step.
    """
    state = State()
    changes: list[Change] = []
    for step in steps:
        try:
            after = step(problem, replace(state, notes={}))
        except QdqError as error:
            error.step = error.step or _name(step)
            raise
        found = list(_changes(_name(step), state, after))
        _check_changes(problem, found)
        logger.debug("%s changed %d tensors", _name(step), len(found))
        changes += found
        state = after
    _check_laws(problem, state)
    for linear in problem.linears:
        if linear.node not in state.floats:
            _check_linear(problem, state, linear)
    return Solution(
        params=state.params,
        constants=state.constants,
        floats=state.floats,
        changes=tuple(changes),
    )


def needs_of(steps: Sequence[Step]) -> frozenset[str]:
    """The statistics that the steps of a recipe ask for, besides ranges."""
    asked: frozenset[str] = frozenset()
    return asked.union(*(getattr(step, "needs", asked) for step in steps))


def kernel_of(problem: Problem, state: State, linear: Linear, step: Step | str) -> Kernel:
    """The integer kernel of a linear node at the present state.

    Raises:
        SolveError: if its input has no parameters yet, or a constant is missing or misshapen.
    """
    bias = None if linear.bias is None else state.constant(problem, linear.bias)
    weight = state.constant(problem, linear.weight)
    return Kernel.of(linear, state.need(linear.input, step), weight, bias)


def _name(step: Step | str) -> str:
    return step if isinstance(step, str) else type(step).__name__


def _changes(step: str, before: State, after: State) -> Iterator[Change]:
    """What differs between two states, in the order of the new one."""
    for tensor in dict.fromkeys((*after.params, *before.params, *after.constants)):
        old, new = before.params.get(tensor), after.params.get(tensor)
        values = after.constants.get(tensor) is not before.constants.get(tensor)
        note = after.notes.get(tensor)
        if (old is new or old == new) and not values and note is None:
            continue
        ratio = None if old is None or new is None else largest_ratio(old, new)
        yield Change(step=step, tensor=tensor, before=old, after=new, ratio=ratio, note=note)


def _check_changes(problem: Problem, changes: Sequence[Change]) -> None:
    """Refuse what no step may do: params of unplanned tensors, other params than given."""
    for c in changes:
        plan = problem.tensors.get(c.tensor)
        if plan is None and c.after is not None:
            raise SolveError(
                f"{c.step} gave params to {c.tensor!r}, which is not planned",
                tensor=c.tensor,
                step=c.step,
            )
        if plan is not None and isinstance(plan.source, Given) and c.after != plan.source.params:
            raise SolveError(
                f"{c.step} changed the params of {c.tensor!r}, which were given: found "
                f"{c.after}, given {plan.source.params}",
                tensor=c.tensor,
                step=c.step,
            )


def _check_laws(problem: Problem, state: State) -> None:
    """Every planned tensor has parameters, unless only float nodes would use them."""
    users: dict[str, list[str]] = {}
    for linear in problem.linears:
        for constant in (linear.weight, linear.bias):
            if constant is not None:
                users.setdefault(constant, []).append(linear.node)
    for name, plan in problem.tensors.items():
        if name in state.params:
            _check_tensor(state, plan, state.params[name])
        elif name not in users or any(node not in state.floats for node in users[name]):
            raise SolveError(
                f"{name!r} ({type(plan.source).__name__}) has no params at the end; no step gave "
                "them. Add the step for its source (see DEFAULT_STEPS)",
                tensor=name,
            )


def _check_tensor(state: State, plan: TensorPlan, found: QuantParams) -> None:
    """The parameters are of the planned type; shared ones equal their owner's."""
    match plan.source:
        case Given():
            return
        case Shared(owner):
            if found != state.params.get(owner):
                raise SolveError(
                    f"{plan.name!r} shares the params of {owner!r}, but they differ: {found} "
                    f"against {state.params.get(owner)}. Put ShareParams after the steps that "
                    "set ranges",
                    tensor=plan.name,
                )
        case _:
            if found.spec.dtype != plan.spec.dtype:
                raise SolveError(
                    f"{plan.name!r} is planned as {plan.spec.dtype} but has params of "
                    f"{found.spec.dtype}",
                    tensor=plan.name,
                )


def _check_linear(problem: Problem, state: State, linear: Linear) -> None:
    """The bias has the derived scale, and the sums of the integer kernel cannot leave int32."""
    kernel = kernel_of(problem, state, linear, "solve")
    w = state.need(linear.weight, "solve")
    planned = problem.tensors.get(linear.bias or "")
    if planned is not None and isinstance(planned.source, Derived):
        scale = np.asarray(bias_scale(kernel.x, w).reshape(-1)[kernel.entries(w)])
        found = state.need(planned.name, "solve").scale
        if not np.all(found == scale):
            factor = float(np.max(np.maximum(found / scale, scale / found)))
            raise SolveError(
                f"bias {linear.bias!r} of {linear.node!r} must have the scale of its input times "
                f"its weight; the two differ by up to a factor of "
                f"{factor:.6g}. Put DeriveBias after every step that changes scales, and give "
                "each node a bias of its own",
                tensor=linear.bias,
                node=linear.node,
            )
    load = kernel.load(w)
    if (load > INT32_MAX).any():
        i = int(load.argmax())
        raise SolveError(
            f"the int32 sum of {linear.node!r} can overflow: channel {i} reaches {load[i]:.6g}, "
            f"wanted at most {INT32_MAX}. Put FitWeightsToBias before DeriveBias, or keep the "
            "node float",
            tensor=linear.bias or linear.weight,
            node=linear.node,
        )
