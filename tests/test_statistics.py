"""Statistics: exact to merge, saved and loaded without loss, refused where they do not belong."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import conv_chain, feeds
from onnx import numpy_helper

from qdq.calibrate import CALIBRATORS, MSE, Calibrator, Entropy, MinMax, Percentile
from qdq.calibrate.moments import Layout, MomentSum
from qdq.errors import CalibrationError, ConfigError
from qdq.ranges import TensorRange
from qdq.statistics import Statistics
from qdq.statistics.packing import Arrays
from qdq.statistics.sharding import collect
from qdq.statistics.shipment import Shipment, fingerprint

ALL = [cls() for cls in CALIBRATORS.values()]
every = pytest.mark.parametrize("calibrator", ALL, ids=lambda c: c.name)

NET = conv_chain(channels=8, size=8, depth=2)
DATA = feeds({"x": (1, 8, 8, 8)}, 6)
REFUSED = r"s\.npz' cannot be read as calibration statistics of qdq"
TENSORS, AXES = ("x", "c0", "r0", "r1"), {"x": 1, "r0": 1}


LAYOUTS = (
    Layout(tensor="r0", channels=8, kernel=(3, 3), strides=(1, 1), dilations=(1, 1), pads=(1,) * 4),
    Layout(tensor="r1", channels=8, groups=2, kernel=(1, 1), strides=(1, 1), dilations=(1, 1),
           pads=(0,) * 4),
)  # fmt: skip


def of(samples: list[dict[str, np.ndarray]], calibrator: Calibrator[Any]) -> Statistics:
    return collect(NET, TENSORS, AXES, samples, calibrator, layouts=LAYOUTS)


@every
@settings(max_examples=15)
@given(owner=st.lists(st.integers(0, 2), min_size=6, max_size=6), order=st.permutations(range(3)))
def test_any_split_and_any_order_gives_the_whole(
    calibrator: Calibrator[Any], owner: list[int], order: list[int]
) -> None:
    parts = [[d for d, o in zip(DATA, owner, strict=True) if o == k] for k in order]
    found = [of(p, calibrator) for p in parts if p]
    merged = found[0]
    for other in found[1:]:
        assert merged.merge(other, calibrator) == other.merge(merged, calibrator)
        merged = merged.merge(other, calibrator)
    assert merged == of(DATA, calibrator)


def test_they_say_what_was_seen() -> None:
    found = of(DATA, MinMax())
    x = np.concatenate([d["x"] for d in DATA])
    assert found.samples == 6
    assert found.summaries["x"] == TensorRange(x.min(), x.max())
    assert list(found.summaries) == list(TENSORS)
    np.testing.assert_allclose(found.means["x"], x.mean((0, 2, 3)), atol=1e-6)
    assert list(found.means) == ["x", "r0"]


def test_what_differs_is_not_equal() -> None:
    found = of(DATA, MinMax())
    more = of([*DATA, DATA[0]], MinMax())  # same ranges
    assert found.summaries == more.summaries
    assert found != more
    x = replace(found, sums={**found.sums, "x": found.sums["r0"]})
    assert x != found
    assert found != replace(found, summaries={**found.summaries, "x": found.summaries["r0"]})
    assert found != replace(found, moments={})
    total = found.moments[LAYOUTS[0]]
    for other in (
        MomentSum(total.bins, total.count + 1),
        MomentSum({e + 4: sums for e, sums in total.bins.items()}, total.count),
        MomentSum({e: (a + 1, b) for e, (a, b) in total.bins.items()}, total.count),
    ):
        assert found != replace(found, moments={**found.moments, LAYOUTS[0]: other})
    assert found != "something else"


def test_merging_wants_one_model_and_one_calibrator() -> None:
    found = of(DATA, MinMax())
    with pytest.raises(ConfigError, match=r"made by MinMax\(\), the calibrator given is MSE\(\)"):
        found.merge(found, MSE())
    with pytest.raises(ConfigError, match=r"their fingerprint differs: '.*' and 'other'"):
        found.merge(replace(found, fingerprint="other"), MinMax())
    with pytest.raises(ConfigError, match="their version differs"):
        found.merge(replace(found, version="0"), MinMax())
    with pytest.raises(ConfigError, match=r"their tensors differs: .*'r1'.* and \(\)$"):
        found.merge(replace(found, tensors=()), MinMax())
    sized = replace(found, axes={}, shapes={"x": (2, 8, 8, 8)})
    with pytest.raises(ConfigError, match=r"axes differs.*\(2, 8, 8, 8\).*one list of all samples"):
        found.merge(sized, MinMax())


def test_shapes_merge_to_the_larger_ones() -> None:
    a, b, c = (
        replace(of([d], MinMax()), shapes={"x": shape})
        for d, shape in zip(DATA[:3], [(1, 8, 9, 8), (2, 8, 8, 8), (9, 9, 9)], strict=True)
    )
    assert a != replace(a, shapes={})
    whole = a.merge(b, MinMax()).merge(c, MinMax())
    assert whole == c.merge(b.merge(a, MinMax()), MinMax())
    assert whole.shapes == {"x": (2, 8, 9, 8)}


def test_channels_that_differ_between_shards() -> None:
    found = of(DATA, MinMax())
    cut = replace(found.sums["x"], bins=found.sums["x"].bins[:, :3])
    with pytest.raises(CalibrationError, match=r"'x' has 8 channels .* and 3 in others") as e:
        found.merge(replace(found, sums={"x": cut}), MinMax())
    assert e.value.tensor == "x"


# ---- files ---------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("axes", [AXES, {}], ids=["means", "no means"])
def test_saved_and_loaded(
    calibrator: Calibrator[Any], axes: dict[str, int], tmp_path: Path
) -> None:
    shapes = {"x": (1, 8, 8, 8), "none": ()}
    layouts = LAYOUTS if axes else ()
    found = collect(NET, TENSORS, axes, DATA, calibrator, layouts=layouts, shapes=shapes)
    found.save(tmp_path / "stats")  # no ending is added
    loaded = Statistics.load(tmp_path / "stats")
    assert loaded == found
    assert loaded.samples == 6
    assert loaded.shapes == shapes
    assert [loaded.summaries[n] for n in TENSORS] == [found.summaries[n] for n in TENSORS]
    loaded.merge(found, calibrator)
    found.merge(loaded, calibrator).save(tmp_path / "twice")
    assert Statistics.load(tmp_path / "twice").samples == 12
    assert {p.name for p in tmp_path.iterdir()} == {"stats", "twice"}


def test_a_tensor_without_values_stays_without(tmp_path: Path) -> None:
    found = of(DATA, MSE())
    left = {n: s for n, s in found.summaries.items() if n != "c0"}
    moments = {LAYOUTS[1]: found.moments[LAYOUTS[1]]}
    found = replace(found, summaries=left, sums={"r0": found.sums["r0"]}, moments=moments)
    found.save(tmp_path / "s.npz")
    loaded = Statistics.load(tmp_path / "s.npz")
    assert loaded == found
    assert loaded.tensors == TENSORS
    assert list(loaded.means) == ["r0"]
    empty = replace(found, summaries={}, sums={}, tensors=(), axes={}, layouts=(), moments={})
    empty.save(tmp_path / "s.npz")
    assert Statistics.load(tmp_path / "s.npz") == empty


def test_names_of_any_kind(tmp_path: Path) -> None:
    found = of(DATA, MinMax())
    names = ("../up", "a/b:0", "größe\0", "header")
    odd = dict(zip(names, found.summaries.values(), strict=True))
    found = replace(found, tensors=names, summaries=odd)
    found.save(tmp_path / "s.npz")
    assert Statistics.load(tmp_path / "s.npz") == found


def test_equal_statistics_are_equal_bytes(tmp_path: Path) -> None:
    of(DATA, MSE()).save(tmp_path / "a.npz")
    of(DATA[::-1], MSE()).save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_summaries_without_a_form_in_the_file(tmp_path: Path) -> None:
    found = replace(of(DATA, MinMax()), summaries={"x": 3.0}, calibrator="Mine()")
    with pytest.raises(ConfigError, match=r"type float, made by Mine\(\), have no form"):
        found.save(tmp_path / "s.npz")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.npz"
    of(DATA[:1], MSE()).save(path)
    before = path.read_bytes()

    def interrupted(file: Any, **_: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        of(DATA, MSE()).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        of(DATA, MSE()).save(tmp_path / "none" / "s.npz")


def counts(arrays: Arrays) -> None:
    arrays["counts"] = arrays["counts"][:-1]


def fields(arrays: Arrays) -> None:
    arrays["exponent"] = arrays["exponent"] + 1


def form(arrays: Arrays) -> None:
    arrays["header"] = np.asarray(str(arrays["header"]).replace("statistics 6", "statistics 9"))


def json(arrays: Arrays) -> None:
    arrays["header"] = np.asarray("[]")


def kind(arrays: Arrays) -> None:
    arrays["header"] = np.asarray(str(arrays["header"]).replace('"histogram"', '"other"'))


def peaks(arrays: Arrays) -> None:
    arrays["peaks"] = np.zeros((3, 2), np.float32)


def data(arrays: Arrays) -> None:
    arrays.clear()
    arrays["x"] = np.zeros((2, 8))


def pickled(arrays: Arrays) -> None:
    arrays["header"] = np.array([{}], object)


@pytest.mark.parametrize("change", [counts, fields, form, json, kind, peaks, data, pickled])
def test_other_contents_are_refused(change: Callable[[Arrays], None], tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    of(DATA, MSE()).save(path)
    with np.load(path) as opened:
        arrays = dict(opened)
    change(arrays)
    np.savez(path, **arrays)
    with pytest.raises(CalibrationError, match=REFUSED):
        Statistics.load(path)


@pytest.mark.parametrize("change", [lambda b: b[:400], lambda b: b"", lambda b: b[::-1]])
def test_a_damaged_file_is_refused(change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    of(DATA, MSE()).save(path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CalibrationError, match=REFUSED):
        Statistics.load(path)


def test_a_bare_array_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "s.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(CalibrationError, match=REFUSED):
        Statistics.load(tmp_path / "s.npz")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="do not exist"):
        Statistics.load(tmp_path / "none.npz")
    with pytest.raises(CalibrationError, match="cannot be read"):
        Statistics.load(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_the_file_has_ordinary_permissions(tmp_path: Path) -> None:
    of(DATA, MinMax()).save(tmp_path / "s.npz")
    (tmp_path / "other").touch()
    assert (tmp_path / "s.npz").stat().st_mode == (tmp_path / "other").stat().st_mode


# ---- where they belong ---------------------------------------------------------------------


def require(found: Statistics, **changes: Any) -> None:
    settings: dict[str, Any] = {
        "calibrator": MSE(),
        "fingerprint": fingerprint(NET),
        "tensors": TENSORS,
        "axes": AXES,
    }
    found.require(**(settings | changes))


def test_statistics_of_this_model_are_taken() -> None:
    found = of(DATA, MSE())
    require(found)
    require(found, tensors=("c0",), axes={})  # more than needed does no harm


def test_another_calibrator_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"made by MSE\(\), the calibrator given is MinMax\(\)"):
        require(of(DATA, MSE()), calibrator=MinMax())
    found = of(DATA, Percentile(99.9))
    with pytest.raises(ConfigError, match=r"percentile=99\.9\).*percentile=99\.99\)"):
        require(found, calibrator=Percentile())
    with pytest.raises(ConfigError, match=r"Entropy\("):
        require(found, calibrator=Entropy())


def test_another_model_is_refused() -> None:
    other = onnx.ModelProto()
    other.CopyFrom(NET)
    value = numpy_helper.to_array(other.graph.initializer[0]).copy()
    value.flat[-1] = np.nextafter(value.flat[-1], np.float32(9))
    other.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(value, other.graph.initializer[0].name)
    )
    with pytest.raises(CalibrationError, match=f"{fingerprint(NET)}.*{fingerprint(other)}"):
        require(of(DATA, MSE()), fingerprint=fingerprint(other))


def test_another_version_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"made by qdq 0\.0\.0, this is qdq"):
        require(replace(of(DATA, MSE()), version="0.0.0"))


def test_tensors_that_were_not_observed() -> None:
    found = of(DATA, MSE())
    with pytest.raises(CalibrationError, match=r"lack tensor 'c1', .* in all: 1\)") as e:
        require(found, tensors=("c0", "c1"))
    assert e.value.tensor == "c1"
    with pytest.raises(CalibrationError, match="lack tensor 'r0'"):
        require(found, axes={"r0": -1})
    require(found, layouts=LAYOUTS[1:])
    with pytest.raises(CalibrationError, match="lack tensor 'r0'"):
        require(found, layouts=[replace(LAYOUTS[0], pads=(0,) * 4)])


# ---- the model's fingerprint and its way to other processes ----------------------------------


def test_the_fingerprint_is_of_the_values_not_of_how_they_are_stored() -> None:
    other = onnx.ModelProto()
    other.CopyFrom(NET)
    large = max(other.graph.initializer, key=lambda t: len(t.raw_data))
    value = numpy_helper.to_array(large)
    large.ClearField("raw_data")
    large.float_data.extend(value.ravel().tolist())
    assert fingerprint(other) == fingerprint(NET)
    assert len(fingerprint(NET)) == 64
    other.graph.node[0].attribute[0].ints[0] += 1
    assert fingerprint(other) != fingerprint(NET)
    large.name += "_"
    other.graph.node[0].attribute[0].ints[0] -= 1
    assert fingerprint(other) != fingerprint(NET)


def test_words_about_a_model_are_not_in_its_fingerprint() -> None:
    other = onnx.ModelProto()
    other.CopyFrom(NET)
    other.producer_name, other.producer_version, other.model_version = "tool", "3", 7
    other.doc_string, other.domain, other.graph.name = "words", "org.example", "another"
    for part in (other.graph, *other.graph.node, *other.graph.initializer, *other.graph.input):
        part.doc_string = "words"
        part.metadata_props.add(key="k", value="v")
    other.graph.node[0].attribute[0].doc_string = "words"
    onnx.helper.set_model_props(other, {"author": "me"})
    before = other.SerializeToString(deterministic=True)
    assert fingerprint(other) == fingerprint(NET)
    assert other.SerializeToString(deterministic=True) == before
    other.graph.node[0].name += "_"
    assert fingerprint(other) != fingerprint(NET)


def test_a_shipped_model_is_the_same_model() -> None:
    state = Shipment(NET).__getstate__()
    assert len(state[1]) == 2  # the weights; biases travel with the graph
    arrived = Shipment.__new__(Shipment)
    arrived.__setstate__(state)
    assert fingerprint(arrived.model) == fingerprint(NET)
    assert {t.name: t for t in arrived.model.graph.initializer} == {
        t.name: t for t in NET.graph.initializer
    }
