"""Laws of the minimum cut: against every possible cut on small graphs."""

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from qdq.placement.mincut import Network

edges = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 20)), min_size=0, max_size=14
)


def cost(side: set[int], listed: list[tuple[int, int, int]]) -> int:
    return sum(c for a, b, c in listed if a in side and b not in side)


@given(edges)
@settings(max_examples=300, deadline=None)
def test_no_cut_is_cheaper(listed: list[tuple[int, int, int]]) -> None:
    net = Network(6)
    for tail, head, capacity in listed:
        net.edge(tail, head, capacity)
    found = net.source_side(0, 1)
    assert 0 in found
    assert 1 not in found
    best = min(
        cost({0} | {v for v, inside in zip(range(2, 6), bits, strict=True) if inside}, listed)
        for bits in product((False, True), repeat=4)
    )
    assert cost(found, listed) == best


def test_long_chain_needs_no_recursion() -> None:
    net = Network(5000)
    for v in range(2, 4999):
        net.edge(v, v + 1, 5 if v != 2500 else 1)
    net.edge(0, 2, 9)
    net.edge(4999, 1, 9)
    side = net.source_side(0, 1)
    assert 2500 in side
    assert 2501 not in side


def test_extra_vertices() -> None:
    net = Network(2)
    middle = net.vertex()
    net.edge(0, middle, 3)
    net.edge(middle, 1, 7)
    assert net.source_side(0, 1) == {0}


@given(edges, st.lists(st.tuples(st.integers(0, 13), st.integers(0, 9)), max_size=6))
@settings(max_examples=300, deadline=None)
def test_a_widened_network_is_cut_as_one_built_so(
    listed: list[tuple[int, int, int]], wider: list[tuple[int, int]]
) -> None:
    net = Network(6)
    numbers = [net.edge(*edge) for edge in listed]
    before = net.source_side(0, 1)
    copied = net.copy()
    grown = [list(edge) for edge in listed]
    for k, by in wider:
        if k < len(numbers):
            net.widen(numbers[k], by)
            grown[k][2] += by
    fresh = Network(6)
    for tail, head, capacity in grown:
        fresh.edge(tail, head, capacity)
    assert net.source_side(0, 1) == fresh.source_side(0, 1)
    assert copied.source_side(0, 1) == before  # a copy has a flow of its own
