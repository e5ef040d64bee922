"""quantize() with a StaticQuantConfig: the arguments of quantize_static as one object."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import onnx

from qdq.compat.options import names_of
from qdq.compat.static import PathLike, quantize_static
from qdq.compat.types import UNSET, CalibrationMethod, QuantFormat, QuantType, Unset, nearest
from qdq.errors import ConfigError
from qdq.modelio import load

Chooser = Callable[[onnx.ModelProto, onnx.NodeProto], bool]

__all__ = ["StaticQuantConfig", "get_qdq_config", "quantize"]


@dataclass
class StaticQuantConfig:
    """The arguments of ``quantize_static`` but the models."""

    calibration_data_reader: Any
    calibrate_method: CalibrationMethod | Unset = UNSET
    quant_format: Any = QuantFormat.QDQ
    activation_type: QuantType | Unset = UNSET
    weight_type: QuantType | Unset = UNSET
    op_types_to_quantize: Sequence[str] | None = None
    nodes_to_quantize: Sequence[str] | None = None
    nodes_to_exclude: Sequence[str] | None = None
    per_channel: bool | Unset = UNSET
    reduce_range: bool = False
    use_external_data_format: bool = False
    calibration_providers: Sequence[Any] | None = None
    extra_options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.extra_options = self.extra_options or {}  # scripts add to it


def quantize(model_input: Any, model_output: PathLike, quant_config: StaticQuantConfig) -> None:
    """``quantize_static`` with the arguments of a config.

    Raises:
        ConfigError: another kind of config; else as ``quantize_static``.
    """
    if not isinstance(quant_config, StaticQuantConfig):
        raise ConfigError(
            f"quant_config is a {type(quant_config).__name__} of {type(quant_config).__module__}; "
            "wants a StaticQuantConfig of qdq.compat: static quantization is all that there is"
        )
    given = {f.name: getattr(quant_config, f.name) for f in fields(quant_config)}
    quantize_static(model_input, model_output, **given)


_CALIBRATE_ARGS = {
    "symmetric": "CalibTensorRangeSymmetric",
    "moving_average": "CalibMovingAverage",
    "averaging_constant": "CalibMovingAverageConstant",
    "max_intermediate_outputs": "CalibMaxIntermediateOutputs",
    "percentile": "CalibPercentile",
}


def get_qdq_config(
    model_input: Any,
    calibration_data_reader: Any,
    calibrate_method: CalibrationMethod | Unset = UNSET,
    calibrate_args: Mapping[str, Any] | None = None,
    activation_type: QuantType | Unset = UNSET,
    weight_type: QuantType | Unset = UNSET,
    activation_symmetric: bool = False,
    weight_symmetric: bool | None = None,
    per_channel: bool | Unset = UNSET,
    reduce_range: bool = False,
    keep_removable_activations: bool = False,
    min_real_range: float | None = None,
    tensor_quant_overrides: Mapping[str, Any] | None = None,
    calibration_providers: Sequence[Any] | None = None,
    op_types_to_quantize: Sequence[str] | None = None,
    nodes_to_exclude: Sequence[str] | Chooser | None = None,
    extra_options: Mapping[str, Any] | None = None,
) -> StaticQuantConfig:
    """A config that quantizes all that has an integer form, for runtimes other than the CPU's.

    The arguments are those of ``quantize_static`` and of its extra options, which win over
    them. ``nodes_to_exclude`` may be a function of the model and a node.

    Raises:
        ConfigError: an unknown key in calibrate_args; the rest is checked by ``quantize``.
    """
    options: dict[str, Any] = {
        "ActivationSymmetric": activation_symmetric,
        "WeightSymmetric": weight_symmetric,
        "QDQKeepRemovableActivations": keep_removable_activations,
        "MinimumRealRange": min_real_range,
        "TensorQuantOverrides": tensor_quant_overrides,
        "ForceQuantizeNoInputCheck": True,
    }
    for key, value in (calibrate_args or {}).items():
        if key not in _CALIBRATE_ARGS:
            raise ConfigError(f"calibrate_args: unknown {key!r}{nearest(key, _CALIBRATE_ARGS)}")
        options[_CALIBRATE_ARGS[key]] = value
    if callable(nodes_to_exclude):
        excluded = _chosen(nodes_to_exclude, load(model_input))
    else:
        excluded = list(names_of(nodes_to_exclude, "nodes_to_exclude"))
    return StaticQuantConfig(
        calibration_data_reader,
        calibrate_method=calibrate_method,
        activation_type=activation_type,
        weight_type=weight_type,
        op_types_to_quantize=op_types_to_quantize,
        nodes_to_exclude=excluded,
        per_channel=per_channel,
        reduce_range=reduce_range,
        calibration_providers=calibration_providers,
        extra_options={**options, **(extra_options or {})},
    )


def _chosen(chooser: Chooser, model: onnx.ModelProto) -> list[str]:
    """Names of the nodes that a function chooses."""
    nodes = [n for n in model.graph.node if chooser(model, n)]
    named = Counter(n.name for n in model.graph.node)
    for node in nodes:
        if not node.name or named[node.name] > 1:
            lacks = (
                "no name" if not node.name else f"the name '{node.name}' of others, too, and none"
            )
            raise ConfigError(
                f"nodes_to_exclude chose the {node.op_type} that makes '{node.output[0]}', which "
                f"has {lacks} to exclude it by; give the model's nodes names of their own"
            )
    return [n.name for n in nodes]
