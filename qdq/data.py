"""Calibration data: from whatever the caller has to checked feeds, in one lazy pass. Numpy only.

Every stage after this one sees ``dict[str, ndarray]`` with exactly the model's inputs; a batch is
checked once, here, and nothing is rewound.
"""

import os
import pickle
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from qdq.errors import CalibrationError

__all__ = [
    "CalibrationData",
    "DataReader",
    "Feed",
    "InputSpec",
    "npz_samples",
    "open_feeds",
    "pull",
]

Feed = dict[str, NDArray[np.generic]]
_Array = NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class InputSpec:
    """What a model wants of one input.

    Attributes:
        dtype: numpy type of the elements; ``object`` for strings.
        shape: one entry per dimension, None where any size will do; None if the rank is free.
    """

    dtype: np.dtype[np.generic]
    shape: tuple[int | None, ...] | None


@runtime_checkable
class DataReader(Protocol):
    """Anything with ``get_next()``: the next sample, or None at the end. Never rewound.

    An empty sample or StopIteration ends the data too.
    """

    def get_next(self) -> object:
        """The next sample, or None at the end."""


CalibrationData = (
    DataReader | Iterable[object] | Mapping[str, NDArray[np.generic]] | str | os.PathLike[str]
)

_ACCEPTED = (
    "an object with get_next(), an iterable of samples (a dict of input name to array, a tuple or "
    "list of arrays in input order, or one array for a model of one input), one dict of arrays "
    "(a single sample), or the path of an .npz file with one array per input, samples first"
)
_UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    pickle.UnpicklingError,
)


def open_feeds(data: CalibrationData, inputs: Mapping[str, InputSpec]) -> Iterator[Feed]:
    """Check the first sample now, and return an iterator that checks the others as they come.

    The iterator holds one sample at a time. Each feed has exactly the names of ``inputs``.

    Args:
        data: an object with ``get_next()`` (None ends it; ``rewind`` is never called), an iterable
            of samples, one mapping of name to array (a single sample), or the path of an ``.npz``
            file with one array per input whose first axis is the sample. A sample is a mapping of
            name to array, a tuple or list of arrays in input order, or one array.
        inputs: the model's inputs, in order.

    Raises:
        CalibrationError: if there is no sample, the data is none of the above or unreadable, or a
            sample does not fit: missing or unknown names, another type, rank or size, NaN or Inf.
            ``sample`` and ``tensor`` of the error say which. What the reader itself raises comes
            through unchanged.
    """
    checked = (_check(sample, inputs, i) for i, sample in enumerate(_samples(data)))
    first = next(checked, None)
    if first is None:
        raise CalibrationError(
            f"The calibration data ({_describe(data)}) gave no sample; at least one is needed. "
            "A generator or reader that was read before is empty: make a new one"
        )
    return chain([first], checked)


def npz_samples(path: str | os.PathLike[str]) -> Iterator[Feed]:
    """The samples of an ``.npz`` file: ``{k: npz[k][i] for k in npz}`` for i = 0, 1, ….

    Raises:
        CalibrationError: if the file is missing, broken, no ``.npz``, holds pickled objects, or
            its arrays have no first axis or first axes of unequal lengths.
    """
    where = f"The calibration file '{os.fspath(path)}'"
    try:
        # numpy leaves a file open that it opened itself and could not read.
        with Path(path).open("rb") as file:
            opened = np.load(file, allow_pickle=False)
            if not isinstance(opened, NpzFile):
                raise CalibrationError(
                    f"{where} holds one bare array; an .npz with one array per input is needed: "
                    "numpy.savez(path, input_name=array)"
                )
            arrays = {k: opened[k] for k in opened.files}
    except FileNotFoundError as e:
        raise CalibrationError(f"{where} does not exist") from e
    except _UNREADABLE as e:
        raise CalibrationError(f"{where} cannot be read as .npz: {_one_line(e)}") from e
    return _rows(arrays, where)


