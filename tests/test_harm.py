"""How an error is weighed, and trials of quantized models on few samples."""

import math

import numpy as np
import onnx
import pytest
from harness import compare
from hypothesis import given
from hypothesis import strategies as st
from models import feeds, model, node, residual, weights

import qdq
from qdq.api import run
from qdq.errors import ConfigError
from qdq.graph import Graph
from qdq.placement.harm import COMMON, LONE, POSITIONS, Judged, read, relative_error, worst_decibels
from qdq.placement.ranking import in_order
from qdq.placement.trial import Trial
from qdq.placement.wholes import judged, logits_of
from qdq.prepare import prepare
from qdq.statistics.keeping import keep_few

# -- how an error is weighed ------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
def test_relative_error_is_scale_free_and_bounded(seed: int, factor: float) -> None:
    r = np.random.default_rng(seed)
    x, e = r.standard_normal((2, 1, 3, 5))
    found = relative_error(x, x + 0.1 * e)
    assert 0 <= found <= 1
    assert relative_error(factor * x, factor * (x + 0.1 * e)) == pytest.approx(found)
    assert relative_error(x, x) == 0


def test_a_small_channel_counts_as_much_as_a_large_one() -> None:
    x = np.array([[[300.0, 200.0], [0.5, 0.1]]])
    lost = np.array([[[300.0, 200.0], [0.0, 0.0]]])
    assert relative_error(x, lost) == pytest.approx(0.5)
    # as one channel nobody would see it
    assert relative_error(x.reshape(1, 4), lost.reshape(1, 4)) < 1e-5


def test_what_cannot_be_compared_is_lost() -> None:
    x = np.ones((1, 4))
    assert relative_error(x, np.ones((1, 3))) == 1
    assert relative_error(x, np.array([[np.inf, 1, 1, 1]])) == 1
    assert relative_error(np.zeros((1, 4)), x) == 1
    assert relative_error(np.zeros((1, 4)), np.zeros((1, 4))) == 0
    # what the float model itself does not know is left out
    assert relative_error(np.array([[np.nan, 1.0]]), np.array([[3.0, 1.0]])) == 0


def test_logits_count_around_their_mean() -> None:
    z = np.array([[1.0, -1.0, 2.0]])
    judged_by = Judged(outputs=("y",), weighed=("y",), logits=("z",))
    for offset in (0.0, 1e4):
        before, after = {"y": z, "z": z + offset}, {"y": z, "z": z + offset + 0.1}
        a = read(before, after, judged_by)
        middle = z - z.mean()
        assert a.harm == pytest.approx(0.5 * 0.03 / (middle**2).sum(), rel=1e-3)


@pytest.mark.parametrize("logits", [False, True])
def test_what_all_positions_have_in_common_tells_nothing(logits: bool) -> None:
    r = np.random.default_rng(0)
    rare = np.array([0.0, -1.0, -3.0])  # three words, rare or not
    y = rare + r.standard_normal((1, 40, 3))
    error = 0.1 * r.standard_normal(y.shape)
    names = {"logits": ("y",), "weighed": ()} if logits else {"weighed": ("y",)}
    by = Judged(outputs=("y",), varied=frozenset("y"), **names)
    found = read({"y": y}, {"y": y + error}, by).harm
    varied = y - y.mean((0, 1))
    assert found == pytest.approx(np.square(error).sum() / np.square(varied).sum())
    for offset in (1.0, -0.5):  # as long as it is not nearly all
        more = y + offset
        assert read({"y": more}, {"y": more + error}, by).harm == pytest.approx(found)
    all_of_it = y + 1e3
    least = np.square(error).sum() / np.square(all_of_it).sum() / COMMON
    assert read({"y": all_of_it}, {"y": all_of_it + error}, by).harm == pytest.approx(least)
    # of few positions the mean is most of what is there
    few = {"y": y[:, : POSITIONS - 1]}, {"y": (y + error)[:, : POSITIONS - 1]}
    whole = np.square(few[1]["y"] - few[0]["y"]).sum() / np.square(few[0]["y"]).sum()
    assert read(*few, by).harm == pytest.approx(whole)
    assert read({"y": y}, {"y": y[:, 1:]}, by).harm == 1
    assert read({"y": y}, {"y": y + 1e9}, by).harm == 1
    none = {"y": np.zeros((1, 40, 3))}
    assert (read(none, none, by).harm, read(none, {"y": error}, by).harm) == (0, 1)


