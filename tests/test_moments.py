"""Second moments: what is summed, exactly in any order; how nodes read their inputs."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from models import conv_chain, mlp, model, node, weights

from qdq.balancing.layouts import moment_layouts
from qdq.calibrate import moments as module
from qdq.calibrate.moments import Layout, MomentSum, MomentSums
from qdq.errors import CalibrationError
from qdq.plan import make_plan
from qdq.prepare import prepare
from qdq.session import run
from qdq.targets import PORTABLE

terms = hnp.arrays(np.float32, (3, 2, 3, 4), elements=st.floats(-(2.0**60), 2.0**60, width=32))


def equal(a: MomentSum, b: MomentSum) -> bool:
    same = a.count == b.count and a.bins.keys() == b.bins.keys()
    return same and all(
        np.array_equal(x, y) for e in a.bins for x, y in zip(a.bins[e], b.bins[e], strict=True)
    )


@given(terms, st.permutations(range(3)))
def test_any_order_gives_the_same_sum(x: np.ndarray, order: list[int]) -> None:
    parts = [MomentSum.of(sample) for sample in x]
    there = parts[0].merge(parts[1]).merge(parts[2])
    a, b, c = (parts[i] for i in order)
    back = a.merge(b.merge(c))
    assert equal(there, back)
    assert there.moments.second.tobytes() == back.moments.second.tobytes()
    assert there.moments.mean.tobytes() == back.moments.mean.tobytes()


@given(terms)
def test_the_moments_are_the_moments(x: np.ndarray) -> None:
    total = MomentSum.of(x[0]).merge(MomentSum.of(x[1])).merge(MomentSum.of(x[2]))
    wide = x.astype(np.float64)
    exact = np.einsum("sbip,sbjp->bij", wide, wide) / 12
    largest = np.abs(wide).max()
    found = total.moments
    # half a code of at least 2**-11 of the largest value, twice
    assert np.abs(found.second - exact).max() <= 2.0**-10 * largest**2
    assert np.abs(found.mean - wide.mean((0, 3))).max() <= 2.0**-11 * largest
    assert np.array_equal(found.second, found.second.swapaxes(1, 2))
    assert total.count == 12


def test_sums_of_the_largest_codes_are_exact() -> None:
    full = MomentSum.of(np.full((1, 2, 512), 15.99999, np.float32))
    ((products, sums),) = full.bins.values()
    assert products.max() * (module._ROWS / 512) <= 2.0**53
    assert (products == np.rint(products)).all()
    assert (sums == np.rint(sums)).all()
    assert products[0, 0, 0] == 2.0**28 * 512


def test_more_than_can_be_summed_exactly_is_refused() -> None:
    one = MomentSum.of(np.ones((1, 1, 1), np.float32))
    many = MomentSum(one.bins, module._ROWS)
    with pytest.raises(CalibrationError, match="more than the 33554432 that can be summed exactly"):
        many.merge(one)


def conv_model(**attributes) -> tuple[onnx.ModelProto, np.ndarray]:
    w = weights(6, 4 // attributes.get("group", 1), 3, 2)
    net = model(
        [node("Conv", ["x", "w"], "y", **attributes)],
        {"x": [2, 4, 9, 8]},
        {"y": [None] * 4},
        {"w": w},
    )
    return net, w


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"pads": [1, 0, 2, 1]},
        {"strides": [2, 3], "dilations": [2, 1], "pads": [2, 1, 0, 1]},
        {"group": 2, "pads": [1, 1, 1, 1]},
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        {"auto_pad": "SAME_LOWER"},
    ],
    ids=str,
)
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_terms_times_weights_are_the_convolution(attributes: dict, blocks: int) -> None:
    net, w = conv_model(**attributes)
    prepared = prepare(net)
    (layout,) = moment_layouts(prepared, make_plan(prepared, target=PORTABLE)).values()
    groups = attributes.get("group", 1)
    layout = replace(layout, blocks=blocks)
    x = np.random.default_rng(0).standard_normal((2, 4, 9, 8)).astype(np.float32)
    ((y,),) = (o.values() for o in run(net, [{"x": x}]))  # onnx 1.19 pads less for SAME_UPPER
    assert y[0, 0].size * 2 <= 256  # all positions are taken
    found = layout.terms(x).reshape(groups, -1, 2 * y[0, 0].size)
    rows = w.reshape(groups, 6 // groups, -1)
    width = rows.shape[-1]
    assert not found[:, width:].any()  # fills up the last block
    again = (rows @ found[:, :width]).reshape(6, 2, *y.shape[2:]).swapaxes(0, 1)
    assert np.abs(again - y).max() < 1e-5


def test_matmul_terms_are_its_rows() -> None:
    layout = Layout(tensor="x", channels=5, blocks=2)
    x = np.arange(30, dtype=np.float32).reshape(2, 3, 5)
    found = layout.terms(x)
    assert found.shape == (2, 3, 6)
    assert np.array_equal(found.reshape(6, 6)[:5], x.reshape(6, 5).T)
    assert not found.reshape(6, 6)[5].any()
    assert layout.terms(x[0, 0]).shape == (2, 3, 1)


@given(st.integers(1, 10**6), st.integers(1, 300), st.integers(1, 512))
def test_positions_are_spread_over_rows_and_columns(total: int, width: int, limit: int) -> None:
    at = module._pattern(total, width, limit)
    assert at.size <= limit
    assert at.size == 0 or at[-1] < total
    if at.size > width:
        assert np.unique(at % width).size == width


def test_shapes_that_do_not_fit_are_named() -> None:
    moments = MomentSums([Layout(tensor="x", channels=3)])
    moments.add({"x": np.zeros((1, 3), np.float32)}, 0)
    other = {"x": np.zeros((1, 4), np.float32)}
    with pytest.raises(CalibrationError, match=r"'x' has shape \(1, 4\).*3 channels") as caught:
        moments.add(other, 1)
    assert caught.value.sample == 1
    assert caught.value.tensor == "x"


def test_empty_batches_do_not_count_and_equal_layouts_are_summed_once() -> None:
    batches = [{"x": np.full((4, 3), k, np.float32)} for k in range(3)]
    batches.append({"x": np.zeros((0, 3), np.float32)})
    layouts = [Layout(tensor="x", channels=3), Layout(tensor="x", channels=3)]
    moments = MomentSums(layouts)
    for batch in batches:
        moments.add(batch)
    (total,) = moments.sums.values()
    assert total.count == 12
    assert np.allclose(total.moments.second, 5 / 3)
    assert np.allclose(total.moments.mean, 1)


def test_layouts_of_a_plan_are_bounded_in_memory() -> None:
    for net in (conv_chain(), mlp()):
        prepared = prepare(net)
        plan = make_plan(prepared, target=PORTABLE)
        free = moment_layouts(prepared, plan)
        assert set(free) == {n.node for n in plan.linears}
        assert all(layout.blocks == 1 for layout in free.values())
        tight = moment_layouts(prepared, plan, memory=free_size(free) // 2)
        assert 0 < free_size(tight) <= free_size(free) // 2


def free_size(layouts: dict[str, Layout]) -> int:
    return sum(layout.size for layout in set(layouts.values()))
