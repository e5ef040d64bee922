"""What a quantized model really does to the outputs, on few samples."""

import math
from collections.abc import Sequence

import numpy as np
import onnx

from qdq.data import Feed
from qdq.errors import ConfigError
from qdq.graph import Graph
from qdq.placement.harm import Reading, read, worst_decibels
from qdq.placement.wholes import judged
from qdq.statistics.observe import Observation, Observer

__all__ = ["Trial"]

_MOST_HELD = 1 << 28  # bytes of the float model's outputs


class Trial:
    """Compares quantized models with the float model that they were made from.

    They run with all of the runtime's optimizations, so it is the integer kernels that count.

    Attributes:
        whole: whether they run as they are: what they are judged by are their outputs.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        feeds: Sequence[Feed],
        exact: Sequence[Observation] = (),
    ) -> None:
        """Run the float model, unless its outputs are there.

        Args:
            model: the prepared float model.
            feeds: at least one sample; they stay in memory, and the float model's outputs with
                them, so that of large outputs the first few samples count only.
            exact: what it makes of each of them: all that it is ``judged`` by.

        Raises:
            ConfigError: the model has no output of floating-point numbers.
            ModelError: onnxruntime cannot run the model.
        """
        graph = Graph(model)
        self._judged = judged(graph)
        self.whole: bool = set(self._judged.names) == set(graph.outputs)
        if not self._judged.outputs:
            raise ConfigError(
                "the model has no output of floating-point numbers, so no error can be measured; "
                "leave out measured=True and target_sqnr"
            )
        self._exact = list(exact) or _held(Observer(model, self._judged.names, few=True), feeds)
        self._feeds = list(feeds[: len(self._exact)])

    def _read(self, model: onnx.ModelProto) -> list[Reading]:
        rounded = Observer(model, self._judged.names)
        pairs = zip(self._exact, (rounded.run(feed) for feed in self._feeds), strict=True)
        return [read(a, b, self._judged) for a, b in pairs]

    def amplitude(self, model: onnx.ModelProto) -> float:
        """Square root of the harm (see ``harm.read``) in the median sample.

        A page without text or a silent clip has relative errors beyond all measure.
        """
        return math.sqrt(float(np.median([r.harm for r in self._read(model)])))

    def sqnr(self, model: onnx.ModelProto) -> float:
        """SQNR in dB over the samples, of the worst output."""
        return worst_decibels(self._read(model))


def _held(observer: Observer, feeds: Sequence[Feed]) -> list[Observation]:
    """What a model makes of the samples, as long as that is little enough to be held."""
    found: list[Observation] = []
    size = 0
    for feed in feeds:
        if size > _MOST_HELD:
            break
        found.append(observer.run(feed))
        size += sum(value.nbytes for value in found[-1].values())
    return found