@pytest.mark.parametrize(
    ("nodes", "shape", "has"),
    [
        ([node("Gemm", ["t", "w", "b"], "g"), node("Reshape", ["g", "to"], "y")], [2, 5, 6], True),
        ([node("MatMul", ["x", "w"], "m"), node("Add", ["m", "b"], "y")], [2, 5, 6], True),
        ([node("MatMul", ["x", "w"], "m"), node("LayerNormalization", ["m", "b"], "n"),
          node("Add", ["n", "m"], "y")], [2, 5, 6], True),
        ([node("MatMul", ["x", "w"], "m"), node("Transpose", ["m"], "y", perm=[1, 0, 2])],
         [5, 2, 6], True),
        ([node("MatMul", ["x", "w"], "m"), node("Transpose", ["m"], "y", perm=[0, 2, 1])],
         [2, 6, 5], False),
        ([node("Gemm", ["t", "w", "b"], "y")], [10, 6], False),
        ([node("Transpose", ["x"], "u", perm=[0, 2, 1]), node("MatMul", ["x", "u"], "y")],
         [2, 5, 5], False),
        ([node("Conv", ["x", "k"], "y")], [2, 5, 4], False),
    ],
)  # fmt: skip
def test_positions_are_told_by_the_product_that_makes_them(
    nodes: list[onnx.NodeProto], shape: list[int], has: bool
) -> None:
    first = node("Reshape", ["x", "flat"], "t")
    read_by = {name for n in nodes for name in n.input}
    constants = {
        "w": weights(4, 6),
        "b": weights(6),
        "k": weights(5, 5, 1),
        "to": np.int64([2, 5, 6]),
        "flat": np.int64([-1, 4]),
    }
    used = {"flat"} | read_by if "t" in read_by else read_by
    net = model(
        [first, *nodes] if "t" in read_by else nodes,
        {"x": [2, 5, 4]},
        {"y": shape},
        {name: value for name, value in constants.items() if name in used},
    )
    found = judged(Graph(onnx.shape_inference.infer_shapes(net)))
    assert found.varied == (frozenset("y") if has else frozenset())


BOTH = Judged(outputs=("a", "b"), weighed=("a", "b"))


def test_decibels_are_those_of_the_worst_output() -> None:
    x = {"a": np.ones(100), "b": np.ones(100)}
    y = {"a": np.full(100, 1.1), "b": np.full(100, 1.01)}
    assert worst_decibels([read(x, y, BOTH)]) == pytest.approx(20, abs=1e-6)
    assert worst_decibels([read(x, x, BOTH)]) == math.inf


def test_decibels_of_an_error_beyond_all_measure() -> None:
    x, lost = {"a": np.ones(3)}, {"a": np.full(3, np.nan)}
    assert worst_decibels([read(x, lost, Judged(outputs=("a",), weighed=("a",)))]) < -2900


# -- logits -----------------------------------------------------------------------------------


def test_logits_of_a_softmax_in_parts() -> None:
    net = model([node("Softmax", ["x"], "y", axis=1)], {"x": [1, 4, 64]}, {"y": [1, 4, 64]})
    assert logits_of(Graph(net)) == ("x",)
    parts = prepare(net)
    assert "Softmax" not in {n.op_type for n in parts.graph.node}
    assert logits_of(Graph(parts)) == ("x",)


def test_logits_behind_movement_and_concat() -> None:
    nodes = [
        node("Conv", ["x", "w"], "c"),
        node("Split", ["c"], ["box", "cls"], axis=1, num_outputs=2),
        node("Sigmoid", ["cls"], "p"),
        node("Concat", ["box", "p"], "both", axis=1),
        node("Flatten", ["both"], "y"),
    ]
    net = prepare(model(nodes, {"x": [1, 4, 3, 3]}, {"y": [1, 36]}, {"w": weights(4, 4, 1, 1)}))
    assert logits_of(Graph(net)) == ("cls",)


