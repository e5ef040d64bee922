"""The emitted model must pass the full checker, load and run; nothing else leaves the library."""

from collections.abc import Mapping

import numpy as np
import onnx
from numpy.typing import NDArray

from qdq.errors import QdqError, VerifyError
from qdq.session import open_session

__all__ = ["verify"]

CHECKER_BYTES = 1 << 31  # the checker takes a message in memory; protobuf's limit


def verify(
    model: onnx.ModelProto, feed: Mapping[str, NDArray[np.generic]] | None = None
) -> onnx.ModelProto:
    """Return the model if it is valid, loads, and runs on ``feed`` where one is given.

    Raises:
        VerifyError: with the checker's or the runtime's reason. It is a fault of qdq, not of the
            caller; the message says what to report.
    """
    try:
        if model.ByteSize() < CHECKER_BYTES:
            onnx.checker.check_model(model, full_check=True)
        session = open_session(model)
        if feed is not None:
            session.run(feed)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, QdqError) as e:
        reason = " ".join(str(e).split())
        raise VerifyError(
            f"the quantized model is not valid: {reason}. This is a fault in qdq; please report "
            f"it with the float model. Rule(nodes=..., keep_float=True) for the node named above "
            f"works around it."
        ) from e
    return model
