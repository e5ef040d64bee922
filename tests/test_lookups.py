"""Tables whose rows are picked as int8 codes, with a scale for each row."""

import json
from typing import Any

import numpy as np
import onnx
import pytest
from harness import FORCED, compare
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from models import node, rng, weights
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import qdq
from qdq import choice, stages, tables
from qdq.api import collect_statistics, run
from qdq.errors import ConfigError
from qdq.graph import Graph
from qdq.modelio import save
from qdq.placement import network
from qdq.placement.adjoint import adjoint
from qdq.placement.costs import Features, float_cost, int8_cost
from qdq.placement.frontier import COARSE, WIDEST, rounded_by
from qdq.placement.place import TABLE_PAYS
from qdq.placement.rating import table_noise
from qdq.plan import make_plan
from qdq.prepare import prepare
from qdq.report.pieces import lookup
from qdq.statistics.observe import Observer
from qdq.tables import bytes_saved, codes_of, mean_squares
from qdq.targets import PORTABLE

WORDS, WIDTH, LENGTH = 900, 96, 12
SHAPE = [1, LENGTH]
DEAR = 10.0
VALUES = arrays(
    np.float32,
    st.tuples(st.integers(1, 7), st.integers(1, 5)),
    elements=st.floats(-(2.0**90), 2.0**90, width=32),
)


