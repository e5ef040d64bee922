"""Charts as inline SVG: text in, text out, no plotting library."""

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from qdq.report import Bars, NodeError, ScaleChange

__all__ = ["histogram", "scale_chart", "sqnr_chart"]

EXACT_DB = 100.0
WIDTH, HEIGHT = 960, 300
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 12, 34


def svg(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """An svg element that scales with the page; ``title`` is read out by screen readers."""
    inner = "".join(parts)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title, quote=True)}">'
        f"{inner}</svg>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _dot(x: float, y: float, kind: str, title: str) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" class="{kind}">'
        f"<title>{escape(title)}</title></circle>"
    )


def sqnr_chart(nodes: Sequence[NodeError]) -> str:
    """SQNR of every node in graph order: what arises there as dots, what accumulated as a line."""
    order = sorted(nodes, key=lambda n: n.position)
    levels = [v for n in order for v in (n.local_db, n.accumulated_db) if _shown(v)]
    finite = [v for v in levels if v is not None] or [0.0, 40.0]
    low = 10 * math.floor(max(min(finite), -20) / 10)
    high = max(10 * math.ceil(max(finite) / 10), low + 10)
    x_of = _Axis(0, max(len(order) - 1, 1), LEFT + 6, WIDTH - RIGHT - 6)
    y_of = _Axis(low, high, HEIGHT - BOTTOM, TOP)
    parts = []
    for level in range(low, high + 1, 10):
        parts.append(_line(LEFT, y_of(level), WIDTH - RIGHT, y_of(level), "grid"))
        parts.append(_text(LEFT - 6, y_of(level) + 4, str(level), "end"))
    parts.append(_text(LEFT - 6, HEIGHT - 10, "dB", "end"))
    parts.append(
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, f"{len(order)} nodes, first to last")
    )
    parts.extend(_accumulated(order, x_of, y_of, low))
    for k, n in enumerate(order):
        if n.local_db is not None and _shown(n.local_db):
            y = y_of(max(n.local_db, low))
            title = f"{n.op_type} {n.name}: {n.local_db:.1f} dB arises here ({n.share:.1%})"
            parts.append(_dot(x_of(k), y, "local", title))
    return svg(WIDTH, HEIGHT, "SQNR of the nodes in graph order", parts)


def _shown(level: float | None) -> bool:
    """Not what is exact but for the rounding of floats."""
    return level is not None and level < EXACT_DB


def _accumulated(
    order: Sequence[NodeError], x_of: "_Axis", y_of: "_Axis", low: float
) -> Iterator[str]:
    """The line, broken where a node is exact or unknown, and its dots."""
    runs: list[list[str]] = [[]]
    dots = []
    for k, n in enumerate(order):
        level = n.accumulated_db
        if level is None or not _shown(level):
            runs.append([])
            continue
        x, y = x_of(k), y_of(max(level, low))
        runs[-1].append(f"{x:.1f},{y:.1f}")
        dots.append(_dot(x, y, "accumulated", f"{n.op_type} {n.name}: {level:.1f} dB accumulated"))
    yield from (f'<polyline points="{" ".join(r)}" class="accumulated"/>' for r in runs if r)
    yield from dots


class _Axis:
    """Linear map of [low, high] to [start, end]."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.start = low, start
        self.slope = (end - start) / ((high - low) or 1.0)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) * self.slope


def histogram(bars: Bars, clips: tuple[float, float], width: int = 300) -> str:
    """Counts on a logarithmic scale, with a line where the codes begin and end."""
    height, floor = 110, 92
    first, last = bars.start, bars.start + bars.width * len(bars.counts)
    low, high = min(first, clips[0]), max(last, clips[1])
    x_of = _Axis(low, high, 4, width - 4)
    y_of = _Axis(0, math.log1p(max(bars.counts)), floor, 8)
    shape = []
    for k, count in enumerate(bars.counts):
        x, y = x_of(bars.start + k * bars.width), y_of(math.log1p(count))
        shape += [f"{x:.1f},{y:.1f}", f"{x_of(bars.start + (k + 1) * bars.width):.1f},{y:.1f}"]
    outline = " ".join([f"{x_of(first):.1f},{floor}", *shape, f"{x_of(last):.1f},{floor}"])
    parts = [
        f'<polygon points="{outline}" class="bars"/>',
        _line(4, floor, width - 4, floor, "axis"),
    ]
    if low < 0 < high:
        parts.append(_line(x_of(0), floor, x_of(0), floor + 4, "axis"))
        if 44 < x_of(0) < width - 44:  # else it would lie on the numbers at the ends
            parts.append(_text(x_of(0), height - 4, "0"))
    for edge in clips:
        parts.append(_line(x_of(edge), 4, x_of(edge), floor, "clip"))
    parts.append(_text(4, height - 4, f"{low:.3g}", "start"))
    parts.append(_text(width - 4, height - 4, f"{high:.3g}", "end"))
    return svg(width, height, "histogram with the range of the codes", parts)


def scale_chart(histories: Sequence[Sequence[ScaleChange]], steps: Sequence[str]) -> str:
    """Scale of each weight after each step, over its first, on a logarithmic axis.

    Args:
        histories: the changes of one weight each, in order.
        steps: the steps in order.
    """
    paths = [_path(h, steps) for h in histories]
    tops = [max(p) for p in paths] + [1.0]
    lows = [min(p) for p in paths] + [1.0]
    bottom, top = math.floor(math.log10(min(lows))), max(math.ceil(math.log10(max(tops))), 1)
    x_of = _Axis(0, max(len(steps) - 1, 1), LEFT + 60, WIDTH - 90)
    y_of = _Axis(bottom, top, HEIGHT - BOTTOM, TOP)
    parts = []
    each = max(1, math.ceil((top - bottom) / 6))
    for power in range(bottom, top + 1, each):
        parts.append(_line(LEFT, y_of(power), WIDTH - RIGHT, y_of(power), "grid"))
        parts.append(_text(LEFT - 6, y_of(power) + 4, f"{_power(power)}x", "end"))
    parts += [_text(x_of(k), HEIGHT - 10, step) for k, step in enumerate(steps)]
    for history, path in zip(histories, paths, strict=True):
        points = [(x_of(k), y_of(math.log10(v))) for k, v in enumerate(path)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" class="raised"/>')
        for (x, y), value in zip(points, path, strict=True):
            parts.append(_dot(x, y, "local", f"{history[0].tensor}: {value:.4g} times"))
    return svg(WIDTH, HEIGHT, "weight scales after each solver step, over the first", parts)


def _power(power: int) -> str:
    return f"{10.0**power:g}" if -3 <= power <= 3 else f"1e{power}"


def _path(history: Sequence[ScaleChange], steps: Sequence[str]) -> list[float]:
    """The greatest growth of a scale of the weight up to each step: the product of the ratios."""
    grown, path = 1.0, []
    by_step = {c.step: c for c in history[1:]}
    for step in steps:
        change = by_step.get(step)
        if change is not None and change.ratio:
            grown *= change.ratio
        path.append(grown)
    return path
