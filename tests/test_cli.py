"""The command line: what it writes where, exit statuses, and nothing left behind."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from harness import ASYMMETRIC
from onnx import TensorProto, helper, numpy_helper

from qdq import cli
from qdq.calibrate import CALIBRATORS
from qdq.cli.progress import Progress, line
from qdq.demo import MODEL, digits
from qdq.errors import ModelError
from qdq.version import __version__

ROOT = Path(__file__).parents[1]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with in.onnx (two convolutions) and data.npz (6 samples), as working directory."""
    rng = np.random.default_rng(3)
    weights = [rng.normal(size=(32, c, 3, 3)).astype(np.float32) for c in (16, 32)]
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w0"], ["a"], "first"),
            helper.make_node("Relu", ["a"], ["b"], "relu"),
            helper.make_node("Conv", ["b", "w1"], ["y"], "second"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 16, 32, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 32, 28, 28])],
        [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)],
    )
    opsets = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "in.onnx")
    np.savez(tmp_path / "data.npz", x=rng.normal(size=(6, 1, 16, 32, 32)).astype(np.float32))
    monkeypatch.chdir(tmp_path)
    return tmp_path


QUICK = ["--repeats", "3", "--advise", "1"]
BASE = ["quantize", "in.onnx", "out.onnx", "--calib", "data.npz"]


def left(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def types(path: str) -> list[str]:
    """Elementwise types of the zero points of the model's QuantizeLinear and DequantizeLinear."""
    graph = onnx.load(path).graph
    kinds = {t.name: TensorProto.DataType.Name(t.data_type) for t in graph.initializer}
    q = [n for n in graph.node if n.op_type.endswith("eLinear")]
    return sorted({kinds[n.input[2]] for n in q})


def test_quantize_writes_a_model_and_a_summary(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(BASE) == 0
    out, err = capsys.readouterr()
    assert err == ""  # a pipe: no progress
    assert "out.onnx: " in out
    assert "2 Conv" in out
    assert "QLinearConv" in out
    assert left(files) == {"in.onnx", "data.npz", "out.onnx"}
    onnx.checker.check_model("out.onnx", full_check=True)


def test_json(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*BASE, "--json", "--samples", "4", "--skip", "fir.*"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["samples"] == 4
    assert facts["integer"]["Conv"] == 1
    assert "first" in facts["float"]["nodes"]
    assert facts["float"]["count"] == len(facts["float"]["nodes"])
    assert sum(facts["float"]["reasons"].values()) == facts["float"]["count"]
    assert facts["bytes"]["output"] == Path("out.onnx").stat().st_size
    assert facts["kernels"]["QLinearConv"] == 1


@pytest.mark.parametrize("calibrator", sorted(CALIBRATORS))
def test_calibrators(files: Path, calibrator: str) -> None:
    assert cli.main([*BASE, "--calibrator", calibrator]) == 0
    assert calibrator in onnx.load("out.onnx").SerializeToString().decode("latin1").lower()


def test_percentile_reaches_the_calibrator(files: Path) -> None:
    assert cli.main([*BASE, "--calibrator", "percentile", "--percentile", "97.25"]) == 0
    assert b"97.25" in Path("out.onnx").read_bytes()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ["INT32", "INT8", "UINT8"]),
        (["--activation-type", "int8"], ["INT32", "INT8"]),
        (["--target", "portable", "--activation-type", "uint16"], ["INT32", "INT8", "UINT16"]),
        (["--target", "portable", "--activation-type", "int16"], ["INT16", "INT32", "INT8"]),
        pytest.param(["--weight-type", "uint8"], ["INT32", "UINT8"], marks=ASYMMETRIC),
    ],
)
def test_types(files: Path, options: list[str], expected: list[str]) -> None:
    assert cli.main([*BASE, *options]) == 0
    assert types("out.onnx") == expected


