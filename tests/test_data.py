"""Calibration data: every accepted form gives the same feeds, every misfit one clear error."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdq.data import InputSpec, npz_samples, open_feeds
from qdq.errors import CalibrationError
from qdq.statistics.shapes import larger

F32 = np.dtype(np.float32)
ONE = {"x": InputSpec(F32, (None, 3))}
TWO = {"x": InputSpec(F32, (None, 3)), "n": InputSpec(np.dtype(np.int64), ())}
WORDS = {"x": InputSpec(np.dtype(object), None)}
BFLOAT16 = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16)
IMAGE = {"image": InputSpec(F32, (1, 3, 8, 6))}


def rows(count: int) -> list[np.ndarray]:
    return [np.full((2, 3), i, np.float32) for i in range(count)]


class Reader:
    """As onnxruntime's CalibrationDataReader, and counts how far it was read."""

    def __init__(self, samples: list[object]) -> None:
        self.samples = iter(samples)
        self.asked = 0

    def get_next(self) -> object:
        self.asked += 1
        return next(self.samples, None)

    def rewind(self) -> None:
        raise AssertionError("rewound")


def values(feeds: Iterator[dict[str, np.ndarray]]) -> list[list[object]]:
    return [[f["x"].tolist(), int(f["n"])] for f in feeds]


def test_every_form_of_data_gives_the_same_feeds(tmp_path: Path) -> None:
    xs, ns = rows(3), [np.int64(i) for i in range(3)]
    path = tmp_path / "data.npz"
    np.savez(path, n=np.array(ns), x=np.stack(xs))
    dicts = [{"n": n, "x": x} for x, n in zip(xs, ns, strict=True)]
    pairs = list(zip(xs, ns, strict=True))
    expected = [[x.tolist(), int(n)] for x, n in pairs]
    with np.load(path) as opened:
        forms = (dicts, pairs, [list(p) for p in pairs], (d for d in dicts), Reader(dicts))
        for data in (*forms, Reader(pairs), str(path), path, opened):
            feeds = list(open_feeds(data, TWO))
            assert values(iter(feeds)) == expected
            assert all(list(f) == ["x", "n"] for f in feeds)
            assert all(isinstance(f["n"], np.ndarray) and f["n"].shape == () for f in feeds)


def test_single_arrays_for_a_model_of_one_input() -> None:
    for data in (rows(2), iter(rows(2)), np.stack(rows(2)), Reader(rows(2))):
        assert [f["x"][0, 0] for f in open_feeds(data, ONE)] == [0, 1]


def test_a_mapping_is_one_sample() -> None:
    assert len(list(open_feeds({"x": rows(1)[0]}, ONE))) == 1


def test_only_the_first_sample_is_read_before_it_is_asked_for() -> None:
    reader = Reader(rows(5))
    feeds = open_feeds(reader, ONE)
    assert reader.asked == 1
    next(feeds)
    assert reader.asked == 1
    next(feeds)
    assert reader.asked == 2


def test_a_later_misfit_is_found_when_it_comes_and_says_which() -> None:
    feeds = open_feeds([*rows(2), np.zeros((2, 4), np.float32)], ONE)
    assert next(feeds)["x"].shape == next(feeds)["x"].shape == (2, 3)
    with pytest.raises(CalibrationError, match="sample 2") as e:
        next(feeds)
    assert (e.value.sample, e.value.tensor) == (2, "x")


@pytest.mark.parametrize("end", [{}, (), [], StopIteration])
def test_a_reader_may_end_otherwise_than_with_none(end: object) -> None:
    samples = iter(rows(2))

    class Ends:
        def get_next(self) -> object:
            return next(samples) if end is StopIteration else next(samples, end)

    assert len(list(open_feeds(Ends(), ONE))) == 2
    with pytest.raises(CalibrationError, match="no sample"):
        open_feeds(Ends(), ONE)


