"""``extra_options``: each one honoured, already so, or refused with what to use instead."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import onnx

from qdq.checks import is_whole
from qdq.compat.overrides import read_overrides
from qdq.compat.types import flag, nearest, number
from qdq.errors import ConfigError
from qdq.scheme import Rule

__all__ = ["KNOWN", "Options", "names_of", "read_options"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the extra options ask for.

    Attributes:
        symmetric_activations: ranges of activations are around 0.
        symmetric_weights: ranges of weights are around 0; None: as their type goes.
        everything: quantize every operator that has an integer form, whether it pays or not.
        constant_matmuls: leave a MatMul of two activations float.
        fit_weights: raise weight scales so that biases and sums fit into int32.
        percentile: of the values that must not saturate; None: the default.
        smooth: move outlier channels into the weights; None: the default.
        stride: samples between two calls of the reader's ``set_range``.
        rules: about single tensors.
        axes: weight → the channel axis that was asked for.
    """

    symmetric_activations: bool = False
    symmetric_weights: bool | None = None
    everything: bool = False
    constant_matmuls: bool = False
    fit_weights: bool = True
    percentile: float | None = None
    smooth: bool | None = None
    stride: int | None = None
    rules: tuple[Rule, ...] = ()
    axes: Mapping[str, int] = field(default_factory=dict)


Reader = Callable[[Options, str, Any], Options]


def read_options(extra_options: object) -> Options:
    """Read ``extra_options``.

    Raises:
        ConfigError: an unknown option (with the nearest name), a value of the wrong kind, or an
            option that qdq does not have (with what to use instead).
    """
    if extra_options is None:
        return Options()
    if not isinstance(extra_options, Mapping):
        raise ConfigError(f"extra_options wants a dict; found {extra_options!r}")
    options = Options()
    for name, value in extra_options.items():
        if name in _REFUSED:
            unwanted, instead = _REFUSED[name]
            if bool(value) == unwanted:
                raise ConfigError(f"extra_options[{name!r}]={value!r}: {instead}")
        elif name in _READERS:
            options = _READERS[name](options, f"extra_options[{name!r}]", value)
        else:
            raise ConfigError(f"unknown extra option {name!r}{nearest(str(name), sorted(KNOWN))}")
    _check_alpha(extra_options)
    return options


def names_of(value: object, argument: str) -> tuple[str, ...]:
    """A list of names as a tuple, each once; None is the empty list.

    Raises:
        ConfigError: something else, as one bare string.
    """
    if value is None:
        return ()
    if not isinstance(value, list | tuple | set | frozenset) or not all(
        isinstance(v, str) and v for v in value
    ):
        raise ConfigError(f"{argument} wants a list of names, none empty; found {value!r}")
    return tuple(dict.fromkeys(sorted(value) if isinstance(value, set | frozenset) else value))


# option → (the truth value that asks for what qdq has not, what to use instead)
_REFUSED: Mapping[str, tuple[bool, str]] = {
    "ActivationRestrictedAsymmetric": (
        True,
        "zero points follow from the ranges here; use ActivationSymmetric for 128 throughout, or "
        "set the ranges of tensors with TensorQuantOverrides ('rmin', 'rmax')",
    ),
    "AddQDQPairToWeight": (
        True,
        "weights are stored as integers here; leave it out, the values that the model computes "
        "with are the same",
    ),
    "BlockSize": (
        True,
        "weights have one scale per output channel or one for all, not one per block; leave it out",
    ),
    "CalibMovingAverage": (
        True,
        "ranges do not depend on the order of the samples here; against outliers leave "
        "calibrate_method out (least squared error) or use CalibrationMethod.Percentile",
    ),
    "DedicatedQDQPair": (
        True,
        "a tensor has one pair, since onnxruntime merges copies when it loads a model; leave it "
        "out",
    ),
    "EnableSubgraph": (True, "nodes inside of If, Loop and Scan stay float; leave it out"),
    "MinimumRealRange": (
        True,
        "a range without extent gets scale 1 here, others stay as they are; widen those of single "
        "tensors with TensorQuantOverrides ('rmin', 'rmax')",
    ),
    "QuantizeBias": (
        False,
        "biases are int32 here, and onnxruntime quantizes a float bias itself when it loads a "
        "model; leave it out",
    ),
    "UseQDQContribOps": (
        True,
        "models have opset 21, whose own QuantizeLinear and DequantizeLinear have all types that "
        "qdq has; leave it out",
    ),
    "extra.Sigmoid.nnapi": (True, "it belongs to QuantFormat.QOperator; leave it out"),
}


