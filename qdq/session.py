"""Run models: the only file that knows onnxruntime.

A ModelProto's weights are lent to the runtime and not serialized: a model of any size opens, and
without a file. The runtime still makes copies of its own, packed for its kernels; only what it is
given as an input does it read in place.

onnxruntime's errors leave this file as qdq's, with one line that says what could not run; its
own log is silent.
"""

import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from qdq.data import Feed, InputSpec
from qdq.errors import CalibrationError, ModelError, QdqError
from qdq.excerpt import add_nodes, make_inputs, reduce_to
from qdq.graph import Graph
from qdq.light import detached
from qdq.nested import all_nodes

__all__ = [
    "RUNTIME_VERSION",
    "Session",
    "input_specs",
    "is_large_matrix",
    "open_session",
    "optimized_op_counts",
    "run",
    "run_sample",
]

log: logging.Logger = logging.getLogger(__name__)

RUNTIME_VERSION: str = ort.__version__

Model = onnx.ModelProto | bytes | str | os.PathLike[str]

# Initializers above this many bytes are lent; the runtime's shape inference reads smaller ones.
_LENT_ABOVE = 1024
# Models with more bytes of weights than this can be opened without copies of them: weights above
# the second number become inputs. Fusions want the smaller ones to be constant.
_HEAVY = 1 << 30
_FED_ABOVE = 1 << 20
# What the runtime takes from numpy as it is; rarer types (bfloat16, 4 bit, strings) go inline.
_LENDABLE = frozenset(
    np.dtype(k) for k in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
)
# onnxruntime's exception classes share no base of their own.
_ORT_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(v for v in vars(ort_errors).values() if isinstance(v, type) and issubclass(v, Exception)),
)


class Session:
    """A loaded model.

    Attributes:
        outputs: names of the model's outputs, in order.
    """

    def __init__(self, session: Any, lent: Sequence[Any] = (), fed: Feed | None = None) -> None:
        self._session = session
        self._lent = lent  # the runtime may read these arrays as long as it lives
        self._fed = fed or {}  # weights that are inputs
        self.outputs: tuple[str, ...] = tuple(o.name for o in session.get_outputs())

    def run(
        self, feed: Mapping[str, NDArray[np.generic]], names: Sequence[str] | None = None
    ) -> Feed:
        """Run one feed and return the named outputs (default: all) by name.

        Raises:
            ModelError: if onnxruntime cannot run the model on this feed.
        """
        wanted = list(self.outputs if names is None else names)
        try:
            values = self._session.run(wanted, {**self._fed, **feed}) if wanted else []
        except _ORT_ERRORS as e:
            raise ModelError(f"onnxruntime could not run the model: {_one_line(e)}") from e
        return dict(zip(wanted, values, strict=True))


def input_specs(model: onnx.ModelProto) -> dict[str, InputSpec]:
    """Name → type and shape of the inputs that a caller has to feed, in order.

    Raises:
        ModelError: if an input is not a tensor (a sequence, map or optional).
    """
    graph = Graph(model)
    specs = {}
    for name, info in graph.inputs.items():
        number = info.type.tensor_type.elem_type
        if not number:
            raise ModelError(
                f"Model input '{name}' is not a tensor but {info.type.WhichOneof('value')}; only "
                "models whose inputs are tensors can be calibrated",
                tensor=name,
            )
        dims = graph.shape(name)
        shape = None if dims is None else tuple(None if d is None or d < 0 else d for d in dims)
        specs[name] = InputSpec(onnx.helper.tensor_dtype_to_np_dtype(number), shape)
    return specs


def open_session(
    model: Model,
    *,
    optimize: bool = True,
    threads: int | None = None,
    optimized_model_path: str | os.PathLike[str] | None = None,
    outputs: Sequence[str] = (),
    added: onnx.GraphProto | None = None,
    lean: bool = False,
    few: bool = False,
) -> Session:
    """Load a model into onnxruntime on the CPU.

    Args:
        model: a ModelProto of any size, its bytes, or a path.
        optimize: run all of onnxruntime's graph optimizations, or none.
        threads: number of threads; None lets onnxruntime choose.
        optimized_model_path: where onnxruntime is to write the graph that it made.
        outputs: for a ModelProto: tensors that take the place of the model's outputs. What they do
            not need is not run.
        added: for a ModelProto: nodes and initializers that it gets besides its own.
        lean: for a ModelProto with above 1 GiB of weights: the runtime makes no copies of them.
            That takes a third of the memory off; small batches run two to three times as long,
            since kernels have to pack the weights each time.
        few: for a ModelProto that few samples are to be run through: no copies of large matrices,
            which take longer to make than they would save.

    Raises:
        ModelError: if onnxruntime cannot load the model.
    """
    options = _options(optimize, threads, optimized_model_path)
    if isinstance(model, onnx.ModelProto):
        return _open_proto(model, options, outputs, added, lean=lean, few=few)
    return _start(model if isinstance(model, bytes) else os.fspath(model), options)


