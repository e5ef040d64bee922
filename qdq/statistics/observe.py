"""Chosen tensors of a model, or readings of them, sample by sample."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from qdq.calibrate.reading import Reading
from qdq.data import Feed
from qdq.errors import ModelError
from qdq.graph import Graph
from qdq.session import open_session, run_sample
from qdq.statistics.gauges import Gauge, gauges_of

__all__ = ["Observation", "Observer", "Readout", "Seen", "observe"]

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


class Seen(NamedTuple):
    """What a readout has of one sample.

    Attributes:
        readings: tensor → its reading.
        whole: tensor → its values, of the tensors that were wanted whole.
    """

    readings: Mapping[str, Reading]
    whole: Observation


class Readout:
    """A model that hands out readings of chosen tensors; otherwise as an ``Observer``.

    Args:
        model: the model; it does not change.
        axes: names of the tensors to read → the axis of their channels, or None for one reading
            of all channels.
        counted: those of which some of the values are wanted.
        whole: tensors to hand out as they are.
        spread: readings of whole tensors have some of the values; False: all, in their shape.
        threads: number of threads per sample; None lets onnxruntime choose.

    Raises:
        ModelError: if a name is not in the graph, or onnxruntime cannot load the model.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        axes: Mapping[str, int | None],
        *,
        counted: frozenset[str],
        whole: frozenset[str] = frozenset(),
        spread: bool = True,
        threads: int | None = None,
    ) -> None:
        graph = Graph(model)
        _check_known(graph, [*axes, *sorted(whole)])
        self._axes = dict(axes)
        self._spread = spread
        self._whole = whole
        apart = {name: axis for name, axis in axes.items() if name not in whole}
        self._gauges, added = gauges_of(model, apart, counted)
        arrays = sorted(whole | (apart.keys() - self._gauges.keys()))
        outputs = [*arrays, *(n for g in self._gauges.values() for n in g.outputs)]
        self._outputs = [n for n in dict.fromkeys(outputs) if n not in graph.inputs]
        self._session = (
            open_session(model, outputs=self._outputs, added=added, threads=threads, lean=True)
            if self._outputs
            else None
        )
        log.debug("read %d tensors, %d of them whole", len(axes), len(arrays))

    def run(self, feed: Feed, sample: int = 0) -> Seen:
        """The readings of one sample.

        Args:
            feed: input name → array.
            sample: index of the sample, for the error.

        Raises:
            CalibrationError: if the sample cannot be run; ``sample`` is its index.
        """
        found: Observation = dict(feed)
        if self._session is not None:
            found |= run_sample(self._session, _aligned(feed), self._outputs, sample)
        readings = {}
        for name, axis in self._axes.items():
            if name in self._gauges:
                readings[name] = _read(self._gauges[name], axis, found)
            else:
                readings[name] = Reading.of(found[name], axis, spread=self._spread)
        return Seen(readings, {name: found[name] for name in self._whole})


def _aligned(feed: Feed) -> Feed:
    """The arrays, each where the runtime would have put it.

    It reads an input where it lies, and the order in which it sums depends on the address modulo
    the width of its vectors: the same values elsewhere would give other bits.
    """
    found = {}
    for name, value in feed.items():
        if value.dtype.kind in "fiu" and value.ctypes.data % _ALIGNMENT:
            room = np.empty(value.nbytes + _ALIGNMENT, np.uint8)
            start = -room.ctypes.data % _ALIGNMENT
            place = room[start : start + value.nbytes].view(value.dtype).reshape(value.shape)
            place[...] = value
            value = place
        found[name] = value
    return found


_ALIGNMENT = 64
_NONE = np.zeros(0, np.float32)
_HUGE = 1e26  # times any number of values it may exceed float32


def _read(gauge: Gauge, axis: int | None, found: Observation) -> Reading:
    """A reading, from what a gauge gave."""
    low, high, mean = found[gauge.low], found[gauge.high], found[gauge.mean]
    if np.isnan(mean).any() and not (low.min() < -_HUGE and high.max() > _HUGE):
        # The runtime's ends do not show NaN. Of huge values of either sign the sum may overflow
        # both ways, which is none.
        low = high = np.full_like(low, np.nan)
    step = int(found[gauge.step][0]) if isinstance(gauge.step, str) else gauge.step
    values = found[gauge.values] if gauge.values else _NONE
    return Reading(low, high, _NONE if axis is None else mean, values, step)


def _check_known(graph: Graph, names: Sequence[str]) -> None:
    known = graph.producer.keys() | graph.inputs.keys() | graph.constants.keys()
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ModelError(f"The model has no tensor '{name}'{hint}", tensor=name)