def test_what_the_reader_raises_comes_through() -> None:
    def broken() -> Iterator[np.ndarray]:
        yield rows(1)[0]
        raise ZeroDivisionError

    feeds = open_feeds(broken(), ONE)
    next(feeds)
    with pytest.raises(ZeroDivisionError):
        next(feeds)

    class Broken:
        def get_next(self) -> object:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        open_feeds(Broken(), ONE)


X = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    ("sample", "inputs", "tensor", "words"),
    [
        ({"X": X}, ONE, "x", ["lacks 'x'", "has 'X'", "are 'x': rename yours"]),
        (
            {"x": X, "xs": X},
            ONE,
            "xs",
            ["'xs', which the model does not know", "mean 'x'", "leave others out"],
        ),
        ({}, ONE, "x", ["lacks 'x'", "give all of them"]),
        ((X, 3), ONE, None, ["2 arrays", "1 input: 'x'", "leave labels out"]),
        (X, TWO, None, ["1 array;", "2 inputs: 'x', 'n'"]),
        ((X, 3), TWO, "n", ["is a int, not a numpy array", "numpy.asarray(value, numpy.int64)"]),
        ({"x": [[1.0, 2, 3]]}, ONE, "x", ["is a list"]),
        ((["a"],), WORDS, "x", ["numpy.asarray(value, object)"]),
        (X, WORDS, "x", ["is float32", "wants object", "value.astype(object)"]),
        (X, {"x": InputSpec(BFLOAT16, None)}, "x", ["value.astype(ml_dtypes.bfloat16)"]),
        ("abc", ONE, None, ["is a str"]),
        (X.astype(np.float64), ONE, "x", ["float64", "wants float32", "astype(numpy.float32)"]),
        (X.astype(">f4"), ONE, "x", [">f4", "wants float32"]),
        (np.float32(1), ONE, "x", ["shape ()", "(any, 3)"]),
        (np.zeros((2, 4), np.float32), ONE, "x", ["shape (2, 4)", "wants (any, 3)"]),
        (np.zeros(3, np.float32), ONE, "x", ["shape (3,)", "batch axis with x[None]"]),
        (np.zeros((1, 2, 3), np.float32), ONE, "x", ["x[0]?"]),
        (np.zeros((5, 2, 3), np.float32), ONE, "x", ["several samples"]),
    ],
)
def test_a_misfit_says_where_and_what_to_do(
    sample: object, inputs: dict[str, InputSpec], tensor: str | None, words: list[str]
) -> None:
    with pytest.raises(CalibrationError) as e:
        open_feeds([sample], inputs)
    assert (e.value.sample, e.value.tensor) == (0, tensor)
    for word in (*words, "sample 0"):
        assert word in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        ((1, 8, 6, 3), "Transpose to channels first?"),
        ((8, 6, 3), "Transpose to channels first? Add a batch axis with x[None]?"),
        ((3, 8, 6), "Add a batch axis with x[None]?"),
        ((1, 1, 3, 8, 6), "Take the leading axis off with x[0]?"),
        ((4, 1, 3, 8, 6), "iterate over the first axis"),
        ((4, 3, 8, 6), "batch size is fixed"),
        ((1, 3, 8, 7), "Reshape, resize or pad"),
        ((7,), "Reshape, resize or pad"),
    ],
)
def test_shape_hints(shape: tuple[int, ...], hint: str) -> None:
    with pytest.raises(CalibrationError) as e:
        open_feeds([np.zeros(shape, np.float32)], IMAGE)
    assert hint in str(e.value)
    assert f"{shape}; the model wants (1, 3, 8, 6)" in str(e.value)


def test_channels_last_is_hinted_where_the_model_wants_it() -> None:
    with pytest.raises(CalibrationError, match="channels last"):
        open_feeds([np.zeros((1, 3, 8, 6), np.float32)], {"x": InputSpec(F32, (1, 8, 6, 3))})


def test_free_rank_and_strings() -> None:
    assert list(open_feeds([X], {"x": InputSpec(F32, None)}))
    words = {"x": InputSpec(np.dtype(object), (None,))}
    assert list(open_feeds([np.array(["a", "b"])], words))
    assert list(open_feeds([np.array(["a", "b"], object)], words))


