"""The errors of qdq, one tree.

::

    QdqError
     ├─ ModelError        the float model cannot be used (invalid, already quantized, opset)
     ├─ ConfigError       also a ValueError: impossible option, rule that matches nothing
     ├─ CalibrationError  no data; wrong names, types or shapes; NaN or Inf in a tensor
     ├─ SolveError        a tensor without parameters, a law broken, steps out of order
     └─ VerifyError       the emitted model fails the checker or does not load

A message says what is wrong, where, what was found against what is wanted, and what to do.
"""

__all__ = [
    "CalibrationError",
    "ConfigError",
    "ModelError",
    "QdqError",
    "SolveError",
    "VerifyError",
]


class QdqError(Exception):
    """Base of every error that qdq raises on purpose.

    Attributes:
        tensor: name of the tensor that the error concerns, if there is one.
        node: name of the node, if there is one.
        step: name of the solver step, if there is one.
        sample: zero-based index of the calibration sample, if there is one.
    """

    def __init__(
        self,
        message: str,
        *,
        tensor: str | None = None,
        node: str | None = None,
        step: str | None = None,
        sample: int | None = None,
    ) -> None:
        super().__init__(message)
        self.tensor = tensor
        self.node = node
        self.step = step
        self.sample = sample


class ModelError(QdqError):
    """The float model cannot be used: unreadable, invalid, already quantized, or its opset."""


class ConfigError(QdqError, ValueError):
    """An option, rule or parameter that is impossible, unknown, or matches nothing."""


class CalibrationError(QdqError):
    """The calibration data is missing, does not fit the model, or gives NaN or Inf."""


class SolveError(QdqError):
    """The solver cannot give every planned tensor parameters that obey the laws."""


class VerifyError(QdqError):
    """The emitted model fails the checker or does not load in the runtime."""
