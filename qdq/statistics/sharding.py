"""Calibration statistics, in this process or by any ``concurrent.futures.Executor``.

The caller reads the samples, once, and hands them out in shards; a worker runs the model on a
shard and returns its ``Statistics``, which merge exactly. So the result is the same, bit for bit,
for any number of workers, any size of shards and any order in which they come back.

A lost shard is run again. Where several samples are bad, the error is that of the first, as it
would be in one process.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
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
from qdq.statistics.shipment import Shipment, fingerprint, want_picklable
from qdq.statistics.worker import (
    Answer,
    Gathering,
    Job,
    Progress,
    Shard,
    Threads,
    forget,
    run_shard,
)

__all__ = ["collect"]

log: logging.Logger = logging.getLogger(__name__)

_SHARD_SAMPLES = 4
_SHARD_BYTES = 1 << 23  # of one shard's samples, unless one sample alone is larger
_FLIGHT_BYTES = 1 << 28  # of all samples handed out and not yet back
_FLIGHT_SHARDS = 64  # where the number of workers is unknown
_ATTEMPTS = 3
_NO_SAMPLES = "no calibration samples; give at least one"
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
    takes_work = callable(getattr(executor, "submit", None))
    if executor is not None and (not takes_work or hasattr(executor, "get_executor")):
        raise ConfigError(
            f"executor={executor!r} ({type(executor).__name__}): wants a "
            "concurrent.futures.Executor; of a dask Client it is client.get_executor()"
        )
    job = Job(
        fingerprint=fingerprint(model) if mark is None else mark,
        tensors=tuple(tensors),
        axes=dict(axes),
        layouts=tuple(dict.fromkeys(layouts)),
        shapes=dict(shapes or {}),
        calibrator=calibrator,
        threads=threads if threads is not None or executor is None else _threads(executor),
    )
    if executor is not None:
        run, merging = partial(run_shard, job), _Merging(calibrator)
        sender = _Dispatcher(executor, run, merging.accept, Shipment(model), progress)
        sender.run(_shards(feeds, shard_size))
        return merging.statistics()
    if type(calibrator) not in CALIBRATORS.values():
        return _one_by_one(job, model, feeds, progress)
    with ThreadPoolExecutor(_THREADS) as pool:
        job = replace(job, threads=_threads(pool) if threads is None else threads)
        tasks = Threads(job, job.readout(model))
        sender = _Dispatcher(pool, tasks.run_shard, int, None, progress)
        sender.run(_shards(feeds, shard_size))
        return tasks.statistics()


def _one_by_one(
    job: Job, model: onnx.ModelProto, feeds: Iterable[Feed], progress: Progress | None
) -> Statistics:
    gathering = Gathering(job, job.readout(model))
    if not gathering.add(feeds, 0, progress):
        raise CalibrationError(_NO_SAMPLES)
    return gathering.statistics()


def _threads(executor: Executor) -> int:
    """Threads per sample so that a local pool fills the machine once."""
    local = isinstance(executor, ProcessPoolExecutor | ThreadPoolExecutor)
    return max(1, (os.cpu_count() or 1) // (_workers(executor) or 1)) if local else 1


def _workers(executor: Executor) -> int | None:
    """How many shards the executor runs at a time, where it tells (dask's does not)."""
    for attribute in ("_max_workers", "num_workers"):  # of concurrent.futures, of mpi4py
        found = getattr(executor, attribute, None)
        if isinstance(found, int):
            return found
    return None


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


class _Dispatcher:
    """Hands shards to an executor, a bounded number at a time, and their answers to ``accept``.

    ``accept`` tells how many samples the answer is for.
    """

    def __init__(
        self,
        executor: Executor,
        run: Callable[[Shard, Shipment | None], Answer],
        accept: Callable[[Any], int],
        shipment: Shipment | None,
        progress: Progress | None,
    ) -> None:
        workers = _workers(executor)
        self._executor: Executor | None = executor  # None when it has broken
        self._run = run
        self._accept = accept
        self._shipment = shipment
        self._progress = progress
        self._limit = _FLIGHT_SHARDS if workers is None else 2 * workers
        self._pending: dict[Future[Any], Shard] = {}
        self._samples = 0
        # index of the sample → its error; the lowest is the one to report
        self._failure: tuple[int, Exception] | None = None

    def run(self, shards: Iterator[Shard]) -> None:
        """Have all shards run."""
        try:
            while self._failure is None and (shard := self._next(shards)) is not None:
                self._send(shard)
                while self._full():
                    self._receive()
            while self._pending:
                self._receive()
        except BaseException:  # Ctrl-C too: nothing is left behind that still waits
            for future in self._pending:
                future.cancel()
            raise
        finally:
            forget()  # workers that are threads, or this process after a broken pool
        if self._failure is not None:
            raise self._failure[1]
        if not self._samples:
            raise CalibrationError(_NO_SAMPLES)

    def _next(self, shards: Iterator[Shard]) -> Shard | None:
        try:
            return next(shards, None)
        except Exception as e:  # of the caller's reader, or a sample that does not fit
            sample = getattr(e, "sample", None)
            # Shards are in order, so an error without an index is behind all of them.
            self._fail(1 << 62 if sample is None else sample, e)
            return None

    def _full(self) -> bool:
        held = sum(shard.size for shard in self._pending.values())
        return bool(self._pending) and (len(self._pending) >= self._limit or held >= _FLIGHT_BYTES)

    def _send(self, shard: Shard, shipment: Shipment | None = None) -> None:
        if self._failure is not None and shard.first > self._failure[0]:
            return  # an earlier sample has failed already
        if self._executor is not None:
            try:
                future = self._executor.submit(self._run, shard, shipment)
            except BrokenExecutor as e:
                self._broke(e)
            except RuntimeError as e:
                reason = " ".join(str(e).split())
                raise ConfigError(
                    f"executor={self._executor!r} takes no work: {reason}; give one that is open"
                ) from e
            else:
                self._pending[future] = shard
                return
        self._take(shard, self._run(shard, self._shipment))

    def _receive(self) -> None:
        for future in wait(self._pending, return_when=FIRST_COMPLETED).done:
            # what an earlier one of these led to may have taken it out
            if (shard := self._pending.pop(future, None)) is None:
                continue
            try:
                answer = future.result()
            except BrokenExecutor as e:
                self._broke(e)
                self._send(shard)
            except Exception as e:  # the worker's end, a cancelled task, a result that was lost
                self._again(shard, e)
            else:
                self._take(shard, answer)

    def _take(self, shard: Shard, answer: Answer) -> None:
        if answer is None:
            self._send(shard, self._shipment)
        elif isinstance(answer, Exception):
            sample = getattr(answer, "sample", None)
            self._fail(shard.first if sample is None else sample, answer)
        else:
            try:
                self._samples += self._accept(answer)
            except CalibrationError as e:
                e.sample = shard.first
                self._fail(shard.first, e)
                return
            if self._progress is not None:
                self._progress(self._samples)

    def _again(self, shard: Shard, error: Exception) -> None:
        """Run a lost shard again, but not for ever: it may be what ends its workers."""
        want_picklable(error, self._run)
        if shard.attempt >= _ATTEMPTS:
            raise CalibrationError(
                f"{shard} could not be calibrated by {self._executor!r}: lost {_ATTEMPTS} times, "
                f"the last time with {type(error).__name__}: {error}. Look at the workers' logs: "
                "they may lack memory, or another version of qdq may be installed there",
                sample=shard.first,
            ) from error
        log.warning("%s lost by a worker (%r); run again", shard, error)
        self._send(replace(shard, attempt=shard.attempt + 1))

    def _broke(self, error: BrokenExecutor) -> None:
        if self._executor is not None:
            log.warning("the executor broke (%s); calibration goes on in this process", error)
        self._executor = None

    def _fail(self, sample: int, error: Exception) -> None:
        """Note an error; only shards that could fail at an earlier sample still matter."""
        if self._failure is None or sample < self._failure[0]:
            self._failure = (sample, error)
        for future, shard in list(self._pending.items()):
            if shard.first > self._failure[0]:
                future.cancel()
                del self._pending[future]
