"""quantize_static: the arguments of onnxruntime's, read as a recipe of qdq's."""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from qdq.api import collect_statistics, run
from qdq.calibrate import MSE, Calibrator, Entropy, MinMax, Percentile
from qdq.compat.options import Options, names_of, read_options
from qdq.compat.overrides import check_axes
from qdq.compat.types import (
    UNSET,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    Unset,
    flag,
    int_type,
    member,
    nearest,
)
from qdq.data import pull
from qdq.errors import ConfigError
from qdq.graph import Graph
from qdq.modelio import load, save
from qdq.outputs import check_output
from qdq.prepare import prepare
from qdq.scheme import Rule, Scheme
from qdq.spec import INT8, UINT8, IntType, QuantSpec
from qdq.statistics import Statistics
from qdq.steps import DEFAULT_STEPS, FitWeightsToBias
from qdq.targets import ORT_CPU, ORT_CPU_NO_VNNI, PORTABLE, Target

__all__ = ["PathLike", "is_path", "quantize_static"]

log: logging.Logger = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]
CPU = "CPUExecutionProvider"
CONTRIB = ("EmbedLayerNormalization",)  # what onnxruntime's list has beside ONNX's own operators


def quantize_static(
    model_input: Any,
    model_output: PathLike,
    calibration_data_reader: Any = None,
    quant_format: Any = QuantFormat.QDQ,
    op_types_to_quantize: Sequence[str] | None = None,
    per_channel: bool | Unset = UNSET,
    reduce_range: bool = False,
    activation_type: QuantType | Unset = UNSET,
    weight_type: QuantType | Unset = UNSET,
    nodes_to_quantize: Sequence[str] | None = None,
    nodes_to_exclude: Sequence[str] | None = None,
    use_external_data_format: bool = False,
    calibrate_method: CalibrationMethod | Unset = UNSET,
    calibration_providers: Sequence[Any] | None = None,
    extra_options: dict[str, Any] | None = None,
    calibration_cache_path: PathLike | None = None,
) -> None:
    """Quantize a float model to QDQ form and write it.

    An argument that is passed is honoured or refused. One that is not passed has qdq's default
    where that is better than onnxruntime's: uint8 activations, one weight scale per output
    channel, ranges of the least squared error, smoothing, equalization across layers.

    Args:
        model_input: path or ModelProto; never changed.
        model_output: the file to write, complete or not at all.
        calibration_data_reader: an object with ``get_next()``, or what ``qdq.quantize`` takes.
        quant_format: ``QuantFormat.QDQ``.
        op_types_to_quantize: quantize nodes of these types at most.
        per_channel: one weight scale per output channel; default True.
        reduce_range: keep 16-bit sums of products from saturating (x86 without VNNI).
        activation_type: ``QUInt8`` (default), ``QInt8``; 16 bits for the portable target.
        weight_type: ``QInt8`` (default), ``QUInt8``; 16 bits for the portable target.
        nodes_to_quantize: names of the nodes to quantize at most.
        nodes_to_exclude: names of nodes that stay float.
        use_external_data_format: write large weights to ``<name>.data``.
        calibrate_method: default: least squared error (``qdq.MSE``).
        calibration_providers: None, or a list that has the CPU provider.
        extra_options: see :doc:`/how-to/from-onnxruntime`.
        calibration_cache_path: statistics of the calibration; read if the file exists, else
            written. It is not onnxruntime's format.

    Raises:
        ConfigError: an argument or option that is unknown, of the wrong kind, or that qdq does
            not have, with what to use instead.
        QdqError: see ``qdq.quantize``.
    """
    if member(QuantFormat, quant_format, "quant_format") is not QuantFormat.QDQ:
        raise ConfigError(
            "quant_format=QOperator: only QDQ models are made; leave it out, onnxruntime turns "
            "them into the same operators when it loads them"
        )
    _check_providers(calibration_providers)
    external = flag(use_external_data_format, "use_external_data_format")
    kept = () if calibration_cache_path is None else ((Path(calibration_cache_path), "cache"),)
    check_output(Path(model_output), Path(model_input) if is_path(model_input) else None, kept)
    options = read_options(extra_options)
    types = _types(activation_type, weight_type)
    channels = True if per_channel is UNSET else flag(per_channel, "per_channel")
    rules = _rules(model_input, op_types_to_quantize, nodes_to_quantize, nodes_to_exclude, options)
    recipe = _Recipe(
        scheme=_scheme(types, channels, rules, options),
        target=_target(types, flag(reduce_range, "reduce_range"), options),
        calibrator=_calibrator(calibrate_method, options),
    )
    if not options.fit_weights:
        steps = tuple(s for s in DEFAULT_STEPS if not isinstance(s, FitWeightsToBias))
        recipe = replace(recipe, steps=steps)
    save(
        recipe.run(model_input, calibration_data_reader, calibration_cache_path, options.stride),
        model_output,
        external_data=external,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    """The arguments of ``qdq.quantize`` that those of ``quantize_static`` come to."""

    scheme: Scheme
    target: Target
    calibrator: Calibrator[Any]
    steps: tuple[Any, ...] = DEFAULT_STEPS

    def run(
        self, model: Any, reader: Any, cache: PathLike | None, stride: int | None
    ) -> onnx.ModelProto:
        """Quantize from samples, or from the statistics in the cache."""
        made: dict[str, Any] = {
            "scheme": self.scheme,
            "target": self.target,
            "calibrator": self.calibrator,
            "steps": self.steps,
        }
        cached = cache is not None and Path(cache).is_file()
        if reader is None and not cached:
            raise ConfigError(
                "give calibration_data_reader, or calibration_cache_path with an existing file"
            )
        samples = None if cached else _strided(reader, stride)
        if cache is None:
            return run(model, samples, **made).model
        path = Path(cache)
        if path.exists() and not cached:
            raise ConfigError(f"calibration_cache_path '{path}' is no file")
        if cached:
            statistics = Statistics.load(path)
        else:
            statistics = collect_statistics(model, samples, **made)
            path.parent.mkdir(parents=True, exist_ok=True)
            statistics.save(path)
        return run(model, statistics=statistics, **made).model


def is_path(model: object) -> bool:
    """Whether a model was given as a path."""
    return isinstance(model, str | os.PathLike)


def _check_providers(providers: Sequence[Any] | None) -> None:
    names = [p[0] if isinstance(p, tuple) else p for p in providers or [CPU]]
    if CPU not in names:
        raise ConfigError(
            f"calibration_providers={providers!r}: calibration runs on the CPU, in many processes "
            "with qdq.quantize(executor=...); leave it out"
        )
    if names != [CPU]:
        log.warning("calibration_providers=%r: calibration runs on the CPU", providers)


def _types(activation: object, weight: object) -> tuple[IntType, IntType]:
    x = UINT8 if activation is UNSET else int_type(activation, "activation_type")
    w = INT8 if weight is UNSET else int_type(weight, "weight_type")
    if x == INT8 and w == UINT8:
        raise ConfigError(
            "activation_type=QInt8 with weight_type=QUInt8: no kernel multiplies these; leave "
            "both out for uint8 activations and int8 weights"
        )
    return x, w


def _scheme(
    types: tuple[IntType, IntType], channels: bool, rules: tuple[Rule, ...], options: Options
) -> Scheme:
    x, w = types
    symmetric = w.signed if options.symmetric_weights is None else options.symmetric_weights
    return Scheme(
        activation=QuantSpec(dtype=x, symmetric=options.symmetric_activations),
        weight=QuantSpec(dtype=w, symmetric=symmetric),
        per_channel=channels,
        smooth=options.smooth is not False,
        rules=rules,
    )


def _target(types: tuple[IntType, IntType], reduced: bool, options: Options) -> Target:
    """The portable target where onnxruntime's CPU provider would refuse what was asked for."""
    chosen = {*types, *(r.dtype for r in options.rules if r.dtype is not None)}
    wide = any(t.bits > 8 for t in chosen)
    if reduced and (types != (UINT8, INT8) or options.symmetric_weights is False):
        raise ConfigError(
            f"reduce_range with {types[0]} activations and {types[1]} weights: only products of "
            "uint8 by symmetric int8 saturate; leave out reduce_range, or activation_type, "
            "weight_type and WeightSymmetric"
        )
    if wide or options.everything:
        if options.smooth:
            raise ConfigError(
                "extra_options['SmoothQuant']=True with 16 bits or ForceQuantizeNoInputCheck: the "
                "target for these quantizes divisions, so nothing is smoothed; leave either out"
            )
        return replace(PORTABLE, saturates=reduced)
    return ORT_CPU_NO_VNNI if reduced else ORT_CPU


_METHODS: dict[CalibrationMethod, Calibrator[Any]] = {
    CalibrationMethod.MinMax: MinMax(),
    CalibrationMethod.Entropy: Entropy(),
    CalibrationMethod.Percentile: Percentile(),
}


def _calibrator(method: object, options: Options) -> Calibrator[Any]:
    kind = None if method is UNSET else member(CalibrationMethod, method, "calibrate_method")
    if options.percentile is not None:
        if kind is not CalibrationMethod.Percentile:
            raise ConfigError(
                "extra_options['CalibPercentile'] wants "
                "calibrate_method=CalibrationMethod.Percentile"
            )
        return Percentile(percentile=options.percentile)
    if kind is None:
        return MSE()
    if kind not in _METHODS:
        raise ConfigError(
            f"calibrate_method={kind.name} is for 8-bit floats, which are not here; leave it out "
            "(least squared error), or use MinMax, Entropy or Percentile"
        )
    return _METHODS[kind]


def _rules(
    model: Any, op_types: object, only: object, exclude: object, options: Options
) -> tuple[Rule, ...]:
    """What stays float, and the rules about tensors."""
    types = names_of(op_types, "op_types_to_quantize")
    known = {s.name for s in onnx.defs.get_all_schemas()}.union(CONTRIB)
    for op in types:
        if op not in known:
            raise ConfigError(f"op_types_to_quantize: no operator {op!r}{nearest(op, known)}")
    names = names_of(only, "nodes_to_quantize")
    rules = [Rule(nodes=re.escape(n), op_types=types, only=True) for n in names]
    if types and not names:
        rules = [Rule(op_types=types, only=True)]
    excluded = names_of(exclude, "nodes_to_exclude")
    rules += [Rule(nodes=re.escape(n), keep_float=True) for n in excluded]
    if options.axes or options.constant_matmuls:
        source = load(model)
        check_axes(Graph(source), options.axes)
        if options.constant_matmuls:
            rules += _dynamic_matmuls(Graph(prepare(source)))
    return (*rules, *options.rules)


def _dynamic_matmuls(graph: Graph) -> Iterator[Rule]:
    for node in graph.nodes:
        if node.op_type == "MatMul" and node.input[1] not in graph.constants:
            yield Rule(nodes=re.escape(node.name), keep_float=True)


def _strided(reader: Any, stride: int | None) -> Any:
    """The samples; with a stride, of a reader that loads them range by range."""
    if stride is None:
        return reader
    try:
        total = len(reader)
    except (TypeError, NotImplementedError):
        total = None
    if total is None or not callable(getattr(reader, "set_range", None)):
        raise ConfigError(
            "CalibStridedMinMax wants a reader with __len__ and set_range; leave it out, memory "
            "does not grow with the number of samples"
        )
    return _ranges(reader, total, stride)


def _ranges(reader: Any, total: int, stride: int) -> Iterator[Any]:
    for start in range(0, total, stride):
        reader.set_range(start_index=start, end_index=min(start + stride, total))
        yield from pull(reader.get_next)
