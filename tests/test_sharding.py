"""Calibration by executors: the same statistics, whoever runs the shards and whatever is lost."""

import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from deadly import Deadly
from models import conv_chain, feeds, model, node
from numpy.typing import NDArray

from qdq.calibrate import CALIBRATORS, Calibrator, MinMax
from qdq.data import Feed, InputSpec, open_feeds
from qdq.errors import CalibrationError, ConfigError, ModelError
from qdq.ranges import TensorRange
from qdq.statistics import Statistics, dispatch, sharding, worker
from qdq.statistics.observe import Readout
from qdq.statistics.sharding import collect

ALL = [cls() for cls in CALIBRATORS.values()]
every = pytest.mark.parametrize("calibrator", ALL, ids=lambda c: c.name)

NET = conv_chain(channels=8, size=8, depth=2)
DATA = feeds({"x": (1, 8, 8, 8)}, 10)
TENSORS, AXES = ("x", "c0", "r0", "r1"), {"x": 1, "r0": 1}


def run(executor: Any, calibrator: Any = ALL[-1], data: Any = DATA, **more: Any) -> Any:
    return collect(NET, TENSORS, AXES, data, calibrator, executor=executor, **more)


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    """Two processes that share nothing with this one."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield pool


class Inline(Executor):
    """Runs tasks when they are waited for, in any order, each as if in a process of its own.

    ``lose`` tells for which numbers of tasks the worker ends; ``by`` with what error.
    """

    def __init__(self, seed: int = 0, lose: Any = (), by: type[Exception] = OSError) -> None:
        self.random, self.lose, self.by, self.sent = Random(seed), lose, by, 0
        self.waiting: list[tuple[Future[Any], bytes, int]] = []
        self.most = 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append((future, pickle.dumps((fn, args)), self.sent))
        self.sent += 1
        self.most = max(self.most, len(self.waiting))
        return future

    def work(self) -> None:
        future, task, number = self.waiting.pop(self.random.randrange(len(self.waiting)))
        if not future.set_running_or_notify_cancel():
            return
        if number in self.lose:
            future.set_exception(self.by("the worker ended"))
            return
        fn, args = pickle.loads(task)
        future.set_result(pickle.loads(pickle.dumps(fn(*args))))


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> type[Inline]:
    """Let ``wait`` do the work of an ``Inline``."""
    made: list[Inline] = []

    class Pool(Inline):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    real = dispatch.wait

    def wait(pending: Any, **kwargs: Any) -> Any:
        while made[-1].waiting and not any(f.done() for f in pending):
            made[-1].work()
        return real(pending, **kwargs)

    monkeypatch.setattr(dispatch, "wait", wait)
    return Pool


# ---- the same for everyone -------------------------------------------------------------------


@every
def test_processes_give_the_same(
    calibrator: Calibrator[Any], processes: Executor, tmp_path: Path
) -> None:
    run(None, calibrator).save(tmp_path / "one.npz")
    run(processes, calibrator, shard_size=3).save(tmp_path / "two.npz")
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("shard_size", [1, 4, 100])
def test_threads_give_the_same(workers: int, shard_size: int) -> None:
    with ThreadPoolExecutor(workers) as pool:
        assert run(pool, shard_size=shard_size) == run(None)
        assert run(pool, data=iter(DATA[::-1]), shard_size=shard_size) == run(None)


def test_any_order_of_completion_gives_the_same(inline: type[Inline]) -> None:
    for seed in range(5):
        assert run(inline(seed), shard_size=1) == run(None)


def test_threads_within_onnxruntime_do_not_matter() -> None:
    assert run(None, threads=1) == run(None, threads=2) == run(None)


def test_a_tensor_that_is_empty_in_some_shards(inline: type[Inline]) -> None:
    net = model([node("Relu", ["x"], "y")], {"x": ["n", 2]}, {"y": ["n", 2]})
    sizes = (0, 3, 0, 0, 2)
    data = [{"x": np.full((n, 2), n, np.float32)} for n in sizes]
    found = collect(net, ["y"], {"y": 1}, data, MinMax(), executor=inline(), shard_size=1)
    assert found == collect(net, ["y"], {"y": 1}, data, MinMax())
    assert found.summaries["y"] == TensorRange(np.float32(2), np.float32(3))
    assert found.means["y"].tolist() == [2.5, 2.5]


@every
def test_how_an_array_lies_in_memory_does_not_matter(
    processes: Executor, calibrator: Calibrator[Any]
) -> None:
    """Images are views of others with their channels last; one that has travelled is not."""
    nodes = [node("Conv", ["x", "w"], "y", strides=[2, 2])]
    net = model(nodes, {"x": ["N", "C", "H", "W"]}, {"y": ["N", "M", "h", "v"]},
                {"w": np.ones((8, 3, 3, 3), np.float32)})  # fmt: skip
    images = np.random.default_rng(0).normal(size=(3, 1, 96, 96, 3)).astype(np.float32) ** 3
    views = [{"x": x.transpose(0, 3, 1, 2)} for x in images]
    plain = [{"x": np.ascontiguousarray(f["x"])} for f in views]
    specs = {"x": InputSpec(np.dtype(np.float32), (None, None, None, None))}
    found = [
        collect(net, ("x",), {"x": 1}, open_feeds(data, specs), calibrator, executor=executor)
        for data, executor in ((plain, None), (views, None), (views, processes))
    ]
    for other in found[1:]:
        assert other.summaries["x"] == found[0].summaries["x"]


def test_a_reader_may_use_its_buffer_again(processes: Executor) -> None:
    def reader() -> Iterator[Feed]:
        buffer = np.zeros_like(DATA[0]["x"])
        for feed in DATA:
            buffer[...] = feed["x"]
            yield {"x": buffer}

    assert run(processes, data=reader(), shard_size=3) == run(None)


def test_the_model_travels_only_where_it_is_missing(
    inline: type[Inline], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = []
    real = sharding.Shipment.__getstate__
    monkeypatch.setattr(
        sharding.Shipment, "__getstate__", lambda self: packed.append(1) or real(self)
    )
    pool = inline()
    run(pool, shard_size=1)
    assert len(packed) <= worker_count_of_first_round(pool)
    assert not worker._kept  # nothing stays in the caller's process


def worker_count_of_first_round(pool: Inline) -> int:
    """All shards that were out before the first one came back: none of them had the model."""
    return pool.most


def test_a_worker_keeps_one_model() -> None:
    shard = worker.Shard(0, tuple(DATA[:1]))
    for tensors in (("x", "c0"), ("x", "r1")):
        job = worker.Job(
            fingerprint="same",
            tensors=tensors,
            axes={},
            layouts=(),
            scores=(),
            shapes={},
            calibrator=MinMax(),
            threads=1,
        )
        assert worker.run_shard(job, shard, None) is None
        first = worker.run_shard(job, shard, sharding.Shipment(NET))
        assert isinstance(first, Statistics)
        assert tuple(first.summaries) == tensors
        assert worker.run_shard(job, shard, None) == first
        assert len(worker._kept) == 1
    worker.forget()
    assert not worker._kept


def test_samples_are_read_as_they_are_needed(inline: type[Inline]) -> None:
    pool = inline()
    pool._max_workers = 2
    read: list[int] = []

    def reader() -> Iterator[Feed]:
        for k, feed in enumerate(DATA * 5):
            read.append(k)
            assert len(pool.waiting) <= 4
            yield feed

    run(pool, data=reader(), shard_size=1)
    assert read == list(range(50))
    assert pool.most == 4


def test_shards_of_large_samples_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "_SHARD_BYTES", 3 * DATA[0]["x"].nbytes)
    for size, wanted in ((100, [3, 3, 3, 1]), (3, [3, 3, 3, 1]), (2, [2] * 5)):
        shards = list(sharding._shards(DATA, size))
        assert [len(s.feeds) for s in shards] == wanted
        assert [s.first for s in shards] == [sum(wanted[:k]) for k in range(len(wanted))]


# ---- progress --------------------------------------------------------------------------------


def test_progress(processes: Executor) -> None:
    here = threading.get_ident()
    seen: list[int] = []

    def progress(done: int) -> None:
        assert threading.get_ident() == here
        seen.append(done)

    for executor in (None, processes):
        seen.clear()
        run(executor, progress=progress, shard_size=4)
        assert seen == sorted(set(seen))
        assert len(seen) == 3
        assert seen[-1] == 10


def test_two_samples_at_a_time_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    lock, inside, most = threading.Lock(), 0, 0
    real = Readout.run

    def watched(self: Readout, *args: Any) -> Any:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.01)
        found = real(self, *args)
        with lock:
            inside -= 1
        return found

    monkeypatch.setattr(Readout, "run", watched)
    assert run(None, data=DATA * 4, shard_size=1).samples == 40
    assert most == 2


@dataclass(frozen=True)
class Own(MinMax):
    """A calibrator that is not qdq's, and says who called it."""

    called: list[Any] = field(default_factory=list)

    def summarize(self, x: np.ndarray) -> TensorRange:
        self.called.append((threading.get_ident(), float(x.flat[0])))
        return super().summarize(x)