def test_worth_and_channels_are_passed_on(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*BASE, "--worth", "1e9", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["integer"] == {}
    assert cli.main([*BASE, "--worth", "-1"]) != 0
    assert "from 0" in capsys.readouterr().err
    for options, smooth, equalize in (
        ([], True, True),
        (["--no-smooth"], False, True),
        (["--no-equalize"], True, False),
    ):
        assert cli.main([*BASE, *options]) == 0
        props = {p.key: p.value for p in onnx.load("out.onnx").metadata_props}
        assert f"smooth={smooth}, equalize={equalize}" in props["qdq.recipe"]


def test_per_tensor(files: Path) -> None:
    def scales() -> set[tuple[int, ...]]:
        graph = onnx.load("out.onnx").graph
        shapes = {t.name: tuple(t.dims) for t in graph.initializer}
        return {shapes[n.input[1]] for n in graph.node if n.op_type == "DequantizeLinear"}

    assert cli.main(BASE) == 0
    assert scales() == {(), (32,)}
    assert cli.main([*BASE, "--per-tensor"]) == 0
    assert scales() == {()}


@pytest.mark.parametrize(
    ("options", "left_float"),
    [
        (["--skip-op", "Conv", "--skip-op", "Relu"], {"first", "relu", "second"}),
        (["--skip", ".*"], {"first", "relu", "second"}),
        (["--skip", "first"], {"first"}),
        (["--skip-tensor", "b"], {"relu", "second"}),
        (["--only", "first", "--only", "re.*"], {"second"}),
    ],
)
def test_skip(
    files: Path, options: list[str], left_float: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*BASE, "--json", *options]) == 0
    assert set(json.loads(capsys.readouterr().out)["float"]["nodes"]) >= left_float


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["quantize", "no.onnx", "out.onnx", "--calib", "data.npz"], "no.onnx"),
        (["quantize", "in.onnx", "out.onnx", "--calib", "no.npz"], "no.npz"),
        (["quantize", "in.onnx", "in.onnx", "--calib", "data.npz"], "float model itself"),
        (["quantize", "in.onnx", "./x/../in.onnx", "--calib", "data.npz"], "float model itself"),
        (["quantize", "in.onnx", "data.npz", "--calib", "data.npz"], "calibration data itself"),
        (["quantize", "in.onnx", "no/out.onnx", "--calib", "data.npz"], "does not exist"),
        (["quantize", "in.onnx", ".", "--calib", "data.npz"], "is a folder"),
        ([*BASE, "--skip", "thirst"], "thirst"),
        ([*BASE, "--only", "thirst"], "thirst"),
        ([*BASE, "--percentile", "99"], "--calibrator percentile"),
        ([*BASE, "--activation-type", "int16"], "no integer kernels for int16"),
        (["demo", "--out", "no"], "does not exist"),
    ],
)
def test_failures_are_one_line_and_leave_nothing(
    files: Path, argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (files / "in.onnx").read_bytes()
    assert cli.main(argv) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("qdq: error: ")
    assert err.count("\n") == 1
    assert words in err
    assert left(files) == {"in.onnx", "data.npz"}
    assert (files / "in.onnx").read_bytes() == before


def test_a_link_to_the_float_model_is_no_output(files: Path) -> None:
    os.link("in.onnx", "link.onnx")
    assert cli.main(["quantize", "in.onnx", "link.onnx", "--calib", "data.npz"]) == 1


def test_sizes_count_external_data(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("in.onnx").stat().st_size
    model = onnx.load("in.onnx")
    onnx.save(model, "ext.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    assert cli.main(["quantize", "ext.onnx", *BASE[2:], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["bytes"]["model"]
    assert before <= found < before + 10_000


def test_a_failure_keeps_the_older_output(files: Path) -> None:
    Path("out.onnx").write_bytes(b"older")
    assert cli.main([*BASE, "--skip", "thirst"]) == 1
    assert Path("out.onnx").read_bytes() == b"older"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        BASE[:3],
        [*BASE, "--calibrator", "magic"],
        [*BASE, "--percentile", "120"],
        [*BASE, "--percentile", "much"],
        [*BASE, "--samples", "0"],
        [*BASE, "--skip", "("],
        [*BASE, "--activation-type", "int32"],
    ],
)
def test_wrong_usage(files: Path, argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        cli.main(argv)
    assert e.value.code == 2
    assert "usage: qdq" in capsys.readouterr().err
    assert left(files) == {"in.onnx", "data.npz"}


def test_debug_gives_the_traceback(files: Path) -> None:
    with pytest.raises(ModelError):
        cli.main(["quantize", "no.onnx", "out.onnx", "--calib", "data.npz", "--debug"])


def test_interrupt(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", interrupted)  # the last moment before the output
    assert cli.main(BASE) == 130
    assert "interrupted" in capsys.readouterr().err
    assert left(files) == {"in.onnx", "data.npz"}


def test_an_unforeseen_error_is_one_line_too(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("no such key")

    monkeypatch.setattr("qdq.cli.quantize.run", broken)
    assert cli.main(BASE) == 1
    err = capsys.readouterr().err
    assert "unforeseen KeyError: 'no such key'" in err
    assert err.count("\n") == 1


def test_progress_on_a_terminal(files: Path) -> None:
    """Nothing in a pipe; on a terminal a line that is drawn again, with a rate in the end."""
    data = np.load("data.npz")["x"]
    np.savez("data.npz", x=np.concatenate([data, data]))
    shown, ours = os.openpty()
    with os.fdopen(shown, "rb", buffering=0) as terminal:
        done = shell(*BASE, "--samples", "10", cwd=files, stderr=ours)
        os.close(ours)
        text = terminal.read(1 << 16).decode()
    assert done.returncode == 0
    assert done.stdout.startswith("out.onnx: ")
    lines = [part.rstrip() for part in text.split("\r") if part.strip()]
    assert re.fullmatch(r"calibrating: [1-8] of 10 samples", lines[0])
    assert re.fullmatch(r"calibrating: 10 of 10 samples, [\d.e+]+/s", lines[-1])
    assert text.endswith("\n")


def test_the_time_left() -> None:
    assert line(4, 10, 0) == "calibrating: 4 of 10 samples"
    assert line(4, 10, 0.25) == "calibrating: 4 of 10 samples, 0.25/s, 0:24 left"
    assert line(10, 10, 123.456) == "calibrating: 10 of 10 samples, 123/s"
    assert line(1, 10_001, 2.0).endswith(", 1:23:20 left")


def test_progress_counts_from_the_first_sample(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("time.monotonic", lambda: now)
    with Progress(6) as progress:
        for now, done in ((100.0, 2), (101.0, 4), (101.05, 5), (102.0, 6)):  # noqa: B007
            progress(done)
    drawn = [part.rstrip() for part in capsys.readouterr().err.split("\r")[1:]]
    assert drawn == [
        "calibrating: 2 of 6 samples",
        "calibrating: 4 of 6 samples, 2/s, 0:01 left",
        "calibrating: 6 of 6 samples, 2/s",
        "calibrating: 6 of 6 samples, 2/s",
    ]


@pytest.mark.parametrize("command", ["quantize", "calibrate"])
def test_jobs_give_the_same(files: Path, command: str) -> None:
    made = []
    for jobs in ("1", "2"):
        out = f"out{jobs}.npz" if command == "calibrate" else f"out{jobs}.onnx"
        done = shell(command, "in.onnx", out, "--calib", "data.npz", "--jobs", jobs, cwd=files)
        assert (done.returncode, done.stderr) == (0, "")
        made.append((files / out).read_bytes())
    assert made[0] == made[1]


def test_jobs_want_samples(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["calibrate", "in.onnx", "s.npz", "--calib", "data.npz"]) == 0
    for option in ("--jobs", "--samples"):
        assert cli.main(["quantize", "in.onnx", "out.onnx", "--stats", "s.npz", option, "2"]) == 1
        assert f"{option} is for --calib" in capsys.readouterr().err
    assert cli.main(["quantize", "in.onnx", "out.onnx", "--stats", "s.npz", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 6
    with pytest.raises(SystemExit, match="2"):
        cli.main([*BASE, "--jobs", "0"])


def shell(
    *argv: str, cwd: Path | None = None, stderr: int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "qdq", *argv]
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env, check=False, cwd=cwd
    )


def test_python_m_qdq(files: Path) -> None:
    done = shell("--version")
    assert (done.returncode, done.stdout) == (0, f"qdq {__version__}\n")
    failed = shell("quantize", "no.onnx", "out.onnx", "--calib", "data.npz")
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr


@pytest.mark.skipif(os.name != "posix", reason="SIGPIPE")
def test_a_closed_pipe_is_silent(files: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "qdq", *BASE]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=env, check=False)
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == b""


def test_the_installed_command_is_this_one() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["qdq"] == "qdq.cli:main"


# -- plan, compare, and every command as a process ------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's float model, its int8 model and its test images, by processes."""
    folder = tmp_path_factory.mktemp("made")
    images = [f["image"] for f in digits().test[:20]]
    np.savez(folder / "data.npz", image=np.stack(images))
    (folder / "in.onnx").write_bytes(MODEL.read_bytes())
    done = shell("quantize", "in.onnx", "int8.onnx", "--calib", "data.npz", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)
    return folder


def test_plan(made: Path) -> None:
    done = shell("plan", "in.onnx", cwd=made)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split(maxsplit=3) for line in done.stdout.splitlines()]
    assert ["int", "Conv", "conv1", "with relu1"] in rows
    (float_row,) = (r for r in rows if "conv0" in r)
    assert float_row[0] == "float"
    assert "faster" in float_row[3]


def test_plan_takes_the_options_of_quantize(made: Path) -> None:
    done = shell(
        "plan", "in.onnx", "--json", "--skip", "conv1", "--activation-type", "int8", cwd=made
    )
    facts = json.loads(done.stdout)
    nodes = {n["name"]: n for n in facts["nodes"]}
    assert not nodes["conv1"]["integer"]
    assert "conv1" in nodes["conv1"]["reason"]
    assert {t["dtype"] for t in facts["tensors"]} <= {"int8", "int32"}
    assert all(n["integer"] == (n["reason"] is None) for n in facts["nodes"])


def test_plan_says_what_quantize_does(made: Path) -> None:
    facts = json.loads(shell("plan", "in.onnx", "--json", cwd=made).stdout)
    planned = {n["name"] for n in facts["nodes"] if not n["integer"]}
    props = {p.key: p.value for p in onnx.load(made / "int8.onnx").metadata_props}
    assert set(json.loads(props["qdq.left_float"])) == planned


def test_compare(made: Path) -> None:
    done = shell("compare", "in.onnx", "int8.onnx", "--data", "data.npz", *QUICK, cwd=made)
    assert (done.returncode, done.stderr) == (0, "")
    assert "int8.onnx against in.onnx, 20 samples" in done.stdout
    assert "arises here" in done.stdout
    assert "what leaving nodes float would change" in done.stdout


def test_compare_json_and_html(made: Path) -> None:
    options = ["--json", "--html", "report.html", "--samples", "5", *QUICK]
    done = shell("compare", "in.onnx", "int8.onnx", "--data", "data.npz", *options, cwd=made)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["samples"] == 5
    assert {"outputs", "nodes", "tensors", "timing", "bytes", "kernels", "advice"} <= set(report)
    page = (made / "report.html").read_text(encoding="utf8")
    assert all(n["name"] in page for n in report["nodes"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["compare", "in.onnx", "in.onnx", "--data", "data.npz"], "no QuantizeLinear"),
        (["compare", "no.onnx", "int8.onnx", "--data", "data.npz"], "no.onnx"),
        (["compare", "in.onnx", "int8.onnx", "--data", "no.npz"], "no.npz"),
        (["compare", "in.onnx", "int8.onnx", "--data", "data.npz", "--html", "in.onnx"],
         "float model itself"),
        (["compare", "in.onnx", "int8.onnx", "--data", "data.npz", "--html", "no/a.html"],
         "does not exist"),
        (["plan", "int8.onnx"], "already quantized"),
        (["plan", "in.onnx", "--skip", "conv11"], "conv1"),
    ],
)  # fmt: skip
def test_failures_of_plan_and_compare_are_one_line(made: Path, argv: list[str], words: str) -> None:
    done = shell(*argv, cwd=made)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("qdq: error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


@pytest.mark.parametrize("command", ["quantize", "plan", "compare", "demo"])
def test_help_has_examples_that_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        cli.main([command, "--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    assert "--json" in text
    examples = [
        line.strip() for line in text.partition("examples:")[2].splitlines() if line.strip()
    ]
    assert examples
    for example in examples:
        words = shlex.split(example.partition(" > ")[0])
        assert words[:2] == ["qdq", command]
        cli._parser().parse_args(words[1:])  # SystemExit on a wrong option


def test_demo_json(tmp_path: Path) -> None:
    done = shell("demo", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["images"] == 500
    assert facts["bytes"][1] == (tmp_path / facts["output"]).stat().st_size


class TestSeparateRuns:
    def test_statistics_in_place_of_data_give_the_same_file(self, files: Path) -> None:
        assert cli.main([*BASE, "--calibrator", "minmax"]) == 0
        calibrate = ["calibrate", "in.onnx", "stats.npz", "--calib", "data.npz"]
        assert cli.main([*calibrate, "--calibrator", "minmax"]) == 0
        later = ["quantize", "in.onnx", "later.onnx", "--stats", "stats.npz"]
        assert cli.main([*later, "--calibrator", "minmax"]) == 0
        assert Path("later.onnx").read_bytes() == Path("out.onnx").read_bytes()

    def test_other_options_are_refused(
        self, files: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["calibrate", "in.onnx", "stats.npz", "--calib", "data.npz"]) == 0
        stale = ["quantize", "in.onnx", "out.onnx", "--stats", "stats.npz"]
        assert cli.main([*stale, "--calibrator", "entropy"]) == 1
        assert "Entropy" in capsys.readouterr().err
        assert not Path("out.onnx").exists()

    def test_parts_merge_to_the_whole(
        self, files: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with np.load("data.npz") as data:
            whole = {name: data[name] for name in data.files}
        parts = []
        for k, part in enumerate((slice(0, 2), slice(2, None))):
            np.savez(f"part{k}.npz", **{name: values[part] for name, values in whole.items()})
            made = ["calibrate", "in.onnx", f"stats{k}.npz", "--calib", f"part{k}.npz"]
            assert cli.main(made) == 0
            parts += ["--stats", f"stats{k}.npz"]
        assert cli.main(["calibrate", "in.onnx", "stats.npz", "--calib", "data.npz"]) == 0
        later = ["quantize", "in.onnx", "out.onnx"]
        assert cli.main([*later, "--stats", "stats.npz"]) == 0
        exact = Path("out.onnx").read_bytes()
        for order in (parts, parts[2:] + parts[:2]):
            assert cli.main([*later, *order]) == 0
            assert Path("out.onnx").read_bytes() == exact
        assert cli.main([*later, *parts, "--stats", "./stats0.npz"]) == 1
        assert "given twice" in capsys.readouterr().err
        minmax = ["calibrate", "in.onnx", "other.npz", "--calib", "data.npz"]
        assert cli.main([*minmax, "--calibrator", "minmax"]) == 0
        assert cli.main([*later, *parts, "--stats", "other.npz"]) == 1
        assert "--stats other.npz does not go with those before" in capsys.readouterr().err

    def test_data_or_statistics(self, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for wrong in ([], ["--calib", "data.npz", "--stats", "stats.npz"]):
            with pytest.raises(SystemExit) as stop:
                cli.main(["quantize", "in.onnx", "out.onnx", *wrong])
            assert stop.value.code == 2
            assert "--calib" in capsys.readouterr().err


def test_a_target_sqnr(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*BASE, "--json", "--target-sqnr", "400"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["integer"] == {}
    assert "qdq: warning: only the float model reaches target_sqnr=400" in shown.err


def test_closed_streams_and_letters_that_the_terminal_lacks(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    assert cli.main([*BASE[:2], "\u00fc.onnx", *BASE[3:]]) == 0
    assert raw.getvalue().startswith(rb"\xfc.onnx: ")
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(BASE) == 0


def test_jobs_from_a_thread_that_signals_do_not_reach(files: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(cli.main, [*BASE, "--jobs", "2"]).result() == 0
