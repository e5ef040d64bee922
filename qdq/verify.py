"""The emitted model must pass the full checker, load and run; nothing else leaves the library."""

import logging
from collections.abc import Mapping
from typing import cast

import numpy as np
import onnx
from numpy.typing import NDArray

from qdq.data import Feed
from qdq.errors import CalibrationError, QdqError, VerifyError
from qdq.light import for_checker
from qdq.session import RUNTIME_VERSION, open_session

__all__ = ["verify"]

_log = logging.getLogger(__name__)


def verify(
    model: onnx.ModelProto,
    feed: Mapping[str, NDArray[np.generic]] | None = None,
    source: onnx.ModelProto | None = None,
    *,
    ran: bool = False,
) -> onnx.ModelProto:
    """Return the model if it is valid, loads, and runs on ``feed`` where one is given.

    Outputs with NaN or Inf that the float model does not give are warned of.

    Args:
        model: the emitted model.
        feed: one sample.
        source: the float model that it was made from. Exporters declare shapes that contradict
            inference, and the runtime takes such models with a warning; so what the checker
            says against the shapes of both is not held against the emitted one.
        ran: whether the runtime has loaded and run it already.

    Raises:
        CalibrationError: the float model does not run on ``feed`` either.
        VerifyError: with the checker's or the runtime's reason. It is a fault of qdq or of an old
            runtime, not of the caller; the message says what to do.
    """
    try:
        _check(model, source)
        if not ran:
            session = open_session(model)
            if feed is not None:
                _look_for_infinities(session.run(feed), source, feed)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, QdqError) as e:
        if feed is not None and source is not None:
            _require_run(source, feed)
        reason = " ".join(str(e).split())
        raise VerifyError(
            f"the quantized model is not valid: {reason}. This is a fault in qdq, or in "
            f"onnxruntime {RUNTIME_VERSION} where a newer one runs the model; please report it "
            f"with the float model. Rule(nodes=..., keep_float=True) for the node named above "
            f"works around it."
        ) from e
    return model


def _look_for_infinities(
    outputs: Feed, source: onnx.ModelProto | None, feed: Mapping[str, NDArray[np.generic]]
) -> None:
    """Warn of NaN and Inf that the float model does not give: a divisor became 0, for one."""
    wrong = [n for n, x in outputs.items() if _has_infinities(x)]
    if not wrong or source is None:
        return
    exact = open_session(source).run(feed)
    for name in wrong:
        bad, before = (int((~np.isfinite(x[name])).sum()) for x in (outputs, exact))
        if before == 0:
            _log.warning(
                "output %r of the quantized model has %d NaN or Inf of %d values on the first "
                "sample, the float model none: what divides, or has a logarithm taken, is rounded "
                "to 0; keep it float with Rule(tensors=..., keep_float=True)",
                name,
                bad,
                outputs[name].size,
            )


def _has_infinities(value: object) -> bool:
    """Whether there is NaN or Inf; sequences and maps are not looked into."""
    floats = isinstance(value, np.ndarray) and value.dtype.kind == "f"
    return floats and not np.isfinite(cast("NDArray[np.floating]", value)).all()


def _require_run(source: onnx.ModelProto, feed: Mapping[str, NDArray[np.generic]]) -> None:
    """Refuse a sample that the float model cannot run either.

    Calibration runs only what leads to the tensors that it observes, so the nodes behind them
    meet the sample here for the first time.
    """
    try:
        open_session(source).run(feed)
    except QdqError as e:
        reason = " ".join(str(e).split())
        raise CalibrationError(
            f"the float model does not run on calibration sample 0: {reason}. Give samples of the "
            f"shapes and values that it is used with",
            sample=0,
        ) from e


def _check(model: onnx.ModelProto, source: onnx.ModelProto | None) -> None:
    """The full checker; without its shapes where the float model fails them too."""
    light = for_checker(model)
    try:
        onnx.checker.check_model(light, full_check=True)
    except onnx.shape_inference.InferenceError:
        if source is None or _shapes_agree(source):
            raise
        onnx.checker.check_model(light)


def _shapes_agree(model: onnx.ModelProto) -> bool:
    """Whether the declared shapes of a model pass strict inference."""
    try:
        onnx.checker.check_model(for_checker(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    return True
