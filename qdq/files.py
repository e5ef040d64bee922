"""Files that are written whole or not at all."""

import contextlib
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["replacing", "resolved"]


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """The path of a temporary file that replaces the target if all goes well.

    It lies in a folder of its own in the target's folder. On any failure, Ctrl-C included, it is
    removed and the target is as before. A link stays: what it leads to is replaced. A file that
    is replaced keeps its permissions.

    Raises:
        OSError: the folder does not exist or cannot be written to, or the target is a folder, a
            device, a pipe or a socket.
    """
    real = resolved(target)
    before = _mode_of(real)
    if before is not None and not stat.S_ISREG(before):
        kind = "a folder" if stat.S_ISDIR(before) else "a device, pipe or socket"
        raise OSError(f"'{target}' is {kind} and cannot be replaced; give the path of a file")
    try:
        folder = tempfile.mkdtemp(prefix=".qdq-", dir=real.parent)
    except OSError as e:
        raise type(e)(e.errno, e.strerror, str(target)) from e
    try:
        temporary = Path(folder) / real.name
        yield temporary
        if before is not None:
            temporary.chmod(stat.S_IMODE(before))
        temporary.replace(real)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def resolved(path: Path) -> Path:
    """The path without links.

    Raises:
        OSError: a link leads to itself.
    """
    try:
        return path.resolve()
    except RuntimeError as e:  # Python below 3.13 has no OSError for that
        raise OSError(f"'{path}' is a link that leads to itself") from e


def _mode_of(path: Path) -> int | None:
    """Type and permissions of what is there; None for nothing."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None
