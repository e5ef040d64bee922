"""What a quantized model really does to the outputs, on few samples."""

import math
from collections.abc import Sequence

import numpy as np
import onnx

from qdq.data import Feed
from qdq.errors import ConfigError
from qdq.graph import Graph
from qdq.placement.harm import Reading, decibels, read
from qdq.placement.wholes import logits_of
from qdq.statistics.observe import Observer

__all__ = ["Trial"]

_FLOATS = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16})


class Trial:
    """Compares quantized models with the float model that they were made from.

    They run with all of the runtime's optimizations, so it is the integer kernels that count.
    """

    def __init__(self, model: onnx.ModelProto, feeds: Sequence[Feed]) -> None:
        """Run the float model.

        Args:
            model: the prepared float model.
            feeds: at least one sample; they stay in memory, and the float model's outputs with
                them.

        Raises:
            ConfigError: the model has no output of floating-point numbers.
            ModelError: onnxruntime cannot run the model.
        """
        graph = Graph(model)
        self._outputs = [
            v.name for v in model.graph.output if v.type.tensor_type.elem_type in _FLOATS
        ]
        if not self._outputs:
            raise ConfigError(
                "the model has no output of floating-point numbers, so no error can be measured; "
                "leave out measured=True and target_sqnr"
            )
        self._logits = [n for n in logits_of(graph) if n not in self._outputs]
        self._names = [*self._outputs, *self._logits]
        self._feeds = list(feeds)
        exact = Observer(model, self._names)
        self._exact = [exact.run(feed) for feed in self._feeds]

    def _read(self, model: onnx.ModelProto) -> list[Reading]:
        rounded = Observer(model, self._names)
        pairs = zip(self._exact, (rounded.run(feed) for feed in self._feeds), strict=True)
        return [read(a, b, self._outputs, self._logits) for a, b in pairs]

    def amplitude(self, model: onnx.ModelProto) -> float:
        """Square root of the harm (see ``harm.read``) in the median sample.

        A page without text or a silent clip has relative errors beyond all measure.
        """
        return math.sqrt(float(np.median([r.harm for r in self._read(model)])))

    def sqnr(self, model: onnx.ModelProto) -> float:
        """SQNR in dB over the samples, of the worst output."""
        return decibels(self._read(model))
