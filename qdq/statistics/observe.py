"""Chosen tensors of a model, or readings of them, sample by sample."""

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from qdq.calibrate.peaks import Peaks
from qdq.calibrate.reading import Channels, Reading
from qdq.data import Feed
from qdq.errors import ModelError
from qdq.graph import Graph
from qdq.session import open_session, run_sample
from qdq.statistics.gauges import gauges_of

__all__ = ["Observation", "Observer", "Readout", "Seen", "observe"]

Floats = NDArray[np.float32]
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
        added: nodes and initializers that the model gets besides its own; their outputs have names
            too.
        few: whether few samples are to be run, see ``open_session``.

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
        added: onnx.GraphProto | None = None,
        few: bool = False,
    ) -> None:
        graph = Graph(model)
        more = () if added is None else (o for n in added.node for o in n.output)
        _check_known(graph, names, frozenset(more))
        self._fed = [n for n in names if n in graph.inputs]
        self._made = made = [n for n in names if n not in graph.inputs]
        self._session = None
        if made:
            self._session = open_session(
                model,
                outputs=made,
                threads=threads,
                optimize=optimize,
                added=added,
                lean=True,
                few=few,
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
            values |= run_sample(self._session, _aligned(feed), self._made, sample)
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
        channels: of the tensors whose channels were wanted.
        whole: tensor → its values, of the tensors that were wanted whole.
        peaks: of the tensors whose rows were wanted.
    """

    readings: Mapping[str, Reading]
    channels: Channels
    whole: Observation
    peaks: Peaks


class Readout:
    """A model that hands out readings of chosen tensors; otherwise as an ``Observer``.

    Args:
        model: the model; it does not change.
        axes: names of the tensors to read → the axis of their channels, or None for one reading
            of all channels.
        counted: those of which some of the values are wanted.
        whole: tensors to hand out as they are.
        peaked: tensors of which the peaks of rows are wanted; below opset 18 there are none.
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
        peaked: Iterable[str] = (),
        spread: bool = True,
        threads: int | None = None,
    ) -> None:
        self._spread = spread
        self._whole = whole
        apart = {name: axis for name, axis in axes.items() if name not in whole}
        self._gauges = gauges = gauges_of(model, apart, counted, peaked)
        gauged = frozenset(gauges.names)
        self._arrays = {n: axis for n, axis in axes.items() if n not in gauged}
        self._starts = [0, *itertools.accumulate(gauges.sizes)]
        names = dict.fromkeys([*self._arrays, *sorted(whole), *gauges.outputs])
        self._observer = Observer(model, list(names), threads=threads, added=gauges.added)
        log.debug("read %d tensors, %d of them whole", len(axes), len(self._arrays))

    def run(self, feed: Feed, sample: int = 0) -> Seen:
        """What one sample shows.

        Args:
            feed: input name → array.
            sample: index of the sample, for the error.

        Raises:
            CalibrationError: if the sample cannot be run; ``sample`` is its index.
        """
        found = self._observer.run(feed, sample)
        arrays = {name: found[name] for name in self._arrays}
        readings = {name: Reading.of(x, spread=self._spread) for name, x in arrays.items()}
        own = {name: axis for name, axis in self._arrays.items() if axis is not None}
        channels = Channels.of(arrays, own)
        peaks = Peaks()
        if self._gauges.readings:
            sizes = 3 * self._starts[-1], 3 * len(self._gauges.peaked)
            ends, rows, values = np.split(found[self._gauges.readings], np.cumsum(sizes))
            low, high, mean = _ends(*ends.reshape(3, -1))
            readings |= self._readings(found, low, high, values)
            channels = self._channels(low, high, mean).with_(channels)
            peaks = Peaks(names=self._gauges.peaked, numbers=rows.reshape(3, -1))
        return Seen(readings, channels, {name: found[name] for name in self._whole}, peaks)

    def _readings(
        self, found: Observation, low: Floats, high: Floats, values: Floats
    ) -> dict[str, Reading]:
        """Readings of the tensors that have gauges."""
        gauges, starts = self._gauges, self._starts[:-1]
        lows, highs = np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts)
        steps, parts = dict(gauges.steps), dict[str, Floats]()
        if gauges.found_steps:
            unknown = [n for n in gauges.counted if n not in steps]
            steps |= zip(unknown, found[gauges.found_steps].tolist(), strict=True)
        if gauges.counted:
            borders = np.cumsum(found[gauges.lengths])
            if borders[-1] != values.size:  # the runtime takes lengths from inferred shapes
                raise ModelError(
                    f"onnxruntime infers shapes with {borders[-1]} values for tensors of which it "
                    f"then makes {values.size}, so they cannot be told apart; look for a pool or "
                    "ConvTranspose with ceil_mode or auto_pad, and export it with explicit pads"
                )
            parts |= zip(gauges.counted, np.split(values, borders[:-1]), strict=True)
        return {
            name: Reading(least, most, parts.get(name, _NONE), steps.get(name, 1))
            for name, least, most in zip(gauges.names, lows.tolist(), highs.tolist(), strict=True)
        }

    def _channels(self, low: Floats, high: Floats, mean: Floats) -> Channels:
        """Those of the tensors that have gauges."""
        count = self._gauges.with_channels
        end = self._starts[count]
        names, sizes = self._gauges.names[:count], self._gauges.sizes[:count]
        return Channels(names, sizes, low[:end], high[:end], mean[:end])


def _ends(low: Floats, high: Floats, mean: Floats) -> tuple[Floats, Floats, Floats]:
    """Smallest and largest values and means, NaN where a value is."""
    nan = np.isnan(mean)
    if nan.any():
        # The runtime's ends do not show NaN. Of huge values of either sign the sum may overflow
        # both ways, which is none.
        nan &= ~((low < -_HUGE) & (high > _HUGE))
        low, high = (np.where(nan, np.float32(np.nan), end) for end in (low, high))
    return low, high, mean


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


def _check_known(graph: Graph, names: Sequence[str], added: frozenset[str]) -> None:
    known = graph.producer.keys() | graph.inputs.keys() | graph.constants.keys() | added
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ModelError(f"The model has no tensor '{name}'{hint}", tensor=name)
