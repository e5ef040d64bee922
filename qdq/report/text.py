"""Reports and plans as text, for a terminal."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from qdq.plan import Plan
from qdq.report import NodeError, Report, plain_values

__all__ = [
    "advice_head",
    "columns",
    "db",
    "level",
    "mark",
    "plan_facts",
    "plan_text",
    "plural",
    "size",
    "table",
]

WORTH_DB = 0.5  # a gain below that is not worth a rule


def size(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e6:.3g} MB" if count >= 1e5 else f"{count / 1e3:.3g} kB"


def plural(count: int, what: str) -> str:
    """``1 node``, ``2 nodes``."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def db(value: float | None) -> str:
    """An SQNR for people."""
    if value is None:
        return "-"
    return "exact" if value == math.inf else f"{value:.1f}"


def table(report: Report, rows: int) -> str:
    """The report, with the ``rows`` nodes that harm most."""
    before, after = report.bytes
    lines = [
        f"{report.quantized_model} against {report.float_model}, "
        f"{plural(report.samples, 'sample')}",
        f"size     {size(after)}, {after / before:.0%} of {size(before)}",
    ]
    t = report.timing
    if t is not None:
        lines.append(
            f"latency  {t.quantized_ms:.3g} ms ({_span(t.quantized_spread)}), float "
            f"{t.float_ms:.3g} ms ({_span(t.float_spread)}): {t.ratio:.2f}x as fast "
            f"({_span(t.ratio_spread)})"
        )
    for o in report.outputs:
        same = "" if o.agreement is None else f", same largest value in {o.agreement:.1%} of rows"
        lines.append(
            f"output   {o.name}: {level(o.sqnr_db)}, differs by up to {o.largest:.3g}{same}"
        )
    lines += ["", *_kernel_lines(report), "", *_node_lines(report, rows)]
    if report.advice:
        lines += ["", f"{advice_head(report)}:"]
        lines += [f"  {a}\n    {a.rule}" for a in report.advice]
    return "\n".join(lines + [f"note: {n}" for n in report.notes])


def level(value: float | None) -> str:
    """An SQNR with its unit."""
    text = db(value)
    return text if text in ("-", "exact") else f"{text} dB"


def advice_head(report: Report) -> str:
    """What was tried, and whether any of it is worth a rule."""
    best = max((a.gain_db for a in report.advice), default=0.0)
    worth = "" if best >= WORTH_DB else "; none of it is worth a rule here"
    return f"what leaving nodes float would change, measured on the first samples{worth}"


def mark(node: NodeError) -> str:
    """int: an integer node; Q: a float node whose result is rounded to codes for its readers."""
    if node.integer:
        return "int"
    return "" if node.local_db in (None, math.inf) else "Q"


def _span(spread: tuple[float, float]) -> str:
    return f"{spread[0]:.3g}..{spread[1]:.3g}"


def _kernel_lines(report: Report) -> list[str]:
    rows = [("operator", "planned", "integer", "float")]
    for k in report.kernels:
        planned = "unknown" if k.planned is None else str(k.planned)
        rows.append((k.op_type, planned, str(k.integer), str(k.float)))
    lines = columns(rows, "<>>>") if report.kernels else []
    return [*lines, f"Q and DQ that run on their own: {report.borders}"]


def _node_lines(report: Report, rows: int) -> list[str]:
    head = ("noise", "arises here", "accumulated dB", "", "operator", "node")
    shown = [
        (
            f"{n.share:.1%}",
            db(n.local_db),
            db(n.accumulated_db),
            mark(n),
            n.op_type,
            n.name,
        )
        for n in report.nodes[:rows]
    ]
    lines = columns([head, *shown], ">>><<<")
    rest = len(report.nodes) - rows
    return lines + ([f"{rest} more with less noise (see --json or --html)"] if rest > 0 else [])


def columns(rows: Sequence[tuple[str, ...]], sides: str) -> list[str]:
    """Rows of text as aligned lines; ``sides``: < or > for each column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]


# -- plans ----------------------------------------------------------------------------------------


def plan_facts(plan: Plan) -> dict[str, Any]:
    """A plan as values that ``json.dumps`` takes.

    Returns:
        ``target``; ``nodes``: for each node in graph order its ``name``, ``op_type``, whether it
        is ``integer``, the ``clamp`` that it absorbs and the ``reason`` why it stays float;
        ``tensors``: for each tensor that gets codes its ``name``, ``dtype``, ``symmetric``,
        ``axis`` and ``source``, where its parameters come from.
    """
    left = plan.left_float
    return {
        "target": plan.target.name,
        "nodes": [
            {
                "name": u.view.name,
                "op_type": u.view.op_type,
                "integer": u.view.name not in left,
                "clamp": u.clamp if u.view.name not in left else None,
                "reason": left.get(u.view.name),
            }
            for u in plan.placement.units
        ],
        "tensors": [
            {
                "name": t.name,
                "dtype": t.spec.dtype.name,
                "symmetric": t.spec.symmetric,
                "axis": t.spec.axis,
                "source": plain_values({"kind": type(t.source).__name__, **_fields(t.source)}),
            }
            for t in plan.tensors.values()
        ],
    }


def _fields(source: Any) -> Mapping[str, Any]:
    return {k: getattr(source, k) for k in source.__slots__ if k != "params"}


def plan_text(plan: Plan) -> str:
    """A plan as a table: each node, whether it is integer, and why not."""
    facts = plan_facts(plan)
    rows = [("", "operator", "node", "")]
    for n in facts["nodes"]:
        remark = n["reason"] or (f"with {n['clamp']}" if n["clamp"] else "")
        rows.append(("int" if n["integer"] else "float", n["op_type"], n["name"], remark))
    counts = Counter(n["integer"] for n in facts["nodes"])
    codes = Counter(t["dtype"] for t in facts["tensors"])
    kinds = ", ".join(f"{c} {k}" for k, c in sorted(codes.items())) or "none"
    ends = f"{counts[True]} nodes integer, {counts[False]} float; tensors with codes: {kinds}"
    return "\n".join([*columns(rows, "<<<<"), "", f"for {facts['target']}: {ends}"])
