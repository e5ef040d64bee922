"""The contract of every operator: alone on every target, and between two integer kernels."""

import numpy as np
import onnx
import pytest
from harness import FORCED, compare, older
from models import feeds
from op_cases import CASES, Case, alone, island

from qdq.api import run
from qdq.calibrate import MinMax
from qdq.errors import ConfigError
from qdq.ops import TABLE, demand_of, register
from qdq.ops.demand import Bounded, Demand, NodeView, SameAs, TensorView
from qdq.prepare.opset import opset_of
from qdq.targets import ORT_CPU, PORTABLE

KERNELS = ORT_CPU.kernels or {}
FUSED = [c for c in CASES if c.op in KERNELS]
# onnxruntime's integer Softmax takes its exponentials from a table
APART = {"Softmax": 3.0}


def test_every_row_and_every_kernel_has_a_case() -> None:
    dynamic = {"LSTM"}  # in test_dynamic: neither codes in nor codes out
    assert {c.op for c in CASES} | dynamic == set(TABLE)
    assert set(KERNELS) <= set(TABLE)
    assert len({str(c) for c in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_alone(case: Case) -> None:
    """Codes in, codes out: within a few steps of float, and fused as unfused."""
    if case.opset > 21 and older("1.24"):
        pytest.skip("no QuantizeLinear of that opset")
    net, data = alone(case), feeds(case.activations, 6)
    found = run(net, data, target=PORTABLE, calibrator=MinMax())
    outcome = compare(net, found.model, data)
    if case.op in ("AveragePool", "HardSwish") and case.refused:  # on every target
        assert case.refused in found.plan.left_float[f"{case.op}_y"]
        return
    node = next(u for u in found.plan.placement.units if u.view.name == f"{case.op}_y")
    assert node.demand is not None, node.reason
    assert node.view.name in found.plan.quantized
    if outcome.exact.dtype.kind == "f":
        assert outcome.sqnr > case.floor
        assert outcome.unfused_sqnr > case.floor
    else:  # ArgMax: equal codes may be picked differently, most are not
        assert np.mean(outcome.exact == outcome.fused) > 0.8
    assert outcome.steps_apart <= APART.get(case.op, 1.01)
    params = found.solution.params
    made = [params[o] for o in node.outputs if o in params]
    if isinstance(node.demand.output, SameAs):
        source = params[node.view.inputs[node.demand.output.slot].name]
        assert all(p == source for p in made)
    if isinstance(node.demand.output, Bounded):
        (p,) = made
        codes = np.array([p.spec.qmin, p.spec.qmax], np.float64)
        low, high = (codes - p.zero_point) * p.scale
        assert low == pytest.approx(node.demand.output.low, abs=0.01)
        assert high == pytest.approx(node.demand.output.high, abs=0.01)


def restate(net: onnx.ModelProto, opset: int) -> None:
    for entry in net.opset_import:
        if not entry.domain:
            entry.version = opset


@pytest.mark.parametrize(
    ("case", "opset"), [(c, o) for c in FUSED for o in (13, 21, 24) if o >= c.opset], ids=str
)
def test_between_integer_kernels(case: Case, opset: int) -> None:
    """The operator that the target's table names is in the runtime's graph, and nothing float."""
    if opset == 24 and older("1.24"):
        pytest.skip("no opset 24")
    if case.name == "ceil_include" and opset < 19 and older("1.29"):
        pytest.skip("the float operator counts other padding than it does from opset 19 on")
    net, data = island(case, opset), feeds(case.activations, 4)
    found = run(net, data, target=FORCED, calibrator=MinMax())
    assert opset_of(found.model) <= 21
    if opset > 21 and not (case.op == "MaxPool" and older("1.28")):
        restate(found.model, opset)  # what a model with newer operators would have
    outcome = compare(net, found.model, data)
    assert outcome.sqnr > 27
    assert outcome.steps_apart <= APART.get(case.op, 1.01)
    ops = outcome.ops
    if case.refused:
        (reason,) = [v for k, v in found.plan.left_float.items() if k == f"{case.op}_y"]
        assert case.refused in reason
        assert ops[case.op] == 1 or ops["MatMul"] == 2  # a cubic Resize is written as two products
        return
    assert found.plan.left_float == {}
    expected = KERNELS[case.op].fused
    assert ops[expected] + ops[f"Nhwc{expected}"] >= 1
    assert ops["QuantizeLinear"] == len(case.activations)
    # a Conv hands out codes to the caller's DQ, a MatMul hands out float
    unread = case.outputs - 1
    assert ops["DequantizeLinear"] <= ops["QLinearConv"] + unread
    assert ops["DequantizeLinear"] <= 1 + unread
    assert not {"Conv", "MatMul", "Gemm"} & set(ops)


def _view(op: str, *inputs: TensorView, **attributes: object) -> NodeView:
    return NodeView(name="n", op_type=op, inputs=inputs, outputs=("y",), attributes=attributes)


X, K, I64 = TensorView("x"), TensorView("k", (8, 8), constant=True), TensorView("i", floating=False)


@pytest.mark.parametrize(
    ("view", "reason"),
    [
        (_view("Nonesuch", X), "no integer form of Nonesuch"),
        (_view("my.domain.Conv", X, K), "no integer form of my.domain.Conv"),
        (_view("Conv", X, X), "its weight 'x' is computed"),
        (_view("Conv", X, K, X), "its bias 'x' is computed"),
        (_view("Conv", K, K), "data input is a constant"),
        (_view("Gemm", X, K, alpha=2.0), "alpha=2.0"),
        (_view("Gemm", X, K, K, beta=0.5), "beta=0.5"),
        (_view("MatMul", K, X), "left side is a constant"),
        (_view("Add", K, K), "all its data inputs are constants"),
        (_view("Add", I64, X), "not float32"),
        (_view("Sigmoid", TensorView("")), "missing"),
        (_view("AveragePool", X, dilations=[1, 1]), "dilations"),
        (_view("Add", X, TensorView("k", constant=True, largest=1e4)), "as masks do"),
        (_view("Where", I64, X, TensorView("k", constant=True, largest=np.inf)), "as masks do"),
        (_view("Add", X, TensorView("k", constant=True, largest=np.nan)), "as masks do"),
    ],
)
def test_what_cannot_run_on_integers_says_why(view: NodeView, reason: str) -> None:
    found = demand_of(view)
    assert isinstance(found, str)
    assert reason in found


def test_registering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdq.ops.TABLE", dict(TABLE))
    register("my.domain.Op", Demand())
    assert demand_of(_view("my.domain.Op", X)) == Demand()
    with pytest.raises(ConfigError, match="'Conv' has a row"):
        register("Conv", Demand())
