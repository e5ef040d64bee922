"""The report as JSON, as text and as a page: complete, well formed, and alone in the world."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from models import conv_chain, feeds, residual
from onnx import numpy_helper

import qdq
from qdq.compare import _gaps
from qdq.history import scale_history
from qdq.plan import make_plan
from qdq.prepare import prepare
from qdq.problem import Derived
from qdq.ranges import Histogram
from qdq.report import Bars, OutputError, Report, TensorError, plain_values
from qdq.report.svg import histogram
from qdq.report.tally import bars
from qdq.report.text import advice_head, columns, db, plan_facts, plan_text, plural, size

SHAPES = {"x": [1, 32, 24, 24]}
VOID = {"meta", "br"}


@pytest.fixture(scope="module")
def report() -> Report:
    """Of a chain with a bias that makes the solver raise a weight's scale."""
    exact = conv_chain()
    for t in exact.graph.initializer:
        if t.name in ("b1", "w1"):
            value = numpy_helper.to_array(t).copy()
            value[3] = -4e4 if t.name == "b1" else value[3] * 1e-5
            t.CopyFrom(numpy_helper.from_array(value, t.name))
    data = feeds(SHAPES, 3)
    return qdq.compare(exact, qdq.quantize(exact, data), data, repeats=3, advise=2)


