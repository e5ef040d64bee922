"""Equations of Einsum with a letter for each axis."""

import numpy as np
import pytest

from qdq.equation import labelled


@pytest.mark.parametrize(
    ("equation", "ranks"),
    [("ba,ac", [2, 2]), ("ij , jk -> k i", [2, 2]), ("...a,ab", [3, 2]),
     ("b...a,a...->...b", [4, 3]), ("...,a->...a", [2, 1]), ("ab->", [2]),
     ("a,a", [1, 1]), ("...a,...a", [1, 1])],
)  # fmt: skip
def test_it_means_the_same(equation: str, ranks: list[int]) -> None:
    found = labelled(equation, ranks)
    assert found is not None
    terms, made = found
    assert [len(term) for term in terms] == ranks
    factors = [np.random.default_rng(rank).standard_normal((3,) * rank) for rank in ranks]
    wanted = np.einsum(equation, *factors)
    np.testing.assert_allclose(np.einsum(f"{','.join(terms)}->{made}", *factors), wanted)


@pytest.mark.parametrize(
    ("equation", "ranks"),
    [("...a,...a->...", [3, 2]), ("...a,ab->...b", [None, 2]), ("...a,...b", [None, 2]),
     ("ab,bc", [2]), ("...abc", [2])],
    ids=["broadcast", "unknown", "one unknown", "an operand lacks", "an axis lacks"],
)  # fmt: skip
def test_what_cannot_be_told(equation: str, ranks: list[int | None]) -> None:
    assert labelled(equation, ranks) is None


def test_ranks_count_only_where_axes_have_no_name() -> None:
    assert labelled("...a,ab->...b", [3, None]) == (["cda", "ab"], "cdb")
