"""Faults of other quantizers around calibration, each of which must not be ours."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from harness import FORCED, quantized
from models import conv_chain, feeds, model, node, rng, weights

import qdq
from qdq import MSE, CalibrationError, Entropy, MinMax, ModelError, Percentile, Rule, Scheme
from qdq.api import run
from qdq.stages import begin

SHAPE = [1, 8, 6, 6]


def scales(net: onnx.ModelProto, data, calibrator=None, **settings) -> dict[str, object]:
    """Scale of every tensor, as number or list."""
    settings = {"target": FORCED, "calibrator": calibrator or MinMax(), **settings}
    found = run(net, data, **settings).solution.params
    return {name: p.scale.tolist() for name, p in found.items()}


def one_conv() -> onnx.ModelProto:
    return model(
        [node("Conv", ["x", "w"], "y")], {"x": SHAPE}, {"y": SHAPE}, {"w": weights(8, 8, 1, 1)}
    )


def heavy_tails(count: int = 512) -> list[dict]:
    """Laplace's distribution: the best 8-bit range ends before its largest values."""
    return [{"x": rng(k).laplace(size=SHAPE).astype(np.float32)} for k in range(count)]


class TestCalibratorsDiffer:
    @pytest.mark.parametrize("calibrator", [Entropy(), MSE(), Percentile()], ids=repr)
    def test_on_heavy_tails_each_clips_what_min_max_keeps(self, calibrator) -> None:
        net, data = one_conv(), heavy_tails()
        widest, found = scales(net, data)["x"], scales(net, data, calibrator)["x"]
        assert found < 0.9 * widest

    @pytest.mark.parametrize("calibrator", [Entropy(), MSE(), Percentile()], ids=repr)
    def test_on_one_sided_data_all_codes_are_used(self, calibrator) -> None:
        data = [{"x": np.abs(f["x"])} for f in heavy_tails(64)]
        found = run(one_conv(), data, calibrator=calibrator, target=FORCED).solution.params["x"]
        assert found.zero_point == 0

    def test_on_uniform_data_nothing_is_clipped_much(self) -> None:
        data = [{"x": rng(k).uniform(-1, 1, SHAPE).astype(np.float32)} for k in range(16)]
        for calibrator in (Entropy(), MSE(), Percentile()):
            assert scales(one_conv(), data, calibrator)["x"] == pytest.approx(2 / 255, rel=0.05)


class TestEverySampleCounts:
    @pytest.mark.parametrize("position", [0, 3, 15, 16, 30, 31])
    @pytest.mark.parametrize("calibrator", [MinMax(), MSE()], ids=repr)
    def test_an_extreme_sample_anywhere(self, calibrator, position: int) -> None:
        """No window, no averaging, nothing dropped after some number of samples."""
        data = [{"x": f["x"] * 0.01} for f in feeds({"x": SHAPE}, 32)]
        data[position] = {"x": np.linspace(-8, 8, 288, dtype=np.float32).reshape(SHAPE)}
        found = scales(one_conv(), data, calibrator)["x"]
        assert found == pytest.approx(16 / 255, rel=0.3)

    @pytest.mark.parametrize("calibrator", [MinMax(), MSE(), Entropy(), Percentile()], ids=repr)
    def test_the_order_of_the_samples_does_not_matter(self, calibrator) -> None:
        data = heavy_tails(12)
        # exact sums of the bias correction are of other samples' business
        steps = tuple(s for s in qdq.steps.DEFAULT_STEPS if type(s).__name__ != "CorrectBias")
        forth = scales(conv_chain(8, 6), data, calibrator, steps=steps)
        back = scales(conv_chain(8, 6), data[::-1], calibrator, steps=steps)
        assert forth == back

    @pytest.mark.parametrize("kind", [list, tuple, iter])
    def test_any_iterable_will_do(self, kind) -> None:
        data = feeds({"x": SHAPE}, 4)
        assert scales(one_conv(), kind(data)) == scales(one_conv(), data)


class TestVariableShapes:
    @pytest.mark.parametrize("calibrator", [MinMax(), MSE(), Entropy(), Percentile()], ids=repr)
    def test_samples_of_several_sizes(self, calibrator) -> None:
        nodes = [node("Conv", ["x", "w"], "a"), node("Relu", ["a"], "r")]
        nodes.append(node("Conv", ["r", "w"], "y"))
        shape = ["n", 8, "h", "w_"]
        net = model(nodes, {"x": shape}, {"y": shape}, {"w": weights(8, 8, 1, 1)})
        sizes = [(1, 8, 4, 4), (1, 8, 7, 3), (2, 8, 5, 5), (3, 8, 1, 9)]
        data = [{"x": rng(k).standard_normal(s).astype(np.float32)} for k, s in enumerate(sizes)]
        _, outcome = quantized(net, data, calibrator=calibrator)
        assert outcome.ops["QLinearConv"] == 2
        assert outcome.sqnr > 20


