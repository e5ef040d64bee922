"""What a comparison found: records, and their JSON values."""

import math
from dataclasses import asdict, dataclass
from typing import Any

__all__ = [
    "Advice",
    "Bars",
    "KernelCount",
    "NodeError",
    "OutputError",
    "Report",
    "ScaleChange",
    "TensorError",
    "Timing",
    "plain_values",
]


@dataclass(frozen=True, slots=True)
class Bars:
    """A histogram for drawing: ``counts[k]`` values from ``start + k * width`` on."""

    start: float
    width: float
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorError:
    """The error of one tensor. SQNR in dB; inf where there is no error, None where unknown.

    Attributes:
        name: the float model's name of it.
        kind: "activation", "weight" or "bias".
        node: the node that makes it, or that reads a constant.
        op_type: the operator of that node.
        position: its place in graph order.
        dtype: type of its codes; None for a tensor without codes.
        rounding_db: SQNR of the float model's values rounded to the codes.
        accumulated_db: SQNR of the quantized model's values, with all errors from before.
        clipped: share of float values more than half a step outside what the codes represent.
        used: smallest and largest value of the float model on the data, where there are codes.
        represented: smallest and largest value that the codes stand for.
        histogram: of the float model's values, where there are codes.
    """

    name: str
    kind: str
    node: str
    op_type: str
    position: int
    dtype: str | None = None
    rounding_db: float | None = None
    accumulated_db: float | None = None
    clipped: float | None = None
    used: tuple[float, float] | None = None
    represented: tuple[float, float] | None = None
    histogram: Bars | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeError:
    """The error of one node. SQNR in dB; inf where there is no error, None where unknown.

    Attributes:
        name: the node; for an input of the model its name.
        op_type: its operator; "input" for an input of the model.
        tensor: the float tensor that it makes, behind a clamp that its codes do the work of.
        position: its place in graph order.
        integer: whether it runs on integers: it reads and makes codes, or rounds by itself.
        reason: why it stays float, where the model says so.
        local_db: SQNR of what arises here: the node with quantized constants and a rounded
            result, against the node with float constants and an exact result, both on the
            float model's inputs, rounded to the codes that the node reads.
        accumulated_db: SQNR of its result in the quantized model, with all errors from before.
        share: its part of the noise that arises in all nodes, each relative to its own signal.
    """

    name: str
    op_type: str
    tensor: str
    position: int
    integer: bool
    reason: str | None = None
    local_db: float | None = None
    accumulated_db: float | None = None
    share: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputError:
    """One output of the model, float against quantized, both as onnxruntime runs them.

    Attributes:
        name: the output.
        sqnr_db: signal to quantization noise ratio.
        unfused_db: the same with the QDQ model run as it is written; a gap between the two is the
            runtime's doing.
        cosine: cosine between the two; None if one is all 0.
        largest: largest absolute difference.
        agreement: share of rows along the last axis with their largest value at the same place.
    """

    name: str
    sqnr_db: float
    unfused_db: float | None
    cosine: float | None
    largest: float
    agreement: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Latency in ms (medians), with lower and upper quartile; ratio: float time over quantized."""

    float_ms: float
    quantized_ms: float
    ratio: float
    float_spread: tuple[float, float]
    quantized_spread: tuple[float, float]
    ratio_spread: tuple[float, float]


@dataclass(frozen=True, slots=True)
class KernelCount:
    """An operator: nodes planned as integer (None: unknown), integer and float nodes that run."""

    op_type: str
    planned: int | None
    integer: int
    float: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleChange:
    """What a solver step did to a weight's scale: the largest after it, new over old, a note."""

    tensor: str
    step: str
    scale: float
    ratio: float | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """A rule that was tried, and what it changed.

    Attributes:
        what: in words.
        rule: the rule for ``Scheme(rules=...)``.
        option: the same for the command line.
        gain_db: change of the outputs' mean SQNR, measured on the first samples; inf where they
            have no error any more.
        slower: change of latency, as a share of the quantized model's; None if not measured.
    """

    what: str
    rule: str
    option: str
    gain_db: float
    slower: float | None

    def __str__(self) -> str:
        time = "" if self.slower is None else f", {100 * self.slower:+.0f} % latency"
        return f"{self.what}: {self.gain}{time}"

    @property
    def gain(self) -> str:
        """The gain in words."""
        return "exact" if self.gain_db == math.inf else f"{self.gain_db:+.1f} dB"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that ``qdq.compare`` found; ``str(report)`` is a table.

    Attributes:
        float_model: name of the float model.
        quantized_model: name of the quantized model.
        samples: how many samples were run.
        outputs: per output of the model.
        nodes: per node and coded model input, the greatest harm first.
        tensors: per tensor, in graph order.
        timing: latency of both; None if it was not measured.
        bytes: size of the float and the quantized model.
        kernels: integer nodes planned against those in onnxruntime's optimized model.
        borders: Q, DQ nodes that are left in the optimized model.
        history: what the solver did to the scales of weights, where the model says so.
        advice: rules that were tried, the greatest gain first.
        notes: what could not be compared, and what is remarkable.
    """

    float_model: str
    quantized_model: str
    samples: int
    outputs: tuple[OutputError, ...]
    nodes: tuple[NodeError, ...]
    tensors: tuple[TensorError, ...]
    timing: Timing | None
    bytes: tuple[int, int]
    kernels: tuple[KernelCount, ...]
    borders: int
    history: tuple[ScaleChange, ...]
    advice: tuple[Advice, ...]
    notes: tuple[str, ...]

    def json(self) -> dict[str, Any]:
        """The report as values that ``json.dumps`` takes; an infinite SQNR is "inf"."""
        facts: dict[str, Any] = plain_values(asdict(self))
        return facts

    def html(self) -> str:
        """The report as one self-contained page: no scripts, no network."""
        from qdq.report.html import page

        return page(self)

    def text(self, rows: int = 20) -> str:
        """The report as a table of the ``rows`` nodes that harm most."""
        from qdq.report.text import table

        return table(self, rows)

    def __str__(self) -> str:
        return self.text()


def plain_values(value: Any) -> Any:
    """Values that ``json.dumps`` takes: lists for tuples, "inf", "-inf", "nan" as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: plain_values(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(v) for v in value]
    return value
