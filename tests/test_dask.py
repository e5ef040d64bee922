"""Calibration on a real dask cluster: an optional extra."""

import os
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path

import numpy as np
import pytest
from deadly import Deadly
from models import conv_chain, feeds

from qdq.calibrate import MSE
from qdq.errors import CalibrationError
from qdq.statistics.sharding import collect

distributed = pytest.importorskip("distributed")

NET = conv_chain(channels=8, size=8, depth=2)
DATA = feeds({"x": (1, 8, 8, 8)}, 12)
TENSORS, AXES = ("x", "c0", "r0", "r1"), {"x": 1, "r0": 1}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Executor]:
    """Two worker processes."""
    folder = tmp_path_factory.mktemp("dask")
    with (
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            dashboard_address=None,
            local_directory=str(folder),
        ) as local,
        distributed.Client(local) as client,
    ):
        yield client.get_executor()


def test_the_same_statistics(cluster: Executor, tmp_path: Path) -> None:
    seen: list[int] = []
    found = collect(
        NET, TENSORS, AXES, DATA, MSE(), executor=cluster, shard_size=2, progress=seen.append
    )
    here = collect(NET, TENSORS, AXES, DATA, MSE())
    assert found == here
    assert seen == [2, 4, 6, 8, 10, 12]
    found.save(tmp_path / "a")
    here.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_bad_sample_is_named(cluster: Executor) -> None:
    data = [dict(feed) for feed in DATA]
    for bad in (7, 10):
        data[bad]["x"] = np.full_like(data[bad]["x"], np.inf)
    with pytest.raises(CalibrationError, match=r"calibration sample 7:.*NaN or Inf") as e:
        collect(NET, TENSORS, AXES, data, MSE(), executor=cluster, shard_size=3)
    assert (e.value.sample, e.value.tensor) == (7, "x")
    # and the cluster goes on working
    assert collect(NET, TENSORS, AXES, DATA, MSE(), executor=cluster).samples == 12


def test_a_worker_that_dies(cluster: Executor, tmp_path: Path) -> None:
    data = [*DATA, {"x": np.full((1, 8, 8, 8), 7, np.float32)}]
    calibrator = Deadly(marker=str(tmp_path / "died"), parent=os.getpid())
    found = collect(NET, TENSORS, AXES, data, calibrator, executor=cluster, shard_size=2)
    assert (tmp_path / "died").exists()
    assert found == collect(NET, TENSORS, AXES, data, calibrator)
