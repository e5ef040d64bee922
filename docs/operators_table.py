"""Writes the table in reference/operators.md from the code: ``python docs/operators_table.py``.

``tests/test_docs.py`` fails where the page is not current.
"""

from pathlib import Path

from qdq.ops import TABLE
from qdq.ops.demand import Bounded, Demand, Handler, Own, SameAs
from qdq.targets import ORT_CPU, Kernel

PAGE = Path(__file__).parent / "reference" / "operators.md"
START, END = "<!-- table: start -->\n", "<!-- table: end -->"
NAMES = {Own: "own range", SameAs: "as its input", Bounded: "{0.low:g} to {0.high:g}"}


def table() -> str:
    """The Markdown table: what each operator asks for, and the kernel of the CPU provider."""
    rows = ["| operator | codes | output | kernel on the CPU |", "|---|---|---|---|"]
    for op_type, row in sorted(TABLE.items()):
        kernel = ORT_CPU.kernels.get(op_type)
        rows.append(f"| {op_type} | {' | '.join(_demand(row))} | {_fused(kernel)} |")
    return "\n".join(rows) + "\n"


def _fused(kernel: Kernel | None) -> str:
    """The operator that the CPU provider makes, and the one with float output."""
    if kernel is None:
        return "float"
    return f"`{kernel.fused}`" + f"; float out: `{kernel.fused_float}`" * kernel.float_output


def _demand(row: Demand | Handler) -> tuple[str, str]:
    """Input slots that are codes, and where the output's parameters come from."""
    if not isinstance(row, Demand):
        summary = (row.__doc__ or "").strip().partition("\n")[0].rstrip(".")
        return "by the node", summary
    slots = ", ".join(map(str, row.activations))
    return f"input {slots}", NAMES[type(row.output)].format(row.output)


def page(text: str) -> str:
    """The page's text with the present table."""
    head, rest = text.split(START)
    return head + START + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf8")), encoding="utf8")