def test_a_calibrator_of_the_callers_sees_one_sample_after_the_other() -> None:
    own = Own()
    found = collect(NET, ("x",), {}, DATA, own)
    here = threading.get_ident()
    assert own.called == [(here, float(feed["x"].flat[0])) for feed in DATA]
    assert found.summaries["x"] == run(None, MinMax()).summaries["x"]


# ---- bad samples -----------------------------------------------------------------------------


def spoiled(*bad: int) -> list[Feed]:
    data = [dict(feed) for feed in DATA]
    for k in bad:
        data[k]["x"] = np.full_like(data[k]["x"], np.nan)
    return data


@pytest.mark.parametrize("bad", [0, 5, 9])
def test_a_bad_sample_is_named(bad: int, processes: Executor) -> None:
    found = []
    for executor in (None, processes):
        with pytest.raises(CalibrationError, match=f"calibration sample {bad}:.*NaN") as e:
            run(executor, data=spoiled(bad), shard_size=3)
        assert (e.value.sample, e.value.tensor) == (bad, "x")
        found.append(str(e.value))
    assert found[0] == found[1]


def test_of_several_bad_samples_the_first_is_named(inline: type[Inline]) -> None:
    for seed in range(6):
        with pytest.raises(CalibrationError, match="calibration sample 3:") as e:
            run(inline(seed), data=spoiled(3, 4, 8), shard_size=1)
        assert e.value.sample == 3


