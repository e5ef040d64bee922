"""quantize() with an executor, with statistics, with progress: the same model."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
from harness import FORCED
from models import conv_chain, feeds, mlp
from onnx import numpy_helper

import qdq
from qdq.api import collect_statistics, run
from qdq.calibrate import CALIBRATORS, MSE, Calibrator, MinMax
from qdq.errors import CalibrationError, ConfigError
from qdq.problem import Problem
from qdq.solve import State
from qdq.targets import PORTABLE

NET = conv_chain(channels=8, size=8)
DATA = feeds({"x": (1, 8, 8, 8)}, 10)


def quantized(*args: Any, **more: Any) -> onnx.ModelProto:
    return run(*args, **{"target": FORCED, **more}).model


@pytest.mark.parametrize("calibrator", [c() for c in CALIBRATORS.values()], ids=lambda c: c.name)
def test_saved_statistics_stand_in_for_the_data(
    calibrator: Calibrator[Any], tmp_path: Path
) -> None:
    direct = quantized(NET, DATA, calibrator=calibrator)
    found = collect_statistics(NET, DATA, calibrator=calibrator, target=FORCED)
    found.save(tmp_path / "s.npz")
    assert quantized(NET, statistics=tmp_path / "s.npz", calibrator=calibrator) == direct
    assert quantized(NET, statistics=str(tmp_path / "s.npz"), calibrator=calibrator) == direct
    assert quantized(NET, statistics=found, calibrator=calibrator) == direct
    bytes_ = [
        m.SerializeToString(deterministic=True)
        for m in (direct, quantized(NET, statistics=found, calibrator=calibrator))
    ]
    assert bytes_[0] == bytes_[1]


def test_sizes_that_the_model_leaves_open() -> None:
    net = open_net()
    data = feeds({"x": (64, 256)}, 4)
    found = collect_statistics(net, data)
    assert qdq.quantize(net, statistics=found) == qdq.quantize(net, data)
    assert found.shapes == {"x": (64, 256)}


def open_net() -> onnx.ModelProto:
    """What pays of it depends on the number of rows, which is left open."""
    net = mlp(rows=64)
    for value in (*net.graph.input, *net.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "n"
    return net


ROWS = [*feeds({"x": (1, 256)}, 2), *feeds({"x": (64, 256)}, 2)]


@pytest.mark.parametrize("kind", [list, tuple])
def test_the_order_of_samples_of_many_sizes_does_not_matter(kind: type) -> None:
    net = open_net()
    found = [qdq.quantize(net, kind(data)) for data in (ROWS, ROWS[::-1])]
    assert found[0].SerializeToString() == found[1].SerializeToString()
    assert collect_statistics(net, kind(ROWS)).shapes == {"x": (64, 256)}


def test_parts_of_other_sizes_merge_to_the_whole() -> None:
    net = open_net()
    small, large = (collect_statistics(net, part) for part in (ROWS[:2], ROWS[2:]))
    assert small.merge(large, MSE()) == large.merge(small, MSE()) == collect_statistics(net, ROWS)


def test_executors_give_the_same_bytes() -> None:
    direct = quantized(NET, DATA).SerializeToString()
    with ThreadPoolExecutor(3) as pool:
        assert quantized(NET, DATA, executor=pool).SerializeToString() == direct
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        assert quantized(NET, DATA[::-1], executor=pool).SerializeToString() == direct
        found = collect_statistics(NET, DATA, target=FORCED, executor=pool)
    assert found == collect_statistics(NET, DATA, target=FORCED)


def test_steps_that_want_moments(tmp_path: Path) -> None:
    steps = (*qdq.steps.DEFAULT_STEPS[:-2], NeedsMoments(), *qdq.steps.DEFAULT_STEPS[-2:])
    seen: list[int] = []
    direct = quantized(NET, DATA, steps=steps).SerializeToString()
    with ThreadPoolExecutor(2) as pool:
        found = collect_statistics(NET, DATA, steps=steps, target=FORCED, executor=pool)
    found.save(tmp_path / "s.npz")
    again = quantized(NET, statistics=tmp_path / "s.npz", steps=steps, progress=seen.append)
    assert again.SerializeToString() == direct
    assert seen == []
    plain = collect_statistics(NET, DATA, target=FORCED)
    with pytest.raises(CalibrationError, match="lack"):
        quantized(NET, statistics=plain, steps=steps)


@dataclass(frozen=True)
class NeedsMoments:
    """Makes sure that they are there."""

    needs = frozenset({"moments"})

    def __call__(self, problem: Problem, state: State) -> State:
        assert {linear.node for linear in problem.linears} == problem.moments.keys()
        assert all(m.count > 10 for m in problem.moments.values())
        return state


def test_a_result_is_equal_to_itself_only() -> None:
    found, other = (run(NET, DATA, target=FORCED) for _ in range(2))
    assert found == found
    assert found != other
    assert len({found, other}) == 2
    assert found.model == other.model


def test_progress() -> None:
    for call in (quantized, collect_statistics):
        seen: list[int] = []
        call(NET, DATA, progress=seen.append)
        assert seen == list(range(1, 11))


def test_stale_statistics_are_refused() -> None:
    found = collect_statistics(NET, DATA, calibrator=MSE(), target=FORCED)
    with pytest.raises(ConfigError, match=r"made by MSE\(\), the calibrator given is MinMax\(\)"):
        quantized(NET, statistics=found, calibrator=MinMax())
    trained = onnx.ModelProto()
    trained.CopyFrom(NET)
    weight = numpy_helper.to_array(NET.graph.initializer[0]) * 2
    trained.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(weight, NET.graph.initializer[0].name)
    )
    with pytest.raises(CalibrationError, match="of another model: its fingerprint is"):
        quantized(trained, statistics=found)
    rule = qdq.Rule(op_types=("Relu",), keep_float=True)
    with pytest.raises(CalibrationError, match=r"lack tensor .*, which these options need"):
        quantized(NET, statistics=found, scheme=qdq.Scheme(rules=(rule,)), target=PORTABLE)


def test_data_or_statistics() -> None:
    found = collect_statistics(NET, DATA)
    for arguments in ({}, {"calib_reader": DATA, "statistics": found}):
        with pytest.raises(ConfigError, match="give either calibration data or statistics"):
            run(NET, **arguments)
