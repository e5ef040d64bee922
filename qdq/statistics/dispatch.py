"""Hands shards of samples to any ``concurrent.futures.Executor``, and takes what comes back.

A lost shard is run again. Where several samples are bad, the error is that of the first, as it
would be in one process.
"""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import replace
from typing import Any

from qdq.errors import CalibrationError, ConfigError
from qdq.statistics.shipment import Shipment, want_picklable
from qdq.statistics.worker import Answer, Progress, Shard, forget

__all__ = ["NO_SAMPLES", "Dispatcher", "workers_of"]

log: logging.Logger = logging.getLogger(__name__)

_FLIGHT_BYTES = 1 << 28  # of all samples handed out and not yet back
_FLIGHT_SHARDS = 64  # where the number of workers is unknown
_ATTEMPTS = 3
NO_SAMPLES = "no calibration samples; give at least one"


def workers_of(executor: Executor) -> int | None:
    """How many shards the executor runs at a time, where it tells (dask's does not)."""
    for attribute in ("_max_workers", "num_workers"):  # of concurrent.futures, of mpi4py
        found = getattr(executor, attribute, None)
        if isinstance(found, int):
            return found
    return None


class Dispatcher:
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
        workers = workers_of(executor)
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
            raise CalibrationError(NO_SAMPLES)

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