def test_a_sample_that_cannot_run(processes: Executor) -> None:
    data = [*DATA[:5], {"x": np.zeros((1, 3, 8, 8), np.float32)}]
    with pytest.raises(CalibrationError, match="Sample 5: onnxruntime could not run") as e:
        run(processes, data=data, shard_size=2)
    assert e.value.sample == 5


def test_a_reader_that_fails(inline: type[Inline]) -> None:
    def reader(data: list[Feed]) -> Iterator[Feed]:
        yield from data
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        run(inline(), data=reader(DATA), shard_size=4)
    # what came before it is looked at first, as in one process
    with pytest.raises(CalibrationError, match="calibration sample 9:"):
        run(inline(), data=reader(spoiled(9)), shard_size=4)


def test_channels_that_differ_between_samples(inline: type[Inline]) -> None:
    net = model([node("Relu", ["x"], "y")], {"x": ["n", "c"]}, {"y": ["n", "c"]})
    data = [{"x": np.ones((2, c), np.float32)} for c in (3, 3, 4)]
    with pytest.raises(CalibrationError, match=r"'y' has . channels") as e:
        collect(net, ["y"], {"y": 1}, data, MinMax(), executor=inline(), shard_size=1)
    assert e.value.tensor == "y"
    assert e.value.sample in (0, 1, 2)


def test_threads_go_on_with_what_they_have_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sample merged with the rest would cost more than it takes to count it."""
    merged: list[int] = []
    real = Statistics.merge
    monkeypatch.setattr(
        Statistics, "merge", lambda self, *more: merged.append(self.samples) or real(self, *more)
    )
    assert run(None).samples == 10
    assert len(merged) <= 1


def test_channels_that_differ_between_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread's samples agree, and the error is still that of the first one which differs."""
    both, real = threading.Barrier(2), Readout.run

    def run_both(self: Readout, feed: Feed, sample: int = 0) -> Any:
        both.wait(60)
        return real(self, feed, sample)

    monkeypatch.setattr(Readout, "run", run_both)
    net = model([node("Relu", ["x"], "y")], {"x": ["n", "c"]}, {"y": ["n", "c"]})
    data = [{"x": np.ones((2, c), np.float32)} for c in (3, 4)]
    with pytest.raises(CalibrationError, match=r"'y' has . channels") as e:
        collect(net, ["y"], {"y": 1}, data, MinMax())
    assert (e.value.tensor, e.value.sample) == ("y", 1)