class TestNotFinite:
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_in_a_weight(self, bad: float) -> None:
        net = one_conv()
        w = weights(8, 8, 1, 1)
        w[3, 4] = bad
        net.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(w, "w"))
        with pytest.raises(ModelError, match=r"weight 'w' .* NaN or Inf") as e:
            scales(net, feeds({"x": SHAPE}, 2))
        assert e.value.tensor == "w"

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_in_the_data(self, bad: float) -> None:
        data = feeds({"x": SHAPE}, 4)
        data[2]["x"][0, 1, 2, 3] = bad
        with pytest.raises(CalibrationError, match=r"'x' of sample 2 has 1 of 288 values") as e:
            scales(one_conv(), data)
        assert (e.value.tensor, e.value.sample) == ("x", 2)

    @pytest.mark.parametrize("calibrator", [MinMax(), MSE(), Entropy(), Percentile()], ids=repr)
    @pytest.mark.parametrize("low", [0.0, -1.0])
    def test_in_an_activation(self, low: float, calibrator) -> None:
        """Log of zero is -Inf, of less NaN: in sample 1, in the tensor that a Conv reads."""
        nodes = [node("Log", ["x"], "l"), node("Conv", ["l", "w"], "y")]
        net = model(nodes, {"x": SHAPE}, {"y": SHAPE}, {"w": weights(8, 8, 1, 1)})
        data = [{"x": np.abs(f["x"]) + 1} for f in feeds({"x": SHAPE}, 3)]
        data[1]["x"][0, 0, 0, 0] = low
        with pytest.raises(CalibrationError, match=r"'l', calibration sample 1: .*NaN or Inf") as e:
            scales(net, data, calibrator)
        assert (e.value.tensor, e.value.sample) == ("l", 1)


MEASURE = """
import resource, sys
import numpy as np
sys.path.insert(0, {tests!r})
from models import conv_chain
from harness import FORCED
import qdq

net = conv_chain(8, 64, depth=4)
rng = np.random.default_rng(0)

def samples(count):
    for _ in range(count):
        yield {{"x": rng.standard_normal((1, 8, 64, 64), np.float32)}}

def peak(count):
    qdq.quantize(net, samples(count), target=FORCED, calibrator=qdq.{calibrator}())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

print(peak(32), peak(256))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
@pytest.mark.parametrize("calibrator", ["MSE", "MinMax"])
def test_memory_does_not_grow_with_the_number_of_samples(calibrator: str) -> None:
    """To keep what 224 more samples give (nine tensors of 128 KiB) would take 250 MiB."""
    code = MEASURE.format(tests=str(Path(__file__).parent), calibrator=calibrator)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    few, many = map(int, done.stdout.split())
    assert many - few < 16 * 1024


def test_a_range_that_the_data_never_leaves_zero() -> None:
    """A dead tensor has a scale, and the model runs."""
    data = [{"x": np.zeros(SHAPE, np.float32)}] * 2
    _, outcome = quantized(one_conv(), data)
    np.testing.assert_array_equal(outcome.fused, 0)


def test_a_rule_sets_a_range_instead_of_the_data() -> None:
    scheme = Scheme(rules=(Rule(tensors="x", range=(0.0, 25.5)),))
    assert scales(one_conv(), feeds({"x": SHAPE}, 2), scheme=scheme)["x"] == pytest.approx(0.1)


def test_the_first_sample_is_kept_though_a_reader_may_use_its_buffer_again() -> None:
    """A plan is timed on it, and the result run on it, when all others have been read."""
    data = feeds({"x": SHAPE}, 3)
    buffer = np.empty(SHAPE, np.float32)

    def one_array():
        for feed in data:
            buffer[:] = feed["x"]
            yield {"x": buffer}

    start = begin(one_conv(), one_array(), None, Scheme(), MinMax(), (), FORCED)
    seen = [feed["x"].copy() for feed in start.feeds]
    np.testing.assert_array_equal(seen, [feed["x"] for feed in data])
    np.testing.assert_array_equal(start.first["x"], data[0]["x"])
