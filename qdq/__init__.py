"""Post-training QDQ quantizer for ONNX models: integer kernels, the same decisions.

::

    import onnx, qdq

    onnx.save(qdq.quantize("model.onnx", reader), "model.int8.onnx")

``quantize`` is the front door, ``compare`` says what it did. ``Scheme`` and ``Rule`` say what is
wished, the calibrators how ranges are found; ``solve`` and the ``steps`` are for those who write
their own solver steps.
"""

import logging

from qdq import steps
from qdq.api import quantize
from qdq.calibrate import MSE, Entropy, MinMax, Percentile
from qdq.compare import compare
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
from qdq.spec import INT8, INT16, UINT8, UINT16, QuantSpec
from qdq.version import __version__

__all__ = [
    "INT8",
    "INT16",
    "MSE",
    "UINT8",
    "UINT16",
    "CalibrationError",
    "ConfigError",
    "Entropy",
    "MinMax",
    "ModelError",
    "Percentile",
    "QdqError",
    "QuantSpec",
    "Rule",
    "Scheme",
    "SolveError",
    "VerifyError",
    "__version__",
    "compare",
    "quantize",
    "solve",
    "steps",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())
