"""A model as it travels to other processes, and its fingerprint. Of any size, in parts."""

import hashlib
import pickle
from collections.abc import Iterator
from typing import Any

import onnx

from qdq.errors import ConfigError
from qdq.light import without_large
from qdq.weights import copy_into, raw_bytes

__all__ = ["Shipment", "fingerprint", "want_picklable"]

_LARGE = 1024
_WORDS = frozenset(
    {"doc_string", "producer_name", "producer_version", "model_version", "metadata_props"}
)


class Shipment:
    """A model that pickles in parts, since one protobuf message cannot exceed 2 GB.

    Threads of the same process share it as it is.
    """

    model: onnx.ModelProto

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model

    def __getstate__(self) -> tuple[bytes, tuple[bytes, ...]]:
        light = without_large(self.model, _LARGE, as_inputs=False)
        large = tuple(_with_data(t) for t in _left_out(self.model, light))
        return light.SerializeToString(), large

    def __setstate__(self, state: tuple[bytes, tuple[bytes, ...]]) -> None:
        light, large = state
        self.model = onnx.load_model_from_string(light)
        for data in large:
            self.model.graph.initializer.add().ParseFromString(data)


def fingerprint(model: onnx.ModelProto) -> str:
    """SHA-256 of a model with its weights, as hexadecimal digits.

    It is the same in every process and for every way in which a tensor's data can be stored;
    one tensor is in memory at a time. What is said about the model, its nodes and tensors (words,
    metadata, who made it) does not count; names of nodes and tensors do.
    """
    light = without_large(model, _LARGE, as_inputs=False)
    light.ClearField("domain")
    _clear_words(light)
    total = hashlib.sha256()
    data = light.SerializeToString(deterministic=True)
    total.update(b"%d:" % len(data))
    total.update(data)
    for t in _left_out(model, light):
        total.update(f"{t.name!r}{t.data_type}{list(t.dims)}".encode())
        total.update(raw_bytes(t))
    return total.hexdigest()


def _clear_words(message: Any) -> None:
    """Clear what changes nothing of what a model computes, in all parts of a protobuf message."""
    if isinstance(message, onnx.GraphProto):
        message.ClearField("name")
    for field, value in message.ListFields():
        if field.name in _WORDS:
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in (value,) if hasattr(value, "ListFields") else value:
                _clear_words(part)


def want_picklable(error: Exception, task: object) -> None:
    """Refuse a task that was lost because it, or its answer, cannot be pickled.

    Raises:
        ConfigError: with what Python says.
    """
    if _unpicklable(error, task):
        raise ConfigError(
            f"the calibrator or its summaries cannot be sent between processes "
            f"({type(error).__name__}: {error}); define their classes at the top level of a "
            "module, with fields that pickle"
        ) from error


def _unpicklable(error: Exception, task: object) -> bool:
    """Python raises errors of several kinds for that, and words them in many ways."""
    if isinstance(error, pickle.PicklingError):
        return True
    if not isinstance(error, AttributeError | TypeError):
        return False
    try:
        pickle.dumps(task)
    except Exception:
        return True
    return "pickle" in str(error)  # the answer


def _with_data(tensor: onnx.TensorProto) -> bytes:
    own = onnx.TensorProto()
    copy_into(own, tensor)
    data: bytes = own.SerializeToString()
    return data


def _left_out(model: onnx.ModelProto, light: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """The initializers that the light copy lacks."""
    present = {t.name for t in light.graph.initializer}
    return (t for t in model.graph.initializer if t.name not in present)