def _rows(arrays: Mapping[str, _Array], where: str) -> Iterator[Feed]:
    """Row i of every array as sample i; rows of a vector are 0-d arrays."""
    lengths = {k: len(a) if a.ndim else None for k, a in arrays.items()}
    if len(set(lengths.values())) > 1 or None in lengths.values():
        found = ", ".join(f"'{k}': {'no axis' if n is None else n}" for k, n in lengths.items())
        raise CalibrationError(
            f"{where} wants one array per input, all with the same number of samples along their "
            f"first axis; found {found}"
        )
    count = next(iter(lengths.values()), 0) or 0
    return ({k: np.asarray(a[i]) for k, a in arrays.items()} for i in range(count))


def _samples(data: CalibrationData) -> Iterator[object]:
    """The raw samples of whatever the caller gave, not yet checked."""
    if isinstance(data, str | os.PathLike):
        return npz_samples(data)
    if isinstance(data, NpzFile):
        return _rows({k: data[k] for k in data.files}, "The opened .npz")
    if isinstance(data, DataReader):
        return pull(data.get_next)
    if isinstance(data, Mapping):
        return iter([data])
    # bytes and 0-d arrays would iterate wrongly or not at all.
    if isinstance(data, Iterable) and not isinstance(data, bytes | bytearray | memoryview):
        if isinstance(data, np.ndarray) and data.ndim == 0:
            raise CalibrationError(f"The calibration data is a single number; give {_ACCEPTED}")
        return iter(data)
    raise CalibrationError(
        f"Calibration data of type {type(data).__name__} is not understood; give {_ACCEPTED}"
    )


def pull(get_next: Callable[[], object]) -> Iterator[object]:
    """A reader's samples up to None, an empty one (which onnxruntime's loops end at), or its end.

    ``iter(get_next, None)`` would compare arrays with None, element by element.
    """
    while True:
        try:
            sample = get_next()
        except StopIteration:  # of a reader that calls next(); a generator must not let it out
            return
        if sample is None or (isinstance(sample, Mapping | tuple | list) and not sample):
            return
        yield sample


def _describe(data: object) -> str:
    return repr(os.fspath(data)) if isinstance(data, str | os.PathLike) else type(data).__name__


def _check(sample: object, inputs: Mapping[str, InputSpec], index: int) -> Feed:
    """The sample as a feed with exactly the model's inputs, or CalibrationError."""
    named = _name(sample, inputs, index)
    _check_names(named, inputs, index)
    return {k: _check_array(k, named[k], spec, index) for k, spec in inputs.items()}


def _name(sample: object, inputs: Mapping[str, InputSpec], index: int) -> Mapping[str, object]:
    """Give positional samples the model's names."""
    if isinstance(sample, Mapping):
        return sample
    given: tuple[object, ...]
    if isinstance(sample, tuple | list):
        given = tuple(sample)
    elif isinstance(sample, np.ndarray | np.generic):
        given = (sample,)
    else:
        raise CalibrationError(
            f"Calibration sample {index} is a {type(sample).__name__}; give a dict of input name "
            "to numpy array, a tuple of arrays in input order, or one numpy array",
            sample=index,
        )
    if len(given) != len(inputs):
        extra = "; leave labels out" if len(given) > len(inputs) else ""
        raise CalibrationError(
            f"Calibration sample {index} has {_count(len(given), 'array')}; the model has "
            f"{_count(len(inputs), 'input')}: {_quote(inputs)}{extra}",
            sample=index,
        )
    return dict(zip(inputs, given, strict=True))


