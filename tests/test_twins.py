"""A table whose transpose a model multiplies with as well: words tied to the head."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from harness import compare
from models import node, rng, weights
from onnx import TensorProto, helper, numpy_helper

import qdq
from qdq.api import run
from qdq.graph import Graph
from qdq.placement import network
from qdq.prepare import prepare
from qdq.targets import PORTABLE
from qdq.twins import turned_twins

WORDS, WIDTH, LENGTH = 1500, 64, 24
TABLE_BYTES = 4 * WORDS * WIDTH
FLOAT_HEAD = qdq.Scheme(rules=(qdq.Rule(nodes="head", keep_float=True),))
ALL_FLOAT = qdq.Scheme(rules=(qdq.Rule(nodes=".*", keep_float=True),))


def table() -> np.ndarray:
    return weights(WIDTH, WORDS).T.copy()


def tied(head: str) -> onnx.ModelProto:
    """Embedding, one wide layer, head; ``head``: how the table's transpose is written."""
    constants = {"table": table(), "g": np.ones(WIDTH, np.float32), "w": weights(WIDTH, 1024),
                 "v": weights(1024, WIDTH), "flat": np.array([LENGTH, WIDTH])}  # fmt: skip
    nodes = [
        node("Gather", ["table", "ids"], "e"),
        node("MatMul", ["e", "w"], "m"),
        node("Relu", ["m"], "r"),
        node("MatMul", ["r", "v"], "n"),
        node("LayerNormalization", ["n", "g"], "l"),
    ]
    if head == "Gemm":
        nodes.append(node("Reshape", ["l", "flat"], "f"))
        nodes.append(helper.make_node("Gemm", ["f", "table"], ["y"], "head", transB=1))
    else:
        if head == "Transpose":
            nodes.append(node("Transpose", ["table"], "turned", perm=[1, 0]))
        else:
            constants["turned"] = table().T.copy()
        nodes.append(helper.make_node("MatMul", ["l", "turned"], ["y"], "head"))
    graph = helper.make_graph(
        nodes,
        "tied",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [1, LENGTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(made)


def ids(count: int = 6, seed: int = 1) -> list[dict[str, np.ndarray]]:
    r = rng(seed)
    return [{"ids": r.integers(0, WORDS, (1, LENGTH))} for _ in range(count)]


def right(given: onnx.ModelProto, model: onnx.ModelProto, least: float) -> None:
    outcome = compare(given, model, ids(2, seed=9))
    assert min(outcome.sqnr, outcome.unfused_sqnr) > least
    assert outcome.steps_apart <= 1


def large(model: onnx.ModelProto) -> list[int]:
    """Types of the table and its transpose in a file."""
    return [t.data_type for t in model.graph.initializer if set(t.dims) == {WORDS, WIDTH}]


def twins_of(model: onnx.ModelProto) -> dict[str, tuple[str, ...]]:
    graph = Graph(model)
    return turned_twins(graph, ["table"], graph.constants)


HEADS = ("Gemm", "Transpose", "copy")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("target", [qdq.targets.ORT_CPU, PORTABLE], ids=lambda t: t.name)
def test_in_float_it_is_in_the_file_once(head: str, target) -> None:
    given = tied(head)
    result = run(given, ids(), scheme=ALL_FLOAT, target=target)
    assert large(result.model) == [TensorProto.FLOAT]
    once = given.ByteSize() - (TABLE_BYTES if head == "copy" else 0)
    assert result.model.ByteSize() < once + TABLE_BYTES // 10  # of metadata
    right(given, result.model, 100)


@pytest.mark.parametrize("head", HEADS)
def test_codes_beside_a_float_head_save_nothing(head: str) -> None:
    given = tied(head)
    result = run(given, ids(), scheme=FLOAT_HEAD, worth=0)
    assert len(result.plan.quantized) == 2
    assert large(result.model) == [TensorProto.FLOAT]
    right(given, result.model, 20)


@pytest.mark.parametrize("head", HEADS)
def test_an_integer_head_has_codes_of_its_own(head: str, monkeypatch) -> None:
    monkeypatch.setattr(network, "_SMALLER", 1.0)  # in a model of some microseconds
    given = tied(head)
    result = run(given, ids(), worth=0)
    assert large(result.model) == [TensorProto.INT8, TensorProto.INT8]
    right(given, result.model, 20)


def test_compare_reads_such_a_model() -> None:
    given = tied("Gemm")
    result = run(given, ids(), scheme=FLOAT_HEAD, worth=0)
    found = qdq.compare(given, result.model, ids(2, seed=9))
    assert "head" in str(found.text())


def test_other_matrices_are_no_twins() -> None:
    given = tied("copy")
    turned = next(t for t in given.graph.initializer if t.name == "turned")
    assert twins_of(given) == {"table": ("turned",)}
    near = table().T.copy()
    near[-1, -1] += 1
    turned.CopyFrom(numpy_helper.from_array(near, "turned"))
    assert twins_of(given) == {}
    assert large(run(given, ids(), scheme=ALL_FLOAT).model) == [TensorProto.FLOAT] * 2


def test_a_twin_that_is_an_output_is_kept() -> None:
    given = tied("copy")
    given.graph.output.append(helper.make_tensor_value_info("turned", TensorProto.FLOAT,
                                                            [WIDTH, WORDS]))  # fmt: skip
    result = run(given, ids(), scheme=ALL_FLOAT)
    assert large(result.model) == [TensorProto.FLOAT] * 2
    right(given, result.model, 100)


def test_matrices_that_stay_in_their_file_are_not_read(tmp_path: Path, monkeypatch) -> None:
    wide = 2 * (1 << 20) // (4 * WIDTH)
    given = tied("Gemm")
    given.graph.initializer[0].CopyFrom(numpy_helper.from_array(weights(wide, WIDTH), "table"))
    del given.graph.value_info[:]
    path = tmp_path / "model.onnx"
    onnx.save(given, path)
    prepared = prepare(qdq.modelio.load(path, lazy=True))
    monkeypatch.setattr(Graph, "floats", lambda *_: pytest.fail("read"))
    assert twins_of(prepared) == {"table": ("table_folded",)}
