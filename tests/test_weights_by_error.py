"""Second moments to emitted codes: both steps through onnxruntime, fused and unfused."""

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import onnx
import pytest
from harness import FORCED, Feed, Outcome, compare, dequantized
from harness import quantized as through_api
from models import conv_chain, feeds, mlp, model, node, rng, weights

from qdq.affine import fake_quantize
from qdq.api import make_problem
from qdq.balancing.layouts import moment_layouts
from qdq.calibrate import MinMax, ranges_from
from qdq.emit import emit
from qdq.plan import make_plan
from qdq.prepare import prepare
from qdq.problem import Problem
from qdq.scheme import Scheme
from qdq.solve import Solution, Step, solve
from qdq.spec import UINT8, QuantSpec
from qdq.statistics.sharding import collect
from qdq.steps import (
    DEFAULT_STEPS,
    CorrectBias,
    FitWeightScales,
    RoundWeights,
)

AT = next(k for k, s in enumerate(DEFAULT_STEPS) if isinstance(s, CorrectBias))
ROUND = (*DEFAULT_STEPS[:AT], RoundWeights(), *DEFAULT_STEPS[AT:])
BOTH = (*DEFAULT_STEPS[:AT], FitWeightScales(), RoundWeights(), *DEFAULT_STEPS[AT:])


def quantized(
    net: onnx.ModelProto,
    samples: Sequence[Feed],
    steps: Sequence[Step],
    scheme: Scheme | None = None,
) -> tuple[onnx.ModelProto, Problem, Solution]:
    """The stages of ``qdq.quantize``, with second moments."""
    prepared = prepare(net)
    plan = make_plan(prepared, scheme or Scheme(), FORCED)
    axes = {n.input: -1 if n.kind == "matmul" else 1 for n in plan.linears}
    layouts = moment_layouts(prepared, plan)
    found = collect(
        prepared, tuple(plan.observed), axes, samples, MinMax(), layouts=layouts.values()
    )
    ranges = ranges_from(found.summaries, plan.observed, MinMax())
    problem = make_problem(prepared, plan, ranges, found.means)
    problem = Problem(
        tensors=problem.tensors,
        linears=problem.linears,
        ranges=problem.ranges,
        constants=problem.constants,
        means=problem.means,
        moments={name: found.moments[layout].moments for name, layout in layouts.items()},
    )
    solution = solve(problem, steps)
    return emit(prepared, plan, solution), problem, solution