def test_no_samples(processes: Executor) -> None:
    for executor in (None, processes):
        with pytest.raises(CalibrationError, match="no calibration samples"):
            run(executor, data=[])


def test_a_model_that_does_not_load(processes: Executor) -> None:
    with pytest.raises(ModelError, match="no tensor 'none'"):
        collect(NET, ["none"], {}, DATA, MinMax(), executor=processes)


@dataclass(frozen=True)
class Faulty(MinMax):
    """A calibrator with a programming error."""

    def summarize(self, x: NDArray[np.floating]) -> TensorRange:
        return {}["missing"]  # type: ignore[no-any-return]


def test_a_fault_of_the_calibrator_is_not_tried_again(inline: type[Inline]) -> None:
    pool = inline()
    with pytest.raises(KeyError, match="missing") as e:
        run(pool, Faulty(), shard_size=10)
    assert pool.sent == 2  # without the model, and with it
    assert "in summarize" in "".join(e.value.__notes__)


# ---- lost workers ----------------------------------------------------------------------------


def test_a_worker_that_dies(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = [dict(feed) for feed in DATA]
    data[6] = {"x": np.where(np.arange(512).reshape(1, 8, 8, 8) == 9, 7, data[6]["x"])}
    data[6]["x"] = data[6]["x"].astype(np.float32)
    calibrator = Deadly(marker=str(tmp_path / "died"), parent=os.getpid())
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        found = run(pool, calibrator, data, shard_size=1)
    assert (tmp_path / "died").exists()
    assert found == run(None, calibrator, data)
    assert found.samples == 10
    (said,) = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert "executor broke" in said
    assert "goes on in this process" in said


@pytest.mark.parametrize("lose", [{0}, {3, 7}, {9, 12, 15}])
def test_a_lost_shard_is_run_again(
    lose: set[int], inline: type[Inline], caplog: pytest.LogCaptureFixture
) -> None:
    assert run(inline(lose=lose), shard_size=1) == run(None)
    assert len([r for r in caplog.records if "lost by a worker" in r.message]) == len(lose)


def test_a_shard_that_is_always_lost(inline: type[Inline]) -> None:
    pool = inline(lose=range(100))
    with pytest.raises(CalibrationError, match=r"samples 0 to 9 could.*lost 3 times.*OSError") as e:
        run(pool, shard_size=10)
    assert e.value.sample == 0
    assert pool.sent == 3


@dataclass(frozen=True)
class Locked(MinMax):
    """A calibrator that cannot be pickled, or whose summaries cannot."""

    lock: Any = None

    def summarize(self, x: NDArray[np.floating]) -> Any:
        return threading.Lock()


@pytest.mark.parametrize("lock", [None, threading.Lock()], ids=["summary", "calibrator"])
def test_what_cannot_be_sent_is_told_at_once(
    lock: Any, processes: Executor, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=r"calibrator.*cannot pickle '_thread\.lock' object"):
        run(processes, Locked(lock=lock), shard_size=1)
    with pytest.raises(ConfigError, match=r"calibrator.*Local.*top level"):
        run(processes, dataclass(frozen=True)(type("Local", (MinMax,), {}))())
    assert not caplog.records


def test_a_pool_that_breaks(inline: type[Inline], caplog: pytest.LogCaptureFixture) -> None:
    pool = inline(lose=range(5, 100), by=BrokenProcessPool)
    assert run(pool, shard_size=1) == run(None)
    assert len([r for r in caplog.records if "executor broke" in r.message]) == 1
    with pytest.raises(CalibrationError, match="calibration sample 4:"):
        run(inline(lose=range(100), by=BrokenProcessPool), data=spoiled(4, 7), shard_size=1)


def test_what_takes_no_work() -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    with pytest.raises(ConfigError, match=r"takes no work: cannot schedule.*give one that is open"):
        run(pool)
    with pytest.raises(ConfigError, match=r"executor=2 \(int\): wants a concurrent"):
        run(2)
    client = types.SimpleNamespace(submit=pool.submit, get_executor=lambda: pool)  # as dask's
    with pytest.raises(ConfigError, match=r"wants a.*of a dask Client it is client\.get_executor"):
        run(client)
    with pytest.raises(ConfigError, match="shard_size=0"):
        run(None, shard_size=0)


# ---- interruption ----------------------------------------------------------------------------


def test_an_interruption_cancels_what_waits(inline: type[Inline]) -> None:
    pool = inline()

    def progress(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pool, shard_size=1, progress=progress)
    assert pool.waiting
    assert all(future.cancelled() for future, _, _ in pool.waiting)
    assert not worker._kept


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_ends_a_pool_at_once(tmp_path: Path) -> None:
    script = tmp_path / "endless.py"
    script.write_text(
        "import multiprocessing, signal, sys\n"
        # a shell that runs the tests in the background has SIGINT ignored, and so had we
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from itertools import cycle\n"
        "from qdq.calibrate import MinMax\n"
        "from qdq.statistics.sharding import collect\n"
        "from models import conv_chain, feeds\n"
        "if __name__ == '__main__':\n"
        "    data = cycle(feeds({'x': (1, 8, 8, 8)}, 2))\n"
        "    net = conv_chain(channels=8, size=8, depth=2)\n"
        "    def progress(done):\n"
        "        print(done, flush=True)\n"
        "    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:\n"
        "        collect(net, ['x'], {}, data, MinMax(), executor=pool, progress=progress)\n",
        encoding="utf8",
    )
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()  # the first shard is back
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
    # onnxruntime keeps a file .ses of its own among the temporary ones
    assert {p.name for p in tmp_path.iterdir()} <= {"endless.py", ".ses"}


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_while_the_processes_of_the_command_line_start(tmp_path: Path) -> None:
    script = tmp_path / "starting.py"
    script.write_text(
        "import os, signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from qdq.cli.progress import pool\n"
        "if __name__ == '__main__':\n"
        "    with pool(2) as executor:\n"
        "        waiting = [executor.submit(time.sleep, 0) for _ in range(8)]\n"
        "        try:\n"
        "            os.killpg(0, signal.SIGINT)\n"
        "            time.sleep(60)\n"
        "        finally:\n"
        "            for future in waiting:\n"
        "                future.cancel()\n",
        encoding="utf8",
    )
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True, text=True, timeout=50, start_new_session=True, check=False,
    )  # fmt: skip
    assert done.stderr.count("Traceback") == 1  # that of this process, none of a worker
    assert done.stderr.endswith("KeyboardInterrupt\n")


