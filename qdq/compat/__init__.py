"""The static QDQ path of onnxruntime.quantization: change the import, keep the script.

::

    from qdq.compat import CalibrationDataReader, QuantType, quantize_static

Arguments that a script passes are honoured, or refused with what to use instead; those that it
leaves out have qdq's defaults. New code is better off with ``qdq.quantize``.
"""

from typing import NoReturn

from qdq.compat.config import StaticQuantConfig, get_qdq_config, quantize
from qdq.compat.preprocess import quant_pre_process
from qdq.compat.static import quantize_static
from qdq.compat.types import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType

__all__ = [
    "CalibrationDataReader",
    "CalibrationMethod",
    "QuantFormat",
    "QuantType",
    "StaticQuantConfig",
    "get_qdq_config",
    "quant_pre_process",
    "quantize",
    "quantize_static",
]

_DYNAMIC = "qdq quantizes statically; import it from onnxruntime.quantization as before"
_RANGES = "qdq.api.collect_statistics gives qdq.statistics.Statistics, which save and load"
_OBJECT = "there is no quantizer object; see qdq.api.run"
_ELSEWHERE = {
    "CalibraterBase": "write a qdq.calibrate.Calibrator",
    "CudaQuantizer": _DYNAMIC,
    "DynamicQuantConfig": _DYNAMIC,
    "MinMaxCalibrater": "use qdq.MinMax",
    "QDQQuantizer": _OBJECT,
    "QuantizationMode": _OBJECT,
    "TensorData": _RANGES,
    "TensorsData": _RANGES,
    "create_calibrator": _RANGES,
    "load_tensors_data": _RANGES,
    "quantize_dynamic": _DYNAMIC,
    "save_tensors_data": _RANGES,
    "write_calibration_table": _RANGES,
}


def __getattr__(name: str) -> NoReturn:
    """Say what to use instead of a name of onnxruntime.quantization that is not here."""
    if name in _ELSEWHERE:
        raise ImportError(f"qdq.compat has no {name}: {_ELSEWHERE[name]}", name=__name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