def test_a_probability_that_stands_alone_is_judged_by_its_logit() -> None:
    def net(*nodes: onnx.NodeProto, out: list[int]) -> Graph:
        made = model([node("MatMul", ["x", "w"], "z"), *nodes], {"x": [2, 4]}, {"y": out},
                     {"w": weights(4, out[1]), "to": np.int64([2, out[1]])})  # fmt: skip
        return Graph(onnx.shape_inference.infer_shapes(made))

    direct = net(node("Sigmoid", ["z"], "y"), out=[2, 1])
    assert judged(direct) == Judged(outputs=("y",), weighed=(), lone=("z",))
    assert judged(direct).names == ("y", "z")
    moved = net(node("Sigmoid", ["z"], "p"), node("Reshape", ["p", "to"], "y"), out=[2, 1])
    assert judged(moved) == Judged(outputs=("y",), weighed=(), lone=("z",))
    several = net(node("Sigmoid", ["z"], "y"), out=[2, 3])
    assert judged(several) == Judged(outputs=("y",), weighed=("y",), logits=("z",))
    for other in ("Tanh", "Softmax"):
        assert judged(net(node(other, ["z"], "y"), out=[2, 1])).weighed == ("y",)


def test_an_output_that_is_made_of_nothing_is_no_probability() -> None:
    nodes = [node("Relu", ["x"], "y"), node("Constant", [], "c", value_float=0.5)]
    net = model(nodes, {"x": [1, 4]}, {"y": [1, 4], "c": []})
    assert judged(Graph(net)).lone == ()


@pytest.mark.parametrize("logit", [-9.0, -1.0, 0.0, 3.0, 20.0])
def test_a_lone_logit_has_a_signal_of_its_own(logit: float) -> None:
    z = np.full((2, 1), logit)
    only = Judged(outputs=("y",), weighed=(), lone=("z",))
    found = read({"y": z, "z": z}, {"y": z, "z": z + 0.1}, only)
    assert found.harm == pytest.approx((0.1 / max(abs(logit), LONE)) ** 2)
    # at least what the probability moves
    p, q = (1 / (1 + math.exp(-v)) for v in (logit, logit + 0.1))
    assert math.sqrt(found.harm) >= abs(p - q) * 0.99 or abs(logit) > LONE
    assert read({"y": z, "z": z}, {"y": z, "z": np.zeros(2)}, only).harm == 1


# -- trials -----------------------------------------------------------------------------------

SHAPE = {"x": [1, 64, 24, 24]}


def test_a_trial_is_what_the_fused_kernels_do() -> None:
    exact, data = residual(channels=64), feeds(SHAPE, 4)
    made, held_out = qdq.quantize(exact, data, worth=0.0), feeds(SHAPE, 3, seed=5)
    found = Trial(prepare(exact), held_out)
    assert found.sqnr(made) == pytest.approx(compare(exact, made, held_out).sqnr, abs=0.01)
    assert found.amplitude(made) > 0
    assert found.amplitude(prepare(exact)) < 1e-6
    assert found.sqnr(prepare(exact)) > 100


def test_the_median_sample_counts() -> None:
    """A sample whose outputs are next to nothing has a relative error beyond all measure."""
    net = model([node("Conv", ["x", "w"], "y")], {"x": [1, 8, 6, 6]}, {"y": [1, 8, 6, 6]},
                {"w": weights(8, 8, 1, 1)})  # fmt: skip
    data = feeds({"x": [1, 8, 6, 6]}, 3)
    quiet = {"x": np.full((1, 8, 6, 6), 1e-9, np.float32)}
    made = model([node("Conv", ["x", "w"], "c"), node("Add", ["c", "off"], "y")],
                 {"x": [1, 8, 6, 6]}, {"y": [1, 8, 6, 6]},
                 {"w": weights(8, 8, 1, 1), "off": np.full(1, 0.01, np.float32)})  # fmt: skip
    plain = Trial(net, data).amplitude(made)
    assert Trial(net, [quiet]).amplitude(made) == 1
    assert Trial(net, [*data, quiet]).amplitude(made) < 2 * plain


def test_outputs_are_held_as_far_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model([node("Relu", ["x"], "y")], SHAPE, {"y": SHAPE["x"]})
    size = 4 * math.prod(SHAPE["x"])
    for room, held in ((0, 1), (size - 1, 1), (size, 2), (9 * size, 3)):
        monkeypatch.setattr("qdq.placement.trial._MOST_HELD", room)
        assert len(Trial(net, feeds(SHAPE, 3))._read(net)) == held


def test_logits_count_in_a_trial() -> None:
    """Probabilities of 0 and 1 hide what happens to their logits."""

    def net(shift: float) -> onnx.ModelProto:
        nodes = [
            node("MatMul", ["x", "w"], "m"),
            node("Add", ["m", "shift"], "logit"),
            node("Softmax", ["logit"], "y", axis=-1),
        ]
        constants = {
            "w": np.eye(4, dtype=np.float32),
            "shift": np.float32([0, 0, 0, shift]),
        }
        return model(nodes, {"x": [1, 4]}, {"y": [1, 4]}, constants)

    trial = Trial(net(0.0), [{"x": np.float32([[60, 0, 0, 0]])}])
    assert trial.sqnr(net(5.0)) > 100  # the probabilities are the same
    assert trial.amplitude(net(5.0)) > 0.05