@pytest.fixture(autouse=True)
def bytes_are_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of some microseconds, for which the three nodes more are no small part."""
    monkeypatch.setattr(network, "_SMALLER", DEAR)


def embedding(rows: int = WORDS, width: int = WIDTH) -> NDArray[np.float32]:
    """Rows of very different size."""
    size = 10 ** rng(3).uniform(-2, 0, (rows, 1))
    return (rng(4).standard_normal((rows, width)) * size).astype(np.float32)


def net(
    nodes: list[onnx.NodeProto],
    constants: dict[str, NDArray],
    outputs: tuple[str, ...] = ("y",),
    kind: int = TensorProto.INT64,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("ids", kind, SHAPE)],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(made)


def encoder(**constants: NDArray) -> onnx.ModelProto:
    """Embedding, norm, product."""
    made = {"table": embedding(), "g": np.ones(WIDTH, np.float32), "w": weights(WIDTH, WIDTH)}
    nodes = [
        node("Gather", ["table", "ids"], "e"),
        node("LayerNormalization", ["e", "g"], "n"),
        node("MatMul", ["n", "w"], "y"),
    ]
    return net(nodes, made | constants)


def ids(count: int = 8, seed: int = 1, kind: type = np.int64) -> list[dict[str, NDArray]]:
    r = rng(seed)
    return [{"ids": r.integers(0, WORDS, SHAPE).astype(kind)} for _ in range(count)]


def picks(found: onnx.ModelProto) -> list[str]:
    """Names of the Gathers that pick codes."""
    codes = {t.name for t in found.graph.initializer if t.data_type == TensorProto.INT8}
    return [n.name for n in found.graph.node if n.op_type == "Gather" and n.input[0] in codes]


@given(VALUES)
def test_codes_are_within_half_a_scale(table: NDArray[np.float32]) -> None:
    codes, scales = codes_of(table)
    assert codes.dtype == np.int8
    assert codes.shape == table.shape
    assert scales.shape == (len(table), 1)
    error = np.abs(codes * scales.astype(np.float64) - table)
    assert (error <= 0.5 * scales * (1 + 1e-5)).all()
    largest = np.abs(table).max(1)
    assert (np.abs(codes.astype(int)).max(1)[largest > 1e-30] == 127).all()
    assert not codes[largest == 0].any()


@given(VALUES)
def test_blocks_of_rows_give_the_same(table: NDArray[np.float32]) -> None:
    whole, squares = codes_of(table), mean_squares(table)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_BLOCK", 2)
        parts, again = codes_of(table), mean_squares(table)
    np.testing.assert_array_equal(whole[0], parts[0])
    np.testing.assert_array_equal(whole[1], parts[1])
    assert again == pytest.approx(squares)


@pytest.mark.parametrize("shape", [(900, 96), (5, 1), (7, 2, 3)])
def test_bytes_that_are_saved(shape: tuple[int, ...]) -> None:
    table = np.ones(shape, np.float32)
    assert bytes_saved(shape) == table.nbytes - sum(part.nbytes for part in codes_of(table))


def test_the_error_is_what_is_foretold() -> None:
    table = embedding(5000, 64)
    codes, scales = codes_of(table)
    error, energy = mean_squares(table)
    assert np.mean((codes * scales - table) ** 2.0) == pytest.approx(error, rel=0.03)
    assert np.mean(table**2.0) == pytest.approx(energy)
    assert 10 * np.log10(energy / error) > 42  # one scale for all of it: 28


def test_rows_too_small_for_a_scale_are_lost() -> None:
    table = np.full((WORDS, WIDTH), 1e-37, np.float32)
    table[::2] = 0
    assert not codes_of(table)[0].any()
    error, energy = mean_squares(table)
    assert error == pytest.approx(energy, rel=1e-3)
    float_net = net([node("Gather", ["table", "ids"], "y")], {"table": table})
    assert picks(run(float_net, ids()).model) == []


@pytest.mark.parametrize("calibrator", [qdq.MSE(), qdq.MinMax()], ids=repr)
def test_a_default_call_stores_codes(calibrator: Any) -> None:
    float_net = encoder()
    result = run(float_net, ids(), calibrator=calibrator)
    assert "Gather_e" in result.plan.quantized
    assert picks(result.model) == ["Gather_e"]
    assert "table" in rounded_by(result.plan)
    names = {t.name for t in result.model.graph.initializer}
    assert "table" not in names
    assert {"table_quantized", "table_scale", "table_zero_point"} <= names
    assert result.model.ByteSize() < 0.45 * float_net.ByteSize()
    found = compare(float_net, result.model, ids(seed=5))
    assert found.sqnr > 30
    assert found.unfused_sqnr == pytest.approx(found.sqnr, abs=1)
    assert found.ops["DequantizeLinear"] >= 1
    props = {p.key: p.value for p in result.model.metadata_props}
    assert json.loads(props["qdq.planned"])["Gather"] == 1


def test_a_model_of_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(choice, "_by_trial")  # there is no kernel to be measured
    nodes = [
        node("Gather", ["table", "ids"], "e"),
        node("ReduceMean", ["e", "k"], "y", keepdims=0),
    ]
    float_net = net(nodes, {"table": embedding(), "k": np.array([1])})
    result = run(float_net, ids())
    assert result.plan.quantized == ("Gather_e",)
    assert "e" not in result.plan.tensors
    assert result.model.ByteSize() < 0.3 * float_net.ByteSize()
    found = compare(float_net, result.model, ids(seed=5))
    assert found.sqnr > 38
    assert found.unfused_sqnr == pytest.approx(found.sqnr, abs=0.1)
    assert 0 < result.harm["table"] < 1e-3


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_indices_from_the_end_and_tables_of_matrices(kind: type) -> None:
    table = embedding(WORDS, WIDTH).reshape(WORDS, 8, 12)
    float_net = net(
        [node("Gather", ["table", "ids"], "y", axis=-3)],
        {"table": table},
        kind=helper.np_dtype_to_tensor_dtype(np.dtype(kind)),
    )
    data = [{"ids": f["ids"] - WORDS} for f in ids(kind=kind)]
    result = run(float_net, data, target=FORCED)
    assert result.plan.quantized == ("Gather_y",)
    assert compare(float_net, result.model, data).unfused_sqnr > 38


def twice(**other: Any) -> onnx.ModelProto:
    nodes = [
        node("Gather", ["table", "ids"], "a"),
        node("Neg", ["ids"], "back"),
        node("Gather", ["table", "back"], "b"),
        node("Sub", ["a", "b"], "y"),
    ]
    return net(nodes, {"table": embedding(), **other})


def test_a_table_of_two_readers_is_stored_once() -> None:
    float_net = twice()
    result = run(float_net, ids())
    assert picks(result.model) == ["Gather_a", "Gather_b"]
    assert result.model.ByteSize() < 0.3 * float_net.ByteSize()
    assert compare(float_net, result.model, ids(seed=5)).sqnr > 38


def test_of_two_readers_both_are_integer_or_none() -> None:
    """The float table would be in the file anyway."""
    scheme = qdq.Scheme(rules=[qdq.Rule(nodes="Gather_b", keep_float=True)])
    for settings in ({}, {"calibrator": qdq.MinMax()}, {"target": FORCED}):
        result = run(twice(), ids(), scheme=scheme, **settings)
        assert picks(result.model) == []
        assert "rule" in result.left_float["Gather_b"]
        assert result.left_float["Gather_a"] == "its table 'table' is read as float elsewhere"


def test_harm_is_what_the_outputs_feel_and_some_of_the_noise() -> None:
    plan = make_plan(prepare(twice()), weighing=WIDEST)
    squares = {"table": (1e-3, 1.0)}
    felt = 8 / 3 / (12 * 127**2)
    assert table_noise(plan, squares, {"table": 30.0}) == pytest.approx({"table": 30 * felt})
    assert table_noise(plan, squares, {"table": 1e9}) == {"table": 1.0}
    assert table_noise(plan, squares, {"table": 1e-9}) == pytest.approx({"table": 1e-3 / 8})
    assert table_noise(plan, squares, {}) == pytest.approx({"table": 1e-3})
    assert table_noise(plan, {"table": (0.5, 0.0)}, {}) == {"table": 0.0}


@pytest.mark.parametrize("shape", [(WORDS, WIDTH), (WORDS, 8, 12)])
def test_what_the_outputs_feel_of_a_table(shape: tuple[int, ...]) -> None:
    """Each picked value has an error in proportion to the largest one in its row."""
    table = embedding().reshape(shape)
    nodes = [
        node("Gather", ["table", "ids"], "a"),
        node("Gather", ["table", "ids"], "b"),
        node("Mul", ["b", "factor"], "c"),
        node("Sub", ["a", "c"], "y"),
    ]
    float_net = net(nodes, {"table": table, "factor": np.float32(3)})
    found = adjoint(prepare(float_net), ["a"], {"table": ["a", "b"], "other": ["ids"]})
    assert found.names == ("a", "table")
    (feed,) = ids(count=1)
    made = Observer(prepare(float_net), [found.output], added=found.added).run(feed)
    rows = table[feed["ids"][0]].reshape(LENGTH, -1).astype(np.float64)
    largest = np.abs(rows).max(1)
    # y is -2 rows; the energy of each channel counts the same
    errors = largest**2 * rows.shape[1] * (1 + 9) / np.square(2 * rows).sum(1)
    assert made[found.output][1] == pytest.approx(errors.mean(), rel=1e-4)


REFUSED = {
    "few": (
        [node("Gather", ["table", "ids"], "e"), node("MatMul", ["e", "turned"], "y")],
        "all its data inputs are constants",
        {"table": weights(WORDS, 8), "turned": weights(8, 900)},
    ),
    "columns are picked": (
        [
            node("Gather", ["table", "ids"], "e"),
            node("Gather", ["table", "ids"], "f", axis=1),
            node("ReduceMean", ["f", "k"], "m", keepdims=0),
            node("Mul", ["e", "m"], "y"),
        ],
        "its table 'table' is read as float elsewhere",
        {"table": embedding(WORDS, WORDS), "k": np.array([0, 1, 2])},
    ),
    "a mask": (
        [node("Gather", ["table", "ids"], "y")],
        "its table 'table' holds -inf, as masks do",
        {"table": np.where(np.arange(WIDTH) == 3, -np.inf, embedding()).astype(np.float32)},
    ),
    "one number a row": (
        [node("Gather", ["table", "ids"], "y")],
        "all its data inputs are constants",
        {"table": embedding(1 << 17, 1)},
    ),
    "picked once and for all": (
        [
            node("Gather", ["table", "ids"], "e"),
            node("Gather", ["table", "k"], "y"),
            node("ReduceSum", ["e"], "z", keepdims=0),
        ],
        "its table 'table' is read as float elsewhere",
        {"table": embedding(), "k": np.array([[3, 5]])},
    ),
    "one row of numbers": (
        [node("Gather", ["table", "ids"], "y")],
        "all its data inputs are constants",
        {"table": embedding(1 << 17, 1).reshape(-1)},
    ),
    "whole numbers": (
        [node("Gather", ["table", "ids"], "i"), node("Cast", ["i"], "y", to=1)],
        "its data is not float32",
        {"table": np.zeros((WORDS, WIDTH), np.int64)},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_stays_float(case: str) -> None:
    nodes, reason, constants = REFUSED[case]
    float_net = net(nodes, constants, tuple(o for o in "yz" if any(o in n.output for n in nodes)))
    result = run(float_net, ids(), target=FORCED)
    assert picks(result.model) == []
    gather = next(n.name for n in nodes if n.op_type == "Gather")
    assert result.left_float[gather] == reason


def test_a_table_that_is_an_output_stays_float() -> None:
    float_net = net([node("Gather", ["table", "ids"], "y")], {"table": embedding()},
                    ("y", "table"))  # fmt: skip
    assert "read as float elsewhere" in run(float_net, ids()).left_float["Gather_y"]


def test_other_runtimes_get_no_tables_of_codes() -> None:
    result = run(encoder(), ids(), target=PORTABLE)
    assert picks(result.model) == []
    assert result.left_float["Gather_e"] == "all its data inputs are constants"


def test_what_it_destroys_stays_float() -> None:
    """One value of each row is all of its energy, and the model drops it."""
    table = embedding()
    table[:, 0] = 3e4
    nodes = [
        node("Gather", ["table", "ids"], "e"),
        node("Slice", ["e", "one", "end", "two"], "y"),
    ]
    ends = {"one": np.array([1]), "end": np.array([WIDTH]), "two": np.array([2])}
    result = run(net(nodes, {"table": table, **ends}), ids())
    assert picks(result.model) == []
    assert result.left_float["Gather_e"] == COARSE
    assert result.harm["table"] > 0.5
    for worth in (0, 1e6):
        again = run(net(nodes, {"table": table, **ends}), ids(), worth=worth)
        assert picks(again.model) == []
        assert again.left_float["Gather_e"] == COARSE
    kept = embedding()
    assert picks(run(net(nodes, {"table": kept, **ends}), ids()).model) == ["Gather_e"]


@pytest.mark.parametrize("worth", [0, 1e6])
def test_why_one_of_two_tables_stays_float(worth: float) -> None:
    table = embedding()
    table[:, 0] = 3e4
    ends = {"one": np.array([1]), "end": np.array([WIDTH]), "two": np.array([2])}
    nodes = [
        node("Gather", ["table", "ids"], "e"),
        node("Slice", ["e", "one", "end", "two"], "y"),
        node("Gather", ["other", "ids"], "z"),
    ]
    float_net = net(nodes, {"table": table, "other": embedding(), **ends}, ("y", "z"))
    result = run(float_net, ids(), worth=worth)
    assert result.left_float["Gather_e"] == COARSE
    assert picks(result.model) == ([] if worth else ["Gather_z"])


def test_bytes_have_a_price() -> None:
    """A share of the time for all of the model's, against what the codes take longer.

    Here there are two tables of one size.
    """
    nodes = [node("Gather", ["table", "ids"], "a"), node("Gather", ["other", "ids"], "b"),
             node("Concat", ["a", "b"], "y", axis=-1)]  # fmt: skip
    float_net = net(nodes, {"table": embedding(), "other": embedding()[::-1].copy()})
    first = run(float_net, ids())
    saved = DEAR * bytes_saved((WORDS, WIDTH)) / (2 * 4 * WORDS * WIDTH)
    priced = first.plan.placement.float_time  # has the price of both tables in it
    time = priced / (1 + 2 * saved)
    f = Features(inputs=LENGTH, outputs=LENGTH * WIDTH, channels_out=WIDTH)
    slower = int8_cost("Gather.table", f) - float_cost("Gather.table", f)
    fair = (saved * time - slower) / priced / first.harm["table"]
    assert "Gather_a" in picks(run(float_net, ids(), worth=0.9 * fair).model)
    assert "Gather_a" not in picks(run(float_net, ids(), worth=1.1 * fair).model)


def test_codes_that_take_longer_than_their_bytes_are_worth(monkeypatch) -> None:
    """As in recommenders: little is done with the rows."""
    monkeypatch.setattr(network, "_SMALLER", 0.05)
    for calibrator in (qdq.MSE(), qdq.MinMax()):
        result = run(encoder(), ids(), calibrator=calibrator)
        assert result.left_float["Gather_e"] == TABLE_PAYS
    wide = [node("MatMul", ["e", "wide"], "m"), node("Relu", ["m"], "r"),
            node("MatMul", ["r", "back"], "y")]  # fmt: skip
    nodes = [node("Gather", ["table", "ids"], "e"), *wide]
    constants = {"wide": weights(WIDTH, 4096), "back": weights(4096, WIDTH)}
    table = embedding(40_000)
    assert picks(run(net(nodes, {"table": table, **constants}), ids()).model) == ["Gather_e"]


def test_what_is_felt_of_a_table_is_by_all_that_read_it() -> None:
    both = run(twice(), ids()).harm["table"]
    apart = twice(other=embedding())
    apart.graph.node[2].input[0] = "other"
    found = run(apart, ids()).harm
    assert both == pytest.approx(found["table"] + found["other"], rel=0.1)
    assert found["other"] > 0.2 * both


def test_rounding_behind_it_is_not_its_own() -> None:
    """Its rows are very unlike, and are seen by themselves: one scale for all is too coarse."""
    size = np.geomspace(1e-4, 1, WORDS)[:, None].astype(np.float32)
    nodes = [
        node("Gather", ["table", "ids"], "e"),
        node("MatMul", ["e", "w"], "m"),
        node("LayerNormalization", ["m", "g"], "y", epsilon=1e-20),
    ]
    table = size * weights(WORDS, WIDTH)
    made = {"table": table, "w": weights(WIDTH, 2048), "g": np.ones(2048, np.float32)}
    result = run(net(nodes, made), ids(), worth=1.0)
    assert result.harm["e"] > 0.1 > 100 * result.harm["table"]
    assert result.plan.quantized == ("Gather_e",)


def test_a_float_reader_reads_what_was_picked() -> None:
    nodes = [
        node("Gather", ["table", "ids"], "e"),
        node("Relu", ["e"], "r"),
        node("MatMul", ["e", "w"], "m"),
        node("Concat", ["r", "m"], "y", axis=-1),
    ]
    float_net = net(nodes, {"table": embedding(), "w": weights(WIDTH, WIDTH)})
    rule = qdq.Rule(nodes="Concat_y", keep_float=True)
    result = run(float_net, ids(), target=FORCED, scheme=qdq.Scheme(rules=[rule]))
    assert result.plan.quantized == ("Gather_e", "MatMul_m")
    (relu,) = [n for n in result.model.graph.node if n.op_type == "Relu"]
    assert relu.input[0] == "e"
    assert compare(float_net, result.model, ids(seed=5)).sqnr > 25


def test_a_clamp_behind_it_is_a_node_of_its_own() -> None:
    nodes = [node("Gather", ["table", "ids"], "e"), node("Relu", ["e"], "y")]
    float_net = net(nodes, {"table": embedding()})
    result = run(float_net, ids(), target=FORCED)
    assert [(u.view.name, u.clamp) for u in result.plan.lookups] == [("Gather_e", None)]
    assert compare(float_net, result.model, ids()).unfused_sqnr > 38


def test_what_is_computed_is_no_table() -> None:
    nodes = [
        node("Cast", ["ids"], "f", to=TensorProto.FLOAT),
        node("ReduceMax", ["f"], "factor"),
        node("Mul", ["table", "factor"], "computed"),
        node("Gather", ["computed", "ids"], "y"),
    ]
    float_net = net(nodes, {"table": embedding()})
    result = run(float_net, ids(), target=FORCED)
    assert picks(result.model) == []
    assert compare(float_net, result.model, ids()).unfused_sqnr > 20


def test_a_table_that_is_multiplied_too_is_codes_in_both_roles() -> None:
    nodes = [
        node("Gather", ["table", "ids"], "e"),
        node("Gemm", ["h", "table"], "y", transB=1),
    ]
    float_net = net([nodes[0], node("ReduceMean", ["e", "k"], "h", keepdims=0), nodes[1]],
                    {"table": embedding(), "k": np.array([1])})  # fmt: skip
    result = run(float_net, ids(), target=FORCED)
    assert picks(result.model) == ["Gather_e"]
    assert not [t for t in result.model.graph.initializer if t.data_type == TensorProto.FLOAT
                and np.prod(t.dims) >= WORDS * WIDTH]  # fmt: skip
    found = compare(float_net, result.model, ids(seed=5))
    assert found.unfused_sqnr == pytest.approx(found.sqnr, abs=1)
    assert found.sqnr > 20


@pytest.mark.parametrize(
    "rule",
    [
        qdq.Rule(nodes="Gather_.*", keep_float=True),
        qdq.Rule(op_types=("Gather",), keep_float=True),
        qdq.Rule(tensors="table", keep_float=True),
    ],
)
def test_rules_keep_it_float(rule: qdq.Rule) -> None:
    result = run(encoder(), ids(), scheme=qdq.Scheme(rules=[rule]))
    assert picks(result.model) == []
    assert "rule" in result.left_float["Gather_e"]


def test_a_rule_for_its_parameters_is_refused() -> None:
    scheme = qdq.Scheme(rules=[qdq.Rule(tensors="table", dtype=qdq.UINT8)])
    with pytest.raises(ConfigError, match="tensor 'table'"):
        run(encoder(), ids(), scheme=scheme)


def test_an_integer_reader_gets_a_q_of_its_own() -> None:
    nodes = [
        node("Gather", ["table", "ids"], "e"),
        node("MatMul", ["e", "w"], "m"),
        node("Add", ["m", "e"], "y"),
    ]
    float_net = net(nodes, {"table": embedding(), "w": weights(WIDTH, WIDTH)})
    result = run(float_net, ids(), target=FORCED)
    found = compare(float_net, result.model, ids(seed=5))
    assert found.sqnr > 25
    assert found.unfused_sqnr == pytest.approx(found.sqnr, abs=1)
    assert picks(result.model) == ["Gather_e"]
    assert found.ops["QuantizeLinear"] >= 1


def test_calibration_apart_gives_the_same_bytes(tmp_path: Any) -> None:
    plain = run(encoder(), ids()).model.SerializeToString()
    collect_statistics(encoder(), ids()[::-1]).save(tmp_path / "s.npz")
    assert run(encoder(), statistics=tmp_path / "s.npz").model.SerializeToString() == plain


def test_a_table_in_the_model_file(tmp_path: Any) -> None:
    """A large one is a reference, which has to be read into what is emitted."""
    path = tmp_path / "m.onnx"
    save(encoder(), path)
    before = path.read_bytes()
    plain = run(encoder(), ids()).model.SerializeToString()
    assert run(path, ids()).model.SerializeToString() == plain
    assert path.read_bytes() == before


def test_compare_takes_the_pieces_for_the_node() -> None:
    float_net = encoder()
    made = qdq.quantize(float_net, ids())
    report = qdq.compare(float_net, made, ids(seed=5), repeats=0)
    (row,) = [n for n in report.nodes if n.name == "Gather_e"]
    assert (row.op_type, row.integer) == ("Gather", True)
    assert 38 < row.local_db < 50
    assert not report.notes
    advice = {a.what: a for a in report.advice}
    assert advice["leave Gather_e float"].gain_db > 0
    float_table = qdq.Scheme(rules=[qdq.Rule(nodes="Gather_e", keep_float=True)])
    assert picks(qdq.quantize(float_net, ids(), scheme=float_table)) == []


def test_a_report_of_a_lookup_alone_has_no_empty_table() -> None:
    float_net = net([node("Gather", ["table", "ids"], "y")], {"table": embedding()})
    report = qdq.compare(float_net, qdq.quantize(float_net, ids()), ids(), repeats=0)
    assert report.kernels == ()
    assert "planned" not in report.text()
    assert "planned integer" not in report.html()
    assert not report.notes


def test_compare_tells_float_lookups_from_these() -> None:
    float_net = encoder()
    scheme = qdq.Scheme(rules=[qdq.Rule(op_types=("Gather",), keep_float=True)])
    report = qdq.compare(float_net, qdq.quantize(float_net, ids(), scheme=scheme), ids(), repeats=0)
    (row,) = [n for n in report.nodes if n.name == "Gather_e"]
    assert not row.integer
    assert row.share == 0


def pieces(ending: str = "e") -> onnx.ModelProto:
    """What a Gather of codes is written as; and what only looks like it."""
    nodes = [
        node("Gather", ["codes", "ids"], "picked"),
        node("Gather", ["scales", "ids"], "scale"),
        node("DequantizeLinear", ["picked", "one"], "real"),
        node("Mul", ["real", "scale"], "e"),
        node("Neg", [ending], "y"),
    ]
    codes, scales = codes_of(embedding())
    return net(nodes, {"codes": codes, "scales": scales, "one": np.float32(1)})


def test_pieces_of_a_lookup() -> None:
    graph = Graph(pieces())
    assert lookup(graph, graph.nodes[0], {"e", "y"}) == [1, 2, 3]
    for named in ({"e", "picked"}, {"e", "real"}, {"y"}):  # each is a tensor of the float model
        assert lookup(graph, graph.nodes[0], named) == []
    assert lookup(graph, graph.nodes[1], {"e", "y"}) == []
    read_twice = Graph(pieces("real"))
    assert lookup(read_twice, read_twice.nodes[0], {"e", "y"}) == []
    others = pieces()
    others.graph.node[1].input[1] = "others"
    graph = Graph(others)
    assert lookup(graph, graph.nodes[0], {"e", "y"}) == []
    others.graph.node[3].input[1] = "scales"
    graph = Graph(others)
    assert lookup(graph, graph.nodes[0], {"e", "y"}) == []


def wide_encoder() -> onnx.ModelProto:
    wide = 2048
    made = {"table": embedding(WORDS, wide), "g": np.ones(wide, np.float32)}
    nodes = [
        node("Gather", ["table", "ids"], "e"),
        node("LayerNormalization", ["e", "g"], "n"),
        node("MatMul", ["n", "w"], "m"),
        node("Neg", ["m"], "y"),
    ]
    return net(nodes, {**made, "w": weights(wide, 256)})


def exaggerated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Foretell so much noise that no kernel is worth it."""
    own = stages.noise_of
    monkeypatch.setattr(
        stages, "noise_of", lambda *args: {k: min(1.0, 1e4 * v) for k, v in own(*args).items()}
    )