def smooth(shape: Sequence[int], count: int = 8) -> list[dict[str, np.ndarray]]:
    """Inputs whose neighbours resemble each other, as those of real models do."""
    r = rng(3)
    mix = r.standard_normal((shape[1], max(shape[1] // 8, 1)))
    found = []
    for _ in range(count):
        base = r.standard_normal((shape[0], mix.shape[1], *shape[2:]))
        for axis in range(2, len(shape)):
            base = base + np.roll(base, 1, axis) + np.roll(base, 2, axis)
        x = np.einsum("cm,nm...->nc...", mix, base) + 0.05 * r.standard_normal(shape)
        found.append({"x": x.astype(np.float32)})
    return found


def grouped() -> onnx.ModelProto:
    """Depthwise 3x3, Relu, grouped 1x1 and a transposed convolution, which is left alone."""
    constants = {
        "w0": weights(32, 1, 3, 3, seed=0),
        "b0": rng(1).standard_normal(32).astype(np.float32),
        "w1": weights(32, 8, 1, 1, seed=2),
        "w2": weights(32, 8, 2, 2, seed=3),
    }
    nodes = [
        node("Conv", ["x", "w0", "b0"], "a", group=32, pads=[1] * 4, strides=[2, 2]),
        node("Relu", ["a"], "ar"),
        node("Conv", ["ar", "w1"], "b", group=4),
        node("ConvTranspose", ["b", "w2"], "y", strides=[2, 2]),
    ]
    shape = [1, 32, 16, 16]
    return model(nodes, {"x": shape}, {"y": [1, 8, 16, 16]}, constants)


NETS = {
    "conv": (conv_chain(), [1, 32, 24, 24]),
    "mlp": (mlp(rows=32, width=64), [32, 64]),
    "groups": (grouped(), [1, 32, 16, 16]),
}


def agrees(outcome: Outcome) -> None:
    assert outcome.steps_apart < 3
    assert outcome.sqnr > 20


@pytest.mark.parametrize("steps", [ROUND, BOTH], ids=["round", "both"])
@pytest.mark.parametrize("name", NETS)
def test_fused_and_unfused_agree_and_the_codes_are_as_chosen(name: str, steps: tuple) -> None:
    net, shape = NETS[name]
    samples = smooth(shape)
    result, problem, solution = quantized(net, samples, steps)
    agrees(compare(net, result, samples))
    changed = 0
    for linear in problem.linears:
        if linear.kind != "conv_transpose":
            values = dequantized(result, linear.weight)
            assert np.allclose(values, solution.constants[linear.weight], rtol=1e-6, atol=0)
            error = values - problem.constants[linear.weight]
            scale = solution.params[linear.weight].scale.max()
            changed += int((np.abs(error) > 0.51 * scale).sum())
        else:
            assert linear.weight not in solution.constants
    assert changed > 5


@pytest.mark.parametrize("name", ["conv", "mlp"])
def test_the_weights_cost_less_than_rounded_to_nearest(name: str) -> None:
    """Measured on other samples, with weights alone rounded."""
    net, shape = NETS[name]
    samples = smooth(shape, 16)
    found = []
    for steps in (DEFAULT_STEPS, ROUND, BOTH):
        _, problem, solution = quantized(net, samples[:12], steps)
        rounded = onnx.ModelProto()
        rounded.CopyFrom(prepare(net))
        for tensor in rounded.graph.initializer:
            plan = problem.tensors.get(tensor.name)
            if plan is not None:
                value = solution.constants.get(tensor.name, problem.constants[tensor.name])
                if any(n.weight == tensor.name for n in problem.linears):
                    value = fake_quantize(value, solution.params[tensor.name])
                tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
        found.append(compare(net, rounded, samples[12:]).unfused_sqnr)
    today, by_error, both = found
    assert by_error > today + 2
    assert both > today + 2


@pytest.mark.parametrize("per_channel", [True, False])
def test_uint8_weights_with_a_zero_point(per_channel: bool) -> None:
    net, shape = NETS["mlp"]
    samples = smooth(shape)
    scheme = Scheme(weight=QuantSpec(dtype=UINT8), per_channel=per_channel)
    result, _, solution = quantized(net, samples, BOTH, scheme)
    agrees(compare(net, result, samples))
    assert solution.params["w0"].zero_point.any()


def test_the_order_of_the_samples_does_not_matter() -> None:
    net, shape = NETS["groups"]
    samples = smooth(shape, 3)
    samples[1]["x"] *= 30  # another range of exponents
    results = {
        quantized(net, [samples[i] for i in order], BOTH)[0].SerializeToString()
        for order in permutations(range(3))
    }
    assert len(results) == 1


def test_independent_inputs_gain_little_and_lose_nothing() -> None:
    net, shape = NETS["mlp"]
    samples = feeds({"x": shape})
    plain, by_error = (
        compare(net, quantized(net, samples, steps)[0], samples).sqnr
        for steps in (DEFAULT_STEPS, ROUND)
    )
    assert by_error > plain - 0.5


def test_a_recipe_is_all_that_a_caller_gives() -> None:
    net, shape = NETS["mlp"]
    samples = smooth(shape)
    result, outcome = through_api(net, samples, steps=BOTH)
    agrees(outcome)
    _, _, solution = quantized(net, samples, BOTH)
    for name in ("w0", "w1"):
        assert np.array_equal(result.solution.constants[name], solution.constants[name])
    assert {c.step for c in result.solution.changes} >= {"FitWeightScales", "RoundWeights"}
    assert through_api(net, samples)[0].solution.constants.keys().isdisjoint({"w0", "w1"})