def test_a_classifier_with_one_probability_goes_to_integers() -> None:
    """Of one logit nothing is left around its mean, so any error was taken for a loss."""
    nodes = [
        node("Conv", ["x", "w"], "c", pads=[1] * 4),
        node("Relu", ["c"], "r"),
        node("Conv", ["r", "v"], "d", pads=[1] * 4),
        node("Relu", ["d"], "s"),
        node("GlobalAveragePool", ["s"], "g"),
        node("Flatten", ["g"], "f"),
        node("Gemm", ["f", "m", "b"], "z"),
        node("Sigmoid", ["z"], "y"),
    ]
    constants = {"w": weights(64, 64, 3, 3), "v": weights(64, 64, 3, 3, seed=1),
                 "m": weights(64, 1), "b": np.float32([-6])}  # fmt: skip
    net = model(nodes, SHAPE, {"y": [1, 1]}, constants)
    made = qdq.quantize(net, feeds(SHAPE, 8))
    found = compare(net, made, feeds(SHAPE, 4, seed=3))
    assert sum(n.op_type == "QuantizeLinear" for n in made.graph.node) >= 2
    assert found.sqnr > 20


def test_no_floating_point_output_is_an_error() -> None:
    nodes = [node("Conv", ["x", "w"], "c", pads=[1] * 4), node("ArgMax", ["c"], "y", axis=1)]
    net = model(nodes, SHAPE, {"y": [1, 1, 24, 24]}, {"w": weights(64, 64, 3, 3)})
    net.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    with pytest.raises(ConfigError, match="no output of floating-point"):
        Trial(prepare(net), feeds(SHAPE, 1))
    with pytest.raises(ConfigError, match="leave out measured"):
        qdq.quantize(net, feeds(SHAPE, 2), measured=True)


# -- the samples that are kept ----------------------------------------------------------------


def test_the_kept_samples_do_not_depend_on_the_order() -> None:
    data = feeds({"x": [1, 1, 3, 3]}, 6)
    found = []
    for order in (data, data[::-1], [*data, *data]):
        kept: dict[bytes, dict[str, np.ndarray]] = {}
        assert [id(f) for f in keep_few(order, kept, 3)] == [id(f) for f in order]
        found.append([f["x"] for f in kept.values()])
        assert len(kept) == 3
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_strings_are_kept_by_what_they_say() -> None:
    """In memory, an array of strings has the addresses where they happen to be."""
    words = ["north", "south", "east", "west"]
    found = []
    for _ in range(2):
        again = ["".join(list(word)) for word in words]  # the same, somewhere else
        kept: dict[bytes, dict[str, np.ndarray]] = {}
        list(keep_few(({"x": np.array([w], object)} for w in again), kept, 2))
        found.append((list(kept), [f["x"].tolist() for f in kept.values()]))
    assert found[0] == found[1]


# -- outputs of other types -------------------------------------------------------------------


def _cast_net(to: int, last: str) -> onnx.ModelProto:
    nodes = [
        node("Conv", ["x", "f", "b"], "c", pads=[1, 1, 1, 1]),
        node("Relu", ["c"], "r"),
        node("Conv", ["r", "f", "b"], "l", pads=[1, 1, 1, 1]),
        node(last, ["l"], "s"),
        node("Cast", ["s"], "y", to=to),
    ]
    shape = [1, 32, 24, 24]
    net = model(nodes, {"x": shape}, {"y": shape}, {"f": weights(32, 32, 3, 3), "b": weights(32)})
    net.graph.output[0].type.tensor_type.elem_type = to
    return net


@pytest.mark.parametrize("last", ["Identity", "Sigmoid"])
@pytest.mark.parametrize("to", [onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE])
def test_what_is_cast_at_the_end_is_judged_as_if_it_were_not(to: int, last: str) -> None:
    data = feeds({"x": [1, 32, 24, 24]}, 4)
    plain = run(_cast_net(onnx.TensorProto.FLOAT, last), data)
    cast = run(_cast_net(to, last), data)
    assert sorted(cast.harm.values()) == pytest.approx(sorted(plain.harm.values()), rel=1e-2)
    qdq.quantize(_cast_net(to, last), data, measured=True)


