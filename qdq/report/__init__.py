"""What compare() finds, as records, text, pictures and a page."""

from qdq.report.records import (
    Advice,
    Bars,
    KernelCount,
    NodeError,
    OutputError,
    Report,
    ScaleChange,
    TensorError,
    Timing,
    plain_values,
)

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
