"""Which paths may be written to, known before the work is done."""

import os
from collections.abc import Sequence
from pathlib import Path

import onnx

from qdq.errors import ConfigError
from qdq.external import file_of, outside
from qdq.files import resolved
from qdq.weights import is_reference, load_light

__all__ = ["check_output", "data_files"]


def check_output(output: Path, model: Path | None, others: Sequence[tuple[Path, str]] = ()) -> None:
    """Refuse an output that would harm an input, or that cannot be written.

    Args:
        output: the file to write; beside it there may be one more, ``<name>.data``.
        model: the float model, if it is a file; its data files count too.
        others: path and what it is, of the other files that are read.

    Raises:
        ConfigError: the output is an input or its data, no regular file, or in a folder that does
            not exist or cannot be written to.
    """
    for path, what in (*(() if model is None else ((model, "float model"),)), *others):
        if _same(output, path):
            raise ConfigError(f"the output '{output}' is the {what} itself; give another path")
    if output.is_dir():
        raise ConfigError(f"the output '{output}' is a folder; give the path of a file")
    if output.exists() and not output.is_file():
        raise ConfigError(f"the output '{output}' is a device, pipe or socket; name a file")
    folder = _resolved(output).parent
    if not folder.is_dir():
        raise ConfigError(f"the folder of the output '{output}' does not exist; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"the folder of the output '{output}' cannot be written to; take another")
    if model is not None:
        _spare_data(output, model)


def _spare_data(output: Path, model: Path) -> None:
    written = (output, output.with_name(f"{output.name}.data"))
    for data in data_files(model):
        if any(_same(path, data) for path in written):
            raise ConfigError(
                f"'{data}' holds weights of the model '{model}', which the output '{output}' would "
                "replace; give another path"
            )


def data_files(model: Path) -> list[Path]:
    """The other files that a model keeps weights in; none of what cannot be read as a model."""
    try:
        proto = load_light(model) or onnx.load(model, load_external_data=False)
    except Exception:  # who loads it for use will say what is wrong
        return []
    places = (
        entry.value
        for t in outside(proto)
        if not is_reference(t)
        for entry in t.external_data
        if entry.key == "location"
    )
    return [file_of(place, model) for place in dict.fromkeys(places)]


def _same(one: Path, other: Path) -> bool:
    both = one.exists() and other.exists()
    return one.samefile(other) if both else _resolved(one) == _resolved(other)


def _resolved(path: Path) -> Path:
    try:
        return resolved(path)
    except OSError as e:
        raise ConfigError(f"'{path}' is a link that leads to itself; give another path") from e
