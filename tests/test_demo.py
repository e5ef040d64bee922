"""The demo: its files are what they claim, and what it prints is true."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from qdq.demo import MODEL, digits, main
from qdq.errors import ConfigError
from qdq.session import optimized_op_counts, run


def test_the_files_are_small_and_sound() -> None:
    data = digits()
    assert MODEL.stat().st_size < 100_000
    assert (MODEL.parent / "digits.npz").stat().st_size < 50_000
    onnx.checker.check_model(MODEL, full_check=True)
    assert len(data.calibration) == 100
    assert len(data.test) == len(data.labels) == 500
    images = np.stack([f["image"] for f in (*data.calibration, *data.test)])
    assert images.shape == (600, 1, 1, 8, 8)
    assert images.min() == 0
    assert images.max() == 1
    assert set(np.unique(data.labels)) == set(range(10))


def test_calibration_and_test_images_do_not_overlap() -> None:
    data = digits()
    seen = {f["image"].tobytes() for f in data.calibration}
    assert len(seen) == 100
    assert not any(f["image"].tobytes() in seen for f in data.test)


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = main(tmp_path)
    text = capsys.readouterr().out
    assert path == tmp_path / "digits.int8.onnx"
    assert str(path) in text
    data = digits()
    accuracy = {}
    decisions = {}
    for name, model in (("float32", MODEL), ("int8", path)):
        outputs = np.concatenate([o["digit"] for o in run(model, data.test)])
        decisions[name] = outputs.argmax(1)
        accuracy[name] = 100 * (decisions[name] == data.labels).mean()
        printed = re.search(rf"^{name} +([\d.]+) % +([\d.]+) kB", text, re.M)
        assert printed
        assert float(printed[1]) == pytest.approx(accuracy[name], abs=0.051)
        assert float(printed[2]) == pytest.approx(model.stat().st_size / 1e3, abs=0.051)
    same = int((decisions["float32"] == decisions["int8"]).sum())
    assert f"same decision on {same} of 500" in text
    assert accuracy["float32"] > 97
    assert same >= 490
    assert path.stat().st_size < MODEL.stat().st_size / 2


def test_the_convolutions_that_cost_most_run_on_integers(tmp_path: Path) -> None:
    counts = optimized_op_counts(main(tmp_path))
    # The first has one input channel; the plan may find that float is faster there.
    assert counts["QLinearConv"] in (3, 4)
    assert counts.get("Conv", 0) + counts["QLinearConv"] == 4


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        main(tmp_path / "no")
