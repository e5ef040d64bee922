"""The 16-bit pair sums of CPUs without VNNI, simulated: no input can saturate them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdq.affine import quantize
from qdq.errors import ConfigError
from qdq.problem import Constant, Given, Linear, Observed, Problem, TensorPlan
from qdq.ranges import TensorRange
from qdq.solve import solve
from qdq.spec import INT8, UINT8, QuantParams, QuantSpec
from qdq.steps import DEFAULT_STEPS, AvoidSaturation, for_target
from qdq.subpixel import Subpixel
from qdq.targets import ORT_CPU, ORT_CPU_NO_VNNI

STEPS = for_target(DEFAULT_STEPS, ORT_CPU_NO_VNNI)


def problem(weight: np.ndarray, kind: str = "conv", groups: int = 1, axis: int | None = 0, **more):
    spec = QuantSpec(dtype=INT8, symmetric=True, axis=axis)
    linear = Linear(node="n", input="x", weight="w", bias=None, kind=kind, groups=groups)  # type: ignore[arg-type]
    return Problem(
        tensors={
            "x": TensorPlan(name="x", spec=QuantSpec(dtype=UINT8), source=Observed()),
            "w": TensorPlan(name="w", spec=spec, source=more.get("source", Constant())),
        },
        linears=(linear,),
        ranges={"x": TensorRange(0, 1)},
        constants={"w": weight.astype(np.float32)},
    )


def pair_sums(codes: np.ndarray) -> np.ndarray:
    """What vpmaddubsw would have to hold at worst: inputs of 255 where that makes it larger."""
    rows = np.moveaxis(codes, 1, -1).reshape(len(codes), -1).astype(np.int64)
    both = [np.maximum(sign * rows, 0) for sign in (1, -1)]
    return 255 * np.stack([p[:, :-1] + p[:, 1:] for p in both])


weights = st.integers(0, 2**32).flatmap(
    lambda seed: st.sampled_from([0.0, 1.0, 3.0]).map(
        lambda tail: (
            np.random.default_rng(seed).standard_normal((4, 6, 3, 3))
            * np.exp(tail * np.random.default_rng(seed + 1).standard_normal((4, 6, 3, 3)))
        )
    )
)


@given(weights, st.sampled_from([0, None]))
@settings(max_examples=60, deadline=None)
def test_no_pair_leaves_int16(weight: np.ndarray, axis: int | None) -> None:
    p = problem(weight, axis=axis)
    before, after = solve(p, DEFAULT_STEPS), solve(p, STEPS)
    codes = quantize(p.constants["w"], after.params["w"])
    assert pair_sums(codes).max() <= 32767
    assert np.all(after.params["w"].scale >= before.params["w"].scale)
    assert np.all(after.params["w"].scale <= before.params["w"].scale * 2.01)


@given(weights, st.sampled_from([1, None]), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_no_pair_of_a_transposed_convolution_leaves_int16(
    weight: np.ndarray, axis: int | None, stride: int
) -> None:
    """In the layout in which it is written, whatever the stride."""
    p = problem(weight, kind="conv_transpose", axis=axis)
    after = solve(p, STEPS)
    codes = quantize(p.constants["w"], after.params["w"])
    form = Subpixel.of(weight.shape, {"strides": [stride, stride]})
    assert pair_sums(form.weight(codes, np.int8(0))).max() <= 32767


def test_the_default_would() -> None:
    p = problem(np.full((2, 8, 1, 1), 0.5))
    assert pair_sums(quantize(p.constants["w"], solve(p, DEFAULT_STEPS).params["w"])).max() > 32767


def test_channels_in_which_large_weights_never_meet_keep_8_bits() -> None:
    weight = np.zeros((2, 6, 1, 1))
    weight[0, ::2] = [[[1.0]], [[0.9]], [[-0.8]]]  # zeros between
    weight[1, :] = 1.0
    change = solve(problem(weight), STEPS)
    scale = change.params["w"].scale
    assert scale[0] == np.float32(1 / 127)
    assert scale[1] == pytest.approx(2 / 127)
    note = next(c.note for c in change.changes if c.step == "AvoidSaturation")
    assert note is not None
    assert note.values["share"] == 0.5


def test_matmul_depthwise_and_given() -> None:
    matrix = np.ones((8, 3))
    p = problem(matrix, kind="matmul", axis=1)
    params = solve(p, STEPS).params["w"]
    codes = quantize(p.constants["w"], params)
    assert pair_sums(codes.T[:, :, None, None]).max() <= 255 * 128
    depthwise = problem(np.ones((4, 1, 3, 3)), groups=4)
    assert solve(depthwise, STEPS).params["w"].scale.max() == np.float32(1 / 127)
    spec = QuantSpec(dtype=INT8, symmetric=True)
    fixed = QuantParams(spec, np.float32(0.01), np.int8(0))
    kept = problem(np.ones((4, 6, 1, 1)), axis=None, source=Given(fixed))
    assert solve(kept, STEPS).params["w"] == fixed


def test_several_outputs_of_each_channel_are_paired_up() -> None:
    """onnxruntime has a kernel of its own for one output of each channel only."""
    p = problem(np.ones((8, 1, 3, 3)), groups=4)
    codes = quantize(p.constants["w"], solve(p, STEPS).params["w"])
    assert pair_sums(codes).max() <= 32767


@pytest.mark.parametrize("symmetric", [True, False])
def test_int8_activations_count_too(symmetric: bool) -> None:
    """onnxruntime makes them uint8 on x86."""
    p = problem(np.ones((4, 6, 3, 3)))
    spec = QuantSpec(dtype=INT8, symmetric=symmetric)
    x = TensorPlan(name="x", spec=spec, source=Observed())
    p = replace(p, tensors={**p.tensors, "x": x})
    codes = quantize(p.constants["w"], solve(p, STEPS).params["w"])
    assert pair_sums(codes).max() <= 32767


def test_only_the_target_asks_for_it() -> None:
    assert for_target(DEFAULT_STEPS, ORT_CPU) == DEFAULT_STEPS
    names = [type(s).__name__ for s in STEPS]
    assert names.index("ShareParams") < names.index("AvoidSaturation") < names.index("CorrectBias")
    own = (*DEFAULT_STEPS[:3], AvoidSaturation(), *DEFAULT_STEPS[3:])
    assert for_target(own, ORT_CPU_NO_VNNI) == own


def test_asymmetric_int8_weights_are_refused() -> None:
    """Their zero point is in every code, which no scale takes out."""
    p = problem(np.ones((4, 6, 3, 3)))
    spec = QuantSpec(dtype=INT8, axis=0)
    plan = TensorPlan(name="w", spec=spec, source=Constant())
    with pytest.raises(ConfigError, match=r"weight 'w' is asymmetric int8.*take symmetric"):
        solve(replace(p, tensors={**p.tensors, "w": plan}), STEPS)