class Page(HTMLParser):
    """Tags must nest; collects what a page refers to, its text, and the elements by tag."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag]


def test_json_survives_a_round_trip(report: Report) -> None:
    text = json.dumps(report.json(), allow_nan=False)
    facts = json.loads(text)
    assert facts == report.json()
    assert [n["name"] for n in facts["nodes"]] == [n.name for n in report.nodes]
    assert all((t["histogram"] is None) == (t["dtype"] is None) for t in facts["tensors"])


def test_what_json_cannot_hold_is_text() -> None:
    found = plain_values({"a": (math.inf, -math.inf, 1.5, None), "b": [math.nan]})
    assert found == {"a": ["inf", "-inf", 1.5, None], "b": ["nan"]}
    assert float(found["a"][0]) == math.inf


def test_text_has_the_rows_that_were_asked_for(report: Report) -> None:
    text = report.text(2)
    assert str(report) == report.text()
    assert sum(n.name in text.partition("what leaving")[0] for n in report.nodes) >= 2
    assert f"{len(report.nodes) - 2} more with less noise" in text
    assert "more with less noise" not in report.text(1000)
    assert f"{report.outputs[0].sqnr_db:.1f} dB" in text
    assert all(str(a) in text for a in report.advice)


def test_page_is_well_formed_and_complete(report: Report) -> None:
    page = Page(report.html())
    text = " ".join(page.texts)
    for n in report.nodes:
        assert n.name in page.texts
    for t in report.tensors:
        if t.kind != "bias" and t.dtype is not None:
            assert t.name in page.texts
    for a in report.advice:
        assert a.rule in page.texts
    assert f"{report.outputs[0].sqnr_db:.1f} dB" in text
    assert "FitWeightsToBias" in page.texts
    assert any("scales raised" in t for t in page.texts)
    drawn = [t for t in report.tensors if t.kind != "bias" and t.dtype is not None]
    assert len(page.all("svg")) == len(drawn) + 2  # and SQNR, and scales


def test_page_refers_to_nothing_outside(report: Report) -> None:
    text = report.html()
    page = Page(text)
    for _, attributes in page.elements:
        assert not {"src", "href", "srcset", "data", "action", "xlink:href"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert {"script", "link", "img", "iframe", "object"}.isdisjoint(t for t, _ in page.elements)
    assert not re.search(r"https?:|//\w|@import|url\(", text)
    (policy,) = (m for m in page.all("meta") if "http-equiv" in m)
    assert policy["content"].startswith("default-src 'none'")


def test_names_cannot_break_the_page(report: Report) -> None:
    evil = "<script>alert(1)</script>\"'&"
    nodes = tuple(replace(n, name=evil, reason=evil, op_type=evil) for n in report.nodes)
    tensors = tuple(replace(t, name=evil) for t in report.tensors)
    history = tuple(replace(c, tensor=evil, note=evil) for c in report.history)
    outputs = tuple(replace(o, name=evil) for o in report.outputs)
    advice = tuple(replace(a, what=evil, rule=evil) for a in report.advice)
    made = replace(report, nodes=nodes, tensors=tensors, history=history, outputs=outputs,
                   advice=advice, notes=(evil,), float_model=evil)  # fmt: skip
    page = Page(made.html())
    assert "script" not in {t for t, _ in page.elements}
    assert page.texts.count(evil) >= len(nodes) + len(tensors)


def test_the_sqnr_chart_has_a_dot_for_every_level(report: Report) -> None:
    page = Page(report.html())
    dots = [c["class"] for c in page.all("circle")]
    finite = [n for n in report.nodes if n.accumulated_db < 100]
    assert dots.count("accumulated") == len(finite)
    raised = 3 - 1  # steps of the weight whose scale was raised
    assert dots.count("local") == len([n for n in report.nodes if n.local_db < 100]) + raised


def test_clip_lines_are_where_the_codes_end() -> None:
    page = Page(histogram(Bars(-1.0, 0.5, (1, 4, 9, 2)), (-0.5, 2.0), width=308))
    at = sorted(float(a["x1"]) for a in page.all("line") if a["class"] == "clip")
    # 300 units from -1 (4) to 2 (304)
    assert at == pytest.approx([54, 304], abs=0.1)
    (shape,) = page.all("polygon")
    xs = [float(p.split(",")[0]) for p in shape["points"].split()]
    assert (min(xs), max(xs)) == (4, 204)


def test_an_empty_report_is_a_page(report: Report) -> None:
    made = replace(report, nodes=report.nodes[:1], tensors=(), history=(), outputs=(), advice=(),
                   timing=None, kernels=())  # fmt: skip
    assert "does not say" in " ".join(Page(made.html()).texts)
    assert made.text()
    exact = replace(report.nodes[0], local_db=math.inf, accumulated_db=math.inf, share=0.0)
    assert Page(replace(made, nodes=(exact,)).html())


def test_bars_keep_every_value() -> None:
    x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    drawn = bars(Histogram.of(x), 64)
    assert sum(drawn.counts) == x.size
    assert 16 < len(drawn.counts) <= 64
    edges = drawn.start + drawn.width * np.arange(len(drawn.counts) + 1)
    assert np.array_equal(np.histogram(x, edges)[0], drawn.counts)


def test_no_advice_is_praised_that_gains_nothing(report: Report) -> None:
    poor = tuple(replace(a, gain_db=0.1) for a in report.advice)
    rich = tuple(replace(a, gain_db=3.0) for a in report.advice)
    assert "none of it is worth" in advice_head(replace(report, advice=poor))
    assert "none of it is worth" not in advice_head(replace(report, advice=rich))


def test_small_texts() -> None:
    assert (db(None), db(math.inf), db(12.34)) == ("-", "exact", "12.3")
    assert [size(n) for n in (799, 74_000, 100_000, 5_467_000)] == [
        "0.799 kB", "74 kB", "0.1 MB", "5.47 MB"
    ]  # fmt: skip
    assert [plural(n, "node") for n in (0, 1, 2)] == ["0 nodes", "1 node", "2 nodes"]
    assert columns([("a", "1"), ("bcd", "23")], "<>") == ["a     1", "bcd  23"]
    assert TensorError(name="a", kind="weight", node="n", op_type="Conv", position=0).dtype is None


# -- plans and histories --------------------------------------------------------------------------


def test_plan_facts_have_every_node_and_tensor() -> None:
    plan = make_plan(prepare(residual()))
    facts = json.loads(json.dumps(plan_facts(plan), allow_nan=False))
    assert [n["name"] for n in facts["nodes"]] == [u.view.name for u in plan.placement.units]
    integer = {n["name"] for n in facts["nodes"] if n["integer"]}
    assert integer == set(plan.quantized)
    assert {t["name"]: t["dtype"] for t in facts["tensors"]} == {
        n: t.spec.dtype.name for n, t in plan.tensors.items()
    }
    derived = {t["name"] for t in facts["tensors"] if t["source"]["kind"] == "Derived"}
    assert derived == {n for n, t in plan.tensors.items() if isinstance(t.source, Derived)}
    (clamped,) = (n for n in facts["nodes"] if n["clamp"])
    assert clamped["name"] == "Conv_a"


def test_plan_text_has_a_line_per_node_and_its_reason() -> None:
    scheme = qdq.Scheme(rules=(qdq.Rule(nodes="Conv_b", keep_float=True),))
    plan = make_plan(prepare(residual()), scheme)
    lines = plan_text(plan).splitlines()
    for name, reason in plan.left_float.items():
        assert any(name in line and reason in line and line.startswith("float") for line in lines)
    assert len(lines) == len(plan.placement.units) + 3
    assert f"{len(plan.quantized)} nodes integer, {len(plan.left_float)} float" in lines[-1]


def test_history_keeps_weights_and_what_has_a_note() -> None:
    data = feeds(SHAPES, 2)
    changes = qdq.api.run(conv_chain(), data).solution.changes
    found = scale_history(changes, {"w0"})
    weight = [e for e in found if e["tensor"] == "w0"]
    assert [e["step"] for e in weight] == ["FromConstants"]
    assert "ratio" not in weight[0]
    noted = {c.tensor for c in changes if c.note is not None and c.after is not None}
    assert {e["tensor"] for e in found} == noted | {"w0"}


@pytest.mark.parametrize(
    ("unfused", "fused", "told"),
    [
        (30.0, 26.0, True),
        (30.0, 28.0, False),
        (None, 20.0, False),
        (math.inf, 140.0, False),  # a float kernel that sums up in another order
        (math.inf, 30.0, True),
    ],
)
def test_what_the_kernels_add_is_told(unfused: float | None, fused: float, told: bool) -> None:
    output = OutputError(
        name="y", sqnr_db=fused, unfused_db=unfused, cosine=1.0, largest=0.1, agreement=None
    )
    assert bool(list(_gaps([output]))) == told
