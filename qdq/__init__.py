"""Post-training QDQ quantizer for ONNX models."""

import logging

from qdq.api import quantize
from qdq.calibrate import MSE, Entropy, MinMax, Percentile
from qdq.errors import (
    CalibrationError,
    ConfigError,
    ModelError,
    QdqError,
    SolveError,
    VerifyError,
)
from qdq.scheme import Rule, Scheme
from qdq.solve import solve
from qdq.version import __version__

__all__ = [
    "MSE",
    "CalibrationError",
    "ConfigError",
    "Entropy",
    "MinMax",
    "ModelError",
    "Percentile",
    "QdqError",
    "Rule",
    "Scheme",
    "SolveError",
    "VerifyError",
    "__version__",
    "quantize",
    "solve",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())
