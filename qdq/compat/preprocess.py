"""quant_pre_process: nothing has to be done before quantization, so little is."""

from pathlib import Path
from typing import Any

from qdq.compat.static import PathLike, is_path
from qdq.compat.types import flag
from qdq.errors import ConfigError
from qdq.modelio import load, save
from qdq.outputs import check_output
from qdq.prepare.opset import infer_types

__all__ = ["quant_pre_process"]


def quant_pre_process(
    input_model: Any = None,
    output_model_path: PathLike | None = None,
    skip_optimization: bool = False,
    skip_onnx_shape: bool = False,
    skip_symbolic_shape: bool = False,
    auto_merge: bool = False,
    int_max: int = 2**31 - 1,
    guess_output_rank: bool = False,
    verbose: int = 0,
    save_as_external_data: bool = False,
    all_tensors_to_one_file: bool = False,
    external_data_location: str | None = None,
    external_data_size_threshold: int = 1024,
    *,
    input_model_path: Any = None,
) -> None:
    """Check a float model, note the shapes of its tensors, and write it.

    The nodes and weights stay what they are, so that lists of node names fit the result too:
    folding and fusing is part of ``quantize_static``. Arguments about optimization and symbolic
    shapes are taken, and there is nothing for them to do.

    Args:
        input_model: path or ModelProto; never changed.
        output_model_path: the file to write, complete or not at all.
        skip_optimization: nothing is optimized here.
        skip_onnx_shape: do not note shapes.
        skip_symbolic_shape: there is no symbolic inference.
        auto_merge: of symbolic inference.
        int_max: of symbolic inference.
        guess_output_rank: of symbolic inference.
        verbose: of symbolic inference; see the logger ``qdq``.
        save_as_external_data: write large weights to ``<name>.data``.
        all_tensors_to_one_file: always so.
        external_data_location: ``<name>.data`` or None.
        external_data_size_threshold: 1024.
        input_model_path: an old name of input_model.

    Raises:
        ConfigError: no input or output, or another place or threshold for external data.
        ModelError: the model cannot be read, is invalid or quantized already.
    """
    source = input_model_path if input_model is None else input_model
    if source is None or output_model_path is None:
        raise ConfigError("quant_pre_process wants input_model and output_model_path")
    path = Path(output_model_path)
    check_output(path, Path(source) if is_path(source) else None)
    external = flag(save_as_external_data, "save_as_external_data")
    if external and external_data_location not in (None, f"{path.name}.data"):
        raise ConfigError(
            f"external_data_location={external_data_location!r}: external data goes to "
            f"'{path.name}.data', beside the model; leave it out"
        )
    if external and external_data_size_threshold != 1024:
        raise ConfigError(
            f"external_data_size_threshold={external_data_size_threshold!r}: weights above 1024 "
            "bytes are external data; leave it out"
        )
    model = load(source)
    if not flag(skip_onnx_shape, "skip_onnx_shape"):
        known = {v.name for v in (*model.graph.value_info, *model.graph.output)}
        types = infer_types(model)
        for name in (o for n in model.graph.node for o in n.output):
            if name in types and name not in known:
                model.graph.value_info.add(name=name).type.CopyFrom(types[name])
    save(model, path, external_data=external)