def test_a_sigmoid_that_becomes_whole_numbers_is_no_error() -> None:
    run(_cast_net(onnx.TensorProto.UINT8, "Sigmoid"), feeds({"x": [1, 32, 24, 24]}, 4))


def test_entries_that_a_topk_puts_in_another_order_are_no_error() -> None:
    r = np.random.default_rng(0)
    boxes, scores = r.standard_normal((1, 20, 4)), r.standard_normal((1, 20, 3))
    order = r.permutation(20)
    reference = {"boxes": boxes, "scores": scores}
    value = {"boxes": boxes[:, order] + 1e-3, "scores": scores[:, order]}
    names = ("boxes", "scores")
    plain = Judged(outputs=names, weighed=names)
    ranked = Judged(outputs=names, weighed=names, ranked={"boxes": 1, "scores": 1})
    assert read(reference, value, plain).harm > 0.5
    assert read(reference, value, ranked).harm < 1e-4
    value["boxes"][0, 0] += 9  # one that is lost is one of twenty
    assert read(reference, value, ranked).harm > 1e-3


@pytest.mark.parametrize("shape", [(2, 5, 4), (1, 1001, 4), (1, 1, 4)])
def test_where_entries_keep_their_order(shape: tuple[int, ...]) -> None:
    """A batch, too many, and one alone."""
    reference = {"y": np.random.default_rng(0).standard_normal(shape)}
    value = {"y": reference["y"][:, ::-1]}
    assert in_order(reference, value, {"y": 1}) is value


def test_other_numbers_of_entries_are_let_be() -> None:
    x = np.random.default_rng(0).standard_normal((1, 5, 4))
    value = {"y": x[:, :3]}
    assert in_order({"y": x}, value, {"y": 1}) is value


@pytest.mark.parametrize("lost", [np.nan, np.inf])
def test_every_entry_is_used_once(lost: float) -> None:
    """More equal ones than there are rounds, and some that are no numbers."""
    r = np.random.default_rng(0)
    x = np.concatenate([np.zeros(60), r.standard_normal(40)]).reshape(1, 100, 1)
    y = x[:, r.permutation(100)]
    y[0, np.argmax(y[0, :, 0])] = lost
    found = in_order({"y": x}, {"y": y}, {"y": 1})["y"]
    assert np.array_equal(np.sort(found, None), np.sort(y, None), equal_nan=True)
    assert np.sum(found != x) <= 2


def test_all_ranked_tensors_tell_the_order_whatever_their_scale() -> None:
    r = np.random.default_rng(0)
    reference = {"id": np.arange(20.0).reshape(20, 1), "noise": np.full((20, 1), 1e6)}
    order = r.permutation(20)
    value = {"id": reference["id"][order], "noise": 1e6 + 1e2 * r.standard_normal((20, 1))}
    for names in (("id", "noise"), ("noise", "id")):
        found = in_order(reference, value, dict.fromkeys(names, 0))
        assert np.array_equal(found["id"], reference["id"])


def test_what_a_topk_orders_is_found() -> None:
    nodes = [
        node("MatMul", ["x", "w"], "s"),
        node("TopK", ["s", "k"], ["v", "i"], axis=1),
        node("Unsqueeze", ["i", "last"], "j"),
        node("GatherND", ["x2", "j"], "y", batch_dims=1),
        node("Relu", ["x2"], "z"),
    ]
    constants = {"w": weights(8, 30), "k": np.array([5]), "last": np.array([-1])}
    shapes = {"x": [1, 8], "x2": [1, 30, 7]}
    made = model(nodes, shapes, {"y": [1, 5, 7], "v": [1, 5], "z": [1, 30, 7]}, constants)
    assert judged(Graph(prepare(made))).ranked == {"y": 1, "v": 1}


def test_each_topk_has_an_order_of_its_own() -> None:
    nodes = [
        node("TopK", ["x", "k"], ["v", "i"], axis=1),
        node("TopK", ["x2", "k"], ["w", "j"], axis=1),
        node("Add", ["v", "w"], "both"),
        node("TopK", ["v", "k"], ["z", "l"], axis=1),
        node("Neg", ["v"], "n"),
    ]
    shapes = {"x": [1, 30], "x2": [1, 30]}
    outputs = {key: [1, 5] for key in ("w", "both", "n", "z", "v")}
    made = model(nodes, shapes, outputs, {"k": np.array([5])})
    assert judged(Graph(prepare(made))).ranked == {"n": 1, "v": 1}
