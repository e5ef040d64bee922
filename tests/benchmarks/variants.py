"""Other calls of qdq as columns of the table: ``--other fastest=variants:fastest``."""

import onnx

import qdq


def fastest(model_path, feeds, out_path):
    """No price on accuracy."""
    onnx.save(qdq.quantize(str(model_path), feeds, worth=0.0), out_path)


def accurate(model_path, feeds, out_path):
    """Most of what costs accuracy stays float."""
    onnx.save(qdq.quantize(str(model_path), feeds, worth=45.0), out_path)


def measured(model_path, feeds, out_path):
    """Placement by the harm to the outputs."""
    onnx.save(qdq.quantize(str(model_path), feeds, measured=True), out_path)
