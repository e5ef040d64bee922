"""Chosen tensors of a model, sample by sample."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any

import onnx
from numpy.typing import NDArray

from qdq.data import Feed
from qdq.errors import ModelError
from qdq.graph import Graph
from qdq.session import open_session, run_sample

__all__ = ["Observation", "Observer", "observe"]

log: logging.Logger = logging.getLogger(__name__)

# what a sample's tensors are is known only when they come
Observation = dict[str, NDArray[Any]]


class Observer:
    """A model that hands out chosen tensors: opened once, run for any number of samples.

    Nothing is kept between samples, and several threads may run it at a time. Of weights, it takes
    one copy where there are above 1 GiB of them, up to three below.

    Args:
        model: the model; it does not change.
        names: names of tensors in the main graph: inputs, outputs or what is between.
        threads: number of threads per sample; None lets onnxruntime choose.
        optimize: False runs a QDQ model as it is written, in float between its Q and DQ.

    Raises:
        ModelError: if a name is not in the graph, or onnxruntime cannot load the model.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        names: Sequence[str],
        *,
        threads: int | None = None,
        optimize: bool = True,
    ) -> None:
        graph = Graph(model)
        _check_known(graph, names)
        self._fed = [n for n in names if n in graph.inputs]
        self._made = [n for n in names if n not in graph.inputs]
        made = self._made
        self._session = (
            open_session(model, outputs=made, threads=threads, optimize=optimize, lean=True)
            if made
            else None
        )
        log.debug("observe %d tensors", len(names))

    def run(self, feed: Feed, sample: int = 0) -> Observation:
        """The values of the tensors for one sample.

        Args:
            feed: input name → array.
            sample: index of the sample, for the error.

        Raises:
            CalibrationError: if the sample cannot be run; ``sample`` is its index.
        """
        values: Observation = {n: feed[n] for n in self._fed}
        if self._session is not None:
            values |= run_sample(self._session, feed, self._made, sample)
        return values


def observe(
    model: onnx.ModelProto, names: Sequence[str], feeds: Iterable[Feed], *, optimize: bool = True
) -> Iterator[Observation]:
    """Run the feeds and yield the named tensors' values, one sample at a time.

    The model is loaded at once, the feeds are run as they are asked for, and nothing is kept
    between samples. Args and Raises: those of ``Observer`` and its ``run``.
    """
    observer = Observer(model, names, optimize=optimize)
    return (observer.run(feed, sample) for sample, feed in enumerate(feeds))


def _check_known(graph: Graph, names: Sequence[str]) -> None:
    known = graph.producer.keys() | graph.inputs.keys() | graph.constants.keys()
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ModelError(f"The model has no tensor '{name}'{hint}", tensor=name)
