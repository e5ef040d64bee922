"""Files are replaced whole, links stay links, and no output takes an input's place."""

import os
import stat
from pathlib import Path

import onnx
import pytest
from models import conv_chain

from qdq.errors import ConfigError
from qdq.files import replacing
from qdq.modelio import save
from qdq.outputs import check_output, data_files


def write(path: Path, text: str = "new") -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_failure_leaves_the_old_file_alone(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.write_text("old")
    writing = replacing(target)
    writing.__enter__().write_text("half")
    assert not writing.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_a_link_stays_and_leads_to_the_new_file(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/x").write_text("old")
    (tmp_path / "link").symlink_to("real/x")
    (tmp_path / "dangling").symlink_to("real/y")
    for name in ("link", "dangling"):
        write(tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / name).read_text() == "new"
    assert names(tmp_path / "real") == ["x", "y"]


def test_permissions_are_kept_or_those_of_any_new_file(tmp_path: Path) -> None:
    kept, new, plain = (tmp_path / n for n in ("kept", "new", "plain"))
    kept.write_text("old")
    kept.chmod(0o640)
    write(kept)
    write(new)
    plain.write_text("")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o640
    assert new.stat().st_mode == plain.stat().st_mode


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, what in (("pipe", "a device, pipe or socket"), ("folder", "a folder")):
        with pytest.raises(OSError, match=f"{name}' is {what}"):
            write(tmp_path / name)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    with pytest.raises(ConfigError, match="device, pipe or socket"):
        check_output(tmp_path / "pipe", None)


def test_the_longest_name_and_the_folder_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path / ("n" * 255))
    with pytest.raises(FileNotFoundError, match=r"no/x\.onnx"):
        write(tmp_path / "no/x.onnx")


def test_graph_and_data_change_together(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_text("old")
    (tmp_path / "x.onnx.data").mkdir()
    with pytest.raises(OSError, match="is a folder"):
        save(conv_chain(), path, external_data=True)
    assert path.read_text() == "old"


@pytest.mark.parametrize("output", ["w.bin", "./w.bin", "w"])
def test_weights_of_the_float_model_are_no_output(output: str, tmp_path: Path) -> None:
    path = tmp_path / "in.onnx"
    location = "w.data" if output == "w" else "w.bin"
    onnx.save(conv_chain(), path, save_as_external_data=True, location=location, size_threshold=0)
    assert data_files(path) == [tmp_path / location]
    with pytest.raises(ConfigError, match=r"holds weights of the model .*in\.onnx"):
        check_output(tmp_path / output, path)
    check_output(tmp_path / "out.onnx", path)


def test_external_data_goes_to_no_link(tmp_path: Path) -> None:
    """The data has a name beside the graph's, which what the link leads to does not have."""
    (tmp_path / "real.onnx").write_text("old")
    (tmp_path / "link.onnx").symlink_to("real.onnx")
    with pytest.raises(OSError, match=r"link\.onnx' is a link.*real\.onnx"):
        save(conv_chain(), tmp_path / "link.onnx", external_data=True)
    assert names(tmp_path) == ["link.onnx", "real.onnx"]
    assert (tmp_path / "real.onnx").read_text() == "old"


def test_a_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("x")
    with pytest.raises(OSError, match=r"leads to itself|symbolic links"):
        write(tmp_path / "x")
    with pytest.raises(ConfigError, match="leads to itself"):
        check_output(tmp_path / "x", None)
    with pytest.raises(ConfigError, match="leads to itself"):
        check_output(tmp_path / "y", tmp_path / "x")


def test_a_folder_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write all
    with pytest.raises(ConfigError, match="cannot be written to"):
        check_output(tmp_path / "x", None)


def test_weights_inside_of_a_large_model_are_in_no_other_file(tmp_path: Path) -> None:
    net = conv_chain(channels=192)
    assert max(len(t.raw_data) for t in net.graph.initializer) > 1 << 20
    onnx.save(net, tmp_path / "in.onnx")
    assert data_files(tmp_path / "in.onnx") == []