def _options(
    optimize: bool, threads: int | None, optimized_model_path: str | os.PathLike[str] | None
) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    if threads is not None:
        options.intra_op_num_threads = threads
    if optimized_model_path is not None:
        options.optimized_model_filepath = os.fspath(optimized_model_path)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name",
            Path(optimized_model_path).name + ".data",
        )
    return options


def _open_proto(
    model: onnx.ModelProto,
    options: Any,
    outputs: Sequence[str],
    added: onnx.GraphProto | None,
    *,
    lean: bool,
    few: bool,
) -> Session:
    """Load a ModelProto of any size; ``outputs``, where given, take the place of its own."""
    more = () if added is None else added.initializer
    light, arrays = detached(model, _LENT_ABOVE, _LENDABLE, more)
    if added is not None:
        add_nodes(light, added.node)
    if outputs:
        reduce_to(light, outputs)
        left = {t.name for t in light.graph.initializer}
        arrays = {n: a for n, a in arrays.items() if n in left}
    fed: Feed = {}
    heavy = lean and sum(a.nbytes for a in arrays.values()) > _HEAVY
    if heavy or few:
        kept = {v.name for v in light.graph.output}
        large = {n: a for n, a in arrays.items() if a.nbytes > _FED_ABOVE and n not in kept}
        fed = {n: a for n, a in large.items() if heavy or is_large_matrix(a.shape, a.nbytes)}
        make_inputs(light, fed)
    lent = {n: ort.OrtValue.ortvalue_from_numpy(a) for n, a in arrays.items() if n not in fed}
    if lent:
        options.add_external_initializers(list(lent), list(lent.values()))
    return _start(light.SerializeToString(), options, list(lent.values()), fed)


def is_large_matrix(shape: Sequence[int], size: int) -> bool:
    """Whether a weight of so many bytes is left where it lies, with ``few`` samples to run."""
    return len(shape) == 2 and size > _FED_ABOVE  # a convolution's has another order inside


def _start(
    source: bytes | str, options: Any, lent: Sequence[Any] = (), fed: Feed | None = None
) -> Session:
    try:
        session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except _ORT_ERRORS as e:
        raise ModelError(_load_message(e)) from e
    return Session(session, lent, fed)


def _one_line(error: BaseException) -> str:
    """The runtime's message as one line, without its "[ONNXRuntimeError] : 1 : FAIL : "."""
    text = " ".join(str(error).split())
    if text.startswith("[ONNXRuntimeError]"):
        text = text.split(" : ", 3)[-1]
    return text or type(error).__name__


def _load_message(error: BaseException) -> str:
    text = _one_line(error)
    low = text.lower()
    hint = ""
    if "ir version" in low or "opset" in low:
        hint = (
            f". onnxruntime {RUNTIME_VERSION} is older than the model: upgrade onnxruntime, or "
            "export the model with a lower opset or IR version"
        )
    return f"onnxruntime could not load the model: {text}{hint}"


def run_sample(session: Session, feed: Feed, names: Sequence[str] | None, index: int) -> Feed:
    """One run of a session; a failure names the sample.

    Raises:
        CalibrationError: if the sample cannot be run; ``sample`` is its index.
    """
    try:
        return session.run(feed, names)
    except QdqError as e:
        raise CalibrationError(f"Sample {index}: {e}", sample=index) from e


def run(
    model: Model,
    feeds: Iterable[Feed],
    *,
    optimize: bool = True,
    threads: int | None = None,
) -> Iterator[Feed]:
    """Run the feeds and yield the model's outputs by name, one sample at a time.

    Raises:
        ModelError: if onnxruntime cannot load the model.
        CalibrationError: if a sample cannot be run; ``sample`` is its index.
    """
    session = open_session(model, optimize=optimize, threads=threads)
    return (run_sample(session, feed, None, i) for i, feed in enumerate(feeds))


def optimized_op_counts(model: Model) -> dict[str, int]:
    """Operator type → number of nodes in the graph that onnxruntime really runs.

    All optimizations are on; nodes of subgraphs are counted too.

    Raises:
        ModelError: if onnxruntime cannot load the model.
    """
    with tempfile.TemporaryDirectory(prefix="qdq-") as folder:
        path = Path(folder) / "optimized.onnx"
        open_session(model, optimized_model_path=path)
        optimized = onnx.load(path, load_external_data=False).graph
    counts = Counter(n.op_type for n in all_nodes(optimized.node))
    return dict(sorted(counts.items()))
