"""The equation of an Einsum, with a letter for each axis. No onnx."""

import string
from collections.abc import Sequence

__all__ = ["labelled"]


def labelled(equation: str, ranks: Sequence[int | None]) -> tuple[list[str], str] | None:
    """Labels of the operands' axes, and of those of the result; "..." becomes letters too.

    Args:
        equation: as in the node; without "->" the result has the labels that are there once, in
            alphabetical order.
        ranks: of the operands, as far as they are known.

    Returns:
        None if a rank that is wanted is not known, or something does not fit.
    """
    read, arrow, made = equation.replace(" ", "").partition("->")
    terms = read.split(",")
    if len(terms) != len(ranks):
        return None
    if not arrow:
        once = sorted(c for c in read if c.isalpha() and read.count(c) == 1)
        made = "".join(["..."] * ("..." in read) + once)
    # operators want as many unnamed axes of each operand that has any
    counts = {
        None if rank is None else rank - len(term.replace("...", ""))
        for term, rank in zip(terms, ranks, strict=True)
        if "..." in term
    }
    count = counts.pop() if counts else 0
    if counts or count is None or count < 0:
        return None
    free = "".join([c for c in string.ascii_letters if c not in equation][:count])
    return [term.replace("...", free) for term in terms], made.replace("...", free)
