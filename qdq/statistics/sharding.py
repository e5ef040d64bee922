"""Calibration statistics, in this process or by any ``concurrent.futures.Executor``.

The caller reads the samples, once, and hands them out in shards; a worker runs the model on a
shard and returns its ``Statistics``, which merge exactly. So the result is the same, bit for bit,
for any number of workers, any size of shards and any order in which they come back.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import onnx

from qdq.calibrate import CALIBRATORS, Calibrator
from qdq.calibrate.moments import Layout
from qdq.data import Feed
from qdq.errors import CalibrationError, ConfigError
from qdq.statistics import Statistics
from qdq.statistics.dispatch import NO_SAMPLES, Dispatcher, workers_of
from qdq.statistics.shipment import Shipment, fingerprint
from qdq.statistics.worker import Gathering, Job, Progress, Shard, Threads, run_shard

__all__ = ["collect"]

_SHARD_SAMPLES = 4
_SHARD_BYTES = 1 << 23  # of one shard's samples, unless one sample alone is larger
_THREADS = 2  # of this process: each has the tensors of one sample in memory


def collect(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    axes: Mapping[str, int],
    feeds: Iterable[Feed],
    calibrator: Calibrator[Any],
    *,
    executor: Executor | None = None,
    shard_size: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    layouts: Iterable[Layout] = (),
    scores: Iterable[str] = (),
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    mark: str | None = None,
) -> Statistics:
    """Run the model on the samples and summarize its tensors.

    Args:
        model: the prepared model; not changed.
        tensors: names of the tensors to summarize.
        axes: tensor → channel axis, for the tensors whose channel means are wanted.
        feeds: the checked samples; read once, in this process, and never all at a time.
        calibrator: makes and merges the summaries.
        executor: who does the work. It stays open. A custom calibrator must be importable where
            the workers run. None: two threads of this process, so that one sample runs while
            another is summarized; a custom calibrator sees one sample after the other.
        shard_size: samples per shard; None: 4 of what travels, 1 in this process.
        threads: that onnxruntime uses per sample; None lets it choose in this process, and
            shares the processors among the workers of a local pool (1 each elsewhere). The
            result does not depend on it.
        progress: called with the number of samples done.
        layouts: of the linear nodes whose inputs' second moments are wanted.
        scores: tensors of float32 of whose rows the peaks are wanted.
        shapes: input → shape of the sample that the plan was made for; only noted.
        mark: the model's fingerprint, where it is known; it is computed otherwise.

    Raises:
        CalibrationError: no samples; a sample that cannot be run or gives NaN or Inf (``sample``
            is its index, the lowest if there are several); a shard that no worker could finish.
        ConfigError: if the executor takes no work, the calibrator cannot be sent to it, or
            shard_size is below 1.
    """
    if shard_size is None:
        shard_size = 1 if executor is None else _SHARD_SAMPLES
    if shard_size < 1:
        raise ConfigError(f"shard_size={shard_size}: wants a whole number from 1 up")
    _require_executor(executor)
    job = Job(
        fingerprint=fingerprint(model) if mark is None else mark,
        tensors=tuple(tensors),
        axes=dict(axes),
        layouts=tuple(dict.fromkeys(layouts)),
        scores=tuple(dict.fromkeys(scores)),
        shapes=dict(shapes or {}),
        calibrator=calibrator,
        threads=threads if threads is not None or executor is None else _threads(executor),
    )
    if executor is not None:
        run, merging = partial(run_shard, job), _Merging(calibrator)
        sender = Dispatcher(executor, run, merging.accept, Shipment(model), progress)
        sender.run(_shards(feeds, shard_size))
        return merging.statistics()
    if type(calibrator) not in CALIBRATORS.values():
        return _one_by_one(job, model, feeds, progress)
    with ThreadPoolExecutor(_THREADS) as pool:
        job = replace(job, threads=_threads(pool) if threads is None else threads)
        tasks = Threads(job, job.readout(model))
        sender = Dispatcher(pool, tasks.run_shard, int, None, progress)
        sender.run(_shards(feeds, shard_size))
        return tasks.statistics()


def _require_executor(executor: object) -> None:
    takes_work = callable(getattr(executor, "submit", None))
    if executor is not None and (not takes_work or hasattr(executor, "get_executor")):
        raise ConfigError(
            f"executor={executor!r} ({type(executor).__name__}): wants a "
            "concurrent.futures.Executor; of a dask Client it is client.get_executor()"
        )


def _one_by_one(
    job: Job, model: onnx.ModelProto, feeds: Iterable[Feed], progress: Progress | None
) -> Statistics:
    gathering = Gathering(job, job.readout(model))
    if not gathering.add(feeds, 0, progress):
        raise CalibrationError(NO_SAMPLES)
    return gathering.statistics()


def _threads(executor: Executor) -> int:
    """Threads per sample so that a local pool fills the machine once."""
    local = isinstance(executor, ProcessPoolExecutor | ThreadPoolExecutor)
    return max(1, (os.cpu_count() or 1) // (workers_of(executor) or 1)) if local else 1


def _shards(feeds: Iterable[Feed], size: int) -> Iterator[Shard]:
    """Group the samples; those before a sample that cannot be read are handed out first."""
    first, group, held = 0, list[Feed](), 0
    try:
        for feed in feeds:
            # A copy: readers may fill the same array again for the next sample.
            group.append({name: np.array(value) for name, value in feed.items()})
            held += sum(a.nbytes for a in group[-1].values())
            if len(group) == size or held >= _SHARD_BYTES:
                yield Shard(first, tuple(group))
                first, group, held = first + len(group), [], 0
    except Exception:
        if group:
            yield Shard(first, tuple(group))
        raise
    if group:
        yield Shard(first, tuple(group))


class _Merging:
    """Merges the statistics that come back."""

    def __init__(self, calibrator: Calibrator[Any]) -> None:
        self._merged: list[Statistics] = []  # of one, once there are some
        self._calibrator = calibrator

    def accept(self, answer: Statistics) -> int:
        """The number of its samples."""
        self._merged = [m.merge(answer, self._calibrator) for m in self._merged] or [answer]
        return answer.samples

    def statistics(self) -> Statistics:
        """Those of all samples; there must be one."""
        return self._merged[0]
