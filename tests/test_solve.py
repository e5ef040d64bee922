"""The engine: order of steps, record of changes, laws at the end."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest

from qdq.errors import SolveError
from qdq.problem import (
    Constant,
    Derived,
    Fixed,
    Given,
    Linear,
    Observed,
    Problem,
    Shared,
    TensorPlan,
)
from qdq.ranges import TensorRange
from qdq.solve import Note, Solution, State, Step, solve
from qdq.spec import INT8, INT32, UINT8, QuantParams, QuantSpec
from qdq.steps import DEFAULT_STEPS, DeriveBias, FitWeightsToBias, FromConstants, FromRanges

ACTIVATION = QuantSpec(dtype=UINT8)
WEIGHT = QuantSpec(dtype=INT8, symmetric=True)
BIAS = QuantSpec(dtype=INT32, symmetric=True)


def plan(name: str, spec: QuantSpec, source) -> TensorPlan:
    return TensorPlan(name=name, spec=spec, source=source)


def problem(bias: float = 0.5, **more: TensorPlan) -> Problem:
    """x -> matmul(w) + b, and the tensors in ``more``."""
    tensors = {
        "x": plan("x", ACTIVATION, Observed()),
        "w": plan("w", WEIGHT, Constant()),
        "b": plan("b", BIAS, Derived("fc")),
    }
    return Problem(
        tensors=tensors | more,
        linears=(Linear(node="fc", input="x", weight="w", bias="b", kind="matmul"),),
        ranges={"x": TensorRange(-1, 3)},
        constants={
            "w": np.array([[1.0, -2.0], [0.5, 0.25]], np.float32),
            "b": np.array([bias, -bias], np.float32),
        },
    )


@dataclass(frozen=True)
class Put:
    """Test step: sets parameters, values, float nodes and notes as told."""

    params: Mapping[str, QuantParams] | None = None
    constants: Mapping[str, np.ndarray] | None = None
    floats: Mapping[str, str] | None = None
    notes: Mapping[str, Note] | None = None

    def __call__(self, problem: Problem, state: State) -> State:
        state = state.set(self.params or {}, self.notes)
        return replace(
            state,
            constants={**state.constants, **(self.constants or {})},
            floats={**state.floats, **(self.floats or {})},
        )


def scalar(spec: QuantSpec, scale: float, zero: int = 0) -> QuantParams:
    return QuantParams(spec, np.float32(scale), np.array(zero))


def test_a_plain_problem_gets_every_parameter() -> None:
    solution = solve(problem(), DEFAULT_STEPS)
    assert isinstance(solution, Solution)
    assert set(solution.params) == {"x", "w", "b"}
    x, w, b = (solution.params[n] for n in "xwb")
    assert x.scale == np.float32(4 / 255)
    assert int(x.zero_point) == 64
    assert w.scale == np.float32(2 / 127)
    assert b.scale == x.scale * w.scale
    assert b.spec.dtype == INT32
    assert not solution.floats
    assert not solution.constants
    assert [(c.step, c.tensor) for c in solution.changes] == [
        ("FromRanges", "x"),
        ("FromConstants", "w"),
        ("DeriveBias", "b"),
    ]


def test_each_change_of_a_scale_is_recorded_with_its_ratio_and_note() -> None:
    solution = solve(problem(bias=1e9), DEFAULT_STEPS)
    (change,) = [c for c in solution.changes if c.step == "FitWeightsToBias"]
    assert change.tensor == "w"
    assert change.before is not None
    assert change.after is solution.params["w"]
    assert change.ratio == pytest.approx(float(change.after.scale / change.before.scale))
    assert change.ratio > 1
    assert change.note is not None
    assert change.note.values["ratio"] == pytest.approx(change.ratio)
    assert change.note.values["sqnr_after_db"] < change.note.values["sqnr_before_db"]


def test_solving_twice_gives_the_same() -> None:
    first, second = (solve(problem(bias=1e9), DEFAULT_STEPS) for _ in range(2))
    assert first.params == second.params
    assert [c.tensor for c in first.changes] == [c.tensor for c in second.changes]


def test_running_the_steps_again_changes_nothing() -> None:
    once = solve(problem(bias=1e9), DEFAULT_STEPS)
    twice = solve(problem(bias=1e9), (*DEFAULT_STEPS, FitWeightsToBias(), DeriveBias()))
    assert once.params == twice.params
    assert len(once.changes) == len(twice.changes)


@pytest.mark.parametrize(
    ("steps", "step", "tensor"),
    [
        ((DeriveBias(), FromRanges(), FromConstants()), "DeriveBias", "w"),
        ((FromConstants(), DeriveBias(), FromRanges()), "DeriveBias", "x"),
        ((FromRanges(), FitWeightsToBias(), FromConstants()), "FitWeightsToBias", "w"),
    ],
)
def test_a_wrong_order_of_steps_says_so(steps: tuple[Step, ...], step: str, tensor: str) -> None:
    message = f"{step} needs params of '{tensor}'; no earlier step gave them"
    with pytest.raises(SolveError, match=message) as caught:
        solve(problem(), steps)
    assert caught.value.step == step
    assert caught.value.tensor == tensor


def test_a_tensor_without_params_is_named() -> None:
    with pytest.raises(SolveError, match=r"'b' \(Derived\) has no params at the end") as caught:
        solve(problem(), DEFAULT_STEPS[:-1])
    assert caught.value.tensor == "b"


def test_without_the_bias_step_an_overflow_is_an_error_not_a_wrapping_model() -> None:
    steps = tuple(s for s in DEFAULT_STEPS if not isinstance(s, FitWeightsToBias))
    assert solve(problem(), steps).params
    with pytest.raises(SolveError, match="the int32 sum of 'fc' can overflow") as caught:
        solve(problem(bias=1e9), steps)
    assert caught.value.node == "fc"


def test_headroom_is_a_law_even_where_the_bias_alone_fits() -> None:
    """The bias is one count below the end of int32; the products need more."""
    steps = tuple(s for s in DEFAULT_STEPS if not isinstance(s, FitWeightsToBias))
    scale = float(np.float32(4 / 255)) * float(np.float32(2 / 127))
    with pytest.raises(SolveError, match="can overflow"):
        solve(problem(bias=(2**31 - 2) * scale), steps)
    assert solve(problem(bias=(2**31 - 200_000) * scale), steps).params


def test_a_scale_changed_after_the_bias_breaks_a_law() -> None:
    late = Put({"w": scalar(WEIGHT, 0.5)})
    with pytest.raises(SolveError, match="must have the scale of its input times its weight"):
        solve(problem(), (*DEFAULT_STEPS, late))


def test_given_params_may_not_be_changed_by_any_step() -> None:
    given = scalar(ACTIVATION, 0.25, 3)
    p = problem(y=plan("y", ACTIVATION, Given(given)))
    assert solve(p, DEFAULT_STEPS).params["y"] == given
    with pytest.raises(SolveError, match="Put changed the params of 'y'") as caught:
        solve(p, (*DEFAULT_STEPS, Put({"y": scalar(ACTIVATION, 0.5, 3)})))
    assert caught.value.step == "Put"


def test_params_of_an_unplanned_tensor_are_refused() -> None:
    with pytest.raises(SolveError, match="'z', which is not planned"):
        solve(problem(), (*DEFAULT_STEPS, Put({"z": scalar(ACTIVATION, 1.0)})))


def test_shared_params_must_be_those_of_the_owner_at_the_end() -> None:
    p = problem(y=plan("y", ACTIVATION, Shared("x")))
    solution = solve(p, DEFAULT_STEPS)
    assert solution.params["y"] == solution.params["x"]
    with pytest.raises(SolveError, match="'y' shares the params of 'x', but they differ"):
        solve(p, (*DEFAULT_STEPS, Put({"y": scalar(ACTIVATION, 1.0)})))


def test_params_of_another_type_than_planned_are_refused() -> None:
    p = problem(y=plan("y", ACTIVATION, Fixed(0, 1)))
    wrong = Put({"y": scalar(QuantSpec(dtype=INT8), 1.0)})
    with pytest.raises(SolveError, match="'y' is planned as uint8 but has params of int8"):
        solve(p, (*DEFAULT_STEPS, wrong))


def test_a_step_may_replace_values_and_that_is_recorded() -> None:
    bias = np.array([0.25, 0.0], np.float32)
    note = Note("corrected", {"mean_error": 0.25})
    solution = solve(problem(), (*DEFAULT_STEPS, Put(constants={"b": bias}, notes={"b": note})))
    assert solution.constants["b"] is bias
    last = solution.changes[-1]
    assert (last.step, last.tensor, last.note, last.ratio) == ("Put", "b", note, 1.0)
    assert last.before == last.after


def test_replaced_values_are_under_the_laws_too() -> None:
    bias = np.array([1e9, 0.0], np.float32)
    with pytest.raises(SolveError, match="can overflow"):
        solve(problem(), (*DEFAULT_STEPS, Put(constants={"b": bias})))


def test_constants_of_float_nodes_need_no_params() -> None:
    steps = (FromRanges(), Put(floats={"fc": "a wish"}), FitWeightsToBias(), DeriveBias())
    solution = solve(problem(), steps)
    assert solution.floats == {"fc": "a wish"}
    assert set(solution.params) == {"x"}


def test_a_constant_without_value_is_named() -> None:
    p = replace(problem(), constants={})
    with pytest.raises(SolveError, match=r"'w' is planned as a constant but .* no value"):
        solve(p, DEFAULT_STEPS)


def test_errors_of_a_step_carry_its_name() -> None:
    with pytest.raises(SolveError) as caught:
        solve(replace(problem(), ranges={}), DEFAULT_STEPS)
    assert caught.value.step == "FromRanges"
    assert caught.value.tensor == "x"
