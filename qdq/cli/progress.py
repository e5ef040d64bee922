"""How far calibration is, on a terminal; and the processes that share its work."""

import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager

__all__ = ["Progress", "line", "pool"]

_EVERY = 0.1  # seconds between two lines


class Progress:
    """Notes how many samples are done, and shows it where stderr is a terminal.

    Args:
        total: how many there are.
    """

    def __init__(self, total: int) -> None:
        self.done: int = 0
        self._total = total
        self._shown = sys.stderr is not None and sys.stderr.isatty()
        self._start = (0, time.monotonic())  # the rate is since then
        self._last = float("-inf")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._shown and self.done:
            self._show()
            print(file=sys.stderr)

    def __call__(self, done: int) -> None:
        """So many samples are done."""
        if self.done == 0 and done < self._total:  # reading and planning are over: leave them out
            self._start = (done, time.monotonic())
        self.done = done
        if self._shown and time.monotonic() - self._last >= _EVERY:
            self._last = time.monotonic()
            self._show()

    def _show(self) -> None:
        done, start = self._start
        rate = (self.done - done) / max(time.monotonic() - start, 1e-9)
        text = line(self.done, self._total, rate)
        print(f"\r{text:<60}", end="", file=sys.stderr, flush=True)


def line(done: int, total: int, rate: float) -> str:
    """Samples done, their rate per second, and the time left at that rate; 0: not known yet."""
    text = f"calibrating: {done} of {total} samples"
    if not rate:
        return text
    text = f"{text}, {rate:.3g}/s"
    if done >= total:
        return text
    minutes, seconds = divmod(round((total - done) / rate), 60)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
    return f"{text}, {clock} left"


@contextmanager
def pool(jobs: int) -> Iterator[Executor | None]:
    """So many processes to calibrate with; None for one job, which is this process.

    Ctrl-C reaches every process of a terminal; the parent alone answers it.
    """
    if jobs == 1:
        yield None
        return
    # spawned, not forked: a fork would lack the threads of what this process has opened
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_leave_interrupts) as executor:
        # A process ignores from its first moment what its parent ignores when it starts it. One
        # that Ctrl-C ends while it starts would take the executor down, at worst for good.
        with _interrupts_ignored():
            for _ in range(jobs):
                executor.submit(int)
        yield executor


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # which alone may say so
        yield
        return
    answer = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, answer)


def _leave_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