def _switch(field: str, *, inverted: bool = False) -> Reader:
    """A True or False that one field of the options holds."""

    def read(options: Options, argument: str, value: Any) -> Options:
        changed: dict[str, Any] = {field: flag(value, argument) != inverted}
        return replace(options, **changed)

    return read


def _symmetric_activations(options: Options, argument: str, value: Any) -> Options:
    """Of two options that do the same; either will do."""
    wanted = flag(value, argument) or options.symmetric_activations
    return replace(options, symmetric_activations=wanted)


def _symmetric_weights(options: Options, argument: str, value: Any) -> Options:
    return replace(options, symmetric_weights=None if value is None else flag(value, argument))


def _percentile(options: Options, argument: str, value: Any) -> Options:
    return replace(options, percentile=None if value is None else number(value, argument))


def _stride(options: Options, argument: str, value: Any) -> Options:
    if value is not None and (not is_whole(value) or value < 0):
        raise ConfigError(f"{argument} wants a number of samples or None; found {value!r}")
    return replace(options, stride=value or None)


def _overrides(options: Options, argument: str, value: Any) -> Options:
    rules, axes = read_overrides({} if value is None else value)
    return replace(options, rules=rules, axes=axes)


def _float_output(options: Options, argument: str, value: Any) -> Options:
    """What kernels that can hand out float do anyway, unless an integer node reads the result."""
    others = [op for op in names_of(value, argument) if op not in ("Gemm", "MatMul")]
    if others:
        raise ConfigError(
            f"{argument}: the integer kernel of {others[0]} cannot hand out float; leave such "
            "nodes float with nodes_to_exclude. Those of Gemm and MatMul do so on their own"
        )
    return options


_AXES = {"Conv": (0,), "ConvTranspose": (1,), "Gemm": (0, 1), "MatMul": (1, -1)}


def _check_alpha(extra_options: Mapping[Any, Any]) -> None:
    """Only onnxruntime's default: that asks for nothing in particular."""
    alpha = extra_options.get("SmoothQuantAlpha")
    if alpha in (None, 0.5) or not extra_options.get("SmoothQuant", True):
        return
    raise ConfigError(
        f"extra_options['SmoothQuantAlpha']={alpha!r}: alpha is chosen for each tensor, the one "
        "with the least expected error; leave it out"
    )


def _axes(options: Options, argument: str, value: Any) -> Options:
    """Only to name the axis of the output channels, which the operator decides here."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{argument} wants a dict of operator type to axis; found {value!r}")
    for op, axis in value.items():
        if axis not in _AXES.get(op, ()):
            raise ConfigError(
                f"{argument}: {op!r} with axis {axis!r}; scales belong to the output channels of "
                f"{', '.join(_AXES)}, and the axis follows from the operator: leave it out"
            )
    return options


def _already(check: Callable[[Any, str], object]) -> Reader:
    """An option for what qdq always does, or that only adds to another one."""

    def read(options: Options, argument: str, value: Any) -> Options:
        if value is not None:
            check(value, argument)
        return options

    return read


def _float_type(value: Any, argument: str) -> None:
    if value != onnx.TensorProto.FLOAT:
        raise ConfigError(f"{argument}: a tensor of unknown type counts as float32; leave it out")


_READERS: Mapping[str, Reader] = {
    "ActivationSymmetric": _symmetric_activations,
    "CalibMaxIntermediateOutputs": _already(number),
    "CalibMovingAverageConstant": _already(number),
    "CalibPercentile": _percentile,
    "CalibStridedMinMax": _stride,
    "CalibTensorRangeSymmetric": _symmetric_activations,
    "DefaultTensorType": _already(_float_type),
    "ForceQuantizeNoInputCheck": _switch("everything"),
    "MatMulConstBOnly": _switch("constant_matmuls"),
    "OpTypesToExcludeOutputQuantization": _float_output,
    "QDQDisableWeightAdjustForInt32Bias": _switch("fit_weights", inverted=True),
    "QDQKeepRemovableActivations": _already(flag),
    "QDQOpTypePerChannelSupportToAxis": _axes,
    "SmoothQuant": _switch("smooth"),
    "SmoothQuantAlpha": _already(number),
    "SmoothQuantFolding": _already(flag),
    "TensorQuantOverrides": _overrides,
    "WeightSymmetric": _symmetric_weights,
}

KNOWN = frozenset(_REFUSED) | frozenset(_READERS)
"""Every extra option of onnxruntime.quantization 1.32."""