# ---- constant memory -------------------------------------------------------------------------

MEASURE = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from models import conv_chain
from qdq.calibrate import CALIBRATORS
from qdq.statistics.sharding import collect
net = conv_chain(channels=8, size=32, depth=2)
def data(count):
    r = np.random.default_rng(0)
    for k in range(count):
        yield {"x": r.standard_normal((1, 8, 32, 32), np.float32) * (1 + k)}
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
names, axes = ["x", "c0", "r0", "c1", "r1"], {"x": 1, "r0": 1}
for count in (32, 512):
    for kind in CALIBRATORS.values():
        collect(net, names, axes, data(count), kind())
        print(kind.name, peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="wants Linux's /proc")
def test_memory_does_not_grow_with_the_samples() -> None:
    command = [sys.executable, "-c", MEASURE, str(Path(__file__).parent)]
    lines = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split("\n")
    found = [(name, int(peak)) for name, peak in (line.split() for line in lines if line)]
    assert [name for name, _ in found] == [*CALIBRATORS, *CALIBRATORS]
    few = found[len(CALIBRATORS) - 1][1]
    for name, many in found[len(CALIBRATORS) :]:
        # in kilobytes; 480 inputs are 15 000, all their tensors 75 000
        assert many - few < 4_000, name


def test_statistics_are_what_comes_back(processes: Executor) -> None:
    assert isinstance(run(processes), Statistics)