@pytest.mark.parametrize("setting", [("_HARDLY", 10), ("AMPLITUDE", 1e6)])
def test_where_kernels_are_no_better_a_table_is_left(
    setting: tuple[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    exaggerated(monkeypatch)
    monkeypatch.setattr(choice, *setting)
    assert run(wide_encoder(), ids()).plan.quantized == ("Gather_e",)


@pytest.mark.parametrize("few", [0, 2000])
def test_a_table_that_is_left_is_measured_too(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is foretold of it knows nothing of a value that a norm takes out of each row."""
    exaggerated(monkeypatch)
    monkeypatch.setattr(network, "_SMALLER", 0.05)  # of a product that is large enough
    own = stages.table_noise
    monkeypatch.setattr(
        stages, "table_noise", lambda *args: {k: 1e-6 * v for k, v in own(*args).items()}
    )
    monkeypatch.setattr(choice, "_FEW", few)
    float_net = wide_encoder()
    table = embedding(WORDS, 2048) + np.float32(8)
    float_net.graph.initializer[0].CopyFrom(numpy_helper.from_array(table, "table"))
    result = run(float_net, ids())
    assert "table" in result.harm
    assert picks(result.model) == []


def test_kernels_are_measured_before_only_a_table_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    float_net = wide_encoder()
    exaggerated(monkeypatch)
    monkeypatch.setattr(network, "_SMALLER", 0.5)
    result = run(float_net, ids())
    assert len(result.plan.quantized) == 2
    assert picks(result.model) == ["Gather_e"]
    monkeypatch.setattr(choice, "_FEW", 0)  # where nothing is measured
    assert run(float_net, ids()).plan.quantized == ("Gather_e",)
