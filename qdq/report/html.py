"""The report as one HTML page that needs nothing else: no network, no script, no library."""

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from qdq.report import NodeError, Report, ScaleChange, TensorError
from qdq.report.svg import histogram, scale_chart, sqnr_chart
from qdq.report.text import advice_head, db, level, mark, plural, size

__all__ = ["page"]

ROWS, CARDS = 25, 12

STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #d9dee5; --paper: #ffffff; --card: #f6f8fa;
  --blue: #1f6feb; --orange: #c2570c; --red: #c9252d; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa5b4; --line: #333c48;
  --paper: #14181e; --card: #1c222a; --blue: #6ea8fe; --orange: #f0883e; --red: #ff7b72; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1060px; padding: 24px 20px 60px; color: var(--ink);
  background: var(--paper); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0 0 2px; } h2 { font-size: 18px; margin: 36px 0 6px; }
p { margin: 4px 0 10px; max-width: 78ch; } .soft, .soft td { color: var(--soft); }
code, .name { font: 12.5px/1.4 ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 12px;
  margin: 18px 0; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 12px; }
.tile b { display: block; font-size: 22px; } .tile span { color: var(--soft); font-size: 13px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: left; padding: 4px 10px 4px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--soft); font-weight: 600; } .r { text-align: right; white-space: nowrap; }
.wide { overflow-x: auto; } .chart { min-width: 640px; } .nodes th:last-child { width: 48%; }
.narrow { width: auto; }
.bar { display: block; height: 8px; background: var(--orange); border-radius: 2px; min-width: 1px; }
.share { display: block; width: 90px; padding-top: 7px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: 12px; }
.card svg { margin-top: 6px; } .card p { margin: 0; font-size: 12.5px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.grid { stroke: var(--line); } .axis { stroke: var(--soft); }
.clip { stroke: var(--red); stroke-width: 1.5; stroke-dasharray: 4 3; }
.bars { fill: var(--blue); opacity: .55; }
polyline { fill: none; stroke-width: 1.5; } polyline.accumulated { stroke: var(--blue); }
polyline.raised { stroke: var(--orange); opacity: .7; }
circle.accumulated { fill: var(--blue); } circle.local { fill: var(--orange); }
.key::before { content: ""; display: inline-block; width: 10px; height: 10px; border-radius: 5px;
  margin: 0 5px 0 0; background: var(--orange); } .key.blue::before { background: var(--blue); }
.key.red::before { background: var(--red); border-radius: 0; height: 3px; vertical-align: 4px; }
details { margin: 8px 0; } summary { cursor: pointer; color: var(--blue); }
.note { border-left: 3px solid var(--orange); padding-left: 10px; }
"""


def page(report: Report) -> str:
    """The page, as text of a file in UTF-8."""
    sections = (
        _head(report),
        _advice(report),
        _nodes(report),
        _outputs(report),
        _kernels(report),
        _histograms(report),
        _history(report),
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">"
        f"<title>{escape(report.quantized_model)}: what quantization did</title>"
        f"<style>{STYLE}</style></head><body>" + "\n".join(sections) + "</body></html>\n"
    )


def _head(report: Report) -> str:
    before, after = report.bytes
    integer = sum(n.integer for n in report.nodes)
    made = sum(n.op_type != "input" for n in report.nodes)
    worst = min(report.outputs, key=lambda o: o.sqnr_db, default=None)
    tiles = [
        (level(worst.sqnr_db), f"SQNR of output {worst.name}") if worst else ("-", "outputs"),
        (f"{before / after:.2f}x smaller", f"{size(after)} of {size(before)}"),
        (f"{integer} of {made}", "compared nodes run on integers"),
    ]
    t = report.timing
    if t is not None:
        spread = f"{t.ratio_spread[0]:.2f} to {t.ratio_spread[1]:.2f}"
        words = f"{t.quantized_ms:.3g} ms against {t.float_ms:.3g} ms; half of the runs: {spread}"
        tiles.insert(1, (f"{t.ratio:.2f}x as fast", words))
    notes = "".join(f'<p class="note">{escape(n)}</p>' for n in report.notes)
    return (
        "<h1>What quantization did</h1>"
        f'<p class="soft"><span class="name">{escape(report.quantized_model)}</span> against '
        f'<span class="name">{escape(report.float_model)}</span>, '
        f"{plural(report.samples, 'sample')}</p>"
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in tiles
        )
        + f"</div>{notes}"
    )


def _advice(report: Report) -> str:
    if not report.advice:
        return ""
    rows = [
        (a.gain, "-" if a.slower is None else f"{100 * a.slower:+.0f} %",
         _words(a.what), f"<code>{escape(a.rule)}</code>")
        for a in report.advice
    ]  # fmt: skip
    head = advice_head(report)
    return (
        f"<h2>Advice</h2><p>{escape(head[0].upper() + head[1:])}. The neighbours stay as they are; "
        "qdq's own placement may move some more. The rules go into "
        "<code>Scheme(rules=(...,))</code>.</p>"
        + _table(("outputs", "latency", "what", "rule"), rows, "rr  ")
    )


def _words(text: str) -> str:
    return f'<span class="name">{escape(text)}</span>'


def _nodes(report: Report) -> str:
    rows = [_node_row(n, report.nodes[0].share or 1.0) for n in report.nodes]
    head = ("noise", "", "arises here", "accumulated", "", "operator", "node")
    more = len(rows) - ROWS
    rest = (
        _details(f"{more} more nodes", _table(head, rows[ROWS:], "r rr   ", "nodes"))
        if more > 0
        else ""
    )
    return (
        "<h2>Signal to quantization noise, node by node</h2>"
        '<p><span class="key">arises here</span>: the node with rounded constants and a rounded '
        "result, against the exact node, both on the float model's inputs as codes hold them. "
        '<span class="key blue">accumulated</span>: its result in the quantized model, against the '
        "float model. 20 dB is an error of a tenth, 40 dB of a hundredth. Point at a dot for its "
        "node.</p>"
        + _chart(sqnr_chart(report.nodes))
        + "<h2>Nodes by harm</h2><p>Noise: the node's part of all noise that arises, each relative "
        "to its own signal. int: an integer node. Q: a float node whose result is rounded for its "
        "readers.</p>" + _table(head, rows[:ROWS], "r rr   ", "nodes") + rest
    )


def _node_row(n: NodeError, largest: float) -> tuple[str, ...]:
    reason = f'<br><span class="soft">{escape(n.reason)}</span>' if n.reason else ""
    width = 100 * n.share / largest
    bar = f'<span class="share"><span class="bar" style="width:{width:.1f}%"></span></span>'
    levels = db(n.local_db), db(n.accumulated_db)
    return (f"{n.share:.1%}", bar, *levels, mark(n), escape(n.op_type), _words(n.name) + reason)


def _outputs(report: Report) -> str:
    rows = [
        (_words(o.name), db(o.sqnr_db), db(o.unfused_db), f"{o.largest:.4g}",
         "-" if o.cosine is None else f"{o.cosine:.6f}",
         "-" if o.agreement is None else f"{o.agreement:.1%}")
        for o in report.outputs
    ]  # fmt: skip
    head = ("output", "SQNR in dB", "unfused", "largest difference", "cosine", "same largest")
    return (
        "<h2>Outputs</h2><p>As onnxruntime runs both models; unfused: the QDQ model as it is "
        "written; same largest: rows along the last axis whose largest value is at the same "
        "place.</p>" + _table(head, rows, " rrrrr")
    )


def _kernels(report: Report) -> str:
    head = ("operator", "planned integer", "integer", "float")
    rows = [
        (escape(k.op_type), "unknown" if k.planned is None else str(k.planned), str(k.integer),
         str(k.float))
        for k in report.kernels
    ]  # fmt: skip
    return (
        "<h2>Kernels that run</h2><p>Nodes of onnxruntime's optimized model. Q and DQ that run on "
        f"their own: {report.borders}.</p>" + (_table(head, rows, " rrr", "narrow") if rows else "")
    )


def _histograms(report: Report) -> str:
    coded = [t for t in report.tensors if t.histogram is not None and t.dtype is not None]
    moving = sorted((t for t in coded if t.kind == "activation"), key=_level)
    weights = sorted((t for t in coded if t.kind == "weight"), key=_level)
    return (
        "<h2>Values and codes</h2><p>Counts (logarithmic) of the float model's values. "
        '<span class="key red">where the codes begin and end</span>: values beyond are clipped. '
        "The least exact tensors come first.</p><h3>Activations</h3>"
        + _cards(moving)
        + "<h3>Weights</h3><p>With a scale per channel the lines show the widest channel.</p>"
        + _cards(weights)
    )


def _level(tensor: TensorError) -> float:
    return float("inf") if tensor.rounding_db is None else tensor.rounding_db


def _cards(tensors: Sequence[TensorError]) -> str:
    if not tensors:
        return '<p class="soft">None.</p>'
    cards = [_card(t) for t in tensors]
    grid = '<div class="cards">{}</div>'
    shown = grid.format("".join(cards[:CARDS]))
    if len(cards) > CARDS:
        rest = grid.format("".join(cards[CARDS:]))
        shown += _details(f"{len(cards) - CARDS} more", rest)
    return shown


def _card(t: TensorError) -> str:
    if t.histogram is None or t.used is None or t.represented is None:
        return ""
    clipped = f", {t.clipped:.2g} of the values clipped" if t.clipped else ""
    used, codes = (f"{low:.4g} to {high:.4g}" for low, high in (t.used, t.represented))
    return (
        f'<div class="card"><p class="name">{escape(t.name)}</p>'
        f'<p class="soft">{t.dtype}, {level(t.rounding_db)}{clipped}<br>values {used}<br>'
        f"codes {codes}</p>{histogram(t.histogram, t.represented)}</div>"
    )


def _history(report: Report) -> str:
    head = "<h2>Weight scales, solver step by solver step</h2>"
    if not report.history:
        return head + (
            '<p class="soft">The quantized model does not say (another tool made it).</p>'
        )
    by_tensor: dict[str, list[ScaleChange]] = {}
    for change in report.history:
        by_tensor.setdefault(change.tensor, []).append(change)
    steps = list(dict.fromkeys(c.step for c in report.history))
    moved = [h for h in by_tensor.values() if any(c.ratio is not None and c.ratio > 1 for c in h)]
    text = (
        f"<p>{len(by_tensor)} tensors; the scales of {len(moved)} were raised after the first "
        "step, so that a bias fits beside the sum of products.</p>"
    )
    columns = ("tensor", "step", "largest scale", "ratio", "note")
    seen = ""
    if moved:
        raised = [[c for c in h if c.ratio is not None and c.ratio > 1] for h in moved]
        table = _table(columns, list(_history_rows(raised)), "  rr ")
        seen = _chart(scale_chart(moved, steps)) + table
    rows = list(_history_rows(by_tensor.values()))
    return head + text + seen + _details(f"all {len(rows)} changes", _table(columns, rows, "  rr "))


def _history_rows(histories: Iterable[Sequence[ScaleChange]]) -> Iterator[tuple[str, ...]]:
    for history in histories:
        for c in history:
            ratio = "" if c.ratio is None else f"{c.ratio:.6g}"
            yield _words(c.tensor), escape(c.step), f"{c.scale:.6g}", ratio, escape(c.note or "")


def _chart(svg: str) -> str:
    return f'<div class="wide"><div class="chart">{svg}</div></div>'


def _details(summary: str, inner: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], sides: str, kind: str = "") -> str:
    """A table; cells are HTML already. ``sides``: r for a column of numbers."""

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = [' class="r"' if s == "r" else "" for s in sides]
        return "".join(f"<{tag}{k}>{c}</{tag}>" for c, k in zip(row, kinds, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{cells("th", head)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