@given(*[st.dictionaries(st.sampled_from("ab"), st.lists(st.integers(0, 9), max_size=3))] * 3)
def test_the_larger_shapes_are_the_same_in_any_order(
    a: dict[str, list[int]], b: dict[str, list[int]], c: dict[str, list[int]]
) -> None:
    x, y, z = ({k: tuple(v) for k, v in shapes.items()} for shapes in (a, b, c))
    assert larger(x, y) == larger(y, x)
    assert larger(larger(x, y), z) == larger(x, larger(y, z))
    assert larger(x, x) == x
    assert larger({"a": (1, 9)}, {"a": (4, 3), "b": ()}) == {"a": (4, 9), "b": ()}
    assert larger({"a": (9,)}, {"a": (1, 2)}) == {"a": (1, 2)}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_refused(bad: float) -> None:
    x = X.copy()
    x[1, 1] = bad
    feeds = open_feeds([X, x], ONE)
    next(feeds)
    with pytest.raises(CalibrationError, match=r"'x' of sample 1 has 1 of 6 values .* NaN") as e:
        next(feeds)
    assert (e.value.sample, e.value.tensor) == (1, "x")


@pytest.mark.parametrize("data", [[], iter(()), Reader([]), ()])
def test_no_sample(data: object) -> None:
    with pytest.raises(CalibrationError, match="gave no sample"):
        open_feeds(data, ONE)


@pytest.mark.parametrize("data", [3, None, b"abc", np.float32(1), np.zeros((), np.float32)])
def test_other_objects_are_refused_with_the_list_of_what_is_accepted(data: object) -> None:
    with pytest.raises(CalibrationError, match="get_next") as e:
        open_feeds(data, ONE)
    assert ".npz" in str(e.value)


def test_unreadable_npz(tmp_path: Path) -> None:
    good = tmp_path / "good.npz"
    np.savez(good, x=np.random.default_rng(0).random((40, 2, 3), np.float32))
    raw = good.read_bytes()
    flipped = bytearray(raw)
    flipped[200] ^= 255
    text, half, empty, crc = (tmp_path / n for n in ("text.npz", "half.npz", "e.npz", "crc.npz"))
    text.write_text("x,y\n1,2\n")
    half.write_bytes(raw[: len(raw) // 2])
    empty.write_bytes(b"")
    crc.write_bytes(flipped)
    npy, pickled = tmp_path / "array.npy", tmp_path / "pickled.npz"
    np.save(npy, X)
    np.savez(pickled, x=np.array([{}], object))
    for path in (text, half, empty, crc, npy, pickled, tmp_path / "missing.npz", tmp_path):
        with pytest.raises(CalibrationError) as e:
            npz_samples(path)
        assert str(path) in str(e.value)
        assert "\n" not in str(e.value)


def test_npz_arrays_must_agree_in_length(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, x=np.zeros((4, 2, 3), np.float32), n=np.zeros(3, np.int64))
    with pytest.raises(CalibrationError, match=r"'x': 4, 'n': 3"):
        open_feeds(path, TWO)
    np.savez(path, x=np.zeros((4, 2, 3), np.float32), n=np.int64(3))
    with pytest.raises(CalibrationError, match="'n': no axis"):
        open_feeds(path, TWO)
    np.savez(path)
    with pytest.raises(CalibrationError, match="gave no sample"):
        open_feeds(path, TWO)


@given(st.lists(st.integers(0, 4), max_size=4), st.lists(st.none() | st.integers(0, 4), max_size=4))
def test_a_shape_is_taken_exactly_if_it_fits(found: list[int], wanted: list[int | None]) -> None:
    fits = len(found) == len(wanted) and all(
        w is None or w == f for f, w in zip(found, wanted, strict=True)
    )
    data = [np.zeros(found, np.float32)]
    inputs = {"x": InputSpec(F32, tuple(wanted))}
    if fits:
        assert next(open_feeds(data, inputs))["x"].shape == tuple(found)
    else:
        with pytest.raises(CalibrationError, match="has shape"):
            open_feeds(data, inputs)