def _check_names(named: Mapping[str, object], inputs: Mapping[str, InputSpec], index: int) -> None:
    unknown = [k for k in named if k not in inputs]
    missing = [k for k in inputs if k not in named]
    if not unknown and not missing:
        return
    parts = [f"lacks {_quote(missing)}"] if missing else []
    if unknown:
        near = get_close_matches(str(unknown[0]), list(inputs), n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        parts.append(f"has {_quote(unknown)}, which the model does not know{hint}")
    cure = "give all of them" if not unknown else "rename yours" if missing else "leave others out"
    raise CalibrationError(
        f"Calibration sample {index} {' and '.join(parts)}; the model's inputs are "
        f"{_quote(inputs)}: {cure}",
        tensor=(missing or [str(k) for k in unknown])[0],
        sample=index,
    )


def _check_array(name: str, value: object, spec: InputSpec, index: int) -> _Array:
    """The value as an array of the spec's type and shape, or CalibrationError."""
    where = f"Calibration input '{name}' of sample {index}"
    problem = None
    if not isinstance(value, np.ndarray | np.generic):
        problem = (
            f"is a {type(value).__name__}, not a numpy array; "
            f"convert it: numpy.asarray(value, {_type(spec.dtype)})"
        )
    elif not _fits_type(value.dtype, spec.dtype):
        problem = (
            f"is {value.dtype}; the model wants {spec.dtype}. "
            f"Cast it: value.astype({_type(spec.dtype)})"
        )
    elif spec.shape is not None and not _fits_shape(value.shape, spec.shape):
        problem = (
            f"has shape {value.shape}; the model wants {_shape(spec.shape)}. "
            f"{_shape_hint(value.shape, spec.shape)}"
        )
    elif value.dtype.kind == "f" and not np.isfinite(value).all():
        bad = np.asarray(value)[~np.isfinite(value)]
        problem = (
            f"has {bad.size} of {value.size} values that are NaN or Inf (first: {bad[0]}); "
            "check the preprocessing or leave the sample out"
        )
    if problem is not None:
        raise CalibrationError(f"{where} {problem}", tensor=name, sample=index)
    return np.asarray(value, order="C")  # what is read of it follows the order in memory


def _type(dtype: np.dtype[np.generic]) -> str:
    """The type as Python code, with the module that has it: numpy, or ml_dtypes."""
    kind = dtype.type
    return "object" if dtype.kind == "O" else f"{kind.__module__}.{kind.__name__}"


def _fits_type(found: np.dtype[np.generic], wanted: np.dtype[np.generic]) -> bool:
    # An onnx string tensor is object in numpy; fixed-width strings are as good.
    return found == wanted or (wanted.kind == "O" and found.kind in "US")


def _fits_shape(found: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(found) == len(wanted) and all(
        w is None or f == w for f, w in zip(found, wanted, strict=True)
    )


def _shape_hint(found: tuple[int, ...], wanted: tuple[int | None, ...]) -> str:
    """The most likely cure of a wrong shape."""
    batch = "Add a batch axis with x[None]?"
    first_channels = "Transpose to channels first?"
    cures: tuple[tuple[tuple[int, ...], str], ...] = (
        ((1, *found), batch),
        (found[1:] if found[:1] == (1,) else (), "Take the leading axis off with x[0]?"),
        (found[1:], "Are these several samples? Give them one by one: iterate over the first axis"),
        ((*found[:1], *found[-1:], *found[1:-1]), first_channels),
        ((1, *found[-1:], *found[:-1]), f"{first_channels} {batch}"),
        ((*found[:1], *found[2:], *found[1:2]), "Transpose to channels last?"),
        (
            (wanted[0] or 1 if wanted else 1, *found[1:]),
            "The model's batch size is fixed; feed batches of that size",
        ),
    )
    fitting = (hint for shape, hint in cures if shape and _fits_shape(shape, wanted))
    return next(fitting, "Reshape, resize or pad the data as for inference")


def _shape(shape: tuple[int | None, ...]) -> str:
    inner = ", ".join("any" if d is None else str(d) for d in shape)
    return f"({inner},)" if len(shape) == 1 else f"({inner})"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _quote(names: Iterable[object]) -> str:
    return ", ".join(f"'{n}'" for n in names)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
